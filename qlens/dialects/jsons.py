"""The texts in a text that is JSON, as a tool's arguments are: as they are read, not as they are spelled."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any

from attrs import define, field

from qlens.dialects import Fixed, Ref, Strand, Within
from qlens.errors import Blocked

MOST_TEXTS = 50_000
"""How many texts and numbers are looked at in what the tools of one request or answer are called with: each goes
through every rule, while all other calls wait."""

_LITERAL = re.compile(r'"([^"\\]*(?:\\.[^"\\]*)*)"(\s*:)?|-?\d[\d.eE+-]*', re.DOTALL)
# Made once: json.loads makes one for every text that it is told how to read.
_AS_CLIENTS = json.JSONDecoder(strict=False, parse_int=float)
"""Reads JSON as clients do, who mind neither lone surrogates nor long numbers."""
_SPELLED = json.JSONDecoder(strict=False)
_MARK = re.compile(r'\\(?:.|$)|["{}\[\]]', re.DOTALL)
_TOLD_IN_JSON = frozenset(
    {
        "arguments",
        "partial_json",
        "response.function_call_arguments.delta",
        "response.mcp_call_arguments.delta",
    }
)
"""The fields, and the events, that hold JSON."""


def is_told(strand: Strand, ref: Ref) -> bool:
    """Whether what stands there is meant to be JSON."""
    return ref[-1] in _TOLD_IN_JSON or (len(strand) > 1 and strand[1] in _TOLD_IN_JSON)


def opened(found: list[tuple[Ref, str]]) -> list[tuple[Ref, str]]:
    """These texts, with those that are in arguments in the place of the JSON that they stand in; keys are Fixed."""
    all_ = []
    for ref, source in found:
        all_ += _within(ref, source) if is_told((), ref) else [(ref, source)]
        if len(all_) > MOST_TEXTS + len(found):
            raise _too_many()
    return all_


def below(node: Any, ref: Ref, found: list[tuple[Ref, str]]) -> None:
    """Add to these texts what `values` finds; raises Blocked for too many."""
    found += islice(values(node, ref), MOST_TEXTS + 1)
    if len(found) > MOST_TEXTS:
        raise _too_many()


def _too_many() -> Blocked:
    return Blocked(f"What tools are called with has more than {MOST_TEXTS} texts and numbers, too many to look at.")


def _within(ref: Ref, source: str) -> list[tuple[Ref, str]]:
    if not _is_json(source):
        return [(ref, source)]
    return [
        ((Fixed if is_key else Within)((*ref, number)), text)
        for number, (_, text, is_key) in enumerate(_literals(source))
    ]


def values(node: Any, ref: Ref) -> Iterator[tuple[Ref, str]]:
    """Every text below a node of parsed JSON, whatever it is called; numbers as texts, and the keys Fixed."""
    if type(node) is str:
        yield ref, node
    elif type(node) is dict:
        for name, child in node.items():
            yield Fixed((*ref, name)), name
            yield from values(child, (*ref, name))
    elif type(node) is list:
        for position, child in enumerate(node):
            yield from values(child, (*ref, position))
    elif type(node) is int or type(node) is float:
        yield ref, json.dumps(node)


def exchanged(source: str, texts: Mapping[int, str]) -> str:
    """This JSON with other texts for some of those in it, by their number; what was one of numbers is then a text."""
    parts, end = [], 0
    for number, (match, _, _) in enumerate(_literals(source)):
        if (text := texts.get(number)) is not None:
            # A letter that was spelled out stays so: not every one can stand for itself.
            parts += [source[end : match.start()], json.dumps(text, ensure_ascii="\\u" in match.group())]
            end = match.end() if match.group(1) is None else match.end(1) + 1
    return "".join([*parts, source[end:]])


def rewritten(source: str, fn: Callable[[str], str], key: Callable[[str], str]) -> str:
    """This JSON with every text in it sent through `fn`, and every key through `key`; what is no JSON as one text."""
    if not _is_json(source):
        return fn(source)
    changed = {}
    for number, (_, text, is_key) in enumerate(_literals(source)):
        if (new := (key if is_key else fn)(text)) != text:
            changed[number] = new
    return exchanged(source, changed) if changed else source


def _is_json(source: str) -> bool:
    if (
        len(source) > MOST_TEXTS
        and source.lstrip()[:1] in "{["
        and next(islice(_LITERAL.finditer(source), MOST_TEXTS, None), None) is not None
    ):
        raise _too_many()
    try:
        _AS_CLIENTS.decode(source)
    except (ValueError, RecursionError):
        return False
    return True


def _literals(source: str) -> Iterator[tuple[re.Match[str], str, bool]]:
    """The texts and numbers in JSON: where each stands, what it says, and whether it is a key."""
    for match in _LITERAL.finditer(source):
        spelled, colon = match.groups()
        text = match.group() if spelled is None else spelled
        if spelled is not None and "\\" in spelled:
            text = _SPELLED.decode(f'"{spelled}"')
        yield match, text, colon is not None


@define(eq=False)
class Arriving:
    """JSON that comes in pieces: nothing of it can pass before it is whole, and then all of it can."""

    fn: Callable[[str], str]
    """Rewrites the whole; may raise a CallError to refuse it."""
    size: int = field(default=0, init=False)
    """How many characters are held."""
    changed: bool = field(default=False, init=False)
    """Whether something of it was rewritten."""
    _pieces: list[str] = field(factory=list, init=False)
    _depth: int = field(default=0, init=False)
    _in_string: bool = field(default=False, init=False)
    _escape: str = field(default="", init=False)
    _hopeless: bool = field(default=False, init=False)

    def grow(self, piece: str) -> str:
        """Take a piece; return the whole, rewritten, once it is there."""
        self._pieces.append(piece)
        self.size += len(piece)
        if self._hopeless or not self._closes(piece):
            return ""
        if _is_json(source := "".join(self._pieces)):
            return self.end()
        # Looking again after every piece would take quadratic time.
        self._hopeless, self._pieces = True, [source]
        return ""

    def end(self) -> str:
        """Return what is held, rewritten."""
        source = "".join(self._pieces)
        self._pieces, self.size = [], 0
        passing = self.fn(source) if source else ""
        self.changed = self.changed or passing != source
        return passing

    def _closes(self, piece: str) -> bool:
        """Whether the brackets that were opened are all closed with this piece."""
        closed = False
        for mark in _MARK.findall(self._escape + piece):
            self._escape = ""
            if mark[0] == "\\":
                self._escape = mark if len(mark) == 1 else ""
            elif mark == '"':
                self._in_string = not self._in_string
            elif not self._in_string:
                self._depth += 1 if mark in "{[" else -1
                closed = self._depth == 0
        return closed
