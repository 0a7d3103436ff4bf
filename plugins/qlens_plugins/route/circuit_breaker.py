"""Circuit breaker: a target that keeps failing is left alone for a while, then tried with one call."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from attrs import define, field, frozen
from attrs.validators import ge, gt

from qlens import (
    Call,
    CallError,
    Gateway,
    Health,
    Reply,
    Target,
    UpstreamError,
    UpstreamModelMissing,
    UpstreamRejected,
    UpstreamUnavailable,
    hookimpl,
)

_PROBE_SECONDS = 1.0
"""When to come back while another call is trying the target."""

_OF_CODE = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError, NameError, RecursionError, TypeError),
    ValueError,
)
"""What a mistake in a provider's plugin raises. One odd call may meet it again and again, before anything is sent:
counted, it would close a good target to everybody. What else a plugin lets pass, an OSError or an error of its client
library, is most likely the target's doing, and counts."""
_FAILED = "provider_failed"
"""How the core calls the end of an attempt in which a provider's plugin let an error pass that is no CallError."""


@frozen
class CircuitBreakerConfig:
    """Stops asking a target after consecutive failures, and lets one call find out when it is back."""

    failures: int = field(default=5, validator=ge(1))
    """How many failures in a row open a target's circuit."""
    open_seconds: float = field(default=30, validator=gt(0))
    """How long an open circuit refuses calls before one is let through to try."""


@define(eq=False)
class _Circuit:
    """What is known about a target that failed lately; a target without one is well."""

    failures: int = 0
    open_until: float | None = None
    probing: bool = False


@define(eq=False)
class CircuitBreaker:
    """Stands around every send. Targets behind a wildcard share one circuit: their names are the clients' choice."""

    config: CircuitBreakerConfig
    name: str
    _gateway: Gateway = field(init=False, repr=False)
    _circuits: dict[tuple[str, str], _Circuit] = field(factory=dict, init=False, repr=False)

    Config = CircuitBreakerConfig

    @hookimpl
    @asynccontextmanager
    async def lifespan(self, gateway: Gateway) -> AsyncIterator[None]:
        """Take the clock and the metrics."""
        self._gateway = gateway
        yield

    @hookimpl
    def adopt(self, old: object) -> None:
        """Go on with what the instance before knew."""
        assert isinstance(old, CircuitBreaker)
        self._circuits = old._circuits

    @hookimpl
    def health(self) -> Health:
        """Name the targets that are left alone."""
        self._forget_removed()
        broken = [
            f"{provider}/{model} ({circuit.failures} failures in a row)"
            for (provider, model), circuit in sorted(self._circuits.items())
            if circuit.open_until is not None
        ]
        return Health(not broken, f"open: {', '.join(broken)}" if broken else "")

    @hookimpl
    async def wrap_send(self, call: Call, target: Target, proceed: Callable[[Target], Awaitable[Reply]]) -> Reply:
        """Refuse while the target's circuit is open; learn from how the send ends."""
        is_probe = bool(self._circuits) and self._enter(_key(target))  # while all are well, there is no circuit
        try:
            reply = await proceed(target)
        except Exception as error:
            self._learn(_key(target), is_probe, _is_well(call, error))
            raise
        except BaseException:
            # Cancelled: nothing was learnt, but the next call may try.
            self._learn(_key(target), is_probe, None)
            raise
        if self._circuits:
            self._learn(_key(target), is_probe, True)
        return reply

    def _enter(self, key: tuple[str, str]) -> bool:
        """Whether this send is the one that tries an open circuit; raises when the target is to be left alone."""
        circuit = self._circuits.get(key)
        if circuit is None or circuit.open_until is None:
            return False
        left = circuit.open_until - self._gateway.clock.monotonic()
        if left > 0 or circuit.probing:
            raise UpstreamUnavailable(
                f"The provider {key[0]} failed {circuit.failures} times in a row and is left alone for a while. "
                "Please try again later.",
                code="circuit_open",
                retry_after=max(left, _PROBE_SECONDS),
            )
        circuit.probing = True
        return True

    def _learn(self, key: tuple[str, str], is_probe: bool, is_well: bool | None) -> None:
        """Take note of how a send ended; None: that says nothing about the target."""
        circuit = self._circuits.get(key)
        if circuit is None:
            if is_well is not False:
                return
            circuit = _Circuit()
        if circuit.open_until is not None and not is_probe:
            return  # sent before the circuit opened: only the probe says when the target is back
        circuit.probing = False
        if is_well is None:
            return
        if is_well:
            self._close(key)
            return
        circuit.failures += 1
        self._circuits[key] = circuit
        if is_probe or circuit.failures >= self.config.failures:
            circuit.open_until = self._gateway.clock.monotonic() + self.config.open_seconds
            self._show(key, 1)

    def _close(self, key: tuple[str, str]) -> None:
        circuit = self._circuits.pop(key, None)
        if circuit is not None and circuit.open_until is not None:
            self._show(key, 0)

    def _forget_removed(self) -> None:
        """Close the circuits of targets that a reload took out: nothing will ever probe them."""
        known = {_key(target) for model in self._gateway.models.values() for target in model.candidates}
        for key in self._circuits.keys() - known:
            self._close(key)

    def _show(self, key: tuple[str, str], is_open: int) -> None:
        gauge = self._gateway.metrics.gauge(
            "qlens_circuit_open", "1 while a target's circuit is open.", ("provider", "model")
        )
        gauge.labels(*key).set(is_open)


def _key(target: Target) -> tuple[str, str]:
    """What a circuit stands for. For a wildcard it is the pattern, or else clients could make circuits without end."""
    return (target.provider, target.public) if "*" in target.public else target.key


def _is_well(call: Call, error: Exception) -> bool | None:
    """Whether a target that ended a send with this error is well; None when the error says nothing about it."""
    if isinstance(error, UpstreamRejected | UpstreamModelMissing):
        return True  # it answered in good order, and said that the request is wrong
    if isinstance(error.__cause__, _OF_CODE) and call.attempts and call.attempts[-1].error == _FAILED:
        return None  # the plugin failed and not the target, which may not even have been asked
    if isinstance(error, UpstreamError):
        return None if error.ours else False
    return None if isinstance(error, CallError) else False
