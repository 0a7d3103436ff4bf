"""A real HTTP server that plays Anthropic's API: as strict as it, with its streams, its pings and its failures.

https://platform.claude.com/docs/en/api/messages
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import orjson
from attrs import define, field

from qlens.dialects import messages, typed
from qlens.testing.messages_content import signature
from qlens.testing.messages_rules import MODELS, VERSIONS, Card, refusal
from qlens.testing.upstreams import TEXT, FakeUpstream, Recorded, Scripted, serving

KEY = "sk-ant-example"
COUNT_PATH = "/v1/messages/count_tokens"
MODEL = "claude-haiku-4-5-20251001"
THOUGHT = "The user greets me."
USAGE = {
    "input_tokens": 9,
    "cache_creation_input_tokens": 0,
    "cache_read_input_tokens": 0,
    "cache_creation": {"ephemeral_5m_input_tokens": 0, "ephemeral_1h_input_tokens": 0},
    "output_tokens": 4,
    "output_tokens_details": None,
    "server_tool_use": None,
    "inference_geo": None,
    "service_tier": "standard",
}

UNCOUNTED = frozenset({"max_tokens", "metadata", "service_tier", "stop_sequences", "stream", "temperature"})
"""Fields of messages that nobody counts."""

_STATUS = {
    "invalid_request_error": 400,
    "authentication_error": 401,
    "billing_error": 402,
    "permission_error": 403,
    "not_found_error": 404,
    "request_too_large": 413,
    "rate_limit_error": 429,
    "api_error": 500,
    "timeout_error": 504,
    "overloaded_error": 529,
}


@define(eq=False)
class FakeAnthropic(FakeUpstream):
    """A running server; made by `anthropic()`. `script` overrides what it says by itself."""

    keys: tuple[str, ...] = (KEY,)
    models: Mapping[str, Card] = field(factory=lambda: dict(MODELS))
    refused: list[str] = field(factory=list)
    """What was wrong with the requests that it refused."""

    @property
    def url(self) -> str:
        """What goes into a provider's `base_url`: without /v1."""
        return self.root

    def _answer(self, request: Recorded) -> Scripted:
        """A scripted answer is for a request that is in order: nobody is told of a mistake by what he scripted."""
        found = self._refusal(request)
        if found is None:
            return super()._answer(request)
        self.refused.append(str(orjson.loads(orjson.dumps(found.body))["error"]["message"]))
        return found

    def _usual(self, request: Recorded) -> Scripted:
        if request.path == COUNT_PATH:
            return Scripted(body={"input_tokens": USAGE["input_tokens"]}, headers={"request-id": "req_011Example"})
        told = _usual_message(request.body)
        return stream(told) if request.body.get("stream") else whole(told)

    def _refusal(self, request: Recorded) -> Scripted | None:
        counting = request.path == COUNT_PATH
        if request.path not in {"/v1/messages", COUNT_PATH} or request.method != "POST":
            return failure("not_found_error", "Not Found")
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        key = request.headers.get("x-api-key") or (token if scheme == "Bearer" else None)
        if key is None:
            return failure("authentication_error", "x-api-key header is required")
        if key not in self.keys:
            return failure("authentication_error", "invalid x-api-key")
        version = request.headers.get("anthropic-version")
        if version not in VERSIONS:
            return failure("invalid_request_error", f'anthropic-version: "{version}" is not a valid version')
        if not request.headers.get("content-type", "").startswith("application/json"):
            return failure("invalid_request_error", "content-type: must be application/json")
        try:
            body = orjson.loads(request.content)
        except orjson.JSONDecodeError:
            return failure("invalid_request_error", "The request body is not valid JSON")
        if isinstance(body, dict) and isinstance(body.get("model"), str) and body["model"] not in self.models:
            return failure("not_found_error", f"model: {body['model']}")
        if counting and (uncounted := sorted(UNCOUNTED.intersection(body))):
            return failure("invalid_request_error", f"{uncounted[0]}: Extra inputs are not permitted")
        fault = refusal({**body, "max_tokens": 1} if counting else body, version)
        return failure("invalid_request_error", fault) if fault is not None else None


