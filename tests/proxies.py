"""An HTTP proxy for tests."""

from __future__ import annotations

import asyncio
from contextlib import suppress


class Proxy:
    """Records what it is asked; tunnels what comes by CONNECT, all of it to one port if that is given."""

    def __init__(
        self, answer: bytes = b"HTTP/1.1 200 Connection established\r\n\r\n", *, to: int | None = None
    ) -> None:
        self.answer = answer
        self.to = to
        self.heads: list[str] = []

    async def talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        self.heads.append(head)
        if not head.startswith("CONNECT "):
            await self.forward(head, reader, writer)
            return
        writer.write(self.answer)
        if b" 200 " not in self.answer:
            return
        await joined(head.split()[1] if self.to is None else f"127.0.0.1:{self.to}", b"", reader, writer)

    async def forward(self, head: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer what does not come by CONNECT."""
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
        await reader.read()


class Forwarding(Proxy):
    """Passes on what does not come by CONNECT, without the credential for the proxy."""

    async def forward(self, head: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Ask the server of the URL, and have each connection carry one request."""
        if b" 200 " not in self.answer:
            writer.write(self.answer)
            return
        method, url, version = head.partition("\r\n")[0].split(" ")
        authority, _, path = url.removeprefix("http://").partition("/")
        fields = [line for line in head.split("\r\n")[1:] if not line.lower().startswith(("proxy-", "connection:"))]
        wanted = "upgrade" if "\r\nupgrade: websocket\r\n" in head.lower() else "close"
        lines = [f"{method} /{path} {version}", f"connection: {wanted}", *fields]
        await joined(authority, "\r\n".join(lines).encode(), reader, writer)


async def joined(authority: str, first: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Open a connection to a host and port, and copy in both directions."""
    host, _, port = authority.rpartition(":")
    inner_reader, inner_writer = await asyncio.open_connection(host, int(port))
    inner_writer.write(first)
    try:
        await asyncio.wait(
            [asyncio.ensure_future(_copy(reader, inner_writer)), asyncio.ensure_future(_copy(inner_reader, writer))]
        )
    finally:
        inner_writer.close()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(ConnectionError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.close()
