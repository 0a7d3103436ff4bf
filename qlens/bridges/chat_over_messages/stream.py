"""From the events of messages to the chunks of a chat stream."""

from __future__ import annotations

from typing import Any

import orjson
from attrs import define, field

from qlens import sse
from qlens.bridges import counts
from qlens.bridges.chat_over_messages.answer import Head, finish_of, note_of
from qlens.bridges.chat_over_messages.tools import Asked
from qlens.dialects import messages
from qlens.errors import UpstreamInvalid
from qlens.provider_errors import error_from
from qlens.usage import Usage

Block = dict[str, Any]


@define(eq=False)
class _Part:
    """A block of the answer that is still being written."""

    kind: str
    """text, call, helper, thought, or dropped."""
    index: int = 0
    """Of a call: which of the client's it is, they are counted apart from other blocks. Of a text: where it begins."""
    silent: bool = True
    """Whether nothing of it was said yet."""
    block: Block = field(factory=dict)
    """Of a thought: all of it so far."""


@define(eq=False)
class Chunks:
    """Writes a chat stream, event by event."""

    asked: Asked
    used: Usage | None = field(init=False, default=None)
    _finish: str | None = field(init=False, default=None)
    """Set once the model has stopped."""
    _head: Head | None = field(init=False, default=None)
    _before: bytes = field(init=False, default=b"", repr=False)
    _done: bool = field(init=False, default=False)
    _parts: dict[int, _Part] = field(init=False, factory=dict)
    _calls: int = field(init=False, default=0)
    _said: int = field(init=False, default=0)
    """The length of the text so far."""

    def feed(self, event: bytes) -> bytes:
        """The chunks for an event; raises the error that it carries."""
        data = sse.data(event)
        if data is None or not data.strip() or self._done:
            return b""
        payload = sse.parsed(data)
        if (error := messages.event_error(payload)) is not None:
            raise error_from(error)
        try:
            return self._event(payload)
        except (AttributeError, KeyError, TypeError) as mistake:
            raise UpstreamInvalid("The provider sent an event that is not as its API promises.") from mistake

    def end(self) -> bytes:
        """What a stream still lacks that stopped after the model had."""
        return b"" if self._done or self._finish is None else self._counted()

    def _event(self, payload: Block) -> bytes:
        self.used = messages.event_usage(payload, self.used)
        match payload.get("type"):
            case "content_block_delta":
                return self._delta(payload["index"], payload["delta"])
            case "content_block_start":
                return self._start(payload["index"], payload["content_block"])
            case "content_block_stop":
                return self._stop(payload["index"])
            case "message_start":
                return self._open(payload["message"])
            case "message_delta":
                return self._close(payload["delta"])
            case "message_stop":
                ending = self._counted() + sse.DONE
                self._done = True
                return ending
        return b""  # a ping, or what a later version of the API may bring

    # --- the message ---------------------------------------------------------------------------

    def _open(self, message: Block) -> bytes:
        self._head = head = Head.of(message)
        self._before = b'data: {"id":%b,"object":"chat.completion.chunk","created":%d,"model":%b,' % (
            orjson.dumps(head.id),
            head.created,
            orjson.dumps(head.model),
        )
        return self._chunk({"role": "assistant", "content": ""})

    def _close(self, delta: Block) -> bytes:
        if delta.get("stop_reason") is None or self._finish is not None:
            return b""
        self._finish = finish = finish_of(delta["stop_reason"], self._calls)
        why = (delta.get("stop_details") or {}).get("explanation")
        refusal = self._chunk({"refusal": why}) if finish == "content_filter" and isinstance(why, str) else b""
        if self.asked.older and finish == "tool_calls":
            finish = "function_call"
        return refusal + self._chunk({}, finish)

    def _counted(self) -> bytes:
        """OpenAI's usage event; whoever did not ask for it is not shown it."""
        if self.used is None:
            return b""
        tier = counts.openai_tier(self.used)
        said = b'"service_tier":%b,' % orjson.dumps(tier) if tier else b""
        return b'%b%b"choices":[],"usage":%b}\n\n' % (
            self._opening(),
            said,
            orjson.dumps(counts.as_openai(self.used)),
        )

    # --- blocks --------------------------------------------------------------------------------

    def _start(self, index: int, block: Block) -> bytes:
        match block["type"]:
            case "text":
                self._parts[index] = _Part("text", self._said)
                return self._text(block["text"]) if block.get("text") else b""
            case "thinking":
                self._parts[index] = _Part("thought", block={"type": "thinking", "thinking": "", "signature": ""})
                return self._thought(self._parts[index], block.get("thinking") or "", block.get("signature") or "")
            case "redacted_thinking":
                self._parts[index] = _Part("thought", block=block)
                return b""
            case "tool_use" if block["name"] == self.asked.helper:
                self._parts[index] = part = _Part("helper")
            case "tool_use":
                self._parts[index] = part = _Part("call", self._calls)
                self._calls += 1
                function = {"name": self.asked.names.client(block["name"]), "arguments": ""}
                return self._called(part.index, function, block["id"]) + self._whole_input(part, block)
            case _:
                self._parts[index] = _Part("dropped")
                return b""
        return self._whole_input(part, block)

    def _whole_input(self, part: _Part, block: Block) -> bytes:
        """An input that is there from the beginning: compatible servers send it so."""
        return self._input(part, orjson.dumps(block["input"]).decode()) if block.get("input") else b""

    def _delta(self, index: int, delta: Block) -> bytes:
        part = self._parts[index]
        match delta["type"]:
            case "text_delta":
                return self._text(delta["text"])
            case "input_json_delta":
                return self._input(part, delta["partial_json"])
            case "thinking_delta":
                return self._thought(part, delta["thinking"], "")
            case "signature_delta":
                return self._thought(part, "", delta["signature"])
            case "citations_delta" if note := note_of(delta["citation"], part.index, self._said):
                return self._chunk({"annotations": [note]})
        return b""

    def _input(self, part: _Part, text: str) -> bytes:
        if not text or part.kind == "dropped":
            return b""
        part.silent = False
        return self._text(text) if part.kind == "helper" else self._called(part.index, {"arguments": text})

    def _thought(self, part: _Part, text: str, signature: str) -> bytes:
        part.block["thinking"] += text
        part.block["signature"] += signature
        return self._chunk({"reasoning_content": text}) if text else b""

    def _stop(self, index: int) -> bytes:
        part = self._parts.pop(index)
        if part.kind == "thought":
            # A signed thought again in one piece, for clients that send it back.
            whole = part.block.get("signature") or part.block.get("data")
            return self._chunk({"thinking_blocks": [part.block]}) if whole else b""
        if not part.silent or part.kind not in {"call", "helper"}:
            return b""
        # A tool that takes nothing: what clients parse must be JSON still.
        return self._input(part, "{}")

    # --- chunks --------------------------------------------------------------------------------

    def _opening(self) -> bytes:
        if self._head is None:
            raise UpstreamInvalid("The provider's stream does not begin with a message.")
        return self._before

    def _text(self, text: str) -> bytes:
        self._said += len(text)
        return self._chunk({"content": text})

    def _called(self, index: int, function: Block, identifier: str | None = None) -> bytes:
        if self.asked.older:
            return self._chunk({"function_call": function}) if not index else b""
        own = {"id": identifier, "type": "function"} if identifier is not None else {}
        return self._chunk({"tool_calls": [{"index": index, **own, "function": function}]})

    def _chunk(self, delta: Block, finish: str | None = None) -> bytes:
        return b'%b"choices":[{"index":0,"delta":%b,"logprobs":null,"finish_reason":%b}]}\n\n' % (
            self._opening(),
            orjson.dumps(delta),
            orjson.dumps(finish),
        )
