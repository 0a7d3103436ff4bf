"""Of several answers to one call the client gets one: the receipt says which, and what became of the others."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from priced import EXACT, INPUT, OUTPUT, SAID, WHOLE
from puppets import Puppet
from yamls import CHAT, HELLO, STREAM, config, targets

from qlens import Reply, Target
from qlens.testing import Running, Scripted, running, upstream
from qlens.testing.upstreams import FakeUpstream

MOST = 50
Proceed = Callable[[Target], Awaitable[Reply]]


def yaml(one: FakeUpstream, two: FakeUpstream, **said: Any) -> str:
    providers = {
        name: {"plugin": "openai", "base_url": up.url, "api_key": "sk-example-up", **said}
        for name, up in (("one", one), ("two", two))
    }
    stages = {
        "route": [{"plugin": "puppets:Puppet", "name": "puppet"}],
        "cost": [{"plugin": "prices", "catalogue": False, "table": [{"model": "*", "input": 3, "output": 7}]}],
    }
    models = {"gpt-4o-mini": {"max_output_tokens": MOST, "targets": targets("one", "two")}}
    return config(stages, providers, models)


def hedge(gateway: Running, *, ends_the_slow: bool, copies: bool = False) -> None:
    """Ask both targets, hand out whichever answers first, and end the other one's task or leave it alone."""
    puppet: Puppet = gateway.plugin("route", "puppet")
    kept: list[asyncio.Task[Reply]] = []

    async def both(target: Target, proceed: Proceed) -> Reply:
        other = Target("two", target.model, target.public)
        tasks = [asyncio.ensure_future(proceed(each)) for each in (target, other)]
        kept.extend(tasks)
        done, slow = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if ends_the_slow:
            for task in slow:
                task.cancel()
        reply = done.pop().result()
        if copies:
            return Reply(chunks=reply.chunks, body=reply.body, dialect=reply.dialect, complete=reply.complete)
        return reply

    puppet.does["wrap_send"] = both


@pytest.mark.parametrize("ends_the_slow", [True, False], ids=["cancelled", "ignored"])
@pytest.mark.parametrize("body", [HELLO, STREAM], ids=["body", "stream"])
@pytest.mark.parametrize("fast", ["one", "two"])
async def test_the_faster_answer_is_the_receipts_and_the_slower_one_is_ended_and_not_free(
    fast: str, body: dict[str, Any], ends_the_slow: bool
) -> None:
    async with upstream() as one, upstream() as two, running(yaml(one, two)) as gateway:
        quick, slow = (one, two) if fast == "one" else (two, one)
        # Slower than the first answer, and there before the call has ended: the last to come is not the source.
        quick.script(Scripted(events=SAID, gap=0.05, delay=0.1) if body is STREAM else Scripted(body=WHOLE, delay=0.1))
        slow.script(Scripted(hang=True))
        hedge(gateway, ends_the_slow=ends_the_slow)
        answer = await gateway.post(CHAT, body)
        assert (answer.status, answer.headers["x-qlens-provider"]) == (200, fast)
        if body is STREAM:
            assert answer.events()[-1] == "[DONE]"
        (receipt,) = await gateway.settled(1)
        assert receipt.target is not None
        assert (receipt.outcome, receipt.error, receipt.target.provider) == ("complete", None, fast)
        assert [attempt.kind for attempt in receipt.attempts] == ["send", "hedge"]
        by_provider = {attempt.target.provider: attempt for attempt in receipt.attempts}
        taken, left = by_provider.pop(fast), by_provider.popitem()[1]
        assert taken.cost.picos == EXACT
        assert left.usage is not None
        assert (left.billed, left.usage.source, left.usage.output, left.error) == (
            True,
            "estimated",
            MOST,
            "unanswered",
        )
        assert receipt.cost.picos == EXACT + left.usage.input * INPUT + MOST * OUTPUT
        await asyncio.wait_for(slow.requests[0].closed.wait(), 5)


@pytest.mark.parametrize("copies", [False, True], ids=["its own", "a copy"])
async def test_a_stream_is_the_receipts_though_another_answers_while_it_runs(copies: bool) -> None:
    async with upstream() as one, upstream() as two, running(yaml(one, two)) as gateway:
        one.script(Scripted(events=SAID, gap=0.05))
        two.script(Scripted(events=SAID[:3], delay=0.1, hang=True))
        hedge(gateway, ends_the_slow=False, copies=copies)
        answer = await gateway.post(CHAT, STREAM)
        assert answer.events()[-1] == "[DONE]"
        (receipt,) = await gateway.settled(1)
        assert receipt.target is not None
        assert (receipt.outcome, receipt.target.provider) == ("complete", "one")
        taken, left = receipt.attempts
        assert taken.cost.picos == EXACT
        assert left.usage is not None
        assert (left.billed, left.usage.source) == (True, "partial")
        await asyncio.wait_for(two.requests[0].closed.wait(), 5)


async def test_an_answer_that_is_not_taken_is_charged_the_most_where_its_provider_goes_on() -> None:
    async with upstream() as one, upstream() as two, running(yaml(one, two, on_disconnect="drain")) as gateway:
        one.script(Scripted(events=SAID, gap=0.05))
        two.script(Scripted(events=SAID[:3], delay=0.1, hang=True))
        hedge(gateway, ends_the_slow=False)
        assert (await gateway.post(CHAT, STREAM)).status == 200
        (receipt,) = await gateway.settled(1)
        left = receipt.attempts[1]
        assert left.usage is not None
        assert (left.usage.source, left.usage.output) == ("estimated", MOST)


async def test_an_attempt_is_no_hedge_when_the_one_before_has_failed() -> None:
    async with upstream() as one, upstream() as two, running(yaml(one, two)) as gateway:
        one.script(Scripted(status=500))
        assert (await gateway.post(CHAT, HELLO)).status == 200
        (receipt,) = await gateway.settled(1)
        assert [(attempt.kind, attempt.billed) for attempt in receipt.attempts] == [("send", False), ("send", True)]


async def test_nobody_is_asked_for_a_call_that_is_over() -> None:
    async with upstream() as one, upstream() as two, running(yaml(one, two)) as gateway:
        later: list[Proceed] = []

        async def keep(target: Target, proceed: Proceed) -> Reply:
            later.append(proceed)
            return await proceed(target)

        gateway.plugin("route", "puppet").does["wrap_send"] = keep
        assert (await gateway.post(CHAT, HELLO)).status == 200
        (receipt,) = await gateway.settled(1)
        with pytest.raises(Exception, match=r"The call is over\."):
            await later[0](Target("two", "mini", "gpt-4o-mini"))
        assert (len(receipt.attempts), two.requests) == (1, [])
