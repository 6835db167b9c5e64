"""Which experiments there are. One model for the YAML file and the admin API: whatever the way in, the same rules.

A layer is a hash space [0, 1) of users. Its running experiments own intervals of it that do not overlap: a user is in
at most one experiment of a layer. Layers are independent of each other, so experiments of different layers meet in all
combinations; hence they may not override the same field.

**Ramps are sticky by construction.** A user's point in a layer and point among an experiment's variants are hashes that
know nothing of traffic. An interval says where it starts, so nobody else's ramp moves it, and a ramp moves its end
outwards only: who was in stays in, with the same variant. `check_follows` refuses a change that would break this.
"""

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations, pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from semantic_ids.bundle import BUNDLE_ID

Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_.-]{0,63}$")]
"""Of a layer, an experiment or a variant; it stands in paths, Redis keys and metric labels."""
Share = Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)]
Metric = Literal["ctr", "conversion"]


@dataclass(frozen=True)
class ConfigProblem:
    """One thing wrong with a configuration."""

    field: str
    rule: str

    def __str__(self) -> str:
        return f"{self.field}: {self.rule}" if self.field else self.rule


class ExperimentsConfigError(ValueError):
    """A configuration that breaks a rule. Names its source, the fields and the rules."""

    def __init__(self, source: str, problems: Sequence[ConfigProblem]) -> None:
        super().__init__(f"{source}: {'; '.join(map(str, problems))}")
        self.problems = tuple(problems)


_ORDERING = frozenset({"reasoning", "diversity"})
_WHY_NOT = "the order after the thought would be the order before it with `reasoning`, and undoes `diversity`"


class _Model(BaseModel):
    # Strict, but for what has no type of its own in JSON: tuples and dates.
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class VariantOverrides(_Model):
    """What a variant changes for its users; None leaves a field as the service and the request have it."""

    bundle: Annotated[str, StringConstraints(pattern=f"^{BUNDLE_ID}$")] | None = None
    reasoning: bool | None = None
    rationale: bool | None = None
    rerank: bool | None = Field(
        None, description="whether the model thinks about what it has retrieved, and orders it anew"
    )
    beam_width: int | None = Field(None, ge=1, le=500)
    diversity: Share | None = None

    @property
    def thinks(self) -> bool:
        """Whether the model is to think, be it before it retrieves or after."""
        return self.reasoning is True or self.rerank is True

    def fields(self) -> frozenset[str]:
        """The fields that are overridden."""
        return frozenset(self.model_dump(exclude_none=True))

    @model_validator(mode="after")
    def _one_order(self) -> Self:
        if self.rerank and (other := _ORDERING & self.wishes()):
            raise ValueError(
                f"`rerank: true` with {' and '.join(sorted(other))} makes no sense: {_WHY_NOT}. Override one of them"
            )
        return self

    def wishes(self) -> frozenset[str]:
        """The fields that are overridden by more than what is so anyway."""
        return frozenset(name for name, value in self.model_dump(exclude_none=True).items() if value)


class Variant(_Model):
    """One arm; its share of the experiment's users is its weight among the weights."""

    name: Name
    weight: float = Field(1.0, gt=0.0, le=1e6, allow_inf_nan=False)
    control: bool = False
    overrides: VariantOverrides = VariantOverrides()


