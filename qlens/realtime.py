"""Realtime sessions: a client's WebSocket and a provider's session, joined and metered.

https://platform.openai.com/docs/guides/realtime
"""

from __future__ import annotations

import asyncio
import math
import re
import time
from base64 import b64decode, b64encode
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from hashlib import sha1
from typing import TYPE_CHECKING, Any, Protocol

import orjson
from attrs import define, evolve, field, frozen

from qlens import transcription
from qlens.account import Account, ClientLeft
from qlens.call import UNPRICED, Call, Reply, Target
from qlens.errors import (
    CallError,
    Forbidden,
    InvalidRequest,
    PluginFailed,
    SessionCut,
    UpgradeRequired,
    UpstreamError,
    UpstreamTruncated,
)
from qlens.operations import model_not_found
from qlens.provider_errors import masked
from qlens.returned import mistakes, session
from qlens.session import UNSAID, Frame, Session, SessionClosed
from qlens.usage import Usage, from_realtime, together

if TYPE_CHECKING:
    from qlens.config import Server
    from qlens.pipeline import Pipeline

PROTOCOL = "realtime"
"""The subprotocol that clients offer and are given."""
KEY_PROTOCOL = "openai-insecure-api-key."
"""How pages in a browser, which can set no header, bring their key."""

_GUID = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
_ANSWER_SECONDS = 1
"""How long a side that takes nothing any more may take to say why."""
_GOING_AWAY, _FAILED = 1001, 1011
_NORMAL = {1000, _GOING_AWAY, UNSAID}
"""How a session is closed that is over."""


class Switch(Protocol):
    """Answers a request for an upgrade and gives the connection as a session."""

    def __call__(self, lines: str) -> Awaitable[Session]: ...


# --- the request -------------------------------------------------------------------------------


def key_of_page(headers: Mapping[str, str]) -> str | None:
    """The key that a page's WebSocket brings in a subprotocol."""
    offered = (name.strip() for name in headers.get("sec-websocket-protocol", "").split(","))
    return next((name.removeprefix(KEY_PROTOCOL) for name in offered if name.startswith(KEY_PROTOCOL)), None) or None


def open_session(pipeline: Pipeline, call: Call) -> None:
    """Look at the request, resolve the model and bound what a session holds.

    Nobody knows beforehand what a session will use. It holds one answer of the model's `max_output_tokens`, or
    nothing where the model has none, and never has a bounded price.
    """
    _check_upgrade(call.headers)
    _refuse_pages(pipeline, call)
    if "call_id" in call.query:
        raise InvalidRequest("This gateway does not join calls: leave `call_id` out.", param="call_id")
    name = call.query.get("model") or call.query.get("deployment")
    if not name and transcription.is_transcription(call):
        raise InvalidRequest(
            "You must provide a model parameter, for transcription too: /v1/realtime?intent=transcription&model=NAME. "
            "Who is asked, and whether you may, is known before a session opens; it is then told the model.",
            param="model",
        )
    if not name:
        raise InvalidRequest("You must provide a model parameter: /v1/realtime?model=NAME.", param="model")
    model = pipeline.models.resolve(name)
    if model is None or not call.known.may_use(name):
        raise model_not_found(name)
    call.asked_model, call.model, call.targets = name, model, model.candidates
    pipeline.refuse_unseen("Realtime sessions are not served")
    most = [model.max_output_tokens or 0 for model in pipeline.reachable(call)]
    # One token at least: limits correct at the end what they have taken something from.
    call.estimated_input = 1
    call.bound, call.bound_cost = Usage(input=1, output=max(most), source="estimated"), UNPRICED
    call.stream = True


