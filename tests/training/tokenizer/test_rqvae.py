"""The learned quantiser: where its gradients go, how its codes live and die, and how its training ends and resumes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from semantic_ids.codes import SidSpace
from semantic_ids.quantizer import ResidualQuantizer
from training.checkpoint import save_checkpoint
from training.processes import Processes
from training.sequences import Sequences
from training.stage import StageError
from training.tokenizer.config import TokenizerConfig
from training.tokenizer.cooccurrence import Partners, item_graph, propagate
from training.tokenizer.objectives import contrastive
from training.tokenizer.rqvae import CHECKPOINT, Batch, FitResult, ItemSignals, RqVae, _batch, _is_flat, fit
from training.tokenizer.standardised import Standardised

Vectors = npt.NDArray[np.float32]
SPACE = SidSpace(num_levels=2, codebook_size=8)
WIDTH, LATENT = 12, 4
ALONE = Processes.alone()
LEARNED = ("rqvae", "letter", "coba", "letter-coba", "gr2")


def config_of(**settings: object) -> TokenizerConfig:
    small = {"method": "rqvae", "num_levels": 2, "codebook_size": 8, "hidden_widths": [16], "latent_width": LATENT}
    more = {"batch_size": 64, "max_epochs": 4, "kmeans_restarts": 1, "diversity_clusters": 3, "cluster_refresh": 2}
    return TokenizerConfig.model_validate({**small, **more, **settings})


def signals_of(num_items: int = 300, seed: int = 0, graph_file: Path | None = None) -> ItemSignals:
    """Items of ten communities: texts and SASRec vectors near the community's, users who stay in one."""
    rng = np.random.default_rng(seed)
    community = rng.integers(10, size=num_items)
    vectors = (rng.normal(size=(10, WIDTH))[community] + 0.4 * rng.normal(size=(num_items, WIDTH))).astype(np.float32)
    text = Standardised.of(vectors)
    members = [np.flatnonzero(community == label) for label in range(10)]
    groups = [group for group in members if len(group)]
    train = Sequences.of([rng.choice(groups[user % len(groups)], 6).tolist() for user in range(2 * num_items)])
    graph = item_graph(train, num_items, window=3)
    return ItemSignals(
        text=text,
        mixed=propagate(text, graph, alpha=0.5, hops=2, path=graph_file) if graph_file else None,
        collaborative=(np.eye(10, LATENT)[community] + 0.1 * rng.normal(size=(num_items, LATENT))).astype(np.float32),
        popularity=np.bincount(train.items, minlength=num_items),
        partners=Partners(graph),
    )


def train(folder: Path, signals: ItemSignals | None = None, space: SidSpace = SPACE, **settings: object) -> FitResult:
    config = config_of(**settings)
    if signals is None:
        file = folder.with_suffix(".mixed.npy") if config.objectives().graph else None
        signals = signals_of(graph_file=file)
    folder.mkdir(parents=True, exist_ok=True)
    return fit(config, config.objectives(), space, signals, folder, ALONE)


def model_of(**settings: object) -> RqVae:
    """A model with codes drawn at random."""
    config = config_of(**settings)
    torch.manual_seed(0)
    model = RqVae(config, config.objectives(), SPACE, WIDTH)
    rng = np.random.default_rng(0)
    model.set_codebooks(rng.normal(size=(2, 8, LATENT)).astype(np.float32))
    model.refresh_clusters(3, seed=0)
    return model


def batch_of(num_items: int = 32, **parts: Any) -> Batch:
    rng = np.random.default_rng(1)
    inputs = torch.from_numpy(rng.normal(size=(num_items, WIDTH)).astype(np.float32))
    everyone, nobody = torch.ones(num_items, dtype=torch.bool), torch.zeros(num_items, dtype=torch.bool)
    plain = Batch(
        inputs=inputs,
        targets=inputs,
        whole=slice(0, num_items),
        collaborative=None,
        is_known=everyone,
        partner_inputs=None,
        has_partner=nobody,
        uniform=torch.from_numpy(rng.random((num_items, 2))),
    )
    return replace(plain, **parts)


def latents_of(num_items: int = 16) -> Tensor:
    return torch.randn(num_items, LATENT, generator=torch.Generator().manual_seed(3)).requires_grad_()


