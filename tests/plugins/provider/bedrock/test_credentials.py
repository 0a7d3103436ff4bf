"""Credentials from every place that AWS knows, fresh when they are needed, and never waited for by a call."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
import threading
from collections.abc import Iterator
from hashlib import sha1
from pathlib import Path
from typing import Any

import orjson
import pytest
from bedrocks import CHAT, NOVA, chat, config

from qlens import StartupError
from qlens.testing import Running, running
from qlens.testing.aws import CONTAINER_TOKEN, ROLE, SSO_TOKEN, WEB_TOKEN, aws
from qlens.testing.aws_signature import Identity
from qlens.testing.bedrock import API_KEY, KEY, bedrock
from qlens_plugins.provider.bedrock.chain import Chain

pytestmark = pytest.mark.usefixtures("nothing_of_this_machine")


@pytest.fixture
def quiet(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.CRITICAL, "aiobotocore"), caplog.at_level(logging.CRITICAL, "botocore"):
        yield caplog


def _config(root: str, **settings: Any) -> str:
    return config(root, NOVA, credentials={}, **settings)


async def _asked(gateway: Running) -> tuple[int, str | None]:
    answer = await gateway.post(CHAT, chat())
    return answer.status, None if answer.status == 200 else answer.json()["error"]["code"]


GOOD = (200, None)
NONE = (502, "upstream_auth_error")


# --- without AWS's SDK -------------------------------------------------------------------------


async def test_an_access_key_of_the_configuration() -> None:
    async with bedrock() as fake, running(config(fake.root)) as gateway:
        assert await _asked(gateway) == GOOD
        request = fake.requests[0]
        assert request.headers["authorization"].startswith(f"AWS4-HMAC-SHA256 Credential={KEY.access_key}/")
        assert "x-amz-security-token" not in request.headers


async def test_a_temporary_access_key_of_the_configuration() -> None:
    async with bedrock() as fake:
        given = fake.identities.add(Identity("ASIAEXAMPLE", "secret", "the-token"))
        keys = {"access_key_id": given.access_key, "secret_access_key": given.secret_key}
        async with running(config(fake.root, credentials=keys, session_token="the-token")) as gateway:
            assert await _asked(gateway) == GOOD
        async with running(config(fake.root, credentials=keys, session_token="another")) as gateway:
            assert await _asked(gateway) == NONE


async def test_an_api_key_of_the_configuration() -> None:
    async with bedrock() as fake, running(_config(fake.root, api_key=API_KEY)) as gateway:
        assert await _asked(gateway) == GOOD
        assert fake.requests[0].headers["authorization"] == f"Bearer {API_KEY}"


async def test_a_wrong_secret_is_the_gateways_fault_and_never_a_401() -> None:
    keys = {"access_key_id": KEY.access_key, "secret_access_key": "wrong"}
    async with bedrock() as fake, running(config(fake.root, credentials=keys)) as gateway:
        assert await _asked(gateway) == NONE
        assert [refusal.name for refusal in fake.refused] == ["InvalidSignatureException"]


async def test_an_api_key_of_the_environment_is_used_when_nothing_else_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_BEARER_TOKEN_BEDROCK", API_KEY)
    async with bedrock() as fake:
        async with running(_config(fake.root)) as gateway:
            assert await _asked(gateway) == GOOD
        async with running(config(fake.root)) as gateway:
            assert await _asked(gateway) == GOOD
        kinds = [request.headers["authorization"].partition(" ")[0] for request in fake.requests]
        assert kinds == ["Bearer", "AWS4-HMAC-SHA256"]


def test_keys_of_the_configuration_need_no_sdk() -> None:
    program = """
import asyncio, sys
from qlens.testing import running
sys.modules["aiobotocore"] = None
sys.modules["botocore"] = None
async def main():
    for text in sys.argv[1:]:
        async with running(text):
            pass
asyncio.run(main())
print("served", "botocore.session" in sys.modules)
"""
    texts = [config("http://127.0.0.1:1"), _config("http://127.0.0.1:1", api_key=API_KEY)]
    done = subprocess.run([sys.executable, "-c", program, *texts], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "served False", done.stderr


def test_the_chain_without_the_sdk_is_a_fault_that_says_what_to_install() -> None:
    program = """