def _check_upgrade(headers: Mapping[str, str]) -> None:
    wanted = [name.strip().lower() for name in headers.get("connection", "").split(",")]
    if headers.get("upgrade", "").strip().lower() != "websocket" or "upgrade" not in wanted:
        raise UpgradeRequired("This path is served by WebSocket alone.")
    if headers.get("sec-websocket-version") != "13":
        raise UpgradeRequired("This path is served by version 13 of WebSocket alone.")
    try:
        size = len(b64decode(headers.get("sec-websocket-key", ""), validate=True))
    except ValueError:
        size = 0
    if size != 16:
        raise InvalidRequest("The header Sec-WebSocket-Key is no key of 16 bytes in base64.")


def _refuse_pages(pipeline: Pipeline, call: Call) -> None:
    """A WebSocket needs no permission of the other side: any page in a browser on this machine could open one."""
    if "origin" not in call.headers:
        return
    vouching = (hook.owner for hook in pipeline.hooks.authenticate if hook.plugin == call.known.by)
    if any(getattr(owner, "needs_no_credential", False) for owner in vouching):
        raise Forbidden("Pages in a browser may open sessions only where callers need a key.")


def _accepting(headers: Mapping[str, str]) -> str:
    """The lines of an answer that accepts an upgrade."""
    key = headers.get("sec-websocket-key", "").strip()
    accept = b64encode(sha1((key + _GUID).encode()).digest()).decode()  # noqa: S324 - what RFC 6455 says, no secret
    lines = f"upgrade: websocket\r\nconnection: upgrade\r\nsec-websocket-accept: {accept}\r\n"
    offered = {name.strip() for name in headers.get("sec-websocket-protocol", "").split(",")}
    return f"{lines}sec-websocket-protocol: {PROTOCOL}\r\n" if PROTOCOL in offered else lines


# --- the attempt -------------------------------------------------------------------------------


async def attempt(pipeline: Pipeline, account: Account, target: Target) -> Reply:
    """Open a session with one target; a reply without a body stands for it in front of `wrap_send`."""
    call, provider = account.call, pipeline.providers[target.provider]
    if provider.connect is None:
        raise InvalidRequest(
            f"The provider {target.provider} of the model `{target.public}` does not do {call.operation.name}.",
            code="unsupported_operation",
        )
    place = account.begin(target)
    try:
        opened = session(await provider.connect.fn(call, target))
    except CallError as error:
        account.failed(place, error)
        raise
    except mistakes() as error:
        account.failed(place, "provider_failed")
        raise _mistake(pipeline, target, error) from error
    except asyncio.CancelledError as error:
        account.cut_off(place, error)
        raise
    reply = account.hold_open(Reply(status=101, body=b"", dialect="", target=target, close=opened.close))
    account.answered(place, reply, Conversation(call, reply, opened))
    return reply


def _mistake(pipeline: Pipeline, target: Target, error: BaseException) -> CallError:
    """The error for a provider that fails by itself, before its session or in it."""
    connect = pipeline.providers[target.provider].connect
    assert connect is not None, "it was asked for the session"
    return pipeline.failure(connect, error, UpstreamError(f"The provider {target.provider} failed."))


# --- the session -------------------------------------------------------------------------------


async def relay(switch: Switch, limits: Server, account: Account, reply: Reply) -> None:
    """Accept the client's upgrade and pass frames both ways until one side closes."""
    conversation = next((meter for meter in account.meters.values() if meter.reply is reply), None)
    if not isinstance(conversation, Conversation):
        raise PluginFailed("A plugin put another answer in the place of a session.")
    try:
        client = await switch(_accepting(account.call.headers))
    except SessionClosed:
        raise ClientLeft from None
    account.first_byte = time.monotonic()
    # A session lasts longer than other calls may.
    account.pipeline.deadlines.end(account.call)
    join = _Join(account, client, conversation)
    try:
        await join.run(limits)
    except BaseException as error:
        # A client that leaves as soon as it is told cancels this, and is not why the session ended.
        with suppress(asyncio.CancelledError):
            await client.close(*_farewell(error))
        raise


