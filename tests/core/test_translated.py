"""Bridges inside a gateway: what reaches the provider, and what a client is told when something cannot."""

from __future__ import annotations

from typing import Any

import pytest
from bedrocks import CLAUDE, STATIC
from yamls import config

from qlens.bridges import params
from qlens.testing import running, upstream
from qlens.testing.anthropic import KEY, MODEL, anthropic
from qlens.testing.bedrock import bedrock

MESSAGE = {"role": "user", "content": [{"type": "text", "text": "Hi", "cache_control": {"type": "ephemeral"}}]}


async def test_a_chat_provider_gets_nothing_that_only_claude_knows() -> None:
    async with upstream() as server:
        providers = {"one": {"plugin": "openai", "base_url": server.url, "api_key": "sk-example-a"}}
        models = {"m": {"max_output_tokens": 100, "targets": [{"provider": "one", "model": "gpt"}]}}
        async with running(config({}, providers, models)) as gateway:
            body: dict[str, Any] = {"model": "m", "max_tokens": 5, "messages": [MESSAGE], "top_k": 3}
            assert (await gateway.post("/v1/messages", body)).status == 200
        (sent,) = server.requests
        assert "cache_control" not in str(sent.body)
        assert "top_k" not in sent.body


async def test_a_bridge_never_asks_for_more_than_the_model_may_generate() -> None:
    async with anthropic() as server:
        providers = {"claude": {"plugin": "anthropic", "base_url": server.url, "api_key": KEY}}
        models = {"m": {"max_output_tokens": 77, "targets": [{"provider": "claude", "model": MODEL}]}}
        async with running(config({}, providers, models)) as gateway:
            body = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
            answer = await gateway.post("/v1/chat/completions", body)
            assert answer.status == 200, answer.text
        (sent,) = server.requests
        assert sent.body["max_tokens"] == 77


async def test_an_operators_params_are_in_the_providers_words() -> None:
    models = {"m": {"max_output_tokens": 9, "targets": [{"provider": "echo", "model": "x", "params": {"token_ms": 1}}]}}
    async with running(config({}, {"echo": {"plugin": "echo"}}, models)) as gateway:
        answer = await gateway.post("/v1/responses", {"model": "m", "input": "Hello"})
        assert answer.status == 200, answer.text


async def test_a_refusal_of_a_bridge_names_the_provider() -> None:
    models = {"m": {"max_output_tokens": 9, "targets": [{"provider": "echo", "model": "x"}]}}
    async with running(config({}, {"echo": {"plugin": "echo"}}, models)) as gateway:
        answer = await gateway.post("/v1/responses", {"model": "m", "background": True, "input": "Hello"})
        assert answer.status == 400
        assert "The provider echo of the model `m`" in answer.json()["error"]["message"]


NO_IMAGE = "data:image/tiff;base64,AAAA"
IMAGE = {"type": "input_image", "image_url": NO_IMAGE}
SOURCE = {"type": "base64", "media_type": "image/tiff", "data": "AAAA"}
RECURSIVE = {"type": "object", "properties": {"a": {"$ref": "#"}}}
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("/v1/responses", {"input": [{"role": "user", "content": [IMAGE]}]}, "input"),
    ("/v1/responses", {"input": "x", "top_logprobs": 3}, "top_logprobs"),
    ("/v1/responses", {"input": "x", "include": ["message.output_text.logprobs"]}, "top_logprobs"),
]


@pytest.mark.parametrize("provider", ["aws", "claude"])
@pytest.mark.parametrize(("path", "asked", "param"), REFUSED)
async def test_what_is_refused_behind_a_bridge_has_the_clients_name(
    provider: str, path: str, asked: dict[str, Any], param: str
) -> None:
    async with bedrock() as aws, anthropic() as server:
        providers = {
            "aws": {"plugin": "bedrock", "region": "us-east-1", "endpoint": aws.root, **STATIC},
            "claude": {"plugin": "anthropic", "base_url": server.url, "api_key": KEY},
        }
        model = CLAUDE if provider == "aws" else MODEL
        models = {"m": {"max_output_tokens": 100, "targets": [{"provider": provider, "model": model}]}}
        async with running(config({}, providers, models)) as gateway:
            answer = await gateway.post(path, {"model": "m", **asked})
            assert (answer.status, answer.json()["error"]["param"]) == (400, param), answer.text


async def test_a_message_that_a_provider_of_chat_refuses_is_told_in_messages_words() -> None:
    async with bedrock() as aws:
        providers = {"aws": {"plugin": "bedrock", "region": "us-east-1", "endpoint": aws.root, **STATIC}}
        models = {"m": {"max_output_tokens": 100, "targets": [{"provider": "aws", "model": CLAUDE}]}}
        async with running(config({}, providers, models)) as gateway:
            messages = [{"role": "user", "content": [{"type": "image", "source": SOURCE}]}]
            answer = await gateway.post("/v1/messages", {"model": "m", "max_tokens": 9, "messages": messages})
            assert answer.json()["error"]["message"].startswith("messages: The provider takes images")
            body = {"model": "m", "max_tokens": 9, "messages": [MESSAGE], "tools": [{"name": "f", "input_schema": 5}]}
            assert "tools[0].input_schema" in (await gateway.post("/v1/messages", body)).json()["error"]["message"]
            body["tools"] = [{"name": "f", "input_schema": RECURSIVE}]
            answer = await gateway.post("/v1/messages", body)
            assert answer.json()["error"]["message"].startswith("tools[0].input_schema: "), answer.text


@pytest.mark.parametrize(
    ("dialect", "theirs", "ours"),
    [
        ("responses", "max_completion_tokens", "max_output_tokens"),
        ("responses", "response_format.json_schema.schema", "text.format"),
        ("responses", "tools[12].function.parameters", "tools[12].parameters"),
        ("responses", "tool_choice.function.name", "tool_choice.name"),
        ("responses", "temperature", "temperature"),
        ("messages", "stop", "stop_sequences"),
        ("messages", "tools[0].function.parameters.a", "tools[0].input_schema.a"),
        ("completions", "messages[0].content", "prompt"),
        ("chat", "messages[0].content", "messages[0].content"),
        ("responses", None, None),
    ],
)
def test_each_field_has_its_name_in_each_dialect(dialect: str, theirs: str | None, ours: str | None) -> None:
    assert params.asked(dialect, theirs) == ours


async def test_a_client_that_says_the_same_words_is_quoted_as_it_is() -> None:
    models = {"m": {"max_output_tokens": 9, "targets": [{"provider": "echo", "model": "x"}]}}
    async with running(config({}, {"echo": {"plugin": "echo"}}, models)) as gateway:
        words = "The provider of this model"
        answer = await gateway.post("/v1/responses", {"model": "m", "input": "Hello", words: True})
        assert answer.status == 400
        message = answer.json()["error"]["message"]
        assert message.startswith(f"Unsupported parameter: '{words}'. The provider echo of the model `m` does not have")


async def test_an_unknown_path_under_messages_is_refused_in_anthropics_words() -> None:
    async with running(config()) as gateway:
        answer = await gateway.post("/v1/messages/nowhere", {})
        assert (answer.status, answer.json()["type"]) == (404, "error")
        answer = await gateway.post("/v1/messages", {"model": "gpt-4o-mini", "max_tokens": "x", "messages": []})
        assert "max_tokens" in answer.json()["error"]["message"]
