"""The one client for URLs that tenants have a say in: it reaches public addresses, and what the operator allows.

A name is resolved once, and connections go to the addresses that were checked: what the name leads to a moment later
does not matter. Redirects are not followed, proxies of the environment are ignored, bodies and times are bounded.
https://cheatsheetseries.owasp.org/cheatsheets/Server_Side_Request_Forgery_Prevention_Cheat_Sheet.html
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from functools import partial
from ipaddress import (
    IPv4Address,
    IPv4Network,
    IPv6Address,
    IPv6Network,
    ip_address,
    ip_network,
)
from itertools import compress
from urllib.parse import urlsplit

from aiohappyeyeballs import AddrInfoType
from attrs import define, evolve, field, frozen

from qlens.errors import UpstreamError, UpstreamUnreachable
from qlens.names import addresses_of, literal
from qlens.upstream import Answer, Deadlines, Upstream
from qlens.upstream_connection import Headers

__all__ = ["Outbound", "OutboundFailed", "Reach", "Received", "is_public", "networks", "outbound_url"]

HTTPS_PORT = 443
_PORTS = {"http": 80, "https": HTTPS_PORT}
MOST_BYTES = 64 * 1024
"""Of an answer's body, where nobody says otherwise."""

_Address = IPv4Address | IPv6Address
_Network = IPv4Network | IPv6Network

