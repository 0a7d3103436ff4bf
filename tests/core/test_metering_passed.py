"""What passes through is metered and billed by what its answer says it used, once, and not a byte of it changes."""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import AsyncIterator
from typing import Any

import orjson
import pytest
from azures import config as azure_config
from hypothesis import given
from hypothesis import strategies as st
from keepers import ACME, kept, settings

from qlens import Receipt
from qlens.metering_passed import MOST_BYTES, Told
from qlens.testing import Response, Running, Scripted, running
from qlens.testing.anthropic import KEY, MODEL, anthropic
from qlens.testing.azure import azure
from qlens.testing.objects import FakeKeeper, keeper

PASS = ', passthrough: ["GET /**", "POST /**"]'
# A dollar is a million picodollars a token: 1 for input, 0.1 for what was cached, 4 and 8 for writes, 2 for output.
RATES = "input: 1, cached_input: 0.1, cache_write_5m: 4, cache_write_1h: 8, output: 2"
PRICES = f"{{plugin: prices, catalogue: false, table: [{{model: upstream, {RATES}}}]}}"
PLACE = "/v1/providers/one"
ASKED = {"model": "upstream", "messages": [{"role": "user", "content": "Hello"}]}

CHAT_USAGE = {
    "prompt_tokens": 100,
    "completion_tokens": 20,
    "total_tokens": 120,
    "prompt_tokens_details": {"cached_tokens": 40},
    "completion_tokens_details": {"reasoning_tokens": 5},
}
CHAT = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "model": "upstream",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": 'the "usage": {"prompt_tokens": 9}'}}],
    "usage": CHAT_USAGE,
}
RESPONSE_USAGE = {
    "input_tokens": 100,
    "input_tokens_details": {"cached_tokens": 40},
    "output_tokens": 20,
    "output_tokens_details": {"reasoning_tokens": 5},
    "total_tokens": 120,
}
RESPONSE = {"id": "resp_1", "object": "response", "status": "completed", "model": "upstream", "usage": RESPONSE_USAGE}
MESSAGE_USAGE = {
    "input_tokens": 60,
    "cache_creation_input_tokens": 30,
    "cache_creation": {"ephemeral_5m_input_tokens": 20, "ephemeral_1h_input_tokens": 10},
    "cache_read_input_tokens": 40,
    "output_tokens": 20,
}
MESSAGE = {"id": "msg_1", "type": "message", "role": "assistant", "model": "upstream", "usage": MESSAGE_USAGE}
EMBEDDINGS = {
    "object": "list",
    "data": [{"object": "embedding", "index": 0, "embedding": [0.5, 1.5]}],
    "model": "upstream",
    "usage": {"prompt_tokens": 7, "total_tokens": 7},
}
COMPLETION = {**CHAT, "object": "text_completion", "choices": [{"index": 0, "text": "Hi"}]}
COMPACTED = {**RESPONSE, "object": "response.compaction"}
PICTURES = {
    "created": 1,
    "data": [{"b64_json": "AAAA"}],
    "usage": {"input_tokens": 60, "output_tokens": 20, "total_tokens": 80, "input_tokens_details": {"text_tokens": 60}},
}
WRITTEN_DOWN = {"text": "Hello", "usage": {"type": "tokens", "input_tokens": 60, "output_tokens": 20}}
RANKED = {"model": "upstream", "results": [], "usage": {"total_tokens": 7}}
USED = {"input": 60, "cached_input": 40, "output": 15, "reasoning": 5}
SPENT = 60_000_000 + 4_000_000 + 40_000_000
"""Picodollars for that."""


@pytest.fixture
async def up() -> AsyncIterator[FakeKeeper]:
    async with keeper() as fake:
        yield fake


@pytest.fixture
async def gateway(up: FakeKeeper) -> AsyncIterator[Running]:
    async with kept(settings(up, up, more=PASS, cost=f"[{PRICES}]")) as gateway:
        yield gateway


