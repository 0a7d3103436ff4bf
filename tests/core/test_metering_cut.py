"""Streams of messages and Responses that say more than a budget has reserved: official clients see a valid end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import orjson
import pytest
from attrs import frozen
from claudes import anthropic_client, claude, config, openai_client
from hypothesis import given
from hypothesis import strategies as st

from qlens import Receipt, Usage
from qlens.dialects import messages, response_events, typed
from qlens.metering_cut import ending, within, written
from qlens.testing import Running, Scripted, running, upstream
from qlens.testing.anthropic import MODEL, anthropic, message, streamed, text, thinking, tool_use
from qlens.testing.upstreams import FakeUpstream

MOST = 16
"""The tokens that are asked for."""
MOST_SPOKEN = 16 * len("word ") + 2 * 16 + 2 * 60
"""The bytes that pass: so many words, what is not counted before there may be too many, and an event after each."""
LONG = "word " * 4000
ARGUMENTS = orjson.dumps({"said": LONG}).decode()


def pipeline(model: str) -> dict[str, Any]:
    """Input is free, and a token of output costs 1 micro-dollar."""
    prices = {"plugin": "prices", "table": [{"model": model, "input": 0, "output": 1}]}
    return {"cost": [prices, {"plugin": "budgets", "limits": [{"per": "tenant", "usd": 1}]}]}


@frozen
class World:
    """A gateway before a provider that does not know when to stop."""

    gateway: Running
    provider: FakeUpstream

    async def receipt(self) -> Receipt:
        """The receipt of the only call, once its provider was told to stop."""
        (receipt,) = await self.gateway.settled(1)
        await asyncio.wait_for(self.provider.requests[0].closed.wait(), 5)
        return receipt

    async def check(self, *, spoken: int) -> Receipt:
        """The call was cut and costs what was delivered, but no more than was reserved."""
        receipt = await self.receipt()
        assert (receipt.outcome, receipt.error, receipt.usage.source) == ("cut", "output_limit", "partial")
        assert MOST < spoken <= MOST_SPOKEN
        assert receipt.usage.completion == MOST
        assert receipt.cost.picos == MOST * 1_000_000
        (row,) = (await self.gateway.get("/v1/budgets")).json()["data"]
        assert (row["spent_usd"], row["reserved_usd"]) == ("0.000016", "0")
        return receipt


@asynccontextmanager
async def claude_says(*blocks: dict[str, Any]) -> AsyncIterator[World]:
    """Anthropic's API, with an answer of these blocks that never ends."""
    events = [e for e in streamed(message(*blocks), 60) if b"message_delta" not in e and b"message_stop" not in e]
    async with asyncio.timeout(20), AsyncExitStack() as stack:
        provider = await stack.enter_async_context(anthropic())
        provider.script(Scripted(events=events[:-1], hang=True))
        gateway = await stack.enter_async_context(running(claude(provider.url, pipeline=pipeline(MODEL))))
        yield World(gateway, provider)


@asynccontextmanager
async def openai_says(events: Iterable[dict[str, Any] | bytes], *, dialect: str = "chat") -> AsyncIterator[World]:
    """A server that speaks chat, or Responses, with these events and no end."""
    async with asyncio.timeout(20), AsyncExitStack() as stack:
        provider = await stack.enter_async_context(upstream())
        provider.script(Scripted(events=events, hang=True))
        told = {"plugin": "openai", "base_url": provider.url, "responses": dialect == "responses"}
        text = config(told, "gpt-4o", pipeline=pipeline("gpt-4o"))
        yield World(await stack.enter_async_context(running(text)), provider)


