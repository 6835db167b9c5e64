"""The learned quantiser: an MLP autoencoder over residual codebooks, with whatever objectives a method switches on.

`fit` goes from vectors to layers and codebooks that need numpy alone. The cost of a step depends on the batch, never on
the catalogue; vectors are read batch by batch, so they may be memory-mapped. Everything random in an epoch is a pure
function of (seed, epoch) and belongs to items, not to processes: under `accelerate launch` each process takes its share
of the same batches, and the loss is that of one process.
"""

import itertools
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from semantic_ids.codes import SidSpace
from semantic_ids.quantizer import DenseLayer, Vectors
from training.checkpoint import load_checkpoint, save_checkpoint
from training.processes import Processes
from training.stage import StageError, progress_bar
from training.tokenizer.assignment import balanced_kmeans, sinkhorn
from training.tokenizer.config import TokenizerConfig
from training.tokenizer.cooccurrence import Partners
from training.tokenizer.kmeans import residual_codebooks
from training.tokenizer.methods import Objectives
from training.tokenizer.objectives import (
    CodeClusters,
    contrastive,
    diversity,
    load_balanced,
    quantisation,
    uniformity,
)
from training.tokenizer.standardised import Standardised

CHECKPOINT = "rqvae.ckpt"
_DIVERGED = 1e4  # times its first value: no training that works has a loss like that


@dataclass(frozen=True)
class ItemSignals:
    """All that is known of the items. Row i is the same item everywhere."""

    text: Standardised  # (N, D) text vectors
    mixed: Vectors | None  # (N, D) the same mixed along the item graph
    collaborative: Vectors | None  # (N, width of the latent), frozen
    popularity: npt.NDArray[np.int64]  # (N,) training interactions; an item without any has no learned vector
    partners: Partners | None

    def inputs(self, rows: npt.NDArray[np.int64]) -> Tensor:
        """What these items are encoded from."""
        return torch.from_numpy(self.text.rows(rows) if self.mixed is None else np.asarray(self.mixed[rows]))


@dataclass(frozen=True)
class FitResult:
    """A trained quantiser of *standardised* vectors, and how its training went."""

    layers: tuple[DenseLayer, ...]
    codebooks: npt.NDArray[np.float32]  # (L, K, d)
    curve: list[dict[str, float]]  # by epoch: train, validation, and each loss term
    has_converged: bool


@dataclass(frozen=True)
class Batch:
    """This process's share of a batch (B items of G)."""

    inputs: Tensor  # (B, D)
    targets: Tensor  # (B, D) to reconstruct
    whole: slice  # where the share lies in the batch
    collaborative: Tensor | None  # (G, d)
    is_known: Tensor  # (G,)
    partner_inputs: Tensor | None  # (B, D)
    has_partner: Tensor  # (G,)
    uniform: Tensor  # (B, L) for the draw of companions


