"""Prices every call exactly, from a table and a catalogue; what has no row is unpriced, never free."""

from __future__ import annotations

import asyncio
import logging
from argparse import Namespace
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import define, evolve, field, frozen, validators

from qlens import (
    Call,
    Command,
    Cost,
    Health,
    InvalidRequest,
    Model,
    StartupError,
    Target,
    Usage,
    file_state,
    hookimpl,
    is_being_written,
    read_yaml,
    usd,
)
from qlens_plugins.cost.prices.book import REQUESTS, Book
from qlens_plugins.cost.prices.catalogue import KINDS, Catalogue
from qlens_plugins.cost.prices.needed import needed
from qlens_plugins.cost.prices.rows import PriceRow, no_duplicates

if TYPE_CHECKING:
    from attrs import Attribute

    from qlens import FileState, Gateway

log = logging.getLogger("qlens.prices")


def _unique(config: object, attribute: Attribute[Any], rows: tuple[PriceRow, ...]) -> None:
    no_duplicates(rows)


@frozen
class PriceFile:
    """A price table in a file of its own."""

    table: tuple[PriceRow, ...] = field(validator=_unique)
    """The rows."""


@frozen
class PricesConfig:
    """Prices every call exactly, from a table and a catalogue; what has no row is unpriced, never free."""

    file: Path | None = None
    """YAML file with a key `table` like the one here; it is read again when it changes."""
    table: tuple[PriceRow, ...] = field(default=(), validator=_unique)
    """Price rows; one replaces the row of `file` for the same provider, model, region, size, tier and date."""
    catalogue: bool = True
    """Price what has no row by the catalogue: Azure OpenAI, Bedrock, and OpenAI and Anthropic themselves."""
    catalogue_file: Path | None = None
    """A catalogue that `qlens prices update` made, instead of the one that is shipped; read at start-up and reload."""
    strict: bool = False
    """Refuse a call when one of its model's targets or fallbacks has no price of what the call is billed by."""
    reload_seconds: float = field(default=5, validator=validators.gt(0))
    """How often `file` is looked at for changes."""


