"""The plugin `ordered`."""

from __future__ import annotations

from qlens.testing import check_plugin, running
from qlens_plugins.route.ordered import Ordered

CALL = {"model": "small", "messages": [{"role": "user", "content": "hello"}]}


def config(first: str = "") -> str:
    return f"""
pipeline: {{auth: [{{plugin: anonymous}}], route: [{{plugin: ordered}}, {{plugin: weighted}}], cost: []}}
providers: {{one: {{plugin: echo}}, two: {{plugin: echo}}}}
models:
  small:
    max_output_tokens: 100
    targets:
      - {{provider: one, model: a, weight: 0{first}}}
      - {{provider: two, model: b, weight: 9}}
"""


def test_it_keeps_the_contract_of_its_stage() -> None:
    check_plugin("route", Ordered)


async def test_the_first_target_is_asked_first_whatever_the_weights() -> None:
    async with running(config()) as gateway:
        for _ in range(5):
            answer = await gateway.post("/v1/chat/completions", CALL)
            assert answer.headers["x-qlens-provider"] == "one"


async def test_the_next_target_is_asked_when_the_first_fails() -> None:
    async with running(config(first=", params: {fail_status: 503}")) as gateway:
        answer = await gateway.post("/v1/chat/completions", CALL)
        assert (answer.status, answer.headers["x-qlens-provider"]) == (200, "two")
        (receipt,) = await gateway.settled(1)
        assert [attempt.target.provider for attempt in receipt.attempts] == ["one", "two"]
