"""What Anthropic refuses of the messages in a request, in its own words."""

from __future__ import annotations

import re
from base64 import b64decode
from collections.abc import Iterator
from hashlib import sha256
from typing import Any

Block = dict[str, Any]

_ID = re.compile(r"[a-zA-Z0-9_-]+")
_MAGIC = {b"\x89PNG": "image/png", b"\xff\xd8\xff": "image/jpeg", b"GIF8": "image/gif", b"RIFF": "image/webp"}
_BLOCKS = {
    "text": {"text", "cache_control", "citations"},
    "image": {"source", "cache_control"},
    "document": {"source", "title", "context", "citations", "cache_control"},
    "search_result": {"source", "title", "content", "citations", "cache_control"},
    "tool_use": {"id", "name", "input", "cache_control", "caller"},
    "tool_result": {"tool_use_id", "content", "is_error", "cache_control"},
    "thinking": {"thinking", "signature"},
    "redacted_thinking": {"data"},
}
_NEEDED = {
    "text": ("text",),
    "image": ("source",),
    "document": ("source",),
    "tool_use": ("id", "name", "input"),
    "tool_result": ("tool_use_id",),
    "thinking": ("thinking", "signature"),
    "redacted_thinking": ("data",),
}
_OF_ROLE = {
    "user": {"text", "image", "document", "search_result", "tool_result"},
    "assistant": {"text", "tool_use", "thinking", "redacted_thinking"},
}


def signature(thought: str) -> str:
    """What proves that a thought is the model's own."""
    return f"sig-{sha256(thought.encode()).hexdigest()}"


def merged(messages: list[Block]) -> list[Block]:
    """The turns of a conversation: messages of one role after another are one."""
    turns: list[Block] = []
    for message in messages:
        content = message.get("content")
        blocks = [{"type": "text", "text": content}] if isinstance(content, str) else list(content or ())
        if turns and turns[-1]["role"] == message.get("role"):
            turns[-1]["content"] += blocks
        else:
            turns.append({"role": message.get("role"), "content": blocks})
    return turns


def turn_faults(messages: list[Block], turns: list[Block], *, prefill: bool) -> Iterator[str]:
    """What is wrong with messages, and with the turns they are."""
    if not turns:
        yield "messages: at least one message is required"
    for at, message in enumerate(messages):
        if message.get("role") not in _OF_ROLE:
            yield f"messages.{at}.role: Input should be 'user' or 'assistant'"
        if "content" not in message:
            yield f"messages.{at}.content: Field required"
        if not message["content"] and (at < len(messages) - 1 or message["role"] == "user"):
            yield (
                f"messages.{at}: all messages must have non-empty content except for the optional final assistant "
                "message"
            )
        if extra := message.keys() - {"role", "content"}:
            yield f"messages.{at}.{min(extra)}: Extra inputs are not permitted"
    if turns[0]["role"] != "user":
        yield 'messages: first message must use the "user" role'
    for at, turn in enumerate(turns):
        for place, block in enumerate(turn["content"]):
            yield from _block(block, turn["role"], f"messages.{at}.content.{place}")
    last = turns[-1]
    if last["role"] == "assistant":
        if not prefill:
            yield (
                "This model does not support assistant message prefill. The conversation must end with a user message."
            )
        if last["content"] and last["content"][-1].get("text", "")[-1:].isspace():
            yield "messages: final assistant content cannot end with trailing whitespace"
    yield from _results(turns)


def _block(block: Block, role: str, where: str) -> Iterator[str]:
    kind = block.get("type")
    if kind not in _BLOCKS:
        yield f"{where}: Input tag '{kind}' found using 'type' does not match any of the expected tags"
        return
    if kind not in _OF_ROLE[role]:
        yield f"{where}: `{kind}` blocks are not allowed in `{role}` messages"
    for name in _NEEDED.get(kind, ()):
        if name not in block:
            yield f"{where}.{kind}.{name}: Field required"
    if extra := block.keys() - _BLOCKS[kind] - {"type"}:
        yield f"{where}.{kind}.{min(extra)}: Extra inputs are not permitted"
    if kind == "text" and not block["text"]:
        yield "messages: text content blocks must be non-empty"
    if kind == "text" and not block["text"].strip():
        yield "messages: text content blocks must contain non-whitespace text"
    yield from _kind_faults(block, kind, where)


def _kind_faults(block: Block, kind: str, where: str) -> Iterator[str]:
    if kind == "thinking" and block["signature"] != signature(block["thinking"]):
        yield f"{where}: Invalid `signature` in `thinking` block"
    if kind in {"image", "document"}:
        yield from _source(block["source"], kind, where)
    if kind == "tool_use" and not _ID.fullmatch(block["id"]):
        yield f"{where}.tool_use.id: String should match pattern '^[a-zA-Z0-9_-]+$'"
    if kind == "tool_use" and not isinstance(block["input"], dict):
        yield f"{where}.tool_use.input: Input should be a valid dictionary"
    if kind == "tool_result" and isinstance(block.get("content"), list):
        for place, inner in enumerate(block["content"]):
            yield from _block(inner, "user", f"{where}.tool_result.content.{place}")


def _source(source: Block, kind: str, where: str) -> Iterator[str]:
    if source.get("type") != "base64":
        if source.get("type") not in {"url", "file", "text", "content"}:
            yield f"{where}.{kind}.source: Input tag '{source.get('type')}' does not match any of the expected tags"
        return
    try:
        data = b64decode(source["data"], validate=True)
    except ValueError:
        yield f"{where}.{kind}.source.base64.data: The {kind} was specified using base64 encoding but is not valid"
        return
    if kind == "document" and (source["media_type"] != "application/pdf" or not data.startswith(b"%PDF")):
        yield f"{where}.document.source.base64: The PDF specified was not valid."
    found = next((media for magic, media in _MAGIC.items() if data.startswith(magic)), None)
    if kind == "image" and found != source["media_type"]:
        yield (
            f"{where}.image.source.base64: The image was specified using the {source['media_type']} media type, "
            f"but the image appears to be a {found} image"
        )


def _results(turns: list[Block]) -> Iterator[str]:
    for at, turn in enumerate(turns):
        before = turns[at - 1]["content"] if at else []
        called = [block["id"] for block in before if block.get("type") == "tool_use"]
        given = [block["tool_use_id"] for block in turn["content"] if block.get("type") == "tool_result"]
        if lacking := [name for name in called if name not in given]:
            yield (
                f"messages.{at - 1}: `tool_use` ids were found without `tool_result` blocks immediately after: "
                f"{', '.join(lacking)}. Each `tool_use` block must have a corresponding `tool_result` block in the "
                "next message."
            )
        if extra := [name for name in given if name not in called]:
            yield (
                f"messages.{at}.content.0: unexpected `tool_use_id` found in `tool_result` blocks: {extra[0]}. Each "
                "`tool_result` block must have a corresponding `tool_use` block in the previous message."
            )
        if len({*given}) != len(given):
            yield f"messages.{at}.content: each tool_use must have a single result. Found multiple `tool_result` blocks"
        kinds = [block.get("type") == "tool_result" for block in turn["content"]]
        if kinds != sorted(kinds, reverse=True):
            yield f"messages.{at}: `tool_result` blocks must come first in the content"
    last = turns[-1]
    if last["role"] == "assistant" and any(block.get("type") == "tool_use" for block in last["content"]):
        yield f"messages.{len(turns) - 1}: `tool_use` ids were found without `tool_result` blocks immediately after"
