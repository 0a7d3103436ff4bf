"""What the ledger's spool promises: nothing that was sent is forgotten, and nothing is written twice."""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ledgers import Place

from qlens import Attempt, Caller, Cost, Event, Receipt, Spool, StartupError, Target, Usage
from qlens.cli import main
from qlens.stores import segments, sqlite
from qlens.stores.spool import Left
from qlens.testing import Running, running
from qlens_plugins.cost.ledger import records, rows, source, writer
from qlens_plugins.cost.ledger.journal import Journal
from qlens_plugins.cost.ledger.source import Source
from qlens_plugins.cost.ledger.store import Store
from qlens_plugins.cost.ledger.writer import Writer

MINI = "{model: gpt-4o-mini, input: 0.15, cached_input: 0.075, output: 0.60, date: 2026-11-24}"


def config(ledger: str = "flush_seconds: 0.01", *, url: str = "sqlite:///ledger.db", before: str = "") -> str:
    return f"""
server: {{admin: {{port: 0}}, port: 0}}
pipeline:
  auth: [{{plugin: anonymous}}]
  cost: [{{plugin: prices, table: [{MINI}]}}, {{plugin: ledger, url: "{url}", {ledger}}}, {before}]
providers: {{echo: {{plugin: echo}}}}
models:
  gpt-4o-mini: {{max_output_tokens: 1000, targets: [{{provider: echo, model: gpt-4o-mini}}]}}
  slow: {{max_output_tokens: 1000, targets: [{{provider: echo, model: gpt-4o-mini, params: {{first_byte_ms: 300}}}}]}}
"""


async def call(gateway: Running, model: str = "gpt-4o-mini", **more: object) -> int:
    body = {"model": model, "messages": [{"role": "user", "content": "hello there"}], **more}
    return (await gateway.post("/v1/chat/completions", body)).status


async def until(condition: Any, seconds: float = 60) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.02)


def receipt(n: int = 0, **changes: Any) -> Receipt:
    target = Target("echo", "gpt-4o-mini", "gpt-4o-mini")
    usage = Usage(input=8, output=3, source="provider")
    cost = Cost(3_000_000, "exact", "*/gpt-4o-mini", (("input", 8, 150_000), ("output", 3, 600_000)))
    made = Receipt(
        id=f"call-{n}", caller=Caller("acme", "bob", "keys", tags={"team": "x"}), operation="chat", model="gpt-4o-mini",
        target=target, outcome="complete", status=200, error=None, usage=usage, cost=cost, saved_picos=0, cache="off",
        streamed=False, attempts=(Attempt(1, target, 0.0, ended=0.5, usage=usage, cost=cost, billed=True),),
        tags={"team": "x"}, wall_ns=10**18 + n, ttft_us=1, total_us=2, overhead_us=3, bytes_out=4, config_version="v",
    )  # fmt: skip
    return evolve(made, **changes)


def known(n: int, picos: int | None = 5_000_000) -> rows.Facts:
    """What admission knows of the call of a receipt: at most 20 tokens in, 1000 out, for so much."""
    return (*rows.facts_of(receipt(n)), 20, 1000, {}, picos, "*/gpt-4o-mini")


def begun(n: int, picos: int | None = 5_000_000) -> bytes:
    return records.opened(known(n, picos))


def closing(n: int) -> bytes:
    return records.closed((known(n), rows.facts_after(receipt(n))))


def late(receipt: Receipt) -> bytes:
    """The record of a call that nobody knew of before."""
    return records.closed((rows.facts_of(receipt), rows.facts_after(receipt)))


def interrupted(n: int) -> tuple[Any, ...]:
    return (f"call-{n}", "failed", "interrupted", 1000, 5_000_000, "estimated")


def complete(n: int) -> tuple[Any, ...]:
    return (f"call-{n}", "complete", None, 3, 3_000_000, "exact")


def short(row: Any) -> tuple[Any, ...]:
    found = row if isinstance(row, dict) else dict(zip(rows.COLUMNS, row, strict=True))
    return tuple(found[name] for name in ("id", "outcome", "error", "output", "cost_picos", "cost_state"))


def read(place: Place) -> list[tuple[Any, ...]]:
    return [short(row) for row in place.rows("SELECT * FROM receipts ORDER BY wall_ns")]


