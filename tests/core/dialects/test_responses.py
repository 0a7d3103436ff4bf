"""The dialect of Responses: what is refused, what counts, and how an answer becomes a stream and back."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from qlens import InvalidRequest, RateLimited, Usage, dialects, error_from, sse
from qlens.dialects import responses, rewrite, typed
from qlens.testing.responses import USAGE

Body = dict[str, Any]

EVENTS: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
CALL = {"type": "function_call", "call_id": "call_1", "name": "f", "arguments": "{}"}
SCHEMA = {"type": "json_schema", "name": "n", "schema": {"type": "object"}, "strict": True}


def request(**fields: Any) -> Body:
    return {"model": "gpt-4o-mini", "input": "hello", **fields}


def refusal(body: Body) -> tuple[str, str | None, str | None]:
    with pytest.raises(InvalidRequest) as caught:
        responses.validate(body)
    return caught.value.message, caught.value.param, caught.value.code


def message(text: str = "Hello there.", **fields: Any) -> Body:
    part = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
    return {"id": "msg_1", "type": "message", "status": "completed", "role": "assistant", "content": [part], **fields}


def answer(*output: Body, **fields: Any) -> Body:
    return {
        "id": "resp_1",
        "object": "response",
        "created_at": 1700000000,
        "status": "completed",
        "model": "m",
        "output": list(output),
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "tools": [],
        "service_tier": "flex",
        "usage": USAGE,
        **fields,
    }


# --- validate ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"input": [{"role": "user", "content": "hi"}, {"role": "developer", "content": [], "type": "message"}]},
        {"input": [{"role": "user", "content": [{"type": "input_text", "text": "hi"}]}]},
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "https://x", "detail": "low"}]}]},
        {"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "f", "filename": None}]}]},
        {"input": [{"role": "user", "content": [{"type": "of_tomorrow", "anything": [1]}]}]},
        {"input": [message(), CALL, {"type": "function_call_output", "call_id": "call_1", "output": "42"}]},
        {"input": [{"type": "function_call_output", "output": [{"type": "input_text", "text": "42"}]}]},
        {"input": [{"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "x"}]},
        {"input": [{"type": "item_reference", "id": "msg_1"}, {"id": "msg_1"}, {"type": None, "id": "msg_1"}]},
        {"input": [{"type": "web_search_call", "id": "ws_1", "action": {"type": "search", "query": "q"}}]},
        {"input": None, "previous_response_id": "resp_1"},
        {"input": None, "conversation": {"id": "conv_1"}},
        {"input": None, "prompt": {"id": "pmpt_1", "variables": {"city": "Paris"}}},
        {"stream": True, "stream_options": {"include_obfuscation": False}},
        {"tools": [{"type": "function", "name": "f", "parameters": {"a": {}}, "strict": None}, {"type": "web_search"}]},
        {"tools": [{"type": "custom", "name": "c", "format": {"type": "text"}}], "tool_choice": "required"},
        {"tool_choice": {"type": "function", "name": "f"}, "parallel_tool_calls": False},
        {"text": {"format": SCHEMA, "verbosity": "low"}, "reasoning": {"effort": "high", "summary": "auto"}},
        {"max_output_tokens": 16, "temperature": 2, "top_p": 0, "top_logprobs": 20, "truncation": "auto"},
        {"background": True, "store": True, "include": ["reasoning.encrypted_content"], "metadata": {"a": "b"}},
        {"of_tomorrow": {"deep": [[[]]]}},
    ],
)
def test_what_openai_accepts_is_accepted_and_left_alone(fields: Body) -> None:
    body = request(**fields)
    before = deepcopy(body)
    responses.validate(body)
    assert body == before


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"model": None}, "model", "invalid_type"),
        ({"input": 4}, "input", "invalid_type"),
        ({"input": None}, "input", "missing_required_parameter"),
        ({"input": ["hi"]}, "input[0]", "invalid_type"),
        ({"input": [{}]}, "input[0].type", "missing_required_parameter"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role", "invalid_value"),
        ({"input": [{"role": "user"}]}, "input[0].content", "missing_required_parameter"),
        ({"input": [{"role": "user", "content": [{"text": "x"}]}]}, "input[0].content[0].type", None),
        ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input[0].content[0].text", None),
        ({"input": [{"type": "function_call", "name": "f", "arguments": "{}"}]}, "input[0].call_id", None),
        ({"input": [{**CALL, "arguments": {}}]}, "input[0].arguments", "invalid_type"),
        ({"input": [{"type": "function_call_output", "call_id": "c"}]}, "input[0].output", None),
        ({"instructions": []}, "instructions", "invalid_type"),
        ({"max_output_tokens": 15}, "max_output_tokens", "integer_below_min_value"),
        ({"max_output_tokens": 16.0}, "max_output_tokens", "invalid_type"),
        ({"temperature": 2.1}, "temperature", "decimal_above_max_value"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools[0].name", "missing_required_parameter"),
        ({"tools": {}}, "tools", "invalid_type"),
        ({"tool_choice": {}}, "tool_choice.type", "missing_required_parameter"),
        ({"text": {"format": {"type": "json_schema", "name": "n"}}}, "text.format.schema", None),
        ({"truncation": "some"}, "truncation", "invalid_value"),
        ({"top_logprobs": 21}, "top_logprobs", "integer_above_max_value"),
        ({"metadata": {"a": 1}}, "metadata.a", "invalid_type"),
        ({"stream": "yes"}, "stream", "invalid_type"),
        ({"stream_options": {}}, "stream_options", None),
    ],
)
def test_what_openai_refuses_is_refused_by_the_name_of_its_field(fields: Body, param: str, code: str | None) -> None:
    _, found, said = refusal(request(**fields))
    assert found == param
    assert code is None or said == code


# --- what counts -------------------------------------------------------------------------------


def test_texts_are_those_the_model_reads_and_can_be_put_back() -> None:
    body = request(
        instructions="be kind",
        input=[
            {"role": "user", "content": "one", "status": "completed"},
            {
                "role": "user",
                "content": [{"type": "input_text", "text": "two"}, {"type": "input_image", "image_url": "u"}],
            },
            {**CALL, "arguments": '{"a":"three"}'},
            {"type": "function_call_output", "call_id": "call_1", "output": "four"},
            {
                "type": "reasoning",
                "id": "rs",
                "summary": [{"type": "summary_text", "text": "five"}],
                "encrypted_content": "e",
            },
        ],
        prompt={"id": "p", "variables": {"city": "six", "part": {"type": "input_text", "text": "seven"}}},
        metadata={"note": "unread"},
        user="unread",
    )
    found = responses.request_texts(body)
    fixed = [text for ref, text in found if type(ref) is dialects.Fixed]
    assert fixed == ["a", CALL["name"]]
    found = [(ref, text) for ref, text in found if type(ref) is not dialects.Fixed]
    assert [text for _, text in found] == ["be kind", "one", "two", "three", "four", "five", "six", "seven"]
    for ref, text in found:
        dialects.put(body, ref, text.upper())
    left = [text for ref, text in responses.request_texts(body) if type(ref) is not dialects.Fixed]
    assert left == [text.upper() for _, text in found]


def test_a_plain_input_is_one_text() -> None:
    assert responses.request_texts(request()) == [(("input",), "hello")]


@given(st.text(), st.text())
def test_the_bound_is_never_less_than_the_bytes_of_all_texts(said: str, told: str) -> None:
    items = [{"role": "user", "content": said}, {**CALL, "arguments": told}]
    for given_input in (said, items):
        body = request(input=given_input, instructions=told)
        size = sum(len(text.encode(errors="surrogatepass")) for _, text in responses.request_texts(body))
        assert responses.input_bound(body)[0] >= size


def test_media_are_counted_and_take_no_part_in_the_bound() -> None:
    image = {"type": "input_image", "image_url": "data:image/png;base64," + "A" * 10_000}
    file = {"type": "input_file", "file_data": "A" * 10_000}
    result = {"type": "function_call_output", "call_id": "call_1", "output": [image]}
    body = request(input=[{"role": "user", "content": [image, file]}, CALL, result])
    assert responses.media(body) == {"images": 2, "files": 1}
    assert responses.input_bound(body)[0] < 500
    assert responses.media(request()) == {}


def test_what_the_provider_remembers_is_said_to_be_there() -> None:
    assert responses.media(request(previous_response_id="resp_1")) == {"history": 1}


def test_an_unknown_field_counts_with_all_its_json() -> None:
    assert responses.input_bound(request(of_tomorrow="x" * 900))[0] > 900
    assert responses.input_bound(request(metadata={"a": "x" * 900}))[0] < 100


def test_the_output_is_bounded_by_its_one_field() -> None:
    body = request(max_output_tokens=500)
    assert responses.output_bound(request()) == (None, None)
    assert responses.output_bound(body) == ("max_output_tokens", 500)
    responses.clamp(body, None, 1)
    responses.clamp(body, 900, 1)
    assert body["max_output_tokens"] == 500
    assert responses.clamp(body, 200, 1) == 200
    assert body["max_output_tokens"] == 200
    assert responses.clamp(plain := request(), 200, 1) is None
    assert "max_output_tokens" not in plain
    assert (responses.choices(body), responses.returned(body)) == (1, 1)


def test_web_searches_are_counted_and_not_the_pages_they_lead_to() -> None:
    actions = [{"type": "search", "query": "q"}, {"type": "open_page", "url": "https://x"}, None]
    body = answer(*({"type": "web_search_call", "id": f"ws_{n}", "action": each} for n, each in enumerate(actions)))
    for said in (body, {"type": "response.completed", "response": body}):
        usage = responses.usage(said)
        assert usage is not None
        assert usage.meters == {"web_searches": 2}


def test_usage_is_read_from_an_answer_and_from_the_event_that_carries_one() -> None:
    expected = Usage(input=7, cached_input=2, output=3, reasoning=1, source="provider", tier="flex")
    body = answer()
    ended = {"type": "response.completed", "response": body}
    assert responses.usage(body) == responses.usage(ended) == responses.event_usage(ended, None) == expected
    for silent in (
        {"type": "response.created", "response": answer(usage=None)},
        {"type": "response.output_text.delta", "delta": "x"},
    ):
        assert responses.event_usage(silent, None) is None
        assert responses.event_usage(silent, expected) is expected


def test_the_finish_is_the_reason_or_else_the_status() -> None:
    assert responses.finish(answer()) == "completed"
    cut = answer(status="incomplete", incomplete_details={"reason": "max_output_tokens"})
    assert responses.finish(cut) == "max_output_tokens"
    assert responses.finish({"type": "response.incomplete", "response": cut}) == "max_output_tokens"
    assert responses.finish({"type": "response.created", "response": answer(status="in_progress")}) is None
    # An item has a status too, which is none of the answer's.
    assert responses.finish({"type": "response.output_item.done", "output_index": 0, "item": message()}) is None


# --- events ------------------------------------------------------------------------------------


def test_only_a_good_end_ends_a_stream() -> None:
    kinds = ["created", "in_progress", "queued", "completed", "incomplete", "failed"]
    ends = [kind for kind in kinds if responses.event_ends_stream({"type": f"response.{kind}", "response": answer()})]
    assert ends == ["completed", "incomplete"]


@pytest.mark.parametrize(
    ("payload", "status", "code"),
    [
        ({"type": "error", "code": "server_error", "message": "m", "param": None}, 502, "upstream_error"),
        ({"type": "error", "code": "rate_limit_exceeded", "message": "m"}, 429, "rate_limit_exceeded"),
        ({"type": "error", "code": "context_length_exceeded", "message": "m"}, 400, "context_length_exceeded"),
        ({"type": "error", "error": {"code": "rate_limit_exceeded"}}, 429, "rate_limit_exceeded"),
        ({"type": "response.failed", "response": {"error": {"code": "server_error"}}}, 502, "upstream_error"),
        ({"type": "response.failed", "response": {"error": {"code": "invalid_prompt"}}}, 400, "invalid_prompt"),
        ({"type": "response.failed", "response": {"error": {"code": "invalid_image_url"}}}, 400, "invalid_image_url"),
        ({"type": "response.failed", "response": {"error": {"code": ["odd"]}}}, 502, "upstream_error"),
        ({"type": "response.failed"}, 502, "upstream_error"),
    ],
)
def test_an_error_event_means_what_the_error_answer_would(payload: Body, status: int, code: str) -> None:
    said = responses.event_error(payload)
    assert said is not None
    error = error_from(said)
    assert (error.status, error.code) == (status, code)


def test_other_events_carry_no_error() -> None:
    for payload in responses.explode(answer(message(), error=None)):
        assert responses.event_error(payload) is None


def test_an_error_of_ours_is_an_event_that_openais_types_accept_and_that_means_the_same() -> None:
    ours = RateLimited("Slow down.")
    event = responses.error_event(ours.body(), 7)
    EVENTS.validate_python(event)
    assert (event["sequence_number"], event["message"], event["code"]) == (7, "Slow down.", "rate_limit_exceeded")
    said = responses.event_error(event)
    assert said is not None
    assert error_from(said).status == ours.status


# --- answers into streams and back -------------------------------------------------------------


def rich_answer() -> Body:
    note = {"type": "url_citation", "url": "https://x", "title": "t", "start_index": 0, "end_index": 1}
    spelled = {"token": "Hel", "logprob": -0.1, "bytes": [72], "top_logprobs": []}
    said = {"type": "output_text", "text": "Hello.", "annotations": [note], "logprobs": [spelled]}
    refused = {"type": "refusal", "refusal": "No."}
    return answer(
        {
            "id": "rs_1",
            "type": "reasoning",
            "summary": [{"type": "summary_text", "text": "why"}],
            "encrypted_content": "e",
        },
        {"id": "rs_2", "type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "raw"}]},
        {"id": "ws_1", "type": "web_search_call", "status": "completed", "action": {"type": "search", "query": "q"}},
        message(content=[said, refused]),
        {
            "id": "fc_1",
            "type": "function_call",
            "call_id": "call_1",
            "name": "f",
            "arguments": '{"a":1}',
            "status": "completed",
        },
        {"id": "ctc_1", "type": "custom_tool_call", "call_id": "call_2", "name": "c", "input": "go"},
        message("", id="msg_2"),
    )


def test_an_answer_becomes_the_events_openai_would_have_sent_in_their_order() -> None:
    events = list(responses.explode(rich_answer()))
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert [event["type"].removeprefix("response.") for event in events] == [
        "created",
        "in_progress",
        "output_item.added",
        "reasoning_summary_part.added",
        "reasoning_summary_text.delta",
        "reasoning_summary_text.done",
        "reasoning_summary_part.done",
        "output_item.done",
        "output_item.added",
        "content_part.added",
        "reasoning_text.delta",
        "reasoning_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "output_item.done",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.annotation.added",
        "output_text.done",
        "content_part.done",
        "content_part.added",
        "refusal.delta",
        "refusal.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "output_item.added",
        "custom_tool_call_input.delta",
        "custom_tool_call_input.done",
        "output_item.done",
        "output_item.added",
        "content_part.added",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]


def test_every_event_is_one_that_openais_own_types_accept() -> None:
    for event in responses.explode(rich_answer()):
        EVENTS.validate_python(event)


def test_items_and_parts_begin_empty_and_in_progress_and_end_as_they_are() -> None:
    body = rich_answer()
    events = list(responses.explode(body))
    began = [event["item"] for event in events if event["type"] == "response.output_item.added"]
    assert [item.get("status") for item in began] == [None, None, *["in_progress"] * 3, None, "in_progress"]
    assert [item.get("content") for item in began] == [None, [], None, [], None, None, []]
    assert [item.get("arguments", item.get("input")) for item in began] == [None] * 4 + ["", "", None]
    assert [event["item"] for event in events if event["type"] == "response.output_item.done"] == body["output"]
    parts = [event["part"] for event in events if event["type"].endswith("part.added")]
    assert parts == [
        {"type": "summary_text", "text": ""},
        {"type": "reasoning_text", "text": ""},
        {"type": "output_text", "text": "", "annotations": [], "logprobs": []},
        {"type": "refusal", "refusal": ""},
        {"type": "output_text", "text": "", "annotations": [], "logprobs": []},
    ]


def test_log_probabilities_stand_beside_the_text_they_spell_and_nowhere_else() -> None:
    events = list(responses.explode(rich_answer()))
    spelled = {event["type"]: event["logprobs"] for event in events if "logprobs" in event}
    assert spelled.keys() == {"response.output_text.delta", "response.output_text.done"}
    delta = next(event for event in events if event["type"] == "response.output_text.delta")
    assert [token["token"] for token in delta["logprobs"]] == ["Hel"]
    plain = next(e for e in responses.explode(answer(message())) if e["type"] == "response.output_text.delta")
    assert plain["logprobs"] == []


@pytest.mark.parametrize("status", ["completed", "incomplete", "failed"])
def test_a_stream_becomes_the_answer_it_was(status: str) -> None:
    body = {**rich_answer(), "status": status}
    events = list(responses.explode(body))
    assert events[-1]["type"] == f"response.{status}"
    assert responses.assemble(events) == body
    Response.model_validate(body)


def test_an_answer_left_out_of_the_last_event_is_put_together() -> None:
    body = rich_answer()
    *events, end = responses.explode(body)
    assert responses.assemble([*events, {**end, "response": {**body, "output": []}}]) == body


def test_a_text_of_its_own_takes_nothing_of_the_event_it_is_made_after() -> None:
    event: Body = {
        "type": "response.output_text.delta",
        "output_index": 0,
        "delta": "old",
        "logprobs": [{"token": "old", "logprob": 0}],
        "obfuscation": "xx",
    }
    made = responses.text_event(event, (0, event["type"], 0), "new")
    assert made == {"type": "response.output_text.delta", "output_index": 0, "delta": "new", "logprobs": []}
    call: Body = {"type": "response.function_call_arguments.delta", "output_index": 0, "delta": "old"}
    assert responses.text_event(call, (0, call["type"], 0), "new") == {**call, "delta": "new"}


# --- rewriting ---------------------------------------------------------------------------------


def events_of(body: Body) -> list[bytes]:
    return [typed.write(event) for event in responses.explode(body)]


async def rewritten(events: list[bytes], hold_back: int = 8) -> list[Body]:
    stream = rewrite.rewrite_stream("responses", sse.chunks_of(events), lambda t: t.replace("secret", "***"), hold_back)
    return [orjson.loads(sse.data(event) or b"") async for event in stream]


def split_deltas(events: list[bytes], size: int) -> list[bytes]:
    found: list[bytes] = []
    for event in events:
        body = orjson.loads(sse.data(event) or b"")
        delta = body.get("delta")
        if type(delta) is not str:
            found.append(event)
            continue
        found += [typed.write({**body, "delta": delta[at : at + size]}) for at in range(0, len(delta), size)]
    return found


@pytest.mark.parametrize("size", [1, 3, 100])
async def test_a_rewritten_text_is_rewritten_wherever_a_stream_repeats_it(size: int) -> None:
    body = answer(message("my secret is a secret"), {**CALL, "id": "fc_1", "arguments": '{"a":"secret"}'})
    events = await rewritten(split_deltas(events_of(body), size))
    assert b"secret" not in orjson.dumps(events)
    deltas: dict[int, str] = {}
    for event in events:
        if type(event.get("delta")) is str:
            deltas[event["output_index"]] = deltas.get(event["output_index"], "") + event["delta"]
    assert deltas == {0: "my *** is a ***", 1: '{"a":"***"}'}
    ended = events[-1]["response"]["output"]
    assert ended[0]["content"][0]["text"] == "my *** is a ***"
    assert ended[1]["arguments"] == '{"a":"***"}'


@pytest.mark.parametrize("size", [1, 5])
async def test_events_stay_numbered_in_their_order_when_text_is_held_back(size: int) -> None:
    events = await rewritten(events_of(answer(message("a text"), message("and more", id="msg_2"))))
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    kinds = [event["type"] for event in events]
    assert kinds.index("response.output_text.done") > max(
        at for at, event in enumerate(events) if event.get("delta") and event["output_index"] == 0
    )


async def test_held_back_text_goes_out_under_the_name_of_its_event() -> None:
    stream = rewrite.rewrite_stream("responses", sse.chunks_of(events_of(answer(message("text")))), str.upper, 8)
    events = [event async for event in stream]
    for event in events:
        assert event.startswith(b"event: " + orjson.loads(sse.data(event) or b"")["type"].encode() + b"\n")
    assert b"".join(events).count(b'"delta":"TEXT"') == 1


def test_a_body_is_rewritten_in_all_its_texts() -> None:
    body = orjson.dumps(answer(message("a secret"), {**CALL, "arguments": "secret"}))
    told = orjson.loads(rewrite.rewrite_body("responses", body, lambda text: text.replace("secret", "***")))
    assert [text for _, text in responses.reply_texts(told)] == ["a ***", "***"]


def test_what_is_no_text_of_the_answer_is_left_alone() -> None:
    body = answer(message("said"), instructions="told", metadata={"a": "b"})
    body["output"].append({"type": "image_generation_call", "id": "ig", "status": "completed", "result": "QUJD"})
    assert [text for _, text in responses.reply_texts(body)] == ["said"]
    assert {text for event in responses.explode(body) for _, _, text in responses.event_texts(event) if text} == {
        "said"
    }
    assert responses.event_texts({"type": "response.audio.delta", "delta": "QUJD"}) == []
