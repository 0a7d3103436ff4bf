"""Asks an issuer for its keys: discovery, then the key set.

https://openid.net/specs/openid-connect-discovery-1_0.html#ProviderConfig
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import orjson

from qlens import Deadlines, Upstream, UpstreamError
from qlens_plugins.auth.jwt.keys import Key, KeysUnfit, from_jwks
from qlens_plugins.auth.jwt.settings import DISCOVERY, JwtConfig, is_loopback, safe_url

FETCH_SECONDS = 10
"""How long discovery and key set may take together."""
MOST_BYTES = 256 * 1024
"""How large each of the two answers may be."""

_DEADLINES = Deadlines(connect_seconds=5, first_byte_seconds=5, idle_seconds=5)


async def fetch(http: Upstream, config: JwtConfig) -> tuple[Key, ...]:
    """The issuer's keys; raises KeysUnfit, whose message has nothing in it that the issuer wrote."""
    try:
        async with asyncio.timeout(FETCH_SECONDS):
            url = config.jwks_url or await _discovered(http, config.issuer)
            return from_jwks(await _document(http, url, "the key set"), config.accepted)
    except TimeoutError:
        raise KeysUnfit(f"the issuer took longer than {FETCH_SECONDS} s") from None


async def _discovered(http: Upstream, issuer: str) -> str:
    document = await _document(http, issuer.rstrip("/") + DISCOVERY, "the discovery document")
    if document.get("issuer") != issuer:
        raise KeysUnfit("the discovery document is that of another issuer")
    url = document.get("jwks_uri")
    try:
        safe_url(None, None, url)  # type: ignore[arg-type]
    except (ValueError, TypeError, AttributeError):
        raise KeysUnfit("the discovery document has no jwks_uri that begins with https://") from None
    # An issuer elsewhere does not send the gateway to its own machine.
    if is_loopback(url) and not is_loopback(issuer):  # type: ignore[arg-type]
        raise KeysUnfit("the discovery document has a jwks_uri on this machine")
    return str(url)


async def _document(http: Upstream, url: str, name: str) -> Mapping[str, Any]:
    try:
        answer = await http.open("GET", url, headers={"accept": "application/json"}, body=None, deadlines=_DEADLINES)
        if answer.status != 200:  # a redirect is not followed: it could lead anywhere
            await answer.close()
            raise KeysUnfit(f"{name} was answered with status {answer.status}")
        document = orjson.loads(await answer.read(MOST_BYTES))
    except UpstreamError as error:
        raise KeysUnfit(f"{name} cannot be fetched: {type(error).__name__}") from None
    except orjson.JSONDecodeError:
        raise KeysUnfit(f"{name} is no JSON") from None
    if not isinstance(document, dict):
        raise KeysUnfit(f"{name} is no JSON object")
    return document
