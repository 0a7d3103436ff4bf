"""New connections to peers: names into addresses, TCP, a proxy's tunnel, TLS; failures as our own errors."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import ssl
from base64 import b64encode
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

import aiohappyeyeballs
from aiohappyeyeballs import AddrInfoType
from attrs import define, field, frozen

from qlens.config.network import PROXY_FORM, Tls, is_proxy
from qlens.errors import UpstreamError, UpstreamInvalid, UpstreamUnreachable
from qlens.names import addresses_of, literal
from qlens.upstream_connection import READ_BYTES, Connection

__all__ = ["Dialer", "Origin", "Resolve", "invalid_url"]

Resolve = Callable[[str, int], Awaitable[Sequence[AddrInfoType]]]
"""What gives the addresses of a host and port, as `getaddrinfo` does; connections go to these and no others."""

_Stamp = tuple[int | None, ...]

_PLAIN = Tls()
_NAME_SECONDS = 10.0
# How long addresses are good for when nobody says any more which they are, and how long that is waited for then.
_STALE_SECONDS = 600.0
_PATIENCE_SECONDS = 0.5
# Names that are looked up at a time.
_MAX_LOOKUPS = 64
_MAX_NAMES = 256
# After this long without a connection, the next address is tried beside the first. (RFC 8305)
_NEXT_ADDRESS_SECONDS = 0.25
_FILES_USED_UP = frozenset({errno.EMFILE, errno.ENFILE})
_DEFAULT_PORTS = {"http": 80, "https": 443}


@frozen(cache_hash=True)
class Origin:
    """Where a URL leads: connections to one origin serve all its URLs."""

    scheme: str
    host: str
    port: int
    tls: Tls | None = None

    @property
    def authority(self) -> str:
        """Host and port as a Host header has them: without a port that goes without saying."""
        return self.host_in_url if self.port == _DEFAULT_PORTS[self.scheme] else f"{self.host_in_url}:{self.port}"

    @property
    def server_name(self) -> str:
        """What the certificate must be for."""
        return (self.tls.server_name if self.tls else None) or self.host

    @property
    def host_in_url(self) -> str:
        """The host; an IPv6 address in brackets."""
        return f"[{self.host}]" if ":" in self.host else self.host


@define(eq=False)
class _Name:
    # Of many calls that need the same name, one asks for it, and goes on asking when the call is over: whoever comes
    # next has what it finds, and a name whose servers are silent is asked for once at a time.
    lookup: asyncio.Task[Sequence[AddrInfoType]] | None = field(init=False, default=None)
    addresses: Sequence[AddrInfoType] = field(init=False, factory=list)
    until: float = field(init=False, default=0.0)
    usable_until: float = field(init=False, default=0.0)


@define(eq=False)
class Dialer:
    """Opens connections, through an HTTP proxy if there is one; make it inside a running event loop."""

    proxy: str | None = field(default=None, repr=False)
    """`http://[user:password@]host:port`: https goes through a tunnel, http is asked for with its whole URL."""
    resolve: Resolve | None = field(default=None, repr=False)
    """None: the system's resolver, and whatever it says."""
    _names: dict[tuple[str, int], _Name] = field(init=False, factory=dict, repr=False)
    _lookups: asyncio.Semaphore = field(init=False, factory=lambda: asyncio.Semaphore(_MAX_LOOKUPS), repr=False)
    _contexts: dict[Tls, tuple[_Stamp, ssl.SSLContext]] = field(init=False, factory=dict, repr=False)
    _buffer: memoryview = field(init=False, factory=lambda: memoryview(bytearray(READ_BYTES)), repr=False)
    _loop: asyncio.AbstractEventLoop = field(init=False, factory=asyncio.get_running_loop, repr=False)
    _proxy_at: tuple[str, int] = field(init=False, default=("", 0), repr=False)
    proxy_headers: Mapping[str, str] = field(init=False, factory=dict, repr=False)
    """The header with the credential for the proxy, if it wants one."""

    def __attrs_post_init__(self) -> None:
        if self.proxy is None:
            return
        if not is_proxy(self.proxy):
            raise ValueError(f"the proxy must be a URL of the form {PROXY_FORM}")
        parts = urlsplit(self.proxy)
        self._proxy_at = parts.hostname or "", parts.port or 80
        if parts.username is not None:
            credential = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            self.proxy_headers = {"proxy-authorization": f"Basic {b64encode(credential.encode()).decode()}"}

    async def dial(self, origin: Origin, on_lost: Callable[[Connection], None], until: float) -> Connection:
        """Open a connection that is ready for a request; TimeoutError when a proxy has not answered at `until`."""
        try:
            context = await self.context(origin.tls) if origin.scheme == "https" else None
            if self.proxy is None:
                return await self._connect((origin.host, origin.port), on_lost, context, origin.server_name)
            connection = await self._connect(self._proxy_at, on_lost)
            if context is None:
                return connection
            await self._ask_for_tunnel(connection, origin, until)
            return await self._secured(connection, on_lost, context, origin.server_name)
        except TimeoutError:
            raise
        except (OSError, UnicodeError) as error:
            raise _not_connected(error) from None

    async def _connect(
        self,
        at: tuple[str, int],
        on_lost: Callable[[Connection], None],
        context: ssl.SSLContext | None = None,
        server_name: str | None = None,
    ) -> Connection:
        addresses = await self._addresses(at)
        try:
            sock = await aiohappyeyeballs.start_connection(addresses, happy_eyeballs_delay=_NEXT_ADDRESS_SECONDS)
        except OSError:
            if (name := self._names.get(at)) is not None:
                name.until = 0.0
            raise
        _, connection = await self._loop.create_connection(
            lambda: Connection(self._buffer, on_lost),
            sock=sock,
            ssl=context,
            server_hostname=server_name if context else None,
        )
        return connection

    async def _addresses(self, at: tuple[str, int]) -> Sequence[AddrInfoType]:
        if literal(at[0]) is not None:
            return await (self.resolve or addresses_of)(*at)
        if (name := self._names.get(at)) is None:
            if len(self._names) >= _MAX_NAMES:
                del self._names[next(iter(self._names))]
            name = self._names[at] = _Name()
        now = self._loop.time()
        if now < name.until:
            return name.addresses
        if name.lookup is None:
            name.lookup = self._loop.create_task(self._look_up(name, at))
            name.lookup.add_done_callback(_noted)
        if now >= name.usable_until:
            return await asyncio.shield(name.lookup)
        try:
            async with asyncio.timeout(_PATIENCE_SECONDS):
                return await asyncio.shield(name.lookup)
        except TimeoutError:
            pass
        except socket.gaierror as error:
            if error.errno != socket.EAI_AGAIN:
                raise
        name.until = max(name.until, self._loop.time() + 2 * _PATIENCE_SECONDS)
        return name.addresses

    async def _look_up(self, name: _Name, at: tuple[str, int]) -> Sequence[AddrInfoType]:
        try:
            async with self._lookups:
                name.addresses = await (self.resolve or addresses_of)(*at)
            name.until = self._loop.time() + _NAME_SECONDS
            name.usable_until = self._loop.time() + _STALE_SECONDS
            return name.addresses
        finally:
            name.lookup = None

    async def context(self, tls: Tls | None) -> ssl.SSLContext:
        """How TLS is spoken; made once for each set of files, and again when they have changed."""
        tls = tls or _PLAIN
        stamp, kept = _stamp(tls), self._contexts.get(tls)
        if kept is not None and kept[0] == stamp:
            return kept[1]
        try:
            context = await self._loop.run_in_executor(None, _new_context, tls)
        except OSError as error:
            if kept is not None:
                return kept[1]  # they are being renewed: the next connection looks again
            refused = _no_tls("its TLS files cannot be read")
            refused.add_note(f"the files of `tls` cannot be used: {error}")
            raise refused from None
        self._contexts[tls] = stamp, context
        return context

    async def _ask_for_tunnel(self, proxy: Connection, origin: Origin, until: float) -> None:
        at = f"{origin.host_in_url}:{origin.port}"
        fields = "".join(f"{name}: {value}\r\n" for name, value in self.proxy_headers.items())
        try:
            await proxy.ask(f"CONNECT {at} HTTP/1.1\r\nhost: {at}\r\n{fields}\r\n".encode(), b"", until, bare=True)
        except BaseException as error:
            proxy.abort()
            if isinstance(error, UpstreamInvalid):
                raise _no_tunnel("does not answer in HTTP") from None
            raise
        if proxy.fault is not None or not 200 <= proxy.status < 300:
            proxy.abort()
            raise _no_tunnel(f"answered with status {proxy.status}")

    async def _secured(
        self, outer: Connection, on_lost: Callable[[Connection], None], context: ssl.SSLContext, server_name: str
    ) -> Connection:
        inner = Connection(self._buffer, on_lost)
        transport = await self._loop.start_tls(outer.detach(), inner, context, server_hostname=server_name)
        if transport is None:
            raise ConnectionResetError
        # Nobody else calls this for a transport that was there before.
        inner.connection_made(transport)
        return inner


