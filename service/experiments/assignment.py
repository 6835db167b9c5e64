"""Who gets what: a pure function of the configuration and the user id, the same in every process and at every time.

A user has one point in [0, 1) for each layer and one for each experiment's salt, 64 bits of keyed BLAKE2b each; the
keys differ, so the points are independent. The layer's point says which experiment, if any, the salt's which variant.
A request without a user id has no unit that would come back, so it is not assigned and counts in no experiment.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import accumulate

from service.experiments.config import Experiment, ExperimentsConfig, Layer, VariantOverrides

_POINTS = 1 << 64


@dataclass(frozen=True)
class Assignment:
    """A user's variant of one experiment."""

    layer: str
    experiment: str
    variant: str
    overrides: VariantOverrides


class Assigner:
    """Assigns users under one configuration; to experiments that are `waiting`, by name, it assigns nobody."""

    def __init__(self, config: ExperimentsConfig, waiting: Collection[str] = ()) -> None:
        self._layers = [_LayerPlan(layer, waiting) for layer in config.layers if layer.running()]

    def assign(self, user_id: str | None) -> tuple[Assignment, ...]:
        """At most one assignment for each layer, in the order of the layers; none for an anonymous request."""
        if user_id is None:
            return ()
        unit = user_id.encode("utf-8", "surrogatepass")  # JSON can carry a lone surrogate
        found = (layer.assign(unit) for layer in self._layers)
        return tuple(assignment for assignment in found if assignment is not None)


def merged_overrides(assignments: Iterable[Assignment]) -> VariantOverrides:
    """All overrides of one request; experiments that may meet never override the same field."""
    merged = VariantOverrides()
    for assignment in assignments:
        fields = assignment.overrides.fields()
        merged = merged.model_copy(update={field: getattr(assignment.overrides, field) for field in fields})
    return merged


class _LayerPlan:
    def __init__(self, layer: Layer, waiting: Collection[str]) -> None:
        self._key = _hash_key("layer", layer.name)
        self._experiments = [_ExperimentPlan(layer, one) for one in layer.running() if one.name not in waiting]

    def assign(self, unit: bytes) -> Assignment | None:
        point = _point(unit, self._key)
        for experiment in self._experiments:
            if experiment.start <= point < experiment.end:
                return experiment.assign(unit)
        return None


class _ExperimentPlan:
    def __init__(self, layer: Layer, experiment: Experiment) -> None:
        self.start, self.end = (_threshold(share) for share in experiment.traffic)
        self._key = _hash_key("variant", experiment.effective_salt)
        self._ends = _variant_ends([variant.weight for variant in experiment.variants])
        self._assignments = [
            Assignment(layer.name, experiment.name, variant.name, variant.overrides) for variant in experiment.variants
        ]

    def assign(self, unit: bytes) -> Assignment:
        point = _point(unit, self._key)
        return next(one for end, one in zip(self._ends, self._assignments, strict=True) if point < end)


def _hash_key(purpose: str, name: str) -> bytes:
    return blake2b(f"{purpose}\0{name}".encode("utf-8", "surrogatepass"), digest_size=32).digest()


def _point(unit: bytes, key: bytes) -> int:
    return int.from_bytes(blake2b(unit, digest_size=8, key=key).digest(), "big")


def _threshold(share: float) -> int:
    return round(share * _POINTS)


def _variant_ends(weights: Sequence[float]) -> list[int]:
    """Where each variant's interval ends; the last one at the very end, whatever the rounding."""
    total = sum(weights)
    return [*(_threshold(end / total) for end in accumulate(weights[:-1])), _POINTS]
