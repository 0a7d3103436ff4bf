"""The queue on disk: what was appended is there in order, whatever happens to the process, the disk or the files."""

from __future__ import annotations

import errno
import logging
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from qlens.stores import spool as spools
from qlens.stores.spool import Left, Spool, SpoolFull
from qlens.stores.syncing import SpoolSync

RECORDS = [b"one", b"two" * 100, b"\0\0\0", b"four"]


def filled(folder: Path, records: list[bytes], **settings: int) -> Spool:
    spool = Spool.open(folder, **settings)
    for record in records:
        spool.append(record)
    return spool


def abandon(spool: Spool) -> None:
    """What the end of the process does: files and lock are closed, and nothing else happens."""
    for segment in spool._segments:
        segment.close()
    spool.place.close()


def everything(folder: Path) -> list[bytes]:
    """What a next owner finds."""
    spool = Spool.open(folder)
    try:
        return spool.read(10_000)
    finally:
        abandon(spool)


def segments(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*.log"))


# --- order and position ------------------------------------------------------------------------


def test_records_come_in_order_and_again_until_they_are_shipped(tmp_path: Path) -> None:
    spool = filled(tmp_path / "s", RECORDS)
    assert spool.read(2) == spool.read(2) == RECORDS[:2]
    assert spool.read(9, after=2) == RECORDS[2:]
    assert spool.read(9, after=1) == RECORDS[1:]
    spool.shipped(3)
    assert spool.read(9) == RECORDS[3:]
    assert spool.left == Left(1, 12)
    spool.shipped(1)
    assert spool.read(9) == []
    assert spool.left == Left(0, 0)
    spool.close()
    assert not (tmp_path / "s").exists()


def test_the_position_and_the_rest_survive_the_owner(tmp_path: Path) -> None:
    spool = filled(tmp_path, RECORDS, segment_bytes=200)
    assert spool.read(2)
    spool.shipped(1)
    abandon(spool)
    spool = Spool.open(tmp_path)
    assert spool.left.records == 3
    spool.append(b"five")
    assert spool.read(9) == [*RECORDS[1:], b"five"]
    spool.shipped(4)
    spool.close()


def test_files_that_are_through_are_deleted(tmp_path: Path) -> None:
    spool = filled(tmp_path, [b"x" * 92] * 30, segment_bytes=1000)
    assert len(segments(tmp_path)) == 3
    spool.read(15)
    spool.shipped(15)
    assert len(segments(tmp_path)) == 2
    spool.read(15)
    spool.shipped(15)
    assert len(segments(tmp_path)) == 1
    spool.sync()
    assert [segment.file >= 0 for segment in spool._segments] == [True]
    spool.close()


def test_a_record_longer_than_a_file_has_its_own(tmp_path: Path) -> None:
    spool = filled(tmp_path, [b"a", b"b" * 5000, b"c"], segment_bytes=1000)
    assert spool.read(3) == [b"a", b"b" * 5000, b"c"]
    abandon(spool)
    assert everything(tmp_path) == [b"a", b"b" * 5000, b"c"]


class Life(RuleBasedStateMachine):
    """A spool against a list, over any order of steps, deaths of its owner included."""

    in_memory = 0

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(os.fspath(os.environ["SPOOL_TEST_FOLDER"]), str(time.monotonic_ns()))
        self.spool = Spool.open(self.folder, segment_bytes=300, in_memory=self.in_memory)
        self.waiting: list[bytes] = []
        self.seen = 0

    @rule(record=st.binary(min_size=1, max_size=120))
    def append(self, record: bytes) -> None:
        self.spool.append(record)
        self.waiting.append(record)

    @rule(most=st.integers(1, 9), data=st.data())
    def read(self, most: int, data: st.DataObject) -> None:
        after = data.draw(st.integers(0, self.seen))
        found = self.spool.read(most, after)
        assert found == self.waiting[after : after + most]
        self.seen = after + len(found)

    @precondition(lambda self: self.seen)
    @rule(data=st.data())
    def ship(self, data: st.DataObject) -> None:
        count = data.draw(st.integers(1, self.seen))
        self.spool.shipped(count)
        del self.waiting[:count]
        self.seen -= count

    @rule()
    def sync(self) -> None:
        self.spool.sync()
        assert not self.spool.unsynced

    @rule(tidy=st.booleans())
    def next_owner(self, tidy: bool) -> None:
        self.spool.close() if tidy else abandon(self.spool)
        self.spool = Spool.open(self.folder, segment_bytes=300, in_memory=self.in_memory)
        self.seen = 0

    @invariant()
    def nothing_is_missing(self) -> None:
        assert self.spool.left == (len(self.waiting), sum(map(len, self.waiting)) + 8 * len(self.waiting))
        assert self.spool.torn == 0

    def teardown(self) -> None:
        assert self.spool.read(10_000) == self.waiting
        self.spool.shipped(len(self.waiting))
        self.spool.close()
        assert not self.folder.exists()


class LifeInMemory(Life):
    """The same where what is appended is in memory as well, as long as it is little."""

    in_memory = 4


@pytest.mark.parametrize("life", [Life, LifeInMemory])
def test_a_spool_is_a_list_that_survives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, life: type[RuleBasedStateMachine]
) -> None:
    from hypothesis.stateful import run_state_machine_as_test

    monkeypatch.setenv("SPOOL_TEST_FOLDER", str(tmp_path))
    run_state_machine_as_test(life, settings=settings(max_examples=40, stateful_step_count=30, deadline=None))


