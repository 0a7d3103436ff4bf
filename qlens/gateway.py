"""The running whole: the current configuration, the lifespans of its plugins, and the change to the next one."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

from attrs import define, field

from qlens import dialects, returned, vocabularies
from qlens.advice import warnings
from qlens.alternative import Alternative
from qlens.audit import Actor, Audit, AuditEntry, AuditOutcome, AuditSink
from qlens.call import Call, Caller
from qlens.clock import Clock
from qlens.config import Config, Draft, Network
from qlens.crashes import censored
from qlens.drains import Drains
from qlens.errors import CallError, ConfigError, Fault, StartupError
from qlens.events import Events
from qlens.metrics import CallMetrics, Metrics
from qlens.models import Models
from qlens.object_ids import ObjectIds
from qlens.operations import OPERATIONS, Operation, Paths
from qlens.paths import Served, served
from qlens.pipeline import Pipeline
from qlens.placed import placed
from qlens.registry import Bound, Health, Instance, Provider, Registration, register
from qlens.roles import Roles
from qlens.upstream import Upstream

log = logging.getLogger("qlens")

OPEN_SECONDS = 60
"""How long a plugin's lifespan may take to open."""
CLOSE_SECONDS = 30
"""How long it may take to close: a ledger writes out what it still has."""
SETTLE_SECONDS = 5
"""How long the last receipts may take to settle when the gateway stops."""
_GIVE_UP_ROUNDS = 8


@define(eq=False)
class Generation:
    """One configuration while calls still use it."""

    registration: Registration
    pipeline: Pipeline
    client: Paths[Served]
    admin: Paths[Served]
    roles: Roles
    running: int = 0
    idle: asyncio.Event = field(factory=asyncio.Event)

    def enter(self) -> None:
        """Hold on to this configuration for one call."""
        if not self.running:
            self.idle.clear()
        self.running += 1

    def leave(self) -> None:
        """Let go of it."""
        self.running -= 1
        if not self.running:
            self.idle.set()

    async def settled(self) -> None:
        """Wait until none of its calls runs and every receipt has settled."""
        await self.idle.wait()
        while self.pipeline.settling:
            await asyncio.wait(set(self.pipeline.settling))


@define(eq=False)
class _Lifespan:
    """A plugin's lifespan, entered and left in one task, as task groups and cancel scopes need it."""

    instance: Instance
    _closing: asyncio.Event = field(factory=asyncio.Event)
    _task: asyncio.Task[None] | None = None

    async def open(self, manager: AbstractAsyncContextManager[None]) -> None:
        opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._hold(manager, opened), name=f"lifespan {self.instance.key}")
        seconds = getattr(self.instance.plugin, "open_seconds", OPEN_SECONDS)
        try:
            async with asyncio.timeout(seconds) as timer:
                await opened
        except (TimeoutError, asyncio.CancelledError) as error:
            await self._give_up()
            if not timer.expired():
                raise
            plugin = self.instance.entry.plugin
            raise StartupError(f"{plugin} did not open within {seconds:g} s") from error

    async def _hold(self, manager: AbstractAsyncContextManager[None], opened: asyncio.Future[None]) -> None:
        try:
            async with manager:
                opened.set_result(None)
                await self._closing.wait()
        except BaseException as error:  # whatever it is: somebody waits for it, and one plugin ends no process
            if not opened.done():
                opened.set_exception(error if isinstance(error, Exception) else _as_exception(error))
            elif not opened.cancelled():
                log.exception("%s failed while closing", self.instance.key)

    async def close(self) -> None:
        """Leave it; never raises, so that the others are left too."""
        if self._task is None:
            return
        self._closing.set()
        done, _ = await asyncio.wait({self._task}, timeout=CLOSE_SECONDS)
        if not done:
            log.error("%s did not close within %s s", self.instance.key, CLOSE_SECONDS)
            await self._give_up()

    async def _give_up(self) -> None:
        assert self._task is not None
        self._task.cancel()
        await asyncio.wait({self._task}, timeout=1)


def _as_exception(error: BaseException) -> Exception:
    """What is no Exception, as one."""
    cancelled = isinstance(error, asyncio.CancelledError)
    found = RuntimeError("it was cancelled" if cancelled else f"it raised {type(error).__name__}")
    found.__cause__ = error
    return found


def _lifespan(registration: Registration, instance: Instance) -> Bound | None:
    return next((hook for hook in registration.hooks.lifespan if hook.instance == instance.key), None)


def _keepers(registration: Registration) -> dict[str, Instance]:
    """The providers that keep objects for clients, by name."""
    return {
        instance.entry.name: instance
        for instance in registration.instances
        if instance.entry.stage == "provider" and getattr(instance.plugin, "objects", None)
    }


