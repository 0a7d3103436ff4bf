"""Credentials of single sign-on with its renewed tokens, and of containers with the files they are given."""

from __future__ import annotations

import asyncio
from hashlib import sha1
from pathlib import Path
from typing import Any

import orjson
import pytest
from bedrocks import CHAT, NOVA, chat, config

from qlens.testing import Running, Scripted, running
from qlens.testing.aws import CONTAINER_TOKEN, SSO_CLIENT, SSO_REFRESH_TOKEN, SSO_TOKEN, FakeAws, aws
from qlens.testing.aws_signature import Identity
from qlens.testing.bedrock import FakeBedrock, bedrock
from qlens_plugins.provider.bedrock import plugin

pytestmark = pytest.mark.usefixtures("nothing_of_this_machine")

GOOD = (200, None)
NONE = (502, "upstream_auth_error")
START = "https://example.awsapps.com/start"


def _config(fake: FakeBedrock, **settings: Any) -> str:
    return config(fake.root, NOVA, credentials={}, **settings)


async def _asked(gateway: Running) -> tuple[int, str | None]:
    answer = await gateway.post(CHAT, chat())
    return answer.status, None if answer.status == 200 else answer.json()["error"]["code"]


async def _health(gateway: Running) -> Any:
    return (await gateway.get("/readyz")).json()["plugins"]["provider.aws"]


def _expire(fake: FakeBedrock, gateway: Running, identity: Identity) -> None:
    """Let what was given out end now, long after the chain was last looked through."""
    fake.identities.add(Identity(identity.access_key, identity.secret_key, identity.token, expires_at=0))
    gateway.plugin("provider", "aws")._chain._looked_at -= 60


# --- single sign-on ----------------------------------------------------------------------------


@pytest.fixture
def token_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where `aws sso login` puts the token of the session `corp`, which a profile `team` uses."""
    (tmp_path / "config").write_text(
        "[profile team]\nsso_session = corp\nsso_account_id = 123456789012\nsso_role_name = example\n"
        f"[sso-session corp]\nsso_start_url = {START}\nsso_region = us-east-1\nsso_registration_scopes = sso:account\n"
    )
    cache = tmp_path / ".aws/sso/cache"
    cache.mkdir(parents=True)
    # The SDK looks for the home folder once, when it is imported.
    monkeypatch.setattr("botocore.tokens.SSOTokenProvider._SSO_TOKEN_CACHE_DIR", str(cache))
    monkeypatch.setattr("botocore.credentials.SSOProvider._SSO_TOKEN_CACHE_DIR", str(cache))
    return cache / f"{sha1(b'corp').hexdigest()}.json"


def _token(text: str, expires_at: str, **fields: str) -> bytes:
    return orjson.dumps(
        {"startUrl": START, "region": "us-east-1", "accessToken": text, "expiresAt": expires_at, **fields}
    )


def _portal(monkeypatch: pytest.MonkeyPatch, fake: FakeAws) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_SSO", fake.root)
    monkeypatch.setenv("AWS_ENDPOINT_URL_SSO_OIDC", fake.root)


async def test_single_sign_on_by_a_session(monkeypatch: pytest.MonkeyPatch, token_file: Path) -> None:
    token_file.write_bytes(_token(SSO_TOKEN, "2099-01-01T00:00:00Z"))
    async with bedrock() as fake, aws(identities=fake.identities) as sso:
        _portal(monkeypatch, sso)
        async with running(_config(fake, profile="team")) as gateway:
            assert await _asked(gateway) == GOOD
            assert fake.requests[0].headers["x-amz-security-token"] == sso.issued[0].token
            assert [request.path for request in sso.requests] == ["/federation/credentials"]
            assert dict(sso.requests[0].query) == {"role_name": "example", "account_id": "123456789012"}


async def test_a_token_of_single_sign_on_that_ends_is_renewed_and_kept(
    monkeypatch: pytest.MonkeyPatch, token_file: Path
) -> None:
    registered = {**SSO_CLIENT, "registrationExpiresAt": "2099-01-01T00:00:00Z", "refreshToken": SSO_REFRESH_TOKEN}
    token_file.write_bytes(_token("an-old-token", "2020-01-01T00:00:00Z", **registered))
    async with bedrock() as fake, aws(identities=fake.identities) as sso:
        _portal(monkeypatch, sso)
        async with running(_config(fake, profile="team")) as gateway:
            assert await _asked(gateway) == GOOD
        assert [request.path for request in sso.requests] == ["/token", "/federation/credentials"]
        assert orjson.loads(token_file.read_bytes())["accessToken"] in sso.sso_tokens


@pytest.mark.parametrize("content", [None, _token("an-old-token", "2020-01-01T00:00:00Z"), b"{}"])
async def test_who_has_to_sign_on_again_is_told_by_health(
    monkeypatch: pytest.MonkeyPatch, token_file: Path, content: bytes | None
) -> None:
    if content is not None:
        token_file.write_bytes(content)
    async with bedrock() as fake, aws(identities=fake.identities) as sso:
        _portal(monkeypatch, sso)
        async with running(_config(fake, profile="team")) as gateway:
            assert await _asked(gateway) == NONE
            health = await _health(gateway)
            assert health["ok"] is False
            assert "AWS's credential chain fails" in health["detail"]
            # Whoever signs on needs not start the gateway again.
            token_file.write_bytes(_token(SSO_TOKEN, "2099-01-01T00:00:00Z"))
            await gateway.plugin("provider", "aws")._chain._look()
            assert await _asked(gateway) == GOOD
            assert (await _health(gateway))["ok"] is True


# --- containers --------------------------------------------------------------------------------


async def test_a_container_of_ecs(monkeypatch: pytest.MonkeyPatch) -> None:
    async with bedrock() as fake, aws(identities=fake.identities) as container:
        # The one address there is for it, which this machine does not have.
        monkeypatch.setattr(
            "botocore.utils.ContainerMetadataFetcher.IP_ADDRESS", container.root.removeprefix("http://")
        )
        monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", container.container_path)
        async with running(_config(fake)) as gateway:
            assert await _asked(gateway) == GOOD
            assert [request.path for request in container.requests] == [container.container_path]


async def test_a_pods_token_is_read_again_whenever_credentials_are_due(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "eks-pod-identity-token"
    file.write_text(CONTAINER_TOKEN)
    async with bedrock() as fake, aws(identities=fake.identities) as container:
        monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", container.container_url)
        monkeypatch.setenv("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", str(file))
        async with running(_config(fake)) as gateway:
            assert await _asked(gateway) == GOOD
            container.container_token = "the-next-token"
            file.write_text("the-next-token")
            _expire(fake, gateway, container.issued[0])
            assert await _asked(gateway) == GOOD
        sent = [request.headers["authorization"] for request in container.requests]
        assert sent == [CONTAINER_TOKEN, "the-next-token"]


async def test_a_slow_source_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin, "FIRST_LOOK_SECONDS", 0.05)
    async with bedrock() as fake, aws(identities=fake.identities) as container:
        container.script(Scripted(hang=True))
        monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", container.container_url)
        monkeypatch.setenv("AWS_CONTAINER_AUTHORIZATION_TOKEN", CONTAINER_TOKEN)
        async with running(_config(fake)) as gateway:
            assert [await _asked(gateway) for _ in range(3)] == [NONE] * 3
            assert (await _health(gateway))["ok"] is False
            chain = gateway.plugin("provider", "aws")._chain
            async with asyncio.timeout(20):
                await chain.looked.wait()  # the SDK asks once more
            assert await _asked(gateway) == GOOD