@asynccontextmanager
async def anthropic() -> AsyncIterator[FakeAnthropic]:
    """Serve as Anthropic on a free loopback port until the block is left."""
    async with serving(FakeAnthropic()) as fake:
        yield fake


# --- answers -----------------------------------------------------------------------------------


def message(
    *blocks: Mapping[str, Any], stop: str = "end_turn", usage: Mapping[str, Any] = USAGE, **fields: Any
) -> dict[str, Any]:
    """An answer with these blocks of content."""
    return {
        "id": "msg_01Example",
        "type": "message",
        "role": "assistant",
        "model": MODEL,
        "content": [dict(block) for block in blocks] or [text(TEXT)],
        "stop_reason": stop,
        "stop_sequence": None,
        "stop_details": None,
        "container": None,
        "usage": dict(usage),
        **fields,
    }


def text(said: str, **fields: Any) -> dict[str, Any]:
    """A block of text."""
    return {"type": "text", "text": said, **fields}


def thinking(thought: str = THOUGHT) -> dict[str, Any]:
    """A block with a thought, signed."""
    return {"type": "thinking", "thinking": thought, "signature": signature(thought)}


def tool_use(identifier: str, name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """A block that calls a tool."""
    return {"type": "tool_use", "id": identifier, "name": name, "input": dict(given)}


def whole(told: Mapping[str, Any], **options: Any) -> Scripted:
    """A scripted answer in one piece; `options` are those of Scripted."""
    return Scripted(body=dict(told), headers={"request-id": "req_011Example"}, **options)


def stream(told: Mapping[str, Any], *, size: int = 6, **options: Any) -> Scripted:
    """The same as a stream, its texts in pieces of `size` characters."""
    return Scripted(events=list(streamed(told, size)), headers={"request-id": "req_011Example"}, **options)


def streamed(told: Mapping[str, Any], size: int = 6) -> Iterator[bytes]:
    """The events that tell an answer: named, a ping among them, the counts of its input in the first one."""
    pinged = False
    for event in messages.explode(dict(told)):
        for piece in _pieces(event, size):
            yield typed.write(piece)
        if event["type"] == "content_block_start" and not pinged:
            pinged = True
            yield typed.write({"type": "ping"})


def _pieces(event: dict[str, Any], size: int) -> Iterator[dict[str, Any]]:
    delta = event.get("delta", {})
    name = {"text_delta": "text", "thinking_delta": "thinking", "input_json_delta": "partial_json"}.get(
        delta.get("type", "")
    )
    if name is None:
        yield event
        return
    if name == "partial_json":
        yield {**event, "delta": {**delta, name: ""}}  # as the real one begins
    for start in range(0, len(delta[name]), size):
        yield {**event, "delta": {**delta, name: delta[name][start : start + size]}}


def failure(kind: str, wording: str, *, status: int | None = None, retry_after: int | None = None) -> Scripted:
    """A scripted error before an answer."""
    headers = {"request-id": "req_011Example", **({"retry-after": str(retry_after)} if retry_after else {})}
    return Scripted(status or _STATUS[kind], headers, body=error(kind, wording))


def error(kind: str, wording: str, **details: Any) -> dict[str, Any]:
    """Anthropic's error object."""
    inner = {"type": kind, "message": wording, **({"details": details} if details else {})}
    return {"type": "error", "error": inner, "request_id": "req_011Example"}


def _usual_message(body: dict[str, Any]) -> dict[str, Any]:
    """A greeting; a thought before it for who asks for thoughts; a call where a tool must be called."""
    tools, choice = body.get("tools") or [], (body.get("tool_choice") or {}).get("type")
    forced = body["tool_choice"]["name"] if choice == "tool" else tools[0]["name"] if choice == "any" else None
    thoughts = [thinking()] if (body.get("thinking") or {}).get("type") in {"enabled", "adaptive"} else []
    if forced is not None:
        called = {**tool_use("toolu_01Example", forced, {}), "caller": {"type": "direct"}}
        return message(*thoughts, called, stop="tool_use", model=body["model"])
    return message(*thoughts, text(TEXT, citations=None), model=body["model"])
