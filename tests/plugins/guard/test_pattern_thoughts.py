"""The plugin `pattern` and signed thoughts: they come out as they came in, or are signed no more."""

from __future__ import annotations

from base64 import urlsafe_b64decode
from typing import Any

import pytest

from qlens.testing import Running, Scripted, running, upstream
from qlens.testing.anthropic import KEY, MODEL, FakeAnthropic, anthropic, message, stream, thinking, tool_use, whole

CONFIG = r"""
pipeline:
  auth: [{plugin: anonymous}]
  guard:
    - {plugin: pattern, rules: [{name: card, regex: '\d{4}-\d{4}', action: redact, replacement: "[card]", on: [reply]}]}
  cost: []
providers:
  up: {plugin: openai, base_url: "URL", api_key: sk-example-upstream}
  claude: {plugin: anthropic, base_url: "ROOT", api_key: KEY}
models:
  small: {max_output_tokens: 1000, targets: [{provider: up, model: small}]}
  claude: {max_output_tokens: 30000, targets: [{provider: claude, model: MODEL}]}
"""
HARMLESS, SECRET, REDACTED = (
    "I should call the tool f for them.",
    "Their card is 4111-1111, I see.",
    "Their card is [card], I see.",
)
HEAD = {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "m"}
QUESTION = {"role": "user", "content": "q"}


def config(url: str = "http://127.0.0.1:9", root: str = "http://127.0.0.1:9") -> str:
    return CONFIG.replace("URL", url).replace("ROOT", root).replace("KEY", KEY).replace("MODEL", MODEL)


def think(up: FakeAnthropic, thought: str, *, streams: bool) -> None:
    told = message(thinking(thought), tool_use("toolu_1", "f", {"a": 1}), stop="tool_use")
    up.script(stream(told, size=3) if streams else whole(told))


# --- chat --------------------------------------------------------------------------------------


async def chat(gateway: Running, *messages: dict[str, Any], streams: bool = False) -> dict[str, Any]:
    """What the assistant says, put together as a client does."""
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    body = {"model": "claude", "reasoning_effort": "low", "max_tokens": 5000, "tools": [tool], "stream": streams}
    answer = await gateway.post("/v1/chat/completions", {**body, "messages": [QUESTION, *messages]})
    assert answer.status == 200, answer.text
    if not streams:
        return dict(answer.json()["choices"][0]["message"])
    return told_in(answer.events())


def told_in(events: list[Any]) -> dict[str, Any]:
    deltas = [choice["delta"] for event in events if event != "[DONE]" for choice in event["choices"]]
    blocks = [block for delta in deltas for block in delta.get("thinking_blocks") or ()]
    reasoning = "".join(delta.get("reasoning_content") or "" for delta in deltas)
    call = {"id": "toolu_1", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}
    more = {"thinking_blocks": blocks} if blocks else {}
    return {"role": "assistant", "content": None, "reasoning_content": reasoning, "tool_calls": [call], **more}


@pytest.mark.parametrize("streams", [False, True])
async def test_signed_thoughts_of_chat_come_back_as_they_were_or_not_at_all(streams: bool) -> None:
    result = {"role": "tool", "tool_call_id": "toolu_1", "content": "5"}
    async with anthropic() as up, running(config(root=up.root)) as gateway:
        for thought, blocks in ((HARMLESS, [thinking(HARMLESS)]), (SECRET, None)):
            think(up, thought, streams=streams)
            said = await chat(gateway, streams=streams)
            assert said.get("thinking_blocks") == blocks
            assert said["reasoning_content"] == (REDACTED if thought is SECRET else thought)
            await chat(gateway, said, result)
            assert up.refused == []