def _noted(lookup: asyncio.Task[Sequence[AddrInfoType]]) -> None:
    """Whoever waited for it may have left: asyncio is not to say that nobody has seen its error."""
    if not lookup.cancelled():
        lookup.exception()


def invalid_url() -> UpstreamUnreachable:
    """The error for a URL that leads nowhere."""
    return UpstreamUnreachable("No connection to the provider: its configured URL is not valid.")


def _files(tls: Tls) -> tuple[Path | None, ...]:
    return tls.ca_file, tls.cert_file, tls.key_file


def _new_context(tls: Tls) -> ssl.SSLContext:
    for file in _files(tls):
        if file is not None:
            file.open("rb").close()  # OpenSSL's own error would not say which one it is
    context = ssl.create_default_context(cafile=tls.ca_file)
    context.set_alpn_protocols(["http/1.1"])
    if tls.cert_file is not None:
        try:
            # Without this one, a passphrase would be asked for at the terminal.
            context.load_cert_chain(tls.cert_file, tls.key_file, password="")
        except ssl.SSLError as error:
            said = f"{error}: they must hold a certificate and its key, which has no passphrase"
            raise ssl.SSLError(error.errno, said) from error
    return context


def _stamp(tls: Tls) -> _Stamp:
    """What tells that its files have changed."""
    return tuple(map(_changed_at, _files(tls)))


