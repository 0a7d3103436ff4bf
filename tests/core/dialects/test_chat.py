"""The chat dialect: what is refused, what counts, and how an answer becomes a stream and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlens import InvalidRequest, Usage, dialects
from qlens.dialects import chat

Body = dict[str, Any]

HELLO = [{"role": "user", "content": "hello"}]
TOOL_CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def request(**fields: Any) -> Body:
    return {"model": "gpt-4o-mini", "messages": HELLO, **fields}


def refusal(body: Body) -> tuple[str, str | None, str | None]:
    with pytest.raises(InvalidRequest) as caught:
        chat.validate(body)
    return caught.value.message, caught.value.param, caught.value.code


# --- validate ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"messages": [{"role": "system", "content": "s"}, {"role": "developer", "content": "d"}, *HELLO]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}], "name": "ann"}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://x"}}]}]},
        {
            "messages": [
                {"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}]}
            ]
        },
        {"messages": [{"role": "user", "content": [{"type": "file", "file": {"file_id": "f"}}]}]},
        {"messages": [{"role": "user", "content": [{"type": "of_tomorrow", "anything": [1]}]}]},
        {"messages": [{"role": "assistant"}, {"role": "assistant", "content": None, "tool_calls": [TOOL_CALL]}]},
        {"messages": [{"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": ""}}]},
        {"messages": [{"role": "tool", "tool_call_id": "call_1", "content": "42"}]},
        {"messages": [{"role": "function", "name": "f", "content": None}]},
        {"messages": [{"role": "assistant", "content": "x", "reasoning_content": "because", "audio": {"id": "a"}}]},
        {"stream": True, "stream_options": {"include_usage": True}},
        {"stream": False, "stream_options": None},
        {"temperature": 0, "top_p": 1.0, "presence_penalty": -2, "frequency_penalty": 2},
        {"max_tokens": 1, "max_completion_tokens": 2**31 - 1, "n": 128, "seed": -(2**63), "top_logprobs": 20},
        {"stop": "x"},
        {"stop": ["a", "b", "c", "d"]},
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"a": {"b": []}}, "strict": None}}]},
        {"tools": [{"type": "custom", "custom": {"name": "c"}}, {"type": "of_tomorrow"}]},
        {"functions": [{"name": "f"}], "function_call": {"name": "f"}},
        {"tool_choice": "auto", "parallel_tool_calls": False},
        {"tool_choice": {"type": "function", "function": {"name": "f"}}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {}}}},
        {"response_format": {"type": "json_object"}},
        {"prediction": {"type": "content", "content": [{"type": "text", "text": "x"}]}},
        {"logit_bias": {"50256": -100}, "metadata": {"a": "b"}, "modalities": ["text"], "logprobs": True},
        {"of_tomorrow": {"deep": [[[]]]}, "top_k": "anything"},
    ],
)
def test_what_openai_accepts_is_accepted_and_left_alone(fields: Body) -> None:
    body = request(**fields)
    before = deepcopy(body)
    chat.validate(body)
    assert body == before


def test_null_is_absent_for_every_optional_field() -> None:
    chat.validate(request(**dict.fromkeys(OPTIONAL)))


OPTIONAL = [
    "audio",
    "frequency_penalty",
    "function_call",
    "functions",
    "logit_bias",
    "logprobs",
    "max_completion_tokens",
    "max_tokens",
    "metadata",
    "modalities",
    "n",
    "parallel_tool_calls",
    "prediction",
    "presence_penalty",
    "prompt_cache_key",
    "reasoning_effort",
    "response_format",
    "safety_identifier",
    "seed",
    "service_tier",
    "stop",
    "store",
    "stream",
    "stream_options",
    "temperature",
    "tool_choice",
    "tools",
    "top_logprobs",
    "top_p",
    "user",
    "verbosity",
    "web_search_options",
]


@pytest.mark.parametrize("name", OPTIONAL)
def test_every_known_field_has_a_type(name: str) -> None:
    # No field takes both an array of arrays and a decimal number.
    codes = [code_of({**request(), name: value}) for value in ([[True]], 0.5)]
    assert "invalid_type" in codes, f"{name} takes anything"


def code_of(body: Body) -> str | None:
    try:
        chat.validate(body)
    except InvalidRequest as error:
        return error.code
    return None


@pytest.mark.parametrize("missing", ["model", "messages"])
def test_a_missing_field_is_named(missing: str) -> None:
    body = request()
    del body[missing]
    assert refusal(body) == (f"Missing required parameter: '{missing}'.", missing, "missing_required_parameter")


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"model": None}, "model", "invalid_type"),
        ({"model": 4}, "model", "invalid_type"),
        ({"model": ""}, "model", "empty_string"),
        ({"model": "m" * 257}, "model", "string_above_max_length"),
        ({"messages": None}, "messages", "invalid_type"),
        ({"messages": "hello"}, "messages", "invalid_type"),
        ({"messages": {}}, "messages", "invalid_type"),
        ({"messages": []}, "messages", "empty_array"),
        ({"messages": ["hello"]}, "messages[0]", "invalid_type"),
        ({"messages": [*HELLO, {"content": "x"}]}, "messages[1].role", "missing_required_parameter"),
        ({"messages": [{"role": None, "content": "x"}]}, "messages[0].role", "invalid_type"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", "invalid_value"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "missing_required_parameter"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "invalid_type"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "invalid_type"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content", "empty_array"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "messages[0].content[0]", "invalid_type"),
        (
            {"messages": [{"role": "user", "content": [{}]}]},
            "messages[0].content[0].type",
            "missing_required_parameter",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": None}]}]},
            "messages[0].content[0].text",
            "invalid_type",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": None}}]}]},
            "messages[0].content[0].image_url.url",
            "invalid_type",
        ),
        ({"messages": [{"role": "user", "content": "x", "name": 1}]}, "messages[0].name", "invalid_type"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id", "missing_required_parameter"),
        (
            {
                "messages": [
                    {"role": "assistant", "tool_calls": [{**TOOL_CALL, "function": {"name": "f", "arguments": {}}}]}
                ]
            },
            "messages[0].tool_calls[0].function.arguments",
            "invalid_type",
        ),
        ({"tools": [{"type": "function"}]}, "tools[0].function", "missing_required_parameter"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name", "missing_required_parameter"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "missing_required_parameter"),
        ({"max_tokens": 0}, "max_tokens", "integer_below_min_value"),
        ({"max_tokens": -1}, "max_tokens", "integer_below_min_value"),
        ({"max_tokens": 10**10}, "max_tokens", "integer_above_max_value"),
        ({"max_tokens": "100"}, "max_tokens", "invalid_type"),
        ({"max_tokens": 1.0}, "max_tokens", "invalid_type"),
        ({"max_tokens": 1e23}, "max_tokens", "invalid_type"),
        ({"max_tokens": True}, "max_tokens", "invalid_type"),
        ({"max_completion_tokens": 1.5}, "max_completion_tokens", "invalid_type"),
        ({"n": 0}, "n", "integer_below_min_value"),
        ({"n": 129}, "n", "integer_above_max_value"),
        ({"n": True}, "n", "invalid_type"),
        ({"seed": 2**63}, "seed", "integer_above_max_value"),
        ({"seed": 1e23}, "seed", "invalid_type"),
        ({"top_logprobs": 21}, "top_logprobs", "integer_above_max_value"),
        ({"temperature": "hot"}, "temperature", "invalid_type"),
        ({"temperature": False}, "temperature", "invalid_type"),
        ({"temperature": 2.1}, "temperature", "decimal_above_max_value"),
        ({"temperature": -0.1}, "temperature", "decimal_below_min_value"),
        ({"temperature": float("nan")}, "temperature", "decimal_above_max_value"),
        ({"top_p": 2}, "top_p", "decimal_above_max_value"),
        ({"logit_bias": {"7": 101}}, "logit_bias.7", "decimal_above_max_value"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop", "array_above_max_length"),
        ({"stop": [1]}, "stop[0]", "invalid_type"),
        ({"stream": "true"}, "stream", "invalid_type"),
        ({"stream_options": {"include_usage": 1}, "stream": True}, "stream_options.include_usage", "invalid_type"),
        ({"stream_options": {}}, "stream_options", None),
        ({"stream_options": {}, "stream": False}, "stream_options", None),
        ({"metadata": {"a": 1}}, "metadata.a", "invalid_type"),
    ],
)
def test_what_openai_refuses_is_refused_with_its_param_and_code(fields: Body, param: str, code: str | None) -> None:
    message, *rest = refusal(request(**fields))
    assert rest == [param, code]
    assert param in message or code == "invalid_value"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"temperature": "hot"},
            "Invalid type for 'temperature': expected a number, but got a string instead.",
        ),
        ({"n": 1.5}, "Invalid type for 'n': expected an integer, but got a decimal number instead."),
        (
            {"max_tokens": 0},
            "Invalid 'max_tokens': integer below minimum value. Expected a value >= 1, but got 0 instead.",
        ),
        (
            {"messages": []},
            "Invalid 'messages': empty array. Expected an array with minimum length 1, but got an empty array instead.",
        ),
        (
            {"messages": [{"role": "robot", "content": ""}]},
            "Invalid value: 'robot'. Supported values are: "
            "'system', 'developer', 'user', 'assistant', 'tool', 'function'.",
        ),
    ],
)
def test_messages_read_like_openais(fields: Body, message: str) -> None:
    assert refusal(request(**fields))[0] == message


def test_a_long_wrong_value_is_not_echoed_whole() -> None:
    assert len(refusal(request(messages=[{"role": "x" * 10_000}]))[0]) < 300


@pytest.mark.parametrize(
    "place",
    [
        lambda deep: {"of_tomorrow": deep},
        lambda deep: {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"a": deep}}}]},
        lambda deep: {"messages": [{"role": "user", "content": "x", "extra": deep}]},
        lambda deep: {"messages": [{"role": "user", "content": [{"type": "x", "y": deep}]}]},
        lambda deep: {"tool_choice": {"x": deep}},
    ],
)
def test_what_could_not_be_written_again_is_refused(place: Callable[[Any], Body]) -> None:
    deep: Any = []
    for _ in range(100):
        deep = [deep]
    chat.validate(request(**place(deep)))
    for _ in range(900):
        deep = [deep]
        # Room for what a dialect puts around it when it is translated.
        if code_of(request(**place(deep))) is None:
            orjson.dumps([[[[[[[[request(**place(deep))]]]]]]]])
    assert refusal(request(**place(deep)))[2] == "invalid_value"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)


@given(
    st.dictionaries(st.sampled_from([*OPTIONAL, "model", "messages", "x"]), JSON)
    | st.lists(
        st.fixed_dictionaries(
            {"role": st.sampled_from(["user", "assistant", "tool"])}, optional={"content": JSON, "tool_calls": JSON}
        )
    ).map(lambda messages: request(messages=messages))
)
def test_any_json_is_accepted_or_refused_in_openais_way(body: Body) -> None:
    if code_of(body) is not None:
        assert refusal(body)[1]
        return
    chat.clamp(body, 100, 2)
    hard, estimate = chat.input_bound(body)
    assert 0 < estimate <= hard
    assert chat.choices(body) <= 2
    assert chat.request_texts(body) is not None
    assert chat.measured(body, chat.validate(body)) == (hard, estimate, chat.media(body))


# --- what is read and bounded ------------------------------------------------------------------

PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA", "detail": "low"}}
CONVERSATION = request(
    messages=[
        {"role": "system", "content": "be kind"},
        {"role": "user", "name": "ann", "content": [{"type": "text", "text": "look"}, PICTURE]},
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": "hm",
            "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"q":1}'}}],
        },
        {"role": "assistant", "tool_calls": [{"id": "d", "type": "custom", "custom": {"name": "g", "input": "raw"}}]},
        {"role": "tool", "tool_call_id": "c", "content": "result"},
        {
            "role": "assistant",
            "content": [{"type": "refusal", "refusal": "no"}],
            "function_call": {"name": "f", "arguments": "{}"},
        },
    ],
    tools=[{"type": "function", "function": {"name": "f", "description": "does f"}}],
    prediction={"type": "content", "content": "guess"},
    metadata={"team": "a"},
)
NAMES = {"f", "g"}


def test_texts_are_what_the_model_reads_and_names_are_fixed() -> None:
    found = chat.request_texts(CONVERSATION)
    assert [text for ref, text in found if type(ref) is not dialects.Fixed] == [
        "be kind", "look", "ann", "hm", "1", "raw", "result", "no", "guess", "does f"
    ]  # fmt: skip
    assert {text for ref, text in found if type(ref) is dialects.Fixed} == {*NAMES, "q"}


def test_a_text_is_put_back_where_it_was_found() -> None:
    body = deepcopy(CONVERSATION)
    for ref, text in chat.request_texts(body):
        if type(ref) is not dialects.Fixed:
            dialects.put(body, ref, text.upper())
    assert [text for _, text in chat.request_texts(body)] == [
        text if type(ref) is dialects.Fixed else text.upper() for ref, text in chat.request_texts(CONVERSATION)
    ]
    assert body["tools"] == [{"type": "function", "function": {"name": "f", "description": "DOES F"}}]


def test_what_a_model_reads_of_a_schema_is_found_and_what_it_does_not_is_left_out() -> None:
    schema = {
        "type": "object",
        "title": "T",
        "required": ["type"],
        "properties": {"type": {"type": ["string", "null"], "enum": ["e", 1], "description": "d", "default": "x"}},
    }
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema}, "cache_control": {"ttl": "5m"}}]
    found = [(text, type(ref) is dialects.Fixed) for ref, text in chat.request_texts(request(tools=tools))[1:]]
    assert sorted(found) == [
        ("T", False), ("d", False), ("e", True), ("f", True), ("type", True), ("type", True), ("x", True)
    ]  # fmt: skip


def test_what_a_file_is_called_is_read_and_bounded() -> None:
    def asked(name: str) -> dict[str, Any]:
        paper = {"type": "file", "file": {"file_id": "unread", "filename": name}}
        return request(messages=[{"role": "user", "content": [paper]}])

    assert chat.request_texts(asked("a.pdf")) == [(("messages", 0, "content", 0, "file", "filename"), "a.pdf")]
    assert chat.input_bound(asked("é" * 500))[0] - chat.input_bound(asked(""))[0] == 1000


def test_media_are_counted_apart_and_not_as_text() -> None:
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 10_000}}
    sound = {"type": "input_audio", "input_audio": {"data": "A" * 10_000, "format": "wav"}}
    paper = {"type": "file", "file": {"file_data": "A" * 10_000}}
    body = request(
        messages=[
            {"role": "user", "content": [picture, picture, sound, paper]},
            {"role": "assistant", "content": None, "audio": {"id": "audio_1"}},
        ]
    )
    assert chat.media(body) == {"images": 2, "audio": 2, "files": 1}
    assert chat.input_bound(body)[0] < 500
    assert chat.media(request()) == {}


def called(arguments: str) -> Body:
    return {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": arguments}}


@pytest.mark.parametrize("text", ["a" * 300, "é" * 300, "😀" * 300, "\n\t" * 150])
@pytest.mark.parametrize(
    "place",
    [
        lambda text: {"messages": [{"role": "user", "content": text}]},
        lambda text: {"messages": [{"role": "user", "content": [{"type": "text", "text": text}]}]},
        lambda text: {"messages": [{"role": "user", "content": "", "name": text}]},
        lambda text: {"messages": [{"role": "assistant", "tool_calls": [called(text)]}]},
        lambda text: {"messages": [{"role": "assistant", "reasoning_content": text}]},
        lambda text: {"tools": [{"type": "function", "function": {"name": "f", "description": text}}]},
        lambda text: {"tools": [{"type": "function", "function": {"name": "f", "parameters": {text: 1}}}]},
        lambda text: {"functions": [{"name": "f", "description": text}]},
        lambda text: {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"d": text}}}},
        lambda text: {"prediction": {"type": "content", "content": text}},
        lambda text: {"documents": [text]},
    ],
)  # fmt: skip
def test_the_hard_bound_has_room_for_every_byte_a_model_may_read(place: Callable[[str], Body], text: str) -> None:
    empty, full = chat.input_bound(request(**place(""))), chat.input_bound(request(**place(text)))
    size = len(text.encode())
    assert full[0] - empty[0] >= size
    assert full[1] - empty[1] >= size // 3


def test_every_message_and_tool_has_room_for_what_a_chat_template_adds() -> None:
    one = chat.input_bound(request())
    two = chat.input_bound(request(messages=HELLO * 2))
    assert two[0] - one[0] == 16 + len("user") + len("hello")
    tools = [{"type": "x"}] * 2
    assert chat.input_bound(request(tools=tools))[0] - one[0] == 32 + len(orjson.dumps(tools))


@pytest.mark.parametrize("text", ["hello", "héllo", "\ud800", "😀" * 5])
def test_what_the_check_saw_of_plain_messages_is_what_is_measured(text: str) -> None:
    plain = [{"role": role, "content": text} for role in ("system", "developer", "user", "assistant")]
    body = request(messages=plain, of_tomorrow=["x"])
    assert chat.validate(body) is not None
    assert chat.measured(body, chat.validate(body)) == (*chat.input_bound(body), {})
    body["messages"] = [*plain, {"role": "user", "content": [PICTURE]}]
    assert chat.validate(body) is None
    assert chat.measured(body, chat.validate(body)) == (*chat.input_bound(body), {"images": 1})


def test_settings_are_no_input() -> None:
    assert chat.input_bound(request(temperature=1, metadata={"a": "b" * 100}, user="c" * 100)) == chat.input_bound(
        request()
    )


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, (None, None)),
        ({"max_tokens": None}, (None, None)),
        ({"max_tokens": 5}, ("max_tokens", 5)),
        ({"max_completion_tokens": 6}, ("max_completion_tokens", 6)),
        ({"max_tokens": 5, "max_completion_tokens": 6}, ("max_completion_tokens", 5)),
        ({"max_tokens": 7, "max_completion_tokens": 6}, ("max_completion_tokens", 6)),
    ],
)
def test_of_two_output_limits_the_smaller_counts(fields: Body, expected: tuple[str | None, int | None]) -> None:
    assert chat.output_bound(request(**fields)) == expected


@pytest.mark.parametrize(
    ("fields", "clamped"),
    [
        ({}, {}),
        ({"max_tokens": 50, "n": 2}, {"max_tokens": 50, "n": 2}),
        ({"max_tokens": 500, "n": 9}, {"max_tokens": 100, "n": 4}),
        ({"max_completion_tokens": 500}, {"max_completion_tokens": 100}),
        ({"max_tokens": 500, "max_completion_tokens": 60}, {"max_tokens": 60, "max_completion_tokens": 60}),
        ({"max_tokens": 500, "max_completion_tokens": None}, {"max_tokens": 100, "max_completion_tokens": None}),
    ],
)
def test_what_is_asked_is_lowered_under_the_clients_own_names(fields: Body, clamped: Body) -> None:
    body = request(**fields)
    assert chat.clamp(body, 100, 4) == chat.output_bound(body)[1]
    assert body == request(**clamped)


def test_without_a_limit_of_the_model_tokens_stay_as_asked() -> None:
    body = request(max_tokens=10**9)
    chat.clamp(body, None, 128)
    assert body == request(max_tokens=10**9)


def test_choices_are_n() -> None:
    assert chat.GENERATES
    assert [chat.choices(request(n=n)) for n in (None, 1, 3)] == [1, 1, 3]
    assert chat.choices(request()) == 1


# --- the answer --------------------------------------------------------------------------------

WORDS = st.text(max_size=20)
TEXTS = st.none() | WORDS
LOGPROBS = st.none() | st.fixed_dictionaries(
    {"content": st.none() | st.lists(st.fixed_dictionaries({"token": WORDS}), max_size=2), "refusal": st.none()}
)
CALLS = st.fixed_dictionaries(
    {
        "id": st.text("abc", min_size=1),
        "type": st.just("function"),
        "function": st.fixed_dictionaries({"name": st.text("fg", min_size=1), "arguments": WORDS}),
    }
) | st.fixed_dictionaries(
    {
        "id": st.text("abc", min_size=1),
        "type": st.just("custom"),
        "custom": st.fixed_dictionaries({"name": st.text("fg", min_size=1), "input": WORDS}),
    }
)
MESSAGES = st.fixed_dictionaries(
    {"role": st.just("assistant"), "content": TEXTS},
    optional={
        "refusal": TEXTS,
        "reasoning_content": TEXTS,
        "field_of_tomorrow": TEXTS,
        "annotations": st.lists(
            st.fixed_dictionaries({"type": st.just("url_citation"), "n": st.integers(0, 9)}), max_size=2
        ),
        "tool_calls": st.none() | st.lists(CALLS, max_size=3),
        "function_call": st.none() | st.fixed_dictionaries({"name": WORDS, "arguments": WORDS}),
        "audio": st.none() | st.fixed_dictionaries({"id": WORDS, "data": WORDS, "transcript": WORDS}),
    },
)
CHOICES = st.fixed_dictionaries(
    {"message": MESSAGES, "finish_reason": st.none() | st.sampled_from(["stop", "length", "tool_calls"])},
    optional={
        "logprobs": LOGPROBS,
        "content_filter_results": st.fixed_dictionaries({"hate": st.just({"filtered": False})}),
    },
)
ANSWERS = st.fixed_dictionaries(
    {
        "id": st.just("chatcmpl-1"),
        "object": st.just("chat.completion"),
        "created": st.integers(1, 2**31),
        "model": st.just("gpt-4o-mini"),
        "choices": st.lists(CHOICES, min_size=1, max_size=3).map(
            lambda choices: [{"index": index, **choice} for index, choice in enumerate(choices)]
        ),
    },
    optional={
        "system_fingerprint": st.none() | st.just("fp_1"),
        "service_tier": st.just("default"),
        "prompt_filter_results": st.just([{"prompt_index": 0}]),
        "usage": st.fixed_dictionaries(
            {"prompt_tokens": st.integers(0, 9), "completion_tokens": st.integers(0, 9)},
            optional={"prompt_tokens_details": st.just({"cached_tokens": 1})},
        ),
    },
)  # fmt: skip


@given(ANSWERS)
def test_an_answer_survives_the_way_through_a_stream(answer: Body) -> None:
    before = deepcopy(answer)
    events = [orjson.loads(orjson.dumps(event)) for event in chat.explode(answer)]
    assert chat.assemble(events) == before == answer


@given(ANSWERS)
def test_the_events_of_an_answer_are_openais(answer: Body) -> None:
    events = list(chat.explode(answer))
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    shared = ("id", "created", "model", "system_fingerprint", "service_tier")
    assert all(event.get(name) == answer.get(name) for event in events for name in shared)
    assert [event["prompt_filter_results"] for event in events if "prompt_filter_results" in event] == (
        [answer["prompt_filter_results"]] if "prompt_filter_results" in answer else []
    )
    if answer.get("usage"):
        assert (events[-1]["choices"], events[-1]["usage"]) == ([], answer["usage"])
    parts = [event["choices"][0] for event in events if event["choices"]]
    for choice in answer["choices"]:
        first, *others, last = [part for part in parts if part["index"] == choice["index"]]
        assert first["delta"]["role"] == "assistant"
        assert (last["delta"], last["finish_reason"]) == ({}, choice["finish_reason"])
        assert all(part["finish_reason"] is None for part in (first, *others))


@given(ANSWERS, st.data())
def test_an_answer_does_not_depend_on_how_its_stream_is_cut_and_mixed(answer: Body, data: st.DataObject) -> None:
    usage = [event for event in chat.explode(answer) if not event["choices"]]
    queues = [
        [
            piece
            for event in chat.explode({**answer, "choices": [choice]})
            if event["choices"]
            for piece in cut(event, data)
        ]
        for choice in answer["choices"]
    ]
    mixed = []
    while queue := data.draw(st.sampled_from(left)) if (left := [queue for queue in queues if queue]) else None:
        mixed.append(queue.pop(0))
    assert chat.assemble([*mixed, *usage]) == answer


def cut(event: Body, data: st.DataObject) -> Iterator[Body]:
    """The same delta in two events, where it has a text that can be cut."""
    texts = [(ref, text) for _, ref, text in chat.event_texts(event) if text]
    if len(event["choices"][0]["delta"]) > 1 or not texts:
        yield event
        return
    ref, text = texts[0]
    at = data.draw(st.integers(0, len(text)))
    strand = chat.event_texts(event)[0][0]
    yield chat.text_event(event, strand, text[:at])
    rest = deepcopy(event)
    dialects.put(rest, ref, text[at:])
    yield rest


def chunk(index: int = 0, finish: str | None = None, **delta: Any) -> Body:
    return {"id": "1", "choices": [{"index": index, "delta": delta, "finish_reason": finish}]}


def test_tool_calls_are_put_together_by_index() -> None:
    def call(index: int, arguments: str, **more: Any) -> Body:
        return chunk(tool_calls=[{"index": index, **more, "function": {"arguments": arguments}}])

    events = [
        chunk(tool_calls=[{"index": 1, "id": "b", "type": "function", "function": {"name": "g", "arguments": ""}}]),
        chunk(tool_calls=[{"index": 0, "id": "a", "type": "function", "function": {"name": "f", "arguments": ""}}]),
        call(0, '{"x"'),
        call(1, "{"),
        call(0, ":1}", id="a", type="function"),
        call(1, "}"),
        chunk(finish="tool_calls"),
    ]
    assert chat.assemble(events)["choices"][0]["message"]["tool_calls"] == [
        {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"x":1}'}},
        {"id": "b", "type": "function", "function": {"name": "g", "arguments": "{}"}},
    ]


def test_tool_calls_without_an_index_start_with_their_id() -> None:
    events = [
        chunk(tool_calls=[{"id": "a", "function": {"name": "f", "arguments": "1"}}]),
        chunk(tool_calls=[{"function": {"arguments": "2"}}]),
        chunk(tool_calls=[{"id": "b", "function": {"name": "g", "arguments": "3"}}]),
    ]
    calls = chat.assemble(events)["choices"][0]["message"]["tool_calls"]
    assert [(call["id"], call["function"]["arguments"]) for call in calls] == [("a", "12"), ("b", "3")]


def test_azures_extras_do_not_disturb() -> None:
    prompt = [{"prompt_index": 0}]
    late = {"index": 0, "content_filter_offsets": {"check_offset": 1}, "content_filter_results": {"hate": {}}}
    last = {"index": 0, "delta": {}, "finish_reason": "stop", "content_filter_results": {"violence": {}}}
    head = {"id": "x", "created": 9, "model": "m"}
    events: list[Body] = [
        {"id": "", "object": "", "created": 0, "model": "", "choices": [], "prompt_filter_results": prompt},
        {**head, "choices": [{"index": 0, "delta": {"role": "assistant", "content": "a"}}]},
        {**head, "choices": [last]},
        {**head, "choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 2}},
        {"id": "", "object": "", "created": 0, "model": "", "choices": [late]},
    ]
    answer = chat.assemble(events)
    assert (answer["id"], answer["created"], answer["model"]) == ("x", 9, "m")
    assert answer["prompt_filter_results"] == [{"prompt_index": 0}]
    assert answer["choices"] == [
        {
            "index": 0,
            "finish_reason": "stop",
            "content_filter_offsets": {"check_offset": 1},
            "content_filter_results": {"violence": {}, "hate": {}},
            "message": {"role": "assistant", "content": "a"},
        }
    ]


def test_a_stream_without_a_role_is_the_assistants() -> None:
    message = chat.assemble([chunk(content="a"), chunk(finish="stop")])["choices"][0]["message"]
    assert message == {"role": "assistant", "content": "a"}


def test_usage_is_taken_from_any_event_and_the_largest_counts() -> None:
    events = [
        {**chunk(content="a"), "usage": {"prompt_tokens": 5, "completion_tokens": 1, "details": {"x": 1}}},
        {**chunk(content="b", finish="stop"), "usage": None},
        {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 2, "details": {"x": 0}}},
        {"choices": [], "usage": {"prompt_tokens": 0, "completion_tokens": 0}},
    ]
    answer = chat.assemble(events)
    assert answer["usage"] == {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7, "details": {"x": 0}}
    assert answer["choices"][0]["message"]["content"] == "ab"


@pytest.mark.parametrize(
    "event",
    [
        {},
        {"choices": None},
        {"choices": [None]},
        {"choices": [{}]},
        {"choices": [{"index": "0", "delta": []}]},
        {"choices": [{"index": 0, "delta": {"content": 5}}]},
        {"choices": [{"index": 0, "delta": {"tool_calls": 7}}]},
        {"choices": [{"index": 0, "delta": {"tool_calls": [None, {"index": 10**12}]}}]},
        {"choices": [{"index": 0, "delta": {"tool_calls": [{"index": 0, "function": None}]}}]},
        {"choices": [{"index": 0, "message": {"content": "x"}}]},
        {"usage": "much"},
        {"choices": [{"index": 0, "logprobs": []}]},
    ],
)
def test_odd_events_are_no_error(event: Body) -> None:
    chat.assemble([chunk(content="a"), event, chunk(finish="stop")])
    assert chat.event_texts(event) == []
    assert chat.event_ends(event) == []
    assert chat.usage(event) is None
    list(chat.explode(event))


@pytest.mark.parametrize("message", [None, "x", {}, {"tool_calls": "x"}, {"tool_calls": [None, {}, {"function": 1}]}])
def test_an_odd_answer_becomes_a_stream_all_the_same(message: object) -> None:
    events = list(chat.explode({"choices": [{"message": message, "finish_reason": "stop"}]}))
    assert chat.event_ends(events[-1]) == [0]
    assert chat.assemble(events)["choices"][0]["finish_reason"] == "stop"


def test_usage_and_finish_are_read_with_the_tier() -> None:
    body = {
        "service_tier": "flex",
        "usage": {"prompt_tokens": 3, "completion_tokens": 4},
        "choices": [{"index": 0, "finish_reason": "length"}, {"index": 1, "finish_reason": "stop"}],
    }
    assert chat.usage(body) == Usage(input=3, output=4, source="provider", tier="flex")
    assert chat.finish(body) == "length"
    assert chat.finish({"choices": []}) is None
    odds: list[Any] = [None, "stop", {"0": {"finish_reason": "stop"}}, [None, "stop"], [[]]]
    for odd in (*odds, [{}, {"finish_reason": "stop"}]):
        assert chat.finish({"choices": odd}) is None
    assert chat.finish({"choices": [{"finish_reason": 1}, {"finish_reason": "stop"}]}) is None
    assert chat.finish({"choices": [None, 3, {"finish_reason": "stop"}]}) == "stop"
    assert chat.usage({"usage": None}) is None


def test_the_texts_of_an_answer_are_all_that_is_shown() -> None:
    message = {
        "role": "assistant",
        "content": "c",
        "refusal": None,
        "reasoning_content": "r",
        "tool_calls": [{"id": "i", "type": "function", "function": {"name": "n", "arguments": "a"}}],
        "audio": {"id": "i", "data": "AAAA", "transcript": "t"},
    }
    assert [text for _, text in chat.reply_texts({"choices": [{"index": 0, "message": message}]})] == [
        "c",
        "r",
        "a",
        "t",
    ]


def test_deltas_are_listed_by_strand() -> None:
    event = {
        "choices": [
            {"index": 2, "delta": {"role": "assistant", "content": "c", "refusal": "r"}, "finish_reason": None},
            {
                "index": 1,
                "delta": {"tool_calls": [{"index": 3, "id": "x", "function": {"name": "f", "arguments": "a"}}]},
            },
            {"index": 0, "delta": {}, "finish_reason": "stop"},
        ]
    }
    assert chat.event_texts(event) == [
        ((2, "content"), ("choices", 0, "delta", "content"), "c"),
        ((2, "refusal"), ("choices", 0, "delta", "refusal"), "r"),
        (
            (1, "tool_calls", 3, "function", "arguments"),
            ("choices", 1, "delta", "tool_calls", 0, "function", "arguments"),
            "a",
        ),
    ]
    assert chat.event_ends(event) == [0]
    told = chat.text_event({**event, "id": "1", "model": "m"}, (1, "tool_calls", 3, "function", "arguments"), "b")
    assert told == {
        "id": "1",
        "object": "chat.completion.chunk",
        "model": "m",
        "choices": [
            {
                "index": 1,
                "delta": {"tool_calls": [{"index": 3, "function": {"arguments": "b"}}]},
                "finish_reason": None,
            }
        ],
    }
