"""Files and batches of an Azure resource, and what passes through to it, on both surfaces and with both credentials."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from azures import config, credentials
from openai import AsyncAzureOpenAI

from qlens.testing import Scripted, running
from qlens.testing.azure import FakeAzure, azure
from qlens.testing.entra import entra

SURFACES = pytest.mark.parametrize(
    ("surface", "place", "version"), [("classic", "/openai", "2024-10-21"), ("v1", "/openai/v1", None)]
)


@pytest.fixture
async def resource() -> AsyncIterator[FakeAzure]:
    async with azure() as resource:
        yield resource


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
