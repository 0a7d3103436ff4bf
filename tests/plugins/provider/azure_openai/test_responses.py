"""Responses at Azure: on both surfaces as they are, and over chat where the model or the api-version has none."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import openai
import orjson
import pytest
from azures import DEPLOYMENT, config

from qlens.testing import Running, Scripted, running, upstream
from qlens.testing.azure import BLOCKED, Deployment, FakeAzure, azure
from qlens.testing.responses import USAGE
from qlens_plugins.provider.azure_openai.parameters import family

PREVIEW = "2025-04-01-preview"
SURFACES = pytest.mark.parametrize(
    ("settings", "place", "version"),
    [
        ({"api_version": PREVIEW}, "/openai/responses", PREVIEW),
        ({"surface": "v1"}, "/openai/v1/responses", None),
        ({"surface": "v1", "api_version": "preview"}, "/openai/v1/responses", "preview"),
    ],
    ids=["classic", "v1", "v1 preview"],
)
TALKING = {"plugin": "prices", "table": [{"model": "*", "input": 1, "output": 2, "tiers": {"provisioned": 0}}]}
PRICED = {"cost": [TALKING]}


@pytest.fixture
async def cloud() -> AsyncIterator[FakeAzure]:
    async with azure({DEPLOYMENT: Deployment("gpt-4o"), "other": Deployment("gpt-4o")}) as cloud:
        yield cloud


def sdk(gateway: Running) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="sk-example-any", max_retries=0)


@SURFACES
async def test_a_response_is_made_followed_and_taken_away(
    cloud: FakeAzure, settings: dict[str, Any], place: str, version: str | None
) -> None:
    async with running(config(cloud.root, base_model="gpt-4o", **settings)) as gateway, sdk(gateway) as client:
        made = await client.responses.create(model="ours", input="Hello")
        assert made.model == "gpt-4o-2024-11-20"
        told: Any = await client.responses.create(model="ours", input="And?", previous_response_id=made.id, stream=True)
        events = [event async for event in told]
        assert events[-1].type == "response.completed"
        assert events[-1].response.previous_response_id == made.id
        assert (await client.responses.retrieve(made.id)).output == made.output
        items = await client.responses.input_items.list(made.id)
        assert [item.type for item in items.data] == ["message"]
        queued = await client.responses.create(model="ours", input="Later", background=True)
        resumed: Any = await client.responses.retrieve(queued.id, stream=True, starting_after=2)
        assert [event async for event in resumed][-1].response.id == queued.id
        assert (await client.responses.cancel(queued.id)).status == "cancelled"
        await client.responses.delete(made.id)
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve(made.id)
        assert {request.query.get("api-version") for request in cloud.requests} == {version}
        assert all(request.path.startswith(place) for request in cloud.requests)
        assert cloud.requests[0].body["model"] == DEPLOYMENT
        receipts = await gateway.settled(4)
        assert (receipts[0].usage.total, receipts[1].usage.total) == (USAGE["total_tokens"],) * 2
        assert receipts[0].usage.source == receipts[1].usage.source == "provider"


async def test_azures_own_client_follows_a_response(cloud: FakeAzure) -> None:
    async with (
        running(config(cloud.root, base_model="gpt-4o", api_version=PREVIEW)) as gateway,
        openai.AsyncAzureOpenAI(
            azure_endpoint=gateway.url, api_key="sk-example-any", api_version=PREVIEW, max_retries=0
        ) as client,
    ):
        made = await client.responses.create(model="ours", input="Hello")
        assert (await client.responses.retrieve(made.id)).id == made.id


# --- native, or over chat ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base_model", "settings", "asked"),
    [
        ("gpt-4o", {}, "responses"),
        ("gpt-5", {}, "responses"),
        ("gpt-5", {"api_version": "2024-10-21"}, "chat/completions"),
        ("gpt-4o", {"api_version": "2024-12-01-preview"}, "chat/completions"),
        ("gpt-4o", {"api_version": "2025-03-01-preview"}, "responses"),
        ("gpt-4o", {"surface": "v1"}, "responses"),
        ("gpt-35-turbo", {"surface": "v1"}, "chat/completions"),
        ("model-router", {"surface": "v1"}, "chat/completions"),
        (None, {"surface": "v1"}, "chat/completions"),
        # It speaks nothing else: an api-version that is meant for other models does not keep it from that.
        ("gpt-5.1-codex", {}, "responses"),
        ("gpt-5.1-codex", {"surface": "v1"}, "responses"),
    ],
)
async def test_the_model_and_the_api_version_say_how_it_is_asked(
    base_model: str | None, settings: dict[str, Any], asked: str
) -> None:
    async with (
        azure({DEPLOYMENT: Deployment(base_model or "gpt-4o")}) as cloud,
        running(config(cloud.root, base_model=base_model, **settings)) as gateway,
    ):
        body = {"model": "ours", "input": "Hello", "store": False}
        for stream in (False, True):
            answer = await gateway.post("/v1/responses", {**body, "stream": stream})
            assert answer.status == 200, answer.text
            assert cloud.requests[-1].path.endswith(f"/{asked}")
        kept = await gateway.post("/v1/responses", {**body, "store": True})
        if asked != "responses":
            assert (kept.status, kept.json()["error"]["param"]) == (400, "store")
            return
        found = await gateway.get(f"/v1/responses/{kept.json()['id']}")
        assert (found.status, found.json()["id"]) == (200, kept.json()["id"])


@pytest.mark.parametrize(
    ("base_model", "spoken"),
    [
        ("gpt-4o-mini", "both"),
        ("gpt-4o-2024-08-06", "both"),
        ("gpt-4.1-nano", "both"),
        ("gpt-5-chat", "both"),
        ("gpt-5.2", "both"),
        ("o1", "both"),
        ("o1-mini", "chat"),
        ("gpt-4o-audio-preview", "chat"),
        ("gpt-4-turbo", "chat"),
        ("DeepSeek-R1-pro", "chat"),
        ("o3-deep-research", "responses"),
        ("o1-pro", "responses"),
        ("gpt-5.1-codex-max", "responses"),
        ("codex-mini", "responses"),
        ("computer-use-preview", "responses"),
    ],
)
def test_what_a_model_speaks(base_model: str, spoken: str) -> None:
    found = family(base_model)
    assert found is not None
    assert (found.chats, found.responds) == (spoken != "responses", spoken != "chat")


# --- what a model accepts ----------------------------------------------------------------------

SAMPLED = {"temperature": 0.5, "top_p": 0.5, "top_logprobs": 2}


@pytest.mark.parametrize(
    ("base_model", "fields", "goes"),
    [
        ("gpt-4o", {}, True),
        ("gpt-5-mini", {}, False),
        ("o4-mini", {}, False),
        ("gpt-5.1", {}, True),
        ("gpt-5.1", {"reasoning": {"effort": "low"}}, False),
    ],
)
async def test_a_reasoning_model_gets_no_sampling(base_model: str, fields: dict[str, Any], goes: bool) -> None:
    async with (
        azure({DEPLOYMENT: Deployment(base_model)}) as cloud,
        running(config(cloud.root, base_model=base_model, surface="v1")) as gateway,
    ):
        answer = await gateway.post("/v1/responses", {"model": "ours", "input": "Hello", **SAMPLED, **fields})
        assert answer.status == 200, answer.text
        assert (SAMPLED.keys() & cloud.requests[0].body.keys()) == (SAMPLED.keys() if goes else set())
        await gateway.reload(config(cloud.root, base_model=base_model, surface="v1", unsupported="reject"))
        answer = await gateway.post("/v1/responses", {"model": "ours", "input": "Hello", **SAMPLED, **fields})
        assert answer.status == (200 if goes else 400)


async def test_what_azure_refuses_is_learned() -> None:
    async with (
        azure({DEPLOYMENT: Deployment("gpt-5.1")}) as cloud,
        running(config(cloud.root, base_model="gpt-4o", surface="v1")) as gateway,
    ):
        body = {"model": "ours", "input": "Hello", "reasoning": {"effort": "low"}, "temperature": 0.5}
        for count in (2, 3):
            assert (await gateway.post("/v1/responses", body)).status == 200
            assert len(cloud.requests) == count
            assert "temperature" not in cloud.requests[-1].body


async def test_errors_are_azures(cloud: FakeAzure) -> None:
    async with running(config(cloud.root, base_model="gpt-4o", surface="v1")) as gateway:
        blocked = await gateway.post("/v1/responses", {"model": "ours", "input": BLOCKED})
        assert (blocked.status, blocked.json()["error"]["code"]) == (400, "content_filter")
        cloud.deployments.clear()
        gone = await gateway.post("/v1/responses", {"model": "ours", "input": "Hello"})
        assert (gone.status, gone.json()["error"]["code"]) == (404, "model_not_found")


# --- provisioned throughput --------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("split", [None, 7])
@pytest.mark.parametrize("busy", [False, True])
async def test_provisioned_tokens_are_free_unless_they_spilled_over(
    cloud: FakeAzure, stream: bool, split: int | None, busy: bool
) -> None:
    params = {"provisioned": True, "spillover_deployment": "other"}
    cloud.deployments[DEPLOYMENT] = Deployment("gpt-4o", busy=busy)
    text = config(cloud.root, base_model="gpt-4o", surface="v1", params=params, pipeline=PRICED)
    async with running(text) as gateway:
        if split is not None and stream and not busy:
            cloud.script(Scripted(events=_events(), split=split))
        answer = await gateway.post("/v1/responses", {"model": "ours", "input": "Hello", "stream": stream})
        assert answer.status == 200, answer.text
        (receipt,) = await gateway.settled(1)
        assert receipt.outcome == "complete"
        assert receipt.usage.total == USAGE["total_tokens"]
        assert bool(receipt.cost.picos) == busy
        assert receipt.tags.get("azure_spillover_from") == (DEPLOYMENT if busy else None)
    assert not params.keys() & cloud.requests[0].body.keys()


def _events() -> list[bytes]:
    response = {"id": "resp_1", "object": "response", "status": "in_progress", "model": "m", "output": []}
    delta = {"item_id": "msg_1", "output_index": 0, "content_index": 0, "delta": '"usage": {', "logprobs": []}
    told: list[dict[str, Any]] = [
        {"type": "response.created", "response": {**response, "usage": None}},
        {"type": "response.output_text.delta", **delta},
        {
            "type": "response.completed",
            "response": {**response, "status": "completed", "service_tier": "default", "usage": USAGE},
        },
    ]
    return [b"event: %b\ndata: %b\n\n" % (str(event["type"]).encode(), orjson.dumps(event)) for event in told]


async def test_a_response_is_reached_with_the_version_it_was_made_with() -> None:
    async with azure({DEPLOYMENT: Deployment("gpt-5.1-codex")}) as cloud:
        text = config(cloud.root, base_model="gpt-5.1-codex", api_version="2024-10-21")
        async with running(text) as gateway, sdk(gateway) as client:
            made = await client.responses.create(model="ours", input="Hello")
            await client.responses.retrieve(made.id)
            file = await client.files.create(file=("a.jsonl", b"{}"), purpose="batch", extra_body={"model": "ours"})
            await client.files.retrieve(file.id)
            # It has no chat: one who chats is answered by a response.
            said = await client.chat.completions.create(model="ours", messages=[{"role": "user", "content": "Hi"}])
            assert said.choices[0].message.content
        versions = [request.query["api-version"] for request in cloud.requests]
        assert versions == [PREVIEW, PREVIEW, "2024-10-21", "2024-10-21", PREVIEW]


async def test_without_a_model_that_reasons_nothing_of_a_body_is_touched() -> None:
    async with upstream() as up, running(config(up.root, base_model="gpt-4o", surface="v1")) as gateway:
        up.script(Scripted(body={"id": "resp_1", "object": "response", "status": "completed", "output": []}))
        body = {"model": "ours", "input": "Hello", "instructions": "x", "temperature": 1, "of_tomorrow": {"a": [1]}}
        assert (await gateway.post("/v1/responses", body)).status == 200
        assert up.requests[0].body == {**body, "model": DEPLOYMENT}