import asyncio, sys
from qlens import StartupError
from qlens.testing import running
sys.modules["aiobotocore.session"] = None
async def main():
    try:
        async with running(sys.argv[1]):
            pass
    except StartupError as error:
        print(error)
asyncio.run(main())
"""
    text = _config("http://127.0.0.1:1")
    done = subprocess.run([sys.executable, "-c", program, text], capture_output=True, text=True, check=False)
    assert "providers.aws" in done.stdout
    assert "install qlens[bedrock]" in done.stdout


# --- AWS's chain -------------------------------------------------------------------------------


async def test_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", KEY.secret_key)
    async with bedrock() as fake, running(_config(fake.root)) as gateway:
        assert await _asked(gateway) == GOOD


async def test_a_profile_with_its_region(tmp_path: Path) -> None:
    secrets = f"[team]\naws_access_key_id = {KEY.access_key}\naws_secret_access_key = {KEY.secret_key}\n"
    (tmp_path / "credentials").write_text(secrets)
    (tmp_path / "config").write_text("[profile team]\nregion = eu-central-1\n")
    async with (
        bedrock("eu-central-1") as fake,
        running(_config(fake.root, profile="team", region=None)) as gateway,
    ):
        assert await _asked(gateway) == GOOD


async def test_a_profile_that_assumes_a_role(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    secrets = f"[base]\naws_access_key_id = {KEY.access_key}\naws_secret_access_key = {KEY.secret_key}\n"
    (tmp_path / "credentials").write_text(secrets)
    (tmp_path / "config").write_text(f"[profile team]\nregion = us-east-1\nrole_arn = {ROLE}\nsource_profile = base\n")
    async with bedrock() as fake, aws(identities=fake.identities) as sts:
        monkeypatch.setenv("AWS_ENDPOINT_URL_STS", sts.root)
        async with running(_config(fake.root, profile="team")) as gateway:
            assert await _asked(gateway) == GOOD
            assert sts.issued[0].token == fake.requests[0].headers["x-amz-security-token"]


async def test_single_sign_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    start = "https://example.awsapps.com/start"
    (tmp_path / "config").write_text(
        f"[profile team]\nsso_start_url = {start}\nsso_region = us-east-1\nsso_account_id = 123456789012\n"
        "sso_role_name = example\n"
    )
    cache = tmp_path / ".aws/sso/cache"
    cache.mkdir(parents=True)
    token = {"startUrl": start, "region": "us-east-1", "accessToken": SSO_TOKEN, "expiresAt": "2099-01-01T00:00:00Z"}
    (cache / f"{sha1(start.encode()).hexdigest()}.json").write_bytes(orjson.dumps(token))
    async with bedrock() as fake, aws(identities=fake.identities) as sso:
        monkeypatch.setenv("AWS_ENDPOINT_URL_SSO", sso.root)
        # The SDK looks for the home folder once, when it is imported.
        monkeypatch.setattr("botocore.credentials.SSOProvider._SSO_TOKEN_CACHE_DIR", str(cache))
        async with running(_config(fake.root, profile="team")) as gateway:
            assert await _asked(gateway) == GOOD


async def test_a_command_that_prints_credentials(tmp_path: Path) -> None:
    printed = {"Version": 1, "AccessKeyId": KEY.access_key, "SecretAccessKey": KEY.secret_key}
    (tmp_path / "printed.json").write_bytes(orjson.dumps(printed))
    (tmp_path / "config").write_text(f"[default]\ncredential_process = cat {tmp_path}/printed.json\n")
    async with bedrock() as fake, running(_config(fake.root)) as gateway:
        assert await _asked(gateway) == GOOD


async def test_a_container(monkeypatch: pytest.MonkeyPatch) -> None:
    async with bedrock() as fake, aws(identities=fake.identities) as container:
        monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", container.container_url)
        monkeypatch.setenv("AWS_CONTAINER_AUTHORIZATION_TOKEN", CONTAINER_TOKEN)
        async with running(_config(fake.root)) as gateway:
            assert await _asked(gateway) == GOOD


async def test_an_instance(monkeypatch: pytest.MonkeyPatch) -> None:
    async with bedrock() as fake, aws(identities=fake.identities) as instance:
        monkeypatch.delenv("AWS_EC2_METADATA_DISABLED")
        monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", instance.root)
        async with running(_config(fake.root)) as gateway:
            assert await _asked(gateway) == GOOD
            assert instance.requests[0].method == "PUT"  # the second version of the protocol


async def test_web_identity_of_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(WEB_TOKEN)
    async with bedrock() as fake, aws(identities=fake.identities) as sts:
        monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(tmp_path / "token"))
        monkeypatch.setenv("AWS_ROLE_ARN", ROLE)
        monkeypatch.setenv("AWS_ENDPOINT_URL_STS", sts.root)
        async with running(_config(fake.root)) as gateway:
            assert await _asked(gateway) == GOOD


# --- a role of the provider's own --------------------------------------------------------------


async def test_each_provider_assumes_its_own_role() -> None:
    async with bedrock() as fake, aws(identities=fake.identities) as sts:
        sts.external_id = "example-external-id"
        text = config(
            fake.root,
            role_arn=ROLE,
            external_id="example-external-id",
            role_session_name="team-a",
            role_seconds=1800,
            sts_endpoint=sts.root,
        )
        async with running(text) as gateway:
            assert await _asked(gateway) == GOOD
            (asked,) = sts.asked
            assert (asked["RoleArn"], asked["RoleSessionName"], asked["DurationSeconds"]) == (ROLE, "team-a", "1800")
            assert fake.requests[0].headers["x-amz-security-token"] == sts.issued[0].token


async def test_a_role_by_a_web_identity_of_the_provider() -> None:
    files = {"token": WEB_TOKEN + "\n"}
    async with bedrock() as fake, aws(identities=fake.identities) as sts:
        text = _config(fake.root, role_arn=ROLE, web_identity_token_file="token", sts_endpoint=sts.root)
        async with running(text, files=files) as gateway:
            assert await _asked(gateway) == GOOD
            assert sts.asked[0]["Action"] == "AssumeRoleWithWebIdentity"


async def test_a_role_that_may_not_be_assumed_shows_in_health_and_does_not_stop_the_start(
    quiet: pytest.LogCaptureFixture,
) -> None:
    async with bedrock() as fake, aws(identities=fake.identities) as sts:
        sts.external_id = "another"
        async with running(config(fake.root, role_arn=ROLE, sts_endpoint=sts.root)) as gateway:
            assert await _asked(gateway) == NONE
            assert fake.requests == []
            ready = await gateway.get("/readyz")
            assert ready.status == 200
            health = ready.json()["plugins"]["provider.aws"]
            assert health == {"ok": False, "detail": "AWS's credential chain fails: ClientError"}


async def test_nothing_found_shows_in_health_and_does_not_stop_the_start() -> None:
    async with bedrock() as fake, running(_config(fake.root)) as gateway:
        assert await _asked(gateway) == NONE
        health = (await gateway.get("/readyz")).json()["plugins"]["provider.aws"]
        assert health == {"ok": False, "detail": "AWS's credential chain finds no credentials"}


async def test_no_region_is_a_fault() -> None:
    with pytest.raises(StartupError, match="no region"):
        async with running(_config("http://127.0.0.1:1", region=None)):
            pass


# --- freshness ---------------------------------------------------------------------------------


async def test_credentials_are_renewed_in_the_background_before_they_expire() -> None:
    async with bedrock() as fake, aws(identities=fake.identities) as sts:
        sts.seconds = 14 * 60  # within the time in which they are due
        async with running(config(fake.root, role_arn=ROLE, sts_endpoint=sts.root)) as gateway:
            chain: Chain = gateway.plugin("provider", "aws")._chain
            first = chain.keys
            chain.look_seconds = 0.01
            watching = asyncio.create_task(chain.watch())
            async with asyncio.timeout(5):
                while chain.keys == first:
                    assert await _asked(gateway) == GOOD
            watching.cancel()
            assert len(sts.issued) >= 2


async def test_a_failed_renewal_keeps_the_key_in_hand(quiet: pytest.LogCaptureFixture) -> None:
    async with bedrock() as fake, aws(identities=fake.identities) as sts:
        sts.seconds = 14 * 60
        async with running(config(fake.root, role_arn=ROLE, sts_endpoint=sts.root)) as gateway:
            chain: Chain = gateway.plugin("provider", "aws")._chain
            sts.external_id = "changed"
            before = chain.keys
            await chain._look()
            assert chain.keys == before
            assert await _asked(gateway) == GOOD


async def test_a_credential_refused_as_expired_is_renewed_once_and_the_call_sent_again() -> None:
    async with (
        bedrock() as fake,
        aws(identities=fake.identities) as sts,
        running(config(fake.root, role_arn=ROLE, sts_endpoint=sts.root)) as gateway,
    ):
        chain: Chain = gateway.plugin("provider", "aws")._chain
        chain._looked_at -= 60
        _expire(fake.identities, sts.issued[0])
        answers = await asyncio.gather(*(_asked(gateway) for _ in range(5)))
        assert answers == [GOOD] * 5
        assert len(sts.issued) == 2  # one renewal for all of them
        receipts = await gateway.settled(5)
        assert {len(receipt.attempts) for receipt in receipts} == {1}


async def test_an_expired_key_that_cannot_be_renewed_is_an_error_and_no_flood(quiet: pytest.LogCaptureFixture) -> None:
    async with (
        bedrock() as fake,
        aws(identities=fake.identities) as sts,
        running(config(fake.root, role_arn=ROLE, sts_endpoint=sts.root)) as gateway,
    ):
        chain: Chain = gateway.plugin("provider", "aws")._chain
        chain._looked_at -= 60
        _expire(fake.identities, sts.issued[0])
        sts.external_id = "changed"
        before = len(sts.requests)
        for _ in range(5):
            assert await _asked(gateway) == NONE
        assert len(sts.requests) == before + 1


def _expire(identities: Any, identity: Identity) -> None:
    identities.add(Identity(identity.access_key, identity.secret_key, identity.token, expires_at=0))


async def test_the_sdk_runs_beside_the_event_loop() -> None:
    threads: list[threading.Thread] = []

    async def find() -> None:
        threads.append(threading.current_thread())

    chain = Chain(find)
    await chain._look()
    assert threads[0] is not threading.current_thread()
    assert threads[0].daemon


async def test_a_chain_that_hangs_does_not_hold_up_the_end() -> None:
    hanging = threading.Event()

    async def find() -> None:
        await asyncio.to_thread(hanging.wait, 2)

    chain = Chain(find)
    watching = asyncio.create_task(chain.watch())
    await asyncio.sleep(0.05)
    watching.cancel()
    with pytest.raises(asyncio.CancelledError):
        await watching
    hanging.set()


# --- settings ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "path", "message"),
    [
        ({"access_key_id": "AKIAEXAMPLE"}, "providers.aws", "secret_access_key"),
        ({"secret_access_key": "example"}, "providers.aws", "belong together"),
        ({"external_id": "example"}, "providers.aws", "set external_id beside a role"),
        ({"web_identity_token_file": "token"}, "providers.aws", "set web_identity_token_file beside a role"),
        ({"region": "Virginia"}, "providers.aws.region", "no region of AWS"),
        ({"role_seconds": 60, "role_arn": ROLE}, "providers.aws.role_seconds", "900"),
        ({"endpoint": "bedrock"}, "providers.aws.endpoint", "URL"),
    ],
)
async def test_settings_that_cannot_work_are_faults(settings: dict[str, Any], path: str, message: str) -> None:
    with pytest.raises(StartupError) as caught:
        async with running(_config("http://127.0.0.1:1", **settings)):
            pass
    assert any(fault.path.endswith(path) and message in str(fault) for fault in caught.value.faults), caught.value
