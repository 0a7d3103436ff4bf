"""Streams of providers that ignore max tokens: how far they get, what they cost, and what is never cut."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager
from decimal import Decimal
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiktoken
from attrs import frozen
from claudes import call_of
from hypothesis import given
from hypothesis import strategies as st

from qlens import CallError, Receipt, Reply, sse, vocabularies
from qlens.call import Cost
from qlens.dialects import response_events, typed
from qlens.metering import Meter
from qlens.metering_length import Length
from qlens.metering_typed import TypedMeter
from qlens.testing import Response, Running, Scripted, running, upstream
from qlens.testing.anthropic import message, streamed
from qlens.testing.anthropic import text as block
from qlens.testing.upstreams import FakeUpstream
from qlens.watching import EventWatcher

FILES = Path(__file__).parents[2] / ".tools" / "vocabularies"
"""`make test` puts OpenAI's own files there."""
MOST = 100
"""The tokens that are asked for; input is free, and a token of output costs 1 micro-dollar."""
PROSE = (
    "The quick brown fox jumps over the lazy dog, and then it doesn't stop: international organisations have written "
    "down 1,234 reasons why nobody should be surprised.\n\nEvery one of them is longer than the one before.  "
)
HAN = "我们今天讨论的问题是如何在不影响其他人的情况下完成这项工作，"


@pytest.fixture(params=[False, True], ids=["by size", "by vocabulary"])
def counted(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    """Whether the model's vocabulary is on this machine."""
    monkeypatch.setattr(vocabularies, "_loaded", {})
    vocabularies._name_of.cache_clear()
    if request.param:
        assert FILES.is_dir(), "make test fetches the vocabularies into .tools"
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(FILES))
    else:
        monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
    yield request.param
    vocabularies._name_of.cache_clear()


@cache
def encoding() -> tiktoken.Encoding:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(FILES))
        return tiktoken.get_encoding("o200k_base")


def tokens_of(text: str) -> list[str]:
    """A text in pieces of a token each, as far as tokens are whole characters."""
    encode, found, held = encoding(), [], []
    for token in encode.encode_ordinary(text):
        held.append(token)
        piece = encode.decode_bytes(held)
        try:
            found.append(piece.decode())
        except UnicodeDecodeError:
            continue
        held = []
    return found


