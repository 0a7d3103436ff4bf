"""The scalar types of settings: each takes a value that is of its kind already, or a text of the environment."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from decimal import Decimal
from types import NoneType
from typing import Any, NoReturn
from urllib.parse import urlsplit

from qlens.config.environment import EnvText, MissingText
from qlens.config.tree import YamlFloat
from qlens.config.yaml import scalar


class Mismatch(ValueError):
    """A value that does not fit; the message says what was found and what is expected."""


class Secret:
    """A text that is never printed; compared by value, and only `reveal` gives it away."""

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def reveal(self) -> str:
        """The text itself."""
        return self._text

    def __repr__(self) -> str:
        return "***"

    def __format__(self, spec: str) -> str:
        return format("***", spec)

    def __eq__(self, other: object) -> bool:
        return self._text == other._text if isinstance(other, Secret) else NotImplemented

    def __hash__(self) -> int:
        return hash((Secret, self._text))

    def __copy__(self) -> Secret:
        return self

    def __deepcopy__(self, memo: object) -> Secret:
        return self

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("a Secret cannot be pickled")


class Url(str):
    """A URL; its repr hides a password. A relative `sqlite:///x.db` of the file has become absolute."""

    __slots__ = ()

    def __repr__(self) -> str:
        return repr(_without_password(self))


# --- reading -----------------------------------------------------------------------------------
# A MissingText passes every reader as it is: it may be right once its variable is set.


def _typed(value: Any) -> Any:
    """What a text of the environment means where no text is wanted; other values are left alone."""
    if not isinstance(value, EnvText) or isinstance(value, MissingText):
        return value
    try:
        return scalar(value)
    except ValueError:
        return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _boolean(value: Any) -> Any:
    typed = _typed(value)
    if isinstance(typed, bool | MissingText):
        return typed
    raise Mismatch(f"found {found(value)}, expected true or false")


def _whole(value: Any) -> Any:
    typed = _typed(value)
    if isinstance(typed, MissingText) or (isinstance(typed, int) and not isinstance(typed, bool)):
        return typed
    raise Mismatch(f"found {found(value)}, expected a whole number")


def _number(value: Any) -> Any:
    typed = _typed(value)
    if isinstance(typed, MissingText):
        return typed
    # The comparison refuses .inf and .nan as well.
    if _is_number(typed) and abs(typed) < 1e300:
        return float(typed)
    raise Mismatch(f"found {found(value)}, expected a number")


def _decimal(value: Any) -> Any:
    typed = _typed(value)
    if isinstance(typed, MissingText):
        return typed
    if not _is_number(typed):
        raise Mismatch(f"found {found(value)}, expected a decimal number")
    # Bounded, so that exact arithmetic stays cheap: 1e-999999 is a decimal number too.
    written = typed.text if isinstance(typed, YamlFloat) else repr(typed)
    if abs(typed) < 1e18 and len(written) <= 40 and abs(Decimal(written).adjusted()) <= 30:
        return Decimal(written)
    raise Mismatch(f"found {found(value)}, expected a decimal number between 1e-30 and 1e18")


def text(value: Any) -> str:
    """Read a text."""
    if isinstance(value, str):
        return value if isinstance(value, MissingText) else str(value)
    hint = "" if isinstance(value, dict | list | NoneType) else " (put it in quotes)"
    raise Mismatch(f"found {found(value)}, expected a text{hint}")


def _secret(value: Any) -> Secret:
    if not isinstance(value, str):
        sort = "a number" if _is_number(value) else found(value)
        raise Mismatch(f"found {sort}, expected a text (put it in quotes)")
    if not value:
        raise Mismatch("found an empty text, expected a secret")
    return Secret(str(value))


def url(value: Any) -> str:
    """Read a URL, as it is written."""
    written = text(value)
    if isinstance(value, MissingText) or _is_url(written):
        return written
    # Nobody can tell where a user and password begin in it: nothing up to the last @ is shown.
    shown = value if isinstance(value, EnvText) else re.sub("^.*@", "***@", written, flags=re.S)
    raise Mismatch(f"found {found(shown)}, expected a URL such as https://example.com")


def _is_url(written: str) -> bool:
    try:
        parts = urlsplit(written)
        web = parts.scheme in {"http", "https"}
        # Elsewhere there may be no host (sqlite), or several with ports (postgresql).
        complete = bool(parts.hostname) and parts.port != 0 if web else bool(parts.scheme)
    except ValueError:
        return False
    return complete and "://" in written and written.isprintable() and " " not in written


def _nothing(value: Any) -> None:
    if value is not None:
        raise Mismatch(f"found {found(value)}, expected nothing")


def choice(value: Any, choices: Mapping[Any, Any]) -> Any:
    """Read one of a few values; gives back what stands behind it."""
    if isinstance(value, MissingText):
        return value
    for candidate in (plain(value), plain(_typed(value))):
        for name, result in choices.items():
            # 1 equals True and 1.0: compare the types too.
            if type(candidate) is type(name) and candidate == name:
                return result
    raise Mismatch(f"found {found(value)}, expected one of: {', '.join(map(str, choices))}")


READERS: Mapping[Any, Callable[[Any], Any]] = {
    bool: _boolean,
    int: _whole,
    float: _number,
    Decimal: _decimal,
    str: text,
    Secret: _secret,
    NoneType: _nothing,
}
"""How a value of each type is read."""


def plain(value: Any) -> Any:
    """A copy in Python's own types, for fields that take anything."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, str):
        return str(value)
    return float(value) if isinstance(value, float) else value


# --- showing -----------------------------------------------------------------------------------


def found(value: Any) -> str:
    """A value as faults show it: short, without passwords, and nothing that came from the environment."""
    if isinstance(value, EnvText):
        return repr(value)
    if isinstance(value, YamlFloat):
        return value.text
    if isinstance(value, str):
        return f"the text {quoted(value)}"
    if isinstance(value, bool | int | float):
        return json.dumps(value) if abs(value) < 1e300 else "a number out of range"
    if isinstance(value, dict):
        return "a mapping"
    return "a list" if isinstance(value, list) else "nothing"


def quoted(value: str) -> str:
    """A text in quotes, shortened."""
    shown = _without_password(value)
    return json.dumps(shown if len(shown) <= 60 else f"{shown[:57]}...", ensure_ascii=False)


def _without_password(value: str) -> str:
    return re.sub(r"://.*@", "://***@", value, flags=re.S)
