"""What passes through to Bedrock's runtime as it is: signed, and metered by what the answer says of its tokens."""

from __future__ import annotations

import re
from base64 import b64decode
from collections.abc import AsyncGenerator, Mapping
from typing import Any, Protocol
from urllib.parse import quote, unquote

import orjson
from attrs import define, evolve, field

from qlens import Answer, CallError, InvalidRequest, Outgoing, Reply, Target, UpstreamTruncated, Usage
from qlens_plugins.provider.bedrock import usage as usages
from qlens_plugins.provider.bedrock.converse_stream import event_name
from qlens_plugins.provider.bedrock.eventstream import MEDIA_TYPE, FrameReader
from qlens_plugins.provider.bedrock.exchange import Wire, request_id_of

_MODEL = re.compile(r"/model/(?P<model>[^/]+)/(converse|converse-stream|invoke|invoke-with-response-stream)")
_MOST_JSON = 4 * 1024 * 1024
"""Up to how many bytes an answer is looked into: longer ones are images, which tell no tokens."""
_COUNTS = {
    "inputTokens": "x-amzn-bedrock-input-token-count",
    "outputTokens": "x-amzn-bedrock-output-token-count",
    "cacheReadInputTokens": "x-amzn-bedrock-cache-read-input-token-count",
    "cacheWriteInputTokens": "x-amzn-bedrock-cache-write-input-token-count",
}
"""Where an answer of InvokeModel says what was used, by the names of Converse."""
_SHOWN = ("content-type", "x-amzn-requestid", "x-amzn-bedrock-invocation-latency", *_COUNTS.values())
_METRICS = "amazon-bedrock-invocationMetrics"


async def pass_on(wire: Wire, target: Target, outgoing: Outgoing) -> Reply:
    """Send a request of JSON as it is; raises what its answer stands for when that is none.

    What was used, and of which model, is in the reply once its stream is over.
    """
    request = outgoing.request
    assert request is not None, "the operation has a dialect"
    if request.query:
        raise InvalidRequest("Bedrock's runtime takes no query.", code="unsupported_parameter")
    path = "/".join(quote(unquote(segment), safe="~") for segment in request.path.split("/"))
    body = request.body or b""
    if not isinstance(body, bytes):
        body = b"".join([piece async for piece in body])
    answer = await wire.post(path, body, request.headers.get("accept", "application/json"))
    reply = Reply(dialect="", raw=True, close=answer.close, upstream_id=request_id_of(answer))
    reply.headers = _shown(answer)
    found = _MODEL.fullmatch(path)
    meter = _meter(answer) if found else None
    if found is None or meter is None:
        reply.chunks = answer.chunks()
    else:
        # The price is the model's, as if it were a target of its own.
        asked = evolve(target, model=unquote(found["model"]), kind="bedrock")
        reply.chunks = _metered(answer, reply, meter, asked)
    return reply


def _shown(answer: Answer) -> dict[str, str]:
    found = {name: answer.headers.get(name) for name in _SHOWN}
    return {name: value for name, value in found.items() if value and value.isascii() and value.isprintable()}


# --- what was used -----------------------------------------------------------------------------


class _Meter(Protocol):
    """Looks at an answer as it passes."""

    usage: Usage | None
    """What was used, as far as the answer has said so."""
    failed: CallError | None
    """What the answer says went wrong."""

    def feed(self, piece: bytes) -> None:
        """Look at what came next."""

    def end(self) -> None:
        """Raise that the answer, which is over, is not whole."""


async def _metered(answer: Answer, reply: Reply, meter: _Meter, asked: Target) -> AsyncGenerator[bytes]:
    async for piece in answer.chunks():
        meter.feed(piece)
        if meter.usage is not None:
            reply.usage, reply.target = meter.usage, asked
        yield piece
        if meter.failed is not None:
            raise meter.failed  # the client has it already, in the stream's own words
    meter.end()


def _meter(answer: Answer) -> _Meter | None:
    media_type = answer.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type == MEDIA_TYPE:
        return _Events()
    counted = {name: int(said) for name, header in _COUNTS.items() if (said := _number(answer.headers, header))}
    if counted:
        return _Known(usages.read({"inputTokens": 0, "outputTokens": 0, **counted}))
    return _Whole() if media_type == "application/json" else None


def _number(headers: Mapping[str, str], name: str) -> str | None:
    text = headers.get(name)
    return text if text and re.fullmatch(r"\d{1,9}", text) else None


@define(eq=False)
class _Known:
    """Of an answer whose headers say it."""

    usage: Usage | None
    failed: CallError | None = None

    def feed(self, piece: bytes) -> None:
        """It is known already."""

    def end(self) -> None:
        """The length of an answer says whether it is whole."""


@define(eq=False)
class _Whole:
    """Of a whole answer of Converse."""

    usage: Usage | None = field(default=None, init=False)
    failed: CallError | None = field(default=None, init=False)
    _kept: bytearray = field(factory=bytearray, init=False, repr=False)

    def feed(self, piece: bytes) -> None:
        """Keep it, and read it as soon as it is whole."""
        if len(self._kept) > _MOST_JSON:
            return
        self._kept += piece
        if piece.rstrip()[-1:] == b"}":
            self.usage = _said(self._kept)

    def end(self) -> None:
        """The length of an answer says whether it is whole."""


@define(eq=False)
class _Events:
    """Of a stream of Converse, or of a model's own events, which passes to its end whatever is in it."""

    usage: Usage | None = field(default=None, init=False)
    failed: CallError | None = field(default=None, init=False)
    _reader: FrameReader = field(factory=FrameReader, init=False)

    def feed(self, piece: bytes) -> None:
        """Look for the event that says what was used, which is the last, and for what is wrong."""
        try:
            for frame in self._reader.feed(piece):
                match event_name(frame):
                    case "metadata":
                        self.usage = _said(frame.payload) or self.usage
                    case "chunk":
                        self.usage = _said_inside(frame.payload) or self.usage
        except CallError as error:
            self.failed = error

    def end(self) -> None:
        """Raise that the last event is missing."""
        if self.usage is None:
            raise UpstreamTruncated("The provider's answer stopped before its end.")


def _said(payload: bytes | bytearray) -> Usage | None:
    try:
        fields: Any = orjson.loads(payload)
        tier = (fields.get("serviceTier") or {}).get("type")
        more = fields.get("additionalModelResponseFields")
        return usages.read(fields.get("usage"), tier if isinstance(tier, str) else None, usages.reasoning(more))
    except (orjson.JSONDecodeError, AttributeError):
        return None


def _said_inside(payload: bytes) -> Usage | None:
    """What a piece of InvokeModel's stream says: a model's own event in base64, the last of them with the metrics."""
    if b"bytes" not in payload:
        return None
    try:
        event: Any = orjson.loads(b64decode(orjson.loads(payload)["bytes"]))
        return usages.read(event.get(_METRICS))
    except (ValueError, AttributeError, KeyError, TypeError):
        return None
