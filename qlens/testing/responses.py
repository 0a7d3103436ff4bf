"""A real HTTP server that plays OpenAI's Responses: it keeps what it made, and is as strict about a body as OpenAI.

https://platform.openai.com/docs/api-reference/responses
"""

from __future__ import annotations

import re
import secrets
from base64 import b64encode
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import orjson
from attrs import define, field, frozen

from qlens.testing.upstreams import TEXT, Event, FakeUpstream, Recorded, Scripted, error, serving

Body = dict[str, Any]

USAGE = {
    "input_tokens": 9,
    "input_tokens_details": {"cached_tokens": 2, "cache_write_tokens": 0},
    "output_tokens": 4,
    "output_tokens_details": {"reasoning_tokens": 1},
    "total_tokens": 13,
}
ARGUMENTS = '{"city":"Paris"}'
THOUGHT = "Somebody greets me."
FAILURE = "make it fail"
"""An input with these words makes a response that fails after it has begun."""

_PARAMETERS = frozenset(
    {
        *("background", "conversation", "include", "input", "instructions", "max_output_tokens", "max_tool_calls"),
        *("metadata", "model", "parallel_tool_calls", "previous_response_id", "prompt", "prompt_cache_key"),
        *("prompt_cache_retention", "reasoning", "safety_identifier", "service_tier", "store", "stream"),
        *(
            "stream_options",
            "temperature",
            "text",
            "tool_choice",
            "tools",
            "top_logprobs",
            "top_p",
            "truncation",
            "user",
        ),
    }
)
_COUNTED = frozenset(
    {
        *("conversation", "input", "instructions", "model", "parallel_tool_calls", "personality"),
        *("previous_response_id", "reasoning", "text", "tool_choice", "tools", "truncation"),
    }
)
_COMPACTED = frozenset(
    {
        *("input", "instructions", "model", "previous_response_id", "prompt_cache_key", "prompt_cache_options"),
        "prompt_cache_retention",
    }
)
_TOOLS = frozenset({"function", "custom", "web_search", "file_search", "code_interpreter", "image_generation", "mcp"})
_PARTS = {
    "assistant": frozenset({"output_text", "refusal"}),
    "user": frozenset({"input_text", "input_image", "input_file", "input_audio"}),
}
_PARTS["system"] = _PARTS["developer"] = _PARTS["user"]
_ENCRYPTED = frozenset({"compaction", "reasoning"})
"""The items that hold something that only their account can read."""
_OF_CALLS = {"function_call": "function_call_output", "custom_tool_call": "custom_tool_call_output"}


@frozen
class Refused(Exception):
    """A 400 with OpenAI's error object, or another error."""

    message: str
    param: str | None = None
    code: str | None = None
    status: int = 400

    def answer(self) -> Scripted:
        """It, as an answer."""
        return error(self.status, self.message, param=self.param, code=self.code)


@frozen
class Kept:
    """A response with what it was made of."""

    response: Body
    items: list[Body]
    """Its input, each item with an id."""
    history: list[Body]
    """All that a model reads that goes on from here."""
    events: list[Event]


