"""The ledger: every call once, whatever happens to the file, the process or the configuration."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import resource
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

import pytest
from attrs import evolve
from ledgers import Place, SqlitePlace

from qlens import Attempt, Caller, Cost, Receipt, StartupError, Target, Usage, background_thread
from qlens.cli import main
from qlens.stores.sqlite import APPLICATION
from qlens.testing import Running, running
from qlens_plugins.cost.ledger import rows
from qlens_plugins.cost.ledger.journal import Journal
from qlens_plugins.cost.ledger.sqlite import SqliteStore, schema, writing
from qlens_plugins.cost.ledger.store import Batch, Store
from qlens_plugins.cost.ledger.writer import Writer

MINI = "{model: gpt-4o-mini, input: 0.15, cached_input: 0.075, output: 0.60, date: 2026-11-24}"


def config(ledger: str = "", *, url: str = "sqlite:///ledger.db", after: str = "") -> str:
    return f"""
server: {{admin: {{port: 0}}, port: 0}}
pipeline:
  auth: [{{plugin: anonymous}}]
  cost: [{{plugin: prices, table: [{MINI}]}}, {{plugin: ledger, url: "{url}", {ledger}}}, {after}]
providers: {{echo: {{plugin: echo}}}}
models:
  gpt-4o-mini: {{max_output_tokens: 1000, targets: [{{provider: echo, model: gpt-4o-mini}}]}}
  unpriced: {{max_output_tokens: 1000, targets: [{{provider: echo, model: unpriced}}]}}
  slow: {{max_output_tokens: 1000, targets: [{{provider: echo, model: gpt-4o-mini, params: {{first_byte_ms: 300}}}}]}}
"""


def chat(model: str = "gpt-4o-mini", **more: object) -> dict[str, object]:
    return {"model": model, "messages": [{"role": "user", "content": "hello there"}], **more}


async def call(gateway: Running, model: str = "gpt-4o-mini", **more: object) -> int:
    return (await gateway.post("/v1/chat/completions", chat(model, **more))).status


def read(where: Place | Path, sql: str = "SELECT * FROM receipts ORDER BY wall_ns") -> list[dict[str, Any]]:
    """What a statement finds; nothing while the tables are still to be made."""
    place = SqlitePlace(where) if isinstance(where, Path) else where
    return place.rows(sql)


def rejections(where: Place | Path) -> dict[tuple[str, int, str], int]:
    found = read(where, "SELECT * FROM rejections")
    return {(row["model"], row["status"], row["error"]): row["calls"] for row in found}


async def written(where: Place | Path, count: int) -> list[dict[str, Any]]:
    """The receipts, once there are this many."""
    await until(lambda: len(read(where)) >= count)
    return read(where)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Another program holds the database's write lock."""
    other = sqlite3.connect(path, timeout=10, isolation_level=None)
    try:
        other.execute("BEGIN IMMEDIATE")
        yield
        other.execute("ROLLBACK")
    finally:
        other.close()


async def until(condition: Any, seconds: float = 60) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.02)


def writer_threads() -> int:
    return sum(thread.name == "qlens-ledger" for thread in threading.enumerate())


# --- a row for each call -----------------------------------------------------------------------


async def test_every_call_has_one_row_that_says_what_the_receipt_says(place: Place) -> None:
    async with running(config("flush_seconds: 0.01", url=place.url)) as gateway:
        assert await call(gateway) == 200
        (receipt,) = await gateway.settled(1)
        (row,) = await written(place, 1)
    assert row["id"] == receipt.id
    assert (row["tenant"], row["subject"]) == (receipt.caller.tenant, receipt.caller.subject)
    assert (row["operation"], row["model"], row["provider"]) == ("chat", "gpt-4o-mini", "echo")
    assert (row["outcome"], row["status"], row["error"], row["streamed"]) == ("complete", 200, None, 0)
    assert row["input"] + row["output"] == receipt.usage.total > 0
    assert row["cost_picos"] == receipt.cost.picos > 0  # type: ignore[operator]
    assert (row["cost_state"], row["price_id"]) == ("exact", "*/gpt-4o-mini@2026-11-24")
    assert row["config_version"] == receipt.config_version
    (attempt,) = json.loads(row["attempts"])
    assert attempt["provider"] == "echo"
    assert attempt["billed"] is True
    assert [each for _, _, each in attempt["cost_lines"]] == [150_000, 600_000]


