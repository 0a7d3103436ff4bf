"""Nothing that Bedrock's own service model says can go wrong ends in an answer that looks like a good one."""

from __future__ import annotations

from typing import Any

import pytest
from bedrocks import CHAT, chat, config

from qlens.testing import Scripted, running
from qlens.testing.bedrock import answer, bedrock, failure, stream, streamed
from qlens.testing.bedrock_failures import (
    OPERATIONS,
    broken_streams,
    exceptions,
    exceptions_in_stream,
    instead_of_an_answer,
)
from qlens.testing.frames import error, event, exception, frame

WHAT = {
    "AccessDeniedException": (502, "upstream_auth_error"),
    "InternalServerException": (502, "upstream_error"),
    "ModelErrorException": (502, "model_error"),
    "ModelNotReadyException": (503, "model_not_ready"),
    "ModelStreamErrorException": (502, "upstream_error"),
    "ModelTimeoutException": (504, "upstream_timeout"),
    "ResourceNotFoundException": (404, "model_not_found"),
    "ServiceQuotaExceededException": (429, "insufficient_quota"),
    "ServiceUnavailableException": (503, "upstream_unavailable"),
    "ThrottlingException": (429, "rate_limit_exceeded"),
    "ValidationException": (400, None),
}
"""What a client gets for each exception: status and code."""
PATHS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "Converse": ("us.anthropic.claude-sonnet-4-5-20250929-v1:0", CHAT, chat()),
    "ConverseStream": ("us.anthropic.claude-sonnet-4-5-20250929-v1:0", CHAT, chat(stream=True)),
    "InvokeModel": ("amazon.titan-embed-text-v2:0", "/v1/embeddings", {"model": "ours", "input": "a"}),
}
EACH = [(operation, name) for operation in PATHS for name in exceptions(operation)]
BROKEN = broken_streams()
CODES = {
    "throttlingException": "rate_limit_exceeded",
    "serviceUnavailableException": "upstream_unavailable",
    "internalServerException": "upstream_error",
    "modelStreamErrorException": "upstream_error",
    "validationException": None,
    "an exception after the answer": "upstream_error",
    "an exception that is not documented": "upstream_error",
    "an error without a model": "upstream_error",
    "an end between two frames": "upstream_truncated",
    "an end inside a frame": "upstream_truncated",
    "an end inside a beginning": "upstream_truncated",
}
"""What ends each broken stream; all else is an invalid answer."""


def test_the_exceptions_are_those_of_the_service_model() -> None:
    assert {name for operation in OPERATIONS for name in exceptions(operation)} <= WHAT.keys()
    assert exceptions("ConverseStream")["ModelErrorException"] == 424
    assert exceptions_in_stream() == {
        "internalServerException": 500,
        "modelStreamErrorException": 424,
        "serviceUnavailableException": 503,
        "throttlingException": 429,
        "validationException": 400,
    }
    assert exceptions_in_stream("InvokeModelWithResponseStream").keys() - exceptions_in_stream().keys() == {
        "modelTimeoutException"
    }


@pytest.mark.parametrize(("operation", "name"), EACH)
async def test_every_exception_instead_of_an_answer(operation: str, name: str) -> None:
    model, path, body = PATHS[operation]
    async with bedrock() as aws, running(config(aws.root, model)) as gateway:
        aws.script(instead_of_an_answer(operation)[name])
        reply = await gateway.post(path, body)
        assert (reply.status, reply.json()["error"]["code"]) == WHAT[name]
        (receipt,) = await gateway.settled(1)
        assert (receipt.outcome, receipt.usage.total) == ("failed", 0)


