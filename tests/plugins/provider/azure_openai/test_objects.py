"""Files and batches of an Azure resource, and what passes through to it, on both surfaces and with both credentials."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from azures import config, credentials
from openai import AsyncAzureOpenAI, AsyncOpenAI, BadRequestError

from qlens.testing import Running, Scripted, running
from qlens.testing.azure import FakeAzure, azure
from qlens.testing.entra import entra

SURFACES = pytest.mark.parametrize(
    ("surface", "place", "version"), [("classic", "/openai", "2024-10-21"), ("v1", "/openai/v1", None)]
)


@pytest.fixture
async def resource() -> AsyncIterator[FakeAzure]:
    async with azure() as resource:
        yield resource


def sdk(gateway: Running) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="sk-example-any", max_retries=0)


@SURFACES
async def test_azures_own_client_keeps_files_and_batches(
    resource: FakeAzure, surface: str, place: str, version: str | None
) -> None:
    async with running(config(resource.root, surface=surface)) as gateway:
        client = AsyncAzureOpenAI(
            azure_endpoint=gateway.url, api_key="sk-example-client", api_version="2024-10-21", max_retries=0
        )
        async with client:
            file = await client.files.create(file=("in.jsonl", b"{}\n"), purpose="batch")
            batch = await client.batches.create(
                input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
            )
            assert (await client.files.content(file.id)).content == b"{}\n"
            assert [each.id async for each in client.batches.list()] == [batch.id]
            assert (await client.batches.cancel(batch.id)).status == "cancelling"
            assert (await client.files.delete(file.id)).id == file.id
    assert {request.query.get("api-version") for request in resource.requests} == {version}
    assert all(request.path.startswith(f"{place}/{kind}") for request in resource.requests for kind in _kind(request))
    assert not resource.keeper.files


def _kind(request: Any) -> tuple[str]:
    return ("batches",) if "batch" in request.path else ("files",)


@pytest.mark.parametrize(
    ("settings", "place", "version"),
    [
        ({}, "/openai", "2025-04-01-preview"),
        ({"api_version": "2024-12-01-preview"}, "/openai", "2024-12-01-preview"),
        ({"surface": "v1"}, "/openai/v1", None),
    ],
    ids=["classic", "classic preview", "v1"],
)
async def test_vector_stores_are_kept_where_azure_has_them(
    resource: FakeAzure, settings: dict[str, Any], place: str, version: str | None
) -> None:
    async with running(config(resource.root, **settings)) as gateway, sdk(gateway) as client:
        made = await client.vector_stores.create(name="s")
        assert (await client.vector_stores.search(made.id, query="Hello")).data == []
        assert [each.id async for each in client.vector_stores.list()] == [made.id]
    assert {request.query.get("api-version") for request in resource.requests} == {version}
    assert all(request.path.startswith(f"{place}/vector_stores") for request in resource.requests)


async def test_what_a_surface_does_not_keep_is_refused_by_name(resource: FakeAzure) -> None:
    async with running(config(resource.root, api_version="2024-10-21")) as gateway:
        for path, operation in (("conversations", "conversation_create"), ("vector_stores", "vector_store_create")):
            answer = await gateway.post(f"/v1/{path}", {})
            assert answer.status == 400
            expected = f"No provider of the models that you may use (azure) does {operation}."
            assert answer.json()["error"]["message"] == expected
    assert not resource.requests


async def test_conversations_and_short_ones_are_v1s(resource: FakeAzure) -> None:
    hello: Any = {"type": "message", "role": "user", "content": "Hello"}
    text = config(resource.root, surface="v1", base_model="gpt-4o")
    async with running(text) as gateway, sdk(gateway) as client:
        made = await client.conversations.create(items=[hello])
        said = await client.responses.create(model="ours", input="And?", conversation=made.id)
        assert said.conversation is not None
        assert said.conversation.id == made.id
        assert (await client.responses.compact(model="ours", input=[hello])).object == "response.compaction"
        assert resource.requests[-1].path == "/openai/v1/responses/compact"
        # Azure does not count: the gateway estimates.
        counted = await client.responses.input_tokens.count(model="ours", input="Hello")
        assert counted.model_extra == {"estimated": True}
        with pytest.raises(BadRequestError, match="No provider of the model `ours` counts input tokens"):
            await client.responses.input_tokens.count(model="ours", input="Hello", previous_response_id=said.id)


@SURFACES
async def test_what_is_listed_passes_through_to_the_resource(
    resource: FakeAzure, surface: str, place: str, version: str | None
) -> None:
    async with running(config(resource.root, surface=surface, passthrough=["GET /models"])) as gateway:
        resource.script(Scripted(body={"object": "list", "data": []}))
        answer = await gateway.get("/v1/providers/azure/models?api-version=evil&limit=1")
        assert answer.json() == {"object": "list", "data": []}
        (request,) = resource.requests
        expected = {"limit": "1", **({"api-version": version} if version else {})}
        assert (request.path, dict(request.query)) == (f"{place}/models", expected)
        assert (await gateway.get("/v1/providers/azure/deployments")).status == 404


async def test_a_token_is_sent_where_there_is_no_key() -> None:
    async with entra() as server, azure() as resource:
        resource.entra = server
        async with running(config(resource.root, identity=credentials(server))) as gateway:
            file = await gateway.post_form("/v1/files", {"purpose": "user_data"}, {"file": b"x"})
            path = f"/v1/files/{file.json()['id']}"
            assert (await gateway.get(path)).status == 200
            assert {request.headers["authorization"][:7] for request in resource.requests} == {"Bearer "}
            resource.script(Scripted(status=401))
            refused = await gateway.get(path)
            assert (refused.status, refused.json()["error"]["code"]) == (502, "upstream_auth_error")
