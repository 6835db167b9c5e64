"""Thinking steps: what a branch sees, what its steps learn, and that a trained one goes the whole way."""

from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from semantic_ids.bundle import Bundle
from semantic_ids.prompt import CONTINUOUS_VERSION, STEPWISE_VERSION, History, PromptError, PromptSpec, make_renderer
from tests.training.conftest import Cli, Run
from tests.training.test_sft import CATALOG, CYCLE, MAX_HISTORY, VALIDATION, config_of, decoded_scores
from training.examples import Examples
from training.generator import TrainedModel, build_model, compact_vocabulary
from training.learner import Teaching
from training.likelihood import hidden_states
from training.sequences import Sequences
from training.sft import SftSummary, run
from training.stage import StageError, StageFolder
from training.stepwise import GlobalInterest, StepClusters, with_branches

CODEBOOKS = np.random.default_rng(0).standard_normal((3, 4, 6)).astype(np.float32)
EVERYTHING = {"steps": (1, 1, 1), "step_clusters": 2, "global_interest": 0.1}


def train(path: Path, **settings: object) -> SftSummary:
    config = config_of(**settings)
    return run(config, CATALOG, CYCLE, VALIDATION, StageFolder(path, config, {}), Teaching(codebooks=CODEBOOKS))


class TestBranches:
    """By hand: two rows of two-code items, the second a padded one; a step before the first code, two behind it."""

    BACKBONE = torch.tensor([[1, 20, 40, 21, 41], [1, 22, 42, 0, 0]])
    TARGETS = np.array([[20, 40], [21, 41], [22, 42]])
    ROWS, ANCHORS = np.array([0, 0, 1]), np.array([0, 2, 0])

    def test_tokens_positions_and_predictors(self):
        made = with_branches(self.BACKBONE, self.ROWS, self.ANCHORS, self.TARGETS, ((5,), (6, 7)))
        assert made.token_ids.tolist() == [
            [1, 20, 40, 21, 41, 5, 20, 6, 7, 5, 21, 6, 7],
            [1, 22, 42, 0, 0, 5, 22, 6, 7, 0, 0, 0, 0],
        ]
        assert made.positions.tolist() == [[5, 8], [9, 12], [5, 8]]
        assert made.tree.position_ids[0].tolist() == [0, 1, 2, 3, 4, 1, 2, 3, 4, 3, 4, 5, 6]
        assert made.tree.position_ids[1, 5:9].tolist() == [1, 2, 3, 4]
        assert made.tree.num_backbone == 5

    def test_a_branch_sees_its_prefix_and_itself_and_nothing_sees_it(self):
        visible = with_branches(self.BACKBONE, self.ROWS, self.ANCHORS, self.TARGETS, ((5,), (6, 7))).tree.visible

        def seen_by(row: int, place: int) -> list[int]:
            found: list[int] = visible[row, place].nonzero()[:, 0].tolist()
            return found

        assert seen_by(0, 3) == [0, 1, 2, 3]
        assert seen_by(0, 7) == [0, 5, 6, 7]
        assert seen_by(0, 12) == [0, 1, 2, 9, 10, 11, 12]
        assert seen_by(1, 8) == [0, 5, 6, 7, 8]
        assert visible.any(dim=2).all(), "who sees nothing makes numbers that are none"

    def test_without_a_step_before_it_a_first_code_is_the_backbones_to_predict(self):
        made = with_branches(self.BACKBONE, self.ROWS, self.ANCHORS, self.TARGETS, ((), (6,)))
        assert made.token_ids[0].tolist() == [1, 20, 40, 21, 41, 20, 6, 21, 6]
        assert made.positions.tolist() == [[0, 6], [2, 8], [0, 6]]

    def test_what_is_fed_back_begins_a_pass_and_reads_the_token_before_it(self):
        made = with_branches(self.BACKBONE, self.ROWS, self.ANCHORS, self.TARGETS, ((5,), (6, 7)), (5, 6, 7))
        assert made.tree.ends == (5, 9, 11, 13)
        assert made.token_ids.tolist() == [
            [1, 20, 40, 21, 41, 5, 20, 5, 21, 6, 6, 7, 7],
            [1, 22, 42, 0, 0, 5, 22, 0, 0, 6, 0, 7, 0],
        ]
        assert made.positions.tolist() == [[5, 11], [7, 12], [5, 11]]
        assert made.tree.position_ids[0].tolist() == [0, 1, 2, 3, 4, 1, 2, 3, 4, 3, 5, 4, 6]
        nobody = [-1] * 5
        assert made.tree.sources.tolist() == [
            [*nobody, 0, -1, 2, -1, 6, 8, 9, 10],
            [*nobody, 0, -1, -1, -1, 6, -1, 9, -1],
        ]
        assert made.tree.visible[0, 12].nonzero()[:, 0].tolist() == [0, 1, 2, 7, 8, 10, 12]
        assert made.tree.visible[0, 9].nonzero()[:, 0].tolist() == [0, 5, 6, 9]

    def test_a_first_code_without_a_step_is_run_with_the_backbone(self):
        made = with_branches(self.BACKBONE, self.ROWS, self.ANCHORS, self.TARGETS, ((), (6,)), (6,))
        assert made.tree.ends == (7, 9)
        assert made.token_ids[0].tolist() == [1, 20, 40, 21, 41, 20, 21, 6, 6]
        assert made.positions.tolist() == [[0, 7], [2, 8], [0, 7]]
        assert made.tree.sources[0].tolist() == [-1] * 7 + [5, 6]


