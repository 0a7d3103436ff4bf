"""When a delivery that failed is tried again."""

from __future__ import annotations

import random
from collections.abc import Callable

FIRST_SECONDS = 5.0
FACTOR = 3.0
LONGEST_SECONDS = 3 * 3600.0
"""Between two tries: 5 s, 15 s, 45 s, ... up to this, each a fifth more or less by chance."""
JITTER = 0.2
LATEST_SECONDS = LONGEST_SECONDS * (1 + JITTER)
"""No try is ever further away."""


def next_try(
    attempts: int, now: float, until: float, asked: float | None = None, *, chance: Callable[[], float] = random.random
) -> float | None:
    """When to try again after so many attempts; None: no more, because the time is over.

    `asked` are the seconds that the receiver wants to be left alone. The last try is at the very end of the time.
    """
    if now >= until:
        return None
    wait: float = min(FIRST_SECONDS * FACTOR ** min(attempts - 1, 20), LONGEST_SECONDS)
    wait *= 1 - JITTER + 2 * JITTER * chance()
    return min(now + min(max(wait, asked or 0.0), LATEST_SECONDS), until)
