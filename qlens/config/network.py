"""How connections are made: through a proxy, with which certificates, how many at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import attrs
from attrs import field, frozen
from attrs.validators import ge, optional

from qlens.config.scalars import Url

PROXY_FORM = "http://[user:password@]host:port"


def is_proxy(url: str) -> bool:
    """Whether a URL has the form of a proxy's."""
    try:
        parts = urlsplit(url)
        has_port = parts.port != 0
    except ValueError:
        return False
    rest = parts.path.strip("/") + parts.query + parts.fragment
    return has_port and parts.scheme == "http" and bool(parts.hostname) and not rest


def _proxy(_: object, __: attrs.Attribute[Any], value: str) -> None:
    if not is_proxy(value):
        raise ValueError(f"must be a URL of the form {PROXY_FORM}")


@frozen
class Tls:
    """How servers are trusted, and who the gateway is to them; certificates are always verified.

    Files that change are read again for the next connection.
    """

    ca_file: Path | None = None
    """Certificates of the authorities that are trusted instead of the system's, in PEM."""
    cert_file: Path | None = None
    """The gateway's own certificate and those above it, in PEM, for servers that ask for one."""
    key_file: Path | None = None
    """Its key, if it is not in the same file."""
    server_name: str | None = None
    """What a server's certificate must be for, and what SNI asks for; without it the host of the URL."""

    def __attrs_post_init__(self) -> None:
        if self.key_file is not None and self.cert_file is None:
            raise ValueError("`key_file` belongs to a `cert_file`")


@frozen
class Network:
    """How connections are made. The environment's proxies are never used."""

    proxy: Url | None = field(default=None, validator=optional(_proxy))
    """A proxy for all connections, `http://[user:password@]host:port`; https goes through a tunnel in it (CONNECT)."""
    tls: Tls | None = None
    """Certificates, for https."""
    max_connections: int | None = field(default=None, validator=optional(ge(1)))
    """How many connections one host and port may have, in each process; calls beyond it wait for one, and fail with 503
    when they have none within `connect_seconds`. Without it there is no bound. Realtime sessions are not among them."""
