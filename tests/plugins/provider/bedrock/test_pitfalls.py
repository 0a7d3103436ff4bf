"""The mistakes that gateways in front of Bedrock are known for, each with the test that it is not made here.

The numbers are those of the project's list of forty pitfalls; those that are missing concern other providers.
"""

from __future__ import annotations

import asyncio
import struct
from base64 import b64decode
from collections.abc import Awaitable, Callable
from typing import Any

import orjson
import pytest
from bedrocks import (
    CHAT,
    CLAUDE,
    LLAMA,
    NOVA,
    PDF,
    PNG,
    TIME,
    WEATHER,
    called,
    chat,
    config,
    document,
    events,
    image,
    refused,
    result,
    schema,
    sent,
    text,
    told,
    user,
)

from qlens import Reply, Target
from qlens.testing import Scripted, frames, running
from qlens.testing.bedrock import TEXT, answer, bedrock, failure, stream, streamed, whole

ASKED = {"stream_options": {"include_usage": True}}
CACHED = {"inputTokens": 562, "outputTokens": 10, "totalTokens": 3631, "cacheReadInputTokens": 3059}


async def test_pitfall_01_the_usage_event_has_no_choices_and_comes_only_when_asked_for() -> None:
    async with bedrock() as aws, running(config(aws.root)) as gateway:
        found = events(await gateway.post(CHAT, chat(stream=True, **ASKED)))
        assert [event["choices"] == [] for event in found].count(True) == 1
        assert found[-1]["usage"]["total_tokens"] == 13
        assert all(event["choices"] for event in events(await gateway.post(CHAT, chat(stream=True))))


async def test_pitfall_03_reading_goes_on_after_the_finish_reason() -> None:
    told_late = streamed(answer())
    async with bedrock() as aws, running(config(aws.root)) as gateway:
        aws.script(stream(told_late, gap=0.02))
        assert events(await gateway.post(CHAT, chat(stream=True, **ASKED)))[-1]["usage"]["prompt_tokens"] == 9


async def test_pitfall_04_no_stream_costs_nothing() -> None:
    async with bedrock() as aws, running(config(aws.root)) as gateway:
        aws.script(stream(streamed(answer())), stream(streamed(answer())[:-1]))
        for _ in range(2):
            await gateway.post(CHAT, chat(stream=True))
        said, guessed = await gateway.settled(2)
        assert (said.usage.source, said.usage.total) == ("provider", 13)
        assert guessed.usage.source == "estimated"
        assert guessed.usage.input > 0
        assert guessed.usage.output > 0


