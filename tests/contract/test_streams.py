"""No client sees an event without choices that it did not ask for, however the provider's bytes are cut."""

from __future__ import annotations

from typing import Any

import pytest
from yamls import CHAT, STREAM, config

from qlens.testing import Scripted, running, upstream

HEAD = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "gpt-4o-mini"}
FILTERS = {
    "id": "",
    "object": "",
    "created": 0,
    "model": "",
    "choices": [],
    "prompt_filter_results": [{"prompt_index": 0}],
}
EVENTS: list[dict[str, Any] | str | bytes] = [
    FILTERS,
    {
        **HEAD,
        "choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}],
        "usage": None,
    },
    {
        **HEAD,
        "choices": [{"index": 0, "delta": {"content": 'Grüße, "choices":[]'}, "finish_reason": None}],
        "usage": None,
    },
    {**HEAD, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}], "usage": None},
    {**HEAD, "choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8}},
    "[DONE]",
]


@pytest.mark.parametrize("split", [1, 2, 3, 7, 64, None])
@pytest.mark.parametrize("provider", ["openai", "azure_openai"])
@pytest.mark.parametrize("asked", [False, True], ids=["not asked", "asked"])
async def test_usage_is_always_asked_of_the_provider_and_shown_only_to_clients_that_asked(
    provider: str, split: int | None, asked: bool
) -> None:
    async with upstream() as up:
        settings = (
            {"base_url": up.url, "api_key": "sk-example-up"}
            if provider == "openai"
            else {"endpoint": up.root, "api_key": "sk-example-up"}
        )
        models = {"gpt-4o-mini": {"max_output_tokens": 100, "targets": [{"provider": "up", "model": "gpt-4o-mini"}]}}
        async with running(config({}, {"up": {"plugin": provider, **settings}}, models)) as gateway:
            up.script(Scripted(events=EVENTS, split=split))
            answer = await gateway.post(
                CHAT, {**STREAM, **({"stream_options": {"include_usage": True}} if asked else {})}
            )
            events = answer.events()
            assert events[-1] == "[DONE]"
            empty = [event for event in events[:-1] if not event["choices"]]
            assert len(empty) == (1 if asked else 0)
            assert "prompt_filter_results" not in answer.text
            assert "".join(e["choices"][0]["delta"].get("content") or "" for e in events[:-1] if e["choices"]) == (
                'Grüße, "choices":[]'
            )
            (request,) = up.requests
            assert request.body["stream_options"] == {"include_usage": True}
            (receipt,) = await gateway.settled(1)
            assert (receipt.outcome, receipt.usage.total, receipt.usage.source) == ("complete", 8, "provider")


async def test_a_providers_secret_never_reaches_a_client_or_a_receipt() -> None:
    canary = "sk-example-canary-0123456789"
    async with upstream() as up:
        models = {"gpt-4o-mini": {"targets": [{"provider": "up", "model": "gpt-4o-mini"}]}}
        providers = {"up": {"plugin": "openai", "base_url": up.url, "api_key": canary}}
        async with running(config({}, providers, models)) as gateway:
            for status in (400, 401, 403, 404, 429, 500, 503):
                up.script(
                    Scripted(
                        status=status, body={"error": {"message": f"bad key {canary}", "type": canary, "code": canary}}
                    )
                )
                for_status = await gateway.post(CHAT, STREAM)
                assert for_status.status >= 400
                assert for_status.status not in {401, 403}
                assert canary not in for_status.text
            receipts = await gateway.settled(7)
            metrics = (await gateway.get("/metrics")).text
            assert canary not in repr(receipts) + metrics + repr(gateway.gateway.config)
            assert {receipt.outcome for receipt in receipts} == {"failed"}
