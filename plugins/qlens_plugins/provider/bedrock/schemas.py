"""JSON schemas as Bedrock's models take them: without references, and closed where an answer is to fit."""

from __future__ import annotations

from typing import Any

import orjson

from qlens import InvalidRequest

Schema = dict[str, Any]

_MOST_NODES = 20_000
"""How large a schema may grow when its references are written out."""
_BOUNDS = (
    *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "minLength", "maxLength"),
    *("minItems", "maxItems", "uniqueItems", "minProperties", "maxProperties", "pattern"),
)
_CHILDREN = ("items", "contains", "not", "if", "then", "else", "additionalItems")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_TABLES = ("properties", "patternProperties", "dependentSchemas")


def parameters(schema: Any, param: str) -> Schema:
    """A tool's parameters: an object without references; raises InvalidRequest for what cannot be one."""
    if not schema:
        return {"type": "object", "properties": {}}
    written = inlined(schema, param)
    kind = written.get("type")
    if kind is None and not any(name in written for name in ("anyOf", "oneOf", "allOf", "enum", "const")):
        return {"type": "object", **written}
    if kind != "object":
        raise InvalidRequest(
            f"Invalid schema for '{param}': the provider takes a schema of type 'object' only.",
            param=param,
            code="invalid_function_parameters",
        )
    return written


def inlined(schema: Schema, param: str) -> Schema:
    """The schema with each local `$ref` replaced by what it stands for; raises InvalidRequest for a recursive one."""
    if b'"$ref"' not in orjson.dumps(schema):
        return {name: value for name, value in schema.items() if name not in {"$defs", "definitions", "$schema"}}
    written = _Inliner(schema, param).write(schema, ())
    assert isinstance(written, dict)
    return written


class _Inliner:
    def __init__(self, root: Schema, param: str) -> None:
        self._root = root
        self._param = param
        self._nodes = 0

    def write(self, node: Any, within: tuple[str, ...]) -> Any:
        self._nodes += 1
        if self._nodes > _MOST_NODES:
            raise self._refusal("it is too large when its references are written out")
        if isinstance(node, list):
            return [self.write(item, within) for item in node]
        if not isinstance(node, dict):
            return node
        reference = node.get("$ref")
        rest = {name: value for name, value in node.items() if name not in {"$ref", "$defs", "definitions", "$schema"}}
        written = {name: self.write(value, within) for name, value in rest.items()}
        if not isinstance(reference, str):
            return written
        if reference in within:
            raise self._refusal(f"{reference[:100]!r} refers to itself, and this provider takes no recursive schema")
        target = self.write(self._find(reference), (*within, reference))
        return {**target, **written} if isinstance(target, dict) else target

    def _find(self, reference: str) -> Any:
        node: Any = self._root
        if not reference.startswith("#"):
            raise self._refusal(f"{reference[:100]!r} is not a reference within the schema")
        for step in reference[1:].split("/")[1:]:
            name = step.replace("~1", "/").replace("~0", "~")
            if not isinstance(node, dict) or name not in node:
                raise self._refusal(f"{reference[:100]!r} refers to nothing")
            node = node[name]
        return node

    def _refusal(self, why: str) -> InvalidRequest:
        return InvalidRequest(f"Invalid schema for '{self._param}': {why}.", param=self._param, code="invalid_schema")


def closed(schema: Schema) -> Schema:
    """The schema as structured answers want it: objects without further properties, bounds told in words."""
    written: Schema = {}
    told = []
    for name, value in schema.items():
        if name in _BOUNDS:
            told.append(f"{name}: {orjson.dumps(value).decode()}")
        elif name in _TABLES and isinstance(value, dict):
            written[name] = {key: closed(child) if isinstance(child, dict) else child for key, child in value.items()}
        elif name in _LISTS and isinstance(value, list):
            written[name] = [closed(child) if isinstance(child, dict) else child for child in value]
        elif name in _CHILDREN and isinstance(value, dict):
            written[name] = closed(value)
        else:
            written[name] = value
    if written.get("type") == "object" or "properties" in written:
        written["additionalProperties"] = False
    if told:
        written["description"] = " ".join([*([schema["description"]] if "description" in schema else []), *told])
    return written


def is_open(schema: Any) -> bool:
    """Whether an object in it may have properties of any name, which a closed schema cannot say."""
    if isinstance(schema, list):
        return any(map(is_open, schema))
    if not isinstance(schema, dict):
        return False
    return schema.get("additionalProperties") not in (None, False) or any(map(is_open, schema.values()))
