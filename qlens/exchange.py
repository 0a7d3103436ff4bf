"""One exchange in OpenAI's wire format: a request out, a Reply or one of our errors back."""

from __future__ import annotations

import math
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from email.utils import parsedate_to_datetime
from urllib.parse import urlencode

import orjson
from attrs import define, field, frozen

from qlens import dialects, sse
from qlens.call import Body, Outgoing, Reply
from qlens.dialects import responses, typed
from qlens.errors import CallError, UpstreamError, UpstreamInvalid, UpstreamRejected, UpstreamTruncated
from qlens.forms import FormBody
from qlens.provider_errors import error_from
from qlens.upstream import Answer, Deadlines, Upstream

__all__ = ["FORWARDED", "Mend", "error_from", "post_openai", "send_request"]

FORWARDED = frozenset({"openai-processing-ms", "x-ms-region"})
"""The headers of a provider's answer that the client may see."""

_ASKING = {"content-type": "application/json", "accept": "application/json"}
_ASKING_FOR_EVENTS = {**_ASKING, "accept": "text/event-stream"}
_OF_CONTENT = ("content-type", "content-disposition")
_ERROR_BODY_BYTES = 64 * 1024
_RAW = frozenset({"speech", "transcriptions", "translations"})
"""The dialects whose answers may be bytes of any kind."""
_APART = _RAW | {"image_edits", "image_variations"}
"""These, and those that are sent as forms."""
_ITEMS = {
    "chat": "choices",
    "completions": "choices",
    "embeddings": "data",
    "image_edits": "data",
    "image_variations": "data",
    "images": "data",
    "moderations": "results",
    "rerank": "results",
    "responses": "output",
}
"""Under which key a dialect's answer has its list, without which no client can read it."""
_OBJECTS = frozenset({dict})


@frozen
class Mend:
    """A repair of a provider's odd stream events: `apply` edits every event whose bytes contain `mark`."""

    mark: bytes
    apply: Callable[[Body], None]


async def post_openai(
    http: Upstream,
    url: str,
    *,
    headers: Mapping[str, str],
    outgoing: Outgoing,
    deadlines: Deadlines,
    ask_usage: bool = True,
    forward: Collection[str] = FORWARDED,
    mend: Mend | None = None,
) -> Reply:
    """Post a body in OpenAI's format and read the answer; a stream comes back once its first good event is in hand.

    `ask_usage` asks a stream for its usage event; False is for servers that refuse `stream_options`.
    Raises UpstreamRejected for the client's mistakes and an UpstreamError for all others.
    """
    if outgoing.dialect in _APART:
        return await _post_apart(http, url, headers=headers, outgoing=outgoing, deadlines=deadlines, forward=forward)
    answer = await http.open(
        "POST",
        url,
        headers={**(_ASKING_FOR_EVENTS if outgoing.stream else _ASKING), **headers},
        body=_written(_asked(outgoing, ask_usage)),
        deadlines=deadlines,
    )
    upstream_id = _plain(answer.headers, "x-request-id") or _plain(answer.headers, "apim-request-id")
    try:
        reply = await _read(answer, outgoing, mend)
    except BaseException as error:
        await answer.close()
        if isinstance(error, CallError):
            error.upstream_id = upstream_id
        raise
    reply.headers = {name: value for name in forward if (value := _plain(answer.headers, name))}
    reply.upstream_id = upstream_id
    return reply


async def _post_apart(
    http: Upstream,
    url: str,
    *,
    headers: Mapping[str, str],
    outgoing: Outgoing,
    deadlines: Deadlines,
    forward: Collection[str],
) -> Reply:
    """The same for what is sent as a form or may be answered by bytes of any kind."""
    asked = _asked(outgoing, ask_usage=True)
    body: bytes | FormBody
    if outgoing.form is None:
        body, media_type = _written(asked), "application/json"
    else:
        body = FormBody.of(asked, outgoing.form.files)
        media_type = body.content_type
    sent = {"content-type": media_type, "accept": "*/*", **headers}
    answer = await http.open("POST", url, headers=sent, body=body, deadlines=deadlines)
    upstream_id = _plain(answer.headers, "x-request-id") or _plain(answer.headers, "apim-request-id")
    try:
        good = 200 <= answer.status < 300
        raw = await _raw(answer, outgoing) if good and outgoing.dialect in _RAW else None
        reply = raw or await _read(answer, outgoing, None)
    except BaseException as error:
        await answer.close()
        if isinstance(error, CallError):
            error.upstream_id = upstream_id
        raise
    shown = (*forward, "content-type") if reply.raw else forward
    reply.headers = {name: value for name in shown if (value := _plain(answer.headers, name))}
    reply.upstream_id = upstream_id
    return reply


