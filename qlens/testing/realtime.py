"""A real WebSocket server that plays a provider of realtime sessions: OpenAI's, Azure's, or the beta's.

https://platform.openai.com/docs/api-reference/realtime
"""

from __future__ import annotations

import asyncio
import binascii
from base64 import b64decode, b64encode
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import orjson
from aiohttp import WSCloseCode, WSMsgType, web
from attrs import define, field

KEY = "sk-example-realtime-key"
TEXT = "Hello from realtime."
USAGE: Mapping[str, Any] = {
    "total_tokens": 170,
    "input_tokens": 120,
    "output_tokens": 50,
    "input_token_details": {
        "text_tokens": 40,
        "audio_tokens": 80,
        "image_tokens": 0,
        "cached_tokens": 30,
        "cached_tokens_details": {"text_tokens": 10, "audio_tokens": 20, "image_tokens": 0},
    },
    "output_token_details": {"text_tokens": 20, "audio_tokens": 30},
}
"""What each answer says it used."""
FRAME_BYTES = 16 * 1024 * 1024

_PREVIEWS = ("2024-10-01-preview", "2024-12-17", "2025-04-01-preview")
_BETA = "realtime=v1"
_ROLES = {"user": "input_text", "system": "input_text", "assistant": "output_text"}


@define(eq=False)
class Joined:
    """One session that a client has."""

    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    """Case-insensitive."""
    socket: web.WebSocketResponse = field(repr=False)
    beta: bool
    """Whether it speaks the first version, whose events have other names."""
    events: list[dict[str, Any]] = field(factory=list, repr=False)
    """What the client sent, parsed."""
    closed: asyncio.Event = field(factory=asyncio.Event, repr=False)
    close_code: int | None = None
    """What the client closed it with; 1006: it was lost."""
    answers: int = 0
    items: int = 0
    audio_bytes: int = 0
    """What is in the audio buffer."""
    running: str | None = None
    """The answer that was begun and is not done."""

    async def say(self, kind: str, **fields: Any) -> None:
        """Send one event."""
        await self.socket.send_str(orjson.dumps({"type": kind, "event_id": "event_1", **fields}).decode())

    async def refuse(self, message: str, code: str, event: Mapping[str, Any]) -> None:
        """Send an error event; the session goes on."""
        said = {"type": "invalid_request_error", "code": code, "message": message, "param": None}
        await self.say("error", error={**said, "event_id": event.get("event_id")})