# https://www.iana.org/assignments/iana-ipv4-special-registry, multicast, and where Azure answers its machines.
_V4_NOT_PUBLIC = tuple(
    map(
        IPv4Network,
        (
            *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "168.63.129.16/32", "169.254.0.0/16"),
            *("172.16.0.0/12", "192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15"),
            *("198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4"),
        ),
    )
)
# https://www.iana.org/assignments/iana-ipv6-special-registry: all else outside 2000::/3 is no public address.
_V6_GLOBAL = IPv6Network("2000::/3")
_V6_NOT_PUBLIC = tuple(map(IPv6Network, ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20")))
_NAT64 = IPv6Network("64:ff9b::/96")


class OutboundFailed(Exception):
    """Nothing came back: no address that may be reached, no connection, no answer in time, or none in HTTP."""


@frozen
class Received:
    """What a receiver answered."""

    status: int
    headers: Headers = field(repr=False)
    body: bytes | None = field(repr=False)
    """None: there was more than may be read, or it did not come in time."""


def is_public(address: _Address) -> bool:
    """Whether an address is one of the internet's, for anybody, and no other address in disguise."""
    if isinstance(address, IPv4Address):
        return address.is_global and not any(address in network for network in _V4_NOT_PUBLIC)
    return address in _V6_GLOBAL and address.is_global and not any(address in network for network in _V6_NOT_PUBLIC)


def networks(_config: object, _attribute: object, value: Sequence[str]) -> None:
    """Check, as an attrs validator, that a setting lists networks."""
    for each in value:
        try:
            ip_network(each)
        except ValueError as error:
            raise ValueError(f"{each!r} is no network such as 10.1.0.0/16 or fd00::/8: {error}") from None


def outbound_url(_config: object, _attribute: object, value: str) -> None:
    """Check, as an attrs validator, that a setting is an http or https URL, with a query perhaps, and nobody's name."""
    try:
        parts = urlsplit(value)
        port = parts.port
    except ValueError:
        raise ValueError("must be a URL; this one cannot be read") from None
    if parts.scheme not in {"http", "https"} or not parts.hostname or port == 0:
        raise ValueError("must be a URL that begins with https:// and a host")
    if parts.username is not None or parts.fragment:
        raise ValueError("must be a URL without user and fragment")
    if not value.isascii() or not value.isprintable() or " " in value or "\\" in value:
        raise ValueError("must be a URL without blanks and backslashes and with other than ASCII characters escaped")


@frozen
class Reach:
    """Where connections may go: over https to public addresses, and to the networks that the operator allows.

    Those are reached at any port, and over http too.
    """

    allow: tuple[str, ...] = ()
    """Networks that may be reached though they are not public, as `10.1.0.0/16`."""
    ports: tuple[int, ...] = (HTTPS_PORT,)
    """At which public addresses may be reached."""
    _allowed: tuple[_Network, ...] = field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        object.__setattr__(self, "_allowed", tuple(map(ip_network, self.allow)))

    def leads_to(self, address: _Address, port: int, scheme: str = "https") -> bool:
        """Whether a connection may go there."""
        is_listed = any(address in network for network in self._allowed)
        if not is_listed and not (scheme == "https" and port in self.ports and is_public(address)):
            return False
        # A network of translated addresses lets through what may be reached behind it, and no more.
        inner = _translated(address)
        return inner is None or self.leads_to(inner, port, scheme)

    def check(self, url: str) -> None:
        """Raise ValueError for a URL that can be seen to be out of reach without asking for its name."""
        parts = urlsplit(url)
        port = parts.port or _PORTS[parts.scheme]
        address = literal(parts.hostname or "")
        if address is not None and not self.leads_to(address, port, parts.scheme):
            raise ValueError(self.refusal((address,), port, parts.scheme))
        if not self.allow and parts.scheme != "https":
            raise ValueError("must begin with https://: http goes to networks that `allow` lists, and to no others")
        if not self.allow and port not in self.ports:
            raise ValueError(f"port {port} is none of `ports`")

    def refusal(self, addresses: Sequence[_Address], port: int, scheme: str) -> str:
        """Why none of some addresses may be reached."""
        if not any(is_public(address) for address in addresses):
            named = ", ".join(map(str, addresses[:3]))
            return f"{named} is not a public address, and in no network that `allow` lists"
        if scheme != "https":
            return "http goes to networks that `allow` lists, and to no others"
        return f"port {port} is none of `ports`"


@define(eq=False)
class Outbound:
    """Sends requests to where they may go; make it inside a running event loop and close it with `aclose`."""

    reach: Reach = field(factory=Reach)
    # Each with its own: an address found for https must not be used for http.
    _by_scheme: dict[str, Upstream] = field(init=False)

    def __attrs_post_init__(self) -> None:
        self._by_scheme = {scheme: Upstream(resolve=partial(self._addresses, scheme)) for scheme in _PORTS}

    async def send(
        self,
        method: str,
        url: str,
        *,
        headers: Mapping[str, str],
        body: bytes | None,
        seconds: float,
        most_bytes: int = MOST_BYTES,
    ) -> Received:
        """Send a request and read its answer, of whatever status, all within some seconds.

        Raises OutboundFailed when there is none; one whose head has come counts, whatever becomes of its body.
        """
        upstream = self._by_scheme.get(urlsplit(url).scheme)
        if upstream is None:
            raise OutboundFailed("its URL is neither https nor http")
        deadlines = Deadlines(connect_seconds=seconds, first_byte_seconds=seconds, idle_seconds=seconds)
        received = None
        try:
            async with asyncio.timeout(seconds):
                answer = await upstream.open(method, url, headers=headers, body=body, deadlines=deadlines)
                received = Received(answer.status, answer.headers, None)
                received = evolve(received, body=await _read(answer, most_bytes))
        except TimeoutError:
            failure = f"no answer within {seconds:g} s"
        except UpstreamError as error:
            failure = _said(error)
        if received is None:
            raise OutboundFailed(failure)
        return received

    async def aclose(self) -> None:
        """Close all connections."""
        for upstream in self._by_scheme.values():
            await upstream.aclose()

    async def _addresses(self, scheme: str, host: str, port: int) -> Sequence[AddrInfoType]:
        """The addresses of a host, but for those that may not be reached."""
        found = await addresses_of(host, port)
        # The system reads 127.1, 2130706433 and 0x7f.1 as addresses too: what counts is where the connection goes.
        addresses = [ip_address(str(each[4][0]).partition("%")[0]) for each in found]
        may = [self.reach.leads_to(address, port, scheme) for address in addresses]
        if not any(may):
            raise UpstreamUnreachable(f"No connection to the provider: {self.reach.refusal(addresses, port, scheme)}.")
        return list(compress(found, may))


async def _read(answer: Answer, most_bytes: int) -> bytes | None:
    pieces: list[bytes] = []
    size = 0
    try:
        async for piece in answer.chunks():
            size += len(piece)
            if size > most_bytes:
                return None
            pieces.append(piece)
    finally:
        await answer.close()
    return b"".join(pieces)


def _translated(address: _Address) -> IPv4Address | None:
    """The IPv4 address that a packet to an IPv6 address ends up at, if there is one in it."""
    if isinstance(address, IPv4Address):
        return None
    if address in _NAT64:
        return IPv4Address(int(address) & 0xFFFF_FFFF)
    return address.ipv4_mapped or address.sixtofour


def _said(error: UpstreamError) -> str:
    """What has failed, of somebody who is no provider."""
    return error.message.replace(" to the provider", "").replace("The provider", "it").rstrip(".")
