"""What is served where: operations, the core's own endpoints and those of plugins."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import orjson

from qlens.call import Call, Reply
from qlens.errors import ConfigError, Fault
from qlens.operations import OPERATIONS, Operation, Paths
from qlens.registry import Endpoint, Registration, is_loopback

if TYPE_CHECKING:
    from qlens.gateway import Gateway

Served = Operation | Endpoint

ROLES = ("member", "viewer", "operator", "admin")
"""From least to most: a role includes those before it."""


def has_role(roles: Iterable[str], needed: str) -> bool:
    """Whether one of these roles is the needed one or more."""
    rank = {role: place for place, role in enumerate(ROLES)}
    return any(role == needed or rank.get(role, -1) >= rank.get(needed, len(ROLES)) for role in roles)


def served(gateway: Gateway, registration: Registration) -> tuple[Paths[Served], Paths[Served]]:
    """The paths of the client and of the admin listener; raises ConfigError when a plugin takes one that is taken."""
    client: Paths[Served] = Paths.of(
        (operation.method, path, operation) for operation in OPERATIONS for path in operation.paths
    )
    admin: Paths[Served] = Paths()
    for endpoint in own_endpoints(gateway):
        (client if endpoint.listener == "client" else admin).add(endpoint.method, endpoint.path, endpoint)
    faults = []
    for owner, endpoint in plugin_endpoints(registration):
        try:
            (client if endpoint.listener == "client" else admin).add(endpoint.method, endpoint.path, endpoint)
        except ValueError as error:
            faults.append(Fault(owner, f"cannot serve its endpoint: {error}"))
    if faults:
        raise ConfigError(faults)
    return client, admin


def plugin_endpoints(registration: Registration) -> list[tuple[str, Endpoint]]:
    """The endpoints of plugins, each with its owner."""
    return [(hook.instance, endpoint) for hook in registration.hooks.endpoints for endpoint in hook.fn()]


def own_endpoints(gateway: Gateway) -> tuple[Endpoint, ...]:
    """The core's endpoints."""

    async def healthz(call: Call) -> Reply:
        return _json({"status": "ok"})

    async def readyz(call: Call) -> Reply:
        if gateway.ready:
            return _json({"status": "ready", "plugins": _plugins(gateway)})
        return _json({"status": "draining", "plugins": _plugins(gateway)}, 503)

    async def metrics(call: Call) -> Reply:
        return Reply(headers={"content-type": "text/plain; version=0.0.4; charset=utf-8"}, body=gateway.metrics.text())

    async def health(call: Call) -> Reply:
        return _json(health_of(gateway))

    admin = gateway.config.server.admin
    open_metrics = admin.metrics == "open" or is_loopback(admin.host)
    return (
        Endpoint("GET", "/healthz", None, healthz),
        Endpoint("HEAD", "/healthz", None, healthz),
        Endpoint("GET", "/readyz", None, readyz),
        Endpoint("HEAD", "/readyz", None, readyz),
        Endpoint("GET", "/metrics", None if open_metrics else "viewer", metrics, "admin"),
        Endpoint("GET", "/admin/health", "viewer", health, "admin"),
    )


def health_of(gateway: Gateway) -> dict[str, Any]:
    """How a gateway is: what /admin/health shows of one process."""
    return {
        "ready": gateway.ready,
        "config": gateway.config.version,
        "running": gateway.current.running,
        "plugins": _plugins(gateway),
    }


def _plugins(gateway: Gateway) -> dict[str, Any]:
    return {name: {"ok": state.ok, "detail": state.detail} for name, state in gateway.health().items()}


def _json(body: object, status: int = 200) -> Reply:
    return Reply(status=status, body=orjson.dumps(body))
