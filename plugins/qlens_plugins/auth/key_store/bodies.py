"""Reads what operators send, strictly: a field that is not known is refused by its name, and so is a wrong value."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from datetime import datetime
from decimal import Decimal, InvalidOperation
from typing import Any

import orjson

from qlens import Allowance, Call, InvalidRequest, picos
from qlens_plugins.auth.credentials import instant
from qlens_plugins.auth.key_store.records import limits_or_none
from qlens_plugins.auth.key_store.store import Page

MOST_BYTES = 64 * 1024
MOST_CHARACTERS = 256
MOST_ITEMS = 256
MOST_METADATA_BYTES = 4096
MOST_NOTES = 16
MOST_NOTE_NAME = 64
MOST_NOTE_CHARACTERS = 512
LARGEST = 10**15
OVERLAP_SECONDS = 3600
"""How long the old key works beside the new one, unless something else is said."""
LONGEST_OVERLAP_SECONDS = 30 * 86_400
MOST_ROWS = 100
ROWS = 20


class Wrong(ValueError):
    """A value that is not what its field takes; the message says what it must be."""


Reader = Callable[[Any], Any]
"""Makes a setting of a JSON value; raises ValueError."""


async def body(call: Call, fields: Mapping[str, Reader], required: Collection[str] = ()) -> dict[str, Any]:
    """The fields of a JSON object; an empty body is an empty object. Raises InvalidRequest with the field's name."""
    raw = await call.read()
    if len(raw) > MOST_BYTES:
        raise InvalidRequest(f"The request body is larger than {MOST_BYTES} bytes.")
    try:
        given = orjson.loads(raw) if raw.strip() else {}
    except orjson.JSONDecodeError:
        raise InvalidRequest("The request body is not valid JSON.") from None
    if not isinstance(given, dict):
        raise InvalidRequest("The request body must be a JSON object.")
    return _read(given, fields, required, "field")


def asked(call: Call, fields: Mapping[str, Reader]) -> dict[str, Any]:
    """The parameters of a query, as strictly."""
    read = _read(dict(call.query), fields, (), "parameter")
    names = [name for name, _ in call.query.items()]
    for name in read:
        if names.count(name) > 1:
            raise InvalidRequest(f"The parameter `{name}` may be said once.", param=name, code="invalid_value")
    return read


def page(asked_for: dict[str, Any]) -> Page:
    """Take the part of a list that a query asks for out of its parameters."""
    return Page(asked_for.pop("limit", ROWS), asked_for.pop("after", None))


def _read(
    given: Mapping[str, Any], fields: Mapping[str, Reader], required: Collection[str], what: str
) -> dict[str, Any]:
    for name in given:
        if name not in fields:
            shown = name if name.isprintable() and len(name) <= 64 else "?"
            known = ", ".join(fields) or "none"
            raise InvalidRequest(f"Unknown {what} `{shown}`; known: {known}.", param=shown, code="unknown_parameter")
    for name in required:
        if name not in given:
            raise InvalidRequest(f"The {what} `{name}` is missing.", param=name, code="missing_required_parameter")
    read = {}
    for name, value in given.items():
        try:
            read[name] = fields[name](value)
        except (ValueError, ArithmeticError) as error:  # a time or an amount that is too large is one of those
            raise InvalidRequest(f"`{name}` is wrong: {error}.", param=name, code="invalid_value") from None
    return read


# --- values ------------------------------------------------------------------------------------


def text(value: Any) -> str:
    """A short text of printable characters, with no blank at its ends that would look like another text."""
    if not isinstance(value, str) or not value or value != value.strip() or not value.isprintable():
        raise Wrong(f"must be a text of 1 to {MOST_CHARACTERS} printable characters, without blanks at its ends")
    if len(value) > MOST_CHARACTERS:
        raise Wrong(f"must be a text of at most {MOST_CHARACTERS} characters")
    return value


def or_null(reader: Reader) -> Reader:
    """A value, or null for none."""
    return lambda value: None if value is None else reader(value)


def yes_or_no(value: Any) -> bool:
    """A boolean."""
    if not isinstance(value, bool):
        raise Wrong("must be true or false")
    return value


