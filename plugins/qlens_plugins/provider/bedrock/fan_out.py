"""Several requests for one call: all at once, and one failure ends the others."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

T = TypeVar("T")

AT_ONCE = 8
"""How many requests of one call run at a time."""


async def gathered(requests: Sequence[Callable[[], Awaitable[T]]]) -> list[T]:
    """The results in the order of the requests; the first failure cancels the rest and is raised."""
    if len(requests) < 2:
        return [await requests[0]()] if requests else []
    turnstile = asyncio.Semaphore(AT_ONCE)

    async def run(request: Callable[[], Awaitable[T]]) -> T:
        async with turnstile:
            return await request()

    tasks = [asyncio.create_task(run(request)) for request in requests]
    try:
        return await asyncio.gather(*tasks)
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