# --- in memory ---------------------------------------------------------------------------------


def said(spool: Spool, number: int) -> tuple[str, int]:
    """Append a record, and what it says in other words."""
    spool.append(b"%03d" % number, ("said", number))
    return "said", number


def test_what_is_in_memory_comes_as_it_was_said(tmp_path: Path) -> None:
    spool = Spool.open(tmp_path, segment_bytes=50, in_memory=100)
    found = [said(spool, n) for n in range(9)]
    spool.append(b"bytes")
    assert spool.read(4) == found[:4]
    assert spool.read(99, after=4) == [*found[4:], b"bytes"]
    assert spool.read(99, after=2) == [*(b"%03d" % n for n in range(2, 9)), b"bytes"]  # again: from the files
    late = said(spool, 10)
    assert spool.read(99, after=10) == [late]
    spool.shipped(7)
    assert len(segments(tmp_path)) == 2
    abandon(spool)
    assert everything(tmp_path) == [b"007", b"008", b"bytes", b"010"]


def test_more_than_may_be_in_memory_is_read_from_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spools, "LOOK_BYTES", 110)
    spool = Spool.open(tmp_path, in_memory=20)
    for n in range(100):
        said(spool, n)
    assert spool.read(60) == [b"%03d" % n for n in range(60)]
    said(spool, 100)
    assert spool.read(99, after=60) == [b"%03d" % n for n in range(60, 101)]
    assert spool.read(99, after=101) == []
    assert [said(spool, 101)] == spool.read(99, after=101)
    spool.shipped(102)
    assert spool.left == (0, 0)
    spool.close()


@pytest.mark.parametrize("is_gone", [True, False])
def test_a_file_that_nobody_reads_is_missed_all_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, is_gone: bool
) -> None:
    spool = Spool.open(tmp_path / "s", in_memory=100)
    found = [said(spool, n) for n in range(3)]
    (path,) = segments(tmp_path / "s")
    if is_gone:
        for each in sorted((tmp_path / "s").rglob("*"), reverse=True):
            each.rmdir() if each.is_dir() else each.unlink()
    else:
        os.truncate(path, 15)
    assert spool.read(99) == found
    assert "is not what was written" in caplog.text
    found.append(said(spool, 3))
    assert spool.read(99, after=3) == found[3:]
    abandon(spool)
    assert everything(tmp_path / "s") == ([b"003"] if is_gone else [b"000", b"003"])


# --- damaged files -----------------------------------------------------------------------------