def _farewell(error: BaseException) -> tuple[int, str]:
    """What the client is told of the gateway's own reasons."""
    if isinstance(error, SessionCut):
        return _GOING_AWAY, error.message
    if isinstance(error, asyncio.CancelledError):
        return _GOING_AWAY, "The gateway is shutting down."
    return _FAILED, error.message if isinstance(error, CallError) else "The gateway made a mistake."


@define(eq=False)
class _Join:
    """Two sides of a session, joined."""

    account: Account
    client: Session
    conversation: Conversation
    _last: float = field(factory=time.monotonic, init=False)
    """When the last message passed."""
    _model: str | None = field(init=False)
    """Which model is to write down what is heard, in a session that does nothing else."""

    def __attrs_post_init__(self) -> None:
        target = self.conversation.reply.target
        self._model = target.model if target and transcription.is_transcription(self.account.call) else None

    async def run(self, limits: Server) -> None:
        """Pass frames until a side closes; raises what the receipt says of another end than a good one."""
        provider = self.conversation.session
        up = asyncio.create_task(_pump(self.client, provider, self._from_client))
        down = asyncio.create_task(_pump(provider, self.client, self._from_provider))
        try:
            await self._first_end(up, down, limits)
            by_client, closed = await _ended(up, down)
        except CallError:
            raise
        except mistakes() as error:
            target = self.conversation.reply.target
            assert target is not None, "a session is with a target"
            raise _mistake(self.account.pipeline, target, error) from error
        finally:
            for task in (up, down):
                task.cancel()
            await asyncio.gather(up, down, return_exceptions=True)
        if by_client:
            await self._client_left(closed)
        else:
            await self._provider_left(closed)

    async def _first_end(self, up: _Pump, down: _Pump, limits: Server) -> None:
        """Wait until one direction has ended; raises SessionCut when the session's time is over."""
        ends = self._last + limits.session_seconds
        while True:
            now = time.monotonic()
            until = min(ends, self._last + limits.session_idle_seconds)
            if now >= until:
                raise _overdue(limits) if now >= ends else _idle(limits)
            done, _ = await asyncio.wait({up, down}, timeout=until - now, return_when=asyncio.FIRST_COMPLETED)
            if done:
                return

    async def _client_left(self, closed: SessionClosed) -> None:
        abandoned = not closed.clean or self.conversation.is_answering
        code, reason = (closed.code, closed.reason) if closed.clean else (_GOING_AWAY, "")
        await self._end((code, reason), (closed.code, closed.reason), ClientLeft() if abandoned else None)

    async def _provider_left(self, closed: SessionClosed) -> None:
        is_over = closed.clean and closed.code in _NORMAL and not self.conversation.is_answering
        told = (closed.code, masked(closed.reason)) if closed.clean else (_FAILED, "The provider's session was lost.")
        truncated = UpstreamTruncated("The provider's session ended before its time.")
        await self._end((closed.code, ""), told, None if is_over else truncated)

    async def _end(self, provider: tuple[int, str], client: tuple[int, str], error: Exception | None) -> None:
        """Close both sides; raises what ended the session, if that was no good end."""
        if error is None:
            self.conversation.reply.complete = self.account.delivered = True
        closings = self.conversation.session.close(*provider), self.client.close(*client)
        try:
            # What fails here is closed once more with the account, or lost anyway.
            await asyncio.gather(*closings, return_exceptions=True)
        except asyncio.CancelledError:
            # A client that has its closing frame may leave at once: how it ended is known by then.
            if error is None:
                raise
        if error is not None:
            raise error

    def _from_client(self, frame: Frame) -> Frame:
        if frame.kind in {"text", "bytes"}:
            self._last = time.monotonic()
            self.conversation.hear(frame)
            if self._model is not None:
                return transcription.pinned(frame, self._model)
        return frame

    def _from_provider(self, frame: Frame) -> Frame:
        if frame.kind in {"text", "bytes"}:
            self._last = time.monotonic()
            frame = self.conversation.see(frame)
        self.account.bytes_out += len(frame.data)
        return frame


