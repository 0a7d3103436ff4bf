"""Whatever becomes of a call, its upstreams are closed, its attempts are billed once, and its account settles once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import orjson
import pytest
from puppets import Puppet, Speaker
from yamls import CHAT, HELLO, STREAM, config, probe, targets

from qlens import Blocked, Cost, Outgoing, Reply, Target, UpstreamError, Usage
from qlens.testing import Running, running

PUPPET = {"plugin": "puppets:Puppet", "name": "puppet"}
SPEAKERS = {name: {"plugin": "puppets:Speaker"} for name in ("one", "two")}
MODELS = {"gpt-4o-mini": {"max_output_tokens": 100, "targets": targets("one", "two")}}
USAGE = b'data: {"id":"1","choices":[],"usage":{"prompt_tokens":5,"completion_tokens":3,"total_tokens":8}}\n\n'
STOP = b'data: {"id":"1","choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n'


def _event(text: str) -> bytes:
    return b'data: {"id":"1","choices":[{"index":0,"delta":{"content":"' + text.encode() + b'"}}]}\n\n'


async def _stream(*events: bytes, hang: bool = False) -> AsyncIterator[bytes]:
    for event in events:
        yield event
    if hang:
        await asyncio.Event().wait()


def _speak(gateway: Running, name: str, *events: bytes, hang: bool = False) -> Speaker:
    speaker: Speaker = gateway.plugin("provider", name)
    speaker.answer = lambda *_: Reply(chunks=_stream(*events, hang=hang), close=speaker.close)
    return speaker


WHOLE = (_event("Hi"), STOP, USAGE, b"data: [DONE]\n\n")


@pytest.mark.parametrize("body", [HELLO, STREAM], ids=["body", "stream"])
async def test_an_answer_that_a_plugin_drops_is_closed_and_billed_for_what_it_is(body: dict[str, Any]) -> None:
    async with running(
        config({"route": [PUPPET], "cost": [probe("p", answer=["price"])]}, SPEAKERS, MODELS)
    ) as gateway:
        puppet: Puppet = gateway.plugin("route", "puppet")
        one, two = _speak(gateway, "one", *WHOLE, hang=True), _speak(gateway, "two", *WHOLE)

        async def drop(target: Target, proceed: Any) -> Reply:
            reply: Reply = await proceed(target)
            if target.provider == "one":
                raise UpstreamError("too slow for me")
            return reply

        puppet.does["wrap_send"] = drop
        answer = await gateway.post(CHAT, body)
        assert answer.status == 200
        (receipt,) = await gateway.settled(1)
        assert (receipt.outcome, one.closed, two.closed) == ("complete", 1, 1)
        dropped, kept = receipt.attempts
        assert dropped.usage is not None
        assert dropped.usage.source == "partial"
        assert kept.usage is not None
        assert kept.usage.total == 8
        assert receipt.cost.picos == (dropped.usage.total + 8) * 1_000_000


async def test_an_answer_asked_for_twice_is_closed_twice() -> None:
    async with running(config({"guard": [PUPPET]}, SPEAKERS, MODELS)) as gateway:
        one = _speak(gateway, "one", *WHOLE)

        async def twice(call: Any, proceed: Any) -> Reply:
            await proceed()
            reply: Reply = await proceed()
            return reply

        gateway.plugin("guard", "puppet").does["wrap_call"] = twice
        assert (await gateway.post(CHAT, STREAM)).status == 200
        (receipt,) = await gateway.settled(1)
        assert (receipt.outcome, len(receipt.attempts), one.closed) == ("complete", 2, 2)


@pytest.mark.parametrize("hook", ["wrap_call", "wrap_send"])
async def test_a_reply_that_a_plugin_puts_in_front_is_closed_too(hook: str) -> None:
    async with running(config({"guard": [PUPPET]}, SPEAKERS, MODELS)) as gateway:
        one = _speak(gateway, "one", *WHOLE)
        closed: list[str] = []

        async def close() -> None:
            closed.append("front")

        async def front(*args: Any) -> Reply:
            reply: Reply = await (args[1]() if hook == "wrap_call" else args[1](args[0]))
            return Reply(chunks=reply.chunks, close=close, dialect=reply.dialect)

        gateway.plugin("guard", "puppet").does[hook] = front
        assert (await gateway.post(CHAT, STREAM)).status == 200
        await gateway.settled(1)
        assert (closed, one.closed) == (["front"], 1)


@pytest.mark.parametrize("how", ["raise", "cancel", "hang"])
async def test_an_upstream_that_does_not_close_well_settles_all_the_same(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qlens.account.CLOSE_SECONDS", 0.1)

    async def close() -> None:
        if how == "raise":
            raise RuntimeError("no")
        if how == "cancel":
            raise asyncio.CancelledError
        await asyncio.Event().wait()

    async with running(config({"guard": [PUPPET]}, SPEAKERS, MODELS)) as gateway:
        gateway.plugin("provider", "one").answer = lambda *_: Reply(chunks=_stream(*WHOLE), close=close)
        answer = await asyncio.wait_for(gateway.post(CHAT, STREAM), 5)
        assert answer.text.endswith("[DONE]\n\n")
        (receipt,) = await gateway.settled(1)
        assert receipt.outcome == "complete"
        assert gateway.plugin("guard", "puppet").held == set()


async def test_a_deadline_during_settlement_changes_nothing_of_the_receipt() -> None:
    async with running(config({"guard": [PUPPET]}, SPEAKERS, MODELS, call_seconds=0.3)) as gateway:
        puppet: Puppet = gateway.plugin("guard", "puppet")
        _speak(gateway, "one", *WHOLE)
        puppet.does["settle"] = lambda receipt: asyncio.sleep(0.6)
        answer = await gateway.post(CHAT, STREAM)
        assert answer.text.endswith("[DONE]\n\n")
        (receipt,) = await gateway.settled(1)
        assert (receipt.outcome, receipt.error) == ("complete", None)
        assert len(puppet.settled) == 1


async def test_a_client_that_left_is_abandoned_though_the_deadline_comes_while_the_upstream_closes() -> None:
    async def slow() -> None:
        await asyncio.sleep(0.6)

    async with running(config({"guard": [PUPPET]}, SPEAKERS, MODELS, call_seconds=0.3)) as gateway:
        gateway.plugin("provider", "one").answer = lambda *_: Reply(chunks=_stream(_event("Hi"), hang=True), close=slow)
        asking = asyncio.create_task(gateway.post(CHAT, STREAM))
        await asyncio.sleep(0.15)
        asking.cancel()
        (receipt,) = await gateway.settled(1)
        assert (receipt.outcome, receipt.error) == ("abandoned", "client_closed")


async def test_an_attempt_that_a_plugin_cuts_off_ends_when_it_is_cut() -> None:
    async with running(config({"route": [PUPPET]}, SPEAKERS, MODELS)) as gateway:
        one, two = gateway.plugin("provider", "one"), gateway.plugin("provider", "two")

        async def hang(*_: object) -> None:
            await asyncio.Event().wait()

        async def late(*_: object) -> Reply:
            await asyncio.sleep(0.3)
            return Reply(chunks=_stream(*WHOLE))

        async def impatient(target: Target, proceed: Any) -> Reply:
            try:
                async with asyncio.timeout(0.05 if target.provider == "one" else None):
                    reply: Reply = await proceed(target)
                    return reply
            except TimeoutError:
                raise UpstreamError("too slow for me") from None

        one.answer, two.answer = hang, late
        gateway.plugin("route", "puppet").does["wrap_send"] = impatient
        assert (await gateway.post(CHAT, STREAM)).status == 200
        (receipt,) = await gateway.settled(1)
        first, second = receipt.attempts
        assert first.ended is not None
        assert first.ended <= second.started
        assert (first.error, first.billed) == ("unanswered", False)


async def test_a_stream_made_into_a_body_says_what_was_used() -> None:
    async with running(config({"guard": [PUPPET]}, SPEAKERS, MODELS)) as gateway:
        _speak(gateway, "one", *WHOLE)
        answer = await gateway.post(CHAT, HELLO)
        assert answer.json()["choices"][0]["message"]["content"] == "Hi"
        assert answer.json()["usage"]["total_tokens"] == 8


async def test_a_stream_that_cannot_be_made_into_a_body_is_502() -> None:
    async with running(config({"guard": [PUPPET]}, SPEAKERS, MODELS)) as gateway:
        _speak(gateway, "one", b"data: not json\n\n", *WHOLE)
        answer = await gateway.post(CHAT, HELLO)
        assert (answer.status, answer.json()["error"]["code"]) == (502, "upstream_invalid_response")


async def test_an_answer_that_cannot_be_put_together_reaches_the_client_and_no_cache() -> None:
    async with running(config({"cache": [PUPPET]}, SPEAKERS, MODELS)) as gateway:
        puppet: Puppet = gateway.plugin("cache", "puppet")
        stored: list[object] = []
        puppet.does["lookup"] = lambda call: setattr(call, "keep", 10**30)
        puppet.does["store"] = lambda call, reply: stored.append(reply)
        _speak(gateway, "one", b"data: not json\n\n", *WHOLE)
        answer = await gateway.post(CHAT, STREAM)
        assert answer.text.endswith("[DONE]\n\n")
        (receipt,) = await gateway.settled(1)
        assert (receipt.outcome, stored) == ("complete", [])


async def test_a_usage_that_turns_into_nonsense_in_a_stream_is_estimated() -> None:
    async with running(config({"guard": [PUPPET]}, SPEAKERS, MODELS)) as gateway:
        replies: list[Reply] = []

        async def lying() -> AsyncIterator[bytes]:
            yield _event("Hi")
            replies[0].usage = Usage(input=-1, output=10**9)
            yield STOP + b"data: [DONE]\n\n"

        def answer(*_: object) -> Reply:
            replies.append(Reply(chunks=lying()))
            return replies[0]

        gateway.plugin("provider", "one").answer = answer
        assert (await gateway.post(CHAT, STREAM)).text.endswith("[DONE]\n\n")
        (receipt,) = await gateway.settled(1)
        assert (receipt.outcome, receipt.usage.source) == ("complete", "estimated")
        assert gateway.plugin("guard", "puppet").held == set()


@pytest.mark.parametrize("body", [HELLO, STREAM], ids=["body", "stream"])
@pytest.mark.parametrize("begun", [False, True], ids=["at once", "later"])
async def test_a_guard_may_block_an_answer_at_any_time(begun: bool, body: dict[str, Any]) -> None:
    async with running(config({"guard": [PUPPET]}, SPEAKERS, MODELS)) as gateway:
        words = [_event("good "), _event("good "), _event("bad")] if begun else [_event("bad")]
        one = _speak(gateway, "one", *words, *WHOLE)

        def check(text: str) -> str:
            if "bad" in text:
                raise Blocked("The answer was blocked.")
            return text

        async def guard(call: Any, proceed: Any) -> Reply:
            reply: Reply = await proceed()
            reply.rewrite_text(check, 3)
            return reply

        gateway.plugin("guard", "puppet").does["wrap_call"] = guard
        answer = await gateway.post(CHAT, body)
        (receipt,) = await gateway.settled(1)
        streamed = begun and body is STREAM
        assert (receipt.outcome, receipt.status) == ("blocked", 200 if streamed else 400)
        error = (answer.events()[-1] if streamed else answer.json())["error"]
        assert error["code"] == "content_filter"
        assert "bad" not in answer.text
        assert "[DONE]" not in answer.text
        assert one.closed == 1


async def test_a_fallback_is_asked_for_no_more_than_it_allows_and_the_bound_knows_the_most() -> None:
    models = {
        "gpt-4o-mini": {"max_output_tokens": 100, "targets": targets("one"), "fallbacks": ["small", "large"]},
        "small": {"max_output_tokens": 10, "max_n": 1, "targets": targets("two")},
        "large": {"max_output_tokens": 5000, "targets": targets("two")},
    }
    async with running(config({"guard": [PUPPET]}, SPEAKERS, models)) as gateway:
        sent: list[dict[str, Any]] = []
        bounds: list[int] = []

        def refuse(call: Any, target: Any, outgoing: Outgoing) -> Reply:
            sent.append(outgoing.body)
            raise UpstreamError("no")

        gateway.plugin("provider", "one").answer = gateway.plugin("provider", "two").answer = refuse
        gateway.plugin("guard", "puppet").does["admit"] = lambda call: bounds.append(call.bound.output)
        await gateway.post(CHAT, {**HELLO, "max_tokens": 2000, "n": 2})
        assert [(body["max_tokens"], body["n"]) for body in sent] == [(100, 2), (10, 1), (100, 2)]
        await gateway.post(CHAT, HELLO)
        assert bounds == [200, 5000]
        assert "max_tokens" not in sent[-1]


async def test_a_store_that_hangs_ends_with_the_calls_deadline() -> None:
    async with running(config({"cache": [PUPPET]}, SPEAKERS, MODELS, call_seconds=0.4)) as gateway:
        puppet: Puppet = gateway.plugin("cache", "puppet")

        async def hang(*_: object) -> None:
            await asyncio.Event().wait()

        puppet.does["store"] = hang
        body = orjson.dumps({"id": "1", "choices": [{"index": 0, "message": {"content": "Hi"}}]})
        gateway.plugin("provider", "one").answer = lambda *_: Reply(body=body, complete=True)
        assert (await gateway.post(CHAT, HELLO)).status == 200
        await asyncio.wait_for(gateway.gateway.settled(), 5)
        assert len(gateway.receipts) == 1


async def test_cancelled_again_and_again_a_call_settles_once() -> None:
    async with running(config({"guard": [PUPPET]}, SPEAKERS, MODELS)) as gateway:
        puppet: Puppet = gateway.plugin("guard", "puppet")
        reached = asyncio.Event()

        async def slow(receipt: object) -> None:
            reached.set()
            await asyncio.sleep(0.2)

        puppet.does["settle"] = slow
        one = _speak(gateway, "one", _event("Hi"), hang=True)
        asking = asyncio.create_task(gateway.post(CHAT, STREAM))
        while not gateway.server.running() or not puppet.held:
            await asyncio.sleep(0.01)
        (task,) = gateway.server.running()
        task.cancel()
        await reached.wait()
        for _ in range(3):
            task.cancel()
            await asyncio.sleep(0.01)
        await asyncio.gather(asking, return_exceptions=True)
        await asyncio.wait_for(gateway.gateway.settled(), 5)
        assert (len(puppet.settled), puppet.held, one.closed) == (1, set(), 1)


async def test_a_provider_cannot_make_endless_metrics_with_the_codes_of_its_errors() -> None:
    async with running(config({"guard": [PUPPET]}, SPEAKERS, MODELS)) as gateway:
        numbers = iter(range(1000))

        def refuse(*_: object) -> Reply:
            raise UpstreamError("no", code=f"code_{next(numbers)}")

        gateway.plugin("provider", "one").answer = gateway.plugin("provider", "two").answer = refuse
        sizes = []
        for _ in range(2):
            for _ in range(10):
                await gateway.post(CHAT, HELLO)
            sizes.append((await gateway.get("/metrics")).text.count("\n"))
        assert sizes[0] == sizes[1]


async def test_an_attempt_that_was_refused_costs_nothing() -> None:
    async with running(config({"cost": [PUPPET]}, SPEAKERS, MODELS)) as gateway:
        gateway.plugin("cost", "puppet").does["price"] = lambda call: Cost(7)

        def refuse(*_: object) -> Reply:
            raise UpstreamError("no")

        gateway.plugin("provider", "one").answer = refuse
        _speak(gateway, "two", *WHOLE)
        assert (await gateway.post(CHAT, STREAM)).status == 200
        (receipt,) = await gateway.settled(1)
        assert [attempt.billed for attempt in receipt.attempts] == [False, True]
        assert receipt.cost.picos == 7


@pytest.mark.parametrize("error", [TimeoutError(), RuntimeError("sk-example-secret")], ids=repr)
async def test_a_guard_that_fails_in_a_stream_is_not_taken_for_the_calls_deadline(error: Exception) -> None:
    async with running(config({"guard": [PUPPET]}, SPEAKERS, MODELS)) as gateway:
        one = _speak(gateway, "one", *WHOLE)

        async def guard(call: Any, proceed: Any) -> Reply:
            reply: Reply = await proceed()

            async def checked() -> AsyncIterator[bytes]:
                yield _event("so far, so good")
                raise error

            reply.replace(chunks=checked())
            return reply

        gateway.plugin("guard", "puppet").does["wrap_call"] = guard
        answer = await gateway.post(CHAT, STREAM)
        assert answer.events()[-1]["error"]["code"] == "plugin_failed"
        (receipt,) = await gateway.settled(1)
        assert (receipt.outcome, receipt.error, one.closed) == ("failed", "plugin_failed", 1)


async def test_a_body_is_complete_whether_its_provider_says_so_or_not_and_is_cached() -> None:
    async with running(config({"cache": [{"plugin": "exact"}]}, SPEAKERS, MODELS)) as gateway:
        said = {"index": 0, "message": {"role": "assistant", "content": "Hi"}, "finish_reason": "stop"}
        body = orjson.dumps({"id": "1", "object": "chat.completion", "choices": [said]})
        used = Usage(input=5, output=3, source="provider")
        gateway.plugin("provider", "one").answer = lambda *_: Reply(body=body, dialect="chat", usage=used)
        assert [(await gateway.post(CHAT, HELLO)).headers["x-qlens-cache"] for _ in "12"] == ["miss", "hit"]
        first, second = await gateway.settled(2)
        assert (first.outcome, first.error, first.usage) == ("complete", None, used)
        assert second.outcome == "cached"


@pytest.mark.parametrize(
    ("says", "known", "told"),
    [
        (None, True, "hit"),
        (None, False, "miss"),
        ("semantic", True, "semantic"),
        ("miss", True, "hit"),
        ("off", False, "off"),
    ],
)
@pytest.mark.parametrize("body", [HELLO, STREAM], ids=["body", "stream"])
async def test_what_a_cache_has_found_is_told_though_it_does_not_say_so(
    says: str | None, known: bool, told: str, body: dict[str, Any]
) -> None:
    async with running(config({"cache": [PUPPET]}, SPEAKERS, MODELS)) as gateway:
        said = {"index": 0, "message": {"role": "assistant", "content": "Hi"}, "finish_reason": "stop"}
        kept = orjson.dumps({"id": "1", "object": "chat.completion", "choices": [said]})
        _speak(gateway, "one", *WHOLE)

        def look(call: Any) -> Reply | None:
            if says is not None:
                call.cache = says
            return Reply(body=kept, complete=True) if known else None

        gateway.plugin("cache", "puppet").does["lookup"] = look
        answer = await gateway.post(CHAT, body)
        (receipt,) = await gateway.settled(1)
        assert (answer.headers["x-qlens-cache"], receipt.cache) == (told, told)
        assert receipt.outcome == ("cached" if known else "complete")
