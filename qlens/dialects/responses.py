"""OpenAI's Responses, created whole or as a stream (https://platform.openai.com/docs/api-reference/responses)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import orjson
from attrs import evolve

from qlens import usage as usages
from qlens.dialects import Body, Ref, Strand, fields, jsons, response_events, texts
from qlens.errors import InvalidRequest
from qlens.usage import Usage

GENERATES = True

# --- the request -------------------------------------------------------------------------------

_ANY = fields.record({"type": fields.text})
_DATA = fields.record({"data": fields.text, "format": fields.text}, required=("data", "format"))
_NAMES_A_FILE = {"file_data": fields.text, "file_id": fields.text, "file_url": fields.text, "filename": fields.text}
_PART = fields.tagged(
    "type",
    {
        "input_text": fields.record({"text": fields.text}, required=("text",)),
        "text": fields.record({"text": fields.text}, required=("text",)),
        "output_text": fields.record({"text": fields.text}, required=("text",)),
        "refusal": fields.record({"refusal": fields.text}, required=("refusal",)),
        "input_image": fields.record({"image_url": fields.text, "file_id": fields.text, "detail": fields.text}),
        "input_audio": fields.record({"input_audio": _DATA}, required=("input_audio",)),
        "input_file": fields.record({**_NAMES_A_FILE, "detail": fields.text}),
    },
    _ANY,
)
_CONTENT = fields.either("a string or an array of objects", {str: fields.text, list: fields.array(_PART, of="objects")})
_SAID = fields.record(
    {"content": _CONTENT, "id": fields.text, "phase": fields.text, "status": fields.text}, required=("content",)
)
_MESSAGE = fields.tagged("role", dict.fromkeys(("user", "assistant", "system", "developer"), _SAID))

_OF_A_CALL = {"call_id": fields.text, "id": fields.text, "name": fields.text, "status": fields.text}
_RESULT = fields.record({**_OF_A_CALL, "output": _CONTENT}, required=("output",))
_THOUGHTS = fields.array(fields.record({"text": fields.text}, required=("text",)), of="objects")
_ITEMS = fields.tagged(
    "type",
    {
        "message": _MESSAGE,
        "function_call": fields.record(
            {**_OF_A_CALL, "arguments": fields.text}, required=("call_id", "name", "arguments")
        ),
        "function_call_output": _RESULT,
        "custom_tool_call": fields.record({**_OF_A_CALL, "input": fields.text}, required=("call_id", "name", "input")),
        "custom_tool_call_output": _RESULT,
        "reasoning": fields.record(
            {"id": fields.text, "summary": _THOUGHTS, "content": _THOUGHTS, "encrypted_content": fields.text}
        ),
        "item_reference": fields.record({"id": fields.text}, required=("id",)),
    },
    _ANY,
)


def _item(value: Any, path: fields.Path) -> None:
    """An item of the input; the type of messages and of references to items may be left out."""
    if type(value) is dict and value.get("type") is None and ("role" in value or "id" in value):
        (_MESSAGE if "role" in value else _ANY)(value, path)
    else:
        _ITEMS(value, path)


_TOOL = fields.tagged(
    "type",
    {
        "function": fields.record(
            {"name": fields.text, "description": fields.text, "parameters": fields.free_form, "strict": fields.flag},
            required=("name",),
        ),
        "custom": fields.record(
            {"name": fields.text, "description": fields.text, "format": fields.free_form}, required=("name",)
        ),
    },
    _ANY,
)
_SCHEMA = fields.record(
    {"name": fields.text, "schema": fields.free_form, "strict": fields.flag, "description": fields.text},
    required=("name", "schema"),
)
_TEXT = fields.record({"format": fields.tagged("type", {"json_schema": _SCHEMA}, _ANY), "verbosity": fields.text})
_REASONING = fields.record(
    {"effort": fields.text, "generate_summary": fields.text, "mode": fields.text, "summary": fields.text}
)
_CHOSEN = fields.tagged("type", {}, _ANY)
_STORED = fields.either("a string or an object", {str: fields.text, dict: fields.free_form})
FIELDS: Mapping[str, fields.Rule] = {
    "background": fields.flag,
    "conversation": _STORED,
    "include": fields.array(fields.text, of="strings"),
    "input": fields.either(
        "a string or an array of objects", {str: fields.text, list: fields.array(_item, of="objects")}
    ),
    "instructions": fields.text,
    # OpenAI's least is 16.
    "max_output_tokens": fields.integer(16, fields.MAX_TOKENS),
    "max_tool_calls": fields.integer(1, fields.MAX_TOKENS),
    "metadata": fields.table(fields.text),
    "model": fields.MODEL,
    "parallel_tool_calls": fields.flag,
    "previous_response_id": fields.text,
    "prompt": fields.record({"id": fields.text, "variables": fields.free_form}, required=("id",)),
    "prompt_cache_key": fields.text,
    "prompt_cache_retention": fields.text,
    "reasoning": _REASONING,
    "safety_identifier": fields.text,
    "service_tier": fields.text,
    "store": fields.flag,
    "stream": fields.flag,
    "stream_options": fields.record({"include_obfuscation": fields.flag}),
    "temperature": fields.number(0, 2),
    "text": _TEXT,
    "tool_choice": fields.either("a string or an object", {str: fields.text, dict: _CHOSEN}),
    "tools": fields.array(_TOOL, of="objects"),
    "top_logprobs": fields.integer(0, 20),
    "top_p": fields.number(0, 1),
    "truncation": fields.one_of("auto", "disabled"),
    "user": fields.text,
}
"""What a request may say, by its rules."""
_REQUEST = fields.record(FIELDS, required=("model",))
_PROMPTED = ("input", "previous_response_id", "conversation", "prompt")


def validate(body: Body) -> None:
    """Refuse a request body with OpenAI's 400: InvalidRequest with its param and code."""
    _REQUEST(body, None)
    fields.check_stream_options(body)
    if all(body.get(name) is None for name in _PROMPTED):
        raise InvalidRequest(
            "One of 'input', 'previous_response_id', 'conversation' or 'prompt' must be provided.",
            param="input",
            code="missing_required_parameter",
        )


