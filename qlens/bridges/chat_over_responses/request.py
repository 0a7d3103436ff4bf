"""From a chat to a request for a response."""

from __future__ import annotations

from typing import Any

import orjson

from qlens.bridges.chat_over_responses.items import items_of
from qlens.dialects import Body, chat
from qlens.errors import InvalidRequest, NotOffered

LEAST_OUTPUT = 16
"""Responses refuse a smaller `max_output_tokens`; asking for more would cost the client more than it allows."""

# What Responses have under the same name and with the same meaning.
_SAME = (
    *("model", "moderation", "parallel_tool_calls", "prompt_cache_key", "prompt_cache_options"),
    *("prompt_cache_retention", "safety_identifier", "service_tier", "stream", "temperature", "top_p", "user"),
)
_SAID = frozenset(
    {
        *(*_SAME, "function_call", "functions", "logprobs", "max_completion_tokens", "max_tokens", "messages"),
        *("reasoning_effort", "response_format", "stream_options", "tool_choice", "tools", "top_logprobs", "verbosity"),
    }
)
# Responses have no equal of these, and an answer without them is an answer still: they nudge the model, or are notes
# for a chat that is kept, which a response is not. The last three are not OpenAI's.
_ADVICE = frozenset(
    {
        *("frequency_penalty", "logit_bias", "metadata", "prediction", "presence_penalty", "seed", "store"),
        *("cache_control", "thinking", "top_k"),
    }
)
# What asks for nothing with this value, and for what cannot be had with any other.
_NOTHING: dict[str, tuple[Any, ...]] = {
    "audio": (None,),
    "modalities": (None, [], ["text"]),
    "n": (None, 1),
    "stop": (None, []),
}
_LOGPROBS = "message.output_text.logprobs"


def written(body: Body) -> Body:
    """The chat as a request for a response, sharing nothing with it."""
    _refuse_what_has_no_equal(body)
    body = _modern(orjson.loads(orjson.dumps(body)))  # nothing is to be shared with the client's own
    found: Body = {name: body[name] for name in _SAME if body.get(name) is not None}
    # OpenAI keeps a response unless it is told not to, and no client of chat could ever delete it.
    found |= {"input": items_of(body["messages"]), "store": False}
    if (most := chat.output_bound(body)[1]) is not None:
        found["max_output_tokens"] = _limit(body, most)
    if body.get("logprobs"):
        found |= {"include": [_LOGPROBS], "top_logprobs": body.get("top_logprobs") or 0}
    options = body.get("stream_options") or {}
    if options.get("include_obfuscation") is not None:
        found["stream_options"] = {"include_obfuscation": options["include_obfuscation"]}
    if body.get("reasoning_effort") is not None:
        found["reasoning"] = {"effort": body["reasoning_effort"]}
    _put_tools(found, body)
    if text := _text(body):
        found["text"] = text
    return found


def is_older(body: Body) -> bool:
    """Whether the client speaks of functions, not of tools."""
    return bool(body.get("functions")) and not body.get("tools")


def _refuse_what_has_no_equal(body: Body) -> None:
    for name, value in body.items():
        if name in _SAID or name in _ADVICE or value is None or value in _NOTHING.get(name, ()):
            continue
        raise NotOffered(
            f"has no equal of '{name[:64]}': it has this model in the Responses API only.",
            param=name[:64],
            code="unsupported_parameter",
        )


def _limit(body: Body, most: int) -> int:
    if most >= LEAST_OUTPUT:
        return most
    name = chat.output_bound(body)[0] or "max_completion_tokens"
    raise InvalidRequest(
        f"Invalid '{name}': integer below minimum value. The model of this name takes {LEAST_OUTPUT} or more, but got "
        f"{most} instead.",
        param=name,
        code="integer_below_min_value",
    )


def _modern(body: Body) -> Body:
    """The chat with tools where it has functions."""
    if not is_older(body):
        return body
    made = [{"type": "function", "function": each} for each in body["functions"]]
    given = body.get("function_call")
    choice = {"type": "function", "function": given} if isinstance(given, dict) else given
    return {**body, "tools": made, "tool_choice": choice, "parallel_tool_calls": False}


# --- tools -------------------------------------------------------------------------------------


def _put_tools(found: Body, body: Body) -> None:
    tools = [_tool(tool, f"tools[{position}]") for position, tool in enumerate(body.get("tools") or ())]
    if not tools:
        found.pop("parallel_tool_calls", None)
        return
    found["tools"] = tools
    if body.get("parallel_tool_calls") is not None:
        found["parallel_tool_calls"] = body["parallel_tool_calls"]
    if body.get("tool_choice") is not None:
        found["tool_choice"] = _choice(body["tool_choice"])


def _tool(tool: dict[str, Any], param: str) -> dict[str, Any]:
    kind = tool["type"]
    if kind == "function":
        function = tool[kind]
        described = {"description": function["description"]} if function.get("description") is not None else {}
        return {
            "type": kind,
            "name": function["name"],
            **described,
            "parameters": function.get("parameters") or {"type": "object", "properties": {}},
            # Left out it means true in Responses, where the schema would be changed, and false in chat.
            "strict": bool(function.get("strict")),
        }
    if kind == "custom":
        custom = {name: value for name, value in tool[kind].items() if value is not None}
        if isinstance(form := custom.get("format"), dict) and form.get("type") == "grammar":
            custom["format"] = {"type": "grammar", **(form.get("grammar") or {})}
        return {"type": kind, **custom}
    raise NotOffered(
        f"takes tools of the types 'function' and 'custom', not '{str(kind)[:64]}'.",
        param=f"{param}.type",
        code="unsupported_value",
    )


def _choice(choice: Any) -> Any:
    if not isinstance(choice, dict):
        return choice
    kind = choice.get("type")
    inner = choice.get(kind) if isinstance(kind, str) else None
    if kind in {"function", "custom"} and isinstance(inner, dict):
        return {"type": kind, "name": inner.get("name")}
    if kind == "allowed_tools" and isinstance(inner, dict):
        return {"type": kind, "mode": inner.get("mode") or "auto", "tools": [_choice(each) for each in inner["tools"]]}
    raise NotOffered(
        "lets a tool of the types 'function' and 'custom' be chosen only.",
        param="tool_choice.type",
        code="unsupported_value",
    )


# --- text --------------------------------------------------------------------------------------


def _text(body: Body) -> Body:
    found: Body = {"verbosity": body["verbosity"]} if body.get("verbosity") is not None else {}
    form = body.get("response_format") or {"type": "text"}
    match form["type"]:
        case "text":
            return found
        case "json_object":
            return {**found, "format": {"type": "json_object"}}
        case "json_schema":
            schema = {name: value for name, value in form["json_schema"].items() if value is not None}
            return {**found, "format": {"type": "json_schema", "schema": {}, **schema}}
        case other:
            raise NotOffered(
                f"does not have the format '{str(other)[:64]}'.", param="response_format.type", code="unsupported_value"
            )
