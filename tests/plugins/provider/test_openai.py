"""The plugin `openai`, through a gateway, in front of a scripted provider."""

from __future__ import annotations

import asyncio
import struct
from base64 import b64decode
from typing import Any

import aiohttp
import orjson
import pytest

from qlens import ConfigError, Target
from qlens.testing import Scripted, check_plugin, running, upstream
from qlens.testing.upstreams import TEXT, USAGE, chat_events, error
from qlens_plugins.provider.openai import OpenAI, OpenAIConfig

CHAT = "/v1/chat/completions"
CANARY = "sk-example-canary0123456789"


def config(base_url: str, **settings: Any) -> str:
    provider = {"plugin": "openai", "base_url": base_url, "api_key": "sk-example-upstream", **settings}
    target = {"provider": "up", "model": "their-name", "params": {"seed": 7}}
    content = {
        "pipeline": {"auth": [{"plugin": "anonymous"}]},
        "providers": {"up": {name: value for name, value in provider.items() if value is not None}},
        "models": {"ours": {"max_output_tokens": 1000, "targets": [target]}},
    }
    return orjson.dumps(content).decode()


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "ours", "messages": [{"role": "user", "content": "Hello"}], **fields}


def test_it_keeps_the_contract_of_its_stage() -> None:
    check_plugin("provider", OpenAI)


async def test_call_goes_out_with_the_targets_name_and_the_gateways_key() -> None:
    async with upstream() as up, running(config(up.url + "/")) as gateway:
        answer = await gateway.post(CHAT, chat(unknown_field=1), key="sk-example-client")
        (request,) = up.requests
        assert answer.status == 200
        assert answer.json()["choices"][0]["message"]["content"] == TEXT
        assert (request.method, request.path) == ("POST", CHAT)
        assert request.body == {**chat(unknown_field=1), "model": "their-name", "seed": 7}
        assert request.headers["authorization"] == "Bearer sk-example-upstream"
        (receipt,) = await gateway.settled(1)
        assert (receipt.usage.prompt, receipt.usage.completion) == (USAGE["prompt_tokens"], USAGE["completion_tokens"])
        assert receipt.attempts[0].upstream_id == "req-upstream"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"model": "ours", "prompt": "Hello"}),
        ("/v1/embeddings", {"model": "ours", "input": "Hello"}),
    ],
)
async def test_every_operation_has_its_path(path: str, body: dict[str, Any]) -> None:
    async with upstream() as up, running(config(up.url)) as gateway:
        assert (await gateway.post(path, body)).status == 200
        assert up.requests[0].path == path


async def test_packed_embeddings_arrive_packed() -> None:
    async with upstream() as up, running(config(up.url)) as gateway:
        body = {"model": "ours", "input": ["a", "b"], "encoding_format": "base64"}
        answer = await gateway.post("/v1/embeddings", body)
        vectors = [struct.unpack("<3f", b64decode(entry["embedding"])) for entry in answer.json()["data"]]
        assert vectors == [pytest.approx((0.6, 0.0, -0.8))] * 2


@pytest.mark.parametrize("has", [True, False])
def test_server_without_responses_is_not_asked_for_them(has: bool) -> None:
    provider = OpenAI(OpenAIConfig(responses=has), "up")
    spoken = provider.dialects(Target("up", "their-name", "ours"))
    assert ("responses" in spoken) is has
    assert {"chat", "embeddings"} < {*spoken, "responses"}


@pytest.mark.parametrize(
    ("model", "base_model", "settings", "chats"),
    [
        ("gpt-5.1-codex-max", None, {}, False),
        ("gpt-5-pro-2025-10-06", None, {}, False),
        ("o4-mini-deep-research", None, {}, False),
        ("computer-use-preview", None, {}, False),
        ("gpt-5.1", None, {}, True),
        ("their-name", "o3-pro", {}, False),
        # Another server may well speak chat for a model of that name, and has Responses or not.
        ("gpt-5.1-codex", None, {"base_url": "http://127.0.0.1:1/v1"}, True),
        ("gpt-5.1-codex", None, {"base_url": "http://127.0.0.1:1/v1", "responses_only": ["gpt-5.1*"]}, False),
        ("their-name", "o3-pro", {"base_url": "http://127.0.0.1:1/v1", "responses": False}, True),
    ],
)
def test_which_models_have_no_chat(model: str, base_model: str | None, settings: dict[str, Any], chats: bool) -> None:
    spoken = OpenAI(OpenAIConfig(**settings), "up").dialects(Target("up", model, "ours", base_model=base_model))
    assert ("chat" in spoken) is chats
    assert "embeddings" in spoken