def _changed_at(file: Path | None) -> int | None:
    try:
        return None if file is None else file.stat().st_mtime_ns
    except OSError:
        return None


def _not_connected(error: OSError | UnicodeError) -> UpstreamError:
    if isinstance(error, UnicodeError):
        return invalid_url()
    if isinstance(error, socket.gaierror):
        return UpstreamUnreachable("No connection to the provider: its host name has no address.")
    if isinstance(error, ssl.SSLCertVerificationError):
        return _no_tls("its certificate is not trusted")
    if isinstance(error, ssl.SSLError):
        return _no_tls("the TLS handshake failed")
    if error.errno in _FILES_USED_UP:
        used_up = UpstreamUnreachable("No connection to the provider: this gateway has too many files open.")
        used_up.ours = True
        return used_up
    reason = f": {os.strerror(error.errno).lower()}" if error.errno else ""
    return UpstreamUnreachable(f"No connection to the provider{reason}.")


def _no_tunnel(reason: str) -> UpstreamUnreachable:
    return UpstreamUnreachable(f"No connection to the provider: the proxy {reason}.")


def _no_tls(reason: str) -> UpstreamUnreachable:
    refused = UpstreamUnreachable(f"No connection to the provider: {reason}.", code="upstream_tls")
    refused.again = False
    return refused
