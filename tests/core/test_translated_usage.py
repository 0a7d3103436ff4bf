"""What a stream costs whose provider speaks another dialect than its client: what it would cost in its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import orjson
import pytest

from qlens import Receipt
from qlens.testing import Running, Scripted, running
from qlens.testing.upstreams import FakeUpstream

CHAT, COMPLETIONS, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"
ASKED: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [{"role": "user", "content": "Hello"}]},
    COMPLETIONS: {"prompt": "Hello"},
    RESPONSES: {"input": "Hello"},
    MESSAGES: {"max_tokens": 100, "messages": [{"role": "user", "content": "Hello"}]},
}
CONFIG = """
pipeline:
  auth: [{{plugin: anonymous}}]
  cost:
    - plugin: prices
      catalogue: false
      table: [{{model: "*", input: 1, cached_input: 0.1, cache_write_5m: 4, output: 2, tiers: {{priority: 2}}}}]
providers:
  claude: {{plugin: anthropic, base_url: "{root}", api_key: sk-example-one}}
  responses: {{plugin: openai, base_url: "{url}", api_key: sk-example-one, responses_only: ["*"]}}
  chats: {{plugin: openai, base_url: "{url}", api_key: sk-example-one, responses: false}}
models:
  claude: {{max_output_tokens: 4096, targets: [{{provider: claude, model: claude-sonnet-4-5}}]}}
  codex: {{max_output_tokens: 4096, targets: [{{provider: responses, model: codex}}]}}
  chat: {{max_output_tokens: 4096, targets: [{{provider: chats, model: chat}}]}}
