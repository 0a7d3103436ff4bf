"""One and the same answer as each kind of provider says it, and fakes of the providers that say it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import orjson
from attrs import define, evolve, field, frozen

from qlens import sse
from qlens.dialects import chat, responses, typed
from qlens.testing import anthropic as claude
from qlens.testing import bedrock as converse
from qlens.testing.anthropic import FakeAnthropic
from qlens.testing.azure import SAFE, FakeAzure
from qlens.testing.bedrock import FakeBedrock
from qlens.testing.responses import FakeResponses
from qlens.testing.upstreams import Event, Recorded, Scripted

Block = dict[str, Any]
PROMPT_TOKENS, CACHED_TOKENS, OUTPUT_TOKENS = TOKENS = 9, 2, 4
"""What each answer has used: all input, what of it was cached, all output."""


@frozen
class Said:
    """What a model says: the same whoever serves it."""

    text: str = ""
    calls: tuple[tuple[str, Mapping[str, Any]], ...] = ()
    """The tools that it calls, each with its arguments."""
    thought: str = ""
    cut: bool = False
    """Whether it ran into the limit of tokens."""
    broken: bool = False
    """Whether its stream ends before it is over."""
    encrypted: str | None = None
    """What an account of Responses makes of the thought."""


@define(eq=False)
class Script:
    """What is said next, in answer to requests that were found to be in order."""

    lines: deque[Said] = field(factory=deque)
    encrypted: str | None = None
    """What the account makes of a thought."""

    def answer(self, request: Recorded, usual: Scripted) -> Scripted:
        """The next line, told as the request wants it; the usual answer when there is none, or for a refusal."""
        if usual.status != 200 or not self.lines:
            return usual
        say = next((say for place, say in _SAYS.items() if request.path.endswith(place)), None)
        if say is None:
            return usual  # this was no question to a model that talks
        said = self.lines.popleft()
        told = say(evolve(said, encrypted=self.encrypted), request.body)
        if said.broken and told.events is not None:
            events = list(told.events)
            return evolve(told, events=events[: (len(events) + 1) // 2])
        return told


# --- the fakes ---------------------------------------------------------------------------------


@define(eq=False)
class OpenAIVoice(FakeResponses):
    """OpenAI itself: chat, Responses, embeddings."""

    script_of: Script = field(factory=Script)

    def _usual(self, request: Recorded) -> Scripted:
        self.script_of.encrypted = self.encrypted()
        return self.script_of.answer(request, super()._usual(request))


@define(eq=False)
class AzureVoice(FakeAzure):
    """Azure: as strict as the fake is, and with the oddities of its answers."""

    script_of: Script = field(factory=Script)

    def _usual(self, request: Recorded) -> Scripted:
        self.script_of.encrypted = self.keeper.encrypted()
        usual = super()._usual(request)
        told = self.script_of.answer(request, usual)
        if told is usual:
            return usual
        chat = request.path.endswith("/completions")
        return _filtered(told, usual) if chat else evolve(told, headers=usual.headers)


@define(eq=False)
class BedrockVoice(FakeBedrock):
    """Bedrock: what its service model and its known rules refuse is never answered."""

    script_of: Script = field(factory=Script)

    def _usual(self, request: Recorded) -> Scripted:
        return self.script_of.answer(request, super()._usual(request))


@define(eq=False)
class AnthropicVoice(FakeAnthropic):
    """Anthropic itself."""

    script_of: Script = field(factory=Script)

    def _usual(self, request: Recorded) -> Scripted:
        return self.script_of.answer(request, super()._usual(request))


Voice = OpenAIVoice | AzureVoice | BedrockVoice | AnthropicVoice


def _filtered(told: Scripted, usual: Scripted) -> Scripted:
    """A chat with what Azure's content filter says of it."""
    results = [{"prompt_index": 0, "content_filter_results": SAFE}]
    if told.events is None:
        assert isinstance(told.body, dict)
        choices = [{**choice, "content_filter_results": SAFE} for choice in told.body["choices"]]
        return Scripted(body={**told.body, "choices": choices, "prompt_filter_results": results}, headers=usual.headers)
    nameless = {"id": "", "object": "", "created": 0, "model": "", "choices": [], "prompt_filter_results": results}
    return Scripted(events=[nameless, *map(_judged, told.events)], headers=usual.headers)