@define(eq=False)
class Prices:
    """The plugin: keeps the table, follows its file, and prices usages."""

    config: PricesConfig
    name: str
    _book: Book | None = field(default=None, init=False)
    _catalogue: Catalogue | None = field(default=None, init=False)
    _seen: FileState | None = field(default=None, init=False)
    _problem: str | None = field(default=None, init=False)
    """Why the file's newest state is not in use."""
    _gateway: Gateway | None = field(default=None, init=False)

    Config = PricesConfig
    shares = "store"  # it refuses by its table, and counts nothing: all workers say the same

    def __new__(cls, config: PricesConfig, name: str) -> Prices:
        """An instance that refuses calls only where the table is strict: no other call pays for being asked about."""
        del name
        if not config.strict or issubclass(cls, StrictPrices):
            return object.__new__(cls)
        if cls is not Prices:
            raise TypeError(f"{cls.__name__} is strict by its settings: derive it from StrictPrices")
        return object.__new__(StrictPrices)

    @property
    def book(self) -> Book:
        """The table in use. It is read when first asked for; a gateway that serves has read it before."""
        if self._book is None:
            self._read()
        assert self._book is not None
        return self._book

    def _read(self) -> None:
        """Take the rows from file and configuration; raises StartupError when the file is faulty."""
        rows: tuple[PriceRow, ...] = ()
        if self.config.file is not None:
            self._seen = file_state(self.config.file)
            rows = read_yaml(self.config.file, PriceFile).table
        if self.config.catalogue_file is not None and self.config.catalogue:
            self._listed()
        self._book = Book.of(rows, self.config.table, catalogue=self._listed if self.config.catalogue else None)

    def _listed(self) -> Catalogue:
        """The catalogue; read once, when a target needs it."""
        if self._catalogue is None:
            self._catalogue = Catalogue.read(self.config.catalogue_file)
        return self._catalogue

    def _prepare(self, models: Mapping[str, Model]) -> None:
        """Read the table, and find the prices of all targets before calls need them."""
        self._read()
        for model in models.values():
            for target in model.candidates:
                self.book.find(target, 0)

    @hookimpl
    @asynccontextmanager
    async def lifespan(self, gateway: Gateway) -> AsyncIterator[None]:
        """Read the table, then follow its file."""
        self._gateway = gateway
        await asyncio.to_thread(self._prepare, gateway.models)
        if not self.book.rows and not self.config.catalogue:
            log.warning(
                "%s: the price table is empty: all calls are unpriced; give `file` or `table`, or `catalogue: true`",
                self.name,
            )
        for name in self._strangers(gateway):
            log.warning(
                "%s: `table` has a row for the provider %r, neither under `providers:` nor a kind of provider; "
                "no call is priced by it",
                self.name,
                name,
            )
        following = asyncio.create_task(self._follow(), name="follow prices")
        try:
            yield
        finally:
            following.cancel()
            await asyncio.wait({following})

    def _strangers(self, gateway: Gateway) -> Iterable[str]:
        """The providers of rows that can price nothing here; the rows of a file may be for other gateways too."""
        entries = gateway.config.providers
        kinds = {target.kind for model in gateway.models.values() for target in model.candidates}
        known = {"*", *KINDS, *kinds, *entries, *(entry.plugin for entry in entries.values())}
        return dict.fromkeys(row.provider for row in self.config.table if row.provider not in known)

    async def _follow(self) -> None:
        while self.config.file is not None:
            await asyncio.sleep(self.config.reload_seconds)
            await asyncio.to_thread(self._refresh, self.config.file)

    def _refresh(self, file: Path) -> None:
        """Read the file again if it changed; a faulty one leaves the table as it is."""
        now = file_state(file)
        if now == self._seen or is_being_written(file, now):
            return
        try:
            self._read()
        except Exception as error:
            self._problem = str(error)
            trace = None if isinstance(error, StartupError) else error
            log.error("%s: the price table stays as it is: %s", self.name, error, exc_info=trace)
        else:
            self._problem = None
            log.info("%s: read %d rows from %s", self.name, len(self.book.rows), file)

    @hookimpl
    def price(self, call: Call, target: Target, usage: Usage) -> Cost | None:
        """What a usage costs by the most specific row; None when there is none, or it lacks a price that is needed."""
        book = self._book or self.book
        sheet = book.known.get((target.provider, target.kind, target.region, target.base_model or target.model))
        if sheet is None:
            sheet = book.find(target, call.wall_ns)
        is_bound = usage is call.bound
        if sheet.by_request and (call.operation.meters or _has_passed(call, usage)):
            usage = evolve(usage, meters={**usage.meters, REQUESTS: 1})
        if (entry := sheet.only) is None:
            return sheet.bound(usage) if is_bound else sheet.cost(usage)
        return entry.dearest.cost(usage, "estimated") if is_bound else entry.cost(usage)

    @hookimpl
    def explain(self, call: Call) -> Iterable[str]:
        """The row of each target, and how the most a call can cost comes about."""
        for target in call.model.candidates if call.model is not None else ():
            cost = self.price(call, target, call.bound)
            where = f"{target.provider}/{target.base_model or target.model}"
            if cost is None or cost.picos is None:
                yield f"{where}: UNPRICED, no row has a price for all it can use"
                continue
            sum_ = " + ".join(f"{quantity} {meter} x {usd(each)}" for meter, quantity, each in cost.lines)
            yield f"{where}: row {cost.price_id}, at most {sum_ or 0} = {usd(cost.picos)} USD"

    @hookimpl
    def health(self) -> Health:
        """Whether the file's newest state is in use."""
        if self._problem is not None:
            return Health(False, f"the price table is not the file's newest: {self._problem}")
        listed = f", and the catalogue of {self._catalogue.date}" if self._catalogue is not None else ""
        return Health(True, f"{len(self.book.rows)} rows{listed}")

    @hookimpl
    def commands(self) -> Iterable[Command]:
        """`qlens prices`."""
        from qlens_plugins.cost.prices import listing  # not for those that serve

        async def run(gateway: Gateway, args: Namespace) -> int:
            now = gateway.clock.time()
            if args.action == "update":
                return await asyncio.to_thread(listing.update, args, now)
            listing.show(self.book, gateway.models, int(now * 10**9), as_json=args.json)
            return 0

        yield Command("prices", listing.HELP, listing.add_arguments, run)


@define(eq=False)
class StrictPrices(Prices):
    """The same with a table that must know a price of all that calls may cost."""

    @hookimpl
    async def admit(self, call: Call) -> None:
        """Refuse what could not be priced, when the table is strict."""
        if call.model is None:
            return
        # A bound counts tokens of audio as those of texts.
        if call.bound_cost.picos is not None and not (call.body and call.body.get("modalities")):
            return
        ways = needed(call)
        sheets = [self.book.find(target, call.wall_ns) for target in self._targets(call.model)]
        if not ways or all(any(sheet.bills(way) for way in ways) for sheet in sheets):
            return
        wanted = " or of ".join(" and ".join(way) for way in ways)
        raise InvalidRequest(
            f"The model `{call.model.name}`, or a fallback of it, has no price of {wanted}, by which this call would "
            "be billed, and this gateway refuses calls that it cannot price. Its operator can add a row to the price "
            "table: `qlens prices` shows what is there.",
            param="model",
            code="model_unpriced",
        )

    def _targets(self, model: Model) -> Iterable[Target]:
        """All that a call for a model may be sent to."""
        yield from model.candidates
        names = dict.fromkeys(name for names in model.fallbacks.values() for name in names)
        for name in names:
            fallback = self._gateway.models.resolve(name) if self._gateway is not None else None
            yield from fallback.candidates if fallback is not None else ()


def _has_passed(call: Call, usage: Usage) -> bool:
    """Whether a model has answered a call that passes through: what says nothing of usage is of no model."""
    return call.operation.name == "passthrough" and usage.source != "none"