@define(eq=False)
class FakeResponses(FakeUpstream):
    """OpenAI as far as Responses go; made by `responses_upstream()`. All else it answers as `upstream()` does."""

    account: str = field(factory=lambda: secrets.token_hex(8))
    """Who can read what is encrypted here, and nobody else."""
    names: dict[str, str] = field(factory=dict)
    """What answers call a model, by the name it was asked for by; all others are `upstream`."""
    kept: dict[str, Kept] = field(factory=dict)
    """The responses that were stored, by id."""
    made: int = 0
    """How many responses were made, stored or not."""

    def _usual(self, request: Recorded) -> Scripted:
        _, found, rest = request.path.partition("/responses")
        if not found:
            return super()._usual(request)
        try:
            return self._responses(request, [step for step in rest.split("/") if step])
        except Refused as refused:
            return refused.answer()

    def _responses(self, request: Recorded, steps: list[str]) -> Scripted:
        match request.method, steps:
            case "POST", []:
                return self._create(request.body)
            case "POST", ["input_tokens"]:
                _check_counted(request.body)
                return Scripted(body={"object": "response.input_tokens", "input_tokens": USAGE["input_tokens"]})
            case "POST", ["compact"]:
                return self._compact(request.body)
            case "GET", [name]:
                return self._retrieve(self._find(name), request.query)
            case "DELETE", [name]:
                self._find(name)
                del self.kept[name]
                return Scripted(body={"id": name, "object": "response", "deleted": True})
            case "POST", [name, "cancel"]:
                return self._cancel(self._find(name))
            case "GET", [name, "input_items"]:
                return _listed(self._find(name).items, request.query)
        raise Refused(f"Unknown request URL: {request.method} {request.path}", code="unknown_url", status=404)

    def _find(self, name: str) -> Kept:
        if name not in self.kept:
            raise Refused(f"Response with id '{name}' not found.", status=404)
        return self.kept[name]

    # --- create --------------------------------------------------------------------------------

    def _create(self, body: Body) -> Scripted:
        _check(body)
        before: list[Body] = []
        if (name := body.get("previous_response_id")) is not None:
            if name not in self.kept:
                raise Refused(
                    f"Previous response with id '{name}' not found.",
                    "previous_response_id",
                    "previous_response_not_found",
                )
            before = self.kept[name].history
        items = self._items(body["input"], self.made + 1)
        _check_calls([*before, *items])
        self.made += 1
        response, events = self._answered(body, self.made)
        if response["store"]:
            kept = Kept(response, items, [*before, *items, *response["output"]], events)
            self.kept[response["id"]] = kept
        if body.get("background") and not body.get("stream"):
            waiting = {**response, "status": "queued", "output": [], "usage": None}
            return Scripted(body=waiting, headers={"x-request-id": "req-upstream"})
        if body.get("stream"):
            return Scripted(events=events, headers={"x-request-id": "req-upstream"})
        return Scripted(body=response, headers={"x-request-id": "req-upstream"})

    def _compact(self, body: Body) -> Scripted:
        """The user's messages, and all else in an item that this account can read."""
        for name in body:
            if name not in _COMPACTED:
                raise Refused(f"Unknown parameter: '{name}'.", name, "unknown_parameter")
        self.made += 1
        items = self._items(body.get("input") or [], self.made)
        item = {"id": f"cmp_{self.made:048x}", "type": "compaction", "encrypted_content": self.encrypted()}
        output = [*(each for each in items if each.get("role") == "user"), item]
        head = {"id": f"resp_{self.made:048x}", "object": "response.compaction", "created_at": 1700000000}
        return Scripted(body={**head, "output": output, "usage": USAGE})

    def _items(self, given: Any, number: int) -> list[Body]:
        """The input as items with ids; refuses what is none, and what this account does not know."""
        listed = [{"role": "user", "content": given}] if isinstance(given, str) else given
        known = {item["id"] for kept in self.kept.values() for item in kept.history}
        items = []
        for at, item in enumerate(listed):
            kind = item.get("type", "message")
            read = {"content": _content(item, f"input[{at}]")} if kind == "message" else {}
            if kind in _ENCRYPTED and item.get("encrypted_content") is not None:
                if item["encrypted_content"] != self.encrypted():
                    wording = "The encrypted content could not be verified."
                    raise Refused(wording, code="invalid_encrypted_content")
            elif kind == "reasoning" and item.get("id") not in known:
                wording = "Items are not persisted when `store` is set to false."
                raise Refused(f"Item with id '{item.get('id')}' not found. {wording}", "input", status=404)
            items.append({"id": f"{kind[:3]}_in_{number:032x}{at:04x}", "type": kind, **item, **read})
        return items

    def encrypted(self) -> str:
        """What this account makes of a thought."""
        return b64encode(f"{self.account} {THOUGHT}".encode()).decode()

    def _answered(self, body: Body, number: int) -> tuple[Body, list[Event]]:
        """A response, and the events it would have been streamed as."""
        told = _Told(number)
        response = _response(body, number, self.names.get(body["model"], "upstream"))
        told("response.created", response=response)
        if response["background"]:
            told("response.queued", response={**response, "status": "queued"})
        told("response.in_progress", response=response)
        if FAILURE in orjson.dumps(body["input"]).decode():
            error = {"code": "server_error", "message": "It was told to fail."}
            failed = {**response, "status": "failed", "error": error}
            told("response.failed", response=failed)
            return failed, told.events
        output: list[Body] = []
        if (body.get("reasoning") or {}).get("effort"):
            included = "reasoning.encrypted_content" in (body.get("include") or ())
            output.append(_thought(told, len(output), self.encrypted() if included else None))
        cut = body.get("max_output_tokens") == 16
        tools = [tool for tool in body.get("tools") or () if tool["type"] == "function"]
        if body.get("tool_choice") == "required" and tools:
            output.append(_call(told, len(output), tools[0]["name"]))
        else:
            output.append(_message(told, len(output), TEXT[:6] if cut else TEXT, "incomplete" if cut else "completed"))
        ended = {
            **response,
            "status": "incomplete" if cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": output,
            "usage": USAGE,
        }
        told(f"response.{ended['status']}", response=ended)
        return ended, told.events

    # --- what is kept --------------------------------------------------------------------------

    @staticmethod
    def _retrieve(kept: Kept, query: Mapping[str, str]) -> Scripted:
        if query.get("stream") != "true":
            return Scripted(body=kept.response)
        if not kept.response["background"]:
            raise Refused("Only responses created with background=true can be streamed.", "stream", "unsupported_value")
        after = int(query.get("starting_after", -1))
        return Scripted(events=[event for number, event in enumerate(kept.events) if number > after])

    def _cancel(self, kept: Kept) -> Scripted:
        if not kept.response["background"]:
            raise Refused("Cannot cancel a synchronous response.")
        response = {**kept.response, "status": "cancelled", "output": [], "usage": None}
        self.kept[response["id"]] = Kept(response, kept.items, kept.history, kept.events)
        return Scripted(body=response)


