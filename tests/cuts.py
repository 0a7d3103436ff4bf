"""Ways to a PostgreSQL server on which connections are lost at the worst moment."""

from __future__ import annotations

import asyncio
from contextvars import ContextVar

from attrs import define

from qlens.testing.faults import FaultProxy

_SILENT: ContextVar[list[bool]] = ContextVar("_SILENT")
"""Of each connection: whether its server's bytes vanish."""


@define(eq=False)
class CommitCut(FaultProxy):
    """Cuts connections when a COMMIT has come by: at once, or when the server has done it, and always unanswered."""

    every: int = 3
    commit: bytes = b"COMMIT;"
    """How what is sent then reads."""
    cuts: int = 0
    _commits: int = 0

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        _SILENT.set([False])
        await super()._pass_on(reader, writer)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, is_late: bool) -> None:
        silent = _SILENT.get()
        while chunk := await reader.read(65536):
            if is_late and silent[0]:
                continue
            is_commit = not is_late and self.commit in chunk
            self._commits += is_commit
            is_cut = is_commit and self._commits % self.every == 0
            silent[0] |= is_cut
            writer.write(chunk)
            await writer.drain()
            if is_cut:
                self.cuts += 1
                await asyncio.sleep(0.05 * (self.cuts % 2))
                break
        raise ConnectionResetError


@define(eq=False)
class Hushed(FaultProxy):
    """Lets connections that are open fall silent, as a firewall does that forgets them; new ones work."""

    hushes: int = 0

    def hush(self) -> None:
        """From now on."""
        self.hushes += 1

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, is_late: bool) -> None:
        since = self.hushes
        while chunk := await reader.read(65536):
            if self.hushes == since:
                writer.write(chunk)
                await writer.drain()
        raise ConnectionResetError