async def ask(gateway: Running, path: str = "chat/completions", body: Any = ASKED, **headers: str) -> Response:
    return await gateway.post(f"{PLACE}/{path}", body, key=ACME, headers=headers or None)


async def the_receipt(gateway: Running) -> Receipt:
    (receipt,) = await gateway.settled(1)
    assert receipt.operation == "passthrough"
    return receipt


def said(receipt: Receipt) -> dict[str, int]:
    """The buckets that have something in them."""
    names = ("input", "cached_input", "cache_write_5m", "cache_write_1h", "output", "reasoning")
    return {name: count for name in names if (count := getattr(receipt.usage, name))}


def assert_unbilled(receipt: Receipt, pattern: str = "POST /**") -> None:
    assert receipt.target is not None
    assert (receipt.outcome, receipt.usage.total, receipt.usage.source) == ("complete", 0, "none")
    assert (receipt.cost.state, receipt.target.model) == ("unpriced", pattern)


# --- whole answers -----------------------------------------------------------------------------


@pytest.mark.parametrize("split", [None, 1, 61])
@pytest.mark.parametrize(
    ("body", "used", "picos"),
    [
        (CHAT, USED, SPENT),
        (COMPLETION, USED, SPENT),
        (RESPONSE, USED, SPENT),
        (COMPACTED, USED, SPENT),
        (
            MESSAGE,
            {"input": 60, "cached_input": 40, "cache_write_5m": 20, "cache_write_1h": 10, "output": 20},
            (60 + 4 + 80 + 80 + 40) * 1_000_000,
        ),
        (EMBEDDINGS, {"input": 7}, 7_000_000),
        (PICTURES, {"input": 60, "output": 20}, 100_000_000),
        (WRITTEN_DOWN, {"input": 60, "output": 20}, 100_000_000),
        (RANKED, {"input": 7}, 7_000_000),
    ],
    ids=["chat", "completion", "response", "compacted", "message", "embeddings", "pictures", "written down", "ranked"],
)
async def test_an_answer_is_billed_by_what_it_says_it_used(
    gateway: Running, up: FakeKeeper, body: dict[str, Any], used: dict[str, int], picos: int, split: int | None
) -> None:
    written = orjson.dumps(body, option=orjson.OPT_INDENT_2)
    up.script(Scripted(body=written, headers={"content-type": "application/json; charset=utf-8"}, split=split))
    answer = await ask(gateway)
    assert (answer.status, answer.body) == (200, written)
    receipt = await the_receipt(gateway)
    assert (said(receipt), receipt.usage.source) == (used, "provider")
    assert (receipt.cost.state, receipt.cost.picos, receipt.outcome) == ("exact", picos, "complete")
    assert receipt.target is not None
    assert (receipt.target.provider, receipt.target.model) == ("one", "upstream")
    assert receipt.attempts[0].target == receipt.target


@pytest.mark.parametrize("completion", [{"completion_tokens": None}, {"completion_tokens": 0}, {}])
async def test_a_completion_that_is_not_counted_is_estimated(
    gateway: Running, up: FakeKeeper, completion: dict[str, Any]
) -> None:
    up.script(Scripted(body={**CHAT, "usage": {"prompt_tokens": 100, **completion}}))
    await ask(gateway)
    receipt = await the_receipt(gateway)
    assert (receipt.usage.input, receipt.usage.output, receipt.usage.source) == (100, 9, "estimated")
    assert receipt.cost.state == "estimated"


async def test_a_compressed_answer_is_billed_too(gateway: Running, up: FakeKeeper) -> None:
    packed = {"content-type": "application/json", "content-encoding": "gzip"}
    up.script(Scripted(body=gzip.compress(orjson.dumps(CHAT)), headers=packed))
    answer = await ask(gateway)
    assert answer.json() == CHAT
    assert (await the_receipt(gateway)).cost.picos == SPENT