def reached(model: RqVae, loss: Tensor) -> set[str]:
    """Which parts of the model a loss has a gradient for that is not zero."""
    model.zero_grad()
    torch.autograd.backward(loss)
    has_gradient = {
        name: parameter.grad is not None and bool((parameter.grad != 0).any())
        for name, parameter in model.named_parameters()
    }
    return {name.split(".")[0] for name, has_any in has_gradient.items() if has_any}


def encoder_of(result: FitResult, signals: ItemSignals) -> ResidualQuantizer:
    """What the stage exports, for vectors that are standardised already."""
    width = signals.text.width
    return ResidualQuantizer(np.zeros(width, np.float32), np.ones(width, np.float32), result.codebooks, result.layers)


# -- gradients


def test_the_sum_of_codes_passes_its_gradient_straight_to_the_latents():
    """z = latents + sg(sum of codes - latents): dz/d latents is the identity, whatever the codes."""
    model, latents = model_of(), latents_of()
    weights = torch.randn(16, LATENT, generator=torch.Generator().manual_seed(4))
    quantised = model.quantise(latents, ALONE, len(latents))
    assert reached(model, (quantised.vectors * weights).sum()) == set()
    assert latents.grad is not None
    assert torch.equal(latents.grad, weights)


def test_what_is_passed_on_is_the_sum_of_the_codes():
    model, latents = model_of(), latents_of()
    quantised = model.quantise(latents, ALONE, len(latents))
    total = sum(model.codebooks[level][quantised.codes[:, level]] for level in range(2))
    assert torch.allclose(quantised.vectors, torch.as_tensor(total), atol=1e-6)
    assert torch.equal(quantised.residuals[:, 0], latents)
    left_over = latents - model.codebooks[0][quantised.codes[:, 0]]
    assert torch.allclose(quantised.residuals[:, 1], left_over, atol=1e-6)


def test_the_quantisation_loss_reaches_latents_and_taken_codes_by_hand():
    """L = ½ Σ_l [Σ(e_l - sg r_l)²/n + μ Σ(sg e_l - r_l)²/n] with L = 2 levels, n = B d elements and r_2 = r_1 - sg e_1.

    dL/d latents = μ/n Σ_l (r_l - e_l): a residual moves with the latent at every level. dL/de_l = Σ over the items that
    took it of (e_l - r_l)/n.
    """
    model, latents = model_of(sinkhorn_last_level=False, commitment_weight=0.3), latents_of()
    quantised = model.quantise(latents, ALONE, len(latents))
    torch.autograd.backward(quantised.loss)
    taken = torch.stack([model.codebooks[level][quantised.codes[:, level]] for level in range(2)], dim=1).detach()
    off = quantised.residuals - taken  # (B, L, d)
    assert latents.grad is not None
    assert torch.allclose(latents.grad, 0.3 * off.sum(dim=1) / off[:, 0].numel(), atol=1e-7)
    expected = torch.zeros(2, 8, LATENT)
    for level in range(2):
        expected[level].index_add_(0, quantised.codes[:, level], -off[:, level] / off[:, 0].numel())
    assert model.codebooks.grad is not None
    assert torch.allclose(model.codebooks.grad, expected, atol=1e-7)


def test_who_learns_from_which_term():
    """Reconstruction and alignment go straight through to the encoder and never to the codes; the codes learn from
    quantisation, diversity and uniformity.
    """
    model = model_of(method="letter-coba", cointeraction_weight=0.1, uniformity_weight=1.0, graph=False)
    model.thresholds.fill_(10.0)
    batch = batch_of()
    everyone = torch.ones(32, dtype=torch.bool)
    batch = replace(batch, collaborative=torch.randn(32, LATENT), partner_inputs=batch.inputs.flip(0))
    batch = replace(batch, has_partner=everyone)
    expected = {
        "reconstruction": {"encoder", "decoder"},
        "quantisation": {"encoder", "codebooks"},
        "collaborative": {"encoder"},
        "cointeraction": {"encoder"},
        "diversity": {"codebooks"},
        "uniformity": {"codebooks"},
    }
    terms = model(batch, ALONE).terms
    assert set(terms) == set(expected)
    for term, parts in expected.items():
        assert reached(model, model(batch, ALONE).terms[term]) == parts, term


