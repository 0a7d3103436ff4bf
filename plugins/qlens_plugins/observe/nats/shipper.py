"""The thread that sends what is in an outbox: it has an event loop of its own, and no call waits for it."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from contextlib import suppress
from threading import Event, Thread

from attrs import define, field

from qlens import Spool, StartupError, background_thread
from qlens_plugins.observe.nats.link import Away, Link, Refused, connected
from qlens_plugins.observe.nats.messages import Message
from qlens_plugins.observe.nats.outbox import Outbox
from qlens_plugins.observe.nats.settings import NatsConfig
from qlens_plugins.observe.nats.source import Source

log = logging.getLogger("qlens.nats")

LOOK_SECONDS = 0.05
"""How often the outbox is looked into: a few events at a time cost less than one by one."""
ORPHAN_SECONDS = 30.0
"""How often the outboxes of dead processes are looked for."""
FIRST_WAIT_SECONDS = 0.1
LONGEST_WAIT_SECONDS = 5.0
"""Between two tries; each wait is twice the one before, and up to a quarter of it comes or goes at random."""
GRACE_SECONDS = 3.0
"""How much longer than its closing time the thread is waited for."""


@define(eq=False)
class Shipper:
    """Sends events as long as it is open, and again what was not acknowledged."""

    outbox: Outbox
    away: str = field(default="", init=False)
    """Why nothing can be sent at present."""
    since: float = field(default=0.0, init=False)
    """Since when, in monotonic seconds."""
    _sources: list[Source] = field(factory=list, init=False)
    """The outbox, and what dead processes left in theirs."""
    _users: int = field(default=0, init=False)
    _unusable: StartupError | None = field(default=None, init=False)
    _thread: Thread | None = field(default=None, init=False)
    _loop: asyncio.AbstractEventLoop | None = field(default=None, init=False)
    _started: Event = field(factory=Event, init=False)
    _ending: asyncio.Event = field(init=False)
    _wait: float = field(default=FIRST_WAIT_SECONDS, init=False)
    _looked: float = field(default=0.0, init=False)
    _refusing: bool = field(default=False, init=False)
    """Whether it was said that some events are not taken."""

    # --- for the gateway's event loop ----------------------------------------------------------

    @property
    def closed(self) -> bool:
        """Whether its last user has left."""
        return self._thread is not None and not self._users

    async def open(self) -> None:
        """Open the outbox and send, if nobody does yet; raises StartupError. To be closed in any case."""
        self._users += 1
        if self._thread is None:
            self._thread = background_thread(self._run, "qlens-nats")
            self._thread.start()
            await asyncio.to_thread(self._started.wait)
        if self._unusable is not None:
            raise self._unusable

    async def close(self) -> None:
        """Leave. With the last user, what waits is sent in some moments, or else after the next start."""
        self._users -= 1
        if not self._users:
            await asyncio.to_thread(self._end)

    def _end(self) -> None:
        self._started.wait()
        if self._loop is not None:
            with suppress(RuntimeError):  # it is over already
                self._loop.call_soon_threadsafe(self._ending.set)
        assert self._thread is not None
        self._thread.join(self.outbox.config.close_seconds + GRACE_SECONDS)

    @property
    def waiting(self) -> int:
        """How many events are not sent, those of dead processes included."""
        return sum(source.spool.left.records for source in tuple(self._sources))

    @property
    def problem(self) -> str:
        """Why nothing, or not all, can be sent at present."""
        refused = next((source for source in tuple(self._sources) if source.why), None)
        if self.away or refused is None:
            return self.away
        return f"{self._aside} events are not taken: {refused.why}"

    @property
    def _aside(self) -> int:
        return sum(source.aside for source in tuple(self._sources))

    # --- on the thread -------------------------------------------------------------------------

    def _own(self) -> None:
        self.outbox.open()
        assert self.outbox.spool is not None
        self._sources.append(Source(self.outbox.spool))

    def _run(self) -> None:
        try:
            self._own()
        except StartupError as error:
            self._unusable = error
        except OSError as error:
            self._failed(f"the outbox {self.outbox.folder} cannot be opened: {error.strerror}")
        try:
            if self._unusable is None:
                asyncio.run(self._live())
        finally:
            self._started.set()
            self.outbox.close()
            for source in self._sources[1:]:
                source.spool.close()

    async def _live(self) -> None:
        self._loop, self._ending = asyncio.get_running_loop(), asyncio.Event()
        self._started.set()
        sending = asyncio.create_task(self._send())
        await self._ending.wait()
        await asyncio.wait({sending}, timeout=self.outbox.config.close_seconds if self.waiting else 0)
        sending.cancel()
        await asyncio.wait({sending})

    async def _send(self) -> None:
        while not self._is_over():
            try:
                await self._serve()
            except Refused as refused:
                self._failed(str(refused))
            except (*Away, ValueError, StartupError) as error:
                self._failed(str(error).removeprefix("nats: ") or "no answer in time")
            except Exception as error:
                log.exception("nats: %s cannot send", self.outbox.name)
                self._failed(f"it fails: {type(error).__name__}")
            else:
                continue
            await self._rest()

    async def _serve(self) -> None:
        """Send over one connection, until the configuration changes or it is over; raises what ends it else."""
        if not self._sources:
            self._own()
        config = self.outbox.config
        async with connected(config, f"qlens {self.outbox.name}") as link:
            await link.find_stream()
            while not self._is_over():
                if config is not self.outbox.config:
                    for source in self._sources:
                        source.look_again(now=True)
                    break
                spent = time.thread_time()
                is_full = await self._round(link, config)
                if (stuck := next((source for source in self._sources if source.is_stuck), None)) is not None:
                    self._failed(stuck.why)
                else:
                    self._recovered()
                if link.is_lost:
                    raise ConnectionError(link.trouble or "the connection is lost")
                if self._ending.is_set():
                    await asyncio.sleep(0)  # a round without messages waits for nothing
                else:
                    self._look_after()
                    # After an outage, half of the processor's time at most: calls need it too.
                    await asyncio.sleep(time.thread_time() - spent if is_full else LOOK_SECONDS)

    async def _round(self, link: Link, config: NatsConfig) -> bool:
        """Send once what each source has; whether one had as much as may be on its way."""
        is_full = False
        for source in tuple(self._sources):
            source.look_again()
            messages, has_more = source.filled(config.in_flight)
            is_full = is_full or has_more
            is_answered = True
            try:
                if messages:
                    is_answered = await link.deliver(messages, config.ack_seconds)
                    self._sent(source, messages, link.trouble or f"no acknowledgement within {config.ack_seconds:g} s")
            finally:
                done = source.done
                self._count(done)  # before they go: nobody sees that none waits and that one is not counted yet
                source.let_go(len(done))
            if not is_answered:
                # As good as no connection: the next one may be to a server that answers.
                raise ConnectionError(source.why or link.trouble or "no acknowledgement in time")
        self.outbox.count.waiting.set(self.waiting)
        if self._refusing and not any(source.why for source in self._sources):
            self._refusing = False
            log.warning("nats: %s: all events are taken again", self.outbox.name)
        return is_full

    def _sent(self, source: Source, messages: list[Message], silence: str) -> None:
        """Note what became of events; raises Refused when it is not the fault of their subjects."""
        why = next((message.refusal for message in messages if message.refusal and not message.done), silence)
        if source.sent(messages, why):
            raise Refused(why)
        if source.why and not self._refusing:
            self._refusing = True
            log.warning("nats: %s: events are not taken and wait: %s", self.outbox.name, why)

    def _count(self, gone: list[Message]) -> None:
        """Count what became of events."""
        for message in gone:
            if message.refusal is None:
                self.outbox.count.sent.inc()
            else:
                log.error("nats: event %s, %s, is lost: %s", message.id, message.subject, message.refusal)
                self.outbox.count.lost["refused"].inc()

    def _look_after(self) -> None:
        """Now and then, take what dead processes left, and leave what is empty."""
        for source in self._sources[1:]:
            if not source.spool.left.records:
                source.spool.close()
                self._sources.remove(source)
        now = time.monotonic()
        if now >= self._looked + ORPHAN_SECONDS or not self._looked:
            self._looked = now
            self._sources += [Source(spool) for spool in Spool.orphans(self.outbox.folder)]

    # --- its state -----------------------------------------------------------------------------

    def _is_over(self) -> bool:
        return self._ending.is_set() and (bool(self.away) or not any(source.unsent for source in tuple(self._sources)))

    async def _rest(self) -> None:
        seconds = self._wait * random.uniform(0.75, 1.25)  # noqa: S311 - no secret
        self._wait = min(self._wait * 2, LONGEST_WAIT_SECONDS)
        with suppress(TimeoutError):
            await asyncio.wait_for(self._ending.wait(), seconds)

    def _failed(self, problem: str) -> None:
        if not self.away:
            self.since = time.monotonic()
            log.warning("nats: %s cannot send, will try again: %s", self.outbox.name, problem)
        self.away = problem
        self.outbox.count.waiting.set(self.waiting)

    def _recovered(self) -> None:
        if self.away:
            log.warning("nats: %s sends again after %.1f s", self.outbox.name, time.monotonic() - self.since)
        self.away, self._wait = "", FIRST_WAIT_SECONDS
