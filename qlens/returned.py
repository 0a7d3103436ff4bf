"""What hooks return, looked at where it arrives: nonsense is the mistake of who returned it, not of the call."""

from __future__ import annotations

import asyncio
from collections.abc import Container, Iterable
from typing import Any

from qlens.call import Caller, Cost, Reply, Target
from qlens.registry import Health
from qlens.session import Session
from qlens.usage import Usage, counts_of


def mistakes() -> tuple[type[BaseException], ...]:
    """What a hook raises by mistake. A cancellation is one when nobody sent it to this task: the hook waited for work
    of its own that was cancelled; else it ends the call and must pass.
    """
    task = asyncio.current_task()
    cancelled = task is not None and task.cancelling()
    return (Exception,) if cancelled else (Exception, asyncio.CancelledError)


def caller(value: Any) -> Caller | None:
    """What `authenticate` returned; TypeError when it is no caller, or one of no tenant."""
    if value is None:
        return None
    if not isinstance(value, Caller) or not isinstance(value.tenant, str) or not value.tenant:
        raise TypeError(f"authenticate returned {_kind(value)}, not a Caller with a tenant")
    return value


def reply(value: Any) -> Reply:
    """What an answering hook returned; TypeError when there is nothing in it to relay."""
    if not isinstance(value, Reply):
        raise TypeError(f"{_kind(value)} was returned, not a Reply")
    if type(value.body) is bytes if value.chunks is None else hasattr(value.chunks, "__aiter__"):
        return value
    raise TypeError("a Reply was returned with neither a body of bytes nor an asynchronous iterator of chunks")


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
    if value is None:
        return None
    if isinstance(value, Cost):
        picos = value.picos
        if picos is None or (type(picos) is int and picos >= 0):
            return value
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
