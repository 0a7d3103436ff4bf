"""Questions and answers between the supervisor and one worker, over a pair of sockets."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from itertools import count
from typing import Any

import orjson
from attrs import define, field

Details = Mapping[str, Any]
Answering = Callable[[str, Details], Awaitable[dict[str, Any]]]
"""Answers a question by its name and details; it must not raise."""

_LAST_SECONDS = 1
"""How long the last answers may take to leave when a side closes."""


class ChannelClosed(Exception):
    """The other side is gone, and with it the answer."""


@define(eq=False)
class Channel:
    """One end: asks, and answers what the other end asks. A message is JSON after its length in four bytes."""

    _reader: asyncio.StreamReader
    _writer: asyncio.StreamWriter
    _answering: Answering
    _waiting: dict[int, asyncio.Future[dict[str, Any]]] = field(factory=dict, init=False)
    _numbers: Iterator[int] = field(factory=count, init=False)
    _answers: set[asyncio.Task[None]] = field(factory=set, init=False)
    _closed: bool = field(default=False, init=False)
    heard_at: float = field(factory=time.monotonic, init=False)
    """When the other side last said anything."""

    @classmethod
    async def over(cls, end: socket.socket, answering: Answering) -> Channel:
        """A channel over one of two connected sockets, which it closes in the end."""
        return cls(*await asyncio.open_unix_connection(sock=end), answering)

    async def listen(self) -> None:
        """Take what comes, until the other side is gone."""
        try:
            while True:
                size = int.from_bytes(await self._reader.readexactly(4))
                message = await self._reader.readexactly(size)
                self.heard_at = time.monotonic()
                self._take(orjson.loads(message))
        except (asyncio.IncompleteReadError, OSError):
            pass
        finally:
            self._closed = True
            for future in self._waiting.values():
                if not future.done():
                    future.set_exception(ChannelClosed())
            self._waiting.clear()

    async def ask(self, what: str, **details: Any) -> dict[str, Any]:
        """The other side's answer; raises ChannelClosed when there will be none."""
        if self._closed:
            raise ChannelClosed
        number = next(self._numbers)
        answer: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        try:
            await self._send({"ask": what, "number": number, "details": details})
            return await answer
        finally:
            self._waiting.pop(number, None)

    async def close(self) -> None:
        """Send what is still to be answered, and leave."""
        if self._answers:
            await asyncio.wait(set(self._answers), timeout=_LAST_SECONDS)
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    def _take(self, message: dict[str, Any]) -> None:
        if "ask" not in message:
            future = self._waiting.get(message["number"])
            if future is not None and not future.done():
                future.set_result(message["answer"])
            return
        task = asyncio.create_task(self._answer(message))
        self._answers.add(task)
        task.add_done_callback(self._answers.discard)

    async def _answer(self, message: dict[str, Any]) -> None:
        answer = await self._answering(message["ask"], message["details"])
        with contextlib.suppress(ChannelClosed):
            await self._send({"number": message["number"], "answer": answer})

    async def _send(self, message: dict[str, Any]) -> None:
        text = orjson.dumps(message)
        try:
            self._writer.write(len(text).to_bytes(4) + text)
            await self._writer.drain()
        except OSError as error:
            raise ChannelClosed from error