# What is no text of its own, in requests, answers and events alike; beside what no dialect has as text. What a file is
# called is read by a model in requests, and by the client in answers.
_OPAQUE = texts.OPAQUE - {"filename"} | {
    "approval_request_id",
    "call_id",
    "caller",
    "container_id",
    "file_url",
    "fingerprint",
    "item_id",
    "logprobs",
    "namespace",
    "obfuscation",
    "partial_image_b64",
    "phase",
    "result",  # a generated image
    "server_label",
    "status",
}


def request_texts(body: Body) -> list[tuple[Ref, str]]:
    """List the texts a model will read: instructions, input, variables of a stored prompt, tools, the answer's form.

    Names and the values of enums are Fixed.
    """
    found: list[tuple[Ref, str]] = []
    for name in ("instructions", "input"):
        texts.gather(body.get(name), (name,), found, _OPAQUE)
    prompt = body.get("prompt")
    if type(prompt) is dict:
        texts.gather(prompt.get("variables"), ("prompt", "variables"), found, _OPAQUE)
    found = jsons.opened(found)
    items = body.get("input")
    for position, item in enumerate(items if type(items) is list else ()):
        texts.named(item, ("input", position), found)
    texts.describe(body.get("tools"), ("tools",), found)
    wanted = body.get("text")
    if type(wanted) is dict:
        texts.describe(wanted.get("format"), ("text", "format"), found)
    return found


_SPOKEN = frozenset({"message", "function_call", "custom_tool_call"})
"""What a model says after it has reasoned."""


def without_reasoning(items: list[Body], unreadable: list[Body]) -> list[Body]:
    """The items of an input without these, which are reasoning.

    What was said after it loses its id: a provider that knew it would miss the reasoning that belongs to it.
    """
    gone = {id(item) for item in unreadable}
    left: list[Body] = []
    is_orphan = False
    for item in items:
        is_said = (item.get("type") or "message") in _SPOKEN and item.get("role", "assistant") == "assistant"
        is_orphan = id(item) in gone or (is_orphan and is_said)
        if id(item) not in gone:
            left.append({name: value for name, value in item.items() if name != "id"} if is_orphan else item)
    return left


# --- its bounds --------------------------------------------------------------------------------

