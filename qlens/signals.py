"""The signals that tell a gateway to stop."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable

STOPS = (signal.SIGTERM, signal.SIGINT)


def on_stop(do: Callable[[], object]) -> None:
    """Do this, and nothing else, when the process is told to stop."""
    for number in STOPS:
        asyncio.get_running_loop().add_signal_handler(number, do)


def ignore_stops() -> None:
    """Let a clean stop come to its end: closing the loop would bring back the signals' own meaning, and kill it."""
    for number in STOPS:
        asyncio.get_running_loop().remove_signal_handler(number)
        signal.signal(number, signal.SIG_IGN)
