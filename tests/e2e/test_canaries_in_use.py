"""Every secret of a gateway in use, good and bad ones, and backends that fail: none of them is found anywhere."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import signal
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

import aiohttp
import pytest
import pytest_asyncio
from attrs import define, field, frozen
from e2e.serving import Served, serving
from receivers import Receiver, receiving

from qlens.testing import Scripted
from qlens.testing.oidc import FakeIssuer, oidc, signing_key
from qlens.testing.postgres import PostgresServer, postgres_server
from qlens.testing.redis import RedisServer, redis_server
from qlens.testing.upstreams import FakeUpstream, Recorded
from qlens.testing.upstreams import serving as playing

PIECE = 12
"""How many characters of a secret are looked for at a time, in its middle half: a mask shows its ends, at most."""
FAILURES = (401, 403, 400, 429, 500, 503)
"""What the provider answers in turn, with all that it was sent in its message."""


def pieces(secret: str) -> Iterator[str]:
    """Four pieces of a secret's middle half."""
    first, last = len(secret) // 4, len(secret) * 3 // 4 - PIECE
    for place in range(4):
        begin = first + (last - first) * place // 3
        yield secret[begin : begin + PIECE]


def made_up(name: str) -> str:
    """A secret that stands nowhere else, and whose characters a URL must write in another way."""
    return "p@/" + hashlib.sha256(name.encode()).hexdigest()[:40] + "#%"


@cache
def ways_to_write(secret: str) -> Sequence[bytes]:
    """Pieces of a secret as they are, in hex, and in base64 at each of its three places."""
    found = []
    for raw in map(str.encode, pieces(secret)):
        # In base64 the first and the last characters depend on what stands beside it.
        found += [raw, raw.hex().encode(), *(base64.b64encode(b"\0" * shift + raw)[4:-4] for shift in range(3))]
    return found


@define(eq=False)
class Secrets:
    """All of them, by what they are, and what was seen of them."""

    known: dict[str, str] = field(factory=dict)
    looked_through: dict[str, int] = field(factory=dict)
    """How many bytes, by place: a place without any would prove nothing."""

    def new(self, name: str, secret: str = "") -> str:
        """Have another one."""
        self.known[name] = secret or made_up(name)
        return self.known[name]

    def clean(self, place: str, content: bytes | str, *, but: str = "") -> None:
        """None of them is in it, but what begins so belongs there."""
        raw = content.encode() if isinstance(content, str) else content
        kind = place.partition(" ")[0]
        self.looked_through[kind] = self.looked_through.get(kind, 0) + len(raw)
        for name, secret in self.known.items():
            if but and name.startswith(but):
                continue
            for written in ways_to_write(secret):
                begin = raw.find(written)
                assert begin < 0, f"{name} in {place}: {raw[max(0, begin - 300) : begin + 60]!r}"


@define(eq=False)
class Gossip(FakeUpstream):
    """A provider that refuses everything in another way each time, and says with what headers it was asked."""

    def _usual(self, request: Recorded) -> Scripted:
        status = FAILURES[len(self.requests) % len(FAILURES)]
        told = f"You sent {dict(request.headers)} to {request.path}"
        error = {"message": told, "type": told, "code": told, "param": told}
        return Scripted(status, {"x-amzn-errormessage": told, "www-authenticate": told}, body={"error": error, **error})


@frozen
class World:
    """The gateway with all that stands around it."""

    served: Served
    folder: Path
    session: aiohttp.ClientSession
    redis: RedisServer
    postgres: PostgresServer
    database: str
    provider: Gossip
    receiver: Receiver
    issuer: FakeIssuer
    secrets: Secrets

    async def ask(self, method: str, url: str, key: str | None = None, **more: Any) -> tuple[int, bytes]:
        """Ask something; what comes back has no secret, in its head or in its body."""
        headers = {**({} if key is None else {"authorization": f"Bearer {key}"}), **more.pop("headers", {})}
        async with self.session.request(method, url, headers=headers, **more) as answer:
            body = await answer.read()
        self.secrets.clean(f"answers {url}", body + str(dict(answer.headers)).encode())
        return answer.status, body

    async def chat(self, key: str | None, model: str = "m", **more: Any) -> int:
        """Make a call."""
        body = {"model": model, "messages": [{"role": "user", "content": "hello"}], **more}
        return (await self.ask("POST", f"{self.served.url}/v1/chat/completions", key, json=body))[0]

    async def admin(self, method: str, path: str, key: str, **more: Any) -> tuple[int, bytes]:
        """Ask the admin listener."""
        return await self.ask(method, f"{self.served.admin_url}{path}", key, **more)

    async def make_key(self, admin: str, what: str, path: str = "/admin/keys", **body: Any) -> tuple[str, str]:
        """The id of a key and the key: the one answer that has it, and nothing else that is secret."""
        headers = {"authorization": f"Bearer {admin}"}
        async with self.session.post(f"{self.served.admin_url}{path}", json=body, headers=headers) as answer:
            raw = await answer.read()
        self.secrets.clean("answers of made keys", raw)
        told = json.loads(raw)
        return told["id"], self.secrets.new(what, told["key"])


