"""The arithmetic of roll-ups: whatever the receipts are and in whatever batches they come, sums are exact."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import time
from collections.abc import Callable, Iterator
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from attrs import define, evolve, field
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from ledgers import PostgresPlace

from qlens import Caller, Cost, InvalidRequest, Receipt, Target, Unavailable, Usage
from qlens.stores.sqlite import APPLICATION
from qlens.testing.postgres import PostgresServer
from qlens_plugins.cost.ledger import reader as reading
from qlens_plugins.cost.ledger import rollups, rows, sums, usage, verifying
from qlens_plugins.cost.ledger.postgres import PostgresStore
from qlens_plugins.cost.ledger.reader import Reader
from qlens_plugins.cost.ledger.rows import LARGEST
from qlens_plugins.cost.ledger.sqlite import SqliteStore, schema, writing
from qlens_plugins.cost.ledger.sqlite.reading import SqliteDatabase
from qlens_plugins.cost.ledger.store import Batch, Database
from qlens_plugins.cost.ledger.summary import percentile
from qlens_plugins.cost.ledger.sums import Question

DAY_NS = 86_400 * 10**9
NOON = 20_000 * 86_400
"""Midnight of some day, in Unix seconds."""

_COUNT = st.integers(0, 5000) | st.integers(0, LARGEST)
_USAGE = st.builds(
    Usage,
    *([_COUNT] * 8),
    meters=st.dictionaries(st.sampled_from(["images", "seconds", "characters", 'o"dd']), st.integers(0, 2**40)),
)
_RECEIPT = st.builds(
    Receipt,
    id=st.integers(0, 30).map("call-{}".format),
    caller=st.builds(
        Caller,
        st.sampled_from(["acme", "globex", "a/b", "100%", ""]),
        st.sampled_from(["ann", "bob"]),
        st.just("keys"),
        st.sampled_from([None, "web", "b"]),
        st.sampled_from([None, "key-1", "key-2"]),
    ),
    operation=st.sampled_from(["chat", "embeddings", "images"]),
    model=st.sampled_from([None, "one", "two"]),
    target=st.sampled_from([None, Target("echo", "one", "one"), Target("other", "two", "two")]),
    outcome=st.sampled_from(["complete", "cached", "failed", "abandoned", "blocked", "cut"]),
    status=st.just(200),
    error=st.none(),
    usage=_USAGE,
    cost=st.builds(Cost, st.none() | _COUNT, st.sampled_from(["exact", "estimated"])),
    saved_picos=st.integers(0, LARGEST),
    cache=st.sampled_from(["hit", "miss", "semantic", "off"]),
    streamed=st.booleans(),
    attempts=st.just(()),
    tags=st.dictionaries(st.sampled_from(["team", "a.b"]), st.sampled_from(["x", "y"])),
    wall_ns=st.integers(NOON * 10**9 - DAY_NS, NOON * 10**9 + 2 * DAY_NS),
    ttft_us=st.none(),
    total_us=st.integers(0, 10**7) | st.integers(0, LARGEST),
    overhead_us=st.just(0),
    bytes_out=st.just(0),
    config_version=st.just("v"),
)  # fmt: skip


def made() -> sqlite3.Connection:
    database = sqlite3.connect(":memory:", isolation_level=None)
    migrate(database, len(schema.MIGRATIONS))
    return database


def migrate(database: sqlite3.Connection, versions: int, present: int = 0) -> None:
    for statement in (statement for version in schema.MIGRATIONS[present:versions] for statement in version):
        database.execute(statement)


def without_coarse(database: sqlite3.Connection) -> None:
    """As a file of version 5 is."""
    for kind, name in database.execute(
        "SELECT type, name FROM sqlite_master WHERE name LIKE 'usage\\_coarse\\_%' ESCAPE '\\' OR type = 'trigger'"
    ).fetchall():
        if kind in {"table", "trigger"}:
            database.execute(f"DROP {kind} {name}")


def write(database: sqlite3.Connection, receipts: list[Receipt]) -> None:
    """As the writer does."""
    last = writing.last_row(database)
    writing.insert(database, list(map(rows.row, receipts)), {})
    writing.roll_up(database, last)


def expected(receipts: list[Receipt], question: Question, key: Callable[[Receipt], Any]) -> dict[Any, tuple[int, ...]]:
    found: dict[Any, list[int]] = {}
    for one in receipts:
        second = one.wall_ns // 10**9
        if not question.start <= second < question.end:
            continue
        bucket = 0 if question.width is None else second // question.width * question.width
        values = (
            *(1, one.outcome in {"failed", "cut"}, one.cache in {"hit", "semantic"}, one.cost.picos is None),
            *(one.usage.input, one.usage.audio_out, one.usage.meters.get("images", 0), one.cost.picos or 0),
            one.saved_picos,
        )
        added = found.setdefault((bucket, key(one)), [0] * len(values))
        for place, value in enumerate(values):
            added[place] += value
    return {group: tuple(values) for group, values in found.items()}


GROUPS = ("usage_groups", "usage_coarse_groups")
TABLES = ("usage_hours", "usage_days", "usage_latencies", "usage_coarse_days", "usage_coarse_latencies")
NAMES = ("calls", "failed", "cached", "unpriced", "input", "audio_out", "images", "cost", "saved")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.lists(_RECEIPT, max_size=12), max_size=5),
    st.integers(NOON - 90_000, NOON + 90_000),
    st.integers(1, 200_000),
    st.sampled_from([None, 60, 3600, 86_400]),
)
def test_sums_are_those_of_the_receipts_that_were_inserted(
    batches: list[list[Receipt]], start: int, length: int, width: int | None
) -> None:
    database = made()
    for batch in batches:
        write(database, batch)
    first: dict[str, Receipt] = {}
    for one in (one for batch in batches for one in batch):
        first.setdefault(one.id, one)
    inserted = list(first.values())
    for by, key in (
        (("model", "tenant"), lambda one: (one.model or "", one.caller.tenant)),
        (("subject",), lambda one: (one.caller.subject,)),
        (("tag:a.b", "provider"), lambda one: (one.tags.get("a.b", ""), one.target.provider if one.target else "")),
    ):
        question = Question(start, start + length, width, by)
        found = sums.read(SqliteDatabase(database), question)
        assert {group: tuple(added[name] for name in NAMES) for group, added in found.items()} == expected(
            inserted, question, key
        )
        whole = sums.latencies(SqliteDatabase(database), Question(NOON - 5 * 86_400, NOON + 5 * 86_400, None, by))
        assert sum(sum(counts.values()) for counts in whole.values()) == len(inserted)
    projects = sums.read(SqliteDatabase(database), Question(0, NOON * 2, None, ("project_id",)))
    owners = {(one.caller.tenant, one.caller.project) for one in inserted}
    assert len(projects) == len(owners)
    # Without the roll-ups, from the receipts alone: as a file of an older version is upgraded.
    before = {table: contents(database, table) for table in TABLES}
    for table in (*GROUPS, *before):
        database.execute(f"DELETE FROM {table}")
    database.execute("UPDATE usage_rolled SET receipt = 0")
    writing.roll_up(database, writing.last_row(database))
    assert {table: contents(database, table) for table in before} == before
    # The coarse ones alone, from the others: as a file of the version before them is upgraded.
    without_coarse(database)
    migrate(database, len(schema.MIGRATIONS), 5)
    upgraded = {table: contents(database, table) for table in before}
    assert upgraded == before
    database.close()


@define(eq=False)
class Both:
    """A ledger in each database, both empty for each example."""

    folder: Path
    place: PostgresPlace
    postgres: PostgresStore = field(init=False)
    sqlite: SqliteStore = field(init=False)
    _examples: int = field(default=0, init=False)

    def __attrs_post_init__(self) -> None:
        self.postgres = self.place.store()
        self.postgres.connect()

    def emptied(self) -> tuple[SqliteStore, PostgresStore]:
        self.place.execute(f"TRUNCATE receipts, rejections, writers, {', '.join((*GROUPS, *TABLES))}")
        self._examples += 1
        self.sqlite = SqliteStore(self.folder / f"{self._examples}.db")
        return self.sqlite, self.postgres


@pytest.fixture
def both(tmp_path: Path, postgres: PostgresServer) -> Iterator[Both]:
    found = Both(tmp_path, PostgresPlace(postgres, postgres.new_database()))
    yield found
    found.postgres.close()


def answers(database: Database, start: int, length: int, width: int | None) -> list[Any]:
    """What each kind of question finds."""
    found: list[Any] = [[tuple(row) for row in database.rows(f"SELECT {PLAIN} FROM receipts ORDER BY id")]]
    narrow = {"tenant": ("acme", "a/b"), "operation": ("chat",), "project_id": ("acme/web", "a%2Fb")}
    for by in (
        rollups.GROUPS,
        rollups.COARSE,
        ("model",),
        ("project_id",),
        ("subject", "outcome"),
        ("tag:a.b", "provider"),
    ):
        for where in ({}, narrow, {"tag:team": ("x",), "model": ()}):
            question = Question(start, start + length, width, by, where)
            found.append({group: added.values for group, added in sums.read(database, question).items()})
            whole = Question(NOON - 5 * 86_400, NOON + 5 * 86_400, None, by, where)
            found.append(sums.latencies(database, whole))
    found.append(usage.read(database, usage.Question(("tenant", "model", "day", "outcome"))))
    found.append(usage.read(database, usage.Question(("key", "provider"), since=date(2024, 10, 4), tenant="acme")))
    verdict = verifying.verify(database)
    return [*found, verdict.receipts, verdict.cost_picos, verdict.told]


PLAIN = ", ".join(name for name in rows.COLUMNS if name not in {"streamed", "meters", "tags"})


# An example takes a third of a second: to make a failing one smaller would take minutes.
@settings(max_examples=15, phases=[Phase.generate], suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batches=st.lists(st.lists(_RECEIPT, max_size=12), min_size=1, max_size=4),
    start=st.integers(NOON - 90_000, NOON + 90_000),
    length=st.integers(1, 200_000),
    width=st.sampled_from([None, 60, 3600, 86_400]),
)
def test_both_databases_give_the_same_answers(
    both: Both, batches: list[list[Receipt]], start: int, length: int, width: int | None
) -> None:
    refused: dict[rows.Rejection, int] = {("2024-10-04", "acme", "chat", None, 429, "rate_limit_exceeded"): 3}
    stores = both.emptied()
    for store in stores:
        for number, batch in enumerate(batches, 1):
            store.write("both", Batch(number, list(map(rows.row, batch)), refused))
    in_sqlite, in_postgres = (
        store.reading(30).run(partial(answers, start=start, length=length, width=width)) for store in stores
    )
    for one, other in zip(in_sqlite, in_postgres, strict=True):
        assert one == other
    assert in_sqlite[-1] == []
    both.sqlite.close()


def contents(database: sqlite3.Connection, table: str) -> list[Any]:
    """What is in a roll-up, with its groups; what is kept in two halves, added up."""
    names = [row[1] for row in database.execute(f"PRAGMA table_info({table})") if row[1] != "group_id"]
    groups, of = ("usage_coarse_groups", rollups.COARSE) if "coarse" in table else ("usage_groups", rollups.GROUPS)
    sql = f"SELECT {', '.join((*of, *names))} FROM {table} JOIN {groups} ON id = group_id"
    found = []
    for row in database.execute(sql):
        told = dict(zip((*of, *names), row, strict=True))
        for name in [name.removesuffix("_high") for name in names if name.endswith("_high")]:
            told[name] = told.pop(f"{name}_high") * rollups.HALF + told.pop(f"{name}_low")
        found.append(tuple(told.values()))
    return sorted(found)


@given(st.integers(0, 10**6), st.integers(1, 10**6), st.sampled_from([None, 60, 3600, 86_400]), st.booleans())
def test_the_parts_of_a_time_follow_each_other_and_each_is_whole(
    start: int, length: int, width: int | None, by_user: bool
) -> None:
    question = Question(start, start + length, width, ("subject",) if by_user else ())
    place = start
    for size, first, last in sums.parts(question):
        assert first == place < last
        assert size is None or first % size == last % size == 0
        assert size is None or not by_user
        assert size is None or width is None or width % size == 0
        place = last
    assert place == start + length


@given(st.lists(st.integers(0, 2**36 - 1), min_size=1), st.sampled_from([50, 95, 99, 100]))
def test_a_percentile_is_an_eighth_off_at_most(latencies: list[int], percent: int) -> None:
    database = sqlite3.connect(":memory:")
    counts: dict[int, int] = {}
    for latency in latencies:
        (number,) = database.execute(f"SELECT {rollups.LATENCY} FROM (SELECT ? AS total_us)", (latency,)).fetchone()
        counts[number] = counts.get(number, 0) + 1
    database.close()
    exact = sorted(latencies)[-(-len(latencies) * percent // 100) - 1]
    found = percentile(counts, percent)
    assert found is not None
    assert abs(found * 1000 - exact) <= exact / 8 + 1e-3
    assert percentile({}, percent) is None


@pytest.mark.parametrize("latency", [-1, 0, 2**36, LARGEST])
def test_a_latency_beyond_all_reason_is_in_the_last_range(latency: int) -> None:
    database = sqlite3.connect(":memory:")
    (number,) = database.execute(f"SELECT {rollups.LATENCY} FROM (SELECT ? AS total_us)", (latency,)).fetchone()
    assert number == (0 if latency <= 0 else 140)
    database.close()


def receipt(n: int, **changes: Any) -> Receipt:
    one = Receipt(
        id=f"call-{n}", caller=Caller("acme", "bob", "keys"), operation="chat", model="one", target=None,
        outcome="complete", status=200, error=None, usage=Usage(input=1), cost=Cost(7), saved_picos=0, cache="off",
        streamed=False, attempts=(), tags={}, wall_ns=NOON * 10**9, ttft_us=1, total_us=2, overhead_us=3, bytes_out=4,
        config_version="v",
    )  # fmt: skip
    return evolve(one, **changes)


def calls(database: sqlite3.Connection) -> int:
    return sum(found["calls"] for found in sums.read(SqliteDatabase(database), Question(0, NOON * 2)).values())


def test_what_a_gateway_of_an_older_version_writes_meanwhile_is_added_with_the_next_batch() -> None:
    database = made()
    write(database, [receipt(1)])
    writing.insert(database, [rows.row(receipt(2))], {})
    write(database, [receipt(3), receipt(2)])
    assert calls(database) == 3
    database.close()


def test_receipts_that_are_deleted_stay_in_the_roll_ups_and_new_ones_are_added() -> None:
    database = made()
    write(database, [receipt(n) for n in range(5)])
    database.execute("DELETE FROM receipts WHERE id >= 'call-3'")
    write(database, [receipt(n) for n in range(10, 13)])
    assert calls(database) == 8
    database.execute("DELETE FROM receipts")
    write(database, [receipt(20)])
    assert calls(database) == 9
    database.close()


def test_an_older_file_is_upgraded_with_its_roll_ups(tmp_path: Path) -> None:
    database = sqlite3.connect(tmp_path / "x.db", isolation_level=None)
    migrate(database, 2)
    odd = receipt(2, tags={"\ud800": "x"}, usage=Usage(input=2**64, meters={"images": 2**70, "\ud800": 1}))
    writing.insert(database, [rows.row(receipt(1)), rows.row(odd)], {})
    database.execute(f"PRAGMA application_id = {APPLICATION}")
    database.execute("PRAGMA user_version = 2")
    database.close()
    database = schema.connect(tmp_path / "x.db")
    assert calls(database) == 2
    (found,) = sums.read(SqliteDatabase(database), Question(0, NOON * 2)).values()
    assert found["input"] == 1 + LARGEST
    assert json.loads(database.execute("SELECT meters FROM receipts WHERE id = 'call-2'").fetchone()[0])
    database.close()


# --- reading -----------------------------------------------------------------------------------

_ENDLESS = "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n"


@pytest.fixture
def reader(tmp_path: Path) -> Reader:
    schema.connect(tmp_path / "x.db").close()
    return Reader(SqliteStore(tmp_path / "x.db"))


async def test_a_question_that_nobody_waits_for_any_longer_ends_and_its_place_is_free(reader: Reader) -> None:
    endless = [asyncio.create_task(reader.ask(lambda database: database.rows(_ENDLESS))) for _ in range(5)]
    await asyncio.sleep(0.1)
    for task in endless:
        task.cancel()
    found = await asyncio.gather(*endless, return_exceptions=True)
    assert all(isinstance(one, asyncio.CancelledError) for one in found)
    assert await reader.ask(lambda database: database.one("SELECT count(*) FROM receipts")) == (0,)


async def test_a_question_that_takes_too_long_is_refused(reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "LONGEST_SECONDS", 0.05)
    with pytest.raises(InvalidRequest, match="too much to read"):
        await reader.ask(lambda database: database.rows(_ENDLESS))


async def test_few_read_at_once_and_none_can_write(reader: Reader) -> None:
    now, most = 0, 0

    def question(_: Database) -> None:
        nonlocal now, most
        now += 1
        most = max(most, now)
        time.sleep(0.02)
        now -= 1

    await asyncio.gather(*(reader.ask(question) for _ in range(8)))
    assert most == reading.AT_ONCE
    with pytest.raises(Unavailable):
        await reader.ask(lambda database: database.rows("DELETE FROM receipts"))
