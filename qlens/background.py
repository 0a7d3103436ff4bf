"""Threads whose work may wait."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress

LOWER = 5
"""How much lower the priority is. On a core that all share it takes a third of the p99 of calls (see benchmarks); with
10, what is written falls behind as soon as the event loop never rests."""


def background_thread(work: Callable[[], object], name: str) -> threading.Thread:
    """A daemon thread, to be started, whose work may wait: it gives way to the event loop, for which clients wait.

    Only Linux has priorities of threads, see setpriority(2).
    """

    def run() -> None:
        if sys.platform == "linux":
            with suppress(OSError):  # a sandbox may forbid it
                # Than the main thread's, which the event loop has: who starts this one may have a lower one already.
                lower = os.getpriority(os.PRIO_PROCESS, os.getpid()) + LOWER
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), lower)
        work()

    return threading.Thread(target=run, name=name, daemon=True)