@define(eq=False)
class Gateway:
    """What plugins see of the gateway, and what the server runs calls with.

    `http` opens calls to URLs, `metrics` makes metrics, `stores` holds clients that several plugins share, `models`,
    `providers` and `roles` follow the current configuration, `clock` tells the time, `worker` is this process' number,
    `url` is where clients reach it, `audit` notes what operators change, `note` what commands do, `events` tells what
    happens.
    """

    clock: Clock = field(factory=Clock)
    worker: int = 0
    url: str = ""
    http: Upstream = field(factory=Upstream)
    metrics: Metrics = field(factory=Metrics)
    stores: dict[str, Any] = field(factory=dict)
    draining: bool = False
    expired: bool = False
    """Whether draining took too long and running calls are being cut off."""
    drains: Drains = field(factory=Drains)
    """The calls that go on without their client."""
    calls: CallMetrics = field(init=False)
    audit: Audit = field(init=False)
    events: Events = field(init=False)
    _current: Generation | None = field(default=None, init=False)
    _seen: Registration | None = field(default=None, init=False)
    _command: str | None = field(default=None, init=False)
    """The instance whose command runs."""
    _older: list[Generation] = field(factory=list, init=False)
    _retiring: set[asyncio.Task[None]] = field(factory=set, init=False)
    _lifespans: list[_Lifespan] = field(factory=list, init=False)
    _changing: asyncio.Lock = field(factory=asyncio.Lock, init=False)

    def __attrs_post_init__(self) -> None:
        self.calls = CallMetrics(self.metrics)
        self.audit = Audit(self.clock)
        self.events = Events(self.clock, self.calls.failures)

    # --- what plugins see ----------------------------------------------------------------------

    @property
    def models(self) -> Models:
        """The models of the current configuration, by public name."""
        return self._registration.models

    @property
    def providers(self) -> Mapping[str, Provider]:
        """The providers of the current configuration, by name."""
        return self._registration.providers

    @property
    def config(self) -> Config:
        """The current configuration."""
        return self._registration.config

    @property
    def roles(self) -> Roles:
        """The roles of the current configuration, and what they open."""
        return Roles.of(self.config.server.roles)

    @property
    def _registration(self) -> Registration:
        assert self._seen is not None, "the gateway has no configuration yet"
        return self._seen

    @property
    def registration(self) -> Registration:
        """The plugins of the current configuration."""
        return self._registration

    @asynccontextmanager
    async def reach(self, network: Network | None) -> AsyncIterator[Upstream]:
        """The connections of a plugin: the gateway's own, or, with a network of its own, others that close with it.

        Raises StartupError when the files of its `tls` cannot be used.
        """
        if network is None:
            yield self.http
            return
        http = await Upstream.through(network, self.http.unsent, self.http.bounds)
        try:
            yield http
        finally:
            await http.aclose()

    async def note(
        self,
        action: str,
        object: str,  # noqa: A002 - the word for it
        *,
        before: Mapping[str, Any] | None = None,
        after: Mapping[str, Any] | None = None,
        tenant: str | None = None,
        outcome: AuditOutcome = "done",
        but: AuditSink | None = None,
    ) -> AuditEntry:
        """Note what a command does, before that takes effect, as done by the user who runs it.

        It goes to the audit logs of the configuration, or is a line of the log `qlens.audit`, on standard error, where
        no plugin keeps one. Raises StartupError when it cannot be noted: then do not do it. The rest is as in
        `audit.record`; a plugin that names its own database as `but` is not asked for its log.
        """
        registration, opened = self._registration, list[_Lifespan]()
        instances = {instance.key: instance for instance in registration.instances}
        try:
            for hook in registration.hooks.audit_log:
                if but is None or hook.instance != self._command:
                    await self._open_log(instances[hook.instance], hook, opened)
            return await self.audit.record(
                *(Actor.user(), action, object), before=before, after=after, tenant=tenant, outcome=outcome, but=but
            )
        except CallError as error:
            raise StartupError(error.message) from error
        finally:
            await self._close(opened)

    async def _open_log(self, instance: Instance, hook: Bound, opened: list[_Lifespan]) -> None:
        if instance.entry.missing_env:
            raise StartupError(
                [Fault(instance.entry.path, "has the audit log, and names environment variables that are not set")]
            )
        await self._open(instance, hook, opened)

    # --- what the server uses ------------------------------------------------------------------

    @property
    def current(self) -> Generation:
        """The configuration that new calls get."""
        assert self._current is not None, "the gateway is not started"
        return self._current

    @property
    def ready(self) -> bool:
        """Whether new calls are welcome."""
        return self._current is not None and not self.draining

    def health(self) -> dict[str, Health]:
        """How every plugin is that says so, by stage and name."""
        found = {}
        # During a reload the next configuration is seen by plugins already, but it does not serve yet.
        registration = self._registration if self._current is None else self._current.registration
        for hook in registration.hooks.health:
            try:
                found[hook.instance] = returned.health(hook.fn())
            except (Exception, SystemExit) as error:
                self.calls.failures.labels(hook.plugin, "health").inc()
                found[hook.instance] = Health(False, f"health failed: {type(error).__name__}")
        return found

    def banner(self) -> list[str]:
        """What the plugins tell the operator at start-up."""
        lines: list[str] = []
        for hook in self._registration.hooks.banner:
            with placed(self._registration, hook.instance, "banner"):
                lines += hook.fn()
        return lines

    # --- configurations ------------------------------------------------------------------------

    async def start(self, registration: Registration) -> None:
        """Open a first configuration; raises StartupError with every fault, and leaves nothing open then."""
        for operation in OPERATIONS:
            if operation.dialect:
                dialects.named(operation.dialect)  # imported now, so that no call waits for it
        async with self._changing:
            if (network := registration.config.server.network) is not None:
                try:
                    self.http = await Upstream.through(network, self.http.unsent, self.http.bounds)
                except StartupError as error:
                    raise StartupError([Fault("server", fault.message) for fault in error.faults]) from None
            await self._change(registration)
        self.calls.loads.labels("loaded").inc()

    async def load(self, read: Callable[[], Draft]) -> None:
        """Read a configuration, in a thread, and change to it; raises what reading it does, and as `reload` does."""
        try:
            found = await asyncio.to_thread(read)
        except StartupError as error:
            self._rejected(error)
            raise
        await self.reload(found)

    async def reload(self, found: Draft) -> None:
        """Change to another configuration; raises StartupError and keeps the present one when that fails."""
        async with self._changing:
            try:
                registration = register(found, self._registration)
                self._refuse_moves(found.config)
                await self._change(registration)
            except StartupError as error:
                self._rejected(error)
                raise
        self.calls.loads.labels("loaded").inc()
        version = self.config.version
        self.events.announce("qlens.config.reloaded", version, {"version": version, "worker": self.worker})

    def _rejected(self, error: StartupError) -> None:
        """Tell that a configuration is not taken, and where its faults are: what stands there may be a secret."""
        self.calls.loads.labels("refused").inc()
        version, places = self.config.version, sorted({fault.path for fault in error.faults})
        data = {"version": version, "worker": self.worker, "faults": places}
        self.events.announce("qlens.config.rejected", version, data)

    def _refuse_moves(self, config: Config) -> None:
        old, new = self.config.server, config.server
        faults = [
            Fault(f"server.{name}", "cannot change while the gateway runs; restart it, or set it back")
            for name in ("host", "port", "workers", "pin_workers", "admin", "access_log", "network")
            if getattr(old, name) != getattr(new, name)
        ]
        if faults:
            raise ConfigError(faults)

    async def _change(self, registration: Registration) -> None:
        old = self._seen
        self._seen = registration
        opened: list[_Lifespan] = []
        try:
            if os.environ.get(vocabularies.FOLDER):
                targets = [target for model in registration.models.values() for target in model.candidates]
                await asyncio.to_thread(vocabularies.load, [target.base_model or target.model for target in targets])
            generation = self._generation(registration)
            self._adopt(old, registration)
            for instance in registration.new:
                await self._open(instance, _lifespan(registration, instance), opened)
        except BaseException:
            self._seen = old
            await self._close(opened)
            raise
        self._lifespans.extend(opened)
        if self._current is not None:
            self._older.append(self._current)
            self._retire(self._current)
        self._current = generation
        self.http.bounds.answer_bytes = registration.config.server.max_answer_bytes
        self.events.all_listen = True
        for warning in warnings(registration) if self.worker == 0 else ():
            log.warning("%s", warning)

    def _generation(self, registration: Registration) -> Generation:
        keepers = _keepers(registration)
        pipeline = Pipeline(
            version=registration.config.version,
            models=registration.models,
            hooks=registration.hooks,
            providers=registration.providers,
            ids=ObjectIds.of(registration.config, keepers),
            metrics=self.calls,
            stopping=lambda: self.expired,
            drains=self.drains,
            unsent=self.http.unsent,
        )
        for name in keepers:
            if not pipeline.ids.keeps(name):
                log.info("%s has no secret to seal ids with: nothing it keeps can be asked for without id_key", name)
        client, admin = served(self, registration)
        generation = Generation(registration, pipeline, client, admin, Roles.of(registration.config.server.roles))
        generation.idle.set()
        return generation

    @staticmethod
    def _adopt(old: Registration | None, registration: Registration) -> None:
        before = {instance.key: instance for instance in old.instances} if old else {}
        adopters = {hook.instance: hook for hook in registration.hooks.adopt}
        for instance in registration.new:
            replaced = before.get(instance.key)
            if replaced is not None and replaced.cls is instance.cls and instance.key in adopters:
                try:
                    adopters[instance.key].fn(replaced.plugin)
                except (Exception, SystemExit) as error:
                    said = censored(f"{type(error).__name__}: {error}", instance.config)
                    message = f"{instance.entry.plugin} cannot adopt: {said}"
                    raise StartupError([Fault(instance.entry.path, message)]) from error

    async def _open(self, instance: Instance, hook: Bound | None, opened: list[_Lifespan]) -> None:
        lifespan = _Lifespan(instance)
        try:
            if hook is not None:
                await lifespan.open(hook.fn(self))
        except StartupError as error:
            raise StartupError(
                [
                    Fault(fault.path or instance.entry.path, censored(fault.message, instance.config))
                    for fault in error.faults
                ]
            ) from error
        except (Exception, SystemExit) as error:
            log.exception("%s failed to open", instance.key)
            said = censored(f"{type(error).__name__}: {error}", instance.config)
            message = f"{instance.entry.plugin} failed to open: {said}"
            raise StartupError([Fault(instance.entry.path, message)]) from error
        opened.append(lifespan)

    def _retire(self, generation: Generation) -> None:
        """Close what only an old configuration uses, once its last call has settled."""

        async def wait() -> None:
            await generation.settled()
            self._older.remove(generation)
            used = {id(i) for g in (*self._older, self.current) for i in g.registration.instances}
            unused = [lifespan for lifespan in self._lifespans if id(lifespan.instance) not in used]
            self._lifespans = [lifespan for lifespan in self._lifespans if lifespan not in unused]
            await self._close(unused)

        task = asyncio.create_task(wait(), name="retire configuration")
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)

    @staticmethod
    async def _close(lifespans: list[_Lifespan]) -> None:
        for lifespan in reversed(lifespans):
            await lifespan.close()

    # --- without serving -----------------------------------------------------------------------

    def view(self, registration: Registration) -> None:
        """Show plugins a configuration that is not served."""
        self._seen = registration

    @asynccontextmanager
    async def only(self, registration: Registration, key: str) -> AsyncIterator[None]:
        """Open the lifespan of one instance alone, for a command."""
        self._seen, self._command = registration, key
        instance = next(instance for instance in registration.instances if instance.key == key)
        opened: list[_Lifespan] = []
        await self._open(instance, _lifespan(registration, instance), opened)
        try:
            yield
        finally:
            await self._close(opened)

    @staticmethod
    def alternative(path: Path) -> Alternative:
        """Another configuration, to ask what calls would cost under it; raises ConfigError with every fault."""
        return Alternative.read(path)

    async def opened(self, registration: Registration, operation: Operation, raw: bytes, caller: Caller) -> Call:
        """A call that is open and does not run, for `qlens explain`."""

        async def reader() -> bytes:
            return raw

        now = asyncio.get_running_loop().time()
        call = Call(
            id="explain", operation=operation, path=operation.path, path_params={}, query={},
            headers={"content-type": "application/json"}, peer=None, credential=None, started=now,
            wall_ns=int(self.clock.time() * 1e9), deadline=now + 60, reader=reader, caller=caller,
        )  # fmt: skip
        await self._generation(registration).pipeline.open(call)
        return call

    # --- the end -------------------------------------------------------------------------------

    async def settled(self) -> None:
        """Wait until no call runs and every receipt has settled."""
        for generation in self._generations():
            await generation.settled()

    def _generations(self) -> tuple[Generation, ...]:
        return (*self._older, *((self._current,) if self._current else ()))

    async def _give_up_settling(self) -> None:
        """Cancel the hooks that hang, one after another: those behind them settle still."""
        for _ in range(_GIVE_UP_ROUNDS):
            hanging = {task for generation in self._generations() for task in generation.pipeline.settling}
            if not hanging:
                return
            log.error("%d receipts or stored answers hang in a plugin and are given up", len(hanging))
            for task in hanging:
                task.cancel()
            await asyncio.wait(hanging, timeout=1)

    async def stop(self) -> None:
        """Close everything, in reverse order, after the last settle; what hangs is given up after a while."""
        self.draining = True
        try:
            await asyncio.wait_for(self.settled(), SETTLE_SECONDS)
        except TimeoutError:
            await self._give_up_settling()
        if self._retiring:
            await asyncio.wait(set(self._retiring), timeout=CLOSE_SECONDS)
        lifespans, self._lifespans = self._lifespans, []
        self.events.all_listen = False
        await self._close(lifespans)
        await self.http.aclose()
