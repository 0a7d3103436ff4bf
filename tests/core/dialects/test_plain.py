"""The dialects beside chat, through the front door: what they refuse, what guards see, what they cost."""

from __future__ import annotations

from typing import Any

import pytest
from yamls import config

from qlens.testing import Scripted, running, upstream

IMAGE = {"data": [{"b64_json": "aGk="}, {"b64_json": "aGk="}]}


def _yaml(url: str, row: dict[str, Any] | None = None, **stages: Any) -> str:
    providers = {"up": {"plugin": "openai", "base_url": url}}
    cost = [] if row is None else [{"plugin": "prices", "table": [{"model": "m", **row}]}]
    return config({**stages, "cost": cost}, providers, {"any-model": {"targets": [{"provider": "up", "model": "m"}]}})


@pytest.mark.parametrize(
    ("path", "body", "param", "code"),
    [
        ("moderations", {}, "input", "missing_required_parameter"),
        ("moderations", {"input": 5}, "input", "invalid_type"),
        ("moderations", {"input": []}, "input", "empty_array"),
        ("moderations", {"input": [{"type": "sound"}]}, "input[0].type", "invalid_value"),
        ("rerank", {"query": "x"}, "documents", "missing_required_parameter"),
        ("rerank", {"query": "", "documents": ["x"]}, "query", "empty_string"),
        ("rerank", {"query": "x", "documents": ["x", 5]}, "documents[1]", "invalid_type"),
        ("rerank", {"query": "x", "documents": ["x"] * 1001}, "documents", "array_above_max_length"),
        ("images/generations", {}, "prompt", "missing_required_parameter"),
        ("images/generations", {"prompt": "x", "n": 2.0}, "n", "invalid_type"),
        ("images/generations", {"prompt": "x", "n": 2, "stream": True}, "n", "unsupported_value"),
        ("audio/speech", {"input": "x"}, "voice", "missing_required_parameter"),
        ("audio/speech", {"input": "x", "voice": "a", "speed": 9}, "speed", "decimal_above_max_value"),
        ("audio/speech", {"input": "x", "voice": "a", "response_format": "midi"}, "response_format", "invalid_value"),
    ],
)
async def test_what_is_wrong_is_openais_400(path: str, body: dict[str, Any], param: str, code: str) -> None:
    async with upstream() as up, running(_yaml(up.url)) as gateway:
        answer = await gateway.post(f"/v1/{path}", {"model": "any-model", **body})
        error = answer.json()["error"]
        assert (answer.status, error["param"], error["code"]) == (400, param, code)
        assert not up.requests


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("moderations", {"input": ["a", "open sesame"]}),
        ("moderations", {"input": [{"type": "text", "text": "open sesame"}]}),
        ("rerank", {"query": "open sesame", "documents": ["x"]}),
        ("rerank", {"query": "x", "documents": ["x", {"title": "open sesame"}]}),
        ("images/generations", {"prompt": "open sesame"}),
        ("audio/speech", {"input": "open sesame", "voice": "alloy"}),
        ("audio/speech", {"input": "x", "instructions": "open sesame", "voice": "alloy"}),
    ],
)
async def test_a_guard_sees_every_text(path: str, body: dict[str, Any]) -> None:
    guard = [{"plugin": "pattern", "rules": [{"name": "words", "words": ["open sesame"]}]}]
    async with upstream() as up, running(_yaml(up.url, guard=guard)) as gateway:
        answer = await gateway.post(f"/v1/{path}", {"model": "any-model", **body})
        assert (answer.status, answer.json()["error"]["code"]) == (400, "content_filter")
        assert not up.requests


@pytest.mark.parametrize(
    ("path", "body", "said", "row", "usd"),
    [
        ("images/generations", {"prompt": "x", "n": 2}, IMAGE, {"meters": {"images": 0.04}}, "0.08"),
        (
            "images/generations",
            {"prompt": "x"},
            {**IMAGE, "usage": {"input_tokens": 10, "output_tokens": 100, "total_tokens": 110}},
            {"input": 5.0, "output": 40.0},
            "0.00405",
        ),
        (
            "rerank",
            {"query": "x", "documents": ["x"]},
            {"results": [{"index": 0, "relevance_score": 1}], "meta": {"billed_units": {"search_units": 2}}},
            {"meters": {"queries": 0.002}},
            "0.004",
        ),
        (
            "rerank",
            {"query": "x", "documents": ["x"]},
            {"results": [{"index": 0, "relevance_score": 1}], "usage": {"total_tokens": 1000}},
            {"input": 0.02},
            "0.00002",
        ),
        (
            "rerank",
            {"query": "x", "documents": ["x"]},
            {"results": [{"index": 0, "relevance_score": 1}]},
            {"input": 0, "meters": {"queries": 0.002}},
            "0.002",
        ),
        ("moderations", {"input": "x"}, {"results": [{"flagged": False}]}, {"input": 0}, "0"),
    ],
)
async def test_its_cost_is_what_the_answer_says_or_the_request(
    path: str, body: dict[str, Any], said: dict[str, Any], row: dict[str, Any], usd: str
) -> None:
    async with upstream() as up, running(_yaml(up.url, row)) as gateway:
        up.script(Scripted(body=said))
        answer = await gateway.post(f"/v1/{path}", {"model": "any-model", **body})
        assert answer.status == 200
        assert float(answer.headers["x-qlens-cost-usd"]) == float(usd)


async def test_speech_is_priced_by_its_characters() -> None:
    row = {"input": 0, "meters": {"characters": 0.000015}}
    async with upstream() as up, running(_yaml(up.url, row)) as gateway:
        await gateway.post("/v1/audio/speech", {"model": "any-model", "input": "x" * 1000, "voice": "alloy"})
        (receipt,) = await gateway.settled(1)
        assert (receipt.cost.picos, receipt.cost.state) == (15_000_000_000, "estimated")


@pytest.mark.parametrize("said", [{"error": {"message": "no"}}, {"results": 5}, {"results": [5]}, {}])
async def test_an_answer_that_is_none_is_a_502(said: dict[str, Any]) -> None:
    async with upstream() as up, running(_yaml(up.url)) as gateway:
        up.script(Scripted(body=said))
        answer = await gateway.post("/v1/moderations", {"model": "any-model", "input": "x"})
        assert answer.status == 502


async def test_a_stream_that_stops_before_its_picture_is_no_success() -> None:
    async with upstream() as up, running(_yaml(up.url)) as gateway:
        partial = {"type": "image_generation.partial_image", "b64_json": "aGk=", "partial_image_index": 0}
        up.script(Scripted(events=[partial]))
        answer = await gateway.post("/v1/images/generations", {"model": "any-model", "prompt": "x", "stream": True})
        assert "error" in answer.events()[-1]
        (receipt,) = await gateway.settled(1)
        assert (receipt.outcome, receipt.usage.meters) == ("failed", {"images": 1})


async def test_a_cache_gives_a_picture_in_either_form() -> None:
    cache = [{"plugin": "exact"}]
    body = {"model": "any-model", "prompt": "x"}
    async with upstream() as up, running(_yaml(up.url, cache=cache)) as gateway:
        streamed = await gateway.post("/v1/images/generations", {**body, "stream": True})
        whole = await gateway.post("/v1/images/generations", body)
        assert whole.headers["x-qlens-cache"] == "hit"
        assert whole.json()["data"] == [{"b64_json": streamed.events()[-1]["b64_json"]}]
        again = await gateway.post("/v1/images/generations", {**body, "stream": True})
        assert again.events()[-1]["type"] == "image_generation.completed"
        assert len(up.requests) == 1
