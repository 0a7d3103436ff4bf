"""A chat client over a provider that speaks Responses only: nothing is kept there."""

from __future__ import annotations

from attrs import frozen

from qlens.bridges import Bridge, Translation
from qlens.bridges.chat_over_responses.answer import answered
from qlens.bridges.chat_over_responses.request import is_older, written
from qlens.bridges.chat_over_responses.stream import Chunks
from qlens.dialects import Body


@frozen
class ChatOverResponses:
    """Chat there, Responses here."""

    def request(self, body: Body) -> Body:
        """The chat as a request for a response; raises InvalidRequest, with chat's param, for what has no equal."""
        return written(body)

    def answer(self, body: Body, asked: Body) -> Body:
        """The response as a chat completion; raises the error of one that failed."""
        return answered(body, is_older(asked))

    def stream(self, asked: Body) -> Translation:
        """The state of one stream."""
        return Chunks(is_older(asked))


def bridge() -> Bridge:
    """The bridge itself."""
    return ChatOverResponses()