def test_terms_that_are_switched_off_are_not_there():
    assert set(model_of()(batch_of(), ALONE).terms) == {"reconstruction", "quantisation"}


def test_a_weight_multiplies_its_term():
    collaborative = torch.randn(32, LATENT, generator=torch.Generator().manual_seed(5))
    light, heavy = (
        model_of(method="letter", collaborative_weight=weight, diversity_weight=weight)(
            batch_of(collaborative=collaborative), ALONE
        ).terms
        for weight in (0.1, 0.3)
    )
    for term in ("collaborative", "diversity"):
        assert float(heavy[term].detach()) == pytest.approx(3 * float(light[term].detach()), rel=1e-5)


# -- codes


def test_ema_codebooks_by_hand():
    """Decay 0.9, count 1 and sum e at the start. Two residuals r, s take code 3: count 0.9 + 0.1·2 = 1.1, sum
    0.9e + 0.1(r + s), and the code is their quotient. A code nobody takes keeps its place: 0.9e/0.9.
    """
    model = model_of(method="gr2", ema_decay=0.9)
    before = model.codebooks.clone()
    residuals = torch.randn(2, 2, LATENT, generator=torch.Generator().manual_seed(6))
    taken = model.track(torch.tensor([[3, 0], [3, 1]]), residuals, ALONE)
    assert taken.tolist() == [[0, 0, 0, 2, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0, 0]]
    assert torch.allclose(model.codebooks[0, 3], (0.9 * before[0, 3] + 0.1 * residuals[:, 0].sum(dim=0)) / 1.1)
    assert torch.allclose(model.codebooks[1, 1], (0.9 * before[1, 1] + 0.1 * residuals[1, 1]) / 1.0)
    untouched = torch.tensor([0, 1, 2, 4, 5, 6, 7])
    assert torch.allclose(model.codebooks[0, untouched], before[0, untouched])


def test_ema_codebooks_move_without_a_gradient_and_others_only_by_one():
    ema, learned = model_of(method="gr2"), model_of()
    assert not ema.codebooks.requires_grad
    assert learned.codebooks.requires_grad
    before = learned.codebooks.detach().clone()
    outcome = learned(batch_of(), ALONE)
    learned.track(outcome.codes, outcome.residuals, ALONE)
    assert torch.equal(learned.codebooks, before)


def test_training_of_ema_codebooks_moves_them(tmp_path):
    one, four = (train(tmp_path / str(epochs), method="gr2", max_epochs=epochs) for epochs in (1, 4))
    assert (np.abs(one.codebooks - four.codebooks) > 1e-4).any()


def test_a_revived_code_stands_on_a_residual_of_its_level_and_others_stay():
    model = model_of(method="gr2")
    before = model.codebooks.clone()
    is_dead = torch.zeros(2, 8, dtype=torch.bool)
    is_dead[0, 2] = is_dead[1, 5] = True
    residuals = torch.randn(10, 2, LATENT, generator=torch.Generator().manual_seed(7))
    model.revive(is_dead, residuals, np.random.default_rng(0))
    assert (model.codebooks[0, 2] == residuals[:, 0]).all(dim=1).any()
    assert (model.codebooks[1, 5] == residuals[:, 1]).all(dim=1).any()
    assert torch.equal(model.codebooks[~is_dead], before[~is_dead])
    assert torch.equal(model.sums[is_dead], model.codebooks[is_dead])
    assert (model.counts[is_dead] == 1).all()


@pytest.mark.parametrize("method", ["rqvae", "gr2"])
def test_codes_far_from_every_item_are_brought_back_into_use(tmp_path, method):
    """Training starts from a checkpoint in which all codes but the first lie far away."""
    config = config_of(method=method, sinkhorn_last_level=False)
    model = model_of(method=method)
    far = 1e3 * np.ones((2, 8, LATENT), np.float32)
    far[:, 0] = 0.0
    model.set_codebooks(far)
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad])
    save_checkpoint(tmp_path / CHECKPOINT, model=model, optimizer=optimizer, step=0, extra={"curve": []})
    signals = signals_of()
    result = fit(config, config.objectives(), SPACE, signals, tmp_path, ALONE)
    assert np.abs(result.codebooks).max() < 100
    codes = encoder_of(result, signals).encode(signals.text.rows(slice(None)))
    assert min(len(np.unique(codes[:, level])) for level in range(2)) >= 6


