"""Tokens that must not be taken, one for each way in that libraries and gateways have had."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import itertools
import logging
import random
import string
from base64 import b64encode
from collections import Counter
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from typing import Any, TypeVar, cast

import jwt
import orjson
import pytest
import pytest_asyncio
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st
from keystores import ADMIN, made, send
from tokens import MODELS, ask, config, entry, packed, refused, taken, unsigned

from qlens import Call, Caller, Unauthenticated
from qlens.operations import OPERATIONS
from qlens.server import _credential
from qlens.testing import ManualClock, Running, running
from qlens.testing.oidc import AUDIENCE, FakeIssuer, SigningKey, oidc, signing_key
from qlens_plugins.auth.jwt import Jwt
from qlens_plugins.auth.jwt.plugin import MOST_KNOWN, _put

# One gateway for all: what a token tries must do nothing to the next one either.
pytestmark = pytest.mark.asyncio(loop_scope="module")

T = TypeVar("T")

SECRET = "example-secret-of-more-than-thirty-two-bytes"
KEY = signing_key("key-1")


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def issuer() -> AsyncIterator[FakeIssuer]:
    """An issuer with one RSA key."""
    async with oidc(clock=ManualClock()) as fake:
        yield fake


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def gateway(issuer: FakeIssuer) -> AsyncIterator[Running]:
    """A gateway that believes it; its keys are there, because a good token was taken."""
    async with running(config(entry(issuer)), clock=issuer.clock) as started:
        await taken(started, issuer.token())
        yield started


def hs(header: dict[str, Any], claims: dict[str, Any], key: bytes) -> str:
    """A token with a MAC over it, whatever the key is."""
    head = f"{packed({'alg': 'HS256', 'typ': 'JWT', **header})}.{packed(claims)}"
    return f"{head}.{packed(hmac.digest(key, head.encode(), 'sha256'))}"


# --- the signature ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["none", "None", "nOnE", "NONE", "", " none", "null", None, 0, [], ["none"], {}])
async def test_no_signature_is_no_signature_however_it_is_called(
    name: Any, issuer: FakeIssuer, gateway: Running
) -> None:
    good = issuer.token()
    for signature in (b"", b"\0" * 256):
        await refused(gateway, unsigned({"alg": name, "kid": "key-1"}, issuer.claims(), signature), "alg")
    await refused(gateway, good.rpartition(".")[0] + ".", "signature")
    await refused(gateway, unsigned({"typ": "JWT"}, issuer.claims()), "alg")


def public_forms() -> dict[str, bytes]:
    """The public key in every form in which it was taken for a secret."""
    public = KEY.private.public_key()
    pem = public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return {
        "PEM": pem,
        "PEM without its end": pem.rstrip(),
        "PEM behind a blank": b" " + pem,
        "PEM behind a line": b"\n" + pem,
        "DER": public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo),
        "PKCS1": public.public_bytes(Encoding.PEM, PublicFormat.PKCS1),
        "PKCS1 in DER": public.public_bytes(Encoding.DER, PublicFormat.PKCS1),
        "OpenSSH": public.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH),
        "JWK": orjson.dumps(KEY.jwk()),
        "modulus": KEY.jwk()["n"].encode(),
    }


@pytest.mark.parametrize("key", public_forms().values(), ids=public_forms())
async def test_the_public_key_is_no_secret(key: bytes, issuer: FakeIssuer, gateway: Running) -> None:
    for header in ({"kid": "key-1"}, {}, {"kid": "key-1", "alg": "HS512"}):
        await refused(gateway, hs(header, issuer.claims(), key), "alg")
    async with running(config(entry(issuer, public_key=KEY.pem()))) as static:
        await refused(static, hs({}, issuer.claims(), key), "alg")


@pytest.mark.parametrize("key", [b"", b"\0", b"secret", SECRET[:31].encode(), b"null", SECRET.encode() + b"\n"])
async def test_an_empty_short_or_other_secret_signs_nothing(key: bytes, issuer: FakeIssuer) -> None:
    async with running(config(entry(issuer, secret=SECRET)), clock=issuer.clock) as gateway:
        await taken(gateway, hs({}, issuer.claims(), SECRET.encode()))
        await refused(gateway, hs({}, issuer.claims(), key), "signature")


async def test_a_key_signs_for_the_algorithms_of_the_configuration_alone() -> None:
    settings = {"algorithms": ["PS256", "ES256"]}
    async with oidc() as issuer:
        # As some issuers do, without saying what the keys are for: their types alone tell.
        keys = [SigningKey("key-1", "PS256", KEY.private).jwk(), signing_key("key-2", "ES256").jwk()]
        issuer.key_set = {"keys": [{name: value for name, value in key.items() if name != "alg"} for key in keys]}
        async with running(config(entry(issuer, **settings))) as gateway:
            await taken(gateway, jwt.encode(issuer.claims(), KEY.private, "PS256", {"kid": "key-1"}))
            await refused(gateway, jwt.encode(issuer.claims(), KEY.private, "RS256", {"kid": "key-1"}), "alg")
            # The names of keys and their types do not go together here.
            head = f"{packed({'alg': 'ES256', 'kid': 'key-1'})}.{packed(issuer.claims())}"
            await refused(gateway, f"{head}.{packed(b'x' * 64)}", "kid")
            head = f"{packed({'alg': 'PS256', 'kid': 'key-2'})}.{packed(issuer.claims())}"
            await refused(gateway, f"{head}.{packed(b'x' * 256)}", "kid")


async def test_a_weak_key_signs_nothing() -> None:
    weak = SigningKey("weak", "RS256", rsa.generate_private_key(65537, 1024))
    async with oidc() as issuer:
        issuer.published.append(weak)
        async with running(config(entry(issuer))) as gateway:
            await taken(gateway, issuer.token())
            await refused(gateway, _signed({"alg": "RS256", "kid": "weak"}, issuer.claims(), weak), "kid")


@pytest.mark.parametrize("crit", [["exp"], ["b64"], ["x"], [], "exp", None, {}, ["b64", "x"], [1]])
async def test_an_extension_that_must_be_understood_is_not(crit: Any, issuer: FakeIssuer, gateway: Running) -> None:
    await refused(
        gateway, _signed({"alg": "RS256", "kid": "key-1", "crit": crit, "b64": True}, issuer.claims()), "crit"
    )


async def test_a_payload_that_is_not_encoded_is_not_read(issuer: FakeIssuer, gateway: Running) -> None:
    header = packed({"alg": "RS256", "kid": "key-1", "b64": False, "crit": ["b64"]})
    for payload in ("", orjson.dumps(issuer.claims()).decode()):
        answer = await ask(gateway, f"{header}.{payload}.{packed(b'x' * 256)}")
        assert answer.status == 401


@pytest.mark.parametrize(
    "kid",
    [
        "../../../../dev/null",
        "/etc/passwd",
        "file:///etc/passwd",
        "https://attacker.example/keys",
        "' OR 1=1 --",
        "key-1' UNION SELECT 'x",
        "key-1\0",
        "KEY-1",
        "key-1 ",
        "",
        "\u202ekey-1",
        "x" * 4000,
    ],
)
async def test_the_name_of_a_key_is_a_name_and_nothing_else(kid: str, issuer: FakeIssuer, gateway: Running) -> None:
    for key in (b"", b"\0", kid.encode()):
        await refused(gateway, hs({"kid": kid}, issuer.claims(), key), "alg")
    await refused(gateway, _signed({"alg": "RS256", "kid": kid}, issuer.claims()), "kid")


@pytest.mark.parametrize("kid", [0, 1.5, True, ["key-1"], {"kid": "key-1"}])
async def test_a_name_that_is_no_text_names_nothing(kid: Any, issuer: FakeIssuer, gateway: Running) -> None:
    await refused(gateway, _signed({"alg": "RS256", "kid": kid}, issuer.claims()), "malformed")


async def test_a_token_brings_no_key_along_and_leads_nowhere(issuer: FakeIssuer, gateway: Running) -> None:
    theirs = signing_key("key-1-of-somebody-else")
    async with oidc() as attacker:
        certificate = b64encode(
            theirs.private.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        )
        for header in (
            {"jku": attacker.keys_url},
            {"x5u": attacker.keys_url},
            {"jwk": theirs.jwk()},
            {"x5c": [certificate.decode()]},
            {"jku": attacker.keys_url, "jwk": theirs.jwk(), "x5u": attacker.keys_url},
        ):
            for kid in (theirs.kid, "key-1"):
                token = theirs.sign(issuer.claims(), {**header, "kid": kid})
                await refused(gateway, token, "signature" if kid == "key-1" else "kid")
            await taken(gateway, issuer.token(header))  # a header that says more than it must is no fault
        assert attacker.requests == []


@pytest.mark.parametrize(
    "header", [b"{", b"", b"[]", b'"RS256"', b"null", b'{"alg":"RS256",}', b"\xff\xfe", b"[" * 3000, b'{"alg":NaN}']
)
async def test_a_header_that_is_none_is_malformed(header: bytes, issuer: FakeIssuer, gateway: Running) -> None:
    token = unsigned(header, issuer.claims(), b"x" * 256)
    answer = await ask(gateway, token)
    assert answer.status == 401
    if header:
        await refused(gateway, token, "malformed")


def _signed(header: dict[str, Any], claims: dict[str, Any], key: SigningKey = KEY) -> str:
    """A token that is signed with RS256, with exactly this header."""
    head = f"{packed(header)}.{packed(claims)}"
    return f"{head}.{packed(key.private.sign(head.encode(), PKCS1v15(), SHA256()))}"


# --- the claims ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"aud": "other"}, "audience"),
        ({"aud": "qlen"}, "audience"),
        ({"aud": "qlens2"}, "audience"),
        ({"aud": "x qlens y"}, "audience"),
        ({"aud": "QLENS"}, "audience"),
        ({"aud": ""}, "audience"),
        ({"aud": None}, "audience"),
        ({"aud": []}, "audience"),
        ({"aud": ["other", "qlens2"]}, "audience"),
        ({"aud": [["qlens"]]}, "audience"),
        ({"aud": {"qlens": True}}, "audience"),
        ({"aud": [None, 7]}, "audience"),
        ({"aud": True}, "audience"),
        ({"exp": None}, "expiry"),
        ({"exp": "1900000000"}, "exp is no time"),
        ({"exp": True}, "exp is no time"),
        ({"exp": [1900000000]}, "exp is no time"),
        ({"exp": 1e300}, "exp is no time"),
        ({"exp": 1_900_000_000_000}, "exp is no time"),
        ({"exp": -1}, "exp is no time"),
        ({"exp": 0}, "expired"),
        ({"exp": 1_799_999_969}, "expired"),
        ({"nbf": 1_800_000_031}, "not valid yet"),
        ({"nbf": "1700000000"}, "nbf is no time"),
        ({"nbf": 1e11}, "nbf is no time"),
    ],
    ids=str,
)
async def test_what_a_token_must_say_it_says_exactly(
    changes: dict[str, Any], reason: str, issuer: FakeIssuer, gateway: Running
) -> None:
    for _ in range(2):  # the second time it is known
        await refused(gateway, issuer.token(**changes), reason)


async def test_another_issuers_tokens_are_nobodys(issuer: FakeIssuer, gateway: Running) -> None:
    mine = issuer.issuer
    for iss in (
        f"{mine}/",
        mine[:-1],
        f"{mine}.attacker.example",
        mine.upper(),
        [mine],
        {mine: 1},
        7,
        "",
        None,
        f" {mine}",
    ):
        claims = {**issuer.claims(), "iss": iss}
        await refused(gateway, _signed({"alg": "RS256", "kid": "key-1"}, claims), "Incorrect API key provided.")
    await refused(gateway, _signed({"alg": "RS256", "kid": "key-1"}, issuer.claims(iss=None)))


@pytest.mark.parametrize(
    "token",
    ["a", "a.b", "a.b.c", "a.b.c.d", "..", "a..c", ".b.c", "é.b.c", "a.b.c ", "e30.e30.", "e30.e30.e30=", "{}.{}.x"],
)
async def test_what_is_no_token_is_nobodys(token: str, gateway: Running) -> None:
    assert (await ask(gateway, token)).status == 401
    assert await _authenticated(gateway, token) is None


async def test_bytes_that_are_no_text_are_no_token(issuer: FakeIssuer, gateway: Running) -> None:
    header, payload, signature = issuer.token().split(".")
    for token in (f"{header}\udcff.{payload}.{signature}", f"\udcff.{payload}.x", f"{header}.{payload}.\udcff"):
        assert await _authenticated(gateway, token) is None


async def test_padding_and_other_ways_to_write_the_same_token_are_not_the_same(
    issuer: FakeIssuer, gateway: Running
) -> None:
    header, payload, signature = issuer.token().split(".")
    for other in (
        f"{header}=.{payload}.{signature}",
        f"{header}.{payload}=.{signature}",
        f"{header}.{payload}.{signature}==",
    ):
        assert (await ask(gateway, other)).status == 401
    await refused(gateway, f"{header}.{payload}.{signature}AAAA", "signature")


async def test_a_token_that_is_too_long_is_not_looked_at(issuer: FakeIssuer, gateway: Running) -> None:
    long = issuer.token(padding="x" * 8000)
    refused = await ask(gateway, long)
    assert (refused.status, refused.json()["error"]["code"]) == (431, "header_too_large")
    with pytest.raises(Unauthenticated, match="longer than 8192 bytes"):
        await _authenticated(gateway, long)
    assert await _authenticated(gateway, "x" * 9000) is None


# --- what is known ------------------------------------------------------------------------------


async def test_a_known_token_with_any_one_character_changed_is_another_one(
    issuer: FakeIssuer, gateway: Running
) -> None:
    token = issuer.token()
    await taken(gateway, token)
    plugin: Jwt = gateway.plugin("auth", "jwt")
    assert hashlib.sha256(token.encode()).digest() in plugin._accepted
    before = dict(plugin._accepted)
    letters = string.ascii_letters + string.digits + "-_.~ é"
    dice = random.Random(1)
    for place, letter in enumerate(token):
        other = dice.choice([each for each in letters if each != letter])
        changed = token[:place] + other + token[place + 1 :]
        try:
            assert await _authenticated(gateway, changed) is None
        except Unauthenticated:
            continue
    for part in (token[:-1], token[1:], token + "A", token[:20], token.swapcase()):
        assert (await ask(gateway, part)).status == 401
    assert dict(plugin._accepted) == before


async def test_no_two_credentials_share_what_is_known(issuer: FakeIssuer) -> None:
    async with running(config(entry(issuer, secret=SECRET)), clock=issuer.clock) as gateway:
        plugin: Jwt = gateway.plugin("auth", "jwt")
        token = hs({}, issuer.claims(), SECRET.encode())
        caller = await _authenticated(gateway, token)

        @given(st.integers(0, len(token)), st.integers(0, 40), st.text(max_size=40))
        def differ(place: int, length: int, text: str) -> None:
            other = token[:place] + text + token[place + length :]
            with contextlib.suppress(Unauthenticated):
                found = _at_once(plugin.authenticate(_call({"api-key": other}, None)))
                assert found == (caller if other == token else None)

        differ()
        assert len(plugin._accepted) == 1


def _at_once(waiting: Coroutine[Any, Any, T]) -> T:
    """The result of what does not wait."""
    try:
        waiting.send(None)
    except StopIteration as done:
        return cast(T, done.value)
    raise AssertionError("it waits")


async def test_what_is_known_is_bounded_and_what_is_refused_is_soon_forgotten(issuer: FakeIssuer) -> None:
    clock = issuer.clock
    assert isinstance(clock, ManualClock)
    async with running(config(entry(issuer, secret=SECRET)), clock=clock) as gateway:
        plugin: Jwt = gateway.plugin("auth", "jwt")
        first = hs({}, issuer.claims(jti="first"), SECRET.encode())
        await _authenticated(gateway, first)
        bad = hs({}, issuer.claims(jti="first"), b"wrong")
        with pytest.raises(Unauthenticated):
            await _authenticated(gateway, bad)
        ((_, until),) = plugin._verdicts.refused.values()
        assert until - clock.time() <= 10
        ((caller, until),) = plugin._accepted.values()
        assert until - clock.time() <= 300
        fill = (b"%032d" % number for number in range(MOST_KNOWN + 50))
        for number, digest in enumerate(fill):
            if number % 100 == 0:
                assert await _authenticated(gateway, first) is caller  # used now and then, so it stays
            _put(plugin._accepted, digest, (Caller("x", "x", "jwt"), until))
        assert len(plugin._accepted) == MOST_KNOWN
        assert await _authenticated(gateway, first) is caller


# --- everything together ------------------------------------------------------------------------


async def test_ten_thousand_odd_credentials_give_no_identity_without_a_tenant(issuer: FakeIssuer) -> None:
    key = "sk-example-Zb1yQ0cW8mT5rL2vX7nK4hJ9dF6gS3aP"
    row, root = (
        f"{{id: {id_}, hash: 'sha256:{hashlib.sha256(each.encode()).hexdigest()}', tenant: acme, roles: [{role}]}}"
        for id_, each, role in (("one", key, "member"), ("root", ADMIN, "admin"))
    )
    trusted = {
        "plugin": "trusted_header",
        "proxies": ["10.0.0.0/8"],
        "headers": {"tenant": "x-tenant", "subject": "x-user"},
    }
    stored = {"plugin": "key_store", "poll_seconds": 0.05}
    keys = {"plugin": "api_keys", "file": "keys.yaml"}
    auth = (trusted, keys, stored, entry(issuer, secret=SECRET, roles_claim="roles"))
    async with running(config(*auth), files={"keys.yaml": f"keys: [{row}, {root}]"}, clock=issuer.clock) as gateway:
        held, revoked = await made(gateway), await made(gateway)
        assert (await send(gateway, "DELETE", f"/admin/keys/{revoked['id']}")).status == 200
        dice = random.Random(20261128)
        callers: Counter[str] = Counter()

        async def ask_for(headers: dict[str, str], peer: str) -> None:
            try:
                caller = await gateway.gateway.current.pipeline.authenticate(_call(headers, peer))
            except Unauthenticated:
                callers["refused"] += 1
                return
            callers[caller.by] += 1
            assert caller.tenant
            assert caller.tenant.isprintable()
            assert caller.subject
            assert caller.roles == {"member"}
            assert caller.key_id != revoked["id"]

        heads = _odd_heads(dice, 10_000, [key, held["key"], revoked["key"]], issuer)
        while together := list(itertools.islice(heads, 500)):  # as unknown keys share their looks at the database
            await asyncio.gather(*(ask_for(*head) for head in together))
        assert callers.pop("refused") > 5000
        assert callers.total() > 300
        assert set(callers) == {"trusted_header", "api_keys", "key_store", "jwt"}


def _odd_heads(
    dice: random.Random, count: int, keys: Sequence[str], issuer: FakeIssuer
) -> Iterator[tuple[dict[str, str], str]]:
    """Heads of requests: credentials that are right, nearly right, and not at all."""
    values: list[Any] = [
        None,
        "",
        "acme",
        " ",
        "\n",
        0,
        7,
        1.5,
        True,
        [],
        ["acme"],
        {},
        {"id": "x"},
        "x" * 300,
        "\ud7ff",
        "é",
    ]
    seeds = [*keys, hs({}, issuer.claims(), SECRET.encode()), issuer.token(), "a.b.c", "Bearer", "null", "' OR 1=1 --"]
    for _ in range(count):
        match dice.randrange(4):
            case 0:  # signed as it must be, with odd claims
                names = dice.sample(["org", "sub", "aud", "exp", "nbf", "iss", "roles", "jti"], dice.randrange(4))
                claims = {**issuer.claims(), **{name: dice.choice(values) for name in names}, "n": dice.random()}
                token = hs({}, claims, SECRET.encode())
            case 1:  # a character changed, taken out or put in
                token = dice.choice(seeds)
                place = dice.randrange(len(token))
                token = (
                    token[:place]
                    + chr(
                        dice.choice([dice.randrange(33, 127), dice.randrange(128, 1000), 0xDC80 + dice.randrange(128)])
                    )
                    + token[place + dice.randrange(2) :]
                )
            case 2:
                token = "".join(dice.choice(".=eyJ-_ABc \t\x7fé\udcff") for _ in range(dice.randrange(60)))
            case _:
                token = dice.choice(seeds)
        scheme = dice.choice(["Bearer ", "bearer ", "Bearer", "Basic ", "", "Bearer  ", "BEARER "])
        headers = {dice.choice(["authorization", "api-key", "x-api-key"]): scheme + token}
        for name in ("x-tenant", "x-user"):
            if dice.random() < 0.3:
                headers[name] = str(dice.choice(values))
        yield headers, dice.choice(["127.0.0.1", "10.1.2.3", "11.0.0.1", "", "::ffff:10.0.0.1", "fe80::1%eth0"])


async def test_nothing_secret_is_shown_anywhere(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    admin = {"roles_claim": "roles", "roles": {"ops": "admin"}}
    shared = entry(name="shared", issuer="shared", secret=SECRET)
    async with oidc() as issuer, running(config(shared, entry(issuer, **admin))) as gateway:
        tokens = [issuer.token(roles=["ops"]), hs({}, issuer.claims(iss="shared"), SECRET.encode())]
        wrong = [
            issuer.token(aud="x"),
            hs({}, issuer.claims(iss="shared"), b"x"),
            issuer.token({"kid": "secret-kid-example"}),
        ]
        shown = [(await gateway.get(MODELS, key=token)).text for token in (*tokens, *wrong, *wrong)]
        issuer.key_set = b"private words of the issuer"
        for name in ("jwt", "shared"):
            plugin: Jwt = gateway.plugin("auth", name)
            shown += [repr(each) for each in (plugin, plugin.config, plugin._keyring, plugin._fixed, plugin._verdicts)]
        gateway.plugin("auth", "jwt")._keyring.renew()
        await issuer.arrived(4)
        shown += [(await gateway.get(path, key=tokens[0])).text for path in ("/admin/health", "/metrics", "/readyz")]
        shown += [repr(gateway.gateway.config), gateway.gateway.metrics.text().decode(), str(gateway.gateway.health())]
        shown.append(caplog.text)
        everything = "\n".join(shown)
        private = KEY.private_pem().splitlines()[5]
        for secret in (
            SECRET,
            b64encode(SECRET.encode()).decode()[:40],
            private,
            "private words",
            "secret-kid-example",
        ):
            assert secret not in everything
        for token in (*tokens, *wrong):
            assert not [part for part in token.split(".") if part in everything]
    assert AUDIENCE in everything


def _call(headers: dict[str, str], peer: str | None) -> Call:
    async def nothing() -> bytes:
        return b""

    return Call(
        id="call", operation=OPERATIONS[0], path="/", path_params={}, query={}, headers=headers, peer=peer,
        credential=_credential(headers), started=0, wall_ns=0, deadline=60, reader=nothing,
    )  # fmt: skip


async def _authenticated(gateway: Running, token: str) -> Caller | None:
    """What the plugin says to a token that no request could carry, or to many of them."""
    plugin: Jwt = gateway.plugin("auth", "jwt")
    return await plugin.authenticate(_call({"authorization": f"Bearer {token}"}, "127.0.0.1"))
