"""The fake issuer publishes keys that check its tokens, turns them over, and fails when told to."""

from __future__ import annotations

from typing import Any

import aiohttp
import jwt
import pytest

from qlens.testing import ManualClock, Scripted
from qlens.testing.oidc import AUDIENCE, DISCOVERY, oidc, signing_key


async def get(url: str) -> Any:
    async with aiohttp.ClientSession() as session, session.get(url) as answer:
        assert answer.status == 200
        return await answer.json()


@pytest.mark.parametrize("algorithm", ["RS256", "PS384", "ES256", "ES512", "EdDSA"])
async def test_what_it_publishes_checks_what_it_signs(algorithm: str) -> None:
    async with oidc(algorithm=algorithm) as issuer:
        discovered = await get(issuer.issuer + DISCOVERY)
        assert discovered["issuer"] == issuer.issuer
        keys = await get(discovered["jwks_uri"])
        assert not any("d" in key for key in keys["keys"])
        token = issuer.token(org="rocket", jti="7")
        key = jwt.PyJWKSet.from_dict(keys)[jwt.get_unverified_header(token)["kid"]]
        claims = jwt.decode(token, key, [algorithm], audience=AUDIENCE, issuer=issuer.issuer)
        assert (claims["org"], claims["sub"], claims["jti"]) == ("rocket", "alice", "7")
        assert jwt.decode(token, issuer.key.pem(), [algorithm], audience=AUDIENCE) == claims
        assert issuer.fetches == 1


async def test_a_claim_can_be_taken_out_and_time_is_its_clocks() -> None:
    clock = ManualClock(1000)
    async with oidc(clock=clock) as issuer:
        claims = jwt.decode(issuer.token(aud=None), options={"verify_signature": False})
        assert claims == {"iss": issuer.issuer, "sub": "alice", "org": "acme", "iat": 1000, "exp": 4600}


async def test_keys_are_turned_over_and_withdrawn() -> None:
    async with oidc() as issuer:
        for keep, kids in ((True, ["key-1", "key-2"]), (False, ["key-3"])):
            issuer.rotate(keep=keep)
            keys = await get(issuer.keys_url)
            assert [key["kid"] for key in keys["keys"]] == kids
            assert jwt.get_unverified_header(issuer.token())["kid"] == kids[-1]
    assert signing_key("key-1").pem() == signing_key("key-1").pem()
    assert signing_key("key-1").pem() != signing_key("key-2").pem()


async def test_it_fails_once_or_until_it_is_mended() -> None:
    async with oidc() as issuer:
        issuer.script(Scripted(500))
        for status in (500, 200, 200):
            async with aiohttp.ClientSession() as session, session.get(issuer.keys_url) as answer:
                assert answer.status == status
        issuer.broken = Scripted(503)
        for path in (issuer.keys_url, issuer.issuer + DISCOVERY, issuer.issuer):
            async with aiohttp.ClientSession() as session, session.get(path) as answer:
                assert answer.status == 503
        issuer.broken, issuer.key_set = None, {"keys": []}
        assert await get(issuer.keys_url) == {"keys": []}
