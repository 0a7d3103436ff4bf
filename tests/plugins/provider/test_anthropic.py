"""The provider `anthropic`: its headers, its betas, its errors, chats that it answers in messages."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Any

import orjson
import pytest
from claudes import OPERATION, call_of
from claudes import claude as config

from qlens import CallError, ConfigError, Outgoing, Reply, UpstreamRejected
from qlens.dialects import messages as dialect
from qlens.testing import Running, running
from qlens.testing.anthropic import (
    KEY,
    MODEL,
    FakeAnthropic,
    anthropic,
    error,
    failure,
    message,
    stream,
    streamed,
    text,
    thinking,
    tool_use,
    whole,
)
from qlens.testing.upstreams import TEXT, Scripted

CHAT = "/v1/chat/completions"
MESSAGES = "/v1/messages"
HELLO: dict[str, Any] = {"role": "user", "content": "Hello"}


@pytest.fixture
async def claude() -> AsyncIterator[FakeAnthropic]:
    async with anthropic() as fake:
        yield fake


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "ours", "max_tokens": 100, "messages": [HELLO], **fields}


async def native(gateway: Running, headers: Mapping[str, str] | None = None, **fields: Any) -> Reply:
    """What the plugin answers to messages, which it sends as they are."""
    body = {"model": MODEL, "max_tokens": 100, "messages": [HELLO], **fields}
    call = call_of(body, "messages")
    call.headers = headers or {}
    plugin = gateway.plugin("provider", "theirs")
    outgoing = Outgoing(OPERATION["messages"], "messages", body, bool(body.get("stream")))
    reply = await plugin.send(call, outgoing)
    assert isinstance(reply, Reply)
    return reply


# --- what is sent ------------------------------------------------------------------------------


async def test_messages_go_out_as_they_are_with_the_gateways_own_key(claude: FakeAnthropic) -> None:
    async with running(config(claude.url + "/", headers={"X-Team": "search"})) as gateway:
        reply = await native(gateway, {"authorization": "Bearer theirs", "x-api-key": "theirs"}, temperature=0.5)
    sent = claude.requests[0]
    assert reply.complete
    assert sent.path == "/v1/messages"
    assert sent.body == {"model": MODEL, "max_tokens": 100, "messages": [HELLO], "temperature": 0.5}
    assert (sent.headers["x-api-key"], sent.headers["anthropic-version"]) == (KEY, "2023-06-01")
    assert sent.headers["x-team"] == "search"
    assert "authorization" not in sent.headers
    assert "anthropic-beta" not in sent.headers


@pytest.mark.parametrize(
    ("settings", "asked", "sent"),
    [
        ({}, "context-1m-2025-08-07", None),
        ({"betas": ["ours-1"]}, "", "ours-1"),
        ({"betas": ["ours-1"], "client_betas": ["context-*"]}, "context-1m, files-2", "ours-1,context-1m"),
        ({"betas": ["ours-1"], "client_betas": ["*"]}, "ours-1,a b,é", "ours-1"),
    ],
)
async def test_betas_are_the_operators_and_those_clients_may_ask_for(
    claude: FakeAnthropic, settings: dict[str, Any], asked: str, sent: str | None
) -> None:
    async with running(config(claude.url, **settings)) as gateway:
        await native(gateway, {"anthropic-beta": asked})
    assert claude.requests[0].headers.get("anthropic-beta") == sent


async def test_a_newer_version_is_spared_what_clients_of_other_apis_cannot_know(claude: FakeAnthropic) -> None:
    async with running(config(claude.url, version="2026-10-21")) as gateway:
        answer = await gateway.post(CHAT, chat(temperature=0.5))
        assert answer.status == 200, (answer.text, claude.refused)
        with pytest.raises(UpstreamRejected, match="temperature"):
            await native(gateway, temperature=0.5)
    assert claude.requests[0].headers["anthropic-version"] == "2026-10-21"


# --- a chat at the front door ------------------------------------------------------------------


async def test_a_chat_is_answered(claude: FakeAnthropic) -> None:
    async with running(config(claude.url)) as gateway:
        answer = await gateway.post(CHAT, chat())
        assert answer.status == 200, (answer.text, claude.refused)
        assert answer.json()["choices"][0]["message"]["content"] == TEXT
        assert answer.json()["usage"]["total_tokens"] == 13
        receipt = (await gateway.settled(1))[0]
    assert (receipt.outcome, receipt.usage.total, receipt.usage.source) == ("complete", 13, "provider")
    assert receipt.attempts[0].upstream_id == "req_011Example"


@pytest.mark.parametrize("asks", [True, False])
async def test_a_stream_is_answered_and_counted_whether_the_client_asks_or_not(
    claude: FakeAnthropic, asks: bool
) -> None:
    options = {"stream_options": {"include_usage": True}} if asks else {}
    async with running(config(claude.url)) as gateway:
        answer = await gateway.post(CHAT, chat(stream=True, **options))
        *events, end = answer.events()
        receipt = (await gateway.settled(1))[0]
    assert end == "[DONE]"
    assert "".join(each["delta"].get("content") or "" for event in events for each in event["choices"]) == TEXT
    assert [event for event in events if not event["choices"]] == [event for event in events[-1:] if asks]
    assert (receipt.outcome, receipt.usage.total, receipt.usage.source) == ("complete", 13, "provider")


@pytest.mark.parametrize(
    ("answer", "status", "code"),
    [
        (failure("overloaded_error", "Overloaded"), 503, "upstream_unavailable"),
        (failure("rate_limit_error", "x", retry_after=7), 429, "rate_limit_exceeded"),
        (failure("authentication_error", "invalid x-api-key sk-ant-example"), 502, "upstream_auth_error"),
        (failure("not_found_error", "model: x"), 404, "model_not_found"),
        (failure("invalid_request_error", "prompt is too long: 9 tokens > 8 maximum"), 400, "context_length_exceeded"),
        (failure("api_error", "Internal server error"), 502, "upstream_error"),
        (Scripted(events=[b": hi\n\n", *streamed(message())][:1]), 502, "upstream_truncated"),
    ],
)
@pytest.mark.parametrize("streams", [True, False])
async def test_failures_have_openais_status_and_code(
    claude: FakeAnthropic, answer: Scripted, status: int, code: str, streams: bool
) -> None:
    if answer.events is not None and not streams:
        answer = Scripted(body=b"", status=200)
        code = "upstream_invalid_response"
    claude.script(answer)
    async with running(config(claude.url)) as gateway:
        got = await gateway.post(CHAT, chat(stream=streams))
    assert (got.status, got.json()["error"]["code"]) == (status, code)
    assert "sk-ant" not in got.text
    assert got.headers.get("retry-after") == ("7" if status == 429 else None)


async def test_another_target_answers_while_the_first_is_overloaded_in_its_first_event(claude: FakeAnthropic) -> None:
    wrong = b"event: error\ndata: " + orjson.dumps(error("overloaded_error", "Overloaded")) + b"\n\n"
    ping = b'event: ping\ndata: {"type": "ping"}\n\n'
    claude.script(Scripted(events=[ping, wrong]))
    settings = orjson.loads(config(claude.url))
    settings["models"]["ours"]["targets"].append({"provider": "theirs", "model": "claude-opus-4-6"})
    async with running(orjson.dumps(settings).decode()) as gateway:
        answer = await gateway.post(CHAT, chat(stream=True))
        assert answer.events()[-1] == "[DONE]"
        receipt = (await gateway.settled(1))[0]
    assert [attempt.status for attempt in receipt.attempts] == [503, 200]
    assert claude.requests[1].body["model"] == "claude-opus-4-6"


async def test_an_error_in_a_stream_ends_it_without_a_done(claude: FakeAnthropic) -> None:
    wrong = b"event: error\ndata: " + orjson.dumps(error("overloaded_error", "Overloaded")) + b"\n\n"
    claude.script(Scripted(events=[*list(streamed(message()))[:5], wrong]))
    async with running(config(claude.url)) as gateway:
        answer = await gateway.post(CHAT, chat(stream=True))
        events = answer.events()
        receipt = (await gateway.settled(1))[0]
    assert events[-1]["error"]["code"] == "upstream_unavailable"
    assert "[DONE]" not in events
    assert receipt.outcome == "failed"


async def test_a_cached_answer_is_streamed_to_who_wants_a_stream(claude: FakeAnthropic) -> None:
    cache = {"cache": [{"plugin": "exact", "store": {"kind": "memory"}, "ttl_seconds": 60}]}
    claude.script(stream(message(text("once"))))
    async with running(config(claude.url, pipeline=cache)) as gateway:
        first = await gateway.post(CHAT, chat(stream=True, temperature=0))
        second = await gateway.post(CHAT, chat(temperature=0))
        third = await gateway.post(CHAT, chat(stream=True, temperature=0))
    assert first.events()[-1] == third.events()[-1] == "[DONE]"
    assert second.json()["choices"][0]["message"]["content"] == "once"
    assert second.headers["x-qlens-cache"] == third.headers["x-qlens-cache"] == "hit"
    assert len(claude.requests) == 1


async def test_a_client_that_leaves_closes_the_connection(claude: FakeAnthropic) -> None:
    claude.script(stream(message(text("word " * 50)), hang=True))
    async with running(config(claude.url)) as gateway:
        async with gateway.session.post(gateway.url + CHAT, json=chat(stream=True)) as answer:
            await answer.content.readany()
        await claude.requests[0].closed.wait()
        receipt = (await gateway.settled(1))[0]
    assert receipt.outcome == "abandoned"
    assert receipt.usage.total


async def test_messages_pass_unchanged_and_say_what_they_used(claude: FakeAnthropic) -> None:
    claude.script(whole(message(text("Hi."))))
    async with running(config(claude.url)) as gateway:
        reply = await native(gateway)
        assert orjson.loads(reply.body or b"") == message(text("Hi."))
        assert reply.usage is not None
        assert reply.usage.total == 13
        claude.script(failure("overloaded_error", "Overloaded"))
        with pytest.raises(CallError):
            await native(gateway, stream=True)


# --- messages at the front door ----------------------------------------------------------------


def messages(**fields: Any) -> dict[str, Any]:
    return {"model": "ours", "max_tokens": 100, "messages": [HELLO], **fields}


async def test_messages_pass_byte_by_byte_and_are_counted(claude: FakeAnthropic) -> None:
    told = message(thinking(), text("Hi."), tool_use("toolu_1", "f", {"a": 1}), stop="tool_use")
    claude.script(whole(told), stream(told))
    async with running(config(claude.url)) as gateway:
        answer = await gateway.post(MESSAGES, messages())
        streamed_answer = await gateway.post(MESSAGES, messages(stream=True))
        receipts = await gateway.settled(2)
    assert answer.json() == told
    assert streamed_answer.body == b"".join(streamed(told))
    assert [(each.outcome, each.usage.total, each.usage.source) for each in receipts] == [
        ("complete", 13, "provider"),
        ("complete", 13, "provider"),
    ]


async def test_a_guard_finds_what_it_looks_for_in_messages_and_their_streams(claude: FakeAnthropic) -> None:
    rule = {"name": "word", "regex": "secret", "action": "redact", "replacement": "[word]"}
    guard = {"guard": [{"plugin": "pattern", "rules": [rule]}]}
    told = message(text("a secret, a secret"), tool_use("toolu_1", "f", {"a": "secret"}), stop="tool_use")
    claude.script(whole(told), stream(told, size=3))
    called = {"role": "assistant", "content": [tool_use("toolu_1", "f", {"name": "a secret"})]}
    result = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "toolu_1", "content": "secret"}]}
    asked = messages(
        system="keep the secret",
        messages=[HELLO, called, result],
        tools=[{"name": "f", "input_schema": {"type": "object"}}],
    )
    async with running(config(claude.url, pipeline=guard)) as gateway:
        answer = await gateway.post(MESSAGES, asked)
        streamed_answer = await gateway.post(MESSAGES, {**asked, "stream": True})
    clean = message(text("a [word], a [word]"), tool_use("toolu_1", "f", {"a": "[word]"}), stop="tool_use")
    assert answer.json() == clean
    assert dialect.assemble(streamed_answer.events()) == clean
    assert all(b"secret" not in request.content for request in claude.requests)


async def test_a_cached_message_is_streamed_to_who_wants_a_stream(claude: FakeAnthropic) -> None:
    cache = {"cache": [{"plugin": "exact", "store": {"kind": "memory"}, "ttl_seconds": 60}]}
    told = message(text("once"))
    claude.script(stream(told))
    async with running(config(claude.url, pipeline=cache)) as gateway:
        first = await gateway.post(MESSAGES, messages(stream=True, temperature=0))
        second = await gateway.post(MESSAGES, messages(temperature=0))
        third = await gateway.post(MESSAGES, messages(stream=True, temperature=0))
    assert dialect.assemble(first.events()) == second.json() == dialect.assemble(third.events()) == told
    assert second.headers["x-qlens-cache"] == third.headers["x-qlens-cache"] == "hit"


async def test_an_error_in_messages_has_anthropics_shape(claude: FakeAnthropic) -> None:
    claude.script(failure("overloaded_error", "Overloaded"), Scripted(events=list(streamed(message()))[:5]))
    async with running(config(claude.url)) as gateway:
        before = await gateway.post(MESSAGES, messages())
        within = await gateway.post(MESSAGES, messages(stream=True))
    assert (before.status, before.json()["type"], before.json()["error"]["type"]) == (503, "error", "overloaded_error")
    assert within.events()[-1]["error"]["type"] == "api_error"
    assert within.body.rindex(b"event: error\n") > within.body.rindex(b"event: content_block_delta\n")


# --- settings ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"version": "latest"}, "version"),
        ({"betas": ["a b"]}, "betas"),
        ({"client_betas": ["a\nb"]}, "client_betas"),
        ({"headers": {"x-api-key": "x"}}, "set by the gateway"),
        ({"headers": {"a b": "x"}}, "not the name of a header"),
        ({"base_url": "api.anthropic.com"}, "base_url"),
        ({"api_key": " "}, "api_key"),
        ({"idle_seconds": 0}, "idle_seconds"),
    ],
)
async def test_wrong_settings_are_told(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        async with running(config("http://127.0.0.1:1", **settings)):
            pass
