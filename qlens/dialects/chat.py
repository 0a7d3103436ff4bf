"""OpenAI's chat completions (https://platform.openai.com/docs/api-reference/chat)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import orjson

from qlens import usage as usages
from qlens.dialects import Body, Fixed, Ref, Strand, chunks, fields, jsons, texts
from qlens.usage import Usage

GENERATES = True

_CHUNK = "chat.completion.chunk"

# --- the request -------------------------------------------------------------------------------

_ANY = fields.record({"type": fields.text})
_CALLED = fields.record({"name": fields.text, "arguments": fields.text}, required=("name", "arguments"))
_CUSTOM_CALLED = fields.record({"name": fields.text, "input": fields.text}, required=("name", "input"))
_TOOL_CALL = fields.tagged(
    "type",
    {
        "function": fields.record({"id": fields.text, "function": _CALLED}, required=("id", "function")),
        "custom": fields.record({"id": fields.text, "custom": _CUSTOM_CALLED}, required=("id", "custom")),
    },
    _ANY,
)

_IMAGE = fields.record({"url": fields.text, "detail": fields.text}, required=("url",))
_AUDIO = fields.record({"data": fields.text, "format": fields.text}, required=("data", "format"))
_FILE = fields.record({"file_data": fields.text, "file_id": fields.text, "filename": fields.text})
_PART = fields.tagged(
    "type",
    {
        "text": fields.record({"text": fields.text}, required=("text",)),
        "refusal": fields.record({"refusal": fields.text}, required=("refusal",)),
        "image_url": fields.record({"image_url": _IMAGE}, required=("image_url",)),
        "input_audio": fields.record({"input_audio": _AUDIO}, required=("input_audio",)),
        "file": fields.record({"file": _FILE}, required=("file",)),
    },
    _ANY,
)
_CONTENT = fields.either(
    "a string or an array of objects", {str: fields.text, list: fields.array(_PART, of="objects", least=1)}
)

_MESSAGE = {"role": fields.text, "content": _CONTENT, "name": fields.text}
_PROMPT = fields.record(_MESSAGE, required=("content",))
_ASSISTANT = {
    **_MESSAGE,
    "audio": fields.free_form,
    "function_call": _CALLED,
    "refusal": fields.text,
    "tool_calls": fields.array(_TOOL_CALL, of="objects"),
}
_MESSAGES = fields.tagged(
    "role",
    {
        "system": _PROMPT,
        "developer": _PROMPT,
        "user": _PROMPT,
        "assistant": fields.record(_ASSISTANT),
        "tool": fields.record({**_MESSAGE, "tool_call_id": fields.text}, required=("content", "tool_call_id")),
        "function": fields.record(_MESSAGE, required=("name",)),
    },
)

_SPEAKERS = ("system", "developer", "user", "assistant")


def _message(value: Any, path: fields.Path) -> None:
    """One message. A plain one, a speaker's text and nothing else, breaks no rule."""
    if (
        type(value) is not dict
        or len(value) != 2
        or type(value.get("content")) is not str
        or value.get("role") not in _SPEAKERS
    ):
        _MESSAGES(value, path)


