"""A queue on disk: what is appended survives the process at once, and a power cut once it is synced."""

from __future__ import annotations

import errno
import logging
import os
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import suppress
from itertools import count, islice
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple
from zlib import crc32

from attrs import define, field

from qlens.stores.segments import HEAD, Place, Position, Segment, records

log = logging.getLogger("qlens.spool")

SEGMENT_BYTES = 16 * 1024 * 1024
MOST_BYTES = 1024 * 1024 * 1024
LOOK_BYTES = 64 * 1024
"""After so many bytes it is looked anew what there is room for, on the disk and in memory."""

# Looked up once: they are used for every record.
_head, _HEAD_BYTES, _write = HEAD.pack, HEAD.size, os.write


class SpoolFull(OSError):
    """As much waits in a spool as may."""


class Left(NamedTuple):
    """What waits in a spool."""

    records: int
    bytes: int


@define(eq=False)
class Spool:
    """Records in the order in which they came, in a folder that this process alone owns.

    `append` is for the event loop: it makes one system call and does not wait for the disk. `sync` may be called by any
    thread, `read` and `shipped` by one. The folder must be on a disk of this machine: on network file systems locks may
    not hold.
    """

    place: Place
    """The numbered folder inside the spool's folder: each process has its own."""
    segment_bytes: int
    most_bytes: int
    in_memory: int = 0
    """How many records that are not read yet may be in memory as well, as they were said: they need no parsing."""
    torn: int = field(default=0, init=False)
    """Bytes that were dropped because they are no whole records: the end of what a crash or a full disk cut off."""
    _segments: list[Segment] = field(factory=list, init=False)
    _current: Segment | None = field(default=None, init=False)
    """The one that is appended to."""
    _numbers: Iterator[int] = field(factory=lambda: count(1), init=False)
    _changing: Lock = field(factory=Lock, init=False)
    """Never held over a wait for the disk: the event loop takes it."""
    _syncing: Lock = field(factory=Lock, init=False)
    _gone: list[Segment] = field(factory=list, init=False)
    """Deleted, and their files perhaps still open."""
    _shipped: Position = field(default=(0, 0), init=False)
    _ends: deque[Position] = field(factory=deque, init=False)
    """Where each record ends that was read and is not shipped."""
    _until: int = field(default=0, init=False)
    """How long the current file may be before it is looked anew what there is room for; never too long."""
    _fresh: deque[tuple[Segment, int, object]] | None = field(default=None, init=False, repr=False)
    """Where each record ends that is not read yet, and what it says; None while some of them are in the files alone."""

    # --- opening and closing -------------------------------------------------------------------

    @classmethod
    def open(
        cls, folder: Path, *, segment_bytes: int = SEGMENT_BYTES, most_bytes: int = MOST_BYTES, in_memory: int = 0
    ) -> Spool:
        """Take the first place in a folder that no living process owns, with what was left there; raises OSError.

        The folder is made, the one it stands in is not.
        """
        for number in count():
            spool = cls._at(folder / str(number), segment_bytes, most_bytes, in_memory)
            if spool is not None:
                return spool
        raise AssertionError

    @classmethod
    def orphans(cls, folder: Path) -> list[Spool]:
        """Take all places in a folder whose owners are dead and left records; whoever has shipped them closes each.

        One that cannot be read is left for another time.
        """
        found: list[Spool] = []
        try:
            places = sorted(path for path in folder.iterdir() if path.name.isdecimal() and path.is_dir())
        except FileNotFoundError:
            return found
        for path in places:
            try:
                spool = cls._at(path, SEGMENT_BYTES, MOST_BYTES)
            except OSError as error:
                log.error("spool %s: what a dead process left cannot be read: %s", path, error.strerror)
                continue
            if spool is not None and spool.left.records:
                found.append(spool)
            elif spool is not None:
                spool.close()
        return found

    @classmethod
    def _at(cls, path: Path, segment_bytes: int, most_bytes: int, in_memory: int = 0) -> Spool | None:
        """The spool at a place; None when a living process owns it."""
        place = Place.taken(path)
        if place is None:
            return None
        spool = cls(place, segment_bytes, most_bytes, in_memory)
        try:
            spool._recover()
        except BaseException:
            place.close()
            raise
        return spool

    def close(self) -> None:
        """Let go of the folder. An empty spool leaves nothing behind; the records of another one wait for an owner."""
        for segment in (*self._segments, *self._gone):
            segment.close()
        if self.left.records:
            self.place.close()
            return
        for segment in self._segments:
            segment.delete()
        self.place.remove()

    def _recover(self) -> None:
        """Find what a former owner left."""
        self._shipped = self.place.shipped()
        self.place.drop_new()
        numbers = self.place.numbers()
        for number in numbers:
            segment = Segment(self.place, number)
            if self._whole(segment):
                self._segments.append(segment)
            else:
                segment.delete()
        self._numbers = count(max([self._shipped[0], *numbers]) + 1)
        self._catch_up()
        if self.torn:
            log.warning("spool %s: %d bytes are no whole record and are dropped", self.place, self.torn)

    def _whole(self, segment: Segment) -> bool:
        """Find out how much of a segment is whole and waits; whether there is anything."""
        number, place = self._shipped
        if segment.number < number:
            return False
        size = self.place.size(segment.number)
        start = segment.size = min(place, size) if segment.number == number else 0
        with segment.open() as file:
            for _, segment.size in records(file, start, size):
                segment.shippable += 1
        segment.synced = segment.size
        self.torn += size - segment.size
        return segment.records > 0

    # --- writing -------------------------------------------------------------------------------

    @property
    def left(self) -> Left:
        """How much waits."""
        with self._changing:
            return Left(sum(segment.records for segment in self._segments), self._waiting)

    @property
    def _waiting(self) -> int:
        """How many bytes wait."""
        number, place = self._shipped
        return sum(each.size - (place if each.number == number else 0) for each in self._segments)

    def allow(self, most_bytes: int) -> None:
        """Let as many bytes wait from now on."""
        if most_bytes != self.most_bytes:
            with self._changing:
                self.most_bytes, self._until = most_bytes, 0

    def append(self, record: bytes, said: object = None) -> None:
        """Add a record at the end; raises SpoolFull, or another OSError when the disk does not take it.

        It is in the kernel's hands then: the death of this process does not harm it. An empty record is none. What it
        says in other words is what `read` gives, where it need not be read from a file.
        """
        length = len(record)
        framed = _head(length, crc32(record, length)) + record
        size = length + _HEAD_BYTES
        changing = self._changing
        changing.acquire()  # `with` takes twice as long
        try:
            segment = self._current
            if segment is None or (end := segment.size + size) > self._until:
                segment = self._with_room(size)
                end = segment.size + size
            if _write(segment.file, framed) != size:
                self._undo(segment)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            segment.size = end
            segment.unsynced.append(framed)
            if (fresh := self._fresh) is not None:
                fresh.append((segment, end, said or record))
        finally:
            changing.release()

    def _with_room(self, size: int) -> Segment:
        """The segment to append so many bytes to, and how many more there is room for."""
        allowed = self.most_bytes - self._waiting
        if size > allowed:
            raise SpoolFull(errno.ENOSPC, f"more than {self.most_bytes} bytes would wait")
        segment = self._current
        if segment is None or segment.size + size > self.segment_bytes:
            segment = self._begin()
        self._until = segment.size + max(size, min(allowed, self.segment_bytes - segment.size, LOOK_BYTES))
        if self._fresh is not None and len(self._fresh) > self.in_memory:
            self._fresh = None
        return segment

    def _begin(self) -> Segment:
        """Go on in a new segment."""
        if any(segment.failed for segment in self._segments):
            raise OSError(errno.EIO, "what was written before could not be synced")
        if self.place.is_removed:
            self.place.own_again()
        number = next(self._numbers)
        self._current = Segment(self.place, number, file=self.place.begin(number))
        self._segments.append(self._current)
        return self._current

    def _undo(self, segment: Segment) -> None:
        """Take away the beginning of a record that did not fit."""
        try:
            os.ftruncate(segment.file, segment.size)
        except OSError:
            self._current = None  # what came after it in this file would never be found

    # --- syncing -------------------------------------------------------------------------------

    def sync(self) -> None:
        """Bring to the disk what is not there yet; raises OSError when it cannot, and may then be called again.

        A file whose sync failed is not asked again, because the kernel may have dropped what it could not write and
        then report success: all of it is written to another file, which takes its place.
        """
        with self._syncing:
            with self._changing:
                open_ones = [segment for segment in self._segments if segment.file >= 0]
            for segment in open_ones:
                if segment.failed or not self._synced(segment):
                    self._rewrite(segment)
            self._let_go()

    @property
    def unsynced(self) -> bool:
        """Whether something is not on the disk yet."""
        return any(segment.unsynced for segment in self._segments)

    def _synced(self, segment: Segment) -> bool:
        with self._changing:
            size, records = segment.size, len(segment.unsynced)
        if records:
            try:
                os.fdatasync(segment.file)
                if not segment.synced:
                    self.place.sync()
            except OSError as error:
                log.error("spool: %s could not be synced: %s", segment, error.strerror)
                return False
        with self._changing:
            del segment.unsynced[:records]
            segment.shippable += records
            segment.synced = size
            if segment is not self._current and not segment.unsynced:
                segment.close()
        return True

    def _rewrite(self, segment: Segment) -> None:
        """Write a segment to another file, which then takes its place, with all records where they were."""
        with self._changing:
            segment.failed = True
            if self._current is segment:
                self._current = None
        if not segment.gone:
            try:
                self.place.write_new(segment.content())
                with self._changing:
                    if not segment.gone:
                        self.place.put(segment.number)
                self.place.sync()
            finally:
                self.place.drop_new()
            log.warning("spool: %s was written anew", segment)
        with self._changing:
            segment.close()
            segment.shippable = segment.records
            segment.unsynced, segment.synced, segment.failed = [], segment.size, False

    # --- reading -------------------------------------------------------------------------------

    def read(self, most: int, after: int = 0) -> list[Any]:
        """The next records that are not shipped, at most so many; `after` skips those that were read already.

        Each is as it was appended: its bytes, or, of those in memory, what it says in other words.
        """
        if len(self._ends) > after:
            with self._changing:
                self._fresh = None  # what is read again stands in front of it
            while len(self._ends) > after:
                self._ends.pop()
        if self._fresh is not None and (found := self._read_memory(most)) is not None:
            return found
        number, place = self._ends[-1] if self._ends else self._shipped
        with self._changing:
            segments = [segment for segment in self._segments if segment.number >= number]
        found = []
        for segment in segments:
            found += self._read(segment, place if segment.number == number else 0, most - len(found))
            if len(found) == most:
                break
        self._catch_up()
        return found

    def _read_memory(self, most: int) -> list[Any] | None:
        """The next records, of those in memory; None when some are in the files alone."""
        with self._changing:
            fresh = self._fresh
            if fresh is None:
                return None
            taken = [fresh.popleft() for _ in range(min(most, len(fresh)))]
            segment = self._current
        self._ends += [(segment.number, place) for segment, place, _ in taken]
        found = [said for _, _, said in taken]
        if found and segment is not None and not segment.is_there:
            # Nobody has noticed, since nothing was read from it. What is appended now goes to a file that is there.
            log.error("spool: %s is not what was written", segment)
            with self._changing:
                if self._current is segment:
                    self._current = None
        return found

    def _catch_up(self) -> None:
        """Keep what is appended from now on in memory, if all that is there was read."""
        if not self.in_memory:
            return
        place = self._ends[-1] if self._ends else self._shipped
        with self._changing:
            last = self._segments[-1] if self._segments else None
            if last is None or place == (last.number, last.size):
                self._fresh = deque()

    def _read(self, segment: Segment, start: int, most: int) -> list[bytes]:
        found: list[bytes] = []
        size, place = segment.size, start
        if start == size:
            return found
        with suppress(FileNotFoundError), segment.open() as file:
            for record, place in islice(records(file, start, size), most):
                found.append(record)
                self._ends.append((segment.number, place))
        if len(found) < most and place < size:
            self._damaged(segment, place)
        return found

    def _damaged(self, segment: Segment, place: int) -> None:
        """Do without what is behind a damage that was not there when the records were written."""
        with self._changing:
            if self._current is segment:
                self._current = None
            lost, segment.size = segment.size - place, place
            readable = sum(number == segment.number for number, _ in self._ends)
            segment.shippable = readable - len(segment.unsynced)
            self.torn += lost
        log.error("spool: %s is damaged, %d bytes are lost", segment, lost)

    def shipped(self, count: int) -> None:
        """Do without the first records of those that were read: they are safe elsewhere.

        Files that are through are deleted. After a power cut some records may come again.
        """
        if not count:
            return
        ends = [self._ends.popleft() for _ in range(count)]
        done = Counter(number for number, _ in ends)
        with self._changing:
            self._shipped = ends[-1]
            for segment in self._segments:
                segment.shippable -= done[segment.number]
        self._note()
        self._delete()

    def _note(self) -> None:
        """Keep the position. When that fails, a crash only makes records come again."""
        with suppress(OSError):
            self.place.note_shipped(self._shipped)

    def _delete(self) -> None:
        """Delete the files that are through."""
        with self._changing:
            through = [segment for segment in self._segments if not segment.records and segment is not self._current]
            self._segments = [segment for segment in self._segments if segment not in through]
            for segment in through:
                segment.gone = True
                self._gone.append(segment)
        for segment in through:
            segment.delete()
        if self._syncing.acquire(blocking=False):
            # Else the sync that is under way does it when it no longer uses them.
            self._let_go()
            self._syncing.release()

    def _let_go(self) -> None:
        while self._gone:
            self._gone.pop().close()
