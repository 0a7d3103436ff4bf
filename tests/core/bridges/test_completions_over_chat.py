"""Legacy completions on a provider of chats, through a gateway and the official SDK."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import openai
import pytest
from yamls import config

from qlens.testing import Running, Scripted, running, upstream
from qlens.testing.anthropic import KEY, MODEL, anthropic
from qlens.testing.upstreams import TEXT, FakeUpstream, chat_events

CHATTER = """
from qlens_plugins.provider.openai import OpenAI


class Chatter(OpenAI):
    def dialects(self, target):
        return ("chat",)
"""


@asynccontextmanager
async def served() -> AsyncIterator[tuple[Running, FakeUpstream, openai.AsyncOpenAI]]:
    async with upstream() as up, anthropic() as claude:
        providers = {
            "chat": {"plugin": "chatter:Chatter", "base_url": up.url},
            "claude": {"plugin": "anthropic", "base_url": claude.url, "api_key": KEY},
        }
        models = {
            "m": {"max_output_tokens": 100, "targets": [{"provider": "chat", "model": "gpt"}]},
            "claude": {"max_output_tokens": 100, "targets": [{"provider": "claude", "model": MODEL}]},
        }
        async with (
            running(config({}, providers, models), files={"chatter.py": CHATTER}) as gateway,
            openai.AsyncOpenAI(api_key="sk-example-c", base_url=f"{gateway.url}/v1", max_retries=0) as client,
        ):
            yield gateway, up, client


async def test_a_completion_and_its_stream_say_the_same() -> None:
    async with served() as (gateway, up, client):
        whole = await client.completions.create(model="m", prompt="Hello", max_tokens=9, stop=["x"], n=1)
        assert (whole.object, whole.choices[0].text, whole.choices[0].finish_reason) == (
            "text_completion",
            TEXT,
            "stop",
        )
        stream = await client.completions.create(
            model="m", prompt=["Hello"], stream=True, stream_options={"include_usage": True}
        )
        parts = [part async for part in stream]
        assert "".join(choice.text for part in parts for choice in part.choices) == TEXT
        assert parts[-1].usage is not None
        assert {part.object for part in parts} == {"text_completion"}
        first, second = up.requests
        assert first.body == {
            "model": "gpt",
            "messages": [{"role": "user", "content": "Hello"}],
            "max_tokens": 9,
            "stop": ["x"],
            "n": 1,
        }
        assert second.body["stream_options"] == {"include_usage": True}
        receipts = await gateway.settled(2)
        ended = [(receipt.operation, receipt.outcome, receipt.usage.source) for receipt in receipts]
        assert ended == [("completions", "complete", "provider")] * 2


async def test_a_model_that_speaks_only_messages_completes_too() -> None:
    async with served() as (_, _, client):
        whole = await client.completions.create(model="claude", prompt="Hello")
        stream = await client.completions.create(model="claude", prompt="Hello", stream=True)
        text = "".join([choice.text async for part in stream for choice in part.choices])
        assert text == whole.choices[0].text != ""


@pytest.mark.parametrize(
    ("param", "value"),
    [("prompt", ["a", "b"]), ("prompt", [1, 2]), ("suffix", "x"), ("echo", True), ("logprobs", 2), ("best_of", 2)],
)
async def test_what_chat_does_not_have_is_refused_by_name(param: str, value: Any) -> None:
    async with served() as (_, up, client):
        with pytest.raises(openai.BadRequestError) as raised:
            await client.completions.create(**{"model": "m", "prompt": "Hello", param: value})
        assert raised.value.param == param
        assert "The provider chat of the model `m`" in raised.value.message
        assert not up.requests


async def test_a_stream_that_stops_is_no_success() -> None:
    async with served() as (gateway, up, client):
        up.script(Scripted(events=chat_events(TEXT)[:3]))
        stream = await client.completions.create(model="m", prompt="Hello", stream=True)
        with pytest.raises(openai.APIError):
            async for _ in stream:
                pass
        (receipt,) = await gateway.settled(1)
        assert receipt.outcome == "failed"
