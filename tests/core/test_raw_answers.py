"""Answers that are neither JSON nor events: passed byte for byte, and never taken for whole when they are not."""

from __future__ import annotations

import asyncio

import aiohttp
import pytest
from yamls import config

from qlens.testing import Running, Scripted, running, upstream
from qlens.testing.other_answers import SPEECH
from qlens.testing.upstreams import FakeUpstream, error

PATH = "/v1/audio/speech"
BODY = {"model": "any-model", "input": "Hello there!", "voice": "alloy"}
AUDIO = {"content-type": "audio/mpeg"}


def _yaml(*fakes: FakeUpstream) -> str:
    providers = {f"up{place}": {"plugin": "openai", "base_url": fake.url} for place, fake in enumerate(fakes)}
    return config({}, providers, {"any-model": {"targets": [{"provider": name, "model": "m"} for name in providers]}})


async def test_it_is_passed_while_it_comes() -> None:
    async with upstream() as up, running(_yaml(up)) as gateway:
        up.script(Scripted(events=[b"first", b"", b"last"], gap=0.05, headers=AUDIO))
        async with gateway.session.post(gateway.url + PATH, json=BODY) as answer:
            assert answer.headers["content-type"] == "audio/mpeg"
            assert await answer.content.readany() == b"first"
            assert await answer.read() == b"last"


@pytest.mark.parametrize("media", ["audio/mpeg", "text/event-stream"])
async def test_one_that_breaks_off_is_no_success(media: str) -> None:
    async with upstream() as up, running(_yaml(up)) as gateway:
        up.script(Scripted(body=SPEECH, cut_at=100, headers={"content-type": media}))
        with pytest.raises(aiohttp.ClientPayloadError):
            await gateway.post(PATH, BODY)
        (receipt,) = await gateway.settled(1)
        assert (receipt.outcome, receipt.error, receipt.bytes_out) == ("failed", "upstream_truncated", 100)
        assert receipt.usage.meters == {"characters": 12}
        assert receipt.usage.source == "partial"


@pytest.mark.parametrize(
    "first", [error(500, "broken"), Scripted(headers=AUDIO), Scripted(raw=b"")], ids=["500", "empty", "no answer"]
)
async def test_what_fails_before_its_first_byte_is_asked_elsewhere(first: Scripted) -> None:
    async with upstream() as down, upstream() as up, running(_yaml(down, up)) as gateway:
        down.script(first)
        answer = await gateway.post(PATH, BODY)
        assert (answer.status, answer.body) == (200, SPEECH)
        (receipt,) = await gateway.settled(1)
        assert len(receipt.attempts) == 2


async def test_a_client_that_leaves_closes_the_provider() -> None:
    async with upstream() as up, running(_yaml(up)) as gateway:
        up.script(Scripted(events=[b"first"], hang=True, headers=AUDIO))
        async with gateway.session.post(gateway.url + PATH, json=BODY) as answer:
            assert await answer.content.readany() == b"first"
        await asyncio.wait_for(up.requests[0].closed.wait(), 5)
        (receipt,) = await gateway.settled(1)
        assert (receipt.outcome, receipt.usage.source) == ("abandoned", "partial")


async def _content_type_of(gateway: Running, up: FakeUpstream, said: dict[str, str]) -> str:
    up.script(Scripted(body=b"bytes", headers=said))
    return (await gateway.post(PATH, BODY)).headers["content-type"]


async def test_its_type_is_the_providers_or_none_in_particular() -> None:
    async with upstream() as up, running(_yaml(up)) as gateway:
        assert await _content_type_of(gateway, up, {"content-type": "audio/wav"}) == "audio/wav"
        assert await _content_type_of(gateway, up, {}) == "application/octet-stream"


async def test_it_is_not_cached() -> None:
    stages = {"cache": [{"plugin": "exact"}]}
    models = {"any-model": {"targets": [{"provider": "echo", "model": "m"}]}}
    async with running(config(stages, {"echo": {"plugin": "echo"}}, models)) as gateway:
        for _ in range(2):
            answer = await gateway.post(PATH, BODY)
            assert (answer.status, answer.headers["x-qlens-cache"]) == (200, "miss")


# --- speech in events --------------------------------------------------------------------------

SSE = {"content-type": "text/event-stream; charset=utf-8"}
SOUND = b'data: {"type":"speech.audio.delta","audio":"SUQz"}\n\n'
DONE = b'data: {"type":"speech.audio.done","usage":{"input_tokens":14,"output_tokens":101,"total_tokens":115}}\n\n'


@pytest.mark.parametrize("split", [None, 1, 7])
@pytest.mark.parametrize("wire", [SOUND + DONE, (SOUND + DONE).rstrip()], ids=["whole", "no blank line"])
async def test_speech_in_events_says_what_it_used(wire: bytes, split: int | None) -> None:
    async with upstream() as up, running(_yaml(up)) as gateway:
        up.script(Scripted(body=wire, headers=SSE, split=split))
        answer = await gateway.post(PATH, {**BODY, "stream_format": "sse"})
        assert (answer.body, answer.headers["content-type"]) == (wire, SSE["content-type"])
        (receipt,) = await gateway.settled(1)
        assert (receipt.outcome, receipt.usage.source) == ("complete", "provider")
        assert (receipt.usage.prompt, receipt.usage.completion) == (14, 101)


@pytest.mark.parametrize("wire", [SOUND, SOUND + DONE[:40], SOUND + DONE.replace(b"done", b"delta")])
async def test_speech_in_events_that_never_says_done_is_no_success(wire: bytes) -> None:
    async with upstream() as up, running(_yaml(up)) as gateway:
        up.script(Scripted(body=wire, headers=SSE))
        with pytest.raises(aiohttp.ClientPayloadError):
            await gateway.post(PATH, {**BODY, "stream_format": "sse"})
        (receipt,) = await gateway.settled(1)
        assert receipt.outcome == "failed"
        assert (receipt.usage.meters, receipt.usage.source) == ({"characters": 12}, "partial")


@pytest.mark.parametrize("usage", [b"", b',"usage":null', b',"usage":{"input_tokens":-1,"output_tokens":"x"}'])
async def test_speech_in_events_without_usage_is_told_by_the_text(usage: bytes) -> None:
    async with upstream() as up, running(_yaml(up)) as gateway:
        up.script(Scripted(body=SOUND + b'data: {"type":"speech.audio.done"%b}\n\n' % usage, headers=SSE))
        await gateway.post(PATH, {**BODY, "stream_format": "sse"})
        (receipt,) = await gateway.settled(1)
        assert (receipt.outcome, receipt.usage.source) == ("complete", "estimated")
        assert receipt.usage.meters == {"characters": 12}
