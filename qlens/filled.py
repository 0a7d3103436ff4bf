"""Frozen objects that every call makes and reads many times, made the short way."""

from __future__ import annotations

from typing import Any, TypeVar

from attrs import NOTHING, AttrsInstance, Factory, fields

Made = TypeVar("Made", bound=AttrsInstance)


def filled(cls: type[Made]) -> type[Made]:
    """Let a class of `frozen(slots=False)` be made by one dict that is put in its place whole.

    attrs fills the dict that an object has, field by field: two thirds more steps, and Python then takes twice as long
    to read each field, because it has no short way to a dict that shares its keys. To fill frozen slots takes still
    longer. There are neither validators nor converters here.
    """
    names: dict[str, Any] = {"put": object.__setattr__}
    given, held = [], []
    for each in fields(cls):
        given.append(each.alias if each.default is NOTHING else f"{each.alias}=default_{each.name}")
        held.append(f"{each.name!r}: {each.alias}")
        names[f"default_{each.name}"] = each.default
        if isinstance(each.default, Factory):  # type: ignore[arg-type]
            names[f"make_{each.name}"] = each.default.factory
            held[-1] = f"{each.name!r}: make_{each.name}() if {each.alias} is default_{each.name} else {each.alias}"
    source = f"def __init__(self, {', '.join(given)}):\n    put(self, '__dict__', {{{', '.join(held)}}})\n"
    code = compile(source, f"<attrs generated, filled {cls.__module__}.{cls.__qualname__}>", "exec")
    exec(code, names)  # noqa: S102 - as attrs itself does
    names["__init__"].__qualname__ = f"{cls.__qualname__}.__init__"
    cls.__init__ = names["__init__"]  # type: ignore[method-assign]
    return cls
