"""How much a model is to think, told in the way of its family."""

from __future__ import annotations

from typing import Any

import pytest
from bedrocks import CHAT, CLAUDE, NOVA, WEATHER, chat, config, events, sent

from qlens.testing import running
from qlens.testing.bedrock import answer, bedrock, stream, streamed, whole

OPUS = "global.anthropic.claude-opus-4-6-v1"
OLD = "anthropic.claude-3-5-sonnet-20241022-v2:0"
FIRST = "us.anthropic.claude-3-7-sonnet-20250219-v1:0"


def _budget(tokens: int) -> dict[str, Any]:
    return {"thinking": {"type": "enabled", "budget_tokens": tokens}}


@pytest.mark.parametrize(
    ("model", "fields", "expected"),
    [
        (CLAUDE, {"reasoning_effort": "low"}, _budget(1024)),
        (CLAUDE, {"reasoning_effort": "medium"}, _budget(4096)),
        (CLAUDE, {"reasoning_effort": "high"}, _budget(16384)),
        (FIRST, {"reasoning_effort": "minimal"}, _budget(1024)),
        (CLAUDE, {"reasoning_effort": "high", "max_tokens": 3000}, _budget(1500)),
        (CLAUDE, {"reasoning_effort": "low", "max_tokens": 2048}, _budget(1024)),
        (CLAUDE, {"reasoning_effort": "low", "max_tokens": 2047}, None),
        (CLAUDE, {"thinking": {"type": "enabled"}, "max_tokens": 3000}, _budget(1500)),
        (CLAUDE, {"thinking": {"type": "enabled", "budget_tokens": 4000}, "max_tokens": 2000}, _budget(1999)),
        (CLAUDE, {"reasoning_effort": "none"}, None),
        (CLAUDE, {"thinking": {"type": "enabled", "budget_tokens": 2048}}, _budget(2048)),
        (CLAUDE, {"thinking": {"type": "disabled"}, "reasoning_effort": "high"}, None),
        (OPUS, {"thinking": {"type": "enabled", "budget_tokens": 2048}}, _budget(2048)),
        (OPUS, {"reasoning_effort": "low"}, {"thinking": {"type": "adaptive"}}),
        (OPUS, {"thinking": {"type": "adaptive"}}, {"thinking": {"type": "adaptive"}}),
        (OLD, {"reasoning_effort": "high"}, None),
        (NOVA, {"reasoning_effort": "high"}, None),
        (
            "us.amazon.nova-2-lite-v1:0",
            {"reasoning_effort": "xhigh", "max_tokens": 100},
            {"reasoningConfig": {"type": "enabled", "maxReasoningEffort": "medium"}},
        ),
        (
            "us.amazon.nova-2-lite-v1:0",
            {"reasoning_effort": "high"},
            {"reasoningConfig": {"type": "enabled", "maxReasoningEffort": "high"}},
        ),
        ("openai.gpt-oss-120b-1:0", {"reasoning_effort": "max"}, {"reasoning_effort": "high"}),
        ("deepseek.v3.2", {"reasoning_effort": "minimal"}, {"reasoning_effort": "low"}),
        ("us.deepseek.r1-v1:0", {"reasoning_effort": "high"}, None),
        ("us.openai.gpt-5.6-sol", {"reasoning_effort": "xhigh"}, {"reasoning": {"effort": "xhigh"}}),
    ],
)
async def test_effort(model: str, fields: dict[str, Any], expected: dict[str, Any] | None) -> None:
    assert (await sent(chat(**fields), model)).get("additionalModelRequestFields") == expected


@pytest.mark.parametrize(
    ("effort", "expected"), [("minimal", "low"), ("medium", "medium"), ("xhigh", "high"), ("max", "max")]
)
async def test_adaptive_models_are_told_an_effort(effort: str, expected: str) -> None:
    assert (await sent(chat(reasoning_effort=effort), OPUS))["outputConfig"] == {"effort": expected}


@pytest.mark.parametrize("model", [CLAUDE, OPUS])
async def test_what_is_refused_beside_thinking_gives_way(model: str) -> None:
    body = await sent(
        chat(reasoning_effort="low", temperature=0.5, top_k=3, tools=[WEATHER], tool_choice="required"), model
    )
    assert "inferenceConfig" not in body
    assert "top_k" not in body["additionalModelRequestFields"]
    assert body["toolConfig"]["toolChoice"] == {"auto": {}}


THOUGHT = {"reasoningContent": {"reasoningText": {"text": "Hm.", "signature": "c2ln"}}}
GPT = "us.openai.gpt-5.6-sol"


@pytest.mark.parametrize(
    ("model", "details", "told"),
    [
        (CLAUDE, {"thinking_tokens": 3}, 3),
        (GPT, {"reasoning_tokens": 3}, 3),
        (CLAUDE, {"thinking_tokens": 90}, 4),  # no more than the whole answer
        (CLAUDE, {}, None),
        (CLAUDE, {"thinking_tokens": "3"}, None),
        (CLAUDE, {"thinking_tokens": -3}, None),
        (CLAUDE, None, None),
        (CLAUDE, 3, None),
    ],
)
async def test_how_many_tokens_are_thoughts_is_said_where_it_is_known(
    model: str, details: object, told: int | None
) -> None:
    reply = answer(THOUGHT, {"text": "Hi"}, additionalModelResponseFields={"usage": {"output_tokens_details": details}})
    async with bedrock() as aws, running(config(aws.root, model)) as gateway:
        aws.script(whole(reply), stream(streamed(reply)))
        one = await gateway.post(CHAT, chat(reasoning_effort="high"))
        options = {"stream": True, "stream_options": {"include_usage": True}}
        other = events(await gateway.post(CHAT, chat(reasoning_effort="high", **options)))[-1]
        for usage in (one.json()["usage"], other["usage"]):
            assert usage["completion_tokens"] == 4
            assert usage["completion_tokens_details"].get("reasoning_tokens") == told
        assert [each.body["additionalModelResponseFieldPaths"] for each in aws.requests] == [
            ["/usage/output_tokens_details"]
        ] * 2
        receipts = await gateway.settled(2)
        assert [(each.usage.reasoning, each.usage.completion) for each in receipts] == [(told or 0, 4)] * 2


async def test_who_is_not_told_to_think_is_not_asked_how_much_it_did() -> None:
    assert "additionalModelResponseFieldPaths" not in await sent(chat())
    assert "additionalModelResponseFieldPaths" not in await sent(
        chat(reasoning_effort="low"), "us.amazon.nova-2-lite-v1:0"
    )
