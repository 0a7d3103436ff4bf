"""Puts a bridge around one attempt: the request into the provider's dialect, its reply back into the client's."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable

import orjson
from attrs import define, field

from qlens import bridges, dialects, sse
from qlens.bridges import Bridge, Translation
from qlens.call import Body, Reply
from qlens.errors import CallError, InvalidRequest, NotOffered, UpstreamInvalid
from qlens.surrogates import json_of


def bridge_for(dialect: str, spoken: tuple[str, ...], provider: str) -> tuple[str, Bridge]:
    """The first of the provider's dialects over which this one can be spoken, with the bridge.

    `provider` says whose they are. Raises InvalidRequest when there is none.
    """
    for other in spoken:
        if (bridge := bridges.between(dialect, other)) is not None:
            return other, _Named(bridge, provider)
    raise InvalidRequest(f"{provider} does not do {dialect}.", code="unsupported_operation")


@define(eq=False)
class _Named:
    """A bridge whose refusals say which provider lacks something: the bridge itself cannot know."""

    _bridge: Bridge
    _provider: str

    def request(self, body: Body) -> Body:
        try:
            return self._bridge.request(body)
        except NotOffered as error:
            error.named(self._provider)
            raise

    def answer(self, body: Body, asked: Body) -> Body:
        return self._bridge.answer(body, asked)

    def stream(self, asked: Body) -> Translation:
        return self._bridge.stream(asked)


def translate(reply: Reply, bridge: Bridge, dialect: str, asked: Body) -> Translation | None:
    """Turn a reply in the provider's dialect into one in the client's; raises UpstreamInvalid for nonsense in it.

    Returns what translates a stream, which hears of usage before the client's dialect may say it.
    """
    translation = None
    if reply.chunks is not None:
        translation = bridge.stream(asked)
        reply.replace(chunks=_Translated(reply.chunks, translation))
    else:
        body = _object(reply.body or b"")
        reply.usage = reply.usage or dialects.named(reply.dialect).usage(body)
        try:
            answer = bridge.answer(body, asked)
        except CallError as error:
            error.usage = reply.usage  # it was made all the same
            raise
        reply.body = orjson.dumps(answer)
        reply.finish = dialects.named(dialect).finish(answer)
    reply.dialect = dialect
    return translation


def _object(raw: bytes) -> Body:
    try:
        body = json_of(raw)
    except orjson.JSONDecodeError:
        raise UpstreamInvalid("The provider's answer is not JSON.") from None
    if not isinstance(body, dict):
        raise UpstreamInvalid("The provider's answer is not a JSON object.")
    return body


@define(eq=False)
class _Translated:
    """A stream on its way back; an iterator of its own, so that closing it leaves nothing running."""

    _source: AsyncIterator[bytes]
    _translation: Translation
    _splitter: sse.Splitter = field(factory=sse.Splitter, init=False)
    _over: bool = field(default=False, init=False)
    _error: CallError | None = field(default=None, init=False)

    def __aiter__(self) -> _Translated:
        return self

    async def __anext__(self) -> bytes:
        while not self._over:
            try:
                events = self._splitter.feed(await self._source.__anext__())
            except StopAsyncIteration:
                self._over = True
                events = self._splitter.flush()
            if block := self._fed(events):
                return block
        if self._error is not None:
            try:
                raise self._error
            finally:
                self._error = None  # its traceback refers to this object: a cycle
        raise StopAsyncIteration

    def _fed(self, events: Iterable[bytes]) -> bytes:
        """What these events become; an error comes after what was in front of it."""
        passing, before = [], self._translation.used
        try:
            for event in events:
                before = self._translation.used
                passing.append(self._translation.feed(event))
            if self._over:
                passing.append(self._translation.end())
        except CallError as error:
            self._over, self._error = True, error
            used = self._translation.used
            if used != before and not isinstance(error, UpstreamInvalid):
                error.usage = used  # the provider's last word; the client's dialect has no place for it
        return b"".join(passing)
