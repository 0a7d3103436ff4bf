"""Tools of a chat as messages know them, and what of a call is needed to read its answer."""

from __future__ import annotations

import re
from hashlib import sha256
from typing import Any

from attrs import define, field, frozen

from qlens.bridges.chat_over_messages.caching import marked
from qlens.bridges.claude import Claude
from qlens.dialects import Body
from qlens.errors import InvalidRequest, NotOffered

Block = dict[str, Any]

HELPER = "json_tool_call"
"""The tool whose input is an answer that fits a schema."""

_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_ID = re.compile(r"[a-zA-Z0-9_-]{1,128}")
_NOT_IN_NAME = re.compile(r"[^a-zA-Z0-9_-]")
_KEPT = 47
"""How much of a name that is replaced stays readable, in front of 16 digits of its hash."""


@define(eq=False)
class Names:
    """The names of one request's tools, there and back: 64 letters, digits, _ and - are taken."""

    _client: dict[str, str] = field(factory=dict, init=False)

    def sent(self, name: str) -> str:
        """The name under which the provider knows a tool."""
        sent = name if _NAME.fullmatch(name) else f"{_NOT_IN_NAME.sub('_', name)[:_KEPT]}_{_digest(name, 16)}"
        self._client[sent] = name
        return sent

    def client(self, sent: str) -> str:
        """The client's name for a tool that the model calls."""
        return self._client.get(sent, sent)

    def unused(self, name: str) -> str:
        """A name like this one that no tool has."""
        while name in self._client:
            name += "_"
        return name


@frozen
class Asked:
    """What of a call is needed to read its answer."""

    names: Names
    helper: str | None
    """The tool whose input would be the answer's text; the model may have been asked in another way."""
    older: bool
    """Whether the client speaks of functions, not of tools."""

    @classmethod
    def of(cls, body: Body) -> Asked:
        """What the client asked."""
        names = Names()
        for name in _named(body):
            names.sent(name)
        form = body.get("response_format")
        by_schema = isinstance(form, dict) and form.get("type") == "json_schema"
        return cls(
            names,
            helper=names.unused(HELPER) if by_schema else None,
            older=bool(body.get("functions")) and not body.get("tools"),
        )


def _named(body: Body) -> list[str]:
    """The names of all functions that are offered, or were called."""
    functions = [tool.get("function") or {} for tool in body.get("tools") or ()] + list(body.get("functions") or ())
    calls = [call.get("function") or {} for message in body["messages"] for call in message.get("tool_calls") or ()]
    older = [message["function_call"] for message in body["messages"] if message.get("function_call")]
    return [each["name"] for each in (*functions, *calls, *older) if isinstance(each.get("name"), str)]


def call_id(given: str) -> str:
    """The id of a call as messages take it; the same for a call and its result."""
    return given if _ID.fullmatch(given) else f"call_{_digest(given, 32)}"


def _digest(text: str, length: int) -> str:
    return sha256(text.encode(errors="surrogatepass")).hexdigest()[:length]


# --- what the client offers --------------------------------------------------------------------


def offered(body: Body, names: Names, model: Claude) -> list[Block]:
    """The tools that the client offers, narrowed to those allowed."""
    found = []
    allowed = _allowed_names(body.get("tool_choice"))
    for position, tool in enumerate(body.get("tools") or ()):
        if tool.get("type") != "function":
            raise NotOffered(
                f"takes tools of type 'function' only, not '{str(tool.get('type'))[:64]}'.",
                param=f"tools[{position}].type",
                code="unsupported_value",
            )
        if allowed is None or tool["function"]["name"] in allowed:
            found.append(_tool(tool, names, model, f"tools[{position}].function.parameters"))
    return found


def _tool(tool: Block, names: Names, model: Claude, param: str) -> Block:
    function = tool["function"]
    written: Block = {"name": names.sent(function["name"]), "input_schema": _schema(function.get("parameters"), param)}
    if function.get("description"):
        written["description"] = function["description"]
    # Where a model cannot be held to a schema it still reads it.
    if function.get("strict") and model.strict_tools:
        written["strict"] = True
    marked(written, tool, function)
    return written


def _schema(schema: Any, param: str) -> Block:
    if not schema:
        return {"type": "object", "properties": {}}
    if schema.get("type", "object") != "object":
        raise InvalidRequest(
            f"Invalid schema for '{param}': the provider takes a schema of type 'object' only.",
            param=param,
            code="invalid_function_parameters",
        )
    return {"type": "object", **schema}


def from_history(turns: list[Block]) -> list[Block]:
    """Tools for the calls of earlier turns: they are not taken without any."""
    used = [block["name"] for turn in turns for block in turn["content"] if block["type"] == "tool_use"]
    return [{"name": name, "input_schema": {"type": "object", "properties": {}}} for name in dict.fromkeys(used)]


# --- the choice --------------------------------------------------------------------------------


def choice(body: Body, names: Names) -> Block | None:
    """Which tools the model may or must use; None leaves it to the model."""
    given = body.get("tool_choice")
    chosen = _choice(given, names)
    if body.get("parallel_tool_calls") is False and (chosen is None or chosen["type"] != "none"):
        chosen = {**(chosen or {"type": "auto"}), "disable_parallel_tool_use": True}
    return chosen


def _choice(given: Any, names: Names) -> Block | None:
    if isinstance(given, dict):
        if given.get("type") == "function":
            return {"type": "tool", "name": names.sent(str((given.get("function") or {}).get("name")))}
        if given.get("type") != "allowed_tools":
            raise NotOffered(
                "lets a tool of type 'function' be chosen only.",
                param="tool_choice.type",
                code="unsupported_value",
            )
        given = _allowed(given).get("mode")
    kinds = {"auto": "auto", "required": "any", "none": "none"}
    return {"type": kinds[given]} if given in kinds else None


def _allowed(given: Block) -> Block:
    inner = given.get("allowed_tools")
    return inner if isinstance(inner, dict) else {}


def _allowed_names(given: Any) -> set[str] | None:
    if not isinstance(given, dict) or given.get("type") != "allowed_tools":
        return None
    return {str((each.get("function") or {}).get("name")) for each in _allowed(given).get("tools") or ()}
