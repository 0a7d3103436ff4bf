"""What is written of errors that nobody expected: where they come from, and never what they or their values say."""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
import traceback
from collections.abc import Mapping
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlsplit

import attrs

from qlens.config.scalars import Secret
from qlens.errors import CallError, StartupError, frames

log = logging.getLogger("qlens")

_LEAST_CHARS = 4
"""A secret that is shorter is in every other text, and is none."""


class Lines(logging.Formatter):
    """Writes log lines, and of errors all but their texts: these may hold a prompt, a key, or a row of a table."""

    def formatException(self, ei: Any) -> str:
        """A traceback without texts."""
        return told(ei[1])


def told(error: BaseException | None) -> str:
    """A traceback with those of its causes; only errors of this gateway and of the system say what they are."""
    parts: list[str] = []
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        where = "".join(traceback.format_tb(error.__traceback__))
        parts.append(f"Traceback (most recent call last):\n{where}{type(error).__name__}{_said(error)}")
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return "\n\nwhich came of\n\n".join(parts)


def _said(error: BaseException) -> str:
    if isinstance(error, CallError | StartupError):
        return f": {error}"
    return f": {error.strerror}" if isinstance(error, OSError) and error.strerror else ""


def guard_output() -> None:
    """Let nothing that this process writes of an error say more than `told`."""

    def excepthook(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
        sys.stderr.write(told(error) + "\n")

    def of_thread(what: threading.ExceptHookArgs) -> None:
        if what.exc_type is not SystemExit:
            log.error("a thread failed: %s", told(what.exc_value))

    def unraisable(what: sys.UnraisableHookArgs) -> None:
        log.error("an error that nobody could be told of: %s", told(what.exc_value))

    sys.excepthook, threading.excepthook, sys.unraisablehook = excepthook, of_thread, unraisable
    if logging.lastResort is not None:  # what is logged by a command, which sets up no log
        logging.lastResort.setFormatter(Lines("%(message)s"))


def guard_loop() -> None:
    """The same for tasks of the running loop whose errors nobody looked at."""
    asyncio.get_running_loop().set_exception_handler(_unhandled)


def _unhandled(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    error, task = context.get("exception"), context.get("task") or context.get("future")
    name = f" ({task.get_name()})" if isinstance(task, asyncio.Task) else ""
    log.error("%s%s: %s", context["message"], name, "" if error is None else frames(error))


def _passwords(url: str) -> set[str]:
    """The password in a URL, as it is written and as it is meant, and those in its query."""
    try:
        parts = urlsplit(url)
        written = {parts.password or ""}
    except ValueError:
        return set()
    if not parts.scheme or "://" not in url:
        return set()
    for name, _, value in (each.partition("=") for each in parts.query.split("&")):
        if name.lower().endswith(("password", "token", "secret", "api_key")):
            written.add(value)
    return {form for each in written for form in (each, unquote(each)) if form}


def censored(text: str, config: object) -> str:
    """A text without the secrets of a plugin's settings, passwords in URLs among them.

    For what a plugin says of itself when it cannot start.
    """
    for secret in sorted(_secrets(config), key=len, reverse=True):
        if len(secret) >= _LEAST_CHARS:
            text = text.replace(secret, str(Secret(secret)))
    return text


def _secrets(value: Any) -> set[str]:
    if isinstance(value, Secret):
        return {value.reveal()}
    if isinstance(value, str):
        return _passwords(value)
    if isinstance(value, Mapping):
        return set().union(*map(_secrets, value.values()))
    if isinstance(value, tuple | list):
        return set().union(*map(_secrets, value))
    if attrs.has(type(value)):
        return set().union(*(_secrets(getattr(value, each.name, None)) for each in attrs.fields(type(value))))
    return set()