def changes(world: Mapping[str, str], secrets: Secrets, endpoint: Mapping[str, Any]) -> Mapping[str, Any]:
    user, redis = quote(secrets.known["redis password"], safe=""), world["redis"]
    store = {"kind": "redis", "url": f"redis://qlens:{user}@127.0.0.1:{redis}", "timeout_ms": 1000}
    hmac = {"plugin": "jwt", "name": "shared", "issuer": "shared", "audience": "qlens", "tenant_claim": "org"}
    up, new = world["provider"], secrets.new
    aws = {"access_key_id": "AKIAEXAMPLE", "secret_access_key": new("provider secret of aws")}

    def model(provider: str) -> dict[str, Any]:
        return {"max_output_tokens": 50, "targets": [{"provider": provider, "model": "m"}]}

    providers = {
        "echo": {"plugin": "echo"},
        "openai": {"plugin": "openai", "base_url": f"{up}/v1", "api_key": new("provider key of openai"),
                   "headers": {"x-team-key": new("provider header")}},
        "azure": {"plugin": "azure_openai", "endpoint": up, "api_key": new("provider key of azure"),
                  "api_version": "2024-10-21"},
        "anthropic": {"plugin": "anthropic", "base_url": up, "api_key": new("provider key of anthropic")},
        "aws": {"plugin": "bedrock", "region": "us-east-1", "endpoint": up, **aws},
        "gone": {"plugin": "openai", "base_url": "http://127.0.0.1:9", "api_key": new("provider key of nobody")},
    }  # fmt: skip
    return {
        "pipeline": {
            "auth": [
                {"plugin": "key_store", "pepper": new("pepper of keys"), "poll_seconds": 0.1},
                {"plugin": "api_keys", "file": "keys.yaml"},
                {"plugin": "jwt", "issuer": world["issuer"], "audience": "qlens", "tenant_claim": "org"},
                {**hmac, "secret": new("secret of tokens")},
            ],
            "rate_limit": [
                {"plugin": "token_bucket", "store": {**store, "replicas": 1},
                 "limits": [{"per": "key", "requests_per_minute": 100_000}]},
            ],
            "guard": [],
            "cache": [],
            "cost": [
                {"plugin": "prices", "table": [{"model": "*", "input": 1, "output": 1}]},
                {"plugin": "budgets", "limits": [{"per": "key", "usd": 100, "window": "total"}], "store": store},
                {"plugin": "ledger", "url": world["postgres"]},
            ],
            "observe": [
                {"plugin": "webhooks", "endpoints": [endpoint], "allow": ["127.0.0.0/8"], "timeout_seconds": 1},
            ],
        },
        "providers": providers,
        "models": {"m": model("echo"), **{name: model(name) for name in providers if name != "echo"}},
    }  # fmt: skip


def hook(receiver: Receiver, secrets: Secrets) -> Mapping[str, Any]:
    """An endpoint with all the secrets that one can have."""
    signing = [
        "whsec_" + base64.b64encode(hashlib.sha256(name.encode()).digest()).decode() for name in ("new", "previous")
    ]
    for name, secret in zip(("new", "previous"), signing, strict=True):
        secrets.new(f"webhook secret, the {name}", secret)
    headers = {"x-hook-key": secrets.new("webhook header")}
    return {"name": "a", "url": receiver.url, "secrets": signing, "events": ["qlens.*"], "headers": headers}


