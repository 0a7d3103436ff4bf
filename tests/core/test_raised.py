"""What a target's `params` add to the bound of a call: what is reserved is what the upstream may be told."""

from __future__ import annotations

from typing import Any

import pytest

from qlens.testing import Running, running, upstream

CHAT = "/v1/chat/completions"


def config(url: str, params: str, *, more: str = "", top: str = "max_output_tokens: 2000") -> str:
    return f"""
pipeline:
  auth: [{{plugin: anonymous}}]
  cost:
    - plugin: prices
      table:
        - {{provider: up, model: m, input: 0, output: 1, meters: {{images: 1}}}}
        - {{provider: up, model: other, input: 0, output: 1}}
        - {{provider: up, model: paid, input: 1, output: 1}}
    - {{plugin: budgets, limits: [{{per: tenant, usd: 0.0005, window: day}}]}}
providers: {{up: {{plugin: openai, base_url: "{url}/v1", api_key: sk-example-upstream}}}}
models:
  m: {{{top}, targets: [{{provider: up, model: m, params: {{{params}}}}}]{more}}}
  other: {{max_output_tokens: 2000, targets: [{{provider: up, model: other, params: {{max_tokens: 1000}}}}]}}
"""


async def say(gateway: Running, **fields: Any) -> int:
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1, **fields}
    return (await gateway.post(CHAT, body)).status


@pytest.mark.parametrize(
    ("params", "status"),
    [
        ("max_tokens: 1000", 429),
        ("max_completion_tokens: 1000", 429),
        ("max_tokens: 400", 200),
        ("max_tokens: 200, n: 3", 429),
        ("max_tokens: 100, n: 3", 200),
        ("n: 3", 200),
        ("temperature: 0", 200),
    ],
)
async def test_a_budget_reserves_what_the_upstream_is_told(params: str, status: int) -> None:
    async with upstream() as up, running(config(up.url, params)) as gateway:
        assert await say(gateway) == status
        assert len(up.requests) == (status == 200)


async def test_what_a_target_asks_for_is_reserved_as_its_model_allows_it() -> None:
    async with (
        upstream() as up,
        running(config(up.url, "max_tokens: 1000, n: 9", top="max_output_tokens: 100, max_n: 4")) as gateway,
    ):
        assert await say(gateway) == 200
        sent = up.requests[0].body
        assert (sent["max_tokens"], sent["n"]) == (100, 4)


async def test_a_fallback_that_asks_for_more_is_reserved_for() -> None:
    async with upstream() as up, running(config(up.url, "", more=", fallbacks: [other]")) as gateway:
        assert await say(gateway) == 429
        assert up.requests == []


async def test_a_target_that_lowers_what_the_client_asked_for_is_told_the_smaller_number() -> None:
    async with upstream() as up, running(config(up.url, "max_tokens: 10")) as gateway:
        assert await say(gateway, max_tokens=300) == 200
        assert up.requests[0].body["max_tokens"] == 10


async def test_a_response_that_a_chat_answers_is_reserved_for_as_the_chat_is_told() -> None:
    settings = "max_tokens: 1000"
    async with upstream() as up, running(config(up.url, settings)) as gateway:
        body = {"model": "m", "input": "hi", "max_output_tokens": 16, "store": False}
        assert (await gateway.post("/v1/responses", body)).status == 429


async def test_images_that_a_target_asks_for_are_reserved() -> None:
    text = config("URL", "n: 3").replace("images: 1", "images: 0.0002")
    async with upstream() as up, running(text.replace("URL", up.url)) as gateway:
        answer = await gateway.post("/v1/images/generations", {"model": "m", "prompt": "a falcon"})
        assert (answer.status, answer.json()["error"]["code"]) == (429, "insufficient_quota"), answer.text


async def test_what_a_target_lets_a_model_read_is_reserved() -> None:
    text = config("URL", f"chat_template: {'x' * 600}").replace("m, input: 0", "m, input: 1")
    async with upstream() as up, running(text.replace("URL", up.url)) as gateway:
        assert await say(gateway) == 429


async def test_a_token_limit_holds_what_the_upstream_is_told() -> None:
    text = """
pipeline:
  auth: [{plugin: anonymous}]
  rate_limit: [{plugin: token_bucket, limits: [{per: tenant, tokens_per_minute: 500}]}]
providers: {echo: {plugin: echo}}
models: {m: {max_output_tokens: 2000, targets: [{provider: echo, model: m, params: {max_tokens: 1000}}]}}
"""
    async with running(text) as gateway:
        assert await say(gateway) == 400  # it could never run, whenever it came
    async with running(text.replace("1000", "100")) as gateway:
        assert await say(gateway) == 200
