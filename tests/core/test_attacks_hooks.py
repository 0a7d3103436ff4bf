"""Plugins that return nonsense: every call still settles once, gives back what it held, and is answered by kind."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable
from typing import Any

import orjson
import pytest
from attrs import evolve
from puppets import Puppet, Speaker
from yamls import CHAT, HELLO, STREAM, config, targets

from qlens import Call, Caller, CallError, Cost, Limit, Outgoing, RateLimited, Reply, Target, UpstreamError, Usage
from qlens.testing import Running, running

PUPPET = {"plugin": "puppets:Puppet", "name": "puppet"}
MESSAGE = {"index": 0, "message": {"role": "assistant", "content": "Hi"}, "finish_reason": "stop"}
BODY = orjson.dumps({"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [MESSAGE]})
STAGE = {
    "authenticate": "auth",
    "admit": "rate_limit",
    "wrap_call": "guard",
    "lookup": "cache",
    "store": "cache",
    "choose": "route",
    "retry": "route",
    "wrap_send": "route",
    "price": "cost",
    "settle": "cost",
}


def _with(hook: str) -> str:
    stages: dict[str, Any] = {STAGE[hook]: [PUPPET]}
    if hook == "authenticate":
        stages["auth"].append({"plugin": "anonymous"})
    return config(stages)


def _puppet(gateway: Running, hook: str) -> Puppet:
    puppet: Puppet = gateway.plugin(STAGE[hook], "puppet")
    return puppet


async def _settled_once(gateway: Running, puppet: Puppet, calls: int = 1) -> None:
    await asyncio.wait_for(gateway.gateway.settled(), 5)
    assert len(puppet.settled) == calls
    assert len(gateway.receipts) == calls
    assert puppet.held == set()


def _stray(*_: object) -> Any:
    raise asyncio.CancelledError  # as awaiting somebody else's task does when that was cancelled


def _exit(*_: object) -> Any:
    raise SystemExit("a library gives up")


def _caller(**said: Any) -> Caller:
    return evolve(Caller("acme", "nobody", "puppet"), **said)


def _raise(kind: type[CallError], **said: Any) -> None:
    raise kind("no", **said)


NONSENSE: list[tuple[str, Callable[..., Any], int]] = [
    ("authenticate", lambda call: True, 503),
    ("authenticate", lambda call: "acme", 503),
    ("authenticate", lambda call: Caller("", "nobody", "puppet"), 503),
    ("authenticate", lambda call: _caller(tenant="acme\nadmin"), 503),
    ("authenticate", lambda call: _caller(subject=None), 503),
    ("authenticate", lambda call: _caller(by=None), 503),
    ("authenticate", lambda call: _caller(project=7), 503),
    ("authenticate", lambda call: _caller(key_id=8), 503),
    ("authenticate", lambda call: _caller(roles="admin"), 503),
    ("authenticate", lambda call: _caller(models="zzz*"), 503),
    ("authenticate", lambda call: _caller(models=(5,)), 503),
    ("authenticate", lambda call: _caller(tags={"team": 1}), 503),
    ("authenticate", lambda call: _caller(expires_at="tomorrow"), 503),
    ("authenticate", lambda call: _caller(allowance={"concurrency": 1}), 503),
    ("authenticate", lambda call: call.tags.update(team=object()), 503),
    ("authenticate", _stray, 503),
    ("authenticate", _exit, 503),
    ("admit", lambda call: call.limits.append(Limit("requests", "x", 10, None, 1.0)), 503),  # type: ignore[arg-type]
    ("admit", lambda call: call.limits.append(Limit("requests", "x", 10, 5, "soon")), 503),  # type: ignore[arg-type]
    ("admit", lambda call: call.limits.append({"kind": "requests"}), 503),
    ("admit", lambda call: setattr(call, "limits", None), 503),
    ("admit", lambda call: call.tags.update(team=object()), 503),
    ("admit", lambda call: _raise(RateLimited, retry_after="soon"), 503),
    ("admit", lambda call: _raise(RateLimited, headers="x: 1"), 503),
    ("admit", _stray, 503),
    ("admit", _exit, 503),
    ("wrap_call", lambda call, proceed: None, 500),
    ("wrap_call", lambda call, proceed: Reply(), 500),
    ("wrap_call", lambda call, proceed: Reply(body="text"), 500),  # type: ignore[arg-type]
    ("wrap_call", _stray, 500),
    ("wrap_call", _exit, 500),
    ("lookup", lambda call: {"choices": []}, 200),
    ("lookup", lambda call: True, 200),
    ("lookup", lambda call: Reply(), 200),
    ("lookup", lambda call: Reply(body=b'{"choices": ['), 200),
    ("lookup", lambda call: Reply(500, body=b"{}"), 200),
    ("lookup", _stray, 200),
    ("lookup", _exit, 200),
    ("choose", lambda call: 5, 500),
    ("choose", lambda call: ["talker"], 500),
    ("choose", lambda call: [evolve(call.model.candidates[0], provider="nowhere")], 500),
    ("choose", _stray, 500),
    ("choose", _exit, 500),
    ("wrap_send", lambda target, proceed: None, 500),
    ("wrap_send", lambda target, proceed: proceed(None), 500),
    ("wrap_send", lambda target, proceed: proceed(evolve(target, provider="nowhere")), 500),
    ("wrap_send", _stray, 500),
    ("wrap_send", _exit, 500),
    ("store", _stray, 200),
    ("store", _exit, 200),
    ("price", lambda call: 5, 200),
    ("price", lambda call: Cost(-5), 200),
    ("price", lambda call: Cost(1.5), 200),  # type: ignore[arg-type]
    ("price", _exit, 200),
    ("settle", _stray, 200),
    ("settle", _exit, 200),
]


@pytest.mark.parametrize("body", [HELLO, STREAM], ids=["body", "stream"])
@pytest.mark.parametrize(("hook", "does", "status"), NONSENSE, ids=[f"{n}-{c[0]}" for n, c in enumerate(NONSENSE)])
async def test_nonsense_from_a_hook_is_a_failure_of_that_hook(
    hook: str, does: Callable[..., Any], status: int, body: dict[str, Any]
) -> None:
    async with running(_with(hook)) as gateway:
        puppet = _puppet(gateway, hook)
        puppet.does["lookup"] = lambda call: setattr(call, "keep", 1_000_000)
        puppet.does[hook] = does
        answer = await asyncio.wait_for(gateway.post(CHAT, body), 5)
        assert answer.status == status
        if status == 200:
            assert "Hello" in answer.text
        else:
            assert answer.json()["error"]["type"] == "server_error"
        await _settled_once(gateway, puppet, 0 if hook == "authenticate" else 1)
        counted = f'qlens_plugin_failures_total{{hook="{hook}",plugin="puppet"}}'
        assert counted in (await gateway.get("/metrics")).text


WAITS: list[Any] = [math.nan, -1, "1", math.inf, 1e300]


@pytest.mark.parametrize("wait", WAITS, ids=str)
async def test_nonsense_from_retry_ends_the_retrying_and_not_the_loop_of_events(wait: Any) -> None:
    async with running(config({"route": [PUPPET]}, SPEAKER, ONE)) as gateway:
        puppet = _puppet(gateway, "retry")
        puppet.does["retry"] = lambda call: wait
        gateway.plugin("provider", "speaker").answer = _refusing
        if wait == 1e300:
            asking = asyncio.create_task(gateway.post(CHAT, HELLO))
            await asyncio.sleep(0.1)
            asking.cancel()  # it waits, as it was told to
        else:
            assert (await asyncio.wait_for(gateway.post(CHAT, HELLO), 5)).status == 502
        await _settled_once(gateway, puppet)
        before = asyncio.get_running_loop().time()
        await asyncio.sleep(0.01)  # the loop still keeps time
        assert asyncio.get_running_loop().time() - before < 2


async def test_a_retry_that_always_says_yes_comes_to_an_end() -> None:
    async with running(config({"route": [PUPPET]}, SPEAKER, ONE)) as gateway:
        puppet = _puppet(gateway, "retry")
        puppet.does["retry"] = lambda call: 0
        gateway.plugin("provider", "speaker").answer = _refusing
        assert (await asyncio.wait_for(gateway.post(CHAT, HELLO), 10)).status == 502
        await _settled_once(gateway, puppet)
        assert len(puppet.settled[0].attempts) == 100


SPEAKER = {"speaker": {"plugin": "puppets:Speaker"}}
ONE = {"gpt-4o-mini": {"max_output_tokens": 100, "targets": targets("speaker")}}


def _refusing(call: Call, target: Target, outgoing: Outgoing) -> Reply:
    raise UpstreamError("not now")


def _words(*words: bytes, finish: bool = True) -> list[bytes]:
    events = [b'data: {"id":"1","choices":[{"index":0,"delta":{"content":"' + word + b'"}}]}\n\n' for word in words]
    end = [b'data: {"id":"1","choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n', b"data: [DONE]\n\n"]
    return [*events, *(end if finish else [])]


async def _stream(*words: bytes) -> AsyncIterator[bytes]:
    for event in _words(*words):
        yield event


ANSWERS: list[Callable[..., Any]] = [
    lambda call, target, outgoing: None,
    lambda call, target, outgoing: {"choices": []},
    lambda call, target, outgoing: Reply(),
    lambda call, target, outgoing: Reply(usage=Usage(input=5)),
    lambda call, target, outgoing: Reply(body="{}", usage=Usage(input=5)),  # type: ignore[arg-type]
    lambda call, target, outgoing: Reply(body=b"[]"),
    lambda call, target, outgoing: Reply(body=BODY, usage=Usage(input=-5), complete=True),
    lambda call, target, outgoing: Reply(body=BODY, usage=Usage(input=1.5), complete=True),  # type: ignore[arg-type]
    lambda call, target, outgoing: Reply(body=BODY, usage={"input": 5}, complete=True),  # type: ignore[arg-type]
    lambda call, target, outgoing: Reply(body=BODY, dialect="klingon", complete=True),
    lambda call, target, outgoing: Reply(chunks=[b"data: [DONE]\n\n"]),  # type: ignore[arg-type]
    lambda call, target, outgoing: Reply(500, body=b'{"error": {"message": "key sk-example is over its quota"}}'),
    lambda call, target, outgoing: Reply(500, chunks=_stream(b"no")),
    lambda call, target, outgoing: Reply("200", body=BODY),  # type: ignore[arg-type]
    _stray,
    _exit,
]


@pytest.mark.parametrize("body", [HELLO, STREAM], ids=["body", "stream"])
@pytest.mark.parametrize("answer", ANSWERS, ids=range(len(ANSWERS)))
async def test_nonsense_from_a_provider_is_502_after_the_next_target_was_asked(
    answer: Callable[..., Any], body: dict[str, Any]
) -> None:
    providers = {**SPEAKER, "talker": {"plugin": "plugs:Talker"}}
    models = {
        "gpt-4o-mini": {"targets": targets("speaker")},
        "both": {"targets": targets("speaker", "talker")},
    }
    async with running(config({"observe": [PUPPET]}, providers, models)) as gateway:
        puppet: Puppet = gateway.plugin("observe", "puppet")
        gateway.plugin("provider", "speaker").answer = answer
        got = await asyncio.wait_for(gateway.post(CHAT, body), 5)
        assert got.status == 502
        assert got.json()["error"]["type"] == "server_error"
        assert (await gateway.post(CHAT, {**body, "model": "both"})).status == 200
        await _settled_once(gateway, puppet, 2)
        assert [receipt.outcome for receipt in puppet.settled] == ["failed", "complete"]
        assert not any(receipt.attempts[0].billed for receipt in puppet.settled)
        assert all(count >= 0 for receipt in puppet.settled for count in (receipt.usage.total, receipt.cost.picos or 0))


BREAKS: list[Any] = [
    "text",
    OSError("gone"),
    TimeoutError("slow"),
    RuntimeError("sk-example-secret-in-an-exception"),
    StopAsyncIteration(),
    asyncio.CancelledError(),
    SystemExit(),
    KeyError("x"),
]


@pytest.mark.parametrize("layered", [False, True], ids=["plain", "in a generator"])
@pytest.mark.parametrize("broken", BREAKS, ids=repr)
@pytest.mark.parametrize("begun", [True, False], ids=["mid-stream", "at its begin"])
async def test_a_stream_that_breaks_by_itself_is_the_providers_failure(begun: bool, broken: Any, layered: bool) -> None:
    class Breaking:
        """Not a generator, which would turn some of these into others."""

        def __init__(self) -> None:
            self.left = _words(b"Hi", finish=False) if begun else []

        def __aiter__(self) -> Breaking:
            return self

        async def __anext__(self) -> Any:
            if self.left:
                return self.left.pop()
            if isinstance(broken, BaseException):
                raise broken
            return broken

    async def generated() -> AsyncIterator[bytes]:
        async for chunk in Breaking():
            yield chunk

    async with running(config({"observe": [PUPPET]}, SPEAKER, ONE)) as gateway:
        puppet: Puppet = gateway.plugin("observe", "puppet")
        speaker: Speaker = gateway.plugin("provider", "speaker")
        speaker.answer = lambda *_: Reply(chunks=generated() if layered else Breaking(), close=speaker.close)
        answer = await asyncio.wait_for(gateway.post(CHAT, STREAM), 5)
        ended = isinstance(broken, StopAsyncIteration)
        error = (answer.events()[-1] if begun else answer.json())["error"]
        assert answer.status == (200 if begun else 502)
        assert error["code"] == ("upstream_truncated" if ended else "upstream_error")
        assert "secret" not in answer.text
        assert "[DONE]" not in answer.text
        await _settled_once(gateway, puppet)
        (receipt,) = puppet.settled
        assert receipt.outcome == "failed"
        assert receipt.error == error["code"]
        assert speaker.closed == 1
        if not ended:
            assert 'hook="send",plugin="speaker"' in (await gateway.get("/metrics")).text


async def test_a_stream_that_ends_the_generator_around_it_still_settles() -> None:
    class Exiting:
        def __aiter__(self) -> Exiting:
            return self

        async def __anext__(self) -> bytes:
            raise GeneratorExit

    async with running(config({"observe": [PUPPET]}, SPEAKER, ONE)) as gateway:
        puppet: Puppet = gateway.plugin("observe", "puppet")
        speaker: Speaker = gateway.plugin("provider", "speaker")
        speaker.answer = lambda *_: Reply(chunks=Exiting(), close=speaker.close)
        answer = await asyncio.wait_for(gateway.post(CHAT, STREAM), 5)
        assert (answer.status, answer.json()["error"]["code"]) == (500, "internal_error")
        await _settled_once(gateway, puppet)
        assert (puppet.settled[0].outcome, speaker.closed) == ("failed", 1)