SETTINGS = frozenset(
    {
        "background",
        "background_options",
        "conversation",
        "include",
        "max_output_tokens",
        "max_tool_calls",
        "metadata",
        "model",
        "parallel_tool_calls",
        "previous_response_id",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "reasoning",
        "safety_identifier",
        "service_tier",
        "store",
        "stream",
        "stream_options",
        "temperature",
        "top_logprobs",
        "top_p",
        "truncation",
        "user",
    }
)
"""What the model never sees. Any other field counts with all its JSON, so that the bound stays one."""
_MEDIA = {
    "computer_screenshot": "images",
    "image_generation_call": "images",
    "input_audio": "audio",
    "input_file": "files",
    "input_image": "images",
    "item_reference": "history",
}
_MEDIA_DATA = frozenset({"image_url", "file_data", "file_url", "file_id", "input_audio"})
# What stands around a text: no model reads these values, and the allowance for each item is more than the names take.
_FRAME_VALUES = frozenset({"id", "phase", "role", "status", "type"})
_FRAME_NAMES = frozenset({"arguments", "call_id", "content", "input", "name", "output", "summary", "text"})
_REMEMBERED = ("previous_response_id", "conversation", "prompt")
_WORDS = frozenset(
    {
        *("input_text", "output_text", "reasoning_text", "refusal", "summary_text", "text"),
        *("compaction", "custom_tool_call", "custom_tool_call_output", "function_call", "function_call_output"),
        *("message", "reasoning"),
        *("apply_patch_call", "apply_patch_call_output", "computer_call", "computer_call_output"),
        *("local_shell_call", "local_shell_call_output", "shell_call", "shell_call_output"),
        *("code_interpreter_call", "file_search_call", "tool_search_call", "tool_search_output", "web_search_call"),
        *("mcp_approval_request", "mcp_approval_response", "mcp_call", "mcp_list_tools"),
    }
)
"""Items and parts whose texts stand in the body; any other is counted as a medium, a known or an unknown one."""
_OWN_TOOLS = ("apply_patch", "computer", "computer_use_preview", "custom", "function", "local_shell", "tool_search")
"""The tools that the client runs, or that cost no more than their tokens."""
_SEARCHES = "web_search"
"""How the types of tools begin whose use the answer counts."""