@pytest.mark.parametrize(
    ("body", "media"),
    [
        (orjson.dumps(CHAT)[:-1], "application/json"),
        (b'{"usage": {', "application/json"),
        (b"[" * 5000 + b'"usage": {', "application/json"),
        (b"\x1f\x8b\x08\x00" + orjson.dumps(CHAT), "application/json"),
        (orjson.dumps([CHAT]), "application/json"),
        (orjson.dumps({**CHAT, "usage": {"prompt_tokens": -1, "completion_tokens": 5}}), "application/json"),
        (orjson.dumps({**CHAT, "usage": {"prompt_tokens": 0, "completion_tokens": 0}}), "application/json"),
        (orjson.dumps({"usage": {"input_tokens": 5, "output_tokens": 6}, "model": "upstream"}), "application/json"),
        (orjson.dumps({"object": "list", "data": [CHAT, CHAT]}), "application/json"),
        (orjson.dumps(CHAT), "text/plain"),
    ],
)
async def test_what_says_nothing_that_can_be_read_passes_without_a_price(
    gateway: Running, up: FakeKeeper, body: bytes, media: str
) -> None:
    up.script(Scripted(body=body, headers={"content-type": media}, split=100))
    assert (await ask(gateway)).body == body
    assert_unbilled(await the_receipt(gateway))


@pytest.mark.parametrize("is_too_long", [True, False])
async def test_an_answer_that_is_too_long_passes_and_is_not_looked_into(
    gateway: Running, up: FakeKeeper, is_too_long: bool
) -> None:
    rest = b'",' + orjson.dumps(CHAT)[1:]
    body = b'{"noise":"'.ljust(MOST_BYTES - len(rest) + is_too_long, b"x") + rest
    up.script(Scripted(body=body, headers={"content-type": "application/json"}))
    assert (await ask(gateway)).body == body
    receipt = await the_receipt(gateway)
    assert receipt.cost.picos == (None if is_too_long else SPENT)


# --- what was paid for already -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "chat/completions/chatcmpl-1", CHAT),
        ("GET", "responses/resp_1", RESPONSE),
        ("GET", "responses/latest", RESPONSE),
        ("POST", "chat/completions/chatcmpl-1", CHAT),
        ("POST", "responses/resp_1/cancel", RESPONSE),
        ("POST", "batches/batch_1/cancel", {"id": "batch_1", "object": "batch", "model": "m", "usage": RESPONSE_USAGE}),
    ],
)
async def test_what_is_there_already_is_not_paid_for_once_more(
    gateway: Running, up: FakeKeeper, method: str, path: str, body: dict[str, Any]
) -> None:
    up.script(Scripted(body=body))
    assert (await gateway.request(method, f"{PLACE}/{path}", key=ACME)).json() == body
    assert_unbilled(await the_receipt(gateway), f"{method} /**")


async def test_a_stream_of_what_is_there_already_is_not_paid_for_once_more(gateway: Running, up: FakeKeeper) -> None:
    up.script(Scripted(events=[{"type": "response.completed", "response": RESPONSE}]))
    assert (await gateway.get(f"{PLACE}/responses/resp_1?stream=true", key=ACME)).status == 200
    assert_unbilled(await the_receipt(gateway), "GET /**")


# --- streams -----------------------------------------------------------------------------------


def typed(*events: dict[str, Any]) -> bytes:
    return b"".join(b"event: %b\ndata: %b\n\n" % (event["type"].encode(), orjson.dumps(event)) for event in events)


def plain(*events: dict[str, Any]) -> bytes:
    return b"".join(b"data: %b\n\n" % orjson.dumps(event) for event in events) + b"data: [DONE]\n\n"


