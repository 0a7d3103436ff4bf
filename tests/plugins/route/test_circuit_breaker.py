"""The plugin `circuit_breaker`: when a target is left alone, and when it is tried again."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import orjson
import pytest
from attrs import define, frozen

from qlens import Call, Outgoing, Reply, StartupError, Target, UpstreamError, hookimpl
from qlens.testing import ManualClock, Response, Running, Scripted, check_plugin, running, upstream
from qlens.testing.upstreams import FakeUpstream
from qlens_plugins.route.circuit_breaker import CircuitBreaker

PATH = "/v1/chat/completions"
CALL = {"model": "small", "messages": [{"role": "user", "content": "hello"}]}
BROKEN = Scripted(500, body={"error": {"message": "broken"}})
SETTINGS = "failures: 3, open_seconds: 30"


def config(url: str, settings: str = SETTINGS, *, targets: str = "") -> str:
    targets = targets or "{provider: up, model: a}"
    return f"""
pipeline: {{auth: [{{plugin: anonymous}}], route: [{{plugin: circuit_breaker, {settings}}}], cost: []}}
providers: {{up: {{plugin: openai, base_url: '{url}', api_key: sk-example-upstream}}, spare: {{plugin: echo}}}}
models:
  small: {{max_output_tokens: 100, targets: [{targets}]}}
  "open/*": {{max_output_tokens: 100, targets: [{{provider: up, model: "*"}}]}}
