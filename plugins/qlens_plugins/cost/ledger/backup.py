"""A ledger as a file of JSON lines, whatever database it is in, and back from one.

In it are the receipts, the counts of refused calls, and what roll-ups say of receipts that were deleted.
"""

from __future__ import annotations

import math
import os
import sqlite3
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from hashlib import sha256
from itertools import count, islice
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

import orjson
from attrs import asdict, define, frozen

from qlens import StartupError
from qlens_plugins.cost.ledger import checks, unwritten
from qlens_plugins.cost.ledger.checks import KEY
from qlens_plugins.cost.ledger.rests import kept_since_ns, rests
from qlens_plugins.cost.ledger.rollups import GROUPED
from qlens_plugins.cost.ledger.rows import COLUMNS, Rejection, Row
from qlens_plugins.cost.ledger.sqlite.reading import SqliteDatabase
from qlens_plugins.cost.ledger.sqlite.schema import connect_to_read
from qlens_plugins.cost.ledger.store import Batch, Database, Rest, Store

FORMAT = 2
FORMATS = (1, 2)
"""Those that it reads. The first had no roll-ups."""
AT_ONCE = 1000
"""Receipts that are read, or written in one transaction."""
SQLITE_MAGIC = b"SQLite format 3\0"
_END_BYTES = 4096
"""Longer than the last line of any backup."""
_STATE = """
SELECT (SELECT count(*) FROM (SELECT 1 FROM receipts UNION ALL SELECT 1 FROM rejections
                              UNION ALL SELECT 1 FROM usage_groups LIMIT 1) AS found),
       (SELECT count(*) FROM writers WHERE id = ?), (SELECT count(*) FROM writers WHERE id <> ?)
"""


@define
class Counts:
    """What a backup has."""

    receipts: int = 0
    rejections: int = 0
    """Rows with counts of refused calls."""
    rests: int = 0
    """Roll-ups of receipts that are deleted."""

    def add(self, batch: Batch) -> None:
        """Count what is in a batch."""
        self.receipts += len(batch.receipts)
        self.rejections += len(batch.rejections)
        self.rests += len(batch.rests)

    def __str__(self) -> str:
        rests = f", and {self.rests} roll-ups of receipts that are deleted," if self.rests else ""
        return f"{self.receipts} receipts and {self.rejections} counts of refused calls{rests}"


def batches(database: Database) -> Iterator[Batch]:
    """All receipts, the oldest first, the counts of refused calls, and at last what else is in the roll-ups."""
    sql = (
        f"SELECT {', '.join(COLUMNS)} FROM receipts "  # noqa: S608 - only names from the code
        "WHERE wall_ns >= ? AND (wall_ns > ? OR id > ?) ORDER BY wall_ns, id LIMIT ?"
    )
    wall_ns, last_id = -(2**63), ""
    for number in count(1):
        found = database.rows(sql, [wall_ns, wall_ns, last_id, AT_ONCE])
        if not found:
            break
        yield Batch(number, list(map(_row, found)), {})
        last_id, wall_ns = found[-1][:2]
    counts = database.rows(f"SELECT {', '.join(KEY)}, calls FROM rejections")  # noqa: S608 - only names from the code
    yield Batch(number, (), {checks.key(row): row[-1] for row in counts}, kept_since_ns=kept_since_ns(database))
    left = rests(database)
    while found_rests := list(islice(left, AT_ONCE)):
        number += 1
        yield Batch(number, (), {}, found_rests)


_STREAMED = COLUMNS.index("streamed")


def _row(found: Sequence[Any]) -> Row:
    return (*found[:_STREAMED], checks.flag(found[_STREAMED]), *found[_STREAMED + 1 :])


# --- to a file ---------------------------------------------------------------------------------


