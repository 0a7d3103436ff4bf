"""What another provider than `openai` costs: the same call, in CPU time of one process."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import orjson

from benchmarks.gateways import MODEL, UPSTREAM_KEY, as_yaml
from benchmarks.instructions import CannedUpstream, canned, connected, framed
from qlens.testing import running

ROUNDS = 15
BLOCKS, CALLS = 20, 20
GOAL_US = 60.0
METHOD = """\
Gateway, client and upstream run in one process, whose CPU time is read; client and upstream are the same for both
providers but for the answer's form, so the difference is the provider's: translation, signature and parsing. Both
answers have the header with the request's id that real ones have, which the gateway keeps. A round counts by the
quickest of its blocks of 20 calls: whatever else the machine does takes the caches away, and only adds."""

_REQUEST_ID = b"6f2b1c1e-8f43-4d6a-9a77-2f1f6f9c0b11"
_CONVERSE = {
    "output": {"message": {"role": "assistant", "content": [{"text": "y" * 700}]}},
    "stopReason": "end_turn",
    "usage": {"inputTokens": 100, "outputTokens": 50, "totalTokens": 150},
    "metrics": {"latencyMs": 1},
}


def _openai(port: int) -> dict[str, Any]:
    return {"plugin": "openai", "base_url": f"http://127.0.0.1:{port}/v1", "api_key": UPSTREAM_KEY}


def _bedrock(port: int) -> dict[str, Any]:
    key = {"access_key_id": "AKIAEXAMPLE", "secret_access_key": UPSTREAM_KEY, "session_token": UPSTREAM_KEY * 20}
    return {"plugin": "bedrock", "region": "us-east-1", "endpoint": f"http://127.0.0.1:{port}", **key}


async def _cost_us(settings: Callable[[int], Mapping[str, Any]], model: str, answer: bytes) -> float:
    upstream = await asyncio.get_running_loop().create_server(lambda: CannedUpstream(answer), "127.0.0.1", 0)
    provider = settings(upstream.sockets[0].getsockname()[1])
    entry = {**MODEL, "targets": [{"provider": "bench", "model": model}]}
    config = as_yaml(
        {
            "pipeline": {"auth": [{"plugin": "anonymous"}]},
            "providers": {"bench": provider},
            "models": {"gpt-4o-mini": entry},
        }
    )
    async with upstream, running(config) as gateway:
        client = await connected(gateway, stream=False)
        for _ in range(50):
            await client.call()
        spent = []
        for _ in range(BLOCKS):
            before = time.process_time()
            for _ in range(CALLS):
                await client.call()
            spent.append(time.process_time() - before)
        client.writer.close()
    return min(spent) / CALLS * 1e6


def measure(rounds: int) -> str:
    """Both in turn; the median of the differences within a round."""
    completion = canned(0).replace(b"\r\n", b"\r\nx-request-id: %b\r\n" % _REQUEST_ID, 1)
    converse = framed(b"application/json", orjson.dumps(_CONVERSE), b"x-amzn-requestid: %b\r\n" % _REQUEST_ID)
    lines = ["| round | openai, us | bedrock, us | more |", "|---|---|---|---|"]
    differences = []
    for number in range(1, rounds + 1):
        plain = asyncio.run(_cost_us(_openai, "gpt-4o-mini", completion))
        signed = asyncio.run(_cost_us(_bedrock, "us.anthropic.claude-sonnet-4-5-20250929-v1:0", converse))
        differences.append(signed - plain)
        lines.append(f"| {number} | {plain:.0f} | {signed:.0f} | {signed - plain:+.0f} |")
    found = f"bedrock costs {median(differences):.0f} us more than openai (goal: at most {GOAL_US:.0f})"
    return "\n".join([METHOD, "", *lines, "", found])
