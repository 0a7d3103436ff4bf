"""Tells what has changed: what commands did, and gateways that died over it, one of those on the database tells."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from attrs import define, field

from qlens import Event, Gateway
from qlens_plugins.auth.key_store.store import Store, StoreAway

log = logging.getLogger("qlens.key_store")

UNHEARD_SECONDS = 3600
"""How long events wait for a gateway that has somebody to tell them to; then one that has nobody drops them."""
OWN_SECONDS = 10.0
"""How long others leave an event to the gateway that made it, which tells it at once: it may wait to let go of it."""


@define(eq=False)
class Teller:
    """Publishes the events that are in the database, and only then lets go of them.

    What a gateway that dies meanwhile had taken is there again, and is told once more under the same id.
    """

    gateway: Gateway
    store: Store
    _told: list[Event] = field(factory=list, init=False)
    """What is still in the database."""
    _task: asyncio.Task[None] | None = field(default=None, init=False)
    _trouble: str = field(default="", init=False)

    def tell(self, event: Event) -> None:
        """Publish what this gateway has made and put into the database; the next look lets go of it."""
        if self.gateway.events.all_listen and self.gateway.events.is_heard:
            self.gateway.events.publish(event)
            self._told.append(event)

    def look(self, oldest: int | None) -> None:
        """Tell what waits, in a task of its own, now that it is known from when on the first is anybody's."""
        # Plugins that listen open after this one, and close before it.
        waits = oldest is not None and self.gateway.events.all_listen and oldest < self._before()
        if (waits or self._told) and (self._task is None or self._task.done()):
            self._task = asyncio.create_task(self._settle(waits=waits), name="key_store: tell what changed")

    async def close(self) -> None:
        """Give up what is under way, but let go of what is told."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self._settle(waits=False)

    async def _settle(self, *, waits: bool) -> None:
        try:
            while self._told:
                told = tuple(self._told)
                await self.store.forget(told)
                del self._told[: len(told)]
            while waits:
                waits = await self.store.tell(self._publish, self._before())
        except Exception as error:  # noqa: BLE001 - whatever it is, the events stay where they are for the next look
            trouble = str(error) if isinstance(error, StoreAway) else type(error).__name__
            if self.gateway.events.all_listen and trouble != self._trouble:
                log.error("what was changed cannot be told, or let go of, at present: %s", trouble)
            self._trouble = trouble
        else:
            self._trouble = ""

    def _before(self) -> int:
        """From when on events are left alone, in Unix nanoseconds."""
        now = self.gateway.clock.time()
        if self.gateway.events.is_heard:
            return int(now * 1_000_000_000)
        return int((now - UNHEARD_SECONDS) * 1_000_000_000)

    def _publish(self, events: Sequence[Event]) -> None:
        """Publish on the event loop; raises StoreAway when whoever was to hear them has just left."""
        before = self._before()
        if not self.gateway.events.all_listen or any(event.time >= before for event in events):
            raise StoreAway("nobody is there any more who was to hear it")
        for event in events:
            self.gateway.events.publish(event)