"""


@pytest.fixture
async def gateway(up: FakeUpstream) -> AsyncIterator[Running]:
    async with running(CONFIG.format(root=up.root, url=up.url)) as gateway:
        yield gateway


def typed(*events: dict[str, Any]) -> list[Any]:
    return [b"event: %b\ndata: %b\n\n" % (event["type"].encode(), orjson.dumps(event)) for event in events]


async def receipt_of(gateway: Running) -> Receipt:
    (receipt,) = await gateway.settled(1)
    return receipt


# --- messages: the input is said at the beginning ----------------------------------------------

COUNTS = {"input_tokens": 3, "cache_read_input_tokens": 50000, "cache_creation_input_tokens": 1000, "output_tokens": 1}
BEGUN: dict[str, Any] = {
    "type": "message",
    "id": "msg_1",
    "role": "assistant",
    "model": "x",
    "content": [],
    "stop_reason": None,
    "stop_sequence": None,
    "usage": COUNTS,
}
SAID = typed(
    {"type": "message_start", "message": BEGUN},
    {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
    *(
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": text}}
        for text in ["word "] * 20 + ["there"]
    ),
)
OVERLOADED = typed({"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}})


@pytest.mark.parametrize("path", ASKED)
@pytest.mark.parametrize("ending", ["cut", "failed", "left"])
async def test_what_messages_say_at_their_beginning_is_billed_however_they_end(
    gateway: Running, up: FakeUpstream, path: str, ending: str
) -> None:
    up.script(Scripted(events=SAID + (OVERLOADED if ending == "failed" else []), hang=ending == "left"))
    async with gateway.session.post(gateway.url + path, json={"model": "claude", "stream": True, **ASKED[path]}) as got:
        text = b""
        async with asyncio.timeout(10):
            while not got.content.at_eof() and not (ending == "left" and b"there" in text):
                text += await got.content.readany()
        got.close()
    receipt = await receipt_of(gateway)
    used = receipt.usage
    assert receipt.outcome == ("abandoned" if ending == "left" else "failed")
    assert (used.input, used.cached_input, used.cache_write_5m, used.source) == (3, 50000, 1000, "partial")
    assert 20 <= used.output <= 30
    assert receipt.cost.state == "estimated"


# --- responses: the one that failed says what it used ------------------------------------------

SPENT = {
    "input_tokens": 50,
    "input_tokens_details": {"cached_tokens": 30},
    "output_tokens": 20,
    "output_tokens_details": {"reasoning_tokens": 11},
    "total_tokens": 70,
}
CREATED = {"id": "resp_1", "object": "response", "created_at": 1, "model": "x", "status": "in_progress", "output": []}
FAILED = {**CREATED, "status": "failed", "error": {"code": "server_error", "message": "no"}, "usage": SPENT}


@pytest.mark.parametrize("path", ASKED)
async def test_what_a_response_used_that_failed_is_billed_in_every_dialect(
    gateway: Running, up: FakeUpstream, path: str
) -> None:
    delta = {"type": "response.output_text.delta", "output_index": 0, "content_index": 0, "item_id": "msg_1"}
    up.script(
        Scripted(
            events=typed(
                {"type": "response.created", "response": CREATED},
                *({**delta, "delta": "word "} for _ in range(40)),
                {"type": "response.failed", "response": FAILED},
            )
        )
    )
    answer = await gateway.post(path, {"model": "codex", "stream": True, **ASKED[path]})
    assert answer.status == 200
    receipt = await receipt_of(gateway)
    used = receipt.usage
    assert (used.input, used.cached_input, used.output, used.reasoning) == (20, 30, 9, 11)
    assert (receipt.outcome, used.source, receipt.cost.state) == ("failed", "provider", "exact")


# --- chat --------------------------------------------------------------------------------------

HEAD = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "x"}
USED = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}


def chunk(finish: str | None = None, **delta: Any) -> dict[str, Any]:
    return {**HEAD, "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}


@pytest.mark.parametrize("path", ASKED)
async def test_the_tier_of_a_chat_is_known_in_every_dialect(gateway: Running, up: FakeUpstream, path: str) -> None:
    told = {**HEAD, "choices": [], "usage": USED, "service_tier": None}
    first = {**chunk(role="assistant", content=""), "service_tier": "priority"}
    up.script(Scripted(events=[first, chunk(content="x"), chunk("stop"), told, "[DONE]"]))
    await gateway.post(path, {"model": "chat", "stream": True, **ASKED[path]})
    receipt = await receipt_of(gateway)
    assert (receipt.usage.tier, receipt.cost.state) == ("priority", "exact")
    assert receipt.cost.picos == (100 * 1_000_000 + 10 * 2_000_000) * 2


@pytest.mark.parametrize("path", ASKED)
async def test_what_a_chat_says_of_usage_before_it_breaks_off_is_billed(
    gateway: Running, up: FakeUpstream, path: str
) -> None:
    begun = chunk(role="assistant", content="")
    up.script(
        Scripted(
            events=[
                begun,
                {**chunk(content="x"), "usage": {**USED, "completion_tokens": 1}},
                *[chunk(content="y ")] * 9,
            ]
        )
    )
    await gateway.post(path, {"model": "chat", "stream": True, **ASKED[path]})
    receipt = await receipt_of(gateway)
    assert (receipt.outcome, receipt.usage.input, receipt.cost.state) == ("failed", 100, "estimated")
    assert receipt.usage.output >= 9


@pytest.mark.parametrize("path", ASKED)
async def test_what_a_chat_used_that_failed_is_billed_in_every_dialect(
    gateway: Running, up: FakeUpstream, path: str
) -> None:
    begun = chunk(role="assistant", content="")
    error = {"error": {"message": "no", "type": "server_error"}, "usage": USED}
    up.script(Scripted(events=[begun, *[chunk(content="y ")] * 40, error]))
    await gateway.post(path, {"model": "chat", "stream": True, **ASKED[path]})
    receipt = await receipt_of(gateway)
    assert (receipt.outcome, receipt.usage.input, receipt.usage.output) == ("failed", 100, 10)
    assert receipt.cost.state == "exact"
