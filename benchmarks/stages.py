"""What each stage costs in place: the pipeline of config/qlens.yaml, built up plugin by plugin under one load."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import jwt
from attrs import evolve, frozen
from e2e.serving import changed

from benchmarks.gateways import (
    BUDGETS,
    MODEL,
    NO_LIMIT,
    Contender,
    Gateway,
    Launch,
    as_yaml,
    make_key,
    provider,
    qlens,
    running,
)
from benchmarks.rig import Cores, Load, Mock, mock_upstream, put
from qlens.testing.redis import redis_server

ROUNDS = 20
SECONDS = 0.4
CONNECTIONS = 64

NO_OP = '''\
from qlens import hookimpl


class NoOp:
    """Has seven hooks and does nothing in them."""

    def __init__(self, config: object, name: str) -> None:
        self.name = name

    @hookimpl
    async def admit(self, call):
        return None

    @hookimpl
    async def wrap_call(self, call, proceed):
        return await proceed()

    @hookimpl
    async def lookup(self, call):
        return None

    @hookimpl
    async def choose(self, call, model):
        return None

    @hookimpl
    async def wrap_send(self, call, target, proceed):
        return await proceed(target)

    @hookimpl
    async def store(self, call, reply):
        return None

    @hookimpl
    async def settle(self, call, receipt, hold):
        return None
'''
NO_OP_HOOKS = NO_OP.count("@hookimpl")

TOKENS = {
    "plugin": "jwt",
    "issuer": "bench",
    "audience": "qlens",
    "tenant_claim": "org",
    "secret": "example-secret-of-more-than-thirty-two-bytes",
}

Pipeline = Mapping[str, Sequence[Mapping[str, Any]]]


@frozen
class Step:
    """A pipeline, and the one it is compared with."""

    name: str
    pipeline: Pipeline
    after: str | None
    key: str | None = None
    """What calls come with, where it is neither nothing nor a key that `qlens keys` makes."""
    at_most: float | None = None
    """The microseconds of CPU time by which it may be more."""


@contextmanager
def redis() -> Iterator[str]:
    """The address of a Redis that runs on the rig's core: what it takes is not the gateway's."""
    with asyncio.Runner() as runner:
        server = redis_server()
        try:
            yield runner.run(server.__aenter__()).url
        finally:
            runner.run(server.__aexit__(None, None, None))


def steps(redis_url: str | None = None) -> list[Step]:
    """From no stage to every stage of config/qlens.yaml, in its order; then a plugin that does nothing.

    In their places stand a token that is known and, where there is a Redis, limits and budgets in it.
    """
    shipped: dict[str, list[dict[str, Any]]] = json.loads(changed({}))["pipeline"]
    shipped["rate_limit"] = [{"plugin": "token_bucket", "store": {"kind": "memory"}, "limits": NO_LIMIT}]
    shipped["cost"].append(BUDGETS)
    anonymous: Pipeline = {"auth": [{"plugin": "anonymous"}]}
    ladder = [Step("anonymous", anonymous, None)]
    so_far: dict[str, list[Mapping[str, Any]]] = {}
    for stage, entries in shipped.items():
        for entry in entries:
            so_far.setdefault(stage, []).append(entry)
            pipeline = {name: list(those) for name, those in so_far.items()}
            ladder.append(Step(f"{stage}: {entry['plugin']}", pipeline, ladder[-1].name))
    ladder[-1] = evolve(ladder[-1], at_most=10)
    ladder.insert(1, Step("auth: jwt, known", {"auth": [TOKENS]}, "anonymous", _token(), at_most=5))
    if redis_url is not None:
        # Patient: the load and Redis have one core together.
        store = {"kind": "redis", "url": redis_url, "timeout_ms": 2000}
        limits = {"plugin": "token_bucket", "store": {**store, "replicas": 3}, "limits": NO_LIMIT}
        in_redis = {**anonymous, "rate_limit": [limits]}
        ladder.insert(2, Step("rate_limit: token_bucket in Redis", in_redis, "anonymous", at_most=20))
        budgets = {**ladder[-1].pipeline, "cost": [*shipped["cost"][:-1], {**BUDGETS, "store": store}]}
        ladder.insert(-1, Step("cost: budgets in Redis", budgets, ladder[-1].after, at_most=10))
    no_op = {**anonymous, "observe": [{"plugin": "no_op:NoOp"}]}
    return [*ladder, Step(f"no-op, {NO_OP_HOOKS} hooks", no_op, "anonymous")]


def with_goals(ladder: Sequence[Step]) -> list[Step]:
    """Those that have a goal, and those that they are compared with."""
    names = {name for step in ladder if step.at_most is not None for name in (step.name, step.after)}
    return [evolve(step, after=step.after if step.after in names else None) for step in ladder if step.name in names]


def _token() -> str:
    """A token as long as an identity provider's, which the gateway verifies once."""
    claims = {"iss": TOKENS["issuer"], "aud": TOKENS["audience"], "sub": "bench", "org": "bench", "exp": 4_000_000_000}
    return jwt.encode({**claims, "groups": ["x" * 30] * 12}, TOKENS["secret"], "HS256")


