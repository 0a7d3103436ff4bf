"""Objects that providers keep: each call about one goes to its provider, and only for the tenant it was made for."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import openai
import orjson
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as checked
from hypothesis import strategies as st
from keepers import ACME, NARROW, OTHER, PROVIDER_KEY, kept, sdk, settings

from qlens.testing import Response, Running, Scripted
from qlens.testing.objects import FakeKeeper, keeper

HELLO = [{"role": "user", "content": "Hello"}]


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


def error_of(answer: Response) -> dict[str, Any]:
    error: dict[str, Any] = answer.json()["error"]
    return error


# --- responses ---------------------------------------------------------------------------------


async def test_everything_about_a_response_goes_to_the_provider_that_made_it(
    gateway: Running, one: FakeKeeper, two: FakeKeeper
) -> None:
    async with sdk(gateway) as client:
        for _ in range(8):
            made = await client.responses.create(model="both", input="Hello")
            keeps, other = (one, two) if one.kept else (two, one)
            before = len(other.requests)
            own = next(iter(keeps.kept))
            assert made.id.startswith("resp_")
            assert own not in made.id
            assert (await client.responses.retrieve(made.id)).id == made.id
            items = await client.responses.input_items.list(made.id, order="asc", limit=1)
            assert [item.type for item in items.data] == ["message"]
            await client.responses.delete(made.id)
            assert not keeps.kept
            assert [request.path for request in keeps.requests[-3:]] == [
                f"/v1/responses/{own}",
                f"/v1/responses/{own}/input_items",
                f"/v1/responses/{own}",
            ]
            assert keeps.requests[-2].query == {"order": "asc", "limit": "1"}
            assert keeps.requests[-1].headers["authorization"] == f"Bearer {PROVIDER_KEY}"
            assert len(other.requests) == before
            with pytest.raises(openai.NotFoundError, match="not found"):
                await client.responses.retrieve(made.id)


async def test_a_conversation_stays_with_its_provider(gateway: Running, one: FakeKeeper, two: FakeKeeper) -> None:
    async with sdk(gateway) as client:
        made = await client.responses.create(model="both", input="Hello")
        keeps, other = (one, two) if one.kept else (two, one)
        for turn in range(10):
            if turn % 2:
                made_next = await client.responses.create(model="both", input="And?", previous_response_id=made.id)
            else:
                async with client.responses.stream(model="both", input="And?", previous_response_id=made.id) as stream:
                    seen = {event.response.id async for event in stream if hasattr(event, "response")}
                    made_next = await stream.get_final_response()
                    assert seen == {made_next.id}
            assert made_next.previous_response_id == made.id
            made = made_next
        assert len(keeps.kept) == 11
        assert not other.requests
        kept_ids = [*keeps.kept]
        assert [kept.response["previous_response_id"] for kept in keeps.kept.values()] == [None, *kept_ids[:-1]]


async def test_a_failing_provider_is_not_replaced_by_one_that_does_not_have_the_object(
    gateway: Running, one: FakeKeeper, two: FakeKeeper
) -> None:
    async with sdk(gateway) as client:
        made = await client.responses.create(model="first", input="Hello")
        one.script(Scripted(status=503))
        with pytest.raises(openai.InternalServerError) as caught:
            await client.responses.create(model="both", input="And?", previous_response_id=made.id)
        assert caught.value.status_code == 503
        assert not two.requests


async def test_a_response_in_the_background_is_cancelled_and_its_stream_taken_up(gateway: Running) -> None:
    async with sdk(gateway) as client:
        made = await client.responses.create(model="both", input="Hello", background=True)
        stream = await client.responses.retrieve(made.id, stream=True, starting_after=1)
        events = [event async for event in stream]
        assert events[-1].type == "response.completed"
        assert events[-1].response.id == made.id
        assert (await client.responses.cancel(made.id)).status == "cancelled"
    receipts = await gateway.settled(3)
    assert [(each.operation, each.outcome, each.streamed, each.usage.total) for each in receipts[1:]] == [
        ("response", "complete", True, 0),
        ("response_cancel", "complete", False, 0),
    ]
    assert receipts[1].bytes_out > 500


async def test_what_the_provider_says_of_a_mistake_reaches_the_client(gateway: Running) -> None:
    async with sdk(gateway) as client:
        made = await client.responses.create(model="first", input="Hello")
        with pytest.raises(openai.BadRequestError, match="Cannot cancel a synchronous response"):
            await client.responses.cancel(made.id)


async def test_a_response_of_a_provider_that_speaks_chat_is_kept_nowhere(gateway: Running) -> None:
    async with sdk(gateway) as client:
        made = await client.responses.create(model="talk", input="Hello")
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve(made.id)


# --- whose it is -------------------------------------------------------------------------------


async def everything(gateway: Running, one: FakeKeeper) -> dict[str, str]:
    """An object of each kind of the first tenant."""
    async with sdk(gateway) as client:
        file = await client.files.create(file=("in.jsonl", b"{}"), purpose="batch", extra_body={"model": "first"})
        batch = await client.batches.create(
            input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
        )
        response = await client.responses.create(model="first", input="Hello")
    return {"responses": response.id, "files": file.id, "batches": batch.id}


UNKNOWN = {"responses": "resp_unknown", "files": "file-unknown", "batches": "batch_unknown"}
PLACES = [
    ("GET", "responses", ""),
    ("DELETE", "responses", ""),
    ("POST", "responses", "/cancel"),
    ("GET", "responses", "/input_items"),
    ("GET", "files", ""),
    ("DELETE", "files", ""),
    ("GET", "files", "/content"),
    ("GET", "batches", ""),
    ("POST", "batches", "/cancel"),
]


async def test_another_tenants_object_is_byte_for_byte_an_unknown_one(gateway: Running, one: FakeKeeper) -> None:
    ids = await everything(gateway, one)
    before = len(one.requests)
    for method, place, rest in PLACES:
        foreign = await gateway.request(method, f"/v1/{place}/{ids[place]}{rest}", key=OTHER)
        unknown = await gateway.request(method, f"/v1/{place}/{UNKNOWN[place]}{rest}", key=OTHER)
        assert (foreign.status, unknown.status) == (404, 404)
        assert foreign.body.replace(ids[place].encode(), b"ID") == unknown.body.replace(UNKNOWN[place].encode(), b"ID")
        assert foreign.headers.keys() == unknown.headers.keys()
    assert len(one.requests) == before


async def test_another_tenants_objects_cannot_be_named_in_bodies(gateway: Running, one: FakeKeeper) -> None:
    ids = await everything(gateway, one)
    before = len(one.requests)
    file = {"type": "input_file", "file_id": ids["files"]}
    part = {"type": "file", "file": {"file_id": ids["files"]}}
    tool = {"type": "code_interpreter", "container": {"type": "auto", "file_ids": [ids["files"]]}}
    bodies: list[tuple[str, dict[str, Any], str]] = [
        ("responses", {"input": "And?", "previous_response_id": ids["responses"]}, "previous_response_id"),
        ("responses", {"input": [{"role": "user", "content": [file]}]}, "input[0].content[0].file_id"),
        ("responses", {"input": "x", "tools": [tool]}, "tools[0].container.file_ids"),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": [part]}]},
            "messages[0].content[0].file.file_id",
        ),
        (
            "batches",
            {"input_file_id": ids["files"], "endpoint": "/v1/responses", "completion_window": "24h"},
            "input_file_id",
        ),
    ]
    for place, body, param in bodies:
        answer = await gateway.post(f"/v1/{place}", {"model": "first", **body}, key=OTHER)
        assert (answer.status, error_of(answer)["param"]) == (400, param)
    assert len(one.requests) == before


async def test_a_providers_own_id_is_good_for_nothing(gateway: Running, one: FakeKeeper) -> None:
    ids = await everything(gateway, one)
    own = {"responses": next(iter(one.kept)), "files": next(iter(one.files)), "batches": next(iter(one.batches))}
    assert not {*own.values()} & {*ids.values()}
    before = len(one.requests)
    for method, place, rest in PLACES:
        assert (await gateway.request(method, f"/v1/{place}/{own[place]}{rest}", key=ACME)).status == 404
    escaped = b'{"model":"first","input":[{"role":"user","content":[{"type":"input_file","file\\u005fid":"%b"}]}]}'
    assert (await gateway.post("/v1/responses", escaped % own["files"].encode(), key=ACME)).status == 400
    assert len(one.requests) == before


async def test_lists_show_a_tenant_its_own_alone(gateway: Running, one: FakeKeeper) -> None:
    one.keep_file(b"of the operator")
    ids = await everything(gateway, one)
    async with sdk(gateway) as client, sdk(gateway, OTHER) as stranger:
        named = {"model": "first"}
        assert [each.id async for each in client.files.list(extra_query=named)] == [ids["files"]]
        for model in ("first", "both"):  # whichever model names the provider: an object has one id
            headers = {"x-qlens-model": model}
            assert [each.id async for each in client.batches.list(extra_headers=headers)] == [ids["batches"]]
        assert [each.id async for each in stranger.files.list(extra_query=named)] == []
        assert [each.id async for each in stranger.batches.list(extra_query=named)] == []
        mine = await stranger.files.create(file=("mine.txt", b"x"), purpose="user_data", extra_body=named)
        assert [each.filename async for each in stranger.files.list(extra_query=named)] == ["mine.txt"]
        assert mine.filename == "mine.txt"
        for limit in ("0", "%D9%A1", "%EF%BC%91", "1.5", "10001"):
            assert (await gateway.get(f"/v1/files?model=first&limit={limit}", key=OTHER)).status == 400, limit


async def test_long_lists_are_found_page_by_page(gateway: Running, one: FakeKeeper) -> None:
    async with sdk(gateway) as client, sdk(gateway, OTHER) as stranger:
        file = await client.files.create(file=("in.jsonl", b"{}"), purpose="batch", extra_body={"model": "first"})
        others = await stranger.files.create(file=("o.jsonl", b"{}"), purpose="batch", extra_body={"model": "first"})
        made = []
        for number in range(5):
            for owner, name in ((client, file.id), (stranger, others.id), (stranger, others.id)):
                batch = await owner.batches.create(
                    input_file_id=name,
                    endpoint="/v1/responses",
                    completion_window="24h",
                    metadata={"number": str(number)},
                )
                if owner is client:
                    made.append(batch)
        listed = [each async for each in client.batches.list(limit=2, extra_query={"model": "first"})]
        assert [each.id for each in listed] == [each.id for each in made[::-1]]
        assert [each.metadata for each in listed] == [{"number": str(number)} for number in range(4, -1, -1)]
        foreign = await gateway.get(f"/v1/batches?model=first&after={made[0].id}", key=OTHER)
        assert foreign.status == 404


async def test_what_one_tenant_says_of_itself_makes_it_no_other_one(gateway: Running, one: FakeKeeper) -> None:
    ids = await everything(gateway, one)
    async with sdk(gateway) as client, sdk(gateway, OTHER) as stranger:
        mark = one.batches[next(iter(one.batches))]["metadata"]["qlens_tenant"]
        assert "qlens_tenant" not in ((await client.batches.retrieve(ids["batches"])).metadata or {})
        file = await stranger.files.create(
            file=(f"{mark}-in.jsonl", b"{}"), purpose="batch", extra_body={"model": "first"}
        )
        await stranger.batches.create(
            input_file_id=file.id,
            endpoint="/v1/responses",
            completion_window="24h",
            metadata={"qlens_tenant": mark},
        )
        await stranger.batches.create(
            input_file_id=file.id,
            endpoint="/v1/responses",
            completion_window="24h",
            metadata={"qlens_tenant": mark, **{f"k{number}": "v" for number in range(15)}},
        )
        assert [each.id async for each in client.batches.list(extra_query={"model": "first"})] == [ids["batches"]]
        assert [each.id async for each in client.files.list(extra_query={"model": "first"})] == [ids["files"]]


async def test_a_key_for_some_models_reaches_only_what_they_made(gateway: Running) -> None:
    async with sdk(gateway) as client, sdk(gateway, NARROW) as narrow:
        first = await client.responses.create(model="first", input="Hello")
        second = await client.responses.create(model="second", input="Hello")
        assert (await narrow.responses.retrieve(first.id)).id == first.id
        with pytest.raises(openai.NotFoundError):
            await narrow.responses.retrieve(second.id)
        file = await client.files.create(file=("a", b"a"), purpose="user_data", extra_body={"model": "second"})
        with pytest.raises(openai.NotFoundError):
            await narrow.files.retrieve(file.id)  # kept by a provider of none of its models
        with pytest.raises(openai.BadRequestError, match="some models only"):
            await narrow.batches.create(input_file_id="file-x", endpoint="/v1/responses", completion_window="24h")


@checked(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_no_forged_id_reaches_a_provider(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(sorted(UNKNOWN)))
    flips = data.draw(st.lists(st.tuples(st.integers(0, 400), st.integers(0, 6)), min_size=1, max_size=3, unique=True))

    async def forge() -> None:
        async with keeper() as one, keeper() as two, kept(settings(one, two)) as gateway:
            made = (await everything(gateway, one))[kind]
            forged = bytearray(made.encode())
            for place, bit in flips:
                forged[place % len(forged)] ^= 1 << bit
            if forged == made.encode():
                return
            before = len(one.requests)
            path = "".join(f"%{byte:02x}" for byte in forged)
            answer = await gateway.get(f"/v1/{kind}/{path}", key=ACME)
            assert answer.status in {400, 404}
            assert len(one.requests) == before

    asyncio.run(forge())


# --- where it goes -----------------------------------------------------------------------------


async def test_a_file_goes_to_the_model_that_is_named_and_comes_back_as_it_was(
    gateway: Running, one: FakeKeeper, two: FakeKeeper
) -> None:
    content = bytes(range(256)) * 8192
    async with sdk(gateway) as client:
        for options in ({"extra_body": {"model": "second"}}, {"extra_headers": {"x-qlens-model": "second"}}):
            file = await client.files.create(file=("data.bin", content), purpose="user_data", **options)  # type: ignore[arg-type]
            assert (file.filename, file.bytes) == ("data.bin", len(content))
            async with client.files.with_streaming_response.content(file.id) as answer:
                assert answer.headers["content-type"] == "application/octet-stream"
                assert b"".join([piece async for piece in answer.iter_bytes()]) == content
            assert (await client.files.retrieve(file.id)).id == file.id
            assert (await client.files.delete(file.id)).deleted
    assert not one.requests
    assert not two.files
    receipts = await gateway.settled(8)
    assert {(each.outcome, each.usage.total) for each in receipts} == {("complete", 0)}
    assert receipts[1].bytes_out == len(content)


async def test_the_only_provider_need_not_be_named(gateway: Running, one: FakeKeeper) -> None:
    async with sdk(gateway, NARROW) as client:  # of its models only one provider keeps files
        file = await client.files.create(file=("a.txt", b"a"), purpose="user_data")
        assert [each.id async for each in client.files.list()] == [file.id]
    assert len(one.files) == 1


async def test_whoever_names_no_model_where_several_providers_could_is_told(gateway: Running) -> None:
    for path in ("/v1/files", "/v1/batches"):
        answer = await gateway.get(path, key=ACME)
        assert (answer.status, error_of(answer)["param"]) == (400, "model")
        assert "x-qlens-model" in error_of(answer)["message"]
    async with sdk(gateway) as client:
        with pytest.raises(openai.BadRequestError, match="form field model"):
            await client.files.create(file=("a.txt", b"a"), purpose="user_data")
        with pytest.raises(openai.NotFoundError, match="does not exist"):
            await client.files.create(file=("a.txt", b"a"), purpose="user_data", extra_body={"model": "none"})
        with pytest.raises(openai.BadRequestError, match=r"No provider of the model `talk` \(echo\) does file_upload"):
            await client.files.create(file=("a.txt", b"a"), purpose="user_data", extra_body={"model": "talk"})


async def test_a_call_with_a_file_goes_to_the_provider_that_keeps_it(
    gateway: Running, one: FakeKeeper, two: FakeKeeper
) -> None:
    async with sdk(gateway) as client:
        file = await client.files.create(file=("a.pdf", b"%PDF"), purpose="user_data", extra_body={"model": "second"})
    own = next(iter(two.files))
    part = {"type": "input_file", "file_id": file.id}
    chat = {"type": "file", "file": {"file_id": file.id}}
    for _ in range(6):
        answer = await gateway.post(
            "/v1/responses", {"model": "both", "input": [{"role": "user", "content": [part]}]}, key=ACME
        )
        assert answer.status == 200
        assert two.requests[-1].body["input"][0]["content"] == [{"type": "input_file", "file_id": own}]
        items = await gateway.get(f"/v1/responses/{answer.json()['id']}/input_items", key=ACME)
        assert items.json()["data"][0]["content"][0]["file_id"] == file.id
        messages = [{"role": "user", "content": [chat]}]
        assert (
            await gateway.post("/v1/chat/completions", {"model": "both", "messages": messages}, key=ACME)
        ).status == 200
        assert two.requests[-1].body["messages"][0]["content"][0]["file"] == {"file_id": own}
    assert not one.requests


async def test_objects_of_two_providers_fit_into_no_call(gateway: Running, one: FakeKeeper, two: FakeKeeper) -> None:
    async with sdk(gateway) as client:
        made = await client.responses.create(model="first", input="Hello")
        file = await client.files.create(file=("a.pdf", b"%PDF"), purpose="user_data", extra_body={"model": "second"})
        part: Any = {"type": "input_file", "file_id": file.id}
        with pytest.raises(openai.BadRequestError, match="kept by another provider than the one in"):
            await client.responses.create(
                model="both", previous_response_id=made.id, input=[{"role": "user", "content": [part]}]
            )
        with pytest.raises(openai.BadRequestError, match="a provider that the model `second` does not have"):
            await client.responses.create(model="second", previous_response_id=made.id, input="And?")


async def test_what_looks_like_an_id_in_a_schema_or_in_metadata_is_none(gateway: Running, one: FakeKeeper) -> None:
    schema = {"type": "object", "properties": {"file_id": {"const": "file-x"}}, "file_id": "file-x"}
    tool = {"type": "function", "name": "f", "parameters": schema}
    body = {"model": "first", "input": "Hello", "metadata": {"file_id": "file-x"}, "tools": [tool]}
    answer = await gateway.post("/v1/responses", body, key=ACME)
    assert answer.status == 200
    assert one.requests[-1].body["tools"] == [tool]
    assert answer.json()["tools"] == [tool]
    assert answer.json()["metadata"] == {"file_id": "file-x"}


# --- batches -----------------------------------------------------------------------------------


async def test_a_batch_runs_where_its_input_is(gateway: Running, one: FakeKeeper, two: FakeKeeper) -> None:
    async with sdk(gateway) as client:
        file = await client.files.create(file=("in.jsonl", b"{}"), purpose="batch", extra_body={"model": "second"})
        batch = await client.batches.create(
            input_file_id=file.id, endpoint="/v1/responses", completion_window="24h", metadata={"a": "b"}
        )
        assert (batch.input_file_id, batch.metadata) == (file.id, {"a": "b"})
        two.complete(next(iter(two.batches)), b'{"custom_id": "1"}\n')
        done = await client.batches.retrieve(batch.id)
        assert done.output_file_id is not None
        assert (await client.files.content(done.output_file_id)).text == '{"custom_id": "1"}\n'
        assert (await client.batches.cancel(batch.id)).id == batch.id
    assert not one.requests


async def test_what_a_batch_will_use_is_not_known_and_not_free(one: FakeKeeper, two: FakeKeeper) -> None:
    table = "[{plugin: prices, table: [{model: '*', input: 1, output: 2}]}]"
    async with kept(settings(one, two).replace("cost: []", f"cost: {table}")) as gateway, sdk(gateway) as client:
        file = await client.files.create(file=("in.jsonl", b"{}"), purpose="batch", extra_body={"model": "first"})
        batch = await client.batches.create(input_file_id=file.id, endpoint="/v1/responses", completion_window="24h")
        await client.batches.retrieve(batch.id)
        costs = {each.operation: (each.cost.picos, each.cost.state) for each in await gateway.settled(3)}
    assert costs["batch_create"] == (None, "unpriced")
    assert costs["batch"][0] == 0  # to ask how it goes is free


async def test_a_batch_with_full_metadata_is_made_all_the_same(gateway: Running) -> None:
    metadata = {f"k{number}": "v" for number in range(16)}
    async with sdk(gateway, ACME) as client:
        file = await client.files.create(file=("in.jsonl", b"{}"), purpose="batch", extra_body={"model": "first"})
        batch = await client.batches.create(
            input_file_id=file.id, endpoint="/v1/responses", completion_window="24h", metadata=metadata
        )
        assert batch.metadata == metadata
        assert (await client.batches.retrieve(batch.id)).metadata == metadata


@pytest.mark.parametrize(("realtime", "made"), [("refuse", 0), ("pass", 1)])
async def test_batches_are_refused_where_a_guard_would_not_see_their_lines(
    one: FakeKeeper, two: FakeKeeper, realtime: str, made: int
) -> None:
    rule = "{name: x, regex: secret, action: block}"
    guards = f"[{{plugin: pattern, realtime: {realtime}, rules: [{rule}]}}]"
    async with kept(settings(one, two, guards=guards)) as gateway, sdk(gateway) as client:
        file = await client.files.create(file=("in.jsonl", b"{}"), purpose="batch", extra_body={"model": "first"})
        with contextlib.nullcontext() if made else pytest.raises(openai.BadRequestError, match="the guard pattern"):
            await client.batches.create(input_file_id=file.id, endpoint="/v1/responses", completion_window="24h")
    assert len(one.batches) == made


async def test_batches_are_refused_where_a_limit_must_know_what_they_generate(one: FakeKeeper, two: FakeKeeper) -> None:
    limits = "[{plugin: token_bucket, limits: [{per: tenant, tokens_per_minute: 100000}]}]"
    async with kept(settings(one, two, limits=limits)) as gateway, sdk(gateway) as client:
        file = await client.files.create(file=("in.jsonl", b"{}"), purpose="batch", extra_body={"model": "first"})
        with pytest.raises(openai.BadRequestError, match="token_bucket must know"):
            await client.batches.create(input_file_id=file.id, endpoint="/v1/responses", completion_window="24h")
    assert not one.batches


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input_file_id"),
        ({"input_file_id": 5}, "input_file_id"),
        ({"input_file_id": "file-x"}, "endpoint"),
        ({"input_file_id": "file-x", "endpoint": "/v1/responses", "completion_window": "24h"}, "input_file_id"),
    ],
)
async def test_a_batch_that_lacks_something_is_refused_here(
    gateway: Running, one: FakeKeeper, body: dict[str, Any], param: str
) -> None:
    answer = await gateway.post("/v1/batches", body, key=ACME)
    assert (answer.status, error_of(answer)["param"]) == (400, param)
    assert not one.requests


# --- configurations ----------------------------------------------------------------------------


async def test_ids_outlast_a_restart_and_are_good_at_every_replica(one: FakeKeeper, two: FakeKeeper) -> None:
    text = settings(one, two)
    async with kept(text) as first, kept(text) as replica, sdk(first) as client, sdk(replica) as other:
        made = await client.responses.create(model="first", input="Hello")
        assert (await other.responses.retrieve(made.id)).id == made.id
    async with kept(text) as later, sdk(later) as client:
        assert (await client.responses.retrieve(made.id)).id == made.id


async def test_an_object_whose_model_is_gone_is_still_there_and_one_whose_provider_is_gone_says_so(
    one: FakeKeeper, two: FakeKeeper
) -> None:
    server = "{id_key: 0123456789abcdef0123456789abcdef}"
    text = settings(one, two, server=server)
    async with kept(text) as gateway, sdk(gateway) as client:
        made = await client.responses.create(model="first", input="Hello")
        gone = [line for line in text.splitlines() if not line.startswith("  first:")]
        await gateway.reload("\n".join(gone))
        assert (await client.responses.retrieve(made.id)).id == made.id
        await gateway.reload(text.replace("provider: one", "provider: two").replace("  one: {", "  three: {"))
        with pytest.raises(openai.NotFoundError, match="The provider one, which keeps this object"):
            await client.responses.retrieve(made.id)
        with pytest.raises(openai.BadRequestError, match="kept by a provider that the model `both` does not have"):
            await client.responses.create(model="both", input="And?", previous_response_id=made.id)


async def test_a_provider_without_any_secret_keeps_nothing(one: FakeKeeper, two: FakeKeeper) -> None:
    async with kept(settings(one, two, key="short")) as gateway, sdk(gateway) as client:
        made = await client.responses.create(model="first", input="Hello")
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve(made.id)
        with pytest.raises(openai.BadRequestError, match=r"server\.id_key"):
            await client.files.create(file=("a.txt", b"a"), purpose="user_data", extra_body={"model": "first"})
    assert not one.files


async def test_a_provider_may_keep_no_files(one: FakeKeeper, two: FakeKeeper) -> None:
    async with kept(settings(one, two, more=", files: false")) as gateway, sdk(gateway) as client:
        with pytest.raises(openai.BadRequestError, match=r"No provider of the model `first` \(one\) does files"):
            [each async for each in client.files.list(extra_query={"model": "first"})]
        file = await client.files.create(file=("a.txt", b"a"), purpose="user_data")  # one is left that could
        assert (await client.files.retrieve(file.id)).id == file.id
    assert len(two.files) == 1


# --- what providers do -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scripted", "status", "code"),
    [
        (Scripted(status=401, body={"error": {"message": "bad key"}}), 502, "upstream_auth_error"),
        (Scripted(status=500), 502, "upstream_error"),
        (Scripted(body=b"no JSON", headers={"content-type": "application/json"}), 502, "upstream_invalid_response"),
        (Scripted(body=b"[]", headers={"content-type": "application/json"}), 502, "upstream_invalid_response"),
        (Scripted(raw=b""), 502, "upstream_unreachable"),
    ],
)
async def test_a_provider_that_fails_is_an_error_like_any_other(
    gateway: Running, one: FakeKeeper, scripted: Scripted, status: int, code: str
) -> None:
    made = await gateway.post("/v1/responses", {"model": "first", "input": "Hello"}, key=ACME)
    one.script(scripted, scripted)
    answer = await gateway.get(f"/v1/responses/{made.json()['id']}", key=ACME)
    assert (answer.status, error_of(answer)["code"]) == (status, code)
    receipts = await gateway.settled(2)
    assert (receipts[1].outcome, receipts[1].cost.picos) == ("failed", 0)


async def test_a_file_that_breaks_off_is_not_taken_for_the_whole(gateway: Running, one: FakeKeeper) -> None:
    async with sdk(gateway) as client:
        file = await client.files.create(file=("a", b"a"), purpose="user_data", extra_body={"model": "first"})
        one.script(Scripted(body=b"x" * 100_000, headers={"content-type": "application/octet-stream"}, cut_at=50_000))
        with pytest.raises(openai.APIConnectionError):
            await client.files.content(file.id)
    receipts = await gateway.settled(2)
    assert (receipts[1].outcome, receipts[1].error) == ("failed", "upstream_truncated")


async def test_the_client_sees_where_the_answer_came_from(gateway: Running) -> None:
    made = await gateway.post("/v1/responses", {"model": "first", "input": "Hello"}, key=ACME)
    answer = await gateway.get(f"/v1/responses/{made.json()['id']}", key=ACME)
    assert (answer.headers["x-qlens-provider"], answer.headers["x-qlens-model"]) == ("one", "first")
    assert orjson.loads(answer.body)["id"] == made.json()["id"]
