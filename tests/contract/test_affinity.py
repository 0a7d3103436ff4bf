"""No path around an object skips the chain: every operation with affinity, at each of its paths, from the table."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from plugs import Probe
from yamls import config, probe

from qlens.operations import OPERATIONS, Operation
from qlens.testing import Response, Running, running
from qlens.testing.objects import FakeKeeper, keeper

CASES = [
    pytest.param(operation, path, id=f"{operation.method} {path}")
    for operation in OPERATIONS
    if operation.runs == "affinity"
    for path in operation.paths
]
MODELS = {"gpt-4o-mini": {"max_output_tokens": 100, "targets": [{"provider": "keeper", "model": "upstream"}]}}


@pytest.fixture
async def up() -> AsyncIterator[FakeKeeper]:
    async with keeper() as up:
        yield up


def text(up: FakeKeeper, may: dict[str, Any], who: dict[str, Any]) -> str:
    settings = {"plugin": "openai", "base_url": up.url, "api_key": "sk-example-0123456789"}
    patterns = [f"{method} /models" for method in ("DELETE", "GET", "PATCH", "POST", "PUT")]
    provider = {**settings, "passthrough": patterns}
    return config({"auth": [who], "rate_limit": [may]}, {"keeper": provider}, MODELS)


ITEM = {"type": "message", "role": "user", "content": "Hello"}
BODIES: dict[str, dict[str, Any]] = {
    "conversation_create": {},
    "conversation_items_create": {"items": [ITEM]},
    "conversation_update": {"metadata": {"a": "b"}},
    "vector_store_create": {},
    "vector_store_file_update": {"attributes": {"a": "b"}},
    "vector_store_search": {"query": "Hello"},
    "vector_store_update": {"name": "x"},
}
MADE = 7
"""How many calls make them."""


async def made(gateway: Running) -> dict[str, str]:
    """An object of each kind."""
    file = await gateway.post_form("/v1/files", {"purpose": "batch"}, {"file": b"{}"})
    name = file.json()["id"]
    asked = {"input_file_id": name, "endpoint": "/v1/responses", "completion_window": "24h"}
    batch = await gateway.post("/v1/batches", asked)
    response = await gateway.post("/v1/responses", {"model": "gpt-4o-mini", "input": "Hello", "background": True})
    conversation = await gateway.post("/v1/conversations", {"items": [ITEM]})
    items = await gateway.get(f"/v1/conversations/{conversation.json()['id']}/items")
    store = await gateway.post("/v1/vector_stores", {"file_ids": [name]})
    within = await gateway.post(f"/v1/vector_stores/{store.json()['id']}/file_batches", {"file_ids": [name]})
    return {
        "file": name,
        "batch": batch.json()["id"],
        "response": response.json()["id"],
        "conversation": conversation.json()["id"],
        "item": items.json()["data"][0]["id"],
        "vector_store": store.json()["id"],
        "file_batch": within.json()["id"],
        "": "",
    }


async def ask(gateway: Running, operation: Operation, path: str, ids: dict[str, str]) -> Response:
    """The operation, as a client asks for it."""
    place = path.replace("{id}", ids[operation.kind]).replace("{provider}", "keeper").replace("{path}", "models")
    place = place.replace("{item}", ids["item"]).replace("{file}", ids["file"]).replace("{batch}", ids["file_batch"])
    if operation.body == "form":
        return await gateway.post_form(place, {"purpose": "batch"}, {"file": b"{}"})
    asked: dict[str, Any] = {
        "input_file_id": ids["file"],
        "endpoint": "/v1/responses",
        "completion_window": "24h",
    }
    if operation.kind != "batch":
        files = (
            {"file_ids": [ids["file"]]} if operation.name == "vector_store_batch_create" else {"file_id": ids["file"]}
        )
        asked = BODIES.get(operation.name, files)
    if operation.body == "json":
        return await gateway.post(place, asked)
    return await gateway.request(operation.method, place)


@pytest.mark.parametrize(("operation", "path"), CASES)
async def test_every_path_authenticates_admits_asks_the_provider_and_settles(
    operation: Operation, path: str, up: FakeKeeper
) -> None:
    whole = text(up, probe("may", hold="h"), probe("who", answer=["authenticate"]))
    async with running(whole) as gateway:
        ids = await made(gateway)
        await gateway.settled(MADE)
        who: Probe = gateway.plugin("auth", "who")
        may: Probe = gateway.plugin("rate_limit", "may")
        who.events.clear()
        may.events.clear()
        before = len(up.requests)
        answer = await ask(gateway, operation, path, ids)
        assert answer.status == 200, answer.text
        receipt = (await gateway.settled(MADE + 1))[-1]
        assert (receipt.operation, receipt.outcome, receipt.usage.total) == (operation.name, "complete", 0)
        assert receipt.target is not None
        assert receipt.target.provider == "keeper"
        assert len(up.requests) == before + 1
        sealed = {each for name, each in ids.items() if name not in {"", "file_batch", "item"}}
        assert not sealed & set(up.requests[-1].path.split("/"))
        assert "authenticate" in who.events
        assert may.events.index("admit") < may.events.index("wrap_send")
        assert may.events[-1] == "settle complete"
        assert may.holds == []


@pytest.mark.parametrize(("operation", "path"), CASES)
async def test_no_path_serves_a_stranger_or_one_who_is_refused(operation: Operation, path: str, up: FakeKeeper) -> None:
    async with running(text(up, probe("may"), {"plugin": "anonymous"})) as gateway:
        ids = await made(gateway)
        before = len(up.requests)
        for may, who, status in (
            (probe("may"), probe("nobody"), 401),
            (probe("may", refuse=["admit"]), {"plugin": "anonymous"}, 429),
        ):
            await gateway.reload(text(up, may, who))
            assert (await ask(gateway, operation, path, ids)).status == status
        assert len(up.requests) == before
