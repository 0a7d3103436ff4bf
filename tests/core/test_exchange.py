"""One exchange in OpenAI's format, against a scripted provider over real sockets."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import orjson
import pytest

from qlens import (
    CallError,
    Deadlines,
    Outgoing,
    Reply,
    Upstream,
    UpstreamAuth,
    UpstreamError,
    UpstreamInvalid,
    UpstreamLimited,
    UpstreamModelMissing,
    UpstreamRejected,
    UpstreamTimedOut,
    UpstreamTruncated,
    UpstreamUnavailable,
    post_openai,
)
from qlens.operations import OPERATIONS
from qlens.testing import Scripted
from qlens.testing.upstreams import TEXT, FakeUpstream, chat_events, error

CANARY = "sk-example-canary0123456789"
CHUNK = {"id": "c", "choices": [{"index": 0, "delta": {"content": "hi"}, "finish_reason": None}]}
DEADLINES = Deadlines(connect_seconds=2, first_byte_seconds=5, idle_seconds=5)
GIVEN: dict[str, dict[str, Any]] = {
    "chat": {"messages": []},
    "completions": {"prompt": "x"},
    "embeddings": {"input": "x"},
}
BY_DIALECT = {operation.dialect: operation for operation in OPERATIONS}


@pytest.fixture
async def http() -> AsyncIterator[Upstream]:
    http = Upstream()
    yield http
    await http.aclose()


def outgoing(*, stream: bool = False, dialect: str = "chat", **fields: Any) -> Outgoing:
    return Outgoing(BY_DIALECT[dialect], dialect, {"model": "m", **GIVEN[dialect], **fields}, stream)


async def ask(http: Upstream, up: FakeUpstream, what: Outgoing | None = None, **options: Any) -> Reply:
    what = what or outgoing()
    path = {"chat": "/chat/completions", "completions": "/completions", "embeddings": "/embeddings"}[what.dialect]
    headers = options.pop("headers", {})
    return await post_openai(http, up.url + path, headers=headers, outgoing=what, deadlines=DEADLINES, **options)


async def refused(http: Upstream, up: FakeUpstream, answer: Scripted, *, stream: bool = False) -> CallError:
    up.script(answer)
    with pytest.raises(CallError) as caught:
        await ask(http, up, outgoing(stream=stream))
    return caught.value


async def drained(reply: Reply) -> bytes:
    assert reply.chunks is not None
    received = b"".join([chunk async for chunk in reply.chunks])
    await reply.aclose()
    return received


# --- what is sent ------------------------------------------------------------------------------


async def test_stream_is_always_asked_for_its_usage(http: Upstream, up: FakeUpstream) -> None:
    await drained(await ask(http, up, outgoing(stream=True, stream_options={"include_obfuscation": False})))
    assert up.requests[0].body["stream"] is True
    assert up.requests[0].body["stream_options"] == {"include_obfuscation": False, "include_usage": True}


async def test_server_that_refuses_stream_options_is_spared_them(http: Upstream, up: FakeUpstream) -> None:
    await drained(await ask(http, up, outgoing(stream=True, stream_options={"include_usage": True}), ask_usage=False))
    assert "stream_options" not in up.requests[0].body


async def test_body_for_a_full_answer_has_no_stream_fields(http: Upstream, up: FakeUpstream) -> None:
    await ask(http, up, outgoing(stream_options={"include_usage": True}))
    assert up.requests[0].body == {"model": "m", "messages": []}


async def test_given_headers_win_in_any_case(http: Upstream, up: FakeUpstream) -> None:
    await ask(http, up, headers={"Accept": "application/json;v=2", "X-Own": "1"})
    sent = up.requests[0].headers
    assert (sent["accept"], sent["x-own"], sent["content-type"]) == ("application/json;v=2", "1", "application/json")


async def test_body_that_cannot_be_written_is_the_clients_mistake(http: Upstream, up: FakeUpstream) -> None:
    deep: list[Any] = []
    for _ in range(400):
        deep = [deep]
    with pytest.raises(UpstreamRejected):
        await ask(http, up, outgoing(metadata=deep))
    assert not up.requests


# --- full answers ------------------------------------------------------------------------------


async def test_full_answer_is_passed_as_it_came(http: Upstream, up: FakeUpstream) -> None:
    said = b'"usage": {"prompt_tokens": 3, "completion_tokens": 1}'
    body = b'{ "choices": [{"message": {"content": "x"}, "finish_reason": "length"}],\n %b }' % said
    up.script(Scripted(body=body, headers={"content-type": "application/json", "x-request-id": "req-1"}))
    reply = await ask(http, up)
    assert (reply.body, reply.finish, reply.complete, reply.upstream_id) == (body, "length", True, "req-1")
    assert reply.usage is not None
    assert (reply.usage.input, reply.usage.source) == (3, "provider")


async def test_json_is_read_whatever_its_content_type_says(http: Upstream, up: FakeUpstream) -> None:
    up.script(Scripted(body=b'{"choices": [{}]}', headers={"content-type": "text/plain"}))
    assert (await ask(http, up)).body == b'{"choices": [{}]}'


async def test_only_listed_headers_of_the_provider_are_kept(http: Upstream, up: FakeUpstream) -> None:
    headers = {
        "openai-processing-ms": "12",
        "x-ms-region": "a" * 500,
        "openai-organization": "org-1",
        "set-cookie": "a",
    }
    up.script(Scripted(body={"choices": [{}]}, headers={**headers, "apim-request-id": "azure-1"}))
    reply = await ask(http, up)
    assert reply.headers == {"openai-processing-ms": "12"}
    assert reply.upstream_id == "azure-1"


@pytest.mark.parametrize("status", [200, 500])
async def test_of_two_ids_the_one_that_is_asked_for_first_counts(http: Upstream, up: FakeUpstream, status: int) -> None:
    ids = {"apim-request-id": "azure-1", "x-request-id": "req-1"}
    up.script(Scripted(status=status, body={"choices": [{}]}, headers=ids))
    try:
        named = (await ask(http, up)).upstream_id
    except UpstreamError as error:
        named = error.upstream_id
    assert named == "req-1"


async def test_headers_to_keep_may_be_named_in_any_case(http: Upstream, up: FakeUpstream) -> None:
    up.script(Scripted(body={"choices": [{}]}, headers={"x-region": "eu"}))
    reply = await ask(http, up, forward=["X-Region"])
    assert reply.headers == {"x-region": "eu"}


async def test_embeddings_stay_packed(http: Upstream, up: FakeUpstream) -> None:
    reply = await ask(http, up, outgoing(dialect="embeddings", encoding_format="base64"))
    assert reply.body is not None
    assert isinstance(orjson.loads(reply.body)["data"][0]["embedding"], str)


@pytest.mark.parametrize(
    "usage",
    [
        {"prompt_tokens": -5, "completion_tokens": 10**30, "total_tokens": "many"},
        {"prompt_tokens": None, "completion_tokens": [1], "prompt_tokens_details": 7},
        {"prompt_tokens": 1, "prompt_tokens_details": {"cached_tokens": 99}},
        "plenty",
    ],
)
async def test_absurd_usage_neither_fails_nor_counts_below_zero(http: Upstream, up: FakeUpstream, usage: Any) -> None:
    # Not by orjson, which does not write such large numbers.
    up.script(Scripted(body=json.dumps({"choices": [{}], "usage": usage}).encode()))
    reply = await ask(http, up)
    assert reply.usage is None or min(reply.usage.prompt, reply.usage.completion) >= 0


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html><body>Welcome</body></html>",
        b'{"choices": [}',
        b'{"choices": [], "id": "\xff"}',
        b"[]",
        b'"text"',
        b"null",
        b"{}",
        b'{"message": "ok"}',
        b'{"choices": null}',
        b'{"choices": {}}',
        b'{"choices": []}',
        b'{"choices": ["text"]}',
        b'data: {"choices": []}\n\n',
    ],
)
async def test_200_that_is_no_answer_is_invalid(http: Upstream, up: FakeUpstream, body: bytes) -> None:
    caught = await refused(http, up, Scripted(body=body, headers={"content-type": "application/json"}))
    assert type(caught) is UpstreamInvalid


async def test_error_within_a_200_is_that_error(http: Upstream, up: FakeUpstream) -> None:
    body = {"error": {"message": "slow down", "type": "tokens", "code": "rate_limit_exceeded"}}
    assert type(await refused(http, up, Scripted(body=body))) is UpstreamLimited


async def test_error_that_is_null_is_no_error(http: Upstream, up: FakeUpstream) -> None:
    up.script(Scripted(body={"choices": [{}], "error": None}))
    assert (await ask(http, up)).complete


# --- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "expected", "shown"),
    [
        (300, UpstreamInvalid, 502),
        (304, UpstreamInvalid, 502),
        (307, UpstreamInvalid, 502),
        (400, UpstreamRejected, 400),
        (401, UpstreamAuth, 502),
        (402, UpstreamLimited, 429),
        (403, UpstreamAuth, 502),
        (404, UpstreamModelMissing, 404),
        (408, UpstreamTimedOut, 504),
        (409, UpstreamRejected, 409),
        (413, UpstreamRejected, 413),
        (415, UpstreamRejected, 415),
        (422, UpstreamRejected, 422),
        (424, UpstreamError, 502),
        (429, UpstreamLimited, 429),
        (500, UpstreamError, 502),
        (502, UpstreamError, 502),
        (503, UpstreamUnavailable, 503),
        (504, UpstreamTimedOut, 504),
        (529, UpstreamUnavailable, 503),
    ],
)
@pytest.mark.parametrize("body", [b"", b"<html>sorry</html>", b"[1]", b'{"statusCode": 1, "message": "no"}'])
async def test_status_decides_when_the_body_says_nothing(
    http: Upstream, up: FakeUpstream, status: int, expected: type[CallError], shown: int, body: bytes
) -> None:
    caught = await refused(http, up, Scripted(status=status, body=None if status == 304 else body))
    assert (type(caught), caught.status) == (expected, shown)


async def test_error_answer_that_breaks_off_still_counts_by_its_status(http: Upstream, up: FakeUpstream) -> None:
    assert type(await refused(http, up, Scripted(status=429, body=b"x" * 100, cut_at=5))) is UpstreamLimited


async def test_rejection_keeps_message_param_and_code(http: Upstream, up: FakeUpstream) -> None:
    told = error(400, "Unsupported value: 'temperature'.", param="temperature", code="unsupported_value")
    caught = await refused(http, up, told)
    assert isinstance(caught, UpstreamRejected)
    assert (caught.message, caught.param, caught.code) == (
        "Unsupported value: 'temperature'.",
        "temperature",
        "unsupported_value",
    )
    assert not caught.elsewhere


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 413, 422, 429, 500, 503])
@pytest.mark.parametrize("stream", [False, True])
async def test_provider_secrets_never_reach_an_error(
    http: Upstream, up: FakeUpstream, status: int, stream: bool
) -> None:
    told = f"Incorrect API key provided: {CANARY}. Organization org-4fGhCANARY77, https://canary.openai.azure.com/x"
    answer = error(status, told, param=CANARY, code=CANARY, type=CANARY)
    caught = await refused(http, up, answer, stream=stream)
    assert "canary" not in (str(caught) + repr(caught.body()) + repr(caught.headers)).lower()


# --- retry-after -------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [429, 503, 500])
@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "7"}, 7),
        ({"retry-after": "1.5"}, 1.5),
        ({"retry-after-ms": "250"}, 0.25),
        ({"retry-after-ms": "250", "retry-after": "7"}, 0.25),
        ({"retry-after-ms": "soon", "retry-after": "7"}, 7),
        ({"retry-after": "-1"}, None),
        ({"retry-after": "0"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "inf"}, None),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "Thu, 99 Foo 2026 99:99:99 GMT"}, None),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, None),
        ({}, None),
    ],
)
async def test_wait_that_the_provider_asks_for_is_kept(
    http: Upstream, up: FakeUpstream, status: int, headers: dict[str, str], seconds: float | None
) -> None:
    caught = await refused(http, up, Scripted(status=status, headers=headers, body={"error": {"message": "x"}}))
    assert caught.retry_after == seconds


async def test_wait_until_a_date_is_counted_from_now(http: Upstream, up: FakeUpstream) -> None:
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=90), usegmt=True)
    caught = await refused(http, up, Scripted(status=429, headers={"retry-after": date}))
    assert caught.retry_after is not None
    assert 60 < caught.retry_after <= 90


# --- streams -----------------------------------------------------------------------------------


@pytest.mark.parametrize("split", [None, 1, 7])
async def test_stream_passes_byte_for_byte(http: Upstream, up: FakeUpstream, split: int | None) -> None:
    raw = b': comment\r\n\r\nevent: message\ndata: {"choices":[]}\r\n\r\n'
    raw += b'data: {"choices":\ndata: [{}]}\n\ndata: [DONE]\n\n'
    up.script(Scripted(events=[raw], split=split))
    reply = await ask(http, up, outgoing(stream=True))
    assert (reply.body, reply.complete) == (None, False)
    assert await drained(reply) == raw


async def test_stream_is_returned_with_its_first_event_and_not_before(http: Upstream, up: FakeUpstream) -> None:
    up.script(Scripted(events=[b": hold on\n\n", b"data:\n\n", CHUNK], hang=True))
    reply = await ask(http, up, outgoing(stream=True))
    assert reply.chunks is not None
    assert b'"hi"' in await anext(reply.chunks)
    await reply.aclose()
    await asyncio.wait_for(up.requests[0].closed.wait(), 5)


async def test_comments_alone_are_no_first_event(http: Upstream, up: FakeUpstream) -> None:
    up.script(Scripted(events=[b": hold on\n\n"], hang=True))
    asking = asyncio.create_task(ask(http, up, outgoing(stream=True)))
    await up.arrived(1)
    await asyncio.sleep(0.1)
    assert not asking.done()
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    await asyncio.wait_for(up.requests[0].closed.wait(), 5)


@pytest.mark.parametrize("split", [None, 1])
@pytest.mark.parametrize(
    ("first", "expected"),
    [
        ({"error": {"message": "x", "code": "rate_limit_exceeded"}}, UpstreamLimited),
        ({"error": {"message": "x", "code": 401}}, UpstreamAuth),
        ({"id": "c", "choices": [], "error": {"message": "x"}}, UpstreamError),
        (b'event: error\ndata: {"message": "x", "code": 503}\n\n', UpstreamUnavailable),
        (b'data: {"error": {"code": 429}}', UpstreamLimited),
        (b"data: {broken\n\n", UpstreamInvalid),
        (b"data: 7\n\n", UpstreamInvalid),
        (b"", UpstreamTruncated),
        (b": only a comment\n\n", UpstreamTruncated),
        (b"data: [DONE]\n\n", UpstreamInvalid),
        (b'data: {"choices": [], "prompt_filter_results": []}\n\ndata: [DONE]\n\n', UpstreamInvalid),
        ({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 0}}, UpstreamTruncated),
    ],
)
async def test_stream_that_begins_badly_fails_before_a_byte_is_passed_on(
    http: Upstream, up: FakeUpstream, first: Any, expected: type[CallError], split: int | None
) -> None:
    caught = await refused(http, up, Scripted(events=[first], split=split), stream=True)
    assert type(caught) is expected


async def test_stream_that_is_cut_before_its_first_event_is_truncated(http: Upstream, up: FakeUpstream) -> None:
    caught = await refused(http, up, Scripted(events=[CHUNK], cut_at=10), stream=True)
    assert type(caught) is UpstreamTruncated


async def test_stream_that_is_cut_later_breaks_in_the_callers_hands(http: Upstream, up: FakeUpstream) -> None:
    up.script(Scripted(events=chat_events(), cut_at=700, gap=0.01))
    reply = await ask(http, up, outgoing(stream=True))
    with pytest.raises(UpstreamTruncated):
        await drained(reply)
    await reply.aclose()


async def test_event_without_its_blank_line_at_the_end_is_an_event(http: Upstream, up: FakeUpstream) -> None:
    up.script(Scripted(events=[b'data: {"choices": [{}]}']))
    assert await drained(await ask(http, up, outgoing(stream=True))) == b'data: {"choices": [{}]}'


@pytest.mark.parametrize("media_type", ["text/html", "text/plain", "application/x-ndjson", ""])
async def test_stream_request_answered_with_something_else_is_invalid(
    http: Upstream, up: FakeUpstream, media_type: str
) -> None:
    caught = await refused(
        http, up, Scripted(events=[CHUNK], headers={"content-type": media_type}, hang=True), stream=True
    )
    assert type(caught) is UpstreamInvalid
    await asyncio.wait_for(up.requests[0].closed.wait(), 5)


async def test_stream_request_answered_with_a_full_body_is_that_body(http: Upstream, up: FakeUpstream) -> None:
    body = {"choices": [{"message": {"content": TEXT}, "finish_reason": "stop"}]}
    up.script(Scripted(body=body, headers={"content-type": "application/json; charset=utf-8"}))
    reply = await ask(http, up, outgoing(stream=True))
    assert reply.chunks is None
    assert orjson.loads(reply.body or b"") == body


async def test_beginning_without_events_is_bounded(http: Upstream, up: FakeUpstream) -> None:
    for endless in ([b": " + b"x" * 1_000_000 + b"\n\n"] * 12, [b"data: ", *[b"x" * 1_000_000] * 12]):
        assert type(await refused(http, up, Scripted(events=endless, hang=True), stream=True)) is UpstreamInvalid


@pytest.mark.parametrize("begun", [False, True])
async def test_closing_a_reply_closes_the_upstream(http: Upstream, up: FakeUpstream, begun: bool) -> None:
    up.script(Scripted(events=[CHUNK], hang=True))
    reply = await ask(http, up, outgoing(stream=True))
    if begun:
        assert reply.chunks is not None
        await anext(reply.chunks)
    before = asyncio.all_tasks()
    await reply.aclose()
    await asyncio.wait_for(up.requests[0].closed.wait(), 5)
    assert asyncio.all_tasks() <= before
