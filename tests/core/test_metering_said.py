"""What providers say of usage, early, twice, late, wrong or of what failed, and what of it is billed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import orjson
import pytest
from yamls import CHAT, HELLO, STREAM

from qlens import Receipt
from qlens.testing import Running, Scripted, running, upstream
from qlens.testing.upstreams import FakeUpstream

RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"
# A dollar is a million picodollars a token: 1 for input, 0.1 for what was cached, 2 for output, 3 for reasoning.
CONFIG = """
pipeline:
  auth: [{{plugin: anonymous}}]
  cache: [{{plugin: exact}}]
  cost:
    - plugin: prices
      catalogue: false
      table: [{{model: "*", input: 1, cached_input: 0.1, output: 2, reasoning: 3}}]
providers:
  one: {{plugin: {kind}, base_url: "{url}", api_key: sk-example-one{more}}}
  two: {{plugin: {kind}, base_url: "{other}", api_key: sk-example-two}}
models:
  gpt-4o-mini:
    max_output_tokens: 4096
    targets: [{{provider: one, model: first}}, {{provider: two, model: second}}]
  alone: {{max_output_tokens: 4096, targets: [{{provider: one, model: first}}]}}
  vectors: {{targets: [{{provider: one, model: vectors}}]}}
"""
HEAD = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "first"}
AZURES_FIRST = {"id": "", "object": "", "created": 0, "model": "", "choices": [], "prompt_filter_results": []}
ALONE = {**STREAM, "model": "alone"}


@pytest.fixture
async def other() -> AsyncIterator[FakeUpstream]:
    async with upstream() as up:
        yield up


@pytest.fixture
async def gateway(up: FakeUpstream, other: FakeUpstream) -> AsyncIterator[Running]:
    async with running(CONFIG.format(kind="openai", url=up.url, other=other.url, more="")) as gateway:
        yield gateway


@pytest.fixture
async def chats(up: FakeUpstream, other: FakeUpstream) -> AsyncIterator[Running]:
    """A gateway to a provider that knows no dialect but chat."""
    async with running(CONFIG.format(kind="openai", url=up.url, other=other.url, more=", responses: false")) as gateway:
        yield gateway


@pytest.fixture
async def claude(up: FakeUpstream, other: FakeUpstream) -> AsyncIterator[Running]:
    async with running(CONFIG.format(kind="anthropic", url=up.root, other=other.root, more="")) as gateway:
        yield gateway


def chunk(text: str | None = None, finish: str | None = None, **more: Any) -> dict[str, Any]:
    delta = {} if text is None else {"content": text}
    return {**HEAD, "choices": [{"index": 0, "delta": delta, "finish_reason": finish}], **more}


def counted(prompt: int, completion: int | None, **details: int) -> dict[str, Any]:
    usage: dict[str, Any] = {"prompt_tokens": prompt, "completion_tokens": completion}
    if "cached" in details:
        usage["prompt_tokens_details"] = {"cached_tokens": details["cached"]}
    if "reasoning" in details:
        usage["completion_tokens_details"] = {"reasoning_tokens": details["reasoning"]}
    return usage


def usage_event(prompt: int, completion: int | None, **details: int) -> dict[str, Any]:
    return {**HEAD, "choices": [], "usage": counted(prompt, completion, **details)}


def typed(*events: dict[str, Any]) -> list[Any]:
    return [b"event: %b\ndata: %b\n\n" % (event["type"].encode(), orjson.dumps(event)) for event in events]


async def receipt_of(gateway: Running) -> Receipt:
    (receipt,) = await gateway.settled(1)
    return receipt


def billed(receipt: Receipt) -> dict[str, int]:
    """The buckets that have something in them."""
    names = ("input", "cached_input", "output", "reasoning")
    return {name: count for name in names if (count := getattr(receipt.usage, name))}


def assert_billed(receipt: Receipt, **used: int) -> None:
    """By the provider's word, in these buckets and no others."""
    assert billed(receipt) == used
    assert receipt.cost.state == "exact"
    rates = {"input": 1_000_000, "cached_input": 100_000, "output": 2_000_000, "reasoning": 3_000_000}
    assert receipt.cost.picos == sum(rates[name] * count for name, count in used.items())


