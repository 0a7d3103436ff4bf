"""What every exchange does with a provider's answer, whatever the wire format: ids, headers, the first good event."""

from __future__ import annotations

import math
import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from email.utils import parsedate_to_datetime
from functools import lru_cache

import orjson

from qlens import sse
from qlens.call import Body, Reply
from qlens.errors import CallError, UpstreamInvalid, UpstreamRejected, UpstreamTruncated
from qlens.trimming import trimmed
from qlens.upstream import Answer
from qlens.usage import Usage

ERROR_BODY_BYTES = 64 * 1024
"""The most that is read of an answer that is an error."""


def written(body: Body) -> bytes:
    """A body as it is sent; raises UpstreamRejected for what cannot be."""
    try:
        return trimmed(orjson.dumps(body))
    except orjson.JSONEncodeError:
        # A reader accepts deeper nesting than a writer.
        raise UpstreamRejected("The body is nested too deeply, or a number in it is too large.") from None


def media_type_of(answer: Answer) -> str:
    """The media type of an answer, without its parameters."""
    return answer.headers.get("content-type", "").partition(";")[0].strip().lower()


def having_used(error: CallError, usage: Usage | None) -> CallError:
    """An error of a provider with what it says the attempt has used all the same."""
    error.usage = usage
    return error


def unreadable(error: UpstreamInvalid, body: bytes) -> UpstreamInvalid:
    """The error for a whole answer that nobody can read; one that begins like a JSON object was made all the same."""
    error.answered = body.lstrip().startswith(b"{")
    return error


def no_answer(answer: Answer) -> UpstreamInvalid:
    """The error for a redirect, say."""
    return UpstreamInvalid(f"The provider answered with status {answer.status}, which is no answer to a call.")


async def identified(answer: Answer, reading: Awaitable[Reply], ids: Collection[str]) -> Reply:
    """What is read of an answer, or the error, with the provider's id of it; an answer that fails is closed."""
    said = shown(answer, ids)
    upstream_id = next(iter(said.values())) if said else None
    try:
        reply = await reading
    except BaseException as error:
        await answer.close()
        if isinstance(error, CallError):
            error.upstream_id = upstream_id
        raise
    reply.upstream_id = upstream_id
    return reply


@lru_cache(maxsize=256)
def _lowered(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name.lower() for name in names)


def shown(answer: Answer, names: Collection[str]) -> dict[str, str]:
    """The headers of these names, lower-cased, that may be shown: short and plain."""
    names = _lowered(tuple(names))
    if answer.headers.lacks(names):
        return {}
    found = {}
    for name in names:
        value = answer.headers.get(name)
        if value and len(value) <= 128 and value.isascii() and value.isprintable():
            found[name] = value
    return found


async def to_first_event(answer: Answer, is_good: Callable[[bytes], bool]) -> bytes:
    """Read until the first good event is whole; everything that was read."""
    splitter = sse.Splitter()
    begun = bytearray()
    async for piece in answer.chunks():
        if not begun and b"\r" not in piece and b"\n\n" in piece and is_good(sse.first(piece)):
            return piece  # as nearly all streams begin
        begun += piece
        if any(map(is_good, splitter.feed(piece))):
            return bytes(begun)
        if len(begun) > sse.MAX_EVENT_BYTES:
            raise UpstreamInvalid("The provider's stream has no event at its beginning.")
    if any(map(is_good, splitter.flush())):
        return bytes(begun)
    raise UpstreamTruncated("The provider ended its stream before the first event.")


def retry_after(headers: Mapping[str, str]) -> float | None:
    """The seconds a provider asks to wait; None when it says nothing, or nonsense."""
    milliseconds = _positive(headers.get("retry-after-ms"))
    if milliseconds is not None:
        return milliseconds / 1000
    said = headers.get("retry-after")
    return _positive(said) or _seconds_until(said)


def _positive(text: str | None) -> float | None:
    try:
        number = float(text or "")
    except ValueError:
        return None
    return number if math.isfinite(number) and number > 0 else None


def _seconds_until(date: str | None) -> float | None:
    try:
        seconds = parsedate_to_datetime(date or "").timestamp() - time.time()
    except (ValueError, OverflowError):
        return None
    return seconds if seconds > 0 else None