def on_disk(folder: Path) -> list[bytes]:
    """The records in a spool's files, beside those who read and write it."""
    found: list[bytes] = []
    for path in sorted(folder.glob("*/*.log")):
        with path.open("rb") as file:
            found += [record for record, _ in segments.records(file, 0, path.stat().st_size)]
    return found


def abandon(spool: Spool) -> None:
    """As when the process ends."""
    for segment in spool._segments:
        segment.close()
    spool.place.close()


def left_by_a_dead_process(folder: Path, *found: bytes) -> None:
    spool = Spool.open(folder)
    for record in found:
        spool.append(record)
    abandon(spool)


def writer_of(store: Store, folder: Path) -> Writer:
    def nothing(_: float) -> None:
        pass

    return Writer(store, Journal(folder, nothing), nothing, nothing, nothing, flush_seconds=0.01)


# --- records -----------------------------------------------------------------------------------


def test_a_record_makes_the_row_and_the_event_that_the_receipt_makes() -> None:
    other = Usage(input=1, output=2, meters={"images": 3}, source="partial", tier="flex")
    target = Target("other", "m", "m")
    failed = Attempt(1, target, 1.5, first_byte=1.75, ended=2.0, status=500, error="upstream", upstream_id="u")
    billed = Attempt(2, target, 2.0, kind="hedge", usage=other, cost=Cost(7, "estimated", "p"), billed=True)
    for each in (
        receipt(),
        receipt(target=None, model=None, outcome="cached", cost=Cost(0), attempts=()),
        receipt(attempts=(failed, billed), usage=Usage(input=9), cost=Cost(None, "unpriced")),
        receipt(tags={"other": "tags"}, streamed=True, error="\ud800"),
        receipt(usage=Usage(input=2**70), caller=Caller("t", "\udfff", "k")),
    ):
        read = records.read(late(each))
        assert read.row == rows.row(each)
        assert Event.of_receipt(read.receipt) == Event.of_receipt(each)
        assert Event.of_receipt(read.receipt).data == Event.of_receipt(each).data
        assert read.id == each.id
    attempts = json.loads(rows.row(receipt(attempts=(failed, billed)))[-1])  # type: ignore[arg-type]
    assert attempts[0]["first_byte_us"] == 250_000
    assert attempts[1]["usage"] == {"input": 1, "output": 2, "images": 3, "source": "partial"}
    assert attempts[1]["cost_usd"] == "0.000000000007"


@given(st.binary(max_size=60))
@settings(max_examples=300)
def test_no_record_can_hold_up_the_others(data: bytes) -> None:
    lost: list[float] = []
    reader = Source(_Records([closing(1), data, closing(2)]), lost.append)  # type: ignore[arg-type]
    found = [short(row) for row in reader.take(10)]
    reader.done()
    assert [row for row in found if row in (complete(1), complete(2))] == [complete(1), complete(2)]
    assert reader.left == (1 if records_begins(data) else 0)


def records_begins(data: bytes) -> bool:
    try:
        return records.read(data).is_beginning
    except Exception:
        return False


class _Records:
    """Enough of a spool for a source."""

    place = "a test"
    most_bytes = 1_000_000

    def __init__(self, waiting: list[bytes]) -> None:
        self.waiting = waiting

    @property
    def left(self) -> Any:
        return Left(len(self.waiting), sum(map(len, self.waiting)))

    def read(self, most: int, after: int) -> list[bytes]:
        return self.waiting[after : after + most]

    def append(self, record: bytes) -> None:
        self.waiting.append(record)

    def shipped(self, count: int) -> None:
        del self.waiting[:count]

    def sync(self) -> None:
        pass


# --- the next start ----------------------------------------------------------------------------


async def test_calls_of_a_dead_process_are_charged_what_they_cost_or_can_have_cost(
    place: Place, tmp_path: Path
) -> None:
    folder = tmp_path / "spool"
    left_by_a_dead_process(
        folder,
        *(begun(n) for n in range(4)),
        closing(1),
        records.voiding("call-2"),
        begun(4, picos=None),
        late(receipt(5)),
    )
    for _ in range(2):
        writer = writer_of(place.store(), folder)
        await writer.open()
        await writer.close(10)
        assert not folder.exists()
    expected = [interrupted(0), complete(1), interrupted(3), (*interrupted(4)[:4], None, "unpriced"), complete(5)]
    assert read(place) == expected
    assert sum(row["calls"] for row in place.rows("SELECT calls FROM usage_days")) == 5
    usage = place.rows("SELECT usage_source, input, tenant, tags, attempts, price_id FROM receipts ORDER BY wall_ns")[0]
    assert (usage["usage_source"], usage["input"], usage["tenant"]) == ("estimated", 20, "acme")