# --- what is said more than once ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("early", "late", "used"),
    [
        (counted(1000, 2), counted(1000, 2, cached=900), {"input": 100, "cached_input": 900, "output": 2}),
        (counted(1000, 502), counted(1000, 502, reasoning=500), {"input": 1000, "output": 2, "reasoning": 500}),
        (counted(1000, 1, cached=900), counted(1000, 2), {"input": 100, "cached_input": 900, "output": 2}),
        (counted(20, 9), counted(10, 5), {"input": 20, "output": 9}),
    ],
    ids=["cached", "reasoning", "not said again", "smaller"],
)
async def test_a_chat_that_says_its_usage_twice_is_billed_once_and_shows_what_is_billed(
    gateway: Running, up: FakeUpstream, early: dict[str, Any], late: dict[str, Any], used: dict[str, int]
) -> None:
    end = {**HEAD, "choices": [], "usage": late}
    up.script(Scripted(events=[chunk("a", usage=early), chunk("b", usage=early), chunk(None, "stop"), end, "[DONE]"]))
    answer = await gateway.post(CHAT, {**ALONE, "stream_options": {"include_usage": True}})
    receipt = await receipt_of(gateway)
    assert_billed(receipt, **used)
    shown = answer.events()[-2]["usage"]
    assert shown["prompt_tokens"] == used["input"] + used.get("cached_input", 0)
    assert shown["completion_tokens"] == used["output"] + used.get("reasoning", 0)
    assert shown.get("prompt_tokens_details", {}).get("cached_tokens", 0) == used.get("cached_input", 0)
    assert shown.get("completion_tokens_details", {}).get("reasoning_tokens", 0) == used.get("reasoning", 0)
    assert int(shown["cost_usd"].replace("0.", "").ljust(12, "0")) == receipt.cost.picos


@pytest.mark.parametrize("path", [RESPONSES, MESSAGES])
async def test_a_chat_that_says_its_usage_twice_is_billed_once_in_another_dialect(
    chats: Running, up: FakeUpstream, path: str
) -> None:
    early, late = counted(1000, 2), usage_event(1000, 502, cached=900, reasoning=450)
    up.script(Scripted(events=[chunk("a", usage=early), chunk("b"), chunk(None, "stop"), late, "[DONE]"]))
    asked = {"input": "Hello"} if path == RESPONSES else {"messages": HELLO["messages"], "max_tokens": 1000}
    answer = await chats.post(path, {"model": "alone", "stream": True, **asked})
    assert_billed(await receipt_of(chats), input=100, cached_input=900, output=52, reasoning=450)
    if path == RESPONSES:
        shown = answer.events()[-1]["response"]["usage"]
        assert (shown["input_tokens"], shown["input_tokens_details"]["cached_tokens"]) == (1000, 900)
        assert (shown["output_tokens"], shown["output_tokens_details"]["reasoning_tokens"]) == (502, 450)
    else:
        shown = next(event["usage"] for event in answer.events() if event["type"] == "message_delta")
        assert (shown["input_tokens"], shown["cache_read_input_tokens"], shown["output_tokens"]) == (100, 900, 502)


MESSAGE: dict[str, Any] = {
    "id": "msg_1",
    "type": "message",
    "role": "assistant",
    "model": "first",
    "content": [],
    "stop_reason": None,
}


def message_events(first: dict[str, Any], *later: dict[str, Any], ends: bool = True) -> list[Any]:
    """A stream of messages with so much of usage in its first event and in those that follow its text."""
    block = {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
    text = {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "Hello there"}}
    end = [{"type": "message_stop"}] if ends else []
    return typed(
        {"type": "message_start", "message": {**MESSAGE, "usage": first}},
        *(block, text, {"type": "content_block_stop", "index": 0}),
        *({"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": usage} for usage in later),
        *end,
    )


