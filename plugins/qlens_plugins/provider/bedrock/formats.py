"""Answers that fit a JSON schema: by the model itself, by a tool that it must call, or by asking for it."""

from __future__ import annotations

from typing import Any

import orjson
from attrs import frozen

from qlens import InvalidRequest
from qlens_plugins.provider.bedrock import fields, schemas
from qlens_plugins.provider.bedrock.families import Family
from qlens_plugins.provider.bedrock.tools import Names

Block = dict[str, Any]

HELPER = "json_tool_call"
_PLACE = "response_format.json_schema"
_PARAM = f"{_PLACE}.schema"


@frozen
class Format:
    """What a request must contain so that its answer has the form that the client wants."""

    text_format: Block | None = None
    """For outputConfig."""
    tool: Block | None = None
    """A tool whose input is the answer."""
    helper: str | None = None
    """The name of that tool."""
    hint: str | None = None
    """A sentence for the system prompt."""


FREE = Format()


def format_of(body: Block, family: Family, names: Names, way: str | None = None) -> Format:
    """The form that `response_format` asks for; `way` overrules how the family does it."""
    asked = body.get("response_format")
    kind = asked.get("type") if isinstance(asked, dict) else None
    if asked is None or kind in {None, "text"}:
        return FREE
    if kind == "json_object":
        return Format(hint="Answer with one JSON object and nothing else.")
    if kind != "json_schema":
        raise InvalidRequest(
            "The provider answers in the formats text, json_object and json_schema only.",
            param="response_format.type",
            code="unsupported_value",
        )
    described = asked["json_schema"]
    words = (fields.text(described, "description", _PLACE) or "").strip()
    schema = schemas.inlined(described.get("schema") or {"type": "object"}, _PARAM)
    way = way or family.schema
    if way == "native" and not schemas.is_open(schema):
        return _native(described["name"], words, schema)
    if way in {"native", "tool"}:
        return _by_tool(words, schema, names)
    text = orjson.dumps(schema).decode()
    return Format(hint=f"Answer with JSON that fits this JSON schema, and with nothing else: {text}")


def _native(name: str, words: str, schema: Block) -> Format:
    structure: Block = {"schema": orjson.dumps(schemas.closed(schema, _PARAM)).decode(), "name": name}
    if words:
        structure["description"] = words
    return Format(text_format={"type": "json_schema", "structure": {"jsonSchema": structure}})


def _by_tool(words: str, schema: Block, names: Names) -> Format:
    if schema.get("type") != "object":
        raise InvalidRequest(
            "The provider takes a schema of type 'object' only.", param=_PARAM, code="unsupported_value"
        )
    helper = names.unused(HELPER)
    text = words or "Gives the answer to the user: call it once, at the end."
    return Format(
        tool={"toolSpec": {"name": helper, "description": text, "inputSchema": {"json": schema}}}, helper=helper
    )
