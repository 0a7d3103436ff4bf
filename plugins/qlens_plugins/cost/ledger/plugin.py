"""Keeps a receipt of every call in SQLite or PostgreSQL, exactly once."""

from __future__ import annotations

import asyncio
import sys
import time
from argparse import Namespace
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from attrs import define, evolve, field, frozen, validators

from qlens import Call, Command, Endpoint, Health, Receipt, Unavailable, Url, hookimpl
from qlens_plugins.cost.ledger import analytics
from qlens_plugins.cost.ledger.journal import Journal
from qlens_plugins.cost.ledger.news import News
from qlens_plugins.cost.ledger.places import check, store_at
from qlens_plugins.cost.ledger.reader import Reader
from qlens_plugins.cost.ledger.rows import DAY_NS
from qlens_plugins.cost.ledger.spent import spent
from qlens_plugins.cost.ledger.sqlite import SqliteStore
from qlens_plugins.cost.ledger.store import Store
from qlens_plugins.cost.ledger.unwritten import spool_of
from qlens_plugins.cost.ledger.versions import note_upgrade, version
from qlens_plugins.cost.ledger.writer import Begun, Writer

if TYPE_CHECKING:
    from attrs import Attribute

    from qlens import Gateway

RETRY_SECONDS = 5.0
"""When a caller that found the ledger full may come back."""


def _supported(config: LedgerConfig, attribute: Attribute[Any], value: Url) -> None:
    check(value)


@frozen
class LedgerConfig:
    """Keeps a receipt of every call in SQLite or PostgreSQL, exactly once, written off the call's way."""

    url: Url = field(default=Url("sqlite:///qlens.db"), validator=_supported)
    """Where it is: `sqlite:///FILE`, a relative one in the folder of the YAML file, or
    `postgresql://USER:PASSWORD@HOST:PORT/DATABASE`, which needs the extra `postgres`."""
    batch_size: int = field(default=500, validator=validators.ge(1))
    """Most receipts in one transaction."""
    flush_seconds: float = field(default=0.2, validator=validators.ge(0))
    """How long a receipt waits for others to be written with it."""
    spool: Path | None = None
    """Folder for what is not in the database yet, on a disk of this machine; without it `FILE.spool` beside the SQLite
    file, or `NAME.spool` beside the YAML file, by the plugin's name."""
    spool_bytes: int = field(default=1024 * 1024 * 1024, validator=validators.ge(1))
    """Most bytes that may wait in a process' part of it: a receipt takes about 600."""
    sync: Literal["group", "call"] = "group"
    """`group` brings records to the disk every 10 ms; with `call` each call waits for that before it is sent, so that a
    power cut forgets none."""
    queue_size: int = field(default=100_000, validator=validators.ge(1))
    """Most receipts that may wait in memory while the spool takes nothing, calls on their way included."""
    when_full: Literal["refuse", "drop"] = "refuse"
    """What happens when neither spool nor database can be written: `refuse` answers calls with 503, `drop` serves them
    and counts what is not recorded."""
    keep_days: int | None = field(default=None, validator=validators.optional(validators.ge(1)))
    """For how many days receipts are kept; None: for good, as roll-ups always are. PostgreSQL drops whole months."""
    close_seconds: float = field(default=10, validator=validators.ge(0))
    """How long a shutdown waits for the last receipts to be written."""


