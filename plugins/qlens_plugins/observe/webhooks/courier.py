"""Takes events, and delivers each to its endpoints until they have it or the time is over."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter as Counts
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from attrs import define, field, frozen
from prometheus_client import Counter, Gauge

from qlens import Event, Gateway, Outbound, OutboundFailed, Received, Spool, StartupError
from qlens_plugins.observe.webhooks.records import Bounds, Count, Delivery, Ended
from qlens_plugins.observe.webhooks.route import Route
from qlens_plugins.observe.webhooks.schedule import next_try
from qlens_plugins.observe.webhooks.settings import WebhooksConfig
from qlens_plugins.observe.webhooks.statements import record
from qlens_plugins.observe.webhooks.store import Store, StoreAway

log = logging.getLogger("qlens.webhooks")

GATHER_SECONDS = 0.02
"""How long an event waits for others to be taken in with it."""
LOOK_SECONDS = 1.0
"""Between two looks into the file, for what other processes and commands have put there."""
AWAY_SECONDS = 2.0
"""Between two tries while the file cannot be used."""
END_SECONDS = 5.0
"""How long the end waits for deliveries under way; those that are cut off are made again, under the same id."""
LEASE_MARGIN_SECONDS = 5.0
_REMEMBERED = 4096
_GONE = 410


@frozen
class _Metrics:
    delivered: Counter
    failed: Counter
    dead: Counter
    lost: Counter
    waiting: Gauge

    @classmethod
    def of(cls, gateway: Gateway) -> _Metrics:
        metrics, endpoint = gateway.metrics, ("endpoint",)
        return cls(
            metrics.counter("qlens_webhooks_delivered_total", "Events that an endpoint has taken.", endpoint),
            metrics.counter("qlens_webhooks_failures_total", "Tries to deliver an event that failed.", endpoint),
            metrics.counter("qlens_webhooks_dead_total", "Events given up after the last try.", endpoint),
            metrics.counter("qlens_webhooks_lost_total", "Events for which there was no room.", ("endpoint", "reason")),
            metrics.gauge("qlens_webhooks_waiting", "Events that wait to be delivered, as of worker 0.", endpoint),
        )


@define(eq=False)
class Courier:
    """Keeps events on disk from the moment they are published, and delivers them at least once.

    Shared by the instances that follow each other over reloads; it ends with the last that opened it.
    """

    gateway: Gateway
    path: Path
    config: WebhooksConfig = field(init=False)
    """The one that was opened last, of those in use."""
    trouble: str = field(default="", init=False)
    """Why nothing can be kept or delivered at present."""
    counts: Mapping[str, Count] = field(factory=dict, init=False)
    problems: dict[str, str] = field(factory=dict, init=False)
    """Why the last try failed, by endpoint; nothing where it succeeded."""
    lost: dict[str, int] = field(factory=dict, init=False)
    """How many events there was no room for since the start."""
    full: set[str] = field(factory=set, init=False)
    """The endpoints for which there is none at present."""
    _configs: list[WebhooksConfig] = field(factory=list, init=False)
    """In use, in the order in which they came: a reload that is refused takes its own away again."""
    _routes: dict[str, Route] = field(factory=dict, init=False)
    _chosen: dict[tuple[str, str | None], tuple[str, ...]] = field(factory=dict, init=False)
    _metrics: _Metrics = field(init=False)
    _store: Store = field(init=False)
    _spool: Spool | None = field(default=None, init=False)
    _outbound: Outbound | None = field(default=None, init=False)
    _flying: set[tuple[str, str]] = field(factory=set, init=False)
    """The deliveries under way, by endpoint and event: none is made twice at a time, whatever the clock does."""
    _tasks: set[asyncio.Task[None]] = field(factory=set, init=False)
    _ended: list[Ended] = field(factory=list, init=False)
    _wake: asyncio.Event = field(factory=asyncio.Event, init=False)
    _closing: asyncio.Event = field(factory=asyncio.Event, init=False)
    _loop: asyncio.Task[None] | None = field(default=None, init=False)

    def __attrs_post_init__(self) -> None:
        self._metrics = _Metrics.of(self.gateway)
        self._store = Store(self.path, Bounds(0, 0), 0)

    # --- its life ------------------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        """Whether its last user has left."""
        return self._closing.is_set()

    async def open(self, config: WebhooksConfig) -> None:
        """Start, or go on under another configuration; raises StartupError when the file is unusable."""
        self._configs.append(config)
        await self._follow(config)
        if len(self._configs) > 1:
            return
        folder = self.path.with_name(f"{self.path.name}.spool")
        try:
            try:
                await self._store.open()
            except StoreAway as away:
                self._failed(str(away))
            self._spool = await self._store.open_spools(folder)
        except OSError as error:
            await self._end()
            raise StartupError(
                f"webhooks: {folder} cannot be used: {error.strerror}; change `url`, or mend it"
            ) from error
        except BaseException:
            await self._end()
            raise
        self._loop = asyncio.create_task(self._run(), name="webhooks")

    async def close(self, config: WebhooksConfig) -> None:
        """Leave. With the last, what is under way is brought to its end, and all else is kept for the next start."""
        self._configs.remove(config)
        if self._configs:
            await self._follow(self._configs[-1])
            return
        self._closing.set()
        self._wake.set()
        if self._loop is not None:
            await self._loop
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=END_SECONDS)
        for task in tuple(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        try:
            await self._store.turn(self._ended, {}, self.gateway.clock.time())
        except (StoreAway, OSError) as error:  # the spool keeps what came, and what was claimed is due again soon
            log.error("webhooks %s: how the last deliveries ended cannot be noted: %s", self.path, error)
        await self._end()

    async def _end(self) -> None:
        self._closing.set()
        await self._store.close()
        if self._outbound is not None:
            await self._outbound.aclose()

    async def _follow(self, config: WebhooksConfig) -> None:
        self.config = config
        self._routes = {endpoint.name: Route.to(endpoint) for endpoint in config.endpoints}
        self._chosen.clear()
        self._store.bounds = Bounds(config.queue_size, config.dead_size)
        self._store.lease_seconds = config.timeout_seconds + LEASE_MARGIN_SECONDS
        self.problems = {name: problem for name, problem in self.problems.items() if name in self._routes}
        self._wake.set()
        outbound = self._outbound
        if outbound is None or outbound.reach != config.reach:
            self._outbound = Outbound(config.reach)
            if outbound is not None:
                await outbound.aclose()

    # --- taking events -------------------------------------------------------------------------

    def take(self, event: Event) -> None:
        """Keep an event for its endpoints; it survives the process from here on."""
        names = self.wanting(event.type, event.tenant)
        if not names or self._spool is None:
            return
        body = event.cloudevent_json(self.config.source)
        now = self.gateway.clock.time()
        try:
            self._spool.append(record(event, names, now, body))
        except OSError as error:
            for name in names:
                self._lose(name, "spool", 1, f"the spool takes nothing: {error.strerror}")
            return
        if not self._wake.is_set():
            self._wake.set()

    def wanting(self, type_: str, tenant: str | None) -> tuple[str, ...]:
        """The endpoints that are sent events of a type and a tenant."""
        names = self._chosen.get((type_, tenant))
        if names is None:
            if len(self._chosen) >= _REMEMBERED:  # tenants that an identity provider names may be without end
                self._chosen.clear()
            names = tuple(each.name for each in self.config.endpoints if each.wants(type_, tenant))
            self._chosen[type_, tenant] = names
        return names

    def _lose(self, endpoint: str, reason: str, count: int, why: str) -> None:
        if endpoint not in self.full:
            log.error("webhooks: there is no room for more events for %s, and they are lost: %s", endpoint, why)
        self.full.add(endpoint)
        self.lost[endpoint] = self.lost.get(endpoint, 0) + count
        self._metrics.lost.labels(endpoint, reason).inc(count)

    def wake(self) -> None:
        """Look into the file now."""
        self._wake.set()

    # --- delivering ----------------------------------------------------------------------------

    async def _run(self) -> None:
        while not self._closing.is_set():
            self._wake.clear()
            rest = await self._turn()
            # Events that come must not hurry a file that cannot be used.
            awaited = self._closing if self.trouble else self._wake
            with suppress(TimeoutError):
                await asyncio.wait_for(awaited.wait(), rest)
                await asyncio.sleep(GATHER_SECONDS)

    async def _turn(self) -> float:
        """One round; the seconds until the next, unless something happens before."""
        now = self.gateway.clock.time()
        busy = Counts(name for name, _ in self._flying)
        free = {name: max(0, self.config.concurrency - busy[name]) for name in self._routes}
        ended, self._ended = self._ended, []
        try:
            turn = await self._store.turn(ended, free, now)
        except Exception as error:  # noqa: BLE001 - whatever it is, events stay where they are, and the reason is shown
            self._ended = ended + self._ended
            self._failed(str(error))
            return AWAY_SECONDS
        self._recovered()
        for (endpoint, reason), count in turn.lost.items():
            if count:
                self._lose(endpoint, reason, count, f"as many wait as may ({reason})")
        if turn.counts is not None:
            self._counted(turn.counts)
        for delivery in turn.claimed:
            self._start(delivery)
        if turn.more:
            return 0
        return LOOK_SECONDS if turn.next_due is None else min(LOOK_SECONDS, max(0.0, turn.next_due - now))

    def _start(self, delivery: Delivery) -> None:
        which = delivery.endpoint, delivery.event
        if which in self._flying:
            return
        self._flying.add(which)
        task = asyncio.create_task(self._deliver(delivery), name=f"webhook to {delivery.endpoint}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _deliver(self, delivery: Delivery) -> None:
        ended = Ended(delivery, "untried", self.gateway.clock.time())
        try:
            ended = await self._tried(delivery)
        finally:
            self._flying.discard((delivery.endpoint, delivery.event))
            self._ended.append(ended)
            self._wake.set()

    async def _tried(self, delivery: Delivery) -> Ended:
        name = delivery.endpoint
        route = self._routes.get(name)
        if route is None:  # it left the configuration a moment ago
            return Ended(delivery, "untried", self.gateway.clock.time())
        received, problem = None, ""
        assert self._outbound is not None
        try:
            received = await route.send(
                self._outbound, delivery.event, self.gateway.clock.time(), delivery.body, self.config.timeout_seconds
            )
        except OutboundFailed as failure:
            problem = str(failure)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is no reason to lose the event
            log.error("webhooks: event %s cannot be sent to %s: %s", delivery.event, name, type(error).__name__)
            problem = f"it cannot be sent: {type(error).__name__}"
        now = self.gateway.clock.time()
        if received is not None and 200 <= received.status < 300:
            self._metrics.delivered.labels(name).inc()
            self.problems.pop(name, None)
            return Ended(delivery, "delivered", now)
        return self._not_taken(delivery, now, problem or _refusal(received), received)

    def _not_taken(self, delivery: Delivery, now: float, problem: str, received: Received | None) -> Ended:
        name = delivery.endpoint
        self._metrics.failed.labels(name).inc()
        if name not in self.problems:
            log.warning("webhooks: %s does not take events: %s", name, problem)
        self.problems[name] = problem
        until = delivery.since + self.config.give_up_hours * 3600
        due = None
        if received is None or received.status != _GONE:
            due = next_try(delivery.attempts + 1, now, until, _asked_wait(received))
        if due is not None:
            return Ended(delivery, "again", due, problem)
        self._metrics.dead.labels(name).inc()
        log.error("webhooks: event %s for %s is given up: %s", delivery.event, name, problem)
        return Ended(delivery, "dead", now, problem)

    # --- how it is -----------------------------------------------------------------------------

    def _counted(self, counts: Mapping[str, Count]) -> None:
        self.counts = counts
        for name in self._routes:
            count = counts.get(name, Count())
            if count.waiting < self.config.queue_size:
                self.full.discard(name)
            if not self.gateway.worker:  # all workers see one file, and their gauges are added up
                self._metrics.waiting.labels(name).set(count.waiting)

    def _failed(self, problem: str) -> None:
        if not self.trouble:
            log.error("webhooks %s: %s; will try again", self.path, problem)
        self.trouble = problem

    def _recovered(self) -> None:
        if self.trouble:
            log.warning("webhooks %s: works again", self.path)
        self.trouble = ""


def _refusal(received: Received | None) -> str:
    status = 0 if received is None else received.status
    moved = "; redirects are not followed" if 300 <= status < 400 else ""
    return f"answered with status {status}{moved}"


def _asked_wait(received: Received | None) -> float | None:
    """How long the receiver wants to be left alone, in seconds."""
    value = "" if received is None else received.headers.get("retry-after", "")
    return float(value) if value.isascii() and value.isdigit() and len(value) < 10 else None
