"""Bedrock ranks documents and paints, by InvokeModel."""

from __future__ import annotations

from typing import Any

import pytest
from bedrocks import config

from qlens.testing import Scripted, running
from qlens.testing.bedrock import API_KEY, PICTURE, bedrock

COHERE = "cohere.rerank-v3-5:0"
AMAZON = "amazon.rerank-v1:0"
CANVAS = "amazon.nova-canvas-v1:0"
STABLE = "stability.stable-image-core-v1:1"
RERANK: dict[str, Any] = {"model": "ours", "query": "hello", "documents": ["one", {"text": "two"}, {"title": "three"}]}
PAINT: dict[str, Any] = {"model": "ours", "prompt": "a cat"}


@pytest.mark.parametrize(("model", "more"), [(COHERE, {"api_version": 2}), (AMAZON, {})])
async def test_documents_are_ranked_and_billed_by_the_query(model: str, more: dict[str, Any]) -> None:
    async with bedrock() as aws, running(config(aws.root, model)) as gateway:
        answer = await gateway.post("/v1/rerank", {**RERANK, "top_n": 2, "return_documents": True})
        assert answer.status == 200, answer.text
        assert answer.json()["results"] == [
            {"index": 0, "relevance_score": 1.0, "document": {"text": "one"}},
            {"index": 1, "relevance_score": 0.5, "document": {"text": "two"}},
        ]
        documents = ["one", "two", '{"title":"three"}']
        assert aws.requests[0].body == {"query": "hello", "documents": documents, "top_n": 2, **more}
        (receipt,) = await gateway.settled(1)
        assert (receipt.usage.meters, receipt.usage.source) == ({"queries": 1}, "provider")


async def test_more_than_a_hundred_documents_are_two_queries() -> None:
    async with bedrock() as aws, running(config(aws.root, COHERE)) as gateway:
        answer = await gateway.post("/v1/rerank", {**RERANK, "documents": ["x"] * 101})
        assert answer.json()["meta"] == {"billed_units": {"search_units": 2}}


@pytest.mark.parametrize("body", [{}, {"results": [{"index": 9}]}, {"results": [{"index": 0}]}, {"results": [5]}])
async def test_nonsense_instead_of_an_order_is_a_502(body: dict[str, Any]) -> None:
    async with bedrock() as aws, running(config(aws.root, COHERE)) as gateway:
        aws.script(Scripted(body=body))
        answer = await gateway.post("/v1/rerank", {**RERANK, "return_documents": True})
        assert answer.status == 502


async def test_a_canvas_is_painted_on_in_requests_of_five() -> None:
    async with bedrock() as aws, running(config(aws.root, CANVAS)) as gateway:
        fields = {"n": 7, "size": "1280x720", "quality": "hd", "seed": 4, "negative_prompt": "dogs"}
        answer = await gateway.post("/v1/images/generations", {**PAINT, **fields})
        assert answer.json()["data"] == [{"b64_json": PICTURE}] * 7
        bodies = [request.body for request in aws.requests]
        sent = sorted(bodies, key=lambda body: int(body["imageGenerationConfig"]["seed"]))
        size = {"width": 1280, "height": 720, "quality": "premium"}
        assert [body["imageGenerationConfig"] for body in sent] == [
            {**size, "seed": 4, "numberOfImages": 5},
            {**size, "seed": 5, "numberOfImages": 2},
        ]
        assert sent[0]["textToImageParams"] == {"text": "a cat", "negativeText": "dogs"}
        (receipt,) = await gateway.settled(1)
        assert (receipt.usage.meters, receipt.usage.source) == ({"images": 7}, "provider")


@pytest.mark.parametrize(("size", "ratio"), [("1024x1024", "1:1"), ("1792x1024", "16:9"), ("1024x1536", "2:3")])
async def test_stability_paints_each_image_by_itself(size: str, ratio: str) -> None:
    async with bedrock() as aws, running(config(aws.root, STABLE)) as gateway:
        answer = await gateway.post("/v1/images/generations", {**PAINT, "n": 2, "size": size, "output_format": "jpeg"})
        assert len(answer.json()["data"]) == 2
        asked = {"prompt": "a cat", "aspect_ratio": ratio, "output_format": "jpeg"}
        assert [request.body for request in aws.requests] == [asked] * 2


@pytest.mark.parametrize(
    ("model", "body"),
    [
        (STABLE, {"images": [""], "finish_reasons": ["Filter reason: prompt"], "seeds": [1]}),
        (CANVAS, {"images": [], "error": "This request has been blocked by our content filters."}),
    ],
)
async def test_an_image_that_is_held_back_is_a_content_filter_error(model: str, body: dict[str, Any]) -> None:
    async with bedrock() as aws, running(config(aws.root, model)) as gateway:
        aws.script(Scripted(body=body))
        answer = await gateway.post("/v1/images/generations", PAINT)
        assert (answer.status, answer.json()["error"]["code"]) == (400, "content_filter")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"size": "large"}, "size"),
        ({"response_format": "url"}, "response_format"),
        ({"output_format": "gif"}, "output_format"),
    ],
)
async def test_what_no_model_there_can_do_is_refused(fields: dict[str, Any], param: str) -> None:
    async with bedrock() as aws, running(config(aws.root, STABLE)) as gateway:
        answer = await gateway.post("/v1/images/generations", {**PAINT, **fields})
        assert (answer.status, answer.json()["error"]["param"]) == (400, param)
        assert not aws.requests


