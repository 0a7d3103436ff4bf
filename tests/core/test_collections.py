"""Conversations and vector stores, kept by a provider for one tenant; counting and shortening what a response reads."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import openai
import orjson
import pytest
from keepers import ACME, NARROW, OTHER, kept, sdk, settings
from yarl import URL

from qlens.testing import Running, Scripted, running
from qlens.testing.objects import FakeKeeper, keeper
from qlens.testing.responses import USAGE

FIRST = {"x-qlens-model": "first"}
HELLO: Any = {"type": "message", "role": "user", "content": "Hello"}
GUARD = "[{plugin: pattern, name: g, rules: [{name: r, regex: secret, action: block}]}]"


@pytest.fixture
async def one() -> AsyncIterator[FakeKeeper]:
    async with keeper() as fake:
        yield fake


@pytest.fixture
async def two() -> AsyncIterator[FakeKeeper]:
    async with keeper() as fake:
        yield fake


@pytest.fixture
async def gateway(one: FakeKeeper, two: FakeKeeper) -> AsyncIterator[Running]:
    async with kept(settings(one, two)) as gateway:
        yield gateway


async def file_of(client: openai.AsyncOpenAI, model: str = "first") -> str:
    made = await client.files.create(file=("a.txt", b"text"), purpose="assistants", extra_body={"model": model})
    return made.id


# --- conversations -----------------------------------------------------------------------------


async def test_a_conversation_is_made_filled_gone_on_with_and_taken_away(
    gateway: Running, one: FakeKeeper, two: FakeKeeper
) -> None:
    async with sdk(gateway) as client:
        made = await client.conversations.create(items=[HELLO], metadata={"a": "b"}, extra_headers=FIRST)
        own = next(iter(one.conversations.kept))
        assert made.id.startswith("conv_")
        assert own not in made.id
        assert (await client.conversations.retrieve(made.id)).id == made.id
        added = await client.conversations.items.create(made.id, items=[HELLO, HELLO])
        assert len(added.data) == 2
        listed = [item async for item in client.conversations.items.list(made.id, order="asc")]
        assert len(listed) == 3
        item: Any = await client.conversations.items.retrieve(str(listed[0].id), conversation_id=made.id)
        assert item.content[0].text == "Hello"
        assert (await client.conversations.items.delete(str(listed[0].id), conversation_id=made.id)).id == made.id
        assert (await client.conversations.update(made.id, metadata={"c": "d"})).metadata == {"c": "d"}
        for given in (made.id, {"id": made.id}):
            said: Any = await client.responses.create(model="both", input="And?", conversation=given)  # type: ignore[arg-type]
            assert said.conversation.id == made.id
            assert one.requests[-1].body["conversation"] in (own, {"id": own})
        events: Any = await client.responses.create(model="both", input="And?", conversation=made.id, stream=True)
        assert {e.response.conversation.id async for e in events if hasattr(e, "response")} == {made.id}
        assert (await client.conversations.delete(made.id)).id == made.id
        assert not two.requests


async def test_a_conversation_is_its_tenants_alone(gateway: Running, one: FakeKeeper) -> None:
    async with sdk(gateway) as client, sdk(gateway, OTHER) as other:
        made = await client.conversations.create(extra_headers=FIRST)
        before = len(one.requests)
        with pytest.raises(openai.NotFoundError, match="Conversation with id"):
            await other.conversations.retrieve(made.id)
        with pytest.raises(openai.NotFoundError):
            await client.conversations.retrieve(next(iter(one.conversations.kept)))
        with pytest.raises(openai.BadRequestError, match="Conversation with id") as caught:
            await other.responses.create(model="first", input="Hello", conversation=made.id)
        assert caught.value.param == "conversation"
        assert len(one.requests) == before


@pytest.mark.parametrize("item", [".", "..", "%2e%2e", "..%2f..%2ffiles"])
async def test_no_item_leads_to_another_path(gateway: Running, one: FakeKeeper, item: str) -> None:
    async with sdk(gateway) as client:
        made = await client.conversations.create(extra_headers=FIRST)
    url = URL(f"{gateway.url}/v1/conversations/{made.id}/items/{item}", encoded=True)
    async with gateway.session.get(url, headers={"authorization": f"Bearer {ACME}"}) as answer:
        assert answer.status == 404
    own = next(iter(one.conversations.kept))
    paths = [request.path for request in one.requests[1:]]
    assert all(path.startswith(f"/v1/conversations/{own}/items/") for path in paths)


async def test_encrypted_items_go_back_to_whoever_made_them(gateway: Running, one: FakeKeeper) -> None:
    async with sdk(gateway) as client:
        asked: Any = {"input": "Hello", "reasoning": {"effort": "low"}, "include": ["reasoning.encrypted_content"]}
        thought, other = [
            (await client.responses.create(model=model, **asked)).output[0].model_dump(exclude_none=True)
            for model in ("first", "second")
        ]
        made = await client.conversations.create(items=[thought], extra_headers=FIRST)
        assert one.requests[-1].body["items"][0]["encrypted_content"] == one.encrypted()
        with pytest.raises(openai.BadRequestError) as caught:
            await client.conversations.items.create(made.id, items=[other])
        assert (caught.value.code, caught.value.param) == ("invalid_encrypted_content", "items[0].encrypted_content")


async def test_no_guard_is_passed_by_way_of_a_conversation(one: FakeKeeper, two: FakeKeeper) -> None:
    async with kept(settings(one, two, guards=GUARD)) as gateway, sdk(gateway) as client:
        made = await client.conversations.create(extra_headers=FIRST)
        with pytest.raises(openai.BadRequestError, match="the guard g cannot look into them"):
            await client.conversations.items.create(made.id, items=[HELLO])
        with pytest.raises(openai.BadRequestError, match="Conversations cannot be filled here"):
            await client.conversations.create(items=[HELLO], extra_headers=FIRST)
        assert len(one.requests) == 1


# --- vector stores -----------------------------------------------------------------------------


async def test_a_vector_store_is_filled_searched_and_taken_away(
    gateway: Running, one: FakeKeeper, two: FakeKeeper
) -> None:
    async with sdk(gateway) as client:
        file, more = await file_of(client), await file_of(client)
        own = list(one.files)
        # The file says whose provider it is.
        made = await client.vector_stores.create(name="s", file_ids=[file], metadata={"a": "b"})
        assert made.id.startswith("vs_")
        assert made.metadata == {"a": "b"}
        assert one.requests[-1].body["file_ids"] == own[:1]
        added = await client.vector_stores.files.create(made.id, file_id=more, attributes={"file_id": "x"})
        assert (added.id, added.vector_store_id) == (more, made.id)
        assert one.requests[-1].body == {"file_id": own[1], "attributes": {"file_id": "x"}}
        assert [each.id async for each in client.vector_stores.files.list(made.id)] == [file, more]
        assert [each.id async for each in client.vector_stores.files.list(made.id, after=file)] == [more]
        page = await gateway.get(f"/v1/vector_stores/{made.id}/files", headers={"authorization": f"Bearer {ACME}"})
        assert (page.json()["first_id"], page.json()["last_id"]) == (file, more)
        assert (await client.vector_stores.files.retrieve(file, vector_store_id=made.id)).id == file
        content = await client.vector_stores.files.content(file, vector_store_id=made.id)
        assert content.data[0].text == "found"
        batch = await client.vector_stores.file_batches.create(made.id, file_ids=[file])
        assert batch.vector_store_id == made.id
        assert (await client.vector_stores.file_batches.cancel(batch.id, vector_store_id=made.id)).status == "cancelled"
        found = await client.vector_stores.search(made.id, query="Hello")
        assert [each.file_id for each in found.data] == [file, more]
        assert found.data[0].filename == "a.txt"
        tool: Any = {"type": "file_search", "vector_store_ids": [made.id]}
        said = await client.responses.create(model="both", input="Hello", tools=[tool])
        assert one.requests[-1].body["tools"][0]["vector_store_ids"] == list(one.vector_stores.kept)
        assert said.tools[0].vector_store_ids == [made.id]  # type: ignore[union-attr]
        assert (await client.vector_stores.files.delete(more, vector_store_id=made.id)).id == more
        changed = await client.vector_stores.update(made.id, metadata={"c": "d"})
        assert changed.metadata == {"c": "d"}
        listed = [each.id async for each in client.vector_stores.list(extra_headers=FIRST)]
        assert listed == [made.id]
        assert (await client.vector_stores.delete(made.id)).deleted
        assert not two.requests
    receipts = await gateway.settled(17)
    costs = {each.operation: each.cost.state for each in receipts}
    assert (costs["vector_store_search"], costs["vector_store_create"]) == ("unpriced", "unpriced")


async def test_a_list_shows_a_tenant_its_own_vector_stores(gateway: Running) -> None:
    async with sdk(gateway) as client, sdk(gateway, OTHER) as other:
        made = await client.vector_stores.create(name="s", extra_headers=FIRST)
        await other.vector_stores.create(name="t", extra_headers=FIRST)
        assert [each.id async for each in client.vector_stores.list(extra_headers=FIRST)] == [made.id]
        with pytest.raises(openai.NotFoundError, match="Vector store with id"):
            await other.vector_stores.retrieve(made.id)
        with pytest.raises(openai.NotFoundError):
            await client.vector_stores.files.retrieve("file-unknown", vector_store_id=made.id)
        with pytest.raises(openai.BadRequestError) as caught:
            await client.vector_stores.list(before=made.id, extra_headers=FIRST)
        assert caught.value.param == "before"


async def test_files_of_two_providers_fit_into_no_vector_store(gateway: Running) -> None:
    async with sdk(gateway) as client:
        files = [await file_of(client, model) for model in ("first", "second")]
        with pytest.raises(openai.BadRequestError, match="kept by another provider"):
            await client.vector_stores.create(file_ids=files)


async def test_a_key_for_some_models_reaches_their_provider_alone(gateway: Running) -> None:
    async with sdk(gateway, NARROW) as client:
        made = await client.vector_stores.create(name="s")
        assert (await client.vector_stores.retrieve(made.id)).id == made.id
        with pytest.raises(openai.NotFoundError):
            await client.vector_stores.create(name="s", extra_headers={"x-qlens-model": "second"})


@pytest.mark.parametrize("place", ["conversations", "vector_stores"])
async def test_who_keeps_none_is_named_with_the_operation(place: str, gateway: Running, one: FakeKeeper) -> None:
    operation = {"conversations": "conversation_create", "vector_stores": "vector_store_create"}[place]
    headers = {"authorization": f"Bearer {ACME}"}
    answer = await gateway.post(f"/v1/{place}", {}, headers={**headers, "x-qlens-model": "talk"})
    error = answer.json()["error"]
    assert (answer.status, error["code"]) == (400, "unsupported_operation")
    assert error["message"] == f"No provider of the model `talk` (echo) does {operation}."
    one.script(Scripted(404, body={"error": {"message": "no such path"}}))
    answer = await gateway.post(f"/v1/{place}", {}, headers={**headers, **FIRST})
    assert answer.json()["error"]["message"] == f"The provider one does not do {operation}: it knows no such path."
    assert answer.status == 400


# --- counting and shortening -------------------------------------------------------------------


async def test_input_tokens_are_counted_by_the_provider_and_cost_nothing(gateway: Running, one: FakeKeeper) -> None:
    async with sdk(gateway) as client:
        made = await client.responses.create(model="first", input="Hello")
        counted = await client.responses.input_tokens.count(model="both", input="And?", previous_response_id=made.id)
        assert (counted.object, counted.input_tokens) == ("response.input_tokens", USAGE["input_tokens"])
        assert one.requests[-1].body == {
            "model": "upstream",
            "input": "And?",
            "previous_response_id": next(iter(one.kept)),
        }
    receipt = (await gateway.settled(2))[-1]
    assert (receipt.operation, receipt.outcome, receipt.usage.total) == ("input_tokens", "complete", 0)


async def test_where_no_provider_counts_they_are_estimated(gateway: Running) -> None:
    async with sdk(gateway) as client:
        counted = await client.responses.input_tokens.count(model="talk", input="Hello there, how are you?")
        assert 5 <= counted.input_tokens <= 30
        assert counted.model_extra == {"estimated": True}
        with pytest.raises(
            openai.BadRequestError, match="No provider of the model `talk` counts input tokens"
        ) as caught:
            await client.responses.input_tokens.count(model="talk", input="Hello", extra_body={"prompt": {"id": "p"}})
        assert caught.value.param == "prompt"


async def test_a_conversation_is_made_short_and_gone_on_with(
    gateway: Running, one: FakeKeeper, two: FakeKeeper
) -> None:
    async with sdk(gateway) as client:
        short = await client.responses.compact(model="first", input=[HELLO])
        item: Any = short.output[-1]
        assert item.type == "compaction"
        assert item.encrypted_content != one.encrypted()
        given: Any = [each.model_dump(exclude_none=True, warnings=False) for each in short.output]
        said = await client.responses.create(model="both", input=[*given, HELLO])
        assert said.output
        assert one.requests[-1].body["input"][-2]["encrypted_content"] == one.encrypted()
        assert not two.requests
    receipt = (await gateway.settled(2))[0]
    assert (receipt.operation, receipt.outcome, receipt.usage.total) == ("compaction", "complete", 13)


async def test_who_cannot_make_it_short_is_named() -> None:
    models = {"ours": {"max_output_tokens": 9, "targets": [{"provider": "up", "model": "m"}]}}
    provider = {"plugin": "openai", "base_url": "http://127.0.0.1:9/v1", "responses": False}
    text = {"pipeline": {"auth": [{"plugin": "anonymous"}]}, "providers": {"up": provider}, "models": models}
    async with running(orjson.dumps(text).decode()) as gateway:
        answer = await gateway.post("/v1/responses/compact", {"model": "ours", "input": "Hello"})
    assert answer.status == 400
    assert answer.json()["error"]["message"] == "The provider up of the model `ours` does not do compaction."


async def test_a_hard_budget_lets_pass_what_costs_nothing_and_refuses_what_nobody_prices(one: FakeKeeper) -> None:
    budget = {"plugin": "budgets", "limits": [{"per": "tenant", "usd": 1, "window": "month"}]}
    prices = {"plugin": "prices", "table": [{"model": "*", "input": 1, "output": 2}]}
    content = {
        "pipeline": {"auth": [{"plugin": "anonymous"}], "cost": [prices, budget]},
        "providers": {"one": {"plugin": "openai", "base_url": one.url, "api_key": "sk-example-0123456789"}},
        "models": {"ours": {"max_output_tokens": 100, "targets": [{"provider": "one", "model": "upstream"}]}},
    }
    async with running(orjson.dumps(content).decode()) as gateway, sdk(gateway) as client:
        made = await client.responses.create(model="ours", input="Hello")
        assert (await client.responses.retrieve(made.id)).id == made.id
        assert (await client.conversations.create()).id
        assert [each async for each in client.vector_stores.list()] == []
        assert (await client.responses.compact(model="ours", input="Hello")).usage.total_tokens == 13
        with pytest.raises(openai.BadRequestError, match="has no price for what is asked"):
            await client.vector_stores.create()
        assert not one.vector_stores.kept
