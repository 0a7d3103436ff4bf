"""Answers that are large: what is read as a whole, and what becomes of one that is larger than that."""

from __future__ import annotations

from typing import Any

import pytest
from priced import INPUT, OUTPUT, WHOLE
from yamls import CHAT, HELLO, config

from qlens.testing import Running, Scripted, running, upstream
from qlens.testing.upstreams import FakeUpstream

MOST = 10_000
LARGE = Scripted(body={**WHOLE, "padding": "x" * MOST})
MODEL = {"max_output_tokens": 50, "targets": [{"provider": "up", "model": "mini"}, {"provider": "up", "model": "two"}]}
OTHER = {"max_output_tokens": 50, "targets": [{"provider": "up", "model": "other"}]}


def yaml(up: FakeUpstream, own: dict[str, Any] | None = None, **server: Any) -> str:
    stages = {
        "route": [
            {"plugin": "retry", "attempts": 3, "backoff_seconds": 0},
            {"plugin": "circuit_breaker", "failures": 1},
        ],
        "cost": [{"plugin": "prices", "catalogue": False, "table": [{"model": "*", "input": 3, "output": 7}]}],
    }
    provider: dict[str, Any] = {"plugin": "openai", "base_url": up.url, "api_key": "sk-example-up", **(own or {})}
    models = {"gpt-4o-mini": {**MODEL, "fallbacks": ["other"]}, "other": OTHER}
    return config(stages, {"up": provider}, models, **server)


async def open_circuits(gateway: Running) -> list[str]:
    return [line for line in (await gateway.get("/metrics")).text.splitlines() if line.startswith("qlens_circuit_open")]


async def test_as_large_as_openai_makes_them_they_are_answers() -> None:
    async with upstream() as up, running(yaml(up)) as gateway:
        up.script(Scripted(body={**WHOLE, "padding": "x" * 34_000_000}))
        answer = await gateway.post(CHAT, HELLO)
        assert (answer.status, len(answer.body) > 34_000_000) == (200, True)


async def test_one_that_is_too_large_is_charged_the_most_and_asked_for_nowhere_else() -> None:
    async with upstream() as up, running(yaml(up, max_answer_bytes=MOST)) as gateway:
        up.script(LARGE)
        answer = await gateway.post(CHAT, HELLO)
        assert (answer.status, answer.json()["error"]["code"]) == (502, "upstream_answer_too_large")
        assert len(up.requests) == 1
        (receipt,) = await gateway.settled(1)
        assert (receipt.usage.output, receipt.usage.source) == (50, "estimated")
        assert receipt.usage.input
        most = receipt.usage.input * INPUT + receipt.usage.output * OUTPUT
        assert (receipt.cost.picos, receipt.cost.state) == (most, "estimated")
        assert not await open_circuits(gateway)
        assert (await gateway.post(CHAT, HELLO)).status == 200


@pytest.mark.parametrize("own", [{}, {"network": {}}], ids=["shared connections", "connections of its own"])
async def test_a_reload_changes_how_large_they_may_be(own: dict[str, Any]) -> None:
    async with upstream() as up, running(yaml(up, own, max_answer_bytes=MOST)) as gateway:
        await gateway.reload(yaml(up, own, max_answer_bytes=2 * MOST))
        up.script(LARGE)
        assert (await gateway.post(CHAT, HELLO)).status == 200
