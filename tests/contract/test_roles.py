"""Who may do what at which endpoint: role x endpoint, generated from what the gateway serves."""

from __future__ import annotations

import pytest
from keystores import ADMIN, ROLES, config, key_of, send, stored

from qlens import ConfigError, Endpoint
from qlens.config.entries import BUILT_IN_ROLES, RANKS
from qlens.paths import own_endpoints, plugin_endpoints
from qlens.testing import Running, running

LIKE = {"auditor": "viewer", "key_desk": "operator", "team_desk": "tenant_operator"}
PATHS = {"auditor": "/admin/audit", "key_desk": "/admin/keys", "team_desk": "/admin/keys"}


def opens(role: str, endpoint: Endpoint) -> bool:
    """What the documentation of roles says, in other words than the code."""
    like = LIKE.get(role, role)
    if like not in BUILT_IN_ROLES or endpoint.role is None:
        return endpoint.role is None
    if endpoint.role == "member":
        return True
    if RANKS.index(like.removeprefix("tenant_")) < RANKS.index(endpoint.role):
        return False
    if like.startswith("tenant_") and not endpoint.scoped:
        return False
    narrowed = PATHS.get(role)
    return narrowed is None or endpoint.path == narrowed or endpoint.path.startswith(narrowed + "/")


def endpoints(gateway: Running) -> list[Endpoint]:
    own = own_endpoints(gateway.gateway)
    return [*own, *(endpoint for _, endpoint in plugin_endpoints(gateway.gateway.registration))]


@pytest.mark.parametrize("role", [None, *ROLES])
async def test_every_endpoint_asks_exactly_its_role(role: str | None) -> None:
    async with stored() as gateway:
        assert len(endpoints(gateway)) >= 19
        for endpoint in endpoints(gateway):
            path = endpoint.path.replace("{id}", "key-0").replace("{name}", "nobody")
            answer = await gateway.request(endpoint.method, path, body=b"[]", key=key_of(role) if role else None)
            where = f"{endpoint.method} {endpoint.path} as {role}: {answer.status} {answer.text[:200]}"
            if role is None and endpoint.role is not None:
                assert answer.status == 401, where
            elif role is None or opens(role, endpoint):
                assert answer.status not in (401, 403), where
            else:
                assert answer.status == 403, where
                assert answer.json()["error"]["code"] == "insufficient_permissions"
        # Whatever was refused, and whatever was malformed, changed nothing.
        assert (await send(gateway, "GET", "/admin/keys")).json()["data"] == []
        assert (await send(gateway, "GET", "/admin/tenants")).json()["data"] == []


async def test_every_endpoint_of_operators_asks_for_a_role_and_only_known_ones_are_open_to_roles_of_a_tenant() -> None:
    async with stored() as gateway:
        public = {(e.method, e.path) for e in endpoints(gateway) if e.role is None}
        assert public == {
            *(("GET", "/healthz"), ("HEAD", "/healthz"), ("GET", "/readyz"), ("HEAD", "/readyz")),
            ("GET", "/metrics"),  # on this machine alone
        }
        scoped = {e.path for e in endpoints(gateway) if e.scoped}
        assert scoped == {
            "/admin/whoami",
            "/admin/keys",
            "/admin/keys/{id}",
            "/admin/keys/{id}/rotate",
            "/admin/tenants",
            "/admin/tenants/{name}",
            "/admin/audit",
        }


async def test_whoami_says_what_a_role_is_confined_to() -> None:
    async with stored() as gateway:
        for role, scope in (("admin", None), ("viewer", None), ("tenant_admin", "acme"), ("member", "acme")):
            me = (await gateway.get("/admin/whoami", key=key_of(role))).json()
            assert (me["tenant"], me["roles"], me["scope"]) == ("acme", [role], scope)
        assert (await gateway.get("/admin/whoami", key=ADMIN)).json()["scope"] is None


HOUSE = """
from qlens import Endpoint, Reply, hookimpl

class House:
    def __init__(self, config, name): ...

    @hookimpl
    async def wrap_call(self, call, proceed):
        return await proceed()

    @hookimpl
    def endpoints(self):
        async def nothing(call):
            return Reply(body=b"{}")

        yield Endpoint("GET", "/admin/house", "ROLE", nothing, "admin")
"""


async def test_an_endpoint_asks_for_a_role_that_ranks() -> None:
    text = "pipeline: {auth: [{plugin: anonymous, roles: [tenant_admin]}], guard: [{plugin: 'house_of_roles:House'}]}"
    with pytest.raises(ConfigError, match="asks for the role 'ROLE', which"):
        async with running(text, files={"house_of_roles.py": HOUSE}):
            pass


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        ("{admin: {like: viewer}}", "'admin' cannot be defined"),
        ("{tenant_admin: {like: admin}}", "'tenant_admin' cannot be defined"),
        ("{x: {like: root}}", "like"),
        ("{x: {like: viewer, paths: [admin]}}", "must begin with /"),
        ("{x: {like: viewer, paths: [/admin/]}}", "must begin with /"),
        ("{x: {like: viewer, paths: ['/admin/*']}}", "must begin with /"),
        ("{x: {like: viewer, paths: []}}", "must not be empty"),
        ("{x: {}}", "like"),
    ],
)
async def test_roles_that_cannot_be_are_refused(roles: str, message: str) -> None:
    text = config()
    start, end = text.index("  roles:"), text.index("pipeline:")
    with pytest.raises(ConfigError, match=message):
        async with running(f"{text[:start]}  roles: {roles}\n{text[end:]}"):
            pass
