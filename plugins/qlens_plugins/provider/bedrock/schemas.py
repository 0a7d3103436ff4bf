"""JSON schemas as Bedrock's models take them: without references, and closed where an answer is to fit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import orjson

from qlens import InvalidRequest

Schema = dict[str, Any]

_MOST_NODES = 20_000
"""How large a schema may grow when its references are written out; a long text counts as several."""
_NODE_BYTES = 64
_DEEPEST = 128
"""How deep a schema may be nested when its references are written out; the JSON encoder stops at 254 levels."""
_BOUNDS = (
    *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "minLength", "maxLength"),
    *("minItems", "maxItems", "uniqueItems", "minProperties", "maxProperties", "pattern"),
)
_CHILDREN = ("items", "contains", "not", "if", "then", "else", "additionalItems")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_TABLES = ("properties", "patternProperties", "dependentSchemas")
_DEFINITIONS = frozenset({"$defs", "definitions", "$schema"})
"""What a schema without references needs no more; as the name of a property each of them is a name like any other."""
_NAMED = frozenset({*_TABLES, "dependencies"})
"""Keywords whose keys are names, and whose values are schemas."""
_VALUES = frozenset({"const", "default", "dependentRequired", "enum", "example", "examples", "required"})
"""Keywords that hold no schemas, whatever stands in them."""


def parameters(schema: Any, param: str) -> Schema:
    """A tool's parameters: an object without references; raises InvalidRequest for what cannot be one."""
    if not schema:
        return {"type": "object", "properties": {}}
    written = inlined(schema, param)
    kind = written.get("type")
    if kind is None and not any(name in written for name in ("anyOf", "oneOf", "allOf", "enum", "const")):
        return {**written, "type": "object"}
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
        return {name: value for name, value in schema.items() if name not in _DEFINITIONS}
    written = _Inliner(schema, param).write(schema, (), 0)
    assert isinstance(written, dict)
    return written


class _Inliner:
    def __init__(self, root: Schema, param: str) -> None:
        self._root = root
        self._param = param
        self._nodes = 0

    def write(self, node: Any, within: tuple[str, ...], depth: int) -> Any:
        """A schema or a list of schemas; `within` are the references that led to it."""
        if isinstance(node, list):
            self._grow(1, depth)
            return [self.write(item, within, depth + 1) for item in node]
        if not isinstance(node, dict):
            return self._value(node, depth)
        self._grow(1, depth)
        reference = node.get("$ref")
        written = {
            name: self._keyword(name, value, within, depth + 1)
            for name, value in node.items()
            if name != "$ref" and name not in _DEFINITIONS
        }
        if not isinstance(reference, str):
            return written
        if reference in within:
            raise self._refusal(f"{reference[:100]!r} refers to itself, and this provider takes no recursive schema")
        target = self.write(self._find(reference), (*within, reference), depth + 1)
        return {**target, **written} if isinstance(target, dict) else target

    def _keyword(self, name: str, value: Any, within: tuple[str, ...], depth: int) -> Any:
        if name in _VALUES:
            return self._value(value, depth)
        if name in _NAMED and isinstance(value, dict):
            self._grow(1, depth)
            return {key: self.write(child, within, depth + 1) for key, child in value.items()}
        return self.write(value, within, depth)

    def _value(self, value: Any, depth: int) -> Any:
        self._grow(1 + len(orjson.dumps(value)) // _NODE_BYTES, depth)
        return value

    def _grow(self, nodes: int, depth: int) -> None:
        self._nodes += nodes
        if self._nodes > _MOST_NODES:
            raise self._refusal("it is too large when its references are written out")
        if depth > _DEEPEST:
            raise self._refusal("it is nested too deeply when its references are written out")

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
        return _refusal(self._param, why)


def _refusal(param: str, why: str) -> InvalidRequest:
    return InvalidRequest(f"Invalid schema for '{param}': {why}.", param=param, code="invalid_schema")


def closed(schema: Schema, param: str) -> Schema:
    """The schema as structured answers want it: objects without further properties, bounds told in words.

    Raises InvalidRequest where a schema with bounds has a description that is no text.
    """
    written: Schema = {}
    told = []
    for name, value in schema.items():
        if name in _BOUNDS:
            told.append(f"{name}: {orjson.dumps(value).decode()}")
        elif name in _TABLES and isinstance(value, dict):
            written[name] = {key: _closed(child, param) for key, child in value.items()}
        elif name in _LISTS and isinstance(value, list):
            written[name] = [_closed(child, param) for child in value]
        elif name in _CHILDREN:
            written[name] = _closed(value, param)
        else:
            written[name] = value
    if written.get("type") == "object" or "properties" in written:
        written["additionalProperties"] = False
    if told:
        described = schema.get("description", "")
        if not isinstance(described, str):
            raise _refusal(param, "a 'description' in it is no string")
        written["description"] = " ".join([*([described] if described else []), *told])
    return written


def _closed(child: Any, param: str) -> Any:
    return closed(child, param) if isinstance(child, dict) else child


def is_open(schema: Any) -> bool:
    """Whether an object in it may have properties of any name, which a closed schema cannot say."""
    if not isinstance(schema, dict):
        return False
    return schema.get("additionalProperties") not in (None, False) or any(map(is_open, _children(schema)))


def _children(schema: Schema) -> Iterator[Any]:
    for name, value in schema.items():
        if name in _NAMED and isinstance(value, dict):
            yield from value.values()
        elif isinstance(value, list) and name not in _VALUES:
            yield from value
        elif name not in _VALUES:
            yield value
