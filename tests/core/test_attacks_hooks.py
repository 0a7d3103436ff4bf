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

from qlens import Call, Caller, Cost, Limit, Outgoing, RateLimited, Reply, Target, UpstreamError, Usage
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


NONSENSE: list[tuple[str, Callable[..., Any], int]] = [
    ("authenticate", lambda call: True, 503),
    ("authenticate", lambda call: "acme", 503),
    ("authenticate", lambda call: Caller("", "nobody", "puppet"), 503),
    ("authenticate", _stray, 503),
    ("admit", _stray, 503),
    ("wrap_call", lambda call, proceed: None, 500),
    ("wrap_call", lambda call, proceed: Reply(), 500),
    ("wrap_call", lambda call, proceed: Reply(body="text"), 500),  # type: ignore[arg-type]
    ("wrap_call", _stray, 500),
    ("lookup", lambda call: {"choices": []}, 200),
    ("lookup", lambda call: True, 200),
    ("lookup", lambda call: Reply(), 200),
    ("lookup", _stray, 200),
    ("choose", lambda call: 5, 500),
    ("choose", lambda call: ["talker"], 500),
    ("choose", lambda call: [evolve(call.model.candidates[0], provider="nowhere")], 500),
    ("choose", _stray, 500),
    ("wrap_send", lambda target, proceed: None, 500),
    ("wrap_send", lambda target, proceed: proceed(None), 500),
    ("wrap_send", lambda target, proceed: proceed(evolve(target, provider="nowhere")), 500),
    ("wrap_send", _stray, 500),
    ("store", _stray, 200),
    ("price", lambda call: 5, 200),
    ("price", lambda call: Cost(-5), 200),
    ("price", lambda call: Cost(1.5), 200),  # type: ignore[arg-type]
    ("settle", _stray, 200),
]


@pytest.mark.parametrize("body", [HELLO, STREAM], ids=["body", "stream"])
@pytest.mark.parametrize(("hook", "does", "status"), NONSENSE, ids=[f"{n}-{c[0]}" for n, c in enumerate(NONSENSE)])
async def test_nonsense_from_a_hook_is_a_failure_of_that_hook(
    hook: str, does: Callable[..., Any], status: int, body: dict[str, Any]
) -> None:
    async with running(_with(hook)) as gateway:
        puppet = _puppet(gateway, hook)
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
