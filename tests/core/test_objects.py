"""Encrypted reasoning: it goes back to whoever can read it, and a conversation never fails for what nobody can."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from keepers import ACME, OTHER, kept, sdk, settings

from qlens import sse
from qlens.bridges.responses_over_chat import thoughts
from qlens.object_ids import ObjectIds
from qlens.objects import Sealer, _SealedEvents
from qlens.testing import Response, Running, Scripted
from qlens.testing.objects import FakeKeeper, keeper

Body = dict[str, Any]
HELLO: Any = {"role": "user", "content": "Hello"}
THINK: Any = {"reasoning": {"effort": "low"}, "store": False, "include": ["reasoning.encrypted_content"]}
KEYLESS = "short"


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


async def ask(gateway: Running, model: str, *items: Body, key: str = ACME, **fields: Any) -> Response:
    return await gateway.post(
        "/v1/responses", {"model": model, "input": [HELLO, *items, HELLO], **THINK, **fields}, key=key
    )


async def thought(gateway: Running, model: str, **fields: Any) -> list[Body]:
    """The output of a model that has reasoned: a thought and a message."""
    answer = await ask(gateway, model, **fields)
    assert answer.status == 200, answer.text
    output: list[Body] = answer.json()["output"]
    return output


def sent(up: FakeKeeper) -> list[Body]:
    """What stands between the client's two questions in the last request."""
    items: list[Body] = up.requests[-1].body["input"]
    return items[1:-1]


# --- there and back ----------------------------------------------------------------------------


def busier(one: FakeKeeper, two: FakeKeeper, before: tuple[int, int]) -> FakeKeeper:
    """The one of two accounts that had all the requests since."""
    more = len(one.requests) - before[0], len(two.requests) - before[1]
    assert sorted(more) == [0, 2]
    return one if more[0] else two


@pytest.mark.parametrize("key", ["sk-example-provider-0123456789", KEYLESS])
@pytest.mark.parametrize("stream", [False, True])
async def test_reasoning_goes_back_to_its_account_whoever_is_asked_first(
    one: FakeKeeper, two: FakeKeeper, key: str, stream: bool
) -> None:
    async with kept(settings(one, two, key=key)) as gateway, sdk(gateway) as client:
        for _ in range(6):
            before = len(one.requests), len(two.requests)
            if stream:
                events = [
                    e async for e in await client.responses.create(model="both", input="Hi", stream=True, **THINK)
                ]
                done: Any = [event.item for event in events if event.type == "response.output_item.done"]
                made: Any = events[-1].response
                assert [item.to_dict() for item in done] == [item.to_dict() for item in made.output]
            else:
                made = await client.responses.create(model="both", input="Hi", **THINK)
            items = [item.to_dict() for item in made.output]
            await client.responses.create(model="both", input=[HELLO, *items, HELLO], **THINK)
            keeps = busier(one, two, before)
            assert items[0]["encrypted_content"] != keeps.encrypted() == sent(keeps)[0]["encrypted_content"]


async def test_reasoning_that_is_kept_under_its_id_goes_back_too(
    gateway: Running, one: FakeKeeper, two: FakeKeeper
) -> None:
    async with sdk(gateway) as client:
        for _ in range(14):  # by chance alone the right one of two is asked each time once in 16,000 runs
            before = len(one.requests), len(two.requests)
            made = await client.responses.create(model="both", input="Hi", reasoning={"effort": "low"})
            items: Any = [item.to_dict() for item in made.output]
            assert items[0]["type"] == "reasoning"
            await client.responses.create(model="both", input=[HELLO, *items, HELLO])
            assert "encrypted_content" not in sent(busier(one, two, before))[0]


async def test_what_is_asked_for_later_is_sealed_as_well(gateway: Running, one: FakeKeeper) -> None:
    async with sdk(gateway) as client:
        made = await client.responses.create(model="first", input="Hi", **{**THINK, "store": True})
        found = await client.responses.retrieve(made.id, include=["reasoning.encrypted_content"])
        assert found.output == made.output
        items: Any = [item.to_dict() for item in made.output]
        follow = await client.responses.create(model="both", input=[HELLO, *items, HELLO])
        listed = await client.responses.input_items.list(follow.id, order="asc")
        assert listed.data[1].to_dict()["encrypted_content"] == items[0]["encrypted_content"]


EVENT = {"type": "response.output_item.done", "item": {"type": "reasoning", "encrypted_content": "gAAAA" * 40}}
BARE = {"type": "response.output_item.added", "item": {"type": "reasoning", "summary": []}}
TEXT = {"type": "response.output_text.delta", "delta": '"encrypted_content": "x", "type": "reasoning"'}