def chat(**delta: Any) -> dict[str, Any]:
    choices = [{"index": 0, "delta": delta, "finish_reason": None}]
    return {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": choices}


def calls(piece: str, **more: Any) -> dict[str, Any]:
    return chat(tool_calls=[{"index": 0, **more, "function": {"arguments": piece, **({"name": "f"} if more else {})}}])


def pieces(text: str) -> list[str]:
    return [text[start : start + 60] for start in range(0, len(text), 60)]


def response(*items: dict[str, Any]) -> Iterator[bytes]:
    """The events of a response in pieces, without its end."""
    writer = response_events.Writer()
    body = {"id": "resp_1", "object": "response", "created_at": 1, "status": "in_progress", "model": "m", "output": [],
            "parallel_tool_calls": True, "tool_choice": "auto", "tools": []}  # fmt: skip
    events = [*writer.begun(body)]
    for index, item in enumerate(items):
        events += response_events.item_events(writer, index, item)
    number = 0
    for event in events[: max(at for at, event in enumerate(events) if event["type"].endswith(".delta")) + 1]:
        for piece in pieces(event["delta"]) if event["type"].endswith(".delta") else [None]:
            yield typed.write({**event, "sequence_number": number, **({} if piece is None else {"delta": piece})})
            number += 1


SAID = {"id": "msg_1", "type": "message", "role": "assistant", "status": "completed",
        "content": [{"type": "output_text", "text": LONG, "annotations": [], "logprobs": []}]}  # fmt: skip
CALLED = {"id": "fc_1", "type": "function_call", "status": "completed", "call_id": "call_1", "name": "f",
          "arguments": ARGUMENTS}  # fmt: skip
THOUGHT = {"id": "rs_1", "type": "reasoning", "summary": [{"type": "summary_text", "text": "Hm."}]}
TOOL = {"type": "object", "properties": {"said": {"type": "string"}}}


# --- messages ----------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["claude", "chat"])
@pytest.mark.parametrize("kind", ["text", "call", "thought"])
async def test_the_anthropic_sdk_sees_a_message_that_reached_its_max_tokens(where: str, kind: str) -> None:
    blocks = {
        "text": [thinking("Hm."), text(LONG)],
        "call": [text("I look."), tool_use("toolu_1", "f", {"said": LONG})],
        "thought": [thinking(LONG)],
    }
    chunks = {
        "text": [chat(content=""), *(chat(content=piece) for piece in pieces(LONG))],
        "call": [chat(content="I look."), calls("", id="call_1", type="function"), *map(calls, pieces(ARGUMENTS))],
        "thought": [chat(content=""), *(chat(reasoning_content=piece) for piece in pieces(LONG))],
    }
    says = claude_says(*blocks[kind]) if where == "claude" else openai_says(chunks[kind])
    asked: dict[str, Any] = {"model": "ours", "max_tokens": MOST, "messages": [{"role": "user", "content": "hello"}]}
    if kind == "call":
        asked["tools"] = [{"name": "f", "input_schema": TOOL}]
    async with says as world, anthropic_client(world.gateway) as sdk, sdk.messages.stream(**asked) as stream:
        events: list[Any] = [event async for event in stream]
        told = await stream.get_final_message()
        assert told.stop_reason == "max_tokens"
        assert told.usage.output_tokens == MOST
        seen = [event.type for event in events]
        assert seen.count("content_block_start") == seen.count("content_block_stop") == len(told.content)
        assert seen[-2:] == ["message_delta", "message_stop"]
        said = {"text": "text", "call": "partial_json", "thought": "thinking"}[kind]
        deltas = [event.delta for event in events if event.type == "content_block_delta"]
        await world.check(spoken=sum(len(getattr(delta, said, "")) for delta in deltas))


# --- responses ---------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["responses", "chat", "claude"])
@pytest.mark.parametrize("kind", ["text", "call"])
async def test_the_openai_sdk_sees_a_response_that_is_incomplete(where: str, kind: str) -> None:
    if where == "claude":
        says = claude_says(text(LONG) if kind == "text" else tool_use("toolu_1", "f", {"said": LONG}))
    elif where == "responses":
        says = openai_says(response(THOUGHT, SAID if kind == "text" else CALLED), dialect="responses")
    else:
        first = chat(content="") if kind == "text" else calls("", id="call_1", type="function")
        rest = [chat(content=piece) for piece in pieces(LONG)] if kind == "text" else map(calls, pieces(ARGUMENTS))
        says = openai_says([first, *rest])
    asked: dict[str, Any] = {"model": "ours", "max_output_tokens": MOST, "input": "hello", "store": False}
    if kind == "call":
        asked["tools"] = [{"type": "function", "name": "f", "parameters": TOOL, "strict": False}]
    async with says as world, openai_client(world.gateway) as sdk, sdk.responses.stream(**asked) as stream:
        seen: list[Any] = [event async for event in stream]
        assert [event.sequence_number for event in seen] == list(range(len(seen)))
        last = seen[-1]
        assert last.type == "response.incomplete"
        assert (last.response.status, last.response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
        assert last.response.usage.output_tokens == MOST
        item = last.response.output[-1]
        assert item.status == "incomplete"
        spoken = item.content[0].text if kind == "text" else item.arguments
        deltas = [event.delta for event in seen if event.type.endswith("delta") and event.output_index == 0]
        if where == "responses":
            assert last.response.output[0].type == "reasoning"
            deltas = [event.delta for event in seen if event.type.endswith("delta") and event.output_index == 1]
        assert spoken == "".join(deltas)
        ends = ["response.output_item.done", "response.incomplete"]
        assert [event.type for event in seen[-2:]] == ends
        assert seen[-2].item.to_dict() == item.to_dict()
        await world.check(spoken=len(spoken))


# --- what is not cut ---------------------------------------------------------------------------


async def test_an_honest_stream_is_not_cut_however_much_surrounds_its_tokens() -> None:
    """As many tokens as were asked for, each as long as a token can be, with what hides how long they are."""
    whole = {**SAID, "content": [{**SAID["content"][0], "text": "-" * 128 * MOST}]}  # type: ignore[dict-item]
    writer = response_events.Writer()
    body = {"id": "resp_1", "object": "response", "created_at": 1, "status": "in_progress", "output": []}
    events: list[dict[str, Any]] = [*writer.begun(body)]
    for event in [*response_events.item_events(writer, 0, whole), writer.ended({**body, "status": "completed"})]:
        cut = [event["delta"][at : at + 128] for at in range(0, 128 * MOST, 128)] if "delta" in event else []
        padded = [{**event, "delta": piece, "obfuscation": "x" * 50 * at} for at, piece in enumerate(cut)]
        events += padded or [event]
    async with openai_says(map(typed.write, events), dialect="responses") as world:
        asked = {"model": "ours", "max_output_tokens": MOST, "input": "hello", "stream": True}
        answer = await world.gateway.post("/v1/responses", asked)
        assert b"response.completed" in answer.body
        assert (await world.gateway.settled(1))[0].outcome == "complete"


async def test_a_stream_without_names_of_events_is_cut_too() -> None:
    bare = [event.partition(b"\n")[2] for event in response(SAID)]
    async with openai_says(bare, dialect="responses") as world:
        asked = {"model": "ours", "max_output_tokens": MOST, "input": "hello", "stream": True}
        answer = await world.gateway.post("/v1/responses", asked)
        last = answer.events()[-1]
        assert last["type"] == "response.incomplete"
        await world.check(spoken=len(last["response"]["output"][0]["content"][0]["text"]))


# --- by itself ---------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 2) | st.sampled_from(["", "x", "message", "function_call"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["type", "id", "text"]), inner),
    max_leaves=4,
)
EVENT = st.fixed_dictionaries(
    {
        "type": st.sampled_from(
            [
                *("response.created", "response.output_item.added", "response.output_item.done"),
                *("response.content_part.added", "response.content_part.done", "response.output_text.delta"),
                *("response.function_call_arguments.delta", "content_block_start", "content_block_stop"),
            ]
        )
    },
    optional={
        name: JSON | st.fixed_dictionaries({"type": st.sampled_from(["message", "function_call", "output_text"])})
        for name in ("response", "item", "part", "delta", "index", "output_index", "content_index", "item_id")
    },
)


@given(st.lists(EVENT, max_size=8), st.sampled_from(["messages", "responses"]))
def test_a_stream_of_nonsense_is_ended_too(told: list[dict[str, Any]], dialect: str) -> None:
    end = ending(dialect)
    assert end is not None
    for event in told:
        end.heard(typed.write(event))
    last = list(end.events(Usage(input=1, output=2)))
    assert written(last)
    assert typed.typed(dialect).finish(last[-2 if dialect == "messages" else -1]) == end.finish


def test_a_long_stream_is_remembered_by_its_text() -> None:
    end: Any = ending("responses")
    for event in response({**SAID, "content": [{"type": "output_text", "text": "x" * 600_000}]}):
        end.heard(event)
    assert sum(map(len, end._recent)) <= 70_000
    *_, last = end.events(Usage())
    assert last["response"]["output"][0]["content"][0]["text"] == "x" * 600_000


@given(*[st.integers(0, 50)] * 4)
def test_what_a_cut_stream_has_used_is_within_what_was_reserved(out: int, thought: int, audio: int, most: int) -> None:
    used = Usage(input=3, output=out, reasoning=thought, audio_out=audio)
    assert within(used, most).completion == most
    assert min(within(used, most).reasoning, within(used, most).audio_out, within(used, most).output) >= 0
    assert within(used, most).prompt == 3


def test_what_ends_a_message_ends_what_can_be_put_together() -> None:
    end: Any = ending("messages")
    events = list(streamed(message(text("Hello")), 2))[:-3]
    for event in events:
        end.heard(event)
    payloads = [orjson.loads(event.partition(b"\ndata: ")[2]) for event in events]
    whole = messages.assemble([*payloads, *end.events(Usage(input=4, output=2))])
    assert (whole["stop_reason"], whole["usage"]["output_tokens"]) == ("max_tokens", 2)
