"""One exchange in OpenAI's Responses, against a strict provider over real sockets."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import orjson
import pytest

from qlens import (
    CallError,
    Deadlines,
    Outgoing,
    Reply,
    Upstream,
    UpstreamError,
    UpstreamInvalid,
    UpstreamLimited,
    UpstreamRejected,
    UpstreamTruncated,
    post_openai,
)
from qlens.operations import Operation
from qlens.testing import Scripted
from qlens.testing.responses import FAILURE, FakeResponses, responses_upstream
from qlens.testing.upstreams import TEXT, Event

DEADLINES = Deadlines(connect_seconds=2, first_byte_seconds=5, idle_seconds=5)
OPERATION = Operation("responses", "POST", "/v1/responses", "full", "responses", "json", True, ("tokens",))


@pytest.fixture
async def http() -> AsyncIterator[Upstream]:
    http = Upstream()
    yield http
    await http.aclose()


@pytest.fixture
async def up() -> AsyncIterator[FakeResponses]:
    async with responses_upstream() as up:
        yield up


async def ask(http: Upstream, up: FakeResponses, *, stream: bool = False, **fields: Any) -> Reply:
    outgoing = Outgoing(OPERATION, "responses", {"model": "m", "input": "Hello", **fields}, stream)
    return await post_openai(http, up.url + "/responses", headers={}, outgoing=outgoing, deadlines=DEADLINES)


async def drained(reply: Reply) -> bytes:
    assert reply.chunks is not None
    content = b"".join([chunk async for chunk in reply.chunks])
    await reply.aclose()
    return content


async def refused(http: Upstream, up: FakeResponses, *, stream: bool = True, **fields: Any) -> CallError:
    with pytest.raises(CallError) as caught:
        await ask(http, up, stream=stream, **fields)
    return caught.value


def event(kind: str, **fields: Any) -> Event:
    return (
        f"event: {kind}\n".encode() + b"data: " + orjson.dumps({"type": kind, "sequence_number": 0, **fields}) + b"\n\n"
    )


CREATED = event("response.created", response={"id": "resp_1", "status": "in_progress", "output": [], "error": None})
ADDED = event("response.output_item.added", output_index=0, item={"type": "message", "content": []})


async def test_whole_answer_passes_with_its_usage(http: Upstream, up: FakeResponses) -> None:
    reply = await ask(http, up)
    assert orjson.loads(reply.body or b"")["output"][0]["content"][0]["text"] == TEXT
    assert reply.usage is not None
    assert (reply.usage.prompt, reply.usage.cached_input, reply.usage.reasoning) == (9, 2, 1)
    assert (reply.dialect, reply.finish, reply.complete, reply.upstream_id) == (
        "responses",
        "completed",
        True,
        "req-upstream",
    )


async def test_stream_passes_from_its_first_event_to_its_last(http: Upstream, up: FakeResponses) -> None:
    content = await drained(await ask(http, up, stream=True))
    assert content.startswith(b"event: response.created\n")
    assert content.count(b"event: response.completed\n") == 1
    # OpenAI refuses to be asked for what its last event always has.
    assert up.requests[0].body == {"model": "m", "input": "Hello", "stream": True}


async def test_the_clients_own_stream_options_are_kept(http: Upstream, up: FakeResponses) -> None:
    options = {"include_obfuscation": False}
    await drained(await ask(http, up, stream=True, stream_options=options))
    assert up.requests[0].body["stream_options"] == options


async def test_response_that_fails_before_any_output_is_an_error_with_its_status(
    http: Upstream, up: FakeResponses
) -> None:
    error = await refused(http, up, input=FAILURE)
    assert type(error) is UpstreamError
    whole = await refused(http, up, stream=False, input=FAILURE)
    assert type(whole) is UpstreamError


@pytest.mark.parametrize(
    ("code", "expected"),
    [("rate_limit_exceeded", UpstreamLimited), ("invalid_prompt", UpstreamRejected), ("server_error", UpstreamError)],
)
@pytest.mark.parametrize("form", ["failed", "error", "whole"])
async def test_error_means_the_same_wherever_it_is_said(
    http: Upstream, up: FakeResponses, code: str, expected: type[CallError], form: str
) -> None:
    said = {"code": code, "message": "It did not work."}
    failed = {"id": "resp_1", "status": "failed", "output": [{"type": "message"}], "error": said}
    answers = {
        "failed": Scripted(events=[CREATED, event("response.failed", response=failed)]),
        "error": Scripted(events=[CREATED, event("error", **said, param=None)]),
        "whole": Scripted(body=failed),
    }
    up.script(answers[form])
    assert type(await refused(http, up, stream=form != "whole")) is expected


async def test_response_that_was_only_created_has_not_begun(http: Upstream, up: FakeResponses) -> None:
    up.script(Scripted(events=[CREATED, event("response.in_progress", response={})]))
    assert isinstance(await refused(http, up), UpstreamTruncated)


async def test_stream_is_handed_on_with_its_first_output_or_its_place_in_the_queue(
    http: Upstream, up: FakeResponses
) -> None:
    queued = event("response.queued", response={"id": "resp_1", "status": "queued"})
    for begins in (ADDED, queued):
        up.script(Scripted(events=[CREATED, begins], hang=True))
        reply = await ask(http, up, stream=True)
        assert reply.chunks is not None
        await reply.aclose()


async def test_answer_without_output_is_none(http: Upstream, up: FakeResponses) -> None:
    up.script(Scripted(body={"id": "resp_1", "object": "response", "status": "completed"}))
    assert isinstance(await refused(http, up, stream=False), UpstreamInvalid)


async def test_wrong_request_keeps_the_name_of_its_field(http: Upstream, up: FakeResponses) -> None:
    error = await refused(http, up, stream=False, previous_response_id="resp_unknown")
    assert (error.status, error.param, error.code) == (400, "previous_response_id", "previous_response_not_found")
