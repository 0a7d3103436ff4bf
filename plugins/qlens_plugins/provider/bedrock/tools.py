"""Tools: their specifications, the choice among them, and names and ids as Bedrock takes them."""

from __future__ import annotations

import re
from hashlib import sha256
from typing import Any

from attrs import define, field

from qlens import InvalidRequest
from qlens_plugins.provider.bedrock import fields, schemas
from qlens_plugins.provider.bedrock.caching import mark, point
from qlens_plugins.provider.bedrock.families import Family

Block = dict[str, Any]

_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_ID = re.compile(r"[a-zA-Z0-9_.:-]{1,64}")
_NOT_IN_NAME = re.compile(r"[^a-zA-Z0-9_-]")
_KEPT = 47
"""How much of a name that is replaced stays readable, in front of 16 digits of its hash."""
_GROUNDING = "nova_grounding"


@define(eq=False)
class Names:
    """The names of one request's tools, there and back: Bedrock takes 64 letters, digits, _ and -."""

    _sent: dict[str, str] = field(factory=dict, init=False)
    _client: dict[str, str] = field(factory=dict, init=False)

    def sent(self, name: str) -> str:
        """The name under which Bedrock knows a tool."""
        known = self._sent.get(name)
        if known is not None:
            return known
        sent = name if _NAME.fullmatch(name) else f"{_NOT_IN_NAME.sub('_', name)[:_KEPT]}_{_digest(name, 16)}"
        self._sent[name], self._client[sent] = sent, name
        return sent

    def client(self, sent: str) -> str:
        """The client's name for a tool that the model calls."""
        return self._client.get(sent, sent)

    def unused(self, name: str) -> str:
        """A name like this one that no tool has."""
        while name in self._client:
            name += "_"
        return name


def call_id(given: str) -> str:
    """The id of a call as Bedrock takes it; the same for a call and its result."""
    return given if _ID.fullmatch(given) else f"call_{_digest(given, 32)}"


def _digest(text: str, length: int) -> str:
    return sha256(text.encode(errors="surrogatepass")).hexdigest()[:length]


# --- what the client offers --------------------------------------------------------------------


def offered(body: dict[str, Any]) -> list[Block]:
    """The functions that the client offers, of `tools` or of the older `functions`, narrowed to those allowed."""
    tools = body.get("tools") or [{"type": "function", "function": each} for each in body.get("functions") or ()]
    for position, tool in enumerate(tools):
        if tool.get("type") != "function":
            raise InvalidRequest(
                f"The provider takes tools of type 'function' only, not '{str(tool.get('type'))[:64]}'.",
                param=f"tools[{position}].type",
                code="unsupported_value",
            )
    choice = body.get("tool_choice")
    if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        allowed = {(each.get("function") or {}).get("name") for each in _allowed(choice).get("tools") or ()}
        tools = [tool for tool in tools if tool["function"]["name"] in allowed]
    return tools


def _allowed(choice: dict[str, Any]) -> dict[str, Any]:
    inner = choice.get("allowed_tools")
    return inner if isinstance(inner, dict) else {}


def specifications(tools: list[Block], names: Names, family: Family) -> list[Block]:
    """Converse's specifications of the tools, with cache points behind those that are marked."""
    written: list[Block] = []
    for position, tool in enumerate(tools):
        function = tool["function"]
        name = function["name"]
        spec: Block = {
            "name": names.sent(name),
            # A blank description is refused.
            "description": (function.get("description") or "").strip() or name or ".",
            "inputSchema": {
                "json": schemas.parameters(function.get("parameters"), f"tools[{position}].function.parameters")
            },
        }
        if function.get("strict") and family.strict_tools:
            spec["strict"] = True
        written.append({"toolSpec": spec})
        place = f"tools[{position}]"
        ttl = mark(tool, place) or mark(function, f"{place}.function")
        if ttl is not None and family.caches_tools:
            written.append(point(ttl, family))
    return written


def from_history(turns: list[Block]) -> list[Block]:
    """Specifications for the tools of earlier turns: Bedrock takes no history of tools without any."""
    used = {block["toolUse"]["name"]: None for turn in turns for block in turn["content"] if "toolUse" in block}
    empty = {"json": {"type": "object", "properties": {}}}
    return [{"toolSpec": {"name": name, "description": name, "inputSchema": empty}} for name in used]


def choice(body: dict[str, Any], names: Names) -> Block | None:
    """Converse's toolChoice; None leaves it to the model, as does what OpenAI calls none.

    Raises InvalidRequest for the choice of a function that it does not name.
    """
    given = body.get("tool_choice")
    if given is None:
        given = body.get("function_call")
        if isinstance(given, dict):
            return {"tool": {"name": names.sent(_named(given, "function_call"))}}
    if isinstance(given, dict):
        if given.get("type") == "function":
            return {"tool": {"name": names.sent(_named(given.get("function") or {}, "tool_choice.function"))}}
        given = _allowed(given).get("mode")
    return {"auto": {}} if given == "auto" else {"any": {}} if given == "required" else None


def _named(chosen: dict[str, Any], place: str) -> str:
    name = fields.text(chosen, "name", place)
    if name is None:
        param = f"{place}.name"
        raise InvalidRequest(f"Missing required parameter: '{param}'.", param=param, code="missing_required_parameter")
    return name


def grounding() -> Block:
    """Nova's own search of the web."""
    return {"systemTool": {"name": _GROUNDING}}