@pytest.mark.parametrize("path", [MESSAGES, CHAT])
async def test_messages_that_say_more_of_their_usage_later_are_billed_once(
    claude: Running, up: FakeUpstream, path: str
) -> None:
    later = {"input_tokens": 100, "cache_read_input_tokens": 900, "output_tokens": 200}
    last = {"output_tokens": 500, "output_tokens_details": {"thinking_tokens": 450}}
    up.script(Scripted(events=message_events({"input_tokens": 1000, "output_tokens": 1}, later, last)))
    answer = await claude.post(path, {**ALONE, "max_tokens": 1000})
    assert answer.status == 200
    assert_billed(await receipt_of(claude), input=100, cached_input=900, output=50, reasoning=450)


def response(status: str, **more: Any) -> dict[str, Any]:
    return {"id": "resp_1", "object": "response", "status": status, "model": "first", "output": [], **more}


def spent(prompt: int, completion: int | None, cached: int = 0) -> dict[str, Any]:
    details = {"input_tokens_details": {"cached_tokens": cached}} if cached else {}
    return {"input_tokens": prompt, "output_tokens": completion, **details}


def response_events(*last: dict[str, Any], words: int = 1, **early: Any) -> list[Any]:
    deltas = [
        {"type": "response.output_text.delta", "item_id": "m", "output_index": 0, "content_index": 0, "delta": "word "}
    ] * words
    return typed({"type": "response.created", "response": response("in_progress", **early)}, *deltas, *last)


async def test_a_response_that_says_its_usage_early_and_late_is_billed_once(gateway: Running, up: FakeUpstream) -> None:
    last = {"type": "response.completed", "response": response("completed", usage=spent(1000, 2, cached=900))}
    up.script(Scripted(events=response_events(last, usage=spent(1000, 1))))
    await gateway.post(RESPONSES, {"model": "alone", "input": "Hello", "stream": True})
    assert_billed(await receipt_of(gateway), input=100, cached_input=900, output=2)


# --- what is said before the answer is over ----------------------------------------------------

WORDS = [chunk("word ") for _ in range(60)]


@pytest.mark.parametrize("completion", [0, 1])
@pytest.mark.parametrize("ending", ["well", "reset"])
async def test_a_usage_in_the_first_chunk_does_not_make_the_rest_free(
    gateway: Running, up: FakeUpstream, ending: str, completion: int
) -> None:
    begun = chunk("", usage=counted(10, completion))
    end: list[Any] = [chunk(None, "stop"), "[DONE]"] if ending == "well" else []
    up.script(Scripted(events=[begun, *WORDS, *end], reset=not end, cut_at=None if end else 6000))
    answer = await gateway.post(CHAT, {**ALONE, "stream_options": {"include_usage": True}})
    receipt = await receipt_of(gateway)
    least = 60 if end else 20
    assert (receipt.usage.input, receipt.usage.source) == (10, "estimated" if end else "partial")
    assert receipt.usage.output >= least
    assert receipt.cost.state == "estimated"
    if end:
        assert answer.events()[-2]["usage"]["completion_tokens"] == receipt.usage.output


@pytest.mark.parametrize("comment", [b": keep-alive\n\n", b":\r\n\r\n"])
@pytest.mark.parametrize("way", ["at once", "one by one", "in small pieces"])
async def test_comments_between_events_are_not_counted(
    gateway: Running, up: FakeUpstream, comment: bytes, way: str
) -> None:
    """Sheet 1.7: servers keep a connection alive with comments, in front of the first event too."""
    events: list[Any] = [chunk(""), *WORDS, chunk(None, "stop"), "[DONE]"]
    ways: dict[str, dict[str, Any]] = {"at once": {}, "one by one": {"gap": 0.001}, "in small pieces": {"split": 100}}
    used = []
    for seed, between in enumerate(([], [comment], [comment] * 3)):
        mixed = [each for event in events for each in (*between, event)]
        up.script(Scripted(events=mixed, **ways[way]))
        answer = await gateway.post(CHAT, {**ALONE, "seed": seed})  # no hit of the cache
        assert answer.status == 200
        used.append((await receipt_of(gateway)).usage)
        gateway.receipts.clear()
    assert used[0].output >= 60
    assert used == [used[0]] * 3


