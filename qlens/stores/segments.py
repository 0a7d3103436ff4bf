"""The files of a spool: a folder with its lock, records with their length and checksum, a note of what is shipped."""

from __future__ import annotations

import fcntl
import io
import os
import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO
from zlib import crc32

from attrs import define, field

HEAD = struct.Struct("<II")
"""In front of each record: its length and its CRC32, which begins with the length."""
SUFFIX = ".log"
_POSITION = struct.Struct("<QQI")
"""Number of a segment, place in it, CRC32 of both."""
_SHIPPED, _LOCK, _NEW = "shipped", "lock", "new"

Position = tuple[int, int]
"""Number of a segment and place in it."""


@define(eq=False)
class Place:
    """A folder that this process alone owns, by a lock on a file in it. It may be moved meanwhile."""

    path: Path
    _folder: int
    _lock: int

    @classmethod
    def taken(cls, path: Path) -> Place | None:
        """Own a folder, which is made where there is none; None when a living process owns it."""
        while True:
            _make(path.parent)
            # An owner who leaves may remove both at any moment: then they are made again.
            with suppress(FileNotFoundError):
                _make(path)
                folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
                try:
                    return cls._locked(path, folder)
                except BaseException:
                    os.close(folder)
                    raise

    @classmethod
    def _locked(cls, path: Path, folder: int) -> Place | None:
        lock = os.open(_LOCK, os.O_RDWR | os.O_CREAT, 0o600, dir_fd=folder)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_ours = os.path.samestat(os.fstat(lock), os.stat(path / _LOCK))
        except BlockingIOError:
            os.close(lock)
            os.close(folder)
            return None
        except BaseException:
            os.close(lock)
            raise
        if is_ours:
            return cls(path, folder, lock)
        os.close(lock)
        raise FileNotFoundError("it was removed meanwhile")

    def __str__(self) -> str:
        return str(self.path)

    @property
    def is_removed(self) -> bool:
        """Whether somebody has removed it."""
        return os.fstat(self._folder).st_nlink == 0

    def own_again(self) -> None:
        """Make it anew after somebody has removed it; raises OSError."""
        other = Place.taken(self.path)
        if other is None:
            raise BlockingIOError("another process has taken its place")
        self.close()
        self._folder, self._lock = other._folder, other._lock

    def close(self) -> None:
        """Leave it to the next owner."""
        os.close(self._lock)
        os.close(self._folder)

    def remove(self) -> None:
        """Remove it when nothing is in it; it is left all the same."""
        with suppress(OSError):
            os.unlink(_SHIPPED, dir_fd=self._folder)
        with suppress(OSError):
            # Last: from here on the place may be somebody else's.
            os.unlink(_LOCK, dir_fd=self._folder)
            self.path.rmdir()
            self.path.parent.rmdir()  # unless other processes have places in it
        self.close()

    # --- files ---------------------------------------------------------------------------------

    def numbers(self) -> list[int]:
        """The numbers of the segments, in order."""
        names = [name.removesuffix(SUFFIX) for name in os.listdir(self._folder) if name.endswith(SUFFIX)]
        return sorted(int(name) for name in names if name.isdecimal() and name.isascii() and len(name) < 20)

    def size(self, number: int) -> int:
        """How long a segment is."""
        return os.stat(_name(number), dir_fd=self._folder).st_size

    def begin(self, number: int) -> int:
        """Make a segment, and open it to append to it."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND
        return os.open(_name(number), flags, 0o600, dir_fd=self._folder)

    def open(self, number: int) -> BinaryIO:
        """Open a segment to read it."""
        return os.fdopen(os.open(_name(number), os.O_RDONLY, dir_fd=self._folder), "rb")

    def delete(self, number: int) -> None:
        """Delete a segment."""
        os.unlink(_name(number), dir_fd=self._folder)

    def write_new(self, content: bytes) -> None:
        """Write a file and bring it to the disk, to `put` it in a segment's place."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        with os.fdopen(os.open(_NEW, flags, 0o600, dir_fd=self._folder), "wb") as file:
            file.write(content)
            file.flush()
            os.fdatasync(file.fileno())

    def put(self, number: int) -> None:
        """Put the new file in a segment's place."""
        os.replace(_NEW, _name(number), src_dir_fd=self._folder, dst_dir_fd=self._folder)

    def drop_new(self) -> None:
        """Do without the new file, if there is one."""
        with suppress(FileNotFoundError):
            os.unlink(_NEW, dir_fd=self._folder)

    def sync(self) -> None:
        """Bring the names of new files to the disk."""
        os.fsync(self._folder)

    def shipped(self) -> Position:
        """Up to where all was shipped, as a former owner noted it; the beginning when that cannot be read."""
        try:
            file = os.open(_SHIPPED, os.O_RDONLY, dir_fd=self._folder)
        except OSError:
            return 0, 0
        try:
            number, place, check = _POSITION.unpack(os.read(file, _POSITION.size))
        except (OSError, struct.error):
            return 0, 0
        finally:
            os.close(file)
        return (number, place) if check == _sum_of(number, place) else (0, 0)

    def note_shipped(self, position: Position) -> None:
        """Note up to where all is shipped; raises OSError."""
        file = os.open(_SHIPPED, os.O_WRONLY | os.O_CREAT, 0o600, dir_fd=self._folder)
        try:
            os.write(file, _POSITION.pack(*position, _sum_of(*position)))
        finally:
            os.close(file)


