"""Prompt caching: marks of the client become cache points, within Bedrock's limits."""

from __future__ import annotations

from typing import Any

import pytest
from bedrocks import CLAUDE, LLAMA, NOVA, WEATHER, chat, sent, user

SHORT = {"cache_control": {"type": "ephemeral"}}
LONG = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}
POINT = {"cachePoint": {"type": "default"}}
HOUR = {"cachePoint": {"type": "default", "ttl": "1h"}}


def _part(text: str, mark: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"type": "text", "text": text, **(mark or {})}


@pytest.mark.parametrize(
    ("mark", "point"),
    [
        (SHORT, POINT),
        (LONG, HOUR),
        ({"prompt_cache_breakpoint": {"mode": "explicit"}}, POINT),
        ({"prompt_cache_breakpoint": {"mode": "explicit", "ttl": "12h"}}, HOUR),
    ],
)
async def test_a_mark_on_a_part_is_a_point_behind_it(mark: dict[str, Any], point: dict[str, Any]) -> None:
    body = await sent(chat(user([_part("one", mark), _part("two")])))
    assert body["messages"][0]["content"] == [{"text": "one"}, point, {"text": "two"}]


async def test_a_mark_on_a_message_is_a_point_at_its_end() -> None:
    body = await sent(chat({"role": "system", "content": "Be kind.", **SHORT}, user("Hello", **SHORT)))
    assert body["system"] == [{"text": "Be kind."}, POINT]
    assert body["messages"][0]["content"] == [{"text": "Hello"}, POINT]


@pytest.mark.parametrize("model", [LLAMA, "openai.gpt-oss-120b-1:0", "mistral.mistral-large-3-675b-instruct"])
async def test_no_points_where_there_is_no_cache(model: str) -> None:
    assert "cachePoint" not in str(await sent(chat(user("Hello", **SHORT), tools=[{**WEATHER, **SHORT}]), model))


async def test_nova_caches_no_tools_and_nothing_for_an_hour() -> None:
    body = await sent(chat(user("Hello", **LONG), tools=[{**WEATHER, **SHORT}]), NOVA)
    assert body["messages"][0]["content"][1] == POINT
    assert POINT not in body["toolConfig"]["tools"]


async def test_an_hour_is_for_models_that_have_it() -> None:
    body = await sent(chat(user("Hello", **LONG)), "us.anthropic.claude-sonnet-4-20250514-v1:0")
    assert body["messages"][0]["content"][1] == POINT


async def test_of_too_many_points_the_last_four_stay() -> None:
    parts = [_part(str(number), SHORT) for number in range(5)]
    body = await sent(chat({"role": "system", "content": "s", **SHORT}, user(parts), tools=[{**WEATHER, **SHORT}]))
    assert POINT not in body["toolConfig"]["tools"] + body["system"]
    assert [block == POINT for block in body["messages"][0]["content"]] == [False, False, *[True, False] * 3, True]


async def test_a_long_point_behind_a_short_one_is_shortened() -> None:
    body = await sent(
        chat({"role": "system", "content": "s", **SHORT}, user("Hello", **LONG), tools=[{**WEATHER, **LONG}])
    )
    assert body["toolConfig"]["tools"][1] == HOUR
    assert body["system"][1] == body["messages"][0]["content"][1] == POINT


async def test_a_mark_on_a_blank_text_belongs_to_what_is_in_front_of_it() -> None:
    body = await sent(chat(user([_part("one"), _part(" ", SHORT)])), CLAUDE)
    assert body["messages"][0]["content"] == [{"text": "one"}, POINT]
