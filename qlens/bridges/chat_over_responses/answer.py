"""From a response to a chat completion."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from attrs import define, field, frozen

from qlens.bridges import counts
from qlens.dialects import Body, responses
from qlens.errors import UpstreamInvalid
from qlens.provider_errors import error_from

Item = dict[str, Any]

FINISH = {"max_output_tokens": "length", "content_filter": "content_filter"}
"""Chat's finish reason, by why a response is incomplete."""
CALLS = {"function_call": ("function", "arguments"), "custom_tool_call": ("custom", "input")}
"""The items that call a tool: what chat calls their kind, and what is given to the tool."""


@frozen
class Head:
    """What every part of one answer repeats."""

    id: str
    created: int
    model: str

    @classmethod
    def of(cls, response: Body) -> Head:
        """The head of a chat completion for a response."""
        created = response.get("created_at")
        return cls(
            f"chatcmpl-{str(response.get('id') or '').removeprefix('resp_')}",
            int(created) if isinstance(created, int | float) else int(time.time()),
            str(response.get("model") or ""),
        )


def finish_of(response: Body, calls: int, *, older: bool) -> str:
    """Chat's finish reason for a response that has ended; `calls` is how many tools the client is to call."""
    if response.get("status") == "incomplete":
        details = response.get("incomplete_details")
        reason = details.get("reason") if isinstance(details, dict) else None
        return FINISH.get(str(reason), "length")
    return ("function_call" if older else "tool_calls") if calls else "stop"


def called(item: Item) -> Item:
    """A call of a tool as chat has it, without its index."""
    kind, given = CALLS[item["type"]]
    return {"id": item["call_id"], "type": kind, kind: {"name": item["name"], given: item.get(given) or ""}}


def note_of(note: Any) -> Item | None:
    """An annotation as chat has it; it knows those of pages alone."""
    if not isinstance(note, dict) or note.get("type") != "url_citation":
        return None
    return {"type": "url_citation", "url_citation": {name: note[name] for name in note if name != "type"}}


def thoughts_of(item: Item) -> Iterator[str]:
    """The texts of a reasoning item: itself where a provider shows it, else how it is summed up."""
    for part in item.get("content") or item.get("summary") or ():
        if isinstance(text := part.get("text"), str) and text:
            yield text


def answered(body: Body, older: bool) -> Body:
    """The response as a chat completion; `older`: for a client that speaks of functions.

    Raises the error of a response that failed, and UpstreamInvalid for what is no response, or none that has ended.
    """
    status, output = body.get("status"), body.get("output")
    if status == "failed":
        raise error_from(responses.answer_error(body))
    if status not in {"completed", "incomplete"} or not isinstance(output, list):
        raise UpstreamInvalid("The provider's answer is no response that has ended.")
    said = _Said()
    try:
        for item in output:
            said.take(item)
    except (AttributeError, KeyError, TypeError) as error:
        raise UpstreamInvalid("The provider's answer has an item that is not as its API promises.") from error
    head = Head.of(body)
    spelled = {"content": said.spelled, "refusal": None} if said.spelled else None
    finish = finish_of(body, len(said.calls), older=older)
    choice = {"index": 0, "message": said.message(older), "logprobs": spelled, "finish_reason": finish}
    return {
        "id": head.id,
        "object": "chat.completion",
        "created": head.created,
        "model": head.model,
        "choices": [{**choice, **filtered(body)}],
        **counted(body),
    }


def counted(response: Body) -> Body:
    """The usage of a response and the tier it was given, as chat says them."""
    usage = responses.usage(response)
    tier = response.get("service_tier")
    return {
        **({"usage": counts.as_openai(usage)} if usage is not None else {}),
        **({"service_tier": tier} if isinstance(tier, str) else {}),
    }


def filtered(response: Body) -> Item:
    """What Azure's content filter says of an answer, as a choice of a chat has it; nothing elsewhere."""
    found = response.get("content_filters")
    for each in found if isinstance(found, list) else ():
        if isinstance(each, dict) and each.get("source_type") == "completion":
            return {"content_filter_results": each.get("content_filter_results")}
    return {}


@define(eq=False)
class _Said:
    texts: list[str] = field(factory=list)
    refusals: list[str] = field(factory=list)
    thoughts: list[str] = field(factory=list)
    calls: list[Item] = field(factory=list)
    notes: list[Item] = field(factory=list)
    spelled: list[Any] = field(factory=list)

    def take(self, item: Item) -> None:
        """Take one item; those of tools that the provider runs itself cannot be asked for, and are left out."""
        match item["type"]:
            case "message":
                for part in item["content"]:
                    self._part(part)
            case "reasoning":
                self.thoughts += thoughts_of(item)
            case "function_call" | "custom_tool_call":
                self.calls.append(called(item))

    def _part(self, part: Item) -> None:
        if part["type"] == "refusal":
            self.refusals.append(part["refusal"])
        elif part["type"] == "output_text":
            self.texts.append(part["text"])
            self.notes += filter(None, map(note_of, part.get("annotations") or ()))
            self.spelled += part.get("logprobs") or ()

    def message(self, older: bool) -> Item:
        """OpenAI's message."""
        silent = not self.texts and not self.calls and not self.refusals
        message: Item = {
            "role": "assistant",
            "content": "".join(self.texts) if self.texts or silent else None,
            "refusal": "".join(self.refusals) or None,
            "annotations": self.notes,
        }
        if self.thoughts:
            message["reasoning_content"] = "".join(self.thoughts)
        if self.calls and older:
            message["function_call"] = self.calls[0].get("function")
        elif self.calls:
            message["tool_calls"] = self.calls
        return message
