"""Usage: disjoint buckets from what providers say, however wrong it is."""

from __future__ import annotations

from typing import Any

import pytest
from attrs import asdict, evolve
from hypothesis import given
from hypothesis import strategies as st

from qlens import NO_USAGE, Usage
from qlens.usage import BUCKETS, from_anthropic, from_openai, from_realtime, grown, larger, together

COUNTS = st.integers(0, 10**7)
NONSENSE = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=True, allow_infinity=True)
    | st.text(max_size=5)
    | st.sampled_from([-1, 2**31, 2**63, 10**30, 1e400, "12", float("nan")]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=4,
)
PROMPT_PARTS = ("cached_tokens", "cache_write_tokens", "audio_tokens")
COMPLETION_PARTS = ("reasoning_tokens", "audio_tokens")


def details(*names: str) -> st.SearchStrategy[object]:
    return st.fixed_dictionaries({}, optional=dict.fromkeys(names, COUNTS | NONSENSE)) | NONSENSE


def buckets(usage: Usage) -> list[int]:
    return [getattr(usage, name) for name in BUCKETS]


def evenly(count: int) -> Usage:
    return Usage(count, count, count, count, count, count, count, count)


@given(st.tuples(COUNTS, COUNTS, COUNTS, COUNTS), st.tuples(COUNTS, COUNTS, COUNTS))
def test_buckets_are_disjoint_and_sum_to_the_total(prompt: tuple[int, ...], completion: tuple[int, ...]) -> None:
    usage = from_openai(
        {
            "prompt_tokens": sum(prompt),
            "completion_tokens": sum(completion),
            "total_tokens": sum(prompt) + sum(completion),
            "prompt_tokens_details": dict(zip(PROMPT_PARTS, prompt, strict=False)),
            "completion_tokens_details": dict(zip(COMPLETION_PARTS, completion, strict=False)),
        }
    )
    assert usage is not None
    assert (usage.cached_input, usage.cache_write_5m, usage.audio_in, usage.input) == prompt
    assert (usage.reasoning, usage.audio_out, usage.output) == completion
    assert (usage.prompt, usage.completion, usage.total) == (
        sum(prompt),
        sum(completion),
        sum(prompt) + sum(completion),
    )


@given(
    st.fixed_dictionaries(
        {"prompt_tokens": COUNTS | NONSENSE},
        optional={
            "completion_tokens": COUNTS | NONSENSE,
            "total_tokens": NONSENSE,
            "prompt_tokens_details": details(*PROMPT_PARTS),
            "completion_tokens_details": details(*COMPLETION_PARTS),
        },
    )
    | NONSENSE,
    NONSENSE,
)
def test_whatever_a_provider_says_no_bucket_is_negative_or_absurd(raw: object, tier: object) -> None:
    usage = from_openai(raw, tier)
    if usage is None:
        return
    assert all(type(count) is int and 0 <= count < 2**31 for count in buckets(usage))
    assert usage.source == "provider"
    assert usage.tier is None or isinstance(usage.tier, str)
    assert isinstance(raw, dict)
    assert usage.prompt >= raw["prompt_tokens"]


@pytest.mark.parametrize(
    "raw",
    [
        None,
        [],
        "10",
        {},
        {"total_tokens": 5},
        {"prompt_tokens": -1, "completion_tokens": 5},
        {"prompt_tokens": "3", "completion_tokens": 5},
        {"prompt_tokens": 3, "completion_tokens": -5},
        {"prompt_tokens": 3, "completion_tokens": 10**30},
        {"prompt_tokens": 2**31, "completion_tokens": 3},
        {"prompt_tokens": float("nan"), "completion_tokens": 5},
        {"prompt_tokens": 1.5},
        {"prompt_tokens": True, "completion_tokens": 1},
    ],
)
def test_counts_that_make_no_sense_are_no_usage(raw: object) -> None:
    assert from_openai(raw) is None


def test_embeddings_have_no_completion() -> None:
    usage = from_openai({"prompt_tokens": 7, "total_tokens": 7, "completion_tokens": None})
    assert usage == Usage(input=7, source="provider")


def test_a_part_larger_than_its_whole_is_taken_as_exclusive_of_it() -> None:
    raw: dict[str, Any] = {
        "prompt_tokens": 10,
        "completion_tokens": 4,
        "prompt_tokens_details": {"cached_tokens": 90},
        "completion_tokens_details": {"reasoning_tokens": 5},
    }
    usage = from_openai(raw)
    assert usage == Usage(input=10, cached_input=90, output=4, reasoning=5, source="provider")


def test_whole_numbers_written_as_decimals_are_counts() -> None:
    assert from_openai({"prompt_tokens": 3.0, "completion_tokens": 4.0}) == Usage(input=3, output=4, source="provider")


def test_the_tier_is_kept_when_it_is_a_text() -> None:
    tiers = [from_openai({"prompt_tokens": 1}, tier) for tier in ("flex", ["flex"], None)]
    assert [usage and usage.tier for usage in tiers] == ["flex", None, None]


USAGES = st.builds(Usage, **dict.fromkeys(BUCKETS, COUNTS), meters=st.dictionaries(st.sampled_from("ab"), COUNTS))