CHUNK = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "model": "upstream"}
CHATTED = plain(
    {**CHUNK, "choices": [{"index": 0, "delta": {"content": '"usage":{"prompt_tokens":9}'}}], "usage": None},
    {**CHUNK, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}], "usage": None},
    {**CHUNK, "choices": [], "usage": CHAT_USAGE},
)
STARTED = {"type": "message_start", "message": {**MESSAGE, "usage": {**MESSAGE_USAGE, "output_tokens": 1}}}
DELTA = {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "Hi"}}
ENDED = {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 20}}
MESSAGED = typed(STARTED, DELTA, ENDED, {"type": "message_stop"})


def responded(end: str) -> bytes:
    unsaid = {**RESPONSE, "status": "in_progress", "usage": None}
    return typed(
        {"type": "response.created", "response": unsaid},
        {"type": "response.output_text.delta", "delta": "Hi"},
        {"type": end, "response": {**RESPONSE, "status": end.removeprefix("response.")}},
    )


@pytest.mark.parametrize("split", [None, 1, 2, 7, 100, 333])
@pytest.mark.parametrize(
    ("stream", "used"),
    [
        (CHATTED, USED),
        (CHATTED.replace(b"\n", b"\r\n"), USED),
        (CHATTED.replace(b'":', b'" : '), USED),
        (CHATTED.replace(b'[],"usage"', b'[],"usage" '), USED),
        (CHATTED.removesuffix(b"data: [DONE]\n\n")[:-2], USED),
        (b'data: {"usage": {"prompt_tokens"\n\n' + CHATTED, USED),
        (b": usage\n\n" + responded("response.completed"), USED),
        (responded("response.incomplete"), USED),
        (responded("response.failed"), USED),
        (
            MESSAGED,
            {"input": 60, "cached_input": 40, "cache_write_5m": 20, "cache_write_1h": 10, "output": 20},
        ),
        (
            typed({"type": "image_generation.completed", "b64_json": "AAAA", "usage": PICTURES["usage"]}),
            {"input": 60, "output": 20},
        ),
        (typed({"type": "transcript.text.done", **WRITTEN_DOWN}), {"input": 60, "output": 20}),
        (
            typed({"type": "speech.audio.done", "usage": {"input_tokens": 60, "output_tokens": 20}}),
            {"input": 60, "output": 20},
        ),
    ],
)
async def test_a_stream_is_billed_by_what_its_events_say(
    gateway: Running, up: FakeKeeper, stream: bytes, used: dict[str, int], split: int | None
) -> None:
    up.script(Scripted(body=stream, headers={"content-type": "text/event-stream"}, split=split))
    assert (await ask(gateway, body={**ASKED, "stream": True})).body == stream
    receipt = await the_receipt(gateway)
    assert (said(receipt), receipt.usage.source, receipt.outcome) == (used, "provider", "complete")
    assert receipt.cost.state == "exact"
    assert receipt.target is not None
    assert receipt.target.model == "upstream"


async def test_a_stream_that_does_not_say_it_has_no_price(gateway: Running, up: FakeKeeper) -> None:
    up.script(Scripted(events=[{**CHUNK, "choices": [{"index": 0, "delta": {"content": "Hi"}}]}, "[DONE]"]))
    assert (await ask(gateway, body={**ASKED, "stream": True})).status == 200
    assert_unbilled(await the_receipt(gateway))


async def test_an_event_without_end_passes_and_ends_the_looking(gateway: Running, up: FakeKeeper) -> None:
    stream = b"data: " + b"x" * (MOST_BYTES + 1) + b"\n\n" + CHATTED
    up.script(Scripted(body=stream, headers={"content-type": "text/event-stream"}, split=1 << 16))
    assert (await ask(gateway)).body == stream
    assert_unbilled(await the_receipt(gateway))


