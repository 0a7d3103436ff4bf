"""What an answer is guessed to have used that does not say it, of a request that is not only text."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from typing import Any

import pytest
from yamls import CHAT

from qlens import Receipt
from qlens.testing import Running, Scripted, running
from qlens.testing.upstreams import FakeUpstream

RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"
CONFIG = """
pipeline:
  auth: [{{plugin: anonymous}}]
  cost:
    - plugin: prices
      catalogue: false
      table:
        - {{model: priced, input: 1, output: 2, meters: {{images: 0.01, files: 0.5}}}}
        - {{model: texts, input: 1, output: 2}}
    - {{plugin: budgets, limits: [{{per: tenant, usd: 100, window: day, hard: {hard}}}]}}
providers:
  one: {{plugin: openai, base_url: "{url}", api_key: sk-example-one}}
  claude: {{plugin: anthropic, base_url: "{root}", api_key: sk-example-one}}
models:
  priced: {{max_output_tokens: 1000, targets: [{{provider: one, model: priced}}]}}
  claude: {{max_output_tokens: 1000, targets: [{{provider: claude, model: priced}}]}}
  texts: {{max_output_tokens: 1000, targets: [{{provider: one, model: texts}}]}}
"""
PDF = base64.b64encode(b"%PDF-1.4" + b"x" * 300).decode()
URL = "https://pictures.example/a.png"
IN_CHAT = [
    {"type": "text", "text": "Summarise"},
    {"type": "file", "file": {"filename": "a.pdf", "file_data": f"data:application/pdf;base64,{PDF}"}},
    {"type": "image_url", "image_url": {"url": URL}},
]
IN_RESPONSES = [
    {"type": "input_text", "text": "Summarise"},
    {"type": "input_file", "filename": "a.pdf", "file_data": f"data:application/pdf;base64,{PDF}"},
    {"type": "input_image", "image_url": URL},
]
IN_MESSAGES = [
    {"type": "text", "text": "Summarise"},
    {"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": PDF}},
    {"type": "image", "source": {"type": "url", "url": URL}},
]
ASKED: dict[str, tuple[str, dict[str, Any]]] = {
    CHAT: ("priced", {"messages": [{"role": "user", "content": IN_CHAT}]}),
    RESPONSES: ("priced", {"input": [{"role": "user", "content": IN_RESPONSES}]}),
    MESSAGES: ("claude", {"max_tokens": 1000, "messages": [{"role": "user", "content": IN_MESSAGES}]}),
}
HEAD = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "x"}
WORDS = [
    {**HEAD, "choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]}
    for text in ("word ", "there")
]
SAID: dict[str, list[Any]] = {
    CHAT: WORDS,
    RESPONSES: [b'event: response.output_text.delta\ndata: {"type":"response.output_text.delta","delta":"there"}\n\n'],
    MESSAGES: [b'event: content_block_start\ndata: {"type":"content_block_start","index":0,"content_block":{}}\n\n'],
}


@pytest.fixture
async def gateway(up: FakeUpstream) -> AsyncIterator[Running]:
    async with running(CONFIG.format(url=up.url, root=up.root, hard="true")) as gateway:
        yield gateway


async def receipt_of(gateway: Running) -> Receipt:
    (receipt,) = await gateway.settled(1)
    return receipt


@pytest.mark.parametrize("path", ASKED)
@pytest.mark.parametrize("ending", ["left", "cut"])
async def test_images_and_files_are_charged_though_nothing_says_what_they_came_to(
    gateway: Running, up: FakeUpstream, path: str, ending: str
) -> None:
    model, asked = ASKED[path]
    up.script(Scripted(events=SAID[path], hang=ending == "left"))
    async with gateway.session.post(gateway.url + path, json={"model": model, "stream": True, **asked}) as answer:
        async with asyncio.timeout(10):
            await answer.content.readany()
            if ending == "cut":
                await answer.content.read()
        answer.close()
    receipt = await receipt_of(gateway)
    assert (receipt.usage.source, receipt.cost.state) == ("partial", "estimated")
    assert dict(receipt.usage.meters) == {"files": 1, "images": 1}
    assert receipt.cost.picos is not None
    assert 510_000_000_000 < receipt.cost.picos < 520_000_000_000


async def test_a_whole_answer_without_usage_is_charged_for_images_and_files_too(
    gateway: Running, up: FakeUpstream
) -> None:
    choice = {"index": 0, "message": {"role": "assistant", "content": "Hello"}, "finish_reason": "stop"}
    up.script(Scripted(body={"id": "1", "object": "chat.completion", "choices": [choice]}))
    await gateway.post(CHAT, {"model": "priced", **ASKED[CHAT][1]})
    receipt = await receipt_of(gateway)
    assert (dict(receipt.usage.meters), receipt.cost.state) == ({"files": 1, "images": 1}, "estimated")


async def test_what_the_provider_counts_has_images_and_files_in_its_tokens(gateway: Running, up: FakeUpstream) -> None:
    usage = {**HEAD, "choices": [], "usage": {"prompt_tokens": 1000, "completion_tokens": 10}}
    end = {**HEAD, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
    up.script(Scripted(events=[*WORDS, end, usage, "[DONE]"]))
    await gateway.post(CHAT, {"model": "priced", "stream": True, **ASKED[CHAT][1]})
    receipt = await receipt_of(gateway)
    assert (receipt.usage.input, dict(receipt.usage.meters), receipt.cost.state) == (1000, {}, "exact")


async def test_images_and_files_without_a_price_do_not_make_the_rest_unpriced(up: FakeUpstream) -> None:
    async with running(CONFIG.format(url=up.url, root=up.root, hard="false")) as gateway:
        up.script(Scripted(events=WORDS))
        await gateway.post(CHAT, {"model": "texts", "stream": True, **ASKED[CHAT][1]})
        receipt = await receipt_of(gateway)
    assert (dict(receipt.usage.meters), receipt.cost.state) == ({}, "estimated")
    assert receipt.cost.picos


# --- what nobody can read ----------------------------------------------------------------------

WHOLE = b'{"id":"1","choices":[{"index":0,"message":{"role":"assistant","content":"Hello"},"finish_reason":"stop"}],}'
IN_JSON = {"content-type": "application/json"}
UNREADABLE = {
    "breaks off": Scripted(body=WHOLE, headers=IN_JSON, cut_at=60),
    "is no JSON": Scripted(body=WHOLE, headers=IN_JSON),
}
HELLO_CHAT = {"messages": [{"role": "user", "content": "Hello"}]}


@pytest.mark.parametrize("answer", UNREADABLE.values(), ids=UNREADABLE)
@pytest.mark.parametrize("path", [CHAT, MESSAGES])
async def test_a_whole_answer_that_nobody_can_read_costs_the_most_it_can_have_used(
    gateway: Running, up: FakeUpstream, path: str, answer: Scripted
) -> None:
    up.script(answer)
    model = "claude" if path == MESSAGES else "priced"
    assert (await gateway.post(path, {"model": model, "max_tokens": 700, **HELLO_CHAT})).status == 502
    receipt = await receipt_of(gateway)
    assert (receipt.outcome, receipt.attempts[0].billed) == ("failed", True)
    assert (receipt.usage.output, receipt.usage.source, receipt.cost.state) == (700, "estimated", "estimated")
    assert receipt.usage.input > 0


@pytest.mark.parametrize(
    "answer",
    [
        Scripted(body=b"<html>busy</html>", headers={"content-type": "text/html"}),
        Scripted(body=WHOLE, headers=IN_JSON, cut_at=0),
        Scripted(status=503, body=WHOLE, headers=IN_JSON, cut_at=60),
    ],
    ids=["no answer", "nothing of it", "a refusal"],
)
async def test_what_was_not_made_is_free(gateway: Running, up: FakeUpstream, answer: Scripted) -> None:
    up.script(answer)
    assert (await gateway.post(CHAT, {"model": "priced", **HELLO_CHAT})).status >= 500
    receipt = await receipt_of(gateway)
    assert (receipt.attempts[0].billed, receipt.usage.total, receipt.cost.picos) == (False, 0, 0)
