"""Faults that other gateways had with Azure, each by its number in the list of pitfalls, and what is right instead."""

from __future__ import annotations

import asyncio
import math
import struct
from base64 import b64decode
from typing import Any

import orjson
import pytest
from azures import CHAT, DEPLOYMENT, chat, config, text

from qlens.testing import Response, Running, Scripted, running
from qlens.testing.azure import KEY, SAFE, Deployment, azure, throttled
from qlens.testing.upstreams import TEXT, USAGE, chat_events

ASKED = {"stream": True, "stream_options": {"include_usage": True}}
PRICES = {"plugin": "prices", "catalogue": False, "table": [{"model": "gpt-4.1-2025-04-14", "input": 2, "output": 8}]}
HEAD = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "gpt-4o-2024-11-20"}


async def stream(gateway: Running, **fields: Any) -> list[Any]:
    return (await gateway.post(CHAT, chat(stream=True, **fields))).events()


async def test_pitfall_1_the_usage_event_has_no_choices_and_comes_only_when_asked_for() -> None:
    async with azure() as cloud, running(config(cloud.root)) as gateway:
        plain, asked = await stream(gateway), (await gateway.post(CHAT, chat(**ASKED))).events()
        assert all(event["choices"] for event in plain[:-1])
        assert [bool(event["choices"]) for event in asked[:-1]] == [*[True] * (len(asked) - 2), False]
        assert asked[-2]["usage"]["total_tokens"] == USAGE["total_tokens"]


async def test_pitfall_2_usage_on_an_event_with_choices_is_read_and_its_text_kept() -> None:
    async with azure() as cloud, running(config(cloud.root)) as gateway:
        last = {**HEAD, "choices": [{"index": 0, "delta": {"content": "!"}, "finish_reason": "stop"}], "usage": USAGE}
        cloud.script(Scripted(events=[*chat_events()[:-2], last, "[DONE]"]))
        assert text(await stream(gateway)) == TEXT + "!"
        (receipt,) = await gateway.settled(1)
        assert (receipt.usage.total, receipt.usage.source) == (USAGE["total_tokens"], "provider")


async def test_pitfall_3_reading_goes_on_after_the_finish_reason() -> None:
    async with azure({DEPLOYMENT: Deployment(filter="asynchronous")}) as cloud, running(config(cloud.root)) as gateway:
        await stream(gateway)
        (receipt,) = await gateway.settled(1)
        assert receipt.usage.source == "provider"


ZERO = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}


@pytest.mark.parametrize("usage", [None, ZERO], ids=["no usage", "a usage of zeros"])
async def test_pitfall_4_azure_is_always_asked_for_usage_and_without_it_there_is_an_estimate(usage: Any) -> None:
    async with azure() as cloud, running(config(cloud.root)) as gateway:
        cloud.script(Scripted(events=chat_events(usage=usage)))
        await stream(gateway)
        assert cloud.requests[0].body["stream_options"] == {"include_usage": True}
        (receipt,) = await gateway.settled(1)
        assert receipt.usage.source == "estimated"
        assert receipt.usage.input > 0
        assert receipt.usage.output > 0


async def test_pitfall_12_a_stream_that_breaks_off_is_no_success() -> None:
    async with azure() as cloud, running(config(cloud.root)) as gateway:
        cloud.script(Scripted(events=chat_events()[:3]))
        events = await stream(gateway)
        assert events[-1]["error"]["code"] == "upstream_truncated"
        (receipt,) = await gateway.settled(1)
        assert (receipt.outcome, receipt.error) == ("failed", "upstream_truncated")


@pytest.mark.parametrize("events", [[], chat_events()[:2]], ids=["before the first token", "in the middle"])
async def test_pitfall_14_when_the_client_leaves_azure_is_told(events: list[Any]) -> None:
    async with azure() as cloud, running(config(cloud.root)) as gateway:
        cloud.script(Scripted(events=events, hang=True))
        leaving = asyncio.create_task(gateway.post(CHAT, chat(stream=True)))
        (request,) = await cloud.arrived(1)
        leaving.cancel()
        await asyncio.wait_for(request.closed.wait(), 5)
        (receipt,) = await gateway.settled(1)
        assert receipt.outcome == "abandoned"