_FUNCTION = fields.record(
    {"name": fields.text, "description": fields.text, "parameters": fields.free_form, "strict": fields.flag},
    required=("name",),
)
_CUSTOM = fields.record({"name": fields.text, "description": fields.text}, required=("name",))
_TOOL = fields.tagged(
    "type",
    {
        "function": fields.record({"function": _FUNCTION}, required=("function",)),
        "custom": fields.record({"custom": _CUSTOM}, required=("custom",)),
    },
    _ANY,
)
_SCHEMA = fields.record({"name": fields.text, "schema": fields.free_form, "strict": fields.flag}, required=("name",))
_FORMAT = fields.tagged(
    "type", {"json_schema": fields.record({"json_schema": _SCHEMA}, required=("json_schema",))}, _ANY
)
_NAMED = fields.record({"type": fields.text, "function": fields.record({"name": fields.text})})
_ALLOWED = fields.record({"mode": fields.text, "tools": fields.array(_NAMED, of="objects")})
_CHOICE = fields.record(
    {"type": fields.text, "function": fields.record({"name": fields.text}), "allowed_tools": _ALLOWED}
)
_CHOSEN = fields.either("a string or an object", {str: fields.text, dict: _CHOICE})
_FIELDS = {
    **fields.SAMPLING,
    "audio": fields.free_form,
    "function_call": _CHOSEN,
    "functions": fields.array(_FUNCTION, of="objects"),
    "logprobs": fields.flag,
    "max_completion_tokens": fields.TOKEN_LIMIT,
    "messages": fields.array(_message, of="objects", least=1),
    "metadata": fields.table(fields.text),
    "modalities": fields.array(fields.text, of="strings"),
    "parallel_tool_calls": fields.flag,
    "prediction": fields.record({"type": fields.text, "content": _CONTENT}, required=("type", "content")),
    "prompt_cache_key": fields.text,
    "reasoning_effort": fields.text,
    "response_format": _FORMAT,
    "safety_identifier": fields.text,
    "service_tier": fields.text,
    "store": fields.flag,
    "tool_choice": _CHOSEN,
    "tools": fields.array(_TOOL, of="objects"),
    "top_logprobs": fields.integer(0, 20),
    "verbosity": fields.text,
    "web_search_options": fields.free_form,
}
_REQUIRED = ("model", "messages")
_REQUEST = fields.record(_FIELDS, required=_REQUIRED)
_REQUEST_OF_PLAIN = fields.record({**_FIELDS, "messages": fields.seen}, required=_REQUIRED)


def validate(body: Body) -> int | None:
    """Refuse a request body with OpenAI's 400: InvalidRequest with its param and code.

    Gives the size of its messages where all of them are plain, so that `measured` need not walk through them again.
    """
    size = _plain_size(body.get("messages"))
    (_REQUEST if size is None else _REQUEST_OF_PLAIN)(body, None)
    if "stream_options" in body:
        fields.check_stream_options(body)
    return size


def _plain_size(messages: Any) -> int | None:
    """How long messages are in bytes that are texts of speakers and nothing else, as most are: these break no rule.

    None where one is anything else. Here and below a plain message is told by its two fields, with a text as content.
    """
    if type(messages) is not list or not messages:
        return None
    size = 0
    for message in messages:
        if type(message) is not dict or len(message) != 2 or type(content := message.get("content")) is not str:
            return None
        if (role := message.get("role")) not in _SPEAKERS:
            return None
        size += len(role) + (len(content) if content.isascii() else texts.size(content))
    return size


def request_texts(body: Body) -> list[tuple[Ref, str]]:
    """List the texts a model will read: messages with the names of files, the prediction, tools, the answer's form.

    Names, the values of enums and signed thoughts are Fixed.
    """
    found: list[tuple[Ref, str]] = []
    for position, message in enumerate(body.get("messages") or ()):
        if len(message) == 2 and "role" in message and type(text := message.get("content")) is str:
            found.append((("messages", position, "content"), text))  # most are, and there is nothing to search
        else:
            _gather(message, ("messages", position), found)
    if _BESIDE.isdisjoint(body):
        return found
    prediction = body.get("prediction")
    if type(prediction) is dict:
        texts.gather(prediction.get("content"), ("prediction", "content"), found)
    for name in _DESCRIBED:
        if value := body.get(name):
            texts.describe(value, (name,), found)
    return found


_DESCRIBED = ("functions", "response_format", "tools", "web_search_options")
_BESIDE = frozenset({"prediction", *_DESCRIBED})
"""What texts stand in beside the messages."""
_OPAQUE = texts.OPAQUE - {"filename"} | {"thinking_blocks"}