def _judged(event: Event) -> Event:
    if not isinstance(event, dict):
        return event
    return {**event, "choices": [{**choice, "content_filter_results": SAFE} for choice in event["choices"]]}


# --- how each of them says it ------------------------------------------------------------------


def _as_chat(said: Said, body: Block) -> Scripted:
    # OpenAI does not show thoughts; it only counts them.
    calls = [
        {"id": f"call_{at:024d}", "type": "function", "function": {"name": name, "arguments": _json(given)}}
        for at, (name, given) in enumerate(said.calls)
    ]
    message = {"role": "assistant", "content": said.text or None, "refusal": None}
    finish = "tool_calls" if calls else "length" if said.cut else "stop"
    choice = {
        "message": {**message, **({"tool_calls": calls} if calls else {})},
        "logprobs": None,
        "finish_reason": finish,
    }
    count = body.get("n") or 1
    told = {
        "id": "chatcmpl-Example",
        "object": "chat.completion",
        "created": 1700000000,
        "model": "gpt-4o-2024-11-20",
        "choices": [{"index": index, **choice} for index in range(count)],
        "usage": {
            "prompt_tokens": PROMPT_TOKENS,
            "completion_tokens": OUTPUT_TOKENS * count,
            "total_tokens": PROMPT_TOKENS + OUTPUT_TOKENS * count,
            "prompt_tokens_details": {"cached_tokens": CACHED_TOKENS, "audio_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": 1 if said.thought else 0, "audio_tokens": 0},
        },
        "service_tier": "default",
        "system_fingerprint": "fp_example",
    }
    if not body.get("stream"):
        return Scripted(body=told)
    asked = (body.get("stream_options") or {}).get("include_usage")
    events = [event for event in chat.explode(told) if event["choices"] or asked]
    return Scripted(events=[*_words(events), sse.DONE])


def _words(events: list[Block]) -> Iterator[Event]:
    """The events of a chat, each text in two pieces."""
    for event in events:
        text = event["choices"][0]["delta"].get("content") if event["choices"] else None
        if not text:
            yield event
            continue
        for piece in (text[:3], text[3:]):
            yield {**event, "choices": [{**event["choices"][0], "delta": {"content": piece}}]}


def _as_responses(said: Said, body: Block) -> Scripted:
    status = "incomplete" if said.cut else "completed"
    output: list[Block] = []
    if said.thought:
        summary = (
            [{"type": "summary_text", "text": said.thought}] if (body.get("reasoning") or {}).get("summary") else []
        )
        included = "reasoning.encrypted_content" in (body.get("include") or ())
        encrypted = {"encrypted_content": said.encrypted} if included else {}
        output.append({"id": "rs_Example", "type": "reasoning", "summary": summary, **encrypted})
    if said.text:
        part = {"type": "output_text", "annotations": [], "logprobs": [], "text": said.text}
        message = {"id": "msg_Example", "type": "message", "status": status, "content": [part], "role": "assistant"}
        output.append(message)
    for at, (name, given) in enumerate(said.calls):
        call = {"id": f"fc_{at:048d}", "type": "function_call", "status": "completed", "arguments": _json(given)}
        output.append({**call, "call_id": f"call_{at:024d}", "name": name})
    told = {
        "id": "resp_Example",
        "object": "response",
        "created_at": 1700000000,
        "status": status,
        "error": None,
        "incomplete_details": {"reason": "max_output_tokens"} if said.cut else None,
        "instructions": body.get("instructions"),
        "max_output_tokens": body.get("max_output_tokens"),
        "model": "gpt-4o-2024-11-20",
        "output": output,
        "parallel_tool_calls": True,
        "previous_response_id": None,
        "store": False,
        "temperature": 1.0,
        "text": body.get("text") or {"format": {"type": "text"}},
        "tool_choice": body.get("tool_choice") or "auto",
        "tools": body.get("tools") or [],
        "top_p": 1.0,
        "truncation": "disabled",
        "metadata": {},
        "usage": {
            "input_tokens": PROMPT_TOKENS,
            "input_tokens_details": {"cached_tokens": CACHED_TOKENS, "cache_write_tokens": 0},
            "output_tokens": OUTPUT_TOKENS,
            "output_tokens_details": {"reasoning_tokens": 1 if said.thought else 0},
            "total_tokens": PROMPT_TOKENS + OUTPUT_TOKENS,
        },
    }
    if body.get("stream"):
        return Scripted(events=[typed.write(event) for event in responses.explode(told)])
    return Scripted(body=told)


