"""Who may do what at which endpoint: role x endpoint, generated from what the gateway serves."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from attrs import evolve
from keystores import ADMIN, CALL, ROLES, config, key_of, made, send, stored

from qlens import ConfigError, Endpoint
from qlens.config.entries import BUILT_IN_ROLES, RANKS
from qlens.paths import own_endpoints, plugin_endpoints
from qlens.testing import Running, running

LIKE = {"auditor": "viewer", "key_desk": "operator", "team_desk": "tenant_operator"}
EVERYTHING = """{plugin: prices, table: [{model: "*", input: 1, output: 1}]},
    {plugin: budgets, limits: [{per: tenant, usd: 9}, {per: project, usd: 9}, {per: key, usd: 9}, {per: model, usd: 9},
      {per: tag, tag: team, usd: 9}], store: {kind: sqlite, url: "sqlite:///budgets.db"}},
    {plugin: ledger, flush_seconds: 0.01}"""
LIMITS = """{plugin: token_bucket, limits: [{per: tenant, requests_per_minute: 9000}, {per: key, concurrency: 99},
    {per: model, requests_per_minute: 90000}, {per: provider, requests_per_minute: 90000}]}"""
PATHS = {"auditor": "/admin/audit", "key_desk": "/admin/keys", "team_desk": "/admin/keys"}


def everything(cost: str = EVERYTHING) -> str:
    """A configuration in which every plugin with endpoints serves them."""
    return config(cost=cost).replace("  cost:", f"  rate_limit: [{LIMITS}]\n  cost:")


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
    async with stored(everything()) as gateway:
        assert len(endpoints(gateway)) >= 39
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
    async with stored(everything()) as gateway:
        public = {(e.method, e.path) for e in endpoints(gateway) if e.role is None}
        assert public == {
            *(("GET", "/healthz"), ("HEAD", "/healthz"), ("GET", "/readyz"), ("HEAD", "/readyz")),
            ("GET", "/metrics"),  # on this machine alone
        }
        scoped = {e.path for e in endpoints(gateway) if e.scoped and e.listener == "admin"}
        assert scoped == {
            "/admin/whoami",
            "/admin/keys",
            "/admin/keys/{id}",
            "/admin/keys/{id}/rotate",
            "/admin/tenants",
            "/admin/tenants/{name}",
            "/admin/audit",
            "/admin/budgets",
            "/admin/budgets/{id}",
            "/admin/limits",
            "/admin/limits/{id}",
        }
        # Of those that read and are open to members, each says what it makes of the roles that its callers have.
        assert all(e.scoped for e in endpoints(gateway) if e.role == "member")


async def _lived_in(gateway: Running) -> dict[str, list[str]]:
    """Let two tenants have one of everything; the ids of what is globex', by the path before an id."""
    keys: dict[str, dict[str, str]] = {}
    for tenant in ("acme", "globex"):
        assert (await send(gateway, "POST", "/admin/tenants", {"name": tenant})).status == 200
        for number in range(2):
            keys[tenant] = await made(
                gateway, tenant=tenant, name=f"{tenant}-name-{number}", metadata={"of": tenant}, tags={"team": tenant},
                limits={"budget_usd": "1"}, project=f"{tenant}-project",
            )  # fmt: skip
            called = await gateway.post("/v1/chat/completions", {**CALL, "user": tenant}, key=keys[tenant]["key"])
            assert called.status == 200
        await send(gateway, "PATCH", "/admin/keys/none", {"roles": ["admin"]}, key=key_of("tenant_admin", tenant))
    receipts = await gateway.settled(4)
    async with asyncio.timeout(5):
        while len((await send(gateway, "GET", "/v1/usage/calls?limit=100")).json()["data"]) < 4:
            await asyncio.sleep(0.02)
    budgets = (await send(gateway, "GET", "/admin/budgets")).json()["data"]
    limits = (await send(gateway, "GET", "/admin/limits")).json()["data"]
    return {
        "/admin/keys/": [keys["globex"]["id"]],
        "/admin/tenants/": ["globex"],
        "/admin/budgets/": [row["id"] for row in budgets if "acme" not in str(row)],
        "/admin/limits/": [row["id"] for row in limits if row["tenant"] != "acme"],
        "/v1/usage/calls/": [receipt.id for receipt in receipts if receipt.caller.tenant == "globex"],
    }