def write(database: Database, path: Path) -> Counts:
    """Write a backup; the file is there when it is whole."""
    counts, digest = Counts(), sha256()
    with _whole(path) as file:
        file.write(_line({"qlens_ledger": FORMAT, "backup": uuid4().hex}))
        for batch in batches(database):
            counts.add(batch)
            receipts = (_line({"receipt": dict(zip(COLUMNS, row, strict=True))}) for row in batch.receipts)
            rejections = (
                _line({"rejections": {**dict(zip(KEY, key, strict=True)), "calls": calls}})
                for key, calls in batch.rejections.items()
            )
            kept = [_line({"kept_since_ns": batch.kept_since_ns})] if batch.kept_since_ns else ()
            rolled = (_line({"roll_up": _rest_said(rest)}) for rest in batch.rests)
            lines = b"".join((*receipts, *rejections, *kept, *rolled))
            digest.update(lines)
            file.write(lines)
        file.write(_line({"end": asdict(counts), "sha256": digest.hexdigest()}))
    return counts


def _rest_said(rest: Rest) -> dict[str, object]:
    """As JSON can hold it, which has no numbers of more than 64 bits."""
    said: dict[str, object] = {
        "seconds": rest.seconds,
        "start": rest.start,
        **dict(zip(GROUPED, rest.group, strict=True)),
        "sums": {name: str(value) for name, value in rest.sums.items()},
    }
    if rest.latencies:
        said["latencies"] = {str(number): calls for number, calls in rest.latencies.items()}
    return said


def copy_sqlite(source: Path, path: Path) -> Counts:
    """Copy a whole SQLite file, while others write to it."""
    with (
        _whole(path) as file,
        closing(connect_to_read(source)) as database,
        closing(sqlite3.connect(file.name)) as copy,
    ):
        database.backup(copy)
        found = SqliteDatabase(copy).one("SELECT (SELECT count(*) FROM receipts), (SELECT count(*) FROM rejections)")
    return Counts(*found) if found else Counts()


@contextmanager
def _whole(path: Path) -> Iterator[IO[bytes]]:
    """A new file for its owner alone, which gets its name when all of it is on the disk."""
    try:
        if path.exists():
            raise StartupError(f"{path} is there already: name another file, or move it away")
        file = tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False)  # noqa: SIM115
    except OSError as error:
        raise StartupError(f"{path} cannot be written: {error.strerror}") from error
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(file.name, path)
    except BaseException:
        os.unlink(file.name)
        raise


def _line(value: object) -> bytes:
    return orjson.dumps(value) + b"\n"


# --- from a file -------------------------------------------------------------------------------