@asynccontextmanager
async def responses_upstream() -> AsyncIterator[FakeResponses]:
    """Serve Responses on a free loopback port until the block is left.

    An answer is a text; a call of the first function where `tool_choice` is `required`; with an effort that is asked
    for, a thought comes first; with the least `max_output_tokens` it is cut off.
    """
    async with serving(FakeResponses()) as fake:
        yield fake


def _listed(items: list[Body], query: Mapping[str, str]) -> Scripted:
    ordered = items if query.get("order") == "asc" else items[::-1]
    ids = [item["id"] for item in ordered]
    start = ids.index(query["after"]) + 1 if query.get("after") in ids else 0
    limit = int(query.get("limit", 20))
    page = ordered[start : start + limit]
    return Scripted(
        body={
            "object": "list",
            "data": page,
            "first_id": page[0]["id"] if page else None,
            "last_id": page[-1]["id"] if page else None,
            "has_more": start + limit < len(ordered),
        }
    )


# --- what is refused ---------------------------------------------------------------------------


def _check(body: Body) -> None:
    for name in body:
        if name not in _PARAMETERS:
            raise Refused(f"Unknown parameter: '{name}'.", name, "unknown_parameter")
    for name in body.get("stream_options") or {}:
        if name != "include_obfuscation":
            param = f"stream_options.{name}"
            raise Refused(f"Unknown parameter: '{param}'.", param, "unknown_parameter")
    if "stream_options" in body and not body.get("stream"):
        raise Refused("The 'stream_options' parameter is only allowed when 'stream' is enabled.", "stream_options")
    for name in ("model", "input"):
        if name not in body:
            raise Refused(f"Missing required parameter: '{name}'.", name, "missing_required_parameter")
    if (most := body.get("max_output_tokens")) is not None and most < 16:
        message = (
            f"Invalid 'max_output_tokens': integer below minimum value. Expected a value >= 16, but got {most} instead."
        )
        raise Refused(message, "max_output_tokens", "integer_below_min_value")
    if body.get("background") and body.get("store") is False:
        raise Refused("Background mode requires 'store' to be true.", "background")
    for at, tool in enumerate(body.get("tools") or ()):
        _check_tool(tool, f"tools[{at}]")


def _check_counted(body: Body) -> None:
    for name in body:
        if name not in _COUNTED:
            raise Refused(f"Unknown parameter: '{name}'.", name, "unknown_parameter")


def _check_tool(tool: Body, param: str) -> None:
    kind = tool.get("type")
    if kind not in _TOOLS:
        raise Refused(f"Invalid value: '{kind}'.", f"{param}.type", "invalid_value")
    if kind in {"function", "custom"} and "name" not in tool:
        raise Refused(f"Missing required parameter: '{param}.name'.", f"{param}.name", "missing_required_parameter")


def _content(item: Body, param: str) -> list[Body]:
    role, content = item.get("role"), item.get("content")
    allowed = _PARTS.get(str(role))
    if allowed is None:
        listed = "'assistant', 'system', 'developer', and 'user'"
        raise Refused(f"Invalid value: '{role}'. Supported values are: {listed}.", f"{param}.role", "invalid_value")
    if isinstance(content, str):
        return [{"type": "output_text" if role == "assistant" else "input_text", "text": content}]
    if not isinstance(content, list):
        raise Refused(f"Invalid type for '{param}.content'.", f"{param}.content", "invalid_type")
    for at, part in enumerate(content):
        if part.get("type") not in allowed:
            place = f"{param}.content[{at}]"
            listed = ", ".join(f"'{name}'" for name in sorted(allowed))
            message = f"Invalid value: '{part.get('type')}'. Supported values are: {listed}."
            raise Refused(message, place, "invalid_value")
    return content


