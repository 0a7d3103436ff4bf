"""The plugin `azure_openai`, through a gateway, in front of a scripted provider."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from qlens import ConfigError
from qlens.testing import Scripted, check_plugin, running, upstream
from qlens.testing.upstreams import TEXT, USAGE, Event, chat_events, error
from qlens_plugins.provider.azure_openai import AzureOpenAI

CHAT = "/v1/chat/completions"
HEAD = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "gpt-4o-2024-11-20"}
FILTERED = {"hate": {"filtered": False, "severity": "safe"}}


def config(endpoint: str, *, deployment: str = "my-deployment", base_model: str | None = None, **settings: Any) -> str:
    provider = {"plugin": "azure_openai", "endpoint": endpoint, "api_key": "example-azure-key", **settings}
    target = {"provider": "azure", "model": deployment, **({"base_model": base_model} if base_model else {})}
    content = {
        "pipeline": {"auth": [{"plugin": "anonymous"}]},
        "providers": {"azure": provider},
        "models": {"ours": {"max_output_tokens": 1000, "targets": [target]}},
    }
    return orjson.dumps(content).decode()


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "ours", "messages": [{"role": "user", "content": "Hello"}], **fields}


def test_it_keeps_the_contract_of_its_stage() -> None:
    check_plugin("provider", AzureOpenAI)


@pytest.mark.parametrize(
    ("settings", "path", "query"),
    [
        ({}, "/openai/deployments/my-deployment/chat/completions", {"api-version": "2024-10-21"}),
        (
            {"api_version": "2025-04-01-preview"},
            "/openai/deployments/my-deployment/chat/completions",
            {"api-version": "2025-04-01-preview"},
        ),
        (
            {"deployment": "a/b c%ü"},
            "/openai/deployments/a%2Fb%20c%25%C3%BC/chat/completions",
            {"api-version": "2024-10-21"},
        ),
        ({"surface": "v1"}, "/openai/v1/chat/completions", {}),
        ({"surface": "v1", "api_version": "preview"}, "/openai/v1/chat/completions", {"api-version": "preview"}),
    ],
)
async def test_each_surface_has_its_address(settings: dict[str, Any], path: str, query: dict[str, str]) -> None:
    async with upstream() as up, running(config(up.root + "/", **settings)) as gateway:
        answer = await gateway.post(CHAT, chat(), key="sk-example-client")
        (request,) = up.requests
        assert answer.json()["choices"][0]["message"]["content"] == TEXT
        assert (request.path, request.query) == (path, query)
        assert request.body["model"] == settings.get("deployment", "my-deployment")
        assert request.headers["api-key"] == "example-azure-key"
        assert "authorization" not in request.headers


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("completions", {"model": "ours", "prompt": "Hello"}),
        ("embeddings", {"model": "ours", "input": "Hello"}),
    ],
)
async def test_classic_surface_serves_every_operation(path: str, body: dict[str, Any]) -> None:
    async with upstream() as up, running(config(up.root)) as gateway:
        assert (await gateway.post(f"/v1/{path}", body)).status == 200
        assert up.requests[0].path == f"/openai/deployments/my-deployment/{path}"


@pytest.mark.parametrize("base_model", ["o1", "o3-mini", "O4-mini-2025-04-16", "gpt-5", "gpt-5.1-codex", "gpt-12-pro"])
async def test_max_tokens_is_renamed_for_reasoning_models(base_model: str) -> None:
    async with upstream() as up, running(config(up.root, base_model=base_model)) as gateway:
        await gateway.post(CHAT, chat(max_tokens=50))
        assert up.requests[0].body["max_completion_tokens"] == 50
        assert "max_tokens" not in up.requests[0].body


@pytest.mark.parametrize("base_model", [None, "gpt-4o", "gpt-4.1", "gpt-35-turbo", "omni", "gpt-oss-120b"])
async def test_max_tokens_stays_for_other_models(base_model: str | None) -> None:
    deployment = "gpt-5-is-only-a-name"
    async with upstream() as up, running(config(up.root, deployment=deployment, base_model=base_model)) as gateway:
        await gateway.post(CHAT, chat(max_tokens=50))
        assert up.requests[0].body["max_tokens"] == 50
        assert "max_completion_tokens" not in up.requests[0].body


async def test_clients_own_max_completion_tokens_wins_over_max_tokens() -> None:
    async with upstream() as up, running(config(up.root, base_model="o3")) as gateway:
        await gateway.post(CHAT, chat(max_tokens=50, max_completion_tokens=40))
        body = up.requests[0].body
        assert body["max_completion_tokens"] == 40
        assert "max_tokens" not in body


def _asynchronous_filter() -> list[Event]:
    nameless = {"id": "", "object": "", "created": 0, "model": ""}
    offsets = {"check_offset": 0, "start_offset": 0, "end_offset": 5}
    results = {"index": 0, "finish_reason": None, "content_filter_results": FILTERED, "content_filter_offsets": offsets}
    usage = {**HEAD, "choices": [], "usage": USAGE}
    return [
        {**nameless, "choices": [], "prompt_filter_results": [{"prompt_index": 0, "content_filter_results": FILTERED}]},
        {**HEAD, "choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]},
        {**HEAD, "choices": [{"index": 0, "delta": {"content": "Hello"}, "finish_reason": None}]},
        {**nameless, "choices": [results]},
        {**HEAD, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]},
        {**nameless, "choices": [results]},
        usage,
    ]


@pytest.mark.parametrize("ending", [["[DONE]"], []])
@pytest.mark.parametrize("split", [None, 1, 50])
async def test_odd_events_of_the_asynchronous_filter_are_mended(split: int | None, ending: list[Event]) -> None:
    async with upstream() as up, running(config(up.root)) as gateway:
        up.script(Scripted(events=_asynchronous_filter() + ending, split=split))
        answer = await gateway.post(CHAT, chat(stream=True))
        *events, end = answer.events()
        assert end == "[DONE]"
        assert all(event["choices"] for event in events)
        assert all("delta" in choice for event in events for choice in event["choices"])
        assert "".join(event["choices"][0]["delta"].get("content", "") for event in events) == "Hello"
        assert sum(event["choices"][0].get("content_filter_results") == FILTERED for event in events) == 2
        (receipt,) = await gateway.settled(1)
        assert (receipt.outcome, receipt.usage.completion) == ("complete", USAGE["completion_tokens"])


async def test_stream_without_oddities_passes_byte_for_byte() -> None:
    events = chat_events()
    async with upstream() as up, running(config(up.root)) as gateway:
        up.script(Scripted(events=events))
        answer = await gateway.post(CHAT, chat(stream=True))
        assert answer.events() == events


@pytest.mark.parametrize(
    ("scripted", "status", "code"),
    [
        (
            Scripted(status=401, body={"statusCode": 401, "message": "Access denied: canary"}),
            502,
            "upstream_auth_error",
        ),
        (error(401, "canary", code="401"), 502, "upstream_auth_error"),
        (error(403, "canary", code="AccessDenied"), 502, "upstream_auth_error"),
        (error(404, "canary", code="DeploymentNotFound"), 404, "model_not_found"),
        (error(404, "Resource not found: canary", code="404"), 404, "model_not_found"),
        (error(429, "canary", code="RateLimitReached"), 429, "rate_limit_exceeded"),
        (Scripted(status=502, body=b"<html>canary</html>"), 502, "upstream_error"),
    ],
)
async def test_azures_errors_become_openais(scripted: Scripted, status: int, code: str) -> None:
    async with upstream() as up, running(config(up.root)) as gateway:
        up.script(scripted)
        answer = await gateway.post(CHAT, chat())
        assert (answer.status, answer.json()["error"]["code"]) == (status, code)
        assert "canary" not in answer.text


async def test_blocked_prompt_is_a_content_filter_error_without_the_verdict() -> None:
    verdict = {"code": "ResponsibleAIPolicyViolation", "content_filter_result": FILTERED}
    told = error(
        400, "The response was filtered.", type=None, param="prompt", code="content_filter", innererror=verdict
    )
    async with upstream() as up, running(config(up.root)) as gateway:
        up.script(told)
        answer = await gateway.post(CHAT, chat())
        assert answer.status == 400
        assert answer.json()["error"] == {
            "message": "The response was filtered.",
            "type": "invalid_request_error",
            "param": "prompt",
            "code": "content_filter",
        }


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"endpoint": "x.openai.azure.com"}, "providers.azure.endpoint"),
        ({"endpoint": "https://x.openai.azure.com/openai/v1/"}, "providers.azure.endpoint"),
        ({"api_key": "sk-example-canary\n"}, "providers.azure.api_key"),
        ({"surface": "v2"}, "providers.azure.surface"),
        ({"connect_seconds": -1}, "providers.azure.connect_seconds"),
    ],
)
async def test_wrong_setting_is_a_fault_with_its_path_and_without_secrets(settings: dict[str, Any], fault: str) -> None:
    with pytest.raises(ConfigError) as caught:
        async with running(config(**{"endpoint": "https://x.openai.azure.com", **settings})):
            pass
    assert fault in str(caught.value)
    assert "canary" not in str(caught.value)
