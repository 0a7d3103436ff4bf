"""A token's parts, split without trust; its claims, judged by the clock and made into a caller.

https://www.rfc-editor.org/rfc/rfc7515, https://www.rfc-editor.org/rfc/rfc7519#section-4
"""

from __future__ import annotations

from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Mapping
from typing import Any

import orjson
from attrs import field, frozen

from qlens import Caller
from qlens_plugins.auth.jwt.keys import Key
from qlens_plugins.auth.jwt.settings import JwtConfig

MOST_BYTES = 8192
"""A longer token is not looked at."""
MOST_CHARACTERS = 256
"""A longer name of a tenant, project, subject or tag is refused."""

_LATEST = 1e11
"""Unix seconds that are a time still; more is a mistake, or milliseconds."""


class Refused(Exception):
    """A token of the issuer that is not accepted; the message is for its sender and has nothing of the token in it."""


@frozen
class Token:
    """A signed token in its three parts, nothing of which is trusted yet (RFC 7515, 7.1)."""

    claims: Mapping[str, Any] = field(repr=False)
    _signed: bytes = field(repr=False)
    _header: str = field(repr=False)
    _signature: str = field(repr=False)

    @classmethod
    def read(cls, credential: str) -> Token | None:
        """Split a credential; None when it is no token."""
        parts = credential.split(".")
        if len(parts) != 3 or not credential.isascii():
            return None
        header, payload, signature = parts
        claims = _object_in(payload)
        return None if claims is None else cls(claims, f"{header}.{payload}".encode(), header, signature)

    def header(self) -> Mapping[str, Any]:
        """What it says of itself; raises Refused when that is no JSON object."""
        found = _object_in(self._header)
        if found is None:
            raise Refused("it is malformed")
        return found

    def prove(self, key: Key, algorithm: str) -> None:
        """Check the signature; raises Refused when it is not this key's."""
        try:
            signature = _decoded(self._signature)
        except ValueError:
            raise Refused("it is malformed") from None
        if not key.has_signed(self._signed, signature, algorithm):
            raise Refused("its signature is wrong")


def _decoded(part: str) -> bytes:
    """The bytes of a part; raises ValueError for other letters, for padding, and for bits that say nothing."""
    raw = urlsafe_b64decode(part + "=" * (-len(part) % 4))
    if urlsafe_b64encode(raw).rstrip(b"=") != part.encode():
        raise ValueError("it is written differently")
    return raw


def _object_in(part: str) -> Mapping[str, Any] | None:
    try:
        found = orjson.loads(_decoded(part))
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def check(claims: Mapping[str, Any], config: JwtConfig, now: float) -> float:
    """Judge verified claims; returns when they end, in Unix seconds. Raises Refused."""
    if claims.get("iss") != config.issuer:
        raise Refused("its issuer is another one")
    audience = claims.get("aud")
    named = audience if isinstance(audience, list) else [audience]
    if not any(isinstance(name, str) and name in config.audiences for name in named):
        raise Refused("its audience (aud) is another one")
    ends = _time(claims, "exp")
    if ends is None:
        raise Refused("it has no time of expiry (exp)")
    if now >= ends + config.leeway_seconds:
        raise Refused("it has expired")
    begins = _time(claims, "nbf")
    if begins is not None and now < begins - config.leeway_seconds:
        raise Refused("it is not valid yet (nbf)")
    return ends


def caller_of(claims: Mapping[str, Any], config: JwtConfig, name: str, ends: float) -> Caller:
    """The caller that verified claims describe; raises Refused when a claim is missing or no text."""
    values = _list(claims, config.roles_claim) or ()
    return Caller(
        tenant=_needed(claims, config.tenant_claim, "tenant"),
        subject=_needed(claims, config.subject_claim, "subject"),
        by=name,
        project=_text(claims, config.project_claim),
        roles=frozenset(config.default_roles).union(config.roles[value] for value in values if value in config.roles),
        models=(_list(claims, config.models_claim) or ()) if config.models_claim is not None else None,
        tags={tag: text for tag, claim in config.tag_claims.items() if (text := _text(claims, claim)) is not None},
        expires_at=ends,
    )


def _time(claims: Mapping[str, Any], name: str) -> float | None:
    value = claims.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < _LATEST:
        raise Refused(f"its {name} is no time in seconds")
    return float(value)


def _at(claims: Mapping[str, Any], path: str) -> Any:
    """The value of a claim: the one of this whole name, or else the one that the path leads to."""
    if path in claims:
        return claims[path]
    value: Any = claims
    for step in path.split("."):
        if not isinstance(value, dict):
            return None
        value = value.get(step)
    return value


def _needed(claims: Mapping[str, Any], path: str, what: str) -> str:
    text = _text(claims, path)
    if text is None:
        raise Refused(f"it has no claim {path}, which names the {what}")
    return text


def _text(claims: Mapping[str, Any], path: str | None) -> str | None:
    value = None if path is None else _at(claims, path)
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)  # identity services number organisations
    if value is None:
        return None
    if not isinstance(value, str) or len(value) > MOST_CHARACTERS or not value.strip() or not value.isprintable():
        raise Refused(f"its claim {path} is no printable text of up to {MOST_CHARACTERS} characters")
    return value


def _list(claims: Mapping[str, Any], path: str | None) -> tuple[str, ...] | None:
    value = None if path is None else _at(claims, path)
    if value is None:
        return None
    if isinstance(value, str):
        value = value.split()  # as scopes are written (RFC 8693, 4.2)
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise Refused(f"its claim {path} is no list of texts")
    return tuple(value)
