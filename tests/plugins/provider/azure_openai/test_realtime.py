"""Realtime sessions on both of Azure's surfaces, by key and by token."""

from __future__ import annotations

from typing import Any

import aiohttp
import pytest
from azures import config, credentials

from qlens.testing import Running, running
from qlens.testing.entra import entra
from qlens.testing.realtime import KEY, FakeRealtime, realtime


async def _open(gateway: Running, query: str = "") -> int:
    """Open a session and close it; the status."""
    try:
        async with gateway.session.ws_connect(f"{gateway.url}/v1/realtime?model=ours{query}") as socket:
            await socket.receive_str(timeout=5)
            return 101
    except aiohttp.WSServerHandshakeError as refused:
        return refused.status


def _deployment() -> Any:
    return realtime(models=("my-deployment",))


@pytest.mark.parametrize(
    ("settings", "path", "query"),
    [
        ({}, "/openai/realtime", {"api-version": "2025-04-01-preview", "deployment": "my-deployment"}),
        (
            {"api_version": "2024-10-21"},
            "/openai/realtime",
            {"api-version": "2025-04-01-preview", "deployment": "my-deployment"},
        ),
        (
            {"api_version": "2024-10-01-preview"},
            "/openai/realtime",
            {"api-version": "2024-10-01-preview", "deployment": "my-deployment"},
        ),
        ({"surface": "v1"}, "/openai/v1/realtime", {"model": "my-deployment"}),
        (
            {"surface": "v1", "api_version": "preview"},
            "/openai/v1/realtime",
            {"model": "my-deployment", "api-version": "preview"},
        ),
    ],
)
async def test_each_surface_has_its_path(settings: dict[str, Any], path: str, query: dict[str, str]) -> None:
    async with _deployment() as up, running(config(up.root, api_key=KEY, **settings)) as gateway:
        assert await _open(gateway) == 101
        session = up.sessions[0]
        assert (session.path, session.query, session.headers["api-key"]) == (path, query, KEY)
        assert "authorization" not in session.headers


async def test_what_a_session_is_for_passes_and_nothing_else_of_the_query_does() -> None:
    async with _deployment() as up, running(config(up.root, api_key=KEY)) as gateway:
        assert await _open(gateway, "&intent=transcription&api-key=sk-example-a&deployment=other") == 101
        assert up.sessions[0].query == {
            "intent": "transcription",
            "api-version": "2025-04-01-preview",
            "deployment": "my-deployment",
        }


async def test_on_v1_a_session_that_only_transcribes_is_opened_without_a_model() -> None:
    async with _deployment() as up, running(config(up.root, api_key=KEY, surface="v1")) as gateway:
        assert await _open(gateway, "&intent=transcription") == 101
        assert up.sessions[0].query == {"intent": "transcription"}


async def test_a_token_is_sent_instead_of_a_key_and_renewed_when_it_is_refused() -> None:
    async with entra() as server, _deployment() as up:
        text = config(up.root, identity=credentials(server))
        async with running(text) as gateway:
            assert await _open(gateway) == 502  # the resource believes its key alone
            (receipt,) = await gateway.settled(1)
            assert receipt.error == "upstream_auth_error"
            up.key = await gateway.plugin("provider", "azure")._tokens.get()
            assert await _open(gateway) == 101
            assert up.sessions[0].headers["authorization"].startswith("Bearer ")
            assert "api-key" not in up.sessions[0].headers


async def test_a_deployment_that_azure_does_not_know_shows_in_its_health() -> None:
    up: FakeRealtime
    async with realtime(models=()) as up, running(config(up.root, api_key=KEY)) as gateway:
        assert await _open(gateway) == 404
        assert "my-deployment" in gateway.plugin("provider", "azure").health().detail
        up.models = ("my-deployment",)
        assert await _open(gateway) == 101
        assert gateway.plugin("provider", "azure").health().ok
