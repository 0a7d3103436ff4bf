"""A client's malformed request is its own mistake, or passes as it is: it never makes the gateway fail."""

from __future__ import annotations

from typing import Any

import pytest

from qlens.testing import running

YAML = """
pipeline: {auth: [{plugin: anonymous}], cost: []}
providers: {echo: {plugin: echo}}
models: {gpt-4o-mini: {max_output_tokens: 100, targets: [{provider: echo, model: gpt-4o-mini}]}}
"""
USER = {"role": "user", "content": "hi"}


def _document(content: Any) -> dict[str, Any]:
    block = {"type": "document", "source": {"type": "content", "content": content}}
    return {"messages": [{"role": "user", "content": [block]}]}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"thinking": {"type": "adaptive", "budget_tokens": "many"}}, "thinking.budget_tokens"),
        (_document([1]), "messages[0].content[0].source.content[0]"),
        (_document([{"type": "text"}]), "messages[0].content[0].source.content[0].text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "novel", "content": [1, {"type": []}]}]}]},
            "messages[0].content[0].type",
        ),
    ],
)
async def test_malformed_messages_are_refused(fields: dict[str, Any], param: str) -> None:
    body = {"model": "gpt-4o-mini", "max_tokens": 5000, "messages": [USER], **fields}
    async with running(YAML) as gateway:
        answer = await gateway.post("/v1/messages", body)
    assert answer.status == 400, answer.text
    assert param in answer.text


async def test_thinking_that_leaves_its_budget_empty_is_answered() -> None:
    thinking = {"type": "adaptive", "budget_tokens": None}
    body = {"model": "gpt-4o-mini", "max_tokens": 5000, "messages": [USER], "thinking": thinking}
    async with running(YAML) as gateway:
        assert (await gateway.post("/v1/messages", body)).status == 200


async def test_tools_that_are_allowed_in_a_chat_are_objects() -> None:
    choice = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": ["look"]}}
    body = {"model": "gpt-4o-mini", "messages": [USER], "tool_choice": choice}
    async with running(YAML) as gateway:
        answer = await gateway.post("/v1/chat/completions", body)
    assert answer.status == 400
    assert answer.json()["error"]["param"] == "tool_choice.allowed_tools.tools[0]"


@pytest.mark.parametrize(
    "fields",
    [
        {"input": [{"role": "user", "content": [{"type": "text"}]}]},
        {"reasoning": {"mode": []}},
        {"tool_choice": {"type": "allowed_tools", "tools": [{"type": {}}]}},
    ],
)
async def test_malformed_requests_for_a_response_are_refused(fields: dict[str, Any]) -> None:
    async with running(YAML) as gateway:
        answer = await gateway.post("/v1/responses", {"model": "gpt-4o-mini", "input": "hi", **fields})
    assert answer.status == 400, answer.text
