"""What all workers say as one: their metrics added up, their health side by side."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from attrs import define, field
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

Sample = tuple[str, Mapping[str, str], float | str]
"""Name, labels and value; a value that is no finite number is a text, because JSON has none."""
Family = tuple[str, str, str, Sequence[Sample]]
"""Name, kind, documentation and samples of one metric."""

_GROWING = frozenset({"counter", "histogram", "gaugehistogram", "summary"})
"""Kinds whose values belong to the past: what a worker counted stays counted when it is gone."""
_NOT_ADDED: tuple[tuple[str, Callable[[float, float], float]], ...] = (
    ("_created", min),
    ("_timestamp_seconds", max),
    ("_info", max),
    ("_ratio", max),
)
"""Samples that are no amounts, by the end of their names."""

_Key = tuple[str, tuple[tuple[str, str], ...]]


def collected(registry: CollectorRegistry) -> list[Family]:
    """All metrics of a process, in a form that JSON can carry."""
    return [
        (
            metric.name,
            metric.type,
            metric.documentation,
            [(sample.name, sample.labels, _portable(sample.value)) for sample in metric.samples],
        )
        for metric in registry.collect()
    ]


def _portable(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


@define(eq=False)
class _Sum:
    kind: str
    doc: str
    values: dict[_Key, float] = field(factory=dict)

    def add(self, key: _Key, value: float) -> None:
        known = self.values.get(key)
        self.values[key] = value if known is None else _fold(key)(known, value)


def _fold(key: _Key) -> Callable[[float, float], float]:
    """How two workers' values become one: amounts are added, gauges too (calls running, bytes held, queues)."""
    name, labels = key
    if any(label == "quantile" for label, _ in labels):
        return max
    return next((fold for end, fold in _NOT_ADDED if name.endswith(end)), _plus)


def _plus(one: float, other: float) -> float:
    return one + other


@define(eq=False)
class Merged(Collector):
    """Metrics of several processes, added up."""

    _sums: dict[str, _Sum] = field(factory=dict, init=False)

    def add(self, families: Iterable[Family], *, ended: bool = False) -> None:
        """Add a process's metrics; of one that has ended only what it counted, not how it was."""
        for name, kind, doc, samples in families:
            if ended and kind not in _GROWING:
                continue
            known = self._sums.get(name)
            if known is None:
                known = self._sums[name] = _Sum(kind, doc)
            for sample, labels, value in samples:
                known.add((sample, tuple(labels.items())), float(value))

    def families(self) -> list[Family]:
        """The sums, in the form that `add` takes."""
        return [
            (
                name,
                each.kind,
                each.doc,
                [(sample, dict(labels), value) for (sample, labels), value in each.values.items()],
            )
            for name, each in self._sums.items()
        ]

    def collect(self) -> Iterator[Metric]:
        """Prometheus' form of it."""
        for name, each in self._sums.items():
            metric = Metric(name, each.doc, each.kind)
            for (sample, labels), value in each.values.items():
                metric.add_sample(sample, dict(labels), value)
            yield metric

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        registry = CollectorRegistry(auto_describe=False)
        registry.register(self)
        return generate_latest(registry)


def health(ready: bool, workers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The health of all: a plugin is well when it is well in every worker that answered."""
    known = [worker for worker in workers if "plugins" in worker]
    plugins: dict[str, Any] = {}
    for worker in known:
        for name, state in worker["plugins"].items():
            if name not in plugins or (plugins[name]["ok"] and not state["ok"]):
                plugins[name] = state
    return {
        "ready": ready,
        "config": known[0]["config"] if known else None,
        "running": sum(worker["running"] for worker in known),
        "plugins": plugins,
        "workers": workers,
    }
