"""Azure's streams, as a client of OpenAI expects them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import pytest
from azures import CHAT, DEPLOYMENT, chat, config, text

from qlens import sse
from qlens.testing import Scripted, running, upstream
from qlens.testing.azure import FILTERED, SAFE, Deployment, azure
from qlens.testing.upstreams import TEXT, USAGE, Event, chat_events

GOLDEN = Path(__file__).parent / "golden"
HEAD = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "gpt-4o-2024-11-20"}
NAMELESS = {"id": "", "object": "", "created": 0, "model": ""}


def said(content: str, *, index: int = 0, finish: str | None = None) -> Event:
    delta = {"content": content} if content else {}
    return {**HEAD, "choices": [{"index": index, "delta": delta, "finish_reason": finish}]}


def verdict(*, index: int = 0, finish: str | None = None, results: Any = SAFE) -> Event:
    choice = {"index": index, "finish_reason": finish, "content_filter_results": results, "content_filter_offsets": {}}
    return {**NAMELESS, "choices": [choice]}


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n"], ids=["LF", "CRLF"])
@pytest.mark.parametrize("split", [None, 1, 2, 3, 7, 50, 500, 1400])
async def test_the_golden_stream_of_the_asynchronous_filter_is_mended(split: int | None, line_end: bytes) -> None:
    wire = (GOLDEN / "asynchronous_filter.sse").read_bytes().replace(b"\n", line_end)
    async with upstream() as up, running(config(up.root)) as gateway:
        up.script(Scripted(events=[wire], split=split))
        answer = await gateway.post(CHAT, chat(stream=True))
        assert answer.body == (GOLDEN / "asynchronous_filter.client.sse").read_bytes()
        (receipt,) = await gateway.settled(1)
        assert (receipt.outcome, receipt.usage.total, receipt.usage.source) == ("complete", 13, "provider")


@pytest.mark.parametrize("filtering", ["default", "asynchronous"])
@pytest.mark.parametrize("done", [True, False])
async def test_every_way_of_filtering_reads_like_openai(filtering: Any, done: bool) -> None:
    async with (
        azure({DEPLOYMENT: Deployment(filter=filtering, ends_with_done=done)}) as cloud,
        running(config(cloud.root)) as gateway,
    ):
        events = (await gateway.post(CHAT, chat(stream=True))).events()
        assert events[-1] == "[DONE]"
        assert text(events) == TEXT
        finishes = [c["finish_reason"] for e in events[:-1] for c in e["choices"] if c["finish_reason"]]
        assert finishes == ["stop"]
        assert any("content_filter_results" in choice for e in events[:-1] for choice in e["choices"])


async def test_a_block_that_comes_first_ends_the_choice() -> None:
    async with upstream() as up, running(config(up.root)) as gateway:
        events = [said("a"), verdict(finish="content_filter", results=FILTERED), said("", finish="stop"), "[DONE]"]
        up.script(Scripted(events=events))
        answer = (await gateway.post(CHAT, chat(stream=True))).events()
        assert [event["choices"][0]["finish_reason"] for event in answer[:-1]] == [None, "content_filter", None]
        assert answer[1]["choices"][0]["content_filter_results"] == FILTERED
        assert answer[1]["choices"][0]["delta"] == {}


@pytest.mark.parametrize("split", [None, 1, 50])
async def test_a_verdict_in_front_of_the_answer_waits_for_its_name(split: int | None) -> None:
    async with upstream() as up, running(config(up.root)) as gateway:
        first = {**NAMELESS, "choices": [], "prompt_filter_results": []}
        usage = {**NAMELESS, "choices": [], "usage": USAGE}
        events = [first, verdict(), verdict(), said("a"), said("", finish="stop"), usage, "[DONE]"]
        up.script(Scripted(events=events, split=split))
        asked = chat(stream=True, stream_options={"include_usage": True})
        answer = (await gateway.post(CHAT, asked)).events()
        assert [{name: event[name] for name in HEAD} for event in answer[:-1]] == [HEAD] * 5
        assert ["content_filter_results" in c for e in answer[:-1] for c in e["choices"]] == [True, True, False, False]
        assert answer[-2]["usage"]["total_tokens"] == USAGE["total_tokens"]


@pytest.mark.parametrize("ending", [["[DONE]"], [], [{"error": {"code": "server_error", "message": "broken"}}]])
async def test_a_verdict_of_an_answer_that_never_comes_is_named_all_the_same(ending: list[Any]) -> None:
    async with upstream() as up, running(config(up.root)) as gateway:
        up.script(Scripted(events=[verdict(finish="content_filter", results=FILTERED), *ending]))
        blocked, *rest = (await gateway.post(CHAT, chat(stream=True))).events()
        assert blocked["id"].startswith("chatcmpl-")
        assert (blocked["object"], blocked["model"]) == ("chat.completion.chunk", "ours")
        assert blocked["created"] > 1_700_000_000
        assert blocked["choices"][0]["finish_reason"] == "content_filter"
        assert ("error" in rest[-1]) is (ending not in (["[DONE]"], []))


async def test_events_are_mended_whatever_lines_they_have() -> None:
    odd = verdict()
    lines = orjson.dumps(odd).replace(b',"choices"', b',\ndata: "choices"')
    wires = [b": one\ndata: " + orjson.dumps(odd), b"data: " + lines, b"event: x\nid: 4\ndata:" + lines]
    async with upstream() as up, running(config(up.root)) as gateway:
        up.script(Scripted(events=[said("a"), *(wire + b"\n\n" for wire in wires), said("", finish="stop"), "[DONE]"]))
        answer = await gateway.post(CHAT, chat(stream=True))
        assert b": one\ndata: {" in answer.body
        assert b"event: x\nid: 4\ndata: {" in answer.body
        for event in answer.events()[:-1]:
            assert {name: event[name] for name in HEAD} == HEAD
            assert event["choices"][0]["delta"] in ({}, {"content": "a"})


async def test_choices_end_each_for_itself() -> None:
    async with upstream() as up, running(config(up.root)) as gateway:
        ends = [said("", index=1, finish="stop"), said("", index=0, finish="length"), verdict(index=1, finish="stop")]
        up.script(Scripted(events=[said("a"), said("b", index=1), *ends, "[DONE]"]))
        answer = (await gateway.post(CHAT, chat(stream=True, n=2))).events()
        ended = [(c["index"], c["finish_reason"]) for e in answer[:-1] for c in e["choices"] if c["finish_reason"]]
        assert ended == [(1, "stop"), (0, "length")]


async def test_completions_are_mended_in_their_own_words() -> None:
    head = {**HEAD, "object": "text_completion"}
    words = {**head, "choices": [{"index": 0, "text": "a", "finish_reason": None}]}
    end = {**head, "choices": [{"index": 0, "text": "", "finish_reason": "stop"}]}
    async with upstream() as up, running(config(up.root, base_model="gpt-35-turbo-instruct")) as gateway:
        up.script(Scripted(events=[words, verdict(), end, "[DONE]"]))
        answer = (await gateway.post("/v1/completions", {"model": "ours", "prompt": "x", "stream": True})).events()
        assert [event["choices"][0]["text"] for event in answer[:-1]] == ["a", "", ""]
        assert "delta" not in answer[1]["choices"][0]


async def test_a_stream_without_oddities_passes_byte_for_byte() -> None:
    async with upstream() as up, running(config(up.root)) as gateway:
        events = chat_events()
        up.script(
            Scripted(events=[b": keep-alive\n\n", b'data:  {"spaced" :1, "choices":[{"delta":{}}]}\n\n', *events])
        )
        answer = await gateway.post(CHAT, chat(stream=True))
        assert answer.body.startswith(b': keep-alive\n\ndata:  {"spaced" :1, "choices":[{"delta":{}}]}\n\n')
        assert answer.events()[1:] == events


async def test_the_last_event_may_lack_its_blank_line() -> None:
    async with upstream() as up, running(config(up.root)) as gateway:
        up.script(Scripted(events=[said("a"), said("", finish="stop"), b"data: [DONE]"]))
        answer = await gateway.post(CHAT, chat(stream=True))
        assert answer.body.endswith(b"data: [DONE]\n\n")
        assert len(answer.events()) == 3


async def test_an_event_is_passed_on_as_soon_as_its_blank_line_is_there() -> None:
    async with upstream() as up, running(config(up.root)) as gateway:
        whole = sse.write(said("a"))
        up.script(Scripted(events=[whole, whole[:-1], b"\n"], gap=0.05, hang=True))
        body, headers = orjson.dumps(chat(stream=True)), {"content-type": "application/json"}
        async with gateway.session.post(gateway.url + CHAT, data=body, headers=headers) as answer:
            assert await answer.content.readexactly(2 * len(whole)) == 2 * whole


async def test_an_event_without_end_is_refused() -> None:
    async with upstream() as up, running(config(up.root)) as gateway:
        endless = b'data: {"choices":[{"delta":{"content":"' + b"x" * 1_000_000
        up.script(Scripted(events=[said("a"), endless, *[b"x" * 1_000_000] * 18], hang=True))
        answer = await gateway.post(CHAT, chat(stream=True))
        assert answer.events()[-1]["error"]["code"] == "upstream_invalid_response"


async def test_what_a_filter_found_is_kept_in_a_body() -> None:
    async with azure() as cloud, running(config(cloud.root)) as gateway:
        body = (await gateway.post(CHAT, chat())).json()
        assert body["prompt_filter_results"] == [{"prompt_index": 0, "content_filter_results": SAFE}]
        assert body["choices"][0]["content_filter_results"] == SAFE
        assert body["usage"] == USAGE
