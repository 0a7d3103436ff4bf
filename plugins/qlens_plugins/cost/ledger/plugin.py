"""Keeps a receipt of every call in an SQLite file, exactly once."""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from attrs import define, field, frozen, validators

from qlens import Call, Command, Endpoint, Health, Receipt, Unavailable, Url, hookimpl
from qlens_plugins.cost.ledger import analytics, usage
from qlens_plugins.cost.ledger.reader import Reader
from qlens_plugins.cost.ledger.writer import Writer

if TYPE_CHECKING:
    from attrs import Attribute

    from qlens import Gateway

SCHEME = "sqlite:///"
RETRY_SECONDS = 5.0
"""When a caller that found the ledger full may come back."""


def _supported(config: LedgerConfig, attribute: Attribute[Any], value: str) -> None:
    # Only the scheme is shown: the rest of a database's address may hold a password.
    scheme = value.partition(":")[0]
    if not value.startswith(SCHEME):
        raise ValueError(f"a ledger at {scheme}:... is not supported; supported: {SCHEME}FILE")
    if Path(value).name in {"", SCHEME.rstrip("/"), ":memory:"}:
        raise ValueError(f"names no file; write {SCHEME}qlens.db, say")


@frozen
class LedgerConfig:
    """Keeps a receipt of every call in an SQLite file, exactly once, written off the call's way."""

    url: Url = field(default=Url("sqlite:///qlens.db"), validator=_supported)
    """SQLite file to write, as `sqlite:///FILE`; a relative one stands in the folder of the YAML file."""
    batch_size: int = field(default=500, validator=validators.ge(1))
    """Most receipts in one transaction."""
    flush_seconds: float = field(default=0.2, validator=validators.ge(0))
    """How long a receipt waits for others to be written with it."""
    queue_size: int = field(default=100_000, validator=validators.ge(1))
    """Most receipts that may wait while the file cannot be written, calls on their way included."""
    when_full: Literal["refuse", "drop"] = "refuse"
    """What happens then: `refuse` answers calls with 503, `drop` serves them and counts what is not recorded."""
    close_seconds: float = field(default=10, validator=validators.ge(0))
    """How long a shutdown waits for the last receipts to be written."""


@define(eq=False)
class Ledger:
    """The plugin: hands receipts to a writer, which it shares with the instances before and after a reload."""

    config: LedgerConfig
    name: str
    _writer: Writer | None = field(default=None, init=False)
    _reader: Reader | None = field(default=None, init=False)
    _gateway: Gateway | None = field(default=None, init=False)

    Config = LedgerConfig
    shares = "store"

    @hookimpl
    def adopt(self, old: Ledger) -> None:
        """Go on with the old instance's writer: a second one could not know what waits in the first one's queue."""
        self._writer, self._reader = old._writer, old._reader

    @hookimpl
    @asynccontextmanager
    async def lifespan(self, gateway: Gateway) -> AsyncIterator[None]:
        """Write as long as anyone serves; what is left is written before the last instance ends."""
        path = self._path(gateway)
        if self._writer is None or self._writer.closed or self._writer.path != path:
            self._writer = _new_writer(path, gateway)
        writer = self._writer
        writer.batch_size, writer.flush_seconds = self.config.batch_size, self.config.flush_seconds
        self._gateway = gateway
        if self._reader is None or self._reader.path != path:
            self._reader = Reader(path)
        await writer.open()
        try:
            yield
        finally:
            await writer.close(self.config.close_seconds)

    def _path(self, gateway: Gateway) -> Path:
        path = Path(self.config.url.removeprefix(SCHEME))
        # The default is not in the YAML file, so nothing has put it in that file's folder yet.
        return path if path.is_absolute() else gateway.config.folder / path

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
    async def admit(self, call: Call) -> Literal[True] | None:
        """Keep a place for the call's receipt: what is sent to a provider must be accounted for."""
        writer = self.writer
        if not writer.full(self.config.queue_size):
            writer.promise()
            return True
        if self.config.when_full == "drop":
            return None
        raise Unavailable(
            "The ledger cannot take more receipts at present, so no further call is accepted. Please try again later.",
            code="ledger_unavailable",
            retry_after=RETRY_SECONDS,
        )

    @hookimpl
    async def settle(self, call: Call, receipt: Receipt, hold: Literal[True] | None) -> None:
        """Keep the receipt; refused calls are only counted, or a flood of them would fill the disk."""
        writer = self.writer
        if hold:
            writer.redeem()
        if receipt.outcome == "rejected":
            writer.count(receipt)
        elif hold or not writer.full(self.config.queue_size):
            writer.keep(receipt)
        elif self.config.when_full == "drop":
            writer.dropped(1)
        else:
            # It ended before it had a place, so nothing was sent and nothing is owed.
            writer.count(receipt)

    @hookimpl
    def health(self) -> Health:
        """Whether receipts reach the file, and how many wait."""
        waiting = f"{self.writer.waiting} of {self.config.queue_size} receipts wait"
        if self.writer.problem is None:
            return Health(True, waiting)
        seconds = time.monotonic() - self.writer.since
        return Health(
            False, f"cannot write {self.writer.path.name} since {seconds:.0f} s: {self.writer.problem}; {waiting}"
        )

    @hookimpl
    def endpoints(self) -> Iterable[Endpoint]:
        """Questions about usage: OpenAI's `/v1/organization/...`, and `/v1/usage/...`."""
        return analytics.endpoints(self)

    @hookimpl
    def commands(self) -> Iterable[Command]:
        """`qlens usage`."""

        async def run(gateway: Gateway, args: Namespace) -> int:
            return await usage.run(self._path(gateway), args)

        yield Command("usage", usage.HELP, usage.add_arguments, run)


def _new_writer(path: Path, gateway: Gateway) -> Writer:
    metrics = gateway.metrics
    return Writer(
        path,
        metrics.counter("qlens_ledger_written_total", "Receipts written to the ledger.").inc,
        metrics.counter("qlens_ledger_dropped_total", "Receipts lost because the ledger could not keep them.").inc,
        metrics.gauge("qlens_ledger_queue", "Receipts that wait to be written to the ledger.").set,
    )
