"""Watches an answer of plain bytes on its way to the client: whether it comes to its end, and what it used."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

from attrs import define, evolve, field

from qlens import returned
from qlens.call import Call, Reply
from qlens.errors import CallError
from qlens.metering import estimated
from qlens.returned import mistakes
from qlens.usage import Usage


@define(eq=False)
class RawMeter:
    """Passes one stream of bytes on as it comes; nothing in it says what was used, so that the request tells it."""

    call: Call
    reply: Reply
    failed: Callable[[BaseException], CallError]
    """What a provider's mistake means for the client."""
    _source: AsyncIterator[bytes] = field(init=False, repr=False)

    def watch(self, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """Pass a stream on; it is complete when its source says that it is over."""
        self._source = chunks
        return self

    def __aiter__(self) -> RawMeter:
        return self

    async def __anext__(self) -> bytes:
        try:
            return await self._source.__anext__()
        except StopAsyncIteration:
            self.reply.complete = True
            raise
        except BaseException as mistake:
            if isinstance(mistake, CallError) or not isinstance(mistake, mistakes()):
                raise
            raise self.failed(mistake) from mistake

    def usage(self) -> Usage:
        """What was used: the provider's word, or else an estimate; it is used up with the request."""
        if self.reply.usage is not None:
            return returned.usage(self.reply.usage) or Usage()
        guess = estimated(self.call, self.reply.dialect, {})
        return guess if self.reply.complete else evolve(guess, source="partial")