async def test_who_leaves_a_stream_pays_what_it_has_said_so_far(gateway: Running, up: FakeKeeper) -> None:
    up.script(Scripted(events=[typed(STARTED), typed(DELTA)], hang=True))
    headers = {"authorization": f"Bearer {ACME}"}
    async with gateway.session.post(f"{gateway.url}{PLACE}/messages", json=ASKED, headers=headers) as answer:
        await answer.content.readuntil(b"text_delta")
    receipt = await the_receipt(gateway)
    assert (receipt.outcome, receipt.usage.source, receipt.cost.state) == ("abandoned", "partial", "estimated")
    assert (receipt.usage.prompt, receipt.usage.output) == (130, 1)
    assert receipt.target is not None
    assert receipt.target.model == "upstream"


async def test_what_breaks_off_is_billed_by_what_it_has_said_and_is_no_success(
    gateway: Running, up: FakeKeeper
) -> None:
    media = {"content-type": "text/event-stream"}
    up.script(Scripted(body=MESSAGED, headers=media, cut_at=len(typed(STARTED, DELTA))))
    answer = await ask(gateway, "messages")
    assert answer.body.startswith(typed(STARTED, DELTA))
    assert answer.events()[-1]["error"]["code"] == "upstream_truncated"
    receipt = await the_receipt(gateway)
    assert (receipt.outcome, receipt.usage.source, receipt.usage.prompt) == ("failed", "partial", 130)


async def test_who_leaves_when_the_answer_is_whole_pays_it(gateway: Running, up: FakeKeeper) -> None:
    up.script(Scripted(events=[orjson.dumps(CHAT)], headers={"content-type": "application/json"}, hang=True))
    headers = {"authorization": f"Bearer {ACME}"}
    async with gateway.session.post(f"{gateway.url}{PLACE}/chat/completions", json=ASKED, headers=headers) as answer:
        await answer.content.readexactly(len(orjson.dumps(CHAT)))
    receipt = await the_receipt(gateway)
    assert (receipt.outcome, receipt.cost.picos, receipt.cost.state) == ("abandoned", SPENT, "exact")


# --- whose price -------------------------------------------------------------------------------

TABLE = f"""
- {{model: cheap, {RATES}}}
- {{model: dear, input: 10, cached_input: 10, output: 10}}
- {{model: flat, {RATES}, meters: {{requests: 0.5}}}}
- {{model: there, region: eu, {RATES}}}
"""


def two_models(up: FakeKeeper, targets: str, more: str = "") -> str:
    rows = "".join(f"        {row}\n" for row in TABLE.strip().splitlines())
    return f"""
pipeline:
  auth: [{{plugin: anonymous}}]
  cost:
    - plugin: prices
      catalogue: false
      {more}
      table:
{rows}
providers:
  one: {{plugin: openai, base_url: "{up.url}"{PASS}}}
models:
  ours: {{max_output_tokens: 10, targets: [{targets}]}}
"""


@pytest.mark.parametrize(
    ("asked", "answered", "model", "picos"),
    [
        ("cheap", "dear", "dear", 120 * 10_000_000),  # the answer knows it
        ("cheap", "cheap-2026-01-01", "cheap", SPENT),  # a target's snapshot
        ("cheap", None, "cheap", SPENT),
        ("cheap", "", "cheap", SPENT),
        ("cheap", 5, "cheap", SPENT),
        ("cheap", "x" * 1000, "cheap", SPENT),
        ("cheap", "new\n", "cheap", SPENT),
        ("hidden", "there", "hidden", SPENT),  # the target says what it is, and where
        ("flat", "flat", "flat", SPENT + 5 * 10**11),
        ("none", "none", "none", None),
        (5, None, "POST /**", None),
        (None, None, "POST /**", None),
    ],
)
async def test_the_price_is_that_of_the_model_that_answered_or_else_of_the_one_that_was_asked(
    up: FakeKeeper, asked: Any, answered: Any, model: str, picos: int | None
) -> None:
    targets = "{provider: one, model: cheap}, {provider: one, model: first, base_model: there}, "
    targets += "{provider: one, model: hidden, base_model: there, region: eu}"
    async with running(two_models(up, targets)) as gateway:
        up.script(Scripted(body={**CHAT, "model": answered}))
        assert (await ask(gateway, body={**ASKED, "model": asked})).status == 200
        receipt = await the_receipt(gateway)
    assert receipt.target is not None
    assert (receipt.target.provider, receipt.target.model, said(receipt)) == ("one", model, USED)
    assert receipt.cost.picos == picos
    assert (receipt.cost.state == "unpriced") is (picos is None)