def _as_messages(said: Said, body: Block) -> Scripted:
    thinks = (body.get("thinking") or {}).get("type") in {"enabled", "adaptive"}
    blocks = [claude.thinking(said.thought)] if said.thought and thinks else []
    forced = (body.get("tool_choice") or {}).get("name") if not said.calls else None
    calls = ((forced, orjson.loads(said.text)),) if forced else said.calls
    if said.text and not forced:
        blocks.append(claude.text(said.text))
    blocks += [claude.tool_use(f"toolu_{at:024d}", name, given) for at, (name, given) in enumerate(calls)]
    usage = {
        **claude.USAGE,
        "input_tokens": PROMPT_TOKENS - CACHED_TOKENS,
        "cache_read_input_tokens": CACHED_TOKENS,
        "output_tokens": OUTPUT_TOKENS,
    }
    stop = "tool_use" if calls else "max_tokens" if said.cut else "end_turn"
    told = claude.message(*blocks, stop=stop, usage=usage, model=body["model"])
    return claude.stream(told) if body.get("stream") else claude.whole(told)


def _as_converse_stream(said: Said, body: Block) -> Scripted:
    told = _as_converse(said, body)
    assert isinstance(told.body, dict)
    return converse.stream(converse.streamed(told.body))


def _as_converse(said: Said, body: Block) -> Scripted:
    more = body.get("additionalModelRequestFields", {})
    blocks: list[Block] = []
    if said.thought and ("thinking" in more or "reasoningConfig" in more):
        # Claude signs its thoughts, Nova does not.
        signed = {"signature": claude.thinking(said.thought)["signature"]} if "thinking" in more else {}
        blocks.append({"reasoningContent": {"reasoningText": {"text": said.thought, **signed}}})
    # A model that must call a tool says with it what it would have said without.
    forced = body.get("toolConfig", {}).get("toolChoice", {}).get("tool", {}).get("name") if not said.calls else None
    calls = ((forced, orjson.loads(said.text)),) if forced else said.calls
    if said.text and not forced:
        blocks.append({"text": said.text})
    blocks += [
        {"toolUse": {"toolUseId": f"tooluse_{at:022d}", "name": name, "input": dict(given)}}
        for at, (name, given) in enumerate(calls)
    ]
    usage = {
        "inputTokens": PROMPT_TOKENS - CACHED_TOKENS,
        "cacheReadInputTokens": CACHED_TOKENS,
        "outputTokens": OUTPUT_TOKENS,
        "totalTokens": PROMPT_TOKENS + OUTPUT_TOKENS,
    }
    stop = "tool_use" if calls else "max_tokens" if said.cut else "end_turn"
    return converse.whole(converse.answer(*blocks, stop=stop, usage=usage))


def _json(given: Mapping[str, Any]) -> str:
    return orjson.dumps(given).decode()


_SAYS: Mapping[str, Callable[[Said, Block], Scripted]] = {
    "/chat/completions": _as_chat,
    "/responses": _as_responses,
    "/messages": _as_messages,
    "/converse": _as_converse,
    "/converse-stream": _as_converse_stream,
}
"""How what is said is told, by the end of the path that was asked."""
