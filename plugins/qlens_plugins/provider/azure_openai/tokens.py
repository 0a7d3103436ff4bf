"""Keeps a token fresh: fetched by one for all, renewed early and in the background, the old one kept while it holds."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager, nullcontext

from attrs import define, field, frozen

from qlens import CallError, UpstreamAuth, UpstreamUnavailable

log = logging.getLogger("qlens.azure_openai")

EARLY_SECONDS = 300
"""A token is renewed this long before it ends."""
LONG_LIVED_SECONDS = 7200
"""One that lives at least this long is renewed at half its life."""
SLACK_SECONDS = 10
"""A token is not used in its last seconds: it would end on its way."""
REST_SECONDS = 30
"""How long nobody asks again after a refusal, and at most after a failed early renewal, or one that a 401 asked for."""
SHORT_REST_SECONDS = 1
"""How long nobody asks again after a failure that may pass, while there is no token at all."""
WAIT_SECONDS = 15
"""How long a call waits for a token; who fetches it may try for longer."""


@frozen
class Grant:
    """A token as an identity service gives it."""

    value: str = field(repr=False)
    lifetime: float
    """Seconds from now to its end."""
    refresh_in: float | None = None
    """Seconds after which the service wants to be asked again."""

    def renewed_after(self) -> float:
        """The seconds after which it is to be renewed."""
        if self.refresh_in is not None and 0 < self.refresh_in < self.lifetime:
            return self.refresh_in
        half = self.lifetime / 2
        return half if self.lifetime >= LONG_LIVED_SECONDS else max(half, self.lifetime - EARLY_SECONDS)

    def rests(self) -> float:
        """The seconds for which nobody asks again; one that soon ends is renewed before it does."""
        return max(SHORT_REST_SECONDS, min(REST_SECONDS, self.lifetime / 2, self.lifetime - SLACK_SECONDS))


@define(eq=False)
class _Held:
    value: str = field(repr=False)
    ends: float
    renew: float


@define(eq=False)
class Tokens:
    """One identity's tokens for one scope."""

    provider: str
    fetch: Callable[[], Awaitable[Grant]] = field(repr=False)
    now: Callable[[], float]
    """Monotonic seconds."""
    waiting: Callable[[], AbstractContextManager[None]] = nullcontext
    """Around the wait of a call that cannot be sent without a token."""
    counted: Callable[[str], None] = lambda outcome: None
    """Told how each fetch ended: fetched or failed."""
    _held: _Held | None = field(default=None, init=False, repr=False)
    _flight: asyncio.Task[None] | None = field(default=None, init=False, repr=False)
    _rests_until: float = field(default=0.0, init=False)
    _failure: CallError | None = field(default=None, init=False, repr=False)

    async def get(self) -> str:
        """A token that is valid; raises UpstreamAuth or UpstreamUnavailable when there is none."""
        held = self._valid()
        if held is None:
            await self._wait()
            held = self._valid()
            if held is None:
                raise self._none()
        elif self.now() >= held.renew:
            self.renew()
        return held.value

    def renew(self) -> None:
        """Fetch a token in the background, unless somebody does or nobody should at the moment."""
        if self._flight is None and self.now() >= self._rests_until:
            self._flight = asyncio.create_task(self._fetch(), name=f"token of {self.provider}")

    def doubt(self, value: str) -> None:
        """Azure refused a token that should be valid: renew it, though not for every call that is refused."""
        if self._held is not None and self._held.value == value:
            self._held.renew = 0.0

    def take_over(self, old: Tokens) -> None:
        """Start with the token of another configuration of the same identity."""
        self._held = old._held

    def left(self) -> float:
        """The seconds for which there is a token."""
        held = self._valid()
        return held.ends - self.now() if held is not None else 0.0

    @property
    def failure(self) -> CallError | None:
        """Why the last fetch failed; None when it did not."""
        return self._failure

    async def aclose(self) -> None:
        """Stop fetching."""
        if self._flight is not None:
            self._flight.cancel()
            await asyncio.wait({self._flight})

    def _valid(self) -> _Held | None:
        held = self._held
        return held if held is not None and self.now() < held.ends - SLACK_SECONDS else None

    async def _wait(self) -> None:
        self.renew()
        if self._flight is not None:
            # Not cancelled with a call that waits: it fetches for all of them.
            with self.waiting():
                await asyncio.wait({self._flight}, timeout=WAIT_SECONDS)

    def _none(self) -> CallError:
        wait = max(0.0, self._rests_until - self.now()) or None
        if isinstance(self._failure, UpstreamAuth):
            return UpstreamAuth(self._failure.message, retry_after=wait)
        said = self._failure.message if self._failure is not None else "There is no token for the provider yet."
        return UpstreamUnavailable(said, retry_after=wait)

    async def _fetch(self) -> None:
        try:
            grant = await self.fetch()
        except CallError as error:
            self._failed(error)
        except Exception as error:  # noqa: BLE001 - whoever waits for a token is told, whatever went wrong
            log.error("%s: fetching a token failed: %s", self.provider, type(error).__name__)
            self._failed(UpstreamUnavailable("The gateway could not get a token for the provider."))
        else:
            now = self.now()
            self._held = _Held(grant.value, now + grant.lifetime, now + grant.renewed_after())
            self._failure, self._rests_until = None, now + grant.rests()
            self.counted("fetched")
        finally:
            self._flight = None

    def _failed(self, error: CallError) -> None:
        rest: float = REST_SECONDS
        if not isinstance(error, UpstreamAuth):
            # Not beyond the token at hand: without one every call waits for the next try.
            rest = max(SHORT_REST_SECONDS, min(REST_SECONDS, self.left() - SLACK_SECONDS))
        self._failure = error
        self._rests_until = self.now() + rest
        self.counted("failed")
