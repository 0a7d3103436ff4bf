"""Azure OpenAI makes images, speaks and listens, on both surfaces, for the SDK of either."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from azures import DEPLOYMENT, config

from qlens.testing import running
from qlens.testing.azure import Deployment, azure
from qlens.testing.other_answers import SPEECH, TRANSCRIPT

CLASSIC = f"/openai/deployments/{DEPLOYMENT}/"
GA, PREVIEW = "2024-10-21", "2025-04-01-preview"
OLDER = "2024-12-01-preview"
SURFACES: list[Any] = [
    ({"surface": "classic"}, CLASSIC, (GA, PREVIEW, PREVIEW, GA, GA)),
    ({"surface": "classic", "api_version": OLDER}, CLASSIC, (OLDER,) * 5),
    ({"surface": "v1"}, "/openai/v1/", (None,) * 5),
]


@pytest.mark.parametrize(("settings", "place", "versions"), SURFACES, ids=["classic", "classic preview", "v1"])
async def test_each_operation_reaches_its_place(
    settings: dict[str, Any], place: str, versions: tuple[str | None, ...]
) -> None:
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
        assert tuple(request.query.get("api-version") for request in cloud.requests[:-1]) == versions


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


@pytest.mark.parametrize("busy", [False, True])
@pytest.mark.parametrize("stream", [False, True])
async def test_provisioned_images_and_transcripts_are_free_unless_they_spilled_over(stream: bool, busy: bool) -> None:
    row = {"model": "gpt-4o", "input": 2.5, "output": 10, "audio_in": 6, "tiers": {"provisioned": 0}}
    prices = {"cost": [{"plugin": "prices", "table": [{**row, "meters": {"seconds": 0.0001}}]}]}
    params = {"provisioned": True, "spillover_deployment": "other"}
    text: dict[str, Any] = {"base_model": "gpt-4o", "params": params, "pipeline": prices}
    deployments = {DEPLOYMENT: Deployment("gpt-4o", busy=busy), "other": Deployment("gpt-4o")}
    async with azure(deployments) as cloud, running(config(cloud.root, **text)) as gateway:
        painted = await gateway.post("/v1/images/generations", {"model": "ours", "prompt": "a cat", "stream": stream})
        fields = {"model": "ours", "stream": str(stream).lower()}
        heard = await gateway.post_form("/v1/audio/transcriptions", fields, {"file": b"a"})
        assert (painted.status, heard.status) == (200, 200)
        tier = None if busy else "provisioned"
        for receipt in await gateway.settled(2):
            assert (receipt.outcome, receipt.usage.tier, receipt.usage.source) == ("complete", tier, "provider")
            assert bool(receipt.cost.picos) == busy