async def send_request(
    http: Upstream,
    url: str,
    *,
    headers: Mapping[str, str],
    outgoing: Outgoing,
    deadlines: Deadlines,
    forward: Collection[str] = FORWARDED,
) -> Reply:
    """Send `outgoing.request`, which has no dialect, below an address, whose query stays; hand on what comes back.

    JSON comes back as a body, unless `outgoing.stream`; all else as chunks, as it arrives. Raises UpstreamRejected for
    the client's mistakes, UpstreamModelMissing for a 404, and an UpstreamError for all others.
    """
    request = outgoing.request
    assert request is not None, "the operation has a dialect"
    address, _, own = url.partition("?")
    query = "&".join([*([own] if own else []), *([urlencode(request.query)] if request.query else [])])
    answer = await http.open(
        request.method,
        f"{address.rstrip('/')}{request.path}{'?' if query else ''}{query}",
        headers={**request.headers, **headers},
        body=request.body,
        deadlines=deadlines,
    )
    upstream_id = _plain(answer.headers, "x-request-id") or _plain(answer.headers, "apim-request-id")
    try:
        reply = await _taken(answer, outgoing)
    except BaseException as error:
        await answer.close()
        if isinstance(error, CallError):
            error.upstream_id = upstream_id
        raise
    said = {name: value for name in forward if (value := _plain(answer.headers, name))}
    reply.headers = {**said, **{name: answer.headers[name] for name in _OF_CONTENT if name in answer.headers}}
    reply.upstream_id = upstream_id
    return reply


async def _taken(answer: Answer, outgoing: Outgoing) -> Reply:
    if not 200 <= answer.status < 300:
        raise await _refusal(answer)
    media_type = answer.headers.get("content-type", "").partition(";")[0].strip().lower()
    if (media_type == "application/json" and not outgoing.stream) or answer.status == 204:
        return Reply(status=answer.status, body=await answer.read(), dialect="")
    is_raw = media_type != "text/event-stream"
    return Reply(status=answer.status, chunks=answer.chunks(), dialect="", raw=is_raw, close=answer.close)


# --- the request -------------------------------------------------------------------------------


def _asked(outgoing: Outgoing, ask_usage: bool) -> Body:
    body = outgoing.fields()
    if not outgoing.stream:
        # Servers refuse stream_options without stream, and some know no `stream` for embeddings.
        body.pop("stream", None)
        body.pop("stream_options", None)
        return body
    body["stream"] = True
    if ask_usage and outgoing.dialect in typed.NAMES:
        return body  # their last event always has it
    if ask_usage:
        body["stream_options"] = {**(body.get("stream_options") or {}), "include_usage": True}
    else:
        body.pop("stream_options", None)
    return body


def _written(body: Body) -> bytes:
    try:
        return orjson.dumps(body)
    except orjson.JSONEncodeError:
        # A reader accepts deeper nesting than a writer.
        raise UpstreamRejected("The body is nested too deeply, or a number in it is too large.") from None


# --- the answer --------------------------------------------------------------------------------


async def _read(answer: Answer, outgoing: Outgoing, mend: Mend | None) -> Reply:
    if not 200 <= answer.status < 300:
        raise await _refusal(answer)
    if not outgoing.stream:
        return _full(await answer.read(), outgoing)
    media_type = answer.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type == "application/json":
        return _full(await answer.read(), outgoing)
    if media_type != "text/event-stream":
        raise UpstreamInvalid("The provider answered a stream request with something that is not a stream.")
    return await _stream(answer, outgoing, mend)


async def _raw(answer: Answer, outgoing: Outgoing) -> Reply | None:
    """An answer that is neither JSON nor the events that were asked for: a text whole, others from their first byte."""
    media_type = answer.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type == "application/json" or (outgoing.stream and media_type == "text/event-stream"):
        return None
    reply = Reply(dialect=outgoing.dialect, raw=True)
    if media_type.startswith("text/") and media_type != "text/event-stream":
        reply.body, reply.complete = await answer.read(), True
        return reply
    reply.chunks, reply.close = answer.chunks(), answer.close
    first = await anext(reply.chunks, b"")
    if not first:
        raise UpstreamInvalid("The provider's answer is empty.")
    answer.put_back(first)
    return reply


async def _refusal(answer: Answer) -> CallError:
    if answer.status < 400:
        return UpstreamInvalid(f"The provider answered with status {answer.status}, which is no answer to a call.")
    try:
        payload = orjson.loads(await answer.read(_ERROR_BODY_BYTES))
    except (UpstreamError, orjson.JSONDecodeError):
        payload = {}  # the status says enough
    return error_from(payload if isinstance(payload, dict) else {}, answer.status, _retry_after(answer.headers))


