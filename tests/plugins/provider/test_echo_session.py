"""Realtime sessions with the echo, for OpenAI's SDK as with a real provider."""

from __future__ import annotations

import openai
import pytest
from openai import AsyncOpenAI
from websockets.exceptions import InvalidStatus
from yamls import config

from qlens.testing import running
from qlens.usage import Usage

ECHO = {"echo": {"plugin": "echo"}}
MODELS = {
    "voice": {"targets": [{"provider": "echo", "model": "any"}]},
    "broken": {"targets": [{"provider": "echo", "model": "any", "params": {"fail_status": 429, "retry_after": 1}}]},
}


async def test_each_answer_is_the_last_text_and_its_prompt_all_that_was_said() -> None:
    async with running(config({}, ECHO, MODELS)) as gateway:
        client = AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="sk-example-a")
        async with client, client.realtime.connect(model="voice") as connection:
            assert (await connection.recv()).type == "session.created"
            said, used = [], []
            for text in ("Hello you", "Good bye"):
                await connection.conversation.item.create(
                    item={"type": "message", "role": "user", "content": [{"type": "input_text", "text": text}]}
                )
                await connection.response.create()
                piece = ""
                async for event in connection:
                    if event.type == "response.output_text.delta":
                        piece += event.delta
                    if event.type == "response.done":
                        assert event.response.usage is not None
                        used.append((event.response.usage.input_tokens, event.response.usage.output_tokens))
                        break
                said.append(piece)
            assert said == ["Hello you", "Good bye"]
            assert used == [(2, 2), (6, 2)]
        (receipt,) = await gateway.settled(1)
        assert (receipt.outcome, receipt.usage) == ("complete", Usage(input=8, output=4, source="provider"))


async def test_what_it_does_not_know_is_an_error_and_the_session_goes_on() -> None:
    async with (
        running(config({}, ECHO, MODELS)) as gateway,
        gateway.session.ws_connect(f"{gateway.url}/v1/realtime?model=voice") as socket,
    ):
        assert (await socket.receive_json())["type"] == "session.created"
        for event in ("no json", "[]", '{"type": "input_audio_buffer.append"}', '{"type": "session.update"}'):
            await socket.send_str(event)
            assert (await socket.receive_json())["error"]["code"] == "invalid_value"
        await socket.send_json({"type": "session.update", "session": {"instructions": "Be brief."}})
        assert (await socket.receive_json())["session"]["instructions"] == "Be brief."


async def test_a_target_that_is_told_to_fail_opens_no_session() -> None:
    async with running(config({}, ECHO, MODELS)) as gateway:
        client = AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="sk-example-a")
        with pytest.raises((InvalidStatus, openai.OpenAIError)) as refused:
            async with client, client.realtime.connect(model="broken"):
                pass
        assert "429" in str(refused.value)