@given(st.lists(st.sampled_from([EVENT, BARE, TEXT]), max_size=6), st.data())
async def test_no_cut_between_chunks_lets_content_pass_unsealed(events: list[Body], data: st.DataObject) -> None:
    block = b"".join(b"event: %b\ndata: %b\n\n" % (str(e["type"]).encode(), orjson.dumps(e)) for e in events)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(block)), max_size=8)))
    sealer = Sealer(ObjectIds(master=b"k" * 32), "acme", "one", "m")

    async def chunks() -> AsyncIterator[bytes]:
        for start, end in zip([0, *cuts], [*cuts, len(block)], strict=True):
            yield block[start:end]

    passed = b"".join([chunk async for chunk in _SealedEvents(chunks(), sealer)])
    read = [orjson.loads(sse.data(event) or b"") for event in sse.cut(passed)]
    assert [event["type"] for event in read] == [event["type"] for event in events]
    for event, given_event in zip(read, events, strict=True):
        if "delta" in event:
            assert event == given_event
            continue
        own = given_event["item"].get("encrypted_content", "")
        assert sealer.ids.open_content("acme", event["item"]["encrypted_content"]) == ("one", own)


# --- what nobody who is asked can read ---------------------------------------------------------


async def test_after_a_change_of_models_the_others_reasoning_is_left_out(
    gateway: Running, one: FakeKeeper, two: FakeKeeper
) -> None:
    items = await thought(gateway, "first")
    assert (await ask(gateway, "second", *items)).status == 200
    (message,) = sent(two)
    assert message["content"] == items[1]["content"]
    # By its id the provider would know that reasoning belongs to it.
    assert "id" not in message
    mixed = [*items, *await thought(gateway, "second")]
    assert (await ask(gateway, "both", *mixed)).status == 200
    assert [item["type"] for item in sent(two)] == ["message", "reasoning", "message"]
    assert sent(two)[2]["id"] == mixed[3]["id"]
    assert (await ask(gateway, "first", *mixed)).status == 200
    assert [item["type"] for item in sent(one)] == ["reasoning", "message", "message"]


async def test_reasoning_for_a_model_of_another_dialect_is_left_out(gateway: Running) -> None:
    assert (await ask(gateway, "talk", *await thought(gateway, "first"))).status == 200


