"""The answers that are read to their end though the client has left: their provider bills them whole."""

from __future__ import annotations

import asyncio

from attrs import define, field

from qlens.watching import Watcher

MOST_DRAINS = 200
"""How many calls a process drains at a time: those beyond are closed, and charged what they can have cost at most."""
DRAIN_SECONDS = 120
"""How long a call is drained, from when its client left."""


@define(eq=False)
class Drains:
    """The calls of this process that go on without their client."""

    _timers: dict[asyncio.Task[None], asyncio.TimerHandle] = field(factory=dict, init=False, repr=False)

    def begin(self, task: asyncio.Task[None]) -> bool:
        """Let a call go on, for so long; False when too many do."""
        if len(self._timers) >= MOST_DRAINS:
            return False
        self._timers[task] = task.get_loop().call_later(DRAIN_SECONDS, task.cancel)
        task.add_done_callback(self._ended)
        return True

    def running(self) -> set[asyncio.Task[None]]:
        """The calls that are drained."""
        return set(self._timers)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._timers.pop(task).cancel()


async def stop() -> None:
    """End the task that runs: for a client that has left, nobody is asked anew."""
    task = asyncio.current_task()
    assert task is not None
    task.cancel()
    await asyncio.sleep(0)


async def read_on(meter: Watcher) -> None:
    """Read what a meter watches to its end, keeping nothing; raises what ends it otherwise."""
    async for _ in meter:
        await meter.pour(_unseen)


def _unseen(_piece: bytes) -> bool:
    return True
