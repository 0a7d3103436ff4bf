"""Prometheus metrics: a registry per gateway, get-or-create for plugins, and the metrics of every call."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from operator import add
from typing import TYPE_CHECKING, Any, TypeVar

from attrs import define, field
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from qlens import errors
from qlens.usage import BUCKETS, counts_of

if TYPE_CHECKING:
    from qlens.call import Attempt, Receipt

M = TypeVar("M", Counter, Gauge, Histogram, "Counts")

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
OVERHEAD = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.1, 1.0)
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

    def counts(self, name: str, doc: str, labels: Sequence[str]) -> Counts:
        """A counter as plain numbers, for the event loop's thread alone: what is counted with every call."""
        return self._get(Counts, name, doc, labels)

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)


class Counts(dict[tuple[str, ...], int]):
    """A counter of a call's path, by the values of its labels."""

    def __init__(self, name: str, doc: str, labels: Sequence[str], registry: CollectorRegistry) -> None:
        registry.register(_Collected(lambda: iter((_counter(name, doc, labels, self),))))

    def __missing__(self, labels: tuple[str, ...]) -> int:
        return 0


class Tally:
    """A histogram of a call's path: plain numbers, which cost a fraction of a metric object's locks and labels."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """Count a value; a bucket holds what is not above its bound."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    @property
    def count(self) -> int:
        """How many values there were."""
        return sum(self.counts)

    def buckets(self) -> list[tuple[str, float]]:
        """The cumulative counts by upper bound, as Prometheus shows them."""
        bounds = [*map(floatToGoString, self.bounds), "+Inf"]
        return list(zip(bounds, map(float, accumulate(self.counts)), strict=True))


@define(eq=False)
class _Spent:
    """What the billed attempts for one model at one provider used."""

    tokens: list[int] = field(factory=lambda: [0] * len(BUCKETS))
    """In the order of BUCKETS."""
    picos: int = 0
    unpriced: int = 0


class CallMetrics:
    """The metrics of every call. Labels come from the configuration only, never from a client's text.

    What is counted for each call is kept as plain numbers on the event loop's thread and turned into metrics when
    somebody asks for them.
    """

    def __init__(self, metrics: Metrics) -> None:
        self.running = 0
        """Calls on their way."""
        self._seconds: dict[tuple[str, str, str], Tally] = defaultdict(lambda: Tally(SECONDS))
        self._overhead = Tally(OVERHEAD)
        self._first: dict[str, Tally] = defaultdict(lambda: Tally(SECONDS))
        self._attempts: dict[tuple[str, str], int] = defaultdict(int)
        self._spent: dict[tuple[str, str], _Spent] = defaultdict(_Spent)
        self._saved: dict[str, int] = defaultdict(int)
        metrics.registry.register(_Collected(self.families))
        self.refused = metrics.counter(
            "qlens_refused_total", "Requests that were refused before they had an account, by status.", ("status",)
        )
        self.failures = metrics.counter(
            "qlens_plugin_failures_total", "Hooks that failed by themselves.", ("plugin", "hook")
        )
        self.loads = metrics.counter("qlens_config_loads_total", "Configurations loaded or refused.", ("result",))

    def settled(self, receipt: Receipt) -> None:
        """Count a finished call."""
        model = receipt.model or NONE
        self._seconds[receipt.operation, model, receipt.outcome].observe(receipt.total_us / 1e6)
        self._overhead.observe(receipt.overhead_us / 1e6)
        if receipt.streamed and receipt.ttft_us is not None:
            self._first[model].observe(receipt.ttft_us / 1e6)
        if receipt.saved_picos:
            self._saved[model] += receipt.saved_picos
        for attempt in receipt.attempts:
            self._attempt(model, attempt)

    def _attempt(self, model: str, attempt: Attempt) -> None:
        provider = attempt.target.provider
        # A provider may put anything into the code of its errors, what a client wrote to it included.
        result = "ok" if attempt.error is None else attempt.error if attempt.error in _RESULTS else OTHER
        self._attempts[provider, result] += 1
        usage = attempt.usage
        if usage is None or not attempt.billed:
            return
        spent, picos = self._spent[model, provider], attempt.cost.picos
        spent.tokens = list(map(add, spent.tokens, counts_of(usage)))
        if picos is None:
            spent.unpriced += 1
        else:
            spent.picos += picos

    def families(self) -> Iterator[Metric]:
        """Everything that was counted, as Prometheus' metrics."""
        call = ("operation", "model", "outcome")
        yield _counter(
            "qlens_calls",
            "Calls that were authenticated, by how they ended.",
            call,
            {key: tally.count for key, tally in self._seconds.items()},
        )
        yield GaugeMetricFamily("qlens_calls_running", "Calls on their way.", self.running)
        yield _histogram("qlens_call_seconds", "Time from request to end of answer.", call, self._seconds)
        yield _histogram(
            "qlens_overhead_seconds",
            "Time of a call that was not spent waiting for a provider.",
            (),
            {(): self._overhead},
        )
        yield _histogram(
            "qlens_first_byte_seconds",
            "Time to the first byte of a streamed answer.",
            ("model",),
            {(model,): tally for model, tally in self._first.items()},
        )
        yield _counter(
            "qlens_attempts", "Sends to targets, by provider and result.", ("provider", "result"), self._attempts
        )
        target = ("model", "provider")
        yield _counter(
            "qlens_tokens",
            "Tokens used, in disjoint buckets.",
            (*target, "bucket"),
            {
                (*key, bucket): count
                for key, spent in self._spent.items()
                for bucket, count in zip(BUCKETS, spent.tokens, strict=True)
                if count
            },
        )
        yield _counter(
            "qlens_cost_usd",
            "Cost of billed attempts in USD.",
            target,
            {key: spent.picos / PICOS for key, spent in self._spent.items()},
        )
        yield _counter(
            "qlens_unpriced",
            "Billed attempts whose price is unknown.",
            target,
            {key: spent.unpriced for key, spent in self._spent.items() if spent.unpriced},
        )
        yield _counter(
            "qlens_saved_usd",
            "What cached answers would have cost in USD.",
            ("model",),
            {(model,): picos / PICOS for model, picos in self._saved.items()},
        )


class _Collected(Collector):
    """What the registry asks at every scrape."""

    def __init__(self, families: Callable[[], Iterator[Metric]]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        return self._families()


def _counter(name: str, doc: str, labels: Sequence[str], counts: Mapping[Any, float]) -> Metric:
    family = CounterMetricFamily(name, doc, labels=labels)
    for key, count in counts.items():
        family.add_metric(key, count)
    return family


def _histogram(name: str, doc: str, labels: Sequence[str], tallies: Mapping[Any, Tally]) -> Metric:
    family = HistogramMetricFamily(name, doc, labels=labels)
    for key, tally in tallies.items():
        family.add_metric(key, tally.buckets(), tally.sum)
    return family