@pytest.mark.parametrize("streaming", [False, True])
async def test_pitfall_05_prompt_tokens_include_what_was_cached(streaming: bool) -> None:
    reply = answer(usage=CACHED)
    async with bedrock() as aws, running(config(aws.root)) as gateway:
        aws.script(stream(streamed(reply)) if streaming else whole(reply))
        got = await gateway.post(CHAT, chat(stream=streaming, **(ASKED if streaming else {})))
        usage = events(got)[-1]["usage"] if streaming else got.json()["usage"]
        assert (usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"]) == (3621, 3059)
        assert usage["total_tokens"] == 3631
        (receipt,) = await gateway.settled(1)
        assert (receipt.usage.input, receipt.usage.cached_input) == (562, 3059)


PRICES = {
    "plugin": "prices",
    "table": [
        {
            "model": CLAUDE,
            "input": 3,
            "cached_input": 0.3,
            "cache_write_5m": 3.75,
            "cache_write_1h": 6,
            "output": 15,
        }
    ],
}


@pytest.mark.parametrize("streaming", [False, True])
async def test_pitfalls_06_and_07_each_token_is_billed_once_and_long_writes_at_their_own_price(streaming: bool) -> None:
    written = {
        "cacheWriteInputTokens": 600,
        "cacheDetails": [{"ttl": "1h", "inputTokens": 500}, {"ttl": "5m", "inputTokens": 100}],
    }
    reply = answer(usage={**CACHED, **written})
    async with bedrock() as aws, running(config(aws.root, pipeline={"cost": [PRICES]})) as gateway:
        aws.script(stream(streamed(reply)) if streaming else whole(reply))
        await gateway.post(CHAT, chat(stream=streaming))
        (receipt,) = await gateway.settled(1)
        usage = receipt.usage
        assert (usage.input, usage.cached_input, usage.cache_write_5m, usage.cache_write_1h) == (562, 3059, 100, 500)
        millionths = 562 * 3_000_000 + 3059 * 300_000 + 100 * 3_750_000 + 500 * 6_000_000 + 10 * 15_000_000
        assert receipt.cost.picos == millionths


@pytest.mark.parametrize("streaming", [False, True])
async def test_pitfall_08_both_spellings_of_counts_are_read(streaming: bool) -> None:
    counts = {
        "inputTokenCount": 5,
        "outputTokenCount": 2,
        "cacheReadInputTokenCount": 7,
        "cacheWriteInputTokenCount": 1,
    }
    reply = answer(usage=counts)
    async with bedrock() as aws, running(config(aws.root)) as gateway:
        aws.script(stream(streamed(reply)) if streaming else whole(reply))
        got = await gateway.post(CHAT, chat(stream=streaming, **(ASKED if streaming else {})))
        usage = events(got)[-1]["usage"] if streaming else got.json()["usage"]
        assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (13, 2, 15)
        (receipt,) = await gateway.settled(1)
        used = receipt.usage
        assert (used.input, used.cached_input, used.cache_write_5m, used.output) == (5, 7, 1, 2)


@pytest.mark.parametrize(
    ("name", "kind", "code"),
    [
        ("throttlingException", "rate_limit_error", "rate_limit_exceeded"),
        ("validationException", "invalid_request_error", "context_length_exceeded"),
        ("serviceUnavailableException", "server_error", "upstream_unavailable"),
        ("modelStreamErrorException", "server_error", "upstream_error"),
    ],
)
async def test_pitfall_10_an_exception_in_mid_stream_is_told_as_what_it_is(name: str, kind: str, code: str) -> None:
    async with bedrock() as aws, running(config(aws.root)) as gateway:
        aws.script(stream([*streamed(answer())[:2], frames.exception(name, "Too many tokens")], gap=0.01))
        *_, begun, last = (await gateway.post(CHAT, chat(stream=True))).events()
        assert begun["choices"][0]["delta"]["content"]
        assert (last["error"]["type"], last["error"]["code"]) == (kind, code)
        assert (await gateway.settled(1))[0].outcome == "failed"


async def test_pitfall_11_an_exception_as_the_first_frame_lets_the_next_target_answer() -> None:
    pipeline = {"route": [{"plugin": "retry", "attempts": 2, "backoff_seconds": 0.01, "max_retry_after_seconds": 2}]}
    async with bedrock() as aws, running(config(aws.root, pipeline=pipeline)) as gateway:
        aws.script(stream([frames.exception("serviceUnavailableException", "busy")]))
        assert text(await gateway.post(CHAT, chat(stream=True))) == TEXT
        assert len(aws.requests) == 2


async def test_pitfall_12_a_truncated_stream_is_no_success() -> None:
    async with bedrock() as aws, running(config(aws.root)) as gateway:
        aws.script(stream(streamed(answer())[:3]))
        reply = await gateway.post(CHAT, chat(stream=True))
        assert reply.events()[-1]["error"]["code"] == "upstream_truncated"
        assert (await gateway.settled(1))[0].outcome == "failed"


@pytest.mark.parametrize("begun", [False, True], ids=["before the first frame", "in mid-stream"])
async def test_pitfall_14_a_client_that_leaves_closes_the_connection(begun: bool) -> None:
    async with bedrock() as aws, running(config(aws.root, on_disconnect="abort")) as gateway:
        aws.script(stream(streamed(answer())[:2], hang=True) if begun else Scripted(hang=True))
        asking = asyncio.create_task(gateway.post(CHAT, chat(stream=True)))
        (request,) = await aws.arrived(1)
        await asyncio.sleep(0.05)
        asking.cancel()
        await asyncio.wait_for(request.closed.wait(), 1)
        assert (await gateway.settled(1))[0].outcome == "abandoned"


async def test_pitfall_15_nothing_is_repeated_once_something_was_sent() -> None:
    pipeline = {"route": [{"plugin": "retry", "attempts": 3, "backoff_seconds": 0.01}]}
    async with bedrock() as aws, running(config(aws.root, pipeline=pipeline)) as gateway:
        aws.script(stream([*streamed(answer())[:2], frames.exception("internalServerException", "oops")], gap=0.01))
        told_so_far = (await gateway.post(CHAT, chat(stream=True))).events()
        texts = [event["choices"][0]["delta"].get("content") for event in told_so_far[:-1]]
        assert texts == ["", TEXT[:6]]
        assert told_so_far[-1]["error"]["code"] == "upstream_error"
        assert len(aws.requests) == 1


async def test_pitfall_16_a_connection_that_the_peer_has_just_closed_is_not_an_error() -> None:
    pipeline = {"route": [{"plugin": "puppets:Puppet", "name": "puppet"}]}
    async with bedrock() as aws, running(config(aws.root, pipeline=pipeline)) as gateway:
        for _ in range(3):
            assert (await gateway.post(CHAT, chat(stream=True))).status == 200
        assert aws.connections == 1  # a stream that was read to its end leaves its connection to the next

        def too_late(target: Target, proceed: Callable[[Target], Awaitable[Reply]]) -> Awaitable[Reply]:
            aws.hang_up()  # and the request is on its way before the event loop looks
            return proceed(target)

        gateway.plugin("route", "puppet").does["wrap_send"] = too_late
        assert (await gateway.post(CHAT, chat())).status == 200
        assert (aws.connections, len(aws.requests)) == (2, 4)
        assert [len(receipt.attempts) for receipt in await gateway.settled(4)] == [1] * 4


@pytest.mark.parametrize("streaming", [False, True])
async def test_pitfall_17_a_slow_model_is_asked_exactly_once(streaming: bool) -> None:
    pipeline = {"route": [{"plugin": "retry", "attempts": 3, "backoff_seconds": 0.01}]}
    async with (
        bedrock() as aws,
        running(config(aws.root, pipeline=pipeline, idle_seconds=0.1, first_byte_seconds=5)) as gateway,
    ):
        aws.script(stream(streamed(answer()), delay=0.5) if streaming else Scripted(body=answer(), delay=0.5))
        assert text(await gateway.post(CHAT, chat(stream=streaming))) == TEXT
        assert len(aws.requests) == 1


async def test_pitfall_18_when_to_come_back_reaches_the_client_after_all_retries() -> None:
    pipeline = {"route": [{"plugin": "retry", "attempts": 2, "backoff_seconds": 0.01, "max_retry_after_seconds": 2}]}
    async with bedrock() as aws, running(config(aws.root, pipeline=pipeline)) as gateway:
        aws.script(*[failure("ThrottlingException", "Too many requests", status=429)] * 2)
        reply = await gateway.post(CHAT, chat())
        assert (reply.status, reply.headers["retry-after"], reply.headers["retry-after-ms"]) == (429, "1", "1000")
        assert len(aws.requests) == 2


# --- tools -------------------------------------------------------------------------------------

HISTORY = [user("Weather?"), called(("call_1", "get_weather", "{}")), result("call_1")]


@pytest.mark.parametrize("fields", [{}, {"tools": [WEATHER], "tool_choice": "none"}], ids=["no tools", "none"])
async def test_pitfall_25_a_history_of_tools_has_its_tools(fields: dict[str, Any]) -> None:
    config_sent = (await sent(chat(*HISTORY, **fields)))["toolConfig"]
    assert [tool["toolSpec"]["name"] for tool in config_sent["tools"]] == ["get_weather"]
    assert "toolChoice" not in config_sent


async def test_pitfall_26_results_of_parallel_calls_stand_in_one_message_in_front_of_what_follows() -> None:
    body = await sent(
        chat(
            user("Both?"),
            called(("call_1", "get_weather", "{}"), ("call_2", "get_time", "{}")),
            result("call_1"),
            {"role": "system", "content": "Be brief."},
            result("call_2", [{"type": "text", "text": "noon"}]),
            user("Well?"),
        )
    )
    *_, last = body["messages"]
    assert [next(iter(block)) for block in last["content"]] == ["toolResult", "toolResult", "text", "text"]
    assert [block["text"] for block in last["content"][2:]] == ["Be brief.", "Well?"]


async def test_pitfall_27_empty_arguments_are_json_both_ways() -> None:
    body = await sent(chat(user("?"), called(("call_1", "get_time", "")), result("call_1", "")))
    assert body["messages"][1]["content"][0]["toolUse"]["input"] == {}
    assert body["messages"][2]["content"][0]["toolResult"]["content"] == [{"text": "."}]
    use = {"toolUse": {"toolUseId": "t1", "name": "get_time", "input": {}}}
    for choice in await told(answer(use, stop="tool_use"), chat(tools=[TIME])):
        assert choice["message"]["tool_calls"][0]["function"]["arguments"] == "{}"
        assert choice["message"]["content"] in (None, "")


@pytest.mark.parametrize("arguments", ["[1]", "{", "1", '"x"'])
async def test_pitfall_27_arguments_that_are_no_object_are_the_clients_mistake(arguments: str) -> None:
    error = await refused(chat(user("?"), called(("call_1", "get_time", arguments)), result("call_1")))
    assert error["param"] == "messages[1].tool_calls[0].function.arguments"


USES: list[dict[str, Any]] = [
    {"text": "I look."},
    {"toolUse": {"toolUseId": "t1", "name": "get_weather", "input": {"city": "Paris, the capital of France"}}},
    {"toolUse": {"toolUseId": "t2", "name": "get_weather", "input": {"city": "Rome"}}},
]


async def test_pitfalls_28_and_29_each_call_has_its_own_index_counted_over_calls_alone() -> None:
    async with bedrock() as aws, running(config(aws.root)) as gateway:
        aws.script(stream(streamed(answer(*USES, stop="tool_use"))))
        reply = await gateway.post(CHAT, chat(tools=[WEATHER], stream=True))
        parts = [call for event in events(reply) for call in event["choices"][0]["delta"].get("tool_calls", ())]
        assert {part["index"] for part in parts} == {0, 1}
        for index, use in enumerate(USES[1:]):
            mine = [part for part in parts if part["index"] == index]
            assert (mine[0]["id"], mine[0]["function"]["name"]) == (use["toolUse"]["toolUseId"], "get_weather")
            assert all(part.keys() == {"index", "function"} for part in mine[1:])
            arguments = "".join(part["function"]["arguments"] for part in mine)
            assert orjson.loads(arguments) == use["toolUse"]["input"]


async def test_pitfall_29_the_tool_by_which_a_model_fits_a_schema_is_not_among_the_calls() -> None:
    asked = chat(tools=[WEATHER], response_format=schema({"type": "object"}))
    async with bedrock() as aws, running(config(aws.root, NOVA)) as gateway:
        aws.script(stream(streamed(answer(*USES, stop="tool_use"))))
        await gateway.post(CHAT, {**asked, "stream": True})
        names = [tool["toolSpec"]["name"] for tool in aws.requests[-1].body["toolConfig"]["tools"]]
        (helper,) = {*names} - {"get_weather"}
        fitting = {"toolUse": {"toolUseId": "t0", "name": helper, "input": {"sky": "blue"}}}
        aws.script(stream(streamed(answer(fitting, USES[1], stop="tool_use"))))
        reply = await gateway.post(CHAT, {**asked, "stream": True})
        deltas = [event["choices"][0]["delta"] for event in events(reply)]
        calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
        assert {call["index"] for call in calls} == {0}
        assert {call["function"].get("name") for call in calls} == {"get_weather", None}
        assert helper not in reply.text


NAMES = ["files/read.all", "x" * 65, "x" * 66, "größe", "a b", "get_weather"]


async def test_pitfall_30_names_and_ids_are_mapped_and_restored_without_collisions() -> None:
    tools = [{"type": "function", "function": {"name": name}} for name in NAMES]
    calls = [(f"call|{number}|" + "y" * 80, name, "{}") for number, name in enumerate(NAMES)]
    history = [user("?"), called(*calls), *(result(identifier) for identifier, _, _ in calls)]
    body = await sent(chat(*history, tools=tools, tool_choice={"type": "function", "function": {"name": NAMES[0]}}))
    names = [tool["toolSpec"]["name"] for tool in body["toolConfig"]["tools"]]
    assert len({*names}) == len(NAMES)
    assert names[-1] == "get_weather"
    assert [block["toolUse"]["name"] for block in body["messages"][1]["content"]] == names
    assert body["toolConfig"]["toolChoice"] == {"tool": {"name": names[0]}}
    ids = [block["toolUse"]["toolUseId"] for block in body["messages"][1]["content"]]
    assert len({*ids}) == len(NAMES)
    assert [block["toolResult"]["toolUseId"] for block in body["messages"][2]["content"]] == ids
    uses = [{"toolUse": {"toolUseId": f"t{at}", "name": name, "input": {}}} for at, name in enumerate(names)]
    for choice in await told(answer(*uses, stop="tool_use"), chat(tools=tools)):
        assert [call["function"]["name"] for call in choice["message"]["tool_calls"]] == NAMES


RECURSIVE = {
    "type": "object",
    "properties": {"child": {"$ref": "#/$defs/node"}},
    "$defs": {"node": {"properties": {"child": {"$ref": "#/$defs/node"}}}},
}
WIDE: dict[str, Any] = {
    "type": "object",
    "properties": {"a": {"$ref": "#/$defs/n0"}},
    "$defs": {
        **{f"n{at}": {"anyOf": [{"$ref": f"#/$defs/n{at + 1}"}] * 10} for at in range(10)},
        "n10": {"type": "string"},
    },
}


@pytest.mark.parametrize(
    "schema",
    [RECURSIVE, WIDE, {"type": "object", "$ref": "#/nowhere"}, {"type": "object", "$ref": "https://x.example"}],
    ids=["recursive", "exponential", "nowhere", "outside"],
)
async def test_pitfall_31_a_schema_that_cannot_be_written_out_ends_in_400(schema: dict[str, Any]) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    error = await refused(chat(tools=[tool]))
    assert (error["param"], error["code"]) == ("tools[0].function.parameters", "invalid_schema")


async def test_pitfall_31_references_are_written_out_and_strict_is_kept_where_it_is_taken() -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"$ref": "#/$defs/text", "title": "A"}},
        "$defs": {"text": {"type": "string"}},
    }
    tool = {"type": "function", "function": {"name": "f", "parameters": schema, "strict": True}}
    spec = (await sent(chat(tools=[tool])))["toolConfig"]["tools"][0]["toolSpec"]
    assert spec["inputSchema"]["json"] == {"type": "object", "properties": {"a": {"type": "string", "title": "A"}}}
    assert spec["strict"] is True
    for model in (NOVA, LLAMA, "us.anthropic.claude-opus-4-7", "us.anthropic.claude-sonnet-5"):
        assert "strict" not in (await sent(chat(tools=[tool]), model))["toolConfig"]["tools"][0]["toolSpec"]


