"""Several requests for one call: all at once, and one failure ends the others. It says what they used all the same."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

from qlens import (
    NO_USAGE,
    CallError,
    UpstreamAuth,
    UpstreamLimited,
    UpstreamModelMissing,
    UpstreamRejected,
    UpstreamUnavailable,
    Usage,
    is_unsent,
)
from qlens_plugins.provider.bedrock.usage import together

T = TypeVar("T")

AT_ONCE = 8
"""How many requests of one call run at a time."""

_OF_ALL = (UpstreamAuth, UpstreamModelMissing)
"""What is said of one request and holds for all that go to one model."""

_OFTEN_OF_ALL = (UpstreamLimited, UpstreamUnavailable)
"""What the others of a call are mostly told, too, and a moment later."""
HEAR_SECONDS = 0.5
"""How long they are listened to then: one that was refused costs nothing, and one that is cut off may have cost all."""


def _untold(_: object) -> None:
    """What a result says of its usage that says nothing of it."""


def _free(_: int) -> Usage:
    return NO_USAGE


async def gathered(
    requests: Sequence[Callable[[], Awaitable[T]]],
    used: Callable[[T], Usage | None] = _untold,
    most: Callable[[int], Usage] = _free,
    *,
    alike: bool = True,
) -> list[T]:
    """The results in the order of the requests; the first failure cancels the rest and is raised.

    It is raised with what all have used, for AWS bills them one by one: what was `used` for a result, and the `most`
    that a request (by its place) can use where its result does not say, or where it was sent and cancelled. Of requests
    that are `alike`, one that is wrong means that all are: those that were cancelled have used nothing.
    """
    if len(requests) < 2:
        return [await requests[0]()] if requests else []
    turnstile = asyncio.Semaphore(AT_ONCE)
    unheard: list[int] = []

    async def run(place: int) -> T:
        async with turnstile:
            try:
                return await requests[place]()
            except asyncio.CancelledError as error:
                if not is_unsent(error):
                    unheard.append(place)
                raise

    def all_used(first: CallError) -> Iterator[Usage | None]:
        if not isinstance(first, (*_OF_ALL, UpstreamRejected) if alike else _OF_ALL):
            yield from map(most, unheard)
        for place, task in enumerate(tasks):
            if task.cancelled():
                continue
            if (error := task.exception()) is None:
                yield used(task.result()) or most(place)
            elif isinstance(error, CallError):
                yield error.usage or (most(place) if error.answered else None)

    tasks = [asyncio.create_task(run(place)) for place in range(len(requests))]
    try:
        return await asyncio.gather(*tasks)
    except CallError as error:
        if isinstance(error, _OFTEN_OF_ALL) and len(tasks) <= AT_ONCE:  # of more, others would begin meanwhile
            await asyncio.wait(tasks, timeout=HEAR_SECONDS)
        await cancelled(tasks)
        error.usage = together(all_used(error))
        raise
    finally:
        await cancelled(tasks)


async def cancelled(tasks: Sequence[asyncio.Task[Any]]) -> None:
    """Cancel tasks and wait until they are over, whatever they raise."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def merged(sources: Sequence[AsyncGenerator[bytes]]) -> AsyncGenerator[bytes]:
    """The pieces of several streams as they come; the first failure ends all."""
    queue: asyncio.Queue[bytes | BaseException | None] = asyncio.Queue(maxsize=len(sources))

    async def pump(source: AsyncGenerator[bytes]) -> None:
        try:
            async with aclosing(source):
                async for piece in source:
                    await queue.put(piece)
            await queue.put(None)
        except Exception as error:  # noqa: BLE001 - raised again by the one who reads
            await queue.put(error)

    tasks = [asyncio.create_task(pump(source)) for source in sources]
    try:
        left = len(tasks)
        while left:
            piece = await queue.get()
            if isinstance(piece, BaseException):
                raise piece
            if piece is None:
                left -= 1
            else:
                yield piece
    finally:
        await cancelled(tasks)
