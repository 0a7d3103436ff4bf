"""A stream of chat on its way back to a client of Responses."""

from __future__ import annotations

from collections.abc import Iterable

from attrs import define, field

from qlens import sse
from qlens.bridges.counts import Heard
from qlens.bridges.responses_over_chat.answer import Answer
from qlens.dialects import Body, typed
from qlens.usage import Usage


@define(eq=False)
class Stream:
    """Events of chat in, events of Responses out."""

    asked: Body
    _heard: Heard = field(init=False, factory=Heard)
    _answer: Answer = field(init=False)

    def __attrs_post_init__(self) -> None:
        self._answer = Answer(self.asked)

    @property
    def used(self) -> Usage | None:
        """What the provider has said so far was used."""
        return self._heard.used

    def feed(self, event: bytes) -> bytes:
        """What a whole event becomes; raises UpstreamInvalid for what is no chunk, and the error that it carries."""
        data = sse.data(event)
        if data is None:
            return event  # a comment keeps the connection alive
        if self._answer.over or not data:
            return b""
        if data.startswith(b"[DONE]"):
            return _written(self._answer.finished())
        self._heard.hear(chunk := sse.parsed(data))
        return _written(self._answer.read(chunk))

    def end(self) -> bytes:
        """What the stream ends with when it has no end mark: nothing if the model had not stopped."""
        return _written(self._answer.finished()) if self._answer.finish is not None else b""


def _written(events: Iterable[Body]) -> bytes:
    return b"".join(map(typed.write, events))
