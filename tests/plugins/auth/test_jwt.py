"""The plugin `jwt`: what a token says of its caller, and where the keys come from."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jwt
import openai
import orjson
import pytest
from joserfc import jwk, jws
from tokens import ask, config, entry, refused, taken
from yamls import CHAT, HELLO, probe

from qlens import Caller, StartupError
from qlens.cli import main
from qlens.testing import ManualClock, Running, Scripted, check_plugin, running
from qlens.testing.oidc import DISCOVERY, KEYS, oidc, signing_key
from qlens_plugins.auth.jwt import Jwt

SECRET = "example-secret-of-more-than-thirty-two-bytes"
ISSUER = "https://login.example.com"


async def caller_of(gateway: Running, token: str) -> Caller:
    before = len(gateway.receipts)
    answer = await gateway.post(CHAT, HELLO, key=token)
    assert answer.status == 200, answer.text
    return (await gateway.settled(before + 1))[-1].caller


async def eventually(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not holds():
            await asyncio.sleep(0.01)


async def idle(gateway: Running) -> None:
    """Wait until no keys are being fetched."""
    plugin: Jwt = gateway.plugin("auth", "jwt")
    await eventually(lambda: plugin._keyring._flight is None)


async def renewed(gateway: Running) -> None:
    """Have the keys fetched as the background does."""
    gateway.plugin("auth", "jwt")._keyring.renew()
    await idle(gateway)


def test_it_keeps_the_contract_of_its_stage() -> None:
    check_plugin("auth", Jwt)


# --- claims -------------------------------------------------------------------------------------


async def test_a_token_tells_everything_about_its_caller() -> None:
    settings: dict[str, Any] = {
        "tenant_claim": "organization.id",
        "project_claim": "https://example.com/project",
        "roles_claim": "realm_access.roles",
        "roles": {"gateway-admins": "admin", "gateway-auditors": "viewer"},
        "models_claim": "models",
        "tag_claims": {"team": "department", "seat": "seat"},
    }
    async with oidc() as issuer, running(config(entry(issuer, **settings))) as gateway:
        claims = issuer.claims(
            organization={"id": "acme"},
            models=["gpt-4o*"],
            department="search",
            realm_access={"roles": ["gateway-auditors", "admin", "offline_access"]},
            **{"https://example.com/project": "rocket"},
        )
        caller = await caller_of(gateway, issuer.key.sign(claims))
        assert caller == Caller(
            tenant="acme",
            subject="alice",
            by="jwt",
            project="rocket",
            roles=frozenset({"member", "viewer"}),
            models=("gpt-4o*",),
            tags={"team": "search"},
            expires_at=claims["exp"],
        )


CLAIMS: list[tuple[Any, set[str]]] = [
    ("llm-admins other", {"member", "admin"}),
    (["llm-admins"], {"member", "admin"}),
    ("admin", {"member"}),
    (["admin", "viewer", "roles", "llm-admins "], {"member"}),
    ([], {"member"}),
    (None, {"member"}),
]


async def test_a_role_is_only_what_the_configuration_makes_of_a_claim() -> None:
    settings = {"roles_claim": "groups", "roles": {"llm-admins": "admin"}}
    async with oidc() as issuer, running(config(entry(issuer, **settings))) as gateway:
        for claim, roles in CLAIMS:
            token = issuer.token(groups=claim, roles=["admin"], role="admin", scope="admin")
            assert (await caller_of(gateway, token)).roles == roles, claim
            assert (await gateway.get("/admin/health", key=token)).status == (200 if "admin" in roles else 403)


async def test_where_models_are_a_claim_a_token_without_it_may_use_none() -> None:
    async with oidc() as issuer, running(config(entry(issuer, models_claim="models"))) as gateway:
        assert (await gateway.post(CHAT, HELLO, key=issuer.token())).status == 404
        assert (await gateway.post(CHAT, HELLO, key=issuer.token(models=[]))).status == 404
        assert (await gateway.post(CHAT, HELLO, key=issuer.token(models="gpt-4o-mini"))).status == 200


async def test_a_token_without_a_tenant_is_refused() -> None:
    nobody: list[Any] = [None, "", " ", "\t", "a\nb", "a\u2028b", ["acme"], {"id": "acme"}, True, 1.5, "x" * 257]
    async with oidc() as issuer, running(config(entry(issuer))) as gateway:
        for value in nobody:
            await refused(gateway, issuer.token(org=value), "org")
            await refused(gateway, issuer.token(sub=value), "sub")


async def test_a_number_is_a_name_too() -> None:
    async with oidc() as issuer, running(config(entry(issuer))) as gateway:
        assert (await caller_of(gateway, issuer.token(org=42))).tenant == "42"


async def test_time_decides_with_some_leeway() -> None:
    clock = ManualClock()
    async with oidc(clock=clock) as issuer, running(config(entry(issuer, leeway_seconds=10)), clock=clock) as gateway:
        now = clock.time()
        token = issuer.token(exp=now + 60, nbf=now + 10)
        await taken(gateway, token)
        await refused(gateway, issuer.token(nbf=now + 11), "not valid yet")
        clock.advance(59)
        await taken(gateway, token)  # known
        clock.advance(10)
        await taken(gateway, token)  # over, but within the leeway
        clock.advance(1)
        await refused(gateway, token, "expired")
        clock.advance(-60)  # it was ahead: what was refused then is right now
        await taken(gateway, token)


async def test_a_token_that_was_known_is_judged_again_when_it_ends() -> None:
    clock = ManualClock()
    async with oidc(clock=clock) as issuer, running(config(entry(issuer, leeway_seconds=0)), clock=clock) as gateway:
        token = issuer.token(exp=clock.time() + 60)
        await taken(gateway, token)
        clock.advance(60)
        await refused(gateway, token, "expired")


async def test_one_of_several_audiences_is_enough() -> None:
    async with oidc() as issuer, running(config(entry(issuer, audience=["qlens", "llm"]))) as gateway:
        await taken(gateway, issuer.token(aud=["somebody", "llm"]))
        await taken(gateway, issuer.token(aud="qlens"))
        await refused(gateway, issuer.token(aud="qlens llm"), "audience")


# --- keys ---------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:EdDSA is deprecated")  # its new names are not those that issuers use yet
@pytest.mark.parametrize(
    "algorithm", ["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"]
)
async def test_another_librarys_tokens_are_taken_and_no_other_algorithm(algorithm: str) -> None:
    key = signing_key(f"other-{algorithm[:2]}", algorithm)
    kind: Any = {"RS": "RSA", "PS": "RSA", "ES": "EC", "Ed": "OKP"}[algorithm[:2]]
    theirs = jwk.import_key(key.private_pem(), kind)
    settings = {"public_key": key.pem(), "algorithms": [algorithm]}
    async with oidc() as issuer, running(config(entry(issuer, **settings))) as gateway:
        for other in {algorithm, "RS256", "PS512"} if kind == "RSA" else {algorithm}:
            header = {"alg": other, "kid": "any"}
            token = jws.serialize_compact(header, orjson.dumps(issuer.claims()), theirs, algorithms=[other])
            await (taken(gateway, token) if other == algorithm else refused(gateway, token, "alg"))


async def test_a_shared_secret_signs_for_hs_alone() -> None:
    async with oidc() as issuer, running(config(entry(issuer, secret=SECRET))) as gateway:
        await taken(gateway, jwt.encode(issuer.claims(), SECRET, "HS256"))
        await refused(gateway, jwt.encode(issuer.claims(), SECRET[:-1], "HS256"), "signature")
        await refused(gateway, jwt.encode(issuer.claims(), SECRET * 2, "HS512"), "alg")
        await refused(gateway, issuer.token(), "alg")
        assert issuer.requests == []


async def test_a_key_in_a_file_is_followed(tmp_path: Path) -> None:
    file = tmp_path / "key.pem"
    one, two = signing_key("one"), signing_key("two")
    file.write_text(one.pem())
    async with oidc() as issuer, running(config(entry(issuer, public_key_file=str(file)))) as gateway:
        old, new = one.sign(issuer.claims()), two.sign(issuer.claims())
        await taken(gateway, old)
        await refused(gateway, new, "signature")
        file.write_text("no key")
        await renewed(gateway)
        await taken(gateway, old)
        health = gateway.gateway.health()["auth.jwt"]
        assert not health.ok
        assert "BEGIN PUBLIC KEY" in health.detail
        file.write_text(two.pem())
        await renewed(gateway)
        await taken(gateway, new)  # what was refused a moment ago was forgotten with the old key
        await refused(gateway, old, "signature")  # and so was what was accepted
        assert gateway.gateway.health()["auth.jwt"].ok


async def test_discovery_finds_keys_and_a_url_needs_none() -> None:
    async with oidc() as issuer:
        async with running(config(entry(issuer))) as gateway:
            await taken(gateway, issuer.token())
            assert [request.path for request in issuer.requests] == [DISCOVERY, KEYS]
        async with running(config(entry(issuer, issuer="anything", jwks_url=issuer.keys_url))) as gateway:
            await taken(gateway, issuer.token(iss="anything"))
            await refused(gateway, issuer.token())
            assert [request.path for request in issuer.requests][2:] == [KEYS]


async def test_a_new_key_is_fetched_when_a_token_names_it_once_for_all() -> None:
    clock = ManualClock()
    async with oidc(clock=clock) as issuer, running(config(entry(issuer)), clock=clock) as gateway:
        await taken(gateway, issuer.token())
        issuer.rotate()
        clock.advance(30)
        await asyncio.gather(*(taken(gateway, issuer.token(jti=str(n))) for n in range(50)))
        assert issuer.fetches == 2


async def test_a_flood_of_unknown_keys_is_one_fetch_in_thirty_seconds() -> None:
    clock = ManualClock()
    async with oidc(clock=clock) as issuer, running(config(entry(issuer)), clock=clock) as gateway:
        await taken(gateway, issuer.token())
        for fetches in (1, 2, 3):
            await asyncio.gather(*(refused(gateway, issuer.token({"kid": f"{fetches}-{n}"}), "kid") for n in range(50)))
            assert issuer.fetches == fetches
            clock.advance(30)


async def test_keys_are_renewed_in_the_background_while_nobody_calls() -> None:
    async with oidc() as issuer, running(config(entry(issuer, refresh_seconds=1))) as gateway:
        await taken(gateway, token := issuer.token())
        issuer.rotate(keep=False)
        await taken(gateway, token)  # known
        await eventually(lambda: issuer.fetches == 2)
        await idle(gateway)
        await refused(gateway, token, "kid")  # its key was withdrawn
        await taken(gateway, issuer.token())


ODD: dict[str, bytes | dict[str, Any]] = {
    "no JSON": b"<html>",
    "nothing": b"",
    "no object": b"[]",
    "no keys": {},
    "keys of another kind": {"keys": {"a": 1}},
    "an empty list": {"keys": []},
    "no keys in the list": {"keys": [1, None, "x", [], {"kty": ["RSA"]}, {"kty": {}}, {"kty": 7}]},
    "broken keys": {
        "keys": [
            {"kty": "RSA", "kid": "key-1", "n": "AQAB", "e": "AQAB"},
            {"kty": "RSA", "kid": "key-1", "n": 7, "e": []},
            {"kty": "EC", "crv": "P-256", "x": "AA", "y": "AA"},
            {"kty": "EC", "crv": ["P-256"], "x": "AA", "y": "AA"},
            {"kty": "OKP", "crv": "X25519", "x": "AA"},
        ]
    },
    "symmetric keys": {"keys": [{"kty": "oct", "kid": "key-1", "k": "AAAA" * 16, "alg": "HS256"}]},
    "an end that is missing": b'{"keys": [{"kty": "RSA"',
    "too much": b'{"keys": [' + b" " * 300_000 + b"]}",
    "depth": b'{"keys":' * 50_000,
}


async def test_an_odd_key_set_leaves_the_keys_as_they_are(caplog: pytest.LogCaptureFixture) -> None:
    async with oidc() as issuer, running(config(entry(issuer))) as gateway:
        await taken(gateway, issuer.token())
        for name, answer in ODD.items():
            caplog.clear()
            issuer.key_set = answer
            for _ in range(3):
                await renewed(gateway)
            await taken(gateway, issuer.token(jti=name))
            health = gateway.gateway.health()["auth.jwt"]
            assert not health.ok, name
            assert health.detail.startswith("1 keys, ")
            assert len([record for record in caplog.records if record.levelno >= logging.ERROR]) == 1, name
            issuer.key_set = None
            await renewed(gateway)
            assert gateway.gateway.health()["auth.jwt"].ok, name
        failed = f'qlens_jwt_fetches_total{{outcome="failed",plugin="jwt"}} {3.0 * len(ODD)}'
        assert failed in gateway.gateway.metrics.text().decode()


async def test_only_an_answer_that_is_one_is_believed_and_a_redirect_leads_nowhere() -> None:
    async with oidc() as issuer, oidc() as other, running(config(entry(issuer, jwks_url=issuer.keys_url))) as gateway:
        await taken(gateway, issuer.token())
        theirs = signing_key("key-2")
        for status in (201, 203, 302, 307, 404, 500):
            location = {"location": other.keys_url}
            issuer.broken = Scripted(status, headers=location, body={"keys": [theirs.jwk()]})
            await renewed(gateway)
            assert gateway.gateway.health()["auth.jwt"].detail.endswith(f"answered with status {status}")
            await taken(gateway, issuer.token(jti=str(status)))
            await refused(gateway, theirs.sign(issuer.claims()), "kid")
        assert other.requests == []


FAILURES = {
    "a redirect": Scripted(302, headers={"location": "http://127.0.0.1:9/keys"}),
    "an error": Scripted(500),
    "a reset": Scripted(body={"keys": []}, cut_at=3, reset=True),
    "nonsense": Scripted(raw=b"SSH-2.0-x\r\n"),
    "a closed door": Scripted(raw=b""),
}


@pytest.mark.parametrize("broken", FAILURES.values(), ids=FAILURES)
async def test_an_issuer_that_is_away_at_the_start_is_503_until_it_is_back(broken: Scripted) -> None:
    clock = ManualClock()
    async with oidc(clock=clock) as issuer:
        issuer.broken = broken
        async with running(config(entry(issuer)), clock=clock) as gateway:
            answer = await ask(gateway, issuer.token())
            assert answer.status == 503
            assert answer.json()["error"]["code"] == "unavailable"
            assert "retry-after" in answer.headers
            health = gateway.gateway.health()["auth.jwt"]
            assert not health.ok
            assert health.detail.startswith("no key yet: ")
            before = len(issuer.requests)
            assert [(await ask(gateway, issuer.token())).status for _ in range(20)] == [503] * 20
            assert len(issuer.requests) == before
            issuer.broken = None
            clock.advance(1)
            await taken(gateway, issuer.token())
            assert gateway.gateway.health()["auth.jwt"].ok


async def test_one_that_hangs_delays_neither_the_start_nor_anybody_elses_calls_nor_the_end() -> None:
    async with oidc() as issuer:
        issuer.broken = Scripted(hang=True)
        async with asyncio.timeout(5), running(config(entry(issuer), {"plugin": "anonymous"})) as gateway:
            assert (await ask(gateway, "sk-example-key")).status == 200
            waiting = asyncio.create_task(ask(gateway, issuer.token()))
            await issuer.arrived(1)
            waiting.cancel()  # a client that leaves takes the fetch of all others not with it
            await asyncio.gather(waiting, return_exceptions=True)
            assert gateway.plugin("auth", "jwt")._keyring._flight is not None


@pytest.mark.parametrize(
    "discovery",
    [
        {"issuer": "https://login.example.com"},
        {"issuer": None},
        {"jwks_uri": "http://example.com/keys"},
        {"jwks_uri": "file:///etc/passwd"},
        {"jwks_uri": "https://user:password@example.com/keys"},
        {"jwks_uri": "//example.com"},
        {"jwks_uri": ["https://example.com"]},
        {"jwks_uri": None},
    ],
    ids=str,
)
async def test_a_discovery_document_leads_nowhere_it_should_not(discovery: dict[str, Any]) -> None:
    async with oidc() as issuer:
        issuer.discovery = discovery
        async with running(config(entry(issuer))) as gateway:
            assert (await ask(gateway, issuer.token())).status == 503
            assert issuer.fetches == 0
            assert "discovery document" in gateway.gateway.health()["auth.jwt"].detail


async def test_where_there_are_several_keys_a_token_must_name_one() -> None:
    async with oidc() as issuer:
        issuer.rotate()
        async with running(config(entry(issuer))) as gateway:
            await refused(gateway, unnamed := jwt.encode(issuer.claims(), issuer.key.private, "RS256"), "kid")
            await taken(gateway, issuer.token())
            issuer.published.pop(0)
            await renewed(gateway)
            await taken(gateway, unnamed)


async def test_keys_for_encryption_for_another_algorithm_or_published_with_their_secret_are_not_used() -> None:
    clock = ManualClock()
    for change in ({"use": "enc"}, {"alg": "PS256"}, {"key_ops": ["encrypt"]}, {"d": "AQAB"}, {"kid": 7}):
        async with oidc(clock=clock) as issuer:
            issuer.key_set = {"keys": [{**issuer.key.jwk(), **change}, signing_key("key-9").jwk()]}
            async with running(config(entry(issuer)), clock=clock) as gateway:
                await refused(gateway, issuer.token(), "kid")


# --- several issuers, reload --------------------------------------------------------------------


async def test_two_instances_are_two_issuers_and_a_token_goes_to_its_own() -> None:
    async with oidc() as one, oidc(algorithm="ES256") as two:
        auth = [entry(one, name="one"), entry(two, name="two", algorithms=["ES256"], tenant_claim="team")]
        async with running(config(*auth)) as gateway:
            assert (await caller_of(gateway, one.token())).by == "one"
            caller = await caller_of(gateway, two.token(team="rocket"))
            assert (caller.by, caller.tenant) == ("two", "rocket")
            await refused(gateway, two.token(), "team")
            await refused(gateway, two.key.sign(one.claims()), "alg")


async def test_a_reload_goes_on_with_the_keys_and_forgets_what_was_decided_otherwise() -> None:
    async with oidc() as issuer, running(config(entry(issuer))) as gateway:
        await taken(gateway, token := issuer.token(team="rocket"))
        issuer.broken = Scripted(500)
        await gateway.reload(config(entry(issuer, refresh_seconds=60)))
        await taken(gateway, token)
        assert gateway.plugin("auth", "jwt")._accepted  # known still
        await gateway.reload(config(entry(issuer, tenant_claim="team")))
        assert (await caller_of(gateway, token)).tenant == "rocket"
        await gateway.reload(config(entry(issuer, audience="other")))
        await refused(gateway, token, "audience")
        assert issuer.fetches == 1


async def test_a_reload_sees_that_the_key_in_the_file_is_another_one(tmp_path: Path) -> None:
    file = tmp_path / "key.pem"
    one, two = signing_key("one"), signing_key("two")
    file.write_text(one.pem())
    async with oidc() as issuer, running(config(entry(issuer, public_key_file=str(file)))) as gateway:
        await taken(gateway, token := one.sign(issuer.claims()))
        file.write_text(two.pem())
        await gateway.reload(config(entry(issuer, public_key_file=str(file), refresh_seconds=60)))
        await refused(gateway, token, "signature")
        await taken(gateway, two.sign(issuer.claims()))


async def test_a_reload_to_another_issuer_forgets_the_keys() -> None:
    async with oidc() as one, oidc() as two, running(config(entry(one))) as gateway:
        await taken(gateway, one.token())
        await gateway.reload(config(entry(two)))
        await refused(gateway, one.token())
        await taken(gateway, two.token())


# --- settings -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"issuer": "http://login.example.com"}, "issuer must begin with https://"),
        ({"issuer": "http://10.0.0.1"}, "issuer must begin with https://"),
        ({"issuer": "acme"}, "issuer must be a URL"),
        ({"jwks_url": "http://example.com/keys"}, "must begin with https://"),
        ({"secret": "", "algorithms": ["HS256"]}, "expected a secret"),
        ({"secret": "short"}, "at least 32 bytes"),
        ({"secret": "x" * 32, "algorithms": ["HS512"]}, "at least 64 bytes"),
        ({"secret": signing_key("key-1").pem()}, "not a key or certificate"),
        ({"secret": SECRET, "algorithms": ["RS256", "HS256"]}, "RS256 cannot be used with `secret`"),
        ({"algorithms": ["HS256"]}, "HS256 needs `secret`"),
        ({"algorithms": ["none"]}, "expected one of: RS256"),
        ({"algorithms": []}, "must name an algorithm"),
        ({"public_key": signing_key("key-1").private_pem()}, "public_key must be a public key as PEM"),
        ({"public_key": signing_key("e", "ES256").pem()}, "is a key for ES256, but algorithms are RS256"),
        ({"public_key": signing_key("e", "ES256").pem(), "algorithms": ["ES384"]}, "is a key for ES256"),
        ({"secret": SECRET, "jwks_url": ISSUER}, "set one of them"),
        ({"leeway_seconds": 61}, "must be <= 60"),
        ({"audience": []}, "audience"),
        ({"audience": [""]}, "audience"),
        ({"tenant_claim": None}, "tenant_claim"),
        ({"roles": {"a": "admin"}}, "roles_claim must say"),
        ({"public_key_file": "missing.pem"}, "missing.pem cannot be read"),
    ],
)
async def test_settings_that_would_let_in_the_wrong_ones_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(StartupError) as caught:
        async with running(config(entry(**settings))):
            pass
    assert message in str(caught.value)
    hidden = [str(settings[name]) for name in ("secret", "public_key") if settings.get(name)]
    assert not [text for text in hidden if text in str(caught.value)]


def test_a_configuration_is_checked_offline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "qlens.yaml"
    file.write_text(
        config(entry(issuer="${ISSUER}", secret="${KEY}", algorithms=["HS256"])).replace("plugs:Talker", "echo")
    )
    assert main(["check", "--no-env", str(file)]) == 0
    capsys.readouterr()


# --- a real client ------------------------------------------------------------------------------


async def test_openais_own_client_takes_a_token_for_a_key() -> None:
    async with oidc() as issuer, running(config(entry(issuer), observe=[probe()])) as gateway:
        async with openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key=issuer.token(), max_retries=0) as client:
            answer = await client.chat.completions.create(**HELLO)  # type: ignore[call-overload]
            assert answer.choices[0].message.content
            stream = await client.chat.completions.create(**HELLO, stream=True)  # type: ignore[call-overload]
            assert [chunk async for chunk in stream]
        wrong = issuer.token(aud="other")
        async with openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key=wrong, max_retries=2) as client:
            with pytest.raises(openai.AuthenticationError) as caught:
                await client.chat.completions.create(**HELLO)  # type: ignore[call-overload]
        assert caught.value.code == "invalid_api_key"
        assert "audience" in caught.value.message
        issued = [receipt.caller.tenant for receipt in await gateway.settled(2)]
        assert issued == ["acme", "acme"]
