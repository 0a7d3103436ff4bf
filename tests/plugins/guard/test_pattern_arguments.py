"""The plugin `pattern` and what tools are called with: JSON, in which a text can be spelled in many ways."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from qlens.testing import Running, Scripted, running, upstream
from qlens.testing.anthropic import KEY, MODEL, anthropic, message, stream, tool_use, whole

CONFIG = r"""
pipeline:
  auth: [{plugin: anonymous}]
  guard:
    - plugin: pattern
      rules:
        - {name: card, regex: '\b\d{4}[ -]?\d{4}[ -]?\d{4}[ -]?\d{4}\b', action: redact, replacement: "[card]"}
        - {name: quoted, words: [bluebird], action: redact, replacement: '"hidden"'}
        - {name: name, words: [Müller], action: redact, replacement: NN}
        - {name: code, words: [project falcon], action: block}
  cost: []
providers:
  up: {plugin: openai, base_url: "URL", api_key: sk-example-upstream, responses: false}
  claude: {plugin: anthropic, base_url: "ROOT", api_key: KEY}
models:
  small: {max_output_tokens: 1000, targets: [{provider: up, model: small}]}
  claude: {max_output_tokens: 1000, targets: [{provider: claude, model: MODEL}]}
"""

SPELLED = r'{ "a" : "x\/y", "n": [1.50, -0, true, null], "\u0062": {} }'
TOLD = [
    (r'{"text":"Card:\n4111-1111-1111-1111\n"}', '{"text":"Card:\\n[card]\\n"}'),
    (r'{"text": "\t4111 1111 1111 1111", "b": {"c": ["M\u00fcller"]}}', '{"text": "\\t[card]", "b": {"c": ["NN"]}}'),
    (r'{"n":"\ud83d \u004d\u00fcller"}', r'{"n":"\ud83d NN"}'),
    ('{"card": 4111111111111111, "n": 12345678901234567890}', '{"card": "[card]", "n": 12345678901234567890}'),
    ('{"a":"the bluebird"}', r'{"a":"the \"hidden\""}'),
    (SPELLED, SPELLED),
    ('"4111-1111-1111-1111"', '"[card]"'),
    ('4111111111111111', '"[card]"'),
    # What is no JSON is one text.
    ('{"a": "4111-1111-1111-1111", "b', '{"a": "[card]", "b'),
    ('{x} 4111-1111-1111-1111 {y}', '{x} [card] {y}'),
]  # fmt: skip
REFUSED = [r'{"a":"project\u0020falcon"}', '{"bluebird":1}', r'{"a":[{"blue\u0062ird":1}]}', '{"project falcon":1}']

HEAD = {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "m"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def asked(**fields: Any) -> dict[str, Any]:
    return {"model": "small", "messages": [{"role": "user", "content": "q"}], "tools": [TOOL], **fields}


def config(url: str = "http://127.0.0.1:9", root: str = "http://127.0.0.1:9") -> str:
    return CONFIG.replace("URL", url).replace("ROOT", root).replace("KEY", KEY).replace("MODEL", MODEL)


def called(arguments: str) -> dict[str, Any]:
    return {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": arguments}}


def answer_with(arguments: str) -> Scripted:
    message = {"role": "assistant", "content": None, "tool_calls": [called(arguments)]}
    choice = {"index": 0, "message": message, "finish_reason": "tool_calls"}
    return Scripted(body={"id": "x", "object": "chat.completion", "created": 1, "choices": [choice]})


def stream_with(*arguments: str, size: int = 3) -> Scripted:
    deltas: list[dict[str, Any]] = [{"role": "assistant", "content": None}]
    for index, told in enumerate(arguments):
        deltas.append({"tool_calls": [{"index": index, **called("")}]})
        pieces = (told[start : start + size] for start in range(0, len(told), size))
        deltas += [{"tool_calls": [{"index": index, "function": {"arguments": piece}}]} for piece in pieces]
    events: list[Any] = [{**HEAD, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
    return Scripted(
        events=[*events, {**HEAD, "choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls"}]}, "[DONE]"]
    )


async def heard(gateway: Running, path: str, body: dict[str, Any]) -> list[Any]:
    answer = await gateway.post(path, {**body, "stream": True})
    assert answer.status == 200, answer.text
    return [event for event in answer.events() if event != "[DONE]"]


def calls_in(events: list[Any]) -> dict[int, str]:
    """The arguments of each call in a stream of chat."""
    found: dict[int, str] = {}
    for choice in (choice for event in events for choice in event.get("choices", ())):
        for part in choice["delta"].get("tool_calls") or ():
            found[part["index"]] = found.get(part["index"], "") + (part["function"].get("arguments") or "")
    return found


# --- answers of chat ---------------------------------------------------------------------------


@pytest.mark.parametrize(("told", "left"), TOLD)
async def test_arguments_are_looked_at_as_what_they_say(told: str, left: str) -> None:
    async with upstream() as up, running(config(up.url)) as gateway:
        up.script(answer_with(told))
        answer = await gateway.post("/v1/chat/completions", asked())
        assert answer.json()["choices"][0]["message"]["tool_calls"][0]["function"]["arguments"] == left
        for size in (1, 3, 1000):
            up.script(stream_with(told, "{}", told, size=size))
            assert calls_in(await heard(gateway, "/v1/chat/completions", asked())) == {0: left, 1: "{}", 2: left}
        up.script(stream_with(told))
        events = await heard(gateway, "/v1/responses", {"model": "small", "input": "q"})
        (done,) = (event for event in events if event["type"] == "response.function_call_arguments.done")
        assert "".join(event.get("delta", "") for event in events) == done["arguments"] == left
        assert events[-1]["response"]["output"][0]["arguments"] == left
        assert [event["sequence_number"] for event in events] == list(range(len(events)))


@pytest.mark.parametrize("told", REFUSED)
async def test_an_answer_is_blocked_by_what_its_arguments_say_and_for_keys_that_must_stay(told: str) -> None:
    async with upstream() as up, running(config(up.url)) as gateway:
        up.script(answer_with(told))
        answer = await gateway.post("/v1/chat/completions", asked())
        assert (answer.status, answer.json()["error"]["code"]) == (400, "content_filter")
        up.script(stream_with(told))
        *before, last = await heard(gateway, "/v1/chat/completions", asked())
        assert last["error"]["code"] == "content_filter"
        assert "".join(calls_in(before).values()) == ""


async def test_arguments_pass_when_their_json_is_whole_and_not_at_the_end_of_the_answer() -> None:
    async with upstream() as up, running(config(up.url)) as gateway:
        up.script(stream_with('{"a":"}{\\"["}', '{"b":2}'))
        events = await heard(gateway, "/v1/chat/completions", asked())
        told = [part for event in events for part in calls_in([event]).items() if part[1]]
        assert told == [(0, '{"a":"}{\\"["}'), (1, '{"b":2}')]
        assert events[-1]["choices"][0] == {"index": 0, "delta": {}, "finish_reason": "tool_calls"}


# --- requests ----------------------------------------------------------------------------------


def history(told: str, *, older: bool = False) -> dict[str, Any]:
    call = {"function_call": called(told)["function"]} if older else {"tool_calls": [called(told)]}
    result = {"role": "function", "name": "f"} if older else {"role": "tool", "tool_call_id": "call_1"}
    return asked(messages=[{"role": "assistant", "content": None, **call}, {**result, "content": "r"}])


@pytest.mark.parametrize(("told", "left"), TOLD)
async def test_arguments_that_are_sent_back_are_looked_at_as_what_they_say(told: str, left: str) -> None:
    async with upstream() as up, running(config(up.url)) as gateway:
        await gateway.post("/v1/chat/completions", history(told))
        await gateway.post("/v1/chat/completions", history(told, older=True))
        item = {"type": "function_call", "call_id": "call_1", "name": "f", "arguments": told}
        result = {"type": "function_call_output", "call_id": "call_1", "output": "r"}
        await gateway.post("/v1/responses", {"model": "small", "input": [item, result]})
        newer, older, bridged = (request.body["messages"][0] for request in up.requests)
        assert older["function_call"]["arguments"] == left
        assert newer["tool_calls"][0]["function"]["arguments"] == left
        assert bridged["tool_calls"][0]["function"]["arguments"] == left


@pytest.mark.parametrize("told", REFUSED)
async def test_a_request_is_refused_for_what_its_arguments_say_and_for_keys_that_must_stay(told: str) -> None:
    async with upstream() as up, running(config(up.url)) as gateway:
        answer = await gateway.post("/v1/chat/completions", history(told))
        assert (answer.status, answer.json()["error"]["code"]) == (400, "content_filter")
        assert up.requests == []


# --- messages, where they are parsed ----------------------------------------------------------


GIVEN = {"text": "Card:\n4111-1111-1111-1111\n", "card": 4111111111111111, "f": 1.5, "b": [True, {"n": "Müller"}]}
LEFT = {"text": "Card:\n[card]\n", "card": "[card]", "f": 1.5, "b": [True, {"n": "NN"}]}
QUESTION = {"model": "claude", "max_tokens": 100, "messages": [{"role": "user", "content": "q"}]}


async def test_messages_meet_the_same_rules() -> None:
    async with anthropic() as up, running(config(root=up.root)) as gateway:
        told = message(tool_use("toolu_1", "f", GIVEN), stop="tool_use")
        up.script(whole(told))
        assert (await gateway.post("/v1/messages", QUESTION)).json()["content"][0]["input"] == LEFT
        up.script(stream(told))
        events = await heard(gateway, "/v1/messages", QUESTION)
        pieces = [event["delta"].get("partial_json", "") for event in events if "delta" in event]
        assert orjson.loads("".join(pieces)) == LEFT
        turns = [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": [tool_use("toolu_1", "f", GIVEN)]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "toolu_1", "content": "r"}]},
        ]
        await gateway.post("/v1/messages", {**QUESTION, "messages": turns})
        assert up.requests[-1].body["messages"][1]["content"][0]["input"] == LEFT


async def test_keys_of_messages_must_stay_too() -> None:
    async with anthropic() as up, running(config(root=up.root)) as gateway:
        used = tool_use("toolu_1", "f", {"a": [{"bluebird": 1}]})
        up.script(whole(message(used, stop="tool_use")))
        assert (await gateway.post("/v1/messages", QUESTION)).status == 400
        turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": [used]}]
        asked_before = len(up.requests)
        refused = await gateway.post("/v1/messages", {**QUESTION, "messages": turns})
        assert (refused.status, len(up.requests)) == (400, asked_before)


MANY = f"[{','.join(['1'] * 50_001)}]"
HALF = f"[{','.join(['1'] * 30_000)}]"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("chat/completions", asked(messages=[{"role": "assistant", "tool_calls": [called(MANY)]}])),
        ("chat/completions", asked(messages=[{"role": "assistant", "tool_calls": [called(HALF), called(HALF)]}])),
        (
            "messages",
            {
                "model": "claude",
                "max_tokens": 9,
                "messages": [
                    {"role": "user", "content": "q"},
                    {"role": "assistant", "content": [tool_use("t", "f", {"x": orjson.loads(MANY)})]},
                    {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": "r"}]},
                ],
            },
        ),
    ],
)
async def test_what_has_too_many_texts_to_look_at_is_refused(path: str, body: dict[str, Any]) -> None:
    async with running(config()) as gateway:
        answer = await gateway.post(f"/v1/{path}", body)
    assert answer.status == 400
    assert "more than 50000 texts and numbers" in answer.json()["error"]["message"]
