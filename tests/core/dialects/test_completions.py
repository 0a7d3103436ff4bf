"""The completions dialect: prompts of every form, and how an answer becomes a stream and back."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlens import InvalidRequest, Usage, dialects
from qlens.dialects import completions

Body = dict[str, Any]


def request(**fields: Any) -> Body:
    return {"model": "gpt-3.5-turbo-instruct", **fields}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"prompt": None},
        {"prompt": ""},
        {"prompt": ["a", "b"]},
        {"prompt": [1, 2, 3]},
        {"prompt": [[1], [2, 3]]},
        {"prompt": "x", "suffix": "y", "echo": True, "logprobs": 5, "best_of": 2, "max_tokens": 7, "n": 2},
        {"prompt": "x", "stream": True, "stream_options": {"include_usage": True}},
        {"of_tomorrow": [1]},
    ],
)
def test_what_openai_accepts_is_accepted(fields: Body) -> None:
    completions.validate(request(**fields))


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"model": None}, "model", "invalid_type"),
        ({"prompt": 5}, "prompt", "invalid_type"),
        ({"prompt": {}}, "prompt", "invalid_type"),
        ({"prompt": []}, "prompt", "empty_array"),
        ({"prompt": [None]}, "prompt[0]", "invalid_type"),
        ({"prompt": [True]}, "prompt[0]", "invalid_type"),
        ({"prompt": ["a", 1]}, "prompt[1]", "invalid_type"),
        ({"prompt": [1, "a"]}, "prompt[1]", "invalid_type"),
        ({"prompt": [1, True]}, "prompt[1]", "invalid_type"),
        ({"prompt": [1, 2.0]}, "prompt[1]", "invalid_type"),
        ({"prompt": [1, -1]}, "prompt[1]", "integer_below_min_value"),
        ({"prompt": [1, 2**31]}, "prompt[1]", "integer_above_max_value"),
        ({"prompt": [[1], [2, "a"]]}, "prompt[1][1]", "invalid_type"),
        ({"prompt": [[1], []]}, "prompt[1]", "empty_array"),
        ({"prompt": [[1], "a"]}, "prompt[1]", "invalid_type"),
        ({"suffix": 1}, "suffix", "invalid_type"),
        ({"echo": 1}, "echo", "invalid_type"),
        ({"logprobs": True}, "logprobs", "invalid_type"),
        ({"logprobs": 6}, "logprobs", "integer_above_max_value"),
        ({"best_of": 0}, "best_of", "integer_below_min_value"),
        ({"best_of": 1.0}, "best_of", "invalid_type"),
        ({"max_tokens": 0}, "max_tokens", "integer_below_min_value"),
        ({"stream_options": {}}, "stream_options", None),
    ],
)
def test_what_openai_refuses_is_refused_with_its_param_and_code(fields: Body, param: str, code: str | None) -> None:
    with pytest.raises(InvalidRequest) as caught:
        completions.validate(request(**fields))
    assert (caught.value.param, caught.value.code) == (param, code)


def test_the_model_is_required() -> None:
    with pytest.raises(InvalidRequest, match="Missing required parameter: 'model'"):
        completions.validate({"prompt": "x"})


@pytest.mark.parametrize(
    ("fields", "texts"),
    [
        ({"prompt": "a", "suffix": "b"}, ["a", "b"]),
        ({"prompt": ["a", "b"]}, ["a", "b"]),
        ({"prompt": [1, 2]}, []),
        ({"prompt": [[1, 2]]}, []),
        ({}, []),
    ],
)
def test_texts_are_prompts_and_suffix(fields: Body, texts: list[str]) -> None:
    body = request(**fields)
    assert [text for _, text in completions.request_texts(body)] == texts
    for ref, text in completions.request_texts(body):
        dialects.put(body, ref, text + "!")
    assert [text for _, text in completions.request_texts(body)] == [text + "!" for text in texts]


@pytest.mark.parametrize(("prompt", "tokens"), [([1, 2, 3], 3), ([[1, 2], [3]], 3), ([7], 1)])
def test_tokens_are_counted_exactly(prompt: Any, tokens: int) -> None:
    assert completions.input_bound(request(prompt=prompt)) == (tokens, tokens)


@given(st.text(), st.text())
def test_the_hard_bound_has_room_for_every_byte(prompt: str, suffix: str) -> None:
    size = len(prompt.encode()) + len(suffix.encode())
    hard, estimate = completions.input_bound(request(prompt=[prompt], suffix=suffix, temperature=1))
    assert size <= hard <= 6 * size + 64  # JSON writes a control character in six bytes
    assert size // 3 <= estimate <= hard
    assert completions.input_bound(request(prompt=prompt, of_tomorrow=suffix))[0] >= size


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, 1),
        ({"prompt": "a", "n": 3}, 3),
        ({"prompt": "a", "n": 2, "best_of": 5}, 5),
        ({"prompt": ["a", "b"], "n": 3}, 6),
        ({"prompt": [1, 2]}, 1),
        ({"prompt": [[1], [2], [3]], "best_of": 2}, 6),
    ],
)
def test_every_prompt_is_answered_n_or_best_of_times(fields: Body, expected: int) -> None:
    assert completions.GENERATES
    assert completions.choices(request(**fields)) == expected


def test_what_is_asked_is_lowered_to_what_the_model_allows() -> None:
    body = request(max_tokens=500, n=9, best_of=20)
    assert completions.clamp(body, 100, 4) == 100
    assert body == request(max_tokens=100, n=4, best_of=4)
    body = request(max_tokens=None)
    completions.clamp(body, 100, 4)
    assert body == request(max_tokens=None)
    body = request(max_tokens=500, n=2)
    assert completions.clamp(body, None, 4) == 500
    assert body == request(max_tokens=500, n=2)


def test_no_max_tokens_is_no_limit() -> None:
    assert completions.output_bound(request()) == (None, None)
    assert completions.output_bound(request(max_tokens=5)) == ("max_tokens", 5)


def test_media_have_no_place() -> None:
    assert completions.media(request(prompt="x")) == {}


LOGPROBS = st.none() | st.fixed_dictionaries(
    {"tokens": st.lists(st.text(max_size=3), max_size=3), "text_offset": st.lists(st.integers(0, 99), max_size=3)}
)
CHOICES = st.fixed_dictionaries(
    {"text": st.text(max_size=20), "finish_reason": st.none() | st.sampled_from(["stop", "length"])},
    optional={"logprobs": LOGPROBS, "content_filter_results": st.just({"hate": {"filtered": False}})},
)
ANSWERS = st.fixed_dictionaries(
    {
        "id": st.just("cmpl-1"),
        "object": st.just("text_completion"),
        "created": st.integers(1, 2**31),
        "model": st.just("gpt-3.5-turbo-instruct"),
        "choices": st.lists(CHOICES, min_size=1, max_size=3).map(
            lambda choices: [{"index": index, **choice} for index, choice in enumerate(choices)]
        ),
    },
    optional={"usage": st.just({"prompt_tokens": 1, "completion_tokens": 2}), "prompt_filter_results": st.just([{}])},
)


@given(ANSWERS, st.randoms())
def test_an_answer_survives_the_way_through_a_stream_however_it_is_cut(answer: Body, random: Any) -> None:
    events = [orjson.loads(orjson.dumps(event)) for event in completions.explode(answer)]
    assert completions.assemble(events) == answer
    cut = []
    for event in events:
        for strand, ref, text in completions.event_texts(event):
            at = random.randint(0, len(text))
            cut.append(completions.text_event(event, strand, text[:at]))
            dialects.put(event, ref, text[at:])
        cut.append(event)
    assert completions.assemble(cut) == answer


@given(ANSWERS)
def test_the_events_of_an_answer_are_openais(answer: Body) -> None:
    events = list(completions.explode(answer))
    assert {event["object"] for event in events} == {"text_completion"}
    parts = [event["choices"][0] for event in events if event["choices"]]
    assert len(events) - len(parts) == ("usage" in answer)
    assert [part["text"] for part in parts if part["text"]] == [c["text"] for c in answer["choices"] if c["text"]]
    assert [part["finish_reason"] for part in parts[1::2]] == [choice["finish_reason"] for choice in answer["choices"]]


def test_an_answer_tells_its_texts_usage_and_end() -> None:
    answer = {
        "choices": [{"index": 0, "text": "a", "finish_reason": "length"}, {"index": 1, "text": "b"}],
        "usage": {"prompt_tokens": 1, "completion_tokens": 2},
    }
    assert completions.reply_texts(answer) == [(("choices", 0, "text"), "a"), (("choices", 1, "text"), "b")]
    assert [strand for strand, _, _ in completions.event_texts(answer)] == [(0, "text"), (1, "text")]
    assert completions.event_ends(answer) == [0]
    assert completions.finish(answer) == "length"
    assert completions.usage(answer) == Usage(input=1, output=2, source="provider")
    assert completions.text_event({"id": "1", "choices": []}, (1, "text"), "x") == {
        "id": "1",
        "object": "text_completion",
        "choices": [{"index": 1, "text": "x", "finish_reason": None}],
    }