# --- reasoning ---------------------------------------------------------------------------------

SIGNED = {"type": "thinking", "thinking": "I must look.", "signature": "c2ln"}
THINKING = {"reasoning_effort": "high", "max_tokens": 6000, "tools": [WEATHER]}


def _history(**fields: Any) -> list[dict[str, Any]]:
    return [user("?"), called(("call_1", "get_weather", "{}"), **fields), result("call_1")]


async def test_pitfall_32_no_thinking_where_the_thoughts_of_a_call_are_missing() -> None:
    for fields in ({}, {"reasoning_content": "unsigned"}, {"thinking_blocks": [{**SIGNED, "signature": ""}]}):
        body = await sent(chat(*_history(**fields), **THINKING))
        assert "additionalModelRequestFields" not in body
        assert "reasoningContent" not in str(body)


async def test_pitfall_32_signed_thoughts_go_back_to_claude_and_to_nobody_else() -> None:
    history = _history(thinking_blocks=[{**SIGNED, "thinking": ""}, SIGNED])
    body = await sent(chat(*history, **THINKING))
    blocks = body["messages"][1]["content"]
    # A block that has a signature only survives.
    assert blocks[0] == {"reasoningContent": {"reasoningText": {"text": "", "signature": "c2ln"}}}
    assert body["additionalModelRequestFields"]["thinking"] == {"type": "enabled", "budget_tokens": 3000}
    for model in (NOVA, LLAMA, "deepseek.v3.2"):
        assert "reasoningContent" not in str(await sent(chat(*history, tools=[WEATHER]), model))


