"""vLLM's own Prometheus families in this service's registry.

vLLM registers them in the process-wide registry, and every further engine removes those of the one before. So they are
taken out as soon as an engine is made, and given a `replica` label.
"""

from collections.abc import Iterable
from typing import Any

from prometheus_client import REGISTRY
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

PREFIX = "vllm:"


class VllmFamilies(Collector):
    """What vLLM counts, of all replicas."""

    def __init__(self) -> None:
        self._of_replica: dict[int, list[Collector]] = {}

    def take_over(self, replica: int) -> None:
        """Own the families that the engine just made has registered; a restarted replica's replace its old ones."""
        found = [collector for collector in list(_registered()) if _name(collector).startswith(PREFIX)]
        for collector in found:
            REGISTRY.unregister(collector)
        self._of_replica[replica] = found

    def describe(self) -> Iterable[Metric]:
        """Nothing beforehand: the families appear with the first engine."""
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
