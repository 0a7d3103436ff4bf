"""Metrics of several processes as one."""

from __future__ import annotations

import json
from typing import Any

from prometheus_client import CollectorRegistry, Gauge, Histogram, Summary, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from qlens.metrics import Metrics
from qlens.workers.merged import Family, Merged, collected


def carried(registry: CollectorRegistry) -> list[Family]:
    """The metrics of a registry as the supervisor gets them."""
    families: list[Family] = json.loads(json.dumps(collected(registry), allow_nan=False))
    return families


def merged(*workers: list[Family], ended: list[Family] | None = None) -> Merged:
    """What the supervisor makes of them."""
    total = Merged()
    if ended is not None:
        total.add(ended, ended=True)
    for families in workers:
        total.add(families)
    return total


def values(total: Merged) -> dict[tuple[str, tuple[Any, ...]], float]:
    """Every sample, as a scraper reads it."""
    families = text_string_to_metric_families(total.text().decode())
    return {(s.name, tuple(s.labels.values())): s.value for family in families for s in family.samples}


def worker(calls: int, running: float = 0) -> CollectorRegistry:
    """The registry of a worker that had some calls."""
    metrics = Metrics()
    count = metrics.counter("calls_total", "Calls.", ("model",))
    took = metrics.histogram("call_seconds", "Time.", ("model",), (1, 2))
    for number in range(calls):
        count.labels('m"\n').inc()
        took.labels('m"\n').observe(number)
    metrics.gauge("running", "Calls on their way.").set(running)
    return metrics.registry


def test_one_worker_says_merged_what_it_says_alone() -> None:
    registry = worker(3, 2)
    Summary("size_bytes", "Sizes.", registry=registry).observe(5)
    Gauge("odd", "No number.", registry=registry).set(float("nan"))
    Gauge("endless", "No end.", registry=registry).set(float("inf"))
    assert merged(carried(registry)).text() == generate_latest(registry)


def test_counters_histograms_and_gauges_are_added_up() -> None:
    found = values(merged(carried(worker(3, 2)), carried(worker(2, 1))))
    assert found["calls_total", ('m"\n',)] == 5
    assert found["call_seconds_bucket", ("1.0", 'm"\n')] == 4
    assert found["call_seconds_count", ('m"\n',)] == 5
    assert found["call_seconds_sum", ('m"\n',)] == 4
    assert found["running", ()] == 3


def test_what_is_no_amount_is_not_added() -> None:
    registries = [CollectorRegistry(), CollectorRegistry()]
    for registry, value in zip(registries, (4, 3), strict=True):
        for name in ("build_info", "seen_timestamp_seconds", "hit_ratio"):
            Gauge(name, "No amount.", registry=registry).set(value)
        Histogram("took_seconds", "Time.", registry=registry)
    found = values(merged(*map(carried, registries)))
    assert [found[name, ()] for name in ("build_info", "seen_timestamp_seconds", "hit_ratio")] == [4, 4, 4]
    created = [values(merged(carried(registry)))["took_seconds_created", ()] for registry in registries]
    assert found["took_seconds_created", ()] == min(created)


def test_what_a_worker_counted_stays_and_how_it_was_goes_with_it() -> None:
    found = values(merged(carried(worker(2, 1)), ended=carried(worker(3, 7))))
    assert found["calls_total", ('m"\n',)] == 5
    assert found["running", ()] == 1


def test_sums_can_be_added_again() -> None:
    past = merged(ended=carried(worker(3)))
    past.add(carried(worker(1)), ended=True)
    assert values(merged(past.families(), carried(worker(2))))["calls_total", ('m"\n',)] == 6
