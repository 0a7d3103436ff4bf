"""The guard `pattern` and what models read beside messages: tools, forms of answers, names, thoughts, tokens."""

from __future__ import annotations

from typing import Any

import aiohttp
import pytest
from plugins.guard.test_pattern import config

from qlens.testing import Response, Running, running, upstream

CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"
BLOCK = "[{name: no-falcon, words: [falcon], on: [request]}]"
REDACT = "[{name: falcon, words: [falcon], action: redact, replacement: bird, on: [request]}]"


def schema(description: str = "d", *, name: str = "city", enum: str = "red") -> dict[str, Any]:
    return {"type": "object", "properties": {name: {"type": "string", "description": description, "enum": [enum]}}}


def chat(**fields: Any) -> tuple[str, dict[str, Any]]:
    return CHAT, {"messages": [{"role": "user", "content": "hi"}], **fields}


def function(**fields: Any) -> dict[str, Any]:
    return {"tools": [{"type": "function", "function": {"name": "f", "description": "d", **fields}}]}


def messages(*blocks: dict[str, Any], **fields: Any) -> tuple[str, dict[str, Any]]:
    said = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": [*blocks, {"type": "text", "text": "yes"}]},
        {"role": "user", "content": "go on"},
    ]
    return MESSAGES, {"max_tokens": 50, "messages": said, **fields}


def responses(*items: dict[str, Any], **fields: Any) -> tuple[str, dict[str, Any]]:
    return RESPONSES, {"input": [{"role": "user", "content": "hi"}, *items], "store": False, **fields}


def form(of: str, **fields: Any) -> dict[str, Any]:
    wanted = {"name": "answer", "schema": schema(), **fields}
    if of == CHAT:
        return {"response_format": {"type": "json_schema", "json_schema": wanted}}
    return {"text": {"format": {"type": "json_schema", **wanted}}}


def tool(**fields: Any) -> dict[str, Any]:
    return {"tools": [{"name": "f", "description": "d", "input_schema": schema(), **fields}]}


def called(name: str) -> dict[str, Any]:
    call = {"id": "c", "type": "function", "function": {"name": name, "arguments": "{}"}}
    said = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "x"},
    ]
    return {"messages": said}


THOUGHT = {"type": "thinking", "thinking": "of a falcon", "signature": "c2lnbmVk"}
PAPER = {"filename": "the falcon.pdf", "file_data": "data:application/pdf;base64,aGk="}
REWRITTEN = [
    chat(**function(description="a falcon")),
    chat(**function(parameters=schema("a falcon"))),
    chat(functions=[{"name": "f", "description": "a falcon"}]),
    chat(tools=[{"type": "custom", "custom": {"name": "c", "description": "a falcon"}}]),
    chat(**form(CHAT, description="a falcon")),
    chat(**form(CHAT, schema=schema("a falcon"))),
    chat(messages=[{"role": "user", "name": "falcon", "content": "hi"}]),
    messages(**tool(description="a falcon")),
    messages(**tool(input_schema=schema("a falcon"))),
    responses(tools=[{"type": "function", "name": "f", "description": "a falcon", "parameters": schema()}]),
    responses(tools=[{"type": "function", "name": "f", "parameters": schema("a falcon")}]),
    responses(**form(RESPONSES, description="a falcon")),
    responses(**form(RESPONSES, schema=schema("a falcon"))),
    chat(messages=[{"role": "user", "content": [{"type": "file", "file": PAPER}]}]),
    responses({"role": "user", "content": [{"type": "input_file", **PAPER}]}),
    responses({"type": "function_call_output", "call_id": "c", "output": [{"type": "input_file", **PAPER}]}),
    responses(prompt={"id": "p", "variables": {"paper": {"type": "input_file", **PAPER}}}),
]
FIXED = [
    chat(**function(name="falcon")),
    chat(**function(parameters=schema(name="falcon"))),
    chat(**function(parameters=schema(enum="falcon"))),
    chat(**form(CHAT, name="falcon")),
    chat(**called("falcon")),
    chat(tools=[{"type": "mcp", "server_label": "falcon"}]),
    chat(messages=[{"role": "assistant", "content": "x", "thinking_blocks": [THOUGHT]}]),
    messages(**tool(name="falcon")),
    messages(**tool(input_schema=schema(enum="falcon"))),
    messages(THOUGHT),
    messages({"type": "tool_use", "id": "t", "name": "falcon", "input": {}}),
    messages(output_config={"format": {"type": "json_schema", "schema": schema(name="falcon")}}),
    responses({"type": "function_call", "call_id": "c", "name": "falcon", "arguments": "{}"}),
    responses(tools=[{"type": "function", "name": "falcon"}]),
    responses(**form(RESPONSES, schema=schema(enum="falcon"))),
]


async def ask(gateway: Running, path: str, body: dict[str, Any]) -> Response:
    return await gateway.post(path, {"model": "small", **body}, headers={"anthropic-version": "2023-06-01"})


@pytest.mark.parametrize(("path", "body"), [*REWRITTEN, *FIXED])
async def test_a_rule_that_blocks_finds_all_that_a_model_reads(path: str, body: dict[str, Any]) -> None:
    async with upstream() as up, running(config(BLOCK, url=up.url)) as gateway:
        answer = await ask(gateway, path, body)
        assert (answer.status, "'no-falcon'" in answer.text, up.requests) == (400, True, [])
        (receipt,) = await gateway.settled(1)
        assert receipt.outcome == "blocked"