@pytest_asyncio.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    """A gateway whose every backend has a secret."""
    secrets = Secrets()
    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        password = secrets.new("redis password")
        redis = await enter(
            redis_server(user=f'qlens on "#{hashlib.sha256(password.encode()).hexdigest()}" ~* &* +@all')
        )
        postgres = await asyncio.to_thread(stack.enter_context, postgres_server())
        database = postgres.new_database()
        password = secrets.new("postgresql password")
        postgres.execute(f"CREATE ROLE gateway LOGIN SUPERUSER PASSWORD '{password}'")
        receiver, issuer, provider = (
            await enter(receiving(status=500)),
            await enter(oidc()),
            await enter(playing(Gossip())),
        )
        places = {
            "redis": str(redis.port),
            "postgres": f"postgresql://gateway:{quote(password, safe='')}@127.0.0.1:{postgres.port}/{database}",
            "issuer": issuer.issuer,
            "provider": provider.root,
        }
        root = secrets.new("caller's key of the file", "sk-example-" + made_up("file")[3:-2])
        hashed = hashlib.sha256(root.encode()).hexdigest()
        (tmp_path / "keys.yaml").write_text(
            f"keys:\n- {{id: root, hash: 'sha256:{hashed}', tenant: ops, roles: [admin, member]}}\n"
        )
        told = changes(places, secrets, hook(receiver, secrets))
        env = {"PYTHONFAULTHANDLER": "1", "PYTHONASYNCIODEBUG": "1"}
        with serving(tmp_path, changes=told, env=env) as served:
            served.key = root
            async with aiohttp.ClientSession() as session:
                yield World(
                    served, tmp_path, session, redis, postgres, database, provider, receiver, issuer, secrets
                )  # fmt: skip


def tokens(world: World) -> dict[str, str]:
    """Tokens that are wrong in every usual way, and one that is none."""
    key, issuer = world.issuer.key, world.issuer
    stranger = signing_key("stranger")
    head = base64.urlsafe_b64encode(b'{"alg":"none","typ":"JWT"}').decode().rstrip("=")
    good = issuer.token(jti=made_up("good"))
    return {
        "expired": issuer.token(exp=1_000_000_000, jti=made_up("expired")),
        "of another audience": issuer.token(aud="others", jti=made_up("audience")),
        "of another issuer": issuer.token(iss="https://others.example", jti=made_up("issuer")),
        "of nobody's tenant": issuer.token(org=None, jti=made_up("tenant")),
        "of an unknown key": stranger.sign(issuer.claims(jti=made_up("unknown"))),
        "signed by a stranger": stranger.sign(issuer.claims(jti=made_up("stranger")), {"kid": key.kid}),
        "unsigned": f"{head}.{good.split('.')[1]}.",
        "cut": good[:-9],
        "with a part too many": f"{good}.{made_up('more')[3:-2]}",
    }


async def misused(world: World, name: str, credential: str) -> None:
    """Show a credential in every way in which a client can show one, and in some in which it should not."""
    url = world.served.url
    path = f"{url}/v1/models"
    assert await world.chat(credential) == 401, name
    for headers in (
        {"api-key": credential},
        {"x-api-key": credential},
        {"authorization": f"Basic {base64.b64encode(credential.encode()).decode()}"},
        {"authorization": credential},
        {"cookie": f"key={credential}"},
        {"sec-websocket-protocol": f"realtime, openai-insecure-api-key.{credential}"},
        {"x-request-id": credential},
    ):
        status, _ = await world.ask("GET", path, headers=headers)
        assert status == 401, (name, headers)
    for where in ("?api-key=", "?key=", "?access_token="):
        assert (await world.ask("GET", f"{path}{where}{quote(credential)}"))[0] == 401
    assert (await world.admin("GET", "/admin/whoami", credential))[0] == 401
    # What is no HTTP at all.
    for head in (
        f"GET /v1/models HTTP/1.1\r\nhost: x\r\nauthorization : Bearer {credential}",
        f"GET /v1/models HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {credential}\0",
        f"GET /v1/models HTTP/9.9 {credential}\r\nhost: x",
    ):
        reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
        writer.write(head.encode() + b"\r\nconnection: close\r\n\r\n")
        answer = await reader.read()
        assert answer.startswith(b"HTTP/1.1 4"), (name, answer)
        world.secrets.clean("answers to no HTTP", answer)
        writer.close()


