"""No path skips the chain: operation x stream x dialect, and role x endpoint, generated from the tables."""

from __future__ import annotations

import pytest
from aiohttp import WSServerHandshakeError
from plugs import Probe
from yamls import ask, config, probe

from qlens.config.entries import BUILT_IN_ROLES, RANKS
from qlens.operations import OPERATIONS, Operation
from qlens.paths import own_endpoints
from qlens.registry import Endpoint
from qlens.testing import running

# Those with affinity need an object first: test_affinity.py; a session has a row of its own below.
CASES = [
    (operation, stream)
    for operation in OPERATIONS
    if operation.runs not in {"affinity", "session"}
    for stream in ((False, True) if operation.streams else (False,))
]
ECHO = {"echo": {"plugin": "echo"}}
MODELS = {"gpt-4o-mini": {"max_output_tokens": 100, "targets": [{"provider": "echo", "model": "gpt-4o-mini"}]}}


def _fields(stream: bool) -> dict[str, object]:
    return {"model": "gpt-4o-mini", **({"stream": True} if stream else {})}


def _name(case: object) -> str:
    return case.name if isinstance(case, Operation) else "stream" if case else "whole"


@pytest.mark.parametrize(("operation", "stream"), CASES, ids=_name)
async def test_every_operation_authenticates_admits_and_settles(operation: Operation, stream: bool) -> None:
    stages = {"auth": [probe("who", answer=["authenticate"])], "rate_limit": [probe("may", hold="h")]}
    path = operation.path.replace("{id}", "gpt-4o-mini")
    async with running(config(stages, ECHO, MODELS)) as gateway:
        answer = await ask(gateway, operation, path, **_fields(stream))
        assert answer.status == 200
        assert ("text/event-stream" in answer.headers["content-type"]) is stream
        (receipt,) = await gateway.settled(1)
        assert (receipt.operation, receipt.outcome, receipt.streamed) == (operation.name, "complete", stream)
        assert bool(receipt.usage.total or receipt.usage.meters) is (operation.runs == "full")
        who: Probe = gateway.plugin("auth", "who")
        may: Probe = gateway.plugin("rate_limit", "may")
        assert "authenticate" in who.events
        assert "admit" in may.events
        assert may.events[-1] == "settle complete"
        assert may.holds == []


@pytest.mark.parametrize(("operation", "stream"), CASES, ids=_name)
async def test_no_operation_answers_a_stranger_or_one_who_is_refused(operation: Operation, stream: bool) -> None:
    path = operation.path.replace("{id}", "gpt-4o-mini")
    for stages, status in (({"auth": [probe("nobody")]}, 401), ({"rate_limit": [probe("no", refuse=["admit"])]}, 429)):
        async with running(config(stages, ECHO, MODELS)) as gateway:
            answer = await ask(gateway, operation, path, **_fields(stream))
            assert answer.status == status


SESSIONS = [(operation, path) for operation in OPERATIONS if operation.runs == "session" for path in operation.paths]


@pytest.mark.parametrize(("operation", "path"), SESSIONS)
async def test_every_session_authenticates_admits_and_settles(operation: Operation, path: str) -> None:
    stages = {"auth": [probe("who", answer=["authenticate"])], "rate_limit": [probe("may", hold="h")]}
    providers, models = (
        {"odd": {"plugin": "realtimes:Odd"}},
        {"voice": {"targets": [{"provider": "odd", "model": "x"}]}},
    )
    async with running(config(stages, providers, models)) as gateway:
        async with gateway.session.ws_connect(f"{gateway.url}{path}?model=voice") as socket:
            await socket.send_str("hello")
            assert await socket.receive_str(timeout=5) == "hello"
            may: Probe = gateway.plugin("rate_limit", "may")
            assert len(may.holds) == 1
        (receipt,) = await gateway.settled(1)
        assert (receipt.operation, receipt.outcome, receipt.model) == (operation.name, "complete", "voice")
        assert "authenticate" in gateway.plugin("auth", "who").events
        assert "admit" in may.events
        assert may.events[-1] == "settle complete"
        assert may.holds == []


@pytest.mark.parametrize(("operation", "path"), SESSIONS)
async def test_no_session_is_open_to_a_stranger_or_to_one_who_is_refused(operation: Operation, path: str) -> None:
    providers, models = (
        {"odd": {"plugin": "realtimes:Odd"}},
        {"voice": {"targets": [{"provider": "odd", "model": "x"}]}},
    )
    for stages, status in (({"auth": [probe("nobody")]}, 401), ({"rate_limit": [probe("no", refuse=["admit"])]}, 429)):
        async with running(config(stages, providers, models)) as gateway:
            with pytest.raises(WSServerHandshakeError) as refused:
                await gateway.session.ws_connect(f"{gateway.url}{path}?model=voice")
            assert refused.value.status == status, operation


@pytest.mark.parametrize("role", [None, *BUILT_IN_ROLES, "nobody-knows-it"])
async def test_every_endpoint_asks_exactly_its_role(role: str | None) -> None:
    auth = [probe("nobody")] if role is None else [{"plugin": "anonymous", "roles": [role]}]
    async with running(config({"auth": auth})) as gateway:
        for endpoint in own_endpoints(gateway.gateway):
            answer = await gateway.request(endpoint.method, endpoint.path)
            if endpoint.role is None:
                expected = 200
            elif role is None:
                expected = 401
            else:
                expected = 200 if _opens(role, endpoint) else 403
            assert answer.status == expected, f"{endpoint.method} {endpoint.path} as {role}"


def _opens(role: str, endpoint: Endpoint) -> bool:
    """What the documentation says: ranks include each other, a tenant's role opens only what minds it."""
    if role not in BUILT_IN_ROLES or endpoint.role is None:
        return False
    rank = role.removeprefix("tenant_")
    if RANKS.index(rank) < RANKS.index(endpoint.role):
        return False
    return rank == role or endpoint.scoped or endpoint.role == "member"


async def test_what_is_not_in_a_table_is_not_served() -> None:
    async with running(config()) as gateway:
        for path in (
            "/",
            "/v1",
            "/metrics/",
            "/admin",
            "/docs",
            "/v1/chat",
            "/v1/assistants",
            "/openai/deployments/x/chat",
        ):
            for method in ("GET", "POST", "PUT", "DELETE", "OPTIONS", "TRACE"):
                assert (await gateway.request(method, path)).status == 404
        assert (await gateway.session.get(gateway.url + "/metrics")).status == 404
        assert (await gateway.session.get(gateway.url + "/admin/health")).status == 404
