"""The plugin `pattern`: what it blocks and redacts, in prompts and answers, whole or in pieces."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import pytest

from qlens import StartupError
from qlens.cli import main
from qlens.testing import Response, Running, Scripted, check_plugin, running, upstream
from qlens.testing.upstreams import chat_events
from qlens_plugins.guard.pattern import Pattern

PATH = "/v1/chat/completions"


def config(rules: str, *, url: str = "", hold_back: int = 64, stages: str = "") -> str:
    provider = f"{{plugin: openai, base_url: '{url}', api_key: sk-example-upstream}}" if url else "{plugin: echo}"
    return f"""
pipeline:
  auth: [{{plugin: anonymous}}]
  guard: [{{plugin: pattern, hold_back: {hold_back}, rules: {rules}}}]
  cost: []
  {stages}
providers: {{up: {provider}}}
models: {{small: {{max_output_tokens: 1000, targets: [{{provider: up, model: small}}]}}}}
"""


async def say(gateway: Running, *texts: str, **fields: Any) -> Response:
    messages = [{"role": "user", "content": text} for text in texts]
    return await gateway.post(PATH, {"model": "small", "messages": messages, **fields})


def said(answer: Response) -> str:
    assert answer.status == 200, answer.text
    if "event-stream" not in answer.headers["content-type"]:
        return str(answer.json()["choices"][0]["message"]["content"])
    events = [event for event in answer.events() if event != "[DONE]" and event.get("choices")]
    return "".join(event["choices"][0]["delta"].get("content") or "" for event in events)


def test_it_keeps_the_contract_of_its_stage() -> None:
    check_plugin("guard", Pattern)


# --- prompts -----------------------------------------------------------------------------------


async def test_a_blocked_prompt_reaches_no_provider_and_names_the_rule_but_not_the_text() -> None:
    rules = "[{name: no-falcon, words: [falcon], on: [request]}]"
    async with upstream() as up, running(config(rules, url=up.url)) as gateway:
        answer = await say(gateway, "first", "tell me about falcon")
        error = answer.json()["error"]
        assert (answer.status, error["type"], error["code"]) == (400, "invalid_request_error", "content_filter")
        assert "'no-falcon'" in error["message"]
        assert "tell me" not in answer.text
        assert up.requests == []
        (receipt,) = await gateway.settled(1)
        assert receipt.outcome == "blocked"


async def test_a_redacted_prompt_reaches_the_provider_without_what_matched() -> None:
    rules = r"[{name: mail, regex: '[a-z]+@[a-z]+\.com', action: redact, replacement: '\1 <mail>', on: [request]}]"
    async with upstream() as up, running(config(rules, url=up.url)) as gateway:
        await say(gateway, "write to ann@example.com and bob@example.com", "thanks")
        contents = [message["content"] for message in up.requests[0].body["messages"]]
        assert contents == [r"write to \1 <mail> and \1 <mail>", "thanks"]


async def test_the_parts_of_a_message_are_looked_at_too() -> None:
    rules = "[{name: falcon, words: [falcon], action: redact, on: [request]}]"
    async with upstream() as up, running(config(rules, url=up.url)) as gateway:
        parts = [{"type": "text", "text": "my falcon"}, {"type": "text", "text": "my hawk"}]
        await gateway.post(PATH, {"model": "small", "messages": [{"role": "user", "content": parts}]})
        sent = up.requests[0].body["messages"][0]["content"]
        assert [part["text"] for part in sent] == ["my [redacted]", "my hawk"]


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("the falcon flies", "the # flies"),
        ("falcon", "#"),
        ("(falcon), falcon!", "(#), #!"),
        ("falconry and xfalcon and falcon_1", "falconry and xfalcon and falcon_1"),
        ("Falcon", "Falcon"),
        ("project x2 is project x", "project x2 is #"),
        ("c++ and c", "# and c"),
    ],
)
async def test_words_match_as_whole_words(text: str, left: str) -> None:
    rules = "[{name: w, words: [falcon, project x, c++], action: redact, replacement: '#', on: [request]}]"
    async with running(config(rules)) as gateway:
        assert said(await say(gateway, text)) == left


async def test_case_is_ignored_where_the_rule_says_so() -> None:
    rules = "[{name: w, words: [falcon], action: redact, ignore_case: true}, {name: r, regex: SKY, action: redact}]"
    async with running(config(rules)) as gateway:
        assert said(await say(gateway, "FALCON Falcon sky")) == "[redacted] [redacted] sky"
        assert said(await say(gateway, "Falconry and xFALCON")) == "Falconry and xFALCON"


async def test_rules_apply_in_order_each_to_what_the_one_before_left() -> None:
    rules = (
        "[{name: one, words: [falcon], action: redact, replacement: hawk, on: [request]},"
        " {name: two, words: [hawk], on: [request]}]"
    )
    async with running(config(rules)) as gateway:
        assert (await say(gateway, "falcon")).status == 400
        assert (await say(gateway, "eagle")).status == 200


async def test_a_rule_for_answers_leaves_prompts_alone_and_the_other_way_round() -> None:
    rules = "[{name: in, words: [upstream], on: [request]}, {name: out, words: [Hello], action: redact, on: [reply]}]"
    async with upstream() as up, running(config(rules, url=up.url)) as gateway:
        assert said(await say(gateway, "Hello")) == "[redacted] from upstream."
        assert up.requests[0].body["messages"][0]["content"] == "Hello"


async def test_what_an_expression_only_looks_at_is_no_match() -> None:
    rules = "[{name: ahead, regex: '(?=.)'}, {name: both, regex: '(?=h)|falcon', action: redact}]"
    async with running(config(rules)) as gateway:
        assert said(await say(gateway, "hello falcon")) == "hello [redacted]"


# --- answers -----------------------------------------------------------------------------------


def answer_with(text: str) -> Scripted:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    return Scripted(body={"id": "x", "object": "chat.completion", "created": 1, "choices": [choice]})


async def test_a_match_in_a_whole_answer_may_be_longer_than_the_hold_back() -> None:
    rules = "[{name: long, regex: 'BEGIN.*END', action: redact, on: [reply]}]"
    async with upstream() as up, running(config(rules, url=up.url, hold_back=8)) as gateway:
        up.script(answer_with("so: BEGIN" + " secret" * 100 + " END."))
        assert said(await say(gateway, "x")) == "so: [redacted]."


async def test_a_blocked_answer_is_an_error_and_the_call_is_charged_for() -> None:
    rules = "[{name: out, words: [secret], on: [reply]}]"
    async with upstream() as up, running(config(rules, url=up.url)) as gateway:
        up.script(answer_with("a secret"))
        answer = await say(gateway, "x")
        assert (answer.status, answer.json()["error"]["code"]) == (400, "content_filter")
        assert "a secret" not in answer.text
        (receipt,) = await gateway.settled(1)
        assert (receipt.outcome, receipt.usage.total > 0) == ("blocked", True)


@pytest.mark.parametrize("size", range(1, 12))
async def test_a_streamed_answer_is_redacted_wherever_it_is_cut(size: int) -> None:
    text = "my secret and the secretary's secret"
    pieces = [text[start : start + size] for start in range(0, len(text), size)]
    head = {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    events: list[Any] = [
        {**head, "choices": [{"index": 0, "delta": {"content": piece}, "finish_reason": None}]} for piece in pieces
    ]
    events.append({**head, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    rules = "[{name: out, words: [secret], action: redact, on: [reply]}]"
    async with upstream() as up, running(config(rules, url=up.url, hold_back=6)) as gateway:
        up.script(Scripted(events=[*events, "[DONE]"]))
        answer = await say(gateway, "x", stream=True)
        assert said(answer) == "my [redacted] and the secretary's [redacted]"
        assert answer.events()[-1] == "[DONE]"


async def test_a_stream_that_is_blocked_ends_with_an_error_and_without_the_text() -> None:
    rules = "[{name: out, words: [secret], on: [reply]}]"
    async with upstream() as up, running(config(rules, url=up.url, hold_back=6)) as gateway:
        up.script(Scripted(events=chat_events("this is quite a long text before the secret comes")))
        answer = await say(gateway, "x", stream=True)
        *_, last = answer.events()
        assert last["error"]["code"] == "content_filter"
        assert "'out'" in last["error"]["message"]
        assert "secret" not in answer.text
        (receipt,) = await gateway.settled(1)
        assert receipt.outcome == "blocked"


async def test_a_cached_answer_is_cleaned_as_well_and_the_cache_keeps_what_the_provider_said() -> None:
    rules = "[{name: out, words: [Hello], action: redact, on: [reply]}]"
    stages = "cache: [{plugin: exact}]"
    async with upstream() as up, running(config(rules, url=up.url, stages=stages)) as gateway:
        first, second = await say(gateway, "x"), await say(gateway, "x")
        assert second.headers["x-qlens-cache"] == "hit"
        assert said(first) == said(second) == "[redacted] from upstream."
        await gateway.reload(config(rules.replace("Hello", "upstream"), url=up.url, stages=stages))
        assert said(await say(gateway, "x")) == "Hello from [redacted]."


async def test_matches_are_counted_by_rule_once_for_each_prompt_and_answer() -> None:
    rules = "[{name: both, words: [falcon], action: redact, replacement: falcon}, {name: never, words: [hawk]}]"
    async with running(config(rules)) as gateway:
        await say(gateway, "falcon falcon", "falcon")
        text = (await gateway.get("/metrics")).text
        assert 'qlens_guard_matches_total{action="redact",guard="pattern",rule="both"} 2.0' in text
        assert 'rule="never"' not in text


# --- configuration -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ("[]", "rules"),
        ("[{name: x}]", "rule 'x' needs either `regex` or `words`"),
        ("[{name: x, regex: a, words: [b]}]", "rule 'x' needs either `regex` or `words`"),
        ("[{name: x, words: []}]", "`words` needs words that are not empty"),
        ("[{name: x, words: [' ']}]", "`words` needs words that are not empty"),
        ("[{name: x, regex: '(a'}]", "the regular expression is wrong: missing )"),
        ("[{name: x, regex: 'a*'}]", "matches the empty text"),
        ("[{name: x, words: [a], on: []}]", "`on` is empty; it takes request, reply or both"),
        ("[{name: x, words: [a], action: shout}]", "block, redact"),
        ("[{name: x, words: [a]}, {name: x, words: [b]}]", "two rules are called 'x'"),
        (f"[{{name: x, words: [{'a' * 65}]}}]", "raise hold_back to 65 or more"),
        ("[{name: '', words: [a]}]", "name"),
    ],
)
async def test_rules_that_make_no_sense_stop_the_start(rules: str, message: str) -> None:
    with pytest.raises(StartupError) as error:
        async with running(config(rules)):
            pass
    (fault,) = error.value.faults
    assert "pipeline.guard[0]" in fault.path
    assert message in str(fault)


def test_explain_names_the_rules_that_a_prompt_meets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rules = "[{name: falcon, words: [falcon]}, {name: hawk, words: [hawk]}]"
    (tmp_path / "qlens.yaml").write_text(config(rules))
    (tmp_path / "body.json").write_text('{"model": "small", "messages": [{"role": "user", "content": "my falcon"}]}')
    assert main(["explain", str(tmp_path / "qlens.yaml"), str(tmp_path / "body.json")]) == 0
    out = capsys.readouterr().out
    assert "the rule falcon would block the request" in out
    assert "hawk" not in out


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"description": "a falcon"}, "the rule bird would redact the request"),
        ({"name": "falcon"}, "the rule bird would refuse the request: what it would redact must stay as it is"),
    ],
)
def test_explain_says_where_a_rule_that_redacts_refuses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], fields: dict[str, Any], said: str
) -> None:
    tools = [{"type": "function", "function": {"name": "f", **fields}}]
    body = {"model": "small", "messages": [{"role": "user", "content": "my falcon"}], "tools": tools}
    (tmp_path / "qlens.yaml").write_text(config("[{name: bird, words: [falcon], action: redact}]"))
    (tmp_path / "body.json").write_bytes(orjson.dumps(body))
    assert main(["explain", str(tmp_path / "qlens.yaml"), str(tmp_path / "body.json")]) == 0
    assert [line.strip() for line in capsys.readouterr().out.splitlines() if "the rule bird" in line] == [
        f"guard.pattern: {said}"
    ]
