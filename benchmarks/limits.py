"""What limits on a shared Redis cost a call beside those in memory: in Python instructions, and in scripts sent."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from benchmarks.gateways import MODEL, NO_LIMIT, as_yaml, provider
from benchmarks.instructions import CannedUpstream, Client, Counted, canned, connected
from qlens.testing import Running, running
from qlens.testing.redis import redis_server

CALLS = 2000
COUNTED = 50
TOGETHER = 16


def _config(port: int, limits: Mapping[str, Any] | None) -> str:
    rate_limit = [] if limits is None else [{"plugin": "token_bucket", "limits": NO_LIMIT, **limits}]
    return as_yaml(
        {
            "pipeline": {"auth": [{"plugin": "anonymous"}], "rate_limit": rate_limit},
            "providers": {"bench": provider(port)},
            "models": {"gpt-4o-mini": MODEL},
        }
    )


async def _measured(gateway: Running) -> tuple[float, float]:
    """Instructions of a call on which no script is sent, and scripts for a thousand calls under load."""
    clients = [await connected(gateway, stream=False) for _ in range(TOGETHER)]

    async def keep(client: Client) -> None:
        for _ in range(CALLS // TOGETHER):
            await client.call()

    await asyncio.gather(*map(keep, clients))
    before = _scripts(gateway)
    await asyncio.gather(*map(keep, clients))
    scripts = (_scripts(gateway) - before) / CALLS * 1000
    counted = Counted()
    counts = []
    for _ in range(COUNTED):
        with counted.counting():
            await clients[0].call()
        counts.append(counted.functions.total())
        counted.functions.clear()
    for client in clients:
        client.writer.close()
    return sorted(counts)[COUNTED // 2], scripts


def _scripts(gateway: Running) -> int:
    return sum(getattr(store, "calls", 0) for store in gateway.gateway.stores.values())


async def _all() -> str:
    answer = canned(0)
    upstream = await asyncio.get_running_loop().create_server(lambda: CannedUpstream(answer), "127.0.0.1", 0)
    port = upstream.sockets[0].getsockname()[1]
    lines = ["| limits | instructions per call | more than none | scripts per 1,000 calls |", "|---|---|---|---|"]
    async with upstream, redis_server() as redis:
        store = {"kind": "redis", "url": redis.url, "replicas": 3}
        none = 0.0
        for name, limits in {"none": None, "memory": {}, "Redis, leases": {"store": store}}.items():
            async with running(_config(port, limits)) as gateway:
                instructions, scripts = await _measured(gateway)
            none = none or instructions
            lines.append(f"| {name} | {instructions:.0f} | {instructions - none:+.0f} | {scripts:.1f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(asyncio.run(_all()))