class Experiment(_Model):
    """One question: does a variant beat the control?"""

    name: Name
    salt: Annotated[str, StringConstraints(min_length=1, max_length=128)] | None = Field(
        None, description="of the hash that chooses the variant; absent: the name"
    )
    traffic: tuple[Share, Share] = Field(
        strict=False, description="the interval [start, end) of the layer's hash space"
    )
    status: Literal["running", "stopped"] = "running"
    variants: tuple[Variant, ...] = Field(strict=False, min_length=2, max_length=20)
    primary_metric: Metric = "ctr"
    minimum_lift: float = Field(
        0.1,
        gt=0.0,
        le=10.0,
        allow_inf_nan=False,
        description="the relative lift that the experiment is planned to see: the sequential test is quickest there",
    )
    started_at: AwareDatetime | None = Field(None, strict=False)

    @property
    def is_running(self) -> bool:
        """Whether users are assigned to it."""
        return self.status == "running"

    @property
    def effective_salt(self) -> str:
        """The salt, or the name in its place."""
        return self.salt if self.salt is not None else self.name

    @property
    def control(self) -> Variant:
        """What the others are compared with."""
        return next(variant for variant in self.variants if variant.control)

    def overridden_fields(self) -> frozenset[str]:
        """The fields that any variant overrides."""
        return frozenset().union(*(variant.overrides.fields() for variant in self.variants))

    def wishes(self) -> frozenset[str]:
        """Those of them that any variant overrides by more than what is so anyway, such as a diversity of 0."""
        return frozenset().union(*(variant.overrides.wishes() for variant in self.variants))

    def bundles(self) -> frozenset[str]:
        """The bundles that its variants name."""
        named = (variant.overrides.bundle for variant in self.variants)
        return frozenset(bundle_id for bundle_id in named if bundle_id is not None)

    @model_validator(mode="after")
    def _check(self) -> Self:
        start, end = self.traffic
        if start >= end:
            raise ValueError(f"traffic [{start:g}, {end:g}) is empty: the end must lie above the start")
        if repeated := _repeated([variant.name for variant in self.variants]):
            raise ValueError(f"more than one variant is named {repeated!r}: name each one once")
        controls = [variant.name for variant in self.variants if variant.control]
        if len(controls) != 1:
            raise ValueError(f"exactly one variant must have `control: true`, and {controls or 'none'} has")
        return self


class Layer(_Model):
    """A hash space of users, shared out among experiments that must not meet."""

    name: Name
    experiments: tuple[Experiment, ...] = Field((), strict=False, max_length=100)

    def running(self) -> list[Experiment]:
        """The experiments that assign users, by where they start."""
        return sorted((one for one in self.experiments if one.is_running), key=lambda one: one.traffic)

    @model_validator(mode="after")
    def _mutually_exclusive(self) -> Self:
        for one, following in pairwise(self.running()):
            if following.traffic[0] < one.traffic[1]:
                raise ValueError(
                    f"experiments {one.name!r} {_interval(one)} and {following.name!r} {_interval(following)} overlap, "
                    "and running experiments of a layer must not: move the newer one, or put it into another layer"
                )
        return self


class ExperimentsConfig(_Model):
    """Every layer and experiment of a deployment; immutable, an edit gives another one."""

    layers: tuple[Layer, ...] = Field((), strict=False, max_length=50)

    @classmethod
    def load(cls, path: Path) -> Self:
        """The configuration of a YAML file. Raises ExperimentsConfigError, which names file, field and rule."""
        try:
            content: Any = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys)  # noqa: S506 - a SafeLoader
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            reason = " ".join(str(error).split())
            raise ExperimentsConfigError(str(path), [ConfigProblem("", f"no readable YAML file: {reason}")]) from error
        return cls._validated(content if content is not None else {}, str(path))

    @classmethod
    def parse(cls, text: str) -> Self:
        """The configuration that `model_dump_json` wrote. Raises ExperimentsConfigError."""
        with _explained("experiments"):
            return cls.model_validate_json(text)

    def experiment(self, name: str) -> Experiment | None:
        """The experiment of that name, or None."""
        return next((one for _, one in self._all() if one.name == name), None)

    def with_experiment(self, layer_name: str, experiment: Experiment) -> Self:
        """The same with `experiment` added to its layer (made if need be), or in the place of the one of its name.

        Raises ExperimentsConfigError where the outcome breaks a rule, or is no successor (see `check_follows`).
        """
        layers = {layer.name: list(layer.experiments) for layer in self.layers}
        siblings = layers.setdefault(layer_name, [])
        place = next((place for place, one in enumerate(siblings) if one.name == experiment.name), len(siblings))
        siblings[place : place + 1] = [experiment]
        edited = self._of_layers(layers)
        edited.check_follows(self)
        return edited

    def without(self, name: str) -> Self:
        """The same without the experiment of that name. Raises ExperimentsConfigError where there is none."""
        if self.experiment(name) is None:
            raise ExperimentsConfigError("experiments", [ConfigProblem("name", f"there is no experiment {name!r}")])
        return self._of_layers(
            {layer.name: [one for one in layer.experiments if one.name != name] for layer in self.layers}
        )

    def check_follows(self, previous: "ExperimentsConfig") -> None:
        """Raise ExperimentsConfigError if a user of an experiment would leave it or change variant since `previous`.

        Of an experiment that both have, only the end of its interval may change, upwards, and its status and dates:
        for anything else make an experiment of another name. That an experiment was removed and came back different
        cannot be seen here.
        """
        known = {experiment.name: (layer, experiment) for layer, experiment in previous._all()}
        problems = [
            ConfigProblem(f"{layer.name}.{experiment.name}.{field}", rule)
            for layer, experiment in self._all()
            if experiment.name in known
            for field, rule in _broken_promises(known[experiment.name], (layer, experiment))
        ]
        if problems:
            raise ExperimentsConfigError("experiments", problems)

    def _all(self) -> Iterator[tuple[Layer, Experiment]]:
        return ((layer, one) for layer in self.layers for one in layer.experiments)

    @classmethod
    def _of_layers(cls, layers: dict[str, list[Experiment]]) -> Self:
        content = [
            {"name": name, "experiments": [one.model_dump(mode="json") for one in experiments]}
            for name, experiments in layers.items()
        ]
        return cls._validated({"layers": content}, "experiments")

    @classmethod
    def _validated(cls, content: object, source: str) -> Self:
        with _explained(source):
            return cls.model_validate(content)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if repeated := _repeated([layer.name for layer in self.layers]):
            raise ValueError(f"more than one layer is named {repeated!r}: name each one once")
        if repeated := _repeated([one.name for _, one in self._all()]):
            raise ValueError(f"more than one experiment is named {repeated!r}: names are unique across layers")
        running = [(layer.name, one) for layer, one in self._all() if one.is_running]
        for (one_layer, one), (other_layer, other) in combinations(running, 2):
            if one_layer == other_layer:
                continue
            if one.effective_salt == other.effective_salt:
                raise ValueError(
                    f"experiments {one.name!r} and {other.name!r} of different layers share the salt "
                    f"{one.effective_salt!r}, so the one's variants would follow the other's: give each its own"
                )
            if both := sorted(one.overridden_fields() & other.overridden_fields()):
                raise ValueError(
                    f"experiments {one.name!r} and {other.name!r} of different layers both override "
                    f"{', '.join(both)}, and a user may be in both: put them into one layer"
                )
            for reranks, orders in ((one, other), (other, one)):
                if "rerank" in reranks.wishes() and (clash := sorted(_ORDERING & orders.wishes())):
                    raise ValueError(
                        f"experiments {reranks.name!r} (rerank) and {orders.name!r} ({', '.join(clash)}) of different "
                        f"layers make no sense for one user, and a user may be in both: {_WHY_NOT}. Put them into "
                        "one layer"
                    )
        return self


