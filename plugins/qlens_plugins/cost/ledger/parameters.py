"""Reads the parameters of a question about usage, strictly: what is not known or not right is refused by its name."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from qlens import Call, InvalidRequest
from qlens_plugins.cost.ledger.sums import LAST_SECOND, TAG

MOST_VALUES = 100
MOST_DIMENSIONS = 8
MOST_CHARACTERS = 512

Reader = Callable[[str, Sequence[str]], Any]
"""Makes a setting of the name of a parameter and all that was said for it; raises InvalidRequest."""

NONE: Mapping[str, Reader] = {}


def asked(call: Call, ones: Mapping[str, Reader], lists: Mapping[str, Reader] = NONE) -> dict[str, Any]:
    """The parameters of a query; a list may be said as `a[]=1&a[]=2` or as `a=1&a=2`."""
    readers = {**ones, **lists}
    given: dict[str, list[str]] = {}
    for written, value in call.query.items():
        name = written.removesuffix("[]")
        if name not in readers or (name != written and name not in lists):
            known = ", ".join(readers)
            shown = written if written.isprintable() and len(written) <= 64 else "?"
            raise InvalidRequest(f"Unknown parameter `{shown}`; known: {known}.", param=shown, code="unknown_parameter")
        given.setdefault(name, []).append(value)
    return {name: readers[name](name, values) for name, values in given.items()}


def wrong(name: str, message: str) -> InvalidRequest:
    """The answer to a value that is not what its parameter takes."""
    return InvalidRequest(f"`{name}` {message}.", param=name, code="invalid_value")


def required(found: Mapping[str, Any], name: str) -> Any:
    """A parameter that must be there."""
    if name not in found:
        raise InvalidRequest(f"The parameter `{name}` is missing.", param=name, code="missing_required_parameter")
    return found[name]


def _one(name: str, values: Sequence[str]) -> str:
    if len(values) != 1:
        raise wrong(name, "may be said once")
    return values[0]


def number(least: int, most: int) -> Reader:
    """A whole number between two others."""

    def read(name: str, values: Sequence[str]) -> int:
        said = _one(name, values)
        if not said.isascii() or not said.isdigit() or len(said) > 16 or not least <= int(said) <= most:
            raise wrong(name, f"must be a whole number from {least} to {most}")
        return int(said)

    return read


time = number(0, LAST_SECOND)
"""A time in Unix seconds."""


def one_of(choices: Collection[str]) -> Reader:
    """One of some words."""

    def read(name: str, values: Sequence[str]) -> str:
        said = _one(name, values)
        if said not in choices:
            raise wrong(name, f"must be one of {', '.join(choices)}")
        return said

    return read


def yes_or_no(name: str, values: Sequence[str]) -> bool:
    """A boolean."""
    return bool(one_of(("true", "false"))(name, values) == "true")


def text(name: str, values: Sequence[str]) -> str:
    """A short text of printable characters."""
    said = _one(name, values)
    if not said or not said.isprintable() or len(said) > MOST_CHARACTERS:
        raise wrong(name, f"must be a text of 1 to {MOST_CHARACTERS} printable characters")
    return said


def texts(name: str, values: Sequence[str]) -> tuple[str, ...]:
    """Several short texts, each once."""
    if len(values) > MOST_VALUES:
        raise wrong(name, f"may have {MOST_VALUES} values at most")
    return tuple(dict.fromkeys(text(name, (value,)) for value in values))


def _is_tag(value: str) -> bool:
    """Whether it is `tag:` with a name that a tag may have."""
    name = value.removeprefix(TAG)
    return value.startswith(TAG) and name != "" and name.isprintable()


def some_of(choices: Collection[str], *, tags: bool = False) -> Reader:
    """Several of some words, each once; with tags, also `tag:` with the name of one."""

    def read(name: str, values: Sequence[str]) -> tuple[str, ...]:
        for value in values[:MOST_VALUES]:
            if value not in choices and not (tags and _is_tag(value)):
                known = ", ".join((*choices, f"{TAG}NAME") if tags else choices)
                raise wrong(name, f"may be any of {known}")
        found = tuple(dict.fromkeys(values))
        if len(found) > MOST_DIMENSIONS:
            raise wrong(name, f"may have {MOST_DIMENSIONS} values at most")
        return found

    return read
