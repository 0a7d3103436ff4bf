"""Answers that fit a JSON schema: by the model itself, by a tool that it must call, or by asking for it."""

from __future__ import annotations

from typing import Any

from attrs import field, frozen

from qlens.bridges.chat_over_messages.tools import HELPER, Names
from qlens.bridges.claude import Claude
from qlens.dialects import Body
from qlens.errors import NotOffered

Block = dict[str, Any]

_SCHEMA = "response_format.json_schema.schema"


@frozen
class Format:
    """What a request must contain so that its answer has the form that the client wants."""

    output: Block = field(factory=dict)
    """For output_config."""
    tool: Block | None = None
    """A tool whose input is the answer."""
    hint: str | None = None
    """A sentence for the system prompt."""


FREE = Format()


def format_of(body: Body, model: Claude, names: Names) -> Format:
    """The form that `response_format` asks for."""
    asked = body.get("response_format")
    kind = asked.get("type") if isinstance(asked, dict) else None
    if asked is None or kind == "text":
        return FREE
    if kind == "json_object":
        return Format(hint="Answer with one JSON object and nothing else.")
    if kind != "json_schema":
        raise NotOffered(
            "answers in the formats text, json_object and json_schema only.",
            param="response_format.type",
            code="unsupported_value",
        )
    described = asked["json_schema"]
    schema = described.get("schema") or {"type": "object"}
    if model.schema == "native":
        return Format(output={"format": {"type": "json_schema", "schema": _closed(schema)}})
    if schema.get("type") != "object":
        raise NotOffered("takes a schema of type 'object' only.", param=_SCHEMA, code="unsupported_value")
    text = described.get("description") or "Gives the answer to the user: call it once, at the end."
    return Format(tool={"name": names.unused(HELPER), "description": text, "input_schema": schema})


def _closed(node: Any) -> Any:
    """A schema in which no object takes properties that it does not name: models fit answers to such alone."""
    if isinstance(node, list):
        return [_closed(child) for child in node]
    if not isinstance(node, dict):
        return node
    written = {name: _closed_below(name, child) for name, child in node.items()}
    if node.get("type") == "object" or (isinstance(node.get("properties"), dict) and "type" not in node):
        written["additionalProperties"] = False
    return written


_DATA = frozenset({"const", "default", "enum", "examples"})
"""What in a schema is no schema."""
_TABLES = frozenset({"$defs", "definitions", "dependentSchemas", "patternProperties", "properties"})
"""What in a schema holds schemas by names of the client's own."""


def _closed_below(name: str, child: Any) -> Any:
    if name in _TABLES and isinstance(child, dict):
        return {own: _closed(schema) for own, schema in child.items()}
    return child if name in _DATA else _closed(child)
