"""Realtime sessions of OpenAI's own Python SDK, unchanged, against a gateway in front of OpenAI or Azure."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import pytest
from openai import AsyncAzureOpenAI, AsyncOpenAI
from websockets.exceptions import InvalidStatus
from yamls import config

from qlens.testing import Running, running
from qlens.testing.realtime import KEY, TEXT, FakeRealtime, realtime
from qlens.usage import Usage

ANSWER = Usage(input=30, cached_input=30, output=20, audio_in=60, audio_out=30, source="provider")
PROVIDERS = {
    "openai": lambda up: {"plugin": "openai", "base_url": up.url, "api_key": KEY},
    "azure classic": lambda up: {"plugin": "azure_openai", "endpoint": up.root, "api_key": KEY},
    "azure v1": lambda up: {"plugin": "azure_openai", "endpoint": up.root, "api_key": KEY, "surface": "v1"},
}


@asynccontextmanager
async def gateway_before(
    up: FakeRealtime, provider: str = "openai", pipeline: Mapping[str, Any] | None = None
) -> AsyncIterator[Running]:
    """A gateway with one model, `voice`."""
    target = {"provider": "cloud", "model": "gpt-realtime", "base_model": "gpt-realtime"}
    async with running(
        config(pipeline or {}, {"cloud": PROVIDERS[provider](up)}, {"voice": {"targets": [target]}})
    ) as gateway:
        yield gateway


@pytest.mark.parametrize("provider", PROVIDERS)
async def test_a_conversation_in_text_and_audio_is_the_same_before_every_provider(provider: str) -> None:
    async with realtime() as up, gateway_before(up, provider) as gateway:
        client = AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="sk-example-a")
        async with client, client.realtime.connect(model="voice") as connection:
            created = await connection.recv()
            assert created.type == "session.created"
            await connection.session.update(session={"type": "realtime", "instructions": "Be brief."})
            assert (await connection.recv()).type == "session.updated"
            await connection.conversation.item.create(
                item={"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hello"}]}
            )
            await connection.input_audio_buffer.append(audio="AAAA")
            await connection.input_audio_buffer.commit()
            await connection.response.create()
            text = ""
            async for event in connection:
                if event.type in {"response.output_text.delta", "response.text.delta"}:
                    text += getattr(event, "delta", "")
                if event.type == "response.done":
                    assert event.response.usage is not None
                    assert event.response.usage.total_tokens == 170
                    break
            assert text == TEXT
        (receipt,) = await gateway.settled(1)
        assert receipt.outcome == "complete"
        assert receipt.usage == Usage(
            **{name: getattr(ANSWER, name) for name in ("input", "cached_input", "output", "audio_in", "audio_out")},
            meters={"transcribed_seconds": 2},
            source="provider",
        )
        assert [event["type"] for event in up.sessions[0].events][-1] == "response.create"


async def test_azures_own_client_finds_its_path() -> None:
    async with realtime() as up, gateway_before(up) as gateway:
        client = AsyncAzureOpenAI(
            azure_endpoint=gateway.url,
            websocket_base_url=f"{gateway.url.replace('http', 'ws')}/openai",
            api_key="sk-example-a",
            api_version="2025-04-01-preview",
        )
        async with client, client.realtime.connect(model="voice") as connection:
            assert (await connection.recv()).type == "session.created"
        (receipt,) = await gateway.settled(1)
        assert (receipt.operation, receipt.outcome) == ("realtime", "complete")


async def test_what_is_refused_before_the_session_is_an_answer_of_http() -> None:
    auth = {"auth": [{"plugin": "realtimes:Keys"}]}
    async with realtime() as up, gateway_before(up, pipeline=auth) as gateway:
        for key, model, status in (("sk-example-wrong", "voice", 401), ("sk-example-right", "nothing", 404)):
            client = AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key=key, max_retries=0)
            with pytest.raises(InvalidStatus) as refused:
                async with client, client.realtime.connect(model=model):
                    pass
            assert refused.value.response.status_code == status
            assert b'"error"' in (refused.value.response.body or b"")


async def test_an_error_event_is_an_event_and_the_session_goes_on() -> None:
    async with realtime() as up, gateway_before(up) as gateway:
        client = AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="sk-example-a")
        async with client, client.realtime.connect(model="voice") as connection:
            await connection.recv()
            await connection.response.cancel()
            error = await connection.recv()
            assert error.type == "error"
            assert error.error.code == "response_cancel_not_active"
            await connection.response.create()
            assert (await connection.recv()).type == "response.created"
