"""What hooks return, looked at where it arrives: nonsense is the mistake of who returned it, not of the call."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Container, Iterable, Mapping
from typing import Any

from qlens.call import Allowance, Call, Caller, Cost, Limit, Reply, Target
from qlens.registry import Health
from qlens.session import Session
from qlens.surrogates import json_of
from qlens.usage import Usage, counts_of

_MOST_SEEN = 1024
_seen: dict[int, Caller] = {}
"""Callers that were looked at, by identity: most auth plugins give the same one for every call with a key."""
_standing: dict[int, object] = {}
"""Limits of plugins' own kinds that were looked at, by identity."""
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")


def mistakes() -> tuple[type[BaseException], ...]:
    """What a hook raises by mistake, an order to end the process among it: that is not for a plugin to give.

    A cancellation is one when nobody sent it to this task: the hook waited for work of its own that was cancelled; else
    it ends the call and must pass.
    """
    task = asyncio.current_task()
    cancelled = task is not None and task.cancelling()
    return (Exception, SystemExit) if cancelled else (Exception, SystemExit, asyncio.CancelledError)


def caller(value: Any) -> Caller | None:
    """What `authenticate` returned; TypeError when it is no caller, or says something of another type than it must."""
    if value is None or _seen.get(id(value)) is value:
        return value
    if not isinstance(value, Caller) or not isinstance(value.tenant, str) or not value.tenant:
        raise TypeError(f"authenticate returned {_kind(value)}, not a Caller with a tenant")
    if not (_is_named(value) and _is_limited(value)):
        raise TypeError(
            "authenticate returned a Caller with fields of other types than they have, or an unprintable name"
        )
    if len(_seen) >= _MOST_SEEN:
        _seen.clear()
    _seen[id(value)] = value
    return value


def _is_named(value: Caller) -> bool:
    subject, project, key_id = value.subject, value.project, value.key_id
    return (
        _is_name(value.tenant)
        and _is_name(subject)
        and isinstance(value.by, str)
        and (project is None or _is_name(project))
        and (key_id is None or _is_name(key_id))
    )


def _is_name(value: object) -> bool:
    """Whether it is a text that stands in one line wherever it is written."""
    return isinstance(value, str) and (value.isprintable() or _UNPRINTABLE.search(value) is None)


def _is_limited(value: Caller) -> bool:
    """Whether what a caller may do is what it says: a text, say, would be taken for a list of its characters."""
    models, tags, ends, allowance = value.models, value.tags, value.expires_at, value.allowance
    return (
        isinstance(value.roles, frozenset)
        and _are_texts(value.roles)
        and (models is None or (isinstance(models, tuple) and _are_texts(models)))
        and isinstance(tags, Mapping)
        and (not tags or (_are_texts(tags) and _are_texts(tags.values())))
        and (ends is None or isinstance(ends, (int, float)))
        and (allowance is None or isinstance(allowance, Allowance))
    )


def _are_texts(values: Iterable[object]) -> bool:
    for value in values:  # noqa: SIM110 - a generator costs as much as all the rest
        if not isinstance(value, str):
            return False
    return True


def reply(value: Any) -> Reply:
    """What an answering hook returned; TypeError when there is nothing in it to relay."""
    if not isinstance(value, Reply):
        raise TypeError(f"{_kind(value)} was returned, not a Reply")
    if type(value.body) is bytes if value.chunks is None else hasattr(value.chunks, "__aiter__"):
        return value
    raise TypeError("a Reply was returned with neither a body of bytes nor an asynchronous iterator of chunks")


def success(value: Reply) -> Reply:
    """What `send` or `lookup` returned as an answer; TypeError when its status says that it is none."""
    if type(value.status) is not int or not 200 <= value.status < 300:
        raise TypeError("a Reply was returned whose status is not 2xx: what failed is an UpstreamError")
    return value


