"""The plugin: puts events into an outbox, which a thread of its own empties."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from attrs import define, field

from qlens import Call, Health, Receipt, StartupError, hookimpl
from qlens_plugins.observe.nats.outbox import Counters, Outbox
from qlens_plugins.observe.nats.settings import NatsConfig

if TYPE_CHECKING:
    from qlens import Gateway
    from qlens_plugins.observe.nats.shipper import Shipper


@define(eq=False)
class Nats:
    """Sends events to NATS; the outbox and its thread are shared with the instances before and after a reload."""

    config: NatsConfig
    name: str
    _outbox: Outbox | None = field(default=None, init=False, repr=False)
    _shipper: Shipper | None = field(default=None, init=False, repr=False)

    Config = NatsConfig
    takes_once = True

    @hookimpl
    def adopt(self, old: Nats) -> None:
        """Go on with the old instance's outbox: a second one would be told every event once more."""
        if old.config.spool == self.config.spool:
            self._outbox, self._shipper = old._outbox, old._shipper

    @hookimpl
    @asynccontextmanager
    async def lifespan(self, gateway: Gateway) -> AsyncIterator[None]:
        """Send as long as anyone serves."""
        if not gateway.url:  # a command runs
            yield
            return
        outbox, shipper = self._own(gateway)
        with outbox.under(self.config):
            try:
                await shipper.open()
                with gateway.events.listen(outbox.take, self.name):
                    yield
            finally:
                await shipper.close()

    def _own(self, gateway: Gateway) -> tuple[Outbox, Shipper]:
        """The outbox and its shipper, new ones where the old ones are of no use any more."""
        if self._outbox is None or self._shipper is None or self._shipper.closed:
            folder = self.config.spool or gateway.config.folder / f"{self.name}.outbox"
            self._outbox = Outbox(folder, self.name, Counters.of(gateway, self.name))
            self._shipper = _shipper(self._outbox)
        return self._outbox, self._shipper

    @hookimpl
    async def settle(self, call: Call, receipt: Receipt, hold: None) -> None:
        """Keep the event; calls that were refused make none, or a flood of them would push out all others."""
        if receipt.outcome != "rejected":
            assert self._outbox is not None
            self._outbox.keep(receipt)

    @hookimpl
    def health(self) -> Health:
        """Whether events are kept and sent, and how many wait."""
        outbox, shipper = self._outbox, self._shipper
        if outbox is None or shipper is None:
            return Health(True)
        said = [f"{shipper.waiting} events wait"]
        if problem := shipper.problem:
            since = f"cannot send since {time.monotonic() - shipper.since:.0f} s: " if shipper.away else ""
            said.insert(0, f"{since}{problem}")
        if trouble := outbox.trouble:
            said.append(f"{outbox.lost} are lost, the outbox takes nothing: {trouble}")
        if unsynced := outbox.unsynced:
            said.append(f"a power cut would take some of them: {unsynced}")
        return Health(not (problem or trouble or unsynced), "; ".join(said))


def _shipper(outbox: Outbox) -> Shipper:
    try:
        from qlens_plugins.observe.nats.shipper import Shipper
    except ImportError as error:
        raise StartupError(f"nats: it needs the extra `nats`: pip install 'qlens[nats]' ({error})") from error
    return Shipper(outbox)
