"""One exchange in OpenAI's wire format: a request out, a Reply or one of our errors back."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from functools import partial
from urllib.parse import urlencode

import orjson

from qlens import dialects, sse
from qlens.answers import (
    ERROR_BODY_BYTES,
    having_used,
    identified,
    media_type_of,
    no_answer,
    retry_after,
    shown,
    to_first_event,
    unreadable,
    written,
)
from qlens.call import Body, Outgoing, Reply
from qlens.dialects import responses, typed
from qlens.errors import CallError, UpstreamError, UpstreamInvalid
from qlens.forms import FormBody
from qlens.provider_errors import error_from
from qlens.surrogates import json_of
from qlens.upstream import Answer, Deadlines, Upstream
from qlens.usage import Usage, larger

__all__ = ["FORWARDED", "error_from", "post_openai", "send_request"]

FORWARDED = frozenset({"openai-processing-ms", "x-ms-region"})
"""The headers of a provider's answer that the client may see."""

_ASKING = {"content-type": "application/json", "accept": "application/json"}
_ASKING_FOR_EVENTS = {**_ASKING, "accept": "text/event-stream"}
_OF_CONTENT = ("content-type", "content-disposition")
_IDS = ("x-request-id", "apim-request-id")
"""The headers in which providers name an answer, Azure in the second."""
_RAW = frozenset({"speech", "transcriptions", "translations"})
"""The dialects whose answers may be bytes of any kind."""
_APART = _RAW | {"image_edits", "image_variations"}
"""These, and those that are sent as forms."""
_ITEMS = {
    "chat": "choices",
    "compaction": "output",
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
_PLAIN = {dialect: key for dialect, key in _ITEMS.items() if dialect not in typed.NAMES}
"""These, but those whose errors are told apart by the dialect."""
_NEVER_EMPTY = frozenset({"chat", "completions", "embeddings", "moderations"})
"""The dialects for which an answer with an empty list is none."""
_OBJECTS = frozenset({dict})


async def post_openai(
    http: Upstream,
    url: str,
    *,
    headers: Mapping[str, str],
    outgoing: Outgoing,
    deadlines: Deadlines,
    ask_usage: bool = True,
    forward: Collection[str] = FORWARDED,
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
        body=written(_asked(outgoing, ask_usage)),
        deadlines=deadlines,
    )
    return await identified(answer, _read(answer, outgoing), _IDS, forward)


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
        body, media_type = written(asked), "application/json"
    else:
        body = FormBody.of(asked, outgoing.form.files)
        media_type = body.content_type
    sent = {"content-type": media_type, "accept": "*/*", **headers}
    answer = await http.open("POST", url, headers=sent, body=body, deadlines=deadlines)
    reply = await identified(answer, _read_apart(answer, outgoing), _IDS, forward)
    if reply.raw:
        reply.headers = {**reply.headers, **shown(answer, ("content-type",))}
    return reply


async def _read_apart(answer: Answer, outgoing: Outgoing) -> Reply:
    good = 200 <= answer.status < 300
    raw = await _raw(answer, outgoing) if good and outgoing.dialect in _RAW else None
    return raw or await _read(answer, outgoing)


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
    reply = await identified(answer, _taken(answer, outgoing), _IDS, forward)
    given = answer.headers.found(_OF_CONTENT)
    reply.headers = {**reply.headers, **{name: given[name] for name in _OF_CONTENT if name in given}}
    return reply


async def _taken(answer: Answer, outgoing: Outgoing) -> Reply:
    if not 200 <= answer.status < 300:
        raise await _refusal(answer)
    media_type = media_type_of(answer)
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


# --- the answer --------------------------------------------------------------------------------


async def _read(answer: Answer, outgoing: Outgoing) -> Reply:
    if not 200 <= answer.status < 300:
        raise await _refusal(answer, outgoing.dialect)
    if not outgoing.stream:
        return _full(await answer.read(), outgoing)
    media_type = media_type_of(answer)
    if media_type == "application/json":
        return _full(await answer.read(), outgoing)
    if media_type != "text/event-stream":
        raise UpstreamInvalid("The provider answered a stream request with something that is not a stream.")
    return await _stream(answer, outgoing)


async def _raw(answer: Answer, outgoing: Outgoing) -> Reply | None:
    """An answer that is neither JSON nor the events that were asked for: a text whole, others from their first byte."""
    media_type = media_type_of(answer)
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


async def _refusal(answer: Answer, dialect: str = "") -> CallError:
    """The error that an answer is; with a dialect, what it says was used is billed."""
    if answer.status < 400:
        return no_answer(answer)
    try:
        payload = json_of(await answer.read(ERROR_BODY_BYTES))
    except (UpstreamError, orjson.JSONDecodeError):
        payload = {}  # the status says enough
    said = payload if isinstance(payload, dict) else {}
    error = error_from(said, answer.status, retry_after(answer.headers))
    return having_used(error, dialects.named(dialect).usage(said)) if dialect and said.get("usage") else error


def _full(body: bytes, outgoing: Outgoing) -> Reply:
    try:
        parsed = json_of(body)
    except orjson.JSONDecodeError:
        raise unreadable(UpstreamInvalid("The provider's answer is not valid JSON."), body) from None
    if not isinstance(parsed, dict):
        raise UpstreamInvalid("The provider's answer is not a JSON object.")
    name = outgoing.dialect
    items = parsed.get(_PLAIN[name]) if name in _PLAIN else None
    if not items or type(items) is not list or not _OBJECTS.issuperset(map(type, items)) or parsed.get("error"):
        _check(parsed, name)
    dialect = dialects.named(name)
    return Reply(body=body, dialect=name, usage=dialect.usage(parsed), finish=dialect.finish(parsed), complete=True)


def _check(parsed: Body, name: str) -> None:
    """Raise what is wrong with an answer in the dialect of this name, if anything is."""
    key = _ITEMS.get(name)
    items = parsed.get(key) if key else None
    error = _error_in(parsed, name)
    dialect = dialects.named(name)
    if error is not None and (not items or parsed.get("status") == "failed"):
        raise having_used(error_from(error), dialect.usage(parsed))
    if key and not (isinstance(items, list) and _OBJECTS.issuperset(map(type, items))):
        raise having_used(UpstreamInvalid(f"The provider's answer has no list of {key}."), dialect.usage(parsed))
    if not items and name in _NEVER_EMPTY:
        raise having_used(UpstreamInvalid(f"The provider's answer has no {key}."), dialect.usage(parsed))


def _error_in(payload: Body, dialect: str) -> Body | None:
    """What the provider says is wrong, in an answer or an event; None when it says nothing of the kind."""
    if dialect in typed.NAMES:
        return typed.typed(dialect).event_error(payload)
    return payload if payload.get("error") else None


async def _stream(answer: Answer, outgoing: Outgoing) -> Reply:
    before: list[Body] = []
    try:
        answer.put_back(await to_first_event(answer, partial(_is_good, dialect=outgoing.dialect, before=before)))
    except CallError as error:
        error.usage = _used(before, outgoing.dialect)
        raise
    return Reply(chunks=answer.chunks(), dialect=outgoing.dialect, close=answer.close)


def _is_good(event: bytes, dialect: str, before: list[Body]) -> bool:
    """Whether an answer begins with this event; raises what the provider says is wrong.

    What is no comment and still not its beginning is added to what came `before` it.
    """
    data = sse.data(event)
    if data is None or not data.strip():
        return False
    if data.startswith(b"[DONE]"):
        raise UpstreamInvalid("The provider's stream ends without an answer.")
    try:
        payload = json_of(data)
    except orjson.JSONDecodeError:
        raise UpstreamInvalid("The provider's stream begins with an event that is not valid JSON.") from None
    if not isinstance(payload, dict):
        raise UpstreamInvalid("The provider's stream begins with an event that is not a JSON object.")
    error = _error_in(payload, dialect)
    if error is not None or event.startswith(b"event: error"):
        before.append(payload)
        raise error_from(error or payload)
    # Azure says first what it found in the prompt, and a response is said to be created before anything has been tried.
    if payload.get("choices") or (_ITEMS.get(dialect) != "choices" and dialect != "responses"):
        return True
    if dialect == "responses" and responses.event_begins(payload):
        return True
    before.append(payload)
    return False


def _used(said: Iterable[Body], dialect: str) -> Usage | None:
    """What these events say was used."""
    used: Usage | None = None
    for payload in said:
        if (usage := dialects.named(dialect).usage(payload)) is not None:
            used = larger(used, usage)
    return used