async def test_pitfall_32_what_claude_thinks_comes_back_so_that_it_can_be_sent_again() -> None:
    thought = {"reasoningContent": {"reasoningText": {"text": "One, two.", "signature": "c2ln"}}}
    redacted = {"reasoningContent": {"redactedContent": "cmVk"}}
    for choice in await told(answer(thought, redacted, {"text": "Two."}), chat()):
        message = choice["message"]
        assert (message["content"], message["reasoning_content"]) == ("Two.", "One, two.")
        body = await sent(chat(user("?"), message, user("!")))
        assert body["messages"][1]["content"] == [thought, redacted, {"text": "Two."}]


async def test_pitfall_33_claude_gets_a_temperature_or_a_top_p() -> None:
    both = chat(temperature=0.5, top_p=0.9)
    assert (await sent(both))["inferenceConfig"] == {"temperature": 0.5}
    assert (await sent(both, "anthropic.claude-3-5-haiku-20241022-v1:0"))["inferenceConfig"] == {
        "temperature": 0.5,
        "topP": 0.9,
    }


# --- content -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "kind"),
    [
        (image(PNG, "image/jpg"), "png"),
        (image("/9j/4AAQSkZJRgABAQ==", "image/png"), "jpeg"),
        (image("R0lGODlhAQABAAAAACw=", "application/octet-stream"), "gif"),
        (image("UklGRiQAAABXRUJQVlA4", ""), "webp"),
        (image("AAAA", "image/jpg"), "jpeg"),
    ],
)
async def test_pitfall_34_the_bytes_of_an_image_say_what_it_is(part: dict[str, Any], kind: str) -> None:
    block = (await sent(chat(user([part]))))["messages"][0]["content"][0]["image"]
    assert block["format"] == kind
    assert block["source"]["bytes"] == part["image_url"]["url"].partition(",")[2]


