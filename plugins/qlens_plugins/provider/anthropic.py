"""Anthropic itself, and every server that speaks its messages."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from attrs import define, field, frozen, validators

from qlens import (
    Call,
    Deadlines,
    Gateway,
    Network,
    Outgoing,
    Reply,
    Secret,
    Target,
    Upstream,
    extra_headers,
    header_value,
    hookimpl,
    http_url,
    path_patterns,
    post_messages,
    send_request,
)

if TYPE_CHECKING:
    from attrs import Attribute

PATHS = {"messages": "/v1/messages", "count_tokens": "/v1/messages/count_tokens"}

_BETA = re.compile(r"[A-Za-z0-9._-]{1,128}")
_SAMPLING = ("temperature", "top_k", "top_p")
_LAST_WITH_SAMPLING = "2023-06-01"
"""The last version of the API that takes temperature, top_p and top_k."""


def _names(_config: object, _attribute: Attribute[tuple[str, ...]], value: tuple[str, ...]) -> None:
    for name in value:
        if not re.fullmatch(r"[A-Za-z0-9._*-]{1,128}", name):
            raise ValueError(f"{name!r} is not the name of a beta: letters, digits, dots and hyphens")


@frozen
class AnthropicConfig:
    """Sends calls to Anthropic, or to any server with an Anthropic-compatible API."""

    base_url: str = field(default="https://api.anthropic.com", validator=http_url)
    """The address in front of `/v1/messages`, as Anthropic's SDK wants it: without `/v1`."""
    api_key: Secret | None = field(default=None, validator=header_value)
    """Sent as `x-api-key`; leave it out for servers that want none, or another header."""
    version: str = field(default=_LAST_WITH_SAMPLING, validator=validators.matches_re(r"\d{4}-\d\d-\d\d"))
    """Sent as `anthropic-version`; versions after 2023-06-01 take no temperature, top_p and top_k."""
    betas: tuple[str, ...] = field(default=(), validator=_names)
    """Betas that every call takes part in, sent as `anthropic-beta`."""
    client_betas: tuple[str, ...] = field(default=(), validator=_names)
    """Betas that clients may ask for in their own `anthropic-beta`: names, or patterns (`context-*`)."""
    headers: Mapping[str, Secret] = field(
        factory=dict, hash=False, validator=extra_headers("anthropic-beta", "anthropic-version", "x-api-key")
    )
    """More headers for every request."""
    passthrough: tuple[str, ...] = field(default=(), validator=path_patterns)
    """What clients may ask of the server as it is, at `/v1/providers/{name}/...`: `GET /v1/models`. It runs auth and
    limits, is billed by what the answer says it used, and objects there belong to all tenants."""
    network: Network | None = None
    """How the server is reached, where it is not as `server.network` says."""
    connect_seconds: float = field(default=5.0, validator=validators.gt(0))
    """How long a connection may take to open."""
    first_byte_seconds: float = field(default=120.0, validator=validators.gt(0))
    """How long the server may think before the first byte of its answer."""
    idle_seconds: float = field(default=60.0, validator=validators.gt(0))
    """How long the server may pause within its answer."""


@define(eq=False)
class Anthropic:
    """Sends messages as they are, with the gateway's own credential."""

    config: AnthropicConfig
    name: str
    _http: Upstream | None = field(default=None, init=False, repr=False)
    _headers: Mapping[str, str] = field(init=False, repr=False)
    _deadlines: Deadlines = field(init=False, repr=False)

    Config = AnthropicConfig

    def __attrs_post_init__(self) -> None:
        config = self.config
        key = {"x-api-key": config.api_key.reveal()} if config.api_key else {}
        extra = {name.lower(): secret.reveal() for name, secret in config.headers.items()}
        self._headers = {**key, "anthropic-version": config.version, **extra}
        self._deadlines = Deadlines(config.connect_seconds, config.first_byte_seconds, config.idle_seconds)

    @property
    def kind(self) -> str | None:
        """Anthropic's own models are behind its own address only; others speak its API too."""
        return "anthropic" if urlsplit(self.config.base_url).hostname == "api.anthropic.com" else None

    def dialects(self, target: Target) -> tuple[str, ...]:
        """The dialects spoken for a target."""
        return ("messages", "count_tokens")

    @property
    def passthrough(self) -> tuple[str, ...]:
        """The patterns of requests that pass as they are."""
        return self.config.passthrough

    @hookimpl
    @asynccontextmanager
    async def lifespan(self, gateway: Gateway) -> AsyncIterator[None]:
        """Take the gateway's connections."""
        async with gateway.reach(self.config.network) as self._http:
            yield

    @hookimpl
    async def send(self, call: Call, outgoing: Outgoing) -> Reply:
        """Post the messages."""
        assert self._http is not None, "the lifespan is not open"
        if outgoing.request is not None:
            return await send_request(
                self._http, self.config.base_url, headers=self._headers, outgoing=outgoing, deadlines=self._deadlines
            )
        if outgoing.operation.dialect != outgoing.dialect and self.config.version > _LAST_WITH_SAMPLING:
            # Clients of other APIs cannot know that this version has no such fields; its own clients are told.
            outgoing.body = {name: value for name, value in outgoing.fields().items() if name not in _SAMPLING}
        betas = self._betas(call)
        return await post_messages(
            self._http,
            self.config.base_url.rstrip("/") + PATHS[outgoing.dialect],
            headers={**self._headers, "anthropic-beta": betas} if betas else self._headers,
            outgoing=outgoing,
            deadlines=self._deadlines,
        )

    def _betas(self, call: Call) -> str:
        """Those of the operator, and of the client's those that it may ask for."""
        asked = [name.strip() for name in call.headers.get("anthropic-beta", "").split(",")]
        known = self.config.client_betas
        allowed = [name for name in asked if _BETA.fullmatch(name) and any(fnmatchcase(name, each) for each in known)]
        return ",".join(dict.fromkeys([*self.config.betas, *allowed]))
