"""The JSON schema of the configuration file, for editors."""

from __future__ import annotations

from collections.abc import Mapping
from types import NoneType
from typing import Any, get_args

import attrs

from qlens.config.entries import ON_DISCONNECT, STAGES, ModelSettings, Server
from qlens.config.shapes import (
    choices_of,
    default_of,
    docstrings,
    fields_of,
    in_words,
    is_choice,
    is_mapping,
    is_tuple,
    is_union,
    kinds_of,
)

_ENV = {"$ref": "#/$defs/env"}
_ON_DISCONNECT = {
    "anyOf": [{"enum": list(ON_DISCONNECT)}, _ENV],
    "description": "Whether an answer whose client has left is read to its end, to learn what it costs, or cut off.",
}
_SCALARS: Mapping[Any, Mapping[str, Any]] = {
    bool: {"type": "boolean"},
    int: {"type": "integer"},
    float: {"type": "number"},
}


def schema(plugins: Mapping[str, Mapping[str, type]]) -> dict[str, Any]:
    """The JSON schema of the whole file, for plugin classes by stage and name."""
    definitions: dict[str, Any] = {
        "env": {
            "description": "A text with environment variables: ${NAME} or ${NAME:-default}.",
            "type": "string",
            "pattern": r"\$\{[A-Za-z_][A-Za-z0-9_]*(:-[^}]*)?\}",
        }
    }
    for stage in (*STAGES, "provider"):
        for name, cls in sorted(plugins.get(stage, {}).items()):
            definitions[f"{stage}.{name}"] = _plugin_schema(stage, name, cls)
    stages = {stage: {"type": "array", "items": _entry_schema(stage, plugins.get(stage, {}))} for stage in STAGES}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "QLens configuration",
        "type": "object",
        "properties": {
            "server": _class_schema(Server),
            "pipeline": {"type": "object", "properties": stages, "additionalProperties": False},
            "providers": {
                "type": "object",
                "additionalProperties": _entry_schema("provider", plugins.get("provider", {})),
            },
            "models": {"type": "object", "additionalProperties": _class_schema(ModelSettings)},
        },
        "additionalProperties": False,
        "$defs": definitions,
    }


def _entry_schema(stage: str, plugins: Mapping[str, type]) -> dict[str, Any]:
    by_path = [{"type": "string", "pattern": ":"}, _ENV]
    plugin = {
        "description": "A plugin's name, or the import path of a class: package.module:Class.",
        "anyOf": [{"enum": sorted(plugins)}, *by_path] if plugins else by_path,
    }
    entry: dict[str, Any] = {"type": "object", "properties": {"plugin": plugin}, "required": ["plugin"]}
    if plugins:
        entry["allOf"] = [_settings_of(stage, name) for name in sorted(plugins)]
    return entry


def _settings_of(stage: str, name: str) -> dict[str, Any]:
    return {
        "if": {"properties": {"plugin": {"const": name}}, "required": ["plugin"]},
        "then": {"$ref": f"#/$defs/{stage}.{name}"},
    }


def _plugin_schema(stage: str, name: str, cls: type) -> dict[str, Any]:
    config = getattr(cls, "Config", None)
    empty: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
    result = _class_schema(config) if config else empty
    own: dict[str, Any] = {"plugin": {"const": name}}
    if stage == "provider":
        own["on_disconnect"] = _ON_DISCONNECT
    else:
        own["name"] = {"type": "string", "description": "The instance's name; needed for a second one of its kind."}
    return {**result, "properties": {**own, **result["properties"]}}


def _class_schema(cls: type, *, kind: bool = False) -> dict[str, Any]:
    texts = docstrings(cls)
    properties, required = {}, ["kind"] if kind else []
    for field in fields_of(cls):
        name = str(field.alias)
        properties[name] = {**_type_schema(field.type), "description": texts.get(field.name, "")}
        if field.default is not attrs.NOTHING:
            properties[name]["default"] = default_of(field)
        elif name not in required:
            required.append(name)
    result: dict[str, Any] = {"type": "object", "properties": properties, "additionalProperties": False}
    if cls.__doc__:
        result["description"] = cls.__doc__.strip().splitlines()[0]
    return {**result, "required": required} if required else result


def _type_schema(type_: Any) -> dict[str, Any]:
    if attrs.has(type_):
        return _class_schema(type_)
    if is_tuple(type_):
        return {"type": "array", "items": _type_schema(get_args(type_)[0])}
    if is_mapping(type_):
        return {"type": "object", "additionalProperties": _type_schema(get_args(type_)[1])}
    if is_union(type_):
        return {"anyOf": _member_schemas(type_)}
    if is_choice(type_):
        return {"anyOf": [{"enum": list(choices_of(type_))}, _ENV]}
    return _scalar_schema(type_)


def _member_schemas(type_: Any) -> list[dict[str, Any]]:
    several = len(kinds_of(type_)) > 1
    return [
        _class_schema(member, kind=True) if several and attrs.has(member) else _type_schema(member)
        for member in get_args(type_)
    ]


def _scalar_schema(type_: Any) -> dict[str, Any]:
    if type_ in {Any, object}:
        return {}
    if type_ is NoneType:
        return {"type": "null"}
    if type_ in _SCALARS:
        return {"anyOf": [_SCALARS[type_], _ENV]}
    return {"anyOf": [{"type": "number"}, _ENV]} if in_words(type_) == "decimal number" else {"type": "string"}