async def test_calls_at_once_have_one_row_each(place: Place) -> None:
    async with running(config("batch_size: 7, flush_seconds: 0.01", url=place.url)) as gateway:
        statuses = await asyncio.gather(*(call(gateway, stream=n % 3 == 0) for n in range(100)))
        assert set(statuses) == {200}
        receipts = await gateway.settled(100)
        found = await written(place, 100)
    assert sorted(row["id"] for row in found) == sorted(receipt.id for receipt in receipts)
    assert sum(row["cost_picos"] for row in found) == sum(receipt.cost.picos or 0 for receipt in receipts)
    assert sum(row["streamed"] for row in found) == 34


async def test_refused_calls_are_counts_and_not_rows(place: Place) -> None:
    async with running(config("flush_seconds: 0.01", url=place.url)) as gateway:
        for _ in range(3):
            assert await call(gateway, "no-such-model") == 404
        for _ in range(2):
            assert await call(gateway, max_tokens="many") == 400
        assert await call(gateway) == 200
        await written(place, 1)
        await until(lambda: sum(rejections(place).values()) == 5)
        assert await call(gateway, "no-such-model") == 404
        await until(lambda: sum(rejections(place).values()) == 6)
        assert len(read(place)) == 1


async def test_an_unpriced_call_has_no_cost_which_is_not_0(place: Place) -> None:
    async with running(config("flush_seconds: 0.01", url=place.url)) as gateway:
        assert await call(gateway, "unpriced") == 200
        (row,) = await written(place, 1)
    assert (row["cost_picos"], row["cost_state"]) == (None, "unpriced")


