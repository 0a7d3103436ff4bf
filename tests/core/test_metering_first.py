"""What the first event of a chat stream says: how much of it is no text, and the tier that all of it is billed by."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import orjson
import pytest
from yamls import CHAT, STREAM

from qlens import Receipt
from qlens.testing import Running, Scripted, running
from qlens.testing.upstreams import FakeUpstream

CONFIG = """
pipeline:
  auth: [{{plugin: anonymous}}]
  cost:
    - plugin: prices
      catalogue: false
      table: [{{model: "*", input: 1, output: 2, tiers: {{priority: 2, flex: 0.5}}}}]
providers:
  one: {{plugin: openai, base_url: "{url}", api_key: sk-example-one}}
models:
  gpt-4o-mini: {{max_output_tokens: 4096, targets: [{{provider: one, model: first}}]}}
"""
HEAD = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "first"}
SENTENCE = 'The "quick" brown fox\njumps over the lazy dog. ' * 8
SIGNS = "漢字かな交じり文。" * 40
USED = {"prompt_tokens": 100, "completion_tokens": 10}


@pytest.fixture
async def gateway(up: FakeUpstream) -> AsyncIterator[Running]:
    async with running(CONFIG.format(url=up.url)) as gateway:
        yield gateway


def chunk(finish: str | None = None, tier: str | None = None, **delta: Any) -> dict[str, Any]:
    said = {} if tier is None else {"service_tier": tier}
    return {**HEAD, **said, "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}


async def receipt_of(gateway: Running) -> Receipt:
    (receipt,) = await gateway.settled(1)
    return receipt


# --- its text ----------------------------------------------------------------------------------


def compact(payload: dict[str, Any]) -> bytes:
    return b"data: %b\n\n" % orjson.dumps(payload)


def spaced(payload: dict[str, Any]) -> bytes:
    """As servers in Python write it: with blanks, and all but ASCII escaped."""
    return b"data: %b\n\n" % json.dumps(payload).encode()


@pytest.mark.parametrize("written", [compact, spaced])
@pytest.mark.parametrize("text", [SENTENCE, SIGNS], ids=["sentence", "signs"])
@pytest.mark.parametrize("field", ["content", "reasoning_content"])
@pytest.mark.parametrize("pieces", [1, 20])
@pytest.mark.parametrize("ending", ["well", "cut"])
async def test_a_text_in_the_first_event_hides_no_other(
    gateway: Running, up: FakeUpstream, written: Any, text: str, field: str, pieces: int, ending: str
) -> None:
    said = [written(chunk(role="assistant", **{field: text})) for _ in range(pieces)]
    end = [written(chunk("stop")), "[DONE]"] if ending == "well" else []
    up.script(Scripted(events=[*said, *end]))
    await gateway.post(CHAT, STREAM)
    receipt = await receipt_of(gateway)
    assert receipt.usage.source == ("estimated" if end else "partial")
    whole = len(text.encode()) * pieces // 4
    # An end without text counts as one of the events, so that it takes away as many bytes as one has beside its text.
    assert whole * 0.95 - 50 <= receipt.usage.output <= whole * 2.1


async def test_a_text_in_the_first_event_is_paid_by_who_leaves_after_it(gateway: Running, up: FakeUpstream) -> None:
    up.script(Scripted(events=[chunk(role="assistant", content=SENTENCE)] * 10, hang=True))
    async with gateway.session.post(gateway.url + CHAT, json=STREAM) as answer:
        got = b""
        async with asyncio.timeout(10):
            while got.count(b"\n\n") < 10:
                got += await answer.content.readany()
        answer.close()
    receipt = await receipt_of(gateway)
    assert (receipt.outcome, receipt.usage.source) == ("abandoned", "partial")
    assert receipt.usage.output >= len(SENTENCE) * 10 // 4


async def test_a_single_event_that_ends_its_choice_too_is_not_counted_as_one_token(
    gateway: Running, up: FakeUpstream
) -> None:
    up.script(Scripted(events=[chunk("stop", role="assistant", content=SENTENCE), "[DONE]"]))
    await gateway.post(CHAT, STREAM)
    assert (await receipt_of(gateway)).usage.output >= len(SENTENCE) // 4


async def test_a_first_event_with_nothing_but_the_role_counts_as_no_token(gateway: Running, up: FakeUpstream) -> None:
    up.script(Scripted(events=[chunk(role="assistant", content=""), *[chunk(content="a ")] * 9]))
    await gateway.post(CHAT, STREAM)
    assert (await receipt_of(gateway)).usage.output == 9


# --- its tier ----------------------------------------------------------------------------------

ROLE = {"role": "assistant", "content": ""}
FIRST, TOLD = chunk(None, "priority", **ROLE), {**HEAD, "choices": [], "usage": USED}
TIERS: dict[str, tuple[list[Any], str | None]] = {
    "in the first event": ([FIRST, chunk(content="x"), chunk("stop"), TOLD], "priority"),
    "in all but the last": (
        [FIRST, chunk(None, "priority", content="x"), chunk("stop", "priority"), TOLD],
        "priority",
    ),
    "in the event that ends the choice": (
        [chunk(**ROLE), chunk(content="x"), chunk("stop", "priority"), TOLD],
        "priority",
    ),
    "null in the last": ([FIRST, chunk(content="x"), chunk("stop"), {**TOLD, "service_tier": None}], "priority"),
    "another in the last": ([FIRST, chunk(content="x"), chunk("stop"), {**TOLD, "service_tier": "flex"}], "flex"),
    "another after the first": (
        [FIRST, chunk(None, "flex", content="x"), chunk("stop"), {**TOLD, "service_tier": None}],
        "flex",
    ),
    "in a text": ([chunk(**ROLE), chunk(content='"service_tier":"priority"'), chunk("stop"), TOLD], None),
    "nowhere": ([chunk(**ROLE), chunk(content="x"), chunk("stop"), TOLD], None),
}


@pytest.mark.parametrize(("events", "tier"), TIERS.values(), ids=TIERS)
async def test_the_tier_is_the_one_that_was_said_last_by_any_event(
    gateway: Running, up: FakeUpstream, events: list[Any], tier: str | None
) -> None:
    up.script(Scripted(events=[*events, "[DONE]"]))
    answer = await gateway.post(CHAT, {**STREAM, "stream_options": {"include_usage": True}})
    receipt = await receipt_of(gateway)
    factor = {"priority": 2, "flex": 0.5, None: 1}[tier]
    assert (receipt.usage.tier, receipt.cost.state) == (tier, "exact")
    assert receipt.cost.picos == (100 * 1_000_000 + 10 * 2_000_000) * factor
    assert float(answer.events()[-2]["usage"]["cost_usd"]) == receipt.cost.picos / 10**12


async def test_a_tier_is_heard_however_lines_end_and_however_many_events_come_at_once(
    gateway: Running, up: FakeUpstream
) -> None:
    block = b"".join(compact(event) for event in (FIRST, chunk(content="x"), chunk("stop"), TOLD)) + b"data: [DONE]\n\n"
    up.script(Scripted(headers={"content-type": "text/event-stream"}, body=block.replace(b"\n", b"\r\n")))
    await gateway.post(CHAT, STREAM)
    assert (await receipt_of(gateway)).usage.tier == "priority"


@pytest.mark.parametrize("before", [1, 8, 20])
@pytest.mark.parametrize("after", [0, 3])
async def test_a_tier_is_heard_among_events_that_are_alike_and_come_at_once(
    gateway: Running, up: FakeUpstream, before: int, after: int
) -> None:
    text = chunk(content="x")
    events = [chunk(**ROLE), *[text] * before, chunk(None, "flex", content="y"), *[text] * after, chunk("stop"), TOLD]
    body = b"".join(map(compact, events)) + b"data: [DONE]\n\n"
    up.script(Scripted(headers={"content-type": "text/event-stream"}, body=body))
    await gateway.post(CHAT, STREAM)
    assert (await receipt_of(gateway)).usage.tier == "flex"


async def test_a_stream_that_is_cut_is_priced_by_the_tier_it_began_with(gateway: Running, up: FakeUpstream) -> None:
    up.script(Scripted(events=[FIRST, chunk(content="x")]))
    await gateway.post(CHAT, STREAM)
    receipt = await receipt_of(gateway)
    assert (receipt.usage.tier, receipt.usage.source) == ("priority", "partial")
