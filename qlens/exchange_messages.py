"""One exchange in Anthropic's wire format: a request out, a Reply or one of our errors back."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import orjson

from qlens import sse
from qlens.answers import (
    ERROR_BODY_BYTES,
    having_used,
    identified,
    media_type_of,
    no_answer,
    retry_after,
    to_first_event,
    unreadable,
    written,
)
from qlens.call import Body, Outgoing, Reply
from qlens.dialects import messages
from qlens.dialects.count_tokens import countable
from qlens.errors import CallError, UpstreamError, UpstreamInvalid
from qlens.provider_errors import error_from
from qlens.surrogates import json_of
from qlens.upstream import Answer, Deadlines, Upstream
from qlens.usage import NO_USAGE

__all__ = ["post_messages"]

_ASKING = {"content-type": "application/json", "accept": "application/json"}
_ASKING_FOR_EVENTS = {**_ASKING, "accept": "text/event-stream"}


async def post_messages(
    http: Upstream,
    url: str,
    *,
    headers: Mapping[str, str],
    outgoing: Outgoing,
    deadlines: Deadlines,
    forward: Collection[str] = (),
) -> Reply:
    """Post messages and read the answer; a stream comes back once its first good event is in hand.

    Raises UpstreamRejected for the client's mistakes and an UpstreamError for all others.
    """
    answer = await http.open(
        "POST",
        url,
        headers={**(_ASKING_FOR_EVENTS if outgoing.stream else _ASKING), **headers},
        body=_written(outgoing),
        deadlines=deadlines,
    )
    return await identified(answer, _read(answer, outgoing), ("request-id",), forward)


def _written(outgoing: Outgoing) -> bytes:
    body = countable(outgoing.fields()) if outgoing.dialect == "count_tokens" else outgoing.fields()
    if outgoing.stream:
        body["stream"] = True
    else:
        body.pop("stream", None)
    return written(body)


# --- the answer --------------------------------------------------------------------------------


async def _read(answer: Answer, outgoing: Outgoing) -> Reply:
    if not 200 <= answer.status < 300:
        raise await _refusal(answer)
    media_type = media_type_of(answer)
    if not outgoing.stream or media_type == "application/json":
        return _full(await answer.read(), outgoing.dialect)
    if media_type != "text/event-stream":
        raise UpstreamInvalid("The provider answered a stream request with something that is not a stream.")
    answer.put_back(await to_first_event(answer, _is_good))
    return Reply(chunks=answer.chunks(), dialect="messages", close=answer.close)


def _full(content: bytes, dialect: str) -> Reply:
    try:
        body = _parsed(content)
    except UpstreamInvalid as mistake:
        raise unreadable(mistake, content) from None
    if (error := messages.event_error(body)) is not None:
        raise having_used(error_from(error), messages.usage(body))
    if dialect == "count_tokens":
        return _count(content, body)
    if not isinstance(body.get("content"), list):
        raise having_used(UpstreamInvalid("The provider's answer has no content."), messages.usage(body))
    usage, finish = messages.usage(body), messages.finish(body)
    return Reply(body=content, dialect="messages", usage=usage, finish=finish, complete=True)


def _count(content: bytes, body: Body) -> Reply:
    if type(body.get("input_tokens")) is not int:
        raise UpstreamInvalid("The provider's answer has no input_tokens.")
    return Reply(body=content, dialect="count_tokens", usage=NO_USAGE, complete=True)


def _is_good(event: bytes) -> bool:
    """Whether this event is an answer's beginning (a ping is not); raises what the provider says is wrong."""
    data = sse.data(event)
    if data is None or not data.strip():
        return False
    payload = _parsed(data)
    if (error := messages.event_error(payload)) is not None:
        raise having_used(error_from(error), messages.usage(payload))
    return payload.get("type") not in {"message_stop", "ping"}


def _parsed(content: bytes) -> Body:
    try:
        parsed = json_of(content)
    except orjson.JSONDecodeError:
        raise UpstreamInvalid("The provider's answer is not valid JSON.") from None
    if not isinstance(parsed, dict):
        raise UpstreamInvalid("The provider's answer is not a JSON object.")
    return parsed


# --- errors ------------------------------------------------------------------------------------


async def _refusal(answer: Answer) -> CallError:
    if answer.status < 400:
        return no_answer(answer)
    try:
        body = _parsed(await answer.read(ERROR_BODY_BYTES))
    except UpstreamError:
        body = {}  # the status says enough
    error = messages.event_error(body) or {"error": {}}
    # What the operator has spent may come as a 400, as if the client were wrong.
    status = 429 if error["error"].get("code") == "insufficient_quota" else answer.status
    return having_used(error_from(error, status, retry_after(answer.headers)), messages.usage(body))