async def test_nobody_who_rules_one_tenant_or_none_reads_of_another_one_at_any_endpoint() -> None:
    async with stored(everything()) as gateway:
        theirs = await _lived_in(gateway)
        assert all(theirs.values())
        read = 0
        for endpoint in endpoints(gateway):
            if endpoint.method != "GET" or endpoint.role is None:
                continue
            before, is_one, _ = endpoint.path.partition("{")
            paths = [before + id_ for id_ in theirs[before]] if is_one else [endpoint.path, f"{endpoint.path}?limit=9"]
            paths += [f"{endpoint.path}?tenant=globex"] if not is_one else []
            if "organization" in endpoint.path:
                paths = [f"{endpoint.path}?start_time=1&bucket_width=1d&group_by={by}" for by in ("tenant", "key_id")]
            for role in ROLES:
                for path in paths:
                    answer = await gateway.get(path, key=key_of(role))
                    where = f"{path} as {role}: {answer.status} {answer.text[:300]}"
                    if _rules_all(role, endpoint):
                        continue
                    read += answer.status == 200
                    shown = answer.text.replace("tenant=globex", "")
                    if is_one:
                        assert answer.status in (403, 404), where
                        unknown = await gateway.get(before + "unknown", key=key_of(role))
                        assert answer.json() == unknown.json(), where
                    assert "globex" not in shown, where
        assert read > 50  # what they may read, they were shown


async def test_an_operator_raises_no_budget_that_binds_the_operator_and_an_admin_raises_any() -> None:
    cost = EVERYTHING.replace("{per: model,", "{per: model, usd: 9, match: {tenant: [globex]}}, {per: model,")
    text = everything(cost) + '  "x/*": {max_output_tokens: 1000, targets: [{provider: echo, model: "*"}]}\n'
    ask = {"usd": "1", "expires_at": "2999-01-01T00:00:00Z", "reason": "launch"}
    async with stored(text) as gateway:
        has: dict[str, Any] = {"limits": {"budget_usd": "1"}, "project": "p", "tags": {"team": "one"}}
        operator = await made(gateway, roles=["operator"], models=["gpt-4o", "x/1"], **has)
        helper = await made(gateway, operator["key"], roles=["operator"])
        other = await made(gateway, tenant="globex", project="q", tags={"team": "two"}, limits={"budget_usd": "1"})
        calls = [(operator, "gpt-4o"), (operator, "x/1"), (helper, "gpt-4o"), (other, "gpt-4o"), (other, "claude")]
        for key, model in calls:
            assert (await gateway.post("/v1/chat/completions", {**CALL, "model": model}, key=key["key"])).status == 200
        await gateway.settled(len(calls))
        rows = (await send(gateway, "GET", "/admin/budgets")).json()["data"]
        refused = set()
        for row in rows:
            answer = await send(gateway, "POST", f"/admin/budgets/{row['id']}/increase", ask, operator["key"])
            assert answer.status in (200, 403), answer.text
            if answer.status == 403:
                refused.add((row["budget"], row["owner"]))
        assert refused == {
            *(("tenant month", "acme"), ("project month", "p"), ("tag team month", "one")),
            *(("model month", "gpt-4o"), ("model month", "x/*"), ("key month", operator["id"])),
            # Keys that it made would spend for it, and it could make one that raises its own.
            *(("key's allowance month", key["id"]) for key in (operator, helper, other)),
        }
        assert len(rows) == len(refused) + 8
        noted = (await send(gateway, "GET", "/admin/audit?action=budgets.increase&limit=100")).json()["data"]
        assert len([entry for entry in noted if entry["outcome"] == "refused"]) == len(refused)
        for row in rows:
            answer = await send(gateway, "POST", f"/admin/budgets/{row['id']}/increase", ask, key=ADMIN)
            assert answer.status == 200, answer.text


def _rules_all(role: str, endpoint: Endpoint) -> bool:
    """Whether a role opens an endpoint for things of all tenants; one for members, as far as it is one of more."""
    ruling = endpoint if endpoint.role != "member" else evolve(endpoint, role="viewer")
    return opens(role, ruling) and not LIKE.get(role, role).startswith("tenant_")


async def test_whoami_says_what_a_role_is_confined_to() -> None:
    async with stored() as gateway:
        for role, scope in (("admin", None), ("viewer", None), ("tenant_admin", "acme"), ("member", "acme")):
            me = (await gateway.get("/admin/whoami", key=key_of(role))).json()
            assert (me["tenant"], me["roles"], me["scope"]) == ("acme", [role], scope)
        assert (await gateway.get("/admin/whoami", key=ADMIN)).json()["scope"] is None
        # A role that is narrowed to other paths rules nobody here.
        assert (await gateway.get("/admin/whoami", key=key_of("auditor"))).json()["scope"] == "acme"


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
