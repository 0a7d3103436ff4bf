"""What a YAML file is read into: plain values that know where they stand."""

from __future__ import annotations

import json
import re
from typing import Any

from attrs import frozen


class YamlFloat(float):
    """A number with a point or an exponent; keeps the text it was written as, for exact decimals."""

    text: str

    def __new__(cls, text: str) -> YamlFloat:
        # Python writes inf and nan without YAML's point.
        self = super().__new__(cls, text.replace(".", "") if text[-1].isalpha() else text)
        self.text = text
        return self


class YamlDict(dict[str, Any]):
    """A mapping that knows its file, its line and the line of each key."""

    def __init__(self, source: str, line: int) -> None:
        super().__init__()
        self.source = source
        self.line = line
        self.lines: dict[str | int, int] = {}

    def without(self, *keys: str) -> YamlDict:
        """A copy without some keys."""
        copy = YamlDict(self.source, self.line)
        copy.update((key, value) for key, value in self.items() if key not in keys)
        copy.lines = self.lines
        return copy


class YamlList(list[Any]):
    """A list that knows its file, its line and the line of each item."""

    def __init__(self, source: str, line: int) -> None:
        super().__init__()
        self.source = source
        self.line = line
        self.lines: dict[str | int, int] = {}


@frozen
class Place:
    """A value and where it stands; as text `qlens.yaml:12 models.gpt-4o.targets[0]`."""

    value: Any
    path: str
    line: str = ""
    """File and line, where they are known."""

    @classmethod
    def of(cls, value: Any, path: str) -> Place:
        """The place of a value; `path` may bring file and line along, or else they are the value's own."""
        if not isinstance(value, YamlDict | YamlList):
            return cls(value, path)
        if given := re.match(rf"{re.escape(value.source)}:\d+(?: |$)", path):
            return cls(value, path[given.end() :], given.group().rstrip())
        return cls(value, path, f"{value.source}:{value.line}")

    def step(self, step: str | int) -> Place:
        """One step down; the value there is None where there is none."""
        value = self.value
        inner = value.get(step) if isinstance(value, dict) else _item(value, step)
        if isinstance(value, YamlDict | YamlList) and step in value.lines:
            return Place(inner, child(self.path, step), f"{value.source}:{value.lines[step]}")
        return Place(inner, child(self.path, step), self.line)

    def __str__(self) -> str:
        return f"{self.line} {self.path}".strip()


def _item(value: Any, step: str | int) -> Any:
    return value[step] if isinstance(value, list) and isinstance(step, int) and step < len(value) else None


_BARE = re.compile(r"[^\s\[\]\"']+")


def child(path: str, step: str | int) -> str:
    """The path of a value inside another: `a.b`, `a[0]`, `a."strange key"`."""
    if isinstance(step, int):
        return f"{path}[{step}]"
    name = step if _BARE.fullmatch(step) and step.isprintable() else json.dumps(step)
    return f"{path}.{name}" if path else name
