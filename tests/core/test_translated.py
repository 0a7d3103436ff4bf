"""Bridges inside a gateway: what reaches the provider, and what a client is told when something cannot."""

from __future__ import annotations

from typing import Any

from yamls import config

from qlens.testing import running, upstream
from qlens.testing.anthropic import KEY, MODEL, anthropic

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
