"""The plugin: listens to the gateway's events, and has a courier deliver them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from attrs import define, field

from qlens import Call, Command, Event, Health, Receipt, hookimpl, sqlite_path
from qlens_plugins.observe.webhooks import commands
from qlens_plugins.observe.webhooks.courier import Courier
from qlens_plugins.observe.webhooks.records import Count
from qlens_plugins.observe.webhooks.settings import WebhooksConfig

if TYPE_CHECKING:
    from pathlib import Path

    from qlens import Gateway

RECEIPT = "qlens.receipt"


@define(eq=False)
class Webhooks:
    """Sends events to endpoints; the courier is shared with the instances before and after a reload."""

    config: WebhooksConfig
    name: str
    _courier: Courier | None = field(default=None, init=False, repr=False)

    Config = WebhooksConfig
    takes_once = True

    def path(self, gateway: Gateway) -> Path:
        """Where the file is."""
        return sqlite_path(self.config.url, gateway.config.folder)

    @hookimpl
    def adopt(self, old: Webhooks) -> None:
        """Go on with the old instance's courier: a second one would be told every event once more."""
        if old.config.url == self.config.url:
            self._courier = old._courier

    @hookimpl
    @asynccontextmanager
    async def lifespan(self, gateway: Gateway) -> AsyncIterator[None]:
        """Deliver as long as anyone serves."""
        if not gateway.url:  # a command runs, which opens the file itself
            yield
            return
        if self._courier is None or self._courier.closed:
            self._courier = Courier(gateway, self.path(gateway))
        courier = self._courier
        await courier.open(self.config)
        try:
            with gateway.events.listen(courier.take, self.name):
                yield
        finally:
            await courier.close(self.config)

    @hookimpl
    async def settle(self, call: Call, receipt: Receipt) -> None:
        """Tell what a call has cost. Refused ones are not told: a flood of them would push out all else."""
        courier = self._courier
        if courier is not None and receipt.outcome != "rejected" and courier.wanting(RECEIPT, receipt.caller.tenant):
            courier.take(Event.of_receipt(receipt))

    @hookimpl
    def commands(self) -> Iterable[Command]:
        """`qlens webhooks`."""
        yield commands.command(self)

    @hookimpl
    def health(self) -> Health:
        """Whether events are kept, and what waits for whom."""
        courier = self._courier
        if courier is None:
            return Health(True)
        lines = [courier.trouble, *(_described(courier, each.name) for each in self.config.endpoints)]
        return Health(not courier.trouble and not courier.full, "; ".join(filter(None, lines)))


def _described(courier: Courier, name: str) -> str:
    """What there is to say of an endpoint; nothing when all is well."""
    count = courier.counts.get(name, Count())
    parts = [f"{count.waiting} wait"] if count.waiting else []
    if count.dead:
        parts.append(f"{count.dead} dead")
    if lost := courier.lost.get(name):
        parts.append(f"{lost} lost because there was no room")
    if problem := courier.problems.get(name):
        parts.append(f"last failure: {problem}")
    return f"{name}: {', '.join(parts)}" if parts else ""