async def test_pitfall_15_another_deployment_is_asked_only_before_the_first_byte() -> None:
    yaml = orjson.loads(config("http://azure.invalid"))
    async with azure({DEPLOYMENT: Deployment(), "second": Deployment()}) as cloud:
        yaml["providers"]["azure"]["endpoint"] = cloud.root
        yaml["models"]["ours"]["targets"].append({"provider": "azure", "model": "second"})
        async with running(orjson.dumps(yaml).decode()) as gateway:
            cloud.script(Scripted(events=[{"error": {"message": "busy", "code": "rate_limit_exceeded"}}]))
            assert text(await stream(gateway)) == TEXT
            assert len(cloud.requests) == 2
            cloud.script(Scripted(events=[*chat_events()[:2], {"error": {"message": "busy", "code": "500"}}]))
            events = await stream(gateway)
            assert "error" in events[-1]
            assert len(cloud.requests) == 3


async def test_pitfall_18_retry_after_reaches_the_client_in_milliseconds() -> None:
    async with azure({DEPLOYMENT: Deployment(busy=True)}) as cloud, running(config(cloud.root)) as gateway:
        answer = await gateway.post(CHAT, chat())
        assert answer.status == 429
        assert (answer.headers["retry-after-ms"], answer.headers["retry-after"]) == ("1200", "2")


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("deployment", "base_model", "model", "picos"),
    [
        ("gpt-4o", "gpt-4.1-2025-04-14", "gpt-4.1", 50_000_000),  # base_model decides
        ("any-name", None, "gpt-4.1", 50_000_000),  # without it, the model that answered
        ("router", "model-router", "model-router", 50_000_000),  # so it does for a router
        ("any-name", "gpt-4o", "gpt-4.1", None),  # unknown is unknown, not free
        ("any-name", None, "gpt-4o", None),
    ],
)
async def test_pitfall_19_the_price_is_never_that_of_the_deployments_name(
    deployment: str, base_model: str | None, model: str, picos: int | None, streamed: bool
) -> None:
    async with azure({deployment: Deployment(model)}) as cloud:
        settings = config(cloud.root, deployment=deployment, base_model=base_model, pipeline={"cost": [PRICES]})
        async with running(settings) as gateway:
            answer = await gateway.post(CHAT, chat(**(ASKED if streamed else {})))
            (receipt,) = await gateway.settled(1)
            assert (receipt.cost.picos, receipt.cost.state) == (picos, "exact" if picos else "unpriced")
            assert _shown_cost(answer, streamed) == ("0.00005" if picos else None)


def _shown_cost(answer: Response, streamed: bool) -> Any:
    if streamed:
        return answer.events()[-2]["usage"]["cost_usd"]
    return answer.headers.get("x-qlens-cost-usd")


@pytest.mark.parametrize("filtering", ["default", "asynchronous"])
async def test_pitfall_20_every_event_names_itself_and_every_choice_has_a_delta(filtering: Any) -> None:
    async with azure({DEPLOYMENT: Deployment(filter=filtering)}) as cloud, running(config(cloud.root)) as gateway:
        events = (await gateway.post(CHAT, chat(**ASKED))).events()
        for event in events[:-1]:
            assert event["id"] == "chatcmpl-azure"
            assert event["object"] == "chat.completion.chunk"
            assert event["created"]
            assert event["model"] == "gpt-4o-2024-11-20"
            assert all(isinstance(choice["delta"], dict) for choice in event["choices"])


async def test_pitfall_20_a_late_block_makes_no_second_finish_reason() -> None:
    late = Deployment(filter="asynchronous", late_block=True)
    async with azure({DEPLOYMENT: late}) as cloud, running(config(cloud.root)) as gateway:
        events = await stream(gateway)
        assert [c["finish_reason"] for e in events[:-1] for c in e["choices"] if c["finish_reason"]] == ["stop"]
        assert events[-2]["choices"][0]["content_filter_results"]["violence"]["filtered"] is True


async def test_pitfall_21_a_missing_end_mark_is_added_after_a_finish_reason_only() -> None:
    async with azure({DEPLOYMENT: Deployment(ends_with_done=False)}) as cloud, running(config(cloud.root)) as gateway:
        assert (await stream(gateway))[-1] == "[DONE]"
        cloud.script(Scripted(events=chat_events()[:-2]))
        assert "error" in (await stream(gateway))[-1]
        whole, broken = await gateway.settled(2)
        assert (whole.outcome, broken.outcome) == ("complete", "failed")


