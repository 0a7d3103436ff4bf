"""What models read or run beside text, and nobody can count: refused where a hard budget applies, and there alone."""

from __future__ import annotations

from typing import Any

import pytest

from qlens.testing import Response, Running, running

BUDGETS = """
pipeline:
  auth: [{plugin: anonymous}]
  cost:
    - {plugin: prices, table: [{provider: up, model: m, input: 1, output: 1}]}
    - {plugin: budgets, limits: [{per: tenant, usd: 1, window: day, hard: true}]}
providers: {up: {plugin: echo}}
models: {m: {max_output_tokens: 100, targets: [{provider: up, model: m}]}}
"""
CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"
TEXT = {"type": "text", "text": "hi"}
FUNCTION = {"type": "function", "function": {"name": "f"}}
SAID = [{"role": "user", "content": "hi"}]


def chat(*parts: dict[str, Any], **fields: Any) -> tuple[str, dict[str, Any]]:
    return CHAT, {"messages": [{"role": "user", "content": [TEXT, *parts]}], **fields}


def responses(*items: dict[str, Any], **fields: Any) -> tuple[str, dict[str, Any]]:
    return RESPONSES, {"input": [{"role": "user", "content": "hi"}, *items], "store": False, **fields}


def messages(*blocks: dict[str, Any], **fields: Any) -> tuple[str, dict[str, Any]]:
    return MESSAGES, {"max_tokens": 20, "messages": [{"role": "user", "content": [TEXT, *blocks]}], **fields}


async def ask(gateway: Running, path: str, body: dict[str, Any]) -> Response:
    return await gateway.post(path, {"model": "m", **body}, headers={"anthropic-version": "2023-06-01"})


UNKNOWN = [
    chat({"type": "video_url", "video_url": {"url": "https://example.com/v.mp4"}}),
    chat({"type": "audio_url", "audio_url": {"url": "https://example.com/a.mp3"}}),
    chat({"type": "image_embeds", "image_embeds": "QUJD"}),
    chat({"type": "image", "source": {"type": "url", "url": "https://example.com/i.png"}}),
    chat({"type": "document", "source": {"type": "url", "url": "https://example.com/d.pdf"}}),
    chat({"type": "image_url", "image_url": {"url": "https://example.com/i.png"}}),
    chat(tools=[FUNCTION, {"type": "mcp", "server_url": "https://example.com"}]),
    responses({"role": "user", "content": [{"type": "input_video", "video_url": "https://example.com/v.mp4"}]}),
    responses({"type": "a_new_item", "value": "x"}),
    responses({"type": "image_generation_call", "id": "ig_1"}),
    responses(tools=[{"type": "mcp", "server_label": "s", "server_url": "https://example.com"}]),
    responses(tools=[{"type": "code_interpreter", "container": {"type": "auto"}}]),
    responses(tools=[{"type": "image_generation"}]),
    responses(tools=[{"type": "file_search", "vector_store_ids": []}]),
    responses(tools=[{"type": "shell", "environment": {"type": "container_auto"}}]),
    messages({"type": "video", "source": {"type": "url", "url": "https://example.com/v.mp4"}}),
    messages({"type": "container_upload", "file_id": "file_1"}),
    messages(tools=[{"type": "code_execution_20250825", "name": "code_execution"}]),
    messages(tools=[{"type": "web_fetch_20250910", "name": "web_fetch"}]),
    messages(mcp_servers=[{"type": "url", "url": "https://example.com", "name": "s"}]),
]
KNOWN = [
    chat(),
    chat({"type": "refusal", "refusal": "no"}, tools=[FUNCTION, {"type": "custom", "custom": {"name": "c"}}]),
    chat(tools=[{"type": "web_search"}]),
    responses({"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}),
    responses(tools=[{"type": "function", "name": "f"}]),
    messages({"type": "tool_result", "tool_use_id": "t", "content": [TEXT]}),
    messages(tools=[{"name": "f", "input_schema": {"type": "object"}}]),
]


@pytest.mark.parametrize(("path", "body"), UNKNOWN)
async def test_what_nobody_can_count_is_refused_under_a_hard_budget(path: str, body: dict[str, Any]) -> None:
    async with running(BUDGETS) as gateway:
        answer = await ask(gateway, path, body)
        assert (answer.status, answer.json()["error"].get("code", "model_unpriced")) == (400, "model_unpriced")
        assert "has no price for what is asked" in answer.text


@pytest.mark.parametrize(("path", "body"), KNOWN)
async def test_texts_tools_of_the_client_and_searches_are_let_through(path: str, body: dict[str, Any]) -> None:
    async with running(BUDGETS) as gateway:
        answer = await ask(gateway, path, body)
        assert answer.status == 200 or "has no price" not in answer.text, answer.text


@pytest.mark.parametrize(("path", "body"), UNKNOWN)
async def test_no_hard_budget_refuses_nothing_for_it(path: str, body: dict[str, Any]) -> None:
    async with running(BUDGETS.replace("hard: true", "hard: false")) as gateway:
        answer = await ask(gateway, path, body)
        assert "has no price" not in answer.text


async def test_an_operator_can_give_them_a_price() -> None:
    priced = BUDGETS.replace("output: 1}", "output: 1, meters: {unknown: 0.1, hosted_tools: 0.2}}")
    path, body = UNKNOWN[0]
    async with running(priced) as gateway:
        assert (await ask(gateway, path, {**body, "tools": [{"type": "mcp"}]})).status == 200


async def test_a_reference_to_an_item_is_history_that_nobody_can_count() -> None:
    """Which no target here keeps; the bound is asked for all the same, by `explain`."""
    from qlens.dialects import responses as dialect

    for reference in ({"type": "item_reference", "id": "msg_1"}, {"id": "msg_1"}):
        assert dialect.media({"input": [reference]}) == {"history": 1}