async def test_what_waits_is_written_when_the_gateway_stops(
    place: Place, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(config("flush_seconds: 600, batch_size: 10", url=place.url)) as gateway:
        for _ in range(5):
            assert await call(gateway) == 200
        assert await call(gateway, "no-such-model") == 404
        assert read(place) == []
    assert len(read(place)) == 5
    assert sum(rejections(place).values()) == 1
    assert writer_threads() == 0
    assert {path.name for path in tmp_path.iterdir()} <= {"x.db"}
    assert not [record for record in caplog.records if record.name == "qlens.ledger"]


async def test_no_thread_outlives_a_gateway_or_a_start_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow_to_end(work: Callable[[], object], name: str) -> threading.Thread:
        def run() -> None:
            work()
            time.sleep(0.3)

        return background_thread(run, name)

    monkeypatch.setattr("qlens_plugins.cost.ledger.writer.background_thread", slow_to_end)
    async with running(config()) as gateway:
        assert await call(gateway) == 200
        assert writer_threads() == 1
    assert writer_threads() == 0
    with pytest.raises(StartupError, match="does not exist"):
        await start(config(url="sqlite:///nowhere/x.db"))
    assert writer_threads() == 0


async def test_a_full_batch_does_not_wait() -> None:
    async with running(config("flush_seconds: 600, batch_size: 3")) as gateway:
        await asyncio.gather(*(call(gateway) for _ in range(3)))
        await written(gateway.folder / "ledger.db", 3)


async def test_without_a_url_the_file_stands_beside_the_configuration() -> None:
    text = config().replace('url: "sqlite:///ledger.db", ', "")
    async with running(text) as gateway:
        assert (gateway.folder / "qlens.db").is_file()


async def test_two_gateways_write_to_one_ledger(place: Place) -> None:
    text = config("flush_seconds: 0.01, batch_size: 5", url=place.url)
    async with running(text) as one, running(text) as other:
        await asyncio.gather(*(call(gateway) for gateway in (one, other) for _ in range(30)))
        await asyncio.gather(*(call(gateway, "no-such-model") for gateway in (one, other) for _ in range(10)))
    assert len(read(place)) == 60
    assert sum(rejections(place).values()) == 20


async def test_gateways_that_start_together_agree_on_a_fresh_ledger(place: Place) -> None:
    @asynccontextmanager
    async def one() -> AsyncIterator[None]:
        async with running(config("flush_seconds: 0.01", url=place.url)) as gateway:
            assert await call(gateway) == 200
            yield

    async def run() -> None:
        async with one():
            await asyncio.sleep(0)

    await asyncio.gather(*(run() for _ in range(6)))
    assert len(read(place)) == 6


# --- outages -----------------------------------------------------------------------------------


async def test_a_locked_file_delays_rows_and_loses_none() -> None:
    async with running(config("flush_seconds: 0.01")) as gateway:
        path, plugin = gateway.folder / "ledger.db", gateway.plugin("cost", "ledger")
        with locked(path):
            assert await call(gateway) == 200
            await until(lambda: not plugin.health().ok)
            assert "locked" in plugin.health().detail
            assert "1 receipts wait" in plugin.health().detail
            for _ in range(9):
                assert await call(gateway) == 200
            assert await call(gateway, "no-such-model") == 404
        assert len(await written(path, 10)) == 10
        await until(lambda: plugin.health().ok)
        assert sum(rejections(path).values()) == 1
        text = (await gateway.get("/metrics")).text
    assert "qlens_ledger_written_total 10.0" in text
    assert "qlens_ledger_queue 0.0" in text


async def test_calls_are_refused_while_neither_spool_nor_database_takes_them() -> None:
    async with running(config("flush_seconds: 0.01, spool_bytes: 1")) as gateway:
        path, plugin = gateway.folder / "ledger.db", gateway.plugin("cost", "ledger")
        assert await call(gateway) == 200
        await written(path, 1)
        with locked(path):
            assert await call(gateway) == 200
            await until(lambda: "locked" in plugin.health().detail)
            assert "the spool cannot be used: more than 1 bytes would wait; 1 receipts" in plugin.health().detail
            refused = await gateway.post("/v1/chat/completions", chat())
            assert refused.status == 503
            assert refused.json()["error"]["code"] == "ledger_unavailable"
            assert refused.headers["retry-after"] == "5"
            assert await call(gateway, "no-such-model") == 404
        await written(path, 2)
        await until(lambda: plugin.writer.problem is None)
        assert await call(gateway) == 200
        await written(path, 3)
        await until(lambda: sum(rejections(path).values()) == 2)
        assert rejections(path)["gpt-4o-mini", 503, "ledger_unavailable"] == 1
        assert "qlens_ledger_dropped_total 0.0" in (await gateway.get("/metrics")).text


async def test_a_call_on_its_way_has_its_place_in_the_queue() -> None:
    async with running(config("flush_seconds: 0, queue_size: 1, spool_bytes: 1")) as gateway:
        slow = asyncio.create_task(call(gateway, "slow"))
        await until(lambda: gateway.gateway.current.running == 1)
        await asyncio.sleep(0.05)
        assert await call(gateway) == 503
        assert await slow == 200
        await written(gateway.folder / "ledger.db", 1)
        await until(lambda: gateway.plugin("cost", "ledger").writer.waiting == 0)
        assert await call(gateway) == 200


async def test_a_call_that_another_plugin_refuses_gives_its_place_back() -> None:
    strict = "{plugin: prices, name: strict, strict: true}"
    text = config("flush_seconds: 0.01, queue_size: 1, spool_bytes: 1", after=strict)
    async with running(text) as gateway:
        for _ in range(5):
            assert await call(gateway, "unpriced") == 400
        assert await call(gateway) == 200
        await written(gateway.folder / "ledger.db", 1)
        await until(lambda: rejections(gateway.folder / "ledger.db") == {("unpriced", 400, "model_unpriced"): 5})


async def test_a_ledger_that_may_drop_serves_on_and_counts_what_is_missing() -> None:
    async with running(config("flush_seconds: 0.01, queue_size: 3, spool_bytes: 1, when_full: drop")) as gateway:
        path = gateway.folder / "ledger.db"
        with locked(path):
            assert [await call(gateway) for _ in range(5)] == [200] * 5
            assert "qlens_ledger_dropped_total 2.0" in (await gateway.get("/metrics")).text
        await written(path, 3)
        assert await call(gateway) == 200
        assert len(await written(path, 4)) == 4


async def test_a_file_that_is_gone_is_made_again_and_nothing_that_waits_is_lost() -> None:
    async with running(config("flush_seconds: 0.01")) as gateway:
        path = gateway.folder / "ledger.db"
        assert await call(gateway) == 200
        await written(path, 1)
        path.rename(gateway.folder / "moved.db")
        assert [await call(gateway) for _ in range(3)] == [200] * 3
        await until(path.exists)
        assert len(await written(path, 3)) == 3


async def test_a_folder_that_is_gone_for_a_while_loses_nothing(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    async with running(config("flush_seconds: 0.01", url=f"sqlite:///{tmp_path}/disk/x.db")) as gateway:
        (tmp_path / "disk").rename(tmp_path / "away")
        assert await call(gateway) == 200
        plugin = gateway.plugin("cost", "ledger")
        await until(lambda: not plugin.health().ok)
        await until(lambda: "does not exist" in plugin.health().detail)
        (tmp_path / "away").rename(tmp_path / "disk")
        await written(tmp_path / "disk" / "x.db", 1)
        await until(lambda: plugin.health().ok)


async def test_a_disk_that_takes_no_more_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x.db"
    async with running(config("flush_seconds: 0.01", url=f"sqlite:///{path}")) as gateway:
        plugin = gateway.plugin("cost", "ledger")
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1, hard))
        try:
            assert await call(gateway) == 200
            await until(lambda: plugin.writer.problem is not None)
            assert [await call(gateway) for _ in range(3)] == [503] * 3
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        await written(path, 1)
        await until(lambda: plugin.writer.problem is None)
        assert await call(gateway) == 200
        assert len(await written(path, 2)) == 2


