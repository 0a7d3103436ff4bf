"""Entra's tokens: four ways to get one, kept fresh, shared, and never shown."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

import orjson
import pytest
from azures import CHAT, chat, config, credentials

from qlens.testing import ManualClock, Running, Scripted, running
from qlens.testing.azure import KEY, FakeAzure, access_denied, azure
from qlens.testing.entra import CLIENT, IDENTITY_HEADER, SECRET, TENANT, entra

CLASSIC = "https://cognitiveservices.azure.com"
V1 = "https://ai.azure.com"
TOKEN_PATH = f"/{TENANT}/oauth2/v2.0/token"


def spent(cloud: FakeAzure) -> list[str]:
    """The tokens that calls came with."""
    return [request.headers["authorization"].removeprefix("Bearer ") for request in cloud.requests]


async def ask(gateway: Running, status: int = 200) -> Any:
    answer = await gateway.post(CHAT, chat())
    assert answer.status == status, answer.text
    return answer.json()


# --- the ways to a token ------------------------------------------------------------------------


@pytest.mark.parametrize(("surface", "resource"), [("classic", CLASSIC), ("v1", V1)])
async def test_an_application_gets_tokens_for_its_secret(surface: str, resource: str) -> None:
    async with (
        entra() as identity,
        azure(entra=identity) as cloud,
        running(config(cloud.root, identity=credentials(identity), surface=surface)) as gateway,
    ):
        await ask(gateway)
        assert spent(cloud) == identity.issued
        assert "api-key" not in cloud.requests[0].headers
        (request,) = identity.requests
        assert request.path == TOKEN_PATH
        assert f"scope={resource}/.default".replace(":", "%3A").replace("/", "%2F") in request.content.decode()


async def test_the_scope_can_be_said() -> None:
    async with entra() as identity, azure(entra=identity) as cloud:
        settings: dict[str, Any] = {"identity": credentials(identity), "surface": "v1", "scope": f"{CLASSIC}/.default"}
        async with running(config(cloud.root, **settings)) as gateway:
            await ask(gateway)
            assert cloud.entra is identity
            assert identity.refusal(spent(cloud)[0], (CLASSIC,)) is None


async def test_a_workload_gets_tokens_for_the_token_in_its_file_and_reads_it_each_time(tmp_path: Path) -> None:
    clock = ManualClock()
    file = tmp_path / "token"
    async with entra(clock=clock) as identity, azure(entra=identity) as cloud:
        file.write_text(identity.assertion(seconds=600) + "\n")
        workload = {
            "kind": "workload_identity",
            "tenant_id": TENANT,
            "client_id": CLIENT,
            "token_file": str(file),
            "authority": identity.url,
        }
        async with running(config(cloud.root, identity=workload), clock=clock) as gateway:
            await ask(gateway)
            clock.advance(3600)  # both tokens are over by now; the cluster has written a new one
            file.write_text(identity.assertion(seconds=600))
            await ask(gateway)
            assert spent(cloud) == identity.issued
            assert len(identity.issued) == 2


async def test_a_workload_without_its_file_is_the_gateways_fault(tmp_path: Path) -> None:
    async with entra() as identity, azure(entra=identity) as cloud:
        workload = {
            "kind": "workload_identity",
            "tenant_id": TENANT,
            "client_id": CLIENT,
            "token_file": str(tmp_path / "none"),
            "authority": identity.url,
        }
        async with running(config(cloud.root, identity=workload)) as gateway:
            assert (await ask(gateway, 502))["error"]["code"] == "upstream_auth_error"
            assert identity.requests == cloud.requests == []


@pytest.mark.parametrize("named", [{}, {"client_id": CLIENT}, {"object_id": CLIENT}, {"resource_id": CLIENT}])
async def test_a_machine_gets_tokens_from_its_metadata_service(named: dict[str, str]) -> None:
    async with entra() as identity, azure(entra=identity) as cloud:
        managed = {"kind": "managed_identity", "endpoint": identity.url, **named}
        async with running(config(cloud.root, identity=managed)) as gateway:
            await ask(gateway)
            (request,) = identity.requests
            assert (request.method, request.path) == ("GET", "/metadata/identity/oauth2/token")
            assert request.headers["metadata"] == "true"
            names = {"object_id": "object_id", "resource_id": "msi_res_id", "client_id": "client_id"}
            assert request.query == {
                "api-version": "2018-02-01",
                "resource": CLASSIC,
                **{names[name]: value for name, value in named.items()},
            }


@pytest.mark.parametrize("named", [{}, {"client_id": CLIENT}, {"object_id": CLIENT}, {"resource_id": CLIENT}])
async def test_an_app_service_gets_tokens_from_its_own_endpoint(named: dict[str, str]) -> None:
    async with entra() as identity, azure(entra=identity) as cloud:
        service = {"kind": "app_service_identity", "endpoint": identity.app_service, "header": IDENTITY_HEADER, **named}
        async with running(config(cloud.root, identity=service)) as gateway:
            await ask(gateway)
            (request,) = identity.requests
            names = {"object_id": "principal_id", "resource_id": "mi_res_id", "client_id": "client_id"}
            assert request.query == {
                "api-version": "2019-08-01",
                "resource": CLASSIC,
                **{names[name]: value for name, value in named.items()},
            }


@pytest.mark.parametrize("status", [404, 410, 429, 500])
async def test_a_metadata_service_that_is_away_is_asked_again(status: int) -> None:
    async with entra() as identity, azure(entra=identity) as cloud:
        identity.script(Scripted(status))
        managed = {"kind": "managed_identity", "endpoint": identity.url}
        async with running(config(cloud.root, identity=managed)) as gateway:
            await ask(gateway)
            assert len(identity.requests) == 2


@pytest.mark.parametrize(
    "said",
    [
        Scripted(body={}),
        Scripted(body={"access_token": "example", "expires_in": "soon"}),
        Scripted(body={"access_token": "example", "expires_in": 0}),
        Scripted(body={"access_token": "a b\r\nx: y", "expires_in": 3600}),
        Scripted(body={"access_token": "example", "expires_on": "1"}),
        Scripted(body=b"<html>"),
        Scripted(body=b"[]"),
    ],
    ids=["nothing", "no time", "no lifetime", "no token", "in the past", "a page", "a list"],
)
async def test_an_answer_without_a_token_is_not_used(said: Scripted) -> None:
    async with entra() as identity, azure(entra=identity) as cloud:
        identity.script(said)
        async with running(config(cloud.root, identity=credentials(identity))) as gateway:
            error = (await ask(gateway, 503))["error"]
            assert error["code"] == "upstream_unavailable"
            assert cloud.requests == []


async def test_a_credential_follows_no_redirect() -> None:
    async with entra() as identity, entra() as other, azure(entra=identity) as cloud:
        identity.script(Scripted(307, {"location": f"{other.url}{TOKEN_PATH}"}))
        async with running(config(cloud.root, identity=credentials(identity))) as gateway:
            assert (await ask(gateway, 502))["error"]["code"] == "upstream_auth_error"
            assert other.requests == []


# --- keeping it fresh ---------------------------------------------------------------------------


async def test_one_token_serves_many_calls_and_many_calls_fetch_one_token() -> None:
    async with entra() as identity, azure(entra=identity) as cloud:
        identity.script(Scripted(503, delay=0.1))
        async with running(config(cloud.root, identity=credentials(identity))) as gateway:
            await asyncio.gather(*(ask(gateway) for _ in range(20)))
            await ask(gateway)
            assert len(set(spent(cloud))) == 1
            assert len(identity.issued) == 1


async def test_a_token_is_renewed_early_and_nobody_waits_for_it() -> None:
    clock = ManualClock()
    async with (
        entra(clock=clock) as identity,
        azure(entra=identity) as cloud,
        running(config(cloud.root, identity=credentials(identity)), clock=clock) as gateway,
    ):
        await ask(gateway)
        clock.advance(3600 - 302)
        await ask(gateway)
        assert len(identity.requests) == 1, "it is not early enough"
        clock.advance(2)
        identity.script(Scripted(hang=True))
        await asyncio.gather(*(ask(gateway) for _ in range(5)))
        await identity.arrived(2)
        assert set(spent(cloud)) == {identity.issued[0]}, "the old one is good for five minutes more"
        assert len(identity.requests) == 2, "one asks for all"


async def test_a_call_whose_client_leaves_while_it_waits_for_a_token_is_free() -> None:
    async with entra() as identity, azure(entra=identity) as cloud:
        identity.script(Scripted(hang=True))
        async with running(config(cloud.root, identity=credentials(identity))) as gateway:
            asking = asyncio.create_task(gateway.post(CHAT, chat()))
            await identity.arrived(1)
            while not gateway.server.running():
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.1)
            asking.cancel()
            (receipt,) = await gateway.settled(1)
            assert (receipt.outcome, len(receipt.attempts)) == ("abandoned", 1)
            assert (receipt.attempts[0].billed, receipt.usage.total, cloud.requests) == (False, 0, [])


@pytest.mark.parametrize(("refresh_in", "early"), [(None, 43_200), (10_000, 10_000)])
async def test_a_long_lived_token_is_renewed_at_half_its_life_or_when_the_service_says(
    refresh_in: int | None, early: int
) -> None:
    clock = ManualClock()
    async with entra(clock=clock, lifetime=86_400) as identity, azure(entra=identity) as cloud:
        body = {"access_token": identity.token(CLASSIC), "expires_in": 86_400}
        identity.script(Scripted(body={**body, "refresh_in": refresh_in} if refresh_in else body))
        async with running(config(cloud.root, identity=credentials(identity)), clock=clock) as gateway:
            await ask(gateway)
            clock.advance(early - 1)
            await ask(gateway)
            assert len(identity.requests) == 1
            clock.advance(1)
            await ask(gateway)
            await identity.arrived(2)


async def test_a_renewal_that_fails_keeps_the_old_token_and_is_tried_again_half_a_minute_later() -> None:
    clock = ManualClock()
    refused = Scripted(401, body={"error": "invalid_client", "error_description": "AADSTS7000222: expired."})
    async with (
        entra(clock=clock) as identity,
        azure(entra=identity) as cloud,
        running(config(cloud.root, identity=credentials(identity)), clock=clock) as gateway,
    ):
        await ask(gateway)
        clock.advance(3400)
        identity.script(refused)
        await ask(gateway)
        await (await identity.arrived(2))[1].answered.wait()
        await _until(lambda: not gateway.plugin("provider", "azure")._tokens._flight)
        clock.advance(29)
        await ask(gateway)
        assert len(identity.requests) == 2, "it is left alone"
        clock.advance(1)
        await ask(gateway)
        await identity.arrived(3)
        await _until(lambda: len(identity.issued) == 2)
        await _until(lambda: not gateway.plugin("provider", "azure")._tokens._flight)
        await ask(gateway)
        assert spent(cloud) == [*identity.issued[:1] * 4, identity.issued[1]]


@pytest.mark.parametrize(("lifetime", "most"), [(12, 90), (16, 23), (26, 9), (41, 6)])
async def test_a_short_lived_token_leaves_no_call_without_one(lifetime: int, most: int) -> None:
    clock = ManualClock()
    async with (
        entra(clock=clock, lifetime=lifetime) as identity,
        azure(entra=identity) as cloud,
        running(config(cloud.root, identity=credentials(identity)), clock=clock) as gateway,
    ):
        for second in range(90):
            await ask(gateway)
            await _until(lambda: not gateway.plugin("provider", "azure")._tokens._flight)
            if (second, lifetime) == (12, 26):
                identity.script(Scripted(body={}))  # the renewal before the token's end fails
            clock.advance(1)
        assert len(identity.requests) <= most


async def test_a_token_that_is_over_is_not_used_whatever_the_renewal_says() -> None:
    clock = ManualClock()
    async with (
        entra(clock=clock) as identity,
        azure(entra=identity) as cloud,
        running(config(cloud.root, identity=credentials(identity)), clock=clock) as gateway,
    ):
        await ask(gateway)
        identity.applications.clear()
        clock.advance(3600)
        assert (await ask(gateway, 502))["error"]["code"] == "upstream_auth_error"
        assert len(cloud.requests) == 1


async def test_a_refused_identity_is_not_hammered() -> None:
    clock = ManualClock()
    async with entra(clock=clock) as identity, azure(entra=identity) as cloud:
        wrong = credentials(identity, client_secret="example-canary-secret")
        async with running(config(cloud.root, identity=wrong), clock=clock) as gateway:
            for _ in range(5):
                error = (await ask(gateway, 502))["error"]
                assert error["code"] == "upstream_auth_error"
                assert TENANT not in error["message"]
            assert len(identity.requests) == 1
            clock.advance(30)
            await ask(gateway, 502)
            assert len(identity.requests) == 2
            assert cloud.requests == []


async def test_a_call_that_waits_for_a_token_may_be_cancelled_without_the_others() -> None:
    async with entra() as identity, azure(entra=identity) as cloud:
        identity.script(Scripted(503, delay=0.2))
        async with running(config(cloud.root, identity=credentials(identity))) as gateway:
            leaving = asyncio.create_task(ask(gateway))
            staying = asyncio.create_task(ask(gateway))
            await identity.arrived(1)
            leaving.cancel()
            await staying
            assert len(identity.issued) == 1


async def test_a_token_that_azure_refuses_is_renewed_once() -> None:
    clock = ManualClock()
    async with (
        entra(clock=clock) as identity,
        azure(entra=identity) as cloud,
        running(config(cloud.root, identity=credentials(identity)), clock=clock) as gateway,
    ):
        await ask(gateway)
        clock.advance(60)
        cloud.script(*[access_denied()] * 3)
        for _ in range(3):
            assert (await ask(gateway, 502))["error"]["code"] == "upstream_auth_error"
        await identity.arrived(2)
        await _until(lambda: not gateway.plugin("provider", "azure")._tokens._flight)
        await ask(gateway)
        assert len(identity.requests) == 2
        assert spent(cloud)[-1] == identity.issued[1]


async def test_when_the_identity_service_is_away_another_target_answers() -> None:
    async with azure() as cloud:
        away = {"kind": "client_credentials", "tenant_id": TENANT, "client_id": CLIENT, "client_secret": SECRET}
        yaml = orjson.loads(config(cloud.root, identity={**away, "authority": "http://127.0.0.1:9"}))
        yaml["providers"]["keyed"] = {"plugin": "azure_openai", "endpoint": cloud.root, "api_key": KEY}
        yaml["models"]["ours"]["targets"].append({"provider": "keyed", "model": "my-deployment"})
        async with running(orjson.dumps(yaml).decode()) as gateway:
            assert (await gateway.post(CHAT, chat())).headers["x-qlens-provider"] == "keyed"
            (receipt,) = await gateway.settled(1)
            assert [attempt.error for attempt in receipt.attempts] == ["upstream_unavailable", None]


async def test_a_changed_configuration_of_the_same_identity_goes_on_with_its_token() -> None:
    async with entra() as identity, azure(entra=identity) as cloud:
        settings: dict[str, Any] = {"identity": credentials(identity)}
        async with running(config(cloud.root, **settings)) as gateway:
            await ask(gateway)
            identity.script(Scripted(hang=True))
            await gateway.reload(config(cloud.root, idle_seconds=30, **settings))
            await ask(gateway)
            assert spent(cloud) == identity.issued * 2


# --- what is shown ------------------------------------------------------------------------------


async def test_health_and_metrics_tell_how_tokens_are() -> None:
    clock = ManualClock()
    async with (
        entra(clock=clock) as identity,
        azure(entra=identity) as cloud,
        running(config(cloud.root, identity=credentials(identity)), clock=clock) as gateway,
    ):
        await ask(gateway)
        assert _health(await gateway.get("/readyz")) == {"ok": True, "detail": "token for 60 min"}
        identity.applications.clear()
        clock.advance(3600)
        await ask(gateway, 502)
        told = _health(await gateway.get("/readyz"))
        assert told["ok"] is False
        assert told["detail"].startswith("no token; The gateway's identity was refused")
        metrics = (await gateway.get("/metrics")).text
        assert 'qlens_azure_tokens_total{outcome="fetched",provider="azure"} 1.0' in metrics
        assert 'qlens_azure_tokens_total{outcome="failed",provider="azure"} 1.0' in metrics


async def test_no_secret_is_ever_printed(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    clock = ManualClock()
    async with (
        entra(clock=clock) as identity,
        azure(entra=identity) as cloud,
        running(config(cloud.root, identity=credentials(identity)), clock=clock) as gateway,
    ):
        await ask(gateway)
        identity.applications.clear()
        clock.advance(3600)
        answer = await gateway.post(CHAT, chat())
        assert "AADSTS700016" in caplog.text, "the log names the reason"
        plugin = gateway.plugin("provider", "azure")
        public = [caplog.text, answer.text, (await gateway.get("/readyz")).text]
        for text in [*public, repr(plugin), repr(plugin._tokens), repr(plugin._tokens._held)]:
            assert not any(secret in text for secret in (SECRET, *identity.issued))
        assert not any(TENANT in text or CLIENT in text for text in public)


def _health(answer: Any) -> Any:
    return answer.json()["plugins"]["provider.azure"]


async def _until(condition: Any) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.005)