@pytest.mark.parametrize(
    "url",
    [
        *(None, "", "data:image/png;base64,", "data:image/png;base64,!!!!", "data:image/png;base64,AAA"),
        *("data:image/png,plain", "https://example.com/x.png", "data:image/tiff;base64,SUkqAA=="),
    ],
)
async def test_pitfall_34_an_image_that_is_none_is_the_clients_mistake(url: str | None) -> None:
    error = await refused(chat(user([{"type": "image_url", "image_url": {"url": url}}])))
    assert error["param"] == "messages[0].content[0].image_url.url"


async def test_pitfall_34_base64_is_on_the_wire_exactly_once() -> None:
    lines = "\n".join(PNG[start : start + 40] for start in range(0, len(PNG), 40))
    block = (await sent(chat(user([image(lines)]))))["messages"][0]["content"][0]["image"]
    assert b64decode(block["source"]["bytes"]).startswith(b"\x89PNG")


async def test_pitfall_35_blank_texts_go_and_no_message_is_empty() -> None:
    blank = [{"type": "text", "text": " \n"}]
    body = await sent(
        chat({"role": "system", "content": " "}, user(blank), {"role": "assistant", "content": ""}, user(" hi"))
    )
    assert "system" not in body
    assert [message["content"] for message in body["messages"]] == [
        [{"text": "."}],
        [{"text": "."}],
        [{"text": " hi"}],
    ]