def _check_calls(items: list[Body]) -> None:
    for call, result in _OF_CALLS.items():
        called = [item["call_id"] for item in items if item["type"] == call]
        answered = [item["call_id"] for item in items if item["type"] == result]
        for name in answered:
            if name not in called:
                raise Refused(f"No tool call found for {result.replace('_', ' ')} with call_id {name}.", "input")
        for name in called:
            if name not in answered:
                raise Refused(f"No tool output found for {call.replace('_', ' ')} {name}.", "input")


# --- what is said ------------------------------------------------------------------------------


def _response(body: Body, number: int, model: str) -> Body:
    store = body.get("store")
    return {
        "id": f"resp_{number:048x}",
        "object": "response",
        "created_at": 1700000000,
        "status": "in_progress",
        "background": bool(body.get("background")),
        "conversation": {"id": _conversation(body)} if body.get("conversation") else None,
        "error": None,
        "incomplete_details": None,
        "instructions": body.get("instructions"),
        "max_output_tokens": body.get("max_output_tokens"),
        "model": model,
        "output": [],
        "parallel_tool_calls": True,
        "previous_response_id": body.get("previous_response_id"),
        "reasoning": {"effort": None, "summary": None, **(body.get("reasoning") or {})},
        "service_tier": "default",
        "store": store is None or store,
        "temperature": 1.0,
        "text": {"format": {"type": "text"}, **(body.get("text") or {})},
        "tool_choice": body.get("tool_choice") or "auto",
        "tools": body.get("tools") or [],
        "top_p": 1.0,
        "truncation": "disabled",
        "usage": None,
        "user": None,
        "metadata": body.get("metadata") or {},
    }


def _conversation(body: Body) -> str:
    given = body["conversation"]
    return str(given["id"] if isinstance(given, dict) else given)


@define(eq=False)
class _Told:
    """The events of a stream as they are told, one after another."""

    number: int
    events: list[Event] = field(factory=list)

    def __call__(self, kind: str, **fields: Any) -> None:
        event = {"type": kind, "sequence_number": len(self.events), **fields}
        self.events.append(b"event: " + kind.encode() + b"\ndata: " + orjson.dumps(event) + b"\n\n")

    def about(self, index: int, item_id: str) -> Callable[..., None]:
        """The same for events about one item."""
        return lambda kind, **fields: self(kind, item_id=item_id, output_index=index, **fields)


def _message(told: _Told, index: int, text: str, status: str) -> Body:
    item: Body = {
        "id": f"msg_{told.number:048x}",
        "type": "message",
        "status": "in_progress",
        "content": [],
        "role": "assistant",
    }
    part: Body = {"type": "output_text", "annotations": [], "logprobs": [], "text": ""}
    about = told.about(index, item["id"])
    told("response.output_item.added", output_index=index, item=item)
    about("response.content_part.added", content_index=0, part=part)
    for delta in re.findall(r"\S+\s*", text):
        about("response.output_text.delta", content_index=0, delta=delta, logprobs=[], obfuscation="x" * 7)
    about("response.output_text.done", content_index=0, text=text, logprobs=[])
    about("response.content_part.done", content_index=0, part={**part, "text": text})
    item = {**item, "status": status, "content": [{**part, "text": text}]}
    told("response.output_item.done", output_index=index, item=item)
    return item


def _thought(told: _Told, index: int, encrypted: str | None) -> Body:
    item: Body = {"id": f"rs_{told.number:048x}", "type": "reasoning", "summary": []}
    about = told.about(index, item["id"])
    told("response.output_item.added", output_index=index, item=item)
    part = {"type": "summary_text", "text": ""}
    about("response.reasoning_summary_part.added", summary_index=0, part=part)
    about("response.reasoning_summary_text.delta", summary_index=0, delta=THOUGHT)
    about("response.reasoning_summary_text.done", summary_index=0, text=THOUGHT)
    about("response.reasoning_summary_part.done", summary_index=0, part={**part, "text": THOUGHT})
    item = {**item, "summary": [{**part, "text": THOUGHT}]}
    if encrypted is not None:
        item["encrypted_content"] = encrypted
    told("response.output_item.done", output_index=index, item=item)
    return item


def _call(told: _Told, index: int, name: str) -> Body:
    call_id = f"call_{told.number:024x}"
    item: Body = {"id": f"fc_{told.number:048x}", "type": "function_call", "status": "in_progress", "arguments": ""}
    item |= {"call_id": call_id, "name": name}
    about = told.about(index, item["id"])
    told("response.output_item.added", output_index=index, item=item)
    for start in range(0, len(ARGUMENTS), 6):
        about("response.function_call_arguments.delta", delta=ARGUMENTS[start : start + 6], obfuscation="x")
    about("response.function_call_arguments.done", arguments=ARGUMENTS)
    item = {**item, "status": "completed", "arguments": ARGUMENTS}
    told("response.output_item.done", output_index=index, item=item)
    return item
