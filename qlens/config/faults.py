"""From what goes wrong in a conversion to faults that say where, what was found and what is right."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import attrs
from cattrs.errors import (
    AttributeValidationNote,
    BaseValidationError,
    ForbiddenExtraKeysError,
    IterableValidationNote,
)

from qlens.config.environment import EnvText, MissingText
from qlens.config.scalars import Mismatch, found
from qlens.config.shapes import fields_of
from qlens.config.tree import Place
from qlens.errors import Fault


def faults_of(error: Exception, place: Place) -> list[Fault]:
    """What cattrs raised for the value at a place, as one fault for each thing that is wrong."""
    if isinstance(error, ForbiddenExtraKeysError):
        known = [str(field.alias) for field in fields_of(error.cl)]
        return [unknown_key(place.step(key), key, known) for key in place.value if key in error.extra_fields]
    if isinstance(error, Mismatch):
        return [Fault(str(place), str(error))]
    if not isinstance(error, BaseValidationError):
        unsure = "cannot be checked while variables are not set"
        return [Fault(str(place), unsure if has_missing(place.value) else masked(str(error), place.value))]
    faults: list[Fault] = []
    for inner in error.exceptions:
        step = _step(inner, error)
        if step is not None and isinstance(inner, KeyError):
            faults.append(Fault(str(place), f'the key "{step}" is missing'))
        else:
            faults += faults_of(inner, place if step is None else place.step(step))
    return faults


def noted(error: Exception, step: str | int) -> Exception:
    """Say which step down an error belongs to, as cattrs does for the fields of a class."""
    error.add_note(IterableValidationNote("", step, object))
    return error


def _step(error: Exception, group: BaseValidationError) -> str | int | None:
    """Which step down an error of a group stands for, as noted; None: it is about the value itself."""
    for note in getattr(error, "__notes__", ()):
        if isinstance(note, IterableValidationNote):
            return note.index
        if isinstance(note, AttributeValidationNote):
            return str(attrs.fields_dict(group.cl)[note.name].alias)
    return None


def unknown_key(place: Place, key: str, known: Iterable[str]) -> Fault:
    """The fault of a key that nobody knows."""
    return Fault(str(place), f"unknown key{suggestion(key, known, 'known keys')}")


def suggestion(name: str, known: Iterable[str], label: str) -> str:
    """What a wrong name may have meant, and all that would be right."""
    names = list(known)
    import difflib  # only for a faulty file

    close = difflib.get_close_matches(name, names, n=1)
    meant = f' did you mean "{close[0]}"?' if close else ""
    return f";{meant} {label}: {', '.join(names) or 'none'}"


# --- the environment ---------------------------------------------------------------------------


def has_missing(value: Any) -> bool:
    """Whether something in a value is unknown, because an environment variable is not set."""
    return any(isinstance(text, MissingText) for text in _env_texts(value))


def masked(message: str, value: Any, result: str = "") -> str:
    """A message of foreign code without the texts of the environment that it may repeat.

    `result` is how the message may show `value` itself after its conversion.
    """
    shown: dict[str, str] = {}
    for text in _env_texts(value):
        forms = (str(text), repr(str(text))[1:-1], result if text is value else "")
        shown.update((form, found(text)) for form in forms if form)
    if not shown:
        return message
    # A short text is masked where it stands alone, or else half of the message would be gone.
    patterns = (re.escape(form) if len(form) > 3 else rf"(?<!\w){re.escape(form)}(?!\w)" for form in _longest(shown))
    return re.sub("|".join(patterns), lambda match: shown[match.group()], message)


def _longest(texts: Iterable[str]) -> list[str]:
    return sorted(texts, key=len, reverse=True)


def _env_texts(value: Any) -> list[EnvText]:
    if isinstance(value, EnvText):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for item in items for text in _env_texts(item)]