async def used(world: World) -> None:
    """Every good credential makes calls that are answered, and calls that fail at a provider in every way."""
    secrets, root = world.secrets, world.served.key
    id_, made = await world.make_key(root, "caller's key of the store", tenant="acme", name="a")
    _, rotated = await world.make_key(
        root, "caller's key, rotated", f"/admin/keys/{id_}/rotate", overlap_seconds=600
    )  # fmt: skip
    gone, revoked = await world.make_key(root, "caller's key, revoked", tenant="acme")
    good = {"caller's token": world.issuer.token(jti=made_up("used"))}
    for name, token in good.items():
        for part, text in zip(("claims", "signature"), token.split(".")[1:], strict=True):
            secrets.new(f"{name}, its {part}", text)
    for credential in (root, made, rotated, *good.values()):
        assert await world.chat(credential) == 200
        assert await world.chat(credential, stream=True) == 200
    for name in ("openai", "azure", "anthropic", "aws", "gone"):
        for _ in FAILURES:
            assert await world.chat(made, name) >= 400
    assert (await world.admin("DELETE", f"/admin/keys/{gone}", root))[0] == 200
    bad = {
        **{f"bad token, {name}": token for name, token in tokens(world).items()},
        "bad key": "sk-example-" + made_up("wrong")[3:-2],
        "bad key of the store": made[:-6] + "abcdef",
        "caller's key, revoked": revoked,
    }
    for name, credential in bad.items():
        if name.startswith("bad token"):
            secrets.new(f"{name}, its claims", credential.split(".")[1])
            if credential.split(".")[2]:
                secrets.new(f"{name}, its signature", credential.split(".")[2])
        elif name.startswith("bad key"):
            secrets.new(name, credential)
    await asyncio.sleep(0.3)  # the revoked key is forgotten
    for name, credential in bad.items():
        await misused(world, name, credential)


async def shown(world: World) -> None:
    """What operators are shown, by the admin listener and by commands."""
    served, secrets, root = world.served, world.secrets, world.served.key
    for path in ("/metrics", "/admin/health", "/admin/whoami", "/admin/keys", "/admin/tenants", "/admin/audit",
                 "/admin/budgets", "/admin/usage", "/admin/nothing"):  # fmt: skip
        _, body = await world.admin("GET", path, root)
        secrets.clean(f"metrics and {path}", body)
    for path in ("/readyz", "/healthz", "/openapi.json", "/docs", "/v1/budgets"):
        await world.ask("GET", f"{served.url}{path}", root)
    asked = world.folder / "body.json"
    asked.write_text(json.dumps({"model": "openai", "messages": [{"role": "user", "content": "hello"}]}))
    for words in (
        ("check", str(served.config)),
        ("routes", str(served.config)),
        ("explain", str(served.config), str(asked)),
        ("usage", "--by", "key,model"),
        ("budgets", "--json"),
        ("audit",),
        ("webhooks", "list"),
        ("webhooks", "test", "a"),
    ):
        done = await asyncio.to_thread(served.qlens, *words)
        assert "Traceback" not in done.stderr, done.stderr
        secrets.clean(f"commands {words[0]}", done.stdout + done.stderr)
        if words[0] != "webhooks":
            assert done.returncode == 0, (words, done.stderr)


async def in_redis(redis: RedisServer) -> str:
    """All keys with all that is in them, and who is connected."""
    found = [str(await redis.command("CLIENT", "LIST"))]
    for key in await redis.command("KEYS", "*"):
        read = {"string": ("GET", key), "hash": ("HGETALL", key), "set": ("SMEMBERS", key),
                "zset": ("ZRANGE", key, "0", "-1", "WITHSCORES"), "list": ("LRANGE", key, "0", "-1")}  # fmt: skip
        found += [key, str(await redis.command(*read[await redis.command("TYPE", key)]))]
    return "\n".join(found)


def in_postgres(world: World) -> str:
    """All rows of all tables, and what its statements are called."""
    run, name = world.postgres.execute, world.database
    tables = run("SELECT schemaname, tablename FROM pg_tables WHERE schemaname !~ '^(pg_|information)'", database=name)
    rows = [
        row for schema, table in tables for row in run(f'SELECT t::text FROM "{schema}"."{table}" t', database=name)
    ]
    rows += run("SELECT a::text FROM pg_stat_activity a", database=name)
    assert "acme" in str(rows)
    return "\n".join(str(row[0]) for row in rows)