@pytest.mark.parametrize(
    ("body", "media"),
    [(b"", "application/json"), (b'{"model"', "application/json"), (b'"model"', "application/json"), (b"x", "text/x")],
)
async def test_a_request_that_names_no_model_passes(up: FakeKeeper, body: bytes, media: str) -> None:
    async with running(two_models(up, "{provider: one, model: cheap}")) as gateway:
        up.script(Scripted(body=PICTURES))
        headers = {"content-type": media}
        assert (await gateway.post(f"{PLACE}/images/generations", body, headers=headers)).json() == PICTURES
        receipt = await the_receipt(gateway)
    assert (receipt.usage.total, receipt.cost.state) == (80, "unpriced")


async def test_a_price_of_all_models_is_none_of_what_no_model_has_answered(up: FakeKeeper) -> None:
    prices = f"{{plugin: prices, catalogue: false, table: [{{model: '*', {RATES}}}]}}"
    async with kept(settings(up, up, more=PASS, cost=f"[{prices}]")) as gateway:
        up.script(Scripted(body={"object": "eval"}), Scripted(body={**CHAT, "model": "any"}))
        assert [(await ask(gateway)).status for _ in range(2)] == [200, 200]
        unbilled, billed = await gateway.settled(2)
    assert_unbilled(unbilled)
    assert billed.cost.picos == SPENT


async def test_a_model_without_a_price_passes_a_strict_table_too(up: FakeKeeper) -> None:
    async with running(two_models(up, "{provider: one, model: cheap}", more="strict: true")) as gateway:
        up.script(Scripted(body={**CHAT, "model": "none"}))
        assert (await ask(gateway)).status == 200
        receipt = await the_receipt(gateway)
    assert (receipt.usage.total, receipt.cost.state) == (120, "unpriced")


async def test_a_deployment_in_azures_path_names_the_model() -> None:
    async with azure() as resource:
        cost = {"cost": [{"plugin": "prices"}]}
        text = azure_config(
            resource.root, base_model="gpt-image-1", pipeline=cost, passthrough=["POST /deployments/**"]
        )
        async with running(text) as gateway:
            resource.script(Scripted(body=PICTURES))
            path = "/v1/providers/azure/deployments/my-deployment/images/generations"
            assert (await gateway.post(path, {"prompt": "a cat", "model": "other"})).json() == PICTURES
            receipt = await the_receipt(gateway)
    assert receipt.target is not None
    assert (receipt.target.model, receipt.target.base_model) == ("my-deployment", "gpt-image-1")
    assert (receipt.usage.total, receipt.cost.state) == (80, "exact")


async def test_messages_that_pass_to_anthropic_are_billed() -> None:
    async with anthropic() as up:
        text = f"""
pipeline:
  auth: [{{plugin: anonymous}}]
  cost: [{{plugin: prices, catalogue: false, table: [{{model: {MODEL}, {RATES}}}]}}]
providers: {{claude: {{plugin: anthropic, base_url: "{up.url}", api_key: {KEY}, passthrough: ["POST /v1/messages"]}}}}
models: {{m: {{max_output_tokens: 10, targets: [{{provider: claude, model: {MODEL}}}]}}}}
"""
        body = {"model": MODEL, "max_tokens": 5, "messages": [{"role": "user", "content": "Hello"}]}
        async with running(text) as gateway:
            whole = await gateway.post("/v1/providers/claude/v1/messages", body)
            stream = await gateway.post("/v1/providers/claude/v1/messages", {**body, "stream": True})
            one, other = await gateway.settled(2)
    assert (whole.status, stream.status) == (200, 200)
    counted = whole.json()["usage"]
    assert (one.usage.input, one.usage.output) == (counted["input_tokens"], counted["output_tokens"])
    assert one.cost.picos == counted["input_tokens"] * 1_000_000 + counted["output_tokens"] * 2_000_000
    assert (one.usage, one.cost) == (other.usage, other.cost)


