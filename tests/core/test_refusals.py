"""What only an operator can mend is said in the log: once, and not again for every call that meets it."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from yamls import CHAT, HELLO, STREAM, config

from qlens import refusals
from qlens.testing import Scripted, running, upstream


def failing(**params: Any) -> str:
    def model(name: str) -> dict[str, Any]:
        return {"max_output_tokens": 100, "targets": [{"provider": "twin", "model": name, "params": params}]}

    return config(providers={"twin": {"plugin": "echo"}}, models={"gpt-4o-mini": model("abc"), "any/*": model("*")})


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"fail_status": 401}, "the provider twin, asked for `gpt-4o-mini`, refuses the gateway's credential"),
        ({"fail_status": 403}, "the provider twin, asked for `gpt-4o-mini`, refuses the gateway's credential"),
        ({"fail_status": 404}, "the provider twin, asked for `gpt-4o-mini`, does not know the model `abc`"),
    ],
    ids=["401", "403", "404"],
)
async def test_a_refusal_is_said_once_a_minute(
    params: dict[str, Any], said: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(failing(**params)) as gateway:
        for call in (HELLO, STREAM, HELLO):
            assert (await gateway.post(CHAT, call)).status in {502, 404}
        assert caplog.text.count(said) == 1
        monkeypatch.setattr(refusals, "TOLD_SECONDS", 0)
        await gateway.post(CHAT, HELLO)
        assert caplog.text.count(said) == 2


@pytest.mark.parametrize(
    ("name", "params"),
    [("gpt-4o-mini", {"fail_status": 400}), ("gpt-4o-mini", {"fail_status": 500}), ("any/name", {"fail_status": 404})],
    ids=["the client's fault", "the provider's fault", "a name that the client made"],
)
async def test_nothing_is_said_of_what_no_operator_can_mend(
    name: str, params: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "qlens")
    async with running(failing(**params)) as gateway:
        assert (await gateway.post(CHAT, {**HELLO, "model": name})).status >= 400
    assert "the provider twin" not in caplog.text


@pytest.mark.parametrize(("status", "count"), [(401, 1), (404, 0)])
async def test_what_is_asked_for_by_no_name_of_a_model_is_told_without_one(
    status: int, count: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "qlens")
    async with upstream() as up:
        up.script(*[Scripted(status=status, body=b'{"error": {"message": "no"}}')] * 2)
        place = {"plugin": "openai", "base_url": up.url, "api_key": "sk-example-1", "passthrough": ["GET /models"]}
        async with running(config(providers={"talker": place})) as gateway:
            for _ in range(2):
                assert (await gateway.get("/v1/providers/talker/models")).status in {502, 404}
            assert len(up.requests) == 2
    assert caplog.text.count("the provider talker refuses the gateway's credential") == count
    assert caplog.text.count("the provider talker") == count
