"""What plugins leave behind and fails later, streams and handlers, fails as theirs: it is counted and named."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING

from attrs import define

from qlens import returned
from qlens.account import ClientLeft
from qlens.call import Call, Reply
from qlens.errors import CallError, frames
from qlens.watching import Watcher
from qlens.wire_errors import mistake

if TYPE_CHECKING:
    from prometheus_client import Counter

    from qlens.registry import Bound

log = logging.getLogger("qlens")

Failed = Callable[[BaseException], CallError]
Handler = Callable[[Call], Awaitable[Reply]]


def note(failures: Counter, hook: Bound, error: BaseException) -> None:
    """Count a hook that failed by itself, and log where."""
    failures.labels(hook.plugin, hook.name).inc()
    log.error("%s failed in %s: %s", hook.plugin, hook.name, frames(error))


@define(eq=False)
class _Blamed:
    """A stream that a plugin has made: what is raised in it by mistake, or is no bytes, is a failure of that plugin."""

    _source: AsyncIterator[bytes]
    _failed: Failed

    def __aiter__(self) -> _Blamed:
        return self

    async def __anext__(self) -> bytes:
        try:
            piece = await self._source.__anext__()
            if not isinstance(piece, bytes | bytearray | memoryview):
                raise TypeError("a stream gave something that is no bytes")
        except (CallError, StopAsyncIteration):
            raise
        except returned.mistakes() as error:
            raise self._failed(error) from error
        return piece


def blame(reply: Reply, failed: Failed) -> Reply:
    """Let the stream of a reply fail as that of the plugin that has put it there, unless it is known whose it is."""
    chunks = reply.chunks
    if chunks is not None and not isinstance(chunks, Watcher | _Blamed):
        reply.replace(chunks=_Blamed(aiter(chunks), failed))
    return reply


def handler(given: Handler, hook: Bound, failures: Counter) -> Handler:
    """A handler of a plugin's endpoint that fails as the plugin does."""

    def failed(error: BaseException) -> CallError:
        note(failures, hook, error)
        return mistake()

    async def handle(call: Call) -> Reply:
        try:
            return blame(returned.page(await given(call)), failed)
        except (CallError, ClientLeft):
            raise
        except returned.mistakes() as error:
            raise failed(error) from error

    return handle