async def test_who_leaves_pays_what_was_delivered_though_the_first_chunk_says_less(
    gateway: Running, up: FakeUpstream
) -> None:
    up.script(Scripted(events=[chunk("", usage=counted(10, 0)), *WORDS], hang=True))
    host, port = gateway.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    raw = orjson.dumps(ALONE)
    head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(raw)}\r\n\r\n"
    writer.write(head.encode() + raw)
    got = b""
    async with asyncio.timeout(10):
        while got.count(b"word ") < 60:
            got += await reader.read(65536)
    writer.transport.abort()
    receipt = await receipt_of(gateway)
    assert (receipt.outcome, receipt.usage.source, receipt.usage.input) == ("abandoned", "partial", 10)
    assert receipt.usage.output >= 60


async def test_a_running_total_in_every_chunk_is_exact_when_the_stream_ends_well(
    gateway: Running, up: FakeUpstream
) -> None:
    told = [chunk("word ", usage=counted(10, count)) for count in range(1, 61)]
    up.script(Scripted(events=[*told, chunk(None, "stop"), "[DONE]"]))
    await gateway.post(CHAT, ALONE)
    assert_billed(await receipt_of(gateway), input=10, output=60)


async def test_a_response_whose_early_usage_is_all_it_says_is_estimated(gateway: Running, up: FakeUpstream) -> None:
    last = {"type": "response.completed", "response": response("completed")}
    up.script(Scripted(events=response_events(last, words=60, usage=spent(10, 1))))
    await gateway.post(RESPONSES, {"model": "alone", "input": "Hello", "stream": True})
    receipt = await receipt_of(gateway)
    assert (receipt.usage.input, receipt.usage.source) == (10, "estimated")
    assert receipt.usage.output >= 60


# --- what is not said --------------------------------------------------------------------------

TEXT = "one two three four five six seven eight"


def chat_body(usage: Any, text: str = TEXT) -> dict[str, Any]:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    return {"id": "chatcmpl-1", "object": "chat.completion", "model": "first", "choices": [choice], "usage": usage}


@pytest.mark.parametrize("is_stream", [True, False], ids=["stream", "body"])
@pytest.mark.parametrize("silence", [{"completion_tokens": None}, {}], ids=["null", "absent"])
async def test_a_completion_that_is_not_counted_is_what_the_total_has_beside_the_prompt(
    gateway: Running, up: FakeUpstream, silence: dict[str, Any], is_stream: bool
) -> None:
    usage = {"prompt_tokens": 10, **silence, "total_tokens": 15}
    if is_stream:
        last = {**HEAD, "choices": [], "usage": usage}
        up.script(Scripted(events=[chunk(TEXT), chunk(None, "stop"), last, "[DONE]"]))
    else:
        up.script(Scripted(body=chat_body(usage)))
    await gateway.post(CHAT, {**ALONE, "stream": is_stream})
    assert_billed(await receipt_of(gateway), input=10, output=5)


@pytest.mark.parametrize("is_stream", [True, False], ids=["stream", "body"])
@pytest.mark.parametrize("path", [RESPONSES, MESSAGES])
async def test_in_another_dialect_too_the_total_says_what_was_generated(
    chats: Running, up: FakeUpstream, path: str, is_stream: bool
) -> None:
    usage = {"prompt_tokens": 10, "completion_tokens": None, "total_tokens": 15}
    if is_stream:
        last = {**HEAD, "choices": [], "usage": usage}
        up.script(Scripted(events=[chunk(TEXT), chunk(None, "stop"), last, "[DONE]"]))
    else:
        up.script(Scripted(body=chat_body(usage)))
    asked = {"input": "Hello"} if path == RESPONSES else {"messages": HELLO["messages"], "max_tokens": 1000}
    await chats.post(path, {"model": "alone", "stream": is_stream, **asked})
    assert_billed(await receipt_of(chats), input=10, output=5)


