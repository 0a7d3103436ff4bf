"""From messages to a chat."""

from __future__ import annotations

from typing import Any

import orjson

from qlens.bridges.messages_over_chat.content import marked
from qlens.bridges.messages_over_chat.conversation import system_of, told
from qlens.dialects import Body
from qlens.errors import NotOffered

Block = dict[str, Any]

_SAID = frozenset(
    {
        *("max_tokens", "messages", "metadata", "model", "output_config", "service_tier", "stop_sequences", "stream"),
        *("system", "temperature", "thinking", "tool_choice", "tools", "top_k", "top_p"),
    }
)
# A chat has no equal of these, and an answer without them is an answer still: prompts are cached without being asked,
# a long context stays whole, and the rest are notes.
_ADVICE = frozenset({"cache_control", "context_management", "diagnostics", "speed", "user_profile_id"})
_NOTHING: tuple[Any, ...] = (None, [], {})

_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
_TIERS = {"auto": "auto", "standard_only": "default"}
_MOST_STOPS = 4
_LOW, _MEDIUM = 2048, 8192
"""Up to which budgets a model thinks with little and with medium effort."""


def written(body: Body) -> Body:
    """The messages as a chat, sharing nothing with them."""
    for name, value in body.items():
        if name not in _SAID and name not in _ADVICE and value not in _NOTHING:
            raise _unsupported(name[:64], f"has no equal of '{name[:64]}'.")
    messages = [part for at, message in enumerate(body["messages"]) for part in told(message, f"messages[{at}]")]
    fields = {
        "model": body["model"],
        "messages": [*system_of(body.get("system")), *messages],
        "max_completion_tokens": _limit(body),
        "stop": _stops(body),
        "temperature": body.get("temperature"),
        "top_p": body.get("top_p"),
        "top_k": body.get("top_k"),
        "tools": [_tool(tool, f"tools[{at}]") for at, tool in enumerate(body.get("tools") or ())] or None,
        **_choice(body),
        "response_format": _format(body),
        "reasoning_effort": _effort(body),
        "thinking": body.get("thinking"),
        "user": (body.get("metadata") or {}).get("user_id"),
        "service_tier": _TIERS.get(str(body.get("service_tier"))),
        "stream": body.get("stream"),
    }
    found = {name: value for name, value in fields.items() if value is not None}
    # Nothing may be shared with the client's own body, which is asked again when this provider fails.
    copied: Body = orjson.loads(orjson.dumps(found))
    return copied


def without_extensions(body: Body, *, keep_settings: bool = False) -> Body:
    """The chat without the fields that only providers of Claude know: OpenAI refuses what it does not know."""
    kept = {name: value for name, value in body.items() if keep_settings or name not in {"thinking", "top_k"}}
    kept["messages"] = [_plain_message(message) for message in kept["messages"]]
    if kept.get("tools"):
        kept["tools"] = [_plain(tool) for tool in kept["tools"]]
    return kept


def _plain_message(message: Block) -> Block:
    plain = {name: value for name, value in _plain(message).items() if name != "thinking_blocks"}
    if isinstance(plain.get("content"), list):
        plain["content"] = [_plain(part) for part in plain["content"]]
    if plain.get("tool_calls"):
        plain["tool_calls"] = [_plain(call) for call in plain["tool_calls"]]
    return plain


def _plain(node: Block) -> Block:
    return {name: value for name, value in node.items() if name != "cache_control"}


def _unsupported(param: str, what: str) -> NotOffered:
    return NotOffered(what, param=param, code="unsupported_parameter")


def _limit(body: Body) -> int:
    limit: int = body["max_tokens"]
    if not limit:
        raise _unsupported(
            "max_tokens",
            "cannot fill its cache without generating: ask for a token at least.",
        )
    return limit


def _stops(body: Body) -> list[str] | None:
    stops = body.get("stop_sequences") or None
    if stops is not None and len(stops) > _MOST_STOPS:
        raise NotOffered(
            f"takes at most {_MOST_STOPS} stop sequences.",
            param="stop_sequences",
            code="array_above_max_length",
        )
    return stops


# --- tools -------------------------------------------------------------------------------------


def _tool(tool: Block, param: str) -> Block:
    if tool.get("type") not in {None, "custom"}:
        raise _unsupported(
            f"{param}.type",
            f"has no tool of type '{str(tool['type'])[:64]}': it takes the client's own.",
        )
    function = {"name": tool["name"], "parameters": tool["input_schema"]}
    if tool.get("description"):
        function["description"] = tool["description"]
    # OpenAI holds a model to fewer schemas than Anthropic does, and refuses the others.
    if tool.get("strict") and _is_strict(tool["input_schema"]):
        function["strict"] = True
    return marked({"type": "function", "function": function}, tool)


def _choice(body: Body) -> Body:
    choice = body.get("tool_choice")
    if not choice or not body.get("tools"):
        return {}
    name = {"type": "function", "function": {"name": choice.get("name")}}
    found: Body = {"tool_choice": name if choice["type"] == "tool" else _CHOICES[choice["type"]]}
    if choice.get("disable_parallel_tool_use"):
        found["parallel_tool_calls"] = False
    return found


# --- formats and thinking ----------------------------------------------------------------------


def _format(body: Body) -> Block | None:
    form = (body.get("output_config") or {}).get("format")
    if not form:
        return None
    schema = form["schema"]
    described = {"name": "answer", "schema": schema, "strict": _is_strict(schema)}
    return {"type": "json_schema", "json_schema": described}


def _is_strict(node: Any) -> bool:
    """Whether a schema is one that OpenAI holds a model to: each object names all its properties and wants them."""
    if isinstance(node, list):
        return all(map(_is_strict, node))
    if not isinstance(node, dict):
        return True
    if node.get("type") == "object":
        names, wanted = node.get("properties") or {}, node.get("required") or []
        if node.get("additionalProperties") is not False or type(names) is not dict or type(wanted) is not list:
            return False
        if len(names) != len(wanted) or any(name not in wanted for name in names):
            return False
    return all(map(_is_strict, node.values()))


def _effort(body: Body) -> str | None:
    """With how much effort a model is to think: as asked, or as much as a budget allows."""
    thinking = body.get("thinking") or {}
    if thinking.get("type") == "disabled":
        return None
    asked = (body.get("output_config") or {}).get("effort")
    if asked or not thinking:
        return str(asked) if asked else None
    budget = thinking.get("budget_tokens")
    if budget is None:
        return "medium"
    return "low" if budget <= _LOW else "medium" if budget <= _MEDIUM else "high"