def _gather(message: dict[str, Any], ref: Ref, found: list[tuple[Ref, str]]) -> None:
    start = len(found)
    texts.gather(message, ref, found, _OPAQUE)
    is_calling = "tool_calls" in message or "function_call" in message
    if is_calling:
        found[start:] = jsons.opened(found[start:])
    name = message.get("name")
    if type(name) is str:  # of who speaks, or of the function that did
        found.append(((*ref, "name") if message.get("role") in _SPEAKERS else Fixed((*ref, "name")), name))
    if is_calling:
        texts.named(message.get("function_call"), (*ref, "function_call"), found)
        calls = message.get("tool_calls")
        for position, call in enumerate(calls if type(calls) is list else ()):
            for kind in ("function", "custom") if type(call) is dict else ():
                texts.named(call.get(kind), (*ref, "tool_calls", position, kind), found)
    thoughts = message.get("thinking_blocks")
    for position, block in enumerate(thoughts if type(thoughts) is list else ()):
        if type(block) is dict and type(thought := block.get("thinking")) is str:
            found.append((Fixed((*ref, "thinking_blocks", position, "thinking")), thought))


# --- its bounds --------------------------------------------------------------------------------

SETTINGS = frozenset(
    {
        *fields.SAMPLING,
        "audio",
        "logprobs",
        "max_completion_tokens",
        "metadata",
        "modalities",
        "parallel_tool_calls",
        "prompt_cache_key",
        "prompt_cache_retention",
        "reasoning_effort",
        "safety_identifier",
        "service_tier",
        "store",
        "top_logprobs",
        "verbosity",
    }
)
"""What the model never sees. Any other field counts with all its JSON, so that the bound stays one."""
_COUNTED_APART = SETTINGS | {"messages"}
_MEDIA = {"image_url": "images", "input_audio": "audio", "file": "files"}
_WORDS = frozenset({"text", "refusal", "thinking"})
"""The parts that are text; any other is counted as a medium, a known or an unknown one."""
_OWN_TOOLS = frozenset({"function", "custom"})
"""The tools that the client runs."""
_SEARCHES = "web_search"
"""How the types of tools begin whose use the answer counts."""


def input_bound(body: Body) -> tuple[int, int]:
    """The most input tokens this body can have, and an estimate of them; media are not text and not counted."""
    most, estimate, _ = measured(body)
    return most, estimate


def media(body: Body) -> dict[str, int]:
    """Count what a model reads beside text, by kind: images, audio, files; what is unknown, and hosted tools."""
    return measured(body)[2]


