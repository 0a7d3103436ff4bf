"""AWS's credential chain, gone through in the background: a call takes the access key that is there."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from threading import Thread
from typing import Any, TypeVar, cast

from attrs import define, field

from qlens import Health, StartupError
from qlens_plugins.provider.bedrock.signing import Keys

log = logging.getLogger("qlens.bedrock")

REFRESH_SECONDS = 15 * 60
"""How long before its end an access key is renewed."""
AGAIN_SECONDS = 5
"""How soon after a look another one may follow, however many calls want it."""

T = TypeVar("T")


@define(eq=False)
class Chain:
    """Holds the access key that AWS's chain gives, and asks for a fresh one long before the present one expires.

    A call takes what is there and never waits. AWS's SDK blocks now and then (it imports, reads files and compiles its
    models), so it runs in a thread with an event loop of its own.
    """

    find: Callable[[], Awaitable[Any]] = field(repr=False)
    """Goes through the chain; the SDK's credentials object, or None when it finds nothing."""
    look_seconds: float = 30.0
    """How often it is looked whether the access key is due."""
    keys: Keys | None = field(init=False, default=None, repr=False)
    fault: str = field(init=False, default="AWS's credential chain was not asked yet")
    looked: asyncio.Event = field(init=False, factory=asyncio.Event)
    """Set once the chain was gone through for the first time."""
    _found: Any = field(init=False, default=None, repr=False)
    _looked_at: float = field(init=False, default=-math.inf, repr=False)
    _looking: asyncio.Lock = field(init=False, factory=asyncio.Lock, repr=False)

    async def watch(self) -> None:
        """Keep the access key fresh until cancelled; raises StartupError when the SDK is not there."""
        while True:
            async with self._looking:
                if self._is_due():
                    await self._look()
            self.looked.set()
            await asyncio.sleep(self.look_seconds)

    async def renew(self) -> bool:
        """Go through the whole chain again, unless that has just been done; True when there is another access key."""
        before, asked_at = self.keys, asyncio.get_running_loop().time()
        async with self._looking:
            if self._looked_at + AGAIN_SECONDS < asked_at:
                self._found = None
                await self._look()
        return self.keys is not None and self.keys != before

    def health(self) -> Health:
        """Whether the last look at the chain gave an access key."""
        return Health(not self.fault, self.fault or "AWS credentials are there")

    def _is_due(self) -> bool:
        if self._found is None or self.keys is None:
            return True
        # Keys that do not expire have nothing to refresh.
        needed = getattr(self._found, "refresh_needed", None)
        return needed is not None and bool(needed(REFRESH_SECONDS))

    async def _look(self) -> None:
        try:
            self._found, keys = await apart(partial(_fetched, self._found, self.find))
        except StartupError:
            raise
        except Exception as error:  # noqa: BLE001 - the SDK's many sources raise what they like
            self._found = None
            self._failed(f"AWS's credential chain fails: {type(error).__name__}")
            return
        finally:
            self._looked_at = asyncio.get_running_loop().time()
        if keys is None:
            self._failed("AWS's credential chain finds no credentials")
            return
        self.keys, self.fault = keys, ""

    def _failed(self, fault: str) -> None:
        # The key in hand may still be good.
        if fault != self.fault:
            log.warning("%s", fault)
        self.fault = fault


# --- a thread of its own -----------------------------------------------------------------------


async def apart(work: Callable[[], T]) -> T:
    """Run something that blocks in a thread; one that hangs does not hold up the end of the process."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def finish(result: T | None, error: Exception | None) -> None:
        if done.done():
            return  # nobody waits any more
        if error is not None:
            done.set_exception(error)
        else:
            done.set_result(cast(T, result))

    def run() -> None:
        result, error = None, None
        try:
            result = work()
        except Exception as raised:  # noqa: BLE001 - raised again by the one who waits
            error = raised
        with suppress(RuntimeError):  # the loop is closed: the process ends
            loop.call_soon_threadsafe(finish, result, error)

    Thread(target=run, name="AWS credentials", daemon=True).start()
    return await done


def _fetched(found: Any, find: Callable[[], Awaitable[Any]]) -> tuple[Any, Keys | None]:
    async def fetch() -> tuple[Any, Keys | None]:
        source = found if found is not None else await find()
        if source is None:
            return None, None
        frozen = await source.get_frozen_credentials()
        return source, Keys(frozen.access_key, frozen.secret_key, frozen.token or None)

    return asyncio.run(fetch())
