"""The signals that tell a gateway to stop, and to read its configuration again."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio

STOPS = (signal.SIGTERM, signal.SIGINT)

_held: list[int] = []
"""The orders to reload that came before somebody could follow them."""


def hold_reload() -> None:
    """Keep an order to reload until `on_reload`: a process that has just started would die of it."""
    signal.signal(signal.SIGHUP, _hold)


def _hold(number: int, _: FrameType | None) -> None:
    _held.append(number)


def on_reload(do: Callable[[], object]) -> None:
    """Do this when the process is told to reload, and now if it was told already."""
    _loop().add_signal_handler(signal.SIGHUP, do)
    if _held:
        _held.clear()
        do()


def on_stop(do: Callable[[], object]) -> None:
    """Do this, and nothing else, when the process is told to stop."""
    for number in STOPS:
        _loop().add_signal_handler(number, do)


def ignore_stops() -> None:
    """Let a clean stop come to its end: closing the loop would bring back the signals' own meaning, and kill it."""
    for number in STOPS:
        _loop().remove_signal_handler(number)
        signal.signal(number, signal.SIG_IGN)


def _loop() -> asyncio.AbstractEventLoop:
    import asyncio  # not above: until it is loaded, an order to reload would kill

    return asyncio.get_running_loop()
