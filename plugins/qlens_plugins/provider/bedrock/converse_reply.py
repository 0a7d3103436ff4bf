"""From Converse's answer to OpenAI's chat completion."""

from __future__ import annotations

import time
from typing import Any
from uuid import uuid4

import orjson
from attrs import frozen

from qlens import UpstreamError, UpstreamInvalid
from qlens_plugins.provider.bedrock.converse_request import Asked

Block = dict[str, Any]

_FINISH = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "tool_use": "tool_calls",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "guardrail_intervened": "content_filter",
    "content_filtered": "content_filter",
    "refusal": "content_filter",
    "pause_turn": "length",
}
_MALFORMED = {"malformed_model_output", "malformed_tool_use"}
_BLOCKS = frozenset({dict})


@frozen(slots=False)  # made for every call
class Head:
    """What every part of one answer repeats."""

    id: str
    created: int
    model: str

    @classmethod
    def of(cls, model: str, request_id: str | None) -> Head:
        """The head of an answer that begins now."""
        return cls(f"chatcmpl-{request_id or uuid4().hex}", int(time.time()), model)


def finish_of(reason: object, calls: int) -> str:
    """OpenAI's finish reason; `calls` is how many tools the client is to call. Raises for an answer that is broken."""
    if reason in _MALFORMED:
        raise UpstreamError("The model's answer is malformed.", code="malformed_model_output")
    finish = _FINISH.get(reason, "stop") if isinstance(reason, str) else "stop"
    if finish == "stop" and calls:
        return "tool_calls"
    if finish == "tool_calls" and not calls:
        return "stop"  # the tool was the answer's own form
    return finish


def older(finish: str) -> str:
    """The finish reason for clients that speak of functions."""
    return "function_call" if finish == "tool_calls" else finish


def choice_of(answer: Block, asked: Asked, index: int) -> Block:
    """One choice of a chat completion."""
    message, calls = _message(_content(answer), asked)
    finish = finish_of(answer.get("stopReason"), len(calls))
    if calls and asked.older:
        message["function_call"] = calls[0]["function"]
    elif calls:
        message["tool_calls"] = calls
    return {
        "index": index,
        "message": message,
        "logprobs": None,
        "finish_reason": older(finish) if asked.older else finish,
    }


def _content(answer: Block) -> list[Block]:
    try:
        content = answer["output"]["message"]["content"]
    except (KeyError, TypeError):
        content = None
    if not isinstance(content, list) or not _BLOCKS.issuperset(map(type, content)):
        raise UpstreamInvalid("The provider's answer has no message.")
    return content


def _message(content: list[Block], asked: Asked) -> tuple[Block, list[Block]]:
    texts: list[str] = []
    calls: list[Block] = []
    thoughts: list[Block] = []
    notes: list[Block] = []
    form: str | None = None
    for block in content:
        if "text" in block:
            texts.append(block["text"])
        elif "toolUse" in block:
            use = block["toolUse"]
            if asked.helper is not None and use["name"] == asked.helper:
                # The first is the answer: two objects behind each other are no JSON.
                form = form or orjson.dumps(use.get("input") or {}).decode()
            elif use.get("type") != "server_tool_use" and not (asked.one_tool and calls):
                calls.append(call_of(use, asked))
        elif "reasoningContent" in block:
            thoughts.append(thought_of(block["reasoningContent"]))
        elif "citationsContent" in block:
            _cited(block["citationsContent"], texts, notes)
    if form is not None:
        texts, notes = [form], []  # notes tell places in the text
    message: Block = {"role": "assistant", "content": "".join(texts) if texts else None, "refusal": None}
    if not texts and not calls:
        message["content"] = ""
    if thoughts:
        message["reasoning_content"] = "".join(each.get("thinking", "") for each in thoughts)
        if replayable := [each for each in thoughts if "signature" in each or "data" in each]:
            message["thinking_blocks"] = replayable
    if notes:
        message["annotations"] = notes
    return message, calls


def call_of(use: Block, asked: Asked) -> Block:
    """A call of a tool under the client's own name for it."""
    arguments = orjson.dumps(use.get("input") or {}).decode()
    return {
        "id": use["toolUseId"],
        "type": "function",
        "function": {"name": asked.names.client(use["name"]), "arguments": arguments},
    }


def thought_of(content: Block) -> Block:
    """A thought as clients keep it and send it back: in Anthropic's form."""
    if "redactedContent" in content:
        return {"type": "redacted_thinking", "data": content["redactedContent"]}
    said = content.get("reasoningText") or {}
    thought: Block = {"type": "thinking", "thinking": said.get("text") or ""}
    if said.get("signature"):
        thought["signature"] = said["signature"]
    return thought


def _cited(content: Block, texts: list[str], notes: list[Block]) -> None:
    start = sum(map(len, texts))
    texts += [part["text"] for part in content.get("content") or () if isinstance(part.get("text"), str)]
    end = sum(map(len, texts))
    for each in content.get("citations") or ():
        url = ((each.get("location") or {}).get("web") or {}).get("url")
        if url:
            cited = {"url": url, "title": each.get("title") or url, "start_index": start, "end_index": end}
            notes.append({"type": "url_citation", "url_citation": cited})
