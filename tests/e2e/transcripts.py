"""What the official SDKs read, told without what is different each time: kinds, roles, reasons, names, counts."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from itertools import groupby
from typing import Any

from attrs import define, field, frozen
from pydantic import BaseModel

TRANSPORT = {"content-encoding", "content-length", "content-type", "date", "server", "transfer-encoding"}
"""Headers of HTTP itself."""


Lines = list[str]


@frozen
class Difference:
    """Why a place is not like the others in a scene, and what is to be read there."""

    reason: str
    shows: Callable[[Lines], Lines] = field(repr=False)
    """From the lines elsewhere to the lines there."""


def instead(*lines: str) -> Callable[[Lines], Lines]:
    """Other lines altogether."""
    return lambda _: list(lines)


def changed(changes: Mapping[str, str | tuple[str, ...]]) -> Callable[[Lines], Lines]:
    """The same lines, some of them changed, or become several."""

    def shows(lines: Lines) -> Lines:
        found = [changes.get(line, line) for line in lines]
        return [each for line in found for each in ((line,) if isinstance(line, str) else line)]

    return shows


@define
class Transcript:
    """The lines that a program writes about what it got, and the fields it met that its SDK does not know."""

    lines: Lines = field(factory=list)
    unknown: set[str] = field(factory=set)
    counts: set[tuple[int, int, int]] = field(factory=set)
    """The tokens of answers with one choice: all input, what of it was cached, all output."""

    def write(self, *lines: str) -> None:
        """Add lines."""
        self.lines.extend(lines)

    def meet(self, model: BaseModel) -> None:
        """Note the fields of an object that the SDK does not know."""
        self.unknown |= _unknown(model, "")

    # --- chat ----------------------------------------------------------------------------------

    def chat(self, answer: Any) -> None:
        """A chat completion, whole or put together from a stream."""
        self.meet(answer)
        self.write(f"{answer.object}, {_prefix(answer.id)}, {_kinds(created=answer.created, model=answer.model)}")
        for choice in answer.choices:
            self.write(f"choice {choice.index}: {', '.join(_said(choice.message))}; {choice.finish_reason}")
        if answer.usage is not None:
            self._chat_usage(answer.usage, len(answer.choices))

    def chunks(self, chunks: list[Any]) -> None:
        """The chunks of a stream of chat: their common head, and what each brings, repetitions left out."""
        for chunk in chunks:
            self.meet(chunk)
        heads = {(chunk.id, chunk.object, chunk.created, chunk.model) for chunk in chunks}
        assert len(heads) == 1, heads
        identifier, kind, created, model = heads.pop()
        self.write(f"{kind}, {_prefix(identifier)}, {_kinds(created=created, model=model)}")
        # Several choices come interleaved as it happens: each is told by itself.
        choices = sorted({choice.index for chunk in chunks for choice in chunk.choices})
        for index in choices:
            self.write(*_once(line for chunk in chunks for line in _deltas(chunk, index)))
        finished = max(at for at, chunk in enumerate(chunks) if chunk.choices)
        assert all(chunk.usage is None for chunk in chunks[: finished + 1]), "usage came with or before a choice"
        for chunk in chunks[finished + 1 :]:
            self._chat_usage(chunk.usage, len(choices))

    def _chat_usage(self, usage: Any, choices: int) -> None:
        assert usage.prompt_tokens > 0, usage
        assert usage.completion_tokens > 0, usage
        assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens, usage
        cached = usage.prompt_tokens_details.cached_tokens
        assert 0 <= cached <= usage.prompt_tokens, usage
        # Bedrock shows thoughts and does not always count them.
        thought = usage.completion_tokens_details.reasoning_tokens
        assert thought is None or 0 <= thought <= usage.completion_tokens, usage
        if choices == 1:
            self.counts.add((usage.prompt_tokens, cached, usage.completion_tokens))
        self.write("prompt + completion = total; cached within prompt, reasoning within completion")

    # --- messages ------------------------------------------------------------------------------

    def message(self, answer: Any) -> None:
        """A message of Anthropic's, whole or put together from a stream."""
        self.meet(answer)
        self.write(f"{answer.type}, {answer.role}, {_prefix(answer.id)}, {_kinds(model=answer.model)}")
        self.write(*(f"block {at}: {_block(block)}" for at, block in enumerate(answer.content)))
        usage = answer.usage
        assert usage.input_tokens > 0, usage
        assert usage.output_tokens > 0, usage
        cached = usage.cache_read_input_tokens
        self.counts.add((usage.input_tokens + cached, cached, usage.output_tokens))
        self.write(
            f"{answer.stop_reason}, {answer.stop_sequence}",
            _kinds(input=usage.input_tokens, output=usage.output_tokens),
        )

    def message_events(self, events: Iterable[Any]) -> None:
        """The events of a stream of messages, repetitions left out."""
        self.write(*_once(line for event in events if (line := _message_event(event)) is not None))

    # --- Responses -----------------------------------------------------------------------------

    def response(self, answer: Any) -> None:
        """A response, whole or as the last event of a stream has it."""
        self.meet(answer)
        self.write(
            f"{answer.object}, {_prefix(answer.id)}, {_kinds(created_at=answer.created_at, model=answer.model)}",
            f"{answer.status}, {answer.incomplete_details and answer.incomplete_details.reason}, error {answer.error}",
            f"format {answer.text.format.type}, {len(answer.tools)} tools, store {answer.store}",
        )
        self.write(*(f"item {at}: {_item(item)}" for at, item in enumerate(answer.output)))
        usage = answer.usage
        assert usage.total_tokens == usage.input_tokens + usage.output_tokens > 0, usage
        assert 0 <= usage.input_tokens_details.cached_tokens <= usage.input_tokens, usage
        assert 0 <= usage.output_tokens_details.reasoning_tokens <= usage.output_tokens, usage
        self.counts.add((usage.input_tokens, usage.input_tokens_details.cached_tokens, usage.output_tokens))
        self.write("input + output = total; cached within input, reasoning within output")

    def response_events(self, events: list[Any]) -> None:
        """The events of a stream of Responses, repetitions left out; they are numbered without a gap."""
        assert [event.sequence_number for event in events] == list(range(len(events)))
        self.write(*_once(f"{event.type}{_place(event)}" for event in events))

    # --- both ----------------------------------------------------------------------------------

    def headers(self, headers: Mapping[str, str]) -> None:
        """The names of an answer's headers."""
        self.write(*sorted({name.lower() for name in headers} - TRANSPORT))