@pytest.mark.parametrize("name", exceptions_in_stream("InvokeModelWithResponseStream"))
@pytest.mark.parametrize("after", [[], [event("messageStart", {"role": "assistant"})]], ids=["first", "after start"])
async def test_every_exception_before_the_first_word_has_its_own_status(name: str, after: list[bytes]) -> None:
    async with bedrock() as aws, running(config(aws.root)) as gateway:
        aws.script(stream([b"".join([*after, exception(name, "as documented")])]))
        reply = await gateway.post(CHAT, chat(stream=True))
        assert (reply.status, reply.json()["error"]["code"]) == WHAT[name[0].upper() + name[1:]]


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"originalStatusCode": 400, "originalMessage": "no"}, 400),
        ({"originalStatusCode": 429, "originalMessage": "slow down"}, 429),
        ({"originalStatusCode": 500, "originalMessage": "oops"}, 502),
        ({"originalStatusCode": "400"}, 502),
        ({}, 502),
    ],
)
async def test_a_models_own_error_is_told_by_the_status_it_had_there(fields: dict[str, Any], status: int) -> None:
    async with bedrock() as aws, running(config(aws.root)) as gateway:
        aws.script(
            stream([exception("modelStreamErrorException", "failed", **fields)]),
            failure("ModelStreamErrorException", "failed", status=424, **fields),
        )
        for _ in range(2):
            assert (await gateway.post(CHAT, chat(stream=True))).status == status


BEFORE: dict[str, Scripted] = {
    "an error without a model": stream([error("InternalFailure", "failed")]),
    "an error of throttling without a model": stream([error("ThrottlingException", "slow down")]),
    "nothing": stream([]),
    "JSON": Scripted(body={"message": "no stream"}),
    "an exception that is not JSON": stream(
        [frame({":message-type": "exception", ":exception-type": "internalServerException"}, b"<busy>")]
    ),
    "half a frame": stream([event("messageStart", {"role": "assistant"})[:-3]]),
    "a reset": stream([event("messageStart", {"role": "assistant"})], cut_at=20, reset=True),
    "an event that makes no sense": stream([event("contentBlockDelta", {"contentBlockIndex": 0})]),
}


@pytest.mark.parametrize("name", BEFORE)
async def test_a_stream_that_never_begins_has_a_status_of_its_own(name: str) -> None:
    async with bedrock() as aws, running(config(aws.root)) as gateway:
        aws.script(BEFORE[name])
        reply = await gateway.post(CHAT, chat(stream=True))
        if reply.status == 200:  # what was good of it is at the client already
            assert name == "an event that makes no sense"
            assert "[DONE]" not in reply.text
        else:
            assert reply.status == (429 if "throttling" in name else 502)
        (receipt,) = await gateway.settled(1)
        assert receipt.outcome == "failed"
        assert (await gateway.post(CHAT, chat())).status == 200  # the connection pool is not poisoned


@pytest.mark.parametrize("name", BROKEN)
async def test_every_stream_that_breaks_ends_with_an_error_and_no_end_mark(name: str) -> None:
    async with bedrock() as aws, running(config(aws.root)) as gateway:
        aws.script(BROKEN[name])
        reply = await gateway.post(CHAT, chat(stream=True))
        assert reply.status == 200
        *good, last = reply.events()
        assert "".join(each["choices"][0]["delta"].get("content") or "" for each in good) == "Hello"
        assert last["error"]["code"] == CODES.get(name, "upstream_invalid_response")
        assert "[DONE]" not in reply.text
        (receipt,) = await gateway.settled(1)
        assert (receipt.outcome, receipt.usage.source) == ("failed", "partial")
        assert receipt.attempts[0].upstream_id
        assert (await gateway.post(CHAT, chat())).status == 200


@pytest.mark.parametrize("options", [{"cut_at": 400}, {"cut_at": 400, "reset": True}, {"hang": True}])
async def test_a_connection_that_is_lost_or_silent_is_no_end(options: dict[str, Any]) -> None:
    told = streamed(answer({"text": "Hello there, how are you?"}))
    events = told[:3] if "hang" in options else told
    async with bedrock() as aws, running(config(aws.root, idle_seconds=0.2)) as gateway:
        aws.script(stream(events, gap=0.01, **options))
        reply = await gateway.post(CHAT, chat(stream=True))
        expected = "upstream_timeout" if "hang" in options else "upstream_truncated"
        assert reply.events()[-1]["error"]["code"] == expected
        (receipt,) = await gateway.settled(1)
        assert (receipt.outcome, receipt.usage.source) == ("failed", "partial")


async def test_events_that_a_later_version_brings_are_passed_over() -> None:
    told = streamed(answer({"text": "Hello"}))
    told.insert(1, event("somethingNew", {"a": 1}))
    async with bedrock() as aws, running(config(aws.root)) as gateway:
        aws.script(stream(told))
        reply = await gateway.post(CHAT, chat(stream=True))
        assert reply.events()[-1] == "[DONE]"