@frozen
class Source:
    """A file that a ledger can be made of: a backup, or a ledger of SQLite."""

    path: Path

    def restore(self, store: Store, noted: Callable[[], None]) -> Counts:
        """Write all of it into an empty ledger, as a gateway writes it: roll-ups of its receipts come about anew.

        After an interruption the same file may be given again: what is written already is left alone. `noted` is called
        before anything is written. Raises StartupError for a file that is none of them, and for a ledger that is not
        empty. All of the file is read and checked before anything is written. The counts are of what the ledger has.
        """
        counts = Counts()
        try:
            with self.path.open("rb") as file:
                is_sqlite = file.read(len(SQLITE_MAGIC)) == SQLITE_MAGIC
                writer = f"restore {self.path.resolve()}" if is_sqlite else f"restore {self._begin(file)}"
                if not store.reading(60).run(partial(_may_take, writer)):
                    raise StartupError(f"the ledger {store} is not empty: restore into a new one")
                for batch in self._of_sqlite(noted) if is_sqlite else self._of_backup(file, noted):
                    store.write(writer, batch)
                    counts.add(batch)
        except OSError as error:
            raise StartupError(f"{self.path} cannot be read: {error.strerror}") from error
        counts.receipts, counts.rejections = store.reading(math.inf).run(_held)
        return counts

    def _of_sqlite(self, noted: Callable[[], None]) -> Iterator[Batch]:
        try:
            with closing(connect_to_read(self.path)) as database:
                database.text_factory = checks.text
                database.execute("BEGIN")
                try:
                    checks.sqlite_file(database)
                except ValueError as error:
                    raise StartupError(f"{self.path}: {error}") from error
                self._refuse_half(database)
                noted()
                yield from batches(SqliteDatabase(database))
        except sqlite3.Error as error:
            raise StartupError(
                f"{self.path} cannot be read as a ledger of this version ({error}); if an older QLens has written it, "
                "run `qlens ledger migrate` on a copy of it first"
            ) from error

    def _refuse_half(self, database: sqlite3.Connection) -> None:
        """Raise StartupError when calls wait beside the file that a gateway which died has not written to it."""
        if waiting := unwritten.count(database, self.path):
            raise StartupError(
                f"{self.path} does not have {waiting} calls that wait in {unwritten.spool_of(self.path)}: run "
                "`qlens usage` with a configuration whose ledger is this file, which writes them to it; then restore it"
            )

    def _of_backup(self, file: IO[bytes], noted: Callable[[], None]) -> Iterator[Batch]:
        place = file.tell()
        for _ in self._of_lines(file):
            pass
        file.seek(place)
        noted()
        yield from self._of_lines(file)

    def _begin(self, file: IO[bytes]) -> str:
        """The backup's name. Looks at both ends, so that nothing is written of half a file."""
        file.seek(0)
        begin = self._read(file.readline(), 1)
        if begin.get("qlens_ledger") not in FORMATS or not isinstance(begin.get("backup"), str):
            raise StartupError(f"{self.path} is no backup of a ledger that this QLens can read")
        place = file.tell()
        file.seek(max(place, file.seek(0, os.SEEK_END) - _END_BYTES))
        if b'{"end":' not in file.read():
            raise StartupError(f"{self.path} is cut short: its last line is missing")
        file.seek(place)
        return str(begin["backup"])

    def _of_lines(self, file: IO[bytes]) -> Iterator[Batch]:
        lines, found, digest = enumerate(file, 2), Counts(), sha256()
        end: Counts | None = None
        told: object = None
        for number in count(1):
            receipts: list[Row] = []
            rejections: dict[Rejection, int] = {}
            left: list[Rest] = []
            kept, place = 0, 0
            for place, line in islice(lines, AT_ONCE):
                value = self._read(line, place)
                if end is not None:
                    raise StartupError(f"{self.path} is damaged: line {place} comes after its end")
                try:
                    if "receipt" in value:
                        receipts.append(checks.receipt(value["receipt"]))
                    elif "rejections" in value:
                        key, calls = checks.rejection(value["rejections"])
                        rejections[key] = calls
                    elif "roll_up" in value:
                        left.append(checks.rest(value["roll_up"]))
                    elif "kept_since_ns" in value:
                        kept = checks.kept_since_ns(value)
                    else:
                        end, told = Counts(**value["end"]), value.get("sha256")
                        continue
                    digest.update(line)
                except (KeyError, TypeError, ValueError, AttributeError) as error:
                    why = str(error) if type(error) is ValueError else repr(error)
                    raise StartupError(f"{self.path}: line {place} is no line of a backup: {why}") from error
            batch = Batch(number, receipts, rejections, left, kept)
            found.add(batch)
            if end is not None and end != found:
                raise StartupError(f"{self.path} is damaged: it has not as many lines as it says")
            # Backups of earlier versions say no sum.
            if end is not None and told not in (None, digest.hexdigest()):
                raise StartupError(f"{self.path} is damaged: its lines are not those that were written")
            if not place:
                return
            yield batch

    def _read(self, line: bytes, place: int) -> dict[str, Any]:
        try:
            value = orjson.loads(line)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise StartupError(f"{self.path}: line {place} is no line of a ledger's backup")
        return value


def _held(database: Database) -> tuple[int, int]:
    """How many receipts, and counts of refused calls, a ledger has."""
    found = database.one("SELECT (SELECT count(*) FROM receipts), (SELECT count(*) FROM rejections)")
    assert found is not None
    return int(found[0]), int(found[1])


def _may_take(writer: str, database: Database) -> bool:
    """Whether there is nothing yet, or only what this very writer has begun to write."""
    found = database.one(_STATE, [writer, writer])
    assert found is not None
    anything, mine, others = found
    return not anything or (mine and not others)