def number(least: int, most: int) -> Reader:
    """A whole number between two others."""

    def read(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise Wrong(f"must be a whole number from {least} to {most}")
        return value

    return read


def digits(reader: Reader) -> Reader:
    """A number where only text can stand, as in a query."""
    return lambda value: reader(int(value) if value.isascii() and value.isdigit() and len(value) <= 16 else value)


def roles(value: Any) -> tuple[str, ...]:
    """Names of roles, at least one."""
    if value == []:
        raise Wrong("must name a role; without one a key could do nothing here")
    return texts(value)


def texts(value: Any) -> tuple[str, ...]:
    """A list of texts, each once."""
    if not isinstance(value, list) or len(value) > MOST_ITEMS:
        raise Wrong(f"must be a list of at most {MOST_ITEMS} texts")
    return tuple(dict.fromkeys(map(text, value)))


def models(value: Any) -> tuple[str, ...]:
    """Names of models, or prefixes that end with `*`; an empty list means none at all."""
    return tuple(map(model, texts(value)))


def model(value: Any) -> str:
    """The name of a model, or such a prefix."""
    name = text(value)
    if "*" in name[:-1]:
        raise Wrong("must be names of models; `*` may only stand at the end of one")
    return name


def tags(value: Any) -> dict[str, str]:
    """Texts by name."""
    if not isinstance(value, dict) or len(value) > MOST_ITEMS:
        raise Wrong("must be an object of texts")
    return {text(name): text(each) for name, each in value.items()}


def notes(value: Any) -> dict[str, str]:
    """Texts by name, as OpenAI has them in metadata."""
    if not isinstance(value, dict) or len(value) > MOST_NOTES:
        raise Wrong(f"must be an object of at most {MOST_NOTES} texts")
    return dict(note(name, each) for name, each in value.items())


def note(name: str, value: Any) -> tuple[str, str]:
    """One of them; a value may have any characters that a text can have, and none at all."""
    text(name)
    if len(name) > MOST_NOTE_NAME:
        raise Wrong(f"must have names of at most {MOST_NOTE_NAME} characters")
    if not isinstance(value, str) or len(value) > MOST_NOTE_CHARACTERS:
        raise Wrong(f"must have texts of at most {MOST_NOTE_CHARACTERS} characters")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise Wrong("must have texts that are Unicode")  # a command line may hold other bytes
    return name, value


def metadata(value: Any) -> dict[str, Any]:
    """Any small object."""
    try:
        size = len(orjson.dumps(value))
    except orjson.JSONEncodeError:
        raise Wrong("must not be nested that deep") from None
    if not isinstance(value, dict) or size > MOST_METADATA_BYTES:
        raise Wrong(f"must be an object of at most {MOST_METADATA_BYTES} bytes")
    return value


def moment(value: Any) -> int:
    """A time with its zone, as Unix seconds."""
    if not isinstance(value, str):
        raise Wrong("must be a time like 2027-01-31T00:00:00Z")
    return int(instant(value).timestamp())


def nanoseconds(value: Any) -> int:
    """A time with its zone, as Unix nanoseconds."""
    at: datetime = instant(text(value))
    found = int(at.timestamp()) * 1_000_000_000 + at.microsecond * 1000
    return max(-(2**63), min(found, 2**63 - 1))  # databases take no more; nothing was done then


def limits(value: Any) -> Allowance | None:
    """Limits and a budget of a key."""
    return _limits(value, _LIMITS)


def tenant_limits(value: Any) -> Allowance | None:
    """What holds for each key of a tenant, and a budget of all of them together."""
    return _limits(value, _TENANT_LIMITS)


def _limits(value: Any, readers: Mapping[str, Reader]) -> Allowance | None:
    if not isinstance(value, dict):
        raise Wrong("must be an object")
    read: dict[str, Any] = {}
    for name, each in value.items():
        if name not in readers:
            raise Wrong(f"unknown {name[:64]!r}; it may have {', '.join(readers)}")
        try:
            read[name] = readers[name](each)
        except (ValueError, ArithmeticError) as error:
            raise Wrong(f"{name}: {error}") from None
    for budget in ("budget", "tenant_budget"):
        if f"{budget}_window" in read and read.get(f"{budget}_usd") is None:
            raise Wrong(f"{budget}_window needs a {budget}_usd")
        if f"{budget}_usd" in read:
            read[f"{budget}_picos"] = read.pop(f"{budget}_usd")
    return limits_or_none(Allowance(**read))


count = number(1, LARGEST)
"""A limit of something."""


def _window(value: Any) -> str:
    if value not in ("day", "week", "month", "total"):
        raise Wrong("must be day, week, month or total")
    return str(value)


def money(value: Any) -> int:
    """Dollars as a decimal text, exact: a JSON number with a fraction is a float, which is not."""
    if isinstance(value, bool) or not isinstance(value, str | int) or (isinstance(value, str) and len(value) > 40):
        raise Wrong('must be an amount in US dollars as a text, like "25.00"')
    try:
        amount = picos(Decimal(value))
    except InvalidOperation:
        raise Wrong('must be an amount in US dollars as a text, like "25.00"') from None
    if amount < 0:
        raise Wrong("must not be negative")
    return amount


_LIMITS: Mapping[str, Reader] = {
    "requests_per_minute": or_null(count),
    "tokens_per_minute": or_null(count),
    "concurrency": or_null(count),
    "budget_usd": or_null(money),
    "budget_window": _window,
}
_TENANT_LIMITS: Mapping[str, Reader] = {
    **_LIMITS,
    "tenant_budget_usd": or_null(money),
    "tenant_budget_window": _window,
}

NEW_KEY: Mapping[str, Reader] = {
    "name": or_null(text),
    "tenant": text,
    "project": or_null(text),
    "subject": text,
    "roles": roles,
    "models": or_null(models),
    "tags": tags,
    "limits": or_null(limits),
    "metadata": notes,
    "expires_at": or_null(moment),
}
CHANGED_KEY: Mapping[str, Reader] = {name: reader for name, reader in NEW_KEY.items() if name != "subject"}
ROTATION: Mapping[str, Reader] = {"overlap_seconds": number(0, LONGEST_OVERLAP_SECONDS)}
CHANGED_TENANT: Mapping[str, Reader] = {
    "disabled": yes_or_no,
    "models": or_null(models),
    "limits": or_null(tenant_limits),
    "metadata": metadata,
}
NEW_TENANT: Mapping[str, Reader] = {"name": text, **CHANGED_TENANT}
LIST: Mapping[str, Reader] = {"limit": digits(number(1, MOST_ROWS)), "after": text}
AUDIT: Mapping[str, Reader] = {
    **LIST,
    **dict.fromkeys(("tenant", "actor", "action", "object"), text),
    "since": nanoseconds,
    "until": nanoseconds,
}