@pytest.mark.parametrize(("path", "body"), REWRITTEN)
async def test_descriptions_and_names_of_speakers_are_redacted(path: str, body: dict[str, Any]) -> None:
    async with upstream() as up, running(config(REDACT, url=up.url)) as gateway:
        answer = await ask(gateway, path, body)
        assert len(up.requests) == 1, answer.text
        sent = str(up.requests[0].body)
        assert "falcon" not in sent
        assert "bird" in sent


@pytest.mark.parametrize(("path", "body"), FIXED)
async def test_what_must_stay_as_it_is_is_refused_where_it_would_be_redacted(path: str, body: dict[str, Any]) -> None:
    async with upstream() as up, running(config(REDACT, url=up.url)) as gateway:
        answer = await ask(gateway, path, body)
        assert (answer.status, up.requests) == (400, []), answer.text
        assert "must stay as it is" in answer.text
        assert "falcon" not in answer.text
        (receipt,) = await gateway.settled(1)
        assert receipt.outcome == "blocked"


async def test_a_refusal_names_the_field() -> None:
    searches = {"user_location": {"type": "approximate", "approximate": {"city": "falcon"}}}
    async with upstream() as up, running(config(REDACT, url=up.url)) as gateway:
        for body, field in (
            (chat(web_search_options=searches), "'web_search_options.user_location'"),
            (chat(**called("falcon")), "'messages[1]'"),
        ):
            assert field in (await ask(gateway, *body)).text


async def test_what_no_model_reads_of_a_tool_meets_no_rule() -> None:
    rules = "[{name: r, words: [object, high, function, secret], on: [request]}]"
    tools = [
        *function(parameters=schema())["tools"],
        {"type": "mcp", "server_label": "s", "server_url": "https://secret", "authorization": "secret"},
    ]
    async with upstream() as up, running(config(rules, url=up.url)) as gateway:
        await ask(gateway, *chat(tools=tools, web_search_options={"search_context_size": "high"}))
        assert len(up.requests) == 1


# --- forms -------------------------------------------------------------------------------------


async def upload(gateway: Running, path: str, name: str, filename: str) -> Response:
    sent = aiohttp.FormData(quote_fields=False)
    for field, value in (("model", "small"), ("prompt", "hi")):
        sent.add_field(field, value)
    sent.add_field(name, b"of a falcon", filename=filename)
    return await gateway.request("POST", path, body=sent())


@pytest.mark.parametrize(("path", "name"), [("/v1/audio/transcriptions", "file"), ("/v1/images/edits", "image")])
async def test_what_the_file_of_a_form_is_called_meets_the_rules(path: str, name: str) -> None:
    async with upstream() as up, running(config(BLOCK, url=up.url)) as gateway:
        answer = await upload(gateway, path, name, "my falcon.mp3")
        assert (answer.status, "'no-falcon'" in answer.text, up.requests) == (400, True, [])
        assert (await upload(gateway, path, name, "my hawk.mp3")).status == 200
    async with upstream() as up, running(config(REDACT, url=up.url)) as gateway:
        for filename in ("my falcon.mp3", "my hawk.mp3"):
            assert (await upload(gateway, path, name, filename)).status == 200
        sent = [(part.filename, part.content) for each in up.requests for part in each.form if part.filename]
        assert sent == [("my bird.mp3", b"of a falcon"), ("my hawk.mp3", b"of a falcon")]
        counted = 'qlens_guard_matches_total{action="redact",guard="pattern",rule="falcon"} 1.0'
        assert counted in (await gateway.get("/metrics")).text


# --- tokens ------------------------------------------------------------------------------------

TOKENS = [
    ("/v1/completions", {"prompt": [1, 2, 3], "max_tokens": 5}, "prompt"),
    ("/v1/completions", {"prompt": [[1, 2], [3]], "max_tokens": 5}, "prompt"),
    ("/v1/embeddings", {"input": [1, 2, 3]}, "input"),
    ("/v1/embeddings", {"input": [[1, 2], [3]]}, "input"),
]


@pytest.mark.parametrize(("path", "body", "param"), TOKENS)
async def test_arrays_of_tokens_are_refused_where_prompts_are_looked_at(
    path: str, body: dict[str, Any], param: str
) -> None:
    async with running(config(BLOCK)) as gateway:
        answer = await ask(gateway, path, body)
        error = answer.json()["error"]
        assert (answer.status, error["code"], error["param"]) == (400, "unsupported_operation", param)
        assert "the guard pattern cannot look into them" in error["message"]


@pytest.mark.parametrize(("path", "body", "param"), TOKENS)
async def test_arrays_of_tokens_pass_where_an_operator_lets_them_or_only_answers_are_looked_at(
    path: str, body: dict[str, Any], param: str
) -> None:
    passing = config(BLOCK).replace("hold_back: 64", "hold_back: 64, realtime: pass")
    for text in (passing, config(BLOCK.replace("request", "reply"))):
        async with running(text) as gateway:
            assert (await ask(gateway, path, body)).status == 200


async def test_texts_of_these_operations_are_looked_at_as_before() -> None:
    async with running(config(BLOCK)) as gateway:
        assert (await ask(gateway, "/v1/embeddings", {"input": ["a falcon"]})).status == 400
        assert (await ask(gateway, "/v1/embeddings", {"input": ["a hawk"]})).status == 200
