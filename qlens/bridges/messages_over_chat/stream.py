"""From the chunks of a chat stream to the events of messages."""

from __future__ import annotations

from typing import Any

import orjson
from attrs import define, field

from qlens import sse
from qlens.bridges import counts
from qlens.bridges.messages_over_chat.answer import REASONING, called, opening, refused, said, stopped
from qlens.dialects import Body, typed
from qlens.errors import UpstreamInvalid
from qlens.provider_errors import error_from
from qlens.usage import NO_USAGE, Usage

Block = dict[str, Any]


@define(eq=False)
class _Call:
    """A call of a tool that is still being written."""

    id: str
    name: str
    said: str = ""
    """Its arguments so far."""
    waiting: str = ""
    """What of them the client has not got yet, because another block is open."""


@define(eq=False)
class Events:
    """Writes a stream of messages, chunk by chunk. Chats may say several things at once, messages one after another."""

    asked: Body
    _heard: counts.Heard = field(init=False, factory=counts.Heard)
    _choice: Block = field(init=False, factory=dict)
    """What finished the answer."""
    _refuses: bool = field(init=False, default=False)
    _began: bool = field(init=False, default=False)
    _done: bool = field(init=False, default=False)
    _index: int = field(init=False, default=-1)
    """The number of the latest block."""
    _open: str | None = field(init=False, default=None)
    """What the open block is: text, thinking or tool_use."""
    _signed_first: str = field(init=False, default="")
    """What was thought in signed pieces whose text has not come yet."""
    _calls: dict[int, _Call] = field(init=False, factory=dict)
    _queue: list[int] = field(init=False, factory=list)
    """Those of the calls whose blocks did not end yet; the first one's is open."""

    @property
    def used(self) -> Usage | None:
        """What the provider has said so far was used."""
        return self._heard.used

    def feed(self, event: bytes) -> bytes:
        """The events for a chunk; raises the error that it carries."""
        data = sse.data(event)
        if data is None or not data.strip() or self._done:
            return b""
        if data.startswith(b"[DONE]"):
            return self.end()
        payload = sse.parsed(data)
        self._heard.hear(payload)
        if payload.get("error"):
            raise error_from(payload)
        try:
            return b"".join(self._chunk(payload))
        except (AttributeError, KeyError, TypeError) as mistake:
            raise UpstreamInvalid("The provider sent an event that is not as its API promises.") from mistake

    def end(self) -> bytes:
        """The end of a message whose reason to stop is known; nothing for one that was cut."""
        if self._done or not self._choice:
            return b""
        self._done = True
        closing = self._close_all()
        delta = stopped(self._choice, bool(self._calls), self._refuses, self.asked)
        usage = counts.as_anthropic(self.used or NO_USAGE)
        closing.append(typed.write({"type": "message_delta", "delta": delta, "usage": usage}))
        closing.append(typed.write({"type": "message_stop"}))
        return b"".join(closing)

    def _chunk(self, payload: Body) -> list[bytes]:
        events = []
        choices = [choice for choice in payload.get("choices") or () if not choice.get("index")]
        if not self._began and choices:
            self._began = True
            events.append(typed.write({"type": "message_start", "message": opening(payload, self.used or NO_USAGE)}))
        for choice in choices:
            events += self._delta(choice.get("delta") or {})
            if choice.get("finish_reason") and not self._choice:
                self._choice = choice
        return events

    # --- deltas --------------------------------------------------------------------------------

    def _delta(self, delta: Block) -> list[bytes]:
        events = []
        thought = next((delta[name] for name in REASONING if delta.get(name)), None)
        if isinstance(thought, str) and not self._is_repeated(thought):
            events += self._say("thinking", {"type": "thinking_delta", "thinking": thought})
        for block in delta.get("thinking_blocks") or ():
            events += self._signed(block)
        self._refuses = self._refuses or refused(delta)
        for name in ("content", "refusal"):
            if isinstance(delta.get(name), str) and delta[name]:
                events += self._say("text", {"type": "text_delta", "text": delta[name]})
        for call in delta.get("tool_calls") or ():
            events += self._call(call)
        if delta.get("function_call"):
            events += self._call({"index": 0, "function": delta["function_call"]})
        return events

    def _say(self, kind: str, delta: Block) -> list[bytes]:
        events = []
        if self._open != kind:
            empty = {"type": "thinking", "thinking": "", "signature": ""} if kind == "thinking" else said("")
            events = [*self._close_all(), self._start(kind, empty)]
        return [*events, self._grow(delta)]

    def _signed(self, block: Block) -> list[bytes]:
        """A thought in one piece: its signature, for one that was told before as it grew."""
        if block["type"] == "redacted_thinking":
            return [*self._close_all(), self._start("redacted_thinking", block), *self._close()]
        events = []
        if self._open != "thinking":
            events = self._say("thinking", {"type": "thinking_delta", "thinking": block["thinking"]})
            self._signed_first += block["thinking"]
        return [*events, self._grow({"type": "signature_delta", "signature": block["signature"]}), *self._close()]

    def _is_repeated(self, thought: str) -> bool:
        """Whether a thought was told already, signed and in one piece, before its text comes."""
        if not self._signed_first.startswith(thought):
            return False
        self._signed_first = self._signed_first[len(thought) :]
        return True

    # --- calls ---------------------------------------------------------------------------------

    def _call(self, part: Block) -> list[bytes]:
        index, function = part.get("index"), part.get("function") or {}
        if type(index) is not int:
            # Some providers leave the index out: an id then starts the next call.
            index = len(self._calls) - (0 if part.get("id") or not self._calls else 1)
        text = function.get("arguments") or ""
        call = self._calls.get(index)
        if call is None:
            call = self._calls[index] = _Call(part.get("id") or f"call_{index}", function["name"])
            self._queue.append(index)
        elif text.strip() and index not in self._queue:
            raise UpstreamInvalid("The provider's stream goes on with a call of a tool after its end.")
        call.said, call.waiting = call.said + text, call.waiting + text
        return self._advance(complete=False)

    def _advance(self, *, complete: bool) -> list[bytes]:
        """Write what can be written of the calls: the next one begins where the open one is whole."""
        events = []
        while self._queue:
            call = self._calls[self._queue[0]]
            if self._open != "tool_use":
                events += [*self._close(), self._start("tool_use", called(call.id, call.name, {}))]
            if call.waiting:
                events.append(self._grow({"type": "input_json_delta", "partial_json": call.waiting}))
                call.waiting = ""
            if not complete and (len(self._queue) == 1 or not _is_json(call.said)):
                break
            self._queue.pop(0)
            events += self._close()
        return events

    # --- blocks --------------------------------------------------------------------------------

    def _start(self, kind: str, block: Block) -> bytes:
        self._index, self._open = self._index + 1, kind
        return typed.write({"type": "content_block_start", "index": self._index, "content_block": block})

    def _grow(self, delta: Block) -> bytes:
        return typed.write({"type": "content_block_delta", "index": self._index, "delta": delta})

    def _close(self) -> list[bytes]:
        if self._open is None:
            return []
        self._open = None
        return [typed.write({"type": "content_block_stop", "index": self._index})]

    def _close_all(self) -> list[bytes]:
        return [*self._advance(complete=True), *self._close()]


def _is_json(text: str) -> bool:
    try:
        orjson.loads(text)
    except orjson.JSONDecodeError:
        return False
    return True