@pytest.mark.parametrize("base_model", ["o3-mini", None])
async def test_pitfall_22_max_tokens_has_its_other_name_for_reasoning_models(base_model: str | None) -> None:
    async with (
        azure({DEPLOYMENT: Deployment("o3-mini")}) as cloud,
        running(config(cloud.root, base_model=base_model)) as gateway,
    ):
        for _ in range(2):
            assert (await gateway.post(CHAT, chat(max_tokens=50))).status == 200
        assert cloud.requests[-1].body["max_completion_tokens"] == 50
        tried = 2 if base_model else 3
        assert len(cloud.requests) == tried, "without a base model it is learned from one refusal"


async def test_pitfall_22_and_back_for_a_model_that_only_knows_the_older_name() -> None:
    async with azure() as cloud, running(config(cloud.root, api_version="2024-02-01")) as gateway:
        for _ in range(2):
            assert (await gateway.post(CHAT, chat(max_completion_tokens=50))).status == 200
        assert ["max_tokens" in request.body for request in cloud.requests] == [False, True, True]


@pytest.mark.parametrize("value", ["-1", "0", "nonsense"])
async def test_pitfall_23_azures_own_limits_are_never_believed(value: str) -> None:
    limits = [{"per": "tenant", "requests_per_minute": 100}]
    pipeline = {"rate_limit": [{"plugin": "token_bucket", "store": {"kind": "memory"}, "limits": limits}]}
    headers = {
        f"x-ratelimit-{what}-{kind}": value for what in ("limit", "remaining") for kind in ("requests", "tokens")
    }
    async with azure() as cloud, running(config(cloud.root, pipeline=pipeline)) as gateway:
        body = {**HEAD, "object": "chat.completion", "choices": [{"index": 0, "message": {}, "finish_reason": "stop"}]}
        cloud.script(Scripted(headers={**headers, "x-ratelimit-reset-tokens": value}, body=body))
        answer = await gateway.post(CHAT, chat())
        assert (answer.status, answer.headers["x-ratelimit-remaining-requests"]) == (200, "99")
        assert "x-ratelimit-remaining-tokens" not in answer.headers
        cloud.script(Scripted(429, {**headers, "retry-after-ms": "-1", "retry-after": value}, body={}))
        answer = await gateway.post(CHAT, chat())
        assert answer.status == 429
        assert math.isfinite(float(answer.headers.get("retry-after", "1")))


async def test_pitfall_39_an_overflow_is_told_from_throttling() -> None:
    async with azure() as cloud, running(config(cloud.root)) as gateway:
        wording = "This model's maximum context length is 8192 tokens. Please reduce the length of the messages."
        cloud.script(Scripted(400, body={"error": {"message": wording, "type": "invalid_request_error"}}))
        answer = await gateway.post(CHAT, chat())
        assert (answer.status, answer.json()["error"]["code"]) == (400, "context_length_exceeded")
        cloud.script(throttled(10))
        assert (await gateway.post(CHAT, chat())).status == 429


async def test_pitfall_40_embeddings_come_in_the_encoding_that_was_asked_for() -> None:
    base_model = "text-embedding-3-small"
    async with (
        azure({DEPLOYMENT: Deployment(base_model)}) as cloud,
        running(config(cloud.root, base_model=base_model)) as gateway,
    ):
        body = {"model": "ours", "input": "x"}
        packed = await gateway.post("/v1/embeddings", {**body, "encoding_format": "base64"})
        plain = await gateway.post("/v1/embeddings", body)
        raw, numbers = b64decode(packed.json()["data"][0]["embedding"]), plain.json()["data"][0]["embedding"]
        assert [*struct.unpack(f"<{len(raw) // 4}f", raw)] == pytest.approx(numbers)
        assert any(numbers)


async def test_more_an_error_that_is_null_is_no_error() -> None:
    async with azure() as cloud, running(config(cloud.root)) as gateway:
        first, *rest = chat_events()
        assert isinstance(first, dict)
        cloud.script(Scripted(events=[{**first, "error": None}, *rest]))
        assert text(await stream(gateway)) == TEXT


async def test_more_the_providers_request_id_is_kept_on_errors() -> None:
    async with azure() as cloud, running(config(cloud.root)) as gateway:
        cloud.script(Scripted(500, {"apim-request-id": "apim-canary-1"}))
        answer = await gateway.post(CHAT, chat())
        (receipt,) = await gateway.settled(1)
        assert receipt.attempts[0].upstream_id == "apim-canary-1"
        assert "apim-canary-1" not in answer.text


async def test_more_keys_and_verdicts_do_not_mix() -> None:
    async with azure() as cloud, running(config(cloud.root)) as gateway:
        answer = await gateway.post(CHAT, chat())
        assert answer.json()["choices"][0]["content_filter_results"] == SAFE
        assert KEY not in answer.text