async def test_what_could_not_be_written_to_the_end_is_said_and_written_by_the_next_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "x.db"
    text = config("flush_seconds: 0.01, close_seconds: 0", url=f"sqlite:///{path}")
    async with running(text) as gateway:
        with locked(path):
            for _ in range(2):
                assert await call(gateway) == 200
            assert await call(gateway, "no-such-model") == 404
            await gateway.gateway.stop()
    waiting, lost = [record.message for record in caplog.records if record.levelno == logging.ERROR]
    assert "2 receipts could not be written within 0 s: database is locked; the next start writes" in waiting
    assert "0 receipts and 1 refused calls are lost: database is locked" in lost
    async with running(text) as gateway:
        assert len(await written(path, 2)) == 2
        journal = gateway.plugin("cost", "ledger").writer.journal
        await until(lambda: not journal.left_behind and not journal.has_news)  # all who listen were told
    assert not (tmp_path / "x.db.spool").exists()


async def test_a_file_that_is_locked_at_the_start_does_not_stop_it(tmp_path: Path) -> None:
    path = tmp_path / "x.db"
    text = config("flush_seconds: 0.01, close_seconds: 0", url=f"sqlite:///{path}")
    async with running(text):
        pass
    with locked(path):
        async with running(text) as gateway:
            assert await call(gateway) == 200
            # It is left while the file is locked still, so the next one writes this receipt.
    async with running(text):
        await written(path, 1)


# --- exactly once ------------------------------------------------------------------------------


def receipt(n: int = 0, **changes: Any) -> Receipt:
    target = Target("echo", "gpt-4o-mini", "gpt-4o-mini")
    usage = Usage(input=8, output=3, source="provider")
    cost = Cost(3_000_000, "exact", "*/gpt-4o-mini")
    made = Receipt(
        id=f"call-{n}", caller=Caller("acme", "bob", "keys"), operation="chat", model="gpt-4o-mini", target=target,
        outcome="complete", status=200, error=None, usage=usage, cost=cost, saved_picos=0, cache="off", streamed=False,
        attempts=(Attempt(1, target, 0.0, ended=0.5, usage=usage, cost=cost, billed=True),), tags={}, wall_ns=10**18,
        ttft_us=1, total_us=2, overhead_us=3, bytes_out=4, config_version="v",
    )  # fmt: skip
    return evolve(made, **changes)


def migrate(database: sqlite3.Connection, versions: int) -> None:
    for statement in (statement for version in schema.MIGRATIONS[:versions] for statement in version):
        database.execute(statement)


def writer_of(store: Store, folder: Path, lost: list[float] | None = None) -> Writer:
    dropped = [] if lost is None else lost
    journal = Journal(folder / "spool", dropped.append)
    return Writer(store, journal, lambda _: None, dropped.append, lambda _: None, flush_seconds=0.01)


def test_a_batch_whose_commit_was_in_doubt_counts_once(place: Place) -> None:
    store = place.store()
    key = rows.rejection(receipt(outcome="rejected", status=429, error="rate_limit_exceeded"))
    batch = Batch(1, (rows.row(receipt(1)), rows.row(receipt(2))), {key: 5})
    store.write("one", batch)
    store.write("one", batch)
    store.write("one", evolve(batch, number=2))
    store.close()
    assert len(read(place)) == 2
    assert sum(rejections(place).values()) == 10
    assert [row["calls"] for row in read(place, "SELECT * FROM usage_days")] == [2]


def test_another_writer_s_batches_are_its_own(place: Place) -> None:
    for n in range(2):
        store = place.store()
        store.write(f"writer-{n}", Batch(1, (rows.row(receipt(n)),), {}))
        store.close()
    assert len(read(place)) == 2