async def test_pitfall_35_an_answer_to_be_continued_does_not_end_in_blanks() -> None:
    body = await sent(chat(user("Say"), {"role": "assistant", "content": "Once upon \n"}))
    assert body["messages"][-1]["content"] == [{"text": "Once upon"}]


@pytest.mark.parametrize("model", [NOVA, LLAMA, "mistral.mistral-large-3-675b-instruct", "some.new-model-v1:0"])
async def test_pitfall_36_the_user_comes_first_where_that_is_wanted(model: str) -> None:
    opening = [{"role": "system", "content": "Be kind."}, {"role": "assistant", "content": "Welcome!"}, user("Hi")]
    body = await sent(chat(*opening), model)
    assert [message["role"] for message in body["messages"]] == ["user", "assistant", "user"]
    assert [message["role"] for message in (await sent(chat(*opening)))["messages"]] == ["assistant", "user"]
    assert (await sent(chat(opening[0]), model))["messages"] == [{"role": "user", "content": [{"text": "."}]}]


async def test_pitfall_37_documents_have_clean_and_unique_names_and_a_text_beside_them() -> None:
    names = ["a/b_c?.d.pdf", "a b c d.pdf", "..pdf", "x" * 300 + ".pdf"]
    content = (await sent(chat(user([document(name) for name in names]))))["messages"][0]["content"]
    assert [block["document"]["name"] for block in content[:4]] == ["a b c d", "a b c d 2", "document", "x" * 190]
    assert content[4:] == [{"text": "."}]


