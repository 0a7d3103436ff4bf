"""What a call that does not pass is told."""

from __future__ import annotations

import math

from qlens import CallError, InvalidRequest, RateLimited, UpstreamLimited
from qlens_plugins.rate_limit.token_bucket.meters import SECOND, Cap, Key, Meter

_WORDS = {"requests": "requests per min (RPM)", "tokens": "tokens per min (TPM)"}


def owner(key: Key) -> str:
    """Whose a bucket is, in words."""
    return f"{key[1]} {key[2]}"


def limited(meter: Meter, key: Key, quantity: int, remaining: int, picoseconds: int) -> CallError:
    """A bucket has less than a call needs; `picoseconds` later it has it."""
    # Rounded up, so that who waits as long as this says is not refused again.
    milliseconds = -(-picoseconds // (SECOND // 1000))
    return _refused(
        key,
        f"on {_WORDS[meter.kind]}: Limit {meter.per_minute}, Remaining {remaining}, Requested {quantity}. "
        f"Please try again in {duration(milliseconds)}.",
        meter.kind,
        milliseconds / 1000,
    )


def crowded(cap: Cap, key: Key, running: int) -> CallError:
    """As many calls run as may."""
    return _refused(
        key,
        f"on concurrent requests: Limit {cap.most}, Running {running}. Please try again when one has ended.",
        "requests",
        1.0,
    )


def _refused(key: Key, why: str, kind: str, retry_after: float) -> CallError:
    message = f"Rate limit reached for {owner(key)} {why}"
    if key[1] == "provider":  # another may have room, or a fallback
        return UpstreamLimited(message, retry_after=retry_after)
    return RateLimited(message, kind=kind, retry_after=retry_after)


def too_large(meter: Meter, key: Key, quantity: int, most: int) -> CallError:
    """A call needs more than a full bucket holds."""
    hint = " Send a shorter prompt or a smaller max_tokens." if meter.kind == "tokens" else ""
    message = (
        f"Request too large for {owner(key)} on {_WORDS[meter.kind]}: it needs up to {quantity}, and "
        f"the limit `{meter.name}` never allows more than {most} at once.{hint}"
    )
    if key[1] == "provider":
        return UpstreamLimited(message, code="request_too_large")
    return InvalidRequest(message, code="request_too_large")


def unbounded() -> InvalidRequest:
    """A credential has an allowance of tokens, and nobody says how many the call may use."""
    return InvalidRequest(
        "max_tokens is required: this credential has an allowance of tokens a minute, and the model has no "
        "max_output_tokens in this gateway's configuration.",
        param="max_tokens",
        code="missing_required_parameter",
    )


def duration(milliseconds: int) -> str:
    """A wait as OpenAI writes it: 120ms, 1.5s, 2m3s."""
    if milliseconds < 1000:
        return f"{milliseconds}ms"
    if milliseconds < 60_000:
        return f"{milliseconds / 1000:g}s"
    seconds = math.ceil(milliseconds / 1000)
    return f"{seconds // 60}m{seconds % 60}s"