def test_every_cut_of_a_file_leaves_its_whole_records(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    abandon(filled(tmp_path, RECORDS))
    (path,) = segments(tmp_path)
    whole = path.read_bytes()
    ends = [sum(8 + len(record) for record in RECORDS[: n + 1]) for n in range(len(RECORDS))]
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        spool = Spool.open(tmp_path)
        there = sum(end <= cut for end in ends)
        assert spool.read(9) == RECORDS[:there]
        assert spool.torn == cut - max([0, *(end for end in ends if end <= cut)])
        abandon(spool)
        assert path.exists() is (there > 0)
    assert "no whole record" in caplog.text


@given(st.binary(max_size=400), st.binary(max_size=30))
@settings(max_examples=200, deadline=None)
def test_no_bytes_can_upset_it(tmp_path_factory: pytest.TempPathFactory, content: bytes, position: bytes) -> None:
    folder = tmp_path_factory.mktemp("s")
    (folder / "0").mkdir()
    (folder / "0" / "00000001.log").write_bytes(content)
    (folder / "0" / "shipped").write_bytes(position)
    spool = Spool.open(folder)
    found = spool.read(1000)
    assert spool.left.records == len(found)
    spool.append(b"new")
    assert spool.read(1000) == [*found, b"new"]
    spool.shipped(len(found) + 1)
    spool.close()
    assert not folder.exists()


@given(place=st.integers(0, 200), bit=st.integers(0, 7))
@settings(max_examples=60, deadline=None)
def test_a_flipped_bit_is_noticed(tmp_path_factory: pytest.TempPathFactory, place: int, bit: int) -> None:
    folder = tmp_path_factory.mktemp("s")
    records = [b"%03d" % n for n in range(20)]
    abandon(filled(folder, records))
    (path,) = segments(folder)
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    path.write_bytes(content)
    assert everything(folder) == records[: place // 11]


def test_files_that_end_in_zeros_have_lost_their_end(tmp_path: Path) -> None:
    abandon(filled(tmp_path, RECORDS))
    (path,) = segments(tmp_path)
    path.write_bytes(path.read_bytes() + bytes(4096))
    spool = Spool.open(tmp_path)
    assert (spool.read(9), spool.torn) == (RECORDS, 4096)
    abandon(spool)


def test_a_file_that_is_damaged_while_it_is_in_use_does_not_stop_the_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spool = filled(tmp_path, [b"%03d" % n for n in range(20)], segment_bytes=110)
    first, second = segments(tmp_path)
    with first.open("r+b") as file:
        file.seek(11 * 4 + 9)
        file.write(b"!")
    assert spool.read(99) == [b"%03d" % n for n in (0, 1, 2, 3, *range(10, 20))]
    assert spool.left.records == 14
    spool.append(b"new")
    second.unlink()
    assert spool.read(99) == [b"000", b"001", b"002", b"003", b"new"]
    assert "damaged" in caplog.text
    spool.shipped(5)
    assert spool.left == (0, 0)
    spool.close()


def test_a_folder_that_somebody_removed_is_made_again(tmp_path: Path) -> None:
    spool = filled(tmp_path / "s", [b"lost"])
    for path in sorted((tmp_path / "s").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    assert spool.read(9) == []
    spool.append(b"kept")
    assert spool.read(9) == [b"kept"]
    assert Spool.open(tmp_path / "s").place.path.name == "1"
    abandon(spool)
    assert everything(tmp_path / "s") == [b"kept"]


# --- owners ------------------------------------------------------------------------------------


def test_a_folder_that_is_moved_for_a_while_is_used_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    spool = filled(tmp_path / "disk" / "s", [b"one"], segment_bytes=20)
    (tmp_path / "disk").rename(tmp_path / "away")
    for record in (b"two", b"three"):
        spool.append(record)
    assert spool.read(9) == [b"one", b"two", b"three"]
    spool.shipped(2)
    spool.sync()
    (tmp_path / "away").rename(tmp_path / "disk")
    spool.append(b"four")
    assert spool.read(9) == [b"three", b"four"]
    abandon(spool)
    assert everything(tmp_path / "disk" / "s") == [b"three", b"four"]


def test_each_owner_has_a_place_and_the_next_takes_what_the_dead_left(tmp_path: Path) -> None:
    spools = [filled(tmp_path, [b"%d" % n]) for n in range(4)]
    assert [spool.place.path.name for spool in spools] == ["0", "1", "2", "3"]
    for spool in (spools[0], spools[1], spools[3]):
        abandon(spool)
    first = Spool.open(tmp_path)
    assert first.read(9) == [b"0"]
    orphans = Spool.orphans(tmp_path)
    assert [spool.read(9) for spool in orphans] == [[b"1"], [b"3"]]
    assert Spool.orphans(tmp_path) == []
    for spool in (*orphans, first, spools[2]):
        spool.read(9)
        spool.shipped(1)
        spool.close()
    assert not tmp_path.exists()


def test_many_owners_come_and_go_at_once(tmp_path: Path) -> None:
    """None gets another's place, none loses a record to one who removes an empty place."""
    folder = tmp_path / "s"
    lost: list[object] = []

    def live() -> None:
        for n in range(15):
            spool = filled(folder, [b"%d" % n])
            if spool.read(9) != [b"%d" % n] or len(list(spool.place.path.glob("*.log"))) != 1:
                lost.append(spool.place.path)
            spool.shipped(1)
            spool.close()

    threads = [threading.Thread(target=live) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert lost == []
    assert not folder.exists()


WRITER = """
import sys
from pathlib import Path
from qlens.stores.spool import Spool
spool = Spool.open(Path(sys.argv[1]), segment_bytes=4000)
n = 0
while True:
    spool.append(b"%d" % n * 20)
    print(n, flush=True)
    n += 1
"""


def test_what_a_killed_process_appended_is_there(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        for _ in range(500):
            process.stdout.readline()
        other = Spool.open(tmp_path)
        assert other.place.path.name == "1"
        assert Spool.orphans(tmp_path) == []
        process.send_signal(signal.SIGKILL)
        last = max([499, *(int(line) for line in process.stdout.read().splitlines() if line)])
    (orphan,) = Spool.orphans(tmp_path)
    found = orphan.read(1_000_000)
    assert found[: last + 1] == [b"%d" % n * 20 for n in range(last + 1)]
    assert len(found) <= last + 2
    orphan.shipped(len(found))
    orphan.close()
    other.close()


# --- a disk that is full or broken -------------------------------------------------------------


def test_no_more_waits_than_may(tmp_path: Path) -> None:
    spool = Spool.open(tmp_path, segment_bytes=200, most_bytes=1000)
    for _ in range(10):
        spool.append(b"x" * 92)
    with pytest.raises(SpoolFull):
        spool.append(b"x")
    spool.read(1)
    spool.shipped(1)
    spool.append(b"x" * 92)
    assert sum(path.stat().st_size for path in segments(tmp_path)) <= 1000 + 200
    abandon(spool)


@contextmanager
def no_file_longer_than(size: int) -> Iterator[None]:
    """As on a full disk: a write is cut short, and the next one refused."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", range(11, 23))
def test_a_full_disk_takes_no_parts_of_records(tmp_path: Path, size: int) -> None:
    spool = filled(tmp_path, [b"one"])
    with no_file_longer_than(size):
        if size < 22:
            for _ in range(2):
                with pytest.raises(OSError, match=r"No space left|File too large"):
                    spool.append(b"two")
    spool.append(b"two")
    assert spool.read(9) == [b"one", b"two"]
    abandon(spool)
    assert everything(tmp_path) == [b"one", b"two"]


def test_what_follows_a_part_that_cannot_be_taken_back_is_in_another_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = filled(tmp_path, [b"one"])

    def refuse(file: int, size: int) -> None:
        raise OSError(errno.EIO, "refused")

    with no_file_longer_than(15), monkeypatch.context() as broken:
        broken.setattr(os, "ftruncate", refuse)
        with pytest.raises(OSError, match="No space left"):
            spool.append(b"two")
    spool.append(b"three")
    abandon(spool)
    assert everything(tmp_path) == [b"one", b"three"]


class Disk:
    """fdatasync of a disk that fails as Linux does: once, with what was dirty dropped; then it reports success."""

    def __init__(self, failures: int) -> None:
        self.failures = failures
        self.asked: list[int] = []
        self.real = os.fdatasync

    def fdatasync(self, file: int) -> None:
        inode = os.fstat(file).st_ino
        self.asked.append(inode)
        if self.failures:
            self.failures -= 1
            path = Path(os.readlink(f"/proc/self/fd/{file}"))
            # What was not synced is on no disk: the file has zeros there.
            with path.open("r+b") as there:
                there.seek(self.kept)
                there.write(bytes(path.stat().st_size - self.kept))
            raise OSError(errno.EIO, "Input/output error")
        self.real(file)

    kept = 0


def test_a_failed_sync_is_not_asked_again_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spool = filled(tmp_path, [b"one"])
    spool.sync()
    disk = Disk(failures=1)
    disk.kept = 11
    monkeypatch.setattr(os, "fdatasync", disk.fdatasync)
    (first,) = segments(tmp_path)
    inode = first.stat().st_ino
    spool.append(b"two")
    spool.sync()
    assert disk.asked.count(inode) == 1
    assert first.stat().st_ino != inode
    assert not spool.unsynced
    spool.append(b"three")
    assert len(segments(tmp_path)) == 2
    spool.sync()
    assert spool.read(9) == [b"one", b"two", b"three"]
    abandon(spool)
    assert everything(tmp_path) == [b"one", b"two", b"three"]


def test_a_disk_that_stays_broken_takes_nothing_until_it_is_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = filled(tmp_path, [b"one"])
    disk = Disk(failures=3)
    monkeypatch.setattr(os, "fdatasync", disk.fdatasync)
    with pytest.raises(OSError, match="Input/output error"):
        spool.sync()
    with pytest.raises(OSError, match="could not be synced"):
        spool.append(b"two")
    assert spool.read(9) == [b"one"]
    assert len(segments(tmp_path)) == 1
    with pytest.raises(OSError, match="Input/output error"):
        spool.sync()
    spool.sync()
    spool.append(b"two")
    assert spool.read(9) == [b"one", b"two"]
    assert disk.asked.count(disk.asked[0]) == 1
    abandon(spool)
    assert everything(tmp_path) == [b"one", b"two"]


def test_a_segment_that_failed_may_be_shipped_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spool = filled(tmp_path, [b"one"])
    disk = Disk(failures=2)
    monkeypatch.setattr(os, "fdatasync", disk.fdatasync)
    with pytest.raises(OSError, match="Input/output error"):
        spool.sync()
    assert spool.read(9) == [b"one"]
    spool.shipped(1)
    assert segments(tmp_path) == []
    spool.append(b"two")
    spool.sync()
    assert spool.read(9) == [b"two"]
    abandon(spool)
    assert everything(tmp_path) == [b"two"]


# --- the thread --------------------------------------------------------------------------------


def until(condition: object, seconds: float = 60) -> None:
    ends = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < ends
        time.sleep(0.002)


def test_what_is_appended_is_synced_soon_also_after_a_rest(tmp_path: Path) -> None:
    spool = Spool.open(tmp_path)
    syncing = SpoolSync(spool)
    syncing.start()
    for _ in range(2):
        until(lambda: syncing.asleep)
        for _ in range(50):
            spool.append(b"record")
            syncing.wake()
        until(lambda: not spool.unsynced)
    spool.append(b"last")
    syncing.stop(10)
    assert not spool.unsynced
    abandon(spool)


def test_a_disk_that_cannot_sync_is_a_problem_until_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("qlens.stores.syncing.RETRY_SECONDS", 0.01)
    caplog.set_level(logging.WARNING)
    spool = Spool.open(tmp_path)
    disk = Disk(failures=4)
    monkeypatch.setattr(os, "fdatasync", disk.fdatasync)
    syncing = SpoolSync(spool)
    syncing.start()
    spool.append(b"one")
    syncing.wake()
    until(lambda: syncing.problem is not None)
    until(lambda: syncing.problem is None)
    assert "written anew" in caplog.text
    assert spool.read(9) == [b"one"]
    syncing.stop(10)
    abandon(spool)
