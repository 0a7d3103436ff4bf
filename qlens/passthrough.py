"""Which requests pass through to a provider as they are: none but those that its configuration lists."""

from __future__ import annotations

import re
from collections.abc import Iterable
from urllib.parse import quote

METHODS = ("DELETE", "GET", "PATCH", "POST", "PUT")

_SEGMENT = re.compile(r"[A-Za-z0-9._~:@!$&'()+,;=-]+|\*{1,2}")
_SAFE = "!$&'()+,;=:@"


def path_patterns(_config: object, _attribute: object, value: Iterable[str]) -> None:
    """Check, as an attrs validator, that these are patterns of requests: `GET /models/*`."""
    for pattern in value:
        method, _, path = pattern.partition(" ")
        if method not in METHODS:
            raise ValueError(f"{pattern!r} must begin with one of {', '.join(METHODS)}, as in 'GET /models/*'")
        segments = path.removeprefix("/").split("/")
        if not path.startswith("/") or not all(_SEGMENT.fullmatch(segment) for segment in segments):
            raise ValueError(f"{pattern!r} must name a path: 'GET /models'; * stands for one segment, ** for the rest")
        if "**" in segments[:-1] or {".", ".."} & {*segments}:
            raise ValueError(f"{pattern!r} may have ** only at its end, and no . or ..")


def matching(patterns: Iterable[str], method: str, path: str) -> str | None:
    """The first pattern that a request keeps to; None: it may not pass. `path` is unescaped and without its slash."""
    given = path.split("/")
    if any(segment in {"", ".", ".."} or not segment.isprintable() or "\\" in segment for segment in given):
        return None
    for pattern in patterns:
        allowed, _, places = pattern.partition(" ")
        if allowed == method and _fits(places.removeprefix("/").split("/"), given):
            return pattern
    return None


def _fits(pattern: list[str], given: list[str]) -> bool:
    if pattern[-1] == "**":
        pattern = pattern[:-1]
        given = given[: len(pattern)] if len(given) > len(pattern) else []
    return len(pattern) == len(given) and all(
        wanted in {"*", segment} for wanted, segment in zip(pattern, given, strict=True)
    )


def escaped(path: str) -> str:
    """The path as it stands in a URL: what a segment holds cannot become another path."""
    return "/" + "/".join(quote(segment, safe=_SAFE) for segment in path.split("/"))
