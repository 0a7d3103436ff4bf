"""A client of messages over a provider that speaks chat."""

from __future__ import annotations

from attrs import frozen

from qlens.bridges import Bridge, Translation
from qlens.bridges.messages_over_chat.answer import answered
from qlens.bridges.messages_over_chat.request import without_extensions, written
from qlens.bridges.messages_over_chat.stream import Events
from qlens.dialects import Body

__all__ = ["MessagesOverChat", "bridge", "without_extensions"]


@frozen
class MessagesOverChat:
    """Messages there, chat here."""

    def request(self, body: Body) -> Body:
        """The messages as a chat, with fields beside OpenAI's own for what only some providers know."""
        return written(body)

    def answer(self, body: Body, asked: Body) -> Body:
        """The chat completion as a message."""
        return answered(body, asked)

    def stream(self, asked: Body) -> Translation:
        """The state of one stream."""
        return Events(asked)


def bridge() -> Bridge:
    """The bridge itself."""
    return MessagesOverChat()