@given(USAGES, USAGES)
def test_running_totals_are_not_added_up(one: Usage, other: Usage) -> None:
    both = larger(one, other)
    assert buckets(both) == list(map(max, buckets(one), buckets(other)))
    assert larger(None, other) == other


def test_the_sum_of_usages_adds_every_bucket_and_is_as_sure_as_the_least_sure() -> None:
    one = evolve(evenly(1), meters={"images": 1}, source="provider")
    other = evolve(evenly(2), meters={"images": 2, "seconds": 3}, source="partial", tier="flex")
    both = together([one, other])
    assert buckets(both) == [3] * len(BUCKETS)
    assert (dict(both.meters), both.source, both.tier) == ({"images": 3, "seconds": 3}, "partial", "flex")
    assert together([]) == NO_USAGE
    assert together([one]) is one


def test_buckets_are_all_the_token_fields() -> None:
    assert set(asdict(NO_USAGE)) - {"meters", "source", "tier"} == set(BUCKETS)
    assert evenly(1).total == len(BUCKETS)


@given(st.tuples(COUNTS, COUNTS, COUNTS, COUNTS), COUNTS, COUNTS)
def test_anthropics_counts_are_disjoint_but_for_thinking(
    prompt: tuple[int, int, int, int], said: int, thought: int
) -> None:
    fresh, cached, five, hour = prompt
    usage = from_anthropic(
        {
            "input_tokens": fresh,
            "cache_read_input_tokens": cached,
            "cache_creation_input_tokens": five + hour,
            "cache_creation": {"ephemeral_5m_input_tokens": five, "ephemeral_1h_input_tokens": hour},
            "output_tokens": said + thought,
            "output_tokens_details": {"thinking_tokens": thought},
            "service_tier": "priority",
        }
    )
    assert usage is not None
    assert (usage.input, usage.cached_input, usage.cache_write_5m, usage.cache_write_1h) == prompt
    assert (usage.output, usage.reasoning, usage.source, usage.tier) == (said, thought, "provider", "priority")


@given(NONSENSE | st.dictionaries(st.sampled_from(["input_tokens", "output_tokens", "cache_creation"]), NONSENSE))
def test_nonsense_from_anthropic_is_no_usage_or_a_sane_one(raw: Any) -> None:
    usage = from_anthropic(raw)
    assert usage is None or min(buckets(usage)) >= 0


def test_a_later_total_of_writes_does_not_count_those_of_an_hour_again() -> None:
    split = {"ephemeral_5m_input_tokens": 10, "ephemeral_1h_input_tokens": 20}
    first = from_anthropic({"input_tokens": 5, "cache_creation_input_tokens": 30, "cache_creation": split})
    later = from_anthropic({"cache_creation_input_tokens": 34, "output_tokens": 9})
    assert later is not None
    both = grown(first, later)
    assert (both.cache_write_5m, both.cache_write_1h, both.input, both.output) == (14, 20, 5, 9)
    assert grown(None, later) == later


def test_anthropics_web_searches_are_a_meter() -> None:
    usage = from_anthropic({"output_tokens": 1, "server_tool_use": {"web_search_requests": 2, "web_fetch_requests": 1}})
    assert usage is not None
    assert usage.meters == {"web_searches": 2}


def test_a_mode_with_prices_of_its_own_is_a_tier() -> None:
    usage = from_anthropic({"input_tokens": 1, "output_tokens": 1, "speed": "fast", "service_tier": "standard"})
    assert usage is not None
    assert usage.tier == "fast"


@given(
    *([st.integers(0, 10_000)] * 8),
)
def test_buckets_of_a_realtime_answer_are_disjoint_and_sum_to_the_total(
    text: int, audio: int, image: int, kept_text: int, kept_audio: int, kept_image: int, said: int, spoken: int
) -> None:
    usage = from_realtime(
        {
            "input_tokens": text + audio + image + kept_text + kept_audio + kept_image,
            "output_tokens": said + spoken,
            "input_token_details": {
                "text_tokens": text + kept_text,
                "audio_tokens": audio + kept_audio,
                "image_tokens": image + kept_image,
                "cached_tokens": kept_text + kept_audio + kept_image,
                "cached_tokens_details": {
                    "text_tokens": kept_text,
                    "audio_tokens": kept_audio,
                    "image_tokens": kept_image,
                },
            },
            "output_token_details": {"text_tokens": said, "audio_tokens": spoken},
        }
    )
    assert usage is not None
    assert (usage.input, usage.audio_in, usage.cached_input) == (text, audio, kept_text + kept_audio)
    assert (usage.output, usage.audio_out, usage.source) == (said, spoken, "provider")
    images = {"image_tokens": image, "cached_image_tokens": kept_image}
    assert usage.meters == {name: count for name, count in images.items() if count}


@given(NONSENSE | st.dictionaries(st.sampled_from(["input_tokens", "output_tokens", "input_token_details"]), NONSENSE))
def test_nonsense_from_a_realtime_session_is_no_usage_or_a_sane_one(raw: Any) -> None:
    usage = from_realtime(raw)
    assert usage is None or min(buckets(usage)) >= 0
