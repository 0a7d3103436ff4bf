"""Azure's errors, as OpenAI would have said them."""

from __future__ import annotations

from typing import Any

import pytest
from azures import CHAT, DEPLOYMENT, chat, config

from qlens import ConfigError
from qlens.testing import Scripted, running
from qlens.testing import azure as cloud_errors
from qlens.testing.azure import BLOCKED, FILTERED, Deployment, azure
from qlens.testing.upstreams import error


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("scripted", "status", "code"),
    [
        (cloud_errors.access_denied(), 502, "upstream_auth_error"),
        (error(401, "canary", code="401"), 502, "upstream_auth_error"),
        (cloud_errors.forbidden(), 502, "upstream_auth_error"),
        (cloud_errors.deployment_not_found(), 404, "model_not_found"),
        (cloud_errors.resource_not_found(), 404, "model_not_found"),
        (cloud_errors.throttled(1500), 429, "rate_limit_exceeded"),
        (cloud_errors.high_demand(), 429, "rate_limit_exceeded"),
        (error(429, "canary", code="RateLimitReached"), 429, "rate_limit_exceeded"),
        (cloud_errors.failed(408), 504, "upstream_timeout"),
        (cloud_errors.failed(424), 502, "upstream_error"),
        (cloud_errors.failed(500), 502, "upstream_error"),
        (cloud_errors.failed(502), 502, "upstream_error"),
        (cloud_errors.failed(503), 503, "upstream_unavailable"),
        (cloud_errors.failed(504), 504, "upstream_timeout"),
        (cloud_errors.filtered_prompt(), 400, "content_filter"),
        (cloud_errors.filtered_prompt(inner="inner_error"), 400, "content_filter"),
        (error(400, "blocked", code="content_policy_violation"), 400, "content_policy_violation"),
        (error(400, "no", code="OperationNotSupported"), 400, "OperationNotSupported"),
        (error(400, "no", code="unsupported_value", param="n"), 400, "unsupported_value"),
        (error(400, "no", code="invalid_encrypted_content"), 400, "invalid_encrypted_content"),
    ],
)
async def test_each_error_has_openais_status_and_code(scripted: Scripted, status: int, code: str, stream: bool) -> None:
    async with azure() as cloud, running(config(cloud.root)) as gateway:
        cloud.script(scripted)
        answer = await gateway.post(CHAT, chat(stream=stream))
        assert (answer.status, answer.json()["error"]["code"]) == (status, code)
        assert not any(word in answer.text for word in ("canary", "Virtual Network", "Front Door", "Access token"))
        assert len(cloud.requests) == 1


async def test_a_blocked_prompt_says_what_was_found_and_nothing_else() -> None:
    async with azure() as cloud, running(config(cloud.root)) as gateway:
        answer = await gateway.post(CHAT, chat(messages=[{"role": "user", "content": f"say {BLOCKED}"}]))
        assert answer.status == 400
        found = answer.json()["error"]
        assert (found["type"], found["param"], found["code"]) == ("invalid_request_error", "prompt", "content_filter")
        assert found["innererror"] == {"code": "ResponsibleAIPolicyViolation", "content_filter_result": FILTERED}


async def test_of_a_verdict_only_flags_and_short_words_are_shown() -> None:
    results = {
        "hate": {"filtered": True, "severity": "high", "note": "canary"},
        "jailbreak": {"detected": True, "filtered": True},
        "custom_blocklists": {"filtered": True, "details": [{"id": "canary-list", "filtered": True}]},
        "can ary": {"filtered": True},
        "text": "canary",
        "violence": {"filtered": "canary", "severity": "https://canary.example.com"},
    }
    told = error(
        400, "blocked", code="content_filter", innererror={"code": "x canary", "content_filter_result": results}
    )
    async with azure() as cloud, running(config(cloud.root)) as gateway:
        cloud.script(told)
        answer = await gateway.post(CHAT, chat())
        assert answer.json()["error"]["innererror"] == {
            "content_filter_result": {
                "hate": {"filtered": True, "severity": "high"},
                "jailbreak": {"detected": True, "filtered": True},
                "custom_blocklists": {"filtered": True},
                "violence": {},
            }
        }
        assert "canary" not in answer.text