async def test_no_value_of_a_receipt_can_hold_up_the_others(place: Place, tmp_path: Path) -> None:
    strange = [
        receipt(1, cost=Cost(2**70, "exact", "p"), usage=Usage(input=2**64)),
        receipt(2, tags={"\ud800": "\udfff"}, error="\ud800", caller=Caller("ten\udc00ant", "s\0", "keys")),
        receipt(3, caller=Caller(None, None, "keys"), target=None, model=None),  # type: ignore[arg-type]
        receipt(4, wall_ns="yesterday"),
        receipt(5, tags={"zero": "a\0b"}, usage=Usage(meters={"images": 2**70, "odd": 3})),
        receipt(6),
    ]
    lost: list[float] = []
    writer = writer_of(place.store(), tmp_path, lost)
    await writer.open()
    for one in strange:
        writer.keep(one)
    await writer.close(5)
    found = {row["id"]: row for row in read(place)}
    assert sorted(found) == ["call-1", "call-2", "call-3", "call-5", "call-6"]
    assert lost == [1]
    assert (found["call-1"]["cost_picos"], found["call-1"]["cost_state"]) == (2**63 - 1, "estimated")
    assert found["call-1"]["input"] == 2**63 - 1
    assert (found["call-2"]["tenant"], found["call-2"]["error"]) == ("ten?ant", "?")
    assert found["call-3"]["tenant"] == ""
    assert json.loads(found["call-1"]["attempts"])[0]["usage"]["output"] == 3
    assert len(json.loads(found["call-2"]["tags"])) == 1
    assert json.loads(found["call-5"]["meters"])["images"] in (2**70, 2**63 - 1)