"""


@asynccontextmanager
async def broken(
    failures: int = 0, settings: str = SETTINGS, **options: str
) -> AsyncIterator[tuple[Running, FakeUpstream, ManualClock]]:
    """A gateway whose upstream has failed so many calls already."""
    clock = ManualClock()
    async with upstream() as up, running(config(up.url, settings, **options), clock=clock) as gateway:
        up.script(*[BROKEN] * failures)
        for _ in range(failures):
            assert (await ask(gateway)).status == 502
        yield gateway, up, clock


async def ask(gateway: Running, **fields: Any) -> Response:
    return await gateway.post(PATH, {**CALL, **fields})


def is_open(answer: Response) -> bool:
    return bool(answer.status == 503 and answer.json()["error"]["code"] == "circuit_open")


async def gauge(gateway: Running) -> dict[str, float]:
    lines = (await gateway.get("/metrics")).text.splitlines()
    return {line.split()[0]: float(line.split()[1]) for line in lines if line.startswith("qlens_circuit_open{")}


def test_it_keeps_the_contract_of_its_stage() -> None:
    check_plugin("route", CircuitBreaker)


async def test_after_failures_in_a_row_the_target_is_left_alone() -> None:
    async with broken(3) as (gateway, up, clock):
        clock.advance(10)
        answer = await ask(gateway)
        assert is_open(answer)
        assert answer.headers["retry-after"] == "20"
        assert answer.json()["error"]["type"] == "server_error"
        assert len(up.requests) == 3
        receipts = await gateway.settled(4)
        assert receipts[-1].attempts == ()


async def test_one_answer_in_between_starts_the_count_again() -> None:
    async with broken(2) as (gateway, up, _):
        assert (await ask(gateway)).status == 200
        up.script(BROKEN, BROKEN)
        assert [(await ask(gateway)).status for _ in range(3)] == [502, 502, 200]


async def test_another_target_takes_over_while_the_circuit_is_open() -> None:
    targets = "{provider: up, model: a}, {provider: spare, model: b}"
    async with upstream() as up, running(config(up.url, targets=targets), clock=ManualClock()) as gateway:
        up.script(*[BROKEN] * 3)
        for _ in range(5):
            answer = await ask(gateway)
            assert (answer.status, answer.headers["x-qlens-provider"]) == (200, "spare")
        assert len(up.requests) == 3
        receipts = await gateway.settled(5)
        assert [len(receipt.attempts) for receipt in receipts] == [2, 2, 2, 1, 1]


async def test_when_the_time_is_over_one_call_tries_and_its_success_lets_all_through() -> None:
    async with broken(3) as (gateway, up, clock):
        clock.advance(30)
        up.script(Scripted(body=ANSWER, delay=1))
        trying = asyncio.create_task(ask(gateway))
        await up.arrived(4)
        waiting = await asyncio.gather(*(ask(gateway) for _ in range(5)))
        assert all(is_open(answer) for answer in waiting)
        assert {answer.headers["retry-after"] for answer in waiting} == {"1"}
        assert (await trying).status == 200
        assert len(up.requests) == 4
        assert [(await ask(gateway)).status for _ in range(3)] == [200] * 3


ANSWER = {
    "id": "x",
    "object": "chat.completion",
    "created": 1,
    "model": "a",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "ok"}, "finish_reason": "stop"}],
}


async def test_when_the_one_call_fails_the_circuit_opens_for_the_whole_time_again() -> None:
    async with broken(3) as (gateway, up, clock):
        clock.advance(30)
        up.script(BROKEN)
        assert (await ask(gateway)).status == 502
        clock.advance(29)
        assert is_open(await ask(gateway))
        clock.advance(1)
        assert (await ask(gateway)).status == 200


async def test_a_trying_call_whose_client_leaves_lets_the_next_one_try() -> None:
    async with broken(3) as (gateway, up, clock):
        clock.advance(30)
        up.script(Scripted(hang=True))
        trying = asyncio.create_task(ask(gateway))
        await up.arrived(4)
        assert is_open(await ask(gateway))
        trying.cancel()
        await gateway.settled(5)
        assert (await ask(gateway)).status == 200


async def test_calls_sent_before_the_circuit_opened_do_not_close_it() -> None:
    async with broken(2) as (gateway, up, _):
        up.script(Scripted(body=ANSWER, delay=1), BROKEN)
        early = asyncio.create_task(ask(gateway))
        await up.arrived(3)
        assert (await ask(gateway)).status == 502  # the third failure in a row
        assert (await early).status == 200
        assert is_open(await ask(gateway))


async def test_a_target_that_says_the_request_is_wrong_is_well() -> None:
    async with broken(2) as (gateway, up, _):
        rejected = Scripted(400, body={"error": {"message": "no", "type": "invalid_request_error"}})
        up.script(rejected, BROKEN, BROKEN)
        assert [(await ask(gateway)).status for _ in range(4)] == [400, 502, 502, 200]


async def test_unknown_model_names_do_not_open_the_circuit_of_a_wildcard() -> None:
    async with broken() as (gateway, up, _):
        missing = {"message": "no such model", "type": "invalid_request_error", "code": "model_not_found"}
        up.script(*[Scripted(404, body={"error": missing})] * 4)
        for number in range(4):
            assert (await ask(gateway, model=f"open/{number}")).status == 404
        assert (await ask(gateway, model="open/real")).status == 200


async def test_clients_that_leave_are_no_failures() -> None:
    async with broken(2) as (gateway, up, _):
        up.script(Scripted(hang=True))
        leaving = asyncio.create_task(ask(gateway))
        await up.arrived(3)
        leaving.cancel()
        await gateway.settled(3)
        assert (await ask(gateway)).status == 200


@pytest.mark.parametrize(
    "failure",
    [
        Scripted(429, headers={"retry-after": "1"}, body={"error": {"message": "slow down"}}),
        Scripted(401, body={"error": {"message": "bad key"}}),
        Scripted(503, body={"error": {"message": "overloaded"}}),
        Scripted(raw=b""),
        Scripted(body=b"<html>", headers={"content-type": "text/html"}),
    ],
    ids=["limited", "refused", "unavailable", "closed", "invalid"],
)
async def test_each_kind_of_failure_counts(failure: Scripted) -> None:
    async with broken() as (gateway, up, _):
        up.script(*[failure] * 9)
        for _ in range(3):
            assert not is_open(await ask(gateway))
        assert is_open(await ask(gateway))


@frozen
class ClumsyConfig:
    """Has no settings."""


@define(eq=False)
class Clumsy:
    """A provider that lets errors pass: the one whose name is in the call's `user`."""

    config: ClumsyConfig
    name: str

    Config = ClumsyConfig

    def dialects(self, target: Target) -> tuple[str, ...]:
        return ("chat",)

    @hookimpl
    async def send(self, call: Call, target: Target, outgoing: Outgoing) -> Reply:
        if kind := outgoing.body.get("user"):
            raise ERRORS[kind]("odd") from ValueError()
        return Reply(body=orjson.dumps(ANSWER), dialect="chat")


ERRORS = {
    kind.__name__: kind
    for kind in (TypeError, KeyError, UnicodeError, RecursionError, OSError, RuntimeError, UpstreamError)
}


@asynccontextmanager
async def clumsy() -> AsyncIterator[tuple[Running, ManualClock]]:
    clock = ManualClock()
    content = {
        "pipeline": {"auth": [{"plugin": "anonymous"}], "route": [{"plugin": "circuit_breaker", "failures": 3}]},
        "providers": {"own": {"plugin": f"{__name__}:Clumsy"}},
        "models": {"small": {"targets": [{"provider": "own", "model": "a"}]}},
    }
    async with running(orjson.dumps(content).decode(), clock=clock) as gateway:
        yield gateway, clock


