"""Makes a JSON value that fits a JSON schema, always the same one for the same schema and text."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

from attrs import define, field

from qlens import UpstreamRejected

MAX_VALUES = 2000
MAX_DEPTH = 48
MAX_TEXT = 4096

_FORMATS = {
    "date": "2024-10-21",
    "date-time": "2024-10-21T00:00:00Z",
    "time": "00:00:00Z",
    "duration": "PT1S",
    "email": "echo@example.com",
    "hostname": "example.com",
    "ipv4": "192.0.2.1",
    "ipv6": "2001:db8::1",
    "uri": "https://example.com/",
    "uuid": "00000000-0000-4000-8000-000000000000",
}


class _Endless(Exception):
    """A schema that contains itself; caught where a value may be left out."""


def sample(schema: Any, text: str) -> Any:
    """A value that fits the schema: strings are filled from the text, enums with their first value.

    Patterns are not followed. A schema that needs too large a value is refused.
    """
    try:
        return _Sampler(schema, text[:MAX_TEXT]).value(schema, ())
    except _Endless:
        raise UpstreamRejected("The echo cannot answer in a schema that nests deeply or without end.") from None


def sample_object(schema: Any, text: str) -> dict[str, Any]:
    """A value that fits the schema of a tool's parameters, which is an object whatever the schema says."""
    value = sample(schema, text)
    return value if isinstance(value, dict) else {}


@define
class _Sampler:
    root: Any
    text: str
    _left: int = field(init=False, default=MAX_VALUES)

    def value(self, schema: Any, inside: tuple[str, ...]) -> Any:
        """`inside` holds the references that were followed to come here, one "" for each other level."""
        self._left -= 1
        if self._left < 0:
            raise UpstreamRejected(f"The echo does not answer in a schema that needs more than {MAX_VALUES} values.")
        if len(inside) > MAX_DEPTH:
            raise _Endless
        if not isinstance(schema, Mapping):
            return self.text
        if isinstance(reference := schema.get("$ref"), str):
            if reference in inside:
                raise _Endless
            return self.value(self._resolve(reference), (*inside, reference))
        return self._plain(schema, (*inside, ""))

    def _plain(self, schema: Mapping[str, Any], inside: tuple[str, ...]) -> Any:
        for name in ("const", "default"):
            if name in schema:
                return schema[name]
        if isinstance(options := schema.get("enum"), list) and options:
            return options[0]
        for name in ("anyOf", "oneOf"):
            if isinstance(options := schema.get(name), list) and options:
                return self._first_possible(options, inside)
        if isinstance(parts := schema.get("allOf"), list) and parts:
            return self.value(self._merged(schema, parts), inside)
        return self._typed(_type(schema), schema, inside)

    def _typed(self, kind: str, schema: Mapping[str, Any], inside: tuple[str, ...]) -> Any:
        match kind:
            case "object":
                return self._object(schema, inside)
            case "array":
                return self._array(schema, inside)
            case "integer" | "number":
                return _number(schema, whole=kind == "integer")
            case "boolean":
                return True
            case "null":
                return None
            case _:
                return self._string(schema)

    def _first_possible(self, options: list[Any], inside: tuple[str, ...]) -> Any:
        for option in options:
            try:
                return self.value(option, inside)
            except _Endless:
                continue
        raise _Endless

    def _merged(self, schema: Mapping[str, Any], parts: list[Any]) -> dict[str, Any]:
        merged = {key: value for key, value in schema.items() if key != "allOf"}
        for part in parts:
            found = self._resolve(part["$ref"]) if isinstance(part, Mapping) and "$ref" in part else part
            if not isinstance(found, Mapping):
                continue
            properties = {**_mapping(merged, "properties"), **_mapping(found, "properties")}
            required = [*_list(merged, "required"), *_list(found, "required")]
            merged |= {**found, **({"properties": properties, "required": required} if properties else {})}
        return merged

    def _object(self, schema: Mapping[str, Any], inside: tuple[str, ...]) -> dict[str, Any]:
        required = _list(schema, "required")
        made = {}
        for name, part in _mapping(schema, "properties").items():
            try:
                made[name] = self.value(part, inside)
            except _Endless:
                if name in required:
                    raise
        for name in required:
            if isinstance(name, str):
                made.setdefault(name, self.text)
        return made

    def _array(self, schema: Mapping[str, Any], inside: tuple[str, ...]) -> list[Any]:
        fixed = _list(schema, "prefixItems")
        least = _bound(schema, "minItems", 0)
        wanted = min(max(least, len(fixed), 1), _bound(schema, "maxItems", MAX_VALUES))
        made: list[Any] = []
        for place in range(wanted):
            part = fixed[place] if place < len(fixed) else schema.get("items", {})
            try:
                made.append(self.value(part, inside))
            except _Endless:
                if place < least:
                    raise
                break
        return made

    def _string(self, schema: Mapping[str, Any]) -> str:
        known = _FORMATS.get(str(schema.get("format")))
        if known is not None:
            return known
        least = min(_bound(schema, "minLength", 0), MAX_TEXT)
        return (self.text.ljust(least, "x"))[: _bound(schema, "maxLength", MAX_TEXT)]

    def _resolve(self, reference: Any) -> Any:
        """What a reference within the schema points at; others are never fetched and fit anything."""
        if not isinstance(reference, str) or not reference.startswith("#"):
            return {}
        node = self.root
        for step in reference[1:].split("/")[1:]:
            key = unquote(step).replace("~1", "/").replace("~0", "~")
            node = node.get(key) if isinstance(node, Mapping) else None
        return node


def _type(schema: Mapping[str, Any]) -> str:
    kind = schema.get("type")
    if isinstance(kind, list):
        kind = next((option for option in kind if option != "null"), "null")
    if isinstance(kind, str):
        return kind
    if "properties" in schema:
        return "object"
    return "array" if "items" in schema or "prefixItems" in schema else "string"


def _number(schema: Mapping[str, Any], *, whole: bool) -> int | float:
    """The number nearest to 0, from above if that is possible, that the bounds allow."""
    past = 1 if whole else 0.001
    lows = [_limit(schema, "minimum", 0), _limit(schema, "exclusiveMinimum", past)]
    highs = [_limit(schema, "maximum", 0), _limit(schema, "exclusiveMaximum", -past)]
    value = max([0, *(low for low in lows if low is not None)])
    value = min([value, *(high for high in highs if high is not None)])
    step = _limit(schema, "multipleOf", 0)
    if step is not None and step > 0:
        value = math.ceil(value / step) * step
    if not whole:
        return value
    return math.floor(value) if value < 0 else math.ceil(value)


def _limit(schema: Mapping[str, Any], name: str, past: float) -> int | float | None:
    value = schema.get(name)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or abs(value) >= 2**53:
        return None
    return value + past


def _bound(schema: Mapping[str, Any], name: str, default: int) -> int:
    value = schema.get(name)
    return value if type(value) is int and value >= 0 else default


def _mapping(schema: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = schema.get(name)
    return value if isinstance(value, Mapping) else {}


def _list(schema: Mapping[str, Any], name: str) -> list[Any]:
    value = schema.get(name)
    return value if isinstance(value, list) else []
