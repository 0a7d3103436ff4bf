"""Tells what commands have changed, as the admin API tells it: one gateway of those that share the database does."""

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
_EVER = 2**63 - 1


@define(eq=False)
class Teller:
    """Takes events out of the database, publishes them and only then lets go of them.

    What a gateway that dies meanwhile had taken is there again, and is told once more under the same id.
    """

    gateway: Gateway
    store: Store
    _task: asyncio.Task[None] | None = field(default=None, init=False)
    _trouble: str = field(default="", init=False)

    def look(self, oldest: int | None) -> None:
        """Tell what waits, in a task of its own, now that the time of the event that waits longest is known."""
        # Plugins that listen open after this one, and close before it.
        if oldest is None or not self.gateway.events.all_listen or oldest >= self._before():
            return
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._tell(), name="key_store: tell what commands changed")

    async def close(self) -> None:
        """Give up what is under way."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _tell(self) -> None:
        try:
            while await self.store.tell(self._publish, self._before()):
                pass
        except Exception as error:  # noqa: BLE001 - whatever it is, the events stay where they are for the next look
            trouble = str(error) if isinstance(error, StoreAway) else type(error).__name__
            if self.gateway.events.all_listen and trouble != self._trouble:
                log.error("what `qlens keys` changed cannot be told at present: %s", trouble)
            self._trouble = trouble
        else:
            self._trouble = ""

    def _before(self) -> int:
        """From when on events are left alone, in Unix nanoseconds."""
        if self.gateway.events.is_heard:
            return _EVER
        return int((self.gateway.clock.time() - UNHEARD_SECONDS) * 1_000_000_000)

    def _publish(self, events: Sequence[Event]) -> None:
        """Publish on the event loop; raises StoreAway when whoever was to hear them has just left."""
        before = self._before()
        if not self.gateway.events.all_listen or any(event.time >= before for event in events):
            raise StoreAway("nobody is there any more who was to hear it")
        for event in events:
            self.gateway.events.publish(event)
