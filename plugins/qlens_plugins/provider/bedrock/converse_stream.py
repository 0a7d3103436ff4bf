"""From ConverseStream's events to the chunks of OpenAI's chat stream."""

from __future__ import annotations

from typing import Any

import orjson
from attrs import define, field

from qlens import UpstreamError, UpstreamInvalid, Usage, json_of
from qlens_plugins.provider.bedrock import usage as usages
from qlens_plugins.provider.bedrock.converse_reply import Head, finish_of, older
from qlens_plugins.provider.bedrock.converse_request import Asked
from qlens_plugins.provider.bedrock.eventstream import Frame
from qlens_plugins.provider.bedrock.failures import failure, from_frame

Block = dict[str, Any]

DONE = b"data: [DONE]\n\n"

MOST_HELD_BYTES = 1024 * 1024
"""How much of a stream is held back while it may yet turn out not to be the answer."""


@define(eq=False)
class _Part:
    """A block of the answer that is still being written."""

    kind: str
    """call, helper, thought, or dropped."""
    index: int = 0
    """Which of the client's tool calls it is: they are counted apart from the answer's other blocks."""
    silent: bool = True
    thinking: list[str] = field(factory=list)
    signature: str = ""
    redacted: str = ""


@define(eq=False)
class ChunkWriter:
    """Writes one choice of a stream, event by event."""

    asked: Asked
    head: Head
    index: int = 0
    finish: str | None = field(init=False, default=None)
    """Set once the model has stopped."""
    usage: Usage | None = field(init=False, default=None)
    ended: bool = field(init=False, default=False)
    """Whether the last event was there."""
    thought: bool = field(init=False, default=False)
    """Whether it had thoughts in it."""
    _reasoning: int = field(init=False, default=0)
    """How many tokens of it are thoughts, as far as that is known."""
    _parts: dict[int, _Part] = field(init=False, factory=dict)
    _calls: int = field(init=False, default=0)
    _held: list[bytes] | None = field(init=False, default=None)
    """Chunks of text that are the answer only if the model does not call the helper, as long as it may; else None."""
    _held_bytes: int = field(init=False, default=0)
    _helped: bool = field(init=False, default=False)
    """Whether the helper was called: its input alone is the text of the answer."""
    _before: bytes = field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        self._before = _opening(self.head) + b'"choices":[{"index":%d,"delta":' % self.index
        if self.asked.helper is not None:
            self._held = []

    def write(self, frame: Frame) -> bytes:
        """The chunks for a frame; raises what the frame says went wrong."""
        name = event_name(frame)
        try:
            payload = json_of(frame.payload)
        except orjson.JSONDecodeError:
            raise UpstreamInvalid("The provider sent an event that is not JSON.") from None
        try:
            return self._event(name, payload)
        except (AttributeError, KeyError, TypeError) as error:
            raise UpstreamInvalid(f"The provider sent an event {name} that is not as its API promises.") from error

    def rest(self) -> bytes:
        """What was held back and is the answer after all, as the stream is over."""
        held, self._held = self._held, None
        return b"".join(held or ())

    def _event(self, name: str, payload: Block) -> bytes:
        match name:
            case "contentBlockDelta":
                return self._delta(payload["contentBlockIndex"], payload["delta"])
            case "contentBlockStart":
                return self._start(payload["contentBlockIndex"], payload.get("start") or {})
            case "contentBlockStop":
                return self._stop(payload["contentBlockIndex"])
            case "messageStart":
                return self._chunk({"role": "assistant", "content": ""})
            case "messageStop":
                self.finish = finish_of(payload.get("stopReason"), self._calls)
                self._reasoning = usages.reasoning(payload.get("additionalModelResponseFields"))
                # Some models end their blocks with the message alone.
                ended = b"".join(map(self._stop, list(self._parts)))
                finish = self._chunk({}, older(self.finish) if self.asked.older else self.finish)
                return ended + self.rest() + finish
            case "metadata":
                tier = payload.get("serviceTier") or {}
                self.usage = usages.read(payload.get("usage"), tier.get("type"), self._reasoning)
                self.ended = True
        return b""  # events that a later version of the API may bring

    # --- blocks --------------------------------------------------------------------------------

    def _start(self, block: int, start: Block) -> bytes:
        use = start.get("toolUse")
        if use is None:
            return b""
        if self.asked.helper is not None and use["name"] == self.asked.helper:
            if self._helped:
                self._parts[block] = _Part("dropped")  # two objects behind each other are no JSON
                return b""
            self._helped, self._held = True, None
            self._parts[block] = _Part("helper")
            return b""
        if use.get("type") == "server_tool_use" or (self.asked.one_tool and self._calls):
            self._parts[block] = _Part("dropped")
            return b""
        self._parts[block] = _Part("call", self._calls)
        self._calls += 1
        function = {"name": self.asked.names.client(use["name"]), "arguments": ""}
        return self._called(self._calls - 1, function, use["toolUseId"])

    def _delta(self, block: int, delta: Block) -> bytes:
        if "text" in delta:
            text = self._text(delta["text"])
            return text if self.asked.helper is None else self._beside(text)
        if "toolUse" in delta:
            return self._input(block, delta["toolUse"].get("input") or "")
        if "reasoningContent" in delta:
            return self._thought(block, delta["reasoningContent"])
        citation = delta.get("citation") or {}
        url = ((citation.get("location") or {}).get("web") or {}).get("url")
        if not url:
            return b""
        cited = {"url": url, "title": citation.get("title") or url, "start_index": 0, "end_index": 0}
        return self._beside(self._chunk({"annotations": [{"type": "url_citation", "url_citation": cited}]}))

    def _beside(self, chunk: bytes) -> bytes:
        """A chunk that is part of the answer only where no helper gives it."""
        if self._held is None:
            return b"" if self._helped else chunk
        self._held.append(chunk)
        self._held_bytes += len(chunk)
        return self.rest() if self._held_bytes > MOST_HELD_BYTES else b""

    def _input(self, block: int, text: str) -> bytes:
        part = self._parts.get(block)
        if part is None or not text:
            return b""
        part.silent = False
        if part.kind == "helper":
            return self._text(text)
        return self._called(part.index, {"arguments": text}) if part.kind == "call" else b""

    def _thought(self, block: int, content: Block) -> bytes:
        self.thought = True
        part = self._parts.setdefault(block, _Part("thought"))
        part.signature += content.get("signature") or ""
        part.redacted += content.get("redactedContent") or ""
        if text := content.get("text"):
            part.thinking.append(text)
            return self._chunk({"reasoning_content": text})
        return b""

    def _stop(self, block: int) -> bytes:
        part = self._parts.pop(block, None)
        if part is None:
            return b""
        if part.kind == "thought":
            return self._whole_thought(part)
        if not part.silent:
            return b""
        # A tool that takes nothing: what clients parse must be JSON still.
        if part.kind == "helper":
            return self._text("{}")
        return self._called(part.index, {"arguments": "{}"}) if part.kind == "call" else b""

    def _whole_thought(self, part: _Part) -> bytes:
        """A signed thought again in one piece, for clients that send it back."""
        if part.redacted:
            return self._chunk({"thinking_blocks": [{"type": "redacted_thinking", "data": part.redacted}]})
        if not part.signature:
            return b""
        thought = {"type": "thinking", "thinking": "".join(part.thinking), "signature": part.signature}
        return self._chunk({"thinking_blocks": [thought]})

    # --- chunks --------------------------------------------------------------------------------

    def _text(self, text: str) -> bytes:
        return b'%s{"content":%s},"logprobs":null,"finish_reason":null}]}\n\n' % (self._before, orjson.dumps(text))

    def _called(self, index: int, function: Block, identifier: str | None = None) -> bytes:
        if self.asked.older:
            return self._chunk({"function_call": function}) if not index else b""
        call: Block = {"index": index, "function": function}
        if identifier is not None:
            call = {"index": index, "id": identifier, "type": "function", "function": function}
        return self._chunk({"tool_calls": [call]})

    def _chunk(self, delta: Block, finish: str | None = None) -> bytes:
        return b'%s%s,"logprobs":null,"finish_reason":%s}]}\n\n' % (
            self._before,
            orjson.dumps(delta),
            orjson.dumps(finish),
        )


def event_name(frame: Frame) -> str:
    """Which event a frame carries; raises the error that it carries instead."""
    kind = frame.headers.get(":message-type")
    if kind == "exception":
        raise from_frame(frame.headers.get(":exception-type", ""), frame.payload)
    if kind == "error":
        raise failure(frame.headers.get(":error-code", ""), {"message": frame.headers.get(":error-message", "")})
    if kind != "event":
        raise UpstreamError(
            "The provider sent a message of a kind that nobody knows.", code="upstream_invalid_response"
        )
    return frame.headers.get(":event-type", "")


def usage_chunk(head: Head, usage: Usage, *, thought: bool) -> bytes:
    """OpenAI's usage event; `thought`: whether the answer has thoughts in it."""
    tier = b'"service_tier":%s,' % orjson.dumps(usage.tier) if usage.tier else b""
    said = orjson.dumps(usages.as_openai(usage, thought=thought))
    return b'%s%s"choices":[],"usage":%s}\n\n' % (_opening(head), tier, said)


def _opening(head: Head) -> bytes:
    return b'data: {"id":%s,"object":"chat.completion.chunk","created":%d,"model":%s,' % (
        orjson.dumps(head.id),
        head.created,
        orjson.dumps(head.model),
    )
