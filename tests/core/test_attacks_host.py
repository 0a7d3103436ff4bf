"""Who calls, and what may be done, never depends on where a request says it goes: Host, its like, or its target."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import pytest
import pytest_asyncio
from attrs import frozen
from yamls import CHAT, HELLO
from yamls import config as yaml_of

from qlens.testing import Running, running
from qlens.testing.oidc import FakeIssuer, oidc

pytestmark = pytest.mark.asyncio(loop_scope="module")

ACME, OPS = "sk-example-acme-0123456789abcdef", "sk-example-ops-0123456789abcdef"
KEYS = [(ACME, "acme", "member", "small"), (OPS, "ops", "admin", "large")]
SAME, BAD, UNKNOWN = "same", 400, 404
"""Answered like the same request with a plain Host; not understood; another path, which nobody serves."""

HOSTS: Mapping[str, str | int] = {
    "localhost": SAME,
    "127.0.0.1": SAME,
    "127.0.0.1:9090": SAME,
    "[::1]:9090": SAME,
    "admin.internal": SAME,
    "api.openai.com": SAME,
    "ops": SAME,
    "": SAME,
    ":": SAME,
    "*": SAME,
    "x:99999": SAME,
    "x:-1": SAME,
    "[::1": SAME,
    "x/?": SAME,
    "x/healthz": SAME,
    "x/healthz?": SAME,
    "x/healthz#": SAME,
    "x/../healthz": SAME,
    "/healthz": SAME,
    "?": SAME,
    "#": SAME,
    "x\\healthz": SAME,
    "evil@x": SAME,
    f"Bearer:{OPS}@x": SAME,
    "http://x/healthz": SAME,
    "x, y": SAME,
    "x y": SAME,
    "x;y": SAME,
    "x\ty": SAME,
    "xn--e1afmkfd": SAME,
    "\u00fc.example": SAME,
    "x" * 8000: SAME,
    "${HOST}": SAME,
    "{host}": SAME,
    "%2fhealthz": SAME,
    "x\x00y": BAD,
    "x\x01y": BAD,
    "x\x7fy": BAD,
}
"""Values of Host."""

HEADS: Mapping[str, tuple[Sequence[str], str | int]] = {
    "no Host": ([], BAD),
    "two Hosts": (["host: x", "host: y"], BAD),
    "the same Host twice": (["host: x", "host: x"], BAD),
    "Host twice in another case": (["host: x", "HOST: localhost"], BAD),
    "a folded Host": (["host: x", " localhost"], BAD),
    "a blank before the colon": (["host : x"], BAD),
    "the Host of HTTP/2": (["host: x", ":authority: localhost"], BAD),
    **{
        f"{name}: {value}": (["host: x", f"{name}: {value}"], SAME)
        for name, value in (
            ("x-forwarded-host", "localhost"),
            ("x-forwarded-host", "127.0.0.1:9090, x"),
            ("x-forwarded-host", "x/healthz?"),
            ("x-forwarded-server", "localhost"),
            ("x-forwarded-proto", "https"),
            ("x-forwarded-scheme", "https"),
            ("x-forwarded-port", "9090"),
            ("x-forwarded-prefix", "/healthz"),
            ("x-forwarded-path", "/healthz"),
            ("x-forwarded-uri", "/healthz"),
            ("x-forwarded-method", "HEAD"),
            ("x-forwarded-for", "127.0.0.1"),
            ("x-forwarded-for", "192.0.2.1"),
            ("x-forwarded-user", "ops"),
            ("x-forwarded-client-cert", "URI=spiffe://x/ns/ops/sa/ops"),
            ("forwarded", "for=192.0.2.1;host=localhost;proto=https;by=127.0.0.1"),
            ("x-real-ip", "192.0.2.1"),
            ("x-client-ip", "192.0.2.1"),
            ("x-cluster-client-ip", "192.0.2.1"),
            ("true-client-ip", "192.0.2.1"),
            ("x-host", "localhost"),
            ("x-original-host", "localhost"),
            ("x-http-host-override", "localhost"),
            ("x-original-url", "/healthz"),
            ("x-rewrite-url", "/healthz"),
            ("x-http-method-override", "HEAD"),
            ("x-http-method", "HEAD"),
            ("x-method-override", "HEAD"),
            ("x-remote-user", "ops"),
            ("x-qlens-peer", "192.0.2.1"),
            ("x-tenant", "ops"),
            ("x-subject", "root"),
            ("origin", "http://localhost:9090"),
            ("referer", "http://localhost:9090/admin/health"),
            ("proxy-authorization", f"Bearer {OPS}"),
            ("cookie", f"authorization=Bearer {OPS}"),
        )
    },
    "all the proxy's headers": (["host: x", "x-forwarded-for: 192.0.2.1", "x-tenant: ops", "x-subject: root"], SAME),
    "Host behind the others": (["x-forwarded-host: localhost", "host: x"], SAME),
    "Host in capitals": (["HOST: localhost"], SAME),
    "Host for a hop alone": (["host: x", "connection: host, authorization"], SAME),
}
"""Heads, without what says who calls."""

TARGETS: Mapping[str, str | int] = {
    "http://x{path}": SAME,
    "https://x{path}": SAME,
    "HTTP://X{path}": SAME,
    "http://localhost:9090{path}": SAME,
    "http://127.0.0.1{path}": SAME,
    "http://x{path}?tenant=ops&host=localhost": SAME,
    "{path}?host=localhost": SAME,
    "{path}?http://localhost/healthz": SAME,
    "http://x{path}?/healthz": SAME,
    "{path}/": UNKNOWN,
    "/{path}": UNKNOWN,
    "//localhost{path}": UNKNOWN,
    "{path}/../../healthz": UNKNOWN,
    "/healthz/..{path}": UNKNOWN,
    "/healthz/%2e%2e{path}": UNKNOWN,
    "http://x/healthz/..{path}": UNKNOWN,
    "http://x/{path}": UNKNOWN,
    "http://x//localhost{path}": UNKNOWN,
    "http://x": UNKNOWN,
    "{path}%00": UNKNOWN,
    "{path}%20": UNKNOWN,
    "{path};x=/healthz": UNKNOWN,
    "{path}\\..\\healthz": UNKNOWN,
}
"""Targets of requests, where the path is what is asked for."""
ODD = ("*", "x", "localhost{path}", "x:80{path}", "http:{path}", "http:/x{path}", "ftp://x{path}", "//", "",
       "http://user:KEY@x{path}", "http://x:99999{path}", "http://[::1{path}", "http:///x{path}", "http://x#{path}",
       "http://x{path}#/healthz", "{path}#/healthz", "http://x?{path}", "http://x/?{path}", "file://{path}",
       "javascript://x{path}", "http://x\\y{path}", "http://x@y{path}")  # fmt: skip
"""Targets that mean nothing good: each is refused, or is what the same request with a plain Host is."""


@frozen
class Said:
    """What came back."""

    status: int
    body: Any


@frozen
class Asked:
    """A gateway, and who may ask it."""

    gateway: Running
    tokens: Mapping[str, str | None]
    """By who it is."""
    plain: Mapping[tuple[str, str], Said]
    """What each is answered with a plain Host, by path."""

    async def send(self, path: str, who: str, target: str, heads: Sequence[str]) -> Said:
        """A request on a connection of its own, to the listener of the path."""
        gateway, token = self.gateway, self.tokens[who]
        url = gateway.admin_url if path.startswith("/admin") else gateway.url
        reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
        body = json.dumps(HELLO | {"model": "small"}).encode() if path == CHAT else b""
        lines = [f"{'POST' if body else 'GET'} {target} HTTP/1.1", *heads]
        lines += [] if token is None else [f"authorization: Bearer {token}"]
        lines += [f"content-length: {len(body)}", "content-type: application/json"] if body else []
        writer.write("\r\n".join([*lines, "connection: close", "", ""]).encode() + body)
        try:
            async with asyncio.timeout(10):
                answer = await reader.read()
        except ConnectionError:
            answer = b""
        finally:
            writer.close()
        head, _, raw = answer.partition(b"\r\n\r\n")
        if not head:
            return Said(0, None)  # closed without a word
        return Said(int(head.split()[1]), _lasting(json.loads(raw)) if raw else None)

    async def holds(self, expected: str | int, path: str, who: str, target: str, heads: Sequence[str]) -> None:
        """What is expected comes back, and nobody was taken for somebody else."""
        before = len(self.gateway.receipts)
        said = await self.send(path, who, target, heads)
        if expected == SAME:
            assert said == self.plain[path, who], (who, target, heads)
        else:
            # A model's name may have slashes and more in it: who may not ask for one is told that first.
            statuses = {expected, 401} if expected == UNKNOWN and TENANTS[who] == "" else {expected}
            assert said.status in statuses, (said, who, target, heads)
            assert "error" in said.body
        tenants = {receipt.caller.tenant for receipt in self.gateway.receipts[before:]}
        assert tenants <= {TENANTS[who]}, (who, target, heads)


TENANTS = {"nobody": "", "wrong": "", "acme": "acme", "ops": "ops", "token": "globex"}
PATHS = ("/v1/models", "/v1/models/small", CHAT, "/admin/whoami", "/admin/health")


def _lasting(body: Any) -> Any:
    """A body without what differs from one answer to the next."""
    if isinstance(body, list):
        return [_lasting(each) for each in body]
    if not isinstance(body, dict):
        return body
    passing = {"id", "created"} if "choices" in body else {"detail", "uptime_seconds"}
    return {name: _lasting(value) for name, value in body.items() if name not in passing}


def config(issuer: FakeIssuer) -> str:
    from_proxy = {"tenant": "x-tenant", "subject": "x-subject"}
    by_token = {"issuer": issuer.issuer, "audience": "qlens", "tenant_claim": "org", "models_claim": "models"}
    auth = [
        {"plugin": "trusted_header", "proxies": ["192.0.2.1/32"], "headers": from_proxy},
        {"plugin": "api_keys", "file": "keys.yaml"},
        {"plugin": "jwt", **by_token},
    ]
    model = {"max_output_tokens": 100, "targets": [{"provider": "echo", "model": "m"}]}
    return yaml_of({"auth": auth}, {"echo": {"plugin": "echo"}}, {"small": model, "large": model})


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def asked() -> AsyncIterator[Asked]:
    rows = [
        f"- {{id: {tenant}, hash: 'sha256:{hashlib.sha256(key.encode()).hexdigest()}', tenant: {tenant}, "
        f"roles: [{role}], models: [{model}]}}\n"
        for key, tenant, role, model in KEYS
    ]
    async with oidc() as issuer, running(config(issuer), files={"keys.yaml": "keys:\n" + "".join(rows)}) as gateway:
        token = issuer.token(org="globex", sub="bob", models=["small", "large"])
        tokens = {"nobody": None, "wrong": "sk-example-wrong-0123456789", "acme": ACME, "ops": OPS, "token": token}
        found = Asked(gateway, tokens, {})
        plain = {
            (path, who): await found.send(path, who, path, ["host: gateway.example"])
            for path in PATHS
            for who in tokens
        }
        yield Asked(gateway, tokens, plain)


async def test_what_is_compared_tells_callers_apart(asked: Asked) -> None:
    plain = asked.plain
    assert [plain["/admin/whoami", who].body.get("tenant") for who in ("acme", "ops", "token")] == [
        "acme", "ops", "globex"
    ]  # fmt: skip
    assert [plain["/v1/models/small", who].status for who in TENANTS] == [401, 401, 200, 404, 200]
    assert [plain["/admin/health", who].status for who in TENANTS] == [401, 401, 403, 200, 403]
    assert len({str(plain["/v1/models", who]) for who in TENANTS}) == 5
    assert [plain[CHAT, who].status for who in TENANTS] == [401, 401, 200, 404, 200]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("host", HOSTS, ids=lambda host: repr(host[:30]))
async def test_no_value_of_host_makes_anybody_somebody_else(asked: Asked, host: str, path: str) -> None:
    for who in TENANTS:
        await asked.holds(HOSTS[host], path, who, path, [f"host: {host}"])
        if HOSTS[host] == SAME:
            await asked.holds(SAME, path, who, path, ["host: x", f"x-forwarded-host: {host}"])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", HEADS)
async def test_no_header_of_a_proxy_makes_anybody_somebody_else(asked: Asked, name: str, path: str) -> None:
    heads, expected = HEADS[name]
    for who in TENANTS:
        await asked.holds(expected, path, who, path, heads)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("target", TARGETS)
async def test_no_target_makes_anybody_somebody_else(asked: Asked, target: str, path: str) -> None:
    for who in TENANTS:
        await asked.holds(TARGETS[target], path, who, target.format(path=path), ["host: x"])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("target", ODD)
async def test_a_target_that_means_nothing_is_refused_or_as_good_as_its_path(
    asked: Asked, target: str, path: str
) -> None:
    for who in TENANTS:
        said = await asked.send(path, who, target.format(path=path).replace("KEY", OPS), ["host: x"])
        assert said == asked.plain[path, who] or said.status in {0, 400, 404, 405}, (said, who)
        assert said.status != 200 or who in {"acme", "ops", "token"}


async def test_nobody_gets_in_by_a_host_that_names_the_other_listener(asked: Asked) -> None:
    """The admin paths are the admin listener's alone, whatever a request to the clients' says."""
    gateway = asked.gateway
    admin = gateway.admin_url.removeprefix("http://")
    for target in ("/admin/whoami", "/metrics", f"{gateway.admin_url}/admin/whoami", f"{gateway.admin_url}/metrics"):
        for who in TENANTS:
            said = await asked.send("/v1/models", who, target, [f"host: {admin}", f"x-forwarded-host: {admin}"])
            assert said.status == 404, (target, who)
