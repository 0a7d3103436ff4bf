"""The official SDK for Python asks for pictures, sounds, verdicts and transcripts."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import openai
import pytest
from yamls import config

from qlens.testing import Running, running, upstream
from qlens.testing.other_answers import PICTURE, SPEECH, TRANSCRIPT
from qlens.testing.upstreams import FakeUpstream

RECORDING = bytes(range(256)) * 8
MODEL = "any-model"


def _models(provider: str) -> Mapping[str, Any]:
    return {MODEL: {"targets": [{"provider": provider, "model": "real-model"}]}}


@asynccontextmanager
async def _client(gateway: Running) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="sk-example-any", max_retries=0) as client:
        yield client


@asynccontextmanager
async def _echo() -> AsyncIterator[openai.AsyncOpenAI]:
    async with (
        running(config({}, {"echo": {"plugin": "echo"}}, _models("echo"))) as gateway,
        _client(gateway) as client,
    ):
        yield client


@asynccontextmanager
async def _real() -> AsyncIterator[tuple[openai.AsyncOpenAI, FakeUpstream, Running]]:
    async with upstream() as up:
        providers = {"up": {"plugin": "openai", "base_url": up.url, "api_key": "sk-example-upstream"}}
        async with running(config({}, providers, _models("up"))) as gateway, _client(gateway) as client:
            yield client, up, gateway


# --- the echo ----------------------------------------------------------------------------------


async def test_the_echo_moderates() -> None:
    async with _echo() as client:
        answer = await client.moderations.create(model=MODEL, input=["a kind word", "hate and violence"])
        assert [result.flagged for result in answer.results] == [False, True]
        assert answer.results[1].categories.violence


async def test_the_echo_paints_the_same_picture_for_the_same_prompt() -> None:
    async with _echo() as client:
        one = await client.images.generate(model=MODEL, prompt="a cat", n=2)
        two = await client.images.generate(model=MODEL, prompt="a cat")
        assert one.data
        assert two.data
        assert len(one.data) == 2
        assert one.data[0].b64_json == two.data[0].b64_json
        assert base64.b64decode(one.data[0].b64_json or "").startswith(b"\x89PNG")


async def test_a_picture_is_streamed_in_parts() -> None:
    async with _echo() as client:
        stream = await client.images.generate(model=MODEL, prompt="a cat", stream=True, partial_images=2)
        kinds = [event.type async for event in stream]
        assert kinds == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]


async def test_the_echo_speaks_in_a_stream_of_bytes() -> None:
    async with _echo() as client:
        speech = client.audio.speech.with_streaming_response.create(model=MODEL, voice="alloy", input="Hello there!")
        async with speech as answer:
            assert answer.headers["content-type"] == "audio/mpeg"
            pieces = [piece async for piece in answer.iter_bytes(1024)]
        assert b"".join(pieces).startswith(b"\xff\xfb")


@pytest.mark.filterwarnings("ignore:deprecated:DeprecationWarning")  # what the SDK says of its own methods
@pytest.mark.parametrize("kind", ["transcriptions", "translations"])
async def test_the_echo_hears_every_byte(kind: str) -> None:
    async with _echo() as client:
        answer = await getattr(client.audio, kind).create(model=MODEL, file=("a.wav", RECORDING))
        assert answer.text == f"a.wav: 2048 bytes, {hashlib.sha256(RECORDING).hexdigest()[:16]}"


# --- a provider --------------------------------------------------------------------------------


async def test_a_moderation_needs_no_model_where_the_usual_one_is_configured() -> None:
    async with upstream() as up:
        providers = {"up": {"plugin": "openai", "base_url": up.url}}
        models = {"omni-moderation-latest": {"targets": [{"provider": "up", "model": "omni-moderation-latest"}]}}
        async with running(config({}, providers, models)) as gateway, _client(gateway) as client:
            parts: Any = [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "https://x/y.png"}}]
            answer = await client.moderations.create(input=parts)
            assert not answer.results[0].flagged
            assert up.requests[0].body == {"model": "omni-moderation-latest", "input": parts}


async def test_a_speech_passes_as_the_bytes_it_is() -> None:
    async with _real() as (client, up, gateway):
        answer = await client.audio.speech.create(model=MODEL, voice="alloy", input="Hello there!")
        assert answer.content == SPEECH
        assert answer.response.headers["content-type"] == "audio/mpeg"
        assert up.requests[0].path == "/v1/audio/speech"
        assert up.requests[0].body == {"model": "real-model", "voice": "alloy", "input": "Hello there!"}
        (receipt,) = await gateway.settled(1)
        assert (receipt.outcome, receipt.bytes_out) == ("complete", len(SPEECH))
        assert receipt.usage.meters == {"characters": 12}
        assert receipt.usage.input > 0


async def test_a_transcription_reaches_the_provider_as_a_form_of_exact_length() -> None:
    async with _real() as (client, up, gateway):
        answer = await client.audio.transcriptions.create(
            model=MODEL,
            file=('a "b".wav', RECORDING, "audio/wav"),
            response_format="verbose_json",
            temperature=0.5,
            timestamp_granularities=["word", "segment"],
        )
        assert answer.text == TRANSCRIPT
        (request,) = up.requests
        assert int(request.headers["content-length"]) == len(request.content)
        assert [(part.name, part.text) for part in request.form[:-1]] == [
            ("model", "real-model"),
            ("response_format", "verbose_json"),
            ("temperature", "0.5"),
            ("timestamp_granularities[]", "word"),
            ("timestamp_granularities[]", "segment"),
        ]
        file = request.form[-1]
        assert (file.name, file.filename, file.content_type) == ("file", "a %22b%22.wav", "audio/wav")
        assert file.content == RECORDING
        (receipt,) = await gateway.settled(1)
        assert (receipt.usage.meters, receipt.usage.source) == ({"seconds": 3}, "provider")


@pytest.mark.parametrize(("form", "media"), [("text", "text/plain"), ("srt", "text/plain"), ("vtt", "text/vtt")])
async def test_a_transcript_that_is_no_json_passes_as_it_is_and_is_not_free(form: Any, media: str) -> None:
    async with _real() as (client, _, gateway):
        raw = await client.audio.transcriptions.with_raw_response.create(
            model=MODEL, file=("a.wav", RECORDING * 100), response_format=form
        )
        assert raw.http_response.text == f"{TRANSCRIPT}\n"
        assert raw.headers["content-type"].startswith(media)
        (receipt,) = await gateway.settled(1)
        assert (receipt.usage.meters, receipt.usage.source) == ({"seconds": 2}, "estimated")


async def test_a_transcript_is_streamed_with_its_usage() -> None:
    async with _real() as (client, _, gateway):
        stream = await client.audio.transcriptions.create(model=MODEL, file=("a.wav", RECORDING), stream=True)
        events = [event async for event in stream]
        assert [event.type for event in events] == ["transcript.text.delta"] * 3 + ["transcript.text.done"]
        (receipt,) = await gateway.settled(1)
        assert (receipt.outcome, receipt.usage.audio_in, receipt.usage.output) == ("complete", 14, 5)


async def test_pictures_are_edited_with_their_mask() -> None:
    async with _real() as (client, up, gateway):
        answer = await client.images.edit(
            model=MODEL, prompt="a hat", image=[("one.png", b"one"), ("two.png", b"two")], mask=("m.png", b"mask"), n=2
        )
        assert answer.data
        assert base64.b64decode(answer.data[1].b64_json or "") == PICTURE
        sent = [(part.name, part.filename) for part in up.requests[0].form if part.filename]
        assert sorted(sent) == [("image[]", "one.png"), ("image[]", "two.png"), ("mask", "m.png")]
        assert up.requests[0].fields["n"] == "2"
        (receipt,) = await gateway.settled(1)
        assert (receipt.usage.input, receipt.usage.output) == (5, 272)


async def test_an_edit_is_streamed() -> None:
    async with _real() as (client, _, gateway):
        stream = await client.images.edit(model=MODEL, prompt="a hat", image=("one.png", b"one"), stream=True)
        assert [event.type async for event in stream] == ["image_edit.partial_image", "image_edit.completed"]
        (receipt,) = await gateway.settled(1)
        assert (receipt.outcome, receipt.usage.output) == ("complete", 272)


@pytest.mark.filterwarnings("ignore:deprecated:DeprecationWarning")  # what the SDK says of its own methods
async def test_a_picture_is_varied() -> None:
    async with _real() as (client, up, _):
        answer = await client.images.create_variation(model=MODEL, image=("one.png", b"one"))
        assert answer.data
        assert up.requests[0].path == "/v1/images/variations"


async def test_what_is_wrong_is_the_sdks_bad_request() -> None:
    async with _real() as (client, up, _):
        with pytest.raises(openai.BadRequestError, match="'n'") as caught:
            await client.images.generate(model=MODEL, prompt="a cat", n=11)
        assert (caught.value.param, caught.value.code) == ("n", "integer_above_max_value")
        with pytest.raises(openai.BadRequestError) as caught:
            await client.audio.transcriptions.create(model=MODEL, file=("a", b"x"), temperature=2)
        assert caught.value.param == "temperature"
        with pytest.raises(openai.NotFoundError):
            await client.audio.transcriptions.create(model="other", file=("a", b"x"))
        assert not up.requests
