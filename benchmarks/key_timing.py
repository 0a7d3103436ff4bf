"""Whether the time that a wrong key takes tells how much of it is right: Welch's t-test, near misses against far ones.

Keys are found by the hash of the whole key, so it should not: |t| stays below 4.5, whatever the machine does.
"""

from __future__ import annotations

import asyncio
import gc
import hashlib
import math
import random
import secrets
import time
from collections.abc import Sequence
from statistics import fmean, variance
from typing import Any

from attrs import frozen

from qlens import Unauthenticated
from qlens.testing import running

PROBES = 10_000
"""Wrong keys of each kind."""
ROUND = 1_000
LIMIT = 4.5
"""Beyond it two means are different, with hardly a doubt left."""
SLOWEST = 0.05
"""The share of the slowest probes that is left out: the machine did something else then."""
CONFIG = """
pipeline:
  auth:
    - {plugin: key_store}
    - {plugin: api_keys, file: keys.yaml}
providers: {echo: {plugin: echo}}
models: {m: {max_output_tokens: 10, targets: [{provider: echo, model: m}]}}
"""
FILE_KEY = f"sk-qlens-x{secrets.token_urlsafe(32)}"
HASH = hashlib.sha256(FILE_KEY.encode()).hexdigest()
FILE = f"keys: [{{id: root, hash: 'sha256:{HASH}', tenant: t, roles: [admin]}}]"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"


@frozen
class Asking:
    """As much of a call as authentication looks at."""

    credential: str
    started: float


def near(key: str) -> str:
    """The key with another end: all but four letters are right."""
    while (wrong := key[:-4] + "".join(random.choices(LETTERS, k=4))) == key:
        pass
    return wrong


def far(key: str, prefix: int) -> str:
    """A key in which nothing but the beginning of all keys is right."""
    return key[:prefix] + "".join(random.choices(LETTERS, k=len(key) - prefix))


def welch(one: Sequence[float], other: Sequence[float]) -> float:
    """How many standard errors two means are apart."""
    return (fmean(one) - fmean(other)) / math.sqrt(variance(one) / len(one) + variance(other) / len(other))


def _without_slowest(times: Sequence[float]) -> Sequence[float]:
    return sorted(times)[: round(len(times) * (1 - SLOWEST))]


async def _probe(plugin: Any, credential: str) -> float:
    call = Asking(credential, time.monotonic())
    begun = time.perf_counter_ns()
    try:
        await plugin.authenticate(call)
    except Unauthenticated:
        return time.perf_counter_ns() - begun
    raise AssertionError("a wrong key was taken")


async def _measured(plugin: Any, key: str, prefix: int) -> tuple[float, float, float]:
    """The mean nanoseconds of a near and of a far miss, and Welch's t."""
    times: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(PROBES // ROUND):
        probes = [(True, near(key)) for _ in range(ROUND)] + [(False, far(key, prefix)) for _ in range(ROUND)]
        random.shuffle(probes)
        # Both kinds are new to the database once, which key_store asks for all of them together.
        await asyncio.gather(*(_probe(plugin, wrong) for _, wrong in probes))
        gc.disable()
        for is_near, wrong in probes:
            times[is_near].append(await _probe(plugin, wrong))
        gc.enable()
    one, other = _without_slowest(times[True]), _without_slowest(times[False])
    return fmean(one), fmean(other), welch(one, other)


async def _all() -> str:
    lines = ["| plugin | near miss, ns | far miss, ns | Welch's t | |", "|---|---|---|---|---|"]
    async with running(CONFIG, files={"keys.yaml": FILE}) as gateway:
        made = (await gateway.request("POST", "/admin/keys", body=b'{"tenant": "t"}', key=FILE_KEY)).json()["key"]
        for name, key, prefix in (("api_keys", FILE_KEY, 10), ("key_store", made, 11)):
            one, other, t = await _measured(gateway.plugin("auth", name), key, prefix)
            verdict = "says nothing" if abs(t) < LIMIT else "TELLS THEM APART"
            lines.append(f"| {name} | {one:.0f} | {other:.0f} | {t:+.2f} | {verdict} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(asyncio.run(_all()))