async def test_what_many_dead_processes_left_is_written_beside_the_living(place: Place, tmp_path: Path) -> None:
    folder = tmp_path / "spool"
    spools = [Spool.open(folder) for _ in range(3)]
    for n, spool in enumerate(spools):
        spool.append(begun(2 * n))
        spool.append(closing(2 * n + 1))
    abandon(spools[0])
    abandon(spools[2])
    writer = writer_of(place.store(), folder)
    await writer.open()
    writer.keep(receipt(9))
    await until(lambda: len(read(place)) == 5)
    assert read(place) == [interrupted(0), complete(1), interrupted(4), complete(5), complete(9)]
    await until(lambda: sorted(path.name for path in folder.iterdir()) == ["1", "3"])
    await writer.close(10)
    abandon(spools[1])
    assert [path.name for path in folder.iterdir()] == ["1"]


steps = st.lists(
    st.tuples(
        st.sampled_from(["begin", "end", "void", "ship", "die", "die in commit", "die after commit"]), st.integers(0, 5)
    ),
    max_size=40,
)


@given(steps)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_wherever_the_process_dies_each_call_is_there_once(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, taken: list[tuple[str, int]]
) -> None:
    """Steps of processes that die, against what must come out: rows are idempotent by id, as in the databases."""
    monkeypatch.setattr(source, "CARRY_AFTER", 3)
    monkeypatch.setattr(source, "CARRY_TIMES", 0)
    folder = tmp_path_factory.mktemp("s") / "spool"
    database: dict[Any, tuple[Any, ...]] = {}
    running_: list[int] = []
    expected: dict[str, tuple[Any, ...]] = {}
    number = 0
    journal = Journal(folder, lambda _: None)
    journal.open()
    for step, which in taken:
        if step == "begin":
            running_.append(number)
            journal.note(begun(number), known(number) if which % 2 else None)
            number += 1
        elif step in {"end", "void"} and running_:
            n = running_.pop(which % len(running_))
            if step == "end":
                expected[f"call-{n}"] = complete(n)
                journal.note(closing(n), (known(n), rows.facts_after(receipt(n))) if which % 3 else None, 1)
            else:
                journal.void(records.voiding(f"call-{n}"))
        elif step in {"ship", "die in commit", "die after commit"}:
            for row in journal.take(2 + which):
                if step != "die in commit":
                    database.setdefault(row[0], short(row))
            if step == "ship":
                journal.done()
        if step.startswith("die"):
            journal._syncing.stop(5)  # type: ignore[union-attr]
            for each in journal._sources:
                abandon(each.spool)
            expected |= {f"call-{n}": interrupted(n) for n in running_}
            running_ = []
            journal = Journal(folder, lambda _: None)
            journal.open()
    expected |= {f"call-{n}": complete(n) for n in running_}
    for n in running_:
        journal.note(closing(n), receipts=1)
    for _ in range(60):
        for row in journal.take(3):
            database.setdefault(row[0], short(row))
        journal.done()
    assert database == expected
    assert journal.waiting == 0
    assert journal.close() == 0
    assert not folder.exists()


def test_calls_that_run_long_do_not_keep_what_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "CARRY_AFTER", 100)
    spool = Spool.open(tmp_path / "s", segment_bytes=20_000)
    reader = Source(spool, lambda _: None)
    for n in range(3):
        spool.append(begun(n))
    for n in range(3, 1500):
        spool.append(begun(n))
        spool.append(closing(n))
        if n % 20 == 0:
            assert all(short(row)[1] == "complete" for row in reader.take(500))
            reader.done()
            assert spool.left.records < 300
    spool.append(closing(1))
    assert len(reader.take(500)) == 20
    reader.done()
    abandon(spool)
    (orphan,) = Spool.orphans(tmp_path / "s")
    former = Source(orphan, lambda _: None, is_former=True)
    assert {short(row) for row in former.take(500)} >= {interrupted(0), interrupted(2)}
    former.done()
    assert former.left == 0
    orphan.close()


