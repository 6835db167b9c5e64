"""What is trained is what is served: likelihoods against the decoding path, resumption, windows, and a toy to learn."""

import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from semantic_ids.catalog import Catalog
from semantic_ids.codes import SidVocabulary
from semantic_ids.decoding.beam import constrained_beam
from semantic_ids.decoding.tree_decoder import TreeDecoder
from semantic_ids.filters import ItemFilter
from semantic_ids.prompt import (
    CHAT_VERSION,
    COMPACT_VERSION,
    CONTINUOUS_VERSION,
    STEPWISE_VERSION,
    THINKING_VERSION,
    History,
    PromptRenderer,
    window_start,
)
from semantic_ids.trie import ROOT
from tests.training.conftest import Cli, Run, command, environment, make_catalog
from training.distillation import LIST_LENGTH, TeacherLists
from training.examples import Examples, TargetSplit, epoch_batches, prompt_windows
from training.generator import MODEL, TrainedModel, _dropped, build_model
from training.legal_softmax import child_log_probs
from training.likelihood import hidden_states, item_log_likelihood, scores_of_targets
from training.sequences import Sequences
from training.sft import CHECKPOINT, SftSummary, run
from training.sft_config import SftConfig
from training.stage import StageError, StageFolder

CATALOG = make_catalog([[a, b, c] for a in range(3) for b in range(2) for c in ((0, 1, 3), (2, 2))[b]], codebook_size=4)
"""15 items; under [a, 1] a pair shares its SID."""
NUM_ITEMS = len(CATALOG)
MAX_HISTORY = 6
CYCLE = Sequences.of([[(start + step) % NUM_ITEMS for step in range(8)] for start in range(NUM_ITEMS)] * 4)


def config_of(**settings: object) -> SftConfig:
    tiny = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "intermediate_size": 64, "max_history": MAX_HISTORY}
    return SftConfig.model_validate({**tiny, "batch_size": 16, "threads": 1, "max_epochs": 2, **settings})


def next_in_cycle(histories: Sequences) -> TargetSplit:
    return TargetSplit(histories, np.array([(items[-1] + 1) % NUM_ITEMS for items in histories], np.int32))


VALIDATION = next_in_cycle(CYCLE.select(np.arange(NUM_ITEMS)).without_last(3))


def train(path: Path, train_on: Sequences = CYCLE, validation: TargetSplit = VALIDATION, **settings: object):
    config = config_of(**settings)
    folder = StageFolder(path, config, {})
    summary = run(config, CATALOG, train_on, validation, folder)
    assert SftSummary.model_validate(folder.finished()) == summary
    return summary


def decoded_scores(
    decoder: TreeDecoder, renderer: PromptRenderer, split: TargetSplit, catalog: Catalog = CATALOG
) -> npt.NDArray[np.float64]:
    """Each target's score as serving computes it, one request at a time."""
    scores = []
    for history, target in zip(split.histories, split.targets, strict=True):
        shown = history[window_start(len(history), renderer.spec.max_history) :]
        state = decoder.prefill([renderer.render(History.of(catalog, shown)).token_ids])
        only = ItemFilter.of(len(catalog), allow=np.array([target], np.int64))
        found = constrained_beam(decoder, catalog.trie, state, [only], [1], forced=renderer.forced)
        scores.append(float(found[0].scores[0]))
    return np.array(scores)


def random_split(seed: int = 0, count: int = 12) -> TargetSplit:
    """Histories of 0 to 3·max_history items, so that prompts are cut."""
    rng = np.random.default_rng(seed)
    histories = [rng.integers(0, NUM_ITEMS, length).tolist() for length in rng.integers(0, 3 * MAX_HISTORY, count)]
    return TargetSplit(Sequences.of(histories), rng.integers(0, NUM_ITEMS, count).astype(np.int32))


