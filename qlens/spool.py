"""Keeps bytes for a while: in memory when they are few, else in a file that has no name and goes with the process."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Callable
from threading import Lock
from typing import IO, TypeVar

from attrs import define, field

from qlens.errors import Unavailable

MEMORY_BYTES = 1024 * 1024
"""How much is kept in memory, and how much is written to the file at once."""
PIECE_BYTES = 256 * 1024
"""How much is read at once."""

T = TypeVar("T")


@define(eq=False)
class Spool:
    """Written once, from its beginning to its end; then read from anywhere, as often as needed, until it is closed.

    The file stands in the system's folder for temporary files (TMPDIR). It is only touched in threads.
    """

    size: int = field(init=False, default=0)
    _begun: bytearray = field(init=False, factory=bytearray, repr=False)
    """What is not in the file."""
    _file: IO[bytes] | None = field(init=False, default=None, repr=False)
    _closed: bool = field(init=False, default=False)
    _in_use: Lock = field(init=False, factory=Lock, repr=False)
    """Held by the thread that uses the file: its number must not become another file's meanwhile."""

    async def write(self, data: bytes) -> None:
        """Add to the end."""
        self._begun += data
        self.size += len(data)
        if len(self._begun) >= MEMORY_BYTES:
            await self._spill()

    async def end(self) -> None:
        """Be ready to be read."""
        if self._file is not None and self._begun:
            await self._spill()

    async def pieces(self, start: int, size: int) -> AsyncIterator[bytes]:
        """Read a part, piece by piece."""
        end = start + size
        while start < end:
            piece = await self._read(start, min(PIECE_BYTES, end - start))
            start += len(piece)
            yield piece

    def close(self) -> None:
        """Let go of it all; may be called more than once."""
        self._closed = True
        self._begun = bytearray()
        if self._in_use.acquire(blocking=False):
            # Else the thread that uses the file closes it afterwards.
            try:
                self._let_go()
            finally:
                self._in_use.release()

    def _let_go(self) -> None:
        if self._file is not None:
            self._file.close()

    async def _spill(self) -> None:
        data, self._begun = self._begun, bytearray()
        await self._apart(lambda: self._append(data))

    async def _read(self, start: int, size: int) -> bytes:
        if self._file is None and not self._closed:
            return bytes(self._begun[start : start + size])
        piece = await self._apart(lambda: self._at(start, size))
        if not piece:
            raise Unavailable("The uploaded file is gone.")
        return piece

    def _append(self, data: bytearray) -> None:
        if self._file is None:
            self._file = tempfile.TemporaryFile(prefix="qlens-", buffering=0)  # noqa: SIM115 - closed by `close`
        view = memoryview(data)
        while view:
            view = view[self._file.write(view) :]

    def _at(self, start: int, size: int) -> bytes:
        assert self._file is not None
        self._file.seek(start)
        return self._file.read(size)

    async def _apart(self, work: Callable[[], T]) -> T:
        try:
            return await asyncio.to_thread(self._alone, work)
        except OSError as error:
            raise Unavailable("The uploaded file cannot be kept at the moment.") from error

    def _alone(self, work: Callable[[], T]) -> T:
        try:
            with self._in_use:
                if self._closed:
                    raise OSError("closed")
                return work()
        finally:
            if self._closed:
                self.close()
