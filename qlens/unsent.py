"""Who waits until what they ask can be sent, and which cancellations came before that: it is billed by nobody."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from attrs import define, field

_MARK = "Nothing was sent."


@define(eq=False)
class Unsent:
    """The tasks that wait for a connection, or for what else a request needs before it goes out."""

    _tasks: set[asyncio.Task[Any] | None] = field(factory=set, init=False, repr=False)

    def __contains__(self, task: object) -> bool:
        return task in self._tasks

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around such a wait; a cancellation of it is marked."""
        task = asyncio.current_task()
        self._tasks.add(task)
        try:
            with marked():
                yield
        finally:
            self._tasks.discard(task)


@contextmanager
def marked() -> Iterator[None]:
    """Mark a cancellation as one of a request that was not sent, or not to its end."""
    try:
        yield
    except asyncio.CancelledError as error:
        error.add_note(_MARK)
        raise


def is_unsent(error: asyncio.CancelledError) -> bool:
    """Whether a cancellation came before the request was sent."""
    return _MARK in getattr(error, "__notes__", ())
