"""Anthropic's messages (https://platform.claude.com/docs/en/api/messages)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

import orjson
from attrs import evolve

from qlens import usage as usages
from qlens.dialects import Body, Fixed, Ref, Strand, fields, jsons, signed, texts
from qlens.usage import Usage

GENERATES = True

Block = dict[str, Any]

# --- the request -------------------------------------------------------------------------------

_ANY = fields.record({"type": fields.text})
_TEXT = fields.record({"text": fields.text}, required=("text",))
_SOURCES = {
    "base64": fields.record({"media_type": fields.text, "data": fields.text}, required=("media_type", "data")),
    "text": fields.record({"media_type": fields.text, "data": fields.text}, required=("data",)),
    "url": fields.record({"url": fields.text}, required=("url",)),
    "file": fields.record({"file_id": fields.text}, required=("file_id",)),
}
_IMAGE = fields.record({"source": fields.tagged("type", _SOURCES, _ANY)}, required=("source",))
_PAGES = fields.either(
    "a string or an array of objects",
    {str: fields.text, list: fields.array(fields.tagged("type", {"text": _TEXT, "image": _IMAGE}), of="objects")},
)
_WRITTEN = {**_SOURCES, "content": fields.record({"content": _PAGES}, required=("content",))}
_DOCUMENT = fields.record(
    {
        "source": fields.tagged("type", _WRITTEN, _ANY),
        "title": fields.text,
        "context": fields.text,
        "citations": fields.free_form,
    },
    required=("source",),
)
_SEARCH_RESULT = fields.record(
    {"source": fields.text, "title": fields.text, "content": fields.array(_TEXT, of="objects")},
    required=("source", "title", "content"),
)
_SHOWN = {"text": _TEXT, "image": _IMAGE, "document": _DOCUMENT, "search_result": _SEARCH_RESULT}
_RESULT = fields.either(
    "a string or an array of objects",
    {str: fields.text, list: fields.array(fields.tagged("type", _SHOWN, _ANY), of="objects")},
)
_BLOCK = fields.tagged(
    "type",
    {
        **_SHOWN,
        "thinking": fields.record(
            {"thinking": fields.text, "signature": fields.text}, required=("thinking", "signature")
        ),
        "redacted_thinking": fields.record({"data": fields.text}, required=("data",)),
        "tool_use": fields.record(
            {"id": fields.text, "name": fields.text, "input": fields.free_form}, required=("id", "name", "input")
        ),
        "tool_result": fields.record(
            {"tool_use_id": fields.text, "content": _RESULT, "is_error": fields.flag}, required=("tool_use_id",)
        ),
    },
    _ANY,
)
_CONTENT = fields.either(
    "a string or an array of objects", {str: fields.text, list: fields.array(_BLOCK, of="objects")}
)
_MESSAGE = fields.record({"content": _CONTENT}, required=("content",))
_MESSAGES = fields.tagged("role", {"user": _MESSAGE, "assistant": _MESSAGE, "system": _MESSAGE})
_SYSTEM = fields.either(
    "a string or an array of objects",
    {str: fields.text, list: fields.array(fields.tagged("type", {"text": _TEXT}), of="objects")},
)
_CUSTOM = fields.record(
    {"name": fields.text, "description": fields.text, "input_schema": fields.free_form, "strict": fields.flag},
    required=("name", "input_schema"),
)
_TOOL_NAME = fields.record({"name": fields.text, "disable_parallel_tool_use": fields.flag}, required=("name",))
_TOOL_CHOICE = fields.record({"disable_parallel_tool_use": fields.flag})
_BUDGETED = {"type": fields.text, "budget_tokens": fields.integer(0, fields.MAX_TOKENS)}
BUDGETED = fields.record(_BUDGETED)
"""What may be said of thinking, as far as it is read here."""
_THINKING = fields.tagged("type", {"enabled": fields.record(_BUDGETED, required=("budget_tokens",))}, BUDGETED)
_SCHEMA = fields.record({"schema": fields.free_form}, required=("schema",))


def _tool(value: Any, path: fields.Path) -> None:
    """A tool: the client's own, of which the type may be left out, or one of Anthropic's."""
    _ANY(value, path)
    if value.get("type") in {None, "custom"}:
        _CUSTOM(value, path)


FIELDS = {
    "cache_control": fields.free_form,
    "max_tokens": fields.integer(0, fields.MAX_TOKENS),  # 0 fills the cache and generates nothing
    "messages": fields.array(_MESSAGES, of="objects", least=1),
    "metadata": fields.record({"user_id": fields.text}),
    "model": fields.MODEL,
    "output_config": fields.record(
        {"effort": fields.text, "format": fields.tagged("type", {"json_schema": _SCHEMA})},
    ),
    "service_tier": fields.text,
    "stop_sequences": fields.array(fields.text, of="strings"),
    "stream": fields.flag,
    "system": _SYSTEM,
    "temperature": fields.number(0, 1),
    "thinking": _THINKING,
    "tool_choice": fields.tagged("type", {"auto": _TOOL_CHOICE, "any": _TOOL_CHOICE, "tool": _TOOL_NAME, "none": _ANY}),
    "tools": fields.array(_tool, of="objects"),
    "top_k": fields.integer(0),
    "top_p": fields.number(0, 1),
}
_REQUEST = fields.record(FIELDS, required=("model", "max_tokens", "messages"))


def validate(body: Body) -> None:
    """Refuse a request body with a 400: InvalidRequest with its param and code."""
    _REQUEST(body, None)
    signed.without_rewritten(body)


def request_texts(body: Body) -> list[tuple[Ref, str]]:
    """List the texts a model will read: system prompts and messages, tools, what these are called with and give back.

    Names and the values of enums are Fixed, and so are thoughts: they are the model's own, signed, and worth nothing
    once a letter of them is changed.
    """
    found: list[tuple[Ref, str]] = []
    _gather(body.get("system"), ("system",), found)
    for position, message in enumerate(body.get("messages") or ()):
        ref, content = ("messages", position, "content"), message.get("content")
        _gather(content, ref, found)
        if type(content) is list:
            _gather_fixed(content, ref, found)
    texts.describe(body.get("tools"), ("tools",), found)
    wanted = body.get("output_config")
    if type(wanted) is dict:
        texts.describe(wanted.get("format"), ("output_config", "format"), found)
    return found


def _gather_fixed(content: list[Any], ref: Ref, found: list[tuple[Ref, str]]) -> None:
    for position, block in enumerate(content):
        if type(block) is dict:
            texts.named(block, (*ref, position), found)
            if block.get("type") == "thinking" and type(thought := block.get("thinking")) is str:
                found.append((Fixed((*ref, position, "thinking")), thought))


def _gather(content: Any, ref: Ref, found: list[tuple[Ref, str]]) -> None:
    if type(content) is str:
        found.append((ref, content))
        return
    for position, block in enumerate(content if type(content) is list else ()):
        if type(block) is dict:
            _gather_block(block, (*ref, position), found)
        else:
            texts.gather(block, (*ref, position), found)


# Tuples where a value may be of any type: what is inside a block of an unknown type keeps to no rule.
_THOUGHTS = ("thinking", "redacted_thinking")
_ENCODED = ("base64", "url", "file")
_GATHERED = frozenset({"content", "input", "source", "tool_use_id"})


def _gather_block(block: Block, ref: Ref, found: list[tuple[Ref, str]]) -> None:
    kind, source = block.get("type"), block.get("source")
    if kind in _THOUGHTS:
        return
    if kind == "document" and type(source) is dict:
        _gather_source(source, (*ref, "source"), found)
    # What tools are called with may have any names: none of them says that a text is not read.
    if "input" in block or len(found) > jsons.MOST_TEXTS:  # which is then refused
        jsons.below(block.get("input"), (*ref, "input"), found)
    content = block.get("content")
    if type(content) is list:
        _gather(content, (*ref, "content"), found)
    elif content is not None:
        texts.gather(content, (*ref, "content"), found)
    if not _GATHERED.isdisjoint(block):
        block = {name: value for name, value in block.items() if name not in _GATHERED}
    texts.gather(block, ref, found)
    if kind == "search_result" and type(source) is str:
        found.append(((*ref, "source"), source))


def _gather_source(source: Block, ref: Ref, found: list[tuple[Ref, str]]) -> None:
    if source.get("type") == "text":
        _gather(source.get("data"), (*ref, "data"), found)
    _gather(source.get("content"), (*ref, "content"), found)


# --- its bounds --------------------------------------------------------------------------------

SETTINGS = frozenset(
    {
        *("cache_control", "max_tokens", "metadata", "model", "service_tier", "stop_sequences", "stream"),
        *("temperature", "thinking", "top_k", "top_p"),
    }
)
"""What the model never sees. Any other field counts with all its JSON, so that the bound stays one."""
_MEDIA = {"container_upload": "files", "document": "files", "image": "images"}
_WORDS = frozenset(
    {
        *("compaction", "redacted_thinking", "search_result", "text", "thinking", "tool_reference"),
        *("mcp_tool_use", "server_tool_use", "tool_use"),
    }
)
_RESULTS = ("_result", "_error")
"""How the types of other blocks end whose texts stand in the body; any other is counted as an unknown medium."""
_OWN_TOOLS = ("bash_", "computer_", "memory_", "text_editor_", "tool_search_tool_")
"""How the types of Anthropic's tools begin that the client runs, or that cost no more than their tokens."""
_SEARCHES = "web_search_"
"""The same of tools whose use the answer counts."""


