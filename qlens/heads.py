"""The head of an answer: its status line and headers as bytes, ready to be written."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Container, Mapping, Sequence
from email.utils import formatdate
from functools import lru_cache
from http import HTTPStatus

from qlens.account import Account
from qlens.call import Call, Reply, Standing
from qlens.errors import CallError
from qlens.metering import cost_text

STREAM_LINES = "content-type: text/event-stream; charset=utf-8\r\ncache-control: no-cache\r\nx-accel-buffering: no\r\n"
_STREAM_NAMES = frozenset({"content-type", "cache-control", "x-accel-buffering"})
_OURS = frozenset({"date", "request-id", "server", "x-request-id"})
_LONG = 10.0**9
"""Seconds that are as good as for ever."""
_FRAMING = frozenset({"connection", "content-length", "keep-alive", "trailer", "transfer-encoding", "upgrade"})
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_UNSENDABLE = re.compile("[\x00-\x08\x0a-\x1f\x7f\ud800-\udfff]")
_STATUS_LINES = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n" for status in HTTPStatus}


def head(status: int, lines: str) -> bytes:
    """The head as bytes, from whole lines."""
    line = _STATUS_LINES.get(status) or f"HTTP/1.1 {status} Status\r\n"
    return f"{line}{lines}{_end(int(time.time()))}".encode()


@lru_cache(maxsize=1)
def _end(second: int) -> str:
    """The last lines of every head in this second."""
    return f"server: qlens\r\ndate: {formatdate(second, usegmt=True)}\r\n\r\n"


def sendable(given: Mapping[str, str], without: Container[str] = ()) -> str:
    """A plugin's headers as lines, without those that would break or forge the message they stand in."""
    lines = {}
    for name, value in given.items():
        if not isinstance(name, str) or not isinstance(value, str):
            continue
        lower = name.lower()
        if lower not in without and _may_be_sent(lower) and not _UNSENDABLE.search(value):
            lines[lower] = f"{lower}: {value}\r\n"
    return "".join(lines.values())


@lru_cache(maxsize=256)
def _may_be_sent(name: str) -> bool:
    is_told = name.startswith(("x-qlens-", "x-ratelimit-"))
    return not is_told and name not in _OURS | _FRAMING and _TOKEN.fullmatch(name) is not None


def of_body(account: Account, reply: Reply) -> str:
    """The lines in front of a complete answer."""
    given = sendable(reply.headers) if reply.headers else ""
    if "content-type: " not in given:
        given = f"content-type: application/json\r\n{given}"
    if account.call.operation.runs != "full" or (cost := cost_text(account.cost())) is None:
        return f"{given}{_told(account)}"
    return f"{given}{_told(account)}x-qlens-cost-usd: {cost}\r\n"


def of_stream(account: Account, reply: Reply) -> str:
    """The lines in front of a stream."""
    if reply.raw:
        given = sendable(reply.headers)
        media = "" if "content-type: " in given else "content-type: application/octet-stream\r\n"
        return f"{media}{given}{_told(account)}"
    return f"{STREAM_LINES}{sendable(reply.headers, _STREAM_NAMES)}{_told(account)}"


def _told(account: Account) -> str:
    """What tells how a call was answered."""
    call, source = account.call, account.source
    lines = limits(call.limits) if call.limits else ""
    if call.operation.runs == "local":
        return lines
    now = time.monotonic()
    own = now - call.started - account.waited(now)
    by = _answered_by(
        None if source is None or source.target is None else source.target.provider,
        None if call.model is None else call.model.name,
        call.cache or "off",
        len(call.attempts),
    )
    return f"{lines}{by}x-qlens-overhead-ms: {own * 1000 if own > 0.0 else 0.0:.3f}\r\n"


@lru_cache(maxsize=1024)
def _answered_by(provider: str | None, model: str | None, cache: str, attempts: int) -> str:
    """The lines that are the same for many calls."""
    lines = "" if provider is None else _line("x-qlens-provider", provider)
    lines += "" if model is None else _line("x-qlens-model", model)
    return f"{lines}x-qlens-cache: {cache}\r\nx-qlens-attempts: {attempts}\r\n"


def of_error(error: CallError, call: Call | None) -> str:
    """The lines in front of an error."""
    lines = sendable(error.headers, ("content-type",)) + "content-type: application/json\r\n"
    if call is not None:
        lines += limits(call.limits)
        if call.attempts:
            lines += f"x-qlens-attempts: {len(call.attempts)}\r\n"
    if isinstance(error.retry_after, int | float) and -_LONG < error.retry_after < _LONG:
        lines += f"retry-after: {max(1, math.ceil(error.retry_after))}\r\n"
        lines += f"retry-after-ms: {max(1, math.ceil(error.retry_after * 1000))}\r\n"
    if error.status == 401:
        lines += "www-authenticate: Bearer\r\n"
    return lines


def _line(name: str, text: str) -> str:
    """A configured name as a header, which takes no control characters."""
    return f"{name}: {text.encode('ascii', 'replace').decode()}\r\n"


def limits(all_limits: Sequence[Standing]) -> str:
    """OpenAI's x-ratelimit headers, for the tightest limit of each kind."""
    requests = tokens = None
    for limit in all_limits:
        kind = limit.kind
        if kind == "requests":
            if requests is None or limit.remaining < requests.remaining:
                requests = limit
        elif kind == "tokens" and (tokens is None or limit.remaining < tokens.remaining):
            tokens = limit
    lines = "" if requests is None else _limit(requests)
    return lines if tokens is None else lines + _limit(tokens)


def _limit(limit: Standing) -> str:
    kind, remaining = limit.kind, limit.remaining
    return (
        f"x-ratelimit-limit-{kind}: {limit.limit}\r\n"
        f"x-ratelimit-remaining-{kind}: {remaining if remaining > 0 else 0}\r\n"
        f"x-ratelimit-reset-{kind}: {duration(limit.reset_seconds)}\r\n"
    )


def duration(seconds: float) -> str:
    """A duration as OpenAI writes it: 12ms, 1.5s, 6m0s, 1h2m3s."""
    # Compared with floats, which is what they are: with whole numbers it takes twice as long.
    if 0.0 <= seconds < 60.0:
        if seconds < 1.0:
            return f"{math.ceil(seconds * 1000)}ms"
        # Three decimals, without zeros at their end.
        return f"{seconds:.4g}s" if seconds < 10.0 else f"{seconds:.5g}s"
    if not seconds > 0:
        return "0s"  # also for what is no number
    minutes, rest = divmod(math.ceil(min(seconds, _LONG)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes}m{rest}s" if hours else f"{minutes}m{rest}s"