@define(eq=False)
class Ledger:
    """The plugin: hands receipts to a writer, which it shares with the instances before and after a reload."""

    config: LedgerConfig
    name: str
    _writer: Writer | None = field(default=None, init=False)
    _reader: Reader | None = field(default=None, init=False)
    _found: int = field(default=0, init=False)
    """The version that the tables had when a command began."""
    _gateway: Gateway | None = field(default=None, init=False)

    Config = LedgerConfig
    shares = "store"
    takes_once = True
    open_seconds = 900  # it upgrades large tables before it serves; cut off, it would begin anew with every start
    spent = spent

    @hookimpl
    def adopt(self, old: Ledger) -> None:
        """Go on with the old instance's writer: a second one could not know what waits in the first one's queue."""
        self._writer, self._reader = old._writer, old._reader

    @hookimpl
    @asynccontextmanager
    async def lifespan(self, gateway: Gateway) -> AsyncIterator[None]:
        """Write as long as anyone serves; what is left is written before the last instance ends."""
        store = self._store(gateway)
        folder = self._spool_folder(gateway, store)
        if self._writer is None or self._writer.closed or not self._writer.is_for(store, folder):
            self._writer = _new_writer(store, folder, gateway)
        writer = self._writer
        writer.batch_size, writer.flush_seconds = self.config.batch_size, self.config.flush_seconds
        writer.queue_size, writer.may_drop = self.config.queue_size, self.config.when_full == "drop"
        writer.journal.most_bytes = self.config.spool_bytes
        writer.keep_days = self.config.keep_days
        self._gateway = gateway
        if self._reader is None or self._reader.store is not writer.store:
            self._reader = Reader(writer.store)
        self._found = 0 if gateway.url else await asyncio.to_thread(version, store)
        await writer.open()
        try:
            if self._found:  # a command runs, whichever: tables that were there are others' as well
                await note_upgrade(gateway, store, self._found)
            yield
        finally:
            await writer.close(self.config.close_seconds)

    def _store(self, gateway: Gateway) -> Store:
        # The default is not in the YAML file, so nothing has put it in that file's folder yet.
        return store_at(self.config.url, gateway.config.folder)

    def _spool_folder(self, gateway: Gateway, store: Store) -> Path:
        if self.config.spool is not None:
            return self.config.spool
        if isinstance(store, SqliteStore):
            return spool_of(store.path)
        return gateway.config.folder / f"{self.name}.spool"

    @property
    def writer(self) -> Writer:
        """The writer, from the time the lifespan has opened."""
        assert self._writer is not None, "the ledger is not open"
        return self._writer

    @property
    def reader(self) -> Reader:
        """The reader, from the time the lifespan has opened."""
        assert self._reader is not None, "the ledger is not open"
        return self._reader

    @property
    def gateway(self) -> Gateway:
        """The gateway, from the time the lifespan has opened."""
        assert self._gateway is not None, "the ledger is not open"
        return self._gateway

    @hookimpl
    async def admit(self, call: Call) -> Begun | None:
        """Note that the call may be sent: what a provider is paid for must be accounted for, whatever happens."""
        if call.operation.runs == "local":
            return None
        writer, config = self._writer, self.config
        assert writer is not None
        begun = writer.begin(call)
        if begun is None and config.when_full == "refuse":
            raise _unavailable()
        if config.sync == "call" and isinstance(begun, tuple):
            try:
                await writer.synced(call, begun)
            except OSError as error:
                raise _unavailable() from error
        return begun

    @hookimpl
    async def settle(self, call: Call, receipt: Receipt, hold: Begun | None) -> None:
        """Keep the receipt; refused calls are only counted, or a flood of them would fill the disk."""
        writer = self._writer
        assert writer is not None
        if receipt.id != call.id:
            # Of a batch that is over. What was forgotten since would be counted a second time.
            if not self._is_forgotten(receipt) and not writer.keep(receipt):
                writer.dropped(1)
            return
        if receipt.outcome == "rejected":
            writer.count(receipt)
            if hold is not None:
                writer.void(receipt.id, hold)
        elif writer.keep(receipt, hold):
            return
        elif self.config.when_full == "drop":
            writer.dropped(1)
        else:
            # It ended before it had a place, so nothing was sent and nothing is owed.
            writer.count(receipt)

    def _is_forgotten(self, receipt: Receipt) -> bool:
        days = self.config.keep_days
        return days is not None and receipt.wall_ns < (time.time_ns() // DAY_NS - days) * DAY_NS

    @hookimpl
    def health(self) -> Health:
        """Whether receipts reach the file, and how many wait."""
        writer, journal = self.writer, self.writer.journal
        problems = []
        if writer.problem is not None:
            seconds = time.monotonic() - writer.since
            problems.append(f"cannot write {writer.store.name} since {seconds:.0f} s: {writer.problem}")
        if journal.problem is not None:
            problems.append(f"the spool cannot be used: {journal.problem}; {journal.in_memory} receipts are in memory")
        return Health(not problems, "; ".join([*problems, f"{writer.waiting} receipts wait"]))

    @hookimpl
    def endpoints(self) -> Iterable[Endpoint]:
        """Questions about usage: OpenAI's `/v1/organization/...`, and `/v1/usage/...`."""
        return analytics.endpoints(self)

    @hookimpl
    def commands(self) -> Iterable[Command]:
        """`qlens ledger`, `qlens usage`, `qlens reconcile` and `qlens what-if`."""
        from qlens_plugins.cost.ledger import reconcile, upkeep, usage, what_if  # not for those that serve

        async def run(gateway: Gateway, args: Namespace) -> int:
            return await usage.run(self.writer.store, args)

        yield upkeep.command(self._store, lambda: self._found, self._caught_up)
        yield self._reading(Command("usage", usage.HELP, usage.add_arguments, run))
        yield self._reading(reconcile.command(lambda: self.writer.store))
        yield self._reading(what_if.command(lambda: self.writer.store))

    def _reading(self, command: Command) -> Command:
        """A command that reads what there is, also what dead processes left."""

        async def run(gateway: Gateway, args: Namespace) -> int:
            await self._caught_up()
            return await command.run(gateway, args)

        return evolve(command, run=run)

    async def _caught_up(self) -> None:
        """Wait until what dead processes left is in the database, or say how much of it is not."""
        writer = self.writer
        if left := await writer.caught_up():
            reason = writer.problem or writer.journal.problem or "it takes too long to write them"
            sys.stderr.write(
                f"qlens: the ledger {writer.store}: up to {left} receipts of a gateway that died wait in "
                f"{writer.journal.folder}, and this does not have them: {reason}\n"
            )


def _unavailable() -> Unavailable:
    return Unavailable(
        "The ledger cannot take more receipts at present, so no further call is accepted. Please try again later.",
        code="ledger_unavailable",
        retry_after=RETRY_SECONDS,
    )


def _new_writer(store: Store, folder: Path, gateway: Gateway) -> Writer:
    metrics = gateway.metrics
    dropped = metrics.counter("qlens_ledger_dropped_total", "Receipts lost because the ledger could not keep them.").inc
    return Writer(
        store,
        Journal(folder, dropped, tells=True),
        metrics.counter("qlens_ledger_written_total", "Receipts written to the ledger.").inc,
        dropped,
        metrics.gauge("qlens_ledger_queue", "Receipts that wait to be written to the ledger.").set,
        News(gateway, store),
    )