def _full(body: bytes, outgoing: Outgoing) -> Reply:
    try:
        parsed = orjson.loads(body)
    except orjson.JSONDecodeError:
        raise UpstreamInvalid("The provider's answer is not valid JSON.") from None
    if not isinstance(parsed, dict):
        raise UpstreamInvalid("The provider's answer is not a JSON object.")
    key = _ITEMS.get(outgoing.dialect)
    items = parsed.get(key) if key else None
    error = _error_in(parsed, outgoing.dialect)
    if error is not None and (not items or parsed.get("status") == "failed"):
        raise error_from(error)
    if key and not (isinstance(items, list) and _OBJECTS.issuperset(map(type, items))):
        raise UpstreamInvalid(f"The provider's answer has no list of {key}.")
    dialect = dialects.named(outgoing.dialect)
    return Reply(
        body=body,
        dialect=outgoing.dialect,
        usage=dialect.usage(parsed),
        finish=dialect.finish(parsed),
        complete=True,
    )


def _error_in(payload: Body, dialect: str) -> Body | None:
    """What the provider says is wrong, in an answer or an event; None when it says nothing of the kind."""
    if dialect in typed.NAMES:
        return typed.typed(dialect).event_error(payload)
    return payload if payload.get("error") else None


async def _stream(answer: Answer, outgoing: Outgoing, mend: Mend | None) -> Reply:
    answer.put_back(await _to_first_event(answer, outgoing.dialect))
    chunks = answer.chunks()
    reply = Reply(chunks=chunks, dialect=outgoing.dialect, close=answer.close)
    if mend is not None:
        reply.replace(chunks=_Mended(chunks, mend))
    return reply


async def _to_first_event(answer: Answer, dialect: str) -> bytes:
    """Read until the first good event is whole; everything that was read."""
    splitter = sse.Splitter()
    begun = bytearray()
    async for piece in answer.chunks():
        if not begun and b"\r" not in piece and b"\n\n" in piece and _is_good(sse.first(piece), dialect):
            return piece  # as nearly all streams begin
        begun += piece
        if any(_is_good(event, dialect) for event in splitter.feed(piece)):
            return bytes(begun)
        if len(begun) > sse.MAX_EVENT_BYTES:
            raise UpstreamInvalid("The provider's stream has no event at its beginning.")
    if any(_is_good(event, dialect) for event in splitter.flush()):
        return bytes(begun)
    raise UpstreamTruncated("The provider ended its stream before the first event.")


def _is_good(event: bytes, dialect: str) -> bool:
    """Whether this event is an answer's beginning (a comment is not); raises what the provider says is wrong."""
    data = sse.data(event)
    if data is None or not data.strip():
        return False
    if data.startswith(b"[DONE]"):
        return True
    try:
        payload = orjson.loads(data)
    except orjson.JSONDecodeError:
        raise UpstreamInvalid("The provider's stream begins with an event that is not valid JSON.") from None
    if not isinstance(payload, dict):
        raise UpstreamInvalid("The provider's stream begins with an event that is not a JSON object.")
    error = _error_in(payload, dialect)
    if error is not None or event.startswith(b"event: error"):
        raise error_from(error or payload)
    # A response is said to be created before anything has been tried.
    return dialect != "responses" or responses.event_begins(payload)


@define(eq=False)
class _Mended:
    # Not a generator: it takes every piece from the provider without a layer in between.
    _chunks: AsyncIterator[bytes]
    _mend: Mend
    _splitter: sse.Splitter = field(init=False, factory=sse.Splitter)
    _ended: bool = field(init=False, default=False)

    def __aiter__(self) -> _Mended:
        return self

    async def __anext__(self) -> bytes:
        while not self._ended:
            try:
                events = self._splitter.take(await self._chunks.__anext__())
            except StopAsyncIteration:
                self._ended = True
                events = b"".join(self._splitter.flush())
            if events:
                return _mend_events(events, self._mend) if self._mend.mark in events else events
        raise StopAsyncIteration


def _mend_events(events: bytes, mend: Mend) -> bytes:
    return b"".join([_mend_event(event, mend) if mend.mark in event else event for event in sse.cut(events)])


def _mend_event(event: bytes, mend: Mend) -> bytes:
    try:
        payload = orjson.loads(sse.data(event) or b"")
    except orjson.JSONDecodeError:
        return event
    if not isinstance(payload, dict):
        return event
    mend.apply(payload)
    return sse.write(payload)


def _plain(headers: Mapping[str, str], name: str) -> str | None:
    value = headers.get(name)
    return value if value and len(value) <= 128 and value.isascii() and value.isprintable() else None


def _retry_after(headers: Mapping[str, str]) -> float | None:
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
