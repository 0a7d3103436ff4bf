"""`qlens ledger`: what was backed up comes back to the last picodollar, into either database, and `verify` sees all."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from ledgers import Place, PostgresPlace, SqlitePlace

from qlens import Caller, Cost, Receipt, Target, Usage, usd
from qlens.cli import main
from qlens.testing import running
from qlens.testing.postgres import PostgresServer
from qlens_plugins.cost.ledger import backup, rows, sums, versions
from qlens_plugins.cost.ledger.postgres import schema as postgres_schema
from qlens_plugins.cost.ledger.rests import kept_since_ns
from qlens_plugins.cost.ledger.rollups import COARSE, DAY, GROUPED, HOUR
from qlens_plugins.cost.ledger.sqlite import schema as sqlite_schema
from qlens_plugins.cost.ledger.sqlite import writing
from qlens_plugins.cost.ledger.store import Batch, Database, Store
from qlens_plugins.cost.ledger.sums import LAST_SECOND, Question

DAY_NS = 86_400 * 10**9
OCTOBER = 1_790_812_800 * 10**9
"""2026-10-01 in UTC, in Unix nanoseconds."""


def call_id(n: int, wall_ns: int) -> str:
    digits = f"{wall_ns // 10**6:012x}"
    return f"{digits[:8]}-{digits[8:]}-7000-8000-{n:012x}"


def receipt(n: int, wall_ns: int, **changes: Any) -> Receipt:
    target = Target("echo", f"model-{n % 3}", f"model-{n % 3}")
    values: dict[str, Any] = {
        "id": call_id(n, wall_ns), "caller": Caller("acme", "bob", "keys", "web", f"key-{n % 2}"), "operation": "chat",
        "model": f"model-{n % 3}", "target": target, "outcome": "complete", "status": 200, "error": None,
        "usage": Usage(input=n, output=3, source="provider", meters={"images": n % 2}),
        "cost": Cost(2**62 + n, "exact", "*/m"), "saved_picos": n, "cache": "off", "streamed": n % 2 == 0,
        "attempts": (), "tags": {"team": "a\\b"}, "wall_ns": wall_ns, "ttft_us": 1, "total_us": 1000 * n,
        "overhead_us": 3, "bytes_out": 4, "config_version": "v",
    }  # fmt: skip
    return Receipt(**{**values, **changes})


def fill(store: Store, count: int = 60, step_ns: int = DAY_NS) -> None:
    """Receipts over two months, and some refused calls."""
    made = [rows.row(receipt(n, OCTOBER + n * step_ns)) for n in range(count)]
    key = rows.rejection(receipt(1, OCTOBER, outcome="rejected", status=429, error="rate_limit_exceeded", model=None))
    store.write("filled", Batch(1, made, {key: 7}))
    store.close()


def fill_and_forget(place: Place, days: int) -> None:
    """Receipts of 20 days, of which the first are gone."""
    store = place.store()
    fill(store, 20)
    store.forget(OCTOBER + days * DAY_NS)
    store.close()


def config(place: Place, ledger: str = "") -> str:
    return f"""
pipeline: {{auth: [{{plugin: anonymous}}], cost: [{{plugin: ledger, url: "{place.url}", {ledger}}}]}}
providers: {{echo: {{plugin: echo}}}}
models: {{echo: {{max_output_tokens: 10, targets: [{{provider: echo, model: echo}}]}}}}
"""


def qlens(folder: Path, place: Place, *words: str) -> int:
    (folder / "qlens.yaml").write_text(config(place))
    return main(["ledger", *words, "-c", str(folder / "qlens.yaml")])


RECEIPTS = "SELECT * FROM receipts ORDER BY id"


def plain(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Receipts as they are in any database."""
    return [{**row, **{name: json.loads(row[name]) for name in ("meters", "tags")}} for row in found]


