"""Retries: how many sends a call may make in all, and how long it waits before a target is asked again."""

from __future__ import annotations

import math
import random
import time

from attrs import define, field, frozen
from attrs.validators import and_, ge, le

from qlens import Attempt, Call, hookimpl


@frozen
class RetryConfig:
    """Lets a call ask targets again that failed, within one number of attempts for the whole call."""

    attempts: int = field(default=3, validator=ge(1))
    """The most sends a call makes, the first one included, over all targets and fallbacks together."""
    backoff_seconds: float = field(default=0.5, validator=ge(0))
    """The wait before the second attempt; it doubles from one attempt to the next."""
    max_backoff_seconds: float = field(default=8, validator=ge(0))
    """The longest wait that doubling leads to."""
    jitter: float = field(default=0.25, validator=and_(ge(0), le(1)))
    """The share of the wait that is random, so that calls which failed together do not return together."""
    max_retry_after_seconds: float = field(default=30, validator=ge(0))
    """A provider that asks for a longer wait than this is not waited for."""


@define(eq=False)
class Retry:
    """Answers the core's one loop over targets; it sends nothing itself."""

    config: RetryConfig
    name: str
    _random: random.Random = field(factory=random.Random, init=False, repr=False)

    Config = RetryConfig

    @hookimpl
    async def admit(self, call: Call) -> None:
        """Say how many sends the call may make."""
        call.attempts_left = self.config.attempts

    @hookimpl
    def retry(self, call: Call, attempt: Attempt) -> float | None:
        """When the target may be asked again, which is never if it wants too long a wait. None: no attempt is left."""
        if not call.attempts_left:
            return None
        asked = attempt.retry_after or 0.0
        wait = max(self._backoff(attempt.n), asked)
        # Who sleeps past the deadline hears of a time-out instead of the provider's own error.
        granted = asked <= self.config.max_retry_after_seconds and time.monotonic() + wait < call.deadline
        return wait if granted else math.inf

    def _backoff(self, failed: int) -> float:
        # The exponent is bounded before it becomes a number too large for a float.
        full = min(self.config.max_backoff_seconds, self.config.backoff_seconds * 2.0 ** min(failed - 1, 32))
        return full * (1 - self.config.jitter * self._random.random())

    @hookimpl
    def explain(self) -> list[str]:
        """Say what the call may do."""
        return [f"up to {self.config.attempts} attempts over all targets and fallbacks"]