@pytest.mark.parametrize(
    ("base_url", "model", "completes"),
    [
        ("https://api.openai.com/v1", "gpt-4o", False),
        ("https://api.openai.com/v1", "gpt-3.5-turbo", False),
        ("https://api.openai.com/v1", "gpt-3.5-turbo-instruct-0914", True),
        ("https://api.openai.com/v1", "ft:davinci-002:acme::a1", True),
        ("http://127.0.0.1:8000/v1", "gpt-4o", True),
    ],
)
def test_openai_itself_is_asked_for_completions_of_the_models_that_have_them(
    base_url: str, model: str, completes: bool
) -> None:
    spoken = OpenAI(OpenAIConfig(base_url=base_url), "up").dialects(Target("up", model, "ours"))
    assert ("completions" in spoken) is completes
    assert "chat" in spoken


async def test_nothing_of_the_clients_headers_goes_out() -> None:
    sent = {"cookie": "a=b", "x-api-key": "client", "x-forwarded-for": "1.2.3.4", "openai-organization": "client"}
    async with upstream() as up, running(config(up.url)) as gateway:
        await gateway.post(CHAT, chat(), key="sk-example-client", headers=sent)
        received = up.requests[0].headers
        assert not {*sent} & {name.lower() for name in received}
        assert "client" not in "".join(received.values())


async def test_organization_project_and_more_headers_are_sent() -> None:
    settings = {"organization": "org-a", "project": "proj-b", "headers": {"X-Title": "QLens"}}
    async with upstream() as up, running(config(up.url, **settings)) as gateway:
        await gateway.post(CHAT, chat())
        sent = up.requests[0].headers
        assert (sent["openai-organization"], sent["openai-project"], sent["x-title"]) == ("org-a", "proj-b", "QLens")


async def test_server_without_keys_gets_none() -> None:
    async with upstream() as up, running(config(up.url, api_key=None)) as gateway:
        assert (await gateway.post(CHAT, chat(), key="sk-example-client")).status == 200
        assert "authorization" not in up.requests[0].headers


@pytest.mark.parametrize("asked", [True, False])
async def test_usage_of_a_stream_is_known_whether_the_client_asks_or_not(asked: bool) -> None:
    async with upstream() as up, running(config(up.url)) as gateway:
        options = {"stream_options": {"include_usage": True}} if asked else {}
        answer = await gateway.post(CHAT, chat(stream=True, **options))
        *events, end = answer.events()
        assert end == "[DONE]"
        assert any(not event["choices"] for event in events) is asked
        text = "".join(event["choices"][0]["delta"].get("content", "") for event in events if event["choices"])
        assert text == TEXT
        (receipt,) = await gateway.settled(1)
        assert (receipt.outcome, receipt.usage.completion) == ("complete", USAGE["completion_tokens"])
        assert up.requests[0].body["stream_options"] == {"include_usage": True}


async def test_server_that_refuses_stream_options_is_not_sent_them() -> None:
    async with upstream() as up, running(config(up.url, stream_options=False)) as gateway:
        answer = await gateway.post(CHAT, chat(stream=True, stream_options={"include_usage": True}))
        assert answer.events()[-1] == "[DONE]"
        assert "stream_options" not in up.requests[0].body
        (receipt,) = await gateway.settled(1)
        assert receipt.outcome == "complete"
        assert receipt.usage.source != "provider"


