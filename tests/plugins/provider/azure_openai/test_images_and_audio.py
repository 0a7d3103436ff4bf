"""Azure OpenAI makes images, speaks and listens, on both surfaces, for the SDK of either."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from azures import DEPLOYMENT, config

from qlens.testing import running
from qlens.testing.azure import azure
from qlens.testing.other_answers import SPEECH, TRANSCRIPT

CLASSIC = f"/openai/deployments/{DEPLOYMENT}/"
SURFACES: list[Any] = [({"surface": "classic"}, CLASSIC), ({"surface": "v1"}, "/openai/v1/")]


@pytest.mark.parametrize(("settings", "place"), SURFACES, ids=["classic", "v1"])
async def test_each_operation_reaches_its_place(settings: dict[str, Any], place: str) -> None:
    async with azure() as cloud, running(config(cloud.root, **settings)) as gateway:
        base = f"{gateway.url}/v1"
        async with openai.AsyncOpenAI(base_url=base, api_key="sk-example-any", max_retries=0) as client:
            image = await client.images.generate(model="ours", prompt="a cat")
            assert image.data
            edited = await client.images.edit(model="ours", prompt="a hat", image=("a.png", b"a"))
            assert edited.data
            speech = await client.audio.speech.create(model="ours", voice="alloy", input="Hello")
            assert speech.content == SPEECH
            heard = await client.audio.transcriptions.create(model="ours", file=("a.wav", b"a"))
            assert heard.text == TRANSCRIPT
            text: Any = await client.audio.transcriptions.create(
                model="ours", file=("a.wav", b"a"), response_format="text"
            )
            assert text == f"{TRANSCRIPT}\n"
            stream = await client.images.generate(model="ours", prompt="a cat", stream=True)
            assert [event.type async for event in stream][-1] == "image_generation.completed"
        operations = ("images/generations", "images/edits", "audio/speech", *("audio/transcriptions",) * 2)
        assert [request.path for request in cloud.requests[:-1]] == [place + operation for operation in operations]


async def test_azures_own_sdk_uploads_to_its_deployment() -> None:
    async with azure() as cloud, running(config(cloud.root)) as gateway:
        async with openai.AsyncAzureOpenAI(
            azure_endpoint=gateway.url, api_key="sk-example-any", api_version="2024-10-21", max_retries=0
        ) as client:
            heard = await client.audio.transcriptions.create(model="ours", file=("a.wav", b"a"))
        assert heard.text == TRANSCRIPT
        assert cloud.requests[0].path == f"{CLASSIC}audio/transcriptions"
        assert cloud.requests[0].form[-1].content == b"a"


@pytest.mark.parametrize(("path", "operation"), [("/v1/moderations", "moderations"), ("/v1/rerank", "rerank")])
async def test_what_azure_does_not_have_is_refused_by_name(path: str, operation: str) -> None:
    body = {"model": "ours", "input": "x", "query": "x", "documents": ["x"]}
    async with azure() as cloud, running(config(cloud.root)) as gateway:
        error = (await gateway.post(path, body)).json()["error"]
        assert error["code"] == "unsupported_operation"
        assert "azure" in error["message"]
        assert operation in error["message"]
        assert not cloud.requests
