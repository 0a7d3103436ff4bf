"""How much faster two workers are than one, on two cores that the load and the mock upstream need too."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from attrs import frozen
from e2e.serving import changed

from benchmarks.gateways import MODEL, NO_LIMIT, Contender, Launch, as_yaml, make_key, provider, qlens, running
from benchmarks.processes import cpu_seconds_of
from benchmarks.rig import Cores, Load, Mock, Way, mock_upstream, put

ROUNDS = 5
LOAD = Load(64, 2.0)
METHOD = """\
One worker runs on a core of its own; load and mock upstream have the other one. Two workers run on both cores, which
load and mock upstream share with them. What these two need of a core at a given rate is measured first, without a
gateway, and taken off: two workers that made r calls a second on 2 - s cores would make r * 2 / (2 - s) on two. Each of
two workers stays on one core (`server.pin_workers`), as one worker does."""


@frozen
class _BothCores(Cores):
    """The gateway may use the rig's core too."""

    @contextmanager
    def for_gateway(self) -> Iterator[None]:
        os.sched_setaffinity(0, {self.gateway, self.rig})
        try:
            yield
        finally:
            os.sched_setaffinity(0, {self.rig})


def _start(workers: int, folder: Path, port: int, upstream_port: int) -> Launch:
    limiter = {"plugin": "token_bucket", "store": {"kind": "memory", "per_worker": True}, "limits": NO_LIMIT}
    changes: dict[str, Any] = {
        "server": {"workers": workers, "pin_workers": True},
        "providers": {"bench": provider(upstream_port)},
        "models": {"gpt-4o-mini": MODEL},
        "pipeline": {"rate_limit": [limiter]},
    }
    config = as_yaml(json.loads(changed(changes)))
    return qlens(folder, port, config, make_key(folder, config))


def _rate(workers: int, mock: Mock, cores: Cores) -> float:
    name = f"{workers} workers"
    with running(Contender(name, name, lambda: "", partial(_start, workers)), mock.port, cores) as gateway:
        put(LOAD, gateway.way, mock)
        seen = put(LOAD, gateway.way, mock)
        return float(seen["calls"] / seen["seconds"])


def _rig_seconds(mock: Mock) -> float:
    """What load and mock upstream need for a call, in seconds of CPU time."""
    before = cpu_seconds_of(mock.process.pid) + time.process_time()
    seen = put(LOAD, Way(mock.port), mock)
    spent = cpu_seconds_of(mock.process.pid) + time.process_time() - before + seen["cpu_seconds"]
    return float(spent / seen["calls"])


def measure(cores: Cores, rounds: int, say: Callable[[str], None]) -> str:
    """One worker and two in turn; the median of the ratios."""
    both = _BothCores(cores.gateway, cores.rig)
    lines = ["| round | one worker, calls/s | two workers, calls/s | rig's share | two on two cores | ratio |"]
    lines.append("|---|---|---|---|---|---|")
    ratios = []
    with mock_upstream() as mock:
        for number in range(1, rounds + 1):
            say(f"round {number} of {rounds}")
            rig = _rig_seconds(mock)
            one, two = _rate(1, mock, cores), _rate(2, mock, both)
            share = two * rig
            alone = two * 2 / (2 - share)
            ratios.append(alone / one)
            lines.append(f"| {number} | {one:.0f} | {two:.0f} | {share:.2f} | {alone:.0f} | {alone / one:.2f} |")
    return "\n".join([METHOD, "", *lines, "", f"median ratio: {median(ratios):.2f} (goal: at least 1.8)"])