def test_the_uniformity_threshold_is_half_the_median_distance_to_the_nearest_code():
    """Codes at 0, 1, 3, 7, … (powers of two less one) have their nearest at 1, 1, 2, 4, 8, 16, 32, 64. The median is 4,
    the lower of the two middle ones, and half of it 2.
    """
    model = model_of()
    codebooks = np.zeros((2, 8, LATENT), np.float32)
    codebooks[:, :, 0] = 2.0 ** np.arange(8) - 1
    model.set_codebooks(codebooks)
    assert model.thresholds.tolist() == pytest.approx([2.0, 2.0], abs=1e-3)


@pytest.mark.parametrize(("codebook_size", "clusters"), [(256, 10), (64, 10), (32, 10), (8, 3), (8, 4), (2, 1)])
def test_clusters_of_codes_all_offer_a_companion(codebook_size, clusters):
    config = config_of(codebook_size=codebook_size)
    model = RqVae(config, config.objectives(), SidSpace(1, codebook_size), WIDTH)
    model.set_codebooks(np.random.default_rng(0).normal(size=(1, codebook_size, LATENT)).astype(np.float32))
    model.refresh_clusters(clusters, seed=0)
    sizes = torch.bincount(model.cluster_labels[0])
    assert len(sizes) == clusters
    assert sizes.min() >= max(2, 0.35 * codebook_size / clusters)
    assert sizes.max() <= 2.6 * codebook_size / clusters + 1


