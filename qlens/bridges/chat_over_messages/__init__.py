"""A chat client over a provider that speaks messages."""

from __future__ import annotations

from attrs import frozen

from qlens.bridges import Bridge, Translation
from qlens.bridges.chat_over_messages.answer import answered
from qlens.bridges.chat_over_messages.request import written
from qlens.bridges.chat_over_messages.stream import Chunks
from qlens.bridges.chat_over_messages.tools import Asked
from qlens.dialects import Body


@frozen
class ChatOverMessages:
    """Chat there, messages here."""

    def request(self, body: Body) -> Body:
        """The chat as messages; the model it names decides what it may contain."""
        return written(body)

    def answer(self, body: Body, asked: Body) -> Body:
        """The message as a chat completion."""
        return answered(body, Asked.of(asked))

    def stream(self, asked: Body) -> Translation:
        """The state of one stream."""
        return Chunks(Asked.of(asked))


def bridge() -> Bridge:
    """The bridge itself."""
    return ChatOverMessages()