@pytest.mark.parametrize("stream", [True, False])
async def test_refused_key_is_the_gateways_fault_and_stays_its_secret(stream: bool) -> None:
    async with upstream() as up, running(config(up.url, api_key=CANARY)) as gateway:
        up.script(error(401, f"Incorrect API key provided: {CANARY}.", code="invalid_api_key"))
        answer = await gateway.post(CHAT, chat(stream=stream))
        assert (answer.status, answer.json()["error"]["code"]) == (502, "upstream_auth_error")
        assert "canary" not in answer.text + str(dict(answer.headers))


async def test_rejected_request_keeps_the_providers_words() -> None:
    async with upstream() as up, running(config(up.url)) as gateway:
        up.script(error(400, "'temperature' must be at most 2.", param="temperature", code="invalid_value"))
        answer = await gateway.post(CHAT, chat())
        assert answer.status == 400
        assert answer.json()["error"] == {
            "message": "'temperature' must be at most 2.",
            "type": "invalid_request_error",
            "param": "temperature",
            "code": "invalid_value",
        }


async def test_providers_wait_reaches_the_client() -> None:
    async with upstream() as up, running(config(up.url)) as gateway:
        up.script(Scripted(status=429, headers={"retry-after-ms": "1500"}, body={"error": {"message": "x"}}))
        answer = await gateway.post(CHAT, chat())
        assert answer.status == 429
        assert answer.headers["retry-after-ms"] == "1500"


async def test_cut_stream_ends_with_an_error_and_no_end_mark() -> None:
    async with upstream() as up, running(config(up.url)) as gateway:
        up.script(Scripted(events=chat_events(), cut_at=700, gap=0.01))
        answer = await gateway.post(CHAT, chat(stream=True))
        *_, last = answer.events()
        assert (answer.status, last["error"]["code"]) == (200, "upstream_truncated")
        assert "[DONE]" not in answer.text
        (receipt,) = await gateway.settled(1)
        assert receipt.outcome == "failed"


@pytest.mark.parametrize("stream", [True, False])
async def test_client_that_leaves_stops_the_provider(stream: bool) -> None:
    async with upstream() as up, running(config(up.url)) as gateway:
        up.script(Scripted(events=chat_events()[:3], hang=True) if stream else Scripted(hang=True))
        async with aiohttp.ClientSession() as client:
            calling = asyncio.create_task(_first_byte(client, gateway.url + CHAT, chat(stream=stream)))
            (request,) = await up.arrived(1)
            await asyncio.sleep(0.05)
            calling.cancel()
            with pytest.raises(asyncio.CancelledError):
                await calling
        await asyncio.wait_for(request.closed.wait(), 5)
        (receipt,) = await gateway.settled(1)
        assert receipt.outcome == "abandoned"


async def _first_byte(client: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> None:
    async with client.post(url, json=body) as answer:
        await answer.content.readany()
        await asyncio.Event().wait()


async def test_silent_provider_times_out() -> None:
    async with upstream() as up, running(config(up.url, first_byte_seconds=0.1)) as gateway:
        up.script(Scripted(hang=True))
        answer = await gateway.post(CHAT, chat())
        assert (answer.status, answer.json()["error"]["code"]) == (504, "upstream_timeout")
        await asyncio.wait_for(up.requests[0].closed.wait(), 5)


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"base_url": "api.openai.com/v1"}, "providers.up.base_url"),
        ({"base_url": "https://x.example/v1?key=1"}, "providers.up.base_url"),
        ({"api_key": f"{CANARY}\n"}, "providers.up.api_key"),
        ({"organization": "ä"}, "providers.up.organization"),
        ({"headers": {"Host": "x"}}, "providers.up.headers"),
        ({"headers": {"x y": "x"}}, "providers.up.headers"),
        ({"headers": {"x-key": f"{CANARY}\r\nx: y"}}, "providers.up.headers"),
        ({"idle_seconds": 0}, "providers.up.idle_seconds"),
    ],
)
async def test_wrong_setting_is_a_fault_with_its_path_and_without_secrets(settings: dict[str, Any], fault: str) -> None:
    with pytest.raises(ConfigError) as caught:
        async with running(config(**{"base_url": "https://x.example/v1", **settings})):
            pass
    assert fault in str(caught.value)
    assert "canary" not in str(caught.value)