async def kept(world: World) -> None:
    """What databases, files and those who were asked have of it."""
    secrets = world.secrets
    secrets.clean("redis", await in_redis(world.redis))
    secrets.clean("postgresql", await asyncio.to_thread(in_postgres, world))
    for request in world.provider.requests:
        secrets.clean("provider's requests", f"{request.path} {request.query} {request.headers}", but="provider")
        secrets.clean("provider's bodies", request.content)
    for taken in world.receiver.got:
        secrets.clean("webhooks", taken.body)
        secrets.clean("webhooks", str(taken.headers), but="webhook header")


def written(world: World) -> None:
    """All files of the gateway's folder, but its configuration: databases, spools, its output."""
    for path in world.folder.rglob("*"):
        if path.is_file() and path.name != "qlens.yaml":
            kind = "output" if path.name == "output.txt" else "spool" if ".spool" in str(path) else "files"
            world.secrets.clean(f"{kind} {path.name}", path.read_bytes())


async def until(world: World, *, ok: bool, plugins: tuple[str, ...]) -> None:
    """Wait until plugins say that they are well, or not."""
    ends = time.monotonic() + 60
    while True:
        status, body = await world.ask("GET", f"{world.served.url}/readyz")
        told = json.loads(body)["plugins"]
        if status == 200 and all(told[name]["ok"] is ok for name in plugins):
            return
        assert time.monotonic() < ends, body
        await world.chat(world.served.key)
        await asyncio.sleep(0.1)


async def backends_fail(world: World) -> None:
    """Passwords that are right no more, then nobody there; each time there are calls."""
    redis, postgres = world.redis, world.postgres
    plugins = ("rate_limit.token_bucket", "cost.budgets", "cost.ledger")
    await redis.command("ACL", "SETUSER", "qlens", "resetpass", ">another")
    await redis.command("CLIENT", "KILL", "USER", "qlens")
    await asyncio.to_thread(postgres.execute, "ALTER ROLE gateway PASSWORD 'another'")
    ended = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'gateway'"
    await asyncio.to_thread(postgres.execute, ended)
    await until(world, ok=False, plugins=plugins)
    await shown_while_away(world)
    redis.kill()
    await asyncio.to_thread(postgres.stop, signal.SIGQUIT)
    await world.chat(world.served.key)
    await shown_while_away(world)


async def shown_while_away(world: World) -> None:
    """What is said while no backend can be had; commands may fail, but say no secret."""
    for path in ("/metrics", "/admin/health", "/admin/budgets", "/admin/usage"):
        _, body = await world.admin("GET", path, world.served.key)
        world.secrets.clean(f"metrics and {path}", body)
    for words in (("usage",), ("budgets",)):
        done = await asyncio.to_thread(world.served.qlens, *words)
        assert done.returncode != 0
        assert "Traceback" not in done.stderr, done.stderr
        world.secrets.clean(f"commands {words[0]}", done.stdout + done.stderr)


async def test_no_secret_is_found_anywhere_whatever_fails(world: World) -> None:
    """It ends by SIGABRT, with the crash output of Python's fault handler."""
    served, secrets = world.served, world.secrets
    await used(world)
    await shown(world)
    await world.receiver.reached(1)
    await asyncio.sleep(0.7)  # the ledger writes within 0.5 s
    await kept(world)
    await backends_fail(world)
    served.told_to_stop, served.leaves_with = True, -signal.SIGABRT
    served.signal(signal.SIGABRT)
    await asyncio.to_thread(served.process.wait, 30)
    assert "Fatal Python error: Aborted" in served.output
    written(world)
    assert {kind for kind, count in secrets.looked_through.items() if count > 100} >= {
        "answers", "metrics", "commands", "redis", "postgresql", "provider's", "webhooks", "output", "spool", "files",
    }  # fmt: skip
    assert len(secrets.known) > 30


def test_a_secret_is_found_in_whatever_way_it_is_written() -> None:
    """The search itself: plain, masked too little, in hex, in base64 at any place, as a part of a URL."""
    secrets = Secrets()
    secret = secrets.new("x")
    for text in (
        secret, quote(secret, safe=""), f"...{secret[8:-8]}...", secret.encode().hex(),
        *(base64.b64encode(b"y" * shift + secret.encode()).decode() for shift in range(3)),
    ):  # fmt: skip
        with pytest.raises(AssertionError, match="x in somewhere"):
            secrets.clean("somewhere", f"before {text} after")
    secrets.clean("somewhere", f"{secret[:10]}...{secret[-4:]}")