class _UniqueKeys(yaml.SafeLoader):
    """YAML in which no key may be given twice: the first would be lost in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [key.value for key, _ in node.value]
        if repeated := _repeated([key for key in keys if isinstance(key, str)]):
            raise yaml.constructor.ConstructorError(None, None, f"the key {repeated!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


@contextmanager
def _explained(source: str) -> Iterator[None]:
    """Pydantic's errors as ExperimentsConfigError."""
    try:
        yield
    except ValidationError as error:
        problems = [ConfigProblem(_field(one["loc"]), _rule(one["msg"])) for one in error.errors()]
        raise ExperimentsConfigError(source, problems) from error


def _field(location: Sequence[int | str]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).lstrip(".")


def _rule(message: str) -> str:
    return message.removeprefix("Value error, ")


def _interval(experiment: Experiment) -> str:
    start, end = experiment.traffic
    return f"[{start:g}, {end:g})"


def _repeated(names: Sequence[str]) -> str | None:
    return next((name for index, name in enumerate(names) if name in names[:index]), None)


def _broken_promises(
    previous: tuple[Layer, Experiment], current: tuple[Layer, Experiment]
) -> Iterator[tuple[str, str]]:
    """(field, rule) of every change that would move a user, or mix what different treatments did."""
    (old_layer, old), (new_layer, new) = previous, current
    if old_layer.name != new_layer.name:
        yield "layer", f"it was in layer {old_layer.name!r}, where other users are in it"
    if new.effective_salt != old.effective_salt:
        yield "salt", "it may not change: users would change variant"
    if new.traffic[0] != old.traffic[0]:
        yield "traffic", f"its start may not move (was {old.traffic[0]:g}): users would leave"
    if new.traffic[1] < old.traffic[1]:
        yield "traffic", f"its end may only grow (was {old.traffic[1]:g}): users would leave; stop the experiment"
    if new.variants != old.variants:
        yield "variants", "they may not change: users would change variant, or variants their meaning"
    if new.minimum_lift != old.minimum_lift:
        yield "minimum_lift", "it may not change: the sequential test holds for the one it began with"