def input_bound(body: Body) -> tuple[int, int]:
    """The most input tokens this body can have, and an estimate of them; media are not text and not counted.

    What the provider has kept of earlier calls is not in the body: `media` says that there is some.
    """
    size, items = 0, 1
    for name, value in body.items():
        if value is None or name in SETTINGS:
            continue
        size += _size(value) if name == "input" else len(orjson.dumps(value))
        items += len(value) if type(value) is list else 1
    return size + items * texts.MESSAGE_TOKENS, -(-size // 3) + items * 4


def _size(node: Any) -> int:
    if type(node) is str:
        return texts.size(node)
    if type(node) is dict:
        return sum(
            _size(value) + (0 if name in _FRAME_NAMES else texts.size(name))
            for name, value in node.items()
            if name not in _MEDIA_DATA and name not in _FRAME_VALUES
        )
    if type(node) is list:
        return sum(texts.MESSAGE_TOKENS + _size(entry) for entry in node)
    return len(orjson.dumps(node))


def media(body: Body) -> dict[str, int]:
    """Count what a model reads beside the body's text, by kind: images, audio, files; history that was kept.

    What is unknown, and tools that the provider runs, are counted too.
    """
    counts: dict[str, int] = {}
    kept = ["history" for name in _REMEMBERED if body.get(name) is not None]
    hosted = _hosted(tools) if type(tools := body.get("tools")) is list else ()
    for kind in (*_media_below(body.get("input")), *kept, *hosted):
        counts[kind] = counts.get(kind, 0) + 1
    return counts


def _media_below(node: Any) -> Iterator[str]:
    if type(node) is list:
        for entry in node:
            yield from _media_below(entry)
    elif type(node) is dict:
        kind = node.get("type")
        if type(kind) is str and kind not in _WORDS:
            yield _MEDIA.get(kind, texts.UNKNOWN)
        elif kind is None and "id" in node and "role" not in node:
            yield "history"  # a reference to an item; its type may be left out
        for name in ("content", "output"):
            yield from _media_below(node.get(name))


def _hosted(tools: list[Any]) -> Iterator[str]:
    for tool in tools:
        kind = tool.get("type") if type(tool) is dict else None
        if kind == "namespace" and type(inner := tool.get("tools")) is list:
            yield from _hosted(inner)
        elif kind == "shell" and type(place := tool.get("environment")) is dict and place.get("type") == "local":
            continue
        elif kind not in _OWN_TOOLS and not str(kind).startswith(_SEARCHES):
            yield texts.HOSTED_TOOLS


def measured(body: Body, validated: int | None = None) -> tuple[int, int, dict[str, int]]:
    """Its `input_bound` and its `media`."""
    return *input_bound(body), media(body)


def output_bound(body: Body) -> tuple[str | None, int | None]:
    """The field and the number by which the client limits the answer, reasoning included."""
    asked = body.get("max_output_tokens")
    return ("max_output_tokens", asked) if asked is not None else (None, None)


def choices(body: Body) -> int:
    """A response is one answer."""
    return 1


returned = choices


def clamp(body: Body, max_output_tokens: int | None, max_n: int) -> int | None:
    """Lower what is asked to what the model allows; gives the limit after it."""
    asked = body.get("max_output_tokens")
    if asked is not None and max_output_tokens is not None:
        body["max_output_tokens"] = min(asked, max_output_tokens)
    return output_bound(body)[1]


# --- the answer --------------------------------------------------------------------------------


def usage(body: Body) -> Usage | None:
    """Read the usage of an answer, or of one event of a stream."""
    answer = _answer_of(body)
    said = usages.from_responses(answer.get("usage"), answer.get("service_tier"))
    searches = _searches(answer.get("output")) if said is not None else 0
    return evolve(said, meters={"web_searches": searches}) if said is not None and searches else said


def _searches(output: Any) -> int:
    """How often the provider searched the web; what it does with the pages it found has no fee."""
    found = 0
    for item in output if type(output) is list else ():
        if type(item) is dict and item.get("type") == "web_search_call":
            action = item.get("action")
            found += type(action) is not dict or action.get("type") not in ("open_page", "find_in_page")
    return found


def _answer_of(body: Body) -> Body:
    response = body.get("response")
    return response if type(response) is dict else body


def finish(body: Body) -> str | None:
    """Why an answer is incomplete, or else its status; None while it is not over. Of an event, that of its answer."""
    answer = _answer_of(body)
    details = answer.get("incomplete_details")
    reason = details.get("reason") if type(details) is dict else None
    said = reason or answer.get("status")
    return said if type(said) is str and said not in {"in_progress", "queued"} else None


def goes_on(body: Body) -> bool:
    """Whether a response is still being made in the background, so that nobody knows yet what it will use."""
    return body.get("status") in ("queued", "in_progress")


def reply_texts(body: Body) -> list[tuple[Ref, str]]:
    """List the texts of an answer."""
    found: list[tuple[Ref, str]] = []
    texts.gather(body.get("output"), ("output",), found, _OPAQUE)
    return found


# --- events ------------------------------------------------------------------------------------

QUIET = (
    b"event: response.output_text.delta\n",
    b"event: response.function_call_arguments.delta\n",
    b"event: response.custom_tool_call_input.delta\n",
    b"event: response.reasoning_text.delta\n",
    b"event: response.reasoning_summary_text.delta\n",
    b"event: response.refusal.delta\n",
)
"""How events begin that say nothing of usage, errors or the end; most events are such."""
QUIET_KEPT = False
"""What they say is said again, whole, by events at the end."""
MARKS: tuple[bytes, ...] = ()
"""Each has a number of its own."""

_BINARY = "response.audio.delta"


def event_texts(event: Body) -> list[tuple[Strand, Ref, str]]:
    """List the text deltas of one event of a stream, and the texts that are whole in it: these have no strand."""
    delta, kind = event.get("delta"), event.get("type")
    if type(delta) is str:
        if kind == _BINARY:
            return []
        number = event.get("content_index", event.get("summary_index", 0))
        return [((_index(event), str(kind), number if type(number) is int else 0), ("delta",), delta)]
    found: list[tuple[Ref, str]] = []
    response = event.get("response")
    if type(response) is dict:
        # What else stands in a response repeats the request.
        texts.gather(response.get("output"), ("response", "output"), found, _OPAQUE)
    else:
        texts.gather(event, (), found, _OPAQUE)
    return [((), ref, text) for ref, text in found]


def event_ends(event: Body) -> list[int]:
    """The items of the output whose texts this event ends."""
    kind, response = event.get("type"), event.get("response")
    if type(response) is dict:
        output = response.get("output")
        return list(range(len(output))) if type(output) is list else []
    return [_index(event)] if type(kind) is str and kind.endswith(".done") else []


def _index(event: Body) -> int:
    index = event.get("output_index")
    return index if type(index) is int else 0


def text_event(event: Body, strand: Strand, text: str) -> Body:
    """An event like `event` that carries only this text for this strand."""
    frame = {name: value for name, value in event.items() if name != "obfuscation"}
    spelled: Body = {"logprobs": []} if "logprobs" in event else {}
    return {**frame, "delta": text, **spelled}


def event_usage(payload: Body, before: Usage | None) -> Usage | None:
    """What was used so far, by an event and those before it: each that says it states a running total."""
    said = usage(payload) if type(payload.get("response")) is dict else None
    return before if said is None else usages.larger(before, said)


def event_begins(payload: Body) -> bool:
    """Whether the model has begun with this event, or the call was taken into the background."""
    return payload.get("type") not in {"response.created", "response.in_progress"}


def event_ends_stream(payload: Body) -> bool:
    """Whether an answer is over with this event, and to be trusted."""
    return payload.get("type") in {"response.completed", "response.incomplete"}


# The codes of failed responses that the client can mend; they come without a type or a status that would say so.
_CLIENTS_FAULTS = frozenset(
    {
        "bio_policy",
        "empty_image_file",
        "failed_to_download_image",
        "image_content_policy_violation",
        "image_file_not_found",
        "image_file_too_large",
        "image_parse_error",
        "image_too_large",
        "image_too_small",
        "invalid_base64_image",
        "invalid_image",
        "invalid_image_format",
        "invalid_image_mode",
        "invalid_image_url",
        "invalid_prompt",
        "misalignment_policy_violation",
        "unsupported_image_media_type",
    }
)


def event_error(payload: Body) -> Body | None:
    """The error that an event of a stream says, in the shape of OpenAI's error answers; None when it says none."""
    kind, response = payload.get("type"), payload.get("response")
    if payload.get("error"):
        return _error(payload["error"])
    if kind == "error":
        return _error({name: payload.get(name) for name in ("message", "param", "code")})
    if kind == "response.failed":
        return answer_error(response if type(response) is dict else {})
    return None


def error_event(answer: Body, number: int | None = None) -> Body:
    """The event that tells a client of an error in the middle of a stream; `answer` is the body of an error answer."""
    error = answer["error"]
    # OpenAI's SDK raises for what stands under `error`; its documentation has the fields beside the type.
    beside = {name: error.get(name) for name in ("code", "message", "param")}
    numbered = {} if number is None else {"sequence_number": number}
    return {"type": "error", **numbered, **beside, "error": error}


def answer_error(body: Body) -> Body:
    """The error of a response that failed, in the shape of OpenAI's error answers."""
    return _error(body.get("error"))


def _error(said: Any) -> Body:
    error = dict(said) if type(said) is dict else {"message": said}
    code = error.get("code")
    if type(code) is str and code in _CLIENTS_FAULTS:
        error["type"] = "invalid_request_error"
    return {"error": error}


# --- streams -----------------------------------------------------------------------------------


def explode(body: Body) -> Iterator[Body]:
    """Turn a complete answer into the events of a stream."""
    writer = response_events.Writer()
    unknown_yet: Body = {name: None for name in ("completed_at", "incomplete_details", "error") if name in body}
    yield from writer.begun({**body, "status": "in_progress", **unknown_yet, "output": [], "usage": None})
    for index, item in enumerate(body.get("output") or ()):
        yield from response_events.item_events(writer, index, item)
    yield writer.ended(body)


def assemble(events: Iterable[Body]) -> Body:
    """Turn the events of a complete stream into the answer it would have been without streaming."""
    answer: Body = {}
    items: dict[int, Any] = {}
    for event in events:
        if type(event.get("response")) is dict:
            answer = event["response"]
        elif event.get("type") == "response.output_item.done":
            items[_index(event)] = event.get("item")
    # Some servers leave out of the last event what earlier ones have said.
    return answer if answer.get("output") or not items else {**answer, "output": [items[at] for at in sorted(items)]}