def known(value: Any, *, is_read: bool) -> Reply:
    """What `lookup` returned, in a Reply of the call's own; TypeError or ValueError when that is no answer.

    A cache may return the one that it keeps, and a call changes what it gets. `is_read`: the body becomes a stream.
    """
    found = success(reply(value))
    if found.chunks is None and not found.raw:
        body = (found.body or b"").strip()
        if not (body.startswith(b"{") and body.endswith(b"}")) or (is_read and type(json_of(body)) is not dict):
            raise TypeError("lookup returned a Reply whose body is no JSON object")
    return found.moved()


def page(value: Any) -> Reply:
    """What the handler of an endpoint returned; TypeError when it cannot be written. It may have no body."""
    if not isinstance(value, Reply) or type(value.status) is not int:
        raise TypeError(f"a handler returned {_kind(value)}, not a Reply with a number as its status")
    return value if value.body is None and value.chunks is None else reply(value)


def limits(given: Any, count: int) -> int:
    """Look at what `admit` put behind the first `count` limits of a call, and return how many there are now.

    TypeError when no client can be told one of them.
    """
    if not isinstance(given, list):
        raise TypeError(f"admit left {_kind(given)} in call.limits, not a list")
    for value in given[count:]:
        if _standing.get(id(value)) is value:
            continue  # one that a plugin keeps up to date for longer than one call
        if not _is_limit(value):
            raise TypeError("admit put something into call.limits that is no Limit of whole numbers")
        if type(value) is not Limit:
            if len(_standing) >= _MOST_SEEN:
                _standing.clear()
            _standing[id(value)] = value
    return len(given)


def _is_limit(value: Any) -> bool:
    return (
        isinstance(getattr(value, "limit", None), int)
        and isinstance(value.remaining, int)
        and isinstance(value.reset_seconds, (int, float))
    )


def tags(call: Call) -> None:
    """Look at the tags of a call; TypeError when they are no texts, which a receipt could not have."""
    found = call.tags
    if not found or (isinstance(found, dict) and _are_texts(found) and _are_texts(found.values())):
        return
    call.tags = {}
    raise TypeError("call.tags has something that is no text")


def session(value: Any) -> Session:
    """What `connect` returned; TypeError when nothing can be sent through it."""
    if not isinstance(value, Session):
        raise TypeError(f"connect returned {_kind(value)}, not a Session with send, receive and close")
    return value


def targets(value: Any, providers: Container[str]) -> list[Target]:
    """What `choose` returned, each target once; TypeError when one of them cannot be asked."""
    chosen: Iterable[Any] = dict.fromkeys(value)
    for target in chosen:
        if not isinstance(target, Target) or target.provider not in providers:
            raise TypeError(f"choose returned {_kind(target)}, not a Target of a configured provider")
    return list(chosen)


def wait(value: Any) -> float | None:
    """What `retry` returned; TypeError when it is no time."""
    if value is None:
        return None
    if not isinstance(value, (int, float)) or not value >= 0:
        raise TypeError(f"retry returned {value!r}, not the seconds to wait")
    return value


def cost(value: Any) -> Cost | None:
    """What `price` returned; TypeError when it is no amount of money, or less than nothing."""
    if isinstance(value, Cost):
        picos = value.picos
        if picos is None or (type(picos) is int and picos >= 0):
            return value
    elif value is None:
        return None
    raise TypeError(f"price returned {value!r}, not a Cost of whole picodollars")


def usage(value: Any) -> Usage | None:
    """What a provider says was used; TypeError when it counts less than nothing, or not in whole tokens."""
    if value is None:
        return None
    if not isinstance(value, Usage):
        raise TypeError(f"usage is {value!r}, not a Usage")
    counts = counts_of(value)
    if type(sum(counts)) is not int or min(counts) < 0:
        raise TypeError(f"usage is {value!r}, not a Usage of whole tokens")
    return value


def health(value: Any) -> Health:
    """What `health` returned; TypeError or ValueError when it cannot be shown."""
    if not isinstance(value, Health) or not isinstance(value.ok, bool) or not isinstance(value.detail, str):
        raise TypeError(f"health returned {_kind(value)}, not a Health")
    value.detail.encode()
    return value


def _kind(value: Any) -> str:
    return f"a {type(value).__name__}"