@pytest.mark.parametrize(
    ("name", "media", "kind"),
    [
        ("x.bin", "application/pdf", "pdf"),
        ("table.CSV", "application/octet-stream", "csv"),
        ("x", "text/markdown", "md"),
        ("x", "application/vnd.openxmlformats-officedocument.wordprocessingml.document", "docx"),
    ],
)
async def test_pitfall_37_documents_are_of_their_media_type_or_else_of_their_suffix(
    name: str, media: str, kind: str
) -> None:
    content = (await sent(chat(user([document(name, media)]))))["messages"][0]["content"]
    assert content[0]["document"]["format"] == kind
    assert content[0]["document"]["source"] == {"bytes": PDF}


@pytest.mark.parametrize(
    ("part", "param"),
    [
        (document("x.zip", "application/zip"), "file_data"),
        # It is no file that this gateway's providers keep.
        ({"type": "file", "file": {"file_id": "file-example"}}, "file_id"),
    ],
)
async def test_pitfall_37_documents_that_bedrock_does_not_take_are_refused(part: dict[str, Any], param: str) -> None:
    assert (await refused(chat(user([part]))))["param"] == f"messages[0].content[0].file.{param}"


CACHE = {"cache_control": {"type": "ephemeral"}}


async def test_pitfall_37_a_cache_point_never_stands_where_it_is_refused() -> None:
    parts = [{"type": "text", "text": " ", **CACHE}, {**document("x.csv", "text/csv"), **CACHE}]
    body = await sent(
        chat(user(parts), {"role": "assistant", "content": "", "thinking_blocks": [SIGNED], **CACHE}, user("go"))
    )
    assert "cachePoint" not in str(body)
    body = await sent(chat(user([{**document("x.pdf"), **CACHE}, {"type": "text", "text": "?"}])))
    assert [next(iter(block)) for block in body["messages"][0]["content"]] == ["document", "cachePoint", "text"]


ARN = "arn:aws:bedrock:us-east-1:123456789012:inference-profile/us.amazon.nova-lite-v1:0"


@pytest.mark.parametrize("operation", ["converse", "converse-stream"])
async def test_pitfall_38_an_arn_is_one_escaped_segment_and_its_signature_is_right(operation: str) -> None:
    async with bedrock() as aws, running(config(aws.root, ARN)) as gateway:
        assert (await gateway.post(CHAT, chat(stream=operation == "converse-stream"))).status == 200
        name = "arn%3Aaws%3Abedrock%3Aus-east-1%3A123456789012%3Ainference-profile%2Fus.amazon.nova-lite-v1%3A0"
        assert aws.requests[0].path == f"/model/{name}/{operation}"
        assert (aws.models, aws.refused) == ([ARN], [])


async def test_pitfall_39_a_text_in_a_header_and_an_empty_body() -> None:
    async with bedrock() as aws, running(config(aws.root)) as gateway:
        aws.script(
            failure("ValidationException", "Input is too long for requested model.", in_header=True),
            failure("ThrottlingException", "Too many tokens, please wait.", status=429, in_header=True),
        )
        first = await gateway.post(CHAT, chat())
        assert (first.status, first.json()["error"]["code"]) == (400, "context_length_exceeded")
        assert first.json()["error"]["message"] == "Input is too long for requested model."
        second = await gateway.post(CHAT, chat())
        assert (second.status, second.json()["error"]["code"]) == (429, "rate_limit_exceeded")


@pytest.mark.parametrize("model", ["amazon.titan-embed-text-v2:0", "cohere.embed-english-v3", "cohere.embed-v4:0"])
async def test_pitfall_40_embeddings_in_base64_are_packed_here(model: str) -> None:
    async with bedrock() as aws, running(config(aws.root, model)) as gateway:
        call = {"model": "ours", "input": ["one", "another"]}
        plain = (await gateway.post("/v1/embeddings", call)).json()["data"]
        packed = (await gateway.post("/v1/embeddings", {**call, "encoding_format": "base64"})).json()["data"]
        for one, other in zip(plain, packed, strict=True):
            raw = b64decode(other["embedding"])
            assert list(struct.unpack(f"<{len(raw) // 4}f", raw)) == one["embedding"]
        assert "encoding_format" not in str([request.body for request in aws.requests])
