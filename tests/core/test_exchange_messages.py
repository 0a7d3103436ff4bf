"""One exchange in Anthropic's format, against a fake over real sockets: what is sent, read, and meant by errors."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from claudes import DEADLINES, OPERATION

from qlens import (
    CallError,
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
    post_messages,
)
from qlens.dialects import typed
from qlens.testing import Scripted
from qlens.testing.anthropic import KEY, MODEL, FakeAnthropic, anthropic, error, failure, message, streamed, whole
from qlens.usage import Usage

HEADERS = {"x-api-key": KEY, "anthropic-version": "2023-06-01"}
PING = typed.write({"type": "ping"})


@pytest.fixture
async def http() -> AsyncIterator[Upstream]:
    http = Upstream()
    yield http
    await http.aclose()


@pytest.fixture
async def claude() -> AsyncIterator[FakeAnthropic]:
    async with anthropic() as fake:
        yield fake


async def ask(http: Upstream, claude: FakeAnthropic, *, stream: bool = False, **fields: Any) -> Reply:
    body = {"model": MODEL, "max_tokens": 9, "messages": [{"role": "user", "content": "Hello"}], **fields}
    outgoing = Outgoing(OPERATION["messages"], "messages", body, stream)
    url = f"{claude.url}/v1/messages"
    return await post_messages(http, url, headers=HEADERS, outgoing=outgoing, deadlines=DEADLINES)


@pytest.mark.parametrize(
    "field",
    [
        {"temperature": None},
        {"stop_sequences": 1},
        {"metadata": []},
        {"tools": 3},
        {"thinking": "on"},
        {"tool_choice": []},
    ],
)
async def test_a_value_of_a_wrong_type_is_answered_and_not_the_end_of_the_fake(
    http: Upstream, claude: FakeAnthropic, field: dict[str, Any]
) -> None:
    with pytest.raises(UpstreamRejected) as caught:
        await ask(http, claude, **field)
    assert caught.value.status == 400


async def refused(http: Upstream, claude: FakeAnthropic, answer: Scripted, *, stream: bool = False) -> CallError:
    claude.script(answer)
    with pytest.raises(CallError) as caught:
        await ask(http, claude, stream=stream)
    assert claude.refused == []
    return caught.value


async def test_an_answer_says_what_it_used(http: Upstream, claude: FakeAnthropic) -> None:
    reply = await ask(http, claude, stream=False)
    assert reply.usage == Usage(input=9, output=4, source="provider", tier="standard")
    assert (reply.finish, reply.complete, reply.dialect, reply.upstream_id) == (
        "end_turn",
        True,
        "messages",
        "req_011Example",
    )
    assert "stream" not in claude.requests[0].body


async def test_a_stream_passes_byte_by_byte_as_it_came(http: Upstream, claude: FakeAnthropic) -> None:
    claude.script(Scripted(events=[PING, *streamed(message())], split=7))
    reply = await ask(http, claude, stream=True)
    assert reply.chunks is not None
    got = b"".join([chunk async for chunk in reply.chunks])
    assert got == PING + b"".join(streamed(message()))
    assert claude.requests[0].body["stream"] is True
    assert claude.requests[0].headers["accept"] == "text/event-stream"
    await reply.aclose()


async def test_a_json_answer_to_a_stream_request_is_an_answer(http: Upstream, claude: FakeAnthropic) -> None:
    claude.script(whole(message()))
    reply = await ask(http, claude, stream=True)
    assert reply.body is not None


@pytest.mark.parametrize(
    ("answer", "kind", "status", "code"),
    [
        (failure("overloaded_error", "Overloaded"), UpstreamUnavailable, 503, "upstream_unavailable"),
        (failure("rate_limit_error", "x", retry_after=7), UpstreamLimited, 429, "rate_limit_exceeded"),
        (failure("authentication_error", "invalid x-api-key"), UpstreamAuth, 502, "upstream_auth_error"),
        (failure("permission_error", "no"), UpstreamAuth, 502, "upstream_auth_error"),
        (failure("not_found_error", "model: x"), UpstreamModelMissing, 404, "model_not_found"),
        (failure("api_error", "Internal server error"), UpstreamError, 502, "upstream_error"),
        (failure("timeout_error", "x"), UpstreamTimedOut, 504, "upstream_timeout"),
        (failure("request_too_large", "Request exceeds the maximum size"), UpstreamRejected, 413, None),
        (failure("invalid_request_error", "max_tokens: Field required"), UpstreamRejected, 400, None),
        (
            failure("invalid_request_error", "prompt is too long: 9 tokens > 8 maximum"),
            UpstreamRejected,
            400,
            "context_length_exceeded",
        ),
        (failure("billing_error", "x"), UpstreamLimited, 429, "insufficient_quota"),
        (
            failure("invalid_request_error", "Your credit balance is too low to access the Anthropic API."),
            UpstreamLimited,
            429,
            "insufficient_quota",
        ),
        (Scripted(502, body=b"<html>bad gateway</html>"), UpstreamError, 502, "upstream_error"),
        (Scripted(204), UpstreamInvalid, 502, "upstream_invalid_response"),
        (Scripted(302, {"location": "http://127.0.0.1/"}), UpstreamInvalid, 502, "upstream_invalid_response"),
        (Scripted(body=b"[]"), UpstreamInvalid, 502, "upstream_invalid_response"),
        (Scripted(body={"type": "message"}), UpstreamInvalid, 502, "upstream_invalid_response"),
        (Scripted(body=error("overloaded_error", "x")), UpstreamUnavailable, 503, "upstream_unavailable"),
    ],
)
async def test_what_goes_wrong_before_an_answer(
    http: Upstream, claude: FakeAnthropic, answer: Scripted, kind: type[CallError], status: int, code: str | None
) -> None:
    raised = await refused(http, claude, answer)
    assert type(raised) is kind
    assert (raised.status, raised.code) == (status, code)


async def test_retry_after_and_the_providers_id_of_the_request_are_kept(http: Upstream, claude: FakeAnthropic) -> None:
    raised = await refused(http, claude, failure("rate_limit_error", "slow down", retry_after=7))
    assert (raised.retry_after, raised.upstream_id) == (7, "req_011Example")


@pytest.mark.parametrize(
    ("events", "kind"),
    [
        ([typed.write(error("overloaded_error", "Overloaded"))], UpstreamUnavailable),
        ([PING, typed.write(error("rate_limit_error", "x"))], UpstreamLimited),
        ([PING], UpstreamTruncated),
        ([b"data: {no\n\n"], UpstreamInvalid),
        ([b"data: 1\n\n"], UpstreamInvalid),
    ],
)  # fmt: skip
async def test_a_stream_that_begins_with_a_failure_is_a_failure(
    http: Upstream, claude: FakeAnthropic, events: list[bytes], kind: type[CallError]
) -> None:
    raised = await refused(http, claude, Scripted(events=events), stream=True)
    assert type(raised) is kind


async def test_something_else_than_a_stream_is_refused(http: Upstream, claude: FakeAnthropic) -> None:
    answer = Scripted(headers={"content-type": "text/html"}, body=b"<html>")
    assert isinstance(await refused(http, claude, answer, stream=True), UpstreamInvalid)
