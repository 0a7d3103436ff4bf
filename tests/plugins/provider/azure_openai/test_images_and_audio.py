"""Azure OpenAI makes images, speaks and listens, on both surfaces, for the SDK of either."""

from __future__ import annotations

from typing import Any

import openai
import orjson
import pytest
from azures import DEPLOYMENT, config

from qlens.testing import running
from qlens.testing.azure import Deployment, azure
from qlens.testing.other_answers import SPEECH, TRANSCRIPT

ABLE = {
    "draws": Deployment("gpt-image-1"),
    "speaks": Deployment("tts"),
    "listens": Deployment("whisper"),
}
GA, PREVIEW = "2024-10-21", "2025-04-01-preview"
OLDER = "2024-12-01-preview"
SURFACES: list[Any] = [
    ({"surface": "classic"}, "/openai/deployments/{}/", (GA, PREVIEW, PREVIEW, GA, GA)),
    ({"surface": "classic", "api_version": OLDER}, "/openai/deployments/{}/", (OLDER,) * 5),
    ({"surface": "v1"}, "/openai/v1/", (None,) * 5),
]


def three(endpoint: str, **settings: Any) -> str:
    """A gateway's configuration with a model for each of these deployments, under its own name."""
    text = orjson.loads(config(endpoint, **settings))
    targets = {name: [{"provider": "azure", "model": name}] for name in ABLE}
    text["models"] = {name: {"max_output_tokens": 1000, "targets": target} for name, target in targets.items()}
    return orjson.dumps(text).decode()


@pytest.mark.parametrize(("settings", "place", "versions"), SURFACES, ids=["classic", "classic preview", "v1"])
async def test_each_operation_reaches_its_place(
    settings: dict[str, Any], place: str, versions: tuple[str | None, ...]
) -> None:
    async with azure(ABLE) as cloud, running(three(cloud.root, **settings)) as gateway:
        base = f"{gateway.url}/v1"
        async with openai.AsyncOpenAI(base_url=base, api_key="sk-example-any", max_retries=0) as client:
            image = await client.images.generate(model="draws", prompt="a cat")
            assert image.data
            edited = await client.images.edit(model="draws", prompt="a hat", image=("a.png", b"a"))
            assert edited.data
            speech = await client.audio.speech.create(model="speaks", voice="alloy", input="Hello")
            assert speech.content == SPEECH
            heard = await client.audio.transcriptions.create(model="listens", file=("a.wav", b"a"))
            assert heard.text == TRANSCRIPT
            text: Any = await client.audio.transcriptions.create(
                model="listens", file=("a.wav", b"a"), response_format="text"
            )
            assert text == f"{TRANSCRIPT}\n"
            stream = await client.images.generate(model="draws", prompt="a cat", stream=True)
            assert [event.type async for event in stream][-1] == "image_generation.completed"
        operations = [
            *(("draws", "images/generations"), ("draws", "images/edits"), ("speaks", "audio/speech")),
            *(("listens", "audio/transcriptions"),) * 2,
        ]
        assert [request.path for request in cloud.requests[:-1]] == [
            place.format(deployment) + operation for deployment, operation in operations
        ]
        assert tuple(request.query.get("api-version") for request in cloud.requests[:-1]) == versions


@pytest.mark.parametrize("operation", ["image_edits", "speech"])
async def test_what_only_previews_have_is_refused_behind_another_version_with_the_way_out(operation: str) -> None:
    async with azure(ABLE) as cloud, running(three(cloud.root, api_version=GA)) as gateway:
        if operation == "speech":
            body = {"model": "speaks", "voice": "alloy", "input": "Hello"}
            answer = await gateway.post("/v1/audio/speech", body)
        else:
            answer = await gateway.post_form("/v1/images/edits", {"model": "draws", "prompt": "a"}, {"image": b"a"})
        error = answer.json()["error"]
        assert (answer.status, error["code"]) == (400, "unsupported_operation")
        assert f"The provider azure does {operation} behind previews" in error["message"]
        assert f"its api_version is {GA}: set it to {PREVIEW}" in error["message"]
        assert not cloud.requests


@pytest.mark.parametrize(
    ("base_model", "version"), [("gpt-image-1", PREVIEW), ("gpt-4o-transcribe", PREVIEW), ("whisper", GA)]
)
async def test_a_model_of_the_last_previews_is_asked_by_them(base_model: str, version: str) -> None:
    async with azure({DEPLOYMENT: Deployment(base_model)}) as cloud:
        async with running(config(cloud.root, base_model=base_model)) as gateway:
            if base_model == "gpt-image-1":
                answer = await gateway.post("/v1/images/generations", {"model": "ours", "prompt": "a"})
            else:
                answer = await gateway.post_form("/v1/audio/transcriptions", {"model": "ours"}, {"file": b"a"})
        assert answer.status == 200, answer.text
        assert cloud.requests[0].query["api-version"] == version


async def test_a_deployment_of_another_model_refuses_and_its_words_come_through() -> None:
    async with azure() as cloud, running(config(cloud.root)) as gateway:
        answer = await gateway.post("/v1/images/generations", {"model": "ours", "prompt": "a"})
        error = answer.json()["error"]
        assert (answer.status, error["code"]) == (400, "OperationNotSupported")
        assert "imageGeneration operation does not work with the specified model, gpt-4o" in error["message"]


async def test_azures_own_sdk_uploads_to_its_deployment() -> None:
    deployments = {DEPLOYMENT: Deployment("whisper")}
    async with azure(deployments) as cloud, running(config(cloud.root)) as gateway:
        async with openai.AsyncAzureOpenAI(
            azure_endpoint=gateway.url, api_key="sk-example-any", api_version="2024-10-21", max_retries=0
        ) as client:
            heard = await client.audio.transcriptions.create(model="ours", file=("a.wav", b"a"))
        assert heard.text == TRANSCRIPT
        assert cloud.requests[0].path == f"/openai/deployments/{DEPLOYMENT}/audio/transcriptions"
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
    row = {"model": "*", "input": 2.5, "output": 10, "audio_in": 6, "tiers": {"provisioned": 0}}
    prices = {"cost": [{"plugin": "prices", "table": [{**row, "meters": {"seconds": 0.0001}}]}]}
    params = {"provisioned": True, "spillover_deployment": "other"}
    text: dict[str, Any] = {"params": params, "pipeline": prices}
    fields = {"model": "ours", "stream": str(stream).lower()}
    for base_model in ("gpt-image-1", "gpt-4o-transcribe"):
        deployments = {DEPLOYMENT: Deployment(base_model, busy=busy), "other": Deployment(base_model)}
        async with azure(deployments) as cloud, running(config(cloud.root, base_model=base_model, **text)) as gateway:
            if base_model == "gpt-image-1":
                asked = {"model": "ours", "prompt": "a cat", "stream": stream}
                answer = await gateway.post("/v1/images/generations", asked)
            else:
                answer = await gateway.post_form("/v1/audio/transcriptions", fields, {"file": b"a"})
            assert answer.status == 200
            tier = None if busy else "provisioned"
            (receipt,) = await gateway.settled(1)
            assert (receipt.outcome, receipt.usage.tier, receipt.usage.source) == ("complete", tier, "provider")
            assert bool(receipt.cost.picos) == busy