async def test_rows_stand_in_the_order_of_settling_whatever_is_among_them(tmp_path: Path) -> None:
    writer = writer_of(SqliteStore(tmp_path / "x.db"), tmp_path)
    await writer.open()
    odd = {n: receipt(n, error="\ud800") for n in range(0, 3 * rows.AT_ONCE, rows.AT_ONCE // 2)}
    for n in range(3 * rows.AT_ONCE + 1):
        writer.keep(odd.get(n) or receipt(n))
    assert writer.waiting == 3 * rows.AT_ONCE + 1
    await writer.close(5)
    assert writer.waiting == 0
    found = read(tmp_path / "x.db", "SELECT id, error FROM receipts ORDER BY rowid")
    assert [row["id"] for row in found] == [f"call-{n}" for n in range(3 * rows.AT_ONCE + 1)]
    assert [row["error"] for row in found if row["error"]] == ["?"] * len(odd)


def test_a_statement_is_not_too_long_for_an_old_sqlite() -> None:
    database = sqlite3.connect(":memory:")
    migrate(database, 1)
    database.setlimit(sqlite3.SQLITE_LIMIT_VARIABLE_NUMBER, 999)
    writing.insert(database, [rows.row(receipt(n)) for n in range(2 * rows.AT_ONCE + 1)], {})
    assert database.execute("SELECT count(*) FROM receipts").fetchone() == (2 * rows.AT_ONCE + 1,)
    database.close()


async def test_what_was_counted_for_a_name_that_is_no_text_is_kept(place: Place, tmp_path: Path) -> None:
    writer = writer_of(place.store(), tmp_path)
    await writer.open()
    for error in ("\ud800", "\udfff", "\ud800"):
        writer.count(receipt(outcome="rejected", status=404, model=None, error=error))
    await writer.close(5)
    assert rejections(place) == {("", 404, "?"): 3}


# --- reload ------------------------------------------------------------------------------------


async def test_a_reload_goes_on_with_the_same_writer_and_its_queue() -> None:
    async with running(config("flush_seconds: 0.01")) as gateway:
        path = gateway.folder / "ledger.db"
        old = gateway.plugin("cost", "ledger")
        with locked(path):
            slow = asyncio.create_task(call(gateway, "slow"))
            await until(lambda: gateway.gateway.current.running == 1)
            assert await call(gateway) == 200
            await gateway.reload(config("flush_seconds: 0.02"))
            new = gateway.plugin("cost", "ledger")
            assert new is not old
            assert new.writer is old.writer
            assert writer_threads() == 1
            assert await call(gateway) == 200
            assert await slow == 200
        assert len(await written(path, 3)) == 3
        await until(lambda: new.writer._users == 1)
        assert await call(gateway) == 200
        assert len(await written(path, 4)) == 4
    assert writer_threads() == 0


async def test_after_a_reload_to_another_file_each_call_is_where_it_began() -> None:
    async with running(config("flush_seconds: 0.01")) as gateway:
        slow = asyncio.create_task(call(gateway, "slow"))
        await until(lambda: gateway.gateway.current.running == 1)
        await gateway.reload(config("flush_seconds: 0.01", url="sqlite:///other.db"))
        assert await call(gateway) == 200
        assert await slow == 200
        (first,) = await written(gateway.folder / "ledger.db", 1)
        (second,) = await written(gateway.folder / "other.db", 1)
        assert (first["model"], second["model"]) == ("slow", "gpt-4o-mini")
        await until(lambda: writer_threads() == 1)


async def test_an_unusable_file_leaves_the_present_configuration_in_place() -> None:
    async with running(config("flush_seconds: 0.01")) as gateway:
        with pytest.raises(StartupError, match="does not exist"):
            await gateway.reload(config(url="sqlite:///nowhere/x.db"))
        assert await call(gateway) == 200
        await written(gateway.folder / "ledger.db", 1)
        assert writer_threads() == 1


# --- faults ------------------------------------------------------------------------------------


async def start(text: str, files: dict[str, str] | None = None) -> None:
    async with running(text, files=files):
        pass


@pytest.mark.parametrize(
    ("url", "message"),
    [
        (
            "mysql://bob:hunter2@db/qlens",
            "a ledger at mysql:... is not supported; supported: sqlite:///FILE and",
        ),
        ("postgresql://bob:hunter2@db", "names no host and database"),
        *((f"postgresql://bob:hunter2{mark}3@db/qlens", "names no host and database") for mark in "#/?"),
        ("postgresql://bob:x@db:hunter2/qlens", "names no host and database"),
        ("postgresql://bob@db/qlens?password=hunter2", "a password belongs before the host"),
        ("sqlite:///:memory:", "names no file"),
        ("sqlite:///", "names no file"),
        ("sqlite:///nowhere/x.db", "nowhere does not exist; create it, or change `url`"),
        ("sqlite:///.", "cannot be opened"),
        ("sqlite:///text.db", "is no SQLite database"),
    ],
)
async def test_an_unusable_url_stops_the_start_and_says_why(url: str, message: str) -> None:
    with pytest.raises(StartupError) as error:
        await start(config(url=url), {"text.db": "this is a letter and no database at all\n" * 100})
    assert message in str(error.value)
    assert "hunter2" not in str(error.value)
    assert writer_threads() == 0


async def test_a_file_of_a_newer_version_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "x.db"
    await start(config(url=f"sqlite:///{path}"))
    database = sqlite3.connect(path)
    database.execute("UPDATE versions SET version = 99, oldest = 98")
    database.commit()
    database.close()
    known = len(schema.MIGRATIONS)
    with pytest.raises(
        StartupError, match=rf"x\.db have version 99 and are not for a QLens that knows up to version {known}, "
    ):
        await start(config(url=f"sqlite:///{path}"))


async def test_a_file_of_an_older_version_is_upgraded_and_keeps_its_rows(tmp_path: Path) -> None:
    path = tmp_path / "x.db"
    database = sqlite3.connect(path)
    migrate(database, 1)
    writing.insert(database, [rows.row(receipt(1))], {})
    database.execute(f"PRAGMA application_id = {APPLICATION}")
    database.execute("PRAGMA user_version = 1")
    database.commit()
    database.close()
    async with running(config("flush_seconds: 0.01", url=f"sqlite:///{path}")) as gateway:
        assert await call(gateway) == 200
        await written(path, 2)
    assert read(path, "SELECT owner, version FROM versions") == [{"owner": "ledger", "version": len(schema.MIGRATIONS)}]
    indexes = read(path, "SELECT name FROM sqlite_master WHERE type = 'index' AND sql IS NOT NULL")
    assert [row["name"] for row in indexes] == ["receipts_by_time"]


async def test_another_program_s_database_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "x.db"
    database = sqlite3.connect(path)
    database.execute("CREATE TABLE receipts (id)")
    database.close()
    with pytest.raises(StartupError, match="database of another program"):
        await start(config(url=f"sqlite:///{path}"))
    assert [row["name"] for row in read(path, "SELECT name FROM sqlite_master")] == ["receipts"]


def test_the_database_is_written_ahead_and_synced_at_each_commit(tmp_path: Path) -> None:
    database = schema.connect(tmp_path / "x.db")
    assert database.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert database.execute("PRAGMA synchronous").fetchone() == (2,)
    database.close()


# --- the process -------------------------------------------------------------------------------


@contextmanager
def serving(folder: Path, text: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    (folder / "qlens.yaml").write_text(text)
    command = [sys.executable, "-m", "qlens", "serve", str(folder / "qlens.yaml")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        yield process, next(word for word in line.split() if word.startswith("http://"))
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def post(url: str) -> int:
    body = json.dumps(chat()).encode()
    request = Request(f"{url}/v1/chat/completions", body, {"content-type": "application/json"})
    for _ in range(100):
        try:
            with urlopen(request) as answer:
                return int(answer.status)
        except URLError:
            time.sleep(0.05)
    raise AssertionError("the gateway does not answer")


def test_sigterm_loses_nothing(tmp_path: Path) -> None:
    with serving(tmp_path, config("flush_seconds: 600, batch_size: 1000")) as (process, url):
        assert [post(url) for _ in range(7)] == [200] * 7
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    assert len(read(tmp_path / "ledger.db")) == 7


def kept(spool: Path) -> list[str]:
    """The files of a spool that have records; of its own process, that had some."""
    return [name for _, _, names in os.walk(spool) for name in names if name != "lock"]


def test_kill_9_loses_nothing(tmp_path: Path) -> None:
    text = config("flush_seconds: 600, batch_size: 1000")
    for n in range(2):
        with serving(tmp_path, text) as (process, url):
            assert [post(url) for _ in range(7)] == [200] * 7
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
        assert len(read(tmp_path / "ledger.db")) <= 7 * n
        assert kept(tmp_path / "ledger.db.spool")
    with serving(tmp_path, config("flush_seconds: 0.01")) as (process, url):
        deadline = time.monotonic() + 60
        # A receipt that a dead process left is kept until all who listen were told of it.
        while len(read(tmp_path / "ledger.db")) < 14 or kept(tmp_path / "ledger.db.spool"):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    found = read(tmp_path / "ledger.db")
    assert len(found) == 14
    # The last one of each may have had its answer a moment before it was accounted for.
    assert {row["outcome"] for row in [*found[:6], *found[7:13]]} == {"complete"}
    assert all((row["outcome"] == "failed") is (row["error"] == "interrupted") for row in found)
    assert [row["integrity_check"] for row in read(tmp_path / "ledger.db", "PRAGMA integrity_check")] == ["ok"]
    assert not (tmp_path / "ledger.db.spool").exists()


# --- the command -------------------------------------------------------------------------------


async def used(folder: Path, place: Place) -> Path:
    """A ledger with some calls in it, and the configuration that names it."""
    text = config("flush_seconds: 0.01", url=place.url)
    (folder / "qlens.yaml").write_text(text)
    async with running(text) as gateway:
        for _ in range(3):
            assert await call(gateway) == 200
        assert await call(gateway, "unpriced") == 200
        assert await call(gateway, max_tokens="many") == 400
        assert await call(gateway, "no-such-model") == 404
    return folder / "qlens.yaml"


def usage(capsys: pytest.CaptureFixture[str], path: Path, *words: str) -> Any:
    capsys.readouterr()
    assert main(["usage", "--json", *words, "-c", str(path)]) == 0
    return json.loads(capsys.readouterr().out)


async def test_usage_adds_up_calls_tokens_and_exact_cost(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = await used(tmp_path, place)
    found = await asyncio.to_thread(usage, capsys, path)
    by_model = {row["model"]: row for row in found["rows"]}
    priced = [row for row in read(place) if row["model"] == "gpt-4o-mini"]
    mini = by_model["gpt-4o-mini"]
    assert mini["calls"] == 3
    assert mini["rejected"] == 0
    assert mini["prompt_tokens"] == sum(row["input"] for row in priced)
    assert mini["completion_tokens"] == sum(row["output"] for row in priced)
    assert float(mini["cost_usd"]) * 10**12 == pytest.approx(sum(row["cost_picos"] for row in priced))
    assert "e" not in mini["cost_usd"]
    assert by_model["unpriced"]["cost_usd"] is None
    assert by_model["unpriced"]["unpriced_calls"] == 1
    assert (by_model[None]["calls"], by_model[None]["rejected"]) == (0, 2)
    assert found["total"]["calls"] == 4
    assert found["total"]["rejected"] == 2
    assert found["total"]["cost_usd"] == mini["cost_usd"]


async def test_usage_can_be_grouped_and_narrowed(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = await used(tmp_path, place)
    today = read(place)[0]["day"]

    def rows_of(*words: str) -> Any:
        return usage(capsys, path, *words)["rows"]

    (day,) = await asyncio.to_thread(rows_of, "--by", "day")
    assert (day["day"], day["calls"], day["rejected"]) == (today, 4, 2)
    outcomes = await asyncio.to_thread(rows_of, "--by", "outcome,provider")
    assert [(row["outcome"], row["provider"], row["calls"], row["rejected"]) for row in outcomes] == [
        ("complete", "echo", 4, 0),
        ("rejected", None, 0, 2),
    ]
    (model,) = await asyncio.to_thread(rows_of, "--model", "unpriced")
    assert (model["model"], model["calls"]) == ("unpriced", 1)
    assert await asyncio.to_thread(rows_of, "--tenant", "nobody") == []
    assert await asyncio.to_thread(rows_of, "--until", "2001-01-01") == []
    assert await asyncio.to_thread(rows_of, "--since", "9999-12-31") == []
    assert len(await asyncio.to_thread(rows_of, "--since", "0001-01-01")) == 3
    assert len(await asyncio.to_thread(rows_of, "--since", today, "--until", today)) == 3


async def test_usage_is_a_table_with_a_total_for_people(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = await used(tmp_path, place)
    capsys.readouterr()
    assert await asyncio.to_thread(main, ["usage", "--by", "model", "-c", str(path)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0][:4] == ["MODEL", "CALLS", "REJECTED", "PROMPT_TOKENS"]
    assert [line[0] for line in lines[1:]] == ["-", "gpt-4o-mini", "unpriced", "total"]
    assert lines[4][1:3] == ["4", "2"]


async def test_usage_reads_while_the_gateway_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = config("flush_seconds: 0.01", url=f"sqlite:///{tmp_path}/x.db")
    (tmp_path / "qlens.yaml").write_text(text)
    async with running(text) as gateway:
        assert await call(gateway) == 200
        await written(tmp_path / "x.db", 1)
        with locked(tmp_path / "x.db"):
            found = await asyncio.to_thread(usage, capsys, tmp_path / "qlens.yaml")
        assert found["total"]["calls"] == 1


def test_sums_are_exact_beyond_64_bits(place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "qlens.yaml").write_text(config(url=place.url))
    large, store = {"cost": Cost(2**63 - 1, "exact", "x"), "usage": Usage(input=2**60 - 1)}, place.store()
    store.write("large", Batch(1, [rows.row(receipt(n, **large)) for n in range(4)], {}))
    store.close()
    for names in ("tenant", "outcome"):
        found = usage(capsys, tmp_path / "qlens.yaml", "--by", names)
        assert found["total"]["cost_usd"] == "36893488.147419103228"
        assert found["total"]["prompt_tokens"] == 4 * (2**60 - 1)


def test_usage_of_no_days_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "qlens.yaml").write_text(config(url=f"sqlite:///{tmp_path}/x.db"))
    words = ["--since", "2026-11-02", "--until", "2026-11-01"]
    assert main(["usage", *words, "-c", str(tmp_path / "qlens.yaml")]) != 0
    assert "--since 2026-11-02 is after --until 2026-11-01" in capsys.readouterr().err


@pytest.mark.parametrize("words", ["--by colour", "--since yesterday", "--by model;DROP"])
async def test_what_usage_does_not_know_is_refused(tmp_path: Path, words: str) -> None:
    (tmp_path / "qlens.yaml").write_text(config(url=f"sqlite:///{tmp_path}/x.db"))
    with pytest.raises(SystemExit) as stop:
        await asyncio.to_thread(main, ["usage", *words.split(), "-c", str(tmp_path / "qlens.yaml")])
    assert stop.value.code == 2


def test_usage_of_a_new_ledger_is_no_calls(place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "qlens.yaml").write_text(config(url=place.url))
    assert main(["usage", "-c", str(tmp_path / "qlens.yaml")]) == 0
    assert capsys.readouterr().out == "no calls\n"


def test_a_name_that_needs_quoting_in_a_url_is_just_a_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "qlens.yaml").write_text(config(url="sqlite:///a#b%20c.db"))
    assert main(["usage", "-c", str(tmp_path / "qlens.yaml")]) == 0
    assert (tmp_path / "a#b%20c.db").is_file()
