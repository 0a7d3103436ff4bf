"""Events on disk from the moment they happen; what does not fit is counted and said."""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from attrs import define, field, frozen

from qlens import Event, Gateway, Receipt, Spool, SpoolSync, StartupError, fits
from qlens_plugins.observe.nats.messages import record
from qlens_plugins.observe.nats.settings import NatsConfig
from qlens_plugins.observe.nats.subjects import subject

log = logging.getLogger("qlens.nats")

SYNC_SECONDS = 5.0
"""How long the last sync is waited for."""
_RECEIPT, _RELOADED = "qlens.receipt", "qlens.config.reloaded"
_REMEMBERED = 4096
"""How many subjects are kept at most: identity providers may name tenants without end."""
# These mean that the path is wrong, and that waiting will not mend it.
_HOPELESS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG}


@frozen
class Counters:
    """Its metrics."""

    sent: Any
    lost: Any
    waiting: Any

    @classmethod
    def of(cls, gateway: Gateway, plugin: str) -> Counters:
        """Those of one plugin."""
        metrics = gateway.metrics
        lost = metrics.counter("qlens_nats_lost_total", "Events that never reach the stream.", ("plugin", "reason"))
        return cls(
            metrics.counter("qlens_nats_sent_total", "Events that the stream has.", ("plugin",)).labels(plugin),
            {reason: lost.labels(plugin, reason) for reason in ("full", "disk", "refused")},
            metrics.gauge("qlens_nats_waiting", "Events that wait to be sent.", ("plugin",)).labels(plugin),
        )


@define(eq=False)
class Outbox:
    """Keeps events until they are sent. The event loop puts them in, the thread of a shipper takes them out.

    Shared by the instances that follow each other over reloads.
    """

    folder: Path
    name: str
    count: Counters
    spool: Spool | None = field(default=None, init=False)
    syncing: SpoolSync | None = field(default=None, init=False)
    trouble: str = field(default="", init=False)
    """Why nothing more is kept at present."""
    lost: int = field(default=0, init=False)
    """How many events were lost since the trouble began."""
    config: NatsConfig = field(init=False)
    """The one that is in force."""
    _configs: list[NatsConfig] = field(factory=list, init=False)
    """Those of the instances that are open, the newest last."""
    _subjects: dict[tuple[str, str | None], bytes] = field(factory=dict, init=False)
    """By type and tenant; empty for those that are not wanted."""

    @property
    def unsynced(self) -> str | None:
        """Why nothing is brought to the disk at present."""
        problem = None if self.syncing is None else self.syncing.problem
        return None if problem is None else problem.strerror

    @contextmanager
    def under(self, config: NatsConfig) -> Iterator[None]:
        """Know of a configuration as long as this is open; it is in force once the gateway serves by it."""
        self._configs.append(config)
        if len(self._configs) == 1:
            self._follow(config)
        try:
            yield
        finally:
            # By identity: an equal one may be in force.
            self._configs = [each for each in self._configs if each is not config]
            if config is self.config and self._configs:
                self._follow(self._configs[-1])

    def _follow(self, config: NatsConfig) -> None:
        self.config = config
        self._subjects.clear()
        if self.spool is not None:
            self.spool.allow(config.spool_bytes)

    # --- on the event loop ---------------------------------------------------------------------

    def keep(self, receipt: Receipt) -> None:
        """Keep the event of a receipt."""
        tenant = receipt.caller.tenant
        found = self._subjects.get((_RECEIPT, tenant))
        if found is None:
            found = self._subject(_RECEIPT, tenant)
        if found:
            self._put(found, Event.of_receipt(receipt))

    def take(self, event: Event) -> None:
        """Keep an event."""
        if event.type == _RELOADED and self._configs[-1] is not self.config:
            self._follow(self._configs[-1])
        found = self._subjects.get((event.type, event.tenant))
        if found is None:
            found = self._subject(event.type, event.tenant)
        if found:
            self._put(found, event)

    def _subject(self, type_: str, tenant: str | None) -> bytes:
        config = self.config
        if len(self._subjects) >= _REMEMBERED:
            self._subjects.clear()
        wanted = fits(type_, config.events) and fits(tenant, config.tenants)
        found = subject(type_, tenant).encode() if wanted else b""
        self._subjects[type_, tenant] = found
        return found

    def _put(self, found: bytes, event: Event) -> None:
        spool, syncing = self.spool, self.syncing
        if spool is None or syncing is None:
            self._lose(OSError(errno.EIO, "it is not open"))
            return
        try:
            spool.append(record(found, event.id, event.cloudevent_json(self.config.source)))
        except OSError as error:
            self._lose(error)
            return
        if syncing.asleep:
            syncing.wake()
        if self.trouble:
            self._recovered()

    def _lose(self, error: OSError) -> None:
        self.count.lost["full" if error.errno == errno.ENOSPC else "disk"].inc()
        if not self.trouble:
            log.error("nats: the outbox %s takes nothing, events are lost: %s", self.folder, error.strerror)
        self.trouble = error.strerror or type(error).__name__
        self.lost += 1

    def _recovered(self) -> None:
        log.warning("nats: the outbox %s takes events again, %d are lost", self.folder, self.lost)
        self.trouble, self.lost = "", 0

    # --- on a thread ---------------------------------------------------------------------------

    def open(self) -> None:
        """Open the folder; raises StartupError when it cannot be used, and OSError when that may pass."""
        try:
            spool = Spool.open(self.folder, most_bytes=self.config.spool_bytes)
        except OSError as error:
            if error.errno not in _HOPELESS:
                raise
            raise StartupError(
                f"nats: the outbox {self.folder} cannot be used: {error.strerror}; make it and its folder writable, or "
                "name another one in `spool`"
            ) from error
        self.syncing = SpoolSync(spool)
        self.syncing.start()
        self.spool = spool

    def close(self) -> None:
        """Bring all to the disk, and leave it there for the next start."""
        spool, syncing = self.spool, self.syncing
        self.spool = self.syncing = None
        if syncing is not None:
            syncing.stop(SYNC_SECONDS)
        if spool is not None:
            spool.close()
