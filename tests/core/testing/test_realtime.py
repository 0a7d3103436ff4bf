"""The fake provider of realtime sessions is as strict as the real ones."""

from __future__ import annotations

from typing import Any

import aiohttp
import orjson
import pytest

from qlens.testing.realtime import KEY, FakeRealtime, realtime

BEARER = {"authorization": f"Bearer {KEY}"}


async def _refused(up: FakeRealtime, path: str, headers: dict[str, str]) -> int:
    async with aiohttp.ClientSession() as http:
        try:
            async with http.ws_connect(up.root + path, headers=headers):
                return 101
        except aiohttp.WSServerHandshakeError as refused:
            return refused.status


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/v1/realtime?model=gpt-realtime", BEARER, 101),
        ("/v1/realtime?model=gpt-realtime", {"api-key": KEY}, 401),
        ("/v1/realtime?model=gpt-realtime", {"authorization": "Bearer sk-example-no"}, 401),
        ("/v1/realtime?model=other", BEARER, 404),
        ("/v1/realtime?model=gpt-realtime&deployment=gpt-realtime", BEARER, 400),
        ("/v1/realtime?model=gpt-realtime", {**BEARER, "openai-beta": "realtime=v1"}, 101),
        ("/v1/realtime?model=gpt-realtime", {**BEARER, "openai-beta": "assistants=v2"}, 400),
        ("/v1/realtime?model=gpt-realtime", {**BEARER, "sec-websocket-protocol": "openai-insecure-api-key.x"}, 401),
        ("/openai/v1/realtime?model=gpt-realtime", {"api-key": KEY}, 101),
        ("/openai/realtime?api-version=2024-10-21&deployment=gpt-realtime", {"api-key": KEY}, 404),
        ("/openai/realtime?api-version=2025-04-01-preview&model=gpt-realtime", {"api-key": KEY}, 404),
        ("/openai/realtime?api-version=2025-04-01-preview&deployment=gpt-realtime", {"api-key": KEY}, 101),
        ("/v1/chat/completions", BEARER, 404),
    ],
)
async def test_who_asks_for_what_is_looked_at(path: str, headers: dict[str, str], status: int) -> None:
    async with realtime() as up:
        assert await _refused(up, path, headers) == status


@pytest.mark.parametrize(
    ("event", "code"),
    [
        ({"type": "nonsense"}, "invalid_value"),
        ({}, "invalid_value"),
        ({"type": "session.update", "session": {"instructions": "x"}}, "missing_required_parameter"),
        ({"type": "conversation.item.create", "item": {"role": "user"}}, "missing_required_parameter"),
        ({"type": "conversation.item.create", "item": {"type": "message", "role": "nobody"}}, "invalid_value"),
        ({"type": "input_audio_buffer.append", "audio": "no base64!"}, "invalid_value"),
        ({"type": "input_audio_buffer.commit"}, "input_audio_buffer_commit_empty"),
        ({"type": "response.cancel"}, "response_cancel_not_active"),
    ],
)
async def test_an_event_that_is_wrong_is_answered_with_an_error_and_the_session_goes_on(
    event: dict[str, Any], code: str
) -> None:
    async with (
        realtime() as up,
        aiohttp.ClientSession() as http,
        http.ws_connect(f"{up.url}/realtime?model=gpt-realtime", headers=BEARER) as socket,
    ):
        assert orjson.loads(await socket.receive_str())["type"] == "session.created"
        await socket.send_str(orjson.dumps(event).decode())
        assert orjson.loads(await socket.receive_str())["error"]["code"] == code
        await socket.send_str("no json")
        assert orjson.loads(await socket.receive_str())["error"]["code"] == "invalid_json"
        await socket.send_str(orjson.dumps({"type": "response.create"}).decode())
        assert orjson.loads(await socket.receive_str())["type"] == "response.created"


@pytest.mark.parametrize(("beta", "delta"), [(True, "response.audio.delta"), (False, "response.output_audio.delta")])
async def test_the_beta_has_events_of_other_names(beta: bool, delta: str) -> None:
    headers = {**BEARER, **({"openai-beta": "realtime=v1"} if beta else {})}
    async with (
        realtime() as up,
        aiohttp.ClientSession() as http,
        http.ws_connect(f"{up.url}/realtime?model=gpt-realtime", headers=headers) as socket,
    ):
        await socket.send_str(orjson.dumps({"type": "response.create"}).decode())
        kinds = []
        while "response.done" not in kinds:
            kinds.append(orjson.loads(await socket.receive_str())["type"])
        assert delta in kinds
