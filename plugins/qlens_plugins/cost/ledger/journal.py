"""What the ledger knows of calls and its database does not yet: on disk, and in memory while the disk takes nothing."""

from __future__ import annotations

import errno
import logging
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from attrs import define, field

from qlens import Spool, SpoolSync, StartupError
from qlens_plugins.cost.ledger import records
from qlens_plugins.cost.ledger.records import Record, Said
from qlens_plugins.cost.ledger.rows import Row
from qlens_plugins.cost.ledger.source import Source

log = logging.getLogger("qlens.ledger")

MOST_BYTES = 1024 * 1024 * 1024
IN_MEMORY = 10_000
"""How many records the thread need not read from the disk, at some 700 bytes each: more wait while it cannot write."""
RETRY_SECONDS = 1.0
"""Between two tries to open a spool, and how long it must have taken all to be called well again."""
SYNC_SECONDS = 5.0
"""How long the last sync is waited for."""

# These mean that the path is wrong, and that waiting will not mend it.
_HOPELESS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG}


@define(eq=False)
class Journal:
    """Takes records from the event loop without waiting, and gives rows to the thread that writes them."""

    folder: Path
    lost: Callable[[float], object]
    """Called with how many receipts could not be understood."""
    most_bytes: int = MOST_BYTES
    """How many may wait on the disk."""
    tells: bool = False
    """Whether what dead processes left untold is kept until it is `told`."""
    _spool: Spool | None = field(default=None, init=False)
    _syncing: SpoolSync | None = field(default=None, init=False)
    _sources: list[Source] = field(factory=list, init=False)
    """What dead processes left, and then the own one."""
    _problem: str | None = field(default=None, init=False)
    _refusal: float = field(default=0.0, init=False)
    """When the disk took nothing last, in monotonic seconds: one that is nearly full takes now this and now that."""
    _memory: deque[bytes] = field(factory=deque, init=False)
    _in_hand: list[bytes] = field(factory=list, init=False)
    """Those of the memory that are being written to the database."""
    fresh: int = field(default=0, init=False)
    """How many receipts came since the thread last looked; it may look too high for a moment, never too low."""
    has_more: bool = field(default=False, init=False)
    """Whether the last look found as much as was asked for."""
    is_stuck: bool = field(default=False, init=False)
    """Whether something could not be read."""
    _given: int = field(default=0, init=False)
    _stored: int = field(default=0, init=False)
    _taken: int = field(default=0, init=False)
    """Of the receipts that were given: how many will be in the database when what was taken last is."""
    _tried: float = field(default=0.0, init=False)
    """When the spool was last tried to be opened, in monotonic seconds."""

    # --- on the event loop ---------------------------------------------------------------------

    def note(self, record: bytes, said: Said | None = None, receipts: int = 0) -> bool:
        """Put a record, which says this and is so many receipts, on the disk; False when that takes nothing."""
        syncing = self._syncing
        if syncing is None:
            return False
        try:
            syncing.spool.append(record, said)
        except OSError as error:
            self._refused(error)
            return False
        if receipts:
            self._given += receipts
            self.fresh += receipts
        if syncing.asleep:
            syncing.wake()
        if self._problem is not None and time.monotonic() > self._refusal + RETRY_SECONDS:
            self._recovered()
        return True

    def remember(self, record: bytes) -> None:
        """Keep a receipt in memory, because the disk has not taken it."""
        self._memory.append(record)
        self._given += 1
        self.fresh += 1

    def void(self, record: bytes) -> None:
        """Take a record back by another one, which is no receipt: it waits until there is something to write."""
        if not self.note(record):
            self._memory.append(record)

    async def synced(self) -> None:
        """Wait until what was noted so far is on the disk; raises OSError."""
        if self._syncing is not None:
            await self._syncing.synced()

    @property
    def problem(self) -> str | None:
        """Why the disk takes nothing at present, or cannot be trusted."""
        failed = None if self._syncing is None else self._syncing.problem
        return self._problem or (None if failed is None else failed.strerror)

    @property
    def waiting(self) -> int:
        """How many receipts are not in the database, with all records that dead processes left."""
        return self._given - self._stored + self.left_behind

    @property
    def in_memory(self) -> int:
        """How many records are in memory alone."""
        return len(self._memory) + len(self._in_hand)

    @property
    def left_behind(self) -> int:
        """How many records of dead processes may be of receipts that are not in the database."""
        # Of a copy: the thread takes sources away meanwhile, and then the one behind would be passed over.
        return sum(source.left for source in tuple(self._sources) if source.is_former and not source.is_written)

    @property
    def has_news(self) -> bool:
        """Whether something that dead processes left is in the database and not told."""
        return any(source.untold for source in self._sources)

    # --- on the thread -------------------------------------------------------------------------

    def open(self) -> None:
        """Open the spool, and take what dead processes left; raises StartupError when the folder cannot be used."""
        self._tried = time.monotonic()
        try:
            self.take_over()
            spool = Spool.open(self.folder, most_bytes=self.most_bytes, in_memory=IN_MEMORY)
            while spool.left.records:  # of one who died this moment
                self._sources.append(self._former(spool))
                spool = Spool.open(self.folder, most_bytes=self.most_bytes, in_memory=IN_MEMORY)
        except OSError as error:
            self._refused(error)
            if error.errno not in _HOPELESS:
                return
            raise StartupError(
                f"ledger: the spool {self.folder} cannot be used: {error.strerror}; make it and its folder writable, "
                "or name another one in `spool`"
            ) from error
        self._sources.append(Source(spool, self.lost))
        syncing = SpoolSync(spool)
        syncing.start()
        self._spool, self._syncing = spool, syncing

    def take_over(self) -> None:
        """Take what processes left that are dead by now; raises OSError."""
        # In front: the last one is the own.
        self._sources[:0] = [self._former(spool) for spool in Spool.orphans(self.folder)]

    def _former(self, spool: Spool) -> Source:
        return Source(spool, self.lost, is_former=True, tells=self.tells)

    def take(self, most: int) -> list[Row]:
        """The next rows, at most so many; they stay where they are until `done`."""
        if self._spool is not None:
            self._spool.allow(self.most_bytes)
        elif time.monotonic() > self._tried + RETRY_SECONDS:
            self._open_late()
        # Before it looks: what comes meanwhile is looked for once more.
        given, self.fresh, self.is_stuck = self._given, 0, False
        found = self._of_memory(most)
        own = len(found)
        for source in self._sources:
            rows = self._read(source, most - len(found))
            found += rows
            own += 0 if source.is_former else len(rows)
        self.has_more = len(found) >= most or self.is_stuck
        self._taken = self._stored + own if self.has_more else given
        return found

    def _read(self, source: Source, most: int) -> list[Row]:
        try:
            return source.take(most)
        except OSError as error:
            self._refused(error)
            self.is_stuck = True
            return []

    def _open_late(self) -> None:
        try:
            self.open()
        except StartupError as error:
            self._problem = str(error)

    def _of_memory(self, most: int) -> list[Row]:
        found: list[Row] = []
        while self._memory and len(self._in_hand) < most:
            # Counted before it leaves: at no moment does it look emptier than it is.
            self._in_hand.append(self._memory[0])
            found += self._understood(self._memory.popleft())
        return found

    def _understood(self, data: bytes) -> list[Row]:
        try:
            record = records.read(data)
            if self._spool is not None:
                self._sources[-1].over(record.id)
            return [] if record.is_void else [record.row]
        except Exception:
            log.exception("ledger: a receipt cannot be understood and is lost: %r", data)
            self.lost(1)
            return []

    def done(self) -> None:
        """Let go of what was taken: it is in the database."""
        self._in_hand, self._stored = [], self._taken
        for source in self._sources:
            source.done()
        self._leave()

    @property
    def untold(self) -> list[Record]:
        """What dead processes have perhaps not told, of what is in the database."""
        return [record for source in self._sources for record in source.untold]

    def told(self) -> None:
        """Let go of what was `untold`."""
        for source in self._sources:
            source.told()
        self._leave()

    def _leave(self) -> None:
        """Leave the places of dead processes that have nothing more."""
        for source in tuple(self._sources):
            if source.is_former and not source.left:
                self._sources.remove(source)
                source.spool.close()

    def close(self) -> int:
        """Bring to the disk what is only in memory; returns how many records that does not take."""
        lost = sum(not self.note(record) for record in (*self._in_hand, *self._memory))
        if self._syncing is not None:
            self._syncing.stop(SYNC_SECONDS)
        for source in self._sources:
            source.spool.close()
        return lost

    def _refused(self, error: OSError) -> None:
        if self._problem is None:
            log.warning("ledger: the spool %s cannot be used, receipts stay in memory: %s", self.folder, error.strerror)
        self._problem, self._refusal = error.strerror, time.monotonic()

    def _recovered(self) -> None:
        log.warning("ledger: the spool %s can be used again", self.folder)
        self._problem = None
