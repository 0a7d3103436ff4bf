"""From a chat completion to a message."""

from __future__ import annotations

from typing import Any

import orjson

from qlens.bridges import counts
from qlens.dialects import Body, chat
from qlens.errors import UpstreamInvalid
from qlens.usage import NO_USAGE, Usage

Block = dict[str, Any]

_STOPS = {
    "stop": "end_turn",
    "length": "max_tokens",
    "tool_calls": "tool_use",
    "function_call": "tool_use",
    "content_filter": "refusal",
}
REASONING = ("reasoning_content", "reasoning")
"""Under which names servers give a model's thoughts."""


def answered(body: Body, asked: Body) -> Body:
    """The chat completion as a message; raises UpstreamInvalid for what is none."""
    try:
        choice = body["choices"][0]
        message = choice["message"]
        finish = choice.get("finish_reason")
        content = [*_thoughts(message), *_texts(message), *_calls(message, finish)]
    except (AttributeError, LookupError, TypeError) as error:
        raise UpstreamInvalid("The provider's answer is not a chat completion.") from error
    calls = any(block["type"] == "tool_use" for block in content)
    usage = chat.usage(body) or NO_USAGE
    return {**opening(body, usage), "content": content, **stopped(choice, calls, refused(message), asked)}


def opening(body: Body, usage: Usage) -> Body:
    """A message before anything is said in it."""
    name = str(body.get("id") or "")
    return {
        "id": f"msg_{name.removeprefix('chatcmpl-')}",
        "type": "message",
        "role": "assistant",
        "model": str(body.get("model") or ""),
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "stop_details": None,
        "container": None,
        "usage": counts.as_anthropic(usage),
    }


# Clients that are generated from Anthropic's schema want the fields that say nothing, too.


def said(text: str) -> Block:
    """A block of text."""
    return {"type": "text", "text": text, "citations": None}


def called(identifier: str, name: str, given: Body) -> Block:
    """A block that calls a tool."""
    return {"type": "tool_use", "id": identifier, "name": name, "input": given, "caller": {"type": "direct"}}


def refused(said: Block) -> bool:
    """Whether a message, or a delta of one, says that the model refuses: a chat that does so just stops."""
    refusal = said.get("refusal")
    return isinstance(refusal, str) and bool(refusal)


def stopped(choice: Block, calls: bool, refuses: bool, asked: Body) -> Body:
    """Why an answer stopped; some servers say which stop sequence it was."""
    finish, matched = choice.get("finish_reason"), choice.get("stop_reason")
    reason = _STOPS.get(str(finish), "end_turn")
    if reason == "end_turn" and calls:
        reason = "tool_use"
    if reason == "end_turn" and refuses:
        reason = "refusal"
    if reason == "end_turn" and isinstance(matched, str) and matched in (asked.get("stop_sequences") or ()):
        return {"stop_reason": "stop_sequence", "stop_sequence": matched}
    return {"stop_reason": reason, "stop_sequence": None}


def _thoughts(message: Block) -> list[Block]:
    signed = message.get("thinking_blocks")
    if isinstance(signed, list) and signed:
        return signed
    thought = next((message[name] for name in REASONING if isinstance(message.get(name), str) and message[name]), None)
    # Nobody signed it: it is for people to read, and not sent on when it comes back.
    return [{"type": "thinking", "thinking": thought, "signature": ""}] if thought else []


def _texts(message: Block) -> list[Block]:
    content = message.get("content")
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    texts = [*(part.get("text") for part in parts), message.get("refusal")]
    return [said(text) for text in texts if isinstance(text, str) and text]


def _calls(message: Block, finish: object) -> list[Block]:
    given = enumerate(message.get("tool_calls") or ())
    calls = [(call.get("id") or f"call_{index}", call["function"]) for index, call in given]
    if message.get("function_call"):
        calls.append(("call_0", message["function_call"]))
    return [called(name, function["name"], _input(function, finish)) for name, function in calls]


def _input(function: Block, finish: object) -> Body:
    text = function.get("arguments") or "{}"
    try:
        given = orjson.loads(text)
    except orjson.JSONDecodeError:
        given = None
    if isinstance(given, dict):
        return given
    if finish == "length":
        return {}  # it was cut in the middle, as the reason says
    raise UpstreamInvalid("The model called a tool with something that is not a JSON object.")
