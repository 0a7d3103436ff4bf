"""The keys that a process knows: all of them, in memory, following the database from moment to moment."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from attrs import define, field, frozen

from qlens import Caller, Unavailable
from qlens_plugins.auth.credentials import masked, refused
from qlens_plugins.auth.key_store.records import Key, Tenant, limits_together, models_within
from qlens_plugins.auth.key_store.store import Changes, Store, StoreAway
from qlens_plugins.auth.key_store.telling import Teller

log = logging.getLogger("qlens.key_store")

LOOK_SECONDS = 0.1
"""How often the database is looked at when unknown keys come in, however many."""
UNKNOWN_SECONDS = 5.0
"""How long an unknown key is remembered as such."""
MOST_UNKNOWN = 10_000
TAKEN_AT_ONCE = 500
"""How many keys are taken over without letting calls go on."""
ANSWER_SECONDS = 2.0
"""How long the database may take to answer what is asked all the time."""
PATIENCE_SECONDS = 2.0
"""How long a start waits for a database that is busy; then it serves without."""

ASK = "Ask the operator of this gateway for"


@frozen
class Held:
    """A hash of a key, as calls meet it."""

    key: Key
    caller: Caller | None
    """None: it is refused whenever it comes."""
    until: float | None
    """Unix seconds."""
    endless: Caller | None = None
    """The caller once more, of a key that has no end."""


@define(eq=False)
class Keyring:
    """Knows callers by the hashes of their keys.

    All keys are in memory, and what changes is read every `poll_seconds`: one number as long as nothing does. A key
    that is not known makes it look at once, so that a new one works everywhere; unknown keys share those looks, of
    which there are ten a second at most. While the database is away, keys go on working for `outage_seconds`.

    Shared by the instances that follow each other over reloads; it ends with the last that opened it.
    """

    store: Store
    teller: Teller
    hashed: Callable[[str], bytes]
    name: str
    poll_seconds: float
    outage_seconds: float
    trouble: str = field(default="", init=False)
    """Why the database cannot be followed at present."""
    closed: bool = field(default=False, init=False)
    _users: int = field(default=0, init=False)
    _change: int | None = field(default=None, init=False)
    """The last change that is known; None: nothing is."""
    _known: dict[bytes, Key] = field(factory=dict, init=False, repr=False)
    """By hash, the one before a rotation included."""
    _hashes: dict[str, tuple[bytes, ...]] = field(factory=dict, init=False, repr=False)
    """By id."""
    held: dict[bytes, Held] = field(factory=dict, init=False, repr=False)
    """What calls have met, by hash: made of a key and its tenant when it is first asked for."""
    _tenants: dict[str, Tenant] = field(factory=dict, init=False, repr=False)
    _unknown: dict[bytes, float] = field(factory=dict, init=False, repr=False)
    """Hashes of unknown keys, and until when they are remembered; the oldest first."""
    _fresh: float = field(default=0.0, init=False)
    """When the database was last in hand, in monotonic seconds."""
    stale: float = field(default=0.0, init=False)
    """From when on nothing that is known counts, in monotonic seconds."""
    _turn: asyncio.Lock = field(factory=asyncio.Lock, init=False)
    _next: asyncio.Task[None] | None = field(default=None, init=False)
    """The look that has not begun: who joins it sees all that is there now."""
    _looked: float = field(default=0.0, init=False)
    _polling: asyncio.Task[None] | None = field(default=None, init=False)

    # --- its life ------------------------------------------------------------------------------

    async def open(self) -> None:
        """Begin to follow the database, or join those for whom it does; raises StartupError when it is unusable."""
        self._users += 1
        if self._users > 1:
            return
        try:
            await self._begin()
        except BaseException:
            self._users, self.closed = 0, True
            await self.store.close()
            raise
        self._polling = asyncio.create_task(self._poll(), name=f"{self.name}: follow the database")

    async def _begin(self) -> None:
        """Know the keys before anyone is served; another gateway that makes the tables is waited for a while."""
        try:
            await self.store.open()
        except StoreAway as error:
            self._lost(error)
        ends = time.monotonic() + PATIENCE_SECONDS
        await self.look()
        while self.trouble and time.monotonic() < ends:
            await asyncio.sleep(LOOK_SECONDS)
            await self.look()

    async def close(self) -> None:
        """Leave; the last to leave ends it."""
        self._users -= 1
        if self._users:
            return
        self.closed = True
        tasks = [task for task in (self._polling, self._next) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.teller.close()
        async with self._turn:
            await self.store.close()

    async def _poll(self) -> None:
        while True:
            await asyncio.sleep(self.poll_seconds)
            await self.look()

    # --- what calls ask ------------------------------------------------------------------------

    async def find(self, digest: bytes, credential: str) -> Held:
        """What a key is, which calls have not met yet, or not since it changed; it may be new to the database.

        Raises Unauthenticated for one that there is not, Unavailable when nobody knows.
        """
        held = self._met(digest)
        if held is None and self._unknown.get(digest, 0.0) <= time.monotonic():
            await self._soon()
            held = self._met(digest)
            if held is None and self.trouble:
                raise away()
            if held is None:
                self._remember(digest)
        if held is None:
            raise refused(f"Incorrect API key provided: {masked(credential)}. {ASK} a key.")
        return held

    def caller(self, held: Held, monotonic: float, now: float) -> Caller:
        """The caller that a key stands for; raises Unauthenticated, or Unavailable when nobody may count on it."""
        if monotonic > self.stale:
            raise away()
        if held.caller is None:
            raise refused(self._reason(held.key))
        if held.until is not None and held.until <= now:
            raise refused(f"This API key ({held.key.id}) has expired. {ASK} a new one.")
        return held.caller

    def _met(self, digest: bytes) -> Held | None:
        key = self._known.get(digest)
        if key is None:
            return None
        held = self.held[digest] = self._hold(key, digest)
        return held

    def _remember(self, digest: bytes) -> None:
        self._unknown.pop(digest, None)
        if len(self._unknown) >= MOST_UNKNOWN:
            del self._unknown[next(iter(self._unknown))]
        self._unknown[digest] = time.monotonic() + UNKNOWN_SECONDS

    def _hold(self, key: Key, digest: bytes) -> Held:
        tenant = self._tenants.get(key.tenant)
        if key.revoked_at is not None or (tenant is not None and tenant.disabled):
            return Held(key, None, None)
        ends = [key.expires_at, key.old_until if digest != key.hash else None]
        until = min((end for end in ends if end is not None), default=None)
        caller = Caller(
            tenant=key.tenant,
            subject=key.subject,
            by=self.name,
            project=key.project,
            key_id=key.id,
            roles=frozenset(key.roles),
            models=models_within(key.models, tenant.models if tenant else None),
            tags=key.tags,
            expires_at=until,
            allowance=limits_together(key.limits, tenant.limits if tenant else None),
        )
        return Held(key, caller, until, caller if until is None else None)

    @staticmethod
    def _reason(key: Key) -> str:
        if key.revoked_at is not None:
            return f"This API key ({key.id}) was revoked. {ASK} a new one."
        return f"The tenant of this API key ({key.id}) is disabled. {ASK} help."

    @property
    def size(self) -> int:
        """How many keys are known."""
        return len(self._hashes)

    def tenant(self, name: str) -> Tenant | None:
        """What is known of a tenant."""
        return self._tenants.get(name)

    # --- following -----------------------------------------------------------------------------

    async def _soon(self) -> None:
        """See what is in the database now, together with all who ask for that within a moment."""
        if self._next is None or self._next.done():
            self._next = asyncio.create_task(self._when_due(), name=f"{self.name}: look for a key")
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                await asyncio.shield(self._next)
        except TimeoutError:
            raise away() from None

    async def _when_due(self) -> None:
        await asyncio.sleep(max(0.0, self._looked + LOOK_SECONDS - time.monotonic()))
        async with self._turn:
            self._next = None  # who comes from now on may ask for what is written from now on
            await self._look()

    async def look(self) -> None:
        """See what is in the database now; when it is away, say so in `trouble` and keep what is known."""
        async with self._turn:
            await self._look()

    async def _look(self) -> None:
        self._looked = time.monotonic()
        try:
            changes = await self.store.changes(self._change)
            await self._take(changes)
        except Exception as error:  # noqa: BLE001 - whatever it is, revoked keys must be heard of when it has passed
            self._lost(error)
            return
        self._fresh = self._looked
        # It is no outage yet when the next look comes late.
        self.stale = self._looked + self.poll_seconds + ANSWER_SECONDS + self.outage_seconds
        if self.trouble:
            log.warning("%s: the database is back, %d keys are known", self.name, self.size)
        self.trouble = ""
        self.teller.look(changes.untold)

    async def _take(self, changes: Changes) -> None:
        known, hashes = ({}, {}) if changes.whole else (self._known, self._hashes)
        for place, key in enumerate(changes.keys, 1):
            for digest in hashes.pop(key.id, ()):
                known.pop(digest, None)
                self.held.pop(digest, None)
            hashes[key.id] = digests = (key.hash,) if key.old_hash is None else (key.hash, key.old_hash)
            for digest in digests:
                known[digest] = key
                self._unknown.pop(digest, None)
            if not place % TAKEN_AT_ONCE:
                await asyncio.sleep(0)  # calls go on meanwhile, with what was known
        if changes.whole:
            self._known, self._hashes, self.held, self._tenants = known, hashes, {}, {}
        for tenant in changes.tenants:
            self._tenants[tenant.name] = tenant
            if tenant.deleted_at is not None:
                del self._tenants[tenant.name]
        if changes.tenants:
            self.held.clear()
        self._change = changes.upto

    def _lost(self, error: Exception) -> None:
        if not self.trouble:
            log.error("%s: the database cannot be asked: %s", self.name, self._said(error))
        self.trouble = self._said(error)
        self._change = None  # it may come back as another one

    @staticmethod
    def _said(error: Exception) -> str:
        return str(error) if isinstance(error, StoreAway) else f"{type(error).__name__} over what is in it"

    def state(self) -> str:
        """How it is, in words."""
        if not self.trouble:
            return f"{self.size} keys"
        gone = time.monotonic() - self._fresh if self._fresh else 0.0
        left = max(0.0, self.stale - time.monotonic())
        return f"database away for {gone:.0f} s: {self.trouble}; {self.size} keys go on working for {left:.0f} s"


def away() -> Unavailable:
    """The answer while the database cannot be asked; why stands in the log."""
    return Unavailable(
        "The database of keys cannot be asked at present. Please try again later.",
        code="key_store_unavailable",
        retry_after=1.0,
    )
