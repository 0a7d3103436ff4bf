"""Keeps an issuer's keys fresh: fetched by one for all, renewed in the background, the old ones kept while it fails."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from attrs import define, field

from qlens_plugins.auth.jwt.keys import Key, KeysUnfit

log = logging.getLogger("qlens.jwt")

REST_SECONDS = 30
"""How long no token makes the gateway ask again, whatever key it names."""
SHORT_REST_SECONDS = 1
"""The same while there never was a key."""
WAIT_SECONDS = 5
"""How long a call waits for keys."""
RETRY_SECONDS = 5
"""How soon the background asks again while there never was a key."""


@define(eq=False)
class Keyring:
    """The keys of one issuer."""

    name: str
    """The plugin instance, for the log."""
    fetch: Callable[[], Awaitable[tuple[Key, ...]]] = field(repr=False)
    """Raises KeysUnfit."""
    now: Callable[[], float] = field(repr=False)
    """Monotonic seconds."""
    changed: Callable[[], None] = field(repr=False)
    """Told when the keys are others than before."""
    counted: Callable[[str], None] = field(repr=False)
    """Told how each fetch ended: fetched or failed."""
    held: tuple[Key, ...] = field(default=(), init=False, repr=False)
    trouble: str = field(default="", init=False)
    """Why the last fetch failed; empty when it did not."""
    _fetched: float = field(default=0.0, init=False)
    _rests_until: float = field(default=float("-inf"), init=False)
    _flight: asyncio.Task[None] | None = field(default=None, init=False, repr=False)

    def find(self, kid: str | None, algorithm: str) -> Key | None:
        """The key for a token; None when it names none that there is, or none at all where there are several."""
        fitting = [key for key in self.held if algorithm in key.algorithms]
        named = [key for key in fitting if kid is not None and key.kid == kid]
        if named:
            return named[0]
        # OpenID Connect Core, 10.1: where there are several keys, a token must name one.
        unnamed = fitting if kid is None else [key for key in fitting if key.kid is None]
        return unnamed[0] if len(unnamed) == 1 else None

    async def renewed(self) -> None:
        """Wait for keys that may have come, unless they were asked for a moment ago."""
        if self.now() >= self._rests_until:
            self.renew()
        if self._flight is not None:
            # Not cancelled with a call that waits: it fetches for all of them.
            await asyncio.wait({self._flight}, timeout=WAIT_SECONDS)

    def renew(self) -> None:
        """Fetch in the background, unless that runs already."""
        if self._flight is None:
            self._flight = asyncio.create_task(self._renew(), name=f"keys of {self.name}")

    async def follow(self, seconds: float) -> None:
        """Fetch every so many seconds, for ever."""
        while True:
            await asyncio.sleep(seconds if self.held else min(RETRY_SECONDS, seconds))
            self.renew()

    def take(self, keys: tuple[Key, ...]) -> None:
        """Use these keys from now on."""
        if self.trouble:
            log.info("%s: the keys can be fetched again", self.name)
        self._fetched, self.trouble = self.now(), ""
        if keys != self.held:
            self.held = keys
            self.changed()
        self.counted("fetched")

    def take_over(self, old: Keyring) -> None:
        """Start with the keys of another configuration of the same issuer."""
        self.held, self.trouble = old.held, old.trouble
        self._fetched, self._rests_until = old._fetched, old._rests_until

    def state(self) -> str:
        """How things are, for operators."""
        if not self.held:
            return f"no key yet: {self.trouble or 'they are being fetched'}"
        told = f"{len(self.held)} keys, {max(0.0, self.now() - self._fetched):.0f} s old"
        return f"{told}; {self.trouble}" if self.trouble else told

    async def aclose(self) -> None:
        """Stop fetching."""
        if self._flight is not None:
            self._flight.cancel()
            await asyncio.wait({self._flight})

    async def _renew(self) -> None:
        try:
            keys = await self.fetch()
        except KeysUnfit as unfit:
            self._failed(str(unfit))
        except Exception as error:  # noqa: BLE001 - who waits for keys is told, whatever went wrong
            self._failed(f"fetching failed: {type(error).__name__}")
        else:
            self.take(keys)
        finally:
            self._rests_until = self.now() + (REST_SECONDS if self.held else SHORT_REST_SECONDS)
            self._flight = None

    def _failed(self, trouble: str) -> None:
        if trouble != self.trouble:
            log.error("%s: %s: %s", self.name, "the keys stay as they are" if self.held else "no keys", trouble)
        self.trouble = trouble
        self.counted("failed")
