"""The workers that run now, and what they say together."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Iterable
from typing import Any

from attrs import define, field

from qlens.config import Server
from qlens.workers import merged
from qlens.workers.child import Child

log = logging.getLogger("qlens")

WELL_SECONDS = 10.0
"""A worker that serves and said nothing for so long is not ready: it keeps the connections that it is given."""
HUNG_SECONDS = 30.0
"""One that said nothing for so long, not even late, hangs: it is killed, and followed by another."""
START_SECONDS = 300.0
"""The same of one that does not serve yet: what its plugins load, they may load without letting it answer."""
POLL_SECONDS = 5.0
"""How often workers are asked for their metrics: what one has counted since then is lost when it is killed."""


@define(eq=False)
class Crew:
    """All workers of a gateway that have not ended, and what the others left behind."""

    settings: Server
    """Those of the configuration that all have."""
    children: list[Child] = field(factory=list, init=False)
    """Those that drain and have a successor are among them."""
    starts: int = field(default=0, init=False)
    stopping: bool = field(default=False, init=False)
    """Whether the gateway is coming to its end."""
    _past: merged.Merged = field(factory=merged.Merged, init=False)

    def ready(self) -> list[Child]:
        """The workers that serve; those that answered when they were asked last come first."""
        ready = [child for child in self.children if child.state == "ready"]
        return sorted(ready, key=lambda child: not child.answering)

    def well(self) -> int:
        """How many of them have said something lately."""
        return sum(child.silent_seconds < WELL_SECONDS for child in self.ready())

    def all_ready(self) -> bool:
        """Whether as many serve as shall, and go on serving."""
        return not self.stopping and self.well() >= self.wanted

    def lose(self, child: Child) -> None:
        """Take out a worker that has ended, and keep what it counted."""
        self._past.add(child.metrics, ended=True)
        self.children.remove(child)

    @property
    def wanted(self) -> int:
        """How many shall serve."""
        return self.settings.workers

    async def metrics(self) -> bytes:
        """The metrics of all workers, added up; of one that does not answer, the last it said."""
        await self._look()
        total = merged.Merged()
        total.add(self._past.families())
        for child in self.children:
            total.add(child.metrics)
        total.add(self._own())
        return total.text()

    def _own(self) -> Iterable[merged.Family]:
        ready = "qlens_workers_ready"
        yield ready, "gauge", "Workers that serve.", [(ready, {}, self.well())]
        restarts = "qlens_worker_restarts"
        count = max(0, self.starts - self.wanted)
        yield restarts, "counter", "Workers that were started in place of another.", [(f"{restarts}_total", {}, count)]

    async def health(self) -> dict[str, Any]:
        """How the workers are, together and each by itself."""
        workers = await asyncio.gather(*(self._health_of(child) for child in self.children))
        present = {child.number for child in self.children}
        workers += [{"worker": number, "state": "down"} for number in range(self.wanted) if number not in present]
        return merged.health(self.all_ready(), sorted(workers, key=lambda worker: worker["worker"]))

    async def _health_of(self, child: Child) -> dict[str, Any]:
        said = await child.learn("health") if child.serving else {}
        state = "silent" if said is None else child.state
        return {"worker": child.number, "state": state, "process": child.process.pid, **(said or {})}

    async def poll(self) -> None:
        """Ask for metrics now and then; say so when one stops answering, and end one that does not begin again."""
        while True:
            await asyncio.sleep(POLL_SECONDS)
            silent = [child for child in self.children if not child.answering]
            starting = [child for child in self.children if child.state == "starting"]
            await asyncio.gather(self._look(), *(child.learn("ping") for child in starting))
            for child in self.children:
                if not child.answering and child.serving and child not in silent:
                    log.warning("worker %d, process %d, does not answer", child.number, child.process.pid)
            longest = {"starting": START_SECONDS, "ready": HUNG_SECONDS}  # who drains has a bound of its own
            for child in self.children:
                if child.silent_seconds > longest.get(child.state, math.inf):
                    log.error("worker %d, process %d, hangs and is killed", child.number, child.process.pid)
                    child.kill()

    async def _look(self) -> None:
        await asyncio.gather(*(child.look() for child in self.children if child.serving))
