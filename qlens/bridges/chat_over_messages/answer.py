"""From a message to a chat completion."""

from __future__ import annotations

import time
from typing import Any

import orjson
from attrs import define, field, frozen

from qlens.bridges import counts
from qlens.bridges.chat_over_messages.tools import Asked
from qlens.dialects import Body, messages
from qlens.errors import UpstreamInvalid
from qlens.usage import Usage

Block = dict[str, Any]

_FINISH = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "tool_use": "tool_calls",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "pause_turn": "length",
    "refusal": "content_filter",
}


@frozen
class Head:
    """What every part of one answer repeats."""

    id: str
    created: int
    model: str

    @classmethod
    def of(cls, message: Body) -> Head:
        """The head of an answer that begins now."""
        return cls(f"chatcmpl-{message.get('id') or ''}", int(time.time()), str(message.get("model") or ""))


def finish_of(reason: object, calls: int) -> str:
    """OpenAI's finish reason; `calls` is how many tools the client is to call."""
    finish = _FINISH.get(reason, "stop") if isinstance(reason, str) else "stop"
    if finish == "stop" and calls:
        return "tool_calls"
    return "stop" if finish == "tool_calls" and not calls else finish  # the tool was the answer's own form


def answered(body: Body, asked: Asked) -> Body:
    """The message as a chat completion; raises UpstreamInvalid for what is no message."""
    content = body.get("content")
    if not isinstance(content, list):
        raise UpstreamInvalid("The provider's answer has no content.")
    try:
        said = _Said(asked)
        for block in content:
            said.take(block)
    except (AttributeError, KeyError, TypeError) as error:
        raise UpstreamInvalid("The provider's answer has a block that is not as its API promises.") from error
    message, finish = said.message(), finish_of(body.get("stop_reason"), len(said.calls))
    if finish == "content_filter" and isinstance(why := (body.get("stop_details") or {}).get("explanation"), str):
        message["refusal"] = why
    if asked.older and finish == "tool_calls":
        finish = "function_call"
    head = Head.of(body)
    usage = messages.usage(body)
    return {
        "id": head.id,
        "object": "chat.completion",
        "created": head.created,
        "model": head.model,
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": finish}],
        **_counted(usage),
    }


def _counted(usage: Usage | None) -> Body:
    if usage is None:
        return {}
    tier = counts.openai_tier(usage)
    return {"usage": counts.as_openai(usage), **({"service_tier": tier} if tier else {})}


@define(eq=False)
class _Said:
    asked: Asked
    texts: list[str] = field(factory=list)
    calls: list[Block] = field(factory=list)
    thoughts: list[Block] = field(factory=list)
    notes: list[Block] = field(factory=list)

    def take(self, block: Block) -> None:
        """Take one block; those of tools that the provider runs itself cannot be asked for, and are left out."""
        match block["type"]:
            case "text":
                self._say(block)
            case "tool_use" if block["name"] == self.asked.helper:
                self.texts.append(orjson.dumps(block["input"]).decode())
            case "tool_use":
                function = {
                    "name": self.asked.names.client(block["name"]),
                    "arguments": orjson.dumps(block["input"]).decode(),
                }
                self.calls.append({"id": block["id"], "type": "function", "function": function})
            case "thinking" | "redacted_thinking":
                self.thoughts.append(block)

    def _say(self, block: Block) -> None:
        start = sum(map(len, self.texts))
        self.texts.append(block["text"])
        for citation in block.get("citations") or ():
            if note := note_of(citation, start, start + len(block["text"])):
                self.notes.append(note)

    def message(self) -> Block:
        """OpenAI's message."""
        message: Block = {"role": "assistant", "content": "".join(self.texts) if self.texts else None, "refusal": None}
        if not self.texts and not self.calls:
            message["content"] = ""
        if self.thoughts:
            message["reasoning_content"] = "".join(each.get("thinking") or "" for each in self.thoughts)
            if replayable := [each for each in self.thoughts if each.get("signature") or each.get("data")]:
                message["thinking_blocks"] = replayable
        if self.notes:
            message["annotations"] = self.notes
        if self.calls and self.asked.older:
            message["function_call"] = self.calls[0]["function"]
        elif self.calls:
            message["tool_calls"] = self.calls
        return message


def note_of(citation: Block, start: int, end: int) -> Block | None:
    """A citation as an annotation; OpenAI knows those of pages alone."""
    url = citation.get("url")
    if not isinstance(url, str):
        return None
    cited = {"url": url, "title": citation.get("title") or url, "start_index": start, "end_index": end}
    return {"type": "url_citation", "url_citation": cited}
