"""Fetches images for Bedrock, which takes bytes only, and never from where the gateway alone may look."""

from __future__ import annotations

import asyncio
import socket
from base64 import b64encode
from collections.abc import Callable, Iterator
from functools import partial
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from typing import Any
from urllib.parse import urljoin, urlsplit

from attrs import define, field

from qlens import CallError, Deadlines, InvalidRequest, Upstream
from qlens_plugins.provider.bedrock.fan_out import gathered

Address = IPv4Address | IPv6Address

MOST_IMAGES = 20
MOST_BYTES = 20_000_000
"""The most bytes of one image; what Bedrock takes at most together is its own to say."""
SECONDS = 15
"""How long one image may take."""
_REDIRECTS = 3
_DEADLINES = Deadlines(connect_seconds=5, first_byte_seconds=10, idle_seconds=5)
_MOVED = {301, 302, 303, 307, 308}
# Addresses for everybody; those that lead through a translator to IPv4 are not among them.
_GLOBAL_V6 = IPv6Network("2000::/3")
_TRANSLATED = (IPv6Network("2002::/16"), IPv6Network("2001::/32"))


def is_public(address: Address) -> bool:
    """Whether an address is on the open internet: not this machine, its network, or a cloud's metadata."""
    if isinstance(address, IPv6Address):
        inside = address in _GLOBAL_V6 and not any(address in network for network in _TRANSLATED)
        return inside and address.is_global
    return address.is_global and not address.is_multicast


@define(eq=False)
class Images:
    """Fetches the images of one message after another.

    Only https: an address is looked up here and again when it is dialled, and a name that has moved to a private
    address in between has no certificate there.
    """

    http: Upstream = field(repr=False)
    allowed: Callable[[Address], bool] = is_public

    async def put_in(self, messages: list[dict[str, Any]]) -> None:
        """Replace each https URL by the image itself, as a data URL; raises InvalidRequest for what is no image."""
        found = list(_https_images(messages))
        if len(found) > MOST_IMAGES:
            raise InvalidRequest(f"At most {MOST_IMAGES} images are fetched for a call.", param="messages")
        await gathered([partial(self._fetch, image, param) for image, param in found])

    async def _fetch(self, image: dict[str, Any], param: str) -> None:
        url = image["url"]
        try:
            async with asyncio.timeout(SECONDS):
                content = await self._get(url)
        except (CallError, OSError, UnicodeError, ValueError):  # TimeoutError is an OSError
            content = b""
        if not content:
            # Why it failed would tell what the gateway can reach.
            raise InvalidRequest("The image could not be fetched.", param=param, code="invalid_image_url")
        image["url"] = f"data:application/octet-stream;base64,{b64encode(content).decode()}"

    async def _get(self, url: str) -> bytes:
        for _ in range(_REDIRECTS + 1):
            await self._check(url)
            answer = await self.http.open("GET", url, headers={"accept": "image/*"}, body=None, deadlines=_DEADLINES)
            try:
                if answer.status == 200:
                    return await answer.read(MOST_BYTES)
                if answer.status not in _MOVED:
                    return b""
                url = urljoin(url, answer.headers.get("location", ""))
            finally:
                await answer.close()
        return b""

    async def _check(self, url: str) -> None:
        """Raise ValueError for a URL that does not lead to the open internet."""
        parts = urlsplit(url)
        if parts.scheme != "https" or not parts.hostname or parts.username is not None:
            raise ValueError("no https")
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(parts.hostname, parts.port or 443, type=socket.SOCK_STREAM)
        addresses = [ip_address(str(entry[4][0]).partition("%")[0]) for entry in found]
        if not addresses or not all(map(self.allowed, addresses)):
            raise ValueError("no public address")


def _https_images(messages: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], str]]:
    for position, message in enumerate(messages):
        content = message.get("content")
        for place, part in enumerate(content if isinstance(content, list) else ()):
            image = part.get("image_url")
            if isinstance(image, dict) and str(image.get("url"))[:6].lower() == "https:":
                yield image, f"messages[{position}].content[{place}].image_url.url"