def asked(capsys: pytest.CaptureFixture[str], folder: Path, *words: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main([*words, "-c", str(folder / "qlens.yaml")])
    return code, *capsys.readouterr()


@pytest.mark.parametrize("command", ["usage", "ledger verify", "ledger backup", "what-if"])
def test_the_first_command_after_a_crash_has_what_the_dead_process_left(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    folder = tmp_path / "spool"
    left_by_a_dead_process(folder, begun(0), *(closing(n) for n in range(1, 20)))
    text = config(f'flush_seconds: 600, spool: "{folder}"', url=place.url)
    for name in ("qlens.yaml", "other.yaml"):
        (tmp_path / name).write_text(text)
    words = {"ledger backup": [str(tmp_path / "x.jsonl")], "what-if": ["--config", str(tmp_path / "other.yaml")]}
    code, out, err = asked(capsys, tmp_path, *command.split(), *words.get(command, []))
    assert (code, "wait" in err) == (0, False)
    told = (tmp_path / "x.jsonl").read_text() if command == "ledger backup" else out
    expected = {
        "usage": "gpt-4o-mini  20 ",
        "ledger verify": "20 receipts, ",
        "ledger backup": '"receipts":20,',
        "what-if": "acme    20 ",
    }
    assert expected[command] in told


def test_a_command_says_what_cannot_be_written_and_does_not_wait_for_ever(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "PATIENCE_SECONDS", 0.05)
    monkeypatch.setattr(sqlite, "BUSY_SECONDS", 0.1)
    (tmp_path / "qlens.yaml").write_text(config("close_seconds: 0"))
    assert asked(capsys, tmp_path, "usage")[:2] == (0, "no calls\n")
    left_by_a_dead_process(tmp_path / "ledger.db.spool", *(closing(n) for n in range(3)))
    other = sqlite3.connect(tmp_path / "ledger.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    code, out, err = asked(capsys, tmp_path, "usage")
    other.close()
    assert (code, out) == (0, "no calls\n")
    assert f"up to 3 receipts of a gateway that died wait in {tmp_path}/ledger.db.spool" in err
    assert "gpt-4o-mini  3 " in asked(capsys, tmp_path, "usage")[1]


def test_a_file_is_restored_when_what_waits_beside_it_is_in_it(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, url in (("old", "sqlite:///old.db"), ("new", place.url)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "qlens.yaml").write_text(config(url=url))
    old, new, path = tmp_path / "old", tmp_path / "new", tmp_path / "old" / "old.db"
    assert asked(capsys, old, "usage")[0] == 0
    left_by_a_dead_process(tmp_path / "old" / "old.db.spool", begun(0), closing(1), begun(2), records.voiding("call-2"))
    code, _, err = asked(capsys, new, "ledger", "restore", str(path))
    assert (code, read(place)) == (1, [])
    assert f"does not have 2 calls that wait in {path}.spool: run `qlens usage` with" in err
    assert asked(capsys, old, "usage")[0] == 0
    code, out, _ = asked(capsys, new, "ledger", "restore", str(path))
    assert (code, out.startswith("2 receipts ")) == (0, True)
    assert read(place) == [interrupted(0), complete(1)]


# --- what is told of it ------------------------------------------------------------------------

HEARER = 'observe: [{plugin: "plugs:Hearer", name: hearer, seconds: 0.5}]\nproviders:'


def heard(gateway: Running) -> list[tuple[str, Any]]:
    """The receipts that were told, in their order."""
    return [(event.id, event.data["outcome"]) for event in gateway.plugin("observe", "hearer").heard]


def telling(place: Place, folder: Path, ledger: str = "flush_seconds: 0.01") -> str:
    text = config(f'{ledger}, spool: "{folder}"', url=place.url)
    return text.replace("providers:", f"  {HEARER}", 1)


async def test_calls_of_a_dead_process_are_told_to_those_that_opened_after_the_ledger(
    place: Place, tmp_path: Path
) -> None:
    folder = tmp_path / "spool"
    left_by_a_dead_process(folder, *(begun(n) for n in range(3)), closing(1), closing(9))
    async with running(telling(place, folder)) as gateway:
        await until(lambda: len(heard(gateway)) == 4)
        events = gateway.plugin("observe", "hearer").heard
        assert heard(gateway) == [
            ("call-1", "complete"),
            ("call-9", "complete"),
            ("call-0", "failed"),
            ("call-2", "failed"),
        ]
        await until(lambda: not (folder / "0").exists() or not on_disk(folder))
    lost = events[2]
    assert (lost.type, lost.subject, lost.tenant, lost.time) == ("qlens.receipt", "call-0", "acme", 10**18)
    assert lost.data["error"] == "interrupted"
    assert (lost.data["usage"], lost.data["usage_source"]) == ({"input": 20, "output": 1000}, "estimated")
    assert (lost.data["cost_usd"], lost.data["cost_state"], lost.data["attempts"]) == ("0.000005", "estimated", [])
    assert events[0] == Event.of_receipt(receipt(1))
    assert not folder.exists()


async def test_what_a_dead_process_wrote_down_long_before_its_end_is_not_told_again(
    tmp_path: Path, place: Place
) -> None:
    folder = tmp_path / "spool"
    left_by_a_dead_process(folder, begun(0), *(closing(n) for n in range(1, 200)))
    async with running(telling(place, folder)) as gateway:
        await until(lambda: len(heard(gateway)) == source.MAY_BE_UNTOLD + 1)
        assert heard(gateway) == [*((f"call-{n}", "complete") for n in range(150, 200)), ("call-0", "failed")]
    assert len(read(place)) == 200


async def test_a_call_whose_beginning_was_carried_behind_its_end_is_not_told_to_have_failed(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "MAY_BE_UNTOLD", 1)
    folder = tmp_path / "spool"
    begins = [begun(n) for n in (1, 3, 4)]
    left_by_a_dead_process(folder, closing(1), *begins, closing(2), closing(3))
    async with running(telling(place, folder, "flush_seconds: 0, batch_size: 1")) as gateway:
        await until(lambda: len(heard(gateway)) == 2)
        assert heard(gateway) == [("call-3", "complete"), ("call-4", "failed")]
    assert read(place) == [complete(1), complete(2), complete(3), interrupted(4)]


async def test_what_another_process_leaves_is_taken_over_and_told_while_this_one_runs(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "TAKE_OVER_SECONDS", 0.05)
    folder = tmp_path / "spool"
    async with running(telling(place, folder)) as gateway:
        other = Spool.open(folder)
        other.append(begun(0))
        await asyncio.sleep(0.2)
        assert not read(place)
        abandon(other)
        await until(lambda: heard(gateway) == [("call-0", "failed")])
        await until(lambda: [path.name for path in folder.iterdir()] == ["0"])
        assert await call(gateway) == 200
        await until(lambda: len(read(place)) == 2)


async def test_a_receipt_leaves_the_spool_when_all_plugins_have_had_it(place: Place, tmp_path: Path) -> None:
    """Or else a process that dies between the ledger and what tells would have it in the ledger and told nowhere."""
    left: list[int] = []

    def wait_for_the_row() -> None:
        ends = time.monotonic() + 60
        while not read(place) and time.monotonic() < ends:
            time.sleep(0.02)
        time.sleep(0.1)
        left.append(spool.left.records)

    async with running(telling(place, tmp_path / "spool", "flush_seconds: 0")) as gateway:
        spool = gateway.plugin("cost", "ledger").writer.journal._spool
        gateway.plugin("observe", "hearer").at_settle.append(wait_for_the_row)
        assert await call(gateway) == 200
        await until(lambda: spool.left.records == 0)
    assert left == [2]  # that it had begun, and how it ended
    assert len(read(place)) == 1


# --- while it runs -----------------------------------------------------------------------------


async def test_a_call_is_noted_before_it_is_sent_and_a_clean_end_leaves_nothing(tmp_path: Path) -> None:
    async with running(config(url=f"sqlite:///{tmp_path}/x.db")) as gateway:
        slow = asyncio.create_task(call(gateway, "slow"))
        await until(lambda: gateway.gateway.current.running == 1)
        spool = gateway.plugin("cost", "ledger").writer.journal._spool
        await until(lambda: spool.left.records == 1)
        (record,) = on_disk(tmp_path / "x.db.spool")
        noted = records.read(record)
        assert noted.is_beginning
        row: dict[str, Any] = dict(zip(rows.COLUMNS, noted.row, strict=True))
        assert (row["tenant"], row["model"], row["output"], row["cost_state"]) == (
            "anonymous",
            "slow",
            1000,
            "estimated",
        )
        assert row["cost_picos"] >= 1000 * 600_000
        assert await slow == 200
        assert (await gateway.get("/v1/models")).status == 200
        await until(lambda: spool.left.records == 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.db"]


async def test_a_call_that_runs_long_does_not_fill_the_spool(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = config("flush_seconds: 0.01, spool_bytes: 20000", url=f"sqlite:///{tmp_path}/x.db")
    async with running(text.replace("first_byte_ms: 300", "first_byte_ms: 60000")) as gateway:
        slow = asyncio.create_task(call(gateway, "slow"))
        await until(lambda: gateway.gateway.current.running == 1)
        journal = gateway.plugin("cost", "ledger").writer.journal
        for _ in range(20):
            assert set(await asyncio.gather(*(call(gateway) for _ in range(6)))) == {200}
            await until(lambda: journal.waiting == 0)
        assert journal.problem is None
        first = records.read(on_disk(tmp_path / "x.db.spool")[0])
        assert first.is_beginning
        assert first.id in journal._sources[-1]._running
        slow.cancel()
    assert not [record for record in caplog.records if record.name.startswith("qlens")]


def test_what_cannot_be_read_for_a_while_is_not_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path / "s", lambda _: None)
    left_by_a_dead_process(tmp_path / "s", begun(0), *(closing(n) for n in range(1, 40)))
    journal.open()
    for n in range(40, 80):
        journal.note(closing(n), receipts=1)
    real, asked = Spool.read, [0]

    def read(spool: Spool, most: int, after: int = 0) -> list[bytes]:
        asked[0] += 1
        if asked[0] % 3:
            raise OSError(5, "Input/output error")
        return real(spool, most, after)

    monkeypatch.setattr(Spool, "read", read)
    found = []
    for _ in range(60):
        found += [short(row) for row in journal.take(20)]
        journal.done()
    assert sorted(found) == sorted([interrupted(0), *(complete(n) for n in range(1, 80))])
    assert journal.problem == "Input/output error"
    assert journal.waiting == 0
    assert journal.close() == 0


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Says how the disk syncs; what it says is that it does."""

    class Disk:
        free = threading.Event()
        error: OSError | None = None

    here, real = Disk(), os.fdatasync
    here.free.set()

    def fdatasync(file: int) -> None:
        if ".spool" in os.readlink(f"/proc/self/fd/{file}"):
            here.free.wait(20)
            if here.error is not None:
                raise here.error
        real(file)

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    return here


async def test_with_sync_by_call_nothing_is_sent_before_the_disk_knows(tmp_path: Path, disk: Any) -> None:
    async with running(config("flush_seconds: 0.01, sync: call", url=f"sqlite:///{tmp_path}/x.db")) as gateway:
        assert await call(gateway) == 200
        journal = gateway.plugin("cost", "ledger").writer.journal
        await until(lambda: not journal._spool.unsynced)
        disk.free.clear()
        waiting = [asyncio.create_task(call(gateway)) for _ in range(5)]
        await until(lambda: gateway.gateway.current.running == 5)
        done, _ = await asyncio.wait(waiting, timeout=0.3)
        assert not done
        waiting[0].cancel()
        await until(lambda: gateway.gateway.current.running == 4)
        disk.free.set()
        assert await asyncio.gather(*waiting[1:]) == [200] * 4
        await until(lambda: journal.waiting == 0 and journal._spool.left.records == 0)
        disk.error = OSError(5, "Input/output error")
        assert await call(gateway) == 503
        disk.error = None
        await until(lambda: journal._syncing.problem is None)
        calls = 5 + await calls_until_well(gateway)
    database = sqlite3.connect(tmp_path / "x.db")
    outcomes = dict(database.execute("SELECT outcome, count(*) FROM receipts GROUP BY 1"))
    database.close()
    assert outcomes["complete"] == calls
    assert set(outcomes) <= {"complete", "abandoned", "failed"}
    assert not (tmp_path / "x.db.spool").exists()


async def test_a_flood_of_calls_that_are_refused_after_it_does_not_fill_the_disk(tmp_path: Path) -> None:
    strict = "{plugin: prices, name: strict, strict: true}"
    text = config("flush_seconds: 0.01, spool_bytes: 20000", url=f"sqlite:///{tmp_path}/x.db", before=strict)
    text = text.replace("gpt-4o-mini, params: {first", "unknown, params: {first")
    async with running(text) as gateway:
        for _ in range(100):
            assert await call(gateway, "slow") == 400
        journal = gateway.plugin("cost", "ledger").writer.journal
        await until(lambda: journal._spool.left.records == 0)
        assert journal.problem is None
        assert await call(gateway) == 200


async def calls_until_well(gateway: Running) -> int:
    """How many calls are made until the ledger has found out that its disk is well again."""
    for calls in range(1, 500):
        assert await call(gateway) == 200
        if gateway.plugin("cost", "ledger").health().ok:
            return calls
        await asyncio.sleep(0.02)
    raise AssertionError(gateway.plugin("cost", "ledger").health().detail)


async def test_a_spool_that_takes_nothing_is_done_without_while_the_database_takes_all(tmp_path: Path) -> None:
    async with running(config("flush_seconds: 0.01, spool_bytes: 1", url=f"sqlite:///{tmp_path}/x.db")) as gateway:
        plugin = gateway.plugin("cost", "ledger")
        for _ in range(20):
            assert await call(gateway) == 200
        await until(lambda: plugin.writer.waiting == 0)
        assert "the spool cannot be used" in plugin.health().detail
        await gateway.reload(config("flush_seconds: 0.02", url=f"sqlite:///{tmp_path}/x.db"))
        calls = 20 + await calls_until_well(gateway)
        await until(lambda: plugin.writer.waiting == 0)
    database = sqlite3.connect(tmp_path / "x.db")
    assert database.execute("SELECT count(*), count(DISTINCT id) FROM receipts").fetchone() == (calls, calls)
    database.close()


async def test_receipts_stay_on_disk_and_not_in_memory_while_the_database_is_away(tmp_path: Path) -> None:
    path = tmp_path / "x.db"
    async with running(config(url=f"sqlite:///{path}")) as gateway:
        writer = gateway.plugin("cost", "ledger").writer
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        statuses = await asyncio.gather(*(call(gateway) for _ in range(200)))
        assert set(statuses) == {200}
        await until(lambda: writer.waiting == 200)
        assert writer.journal.in_memory == 0
        await until(lambda: not writer.journal._spool.unsynced)
        other.execute("ROLLBACK")
        other.close()
        await until(lambda: writer.waiting == 0)
    database = sqlite3.connect(path)
    assert database.execute("SELECT count(*), count(DISTINCT id) FROM receipts").fetchone() == (200, 200)
    database.close()


async def test_a_spool_that_cannot_be_used_stops_the_start_and_says_why(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    for spool, why in ((tmp_path / "file", "Not a directory"), (tmp_path / "no" / "where", "No such file")):
        with pytest.raises(StartupError) as error:
            async with running(config(f'spool: "{spool}"')):
                pass
        assert f"the spool {spool} cannot be used: {why}" in str(error.value)
        assert "name another one in `spool`" in str(error.value)


async def test_another_spool_is_another_writer_and_the_old_one_ends_clean(tmp_path: Path) -> None:
    text = config('flush_seconds: 0.01, spool: "one"')
    async with running(text) as gateway:
        slow = asyncio.create_task(call(gateway, "slow"))
        await until(lambda: gateway.gateway.current.running == 1)
        assert (gateway.folder / "one" / "0").is_dir()
        await gateway.reload(config('flush_seconds: 0.01, spool: "two"'))
        assert (gateway.folder / "two" / "0").is_dir()
        assert await call(gateway) == 200
        assert await slow == 200
        await until(lambda: not (gateway.folder / "one").exists())
        await until(lambda: gateway.plugin("cost", "ledger").writer.waiting == 0)
        database = sqlite3.connect(gateway.folder / "ledger.db")
        assert database.execute("SELECT count(*) FROM receipts").fetchone() == (2,)
        database.close()