async def test_thoughts_that_a_bridge_has_closed_go_to_no_account(gateway: Running, one: FakeKeeper) -> None:
    closed = thoughts.closed([{"type": "thinking", "thinking": "So", "signature": "c2ln"}])
    item = {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": closed}
    said = {"type": "message", "role": "assistant", "content": "Hi", "id": "msg_1"}
    assert (await ask(gateway, "both", item, said)).status == 200
    assert (await ask(gateway, "first", item, said)).status == 200
    assert sent(one) == [{"type": "message", "role": "assistant", "content": "Hi"}]


async def test_another_object_says_who_is_asked(gateway: Running, one: FakeKeeper, two: FakeKeeper) -> None:
    items = await thought(gateway, "first")
    answer = await gateway.post("/v1/responses", {"model": "second", "input": "Hello"}, key=ACME)
    follow = await ask(gateway, "both", *items, previous_response_id=answer.json()["id"], store=True)
    assert follow.status == 200
    assert [item["type"] for item in sent(two)] == ["message"]


async def test_reasoning_of_a_provider_that_is_gone_or_has_a_new_secret_is_left_out(
    one: FakeKeeper, two: FakeKeeper
) -> None:
    server = "{id_key: 0123456789abcdef0123456789abcdef}"
    for text, renamed in ((settings(one, two), False), (settings(one, two, server=server), True)):
        async with kept(text) as gateway:
            items = await thought(gateway, "first")
            gone = text.replace("provider: one", "provider: two").replace("  one: {", "  three: {")
            await gateway.reload(gone if renamed else text.replace("sk-example-provider", "sk-example-renewed-key"))
            for model in ("first", "both"):
                assert (await ask(gateway, model, *items)).status == 200


async def test_another_tenant_cannot_have_it_read(gateway: Running, one: FakeKeeper) -> None:
    items = await thought(gateway, "first")
    assert (await ask(gateway, "first", *items, key=OTHER)).status == 200
    assert [item["type"] for item in sent(one)] == ["message"]
    altered = items[0]["encrypted_content"].replace(".", ".x", 2)
    assert (await ask(gateway, "first", {**items[0], "encrypted_content": altered})).status == 200
    assert sent(one) == []


# --- what must not be left out -----------------------------------------------------------------


async def test_a_shortened_conversation_goes_to_its_maker_or_is_refused(
    gateway: Running, one: FakeKeeper, two: FakeKeeper
) -> None:
    one.script(Scripted(body=_response({"type": "compaction", "id": "cmp_1", "encrypted_content": one.encrypted()})))
    (item,) = (await gateway.post("/v1/responses", {"model": "first", "input": "Hi"}, key=ACME)).json()["output"]
    for _ in range(4):
        assert (await ask(gateway, "both", item)).status == 200
        assert sent(one)[0]["encrypted_content"] == one.encrypted()
    assert not two.requests
    for refused, code in (
        (await ask(gateway, "second", item), None),
        (await ask(gateway, "both", item, key=OTHER), "invalid_encrypted_content"),
        (await ask(gateway, "both", {**item, "encrypted_content": "qlens-sealed-1.!"}), "invalid_encrypted_content"),
    ):
        error = refused.json()["error"]
        assert (refused.status, error["param"], error["code"]) == (400, "input[1].encrypted_content", code)
    # What was thought elsewhere does not take it away.
    assert (await ask(gateway, "both", item, *await thought(gateway, "second"))).status == 200
    assert [each["type"] for each in sent(one)] == ["compaction", "message"]


async def test_content_from_elsewhere_passes_where_one_provider_alone_can_have_made_it(
    gateway: Running, one: FakeKeeper, two: FakeKeeper
) -> None:
    item = {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": one.encrypted()}
    assert (await ask(gateway, "first", item)).status == 200
    assert sent(one) == [item]
    assert (await ask(gateway, "talk", item)).status == 200
    refused = await ask(gateway, "both", item)
    error = refused.json()["error"]
    assert (refused.status, error["param"]) == (400, "input[1].encrypted_content")
    assert error["code"] == "invalid_encrypted_content"
    assert "leave this item out" in error["message"]
    # A provider's own refusal is OpenAI's.
    refused = await ask(gateway, "second", item)
    assert (refused.status, refused.json()["error"]["code"]) == (400, "invalid_encrypted_content")


# --- what no id that was sealed here names -----------------------------------------------------


def reference(item: Body) -> Body:
    return {"type": "item_reference", "id": item["id"]}


def check_refused(answer: Response, param: str, code: str | None = "unsupported_parameter") -> None:
    error = answer.json()["error"]
    assert (answer.status, error["param"], error["code"]) == (400, param, code), answer.text


async def test_a_reference_to_an_item_goes_to_the_one_that_can_keep_it_or_to_nobody(
    gateway: Running, one: FakeKeeper, two: FakeKeeper
) -> None:
    known = reference((await thought(gateway, "first", store=True))[1])
    assert (await ask(gateway, "first", known)).status == 200
    assert sent(one)[-1]["id"] == known["id"]
    before = len(one.requests)
    for item in (known, {"id": known["id"]}, {**known, "type": None}):
        refused = await ask(gateway, "both", item)
        check_refused(refused, "input[1].id")
        assert "previous_response_id" in refused.json()["error"]["message"]
    assert (len(one.requests), len(two.requests)) == (before, 0)


async def test_a_reference_beside_an_earlier_response_goes_to_its_account(
    gateway: Running, one: FakeKeeper, two: FakeKeeper
) -> None:
    made = (await ask(gateway, "second", store=True)).json()
    items = [HELLO, reference(made["output"][1]), HELLO]
    asked: Body = {"model": "both", "previous_response_id": made["id"], "input": items}
    for _ in range(6):
        answer = await gateway.post("/v1/responses", asked, key=ACME)
        assert answer.status == 200, answer.text
        assert sent(two) == items[1:-1]
    assert not one.requests
    before = len(two.requests)
    refused = await gateway.post("/v1/responses", asked, key=OTHER)
    check_refused(refused, "previous_response_id", "previous_response_not_found")
    assert len(two.requests) == before


@pytest.mark.parametrize("conversation", ["conv_1", {"id": "conv_1"}, {}, ""])
async def test_a_conversation_that_the_tenant_does_not_have_goes_to_nobody(
    gateway: Running, one: FakeKeeper, two: FakeKeeper, conversation: Any
) -> None:
    made = (await ask(gateway, "first", store=True)).json()
    before = len(one.requests)
    besides: list[Body] = [{}, {"previous_response_id": made["id"]}, {"input": "Hello"}]
    for fields in besides:
        for model in ("first", "both"):
            check_refused(await ask(gateway, model, conversation=conversation, **fields), "conversation", None)
    assert (len(one.requests), len(two.requests)) == (before, 0)
    assert (await ask(gateway, "first", conversation=None)).status == 200


def _response(*output: Body) -> Body:
    return {"id": "resp_1", "object": "response", "status": "completed", "model": "m", "output": [*output]}


# --- in the background -------------------------------------------------------------------------


async def test_what_goes_on_in_the_background_is_charged_as_the_most_it_can_be(
    one: FakeKeeper, two: FakeKeeper
) -> None:
    prices = "[{plugin: prices, table: [{model: '*', input: 1, output: 2}]}]"
    text = settings(one, two).replace("cost: []", f"cost: {prices}")
    async with kept(text) as gateway:
        body = {"model": "first", "input": "Hello", "background": True}
        queued = await gateway.post("/v1/responses", {**body, "max_output_tokens": 40}, key=ACME)
        assert queued.json()["status"] == "queued"
        for _ in range(2):  # to ask how it went costs nothing, however often
            done = await gateway.get(f"/v1/responses/{queued.json()['id']}", key=ACME)
            assert done.json()["usage"]["output_tokens"] == 4
        await gateway.post("/v1/responses", body, key=ACME)
        streamed = await gateway.post("/v1/responses", {**body, "stream": True}, key=ACME)
        assert streamed.events()[-1]["type"] == "response.completed"
        receipts = await gateway.settled(5)
    told = [
        (each.usage.output, each.usage.source, each.cost.state) for each in receipts if each.operation != "response"
    ]
    assert told == [(40, "estimated", "estimated"), (100, "estimated", "estimated"), (3, "provider", "exact")]
    assert [each.usage.total for each in receipts if each.operation == "response"] == [0, 0]


async def test_what_was_only_begun_is_no_answer_to_the_next(one: FakeKeeper, two: FakeKeeper) -> None:
    async with kept(settings(one, two, cache="[{plugin: exact}]")) as gateway:
        body = {"model": "first", "input": "Hello", "background": True, "temperature": 0}
        answers = [await gateway.post("/v1/responses", body, key=ACME) for _ in range(2)]
        assert answers[0].json()["id"] != answers[1].json()["id"]
    assert len(one.requests) == 2


async def test_a_client_that_leaves_a_response_in_the_background_pays_for_it(one: FakeKeeper, two: FakeKeeper) -> None:
    async with kept(settings(one, two)) as gateway:
        begun = {"type": "response.queued", "response": {**_response(), "status": "queued"}}
        event = b"event: response.queued\ndata: %b\n\n" % orjson.dumps(begun)
        for background, least, most in ((True, 100, 100), (False, 0, 10)):
            one.script(Scripted(events=[event], cut_at=len(event)))
            await gateway.post(
                "/v1/responses",
                {"model": "first", "input": "Hi", "stream": True, "background": background},
                key=ACME,
            )
            receipt = (await gateway.settled(1 if background else 2))[-1]
            assert receipt.outcome == "failed"
            assert least <= receipt.usage.output <= most
            assert receipt.usage.source == "partial"


# --- files that a body names -------------------------------------------------------------------


async def test_images_to_edit_may_be_named_instead_of_uploaded(
    gateway: Running, one: FakeKeeper, two: FakeKeeper
) -> None:
    async with sdk(gateway) as client:
        file = await client.files.create(file=("a.png", b"a"), purpose="vision", extra_body={"model": "second"})
    asked: Body = {
        "model": "both",
        "prompt": "a hat",
        "images": [{"file_id": file.id}],
        "mask": {"image_url": "data:,"},
    }
    answer = await gateway.post("/v1/images/edits", asked, key=ACME)
    assert answer.status == 200, answer.text
    assert answer.json()["data"]
    assert not one.requests
    assert two.requests[-1].headers["content-type"] == "application/json"
    assert two.requests[-1].body["images"] == [{"file_id": next(iter(two.files))}]
    streamed = await gateway.post("/v1/images/edits", {**asked, "stream": True}, key=ACME)
    assert streamed.events()[-1]["type"] == "image_edit.completed"
    wrong: list[tuple[Body, str]] = [
        ({"images": None}, "images"),
        ({"images": []}, "images"),
        ({"images": [{}]}, "images[0]"),
        ({"images": [{"file_id": file.id, "image_url": "data:,"}]}, "images[0]"),
        ({"images": [{"file_id": "file-x"}]}, "images[0].file_id"),
        ({"mask": {"file_id": "file-x"}}, "mask.file_id"),
    ]
    for fields, param in wrong:
        refused = await gateway.post("/v1/images/edits", {**asked, **fields}, key=ACME)
        assert (refused.status, refused.json()["error"]["param"]) == (400, param)


async def test_what_takes_no_names_of_files_says_what_it_takes(gateway: Running) -> None:
    asked = {"model": "first", "images": [{"image_url": "data:,"}]}
    answer = await gateway.post("/v1/images/variations", asked, key=ACME)
    assert (answer.status, "multipart/form-data" in answer.json()["error"]["message"]) == (415, True)