class RqVae(nn.Module):
    """Encoder, L codebooks of K codes, decoder; its forward pass is the objective."""

    codebooks: nn.Parameter  # (L, K, d)
    counts: Tensor  # (L, K) moving averages of how often a code is taken, per batch
    sums: Tensor  # (L, K, d) moving sums of the residuals that took it (EMA codebooks)
    thresholds: Tensor  # (L,) δ of the uniformity term
    cluster_labels: Tensor  # (L, K) of the diversity term

    def __init__(self, config: TokenizerConfig, objectives: Objectives, space: SidSpace, width: int) -> None:
        super().__init__()
        self.config, self.objectives, self.space = config, objectives, space
        widths = [width, *config.hidden_widths, config.latent_width]
        self.encoder = _mlp(widths)
        self.decoder = _mlp(widths[::-1])
        shape = (space.num_levels, space.codebook_size, config.latent_width)
        learns = objectives.codebook_update == "gradient"
        self.codebooks = nn.Parameter(torch.zeros(shape), requires_grad=learns)
        self.register_buffer("counts", torch.zeros(shape[:2]))
        self.register_buffer("sums", torch.zeros(shape))
        self.register_buffer("thresholds", torch.zeros(shape[0]))
        self.register_buffer("cluster_labels", torch.zeros(shape[:2], dtype=torch.int64))

    def set_codebooks(self, codebooks: npt.NDArray[np.float32]) -> None:
        """Start values, (L, K, d); the uniformity threshold is half the median distance to the nearest other code."""
        with torch.no_grad():
            self.codebooks.copy_(torch.from_numpy(codebooks))
            self.counts.fill_(1.0)
            self.sums.copy_(self.codebooks)
            for level, codes in enumerate(self.codebooks):
                distances = torch.cdist(codes, codes).fill_diagonal_(torch.inf)
                nearest = distances.min(dim=1).values
                if (nearest > 0).any():  # codes start as copies of each other where there are few items
                    self.thresholds[level] = nearest[nearest > 0].median() / 2

    def refresh_clusters(self, num_clusters: int, seed: int) -> None:
        """Cluster every level's codes anew, for the diversity term; sizes within 0.4 and 2.4 of the even share.

        (LETTER's code has 10 to 60 of 256 codes in each of 10 clusters, which are these shares.) A codebook too small
        for so many clusters of two codes has fewer.
        """
        num_clusters = min(num_clusters, self.space.codebook_size // 2)
        share = self.space.codebook_size / num_clusters
        sizes = {"min_size": max(2, round(0.4 * share)), "max_size": max(2, math.ceil(2.4 * share))}
        for level, codes in enumerate(self.codebooks.detach().cpu()):
            labels = balanced_kmeans(codes.numpy(), num_clusters, seed=seed, **sizes).labels
            self.cluster_labels[level] = torch.from_numpy(labels)

    def forward(self, batch: Batch, processes: Processes) -> "Outcome":
        """This process's part of each loss term of a batch, and which residual took which code."""
        whole = len(batch.is_known)
        latents = self.encoder(batch.inputs)
        quantised = self.quantise(latents, processes, whole)
        goals, config = self.objectives, self.config
        share = len(latents) / whole
        terms = {
            "reconstruction": share * nn.functional.mse_loss(self.decoder(quantised.vectors), batch.targets),
            "quantisation": share * quantised.loss,
        }
        own = torch.arange(batch.whole.start, batch.whole.stop, device=latents.device)
        if batch.collaborative is not None:
            terms["collaborative"] = goals.collaborative_weight * contrastive(
                quantised.vectors,
                batch.collaborative,
                own,
                batch.is_known,
                goals.collaborative_similarity,
                config.collaborative_temperature,
            )
        if batch.partner_inputs is not None:
            partners = self.quantise(self.encoder(batch.partner_inputs), processes, whole).vectors
            everyones = processes.gather_with_gradient(partners, whole)
            terms["cointeraction"] = goals.cointeraction_weight * contrastive(
                quantised.vectors, everyones, own, batch.has_partner, "cosine", config.cointeraction_temperature
            )
        if goals.diversity_weight:
            terms["diversity"] = share * goals.diversity_weight * self._diversity(quantised.codes, batch.uniform)
        if goals.uniformity_weight:
            by_level = [
                uniformity(self.codebooks[level], float(self.thresholds[level]))
                for level in range(self.space.num_levels)
            ]
            terms["uniformity"] = share * goals.uniformity_weight * torch.stack(by_level).mean()
        return Outcome(terms, quantised.codes, quantised.residuals)

    def quantise(self, latents: Tensor, processes: Processes, whole: int) -> "Quantised":
        """Codes level by level, of a share of `whole` latents. Training balances them; serving takes the nearest."""
        goals, config = self.objectives, self.config
        residual, total, codes, residuals, losses = latents, torch.zeros_like(latents), [], [], []
        for level, codebook in enumerate(self.codebooks):
            with torch.no_grad():
                distances = torch.cdist(residual, codebook).square()  # (B, K)
                if self.training and goals.load_balance:
                    distances = load_balanced(
                        distances, self.counts[level], goals.load_balance, config.load_balance_bound
                    )
                if self.training and goals.sinkhorn_last_level and level == self.space.num_levels - 1:
                    everyones = processes.gather(distances, whole)  # (G, K)
                    taken = sinkhorn(everyones, config.sinkhorn_epsilon, config.sinkhorn_iterations)
                    taken = taken[processes.share(whole)]
                else:
                    taken = distances.argmin(dim=1)
            vectors = codebook[taken]  # (B, d)
            learns = goals.codebook_update == "gradient"
            losses.append(quantisation(residual, vectors, config.commitment_weight, learns_codes=learns))
            codes.append(taken)
            residuals.append(residual.detach())
            residual, total = residual - vectors.detach(), total + vectors.detach()
        return Quantised(
            vectors=latents + (total - latents).detach(),  # straight through: the gradient is the latents'
            codes=torch.stack(codes, dim=1),
            residuals=torch.stack(residuals, dim=1),
            loss=torch.stack(losses).mean(),
        )

    def _diversity(self, codes: Tensor, uniform: Tensor) -> Tensor:
        by_level = []
        for level in range(self.space.num_levels):
            taken = codes[:, level]
            companions = CodeClusters.of(self.cluster_labels[level]).companions(taken, uniform[:, level])
            by_level.append(diversity(self.codebooks[level], taken, companions))
        return torch.stack(by_level).mean()

    @torch.no_grad()
    def track(self, codes: Tensor, residuals: Tensor, processes: Processes) -> Tensor:
        """Move the averages, and with EMA the codebooks, by a batch's codes (B, L); how often each was taken (L, K)."""
        taken = nn.functional.one_hot(codes, self.space.codebook_size).float()  # (B, L, K)
        taken_counts = processes.sum(taken.sum(dim=0))  # (L, K)
        decay = self.config.ema_decay
        self.counts.mul_(decay).add_(taken_counts, alpha=1 - decay)
        if self.objectives.codebook_update == "ema":
            taken_sums = processes.sum(torch.einsum("blk,bld->lkd", taken, residuals))
            self.sums.mul_(decay).add_(taken_sums, alpha=1 - decay)
            is_taken = self.counts > 1e-5  # a code that nobody takes stays where it was
            self.codebooks[is_taken] = self.sums[is_taken] / self.counts[is_taken][:, None]
        return taken_counts

    @torch.no_grad()
    def revive(self, is_dead: Tensor, residuals: Tensor, generator: np.random.Generator) -> None:
        """Put the dead codes (L, K) onto residuals of random items of a batch (G, L, d), each onto another item's.

        More dead codes than items: the rest wait for the next epoch.
        """
        for level in range(self.space.num_levels):
            dead = is_dead[level].nonzero()[:, 0][: len(residuals)]
            items = torch.from_numpy(generator.permutation(len(residuals))[: len(dead)])
            self.codebooks[level, dead] = residuals[items, level]
            self.counts[level, dead] = 1.0
            self.sums[level, dead] = residuals[items, level]


@dataclass(frozen=True)
class Quantised:
    """What `RqVae.quantise` makes of latents."""

    vectors: Tensor  # (B, d) sum of the codes, straight through
    codes: Tensor  # (B, L)
    residuals: Tensor  # (B, L, d) what each level had to quantise
    loss: Tensor


@dataclass(frozen=True)
class Outcome:
    """What a forward pass gives."""

    terms: dict[str, Tensor]  # weighted; their sum, over the processes too, is the loss
    codes: Tensor  # (B, L)
    residuals: Tensor  # (B, L, d)


def fit(
    config: TokenizerConfig,
    objectives: Objectives,
    space: SidSpace,
    signals: ItemSignals,
    folder: Path,
    processes: Processes,
) -> FitResult:
    """Train until the validation loss is flat, or `max_epochs`; resumes from the checkpoint in `folder`.

    Flat: over the last `convergence_window` epochs the best validation loss fell by less than the share
    `convergence_threshold`. That loss is reconstruction and quantisation, of items that take no part in training:
    their vectors are what new items can share with others; alignment and the like cannot be learned for them.
    """
    torch.manual_seed(config.seed)
    model = RqVae(config, objectives, space, signals.text.width)
    training, validation = _split(signals, config)
    if len(training) // -(-len(training) // config.batch_size) < processes.count:
        raise StageError(f"{len(training)} items do not keep {processes.count} processes busy: launch fewer")
    sample = np.sort(np.random.default_rng((config.seed, 1)).permutation(training)[: config.init_sample])
    with torch.no_grad():
        parts = np.array_split(sample, -(-len(sample) // 8192))
        latents = torch.cat([model.encoder(signals.inputs(part)) for part in parts]).numpy()
    model.set_codebooks(
        residual_codebooks(
            latents, space, objectives.initialisation, config.kmeans_restarts, config.threads, config.seed
        )
    )
    model.to(processes.device)
    wrapped = processes.prepare(model)
    optimizer = torch.optim.AdamW(
        (parameter for parameter in model.parameters() if parameter.requires_grad),
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
    )
    checkpoint = folder / CHECKPOINT
    resumed = load_checkpoint(checkpoint, model=model, optimizer=optimizer)
    curve: list[dict[str, float]] = resumed.extra["curve"] if resumed else []
    with progress_bar(f"tokenizer: {config.method}", config.max_epochs, len(curve)) as bar:
        while len(curve) < config.max_epochs and not _is_flat(curve, config):
            epoch = len(curve)
            if objectives.diversity_weight and epoch % config.cluster_refresh == 0:
                model.refresh_clusters(config.diversity_clusters, config.seed)
            curve.append(_train_epoch(wrapped, model, optimizer, signals, training, config, epoch, processes))
            curve[-1]["validation"] = _validation_loss(model, signals, validation)
            _refuse_divergence(curve, config)
            if processes.is_main and (epoch + 1) % config.checkpoint_epochs == 0:
                save_checkpoint(checkpoint, model=model, optimizer=optimizer, step=epoch + 1, extra={"curve": curve})
            bar.advance()
            bar.note(f"train {curve[-1]['train']:.4f}  validation {curve[-1]['validation']:.4f}")
    processes.wait_for_all()
    return FitResult(
        _dense_layers(model.encoder), model.codebooks.detach().cpu().numpy().copy(), curve, _is_flat(curve, config)
    )


def _train_epoch(
    wrapped: nn.Module,
    model: RqVae,
    optimizer: torch.optim.Optimizer,
    signals: ItemSignals,
    rows: npt.NDArray[np.int64],
    config: TokenizerConfig,
    epoch: int,
    processes: Processes,
) -> dict[str, float]:
    """One pass over the training items; the mean of each loss term."""
    generator = np.random.default_rng((config.seed, 2, epoch))
    wrapped.train()
    terms: dict[str, float] = {}
    taken = torch.zeros_like(model.counts)
    batches = np.array_split(generator.permutation(rows), max(1, -(-len(rows) // config.batch_size)))
    for batch_rows in batches:
        batch = _batch(signals, batch_rows, processes.share(len(batch_rows)), model, generator)
        outcome: Outcome = wrapped(batch, processes)
        loss = processes.count * torch.stack(list(outcome.terms.values())).sum()  # gradients are averaged
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        taken += model.track(outcome.codes, outcome.residuals, processes)
        for name, term in outcome.terms.items():
            terms[name] = terms.get(name, 0.0) + float(processes.sum(term.detach())) / len(batches)
    model.revive(taken == 0, processes.gather(outcome.residuals, len(batch_rows)), generator)
    return {"train": sum(terms.values()), **terms}


@torch.no_grad()
def _validation_loss(model: RqVae, signals: ItemSignals, rows: npt.NDArray[np.int64]) -> float:
    """Reconstruction and quantisation of the validation items with nearest codes, a mean over items."""
    model.eval()
    total = 0.0
    for start in range(0, len(rows), model.config.batch_size):
        part = rows[start : start + model.config.batch_size]
        targets = signals.inputs(part).to(model.counts.device)
        quantised = model.quantise(model.encoder(targets), Processes.alone(), len(part))
        reconstruction = nn.functional.mse_loss(model.decoder(quantised.vectors), targets)
        total += float(reconstruction + quantised.loss) * len(part)
    return total / len(rows)


def _split(signals: ItemSignals, config: TokenizerConfig) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Training and validation rows: held out are the items with the fewest interactions, which are most like new ones.

    With very few items both are all of them.
    """
    num_items = len(signals.text)
    order = np.random.default_rng((config.seed, 0)).permutation(num_items)
    order = order[np.argsort(signals.popularity[order], kind="stable")]
    held_out = min(round(config.validation_share * num_items), config.max_validation_items)
    return (order[held_out:], order[:held_out]) if held_out >= 2 else (order, order)


def _batch(
    signals: ItemSignals,
    rows: npt.NDArray[np.int64],
    share: slice,
    model: RqVae,
    generator: np.random.Generator,
) -> Batch:
    """This process's share of the batch of these rows; the draws are made for all of it, on every process alike."""
    config, objectives = model.config, model.objectives
    targets = signals.inputs(rows[share])
    inputs = targets
    keeps_text = generator.random(len(rows)) < config.graph_dropout
    if signals.mixed is not None and model.training:
        # A new item has no edges: some items are read by their text alone, and must reconstruct what the graph knows.
        text = torch.from_numpy(signals.text.rows(rows[share]))
        inputs = torch.where(torch.from_numpy(keeps_text[share])[:, None], text, targets)
    uniform = generator.random((len(rows), model.space.num_levels))
    partner_inputs, has_partner = None, np.zeros(len(rows), np.bool_)
    if objectives.cointeraction_weight and signals.partners is not None:
        partners = signals.partners.draw(rows, generator.random(len(rows)))
        has_partner = signals.partners.has_any(rows)
        partner_inputs = signals.inputs(partners[share]).to(model.counts.device)
    collaborative = None
    if objectives.collaborative_weight and signals.collaborative is not None:
        collaborative = torch.from_numpy(signals.collaborative[rows]).to(model.counts.device)
    return Batch(
        inputs=inputs.to(model.counts.device),
        targets=targets.to(model.counts.device),
        whole=share,
        collaborative=collaborative,
        is_known=torch.from_numpy(signals.popularity[rows] > 0).to(model.counts.device),
        partner_inputs=partner_inputs,
        has_partner=torch.from_numpy(has_partner).to(model.counts.device),
        uniform=torch.from_numpy(uniform[share]).to(model.counts.device),
    )


def _is_flat(curve: list[dict[str, float]], config: TokenizerConfig) -> bool:
    if len(curve) <= config.convergence_window:
        return False
    losses = [epoch["validation"] for epoch in curve]
    before, now = min(losses[: -config.convergence_window]), min(losses)
    return before - now < config.convergence_threshold * abs(before)


def _refuse_divergence(curve: list[dict[str, float]], config: TokenizerConfig) -> None:
    for name, value in curve[-1].items():
        if not math.isfinite(value) or abs(value) > _DIVERGED * max(1.0, abs(curve[0][name])):
            raise StageError(
                f"the tokenizer's {name} loss became {value:.3g} in epoch {len(curve)}: lower tokenizer.learning_rate, "
                f"now {config.learning_rate}, or the weight of that term"
            )


def _mlp(widths: list[int]) -> nn.Sequential:
    """Linear layers with ReLU between them; Xavier-normal weights and zero biases (LETTER's code)."""
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        linear = nn.Linear(before, after)
        nn.init.xavier_normal_(linear.weight)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _dense_layers(encoder: nn.Sequential) -> tuple[DenseLayer, ...]:
    return tuple(
        DenseLayer(layer.weight.detach().cpu().numpy().copy(), layer.bias.detach().cpu().numpy().copy())
        for layer in encoder
        if isinstance(layer, nn.Linear)
    )