STEPS: dict[str, dict[str, object]] = {
    "compact": {},
    "steps": {"steps": (1, 1, 1)},
    "early_steps": {"steps": (2, 0, 1)},
    "continuous": {"steps": (1, 1, 1), "step_form": "continuous"},
    "continuous_early_steps": {"steps": (2, 0, 1), "step_form": "continuous"},
    "continuous_late_steps": {"steps": (0, 1, 2), "step_form": "continuous"},
}


@pytest.fixture(
    params=[
        "compact llama",
        "compact qwen3",
        "steps llama",
        "early_steps qwen3",
        "continuous llama",
        "continuous_early_steps qwen3",
        "continuous_late_steps llama",
        "chat llama",
        "chat qwen3",
        "chat phi",
        "thinking llama",
    ]
)
def built(
    request: pytest.FixtureRequest, pretrained: dict[str, Path], tmp_path: Path
) -> tuple[PreTrainedModel, SidVocabulary, PromptRenderer]:
    """A model of either prompt kind, ready to score, with weights that tell items apart."""
    kind, architecture = request.param.split()
    if kind in STEPS:
        config = config_of(architecture=architecture, **STEPS[kind])
    else:
        config = config_of(base_model=str(pretrained[architecture]), thinking=kind == "thinking")
    model, vocabulary, renderer = build_model(config, CATALOG, tmp_path)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 or name.endswith("lm_head.bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    return model.train(False), vocabulary, renderer


@torch.inference_mode()
def test_the_trained_likelihood_is_the_served_score(built):
    model, vocabulary, renderer = built
    split = random_split()
    windows = prompt_windows(split.histories, split.targets, MAX_HISTORY)
    batch = Examples(CATALOG, vocabulary, renderer).batch_of_last(windows)
    trained = item_log_likelihood(model, CATALOG, vocabulary, batch).numpy()
    served = decoded_scores(TreeDecoder(model, vocabulary, fed_back=renderer.fed_back), renderer, split)
    assert np.ptp(served) > 0.5
    assert trained == pytest.approx(served, abs=1e-4)


@torch.inference_mode()
def test_every_position_of_a_training_row_has_the_score_of_its_own_prompt(built):
    """A chat row asks for its history's items inside the history; only its last item is behind a question."""
    model, vocabulary, renderer = built
    window = np.random.default_rng(2).integers(0, NUM_ITEMS, MAX_HISTORY).astype(np.int32)
    batch = Examples(CATALOG, vocabulary, renderer).batch(Sequences.of([window]))
    trained = item_log_likelihood(model, CATALOG, vocabulary, batch).numpy()
    prefixes = TargetSplit(Sequences.of([window[:place] for place in range(len(window))]), window)
    served = decoded_scores(TreeDecoder(model, vocabulary, fed_back=renderer.fed_back), renderer, prefixes)
    assert batch.ranks.tolist() == window.tolist()
    if renderer.spec.version in (COMPACT_VERSION, STEPWISE_VERSION, CONTINUOUS_VERSION):
        assert trained == pytest.approx(served, abs=1e-4)
    else:
        assert trained[-1] == pytest.approx(served[-1], abs=1e-4)


@torch.inference_mode()
def test_no_score_depends_on_later_items_or_on_other_rows(built):
    model, vocabulary, renderer = built
    examples = Examples(CATALOG, vocabulary, renderer)

    def scores(*windows: list[int]) -> list[float]:
        batch = examples.batch(Sequences.of(list(windows)))
        return item_log_likelihood(model, CATALOG, vocabulary, batch).tolist()

    alone = scores([3, 1, 4, 1])
    assert scores([3, 1, 4, 9])[:3] == pytest.approx(alone[:3], abs=1e-5)
    assert scores([3, 1, 4, 9])[3] != pytest.approx(alone[3], abs=1e-3)
    assert scores([2, 7, 1, 8, 2, 8], [3, 1, 4, 1], [5])[6:10] == pytest.approx(alone, abs=1e-4)


def test_two_batches_scored_together_have_the_scores_and_expectations_of_each_alone(built):
    """As a step does with sequences and continuations, to read its tables once."""
    model, vocabulary, renderer = built
    examples, rng = Examples(CATALOG, vocabulary, renderer), np.random.default_rng(4)
    batches = [examples.batch(Sequences.of(windows)) for windows in ([[3, 1, 4, 1], [5]], [[2, 7, 1, 8, 2]])]
    lists = [
        TeacherLists(
            rng.integers(0, NUM_ITEMS, (len(batch.ranks), LIST_LENGTH)).astype(np.int32),
            rng.dirichlet(np.ones(LIST_LENGTH), len(batch.ranks)).astype(np.float32),
        )
        for batch in batches
    ]
    before_codes = [batch.before_codes(hidden_states(model, batch)) for batch in batches]
    alone = [
        scores_of_targets(before, model, CATALOG, vocabulary, batch.ranks, of_batch)
        for before, batch, of_batch in zip(before_codes, batches, lists, strict=True)
    ]
    ranks = np.concatenate([batch.ranks for batch in batches])
    together = scores_of_targets(
        torch.cat(before_codes), model, CATALOG, vocabulary, ranks, lists[0].followed_by(lists[1])
    )
    for whole, parts in zip(together, zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(whole, torch.cat(parts))
    assert not torch.allclose(*together)


def test_the_probabilities_of_all_sids_add_up_to_one(built):
    model, vocabulary, renderer = built
    leaves = np.unique(CATALOG.trie.leaf_rank[:-1]).astype(np.int32)  # one item of each SID
    windows = Sequences.of([[4, 2, rank] for rank in leaves])
    with torch.inference_mode():
        batch = Examples(CATALOG, vocabulary, renderer).batch_of_last(windows)
        total = item_log_likelihood(model, CATALOG, vocabulary, batch).exp().sum()
    assert len(leaves) < NUM_ITEMS
    assert float(total) == pytest.approx(1, abs=1e-5)


@given(st.lists(st.integers(0, 30), min_size=1, max_size=20), st.integers(1, 8), st.integers(1, 5), st.integers(0, 3))
def test_an_epoch_holds_every_event_once_in_windows_that_fit_a_prompt(lengths, max_history, batch_size, epoch):
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    numbered = Sequences(offsets.astype(np.int64), np.arange(offsets[-1], dtype=np.int32))
    user_of_event = np.repeat(np.arange(len(lengths)), lengths)
    config = config_of(max_history=max_history, batch_size=batch_size)
    batches = list(epoch_batches(numbered, config, epoch))
    windows = [window for batch in batches for window in batch]
    assert sorted(event for window in windows for event in window) == list(range(offsets[-1]))
    for window in windows:
        assert 1 <= len(window) <= max_history + 1  # a full history and its target
        assert (np.diff(window) == 1).all()
        assert len(set(user_of_event[window])) == 1
    assert all(len(batch) <= batch_size for batch in batches)
    again = list(epoch_batches(numbered, config, epoch))
    assert [batch.items.tolist() for batch in again] == [batch.items.tolist() for batch in batches]


def test_epochs_and_seeds_cut_and_shuffle_differently():
    orders = [
        [batch.items.tolist() for batch in epoch_batches(CYCLE, config_of(seed=seed), epoch)]
        for seed, epoch in ((0, 0), (0, 1), (1, 0))
    ]
    assert orders[0] != orders[1] != orders[2] != orders[0]


@given(st.lists(st.integers(0, 60), min_size=1, max_size=6), st.integers(1, 50))
def test_validation_prompts_are_cut_as_serving_cuts_them(lengths, max_history):
    histories = [list(range(length)) for length in lengths]
    targets = np.arange(100, 100 + len(lengths), dtype=np.int32)
    windows = prompt_windows(Sequences.of(histories), targets, max_history)
    expected = [
        [*history[window_start(len(history), max_history) :], target]
        for history, target in zip(histories, targets.tolist(), strict=True)
    ]
    assert [window.tolist() for window in windows] == expected


def test_a_deterministic_cycle_is_learned(tmp_path):
    summary = train(tmp_path, max_epochs=25, patience=25, learning_rate=0.01, dropout=0.0)
    trained = TrainedModel.load(tmp_path, CATALOG)
    decoder = trained.load_decoder()
    first = []
    for history in VALIDATION.histories:
        state = decoder.prefill([trained.renderer.render(History.of(CATALOG, history)).token_ids])
        first.append(constrained_beam(decoder, CATALOG.trie, state, [ItemFilter.of(NUM_ITEMS)], [1])[0].ranks[0])
    sids = CATALOG.codes[np.array(first)] == CATALOG.codes[VALIDATION.targets]
    assert sids.all(axis=1).mean() > 0.9
    assert summary.validation_log_likelihood > -0.5


def test_the_best_epoch_is_what_is_kept_and_training_stops_after_patience(tmp_path):
    """Targets that have nothing to do with the sequences: every epoch that learns the sequences makes them worse."""
    noise = random_split(seed=5, count=20)
    summary = train(tmp_path, validation=noise, max_epochs=40, patience=2, learning_rate=0.02, dropout=0.0)
    assert summary.epochs == summary.best_epoch + 2 < 40
    trained = TrainedModel.load(tmp_path, CATALOG)
    served = decoded_scores(trained.load_decoder(), trained.renderer, noise)
    assert served.mean() == pytest.approx(summary.validation_log_likelihood, abs=1e-4)


def test_the_last_epoch_is_kept_where_that_is_asked_for(tmp_path):
    """Targets that have nothing to do with the sequences: the first epochs are the best ones, and are not kept."""
    noise = random_split(seed=5, count=20)
    config = config_of(keep="last", max_epochs=8, patience=1, learning_rate=0.02, dropout=0.0)
    summary = run(config, CATALOG, CYCLE, noise, StageFolder(tmp_path, config, {}))
    assert summary.epochs == summary.best_epoch == 8
    trained = TrainedModel.load(tmp_path, CATALOG)
    served = decoded_scores(trained.load_decoder(), trained.renderer, noise)
    assert served.mean() == pytest.approx(summary.validation_log_likelihood, abs=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
@pytest.mark.parametrize("temperature", [0.6, 1.2])
def test_what_is_saved_decodes_at_the_temperature_that_was_trained(tmp_path, architecture, temperature):
    summary = train(tmp_path, architecture=architecture, temperature=temperature, max_epochs=2)
    trained = TrainedModel.load(tmp_path, CATALOG)
    served = decoded_scores(trained.load_decoder(), trained.renderer, VALIDATION)
    assert served.mean() == pytest.approx(summary.validation_log_likelihood, abs=1e-4)


@torch.inference_mode()
def test_a_temperature_divides_the_logits(tmp_path):
    model, vocabulary, _ = build_model(config_of(), CATALOG, tmp_path)
    hidden, prefix = torch.randn(5, model.config.hidden_size), np.full(5, ROOT)
    weight = model.get_output_embeddings().weight[vocabulary.block(0)]
    plain = child_log_probs(hidden, weight, None, CATALOG.trie, prefix).log_probs
    sharp = child_log_probs(hidden, weight, None, CATALOG.trie, prefix, temperature=0.5).log_probs
    torch.testing.assert_close(sharp, (2 * plain).log_softmax(dim=-1))
    assert not torch.allclose(sharp, plain)


def test_a_base_model_has_no_temperature_of_its_own():
    with pytest.raises(ValidationError, match=r"leave sft\.temperature or sft\.base_model out"):
        config_of(base_model="there", temperature=0.8)


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_a_model_from_scratch_is_a_plain_checkpoint_without_dropout(tmp_path, architecture):
    train(tmp_path, architecture=architecture, dropout=0.5)
    trained = TrainedModel.load(tmp_path, CATALOG)
    assert trained.renderer.spec.version == COMPACT_VERSION
    assert trained.renderer.spec.max_history == MAX_HISTORY
    assert {file.name for file in tmp_path.iterdir()} == {".fingerprint", "stage.json", "prompt.json", "model"}
    assert {file.suffix for file in trained.folder.iterdir()} == {".json", ".safetensors"}
    model = AutoModelForCausalLM.from_pretrained(trained.folder)
    token_ids = torch.arange(1, 20)[None]
    with torch.inference_mode():
        served = model.train(False)(token_ids).logits
        assert torch.equal(model.train(True)(token_ids).logits, served)


def test_dropout_is_on_in_training_and_off_in_evaluation(tmp_path):
    model, _, _ = build_model(config_of(dropout=0.5), CATALOG, tmp_path)
    token_ids = torch.arange(1, 20)[None]
    with torch.inference_mode():
        assert torch.equal(model.train(False)(token_ids).logits, model(token_ids).logits)
        assert not torch.equal(model.train(True)(token_ids).logits, model(token_ids).logits)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_dropout_drops_its_share_wherever_a_number_stands_and_keeps_the_mean(share):
    """4,001 rows of seven: no multiple of the four numbers of a draw. Five standard errors are allowed."""
    torch.manual_seed(0)
    values = torch.ones(4001, 7, requires_grad=True)
    dropped = _dropped(values, share)
    is_kept = dropped.detach() != 0
    assert np.unique(dropped.detach()[is_kept].numpy()) == pytest.approx([1 / (1 - share)])
    assert is_kept.float().mean(dim=0).numpy() == pytest.approx(np.full(7, 1 - share), abs=5 * 0.5 / 4001**0.5)
    pairs = is_kept[:, :-1].float() - (1 - share), is_kept[:, 1:].float() - (1 - share)
    assert abs(float((pairs[0] * pairs[1]).mean())) < 5 * share * (1 - share) / 24_006**0.5
    (gradient,) = torch.autograd.grad(dropped.sum(), values)
    assert torch.equal(gradient, dropped.detach())
    assert _dropped(values, 0.0) is values


@pytest.mark.parametrize(("architecture", "thinking"), [("llama", False), ("qwen3", False), ("llama", True)])
def test_a_pretrained_checkpoint_goes_the_whole_way(tmp_path, pretrained, architecture, thinking):
    base = AutoModelForCausalLM.from_pretrained(pretrained[architecture])
    settings = {"max_epochs": 3, "learning_rate": 0.005, "thinking": thinking}
    summary = train(tmp_path, base_model=str(pretrained[architecture]), **settings)
    trained = TrainedModel.load(tmp_path, CATALOG)
    assert trained.renderer.spec.version == (THINKING_VERSION if thinking else CHAT_VERSION)
    assert trained.vocabulary.first_token_id == base.config.vocab_size + 2  # the thinking tokens come before
    assert trained.vocabulary.vocab_size == base.config.vocab_size + 2 + CATALOG.space.num_tokens
    tokenizer = AutoTokenizer.from_pretrained(trained.folder)
    assert tokenizer.convert_tokens_to_ids(CATALOG.space.token(0, 0)) == trained.vocabulary.first_token_id
    served = decoded_scores(trained.load_decoder(), trained.renderer, VALIDATION)
    assert served.mean() == pytest.approx(summary.validation_log_likelihood, abs=1e-4)
    assert summary.validation_log_likelihood > -np.log(NUM_ITEMS)


def test_new_rows_of_a_pretrained_model_start_like_its_old_ones(tmp_path, pretrained):
    base = AutoModelForCausalLM.from_pretrained(pretrained["qwen3"])
    model, vocabulary, _ = build_model(config_of(base_model=str(pretrained["qwen3"])), CATALOG, tmp_path)
    first = len(base.get_input_embeddings().weight)
    for old, new in (
        (base.get_input_embeddings().weight.data, model.get_input_embeddings().weight.data),
        (base.get_output_embeddings().weight.data, model.get_output_embeddings().weight.data),
    ):
        assert torch.equal(new[:first], old)
        assert len(new) == vocabulary.vocab_size
        assert len(torch.unique(new[first:], dim=0)) == 2 + CATALOG.space.num_tokens  # the thinking tokens too
        assert new[first:].std().item() == pytest.approx(0.5 * old.std().item(), rel=0.3)


def weights(path: Path) -> bytes:
    return (path / MODEL / "model.safetensors").read_bytes()


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(tmp_path):
    for name, seed in (("one", 3), ("two", 3), ("other", 4)):
        train(tmp_path / name, seed=seed)
    assert weights(tmp_path / "one") == weights(tmp_path / "two")
    assert weights(tmp_path / "one") != weights(tmp_path / "other")


@pytest.mark.parametrize(
    ("base", "epochs"), [(None, 12), ("llama", 4)], ids=["from scratch", "pretrained"]
)  # enough epochs that the kill comes before the end
def test_training_killed_and_resumed_ends_with_the_same_bits(
    finished: Run, pretrained: dict[str, Path], cli: Cli, tmp_path: Path, base: str | None, epochs: int
) -> None:
    settings = [f"sft.max_epochs={epochs}", *([f"sft.base_model={pretrained[base]}"] if base else [])]
    straight, killed = (finished.copy(tmp_path / name) for name in ("straight", "killed"))
    process = subprocess.Popen(
        command("sft", *killed.args(*settings)), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        while not (killed.out / "sft" / CHECKPOINT).exists():
            assert process.poll() is None, "training ended before its first checkpoint was seen"
            time.sleep(0.001)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (killed.out / "sft" / "stage.json").exists()
    resumed = cli("sft", *killed.args(*settings), "--json")
    whole = cli("sft", *straight.args(*settings), "--json")
    assert weights(killed.out / "sft") == weights(straight.out / "sft")
    timing = {"seconds", "tokens_per_s"}
    assert {k: v for k, v in resumed.json.items() if k not in timing} == {
        k: v for k, v in whole.json.items() if k not in timing
    }
    assert not (killed.out / "sft" / CHECKPOINT).exists()


@pytest.mark.parametrize(("batch_size", "where"), [(4, "a batch"), (1000, "the validation after the only batch")])
def test_a_loss_that_is_no_number_names_the_setting_to_change(tmp_path, batch_size, where):
    with pytest.raises(StageError, match=r"the loss is nan in epoch 1: lower sft.learning_rate \(now 1e\+18\)"):
        train(tmp_path, learning_rate=1e18, max_epochs=1, batch_size=batch_size, warmup_share=0.0)
    assert not (tmp_path / "stage.json").exists()


def test_heads_that_do_not_divide_the_width_are_named(tmp_path):
    with pytest.raises(StageError, match=r"sft.hidden_size=32 is not a multiple of sft.num_heads=5"):
        train(tmp_path, num_heads=5)


def test_a_base_model_that_is_not_there_is_named_with_the_remedy(tmp_path):
    with pytest.raises(StageError, match=r"base model '/no/such/model' cannot be loaded.*Give a checkpoint folder"):
        train(tmp_path, base_model="/no/such/model")


def test_a_model_from_scratch_cannot_think():
    with pytest.raises(ValidationError, match=r"knows SIDs only and cannot think: give sft.base_model too"):
        config_of(thinking=True)


def test_nobody_to_validate_on_is_refused(tmp_path):
    with pytest.raises(StageError, match=r"no user has three events.*give longer histories"):
        train(tmp_path, validation=TargetSplit(Sequences.of([]), np.empty(0, np.int32)))