@define(eq=False)
class FakeRealtime:
    """A running server; made by `realtime()`. Its attributes may be changed at any time."""

    port: int = 0
    key: str = KEY
    models: tuple[str, ...] = ("gpt-realtime",)
    """Models, or Azure's deployments."""
    usage: Mapping[str, Any] | None = field(factory=lambda: dict(USAGE))
    """What the next answer says it used; None: it does not say."""
    hangs: bool = False
    """Whether an answer stops after its first piece, until it is cancelled."""
    refuses_with: int | None = None
    """A status with which every upgrade is refused."""
    script: Mapping[str, Sequence[Mapping[str, Any]]] = field(factory=dict, repr=False)
    """What it says, word for word, to a client's event of a type; and under `session.created`, at the start."""
    reading: asyncio.Event = field(factory=asyncio.Event, repr=False)
    """While it is not set, nothing is read from clients."""
    sessions: list[Joined] = field(factory=list, repr=False)
    requests: int = 0
    """Upgrades that were asked for, refused ones too."""

    @property
    def url(self) -> str:
        """What goes into a provider's `base_url`; ends in /v1."""
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def root(self) -> str:
        """The address without a path: an Azure endpoint."""
        return f"http://127.0.0.1:{self.port}"

    async def joined(self, count: int = 1, seconds: float = 5) -> Joined:
        """Wait for so many sessions; the last of them."""
        async with asyncio.timeout(seconds):
            while len(self.sessions) < count:  # noqa: ASYNC110 - a test waits for moments
                await asyncio.sleep(0.005)
        return self.sessions[count - 1]

    # --- the upgrade ----------------------------------------------------------------------------

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """One request: refused, or a session to its end."""
        self.requests += 1
        refused = self._refused(request)
        if refused is not None:
            status, code, message = refused
            said = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
            return web.json_response({"error": said}, status=status, headers={"retry-after": "2"})
        socket = web.WebSocketResponse(max_msg_size=FRAME_BYTES, protocols=("realtime",), timeout=1)
        await socket.prepare(request)
        beta = request.headers.get("openai-beta") == _BETA or request.path == "/openai/realtime"
        session = Joined(request.path, dict(request.query), request.headers, socket, beta)
        self.sessions.append(session)
        try:
            if not await self._scripted(session, "session.created"):
                await session.say("session.created", session=self._described(session))
            await self._serve(session)
        except ConnectionError:
            pass  # the client has left
        finally:
            session.close_code = socket.close_code or WSCloseCode.ABNORMAL_CLOSURE
            session.closed.set()
        return socket

    def _refused(self, request: web.Request) -> tuple[int, str | None, str] | None:
        azure = request.path.startswith("/openai/")
        bearer = request.headers.get("authorization", "").removeprefix("Bearer ")
        given = request.headers.get("api-key", bearer) if azure else bearer
        if self.refuses_with is not None:
            return self.refuses_with, None, "No."
        if given != self.key or "openai-insecure-api-key" in request.headers.get("sec-websocket-protocol", ""):
            return 401, "invalid_api_key", "Incorrect API key provided."
        if request.path == "/openai/realtime":
            if request.query.get("api-version") not in _PREVIEWS or "model" in request.query:
                return 404, "404", "Resource not found"
            name = request.query.get("deployment")
        elif request.path in {"/v1/realtime", "/openai/v1/realtime"}:
            if "deployment" in request.query:
                return 400, "unknown_parameter", "Unknown query parameter: deployment"
            name = request.query.get("model")
            if request.query.get("intent") == "transcription":
                wording = "You must not provide a model parameter for transcription sessions."
                return (400, "invalid_model", wording) if name is not None else None
        else:
            return 404, "unknown_url", "Invalid URL"
        if name not in self.models:
            code = "DeploymentNotFound" if azure else "model_not_found"
            return 404, code, f"The model {name} does not exist."
        beta = request.headers.get("openai-beta")
        return None if beta in (None, _BETA) else (400, "invalid_beta", f"Unknown beta: {beta}")

    # --- the session ----------------------------------------------------------------------------

    def _described(self, session: Joined) -> dict[str, Any]:
        name = session.query.get("model") or session.query.get("deployment")
        described = {"id": "sess_1", "object": "realtime.session", "model": name, "instructions": ""}
        return described if session.beta else {**described, "type": _kind(session)}

    async def _serve(self, session: Joined) -> None:
        while True:
            await self.reading.wait()
            message = await session.socket.receive()
            if message.type is not WSMsgType.TEXT:
                if message.type is WSMsgType.BINARY:
                    await session.socket.close(code=WSCloseCode.UNSUPPORTED_DATA, message=b"events are text")
                return
            try:
                event = orjson.loads(message.data)
            except orjson.JSONDecodeError:
                await session.refuse("The event is no JSON.", "invalid_json", {})
                continue
            session.events.append(event)
            await self._answer(session, event)

    async def _scripted(self, session: Joined, kind: str) -> bool:
        """Say what the script has for an event of this type; whether it has anything."""
        for event in self.script.get(kind, ()):
            await session.socket.send_str(orjson.dumps(event).decode())
        return kind in self.script

    async def _answer(self, session: Joined, event: dict[str, Any]) -> None:
        if await self._scripted(session, str(event.get("type"))):
            return
        match event.get("type"):
            case "session.update":
                await self._update(session, event)
            case "conversation.item.create":
                await self._item(session, event)
            case "input_audio_buffer.append":
                await self._append(session, event)
            case "input_audio_buffer.commit":
                await self._commit(session, event)
            case "response.create":
                await self._respond(session, event)
            case "response.cancel":
                await self._cancel(session, event)
            case unknown:
                await session.refuse(f"Invalid value: '{unknown}'.", "invalid_value", event)

    async def _update(self, session: Joined, event: dict[str, Any]) -> None:
        wanted = event.get("session")
        if not isinstance(wanted, dict) or (not session.beta and wanted.get("type") != _kind(session)):
            await session.refuse("Missing required parameter: 'session.type'.", "missing_required_parameter", event)
            return
        await session.say("session.updated", session={**self._described(session), **wanted})

    async def _item(self, session: Joined, event: dict[str, Any]) -> None:
        item = event.get("item")
        if not isinstance(item, dict) or item.get("type") not in {"message", "function_call_output"}:
            await session.refuse("Missing required parameter: 'item.type'.", "missing_required_parameter", event)
            return
        if item["type"] == "message":
            wanted = _ROLES.get(item.get("role", ""))
            kinds = {part.get("type") for part in item.get("content", ())}
            if wanted is None or not kinds <= {wanted, "input_audio", "input_image", "text"}:
                await session.refuse("Invalid value: 'item.content'.", "invalid_value", event)
                return
        session.items += 1
        item = {"id": f"item_{session.items}", "object": "realtime.item", "status": "completed", **item}
        for kind in ("created",) if session.beta else ("added", "done"):
            await session.say(f"conversation.item.{kind}", item=item, previous_item_id=None)

    async def _append(self, session: Joined, event: dict[str, Any]) -> None:
        try:
            session.audio_bytes += len(b64decode(event.get("audio", ""), validate=True))
        except (binascii.Error, ValueError):
            await session.refuse("Invalid 'audio'. Expected base64-encoded audio.", "invalid_value", event)

    async def _commit(self, session: Joined, event: dict[str, Any]) -> None:
        if not session.audio_bytes:
            await session.refuse("The buffer is too small.", "input_audio_buffer_commit_empty", event)
            return
        session.audio_bytes = 0
        session.items += 1
        place = {"item_id": f"item_{session.items}", "previous_item_id": None}
        await session.say("input_audio_buffer.committed", **place)
        usage = {"type": "duration", "seconds": 1.5}
        await session.say(
            "conversation.item.input_audio_transcription.completed",
            item_id=place["item_id"], content_index=0, transcript="Hello", usage=usage,
        )  # fmt: skip

    async def _respond(self, session: Joined, event: dict[str, Any]) -> None:
        if session.running is not None:
            await session.refuse(
                "Conversation already has an active response in progress: resp_1. Wait until it is finished. "
                "See https://example.com/org-a1b2c3d4e5f6 for more.",
                "conversation_already_has_active_response",
                event,
            )
            return
        session.answers += 1
        session.running = f"resp_{session.answers}"
        await session.say("response.created", response=_response(session.running, "in_progress", None))
        place = {"response_id": session.running, "item_id": "item_9", "output_index": 0, "content_index": 0}
        text = "response.text.delta" if session.beta else "response.output_text.delta"
        audio = "response.audio.delta" if session.beta else "response.output_audio.delta"
        await session.say(text, delta=TEXT, **place)
        await session.say(audio, delta=b64encode(bytes(9600)).decode(), **place)
        if not self.hangs:
            await self._done(session, "completed", TEXT)

    async def _cancel(self, session: Joined, event: dict[str, Any]) -> None:
        if session.running is None:
            await session.refuse("Cancellation failed: no active response found", "response_cancel_not_active", event)
            return
        await self._done(session, "cancelled", "")

    async def _done(self, session: Joined, status: str, text: str) -> None:
        assert session.running is not None, "an answer was begun"
        name, session.running = session.running, None
        await session.say("response.done", response={**_response(name, status, text), "usage": self.usage})


def _response(name: str, status: str, text: str | None) -> dict[str, Any]:
    part = {"type": "output_text", "text": text}
    item = {"id": "item_9", "type": "message", "role": "assistant", "status": "completed", "content": [part]}
    return {
        "id": name,
        "object": "realtime.response",
        "status": status,
        "status_details": None,
        "output": [item] if text else [],
        "usage": None,
    }


def _kind(session: Joined) -> str:
    return "transcription" if session.query.get("intent") == "transcription" else "realtime"


@asynccontextmanager
async def realtime(**settings: Any) -> AsyncIterator[FakeRealtime]:
    """Serve on a free loopback port until the block is left; `settings` are attributes of FakeRealtime."""
    fake = FakeRealtime(**settings)
    fake.reading.set()
    application = web.Application()
    application.router.add_get("/{path:.*}", fake.handle)
    runner = web.AppRunner(application, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        fake.port = runner.addresses[0][1]
        yield fake
    finally:
        for session in fake.sessions:
            await session.socket.close(code=WSCloseCode.GOING_AWAY)
        await runner.cleanup()
