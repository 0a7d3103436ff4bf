"""One bridge behind another: for a client's dialect that reaches the provider's over a third one."""

from __future__ import annotations

from attrs import define, frozen

from qlens import sse
from qlens.bridges import Bridge, Translation, params
from qlens.dialects import Body
from qlens.errors import InvalidRequest
from qlens.usage import Usage


@frozen
class Composed:
    """The client's side of the first bridge, the provider's of the second."""

    client: str
    """The client's dialect."""
    first: Bridge
    second: Bridge

    def request(self, body: Body) -> Body:
        """The body as the provider's dialect says it; what the second cannot say is refused by the client's name."""
        chat = self.first.request(body)
        try:
            return self.second.request(chat)
        except InvalidRequest as error:
            error.param = params.asked(self.client, error.param)
            raise

    def answer(self, body: Body, asked: Body) -> Body:
        """A complete answer in the client's dialect."""
        return self.first.answer(self.second.answer(body, self.first.request(asked)), asked)

    def stream(self, asked: Body) -> Translation:
        """The state of one stream."""
        return _Stream(self.first.stream(asked), self.second.stream(self.first.request(asked)))


@define(eq=False)
class _Stream:
    _first: Translation
    _second: Translation

    @property
    def used(self) -> Usage | None:
        return self._second.used

    def feed(self, event: bytes) -> bytes:
        return self._through(self._second.feed(event))

    def end(self) -> bytes:
        return self._through(self._second.end()) + self._first.end()

    def _through(self, block: bytes) -> bytes:
        return b"".join(map(self._first.feed, sse.cut(block))) if block else b""