@pytest.mark.parametrize("is_stream", [True, False], ids=["stream", "body"])
@pytest.mark.parametrize("said", [{"completion_tokens": None}, {}, {"completion_tokens": 0}])
async def test_a_completion_of_which_nothing_is_said_is_estimated_and_never_nothing(
    gateway: Running, up: FakeUpstream, said: dict[str, Any], is_stream: bool
) -> None:
    usage = {"prompt_tokens": 10, **said}
    if is_stream:
        last = {**HEAD, "choices": [], "usage": usage}
        up.script(Scripted(events=[chunk(""), *map(chunk, TEXT.split()), chunk(None, "stop"), last, "[DONE]"]))
    else:
        up.script(Scripted(body=chat_body(usage)))
    asked = {"stream_options": {"include_usage": True}} if is_stream else {}
    answer = await gateway.post(CHAT, {**ALONE, "stream": is_stream, **asked})
    receipt = await receipt_of(gateway)
    assert (receipt.usage.input, receipt.usage.source, receipt.cost.state) == (10, "estimated", "estimated")
    assert receipt.usage.output >= 8
    if is_stream:
        assert answer.events()[-2]["usage"]["completion_tokens"] == receipt.usage.output


async def test_a_body_that_becomes_a_stream_shows_what_was_estimated(gateway: Running, up: FakeUpstream) -> None:
    up.script(Scripted(body=chat_body({"prompt_tokens": 10, "completion_tokens": None})))
    answer = await gateway.post(CHAT, {**ALONE, "stream_options": {"include_usage": True}})
    receipt = await receipt_of(gateway)
    assert answer.events()[-2]["usage"]["completion_tokens"] == receipt.usage.output > 0


async def test_embeddings_generate_nothing_and_need_not_say_so(gateway: Running, up: FakeUpstream) -> None:
    data = [{"object": "embedding", "index": 0, "embedding": [0.5]}]
    up.script(Scripted(body={"object": "list", "data": data, "model": "vectors", "usage": {"prompt_tokens": 7}}))
    await gateway.post("/v1/embeddings", {"model": "vectors", "input": "Hello"})
    assert_billed(await receipt_of(gateway), input=7)


# --- what failed -------------------------------------------------------------------------------

ERROR = {"message": "The response was filtered", "code": "content_filter"}
FAILED = response("failed", error={"code": "server_error", "message": "no"}, usage=spent(10, 3))
FAILURES = {
    "no choices": (CHAT, Scripted(body={**chat_body(counted(10, 3)), "choices": []})),
    "no list of choices": (CHAT, Scripted(body={"usage": counted(10, 3)})),
    "an error in a 200": (CHAT, Scripted(body={"error": ERROR, "usage": counted(10, 3)})),
    "a refusal": (CHAT, Scripted(status=500, body={"error": ERROR, "usage": counted(10, 3)})),
    "an error event": (CHAT, Scripted(events=[{"error": ERROR, "usage": counted(10, 3)}])),
    "only usage": (CHAT, Scripted(events=[AZURES_FIRST, usage_event(10, 3), "[DONE]"])),
    "a failed response": (RESPONSES, Scripted(body=FAILED)),
    "a stream of it": (
        RESPONSES,
        Scripted(events=response_events({"type": "response.failed", "response": FAILED}, words=0)),
    ),
}


@pytest.mark.parametrize(("path", "answer"), FAILURES.values(), ids=FAILURES)
async def test_an_attempt_that_fails_and_says_what_it_used_is_billed(
    gateway: Running, up: FakeUpstream, path: str, answer: Scripted
) -> None:
    up.script(answer)
    asked = {"input": "Hello"} if path == RESPONSES else {"messages": HELLO["messages"]}
    got = await gateway.post(path, {"model": "alone", "stream": answer.events is not None, **asked})
    assert got.status >= 400
    receipt = await receipt_of(gateway)
    assert (receipt.outcome, receipt.attempts[0].billed) == ("failed", True)
    assert_billed(receipt, input=10, output=3)


