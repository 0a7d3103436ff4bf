"""Addresses of host names, from the system's resolver, whose servers may be silent: no name waits for another."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from ipaddress import IPv4Address, IPv6Address, ip_address

from aiohappyeyeballs import AddrInfoType

__all__ = ["addresses_of", "literal"]


def literal(host: str) -> IPv4Address | IPv6Address | None:
    """The address that a host is, in whatever way it is written; None for a name."""
    with suppress(ValueError):
        return ip_address(host.partition("%")[0])
    with suppress(OSError, ValueError):
        return IPv4Address(socket.inet_aton(host))
    return None


async def addresses_of(host: str, port: int) -> Sequence[AddrInfoType]:
    """What `getaddrinfo` says; raises what it does.

    The threads of an executor are few, and a name whose servers are silent has one for half a minute: here each name
    has its own, which the end of the process does not wait for.
    """
    ask = partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
    if literal(host) is not None:
        return ask()
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[Sequence[AddrInfoType]] = loop.create_future()

    def settle(found: Sequence[AddrInfoType] | None, error: Exception | None) -> None:
        if answer.done():
            return  # nobody waits any more
        if error is None:
            answer.set_result(found or ())
        else:
            answer.set_exception(error)

    def look() -> None:
        found, error = None, None
        try:
            found = ask()
        except Exception as raised:  # noqa: BLE001 - raised where it is waited for
            error = raised
        with suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(settle, found, error)

    threading.Thread(target=look, name="qlens-names", daemon=True).start()
    return await answer
