"""What is served where: operations, the core's own endpoints and those of plugins."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import orjson
from attrs import evolve

from qlens.audit import written
from qlens.blamed import handler
from qlens.call import Call, Caller, Reply
from qlens.config.entries import RANKS
from qlens.errors import ConfigError, Fault
from qlens.operations import OPERATIONS, Operation, Paths
from qlens.placed import placed
from qlens.registry import Bound, Endpoint, Registration, is_loopback

if TYPE_CHECKING:
    from qlens.gateway import Gateway

Served = Operation | Endpoint

_RANKED = " or ".join(RANKS)


def served(gateway: Gateway, registration: Registration) -> tuple[Paths[Served], Paths[Served]]:
    """The paths of the client and of the admin listener; raises ConfigError when a plugin takes one that is taken."""
    client: Paths[Served] = Paths.of(
        (operation.method, path, operation) for operation in OPERATIONS for path in operation.paths
    )
    admin: Paths[Served] = Paths()
    for endpoint in own_endpoints(gateway):
        (client if endpoint.listener == "client" else admin).add(endpoint.method, endpoint.path, endpoint)
    faults = []
    for hook, endpoint in plugin_endpoints(registration):
        owner, answer = hook.instance, handler(endpoint.handler, hook, gateway.calls.failures)
        if endpoint.role not in (None, *RANKS):
            faults.append(Fault(owner, f"{endpoint.path} asks for the role {endpoint.role!r}, which is not {_RANKED}"))
        try:
            paths = client if endpoint.listener == "client" else admin
            paths.add(endpoint.method, endpoint.path, evolve(endpoint, handler=answer))
        except ValueError as error:
            faults.append(Fault(owner, f"cannot serve its endpoint: {error}"))
    if faults:
        raise ConfigError(faults)
    return client, admin


def plugin_endpoints(registration: Registration) -> list[tuple[Bound, Endpoint]]:
    """The endpoints of plugins, each with the hook that gave it; of those that instances share, the first one's.

    Raises StartupError when a plugin cannot say what it serves.
    """
    found: list[tuple[Bound, Endpoint]] = []
    shared: set[tuple[str, str, str]] = set()
    for hook in registration.hooks.endpoints:
        with placed(registration, hook.instance, "endpoints"):
            given = [(endpoint, endpoint.method, endpoint.path) for endpoint in hook.fn()]
        for endpoint, *served_at in given:
            # With the plugin's module: another plugin's path is never taken over in silence.
            place = (*served_at, type(hook.owner).__module__)
            if endpoint.shared and place in shared:
                continue
            shared.add(place)
            found.append((hook, endpoint))
    return found


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

    async def whoami(call: Call) -> Reply:
        return _json({**_said(call.known), "scope": call.scope})

    admin = gateway.config.server.admin
    open_metrics = admin.metrics == "open" or is_loopback(admin.host)
    return (
        Endpoint("GET", "/healthz", None, healthz),
        Endpoint("HEAD", "/healthz", None, healthz),
        Endpoint("GET", "/readyz", None, readyz),
        Endpoint("HEAD", "/readyz", None, readyz),
        *(
            Endpoint(method, path, None, answer, "admin")
            for path, answer in (("/healthz", healthz), ("/readyz", readyz))
            for method in ("GET", "HEAD")
        ),
        Endpoint("GET", "/metrics", None if open_metrics else "viewer", metrics, "admin"),
        Endpoint("GET", "/admin/health", "viewer", health, "admin"),
        Endpoint("GET", "/admin/whoami", "member", whoami, "admin", scoped=True),
    )


def _said(caller: Caller) -> dict[str, Any]:
    """A caller as /admin/whoami shows it."""
    return {
        "tenant": caller.tenant,
        "project": caller.project,
        "subject": caller.subject,
        "key_id": caller.key_id,
        "by": caller.by,
        "roles": sorted(caller.roles),
        "models": caller.models,
        "tags": dict(caller.tags),
        "limits": None if caller.allowance is None else caller.allowance.row(),
        "expires_at": None if caller.expires_at is None else written(round(caller.expires_at * 1e9)),
    }


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
