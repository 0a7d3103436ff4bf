"""`${NAME}` in texts: filled in once, marked as foreign, never printed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from attrs import frozen

SURROGATES = re.compile("[\ud800-\udfff]")
"""Halves of characters: from bytes that are no UTF-8, or from a broken escape."""


class EnvText(str):
    """A text that holds values of environment variables; its repr shows their names only."""

    names: tuple[str, ...]
    """The variables it was made from."""

    def __new__(cls, text: str, names: Iterable[str]) -> EnvText:
        self = super().__new__(cls, text)
        self.names = tuple(dict.fromkeys(names))
        return self

    def __repr__(self) -> str:
        return f"a value from {' and '.join(f'${{{name}}}' for name in self.names) or 'the environment'}"


class MissingText(EnvText):
    """A text as written, because something in it has no value: nothing can be said about its type."""


@frozen
class Expanded:
    """A text after its variables were filled in, and what was wrong."""

    text: str
    problems: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    """Variables without a value."""


_REFERENCE = re.compile(r"\$\$\{|\$\{(?:([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\})?")
_MALFORMED = "expected ${NAME} or ${NAME:-default} without another ${ inside; a plain ${ is written as $${"


def expand(text: str, env: Mapping[str, str]) -> Expanded:
    """Fill in `${NAME}`, and `${NAME:-default}` where the variable is unset or empty; `$${` is a plain `${`.

    What comes from the environment is not expanded again. With a problem or a missing variable, the text stays
    as written and is a MissingText.
    """
    parts, names, missing, problems = [], [], [], []
    end = 0
    for match in _REFERENCE.finditer(text):
        parts.append(text[end : match.start()])
        end = match.end()
        name, default = match.groups()
        if match.group() == "$${":
            parts.append("${")
        elif name is None or "${" in (default or ""):
            problems.append(_MALFORMED)
        elif SURROGATES.search(env.get(name, "")):
            problems.append(f"the environment variable {name} is not valid UTF-8")
        elif name not in env and default is None:
            missing.append(name)
        else:
            names.append(name)
            parts.append(env.get(name, "") if default is None else env.get(name) or default)
    parts.append(text[end:])
    if problems or missing:
        return Expanded(MissingText(text, missing), tuple(problems), tuple(dict.fromkeys(missing)))
    filled = "".join(parts)
    return Expanded(EnvText(filled, names) if names else filled)
