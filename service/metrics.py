"""Every Prometheus metric of the service, by name and meaning; no other module creates one."""

from collections.abc import Collection, Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.metrics_core import Metric, SummaryMetricFamily
from prometheus_client.registry import Collector

from service.engine.base import ThoughtEnd
from service.foreign_metrics import ForeignFamilies

CONTENT_TYPE = CONTENT_TYPE_LATEST

_LATENCY_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class Pauses(Collector):
    """How often and how long something stood still, in plain numbers: no lock, so it may be told of anywhere.

    Python looks for cycles in the midst of anything, even while a metric's lock is held, which is taken only once.
    """

    def __init__(self, name: str, documentation: str) -> None:
        self._name, self._documentation = name, documentation
        self._count, self._seconds = 0, 0.0

    def add(self, seconds: float) -> None:
        """One more, of so long."""
        self._count += 1
        self._seconds += seconds

    def collect(self) -> Iterable[Metric]:
        """The registry's."""
        yield SummaryMetricFamily(self._name, self._documentation, count_value=self._count, sum_value=self._seconds)


class Metrics:
    """One set of metrics in a registry of its own, so that an application can be made twice in a process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.vllm = ForeignFamilies("vllm:")
        self.registry.register(self.vllm)
        self.requests = Counter(
            "sidrec_http_requests", "HTTP requests by outcome.", ("method", "route", "status"), registry=self.registry
        )
        self.request_seconds = Histogram(
            "sidrec_http_request_seconds",
            "Time to answer, every status.",
            ("route",),
            buckets=_LATENCY_BUCKETS_S,
            registry=self.registry,
        )
        self.in_flight = Gauge("sidrec_http_in_flight", "Requests being answered.", registry=self.registry)
        self.in_flight_limit = Gauge(
            "sidrec_http_in_flight_limit", "How many may be: less while the event loop lags.", registry=self.registry
        )
        self.event_loop_lag = Histogram(
            "sidrec_event_loop_lag_seconds",
            "How late the event loop was, the wait for a turn included, looked at every 10 ms.",
            buckets=_LATENCY_BUCKETS_S,
            registry=self.registry,
        )
        self.gc_pauses = Pauses(
            "sidrec_gc_pause_seconds", "Collections of garbage in this process, all of which stood still meanwhile."
        )
        self.registry.register(self.gc_pauses)
        self.shed = Counter(
            "sidrec_shed", "Requests turned away with 503, by reason.", ("reason",), registry=self.registry
        )
        self.rate_limited = Counter(
            "sidrec_rate_limited", "Requests turned away with 429, by key.", ("key",), registry=self.registry
        )
        self.rate_limit_failures = Counter(
            "sidrec_rate_limit_failures", "Requests let pass uncounted: Redis did not answer.", registry=self.registry
        )
        self.predicted_wait = Gauge(
            "sidrec_predicted_wait_seconds",
            "How long a bundle's engine would take to answer a request that came now.",
            ("bundle",),
            registry=self.registry,
        )
        self.fallback_items = Counter(
            "sidrec_fallback_items", "Items not from the model, by list.", ("source",), registry=self.registry
        )
        self.breaker_state = Gauge(
            "sidrec_breaker_state",
            "0 closed, 1 half-open, 2 open; of every bundle's engine.",
            ("dependency", "bundle"),
            registry=self.registry,
        )
        self.breaker_opened = Counter(
            "sidrec_breaker_opened", "Times a breaker opened.", ("dependency",), registry=self.registry
        )
        self.answers = Counter(
            "sidrec_answers", "Answers by source and reason.", ("endpoint", "source", "reason"), registry=self.registry
        )
        self.stage_seconds = Histogram(
            "sidrec_stage_seconds", "Time by stage.", ("stage",), buckets=_LATENCY_BUCKETS_S, registry=self.registry
        )
        self.events = Counter("sidrec_events", "Events by outcome.", ("outcome",), registry=self.registry)
        self.history_failures = Counter(
            "sidrec_history_failures", "Times that Redis did not answer or refused.", registry=self.registry
        )
        self.engine_ready = Gauge("sidrec_engine_ready", "Whether the engine takes requests.", registry=self.registry)
        self.engine_waiting = Gauge("sidrec_engine_waiting", "Requests not yet in a batch.", registry=self.registry)
        self.engine_batch_size = Histogram(
            "sidrec_engine_batch_size", "Requests per batch.", buckets=(1, 2, 4, 8, 16, 32, 64), registry=self.registry
        )
        self.engine_steps = Counter("sidrec_engine_steps", "Beam steps.", registry=self.registry)
        self.engine_beams = Counter("sidrec_engine_beams", "Prefixes kept, over all steps.", registry=self.registry)
        self.engine_closed_beams = Counter(
            "sidrec_engine_closed_beams",
            "Prefixes with one SID left, which need no forward pass.",
            registry=self.registry,
        )
        self.engine_masked_share = Histogram(
            "sidrec_engine_masked_share",
            "Share of codes that were illegal, per search.",
            buckets=(0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1.0),
            registry=self.registry,
        )
        self.engine_prompt_tokens = Counter(
            "sidrec_engine_prompt_tokens",
            "Prompt tokens that were kept from prompts before, and computed.",
            ("from",),
            registry=self.registry,
        )
        self.engine_prefill_seconds = Histogram(
            "sidrec_engine_prefill_seconds",
            "From a prompt's submission to its capture, waiting included.",
            buckets=_LATENCY_BUCKETS_S,
            registry=self.registry,
        )
        self.engine_beam_seconds = Histogram(
            "sidrec_engine_beam_seconds",
            "One call of the beam inside vLLM's process.",
            buckets=_LATENCY_BUCKETS_S,
            registry=self.registry,
        )
        self.engine_captures = Gauge(
            "sidrec_engine_captures", "Prompts captured and not yet searched.", registry=self.registry
        )
        self.engine_restarts = Counter(
            "sidrec_engine_restarts", "Engine processes made anew after a death.", registry=self.registry
        )
        self.engine_request_errors = Counter(
            "sidrec_engine_request_errors", "Requests that failed inside the engine.", ("kind",), registry=self.registry
        )
        self.engine_think_tokens = Counter(
            "sidrec_engine_think_tokens", "Tokens of thoughts, closes not counted.", registry=self.registry
        )
        self.engine_thoughts = Counter(
            "sidrec_engine_thoughts", "Thoughts by what ended them.", ("end",), registry=self.registry
        )
        self.rationale_cuts = Counter(
            "sidrec_rationale_cuts",
            "Sentences cut from rationales, by what they named that they may not.",
            ("kind",),
            registry=self.registry,
        )
        self.step_traces = Counter(
            "sidrec_step_traces",
            "Rationales asked of bundles that think in steps: shown, or why not.",
            ("outcome",),
            registry=self.registry,
        )
        self.thought_cache = Counter(
            "sidrec_thought_cache",
            "Thoughts looked up (hit, miss), kept (write, or moved: the history had) and failures of either.",
            ("outcome",),
            registry=self.registry,
        )
        self.think_ahead = Counter(
            "sidrec_think_ahead",
            "Users that a worker was to think for: asked, known (asked already, or erased) or dropped.",
            ("outcome",),
            registry=self.registry,
        )
        self.exposures_dropped = Counter(
            "sidrec_exposures_dropped", "Exposures and outcomes of experiments that were lost.", registry=self.registry
        )
        self.served_log_dropped = Counter(
            "sidrec_served_log_dropped", "Answers and outcomes missing in the log.", registry=self.registry
        )
        self.experiment_waits = Gauge(
            "sidrec_experiment_waits",
            "1 for each running experiment that is not in force here.",
            ("experiment",),
            registry=self.registry,
        )
        self.reranks = Counter(
            "sidrec_reranks",
            "Answers that an experiment wants re-ranked after a thought, by whether they were.",
            ("outcome",),
            registry=self.registry,
        )
        self.bundle = Gauge("sidrec_bundle", "1 for the bundle being served.", ("bundle",), registry=self.registry)
        self.bundle_beside = Gauge(
            "sidrec_bundle_beside",
            "1 for each bundle served beside it, for an experiment.",
            ("bundle",),
            registry=self.registry,
        )
        self.activations = Counter(
            "sidrec_bundle_activations",
            "Bundles that were to be served, by outcome.",
            ("outcome",),
            registry=self.registry,
        )
        self.catalog_epoch = Gauge("sidrec_catalog_epoch", "The catalogue epoch being served.", registry=self.registry)
        self.catalog_changes = Counter(
            "sidrec_catalog_changes", "Items put and deleted through this process.", ("kind",), registry=self.registry
        )
        self.catalog_build_seconds = Histogram(
            "sidrec_catalog_build_seconds",
            "Time to make a catalogue epoch.",
            buckets=_LATENCY_BUCKETS_S,
            registry=self.registry,
        )

    def experiments_wait(self, names: Collection[str]) -> None:
        """These running experiments are not in force, and all others are."""
        self.experiment_waits.clear()
        for name in names:
            self.experiment_waits.labels(name).set(1)

    def forget_bundle(self, bundle_id: str) -> None:
        """The bundle's engine has stopped: what it was like is of no interest any more."""
        self.predicted_wait.remove(bundle_id)
        self.breaker_state.remove("engine", bundle_id)

    def count_beam_work(self, steps: int, beams: int, closed_beams: int, masked_share: float) -> None:
        """Add what one search did."""
        self.engine_masked_share.observe(masked_share)
        self.engine_steps.inc(steps)
        self.engine_beams.inc(beams)
        self.engine_closed_beams.inc(closed_beams)

    def count_prompt_tokens(self, tokens: int, cached: int) -> None:
        """Add prompts of so many tokens in all, of which `cached` were not computed again."""
        self.engine_prompt_tokens.labels("cached").inc(cached)
        self.engine_prompt_tokens.labels("computed").inc(tokens - cached)

    def count_thought(self, tokens: int, end: ThoughtEnd) -> None:
        """Add one thought that reached its end."""
        self.engine_think_tokens.inc(tokens)
        self.engine_thoughts.labels(end).inc()

    def exposition(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self.registry)