def input_bound(body: Body) -> tuple[int, int]:
    """The most input tokens this body can have, and an estimate of them; media are not text and not counted."""
    size, items = 0, 1
    for name, value in body.items():
        if name in SETTINGS or value is None:
            continue
        items += len(value) if type(value) is list else 1
        if name == "messages":
            size += sum(_content_size(message.get("content")) for message in value)
        else:
            size += _json_size(value)
    return size + items * texts.MESSAGE_TOKENS, -(-size // 3) + items * 4


def _content_size(content: Any) -> int:
    if type(content) is not list:
        return _json_size(content)
    return sum(texts.MESSAGE_TOKENS + _block_size(block) for block in content)


def _block_size(block: Block) -> int:
    size = 0
    for name, value in block.items():
        if name == "source" and type(value) is dict:
            encoded = value.get("type") in _ENCODED
            size += 0 if encoded else _json_size(value)
        elif name == "content" and type(value) is list:
            size += sum(_block_size(inner) if type(inner) is dict else _json_size(inner) for inner in value)
        else:
            size += _json_size(value)
    return size


def _json_size(value: Any) -> int:
    return texts.size(value) if type(value) is str else len(orjson.dumps(value))


def media(body: Body) -> dict[str, int]:
    """Count what a model reads beside text, by kind: images, files; what is unknown, and tools Anthropic runs."""
    counts: dict[str, int] = {}
    for message in body["messages"]:
        if type(content := message.get("content")) is list:
            _count_media(content, counts)
    hosted = sum(map(_is_hosted, tools)) if (tools := body.get("tools")) else 0
    if type(servers := body.get("mcp_servers")) is list:
        hosted += len(servers)
    return {**counts, texts.HOSTED_TOOLS: hosted} if hosted else counts


def _is_hosted(tool: Block) -> bool:
    kind = tool.get("type")
    return type(kind) is str and kind != "custom" and not kind.startswith((*_OWN_TOOLS, _SEARCHES))


def _count_media(content: Any, counts: dict[str, int]) -> None:
    for block in content if type(content) is list else (content,):
        if type(block) is not dict:
            continue
        kind, source = block.get("type"), block.get("source")
        if type(kind) is str and kind in _MEDIA:
            if type(source) is not dict or source.get("type") != "text":
                counts[_MEDIA[kind]] = counts.get(_MEDIA[kind], 0) + 1
        elif type(kind) is str and kind not in _WORDS and not kind.endswith(_RESULTS):
            counts[texts.UNKNOWN] = counts.get(texts.UNKNOWN, 0) + 1
        # A document may be made of blocks, as a tool's result may.
        if "content" in block:
            _count_media(block["content"], counts)
        if type(source) is dict and "content" in source:
            _count_media(source["content"], counts)


def measured(body: Body, validated: int | None = None) -> tuple[int, int, dict[str, int]]:
    """Its `input_bound` and its `media`."""
    return *input_bound(body), media(body)


def output_bound(body: Body) -> tuple[str | None, int | None]:
    """The field and the number by which the client limits generated tokens: this API wants it always."""
    return "max_tokens", body.get("max_tokens")


def choices(body: Body) -> int:
    """How many choices are generated: this API knows only one."""
    return 1


def returned(body: Body) -> int:
    """How many of them come back."""
    return 1


LEAST_BUDGET = 1024
"""The fewest tokens that a model may be given for thinking."""


class Chosen(Block):
    """A `thinking` whose budget no client has given: of `max_tokens`, whatever it becomes, half is for the answer."""


def clamp(body: Body, max_output_tokens: int | None, max_n: int) -> int | None:
    """Lower what is asked to what the model allows, and with it what is for thinking; gives the limit after it."""
    asked, thinking = body.get("max_tokens"), body.get("thinking")
    if asked is None:
        return None
    most = asked if max_output_tokens is None else min(asked, max_output_tokens)
    body["max_tokens"] = most
    if type(thinking) is Chosen:
        _leave_room(body, thinking, most // 2)
    elif type(thinking) is dict and most < asked:
        _leave_room(body, thinking, most - 1)
    return output_bound(body)[1]


def _leave_room(body: Body, thinking: Block, most: int) -> None:
    if (thinking.get("budget_tokens") or 0) <= most:
        return
    if most >= LEAST_BUDGET:
        body["thinking"] = {**thinking, "budget_tokens": most}
    else:
        del body["thinking"]  # there is no room to think


# --- the answer --------------------------------------------------------------------------------


def usage(body: Body, before: Usage | None = None) -> Usage | None:
    """Read the usage of an answer, or of one event of a stream, which may leave out what was said `before` it."""
    message = body.get("message")
    return usages.from_anthropic((message if type(message) is dict else body).get("usage"), before)


def finish(body: Body) -> str | None:
    """The reason why an answer stopped, or the one that an event of a stream gives."""
    delta = body.get("delta")
    reason = (delta if type(delta) is dict else body).get("stop_reason")
    return reason if type(reason) is str else None


def reply_texts(body: Body) -> list[tuple[Ref, str]]:
    """List the texts of an answer: what is said, thought, and given to tools."""
    found: list[tuple[Ref, str]] = []
    for position, block in enumerate(_blocks(body)):
        ref = ("content", position)
        if block.get("type") == "thinking":
            found.append(((*ref, "thinking"), block.get("thinking") or ""))
        else:
            _gather_block(block, ref, found)
    return found


def _blocks(body: Body) -> list[Block]:
    content = body.get("content")
    return [block for block in content if type(block) is dict] if type(content) is list else []


# --- events ------------------------------------------------------------------------------------

QUIET = (b"event: content_block_delta\n", b"event: content_block_start\n", b"event: content_block_stop\n")
"""How events begin that say nothing of usage, errors or the end; most events are such."""
QUIET_KEPT = True
MARKS = (b'"text":"', b'"thinking":"', b'"partial_json":"')
"""How the texts begin in which most of these differ alone."""

_DELTAS = {"text": "text_delta", "thinking": "thinking_delta", "partial_json": "input_json_delta"}
"""The fields that hold a delta's text, and the deltas they belong to."""


def event_texts(event: Body) -> list[tuple[Strand, Ref, str]]:
    """List the text deltas of one event of a stream, a strand being a block and a field; and what is whole in it."""
    place = {"content_block_delta": "delta", "content_block_start": "content_block"}.get(str(event.get("type")))
    part, index = event.get(place or ""), event.get("index")
    if place is None or type(part) is not dict or type(index) is not int:
        return []
    found: list[tuple[Strand, Ref, str]] = [
        ((index, name), (place, name), part[name]) for name in _DELTAS if type(part.get(name)) is str and part[name]
    ]
    if place == "content_block" or "citation" in part:
        whole: list[tuple[Ref, str]] = []
        if place == "content_block":
            _gather_block(part, (place,), whole)
        else:
            texts.gather(part["citation"], (place, "citation"), whole)
        grown = {ref for _, ref, _ in found}
        found += [((), ref, text) for ref, text in whole if ref not in grown and text]
    return found


def event_ends(event: Body) -> list[int]:
    """The blocks that this event finishes."""
    index = event.get("index")
    return [index] if event.get("type") == "content_block_stop" and type(index) is int else []


def text_event(event: Body, strand: Strand, text: str) -> Body:
    """An event that carries only this text for this strand."""
    index, name = strand
    return {
        "type": "content_block_delta",
        "index": index,
        "delta": {"type": _DELTAS[str(name)], name: text},
    }


def event_usage(payload: Body, before: Usage | None) -> Usage | None:
    """What was used so far, by an event and those before it.

    Of the first event only the input is believed: little has been said yet.
    """
    kind = payload.get("type")
    found = usage(payload, before) if kind in {"message_start", "message_delta"} else None
    if found is None:
        return before
    return usages.larger(before, evolve(found, output=0, reasoning=0) if kind == "message_start" else found)


def event_ends_stream(payload: Body) -> bool:
    """Whether nothing follows this event."""
    return payload.get("type") == "message_stop"


def event_error(payload: Body) -> Body | None:
    """The error that an event or a body carries instead of an answer, in OpenAI's shape."""
    error = payload.get("error")
    if not error:
        return None
    if type(error) is not dict:
        return {"error": {"message": str(error)}}
    message, kind, details = str(error.get("message") or ""), error.get("type"), error.get("details")
    code = details.get("error_code") if type(details) is dict else None
    if code in _SPENT_CODES or kind == "billing_error" or _SPENT.search(message):
        code = "insufficient_quota"
    elif _OVERFLOW.search(message):
        code = "context_length_exceeded"
    return {"error": {"message": message, "type": kind, "code": code}}


_OVERFLOW = re.compile(r"prompt is too long|exceeds? (the )?context (limit|window)", re.IGNORECASE)
# The operator's account is empty, or has spent what it may: no mistake of the client, though it may come as a 400.
_SPENT = re.compile(r"credit balance is too low|specified (workspace )?(api )?usage limits|spend limit", re.IGNORECASE)
_SPENT_CODES = frozenset({"enforced_spend_limit_reached"})


# --- streams -----------------------------------------------------------------------------------

_DONE_LATER = frozenset({"content", "stop_reason", "stop_sequence", "stop_details", "usage"})


def explode(body: Body) -> Iterator[Body]:
    """Turn a complete answer into the events of a stream."""
    counts = body.get("usage")
    counts = counts if type(counts) is dict else {}
    opening = {name: value for name, value in body.items() if name not in _DONE_LATER}
    started = {**opening, "content": [], "stop_reason": None, "stop_sequence": None, "usage": {**counts}}
    started["usage"]["output_tokens"] = 0
    yield {"type": "message_start", "message": started}
    for index, block in enumerate(_blocks(body)):
        yield from _block_events(index, block)
    delta = {name: body.get(name) for name in ("stop_reason", "stop_sequence", "stop_details") if name in body}
    yield {"type": "message_delta", "delta": delta, "usage": {"output_tokens": 0, **counts}}
    yield {"type": "message_stop"}


def _block_events(index: int, block: Block) -> Iterator[Body]:
    start, deltas = _told(block)
    yield {"type": "content_block_start", "index": index, "content_block": start}
    for delta in deltas:
        yield {"type": "content_block_delta", "index": index, "delta": delta}
    yield {"type": "content_block_stop", "index": index}


def _told(block: Block) -> tuple[Block, list[Block]]:
    """How a block begins, and its deltas."""
    match block.get("type"):
        case "text":
            cited = [{"type": "citations_delta", "citation": each} for each in block.get("citations") or ()]
            said = [{"type": "text_delta", "text": block["text"]}] if block.get("text") else []
            return {**block, "text": "", **({"citations": []} if cited else {})}, [*said, *cited]
        case "thinking":
            thought = [{"type": "thinking_delta", "thinking": block["thinking"]}] if block.get("thinking") else []
            if block.get("signature"):
                thought.append({"type": "signature_delta", "signature": block["signature"]})
            return {**block, "thinking": "", "signature": ""}, thought
        case "tool_use" | "server_tool_use" if block.get("input"):
            text = orjson.dumps(block["input"]).decode()
            return {**block, "input": {}}, [{"type": "input_json_delta", "partial_json": text}]
    return block, []


def assemble(events: Iterable[Body]) -> Body:
    """Turn the events of a complete stream into the answer it would have been without streaming."""
    body: Body = {}
    blocks: dict[int, Block] = {}
    inputs: dict[int, str] = {}
    for event in events:
        match event.get("type"):
            case "message_start":
                body = {**event["message"]}
            case "content_block_start":
                blocks[event["index"]] = {**event["content_block"]}
            case "content_block_delta":
                _grow(event["index"], event["delta"], blocks[event["index"]], inputs)
            case "message_delta":
                body.update(event["delta"])
                said = {name: value for name, value in (event.get("usage") or {}).items() if value is not None}
                body["usage"] = {**(body.get("usage") or {}), **said}
    for index, text in inputs.items():
        blocks[index]["input"] = orjson.loads(text or b"{}")
    return {**body, "content": [blocks[index] for index in sorted(blocks)]}


def _grow(index: int, delta: Block, block: Block, inputs: dict[int, str]) -> None:
    match delta.get("type"):
        case "text_delta":
            block["text"] = (block.get("text") or "") + delta["text"]
        case "thinking_delta":
            block["thinking"] = (block.get("thinking") or "") + delta["thinking"]
        case "signature_delta":
            block["signature"] = (block.get("signature") or "") + delta["signature"]
        case "input_json_delta":
            inputs[index] = inputs.get(index, "") + delta["partial_json"]
        case "citations_delta":
            block["citations"] = [*(block.get("citations") or ()), delta["citation"]]