def test_a_backup_comes_back_into_either_database(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(place.store())
    file = tmp_path / "ledger.jsonl"
    assert qlens(tmp_path, place, "backup", str(file)) == 0
    assert "60 receipts and 1 counts of refused calls" in capsys.readouterr().out
    assert file.stat().st_mode & 0o777 == 0o600
    assert qlens(tmp_path, place, "backup", str(file)) == 1
    assert "is there already" in capsys.readouterr().err
    other = SqlitePlace(tmp_path / "other.db")
    assert qlens(tmp_path, other, "restore", str(file)) == 0
    assert plain(other.rows(RECEIPTS)) == plain(place.rows(RECEIPTS))
    assert other.rows("SELECT * FROM rejections") == place.rows("SELECT * FROM rejections")
    capsys.readouterr()
    for each in (place, other):
        assert qlens(tmp_path, each, "verify") == 0
    total = sum(2**62 + n for n in range(60))
    line = f"60 receipts, {usd(total)} USD: the roll-ups agree\n"
    assert capsys.readouterr().out == 2 * line
    # The same again is the same, and a ledger that has something in it is left alone.
    assert qlens(tmp_path, other, "restore", str(file)) == 0
    assert len(other.rows(RECEIPTS)) == 60
    assert [row["calls"] for row in other.rows("SELECT * FROM rejections")] == [7]
    assert qlens(tmp_path, place, "restore", str(file)) == 1
    assert "is not empty" in capsys.readouterr().err


# Each table with its groups, in the order of what it says: the same in any ledger that says the same.
ROLL_UPS = {
    (seconds, name): (question, by)
    for seconds, width in (("hours", HOUR), ("days", DAY))
    for name, by in (("fine", GROUPED), ("coarse", COARSE))
    for question in [Question(0, LAST_SECOND // DAY * DAY, width, by)]
}


def said(place: Place) -> dict[Any, Any]:
    """All that the roll-ups say, and from when on all receipts are there."""

    def read(database: Database) -> dict[Any, Any]:
        found: dict[Any, Any] = {"since": kept_since_ns(database)}
        for name, (question, by) in ROLL_UPS.items():
            assert question.width is not None
            parts = sums.part(database, question, question.width, question.start, question.end)
            found[name] = {(start, plain_group(group)): each.values for (start, group), each in parts}
            for day in {start for start, _ in found[name]} if name[0] == "days" else ():
                slow = sums.latencies(database, Question(day, day + DAY, None, by), receipts=False)
                found[name, day] = {plain_group(group): calls for group, calls in slow.items()}
        return found

    store = place.store()
    try:
        return store.reading(60).run(read)
    finally:
        store.close()


def plain_group(group: Sequence[str]) -> tuple[str, ...]:
    """A group's values; tags are JSON, which databases write in ways of their own."""
    return tuple(json.dumps(json.loads(value)) if value.startswith("{") else value for value in group)


@pytest.mark.parametrize("into", ["sqlite", "postgres"])
@pytest.mark.parametrize("kept_days", [31, 60, 1000])
def test_what_roll_ups_say_of_deleted_receipts_comes_back_into_either_database(
    into: str,
    kept_days: int,
    place: Place,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    postgres: PostgresServer,
) -> None:
    store = place.store()
    fill(store, 120, DAY_NS // 2)
    while store.forget(OCTOBER + kept_days * DAY_NS):
        pass
    # What comes late is among what was deleted.
    late = [rows.row(receipt(200 + n, OCTOBER + 5 * DAY_NS, cost=Cost(None, "unpriced", None))) for n in range(3)]
    store.write("filled", Batch(2, late, {}))
    store.close()
    assert len(place.rows(RECEIPTS)) < 120
    before, file = said(place), tmp_path / "ledger.jsonl"
    assert sum(each["calls"] for each in before["days", "fine"].values()) == 123
    assert qlens(tmp_path, place, "backup", str(file)) == 0
    assert "roll-ups of receipts that are deleted, are in" in capsys.readouterr().out
    other: Place = SqlitePlace(tmp_path / "other.db")
    if into == "postgres":
        other = PostgresPlace(postgres, postgres.new_database())
    for _ in range(2):  # the same again is the same
        assert qlens(tmp_path, other, "restore", str(file)) == 0
        assert said(other) == before
        assert plain(other.rows(RECEIPTS)) == plain(place.rows(RECEIPTS))
        assert qlens(tmp_path, other, "verify") == 0
    # And on into a third one, by way of a backup of the second.
    last, again = SqlitePlace(tmp_path / "last.db"), tmp_path / ("again.db" if into == "sqlite" else "again.jsonl")
    assert qlens(tmp_path, other, "backup", str(again)) == 0
    assert qlens(tmp_path, last, "restore", str(again)) == 0
    assert said(last) == before


def test_a_ledger_with_roll_ups_alone_is_not_empty(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place, other = SqlitePlace(tmp_path / "x.db"), SqlitePlace(tmp_path / "other.db")
    for each, day in ((place, 0), (other, 1)):
        store = each.store()
        store.write("filled", Batch(1, [rows.row(receipt(1, OCTOBER + day * DAY_NS))], {}))
        store.forget(OCTOBER + 2 * DAY_NS)
        store.close()
        assert qlens(tmp_path, each, "backup", str(tmp_path / f"{day}.jsonl")) == 0
    new = SqlitePlace(tmp_path / "new.db")
    assert qlens(tmp_path, new, "restore", str(tmp_path / "0.jsonl")) == 0
    assert qlens(tmp_path, new, "restore", str(tmp_path / "1.jsonl")) == 1
    assert "is not empty" in capsys.readouterr().err
    assert said(new) == said(place)


def test_a_backup_of_the_first_format_is_read_and_sums_of_a_later_version_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place, file = SqlitePlace(tmp_path / "x.db"), tmp_path / "ledger.jsonl"
    fill_and_forget(place, 3)
    assert qlens(tmp_path, place, "backup", str(file)) == 0
    text = file.read_text()
    first = [line for line in text.splitlines() if "roll_up" not in line and "kept_since" not in line]
    first[-1] = json.dumps({"end": {"receipts": 17, "rejections": 1}}, separators=(",", ":"))
    file.write_text("\n".join([first[0].replace('"qlens_ledger":2', '"qlens_ledger":1'), *first[1:]]) + "\n")
    assert qlens(tmp_path, SqlitePlace(tmp_path / "first.db"), "restore", str(file)) == 0
    file.write_text(text.replace('"calls":"1"', '"calls":"1","glances":"1"', 1))
    capsys.readouterr()
    assert qlens(tmp_path, SqlitePlace(tmp_path / "later.db"), "restore", str(file)) == 1
    assert "sums that this QLens does not know" in capsys.readouterr().err


def test_a_copy_of_an_older_version_is_refused_with_the_way_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    old = SqlitePlace(tmp_path / "old.db")
    with monkeypatch.context() as patch:
        patch.setattr(sqlite_schema, "MIGRATIONS", sqlite_schema.MIGRATIONS[:3])
        store = old.store()
        store.connect()
        store.close()
    new = SqlitePlace(tmp_path / "new.db")
    assert qlens(tmp_path, new, "restore", str(old.path)) == 1
    assert "run `qlens ledger migrate` on a copy of it first" in capsys.readouterr().err
    assert qlens(tmp_path, old, "migrate") == 0
    assert qlens(tmp_path, new, "restore", str(old.path)) == 0


def test_an_sqlite_ledger_moves_into_either_database(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = SqlitePlace(tmp_path / "old.db")
    fill(old.store())
    copy = tmp_path / "copy.db"
    assert qlens(tmp_path, old, "backup", str(copy)) == 0
    assert SqlitePlace(copy).rows(RECEIPTS) == old.rows(RECEIPTS)
    assert qlens(tmp_path, place, "restore", str(copy)) == 0
    assert plain(place.rows(RECEIPTS)) == plain(old.rows(RECEIPTS))
    assert qlens(tmp_path, place, "verify") == 0
    if not isinstance(place, SqlitePlace):
        capsys.readouterr()
        assert qlens(tmp_path, place, "backup", str(tmp_path / "x.db")) == 1
        assert "name it x.jsonl" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda lines: lines[:-1], "is cut short"),
        (lambda lines: [*lines[:5], *lines[6:]], "has not as many lines as it says"),
        (lambda lines: [*lines[:5], b"nonsense\n", *lines[5:]], "line 6 is no line of a ledger's backup"),
        (lambda lines: [*lines[:5], b'{"receipt": {"id": "x"}}\n', *lines[5:]], "line 6 is no line of a backup"),
        (lambda lines: lines[1:], "is no backup of a ledger"),
        (lambda _: [], "line 1 is no line"),
    ],
)
def test_a_damaged_backup_is_refused(
    harm: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = SqlitePlace(tmp_path / "x.db")
    fill(place.store(), 20)
    file = tmp_path / "ledger.jsonl"
    place.store().reading(10).run(lambda database: backup.write(database, file))
    file.write_bytes(b"".join(harm(file.read_bytes().splitlines(keepends=True))))
    assert qlens(tmp_path, SqlitePlace(tmp_path / "new.db"), "restore", str(file)) == 1
    assert message in capsys.readouterr().err


def _dumped(tmp_path: Path) -> tuple[Path, list[bytes]]:
    """A backup of 20 receipts, and its lines."""
    place, file = SqlitePlace(tmp_path / "x.db"), tmp_path / "ledger.jsonl"
    fill(place.store(), 20)
    place.store().reading(10).run(lambda database: backup.write(database, file))
    return file, file.read_bytes().splitlines(keepends=True)


def test_one_line_twice_for_another_is_seen_and_an_older_backup_says_what_came(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, lines = _dumped(tmp_path)
    changed = [*lines[:3], lines[2], *lines[4:]]
    file.write_bytes(b"".join(changed))
    new = SqlitePlace(tmp_path / "new.db")
    assert qlens(tmp_path, new, "restore", str(file)) == 1
    assert "its lines are not those that were written" in capsys.readouterr().err
    assert new.rows(RECEIPTS) == []
    for harm, count in ((changed, 19), (lines, 20)):
        end = json.loads(lines[-1])
        del end["sha256"]
        file.write_bytes(b"".join(harm[:-1]) + json.dumps(end, separators=(",", ":")).encode())
        old = SqlitePlace(tmp_path / f"{count}.db")
        assert qlens(tmp_path, old, "restore", str(file)) == 0
        assert f"{count} receipts and 1 counts of refused calls are in" in capsys.readouterr().out
        assert len(old.rows(RECEIPTS)) == count


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("cost_picos", "abc"), ("cost_picos", 1.5), ("cost_picos", 10**25), ("cost_picos", -1), ("cost_picos", True),
        ("wall_ns", "x"), ("wall_ns", -(10**18)), ("input", -5), ("total_us", None), ("tenant", None), ("streamed", 1),
        ("meters", [1]), ("meters", '{"images":-1}'), ("meters", '{"images":1.5}'),
        ("attempts", "{"), ("attempts", "{}"), ("tags", "[]"),
    ],
)  # fmt: skip
def test_a_value_of_another_type_than_its_column_s_is_refused_and_nothing_is_written(
    column: str, value: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backup, "AT_ONCE", 7)
    file, lines = _dumped(tmp_path)
    told = json.loads(lines[15])
    told["receipt"][column] = value
    end = json.dumps({"end": json.loads(lines[-1])["end"]}, separators=(",", ":")).encode()
    file.write_bytes(b"".join([*lines[:15], json.dumps(told).encode() + b"\n", *lines[16:-1], end]))
    new = SqlitePlace(tmp_path / "new.db")
    assert qlens(tmp_path, new, "restore", str(file)) == 1
    assert f"line 16 is no line of a backup: {column} is " in capsys.readouterr().err
    assert new.rows(RECEIPTS) == []


def _of_receipt(column: str, value: str) -> Any:
    """A value that SQLite takes, and what is said of it; `value` is SQL."""
    return f"UPDATE receipts SET {column} = {value} WHERE rowid = 6", f"receipts, row with rowid 6: {column} is "


DAY_OF_ROW = f"start {OCTOBER // 10**9}, group_id 1"
# Row 6 is not among the first that are written; of the first days the receipts are deleted.
HARMED = [
    *(
        _of_receipt(column, value)
        for column, value in [
            ("cost_picos", "'abc'"), ("cost_picos", "-1"), ("cost_picos", "1.5"), ("cost_picos", "x'00'"),
            ("cost_picos", "1e30"), ("wall_ns", "'x'"), ("wall_ns", "-1e300"), ("input", "-5"), ("ttft_us", "'1 ms'"),
            ("id", "NULL"), ("id", "x'ff'"), ("tenant", "x'6163'"), ("tenant", "CAST(x'ff' AS TEXT)"),
            ("project", "x'ff'"), ("streamed", "2"), ("streamed", "'yes'"), ("meters", "'[1]'"), ("meters", "'{'"),
            ("meters", "'{\"images\":-1}'"), ("attempts", "'{}'"), ("tags", "'[]'"), ("tags", "''"),
        ]
    ),
    ("UPDATE rejections SET calls = -7", "rejections, row with day '2026-10-01', tenant 'acme', "),
    ("UPDATE rejections SET calls = -7", "status 429, error 'rate_limit_exceeded': calls is -7 and must be a whole"),
    ("UPDATE rejections SET status = 'x'", "status is 'x' and must be a whole number"),
    ("UPDATE receipts_kept SET since_ns = 'x'", "receipts_kept, row with rowid 1: since_ns is 'x' and must be"),
    ("UPDATE usage_days SET calls = 'x' WHERE group_id = 1", f"usage_days, row with {DAY_OF_ROW}: calls is 'x' and"),
    ("UPDATE usage_days SET start = 'x' WHERE start = 1790899200", "usage_days, row with start 'x', group_id "),
    ("UPDATE usage_hours SET cost_low = 0.5", f"usage_hours, row with {DAY_OF_ROW}: cost_low is 0.5 and must be"),
    ("UPDATE usage_latencies SET calls = x'00'", f"usage_latencies, row with {DAY_OF_ROW}, latency 0: calls is b"),
    ("UPDATE usage_groups SET tags = 'x' WHERE id = 2", "usage_groups, row with id 2: tags is 'x' and must be JSON"),
    ("UPDATE usage_groups SET model = x'ff' WHERE id = 2", "usage_groups, row with id 2: model is b'\\xff' and"),
]  # fmt: skip


@pytest.mark.parametrize(("harm", "told"), HARMED)
def test_a_value_that_sqlite_takes_and_no_column_has_is_refused_and_nothing_is_written(
    harm: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of SQLite's is held to what a backup is held to."""
    monkeypatch.setattr(backup, "AT_ONCE", 3)
    old, new = SqlitePlace(tmp_path / "old.db"), SqlitePlace(tmp_path / "new.db")
    fill_and_forget(old, 2)
    whole = SqlitePlace(tmp_path / "whole.db")
    assert qlens(tmp_path, old, "backup", str(whole.path)) == 0
    for trigger in old.rows("SELECT name FROM sqlite_master WHERE type = 'trigger'"):
        old.execute(f"DROP TRIGGER {trigger['name']}")
    old.execute(harm)
    capsys.readouterr()
    assert qlens(tmp_path, new, "restore", str(old.path)) == 1
    message = capsys.readouterr().err
    assert f"{old.path}: " in message
    assert told in message
    for table in ("receipts", "rejections", "usage_groups", "writers"):
        assert new.rows(f"SELECT * FROM {table}") == []
    assert qlens(tmp_path, new, "restore", str(whole.path)) == 0
    assert len(new.rows(RECEIPTS)) == 18
    assert said(new) == said(whole)


def test_a_value_that_sqlite_took_is_not_made_right_by_a_backup(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, file = SqlitePlace(tmp_path / "old.db"), tmp_path / "ledger.jsonl"
    fill(old.store(), 20)
    old.execute("UPDATE receipts SET streamed = 'no' WHERE rowid = 6")
    assert qlens(tmp_path, old, "backup", str(file)) == 0
    assert qlens(tmp_path, SqlitePlace(tmp_path / "new.db"), "restore", str(file)) == 1
    assert "line 7 is no line of a backup: streamed is 'no' and must be true or false" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (("start", -1), "start is -1 and must be a whole number from 0"),
        (("start", True), "start is True"),
        (("tenant", None), "tenant is None and must be a text"),
        (("tags", "x"), "tags is 'x' and must be JSON"),
        (("latencies", {"7": 1.5}), "7 is 1.5 and must be a whole number"),
        (("sums", {"calls": "x"}), "'x' is no sum"),
    ],
)
def test_what_a_backup_says_of_deleted_receipts_is_checked(
    harm: tuple[str, Any], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, file = SqlitePlace(tmp_path / "old.db"), tmp_path / "ledger.jsonl"
    fill_and_forget(old, 2)
    assert qlens(tmp_path, old, "backup", str(file)) == 0
    lines = file.read_text().splitlines()
    (number, *_) = (number for number, line in enumerate(lines) if line.startswith('{"roll_up"'))
    changed = json.loads(lines[number])
    changed["roll_up"][harm[0]] = harm[1]
    lines[number] = json.dumps(changed)
    file.write_text("\n".join(lines) + "\n")
    new = SqlitePlace(tmp_path / "new.db")
    assert qlens(tmp_path, new, "restore", str(file)) == 1
    assert f"line {number + 1} is no line of a backup: {told}" in capsys.readouterr().err
    assert new.rows(RECEIPTS) == []


def test_a_restore_that_was_cut_off_goes_on(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backup, "AT_ONCE", 7)
    old = SqlitePlace(tmp_path / "old.db")
    fill(old.store())
    file = tmp_path / "ledger.jsonl"
    old.store().reading(10).run(lambda database: backup.write(database, file))

    class Failing:
        """A store that goes away."""

        def __init__(self, store: Store) -> None:
            self.store, self.reading, self.left = store, store.reading, 4

        def write(self, writer: str, batch: Batch) -> None:
            self.left -= 1
            if self.left < 0:
                raise RuntimeError("away")
            self.store.write(writer, batch)

    store = place.store()
    store.connect()
    with pytest.raises(BaseException):  # noqa: B017 - any
        backup.Source(file).restore(Failing(store), lambda: None)  # type: ignore[arg-type]
    assert len(place.rows(RECEIPTS)) == 28
    backup.Source(file).restore(store, lambda: None)
    store.close()
    assert plain(place.rows(RECEIPTS)) == plain(old.rows(RECEIPTS))
    assert qlens(tmp_path, place, "verify") == 0


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        ("UPDATE receipts SET cost_picos = cost_picos + 1 WHERE total_us = 5000", "cost is"),
        ("DELETE FROM receipts WHERE total_us = 5000", "calls is 0 in the receipts, 1 in the roll-ups"),
        ("DELETE FROM usage_hours", "calls is 1 in the receipts, 0 in the roll-ups"),
        ("UPDATE usage_days SET calls = calls + 1", "calls is 1 in the receipts, 2 in the roll-ups"),
        ("UPDATE usage_latencies SET latency = latency + 1", "the latencies in the roll-ups are not those"),
        ("DELETE FROM usage_coarse_days", "calls is 1 in the receipts, 0 in the roll-ups"),
        ("UPDATE usage_coarse_days SET failed = failed + 1", "failed is 0 in the receipts, 1 in the roll-ups"),
        ("UPDATE usage_coarse_latencies SET calls = calls + 1", "the latencies in the roll-ups are not those"),
        ('UPDATE usage_groups SET tags = \'{"team":"b"}\'', "calls is 0 in the receipts, 1 in the roll-ups"),
    ],
)
def test_verify_sees_a_difference(
    place: Place, harm: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(place.store(), 10)
    place.execute(harm)
    assert qlens(tmp_path, place, "verify") == 1
    out = capsys.readouterr().out
    assert told in out
    assert "differences" in out.splitlines()[-1]


def test_a_server_that_takes_nothing_is_read_all_the_same(
    postgres: PostgresServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a standby is: who takes backups of it keeps no gateway waiting."""
    place = PostgresPlace(postgres, postgres.new_database())
    fill(place.store(), 10)
    place.execute(f"ALTER DATABASE {place.name} SET default_transaction_read_only = on")
    assert qlens(tmp_path, place, "verify") == 0
    assert qlens(tmp_path, place, "backup", str(tmp_path / "ledger.jsonl")) == 0
    assert "10 receipts and 1 counts of refused calls" in capsys.readouterr().out
    assert qlens(tmp_path, place, "migrate") == 1
    assert "read-only transaction" in capsys.readouterr().err


def test_a_command_that_an_operator_of_the_server_ends_says_so(
    postgres: PostgresServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = PostgresPlace(postgres, postgres.new_database())
    fill(place.store(), 10)

    def cancelled() -> None:
        found: list[dict[str, Any]] = []
        while not found:
            time.sleep(0.02)
            found = place.rows(
                "SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE wait_event_type = 'Lock' "
                "AND datname = current_database() AND application_name = 'qlens questions'"
            )

    async def locked() -> int:
        other = await asyncpg.connect(place.url)
        async with other.transaction():
            await other.execute("LOCK TABLE usage_days")
            thread = asyncio.create_task(asyncio.to_thread(cancelled))
            code = await asyncio.to_thread(qlens, tmp_path, place, "verify")
            await thread
        await other.close()
        return code

    assert asyncio.run(locked()) == 1
    assert "canceling statement due to user request" in capsys.readouterr().err


def test_a_ledger_that_somebody_locks_for_long_is_told_of(
    postgres: PostgresServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(versions, "SECONDS", 1)
    place = PostgresPlace(postgres, postgres.new_database())
    fill(place.store(), 10)

    async def locked() -> int:
        other = await asyncpg.connect(place.url)
        async with other.transaction():
            await other.execute("LOCK TABLE receipts")
            code = await asyncio.to_thread(qlens, tmp_path, place, "verify")
        await other.close()
        return code

    assert asyncio.run(locked()) == 2
    assert "has not answered within 1 s: somebody may lock it" in capsys.readouterr().err


def test_migrate_makes_the_tables(place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert qlens(tmp_path, place, "migrate") == 0
    assert "has the tables of this version" in capsys.readouterr().out
    assert place.rows("SELECT owner FROM versions") == [{"owner": "ledger"}]
    assert qlens(tmp_path, place, "verify") == 0
    assert capsys.readouterr().out == "0 receipts, 0 USD: the roll-ups agree\n"


def test_coarse_roll_ups_begin_with_what_was_summed_up_before_and_have_what_older_gateways_write(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    schema, before = (sqlite_schema, 5) if isinstance(place, SqlitePlace) else (postgres_schema, 1)
    old = place.store()
    with monkeypatch.context() as patch:
        patch.setattr(schema, "MIGRATIONS", schema.MIGRATIONS[:before])
        old.write("old", Batch(1, [rows.row(receipt(n, OCTOBER + n * DAY_NS // 4)) for n in range(40)], {}))
    assert place.rows("SELECT * FROM usage_coarse_days") == []
    assert qlens(tmp_path, place, "migrate") == 0
    # The gateway of the older version runs on, and adds to old groups and new ones.
    for number in (2, 3):
        more = [rows.row(receipt(n, OCTOBER + 9 * DAY_NS + n)) for n in range(40, 50 * number)]
        old.write("old", Batch(number, more, {}))
    old.close()
    capsys.readouterr()
    assert qlens(tmp_path, place, "verify") == 0
    assert capsys.readouterr().out.startswith("150 receipts, ")
    assert sum(row["calls"] for row in place.rows("SELECT calls FROM usage_coarse_days")) == 150


# --- what is old -------------------------------------------------------------------------------


def test_old_receipts_go_and_their_sums_stay(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(writing, "FORGOTTEN_AT_ONCE", 7)
    store = place.store()
    fill(store)
    odd = rows.row(receipt(99, OCTOBER + DAY_NS, id="an id without a time"))
    store.write("filled", Batch(2, [odd], {}))
    before = [place.rows(f"SELECT * FROM {table} ORDER BY start, group_id") for table in ("usage_hours", "usage_days")]
    november = OCTOBER + 31 * DAY_NS
    while store.forget(november + DAY_NS):
        pass
    kept = {row["wall_ns"] for row in place.rows(RECEIPTS)}
    first = november + DAY_NS if isinstance(place, SqlitePlace) else november
    assert kept == {wall_ns for wall_ns in range(OCTOBER, OCTOBER + 60 * DAY_NS, DAY_NS) if wall_ns >= first}
    # What comes late, or again, is not lost; and there may be nothing left to delete.
    store.write("filled", Batch(3, [rows.row(receipt(61, november + 5 * DAY_NS))], {}))
    assert not store.forget(november + DAY_NS)
    store.close()
    assert len(place.rows(RECEIPTS)) == len(kept) + 1
    after = [place.rows(f"SELECT * FROM {table} ORDER BY start, group_id") for table in ("usage_hours", "usage_days")]
    assert all(row in rolled for rolled, rows_ in zip(after, before, strict=True) for row in rows_[:30])
    assert qlens(tmp_path, place, "verify") == 0
    assert f"{len(kept) + 1} receipts" in capsys.readouterr().out


async def test_a_gateway_deletes_what_is_older_than_its_days(place: Place) -> None:
    store, now = place.store(), time.time_ns()
    old = [rows.row(receipt(n, now - 100 * DAY_NS + n)) for n in range(5)]

    def fill() -> None:
        store.write("filled", Batch(1, [*old, rows.row(receipt(9, now - 39 * DAY_NS))], {}))
        store.close()  # in the same thread: what SQLite opened in one can be closed in no other

    await asyncio.to_thread(fill)
    async with running(config(place, "keep_days: 40, flush_seconds: 0.01")) as gateway:
        body = {"model": "echo", "messages": [{"role": "user", "content": "hello"}]}
        assert (await gateway.post("/v1/chat/completions", body)).status == 200
        async with asyncio.timeout(10):
            while len(place.rows(RECEIPTS)) != 2:
                await asyncio.sleep(0.05)
    assert place.rows(RECEIPTS)[0]["total_us"] == 9000
    assert sum(row["calls"] for row in place.rows("SELECT calls FROM usage_days")) == 7