class TestClusters:
    """The auxiliary loss of the steps."""

    @staticmethod
    def clusters(steps: tuple[int, ...] = (1, 1, 1), *, is_shuffled: bool = False, seed: int = 0) -> StepClusters:
        torch.manual_seed(0)
        codebooks = np.concatenate([CODEBOOKS, CODEBOOKS + 100], axis=1)  # two groups of four codes a level
        codes = np.array([[code] * 3 for code in range(8)])
        return StepClusters(codebooks, codes, 2, steps, width=5, is_shuffled=is_shuffled, seed=seed)

    def test_codes_that_are_near_are_in_one_cluster_and_shuffled_ones_are_not(self):
        labels = self.clusters().cluster_of_code
        for level in range(3):
            assert len(set(labels[level, :4].tolist())) == len(set(labels[level, 4:].tolist())) == 1
            assert labels[level, 0] != labels[level, 4]
        shuffled = self.clusters(is_shuffled=True).cluster_of_code
        assert (shuffled.sort(dim=1).values == labels.sort(dim=1).values).all(), "clusters of the same sizes"
        assert any(len(set(level[:4].tolist())) == 2 for level in shuffled)

    def test_the_loss_is_the_cross_entropy_of_cosines_over_the_temperature(self):
        clusters, codes = self.clusters(), torch.tensor([[0, 5, 2], [7, 1, 3]])
        hidden = torch.randn(2, 3, 5)
        expected = 0.0
        for level in range(3):
            for item in range(2):
                projected = hidden[item, level] @ clusters.projection[level]
                cosines = torch.nn.functional.cosine_similarity(projected[None], clusters.centres[level])
                label = int(clusters.cluster_of_code[level, codes[item, level]])
                expected -= float((cosines / 0.1).log_softmax(dim=0)[label].detach()) / 2
        assert clusters(hidden, codes).item() == pytest.approx(expected, rel=1e-4)

    def test_only_levels_with_a_step_are_supervised_and_all_where_there_is_none_at_all(self):
        hidden, codes = torch.randn(4, 3, 5, requires_grad=True), torch.randint(8, (4, 3))
        for steps, levels in (((2, 0, 1), [0, 2]), ((0, 0, 0), [0, 1, 2]), ((), [0, 1, 2])):
            (gradient,) = torch.autograd.grad(self.clusters(steps)(hidden, codes), hidden)
            assert gradient.abs().sum(dim=(0, 2)).nonzero()[:, 0].tolist() == levels


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_the_general_interest_contrasts_other_items_only_and_pulls_the_first_step_without_being_pulled(architecture):
    model, _, _ = build_model(config_of(steps=(1, 1, 1), num_layers=4, architecture=architecture), CATALOG, Path())
    interest = GlobalInterest(model, weight=0.5)
    assert interest.decoder.config.num_hidden_layers == 2
    torch.manual_seed(0)
    backbone, first = torch.randn(2, 3, 32), torch.randn(3, 32, requires_grad=True)
    rows, anchors, targets = torch.tensor([0, 0, 1]), torch.tensor([0, 2, 1]), torch.randn(3, 32)
    seen = interest.decoder(inputs_embeds=backbone).last_hidden_state[rows, anchors].detach()
    cosines = torch.nn.functional.cosine_similarity(seen[:, None], targets[None], dim=-1) / 0.1
    nearness = torch.nn.functional.cosine_similarity(first, seen).mean()
    loss = interest(backbone, rows, anchors, first, targets, torch.tensor([4, 5, 6]))
    expected = -cosines.log_softmax(dim=1).diagonal().mean() + 0.5 * (1 - nearness)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    same = interest(backbone, rows, anchors, first, targets, torch.tensor([4, 4, 6]))
    cosines[0, 1] = cosines[1, 0] = -torch.inf  # the same item twice is not its own contrast
    expected = -cosines.log_softmax(dim=1).diagonal().mean() + 0.5 * (1 - nearness)
    assert same.item() == pytest.approx(expected.item(), rel=1e-4)
    (gradient,) = torch.autograd.grad(loss, first)
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize("steps", [(1, 1, 1), (2, 0, 1), (0, 1, 2)])
def test_the_gradient_of_passes_is_that_of_every_item_run_token_by_token(steps):
    """Against the obvious path: no cache, no mask, an item at a time, each input made when the one before has run."""
    model, vocabulary, renderer = build_model(
        config_of(steps=steps, step_form="continuous", num_layers=2, dropout=0.0), CATALOG, Path()
    )
    torch.manual_seed(1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    windows = Sequences.of([[3, 1, 4, 1], [5, 9]])
    batch = Examples(CATALOG, vocabulary, renderer).batch(windows)
    weight = torch.randn(len(batch.ranks), 3, 32)  # any function of the outputs that predict codes
    in_passes = hidden_states(model, batch)[batch.rows[:, None], batch.positions]
    rows = model.get_input_embeddings().weight
    one_by_one = []
    for window in windows:
        for place in range(len(window)):
            plain = make_renderer(PromptSpec(version=1, max_history=MAX_HISTORY), vocabulary)
            prompt = plain.render(History.of(CATALOG, window[:place])).token_ids
            inputs = rows[torch.from_numpy(prompt)]
            for level, token_id in enumerate(vocabulary.token_ids(CATALOG.codes[window[place]]).tolist()):
                output = model.base_model(inputs_embeds=inputs[None], use_cache=False).last_hidden_state[0, -1]
                for step in renderer.forced[level]:
                    inputs = torch.cat((inputs, (rows[step] + output)[None]))
                    output = model.base_model(inputs_embeds=inputs[None], use_cache=False).last_hidden_state[0, -1]
                one_by_one.append(output)
                inputs = torch.cat((inputs, rows[token_id][None]))
    expected = torch.stack(one_by_one).view_as(in_passes)
    torch.testing.assert_close(in_passes, expected, atol=1e-4, rtol=1e-3)
    parameters = list(model.base_model.parameters())
    gradients = torch.autograd.grad((in_passes * weight).sum(), parameters)
    for found, wanted in zip(gradients, torch.autograd.grad((expected * weight).sum(), parameters), strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-3 * float(wanted.abs().max()), rtol=1e-3)


FORMS = pytest.mark.parametrize(
    ("form", "version"), [("discrete", STEPWISE_VERSION), ("continuous", CONTINUOUS_VERSION)]
)


@FORMS
def test_the_steps_learn_and_what_is_kept_is_a_plain_model_with_its_prompt(form, version, tmp_path):
    """A cycle is learnt through branches, and the served score of the kept model is the validated one."""
    summary = train(tmp_path, **EVERYTHING, step_form=form, max_epochs=12, learning_rate=0.01, dropout=0.0)
    assert summary.validation_log_likelihood > -0.3
    trained = TrainedModel.load(tmp_path, CATALOG)
    assert (trained.renderer.spec.version, trained.renderer.spec.steps) == (version, (1, 1, 1))
    served = decoded_scores(trained.load_decoder(), trained.renderer, VALIDATION)
    assert served.mean() == pytest.approx(summary.validation_log_likelihood, abs=1e-4)


def test_what_supervises_the_steps_changes_what_is_learnt(tmp_path):
    rows: dict[str, dict[str, object]] = {
        "pause": {"steps": (1, 1, 1)},
        "clusters": {"steps": (1, 1, 1), "step_clusters": 2},
        "shuffled": {"steps": (1, 1, 1), "step_clusters": 2, "step_clusters_shuffled": True},
        "clusters alone": {"step_clusters": 2},
        "interest": {"steps": (1, 1, 1), "global_interest": 0.1},
        "continuous pause": {"steps": (1, 1, 1), "step_form": "continuous"},
        "continuous clusters": {"steps": (1, 1, 1), "step_form": "continuous", "step_clusters": 2},
        "plain": {},
    }
    scores = {name: train(tmp_path / name, **settings).validation_log_likelihood for name, settings in rows.items()}
    assert len(set(scores.values())) == len(rows), scores


@pytest.mark.parametrize("steps", [(1, 1), (0, 0, 0), (-1, 1, 1), (14, 0, 0)])
def test_steps_that_cannot_be_are_refused_with_the_rule(steps):
    with pytest.raises(PromptError, match="a number of steps for each of 3 levels, together 1 to 13, not"):
        make_renderer(PromptSpec(version=STEPWISE_VERSION, max_history=5, steps=steps), compact_vocabulary(CATALOG))
    with pytest.raises(PromptError, match="prompt version 1 has no thinking steps"):
        make_renderer(PromptSpec(version=1, max_history=5, steps=(1, 1, 1)), compact_vocabulary(CATALOG))


def test_settings_that_do_not_fit_are_refused(tmp_path, pretrained):
    with pytest.raises(ValidationError, match="thinking steps are for models from scratch"):
        config_of(base_model=str(pretrained["llama"]), steps=(1, 1, 1))
    with pytest.raises(ValidationError, match=r"learns: give sft\.steps too"):
        config_of(global_interest=0.1, steps=(0, 1, 1))
    with pytest.raises(ValidationError, match=r"continuous is a form of thinking steps: give sft\.steps too"):
        config_of(step_form="continuous", steps=(0, 0, 0))
    with pytest.raises(StageError, match=r"sft.steps=\[1, 1\]: stepwise prompts have a number of steps for each of 3"):
        train(tmp_path / "steps", steps=(1, 1))
    config = config_of(step_clusters=2)
    with pytest.raises(StageError, match="step_clusters=2 needs the codebooks"):
        run(config, CATALOG, CYCLE, VALIDATION, StageFolder(tmp_path / "clusters", config, {}))


@FORMS
def test_a_stepwise_model_goes_from_data_to_a_bundle(
    form: str, version: int, finished: Run, cli: Cli, tmp_path: Path
) -> None:
    """Through every stage, with every supervision: evaluated, tried out, published with its steps."""
    copy = finished.copy(tmp_path / "run")
    settings = ["sft.steps=[1,1,1]", f"sft.step_form={form}", "sft.step_clusters=4", "sft.global_interest=0.1"]
    settings.append("sft.max_epochs=1")
    summary = cli("pipeline", *copy.args(*settings), "--json").json
    assert summary["num_users"] > 0
    bundle = Bundle.load_current(copy.out / "bundles")
    assert (bundle.manifest.prompt.version, bundle.manifest.prompt.steps) == (version, (1, 1, 1))
    assert [len(forced) for forced in bundle.renderer.forced] == [1, 1, 1]
