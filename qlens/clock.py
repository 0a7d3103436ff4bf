"""Time as plugins see it, so that a test can turn the hands."""

from __future__ import annotations

import time

from attrs import define


class Clock:
    """The real time."""

    def monotonic(self) -> float:
        """Seconds that never go back; for intervals."""
        return time.monotonic()

    def time(self) -> float:
        """Unix seconds; for dates."""
        return time.time()


@define(eq=False)
class ManualClock(Clock):
    """A clock that stands still until it is advanced."""

    now: float = 1_800_000_000.0

    def monotonic(self) -> float:
        """The hand's position."""
        return self.now

    def time(self) -> float:
        """The hand's position."""
        return self.now

    def advance(self, seconds: float) -> None:
        """Turn the hand."""
        self.now += seconds
