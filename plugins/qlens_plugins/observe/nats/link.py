"""A connection to NATS: the stream it leads to, and what it acknowledges."""

from __future__ import annotations

import asyncio
import logging
import ssl
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from itertools import count
from typing import TYPE_CHECKING, Any

import orjson
from attrs import define, field
from nats import errors
from nats.aio.client import Client
from nats.js import api
from nats.js import errors as stream_errors

from qlens_plugins.observe.nats.credentials import Signer, seed_of

if TYPE_CHECKING:
    from nats.aio.msg import Msg

    from qlens_plugins.observe.nats.messages import Message
    from qlens_plugins.observe.nats.settings import NatsConfig, Stream

log = logging.getLogger("qlens.nats")

CONNECT_SECONDS = 5
CLOSE_SECONDS = 1
ASK_SECONDS = 2
AT_ONCE = 10
"""Events that are sent, or acknowledgements that are heard, before this thread lets go of Python's lock."""
PAUSE_SECONDS = 0.00005
"""For how long. Not 0: with two cores this thread would have the lock back at once."""
PING_SECONDS = 20
CONTENT_TYPE = "application/cloudevents+json"
# https://github.com/nats-io/nats-server/blob/main/server/errors.json
_TOO_LARGE = 10054
_ANOTHER_STREAM = 10060

Away = (OSError, errors.Error, ssl.SSLError, TimeoutError)
"""What connections fail with."""


class Refused(Exception):
    """NATS is there, and does not take events; the message says why."""


class _Client(Client):
    """The library's client, with what its settings do not give."""

    signer: Signer | None = None
    must_encrypt = False

    def _connect_command(self) -> bytes:
        # It comes with the first thing that is sent, and whether there is TLS is up to the server, or to whoever is in
        # between: nothing would be said of it.
        if self.must_encrypt and not self._server_info.get("tls_required"):
            raise errors.Error("the server has no TLS")
        if self.signer is not None and self.signer.jwt is None:
            self._public_nkey = self.signer.public
        command: bytes = super()._connect_command()
        return command

    async def end(self) -> None:
        """Close the connection; one whose server takes nothing is cut off."""
        with suppress(*Away):
            async with asyncio.timeout(CLOSE_SECONDS):
                await self.close()
        writer = getattr(self._transport, "_io_writer", None)
        if writer is not None:
            writer.transport.abort()


@define(eq=False)
class Link:
    """Publishes events, and notes which of them the stream has."""

    client: Client
    stream: Stream
    prefix: str
    trouble: str = field(default="", init=False)
    """What the server or the connection said last."""
    _inbox: str = field(init=False)
    _numbers: Any = field(factory=count, init=False)
    _awaited: dict[str, Message] = field(factory=dict, init=False)
    """By the subject that the acknowledgement comes on."""
    _open: int = field(default=0, init=False)
    """How many of a round have no answer yet."""
    _answered: asyncio.Future[None] | None = field(default=None, init=False)

    def __attrs_post_init__(self) -> None:
        self._inbox = self.client.new_inbox()

    async def listen(self) -> None:
        """Hear acknowledgements from now on."""
        await self.client.subscribe(f"{self._inbox}.*", cb=self._hear)

    def lost(self) -> None:
        """Wait no longer: the connection is gone."""
        if self._answered is not None and not self._answered.done():
            self._answered.set_result(None)

    @property
    def is_lost(self) -> bool:
        """Whether the connection is gone."""
        return self.client.is_closed

    # --- the stream ----------------------------------------------------------------------------

    async def find_stream(self) -> None:
        """See to it that there is a stream; raises Refused where there is none, and what connections fail with."""
        name = self.stream.name
        try:
            await self.client.jetstream(timeout=ASK_SECONDS).stream_info(name)
        except stream_errors.NotFoundError:
            await self._make_stream()
        except stream_errors.ServiceUnavailableError as error:
            raise Refused("the server has no JetStream, or none for this user") from error
        except (stream_errors.APIError, errors.TimeoutError):
            # Perhaps the user may not ask. What is published tells it anyway.
            log.debug("nats: nothing is known of the stream %s", name)

    async def _make_stream(self) -> None:
        wanted, name = self.stream, self.stream.name
        subjects = f"{self.prefix}.>"
        if not wanted.create:
            raise Refused(
                f"there is no stream {name}: make one with the subjects {subjects}, or write `stream: {{create: true}}`"
            )
        config = api.StreamConfig(
            name=name,
            subjects=[subjects],
            retention=api.RetentionPolicy(wanted.retention),
            max_age=wanted.max_age_days * 86_400,
            max_bytes=wanted.max_bytes or -1,
            num_replicas=wanted.replicas,
            duplicate_window=wanted.duplicate_seconds,
            storage=api.StorageType.FILE,
        )
        try:
            await self.client.jetstream().add_stream(config)
        except stream_errors.APIError as error:
            raise Refused(f"the stream {name} cannot be made: {error.description}") from error
        log.info("nats: made the stream %s", name)

    # --- events --------------------------------------------------------------------------------

    async def deliver(self, messages: Sequence[Message], seconds: float) -> bool:
        """Publish events and wait for what becomes of them, so many seconds at most; raises what connections fail with.

        What was acknowledged is `done`, and so is what the stream will never take. False when nothing was answered.
        """
        self._awaited = {reply: message for reply, message in self._awaited.items() if not message.done}
        self._open, self._answered = len(messages), asyncio.get_running_loop().create_future()
        try:
            for number, message in enumerate(messages, 1):
                await self._publish(message)
                if number % AT_ONCE == 0:
                    _pause()
            if self._open:
                await asyncio.wait({self._answered}, timeout=seconds)
        finally:
            answered, self._answered = self._answered, None
            answered.cancel()
        if self.client.is_closed:
            raise errors.ConnectionClosedError
        return self._open < len(messages)

    async def _publish(self, message: Message) -> None:
        message.refusal = None
        reply = f"{self._inbox}.{next(self._numbers)}"
        subject = f"{self.prefix}.{message.subject}"
        headers = {
            "Nats-Msg-Id": message.id,
            "Nats-Expected-Stream": self.stream.name,
            "Content-Type": CONTENT_TYPE,
        }
        self._awaited[reply] = message
        try:
            await self.client.publish(subject, message.body, reply, headers)
        except errors.MaxPayloadError:
            self._never(message, "it is larger than the server takes")
            self._end()

    async def _hear(self, answer: Msg) -> None:
        message = self._awaited.pop(answer.subject, None)
        if message is None or message.done:
            return  # an earlier round's
        subject = f"{self.prefix}.{message.subject}"
        if answer.headers and answer.headers.get("Status") == "503":
            message.refusal = f"no stream takes {subject}: {self.stream.name} must have the subjects {self.prefix}.>"
        else:
            self._read(message, subject, answer.data)
        self._end()

    def _read(self, message: Message, subject: str, data: bytes) -> None:
        try:
            error = orjson.loads(data).get("error")
        except (ValueError, AttributeError):
            message.refusal = "the server's answer is no acknowledgement"
            return
        if error is None:
            message.done = True
        elif error.get("err_code") == _TOO_LARGE:
            self._never(message, str(error.get("description")))
        elif error.get("err_code") == _ANOTHER_STREAM:
            message.refusal = f"another stream than {self.stream.name} takes {subject}"
        else:
            message.refusal = str(error.get("description"))

    def _never(self, message: Message, why: str) -> None:
        message.done, message.refusal = True, why

    def _end(self) -> None:
        self._open -= 1
        if self._open % AT_ONCE == 0:
            _pause()
        if not self._open and self._answered is not None and not self._answered.done():
            self._answered.set_result(None)


