"""Rules for the fields of a request body; a broken rule is OpenAI's 400 for it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any
from weakref import WeakKeyDictionary

from qlens.errors import InvalidRequest

Path = tuple["Path", str | int] | None
"""Where a value stands: the path of what holds it and the last step; None for the body itself. So one more step costs
no copy, which matters because a path is made for every value, and read for those alone that are refused."""
Rule = Callable[[Any, Path], None]
"""Looks at a value that stands at a path, and raises InvalidRequest when it may not stand there."""

INT64_MAX = 2**63 - 1
MAX_TOKENS = 2**31 - 1
MAX_DEPTH = 128
"""How deep a free-form value may be nested: the JSON encoder stops at 254 levels, and dialects add some."""

_NESTED = (dict, list)
_NAMES: dict[type, str] = {
    str: "a string",
    bool: "a boolean",
    int: "an integer",
    float: "a decimal number",
    list: "an array",
    dict: "an object",
    type(None): "null",
}


def written(path: Path) -> str:
    """A path as OpenAI writes it in `param`: messages[0].role."""
    steps: list[str] = []
    while path is not None:
        path, step = path
        steps.append(f"[{step}]" if isinstance(step, int) else f".{step}")
    return "".join(reversed(steps)).removeprefix(".")


def missing(path: Path) -> InvalidRequest:
    """A required field is not there."""
    param = written(path)
    return InvalidRequest(f"Missing required parameter: '{param}'.", param=param, code="missing_required_parameter")


def wrong_type(path: Path, expected: str, value: object) -> InvalidRequest:
    """A value is of another JSON type than the API takes here."""
    param, got = written(path), _NAMES.get(type(value), "something else")
    return InvalidRequest(
        f"Invalid type for '{param}': expected {expected}, but got {got} instead.", param=param, code="invalid_type"
    )


def out_of_range(path: Path, what: str, code: str, expected: str, got: object) -> InvalidRequest:
    """A value is of the right type and too small, too large, too short or too long."""
    param = written(path)
    return InvalidRequest(
        f"Invalid '{param}': {what}. Expected {expected}, but got {got} instead.", param=param, code=code
    )


def wrong_value(path: Path, value: str, allowed: Collection[str]) -> InvalidRequest:
    """A string is none of those the API knows."""
    listed = ", ".join(f"'{name}'" for name in allowed)
    shown = value if len(value) <= 64 else value[:64] + "..."
    return InvalidRequest(
        f"Invalid value: '{shown}'. Supported values are: {listed}.", param=written(path), code="invalid_value"
    )


# --- one value ---------------------------------------------------------------------------------


def flag(value: Any, path: Path) -> None:
    """A boolean."""
    if type(value) is not bool:
        raise wrong_type(path, "a boolean", value)


def text(value: Any, path: Path) -> None:
    """A string of any length."""
    if type(value) is not str:
        raise wrong_type(path, "a string", value)


def seen(value: Any, path: Path) -> None:
    """An array that was looked at already."""


_Told = tuple[type | None, float | None, float]
"""A type, and the least and the most that a value of it may be; None as the least: it may be any."""
_TOLD: WeakKeyDictionary[Rule, _Told] = WeakKeyDictionary()
"""The rules that such a value keeps: a record need not ask them. Most values of most bodies are one."""
_TOLD[text], _TOLD[flag], _TOLD[seen] = (str, None, 0), (bool, None, 0), (list, None, 0)
_UNTOLD: _Told = (None, None, 0)
_Look = tuple[type | None, float | None, float, Rule | None]
"""The same with the rule itself, for any other value; None: there is none."""


def string(*, least: int = 0, most: int | None = None) -> Rule:
    """A string with a length within bounds."""

    def rule(value: Any, path: Path) -> None:
        if type(value) is not str:
            raise wrong_type(path, "a string", value)
        if len(value) < least:
            raise out_of_range(
                path, "empty string", "empty_string", f"a string with minimum length {least}", "an empty string"
            )
        if most is not None and len(value) > most:
            expected, got = f"a string with maximum length {most}", f"a string with length {len(value)}"
            raise out_of_range(path, "string too long", "string_above_max_length", expected, got)

    return rule


def one_of(*allowed: str) -> Rule:
    """One of these strings."""

    def rule(value: Any, path: Path) -> None:
        text(value, path)
        if value not in allowed:
            raise wrong_value(path, value, allowed)

    return rule


def integer(low: int = -(2**63), high: int = INT64_MAX) -> Rule:
    """An integer within bounds; neither a boolean nor 1.0 is one."""

    def rule(value: Any, path: Path) -> None:
        if type(value) is not int:
            raise wrong_type(path, "an integer", value)
        if not low <= value <= high:
            raise _beyond(path, "integer", value, low, high)

    _TOLD[rule] = (int, low, high)
    return rule


def number(low: float, high: float) -> Rule:
    """A number within bounds."""

    def rule(value: Any, path: Path) -> None:
        if type(value) is not float and type(value) is not int:
            raise wrong_type(path, "a number", value)
        if not low <= value <= high:
            raise _beyond(path, "decimal", value, low, high)

    _TOLD[rule] = (float, low, high)
    return rule


def _beyond(path: Path, kind: str, value: float, low: float, high: float) -> InvalidRequest:
    if value < low:
        what, code, expected = f"{kind} below minimum value", f"{kind}_below_min_value", f"a value >= {low}"
    else:
        what, code, expected = f"{kind} above maximum value", f"{kind}_above_max_value", f"a value <= {high}"
    return out_of_range(path, what, code, expected, value)


# --- arrays and objects ------------------------------------------------------------------------


def array(item: Rule, *, of: str, least: int = 0, most: int | None = None) -> Rule:
    """An array whose items all keep a rule; `of` names them in the plural."""

    def rule(value: Any, path: Path) -> None:
        if type(value) is not list:
            raise wrong_type(path, f"an array of {of}", value)
        check_length(value, path, least, most)
        for index, entry in enumerate(value):
            item(entry, (path, index))

    return rule


def check_length(value: list[Any], path: Path, least: int, most: int | None) -> None:
    """Refuse an array that is too short or too long."""
    if len(value) < least:
        expected = f"an array with minimum length {least}"
        raise out_of_range(path, "empty array", "empty_array", expected, "an empty array")
    if most is not None and len(value) > most:
        expected, got = f"an array with maximum length {most}", f"an array with length {len(value)}"
        raise out_of_range(path, "array too long", "array_above_max_length", expected, got)


def record(known: Mapping[str, Rule], *, required: tuple[str, ...] = ()) -> Rule:
    """An object whose known fields keep their rules; null stands for an optional field that is absent."""
    looks: dict[str, _Look] = {name: (*_TOLD.get(check, _UNTOLD), check) for name, check in known.items()}
    unknown: _Look = (*_UNTOLD, None)

    def rule(value: Any, path: Path) -> None:
        if type(value) is not dict:
            raise wrong_type(path, "an object", value)
        for name in required:
            if name not in value:
                raise missing((path, name))
        for name, entry in value.items():
            kind, low, high, check = looks.get(name, unknown)
            # What has bounds is a number.
            if type(entry) is kind and (low is None or low <= entry <= high):  # type: ignore[operator]
                continue
            if check is None:
                if type(entry) in _NESTED:
                    anything(entry, (path, name))
            elif entry is not None or name in required:
                check(entry, (path, name))

    return rule


def tagged(tag: str, rules: Mapping[str, Rule], other: Rule | None = None) -> Rule:
    """An object whose rule depends on one of its fields; without `other`, a value that has no rule is refused."""

    def rule(value: Any, path: Path) -> None:
        if type(value) is not dict:
            raise wrong_type(path, "an object", value)
        if tag not in value:
            raise missing((path, tag))
        kind = value[tag]
        if type(kind) is not str:
            raise wrong_type((path, tag), "a string", kind)
        chosen = rules.get(kind, other)
        if chosen is None:
            raise wrong_value((path, tag), kind, rules)
        chosen(value, path)

    return rule


def table(entry: Rule) -> Rule:
    """An object with any keys, whose values all keep one rule."""

    def rule(value: Any, path: Path) -> None:
        if type(value) is not dict:
            raise wrong_type(path, "an object", value)
        for name, item in value.items():
            entry(item, (path, name))

    return rule


def anything(value: Any, path: Path) -> None:
    """Any value that is not nested too deeply to be written again."""
    level = [value] if type(value) in _NESTED else []
    depth = 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            param = written(path)
            raise InvalidRequest(
                f"Invalid '{param}': nested deeper than {MAX_DEPTH} levels.", param=param, code="invalid_value"
            )
        level = [
            child
            for node in level
            for child in (node.values() if type(node) is dict else node)
            if type(child) in _NESTED
        ]


def free_form(value: Any, path: Path) -> None:
    """An object with any content."""
    if type(value) is not dict:
        raise wrong_type(path, "an object", value)
    anything(value, path)


def either(expected: str, rules: Mapping[type, Rule]) -> Rule:
    """One of several JSON types, each with its own rule."""

    def rule(value: Any, path: Path) -> None:
        chosen = rules.get(type(value))
        if chosen is None:
            raise wrong_type(path, expected, value)
        if chosen is not text:  # of which the type says all
            chosen(value, path)

    if rules.get(str) is text:
        _TOLD[rule] = _TOLD[text]
    return rule


# --- texts and tokens --------------------------------------------------------------------------


def prompts(*, least_text: int = 0, most: int | None = None) -> Rule:
    """A text, texts, a token array or token arrays."""
    one = string(least=least_text)
    expected = "a string, an array of strings, an array of integers or an array of arrays of integers"

    def many(value: Any, path: Path) -> None:
        check_length(value, path, 1, None)
        if type(value[0]) is int:
            tokens(value, path)
            return
        check_length(value, path, 1, most)
        item = tokens if type(value[0]) is list else one
        for index, entry in enumerate(value):
            item(entry, (path, index))

    return either(expected, {str: one, list: many})


def tokens(value: Any, path: Path) -> None:
    """A token array; looked at as a whole, because it may be very long."""
    if type(value) is not list:
        raise wrong_type(path, "an array of integers", value)
    check_length(value, path, 1, None)
    if set(map(type, value)) == {int} and 0 <= min(value) <= max(value) <= MAX_TOKENS:
        return
    for index, token in enumerate(value):
        _TOKEN(token, (path, index))


_TOKEN = integer(0, MAX_TOKENS)


# --- fields that several APIs share ------------------------------------------------------------

MODEL = string(least=1, most=256)
TOKEN_LIMIT = integer(1, MAX_TOKENS)

SAMPLING: Mapping[str, Rule] = {
    "frequency_penalty": number(-2, 2),
    "logit_bias": table(number(-100, 100)),
    "max_tokens": TOKEN_LIMIT,
    "model": MODEL,
    "n": integer(1, 128),
    "presence_penalty": number(-2, 2),
    "seed": integer(),
    "stop": either("a string or an array of strings", {str: text, list: array(text, of="strings", most=4)}),
    "stream": flag,
    "stream_options": record({"include_obfuscation": flag, "include_usage": flag}),
    "temperature": number(0, 2),
    "top_p": number(0, 1),
    "user": text,
}


def check_stream_options(body: Mapping[str, Any]) -> None:
    """Refuse `stream_options` where nothing is streamed."""
    if body.get("stream_options") is not None and not body.get("stream"):
        raise InvalidRequest(
            "The 'stream_options' parameter is only allowed when 'stream' is enabled.", param="stream_options"
        )