_Pump = asyncio.Task["SessionClosed | None"]


async def _pump(source: Session, sink: Session, look: Callable[[Frame], Frame]) -> SessionClosed | None:
    """Pass frames on, one at a time, until the source is closed; None: the sink takes nothing any more.

    The next frame is not read before the one at hand was taken, so that a slow side slows the other.
    """
    while True:
        try:
            frame = await source.receive()
        except SessionClosed as closed:
            return closed
        try:
            await sink.send(look(frame))
        except SessionClosed:
            return None


async def _ended(up: _Pump, down: _Pump) -> tuple[bool, SessionClosed]:
    """Whether it was the client that ended the session, and how; one direction at least has ended."""
    if None in [pump.result() for pump in (up, down) if pump.done()]:
        # Who takes nothing any more will have said why, or be gone.
        await asyncio.wait({up, down}, timeout=_ANSWER_SECONDS)
    for pump in (up, down):
        if pump.done() and (closed := pump.result()) is not None:
            return pump is up, closed
    return down.done(), SessionClosed()


def _overdue(limits: Server) -> SessionCut:
    said = f"A session may take {limits.session_seconds:g} s here."
    return SessionCut(said, code="session_expired")


def _idle(limits: Server) -> SessionCut:
    said = f"Nothing was said for {limits.session_idle_seconds:g} s."
    return SessionCut(said, code="session_idle")


# --- what it used ------------------------------------------------------------------------------

_EVENTS = "response.created", "response.done", "error", "conversation.item.input_audio_transcription.completed"
# What makes an event worth parsing. Inside a JSON string the quotes would be escaped, so text never matches.
_NOTABLE = re.compile(rb'"type"\s*:\s*"(?:%b)"' % b"|".join(re.escape(name.encode()) for name in _EVENTS))
_AUDIO = re.compile(rb'"type"\s*:\s*"(?:input_audio_buffer\.append|response\.(?:output_)?audio\.delta)"')
_DELTA = re.compile(rb'"type"\s*:\s*"response\.[\w.]+\.delta"')
_HEAD_BYTES = 512
"""Where an event says its type, if it is to be counted before it is known what it cost."""
_BYTES_PER_TOKEN = 4
_ENVELOPE_BYTES = 180
"""What an event has around a piece of text, about."""
_HEARD_BYTES, _SPOKEN_BYTES = 4800, 2400
"""Bytes of audio to a token: 100 ms of what is heard, 50 ms of what is said, in 16 bits at 24 kHz."""


@frozen
class _Heard:
    """Bytes that passed, for an estimate."""

    text: int = 0
    audio: int = 0

    def more(self, text: int, audio: int) -> _Heard:
        return _Heard(self.text + text, self.audio + audio)