@pytest.mark.parametrize("codebook_size", [2, 3, 8, 16, 19])
def test_a_codebook_too_small_for_that_many_clusters_has_fewer(codebook_size):
    config = config_of(codebook_size=codebook_size)
    model = RqVae(config, config.objectives(), SidSpace(1, codebook_size), WIDTH)
    model.set_codebooks(np.random.default_rng(0).normal(size=(1, codebook_size, LATENT)).astype(np.float32))
    model.refresh_clusters(10, seed=0)
    sizes = torch.bincount(model.cluster_labels[0])
    assert len(sizes) == min(10, codebook_size // 2)
    assert sizes.min() >= 2


def test_the_last_level_is_balanced_in_training_and_nearest_in_evaluation():
    """A heap of items nearest to one last code: Sinkhorn spreads them; what is served takes the nearest for all."""
    model = model_of()
    codebooks = np.zeros((2, 8, LATENT), np.float32)
    codebooks[0, 1:] = 100.0
    codebooks[1, :, 0] = np.arange(8)
    model.set_codebooks(codebooks)
    latents = 0.2 * torch.rand(64, LATENT, generator=torch.Generator().manual_seed(8))
    balanced = model.train().quantise(latents, ALONE, len(latents)).codes
    nearest = model.eval().quantise(latents, ALONE, len(latents)).codes
    assert set(nearest[:, 1].tolist()) == {0}
    assert len(set(balanced[:, 1].tolist())) >= 4
    assert set(balanced[:, 0].tolist()) == {0}


def test_frequent_codes_are_moved_away_in_training_and_not_in_evaluation():
    """A residual at 0.52 between codes 0 and 1: squared distances 0.2704 and 0.2304. Where code 1 is taken often and
    code 0 hardly ever, factors of up to 1 ± 0.2 turn the order round.
    """
    model = model_of(method="coba", graph=False)
    codebooks = np.full((2, 8, LATENT), 50.0, np.float32)
    codebooks[:, :2] = 0.0
    codebooks[:, 1, 0] = 1.0
    model.set_codebooks(codebooks)
    model.counts[:, 0], model.counts[:, 1] = 0.0, 1000.0
    latents = torch.zeros(1, LATENT)
    latents[0, 0] = 0.52
    assert model.train().quantise(latents, ALONE, len(latents)).codes[0, 0] == 0
    assert model.eval().quantise(latents, ALONE, len(latents)).codes[0, 0] == 1


# -- training


@pytest.mark.parametrize("method", LEARNED)
def test_every_method_trains_and_reconstructs_better_as_it_goes(tmp_path, method):
    result = train(tmp_path / "fit", method=method, max_epochs=12, learning_rate=3e-3)
    assert len(result.curve) == 12
    assert result.curve[-1]["reconstruction"] < 0.9 * result.curve[0]["reconstruction"]
    assert np.isfinite(result.codebooks).all()
    assert result.codebooks.shape == (2, 8, LATENT)
    assert [layer.weight.shape for layer in result.layers] == [(16, WIDTH), (LATENT, 16)]


def test_the_loss_of_an_epoch_is_the_sum_of_its_terms(tmp_path):
    epoch = train(tmp_path / "fit", method="letter-coba", max_epochs=1).curve[0]
    terms = {"reconstruction", "quantisation", "collaborative", "diversity", "uniformity"}
    assert set(epoch) == {"train", "validation"} | terms
    assert epoch["train"] == pytest.approx(sum(epoch[term] for term in terms))


def test_the_validation_loss_falls(tmp_path):
    losses = [epoch["validation"] for epoch in train(tmp_path / "fit", max_epochs=20, learning_rate=3e-3).curve]
    assert losses[-1] < 0.8 * losses[0]


def test_training_ends_by_itself_when_the_validation_loss_is_flat(tmp_path):
    """The fall over the last five epochs is below a tenth of the loss; before, it never was."""
    window, threshold = 5, 0.1
    settings: dict[str, Any] = {"convergence_window": window, "convergence_threshold": threshold, "learning_rate": 3e-3}
    result = train(tmp_path / "fit", max_epochs=500, **settings)
    losses = [epoch["validation"] for epoch in result.curve]

    def fall(epochs: int) -> float:
        before = min(losses[: epochs - window])
        return (before - min(losses[:epochs])) / before

    assert result.has_converged
    assert window < len(losses) < 500
    assert fall(len(losses)) < threshold
    assert all(fall(epochs) >= threshold for epochs in range(window + 1, len(losses)))


def test_the_least_known_items_are_held_out_and_validated_on_their_nearest_codes(tmp_path):
    """A twentieth of 300 items: what becomes of the 15 nobody touched changes no bit of what is learned, and the
    validation loss is theirs.
    """
    signals = signals_of()
    unknown = np.arange(0, 300, 20)
    popularity = signals.popularity + 1
    popularity[unknown] = 0
    vectors = signals.text.vectors.copy()
    vectors[unknown] += 1.0
    moved = replace(signals, popularity=popularity, text=replace(signals.text, vectors=vectors))
    settings: dict[str, Any] = {"max_epochs": 3, "checkpoint_epochs": 3}
    one = train(tmp_path / "one", replace(signals, popularity=popularity), **settings)
    other = train(tmp_path / "other", moved, **settings)
    assert (one.codebooks == other.codebooks).all()
    assert [epoch["train"] for epoch in one.curve] == [epoch["train"] for epoch in other.curve]
    model = model_of()
    model.load_state_dict(torch.load(tmp_path / "other" / CHECKPOINT, weights_only=True)["model"])
    held_out = torch.from_numpy(moved.text.rows(unknown))
    with torch.no_grad():
        quantised = model.eval().quantise(model.encoder(held_out), ALONE, len(held_out))
        loss = torch.nn.functional.mse_loss(model.decoder(quantised.vectors), held_out) + quantised.loss
    assert other.curve[-1]["validation"] == pytest.approx(float(loss), rel=1e-5)


def test_training_ends_at_the_most_epochs_allowed_and_says_that_it_was_still_learning(tmp_path):
    result = train(tmp_path / "fit", max_epochs=3)
    assert len(result.curve) == 3
    assert not result.has_converged


@pytest.mark.parametrize("method", ["rqvae", "letter-coba", "gr2"])
def test_training_resumed_from_a_checkpoint_equals_training_straight_through(tmp_path, method):
    """The checkpoint after epoch 3 stands between two refreshes of the clusters, so these must be in it too."""
    settings = {"method": method, "checkpoint_epochs": 3, "cluster_refresh": 2}
    straight = train(tmp_path / "straight", max_epochs=7, **settings)
    first = train(tmp_path / "resumed", max_epochs=3, **settings)
    np.random.default_rng().random()
    torch.manual_seed(99)  # a new process
    resumed = train(tmp_path / "resumed", max_epochs=7, **settings)
    assert first.curve == straight.curve[:3]
    assert resumed.curve == straight.curve
    assert (resumed.codebooks == straight.codebooks).all()
    for one, other in zip(resumed.layers, straight.layers, strict=True):
        assert (one.weight == other.weight).all()
        assert (one.bias == other.bias).all()


def test_training_resumed_after_its_last_epoch_has_nothing_left_to_do(tmp_path):
    one, again = (train(tmp_path / "fit", max_epochs=4, checkpoint_epochs=2) for _ in range(2))
    assert one.curve == again.curve
    assert (one.codebooks == again.codebooks).all()


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(tmp_path):
    one, two, other = (
        train(tmp_path / name, method="letter-coba", seed=seed, max_epochs=2)
        for name, seed in (("one", 0), ("two", 0), ("other", 1))
    )
    assert one.curve == two.curve
    assert (one.codebooks == two.codebooks).all()
    assert (one.codebooks != other.codebooks).any()


def test_a_loss_that_is_no_number_names_the_setting_to_change(tmp_path):
    with pytest.raises(
        StageError, match=r"loss became (nan|inf) in epoch \d+: lower tokenizer.learning_rate, now 1e\+20"
    ):
        train(tmp_path / "fit", learning_rate=1e20, max_epochs=20)
    assert not (tmp_path / "fit" / CHECKPOINT).exists()


@pytest.mark.parametrize("method", LEARNED)
@pytest.mark.parametrize("num_items", [2, 3, 7, 65])
def test_a_catalogue_smaller_than_a_batch_or_a_codebook_trains(tmp_path, method, num_items):
    file = tmp_path / "mixed.npy" if method in ("coba", "letter-coba") else None
    signals = signals_of(num_items, graph_file=file)
    result = train(tmp_path / "fit", signals, method=method, max_epochs=3)
    assert len(result.curve) == 3
    codes = encoder_of(result, signals).encode(signals.text.rows(slice(None)))
    assert codes.shape == (num_items, 2)


@pytest.mark.parametrize("method", LEARNED)
def test_items_that_repeat_train(tmp_path, method):
    signals = signals_of(60, graph_file=tmp_path / "mixed.npy")
    text = Standardised.of(np.repeat(signals.text.vectors[:4], 15, axis=0))
    result = train(tmp_path / "fit", replace(signals, text=text, mixed=None), method=method, graph=False)
    assert np.isfinite(result.codebooks).all()


def test_items_nobody_touched_have_no_part_in_alignment(tmp_path):
    """Their learned vectors may be anything: not one bit changes."""
    signals = signals_of()
    popularity = np.where(np.arange(300) % 3 == 0, 0, signals.popularity)
    assert signals.collaborative is not None
    noise = np.where(popularity[:, None] > 0, signals.collaborative, 1e3).astype(np.float32)
    plain, noisy = (
        train(
            tmp_path / name,
            replace(signals, popularity=popularity, collaborative=collaborative),
            method="letter",
            max_epochs=2,
        )
        for name, collaborative in (("plain", signals.collaborative), ("noisy", noise))
    )
    assert plain.curve == noisy.curve
    assert (plain.codebooks == noisy.codebooks).all()


def test_without_a_single_interaction_every_method_trains(tmp_path):
    signals = signals_of(100)
    nobody = Partners(item_graph(Sequences.of([]), 100, window=3))
    signals = replace(signals, popularity=np.zeros(100, np.int64), partners=nobody)
    for method in ("letter", "gr2"):
        result = train(tmp_path / method, signals, method=method, max_epochs=2)
        assert result.curve[-1].get("collaborative", 0.0) == 0
        assert result.curve[-1].get("cointeraction", 0.0) == 0


def test_items_read_by_text_alone_while_training_bring_a_new_items_latent_near_the_mixed_one(tmp_path):
    """Mean distance between the latents of an item's text and of its mixed vector, in units of the latents' spread."""
    signals = signals_of(graph_file=tmp_path / "mixed.npy")
    assert signals.mixed is not None
    flipped = replace(signals, mixed=signals.text.rows(slice(None))[:, ::-1].copy())  # the graph says all else

    def distance(dropout: float) -> float:
        result = train(
            tmp_path / f"fit{dropout}", flipped, method="coba", graph_dropout=dropout, max_epochs=60, learning_rate=3e-3
        )
        quantizer = encoder_of(result, flipped)
        assert flipped.mixed is not None
        mixed, text = quantizer.latents(flipped.mixed), quantizer.latents(flipped.text.rows(slice(None)))
        spread = np.linalg.norm(mixed - mixed.mean(axis=0), axis=1).mean()
        return float(np.linalg.norm(text - mixed, axis=1).mean() / spread)

    assert distance(0.5) < 0.8 * distance(0.0)


@pytest.mark.parametrize("method", ["rqvae", "gr2"])
def test_the_exported_quantiser_gives_the_codes_that_the_model_gives(tmp_path, method):
    """numpy on the layers and codebooks against torch on the checkpoint of the same epoch, for every item."""
    signals = signals_of()
    config = config_of(method=method, checkpoint_epochs=4, max_epochs=4)
    result = train(tmp_path / "fit", signals, method=method, checkpoint_epochs=4, max_epochs=4)
    model = RqVae(config, config.objectives(), SPACE, WIDTH)
    model.load_state_dict(torch.load(tmp_path / "fit" / CHECKPOINT, weights_only=True)["model"])
    rows = signals.text.rows(slice(None))
    with torch.no_grad():
        latents = model.eval().encoder(torch.from_numpy(rows))
        codes = model.quantise(latents, ALONE, len(latents)).codes
    quantizer = encoder_of(result, signals)
    assert quantizer.latents(rows) == pytest.approx(latents.numpy(), abs=1e-5)
    assert (quantizer.encode(rows) == codes.numpy()).all()


def test_flat_is_judged_by_the_best_loss_of_the_window_and_not_by_the_last():
    """Window 2: the best before is 1.0. A window that dipped to 0.5 has improved, wherever it ends."""
    config = config_of(convergence_window=2, convergence_threshold=0.01)

    def curve(*losses: float) -> list[dict[str, float]]:
        return [{"validation": loss} for loss in losses]

    assert not _is_flat(curve(1.0, 0.9), config)
    assert not _is_flat(curve(1.0, 0.5, 1.2), config)
    assert _is_flat(curve(1.0, 0.995, 1.2), config)
    assert _is_flat(curve(1.0, 0.5, 0.6, 0.7), config)


def test_every_epoch_shuffles_anew(tmp_path):
    """Nothing is learned, so two epochs over the same batches would have the same loss to the bit."""
    first, second = train(tmp_path / "run", learning_rate=1e-12, weight_decay=0.0, max_epochs=2).curve
    assert first["reconstruction"] == pytest.approx(second["reconstruction"], rel=0.05)
    assert first["reconstruction"] != second["reconstruction"]


def test_cointeraction_draws_neighbours_and_compares_directions():
    """The term is InfoNCE of cosines between each item's sum of codes and that of the neighbour drawn for it."""
    model, signals = model_of(method="gr2", cointeraction_weight=1.0), signals_of()
    rows = np.arange(40)
    batch = _batch(signals, rows, slice(0, 40), model, np.random.default_rng(5))
    assert batch.partner_inputs is not None
    assert signals.partners is not None
    own = signals.inputs(rows)
    is_other = (batch.partner_inputs != own).any(dim=1)
    assert torch.equal(is_other, batch.has_partner), "everybody with a neighbour gets one, nobody else does"
    assert batch.has_partner.float().mean() > 0.9
    model.eval()
    outcome = model(batch, ALONE)
    anchors, partners = (model.quantise(model.encoder(part), ALONE, 40).vectors for part in (own, batch.partner_inputs))
    expected = contrastive(anchors, partners, torch.arange(40), batch.has_partner, "cosine", 0.1)
    assert outcome.terms["cointeraction"].item() == pytest.approx(expected.item(), rel=1e-5)