def _once(lines: Iterable[str]) -> Lines:
    return [line for line, _ in groupby(lines)]


def _prefix(identifier: str) -> str:
    """The part of an id that says of what it is."""
    kind, mark, rest = re.split(r"([-_])", identifier, maxsplit=1)
    assert rest, identifier
    kind += mark
    return f"id {kind}"


def _kinds(**values: Any) -> str:
    for name, value in values.items():
        assert value, f"{name} is empty"
    return ", ".join(f"{name} {type(value).__name__}" for name, value in values.items())


def _unknown(node: Any, path: str) -> set[str]:
    if isinstance(node, list):
        return {name for each in node for name in _unknown(each, path)}
    if not isinstance(node, BaseModel):
        return set()
    found = {f"{path}{name}" for name, value in (node.model_extra or {}).items() if value is not None}
    for name in type(node).model_fields:
        found |= _unknown(getattr(node, name, None), f"{path}{name}.")
    return found


# --- chat --------------------------------------------------------------------------------------


def _said(message: Any) -> Iterable[str]:
    yield message.role
    if thought := (message.model_extra or {}).get("reasoning_content"):
        yield _text(thought, "thought")
    if message.content is not None:
        yield _text(message.content)
    for call in message.tool_calls or ():
        assert call.id
        yield f"{call.type} {call.function.name}({_arguments(call.function.arguments)})"
    if message.refusal:
        yield "refusal"


def _text(text: str, kind: str = "text") -> str:
    assert text.strip(), "an empty text"
    return kind


def _arguments(text: str) -> str:
    return ", ".join(f"{name} {type(value).__name__}" for name, value in sorted(json.loads(text).items()))


def _deltas(chunk: Any, index: int) -> Iterable[str]:
    for choice in chunk.choices:
        if choice.index != index:
            continue
        delta = choice.delta
        if delta.role:
            yield f"{index} {delta.role}"
        if (delta.model_extra or {}).get("reasoning_content"):
            yield f"{index} thought"
        if delta.content:
            yield f"{index} text"
        for call in delta.tool_calls or ():
            began = bool(call.id and call.function.name and call.type == "function")
            assert began or not (call.id or call.function.name), call
            yield f"{index} call {call.index} {call.function.name if began else 'arguments'}"
        if choice.finish_reason:
            yield f"{index} {choice.finish_reason}"


# --- messages ----------------------------------------------------------------------------------


def _block(block: Any) -> str:
    match block.type:
        case "text":
            return _text(block.text)
        case "thinking":
            return _text(block.thinking, "thinking, signed" if block.signature else "thinking")
        case "tool_use":
            assert block.id
            return f"tool_use {block.name}({_arguments(json.dumps(block.input))})"
        case other:
            return str(other)


def _message_event(event: Any) -> str | None:
    match event.type:
        case "ping":
            return None
        case "message_start":
            return f"message_start {event.message.role}, {len(event.message.content)} blocks"
        case "content_block_start":
            return f"{event.index} start {event.content_block.type}"
        case "content_block_delta":
            return f"{event.index} {event.delta.type}"
        case "content_block_stop":
            return f"{event.index} stop"
        case "message_delta":
            assert event.usage.output_tokens > 0
            return f"message_delta {event.delta.stop_reason}"
        case other:
            return str(other)


# --- Responses ---------------------------------------------------------------------------------


def _item(item: Any) -> str:
    match item.type:
        case "message":
            return (
                f"message {item.role} {item.status}: {', '.join(_text(part.text, part.type) for part in item.content)}"
            )
        case "function_call":
            assert item.call_id
            return f"function_call {item.name}({_arguments(item.arguments)}) {item.status}"
        case "reasoning":
            return f"reasoning: {', '.join(_text(part.text, part.type) for part in item.summary)}"
        case other:
            return str(other)


def _place(event: Any) -> str:
    names = ("output_index", "content_index", "summary_index")
    return "".join(f" {getattr(event, name)}" for name in names if getattr(event, name, None) is not None)
