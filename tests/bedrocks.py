"""Pieces for the tests of the provider `bedrock`: configurations, calls, answers as Bedrock gives them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson

from qlens.dialects import chat as chat_dialect
from qlens.testing import Response, running
from qlens.testing.bedrock import KEY, bedrock, stream, streamed, whole

CLAUDE = "us.anthropic.claude-sonnet-4-5-20250929-v1:0"
NOVA = "amazon.nova-lite-v1:0"
LLAMA = "us.meta.llama3-3-70b-instruct-v1:0"
CHAT = "/v1/chat/completions"
STATIC = {"access_key_id": KEY.access_key, "secret_access_key": KEY.secret_key}
PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
PDF = "JVBERi0xLjQKJSVFT0YK"
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
TIME = {"type": "function", "function": {"name": "get_time"}}


def config(
    root: str,
    model: str = CLAUDE,
    *,
    target: Mapping[str, Any] | None = None,
    pipeline: Mapping[str, Any] | None = None,
    credentials: Mapping[str, Any] = STATIC,
    **settings: Any,
) -> str:
    """One model `ours` behind a fake Bedrock."""
    provider = {"plugin": "bedrock", "region": "us-east-1", "endpoint": root, **credentials, **settings}
    content = {
        "pipeline": {"auth": [{"plugin": "anonymous"}], **(pipeline or {})},
        "providers": {"aws": provider},
        "models": {
            "ours": {"max_output_tokens": 8000, "targets": [{"provider": "aws", "model": model, **(target or {})}]}
        },
    }
    return orjson.dumps(content).decode()


def chat(*messages: Mapping[str, Any], **fields: Any) -> dict[str, Any]:
    """A chat call; without messages, a greeting."""
    return {"model": "ours", "messages": [*messages] or [user("Hello")], **fields}


def user(content: Any, **fields: Any) -> dict[str, Any]:
    """A message of the user."""
    return {"role": "user", "content": content, **fields}


def called(*calls: tuple[str, str, str], content: str | None = None, **fields: Any) -> dict[str, Any]:
    """A message of the assistant that calls tools: (id, name, arguments)."""
    tools = [
        {"id": identifier, "type": "function", "function": {"name": name, "arguments": arguments}}
        for identifier, name, arguments in calls
    ]
    return {"role": "assistant", "content": content, "tool_calls": tools, **fields}


def result(identifier: str, content: Any = "sunny", **fields: Any) -> dict[str, Any]:
    """A message with a tool's result."""
    return {"role": "tool", "tool_call_id": identifier, "content": content, **fields}


def image(data: str = PNG, media: str = "image/png") -> dict[str, Any]:
    """A part with an image."""
    return {"type": "image_url", "image_url": {"url": f"data:{media};base64,{data}"}}


def document(name: str, media: str = "application/pdf", data: str = PDF) -> dict[str, Any]:
    """A part with a file."""
    return {"type": "file", "file": {"filename": name, "file_data": f"data:{media};base64,{data}"}}


def schema(body: Mapping[str, Any], **fields: Any) -> dict[str, Any]:
    """A response_format that asks for JSON of this schema."""
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": dict(body), **fields}}


def text(answer: Response) -> str:
    """The text of a chat's answer, whole or streamed."""
    if answer.headers["content-type"].startswith("text/event-stream"):
        deltas = [choice["delta"] for event in events(answer) for choice in event["choices"]]
        return "".join(delta.get("content") or "" for delta in deltas)
    content = answer.json()["choices"][0]["message"]["content"]
    assert isinstance(content, str)
    return content


def events(answer: Response) -> list[dict[str, Any]]:
    """The events of a stream that came to its end."""
    assert answer.status == 200, answer.text
    *found, end = answer.events()
    assert end == "[DONE]", answer.text
    return found


def plain(content: dict[str, Any]) -> dict[str, Any]:
    """An answer, or an event of one, without what is different each time."""
    assert content["id"].startswith("chatcmpl-")
    assert type(content["created"]) is int
    return {name: value for name, value in content.items() if name not in {"id", "created"}}


async def sent(body: Mapping[str, Any], model: str = CLAUDE, **settings: Any) -> dict[str, Any]:
    """What Bedrock gets for a call that it takes."""
    async with bedrock() as aws, running(config(aws.root, model, **settings)) as gateway:
        answer = await gateway.post(CHAT, body)
        assert answer.status == 200, (answer.text, aws.refused)
        found = aws.requests[-1].body
        assert isinstance(found, dict)
        return found


async def refused(body: Mapping[str, Any], model: str = CLAUDE, **settings: Any) -> dict[str, Any]:
    """The error for a call that is refused before Bedrock hears of it."""
    async with bedrock() as aws, running(config(aws.root, model, **settings)) as gateway:
        answer = await gateway.post(CHAT, body)
        assert (answer.status, aws.requests) == (400, []), answer.text
        error = answer.json()["error"]
        assert error["type"] == "invalid_request_error"
        assert isinstance(error, dict)
        return error


async def told(reply: Mapping[str, Any], body: Mapping[str, Any], model: str = CLAUDE) -> list[dict[str, Any]]:
    """The choice that a client gets for this answer of Converse: whole, and streamed and put together again."""
    async with bedrock() as aws, running(config(aws.root, model)) as gateway:
        aws.script(whole(reply), stream(streamed(reply)))
        one = await gateway.post(CHAT, body)
        assert one.status == 200, one.text
        other = await gateway.post(CHAT, {**body, "stream": True})
        assembled = chat_dialect.assemble(events(other))
        return [one.json()["choices"][0], assembled["choices"][0]]
