"""How long messages are: asked of a provider that counts, else estimated and marked, in Anthropic's words."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import anthropic as sdk
import orjson
import pytest

from qlens.testing import Running, Scripted, running
from qlens.testing.anthropic import KEY, MODEL, FakeAnthropic, anthropic, failure

PATH = "/v1/messages/count_tokens"
HELLO: Any = [{"role": "user", "content": "Hello there!"}]


def settings(up: FakeAnthropic, limits: str = "[]") -> str:
    return f"""
pipeline: {{auth: [{{plugin: anonymous}}], rate_limit: {limits}, cost: []}}
providers:
  claude: {{plugin: anthropic, base_url: "{up.url}", api_key: {KEY}}}
  echo: {{plugin: echo}}
models:
  counted: {{max_output_tokens: 100, targets: [{{provider: claude, model: {MODEL}, params: {{max_tokens: 5}}}}]}}
  guessed: {{max_output_tokens: 100, targets: [{{provider: echo, model: any}}], fallbacks: [counted]}}
  mixed:
    targets: [{{provider: echo, model: any}}, {{provider: claude, model: {MODEL}}}]
    fallbacks: [guessed]
"""


@pytest.fixture
async def up() -> AsyncIterator[FakeAnthropic]:
    async with anthropic() as up:
        yield up


@pytest.fixture
async def gateway(up: FakeAnthropic) -> AsyncIterator[Running]:
    async with running(settings(up)) as gateway:
        yield gateway


def client(gateway: Running) -> sdk.AsyncAnthropic:
    return sdk.AsyncAnthropic(base_url=gateway.url, api_key="sk-example-client", max_retries=0)


async def test_a_provider_that_counts_is_asked(gateway: Running, up: FakeAnthropic) -> None:
    async with client(gateway) as anthropics:
        tool: Any = {"name": "f", "input_schema": {"type": "object"}}
        counted = await anthropics.messages.count_tokens(
            model="counted", messages=HELLO, system="Be kind.", tools=[tool]
        )
    assert counted.input_tokens == 9
    assert "estimated" not in counted.model_dump()
    (request,) = up.requests
    assert request.path == PATH
    assert request.body == {"model": MODEL, "messages": HELLO, "system": "Be kind.", "tools": [tool]}
    (receipt,) = await gateway.settled(1)
    assert (receipt.operation, receipt.outcome, receipt.usage.total) == ("count_tokens", "complete", 0)


async def test_where_no_target_counts_the_answer_is_an_estimate_and_says_so(
    gateway: Running, up: FakeAnthropic
) -> None:
    async with client(gateway) as anthropics:
        short = await anthropics.messages.count_tokens(model="guessed", messages=HELLO)
        long = await anthropics.messages.count_tokens(model="guessed", messages=HELLO, system="word " * 300)
    assert short.model_dump()["estimated"] is True
    assert 3 <= short.input_tokens < 30
    assert 300 <= long.input_tokens < 900
    assert not up.requests
    receipts = await gateway.settled(2)
    assert [(each.outcome, each.usage.total, each.target) for each in receipts] == [("complete", 0, None)] * 2


async def test_of_several_targets_one_that_counts_is_asked(gateway: Running, up: FakeAnthropic) -> None:
    async with client(gateway) as anthropics:
        assert (await anthropics.messages.count_tokens(model="mixed", messages=HELLO)).input_tokens == 9
    assert len(up.requests) == 1


@pytest.mark.parametrize(
    ("body", "status", "kind"),
    [
        ({"model": "none", "messages": HELLO}, 404, "not_found_error"),
        ({"model": "counted"}, 400, "invalid_request_error"),
        ({"model": "counted", "messages": []}, 400, "invalid_request_error"),
        ({"model": "counted", "messages": [{"role": "nobody", "content": "x"}]}, 400, "invalid_request_error"),
    ],
)
async def test_mistakes_are_told_as_anthropic_does(
    gateway: Running, up: FakeAnthropic, body: dict[str, Any], status: int, kind: str
) -> None:
    answer = await gateway.post(PATH, body)
    assert (answer.status, answer.json()["type"], answer.json()["error"]["type"]) == (status, "error", kind)
    assert not up.requests


async def test_a_provider_that_fails_is_not_replaced_by_a_guess(gateway: Running, up: FakeAnthropic) -> None:
    up.script(failure("overloaded_error", "Overloaded"))
    assert (await gateway.post(PATH, {"model": "counted", "messages": HELLO})).status == 503
    up.script(Scripted(body=orjson.dumps({"tokens": 5}), headers={"content-type": "application/json"}))
    assert (await gateway.post(PATH, {"model": "counted", "messages": HELLO})).status == 502


async def test_an_answer_from_the_cache_is_not_taken_for_an_estimate(up: FakeAnthropic) -> None:
    async with running(settings(up).replace("cost: []", "cache: [{plugin: exact}], cost: []")) as gateway:
        for _ in range(2):
            answer = await gateway.post(PATH, {"model": "counted", "messages": HELLO})
            assert answer.json() == {"input_tokens": 9}
        receipts = await gateway.settled(2)
    assert [each.outcome for each in receipts] == ["complete", "cached"]
    assert len(up.requests) == 1


async def test_to_count_uses_up_no_tokens_of_a_limit(up: FakeAnthropic) -> None:
    limits = "[{plugin: token_bucket, limits: [{per: tenant, tokens_per_minute: 1000}]}]"
    async with running(settings(up, limits)) as gateway:
        for model in ("counted", "guessed"):
            for _ in range(20):
                body = {"model": model, "messages": [{"role": "user", "content": "word " * 100}]}
                assert (await gateway.post(PATH, body)).status == 200
