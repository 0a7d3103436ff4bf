"""What calls notice of events that nobody takes: `PYTHONPATH=tests .venv/bin/python -m benchmarks.outages`.

NATS is killed and started again, a receiver of webhooks hangs and answers again. Calls go on at a fixed rate
meanwhile; the percentiles with and without the outage are compared within each round.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from statistics import median
from typing import Any

from attrs import frozen
from e2e.serving import changed
from receivers import endpoint, receiving

from benchmarks import gateways
from benchmarks.gateways import Contender, Gateway, Launch, as_yaml, make_key
from benchmarks.rig import Cores, Fault, Load, Mock, mock_upstream, put, take_cores
from qlens.testing.nats import nats_server

ROUNDS, SECONDS, RATE, CONNECTIONS = 3, 4.0, 300.0, 16
WARM_UP = Load(CONNECTIONS, 3.0, RATE)
DRAIN_SECONDS = 30.0
GOAL = 1.05
METHOD = f"""\
Calls to config/qlens.yaml, {RATE:g} a second, each timed from the moment it was due. In each of {ROUNDS} rounds
{SECONDS:g} s with the receiver of the events there and {SECONDS:g} s without it; before the next round it has got all
that it missed. The receiver shares the core of the load generator, so its work, which an outage saves, is part of the
first."""


@frozen
class Taker:
    """What takes events, and how it is switched off and on."""

    name: str
    plugin: dict[str, Any]
    """Its configuration in `observe`."""
    off: Callable[[], Awaitable[object]]
    on: Callable[[], Awaitable[object]]
    taken: Callable[[], Awaitable[int]]
    """How many receipts it has been told."""


@asynccontextmanager
async def _nats() -> AsyncIterator[Taker]:
    async with nats_server() as server:
        plugin = {"plugin": "nats", "servers": [server.url], "stream": {"create": True}, "events": ["qlens.receipt"]}

        async def off() -> None:
            server.kill()

        yield Taker("NATS down", plugin, off, server.start, server.count)


@asynccontextmanager
async def _webhooks() -> AsyncIterator[Taker]:
    async with receiving() as receiver:
        hook = endpoint(receiver, events="qlens.receipt")
        plugin = {"plugin": "webhooks", "endpoints": [hook], "allow": ["127.0.0.0/8"], "timeout_seconds": 1}

        async def hang() -> None:
            receiver.hangs = True

        async def answer() -> None:
            receiver.hangs = False

        async def taken() -> int:
            return len({each.id for each in receiver.got})

        yield Taker("webhook receiver hangs", plugin, hang, answer, taken)


def _contender(taker: Taker) -> Contender:
    def start(folder: Path, port: int, upstream_port: int) -> Launch:
        changes = {
            "providers": {"bench": gateways.provider(upstream_port)},
            "models": {"gpt-4o-mini": gateways.MODEL},
            "pipeline": {
                "rate_limit": [{"plugin": "token_bucket", "store": {"kind": "memory"}, "limits": gateways.NO_LIMIT}],
                "observe": [taker.plugin],
            },
        }
        config = as_yaml(json.loads(changed(changes)))
        return gateways.qlens(folder, port, config, make_key(folder, config))

    return Contender("qlens", "QLens", lambda: "", start)


async def _measured(taker: Taker, gateway: Gateway, mock: Mock) -> list[tuple[dict[str, float], dict[str, float]]]:
    """Latencies in microseconds, by percentile: with the taker and without it, in each round."""
    load = Load(CONNECTIONS, SECONDS, RATE)
    found, made = [], 1

    async def calls(load: Load) -> dict[str, float]:
        nonlocal made
        seen = await asyncio.to_thread(put, load, gateway.way, mock)
        made += seen["calls"]
        latencies: dict[str, float] = seen["latency_us"]
        return latencies

    await calls(WARM_UP)
    for _ in range(ROUNDS):
        there = await calls(load)
        await taker.off()
        away = await calls(load)
        await taker.on()
        await _drained(taker, made)
        found.append((there, away))
    return found


async def _drained(taker: Taker, made: int) -> None:
    """Wait until the taker has been told of all calls."""
    try:
        async with asyncio.timeout(DRAIN_SECONDS):
            while await taker.taken() < made:
                await asyncio.sleep(0.1)
    except TimeoutError:
        raise Fault(f"{taker.name}: {await taker.taken()} of {made} receipts came within {DRAIN_SECONDS:g} s") from None


async def _all(cores: Cores) -> str:
    lines = [
        "| outage | round | p50 without, with (us) | p99 without, with (us) | p99 ratio |",
        "|---|---|---|---|---|",
    ]
    verdicts = []
    with mock_upstream() as mock:
        for make in (_nats, _webhooks):
            async with make() as taker:
                with gateways.running(_contender(taker), mock.port, cores) as gateway:
                    rounds = await _measured(taker, gateway, mock)
            for number, (there, away) in enumerate(rounds, 1):
                lines.append(
                    f"| {taker.name} | {number} | {there['p50']:.0f}, {away['p50']:.0f} "
                    f"| {there['p99']:.0f}, {away['p99']:.0f} | {away['p99'] / there['p99']:.3f} |"
                )
            ratio = median(away["p99"] / there["p99"] for there, away in rounds)
            verdicts.append(f"{taker.name}: p99 is {ratio:.3f} of that without the outage (goal: at most {GOAL})")
    return "\n".join([METHOD, "", *lines, "", *verdicts])


if __name__ == "__main__":
    try:
        print(asyncio.run(_all(take_cores())))
    except Fault as fault:
        sys.exit(f"outages: {fault}")
