"""A model's tables from one memory: what they are, that all of it learns, and that a checkpoint is plain."""

from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from tests.training.test_sft import CATALOG, CYCLE, NUM_ITEMS, VALIDATION, config_of, decoded_scores
from training.checkpoint import load_checkpoint, save_checkpoint
from training.examples import Examples
from training.generator import TrainedModel, build_model, compact_vocabulary
from training.item_memory import TEXT_WIDTH, ItemMemory, KnownItems, memory_of, plain_state, rows_of
from training.learner import Teaching
from training.likelihood import embed, item_log_likelihood
from training.sft import SftSummary, run
from training.stage import StageError, StageFolder

TEXT, COLLABORATIVE = np.random.default_rng(0).standard_normal((2, NUM_ITEMS, 5)).astype(np.float32)
KNOWN = KnownItems(TEXT, COLLABORATIVE)


def train(path: Path, known: KnownItems | None = KNOWN, **settings: object) -> SftSummary:
    config = config_of(item_memory=True, **settings)
    return run(config, CATALOG, CYCLE, VALIDATION, StageFolder(path, config, {}), Teaching(known))


def with_memory(path: Path):
    torch.manual_seed(0)
    return build_model(config_of(dropout=0.0, item_memory=True), CATALOG, path, KNOWN)


def test_a_row_is_its_own_part_and_the_projected_mean_of_the_items_beneath(tmp_path):
    model, vocabulary, _ = with_memory(tmp_path)
    memory = memory_of(model)
    assert memory is not None
    beneath = CATALOG.codes[:, 1] == 1
    token = vocabulary.block(1).start + 1
    [place] = (memory.used == token).nonzero()[0].tolist()
    expected = memory.own[place] + memory.projection(torch.from_numpy(TEXT[beneath].mean(axis=0)))
    torch.testing.assert_close(model.lm_head.weight[rows_of(model, torch.tensor(token))], expected)
    read = embed(model, torch.tensor([token]))[0]
    torch.testing.assert_close(read, expected * memory.input_scale)
    torch.testing.assert_close(plain_state(model)["model.embed_tokens.weight"][token], read.detach())
    torch.testing.assert_close(plain_state(model)["lm_head.weight"][token], expected.detach())
    nobody = vocabulary.block(0).start + 3  # the first level has three codes of four
    assert (CATALOG.codes[:, 0] != 3).all()
    assert (plain_state(model)["lm_head.weight"][nobody] == 0).all()
    with pytest.raises(IndexError):
        embed(model, torch.tensor([nobody]))


def test_every_parameter_learns_and_the_tables_are_none(tmp_path):
    model, vocabulary, renderer = with_memory(tmp_path)
    names = {name for name, _ in model.named_parameters()}
    assert {name for name in names if "memory" in name} == {
        f"model.embed_tokens.memory.{part}" for part in ("own", "projection.weight", "input_scale")
    }
    assert not names & {"model.embed_tokens.weight", "lm_head.weight"}
    batch = Examples(CATALOG, vocabulary, renderer).batch(CYCLE.select(np.arange(NUM_ITEMS)).without_last(2))
    torch.autograd.backward(-item_log_likelihood(model, CATALOG, vocabulary, batch).mean())
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in model.parameters())


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_what_is_saved_is_a_plain_model_that_scores_as_trained(tmp_path, temperature):
    summary = train(tmp_path, learning_rate=0.01, max_epochs=3, temperature=temperature)
    trained = TrainedModel.load(tmp_path, CATALOG)
    model, info = AutoModelForCausalLM.from_pretrained(trained.folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert memory_of(model) is None
    served = decoded_scores(trained.load_decoder(), trained.renderer, VALIDATION)
    assert served.mean() == pytest.approx(summary.validation_log_likelihood, abs=1e-4)
    assert not torch.equal(model.get_input_embeddings().weight, model.get_output_embeddings().weight)


def test_a_checkpoint_brings_the_memory_back(tmp_path):
    model, _, _ = with_memory(tmp_path)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    save_checkpoint(tmp_path / "there", model=model, optimizer=optimizer, step=1)
    saved = {name: table.clone() for name, table in plain_state(model).items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    load_checkpoint(tmp_path / "there", model=model, optimizer=optimizer)
    torch.testing.assert_close(plain_state(model), saved, rtol=0, atol=0)


def test_a_model_without_a_memory_keeps_its_own_state(tmp_path):
    model, _, _ = build_model(config_of(), CATALOG, tmp_path)
    assert plain_state(model).keys() == model.state_dict().keys()


def test_text_is_centred_and_cut_to_the_strongest_directions_and_both_kinds_are_of_one_length():
    rng = np.random.default_rng(1)
    text = rng.standard_normal((400, TEXT_WIDTH + 40)) * np.linspace(5, 0.01, TEXT_WIDTH + 40) + 7
    collaborative = rng.standard_normal((400, 8)) * 100
    known = KnownItems.of(text.astype(np.float32), collaborative.astype(np.float32))
    assert (known.text.shape, known.collaborative.shape) == ((400, TEXT_WIDTH), (400, 8))
    assert np.abs(known.text.mean(axis=0)).max() < 1e-3
    assert (known.text**2).mean() == pytest.approx(1, rel=1e-4)
    assert (known.collaborative**2).mean() == pytest.approx(1, rel=1e-4)
    # the directions that are left out are the weak ones: nothing that matters to a distance is lost
    original = text - text.mean(axis=0)
    ours = np.linalg.norm(known.text[:100] - known.text[100:200], axis=1)
    theirs = np.linalg.norm(original[:100] - original[100:200], axis=1)
    assert np.corrcoef(ours, theirs)[0, 1] > 0.99
    assert (known.select(np.array([3, 1])).text == known.text[[3, 1]]).all()


@pytest.mark.parametrize("width", [64, 4])
def test_rows_start_at_what_sasrec_knows_of_their_items(width):
    """The more alike two items' vectors, the more alike their rows, whatever the noise."""
    vocabulary = compact_vocabulary(CATALOG)
    known = KnownItems.of(TEXT, COLLABORATIVE)
    wanted = torch.from_numpy(_mean_of_last_codes(known.collaborative))
    similarity = torch.zeros(len(wanted), len(wanted))
    for seed in range(200):
        torch.manual_seed(seed)
        memory = ItemMemory(CATALOG, vocabulary, known, width)
        own = torch.zeros(vocabulary.vocab_size, width).index_copy(0, memory.used, memory.own.detach())
        rows = own[vocabulary.block(CATALOG.space.num_levels - 1)][: len(wanted)]
        similarity += rows @ rows.T
    other_than_itself = ~torch.eye(len(wanted), dtype=torch.bool)
    pair = torch.stack([similarity[other_than_itself], (wanted @ wanted.T)[other_than_itself]])
    assert torch.corrcoef(pair)[0, 1] > 0.9


def _mean_of_last_codes(vectors: np.ndarray) -> np.ndarray:
    last = CATALOG.codes[:, -1]
    return np.stack([vectors[last == code].mean(axis=0) for code in range(int(last.max()) + 1)])


def test_a_memory_needs_something_to_know_and_tables_of_its_own(tmp_path, pretrained):
    with pytest.raises(StageError, match="item_memory=true needs what is known"):
        train(tmp_path, known=None)
    with pytest.raises(ValidationError, match="brings its tables with it"):
        config_of(item_memory=True, base_model=str(pretrained["llama"]))
