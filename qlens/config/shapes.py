"""The types that fields of config classes may have, and what the classes say about them."""

from __future__ import annotations

import ast
import enum
import inspect
import sys
from collections.abc import Mapping
from decimal import Decimal
from itertools import pairwise
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import attrs

from qlens.config.scalars import Secret, Url


def fields_of(cls: Any) -> tuple[attrs.Attribute[Any], ...]:
    """The fields a file may set, with their types resolved."""
    return tuple(field for field in attrs.fields(attrs.resolve_types(cls)) if field.init)


def is_union(type_: Any) -> bool:
    """Whether it is a union; `X | None` is one."""
    return get_origin(type_) in {Union, UnionType}


def is_tuple(type_: Any) -> bool:
    """Whether it is a `tuple[X, ...]`."""
    return get_origin(type_) is tuple and get_args(type_)[1:] == (...,)


def is_mapping(type_: Any) -> bool:
    """Whether it is a `Mapping[str, X]`."""
    return get_origin(type_) in {Mapping, dict} and get_args(type_)[0] is str


def is_choice(type_: Any) -> bool:
    """Whether it is a Literal or an enum."""
    return get_origin(type_) is Literal or (isinstance(type_, type) and issubclass(type_, enum.Enum))


def choices_of(type_: Any) -> dict[Any, Any]:
    """The values a Literal or an enum may have in a file, and what they stand for."""
    if get_origin(type_) is Literal:
        return {name: name for name in get_args(type_)}
    return {member.value: member for member in type_}


def shape_of(value: Any) -> str:
    """Which members of a union a value may belong to."""
    if value is None:
        return "null"
    return "mapping" if isinstance(value, dict) else "list" if isinstance(value, list) else "scalar"


def shape_of_type(type_: Any) -> str:
    """Which values a member of a union takes."""
    if type_ is NoneType:
        return "null"
    if attrs.has(type_) or is_mapping(type_):
        return "mapping"
    return "list" if is_tuple(type_) else "scalar"


def kinds_of(type_: Any) -> dict[str, Any]:
    """The classes of a union by the choices of their field `kind`; empty where there are no two classes."""
    classes = [one for one in get_args(type_) if attrs.has(one)] if is_union(type_) else []
    if len(classes) < 2:
        return {}
    kinds = {}
    for cls in classes:
        field = next((field for field in fields_of(cls) if field.name == "kind"), None)
        kinds.update(dict.fromkeys(get_args(field.type) if field else (), cls))
    return kinds


_NOUNS: Mapping[Any, str] = {
    bool: "true or false",
    int: "whole number",
    float: "number",
    Decimal: "decimal number",
    str: "text",
    Secret: "secret text",
    Path: "path",
    Url: "URL",
    NoneType: "nothing",
    Any: "anything",
    object: "anything",
}


def in_words(type_: Any) -> str:
    """A type as a reader of YAML would call it."""
    if type_ in _NOUNS:
        return _NOUNS[type_]
    if is_choice(type_):
        return " or ".join(f"`{choice}`" for choice in choices_of(type_))
    if is_union(type_):
        return " or ".join(dict.fromkeys(map(in_words, get_args(type_))))
    if is_tuple(type_):
        return f"list of {in_words(get_args(type_)[0])}"
    return f"mapping of {in_words(get_args(type_)[1])}" if is_mapping(type_) else "mapping"


# --- documentation -----------------------------------------------------------------------------


def docstrings(cls: type) -> dict[str, str]:
    """The docstring below each field of a class, read from its source; inherited fields included."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if attrs.has(base):
            body = _class_node(base).body
            for node, after in pairwise(body):
                if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and (text := _text(after)):
                    found[node.target.id] = text
    return found


def _class_node(cls: type) -> ast.ClassDef:
    node: Any = ast.parse(inspect.getsource(sys.modules[cls.__module__]))
    for name in cls.__qualname__.split("."):
        node = next(inner for inner in node.body if isinstance(inner, ast.ClassDef) and inner.name == name)
    assert isinstance(node, ast.ClassDef)
    return node


def _text(node: ast.stmt) -> str | None:
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
        return " ".join(node.value.value.split())
    return None


def default_of(field: attrs.Attribute[Any]) -> Any:
    """A field's default as JSON would have it; of an instance only what tells it from its own defaults."""
    default: Any = field.default
    return _plain(default.factory() if isinstance(default, attrs.Factory) else default)  # type: ignore[arg-type]


def _plain(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.value
    if attrs.has(type(value)):
        pairs = {str(field.alias): (field, _plain(getattr(value, field.name))) for field in fields_of(type(value))}
        return {
            name: item
            for name, (field, item) in pairs.items()
            if name == "kind" or field.default is attrs.NOTHING or item != default_of(field)
        }
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, float | Decimal):
        number = float(value)
        return int(number) if number.is_integer() else number
    return value if isinstance(value, bool | int | str | NoneType) else str(value)
