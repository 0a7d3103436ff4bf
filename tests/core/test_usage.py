"""Usage: disjoint buckets from what providers say, however wrong it is."""

from __future__ import annotations

import copy
from inspect import signature
from typing import Any

import pytest
from attrs import asdict, evolve, fields
from attrs.exceptions import FrozenInstanceError
from hypothesis import given
from hypothesis import strategies as st

from qlens import NO_USAGE, Usage
from qlens.usage import BUCKETS, from_anthropic, from_openai, from_realtime, from_responses, larger, together

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
    assert isinstance(raw, dict)
    assert usage.source == "provider" or raw.get("completion_tokens") is None
    assert usage.tier is None or isinstance(usage.tier, str)
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


def prompt_of(usage: Usage) -> list[int]:
    return [usage.input, usage.cached_input, usage.cache_write_5m, usage.cache_write_1h, usage.audio_in]


def completion_of(usage: Usage) -> list[int]:
    return [usage.output, usage.reasoning, usage.audio_out]


@given(st.lists(USAGES, min_size=1, max_size=5))
def test_running_totals_are_not_added_up_nor_are_the_parts_of_two_of_them_mixed(said: list[Usage]) -> None:
    so_far: Usage | None = None
    for usage in said:
        so_far = larger(so_far, usage)
    assert so_far is not None
    assert so_far.prompt == max(usage.prompt for usage in said)
    assert so_far.completion == max(usage.completion for usage in said)
    assert prompt_of(so_far) in [prompt_of(usage) for usage in said]
    assert completion_of(so_far) in [completion_of(usage) for usage in said]


@st.composite
def growing(draw: st.DrawFn) -> list[Usage]:
    """Reports of which each says as much as the one before it or more, split in its own way."""
    prompt = completion = 0
    said = []
    for _ in range(draw(st.integers(1, 5))):
        prompt, completion = prompt + draw(st.integers(0, 1000)), completion + draw(st.integers(0, 1000))
        cached = draw(st.integers(0, prompt))
        written = draw(st.integers(0, prompt - cached))
        thought = draw(st.integers(0, completion))
        raw = {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "prompt_tokens_details": {"cached_tokens": cached, "cache_write_tokens": written},
            "completion_tokens_details": {"reasoning_tokens": thought},
        }
        usage = from_openai(raw)
        assert usage is not None
        said.append(usage)
    return said


@given(growing())
def test_of_reports_that_grow_the_last_one_is_the_whole(said: list[Usage]) -> None:
    so_far: Usage | None = None
    for usage in said:
        so_far = larger(so_far, usage)
    last = said[-1]
    assert so_far is not None
    assert (so_far.prompt, so_far.completion, so_far.total) == (last.prompt, last.completion, last.total)
    if last.input < last.prompt:
        assert prompt_of(so_far) == prompt_of(last)
    if last.output < last.completion:
        assert completion_of(so_far) == completion_of(last)


def test_a_report_that_splits_nothing_does_not_undo_one_that_does() -> None:
    split = Usage(input=100, cached_input=900, output=50, reasoning=450, source="provider")
    assert larger(split, Usage(input=1000, output=500, source="provider")) == split
    assert larger(Usage(input=1000, output=500, source="provider"), split) == split


def test_images_of_a_prompt_that_are_told_later_are_not_counted_twice() -> None:
    early = Usage(input=100, output=1, source="provider")
    later = Usage(input=40, output=9, meters={"image_tokens": 60}, source="provider")
    assert larger(early, later) == later
    assert larger(later, early) == later


def test_what_the_vendor_leaves_out_of_a_later_event_has_not_changed() -> None:
    first = from_anthropic({"input_tokens": 1000, "output_tokens": 1, "service_tier": "priority"})
    told = {"input_tokens": 100, "cache_read_input_tokens": 900, "output_tokens": 200}
    second = larger(first, from_anthropic(told, first) or NO_USAGE)
    assert (second.input, second.cached_input, second.output, second.tier) == (100, 900, 200, "priority")
    said = {"output_tokens": 500, "output_tokens_details": {"thinking_tokens": 450}}
    third = larger(second, from_anthropic(said, second) or NO_USAGE)
    assert (third.input, third.cached_input, third.output, third.reasoning) == (100, 900, 50, 450)
    zeros = {"input_tokens": 0, "cache_read_input_tokens": 0, "output_tokens": 600}
    assert larger(third, from_anthropic(zeros, third) or NO_USAGE).prompt == 1000


@pytest.mark.parametrize(
    ("raw", "completion", "source"),
    [
        ({"prompt_tokens": 10, "completion_tokens": None, "total_tokens": 15}, 5, "provider"),
        ({"prompt_tokens": 10, "total_tokens": 15}, 5, "provider"),
        ({"prompt_tokens": 10, "total_tokens": 9}, 0, "estimated"),
        ({"prompt_tokens": 10, "completion_tokens": None, "total_tokens": None}, 0, "estimated"),
        ({"prompt_tokens": 10}, 0, "estimated"),
    ],
)
def test_a_completion_that_is_not_counted_is_told_by_the_total_or_not_believed(
    raw: dict[str, Any], completion: int, source: str
) -> None:
    for usage in (from_openai(raw), from_responses({name.replace("prompt", "input"): raw[name] for name in raw})):
        assert usage is not None
        assert (usage.prompt, usage.completion, usage.source) == (10, completion, source)
    assert from_openai(raw, generates=False) == Usage(input=10, source="provider")


def test_the_sum_of_usages_adds_every_bucket_and_is_as_sure_as_the_least_sure() -> None:
    one = evolve(evenly(1), meters={"images": 1}, source="provider")
    other = evolve(evenly(2), meters={"images": 2, "seconds": 3}, source="partial", tier="flex")
    both = together([one, other])
    assert buckets(both) == [3] * len(BUCKETS)
    assert (dict(both.meters), both.source, both.tier) == ({"images": 3, "seconds": 3}, "partial", "flex")
    assert together([]) == NO_USAGE
    assert together([one]) is one


def test_a_usage_is_made_as_attrs_would_make_it() -> None:
    names = [field.name for field in fields(Usage)]
    assert list(signature(Usage).parameters) == names == list(vars(NO_USAGE))
    values: list[Any] = [*range(8), {"images": 1}, "provider", "flex"]
    made = Usage(*values)
    assert [getattr(made, name) for name in names] == values
    assert made == evolve(NO_USAGE, **dict(zip(names, values, strict=True))) == copy.deepcopy(made)
    assert [getattr(Usage(), field.name) for field in fields(Usage) if field.name != "meters"] == [
        field.default for field in fields(Usage) if field.name != "meters"
    ]
    assert Usage().meters == {}
    assert Usage().meters is not Usage().meters
    with pytest.raises(FrozenInstanceError):
        made.input = 1  # type: ignore[misc]


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
    both = from_anthropic({"cache_creation_input_tokens": 34, "output_tokens": 9}, first)
    assert both is not None
    assert (both.cache_write_5m, both.cache_write_1h, both.input, both.output) == (14, 20, 5, 9)


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
