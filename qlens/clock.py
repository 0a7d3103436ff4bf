"""Time as plugins see it, so that a test can turn the hands."""

from __future__ import annotations

import time

from attrs import define


class Clock:
    """The real time."""

    # Not methods that call these: calls ask several times.
    monotonic = staticmethod(time.monotonic)
    """Seconds that never go back; for intervals."""
    monotonic_ns = staticmethod(time.monotonic_ns)
    """The same in whole nanoseconds."""
    time = staticmethod(time.time)
    """Unix seconds; for dates."""


@define(eq=False)
class ManualClock(Clock):
    """A clock that stands still until it is advanced."""

    now: float = 1_800_000_000.0

    def monotonic(self) -> float:
        """The hand's position."""
        return self.now

    def monotonic_ns(self) -> int:
        """The hand's position, in whole microseconds: a float of seconds is no finer."""
        return round(self.now * 1_000_000) * 1000

    def time(self) -> float:
        """The hand's position."""
        return self.now

    def advance(self, seconds: float) -> None:
        """Turn the hand."""
        self.now += seconds