@pytest.mark.parametrize("kind", ["TypeError", "KeyError", "UnicodeError", "RecursionError"])
async def test_a_mistake_in_a_providers_plugin_does_not_close_its_target_to_everybody(kind: str) -> None:
    async with clumsy() as (gateway, _):
        answers = [await ask(gateway, user=kind) for _ in range(9)]
        assert {(answer.status, answer.json()["error"]["code"]) for answer in answers} == {(502, "upstream_error")}
        assert (await ask(gateway)).status == 200
        assert gateway.plugin("route", "circuit_breaker").health().ok


@pytest.mark.parametrize("kind", ["OSError", "RuntimeError", "UpstreamError"])
async def test_what_else_a_providers_plugin_raises_counts(kind: str) -> None:
    async with clumsy() as (gateway, clock):
        assert [(await ask(gateway, user=kind)).status for _ in range(3)] == [502] * 3
        assert is_open(await ask(gateway))
        clock.advance(30)
        assert (await ask(gateway, user="TypeError")).status == 502  # the one that tries learns nothing
        assert (await ask(gateway)).status == 200


async def test_targets_have_circuits_of_their_own_and_those_behind_a_wildcard_share_one() -> None:
    async with broken(3) as (gateway, up, _):
        up.script(*[BROKEN] * 3)
        for number in range(3):
            assert (await ask(gateway, model=f"open/{number}")).status == 502
        assert is_open(await ask(gateway, model="open/another"))
        assert len(gateway.plugin("route", "circuit_breaker")._circuits) == 2
        assert await gauge(gateway) == {
            'qlens_circuit_open{model="a",provider="up"}': 1,
            'qlens_circuit_open{model="open/*",provider="up"}': 1,
        }


async def test_health_and_metrics_name_what_is_open() -> None:
    async with broken(2) as (gateway, up, clock):
        plugin = gateway.plugin("route", "circuit_breaker")
        assert plugin.health().ok
        up.script(BROKEN)
        await ask(gateway)
        assert not plugin.health().ok
        assert plugin.health().detail == "open: up/a (3 failures in a row)"
        clock.advance(30)
        assert (await ask(gateway)).status == 200
        assert plugin.health().ok
        assert await gauge(gateway) == {'qlens_circuit_open{model="a",provider="up"}': 0}


async def test_a_reload_keeps_an_open_circuit_and_forgets_a_target_that_was_taken_out() -> None:
    async with broken(3) as (gateway, up, _):
        await gateway.reload(config(up.url, "failures: 9"))
        assert is_open(await ask(gateway))
        await gateway.reload(config(up.url, "failures: 9", targets="{provider: spare, model: a}"))
        assert gateway.plugin("route", "circuit_breaker").health().ok
        assert await gauge(gateway) == {'qlens_circuit_open{model="a",provider="up"}': 0}


async def test_a_healthy_target_takes_no_memory() -> None:
    async with broken(1) as (gateway, _, _):
        assert (await ask(gateway)).status == 200
        assert gateway.plugin("route", "circuit_breaker")._circuits == {}


@pytest.mark.parametrize(("settings", "name"), [("failures: 0", "failures"), ("open_seconds: 0", "open_seconds")])
async def test_settings_that_make_no_sense_stop_the_start(settings: str, name: str) -> None:
    with pytest.raises(StartupError) as error:
        async with running(config("http://127.0.0.1:1", settings)):
            pass
    (fault,) = error.value.faults
    assert f"pipeline.route[0].{name}" in fault.path


async def test_a_bound_of_the_gateway_itself_says_nothing_about_a_target(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = "failures: 1"
    async with upstream() as up:
        narrow = config(up.url, settings).replace(
            "api_key", "connect_seconds: 0.05, network: {max_connections: 1}, api_key"
        )
        async with running(narrow, clock=ManualClock()) as gateway:
            up.script(Scripted(hang=True))
            asking = asyncio.create_task(ask(gateway))
            await up.arrived(1)
            for _ in range(2):
                answer = await ask(gateway)
                assert (answer.status, answer.headers["retry-after"]) == (503, "1")
                assert answer.json()["error"]["code"] == "upstream_connections"
                assert "max_connections" in answer.json()["error"]["message"]
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            await up.requests[0].closed.wait()
            assert len(up.requests) == 1
            assert (await ask(gateway)).status == 200
            up.hang_up()

            async def used_up(*_: Any, **__: Any) -> None:
                raise OSError(errno.EMFILE, "Too many open files")

            with monkeypatch.context() as patched:
                patched.setattr("qlens.upstream_dialer.aiohappyeyeballs.start_connection", used_up)
                for _ in range(2):
                    answer = await ask(gateway, model="small")
                    assert "too many files open" in answer.json()["error"]["message"]
            assert (await ask(gateway)).status == 200