# --- who counts it -----------------------------------------------------------------------------


async def test_a_limit_of_tokens_takes_what_was_used(up: FakeKeeper) -> None:
    limit = "[{plugin: token_bucket, limits: [{per: tenant, tokens_per_minute: 200}]}]"
    async with kept(settings(up, up, more=PASS, limits=limit)) as gateway:
        up.script(*[Scripted(body=CHAT)] * 3)
        assert [(await ask(gateway)).status for _ in range(3)] == [200, 200, 429]


async def test_a_soft_budget_is_charged_and_a_hard_one_refuses(up: FakeKeeper) -> None:
    for hard, status in ((False, 200), (True, 400)):
        budget = f"{{plugin: budgets, limits: [{{per: tenant, usd: 5, window: month, hard: {str(hard).lower()}}}]}}"
        async with kept(settings(up, up, more=PASS, cost=f"[{PRICES}, {budget}]")) as gateway:
            up.script(*[Scripted(body=CHAT)] * 2)
            answers = [await ask(gateway) for _ in range(2)]
            assert {answer.status for answer in answers} == {status}
            (row,) = (await gateway.get("/v1/budgets", key=ACME)).json()["data"]
            assert row["spent_usd"] == ("0" if hard else "0.000208")
            if hard:
                assert answers[0].json()["error"]["code"] == "cost_unknown"


async def test_the_ledger_has_its_tokens_and_its_cost(up: FakeKeeper) -> None:
    ledger = '{plugin: ledger, url: "sqlite:///ledger.db"}'
    async with kept(settings(up, up, more=PASS, cost=f"[{PRICES}, {ledger}]")) as gateway:
        up.script(Scripted(body=RESPONSE))
        await ask(gateway, "responses")
        await gateway.settled(1)
        async with asyncio.timeout(20):
            while gateway.gateway.current.running or gateway.plugin("cost", "ledger").writer.waiting:
                await asyncio.sleep(0.02)
        (row,) = (await gateway.get("/v1/usage/calls", key=ACME)).json()["data"]
    assert (row["operation"], row["upstream_model"], row["cost_usd"]) == ("passthrough", "upstream", "0.000104")


# --- whatever an answer says -------------------------------------------------------------------

NAMES = ["type", "object", "usage", "data", "text", "results", "response", "message", "model", "output", "id"]
WORDS = ["message", "message_start", "response", "response.completed", "image_edit.completed", "transcript.text.done"]
COUNTS = ["prompt_tokens", "input_tokens", "output_tokens", "prompt_tokens_details", "seconds", "total_tokens", "type"]
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.sampled_from(WORDS),
    lambda inside: (
        st.lists(inside, max_size=3)
        | st.dictionaries(st.sampled_from(NAMES) | st.sampled_from(COUNTS) | st.text(max_size=3), inside, max_size=6)
    ),
    max_leaves=30,
)


@given(
    st.dictionaries(st.sampled_from(NAMES), ANYTHING, max_size=6),
    st.dictionaries(st.sampled_from(COUNTS), ANYTHING, max_size=6),
)
def test_nothing_that_an_answer_says_is_a_mistake_of_the_gateway(body: dict[str, Any], usage: dict[str, Any]) -> None:
    told = Told("chat/completions")
    told.hear(orjson.dumps({**body, "usage": usage}))
    # It is a guess where an answer says what was sent, and not what came back.
    assert told.usage is None or told.usage.source in {"provider", "estimated"}
