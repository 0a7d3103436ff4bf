"""Embeddings by InvokeModel."""

from __future__ import annotations

from typing import Any

import pytest
from bedrocks import CHAT, chat, config

from qlens.testing import Running, Scripted, running
from qlens.testing.bedrock import FakeBedrock, bedrock, failure

TITAN = "amazon.titan-embed-text-v2:0"
COHERE = "cohere.embed-multilingual-v3"
COHERE_4 = "cohere.embed-v4:0"
PATH = "/v1/embeddings"


def _call(given: Any, **fields: Any) -> dict[str, Any]:
    return {"model": "ours", "input": given, **fields}


async def _embedded(gateway: Running, given: Any, **fields: Any) -> dict[str, Any]:
    answer = await gateway.post(PATH, _call(given, **fields))
    assert answer.status == 200, answer.text
    content = answer.json()
    assert isinstance(content, dict)
    return content


@pytest.mark.parametrize(("model", "requests"), [(TITAN, 100), (COHERE, 2), (COHERE_4, 2)])
async def test_many_texts_are_as_many_requests_as_the_model_needs_and_come_back_in_order(
    model: str, requests: int
) -> None:
    texts = ["x" * (number + 1) for number in range(100)]
    async with bedrock() as aws, running(config(aws.root, model)) as gateway:
        content = await _embedded(gateway, texts)
        assert [entry["embedding"][0] for entry in content["data"]] == [number + 1.0 for number in range(100)]
        assert [entry["index"] for entry in content["data"]] == list(range(100))
        assert content["usage"] == {"prompt_tokens": 100, "total_tokens": 100}
        assert len(aws.requests) == requests
        (receipt,) = await gateway.settled(1)
        assert (receipt.usage.input, receipt.usage.source) == (100, "provider")
        assert receipt.attempts[0].upstream_id


async def test_one_text_is_a_list_of_one() -> None:
    async with bedrock() as aws, running(config(aws.root, TITAN)) as gateway:
        assert len((await _embedded(gateway, "hello"))["data"]) == 1


@pytest.mark.parametrize(
    ("model", "asked", "size"),
    [(TITAN, None, 1024), (TITAN, 512, 512), (COHERE_4, None, 1536), (COHERE_4, 256, 256), (COHERE, 1024, 1024)],
)
async def test_dimensions(model: str, asked: int | None, size: int) -> None:
    fields = {"dimensions": asked} if asked else {}
    async with bedrock() as aws, running(config(aws.root, model)) as gateway:
        assert len((await _embedded(gateway, "hello", **fields))["data"][0]["embedding"]) == size


@pytest.mark.parametrize(
    ("model", "asked"), [(TITAN, 100), (COHERE_4, 1), (COHERE, 512), ("amazon.titan-embed-text-v1", 512)]
)
async def test_dimensions_that_the_model_does_not_make_are_refused(model: str, asked: int) -> None:
    await _refused(model, _call("hello", dimensions=asked), "dimensions")


async def _refused(model: str, body: dict[str, Any], param: str) -> None:
    async with bedrock() as aws, running(config(aws.root, model)) as gateway:
        answer = await gateway.post(PATH, body)
        assert (answer.status, answer.json()["error"]["param"], aws.requests) == (400, param, [])


@pytest.mark.parametrize("tokens", [[1, 2, 3], [[1, 2], [3]]])
async def test_tokens_are_refused(tokens: Any) -> None:
    await _refused(TITAN, _call(tokens), "input")


async def test_the_input_type_may_be_said() -> None:
    async with bedrock() as aws, running(config(aws.root, COHERE)) as gateway:
        await _embedded(gateway, "hello", input_type="search_query", truncate="END")
        await _embedded(gateway, "hello")
        assert [request.body["input_type"] for request in aws.requests] == ["search_query", "search_document"]
        assert aws.requests[0].body["truncate"] == "END"
    await _refused(COHERE, _call("hello", input_type="poem"), "input_type")


async def test_a_model_of_vectors_does_not_chat_and_the_other_way_round() -> None:
    async with bedrock() as aws, running(config(aws.root, TITAN)) as gateway:
        assert (await gateway.post(CHAT, chat())).json()["error"]["code"] == "unsupported_operation"
    async with bedrock() as aws, running(config(aws.root)) as gateway:
        assert (await gateway.post(PATH, _call("hello"))).json()["error"]["code"] == "unsupported_operation"


async def test_one_failure_is_the_answer_and_ends_the_rest() -> None:
    async with bedrock() as aws, running(config(aws.root, TITAN)) as gateway:
        aws.script(Scripted(hang=True), failure("ThrottlingException", "slow down", status=429), Scripted(hang=True))
        answer = await gateway.post(PATH, _call(["a"] * 50))
        assert answer.status == 429
        # Eight run at a time, and each that is answered in the same moment has let another one begin.
        assert len(aws.requests) <= 16
        await _all_closed(aws)


async def _all_closed(aws: FakeBedrock) -> None:
    for request in aws.requests:
        if not request.answered.is_set():
            await request.closed.wait()


async def test_a_count_that_is_not_told_is_estimated() -> None:
    async with bedrock() as aws, running(config(aws.root, COHERE)) as gateway:
        aws.script(Scripted(body={"embeddings": [[0.5, 1]]}))
        content = await _embedded(gateway, "hello")
        assert content["data"][0]["embedding"] == [0.5, 1]
        assert content["usage"]["prompt_tokens"] > 0
        (receipt,) = await gateway.settled(1)
        assert (receipt.usage.source, receipt.usage.input > 0) == ("estimated", True)


@pytest.mark.parametrize(
    "body", [{}, {"embedding": []}, {"embedding": ["a"]}, {"embeddings": {"float": [[1.0], [2.0]]}}, {"embeddings": 1}]
)
async def test_an_answer_without_a_vector_for_each_text_is_502(body: dict[str, Any]) -> None:
    async with bedrock() as aws, running(config(aws.root, TITAN)) as gateway:
        aws.script(Scripted(body=body))
        answer = await gateway.post(PATH, _call("hello"))
        assert (answer.status, answer.json()["error"]["code"]) == (502, "upstream_invalid_response")
