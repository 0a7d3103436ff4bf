"""Responses on a provider that speaks chat only: nothing is kept from one call to the next."""

from __future__ import annotations

from attrs import frozen

from qlens.bridges.responses_over_chat.answer import answered
from qlens.bridges.responses_over_chat.request import asked_of_chat
from qlens.bridges.responses_over_chat.stream import Stream
from qlens.dialects import Body


@frozen
class ResponsesOverChat:
    """Asks chat for what a client of Responses wants."""

    def request(self, body: Body) -> Body:
        """The body of a chat call; raises InvalidRequest, with the client's own param, for what chat does not have."""
        return asked_of_chat(body)

    def answer(self, body: Body, asked: Body) -> Body:
        """A chat completion as a response; `asked` is the client's request body."""
        return answered(body, asked)

    def stream(self, asked: Body) -> Stream:
        """The state of one stream."""
        return Stream(asked)


def bridge() -> ResponsesOverChat:
    """The bridge; it has no state."""
    return ResponsesOverChat()
