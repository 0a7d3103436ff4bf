"""Ends calls whose time is over, with one timer for all of them: one for each would cost more than most hooks do."""

from __future__ import annotations

import asyncio

from attrs import define, field

from qlens.call import Call


@define(eq=False)
class Deadlines:
    """The running calls of one configuration, in the order of their deadlines: all of them get the same time."""

    _running: dict[Call, asyncio.Task[None]] = field(factory=dict, init=False)
    _over: set[Call] = field(factory=set, init=False)
    _timer: asyncio.TimerHandle | None = field(default=None, init=False)

    def begin(self, call: Call, task: asyncio.Task[None]) -> None:
        """Cancel the task when the call's deadline comes."""
        self._running[call] = task
        if self._timer is None:
            self._timer = task.get_loop().call_at(call.deadline, self._look)

    def end(self, call: Call) -> None:
        """Forget a call."""
        self._running.pop(call, None)
        if self._over:
            self._over.discard(call)

    def over(self, call: Call) -> bool:
        """Whether a call was cancelled because its time was over."""
        return call in self._over

    def _look(self) -> None:
        self._timer = None
        for call, task in tuple(self._running.items()):
            loop = task.get_loop()
            if call in self._over:
                continue
            if call.deadline > loop.time():
                # The timer of a call that has ended since, as nearly all do: the next one is the oldest that runs.
                self._timer = loop.call_at(call.deadline, self._look)
                return
            self._over.add(call)
            task.cancel()
