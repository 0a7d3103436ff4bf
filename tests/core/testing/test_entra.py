"""The fake Entra is as strict as the real one."""

from __future__ import annotations

from typing import Any

import aiohttp
import pytest

from qlens.testing import ManualClock
from qlens.testing.entra import (
    CLIENT,
    IDENTITY_HEADER,
    JWT_BEARER,
    RESOURCES,
    SECRET,
    TENANT,
    Application,
    FakeEntra,
    entra,
)

SCOPE = f"{RESOURCES[0]}/.default"
FORM = {"grant_type": "client_credentials", "client_id": CLIENT, "client_secret": SECRET, "scope": SCOPE}
IMDS = {"api-version": "2018-02-01", "resource": RESOURCES[0]}
APP_SERVICE = {"api-version": "2019-08-01", "resource": RESOURCES[0]}


async def ask(identity: FakeEntra, form: dict[str, str], tenant: str = TENANT) -> tuple[int, Any]:
    url = f"{identity.url}/{tenant}/oauth2/v2.0/token"
    async with aiohttp.ClientSession() as session, session.post(url, data=form) as answer:
        return answer.status, await answer.json()


async def get(url: str, query: dict[str, str], headers: dict[str, str]) -> tuple[int, Any]:
    async with aiohttp.ClientSession() as session, session.get(url, params=query, headers=headers) as answer:
        return answer.status, await answer.json() if answer.content_type == "application/json" else None


async def test_a_token_is_for_one_resource_and_a_time() -> None:
    clock = ManualClock()
    async with entra(clock=clock) as identity:
        status, body = await ask(identity, FORM)
        token = body["access_token"]
        assert (status, body["expires_in"]) == (200, 3599)
        assert identity.refusal(token, RESOURCES[:1]) is None
        assert "audience" in (identity.refusal(token, RESOURCES[1:]) or "")
        assert "malformed" in (identity.refusal(token + "x", RESOURCES) or "")
        assert "malformed" in (identity.refusal("sk-example-key", RESOURCES) or "")
        assert "malformed" in (FakeEntra().refusal(token, RESOURCES) or ""), "another directory signed it"
        clock.advance(3600)
        assert "expired" in (identity.refusal(token, RESOURCES) or "")


@pytest.mark.parametrize(
    ("changes", "tenant", "number"),
    [
        ({"client_secret": "example-wrong"}, TENANT, 7000215),
        ({"client_secret": None}, TENANT, 7000218),
        ({"client_id": "nobody"}, TENANT, 700016),
        ({"client_id": None}, TENANT, 900144),
        ({"grant_type": "password"}, TENANT, 70003),
        ({"scope": RESOURCES[0]}, TENANT, 1002012),
        ({"scope": "https://example.com/.default"}, TENANT, 500011),
        ({}, "elsewhere", 90002),
        ({"client_assertion_type": "x", "client_assertion": "y"}, TENANT, 50027),
        ({"client_assertion_type": JWT_BEARER, "client_assertion": "y"}, TENANT, 50027),
    ],
)
async def test_what_is_wrong_has_its_number(changes: dict[str, str | None], tenant: str, number: int) -> None:
    async with entra() as identity:
        form = {name: value for name, value in {**FORM, **changes}.items() if value is not None}
        status, body = await ask(identity, form, tenant)
        assert status in {400, 401}
        assert body["error_codes"] == [number]
        assert body["error_description"].startswith(f"AADSTS{number}: ")
        assert identity.issued == []


async def test_a_service_accounts_token_must_be_for_entra_of_the_right_subject_and_fresh() -> None:
    clock = ManualClock()
    form = {name: value for name, value in FORM.items() if name != "client_secret"}
    async with entra(clock=clock) as identity:
        for assertion, number in (
            (identity.assertion(), None),
            (identity.assertion(audience="https://kubernetes.default.svc"), 700212),
            (identity.assertion(subject="system:serviceaccount:other:gateway"), 700213),
            (identity.assertion(seconds=-1), 700024),
        ):
            proof = {"client_assertion_type": JWT_BEARER, "client_assertion": assertion}
            _, body = await ask(identity, {**form, **proof})
            assert body.get("error_codes") == (None if number is None else [number])


@pytest.mark.parametrize(
    ("query", "headers", "status"),
    [
        (IMDS, {"Metadata": "true"}, 200),
        (IMDS, {}, 400),
        (IMDS, {"Metadata": "true", "X-Forwarded-For": "10.0.0.1"}, 400),
        ({**IMDS, "api-version": "2017-01-01"}, {"Metadata": "true"}, 400),
        ({**IMDS, "resource": SCOPE}, {"Metadata": "true"}, 400),
        ({**IMDS, "client_id": "nobody"}, {"Metadata": "true"}, 400),
    ],
)
async def test_the_metadata_service_asks_for_its_header(query: Any, headers: dict[str, str], status: int) -> None:
    async with entra() as identity:
        got, body = await get(f"{identity.url}/metadata/identity/oauth2/token", query, headers)
        assert got == status
        assert (body.get("expires_in") == "3599") is (status == 200)


@pytest.mark.parametrize(
    ("query", "header", "status"),
    [
        (APP_SERVICE, IDENTITY_HEADER, 200),
        (APP_SERVICE, "example-wrong", 401),
        ({**APP_SERVICE, "api-version": "2018-02-01"}, IDENTITY_HEADER, 400),
        ({**APP_SERVICE, "principal_id": "nobody"}, IDENTITY_HEADER, 400),
        ({**APP_SERVICE, "object_id": "nobody"}, IDENTITY_HEADER, 400),
    ],
)
async def test_app_service_asks_for_its_secret_header(query: Any, header: str, status: int) -> None:
    async with entra() as identity:
        got, body = await get(identity.app_service, query, {"X-IDENTITY-HEADER": header})
        assert got == status
        assert "expires_in" not in body


async def test_microsofts_libraries_are_told_where_tokens_are() -> None:
    async with entra() as identity:
        _, body = await get(f"{identity.url}/{TENANT}/v2.0/.well-known/openid-configuration", {}, {})
        assert body["token_endpoint"] == f"https://127.0.0.1:{identity.port}/{TENANT}/oauth2/v2.0/token"
        assert (await get(f"{identity.url}/{TENANT}/nonsense", {}, {}))[0] == 404


async def test_an_application_may_have_only_a_secret_or_only_trust() -> None:
    async with entra() as identity:
        identity.applications[CLIENT] = Application(secret=None)
        assert (await ask(identity, FORM))[1]["error_codes"] == [7000215]
