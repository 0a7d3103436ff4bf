"""How a target misbehaves when its `params` tell it to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from attrs import frozen

MAX_MILLISECONDS = 600_000


@frozen
class Behaviour:
    """What the operator wants to try out with a target; nothing of it comes from clients."""

    first_byte_ms: float = 0
    """How long nothing is said."""
    token_ms: float = 0
    """How long each token takes."""
    fail_status: int | None = None
    """Fail as a provider that answers with this status of HTTP."""
    fail_code: str | None = None
    """The error code that goes with the status: context_length_exceeded, say."""
    retry_after: float | None = None
    """The seconds that the failure asks to wait."""
    fail_first: int | None = None
    """Fail only this many times, then work; with status 503 if none is given."""
    break_after_tokens: int | None = None
    """Stop after this many tokens, in the middle of the answer."""

    @classmethod
    def of(cls, params: Mapping[str, Any]) -> Behaviour:
        """The behaviour that a target's params ask for; the params have been found to be without faults."""
        return cls(**{name: params[name] for name in PARAMS if name in params})

    def fails(self, failures: int) -> bool:
        """Whether the next attempt fails, after this many that did."""
        if self.fail_first is not None:
            return failures < self.fail_first
        return self.fail_status is not None


def faults(params: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the params that are meant for the echo itself."""
    for name, (fits, wanted) in PARAMS.items():
        if name in params and not fits(params[name]):
            yield f"params.{name} must be {wanted}, not {params[name]!r}"
    if "fail_status" not in params and "fail_first" not in params:
        for name in ("fail_code", "retry_after"):
            if name in params:
                yield f"params.{name} does nothing without params.fail_status or params.fail_first: add one of them"


def _within(low: float, high: float, *types: type) -> Callable[[Any], bool]:
    # By exact type, because True is an int too.
    return lambda value: type(value) in types and low <= value <= high


PARAMS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "first_byte_ms": (_within(0, MAX_MILLISECONDS, int, float), f"milliseconds from 0 to {MAX_MILLISECONDS}"),
    "token_ms": (_within(0, MAX_MILLISECONDS, int, float), f"milliseconds from 0 to {MAX_MILLISECONDS}"),
    "fail_status": (_within(400, 599, int), "a status from 400 to 599"),
    "fail_code": (lambda value: isinstance(value, str) and bool(value), "an error code such as rate_limit_exceeded"),
    "retry_after": (_within(0, 86_400, int, float), "seconds from 0 to 86400"),
    "fail_first": (_within(1, 1_000_000, int), "a number of attempts from 1"),
    "break_after_tokens": (_within(0, 1_000_000, int), "a number of tokens from 0"),
}
"""The params that are the echo's own and no fields of a body: the check of each, and what it wants."""
