"""What goes wrong at a provider, in its own words, is the SDKs' right exception wherever it went wrong."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import anthropic
import openai
import pytest
from e2e.places import OTHERS, Place, World

from qlens.testing import Scripted, azure
from qlens.testing import anthropic as claude
from qlens.testing import bedrock as converse
from qlens.testing.upstreams import error

pytestmark = pytest.mark.asyncio(loop_scope="module")

WORDS: Mapping[str, Mapping[str, Scripted]] = {
    "openai": {
        "throttled": Scripted(429, {"retry-after": "2"}, body={"error": {"message": "slow", "type": "requests"}}),
        "overloaded": error(503, "The engine is overloaded.", type="server_error"),
        "too long": error(400, "This model's maximum context length is 8.", code="context_length_exceeded"),
        "not let in": error(401, "Incorrect API key provided: sk-example-canary.", code="invalid_api_key"),
        "no such model": error(404, "The model does not exist.", code="model_not_found"),
        "failed": Scripted(500, body=b"<html>sk-example-canary</html>"),
    },
    "azure": {
        "throttled": azure.throttled(2000),
        "overloaded": azure.failed(503),
        "too long": azure.refusal("The maximum context length is 8.", code="context_length_exceeded"),
        "not let in": azure.access_denied(),
        "no such model": azure.deployment_not_found(),
        "failed": azure.failed(502),
    },
    "aws": {
        "throttled": converse.failure("ThrottlingException", "Too many requests", status=429),
        "overloaded": converse.failure("ServiceUnavailableException", "busy", status=503),
        "too long": converse.failure("ValidationException", "Input is too long for requested model."),
        "not let in": converse.failure("AccessDeniedException", "arn:aws:iam::1:user/sk-example-canary", status=403),
        "no such model": converse.failure("ResourceNotFoundException", "no", status=404),
        "failed": converse.failure("InternalServerException", "sk-example-canary", status=500),
    },
    "claude": {
        "throttled": claude.failure("rate_limit_error", "slow", retry_after=2),
        "overloaded": claude.failure("overloaded_error", "Overloaded"),
        "too long": claude.failure("invalid_request_error", "prompt is too long: 200001 tokens > 200000 maximum"),
        "not let in": claude.failure("authentication_error", "invalid x-api-key sk-example-canary"),
        "no such model": claude.failure("not_found_error", "model: claude-none"),
        "failed": claude.failure("api_error", "sk-example-canary"),
    },
}
"""The same failures as each provider tells them."""
SAME = {"compatible": "openai", **dict.fromkeys(("azure-default", "azure-v1", "azure-older"), "azure")}

OPENAI: Mapping[str, tuple[type[openai.APIStatusError], str]] = {
    "throttled": (openai.RateLimitError, "rate_limit_exceeded"),
    "overloaded": (openai.InternalServerError, "upstream_unavailable"),
    "too long": (openai.BadRequestError, "context_length_exceeded"),
    "not let in": (openai.InternalServerError, "upstream_auth_error"),
    "no such model": (openai.NotFoundError, "model_not_found"),
    "failed": (openai.InternalServerError, "upstream_error"),
}
ANTHROPIC: Mapping[str, tuple[type[anthropic.APIStatusError], str]] = {
    "throttled": (anthropic.RateLimitError, "rate_limit_error"),
    "overloaded": (anthropic.InternalServerError, "overloaded_error"),
    "too long": (anthropic.BadRequestError, "invalid_request_error"),
    "not let in": (anthropic.InternalServerError, "api_error"),
    "no such model": (anthropic.NotFoundError, "not_found_error"),
    "failed": (anthropic.InternalServerError, "api_error"),
}

Ask = Callable[[World, str], Awaitable[Any]]
HELLO: Any = [{"role": "user", "content": "Hello"}]


async def chat(everywhere: World, model: str) -> Any:
    return await everywhere.openai.chat.completions.create(model=model, messages=HELLO)


async def chat_streamed(everywhere: World, model: str) -> Any:
    return await everywhere.openai.chat.completions.create(model=model, messages=HELLO, stream=True)


async def response(everywhere: World, model: str) -> Any:
    return await everywhere.openai.responses.create(model=model, input="Hello", store=False)


async def response_streamed(everywhere: World, model: str) -> Any:
    return await everywhere.openai.responses.create(model=model, input="Hello", store=False, stream=True)


@pytest.mark.parametrize("place", OTHERS, ids=lambda place: place.name)
@pytest.mark.parametrize("kind", OPENAI)
@pytest.mark.parametrize("ask", [chat, chat_streamed, response, response_streamed], ids=lambda ask: ask.__name__)
async def test_openais_sdk_raises_the_right_exception(everywhere: World, ask: Ask, kind: str, place: Place) -> None:
    expected, code = OPENAI[kind]
    everywhere.fails(place, WORDS[SAME.get(place.provider, place.provider)][kind])
    with pytest.raises(expected) as caught:
        await ask(everywhere, f"{place.name}/talks")
    assert caught.value.code == code
    assert "canary" not in caught.value.response.text
    if kind == "throttled":
        assert 0 < float(caught.value.response.headers["retry-after-ms"]) <= 2000


@pytest.mark.parametrize("place", OTHERS, ids=lambda place: place.name)
@pytest.mark.parametrize("kind", ANTHROPIC)
@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
async def test_anthropics_sdk_raises_the_right_exception(
    everywhere: World, streamed: bool, kind: str, place: Place
) -> None:
    expected, name = ANTHROPIC[kind]
    everywhere.fails(place, WORDS[SAME.get(place.provider, place.provider)][kind])
    asked: Any = {"model": f"{place.name}/talks", "max_tokens": 50, "messages": HELLO, "stream": streamed}
    with pytest.raises(expected) as caught:
        await everywhere.anthropic.messages.create(**asked)
    assert caught.value.type == name
    assert "canary" not in caught.value.response.text