async def test_thoughts_that_come_in_pieces_before_their_signature() -> None:
    def piece(text: str, signature: str | None = None) -> dict[str, Any]:
        block = {"type": "thinking", "thinking": text, "signature": signature}
        delta = {"reasoning_content": text, "thinking_blocks": [block]}
        return {**HEAD, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]}

    last = {**HEAD, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
    async with upstream() as up, running(config(url=up.url)) as gateway:
        for thought, told, signatures in ((HARMLESS, HARMLESS, ["c2ln"]), (SECRET, REDACTED, [])):
            pieces = [piece(thought[:20]), piece(thought[20:]), piece("", "c2ln")]
            up.script(Scripted(events=[*pieces, last, "[DONE]"]))
            answer = await gateway.post(
                "/v1/chat/completions", {"model": "small", "messages": [QUESTION], "stream": True}
            )
            blocks = told_in(answer.events())["thinking_blocks"]
            assert "".join(block["thinking"] for block in blocks) == told
            assert [block["signature"] for block in blocks if block.get("signature")] == signatures


# --- messages ----------------------------------------------------------------------------------


async def ask(gateway: Running, *turns: dict[str, Any], streams: bool = False, path: str = "/v1/messages") -> Any:
    tool = {"name": "f", "input_schema": {"type": "object", "properties": {}}}
    mind = {"type": "enabled", "budget_tokens": 1024}
    body = {"model": "claude", "max_tokens": 5000, "thinking": mind, "tools": [tool], "messages": [QUESTION, *turns]}
    answer = await gateway.post(path, {**body, **({"stream": True} if streams else {})})
    assert answer.status == 200, answer.text
    if not streams:
        return answer.json().get("content")
    found: dict[int, Any] = {}
    for event in answer.events():
        delta, block = event.get("delta", {}), found.get(event.get("index"), {})
        if event["type"] == "content_block_start":
            found[event["index"]] = {**event["content_block"]}
        elif event["type"] == "content_block_stop" and block["type"] == "tool_use":
            block["input"] = {"a": 1}
        for name in {"thinking", "signature"} & delta.keys():
            block[name] += delta[name]
    return [found[index] for index in sorted(found)]


@pytest.mark.parametrize("streams", [False, True])
async def test_thoughts_of_messages_that_were_rewritten_are_taken_out_when_they_come_back(streams: bool) -> None:
    result = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "toolu_1", "content": "5"}]}
    call = tool_use("toolu_1", "f", {"a": 1})
    async with anthropic() as up, running(config(root=up.root)) as gateway:
        think(up, HARMLESS, streams=streams)
        said = await ask(gateway, streams=streams)
        assert said == [thinking(HARMLESS), call]
        await ask(gateway, {"role": "assistant", "content": said}, result)
        assert up.requests[-1].body["messages"][1]["content"] == [thinking(HARMLESS), call]
        assert "thinking" in up.requests[-1].body

        think(up, SECRET, streams=streams)
        said = await ask(gateway, streams=streams)
        assert said[0] == {"type": "thinking", "thinking": REDACTED, "signature": "qlens-rewritten-1"}
        for path in ("/v1/messages", "/v1/messages/count_tokens"):
            await ask(gateway, {"role": "assistant", "content": said}, result, path=path)
            assert up.requests[-1].body["messages"][1]["content"] == [call]
            assert "thinking" not in up.requests[-1].body  # a model does not think on without the thought before
        # Where no tool waits for its result, and in a turn of nothing else.
        await ask(gateway, {"role": "assistant", "content": [said[0]]}, {"role": "user", "content": "go on"})
        assert [turn["content"] for turn in up.requests[-1].body["messages"]] == ["q", "go on"]
        assert "thinking" in up.requests[-1].body
        assert up.refused == []


# --- Responses ---------------------------------------------------------------------------------


@pytest.mark.parametrize("streams", [False, True])
async def test_what_is_redacted_is_not_in_what_a_response_has_closed(streams: bool) -> None:
    asked = {"model": "claude", "reasoning": {"effort": "low", "summary": "auto"}, "max_output_tokens": 5000}
    tool = {"type": "function", "name": "f", "parameters": {"type": "object", "properties": {}}}
    body = {**asked, "tools": [tool], "store": False}
    async with anthropic() as up, running(config(root=up.root)) as gateway:
        for thought in (HARMLESS, SECRET):
            think(up, thought, streams=streams)
            answer = await gateway.post("/v1/responses", {**body, "input": [QUESTION], "stream": streams})
            output = (answer.events()[-1]["response"] if streams else answer.json())["output"]
            reasoning = output[0]
            if thought is HARMLESS:
                closed = reasoning["encrypted_content"].removeprefix("qlens-thoughts-1.")
                assert thought.encode() in urlsafe_b64decode(closed)
            else:
                assert reasoning["summary"] == [{"type": "summary_text", "text": REDACTED}]
                assert "qlens-thoughts" not in answer.text
            result = {"type": "function_call_output", "call_id": "toolu_1", "output": "5"}
            again = await gateway.post("/v1/responses", {**body, "input": [QUESTION, *output, result]})
            assert (again.status, up.refused) == (200, []), again.text
            sent = [block["type"] for block in up.requests[-1].body["messages"][1]["content"]]
            assert sent == (["thinking", "tool_use"] if thought is HARMLESS else ["tool_use"])
