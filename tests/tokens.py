"""Pieces that tests of tokens use: a gateway that takes them, and tokens that no library would make."""

from __future__ import annotations

from base64 import urlsafe_b64encode
from collections.abc import Mapping
from typing import Any

import orjson
from yamls import config as yaml_of

from qlens.testing import Response, Running
from qlens.testing.oidc import AUDIENCE, FakeIssuer

MODELS = "/v1/models"


def entry(issuer: FakeIssuer | None = None, /, **settings: Any) -> dict[str, Any]:
    """The entry of a plugin `jwt`; None takes a setting out."""
    usual = {
        "plugin": "jwt",
        "issuer": issuer.issuer if issuer is not None else "https://login.example.com",
        "audience": AUDIENCE,
        "tenant_claim": "org",
    }
    return {name: value for name, value in {**usual, **settings}.items() if value is not None}


def config(*auth: Mapping[str, Any], **more: Any) -> str:
    """A configuration with these auth plugins."""
    return yaml_of({"auth": list(auth), **more})


def packed(value: Any) -> str:
    """A part of a token: JSON, or bytes as they are, in base64url."""
    raw = value if isinstance(value, bytes) else orjson.dumps(value)
    return urlsafe_b64encode(raw).decode().rstrip("=")


def unsigned(header: Any, claims: Any, signature: bytes = b"") -> str:
    """A token with whatever header, claims and signature."""
    return f"{packed(header)}.{packed(claims)}.{packed(signature)}"


async def ask(gateway: Running, token: str) -> Response:
    """Show a token to a gateway."""
    return await gateway.get(MODELS, key=token)


async def taken(gateway: Running, token: str) -> None:
    """It is accepted."""
    answer = await ask(gateway, token)
    assert answer.status == 200, answer.text


async def refused(gateway: Running, token: str, reason: str = "") -> None:
    """It is refused as OpenAI refuses a wrong key, and nothing of it is shown."""
    answer = await ask(gateway, token)
    assert answer.status == 401, answer.text
    assert answer.headers["www-authenticate"] == "Bearer"
    error = answer.json()["error"]
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", None, "invalid_api_key")
    assert reason in error["message"]
    assert not [part for part in token.split(".") if len(part) > 12 and part[:12] in answer.text]
