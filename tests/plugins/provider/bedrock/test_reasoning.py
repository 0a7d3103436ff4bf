"""How much a model is to think, told in the way of its family."""

from __future__ import annotations

from typing import Any

import pytest
from bedrocks import CLAUDE, NOVA, WEATHER, chat, sent

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
        (CLAUDE, {"reasoning_effort": "high", "max_tokens": 2000}, _budget(1999)),
        (CLAUDE, {"reasoning_effort": "high", "max_tokens": 1024}, None),
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
