"""Prometheus metrics: a registry per gateway, get-or-create for plugins, and the metrics of every call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from attrs import define, field
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from qlens import errors
from qlens.usage import BUCKETS

if TYPE_CHECKING:
    from qlens.call import Attempt, Receipt

M = TypeVar("M", Counter, Gauge, Histogram)

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
OVERHEAD = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.1, 1)
PICOS = 10**12
NONE = "-"
"""The label of what a call did not reach."""
OTHER = "other"
"""The label of an error that the gateway has no name of its own for."""

_CLASSES = [thing for thing in vars(errors).values() if isinstance(thing, type) and issubclass(thing, errors.CallError)]
_RESULTS = frozenset(
    {
        "client_closed",
        "content_policy_violation",
        "context_length_exceeded",
        "internal_error",
        "provider_failed",
        "shutting_down",
        "unanswered",
        "upstream_tls",
        *(name for cls in _CLASSES for name in (cls.code, cls.type) if name),
    }
)


@define(eq=False)
class Metrics:
    """Makes metrics, or hands out those of the same name; every gateway has its own set."""

    registry: CollectorRegistry = field(factory=lambda: CollectorRegistry(auto_describe=True))
    _made: dict[str, Any] = field(factory=dict)

    def counter(self, name: str, doc: str, labels: Sequence[str] = ()) -> Counter:
        """A counter; its name ends in `_total`."""
        return self._get(Counter, name, doc, labels)

    def gauge(self, name: str, doc: str, labels: Sequence[str] = ()) -> Gauge:
        """A gauge."""
        return self._get(Gauge, name, doc, labels)

    def histogram(
        self, name: str, doc: str, labels: Sequence[str] = (), buckets: Sequence[float] = SECONDS
    ) -> Histogram:
        """A histogram; its name ends in a unit."""
        return self._get(Histogram, name, doc, labels, buckets=buckets)

    def _get(self, kind: type[M], name: str, doc: str, labels: Sequence[str], **options: Any) -> M:
        made = self._made.get(name)
        if made is None:
            made = self._made[name] = kind(name, doc, labels, registry=self.registry, **options)
        if not isinstance(made, kind):
            raise TypeError(f"metric {name} exists already as a {type(made).__name__.lower()}")
        return made

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)


@define(eq=False)
class Labelled(Generic[M]):
    """A metric whose children are looked up once: finding one by its labels costs more than counting it."""

    metric: M
    _children: dict[tuple[str, ...], M] = field(factory=dict, init=False)

    def labels(self, *labels: str) -> M:
        """The child with these labels."""
        child = self._children.get(labels)
        if child is None:
            child = self._children[labels] = self.metric.labels(*labels)
        return child


class CallMetrics:
    """The metrics of every call. Labels come from the configuration only, never from a client's text."""

    def __init__(self, metrics: Metrics) -> None:
        call = ("operation", "model", "outcome")
        self.calls = Labelled(
            metrics.counter("qlens_calls_total", "Calls that were authenticated, by how they ended.", call)
        )
        self.refused = Labelled(
            metrics.counter(
                "qlens_refused_total", "Requests that were refused before they had an account, by status.", ("status",)
            )
        )
        self.running = metrics.gauge("qlens_calls_running", "Calls on their way.")
        self.seconds = Labelled(metrics.histogram("qlens_call_seconds", "Time from request to end of answer.", call))
        self.overhead = metrics.histogram(
            "qlens_overhead_seconds", "Time of a call that was not spent waiting for a provider.", buckets=OVERHEAD
        )
        self.first = Labelled(
            metrics.histogram("qlens_first_byte_seconds", "Time to the first byte of a streamed answer.", ("model",))
        )
        self.attempts = Labelled(
            metrics.counter("qlens_attempts_total", "Sends to targets, by provider and result.", ("provider", "result"))
        )
        self.tokens = Labelled(
            metrics.counter("qlens_tokens_total", "Tokens used, in disjoint buckets.", ("model", "provider", "bucket"))
        )
        self.cost = Labelled(
            metrics.counter("qlens_cost_usd_total", "Cost of billed attempts in USD.", ("model", "provider"))
        )
        self.unpriced = Labelled(
            metrics.counter("qlens_unpriced_total", "Billed attempts whose price is unknown.", ("model", "provider"))
        )
        self.saved = Labelled(
            metrics.counter("qlens_saved_usd_total", "What cached answers would have cost in USD.", ("model",))
        )
        self.failures = Labelled(
            metrics.counter("qlens_plugin_failures_total", "Hooks that failed by themselves.", ("plugin", "hook"))
        )
        self.loads = metrics.counter("qlens_config_loads_total", "Configurations loaded or refused.", ("result",))

    def settled(self, receipt: Receipt) -> None:
        """Count a finished call."""
        model = receipt.model or NONE
        self.calls.labels(receipt.operation, model, receipt.outcome).inc()
        self.seconds.labels(receipt.operation, model, receipt.outcome).observe(receipt.total_us / 1e6)
        self.overhead.observe(receipt.overhead_us / 1e6)
        if receipt.ttft_us is not None and receipt.streamed:
            self.first.labels(model).observe(receipt.ttft_us / 1e6)
        if receipt.saved_picos:
            self.saved.labels(model).inc(receipt.saved_picos / PICOS)
        for attempt in receipt.attempts:
            self._attempt(model, attempt)

    def _attempt(self, model: str, attempt: Attempt) -> None:
        provider = attempt.target.provider
        # A provider may put anything into the code of its errors, what a client wrote to it included.
        result = "ok" if attempt.error is None else attempt.error if attempt.error in _RESULTS else OTHER
        self.attempts.labels(provider, result).inc()
        if not attempt.billed or attempt.usage is None:
            return
        used = attempt.usage
        for bucket in BUCKETS:
            if count := getattr(used, bucket):
                self.tokens.labels(model, provider, bucket).inc(count)
        if attempt.cost.picos is None:
            self.unpriced.labels(model, provider).inc()
        else:
            self.cost.labels(model, provider).inc(attempt.cost.picos / PICOS)
