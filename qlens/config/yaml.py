"""YAML files: the 1.2 core schema, the environment filled in, and nothing that surprises."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, cast

import yaml
from attrs import define, field, frozen
from yaml.parser import Parser
from yaml.reader import Reader, ReaderError
from yaml.scanner import Scanner

from qlens.config.environment import SURROGATES, MissingText, expand
from qlens.config.tree import YamlDict, YamlFloat, YamlList, child
from qlens.errors import ConfigError, Fault

MAX_BYTES = 1024 * 1024
MAX_ALIASES = 100
MAX_DEPTH = 50
MAX_VALUES = 100_000
"""How many values a file may have, each alias counted as all that it stands for."""


@frozen
class Document:
    """What a file says, as far as it could be read, and what is wrong with it."""

    root: Any
    faults: tuple[Fault, ...]


def load(text: str, *, source: str, env: Mapping[str, str], check_env: bool = True) -> Document:
    """Read one YAML document.

    Raises ConfigError where nothing can be read: broken syntax, an empty file, one that is too large. A variable
    without a value leaves a MissingText, which is a fault unless `check_env` is False.
    """
    if len(text.encode(errors="replace")) > MAX_BYTES:
        raise ConfigError([Fault(source, f"the file is too large: at most {MAX_BYTES} bytes are read")])
    builder = _Builder(source, env, check_env)
    root = builder.document(_events(text, source))
    return Document(root, tuple(builder.faults))


# --- syntax ------------------------------------------------------------------------------------


class _Events(Reader, Scanner, Parser):
    """PyYAML from text to events; the layers behind that are YAML 1.1 and would build Python objects."""

    def __init__(self, text: str) -> None:
        Reader.__init__(self, text)
        Scanner.__init__(self)
        Parser.__init__(self)


# JSON may hold a raw DEL. YAML 1.1 folds NEL, LS and PS as line ends, where 1.2 has them as text: refuse them.
_FORBIDDEN = "[^\t\n\r\x20-\x7f\xa0-\u2027\u202a-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]"
setattr(_Events, "NON_PRINTABLE", re.compile(_FORBIDDEN))  # noqa: B010


def _events(text: str, source: str) -> Iterator[yaml.Event]:
    parser: Any = None
    try:
        parser = _Events(text)
        while parser.check_event():
            yield parser.get_event()
    except ReaderError as error:
        raise ConfigError([_character_fault(error.position, text, source)]) from None
    except yaml.MarkedYAMLError as error:
        raise ConfigError([_syntax_fault(error, text, source)]) from None
    except (ValueError, OverflowError):
        # PyYAML lets some of its own conversions fail: an escape beyond Unicode, a version of a thousand digits.
        line = parser.get_mark().line + 1
        raise ConfigError([Fault(f"{source}:{line}", "not valid YAML: an escape or number is out of range")]) from None


def _character_fault(position: int, text: str, source: str) -> Fault:
    line, column = text.count("\n", 0, position) + 1, position - text.rfind("\n", 0, position)
    name = f"U+{ord(text[position]):04X}"
    return Fault(
        f"{source}:{line}:{column}", f"not valid YAML: the character {name} is not allowed; write it as an escape"
    )


def _syntax_fault(error: yaml.MarkedYAMLError, text: str, source: str) -> Fault:
    message = ", ".join(part for part in (error.context, error.problem) if part)
    mark = error.problem_mark or error.context_mark
    assert mark is not None, "the scanner and the parser always say where"
    lines = text.splitlines()
    if mark.line < len(lines) and "${" in lines[mark.line]:
        message += '; inside {} and [], quote the environment: "${NAME}"'
    return Fault(f"{source}:{mark.line + 1}:{mark.column + 1}", f"not valid YAML: {message}")


# --- the core schema ---------------------------------------------------------------------------

_WORDS: Mapping[str, bool | None] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
# Unlike in the core schema a leading zero makes text: 012 is ten to one reader and twelve to the next.
_INT = re.compile(r"[-+]?(?:0|[1-9][0-9]*)|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(?:(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+)")
_SPECIAL = re.compile(r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)")


def scalar(text: str) -> Any:
    """What an unquoted text means; raises ValueError for a number out of range."""
    if text in _WORDS:
        return _WORDS[text]
    if _INT.fullmatch(text):
        return _integer(text)
    if _FLOAT.fullmatch(text):
        number = YamlFloat(text)
        if math.isinf(number):
            raise ValueError("the number is too large; put it in quotes if it is a text")
        return number
    return YamlFloat(text) if _SPECIAL.fullmatch(text) else text


def _integer(text: str) -> int:
    # By length first: Python refuses to convert thousands of digits.
    number = int(text, 0) if len(text) <= 100 else 2**64
    if not -(2**63) <= number < 2**63:
        raise ValueError("the number does not fit in 64 bits; put it in quotes if it is a text")
    return number


# --- values ------------------------------------------------------------------------------------


@define
class _Builder:
    """Turns events into values and gathers faults; goes on after all that leave the rest readable."""

    source: str
    env: Mapping[str, str]
    check_env: bool
    faults: list[Fault] = field(factory=list, init=False)
    _anchors: dict[str, tuple[Any, int]] = field(factory=dict, init=False)
    """Complete values by anchor, each with its size: nothing can contain itself."""
    _aliases: int = field(default=0, init=False)
    _count: int = field(default=0, init=False)
    """Values so far, aliases expanded."""

    def document(self, events: Iterator[yaml.Event]) -> Any:
        found, root = False, None
        for event in events:
            if isinstance(event, yaml.NodeEvent):
                root = self._value(event, events, "", 0)
            elif isinstance(event, yaml.DocumentStartEvent) and found:
                raise self._stop(event, "a second document starts here; a file holds one")
            found = found or isinstance(event, yaml.DocumentStartEvent)
        if not found:
            raise ConfigError([Fault(self.source, "the file is empty")])
        return root

    def _value(self, event: yaml.Event, events: Iterator[yaml.Event], path: str, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise self._stop(event, f"nested too deep: at most {MAX_DEPTH} levels")
        if isinstance(event, yaml.AliasEvent):
            return self._alias(event)
        before = self._count
        self._grow(event, 1)
        if tag := getattr(event, "tag", None):
            self._fault(event, path, f"the tag {tag} is not allowed; remove it")
        value = self._untagged(event, events, path, depth)
        if anchor := getattr(event, "anchor", None):
            self._anchors[anchor] = value, self._count - before
        return value

    def _untagged(self, event: yaml.Event, events: Iterator[yaml.Event], path: str, depth: int) -> Any:
        if isinstance(event, yaml.MappingStartEvent):
            return self._mapping(event, events, path, depth)
        if isinstance(event, yaml.SequenceStartEvent):
            return self._sequence(event, events, path, depth)
        return self._scalar(cast(yaml.ScalarEvent, event), path)

    def _alias(self, event: yaml.AliasEvent) -> Any:
        self._aliases += 1
        if self._aliases > MAX_ALIASES:
            raise self._stop(event, f"too many aliases: at most {MAX_ALIASES}")
        if event.anchor not in self._anchors:
            raise self._stop(event, f"the alias *{event.anchor} has no complete value with the anchor &{event.anchor}")
        value, size = self._anchors[event.anchor]
        self._grow(event, size)
        return value

    def _grow(self, event: yaml.Event, size: int) -> None:
        self._count += size
        if self._count > MAX_VALUES:
            raise self._stop(event, f"too many values: at most {MAX_VALUES}, with aliases expanded")

    def _mapping(self, start: yaml.Event, events: Iterator[yaml.Event], path: str, depth: int) -> YamlDict:
        mapping = YamlDict(self.source, _line(start))
        while not isinstance(event := next(events), yaml.MappingEndEvent):
            key = self._key(event, events, path, depth)
            value = self._value(next(events), events, child(path, key), depth + 1)
            if key in mapping:
                self._fault(event, child(path, key), f"duplicate key; it is on line {mapping.lines[key]} already")
                continue
            mapping[key] = value
            mapping.lines[key] = _line(event)
        return mapping

    def _key(self, event: yaml.Event, events: Iterator[yaml.Event], path: str, depth: int) -> str:
        """The text of a key, never expanded; what is no text is a fault, and goes on as what it looks like."""
        if not isinstance(event, yaml.ScalarEvent) or event.tag is not None:
            self._value(event, events, path, depth + 1)
            self._fault(event, path, "a key must be a plain text")
            return "?"
        if not event.style and not isinstance(_or_none(event.value), str):
            self._fault(event, path, f"the key {event.value or 'null'} is not a text; put it in quotes")
        return self._text(event, path)

    def _sequence(self, start: yaml.Event, events: Iterator[yaml.Event], path: str, depth: int) -> YamlList:
        sequence = YamlList(self.source, _line(start))
        while not isinstance(event := next(events), yaml.SequenceEndEvent):
            sequence.lines[len(sequence)] = _line(event)
            sequence.append(self._value(event, events, child(path, len(sequence)), depth + 1))
        return sequence

    def _scalar(self, event: yaml.ScalarEvent, path: str) -> Any:
        if event.style:
            return self._expanded(event, self._text(event, path), path)
        try:
            value = scalar(event.value)
        except ValueError as error:
            self._fault(event, path, str(error))
            return MissingText(event.value, ())
        return self._expanded(event, value, path) if isinstance(value, str) else value

    def _text(self, event: yaml.ScalarEvent, path: str) -> str:
        text: str = event.value
        if not SURROGATES.search(text):
            return text
        # JSON escapes a character beyond 16 bits as two halves; PyYAML leaves them apart.
        try:
            return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le")
        except UnicodeDecodeError:
            self._fault(event, path, r"half of an escaped character (\ud800 to \udfff) is missing")
            return SURROGATES.sub("?", text)

    def _expanded(self, event: yaml.Event, text: str, path: str) -> str:
        expanded = expand(text, self.env)
        unset = expanded.missing if self.check_env else ()
        for problem in (*expanded.problems, *(f"the environment variable {name} is not set" for name in unset)):
            self._fault(event, path, problem)
        return expanded.text

    def _fault(self, event: yaml.Event, path: str, message: str) -> None:
        self.faults.append(Fault(f"{self.source}:{_line(event)} {path}".rstrip(), message))

    def _stop(self, event: yaml.Event, message: str) -> ConfigError:
        return ConfigError([*self.faults, Fault(f"{self.source}:{_line(event)}", message)])


def _line(event: yaml.Event) -> int:
    return cast(int, cast(Any, event.start_mark).line) + 1


def _or_none(text: str) -> Any:
    try:
        return scalar(text)
    except ValueError:
        return None