def _start(step: Step, folder: Path, port: int, upstream_port: int) -> Launch:
    (folder / "no_op.py").write_text(NO_OP)
    config = as_yaml(
        {
            "server": {"port": "${QLENS_PORT}", "admin": {"port": "${QLENS_ADMIN_PORT}"}},
            "pipeline": step.pipeline,
            "providers": {"bench": provider(upstream_port)},
            "models": {"gpt-4o-mini": MODEL},
        }
    )
    has_keys = any(entry["plugin"] == "api_keys" for entry in step.pipeline["auth"])
    return qlens(folder, port, config, make_key(folder, config) if has_keys else step.key)


def cpu_us(gateway: Gateway, load: Load, mock: Mock) -> float:
    """CPU time of a call, until every receipt is on disk."""
    gateway.settle()
    before = gateway.tree.cpu_seconds()
    calls = put(load, gateway.way, mock)["calls"]
    gateway.answered += calls
    gateway.settle()
    return (gateway.tree.cpu_seconds() - before) / float(calls) * 1e6


def measure(cores: Cores, rounds: int, chunks: int, *, goals: bool = False) -> str:
    """All gateways run at once and have short turns: what slows the machine down for a while slows all of them."""
    load = Load(CONNECTIONS, SECONDS, chunks=chunks)
    with mock_upstream() as mock, redis() as redis_url, ExitStack() as stack:
        ladder = with_goals(steps(redis_url)) if goals else steps(redis_url)
        costs: dict[str, list[float]] = {step.name: [] for step in ladder}
        gateways = {}
        for step in ladder:
            contender = Contender(step.name, step.name, lambda: "", partial(_start, step))
            gateways[step.name] = stack.enter_context(running(contender, mock.port, cores))
        for number in range(rounds + 1):
            for name, gateway in gateways.items():
                cost = cpu_us(gateway, load, mock)
                if number:  # the first round warms up
                    costs[name].append(cost)
    return table(ladder, costs)


def table(ladder: Sequence[Step], costs: Mapping[str, Sequence[float]]) -> str:
    """Each step with its cost, and the difference to the one before: the median of the differences within a round."""
    lines = ["| with | CPU per call, us | more than before, us | middle half | goal |", "|---|---|---|---|---|"]
    for step in ladder:
        line = f"| {step.name} | {median(costs[step.name]):.1f} |"
        if step.after is None:
            lines.append(f"{line} | | |")
            continue
        more = [here - there for here, there in zip(costs[step.name], costs[step.after], strict=True)]
        low, _, high = quantiles(more, n=4) if len(more) > 1 else more * 3
        lines.append(f"{line} {median(more):+.1f} | {low:+.1f} to {high:+.1f} | {goal(step, median(more))} |")
    return "\n".join(lines)


def goal(step: Step, more: float) -> str:
    """What a step may cost, and whether it does."""
    if step.at_most is None:
        return ""
    return f"at most {step.at_most:g}: {'met' if more <= step.at_most else 'missed'}"