@define(eq=False)
class Segment:
    """A file of records. Only the process that made it appends to it."""

    place: Place
    number: int
    size: int = 0
    """Up to here there are whole records."""
    shippable: int = 0
    """How many of those that were synced are not shipped; below 0 when others are shipped before they are synced."""
    synced: int = 0
    file: int = -1
    """Open for writing, until all of it is synced."""
    unsynced: list[bytes] = field(factory=list, repr=False)
    """Once a sync has failed, nobody knows what of it is on the disk, nor what in the kernel's memory."""
    failed: bool = False
    """Whether a sync has failed, and what was not synced is not in another file yet."""
    gone: bool = False

    def __str__(self) -> str:
        return f"{self.place}/{_name(self.number)}"

    @property
    def records(self) -> int:
        """How many records are not shipped."""
        return self.shippable + len(self.unsynced)

    @property
    def is_there(self) -> bool:
        """Whether the file has all that was written to it, by its length."""
        size = self.size  # first: it grows meanwhile
        try:
            return self.place.size(self.number) >= size
        except OSError:
            return False

    def open(self) -> BinaryIO:
        """Open it to read it."""
        return io.BytesIO(self.content()) if self.failed else self.place.open(self.number)

    def content(self) -> bytes:
        """All of it, without believing what was not synced."""
        with self.place.open(self.number) as file:
            return file.read(self.synced) + b"".join(self.unsynced)

    def delete(self) -> None:
        """Delete the file, if it is there."""
        with suppress(OSError):
            self.place.delete(self.number)

    def close(self) -> None:
        """Write no more to it."""
        if self.file >= 0:
            os.close(self.file)
            self.file = -1


def records(file: BinaryIO, place: int, end: int) -> Iterator[tuple[bytes, int]]:
    """The whole records between two places of a file, each with the place where it ends, up to the first damage."""
    read, unpack, size = file.read, HEAD.unpack, HEAD.size
    file.seek(place)
    while place + size < end:
        head = read(size)
        if len(head) < size:
            return
        length, check = unpack(head)
        place += size + length
        # No length is damage too: files end in zeros after some power cuts.
        if not length or place > end:
            return
        record = read(length)
        if crc32(record, length) != check:
            return
        yield record, place


def _name(number: int) -> str:
    return f"{number:08}{SUFFIX}"


def _make(folder: Path) -> None:
    with suppress(FileExistsError):
        os.mkdir(folder, 0o700)


def _sum_of(number: int, place: int) -> int:
    return crc32(b"%d %d" % (number, place))
