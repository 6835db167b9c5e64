"""What experiments make of one request: the variants that its user is in, and the request as they want it answered."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

from service.experiments.assignment import Assignment, merged_overrides
from service.experiments.config import VariantOverrides
from service.schemas import UserRequest

R = TypeVar("R", bound=UserRequest)


@dataclass(frozen=True)
class Treatment:
    """The variants of one request, known before it is decided which bundle answers it."""

    assignments: tuple[Assignment, ...] = ()

    @cached_property
    def overrides(self) -> VariantOverrides:
        """What they change, together."""
        return merged_overrides(self.assignments)

    def applied_to(self, request: R) -> R:
        """The request as the variants want it answered, so far as a request of its kind can say it."""
        if not self.assignments:
            return request
        reasoning = {None: None, True: "on", False: "off"}[self.overrides.reasoning]
        wishes: dict[str, Any] = {
            "include_rationale": self.overrides.rationale,
            "diversity": self.overrides.diversity,
            "reasoning": reasoning,
        }
        fields = type(request).model_fields
        return request.model_copy(
            update={name: wish for name, wish in wishes.items() if wish is not None and name in fields}
        )


UNTREATED = Treatment()


def leaves_open(request: UserRequest) -> bool:
    """Whether the request has no wish of its own for what experiments vary: else its variant would not show in it."""
    wishes = {"include_rationale", "diversity", "exploration"} & request.model_fields_set
    return request.reasoning == "auto" and not wishes
