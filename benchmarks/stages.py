"""What each stage costs in place: the pipeline of config/qlens.yaml, built up plugin by plugin under one load."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import jwt
from attrs import frozen
from e2e.serving import changed

from benchmarks.gateways import MODEL, NO_LIMIT, Contender, Gateway, Launch, as_yaml, make_key, provider, qlens, running
from benchmarks.rig import Cores, Load, Mock, mock_upstream, put

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


def steps() -> list[Step]:
    """From no stage to every stage of config/qlens.yaml, in its order; then a plugin that does nothing."""
    shipped: dict[str, list[dict[str, Any]]] = json.loads(changed({}))["pipeline"]
    shipped["rate_limit"] = [{"plugin": "token_bucket", "store": {"kind": "memory"}, "limits": NO_LIMIT}]
    shipped["cost"].append({"plugin": "budgets", "limits": [{"per": "tenant", "usd": 1_000_000}]})
    anonymous: Pipeline = {"auth": [{"plugin": "anonymous"}]}
    ladder = [Step("anonymous", anonymous, None)]
    so_far: dict[str, list[Mapping[str, Any]]] = {}
    for stage, entries in shipped.items():
        for entry in entries:
            so_far.setdefault(stage, []).append(entry)
            pipeline = {name: list(those) for name, those in so_far.items()}
            ladder.append(Step(f"{stage}: {entry['plugin']}", pipeline, ladder[-1].name))
    ladder.insert(1, Step("auth: jwt, known", {"auth": [TOKENS]}, "anonymous", _token()))
    no_op = {**anonymous, "observe": [{"plugin": "no_op:NoOp"}]}
    return [*ladder, Step(f"no-op, {NO_OP_HOOKS} hooks", no_op, "anonymous")]


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


def measure(cores: Cores, rounds: int, chunks: int) -> str:
    """All gateways run at once and have short turns: what slows the machine down for a while slows all of them."""
    ladder = steps()
    load = Load(CONNECTIONS, SECONDS, chunks=chunks)
    costs: dict[str, list[float]] = {step.name: [] for step in ladder}
    with mock_upstream() as mock, ExitStack() as stack:
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
    lines = ["| with | CPU per call, us | more than before, us | middle half |", "|---|---|---|---|"]
    for step in ladder:
        line = f"| {step.name} | {median(costs[step.name]):.1f} |"
        if step.after is None:
            lines.append(f"{line} | |")
            continue
        more = [here - there for here, there in zip(costs[step.name], costs[step.after], strict=True)]
        low, _, high = quantiles(more, n=4) if len(more) > 1 else more * 3
        lines.append(f"{line} {median(more):+.1f} | {low:+.1f} to {high:+.1f} |")
    return "\n".join(lines)