async def test_too_long_a_prompt_is_openais_context_error() -> None:
    async with azure({DEPLOYMENT: Deployment(context_tokens=10)}) as cloud, running(config(cloud.root)) as gateway:
        answer = await gateway.post(CHAT, chat(messages=[{"role": "user", "content": "word " * 50}]))
        assert (answer.status, answer.json()["error"]["code"]) == (400, "context_length_exceeded")


async def test_a_throttled_deployment_is_left_alone_for_as_long_as_it_says() -> None:
    pipeline = {"route": [{"plugin": "retry", "attempts": 2}]}
    async with azure() as cloud, running(config(cloud.root, pipeline=pipeline)) as gateway:
        cloud.script(cloud_errors.throttled(60_000))
        answer = await gateway.post(CHAT, chat())
        assert (answer.status, answer.headers["retry-after-ms"]) == (429, "60000")
        (receipt,) = await gateway.settled(1)
        assert receipt.attempts[0].retry_after == 60


async def test_an_unknown_deployment_is_shown_to_the_operator_until_it_is_known(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with azure({}) as cloud, running(config(cloud.root)) as gateway:
        for _ in range(3):
            assert (await gateway.post(CHAT, chat())).status == 404
        told = (await gateway.get("/readyz")).json()["plugins"]["provider.azure"]
        assert told == {"ok": False, "detail": f"unknown deployments: {DEPLOYMENT}"}
        assert caplog.text.count("does not know the deployment") == 1
        cloud.deployments[DEPLOYMENT] = Deployment()
        assert (await gateway.post(CHAT, chat())).status == 200
        assert (await gateway.get("/readyz")).json()["plugins"]["provider.azure"]["ok"] is True


async def test_names_that_clients_invent_behind_a_wildcard_are_no_fault_of_the_configuration() -> None:
    async with azure({}) as cloud, running(config(cloud.root, deployment="*", name="azure/*")) as gateway:
        assert (await gateway.post(CHAT, {**chat(), "model": "azure/invented"})).status == 404
        assert (await gateway.get("/readyz")).json()["plugins"]["provider.azure"]["ok"] is True


# --- settings -----------------------------------------------------------------------------------

SECRET = "sk-example-canary"
APPLICATION = {"kind": "client_credentials", "tenant_id": "t", "client_id": "c", "client_secret": SECRET}


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"endpoint": "x.openai.azure.com"}, "providers.azure.endpoint"),
        ({"endpoint": "https://x.openai.azure.com/openai/v1/"}, "providers.azure.endpoint"),
        ({"api_key": f"{SECRET}\n"}, "providers.azure.api_key"),
        ({"api_key": None}, "set api_key or identity"),
        ({"identity": APPLICATION, "api_key": SECRET}, "set api_key or identity, not both"),
        ({"identity": {"kind": "password"}}, "providers.azure.identity.kind"),
        ({"identity": {**APPLICATION, "tenant_id": "a/b"}}, "providers.azure.identity.tenant_id"),
        ({"identity": {**APPLICATION, "client_secret": ""}}, "providers.azure.identity.client_secret"),
        ({"identity": {**APPLICATION, "authority": "http://login.example.com"}}, "must begin with https://"),
        ({"identity": {"kind": "managed_identity", "client_id": "a", "object_id": "b"}}, "set one of them"),
        ({"identity": {"kind": "app_service_identity", "endpoint": "http://x"}}, 'the key "header" is missing'),
        ({"identity": APPLICATION, "scope": "https://ai.azure.com"}, "providers.azure.scope"),
        ({"surface": "v2"}, "providers.azure.surface"),
        ({"unsupported": "ignore"}, "providers.azure.unsupported"),
        ({"connect_seconds": -1}, "providers.azure.connect_seconds"),
    ],
)
async def test_wrong_setting_is_a_fault_with_its_path_and_without_secrets(settings: dict[str, Any], fault: str) -> None:
    with pytest.raises(ConfigError) as caught:
        async with running(config(**{"endpoint": "https://x.openai.azure.com", **settings})):
            pass
    assert fault in str(caught.value)
    assert "canary" not in str(caught.value)