@define(eq=False)
class Conversation:
    """A session with a provider, and what it has used: the sum of its answers, and an estimate of one that runs."""

    call: Call
    reply: Reply
    session: Session
    _used: Usage = field(factory=lambda: Usage(source="provider"), init=False)
    _answering: set[object] = field(factory=set, init=False)
    """The answers that have begun and are not done."""
    _context: int = field(default=0, init=False)
    """The tokens of the conversation when the last answer was done: the next one reads them again."""
    _heard: _Heard = field(factory=_Heard, init=False)
    """What the client has sent since then."""
    _spoken: _Heard = field(factory=_Heard, init=False)
    """What has come of answers that are not done."""
    _transcribed: float = field(default=0.0, init=False)
    """Seconds of audio that another model has written down."""

    @property
    def is_answering(self) -> bool:
        """Whether an answer has begun and is not done."""
        return bool(self._answering)

    def hear(self, frame: Frame) -> None:
        """Count what the client sends."""
        size = len(frame.data)
        audio = frame.kind == "bytes" or _AUDIO.search(frame.data, 0, _HEAD_BYTES) is not None
        self._heard = self._heard.more(0, size) if audio else self._heard.more(size, 0)

    def see(self, frame: Frame) -> Frame:
        """Look at what the provider sends; what is returned goes to the client."""
        data = frame.data
        if _NOTABLE.search(data) is not None:
            with suppress(orjson.JSONDecodeError):
                event = orjson.loads(data)
                return self._read(event, frame) if isinstance(event, dict) else frame
        if self._answering and _DELTA.search(data, 0, _HEAD_BYTES) is not None:
            audio = _AUDIO.search(data, 0, _HEAD_BYTES) is not None
            size = max(0, len(data) - _ENVELOPE_BYTES)
            # A token at least.
            self._spoken = self._spoken.more(0, size) if audio else self._spoken.more(max(_BYTES_PER_TOKEN, size), 0)
        return frame

    def _read(self, event: dict[str, Any], frame: Frame) -> Frame:
        match event.get("type"):
            case "response.created":
                self._answering.add(_id_of(event))
            case "response.done":
                self._done(event)
            case "conversation.item.input_audio_transcription.completed":
                self._add(self._transcription(event.get("usage")))
            case "error":
                return _masked_error(event, frame)
        return frame

    def _done(self, event: dict[str, Any]) -> None:
        response = event.get("response")
        usage = from_realtime(response.get("usage")) if isinstance(response, dict) else None
        # A provider that does not say what it used has used something all the same.
        usage = usage or evolve(self._estimate(), source="estimated")
        self._answering.discard(_id_of(event))
        self._add(usage)
        self._context = usage.total
        self._heard = _Heard()
        if not self._answering:
            self._spoken = _Heard()

    def _transcription(self, raw: object) -> Usage:
        """What another model used to write the client's audio down: it has prices of its own."""
        if not isinstance(raw, dict):
            return Usage(source="provider")
        seconds = raw.get("seconds")
        if isinstance(seconds, (int, float)) and 0 <= seconds < 1e6:
            before, self._transcribed = math.ceil(self._transcribed), self._transcribed + seconds
            return Usage(meters={"transcribed_seconds": math.ceil(self._transcribed) - before}, source="provider")
        used = from_realtime(raw) or Usage()
        counts = {"text_in": used.input, "audio_in": used.audio_in, "text_out": used.completion}
        return Usage(meters={f"transcribed_{name}": count for name, count in counts.items()}, source="provider")

    def _add(self, usage: Usage) -> None:
        self._used = together([self._used, usage])

    def _estimate(self) -> Usage:
        heard, spoken = self._heard, self._spoken
        return Usage(
            input=self._context + heard.text // _BYTES_PER_TOKEN,
            audio_in=_audio(heard.audio, _HEARD_BYTES),
            output=spoken.text // _BYTES_PER_TOKEN,
            audio_out=_audio(spoken.audio, _SPOKEN_BYTES),
            source="partial",
        )

    def usage(self) -> Usage:
        """What the session has used so far."""
        return together([self._used, self._estimate()]) if self._answering else self._used


def _audio(size: int, per_token: int) -> int:
    """Tokens of audio, from bytes of base64."""
    return size * 3 // 4 // per_token


def _id_of(event: dict[str, Any]) -> object:
    response = event.get("response")
    said = response.get("id") if isinstance(response, dict) else None
    return said if isinstance(said, str) else None


def _masked_error(event: dict[str, Any], frame: Frame) -> Frame:
    """An error event without what names the gateway's account at the provider."""
    error = event.get("error")
    said = error.get("message") if isinstance(error, dict) else None
    if not isinstance(error, dict) or not isinstance(said, str) or (shown := masked(said)) == said:
        return frame
    return Frame(frame.kind, orjson.dumps({**event, "error": {**error, "message": shown}}))
