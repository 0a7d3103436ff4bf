"""What plugins leave behind and fails only later, in a stream or a handler, is counted as theirs, and is answered."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from plugs import SECRET
from puppets import Puppet, Resident
from yamls import CHAT, HELLO, STREAM, config

from qlens import Blocked, Call, Reply, Target
from qlens.testing import Running, running

GUARD = {"guard": [{"plugin": "puppets:Puppet", "name": "puppet"}]}
ROUTE = {"route": [{"plugin": "puppets:Puppet", "name": "puppet"}]}
CACHE = {"cache": [{"plugin": "puppets:Puppet", "name": "puppet"}]}
HOME = {"observe": [{"plugin": "puppets:Resident", "name": "home"}]}


async def _counted(gateway: Running, plugin: str, hook: str) -> bool:
    return f'qlens_plugin_failures_total{{hook="{hook}",plugin="{plugin}"}} 1.0' in (await gateway.get("/metrics")).text


def _failing(error: BaseException, after: int) -> Callable[[str], str]:
    seen: list[str] = []

    def rewrite(text: str) -> str:
        seen.append(text)
        if len(seen) > after:
            raise error
        return text

    return rewrite


@pytest.mark.parametrize("error", [KeyError(SECRET), SystemExit(1)], ids=repr)
@pytest.mark.parametrize("after", [0, 2])
async def test_a_rewriting_that_fails_in_a_stream_is_the_guards_failure(after: int, error: BaseException) -> None:
    async with running(config(GUARD)) as gateway:
        puppet: Puppet = gateway.plugin("guard", "puppet")

        async def rewritten(call: Call, proceed: Callable[[], Awaitable[Reply]]) -> Reply:
            reply = await proceed()
            reply.rewrite_text(_failing(error, after), hold_back=0)
            return reply

        puppet.does["wrap_call"] = rewritten
        answer = await gateway.post(CHAT, STREAM)
        said = answer.events()[-1] if after else answer.json()
        assert (answer.status, said["error"]["code"]) == (200 if after else 500, "plugin_failed")
        assert SECRET not in answer.text
        assert "[DONE]" not in answer.text
        assert await _counted(gateway, "puppet", "wrap_call")
        (receipt,) = await gateway.settled(1)
        assert (receipt.outcome, receipt.error) == ("failed", "plugin_failed")


async def test_a_guard_that_blocks_in_a_stream_has_not_failed() -> None:
    async with running(config(GUARD)) as gateway:
        puppet: Puppet = gateway.plugin("guard", "puppet")

        async def rewritten(call: Call, proceed: Callable[[], Awaitable[Reply]]) -> Reply:
            reply = await proceed()
            reply.rewrite_text(_failing(Blocked("no"), 1), hold_back=0)
            return reply

        puppet.does["wrap_call"] = rewritten
        assert (await gateway.post(CHAT, STREAM)).events()[-1]["error"]["code"] == "content_filter"
        assert not await _counted(gateway, "puppet", "wrap_call")


async def _texts() -> AsyncIterator[Any]:
    yield "data: [DONE]\n\n"


def _put_in(reply: Reply) -> Reply:
    reply.replace(chunks=_texts())
    return reply


def _own(_reply: Reply) -> Reply:
    return Reply(chunks=_texts())


@pytest.mark.parametrize("made", [_put_in, _own])
@pytest.mark.parametrize(("stages", "hook"), [(GUARD, "wrap_call"), (ROUTE, "wrap_send"), (CACHE, "lookup")])
async def test_a_stream_of_texts_is_answered_as_the_failure_of_who_made_it(
    stages: dict[str, Any], hook: str, made: Callable[[Reply], Reply]
) -> None:
    async with running(config(stages)) as gateway:
        puppet: Puppet = gateway.plugin(next(iter(stages)), "puppet")

        async def layer(*args: Any) -> Reply:
            *_, proceed = args
            target: list[Target] = [each for each in args if isinstance(each, Target)]
            return made(await proceed(*target))

        puppet.does[hook] = (lambda call: made(Reply())) if hook == "lookup" else layer
        answer = await gateway.post(CHAT, STREAM)
        assert (answer.status, answer.json()["error"]["code"]) == (500, "plugin_failed")
        assert await _counted(gateway, "puppet", hook)
        assert (await gateway.settled(1))[0].outcome == "failed"


async def test_a_tag_that_is_no_text_costs_no_receipt(caplog: pytest.LogCaptureFixture) -> None:
    async with running(config({**GUARD, "cost": [{"plugin": "ledger", "url": "sqlite:///l.db"}]})) as gateway:
        puppet: Puppet = gateway.plugin("guard", "puppet")

        async def tagging(call: Call, proceed: Callable[[], Awaitable[Reply]]) -> Reply:
            call.tags |= {"team": "red", "thing": object()}  # type: ignore[dict-item]
            return await proceed()

        puppet.does["wrap_call"] = tagging
        assert (await gateway.post(CHAT, HELLO)).status == 200
        (receipt,) = await gateway.settled(1)
        assert receipt.tags == {"team": "red"}
        assert "no text" in caplog.text
        assert not await _counted(gateway, "ledger", "settle")


# --- endpoints ---------------------------------------------------------------------------------


async def _not_bytes(call: Call) -> Reply:
    return Reply(chunks=_texts())


async def _raising(call: Call) -> Reply:
    raise KeyError(SECRET)


async def _exiting(call: Call) -> Reply:
    raise SystemExit(1)


async def _plain(call: Call) -> Any:
    return {"a": 1}


async def _odd_status(call: Call) -> Reply:
    return Reply("200", body=b"{}")  # type: ignore[arg-type]


async def _odd_body(call: Call) -> Reply:
    return Reply(body="{}")  # type: ignore[arg-type]


@pytest.mark.parametrize("handler", [_not_bytes, _raising, _exiting, _plain, _odd_status, _odd_body])
async def test_a_handler_that_fails_is_its_plugins_failure(
    handler: Callable[[Call], Awaitable[Any]], caplog: pytest.LogCaptureFixture
) -> None:
    async with running(config(HOME)) as gateway:
        home: Resident = gateway.plugin("observe", "home")
        home.answer = handler
        answer = await gateway.get("/home")
        assert (answer.status, answer.json()["error"]["code"]) == (500, "internal_error")
        assert SECRET not in answer.text + caplog.text
        assert "home failed in endpoints" in caplog.text
        assert await _counted(gateway, "home", "endpoints")


async def test_a_handler_may_answer_without_a_body() -> None:
    async with running(config(HOME)) as gateway:
        home: Resident = gateway.plugin("observe", "home")

        async def nothing(call: Call) -> Reply:
            return Reply(204)

        home.answer = nothing
        answer = await gateway.get("/home")
        assert (answer.status, answer.body) == (204, b"")
