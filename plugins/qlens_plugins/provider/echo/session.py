"""A realtime session with the echo: texts alone, said back to whoever wrote them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from itertools import count as numbers
from typing import Any

import orjson
from attrs import define, field

from qlens import Frame, SessionClosed
from qlens_plugins.provider.echo.tokens import count, tokens

_WAITING = 64
"""How many events wait to be read before nothing more is taken."""


@define(eq=False)
class EchoSession:
    """Says in each answer what the conversation's last text was; all texts so far are its prompt."""

    model: str
    _events: asyncio.Queue[Frame] = field(factory=lambda: asyncio.Queue(_WAITING), init=False, repr=False)
    _closed: bool = field(default=False, init=False)
    _numbers: Iterator[int] = field(factory=lambda: numbers(1), init=False, repr=False)
    _last: str = field(default="", init=False, repr=False)
    _context: int = field(default=0, init=False)
    """The tokens of the conversation so far."""

    async def begin(self) -> None:
        """Say that the session is there."""
        await self._say("session.created", session=self._described({}))

    async def send(self, frame: Frame) -> None:
        """Take what the client says."""
        if self._closed:
            raise SessionClosed
        if frame.kind == "ping":
            await self._events.put(Frame("pong", frame.data))
        elif frame.kind == "text":
            await self._hear(frame.data)

    async def receive(self) -> Frame:
        """What the echo says."""
        if self._closed:
            raise SessionClosed
        return await self._events.get()

    async def close(self, code: int = 1000, reason: str = "") -> None:
        """Say nothing more."""
        self._closed = True

    async def _hear(self, data: bytes) -> None:
        try:
            event = orjson.loads(data)
        except orjson.JSONDecodeError:
            event = None
        if not isinstance(event, dict):
            await self._refuse("The event is not a JSON object.", {})
            return
        match event.get("type"):
            case "session.update" if isinstance(event.get("session"), dict):
                await self._say("session.updated", session=self._described(event["session"]))
            case "conversation.item.create" if isinstance(event.get("item"), dict):
                await self._add(event["item"])
            case "response.create":
                await self._answer()
            case other:
                await self._refuse(f"The echo does not know what to do about {str(other)[:64]!r}.", event)

    async def _add(self, item: Mapping[str, Any]) -> None:
        parts = item.get("content")
        texts = [part.get("text") for part in parts if isinstance(part, dict)] if isinstance(parts, list) else []
        self._last = "".join(text for text in texts if isinstance(text, str))
        self._context += count(self._last)
        said = {"id": f"item_{next(self._numbers)}", "object": "realtime.item", "status": "completed", **item}
        await self._say("conversation.item.added", item=said, previous_item_id=None)
        await self._say("conversation.item.done", item=said, previous_item_id=None)

    async def _answer(self) -> None:
        name, item = f"resp_{next(self._numbers)}", f"item_{next(self._numbers)}"
        await self._say("response.created", response=_response(name, "in_progress", []))
        pieces = tokens(self._last)
        for piece in pieces:
            place = {"response_id": name, "item_id": item, "output_index": 0, "content_index": 0}
            await self._say("response.output_text.delta", delta=piece, **place)
        content = [{"type": "output_text", "text": self._last}]
        output = [{"id": item, "type": "message", "role": "assistant", "status": "completed", "content": content}]
        usage = {
            "total_tokens": self._context + len(pieces),
            "input_tokens": self._context,
            "output_tokens": len(pieces),
            "input_token_details": {"text_tokens": self._context, "audio_tokens": 0, "cached_tokens": 0},
            "output_token_details": {"text_tokens": len(pieces), "audio_tokens": 0},
        }
        self._context += len(pieces)
        await self._say("response.done", response={**_response(name, "completed", output), "usage": usage})

    async def _refuse(self, message: str, event: Mapping[str, Any]) -> None:
        error = {"type": "invalid_request_error", "code": "invalid_value", "message": message, "param": None}
        await self._say("error", error={**error, "event_id": event.get("event_id")})

    def _described(self, wanted: Mapping[str, Any]) -> dict[str, Any]:
        known = {"id": "sess_echo", "object": "realtime.session", "model": self.model, "output_modalities": ["text"]}
        return {"type": "realtime", **wanted, **known}

    async def _say(self, kind: str, **fields: Any) -> None:
        event = {"type": kind, "event_id": f"event_{next(self._numbers)}", **fields}
        await self._events.put(Frame("text", orjson.dumps(event)))


def _response(name: str, status: str, output: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "id": name,
        "object": "realtime.response",
        "status": status,
        "status_details": None,
        "output": output,
        "usage": None,
    }