@asynccontextmanager
async def connected(config: NatsConfig, name: str) -> AsyncIterator[Link]:
    """A connection to one of the servers; raises what connections fail with, or ValueError for unusable credentials."""
    client = _Client()
    as_whom = _credentials(client, config)
    link = Link(client, config.stream, config.subject_prefix)

    async def failed(error: Exception) -> None:
        link.trouble = str(error) or type(error).__name__
        log.debug("nats: %s", link.trouble)

    async def closed() -> None:
        link.lost()

    try:
        try:
            async with asyncio.timeout(CONNECT_SECONDS * (1 + len(config.servers))):
                await client.connect(
                    servers=list(config.servers),
                    name=name,
                    error_cb=failed,
                    closed_cb=closed,
                    # Whoever comes back begins anew: what was on its way is sent again, under the same ids.
                    allow_reconnect=False,
                    max_reconnect_attempts=1,
                    reconnect_time_wait=0,
                    connect_timeout=CONNECT_SECONDS,
                    flush_timeout=config.ack_seconds,
                    skip_subject_validation=True,  # they are all our own
                    ping_interval=PING_SECONDS,
                    **as_whom,
                )
        except errors.NoServersError as error:
            raise errors.Error(link.trouble or "no server answers") from error
        await link.listen()
        yield link
    finally:
        await client.end()


def _pause() -> None:
    """Let the gateway's thread go on; this one has nothing to do meanwhile that could not wait."""
    time.sleep(PAUSE_SECONDS)


def _credentials(client: _Client, config: NatsConfig) -> dict[str, Any]:
    """Who the gateway is, as the client wants it; files are read anew."""
    told: dict[str, Any] = {}
    if config.user is not None and config.password is not None:
        told |= {"user": config.user, "password": config.password.reveal()}
    if config.token is not None:
        told["token"] = config.token.reveal()
    if config.nkey is not None:
        client.signer = Signer(seed_of(config.nkey.reveal()))
    if config.credentials is not None:
        client.signer = Signer.of_file(config.credentials)
    if (signer := client.signer) is not None:
        told["signature_cb"] = signer.sign
        if (jwt := signer.jwt) is not None:
            told["user_jwt_cb"] = lambda: bytearray(jwt.encode())
    client.must_encrypt = config.tls is not None or any(url.startswith("tls:") for url in config.servers)
    if client.must_encrypt:
        told["tls"] = _context(config)
    return told


def _context(config: NatsConfig) -> ssl.SSLContext:
    tls = config.tls
    context = ssl.create_default_context(cafile=tls.ca_file if tls else None)
    if tls is not None and tls.cert_file is not None:
        context.load_cert_chain(tls.cert_file, tls.key_file)
    return context
