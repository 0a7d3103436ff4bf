"""What a provider's error means."""

from __future__ import annotations

from typing import Any

import pytest

from qlens import (
    CallError,
    UpstreamAuth,
    UpstreamError,
    UpstreamLimited,
    UpstreamModelMissing,
    UpstreamRejected,
    UpstreamUnavailable,
    error_from,
)


@pytest.mark.parametrize("code", [400, "400", "not a name", "x" * 65, ["odd"], None])
def test_code_that_is_no_name_is_left_out(code: Any) -> None:
    assert error_from({"error": {"message": "x", "code": code, "param": code}}, 400).code is None


@pytest.mark.parametrize(
    ("told", "hidden"),
    [
        ("key sk-proj-abcd****************wxyz is wrong", "wxyz"),
        ("Authorization: Bearer abc.DEF is wrong", "DEF"),
        ("organization org-AbC123dEf456 on tokens per min", "AbC123"),
        ("subscription 0f8fad5b-d9cb-469f-a165-70867728950e", "0f8fad5b"),
        ("resource /subscriptions/x/resourceGroups/prod is gone", "prod"),
        ("arn:aws:bedrock:us-east-1:123456789012:model/x denied", "123456789012"),
        ("host prod-eu.openai.azure.com failed", "prod-eu"),
        ("see http://10.1.2.3:8000/v1 for more", "10.1.2.3"),
        ("mail ops@corp.example.com", "ops"),
        ("api_key=hunter2hunter2 given", "hunter2"),
        ("token 0123456789abcdef0123456789abcdef given", "0123456789abcdef"),
        ("jwt eyJhbGciOi.eyJzdWIi.c2ln given", "eyJzdWIi"),
    ],
)
def test_what_looks_like_a_secret_is_masked(told: str, hidden: str) -> None:
    message = error_from({"error": {"message": told}}, 400).message
    assert hidden not in message
    assert "***" in message


@pytest.mark.parametrize(
    "told",
    [
        "Invalid type for 'messages[0].content': expected one of a string or array of objects, but got an integer.",
        "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead.",
        "Invalid schema for function 'get_weather': keyword_arguments is not allowed in tools.0.function.parameters",
    ],
)
def test_plain_sentence_is_not_masked(told: str) -> None:
    assert error_from({"error": {"message": told}}, 400).message == told


def test_long_message_is_cut_and_put_on_one_line() -> None:
    message = error_from({"error": {"message": "many words\n\x1b[31m" * 1000}}, 400).message
    assert len(message) == 512
    assert message.isprintable()


@pytest.mark.parametrize(
    ("error_object", "status"),
    [
        ({"code": "context_length_exceeded", "message": "x"}, 400),
        ({"code": 400, "type": "exceed_context_size_error", "message": "the request exceeds it", "n_ctx": 4096}, 400),
        ({"code": 400, "message": "This model's maximum context length is 4096 tokens. However, ..."}, 400),
        ({"message": "The decoder prompt (length 5000) is longer than the maximum model length of 4096."}, 400),
        ({"message": "the request exceeds the available context size, try increasing it"}, 400),
        ({"message": "prompt is too long: 210000 tokens > 200000 maximum"}, 413),
        ({"message": "`inputs` tokens + `max_new_tokens` must be <= 4096. Given: 5000"}, 422),
    ],
)
def test_overflow_of_the_context_is_recognised_in_every_wording(error_object: dict[str, Any], status: int) -> None:
    caught = error_from({"error": error_object}, status)
    assert (caught.code, caught.status, caught.fallback) == ("context_length_exceeded", 400, "context_length")


@pytest.mark.parametrize(
    "error_object",
    [
        {"code": "content_filter", "param": "prompt", "status": 400},
        {"code": "content_policy_violation"},
        {"code": "400", "innererror": {"code": "ResponsibleAIPolicyViolation"}},
        {"code": None, "inner_error": {"code": "ResponsibleAIPolicyViolation"}},
    ],
)
def test_refusal_by_a_content_filter_is_recognised(error_object: dict[str, Any]) -> None:
    caught = error_from({"error": {"message": "filtered", **error_object}}, 400)
    assert isinstance(caught, UpstreamRejected)
    assert caught.fallback == "content_filter"
    assert caught.code in {"content_filter", "content_policy_violation"}


def test_spent_quota_is_not_asked_again() -> None:
    caught = error_from({"error": {"code": "insufficient_quota", "message": "x"}}, 429)
    assert (type(caught), caught.again, caught.type) == (UpstreamLimited, False, "insufficient_quota")
    assert caught.headers == {"x-should-retry": "false"}


def test_unknown_deployment_is_a_missing_model_under_any_status() -> None:
    assert type(error_from({"error": {"code": "DeploymentNotFound"}}, 400)) is UpstreamModelMissing


@pytest.mark.parametrize(
    ("payload", "expected"),
    [
        ({"error": {"message": "x", "type": "server_error"}}, UpstreamError),
        ({"error": {"message": "x", "code": 503}}, UpstreamUnavailable),
        ({"error": {"message": "x", "code": "429"}}, UpstreamLimited),
        ({"error": {"type": "invalid_request_error", "code": "rate_limit_exceeded"}}, UpstreamLimited),
        ({"error": {"type": "invalid_request_error", "code": "invalid_api_key"}}, UpstreamAuth),
        ({"error": {"type": "invalid_request_error", "code": None}}, UpstreamRejected),
        ({"error": {"type": "overloaded_error"}}, UpstreamUnavailable),
        ({"error": "something went wrong"}, UpstreamError),
        ({"error": {"code": "content_filter"}}, UpstreamRejected),
        ({"error": ["odd"]}, UpstreamError),
        ({"error": {"code": {"odd": 1}, "type": 5, "message": None, "param": []}}, UpstreamError),
        ({"object": "error", "message": "x", "type": "BadRequestError", "code": 400}, UpstreamRejected),
        ({}, UpstreamError),
    ],
)
def test_error_without_a_status_is_read_from_its_own_words(payload: dict[str, Any], expected: type[CallError]) -> None:
    assert type(error_from(payload)) is expected