async def test_what_a_failed_attempt_used_is_added_to_what_the_next_one_used(
    gateway: Running, up: FakeUpstream, other: FakeUpstream
) -> None:
    up.script(Scripted(body={"error": {"message": "no"}, "usage": counted(10, 3)}))
    other.script(Scripted(body=chat_body(counted(20, 4))))
    answer = await gateway.post(CHAT, HELLO)
    assert answer.status == 200
    receipt = await receipt_of(gateway)
    assert [attempt.billed for attempt in receipt.attempts] == [True, True]
    assert receipt.attempts[0].error is not None
    assert_billed(receipt, input=30, output=7)


async def test_an_attempt_that_fails_and_says_nothing_of_usage_is_free(gateway: Running, up: FakeUpstream) -> None:
    up.script(Scripted(body={"error": ERROR}))
    await gateway.post(CHAT, {**HELLO, "model": "alone"})
    receipt = await receipt_of(gateway)
    assert (receipt.attempts[0].billed, receipt.usage.total, receipt.cost.picos) == (False, 0, 0)


async def test_messages_that_fail_and_say_what_they_used_are_billed(claude: Running, up: FakeUpstream) -> None:
    up.script(Scripted(body={"type": "error", "error": {"type": "api_error", "message": "no"}, "usage": spent(10, 3)}))
    await claude.post(MESSAGES, {**HELLO, "model": "alone", "max_tokens": 100})
    assert_billed(await receipt_of(claude), input=10, output=3)


async def test_a_stream_that_fails_in_the_middle_is_billed_by_the_usage_of_its_failure(
    gateway: Running, up: FakeUpstream
) -> None:
    up.script(Scripted(events=response_events({"type": "response.failed", "response": FAILED}, words=30)))
    await gateway.post(RESPONSES, {"model": "alone", "input": "Hello", "stream": True})
    assert_billed(await receipt_of(gateway), input=10, output=3)


async def test_a_chat_that_fails_in_the_middle_is_billed_by_the_usage_of_its_failure(
    gateway: Running, up: FakeUpstream
) -> None:
    up.script(Scripted(events=[*WORDS, {"error": ERROR, "usage": counted(10, 3)}]))
    await gateway.post(CHAT, ALONE)
    assert_billed(await receipt_of(gateway), input=10, output=3)


# --- answers without anything in them ----------------------------------------------------------

EMPTY = {
    "only an end mark": Scripted(events=["[DONE]"]),
    "only azure's first event": Scripted(events=[AZURES_FIRST, "[DONE]"]),
    "nothing": Scripted(events=[b": hold on\n\n"]),
    "no choices": Scripted(body={**chat_body(None), "choices": []}),
}


@pytest.mark.parametrize("answer", EMPTY.values(), ids=EMPTY)
async def test_an_answer_without_choices_is_a_failure_that_another_target_may_mend(
    gateway: Running, up: FakeUpstream, other: FakeUpstream, answer: Scripted
) -> None:
    body = STREAM if answer.events is not None else HELLO
    good = Scripted(events=[AZURES_FIRST, chunk("Hello"), chunk(None, "stop"), usage_event(10, 3), "[DONE]"])
    up.script(answer)
    other.script(good if body is STREAM else Scripted(body=chat_body(counted(10, 3), "Hello")))
    got = await gateway.post(CHAT, body)
    assert got.status == 200
    assert "Hello" in got.text
    assert_billed(await receipt_of(gateway), input=10, output=3)
    assert (len(up.requests), len(other.requests)) == (1, 1)


@pytest.mark.parametrize("answer", EMPTY.values(), ids=EMPTY)
async def test_an_answer_without_choices_is_a_502_and_is_not_kept(
    gateway: Running, up: FakeUpstream, answer: Scripted
) -> None:
    body = {**(STREAM if answer.events is not None else HELLO), "model": "alone"}
    up.script(answer, answer)
    for _ in range(2):
        assert (await gateway.post(CHAT, body)).status == 502
    assert len(up.requests) == 2
    assert [receipt.outcome for receipt in await gateway.settled(2)] == ["failed", "failed"]
