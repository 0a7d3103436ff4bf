"""A gateway with a store of keys, beside which a file has a key for every role."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import orjson
from ledgers import Place

from qlens.clock import Clock
from qlens.config.entries import BUILT_IN_ROLES
from qlens.testing import Response, Running, running

CALL = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "hello"}]}
CUSTOM = ("auditor", "key_desk", "team_desk")
ROLES = (*BUILT_IN_ROLES, *CUSTOM, "undefined")
DEFINED = """{auditor: {like: viewer, paths: [/admin/audit]}, key_desk: {like: operator, paths: [/admin/keys]},
          team_desk: {like: tenant_operator, paths: [/admin/keys]}}"""


def key_of(role: str, tenant: str = "acme") -> str:
    """The key of the file that has a role, in a tenant."""
    return f"sk-example-{tenant}-{role}-0123456789abcdef"


ADMIN = key_of("admin", "ops")


def key_file() -> str:
    """The file of keys: one for each role in acme and globex, and an admin in ops."""
    rows = [
        _row(key_of(role, tenant), f"{tenant}-{role}", tenant, role) for tenant in ("acme", "globex") for role in ROLES
    ]
    return "keys:\n" + "".join([*rows, _row(ADMIN, "root", "ops", "admin")])


def _row(key: str, id_: str, tenant: str, role: str) -> str:
    hashed = hashlib.sha256(key.encode()).hexdigest()
    return f"- {{id: {id_}, hash: 'sha256:{hashed}', tenant: {tenant}, roles: [{role}]}}\n"


def config(settings: str = "poll_seconds: 0.05", cost: str = "", *, place: Place | None = None) -> str:
    """The configuration, with the keys in a database, by default in a file beside it."""
    if place is not None:
        settings += f', url: "{place.url}"'
    return f"""
server:
  roles: {DEFINED}
pipeline:
  auth: [{{plugin: key_store, {settings}}}, {{plugin: api_keys, file: keys.yaml}}]
  cost: [{cost}]
providers: {{echo: {{plugin: echo}}}}
models:
  gpt-4o-mini: {{max_output_tokens: 1000, targets: [{{provider: echo, model: gpt-4o-mini}}]}}
  gpt-4o: {{max_output_tokens: 1000, targets: [{{provider: echo, model: gpt-4o}}]}}
  claude: {{max_output_tokens: 1000, targets: [{{provider: echo, model: claude}}]}}
"""


@asynccontextmanager
async def stored(
    text: str | None = None, *, place: Place | None = None, clock: Clock | None = None
) -> AsyncIterator[Running]:
    """Run it."""
    async with running(text or config(place=place), files={"keys.yaml": key_file()}, clock=clock) as gateway:
        yield gateway


async def send(gateway: Running, method: str, path: str, body: Any = None, key: str = ADMIN) -> Response:
    """Ask the admin API."""
    raw = None if body is None else orjson.dumps(body)
    return await gateway.request(method, path, body=raw, key=key)


async def made(gateway: Running, key: str = ADMIN, **body: Any) -> dict[str, Any]:
    """Make a key; what the answer says, the key itself included."""
    answer = await send(gateway, "POST", "/admin/keys", {"tenant": "acme", **body}, key)
    assert answer.status == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def status(gateway: Running, key: str) -> int:
    """What a call with a key is answered."""
    return (await gateway.get("/v1/models", key=key)).status
