"""The embeddings dialect: inputs of every form."""

from __future__ import annotations

from typing import Any

import pytest

from qlens import InvalidRequest, Usage, dialects
from qlens.dialects import embeddings

Body = dict[str, Any]


def request(**fields: Any) -> Body:
    return {"model": "text-embedding-3-small", "input": "x", **fields}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"input": ["a", "b"]},
        {"input": ["a"] * 2048},
        {"input": [1, 2]},
        {"input": list(range(8192))},
        {"input": [[1, 2], [3]]},
        {"encoding_format": "base64", "dimensions": 256, "user": "u"},
        {"encoding_format": None, "dimensions": None},
        {"of_tomorrow": {}},
    ],
)
def test_what_openai_accepts_is_accepted(fields: Body) -> None:
    embeddings.validate(request(**fields))


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"input": None}, "input", "invalid_type"),
        ({"input": 1}, "input", "invalid_type"),
        ({"input": ""}, "input", "empty_string"),
        ({"input": []}, "input", "empty_array"),
        ({"input": ["a", ""]}, "input[1]", "empty_string"),
        ({"input": ["a"] * 2049}, "input", "array_above_max_length"),
        ({"input": [[1]] * 2049}, "input", "array_above_max_length"),
        ({"input": [[]]}, "input[0]", "empty_array"),
        ({"input": ["a", [1]]}, "input[1]", "invalid_type"),
        ({"input": [{"text": "a"}]}, "input[0]", "invalid_type"),
        ({"encoding_format": "hex"}, "encoding_format", "invalid_value"),
        ({"encoding_format": 1}, "encoding_format", "invalid_type"),
        ({"dimensions": 0}, "dimensions", "integer_below_min_value"),
        ({"dimensions": 1.0}, "dimensions", "invalid_type"),
        ({"user": 1}, "user", "invalid_type"),
        ({"model": ""}, "model", "empty_string"),
    ],
)
def test_what_openai_refuses_is_refused_with_its_param_and_code(fields: Body, param: str, code: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        embeddings.validate(request(**fields))
    assert (caught.value.param, caught.value.code) == (param, code)


@pytest.mark.parametrize("missing", ["model", "input"])
def test_a_missing_field_is_named(missing: str) -> None:
    body = request()
    del body[missing]
    with pytest.raises(InvalidRequest) as caught:
        embeddings.validate(body)
    assert (caught.value.param, caught.value.code) == (missing, "missing_required_parameter")


def test_texts_are_the_inputs() -> None:
    body = request(input=["a", "b"])
    assert embeddings.request_texts(body) == [(("input", 0), "a"), (("input", 1), "b")]
    dialects.put(body, ("input", 1), "c")
    assert body["input"] == ["a", "c"]
    assert embeddings.request_texts(request()) == [(("input",), "x")]
    assert embeddings.request_texts(request(input=[1, 2])) == []


@pytest.mark.parametrize(
    ("value", "hard", "estimate"),
    [
        ("abc", 3 + 16, 2),
        ("é" * 30, 60 + 16, 21),
        (["abc", "abc"], 2 * (3 + 16), 4),
        ([1, 2, 3], 3, 3),
        ([[1, 2], [3, 4, 5]], 5, 5),
    ],
)
def test_input_is_bounded_by_bytes_and_tokens_exactly(value: Any, hard: int, estimate: int) -> None:
    assert embeddings.input_bound(request(input=value)) == (hard, estimate)


def test_nothing_is_generated() -> None:
    body = request()
    assert embeddings.clamp(body, 1, 1) == 0
    assert body == request()
    assert not embeddings.GENERATES
    assert embeddings.output_bound(body) == (None, 0)
    assert embeddings.choices(body) == 1
    assert embeddings.media(body) == {}


def test_an_answer_has_usage_and_no_text() -> None:
    answer = {
        "object": "list",
        "data": [{"object": "embedding", "index": 0, "embedding": [0.5]}],
        "usage": {"prompt_tokens": 4, "total_tokens": 4},
    }
    assert embeddings.usage(answer) == Usage(input=4, source="provider")
    assert embeddings.finish(answer) is None
    assert embeddings.reply_texts(answer) == []
    assert embeddings.event_texts(answer) == []
    assert embeddings.event_ends(answer) == []
    assert embeddings.assemble(embeddings.explode(answer)) == answer
    with pytest.raises(LookupError):
        embeddings.text_event(answer, (0,), "x")
