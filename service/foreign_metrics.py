"""Families that a library registers in the process-wide Prometheus registry, taken over into the service's own.

vLLM does so, and every further engine removes the families of the one before. So they are taken out as soon as an
engine is made, and told apart by a `replica` label.
"""

from collections.abc import Iterable
from itertools import count
from typing import Any

from prometheus_client import REGISTRY
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector


class ForeignFamilies(Collector):
    """What a library counts, once for each of its replicas."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._of_replica: dict[int, list[Collector]] = {}

    def claim(self) -> int:
        """The lowest number that no replica has."""
        number = next(number for number in count() if number not in self._of_replica)
        self._of_replica[number] = []
        return number

    def take_over(self, replica: int) -> None:
        """Own the families that were just registered; those that this replica had before go."""
        found = [collector for collector in list(_registered()) if _name(collector).startswith(self._prefix)]
        for collector in found:
            REGISTRY.unregister(collector)
        self._of_replica[replica] = found

    def release(self, replica: int) -> None:
        """The replica is gone, and its number free."""
        self._of_replica.pop(replica, None)

    def describe(self) -> Iterable[Metric]:
        """Nothing beforehand: the families appear with the first replica."""
        return []

    def collect(self) -> Iterable[Metric]:
        """Every family once, with the samples of every replica."""
        families: dict[str, Metric] = {}
        for replica, collectors in self._of_replica.items():
            for collector in collectors:
                for family in collector.collect():
                    whole = families.setdefault(
                        family.name, Metric(family.name, family.documentation, family.type, family.unit)
                    )
                    for sample in family.samples:
                        labels = {**sample.labels, "replica": str(replica)}
                        whole.samples.append(sample._replace(labels=labels))
        return families.values()


def _registered() -> Iterable[Collector]:
    return REGISTRY._collector_to_names  # the library's own way to list them is private


def _name(collector: Any) -> str:  # noqa: ANN401
    return str(getattr(collector, "_name", ""))