def chunk(delta: dict[str, Any], finish: str | None = None, usage: int | None = None) -> dict[str, Any]:
    choices = [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}]
    if usage is not None:
        choices = []
    said = None if usage is None else {"prompt_tokens": 1, "completion_tokens": usage, "total_tokens": usage + 1}
    return {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": choices, "usage": said}


def chat(pieces: Iterable[str], kind: str = "content") -> Iterator[dict[str, Any]]:
    """What OpenAI sends: an event with the role, which is the longest, and one for each piece."""
    yield chunk({"role": "assistant", "content": "", "refusal": None})
    for number, piece in enumerate(pieces):
        if kind == "arguments":
            head = {"id": "call_1", "type": "function"} if not number else {}
            function = {"arguments": piece, **({"name": "f"} if not number else {})}
            yield chunk({"tool_calls": [{"index": 0, **head, "function": function}]})
        else:
            yield chunk({kind: piece})


def config(url: str, limit: str, plugin: str = "openai", **settings: Any) -> str:
    target = {"provider": "up", "model": "ours", "base_model": "gpt-4o" if plugin == "openai" else "claude"}
    prices = {"plugin": "prices", "table": [{"model": target["base_model"], "input": 0, "output": 1}]}
    provider = {"plugin": plugin, "base_url": url, "api_key": "sk-example-up", **settings}
    return json.dumps(
        {
            "pipeline": {
                "auth": [{"plugin": "anonymous"}],
                "cost": [prices, {"plugin": "budgets", "limits": [{"per": "tenant", "usd": float(limit)}]}],
            },
            "providers": {"up": provider},
            "models": {"m": {"max_output_tokens": 1000, "targets": [target]}},
        }
    )


@frozen
class World:
    """A gateway before a provider."""

    gateway: Running
    provider: FakeUpstream

    async def ask(self, **more: Any) -> Response:
        body = {"model": "m", "max_tokens": MOST, "messages": [{"role": "user", "content": "hi"}], "stream": True}
        return await self.gateway.post("/v1/chat/completions", {**body, **more})

    async def receipt(self) -> Receipt:
        (receipt,) = await self.gateway.settled(1)
        return receipt

    async def budget(self) -> dict[str, Decimal]:
        (row,) = (await self.gateway.get("/v1/budgets")).json()["data"]
        return {name: Decimal(row[f"{name}_usd"]) for name in ("limit", "spent", "reserved")}


@asynccontextmanager
async def world(limit: str = "1") -> AsyncIterator[World]:
    async with (
        asyncio.timeout(30),
        upstream() as provider,
        running(config(provider.url, limit)) as gateway,
    ):
        yield World(gateway, provider)


def said(answer: Response) -> str:
    deltas = [event["choices"][0]["delta"] for event in answer.events()[:-1] if event["choices"]]
    calls = [call["function"]["arguments"] for delta in deltas for call in delta.get("tool_calls") or ()]
    texts = [delta.get("content") or delta.get("reasoning_content") or "" for delta in deltas]
    return "".join([*texts, *calls])


def most_passed(counted: bool) -> int:
    """The tokens that pass before a stream is cut: a word of prose is 1.3, and a third of them is not counted."""
    return MOST + 5 if counted else 2 * MOST


@pytest.mark.parametrize("kind", ["content", "reasoning_content", "arguments"])
async def test_an_endless_stream_of_tokens_is_cut_and_costs_what_was_reserved(counted: bool, kind: str) -> None:
    pieces = tokens_of(PROSE) * 40
    async with world() as it:
        it.provider.script(Scripted(events=chat(pieces, kind), hang=True, gap=0.0001))
        answer = await it.ask()
        passed = len(encoding().encode_ordinary(said(answer)))
        assert 0.5 * MOST < passed <= most_passed(counted)
        assert answer.events()[-1] == "[DONE]"
        receipt = await it.receipt()
        assert (receipt.outcome, receipt.usage.completion) == ("cut", MOST)
        await asyncio.wait_for(it.provider.requests[0].closed.wait(), 5)
        assert (await it.budget())["spent"] == Decimal(MOST) / 10**6


async def test_a_provider_that_says_in_the_end_that_it_did_ten_times_as_much_is_not_heard_out(counted: bool) -> None:
    pieces = tokens_of(PROSE * 40)[: 10 * MOST]
    events: list[Any] = [*chat(pieces), chunk({}, "stop"), chunk({}, usage=10 * MOST), "[DONE]"]
    async with world("0.0001") as it:  # of which the call reserves all
        it.provider.script(Scripted(events=events, gap=0.0001))
        await it.ask()
        assert (await it.receipt()).outcome == "cut"
        budget = await it.budget()
        assert budget["spent"] == budget["limit"] == Decimal("0.0001")


async def test_of_many_such_streams_at_once_no_sum_is_above_the_limit_at_any_moment(counted: bool) -> None:
    events: list[Any] = [
        *chat(tokens_of(PROSE * 10)[: 4 * MOST]),
        chunk({}, "stop"),
        chunk({}, usage=4 * MOST),
        "[DONE]",
    ]
    async with world("0.0008") as it:  # room for eight
        it.provider.script(*(Scripted(events=events, gap=0.0002) for _ in range(40)))
        calls = [asyncio.create_task(it.ask()) for _ in range(40)]
        while not all(call.done() for call in calls):
            budget = await it.budget()
            assert budget["spent"] + budget["reserved"] <= budget["limit"]
            await asyncio.sleep(0.01)
        assert [call.result().status for call in calls].count(200) == 8
        assert (await it.budget())["spent"] == Decimal("0.0008")


@pytest.mark.parametrize(
    "text",
    [PROSE, HAN, "a b c d e f ", "-" * 128, "0123456789", "the\n\n\n    if x:\n\t\t"],
    ids=["prose", "han", "letters", "dashes", "digits", "code"],
)
@pytest.mark.parametrize("each", [1, 7])
async def test_a_stream_of_just_as_many_tokens_as_were_asked_for_is_not_cut(
    counted: bool, text: str, each: int
) -> None:
    tokens = encoding().encode_ordinary(text * 200)[:MOST]
    whole = encoding().decode(tokens).rstrip("\ufffd")
    single = tokens_of(whole)
    pieces = ["".join(single[start : start + each]) for start in range(0, len(single), each)]
    events: list[Any] = [*chat(pieces), chunk({}, "length"), chunk({}, usage=MOST), "[DONE]"]
    async with world() as it:
        it.provider.script(Scripted(events=events))
        assert said(await it.ask()) == whole
        receipt = await it.receipt()
        assert (receipt.outcome, receipt.usage.completion) == ("complete", MOST)


@pytest.mark.parametrize("dialect", ["messages", "responses"])
async def test_streams_of_typed_events_are_cut_as_early(counted: bool, dialect: str) -> None:
    long = PROSE * 40
    if dialect == "messages":
        events: list[Any] = [e for e in streamed(message(block(long)), 6) if b"message_" not in e or b"start" in e][:-1]
        plugin, settings = "anthropic", {}
        body: dict[str, Any] = {"max_tokens": MOST, "messages": [{"role": "user", "content": "hi"}]}
    else:
        item = {"id": "msg_1", "type": "message", "role": "assistant", "status": "completed",
                "content": [{"type": "output_text", "text": long, "annotations": [], "logprobs": []}]}  # fmt: skip
        writer, events = response_events.Writer(), []
        head = {"id": "resp_1", "object": "response", "created_at": 1, "status": "in_progress", "output": []}
        for event in [*writer.begun(head), *response_events.item_events(writer, 0, item)]:
            pieces = [long[at : at + 6] for at in range(0, len(long), 6)] if "delta" in event else []
            events += [typed.write({**event, "delta": piece}) for piece in pieces] or [typed.write(event)]
            if pieces:
                break
        plugin, settings = "openai", {"responses": True}
        body = {"max_output_tokens": MOST, "input": "hi", "store": False}
    async with asyncio.timeout(30), upstream() as provider:
        provider.script(Scripted(events=events, hang=True, gap=0.0001))
        async with running(config(provider.url, "1", plugin, **settings)) as gateway:
            answer = await gateway.post(f"/v1/{dialect}", {"model": "m", "stream": True, **body})
            deltas = [event.get("delta") for event in answer.events() if "delta" in event["type"]]
            texts = [each if isinstance(each, str) else (each or {}).get("text", "") for each in deltas]
            passed = len(encoding().encode_ordinary("".join(texts)))
            assert 0.5 * MOST < passed <= most_passed(counted and dialect == "responses")
            (receipt,) = await gateway.settled(1)
            assert (receipt.outcome, receipt.usage.completion) == ("cut", MOST)


# --- by itself ---------------------------------------------------------------------------------

TEXT = st.text(st.sampled_from("aB9 .,/'\n\té我한🙂\u00a0\u3000-"), max_size=60) | st.text(max_size=30)


@given(st.lists(TEXT, max_size=12))
def test_no_text_counts_more_than_its_tokens_however_it_is_cut_into_pieces(pieces: list[str]) -> None:
    encode, whole = encoding().encode_ordinary, "".join(pieces)
    for by in (None, encode):
        length = Length(0, by)
        for piece in pieces:
            length.add("x", piece)
        assert length.counted <= len(encode(whole))


@pytest.mark.parametrize("text", ["a.\n/b c", HAN * 40, "=" * 1000, "supercalifragilistic" * 60, "\n\n//\n" * 90])
def test_what_is_cut_where_vocabularies_do_not_cut_counts_no_more_either(text: str) -> None:
    encode = encoding().encode_ordinary
    for each in (1, 3, 257):
        length = Length(0, encode)
        for start in range(0, len(text), each):
            length.add("x", text[start : start + each])
        length.add("x", " end ")
        assert 0.5 * len(encode(text)) - 1 <= length.counted <= len(encode(text))


@given(st.lists(st.tuples(st.integers(0, 2), TEXT), max_size=12))
def test_several_choices_count_together_and_each_by_itself(told: list[tuple[int, str]]) -> None:
    encode = encoding().encode_ordinary
    wholes = ["".join(text for index, text in told if index == each) for each in range(3)]
    for by in (None, encode):
        length = Length(0, by)
        for index, text in told:
            length.add(index, text)
        assert length.counted <= sum(len(encode(whole)) for whole in wholes)


# --- whatever the events look like ---------------------------------------------------------------


def _chat(number: int, delta: dict[str, Any], finish: str | None = None) -> bytes:
    head = {"id": "c", "object": "chat.completion.chunk", "created": number, "model": "m"}
    return sse.write({**head, "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]})


def _typed(kind: str, text: str) -> bytes:
    delta = {"type": f"{kind}_delta", kind: text}
    return typed.write({"type": "content_block_delta", "index": 0, "delta": delta})


SHAPES = {
    "what one cannot read": [
        _chat(1, {"content": " word"}) if n % 15 else b'data: {"choices":[{"delta":{"content":"\\x"}}]}\n\n'
        for n in range(5000)
    ],
    "reasoning first": [_chat(n, {"reasoning_content" if n < 20 else "content": " word"}) for n in range(5000)],
    "a time in each": [_chat(n, {"content": " word"}) for n in range(5000)],
    "thinking first": [_typed("thinking", " word"), *(_typed("text", " word") for _ in range(5000))],
    "names without data": [_chat(n, {"content": " word"}) + b"event: ping\n\n" for n in range(5000)],
    "blank lines": [_chat(n, {"content": " word"}) + b"\n\n" for n in range(5000)],
    "blanks": [_typed("text", " word").replace(b"}}", b"}" + b" " * (14 - n % 15) + b"}") for n in range(5000)],
}


@pytest.mark.parametrize("shape", SHAPES)
async def test_no_stream_is_endless_whatever_its_events_look_like(shape: str) -> None:
    meter = await _metered(SHAPES[shape], 1500, "chat" if b"choices" in SHAPES[shape][1] else "messages")
    assert meter.reply.cut
    assert 1500 <= meter.events <= 3 * 1500


async def test_what_is_said_in_two_fields_is_counted_once() -> None:
    events = [_chat(1, {"reasoning": f" w{n}", "reasoning_content": f" w{n}"}) for n in range(190)]
    meter = await _metered([*events, _chat(1, {}, "stop"), sse.DONE], 200, "chat")
    assert (meter.reply.cut, meter.events) == (False, 191)


async def _metered(events: list[bytes], most: int, dialect: str) -> EventWatcher:
    async def chunks() -> AsyncIterator[bytes]:
        for event in events:
            yield event

    async def ended(_: bytes) -> None:
        raise AssertionError

    call = call_of({"model": "m", "n": 1}, dialect)
    call.most_output = most
    reply = Reply(chunks=chunks(), dialect=dialect)
    meter: EventWatcher
    if dialect == "chat":
        meter = Meter(call, reply, failed=lambda _: CallError(""), ended=ended, price=lambda _: Cost(0))
    else:
        meter = TypedMeter(call, reply, failed=lambda _: CallError(""), ended=ended)
    async for _ in meter.watch(chunks()):
        pass
    return meter