def measured(body: Body, plain_size: int | None = None) -> tuple[int, int, dict[str, int]]:
    """Its `input_bound` and its `media` at once; with the size of plain messages that `validate` has seen."""
    messages = body["messages"]
    items = 1 + len(messages)
    counts: dict[str, int] = {}
    size = _messages_size(messages, counts) if plain_size is None else plain_size
    if not _COUNTED_APART.issuperset(body):
        for name in body.keys() - _COUNTED_APART:
            if (value := body[name]) is not None:
                size += len(orjson.dumps(value))
                items += len(value) if type(value) is list else 1
        if tools := body.get("tools"):
            kinds = [tool["type"] for tool in tools]
            if hosted := sum(kind not in _OWN_TOOLS and not kind.startswith(_SEARCHES) for kind in kinds):
                counts[texts.HOSTED_TOOLS] = hosted
    return size + items * texts.MESSAGE_TOKENS, -(-size // 3) + items * 4, counts


def _messages_size(messages: list[dict[str, Any]], counts: dict[str, int]) -> int:
    """The bytes of messages of any kind, whose media are added to `counts`."""
    size = 0
    for message in messages:
        if len(message) == 2 and "role" in message and type(content := message.get("content")) is str:
            size += len(message["role"]) + texts.size(content)
        else:
            size += _message_size(message)
            _count_media(message, counts)
    return size


def _message_size(message: dict[str, Any]) -> int:
    size = 0
    for name, value in message.items():
        if type(value) is str:
            size += texts.size(value)
        elif name == "content" and type(value) is list:
            size += sum(map(_part_size, value))
        elif value is not None:
            size += len(orjson.dumps(value))
    return size


def _part_size(part: dict[str, Any]) -> int:
    file = part.get("file")
    named = texts.size(name) if type(file) is dict and type(name := file.get("filename")) is str else 0
    return texts.MESSAGE_TOKENS + named + sum(_json_size(value) for name, value in part.items() if name not in _MEDIA)


def _json_size(value: Any) -> int:
    return texts.size(value) if type(value) is str else len(orjson.dumps(value))


def _count_media(message: dict[str, Any], counts: dict[str, int]) -> None:
    content = message.get("content")
    if type(content) is list:
        for part in content:
            for kind in _media_of(part):
                counts[kind] = counts.get(kind, 0) + 1
    # An earlier spoken answer is read again.
    if message.get("audio"):
        counts["audio"] = counts.get("audio", 0) + 1


def _media_of(part: dict[str, Any]) -> list[str]:
    known = [_MEDIA[name] for name in part if name in _MEDIA]
    return known if known or part["type"] in _WORDS else [texts.UNKNOWN]


def output_bound(body: Body) -> tuple[str | None, int | None]:
    """The field and the number by which the client limits each choice; of two limits the smaller number counts."""
    newer, older = body.get("max_completion_tokens"), body.get("max_tokens")
    if newer is None:
        return (None, None) if older is None else ("max_tokens", older)
    return "max_completion_tokens", newer if older is None else min(newer, older)


def choices(body: Body) -> int:
    """How many choices are generated."""
    return body.get("n") or 1


def returned(body: Body) -> int:
    """How many of them come back: all."""
    return choices(body)


def clamp(body: Body, max_output_tokens: int | None, max_n: int) -> int | None:
    """Lower what is asked to what the model allows, under the client's own field names; gives the limit after it."""
    name, asked = output_bound(body)
    if name is not None and asked is not None:
        if max_output_tokens is not None and asked > max_output_tokens:
            asked = max_output_tokens
        body[name] = asked
        # Of two limits a provider may read either: both are to say the smaller number.
        if name != "max_tokens" and body.get("max_tokens") is not None:
            body["max_tokens"] = asked
    if "n" in body and choices(body) > max_n:
        body["n"] = max_n
    return asked


# --- the answer --------------------------------------------------------------------------------


def usage(body: Body) -> Usage | None:
    """Read the usage of an answer, or of one event of a stream."""
    return usages.from_openai(body.get("usage"), body.get("service_tier"))


finish = chunks.finish
event_ends = chunks.ends


def reply_texts(body: Body) -> list[tuple[Ref, str]]:
    """List the texts of an answer."""
    return [(ref, text) for _, ref, text in _texts(body, "message")]


def event_texts(event: Body) -> list[tuple[Strand, Ref, str]]:
    """List the text deltas of one event of a stream."""
    return _texts(event, "delta")


def _texts(body: Body, field: str) -> list[tuple[Strand, Ref, str]]:
    found: list[tuple[Strand, Ref, str]] = []
    for position, index, choice in chunks.choices_of(body):
        found += texts.leaves(choice.get(field), (index,), ("choices", position, field))
    return found


def text_event(event: Body, strand: Strand, text: str) -> Body:
    """An event like `event`, which has this strand, that carries only this text for it."""
    ref = next(ref for name, ref, _ in event_texts(event) if name == strand)
    delta = texts.only(event, ref, 3, text)
    return {
        **chunks.head(event, _CHUNK),
        "choices": [{"index": strand[0], "delta": delta, "finish_reason": None}],
    }


# --- streams -----------------------------------------------------------------------------------


def explode(body: Body) -> Iterator[Body]:
    """Turn a complete answer into the events of a stream, the usage event last if there is usage."""
    parts = (part for _, index, choice in chunks.choices_of(body) for part in _parts(index, choice))
    return chunks.events_of(body, _CHUNK, parts)


def _parts(index: int, choice: chunks.Choice) -> Iterator[chunks.Choice]:
    message = choice.get("message")
    deltas = list(_deltas(message if type(message) is dict else {}))
    # Log probabilities stand beside the text they belong to.
    spoken = next((at for at, delta in enumerate(deltas) if delta.get("content") or delta.get("refusal")), 0)
    silent: chunks.Choice = {"logprobs": None} if "logprobs" in choice else {}
    for at, delta in enumerate(deltas):
        spelled = {"logprobs": choice["logprobs"]} if silent and at == spoken else silent
        yield {"index": index, "delta": delta, **spelled, "finish_reason": None}
    more = chunks.choice_extras(choice)
    yield {"index": index, "delta": {}, **silent, **more, "finish_reason": choice.get("finish_reason")}


def _deltas(message: dict[str, Any]) -> Iterator[dict[str, Any]]:
    spoken = {name: value for name, value in message.items() if type(value) is str and value and name != "role"}
    tools = message.get("tool_calls")
    tools = [tool for tool in tools if type(tool) is dict] if type(tools) is list else []
    later = {*spoken, "tool_calls"} if tools else spoken.keys()
    opening = {"content": ""} if "content" in spoken else {}
    yield {"role": "assistant", **opening, **{name: message[name] for name in message if name not in later}}
    # Reasoning comes before what was reasoned about.
    for name in sorted(spoken, key=lambda name: name in {"content", "refusal"}):
        yield {name: spoken[name]}
    for index, tool in enumerate(tools):
        yield from ({"tool_calls": [part]} for part in _tool_parts(index, tool))


def _tool_parts(index: int, tool: dict[str, Any]) -> Iterator[dict[str, Any]]:
    kind, field = ("custom", "input") if type(tool.get("custom")) is dict else ("function", "arguments")
    called = tool.get(kind)
    called = called if type(called) is dict else {}
    spoken = called.get(field)
    if type(spoken) is not str:
        yield {"index": index, **tool}
        return
    yield {"index": index, **tool, kind: {**called, field: ""}}
    if spoken:
        yield {"index": index, kind: {field: spoken}}


def assemble(events: Iterable[Body]) -> Body:
    """Turn the events of a complete stream into the answer it would have been without streaming."""
    body, parts = chunks.gathered(events)
    choices = [
        {**chunks.around(index, parts[index]), "message": _assembled([part.get("delta") for part in parts[index]])}
        for index in sorted(parts)
    ]
    return {**body, "object": "chat.completion", "choices": choices}


def _assembled(deltas: list[Any]) -> dict[str, Any]:
    deltas = [delta for delta in deltas if type(delta) is dict]
    roles = [delta["role"] for delta in deltas if delta.get("role")]
    message: dict[str, Any] = {"role": roles[0] if roles else "assistant", "content": None}
    for name in dict.fromkeys(name for delta in deltas for name in delta):
        values = [delta.get(name) for delta in deltas]
        if name == "tool_calls":
            message[name] = _assembled_tools(values)
        elif name != "role":
            message[name] = chunks.joined(values)
    return message


def _assembled_tools(values: list[Any]) -> list[dict[str, Any]] | None:
    found: dict[int, list[dict[str, Any]]] = {}
    last = -1
    lists = [value for value in values if type(value) is list]
    for part in (part for value in lists for part in value if type(part) is dict):
        index = part.get("index")
        if type(index) is not int:
            # Some providers leave the index out: an id then starts the next tool call.
            index = last + 1 if part.get("id") or last < 0 else last
        last = index
        found.setdefault(index, []).append(part)
    return [_assembled_tool(found[index]) for index in sorted(found)] if lists else None


def _assembled_tool(parts: list[dict[str, Any]]) -> dict[str, Any]:
    names = dict.fromkeys(name for part in parts for name in part if name != "index")
    tool = {name: chunks.joined(part.get(name) for part in parts) for name in names}
    for name in ("id", "type"):
        # These are whole in one delta, and repeated by some providers.
        if given := [part[name] for part in parts if part.get(name)]:
            tool[name] = given[0]
    return tool