async def test_a_stream_is_asked_of_it_as_a_whole() -> None:
    async with bedrock() as aws, running(config(aws.root, CANVAS)) as gateway:
        answer = await gateway.post("/v1/images/generations", {**PAINT, "stream": True})
        (event,) = answer.events()
        assert (event["type"], event["b64_json"]) == ("image_generation.completed", PICTURE)


async def test_what_a_model_does_not_do_names_provider_and_operation() -> None:
    async with bedrock() as aws, running(config(aws.root, COHERE)) as gateway:
        answer = await gateway.post("/v1/moderations", {"model": "ours", "input": "x"})
        error = answer.json()["error"]
        assert (answer.status, error["code"]) == (400, "unsupported_operation")
        assert "aws" in error["message"]
        assert "moderations" in error["message"]


# --- guardrails --------------------------------------------------------------------------------

IDENTIFIER, VERSION = "x-amzn-bedrock-guardrailidentifier", "x-amzn-bedrock-guardrailversion"
ARN = "arn:aws:bedrock:us-east-1:123456789012:guardrail/gr1example"


@pytest.mark.parametrize("model", [CANVAS, STABLE])
@pytest.mark.parametrize("identifier", ["gr1example", ARN])
async def test_a_configured_guardrail_stands_around_every_image_and_is_signed(model: str, identifier: str) -> None:
    async with (
        bedrock() as aws,
        running(config(aws.root, model, guardrail={"id": identifier, "version": "2"})) as gateway,
    ):
        answer = await gateway.post("/v1/images/generations", {**PAINT, "n": 6})
        assert answer.status == 200, answer.text
        assert len(aws.requests) > 1
        for request in aws.requests:
            assert (request.headers[IDENTIFIER], request.headers[VERSION]) == (identifier, "2")
            assert f";{IDENTIFIER};{VERSION}," in request.headers["authorization"]
        refused = await gateway.post("/v1/images/generations", {**PAINT, "guardrail": {"id": "gr9other"}})
        assert (refused.status, refused.json()["error"]["param"]) == (400, "guardrail")


async def test_a_guardrail_is_sent_with_an_api_key_too() -> None:
    key = {"api_key": API_KEY}
    async with (
        bedrock() as aws,
        running(config(aws.root, CANVAS, credentials=key, guardrail={"id": "gr1example"})) as gateway,
    ):
        assert (await gateway.post("/v1/images/generations", PAINT)).status == 200
        sent = aws.requests[0].headers
        assert (sent[IDENTIFIER], sent[VERSION]) == ("gr1example", "DRAFT")


@pytest.mark.parametrize("wrong", ["gr1", {}, {"id": "a\r\nx-evil: 1"}, {"id": "gr1", "version": "1 2"}, {"id": ""}])
async def test_a_client_puts_nothing_but_a_name_into_a_header(wrong: Any) -> None:
    async with bedrock() as aws, running(config(aws.root, CANVAS)) as gateway:
        assert (await gateway.post("/v1/images/generations", {**PAINT, "guardrail": {"id": "gr1"}})).status == 200
        assert aws.requests[0].headers[IDENTIFIER] == "gr1"
        answer = await gateway.post("/v1/images/generations", {**PAINT, "guardrail": wrong})
        assert (answer.status, answer.json()["error"]["param"].partition(".")[0]) == (400, "guardrail")
        assert len(aws.requests) == 1


async def test_an_image_that_a_guardrail_stopped_is_a_content_filter_error() -> None:
    async with bedrock() as aws, running(config(aws.root, CANVAS, guardrail={"id": "gr1example"})) as gateway:
        aws.script(Scripted(body={"images": [PICTURE], "amazon-bedrock-guardrailAction": "INTERVENED"}))
        answer = await gateway.post("/v1/images/generations", PAINT)
        assert (answer.status, answer.json()["error"]["code"]) == (400, "content_filter")


@pytest.mark.parametrize("model", [".", ".."])
async def test_a_name_that_is_a_step_in_a_path_is_no_model(model: str) -> None:
    async with bedrock() as aws, running(config(aws.root, model)) as gateway:
        body = {"model": "ours", "messages": [{"role": "user", "content": "Hello"}]}
        answer = await gateway.post("/v1/chat/completions", body)
        assert answer.json()["error"]["message"].startswith("The provider does not know the model")
        assert not aws.requests
