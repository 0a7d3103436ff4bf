"""A ledger in PostgreSQL: 0 lost and 0 double, whatever becomes of the server and of the way to it."""

from __future__ import annotations

import asyncio
import math
import random
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from cuts import CommitCut
from ledgers import PostgresPlace, SqlitePlace

from qlens import (
    Caller,
    Cost,
    InvalidRequest,
    PostgresMigration,
    Receipt,
    Secret,
    StartupError,
    Target,
    Unavailable,
    Url,
    Usage,
)
from qlens.testing import Running, running
from qlens.testing.faults import fault_proxy
from qlens.testing.postgres import PostgresServer, postgres_server
from qlens_plugins.cost.ledger import backup, rows, sums, verifying, writer
from qlens_plugins.cost.ledger import reader as reading
from qlens_plugins.cost.ledger.plugin import LedgerConfig
from qlens_plugins.cost.ledger.postgres import PostgresStore, schema, store
from qlens_plugins.cost.ledger.postgres.schema import MIGRATIONS, Month
from qlens_plugins.cost.ledger.reader import Reader
from qlens_plugins.cost.ledger.rollups import DAY, GROUPS
from qlens_plugins.cost.ledger.store import Batch, Database, StoreAway, TookTooLong
from qlens_plugins.cost.ledger.sums import Question

PASSWORD = "example-password"
NOON = 1_795_824_000
"""2026-11-28 in UTC, in Unix seconds."""


def config(url: str, ledger: str = "flush_seconds: 0.01, batch_size: 20") -> str:
    return f"""
server: {{admin: {{port: 0}}, port: 0}}
pipeline:
  auth: [{{plugin: anonymous}}]
  cost: [{{plugin: prices, table: [{{model: gpt-4o-mini, input: 0.15, output: 0.60}}]}},
         {{plugin: ledger, url: "{url}", {ledger}}}]
providers: {{echo: {{plugin: echo}}}}
models:
  gpt-4o-mini: {{max_output_tokens: 1000, targets: [{{provider: echo, model: gpt-4o-mini}}]}}
"""


async def call(gateway: Running, model: str = "gpt-4o-mini") -> int:
    body = {"model": model, "messages": [{"role": "user", "content": "hello there"}]}
    return (await gateway.post("/v1/chat/completions", body)).status


async def until(condition: Any, seconds: float = 60) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.02)


def receipt(n: int, **changes: Any) -> Receipt:
    wall_ns = NOON * 10**9 + n
    values: dict[str, Any] = {
        "id": f"019ac{n:03x}-0000-7000-8000-{n:012x}", "caller": Caller("acme", "bob", "keys", None, f"key-{n % 5}"),
        "operation": "chat", "model": f"model-{n % 7}", "target": Target("echo", "m", "m"), "outcome": "complete",
        "status": 200, "error": None, "usage": Usage(input=n, output=1), "cost": Cost(10**18 + n), "saved_picos": 0,
        "cache": "off", "streamed": False, "attempts": (), "tags": {}, "wall_ns": wall_ns, "ttft_us": None,
        "total_us": 100 * n, "overhead_us": 1, "bytes_out": 1, "config_version": "v",
    }  # fmt: skip
    return Receipt(**{**values, **changes})


@pytest.fixture
def place(postgres: PostgresServer) -> PostgresPlace:
    return PostgresPlace(postgres, postgres.new_database())


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "LONGEST_WAIT_SECONDS", 0.2)


@asynccontextmanager
async def calling(gateway: Running) -> AsyncIterator[list[int]]:
    """Calls that go on all the time; the statuses."""
    statuses: list[int] = []
    ends, numbers = asyncio.Event(), count()

    async def one() -> None:
        while not ends.is_set():
            statuses.append(await call(gateway, "no-such-model" if next(numbers) % 10 == 9 else "gpt-4o-mini"))
            await asyncio.sleep(0.002)

    tasks = [asyncio.create_task(one()) for _ in range(4)]
    try:
        yield statuses
    finally:
        ends.set()
        await asyncio.gather(*tasks)


def exact(place: PostgresPlace, statuses: list[int]) -> None:
    """Receipts, roll-ups and counts of refused calls are those of the calls, each once."""
    found = place.rows("SELECT count(*) AS n, count(DISTINCT id) AS ids, sum(cost_picos) AS cost FROM receipts")[0]
    assert found["n"] == found["ids"] == statuses.count(200) > 0
    for table in ("usage_hours", "usage_days", "usage_coarse_days"):
        rolled = place.rows(f"SELECT sum(calls) AS n, sum(cost) AS cost FROM {table}")[0]
        assert (rolled["n"], rolled["cost"]) == (found["n"], found["cost"])
    assert place.rows("SELECT sum(calls) AS n FROM rejections")[0]["n"] == statuses.count(404) > 0
    ledger = place.store()
    verdict = ledger.reading(30).run(verifying.verify)
    ledger.close()
    assert verdict.told == []


# --- outages -----------------------------------------------------------------------------------


async def test_a_server_that_crashes_under_load_loses_nothing_and_doubles_nothing(impatient: None) -> None:
    with postgres_server() as server:
        place = PostgresPlace(server, server.new_database())
        async with running(config(place.url)) as gateway:
            plugin = gateway.plugin("cost", "ledger")
            async with calling(gateway) as statuses:
                for _ in range(2):
                    # It writes again; the callers rest for nobody, so on a busy machine it never catches up.
                    await until(lambda: plugin.health().ok, seconds=60)
                    before = len(statuses)
                    await until(lambda before=before: len(statuses) > before + 50)
                    await asyncio.to_thread(server.stop, signal.SIGQUIT)
                    await until(lambda: not plugin.health().ok)
                    await asyncio.sleep(0.5)
                    await asyncio.to_thread(server.start)
            await until(lambda: plugin.writer.waiting == 0 and plugin.health().ok, seconds=60)
        await asyncio.to_thread(exact, place, statuses)
        assert set(statuses) == {200, 404}


async def test_a_connection_cut_right_after_its_commit_doubles_nothing(place: PostgresPlace, impatient: None) -> None:
    proxy = CommitCut(place.server.port)
    await proxy.up()
    try:
        url = place.server.url(place.name, port=proxy.port)
        async with running(config(url)) as gateway:
            plugin = gateway.plugin("cost", "ledger")
            async with calling(gateway) as statuses:
                await until(lambda: proxy.cuts >= 10)
            proxy.every = 10**9
            await until(lambda: plugin.writer.waiting == 0 and plugin.health().ok)
        await asyncio.to_thread(exact, place, statuses)
    finally:
        await proxy.close()


async def test_a_server_that_is_away_at_the_start_does_not_stop_it(impatient: None) -> None:
    with postgres_server() as server:
        place = PostgresPlace(server, server.new_database())
        server.stop()
        async with running(config(place.url)) as gateway:
            plugin = gateway.plugin("cost", "ledger")
            assert [await call(gateway) for _ in range(3)] == [200] * 3
            health = plugin.health()
            assert not health.ok
            assert f"cannot write postgresql://127.0.0.1:{server.port}/{place.name}" in health.detail
            assert "3 receipts" in health.detail
            assert PASSWORD not in health.detail
            assert (await gateway.get("/v1/usage/summary")).status in (403, 503)
            await asyncio.to_thread(server.start)
            await until(lambda: plugin.health().ok)
            await until(lambda: len(place.rows("SELECT id FROM receipts")) == 3)


async def test_a_server_that_falls_silent_is_left_after_a_while(
    place: PostgresPlace, impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "WRITE_SECONDS", 0.3)
    async with (
        fault_proxy(place.server.port) as proxy,
        running(config(place.server.url(place.name, port=proxy.port))) as gateway,
    ):
        plugin = gateway.plugin("cost", "ledger")
        assert await call(gateway) == 200
        await until(lambda: plugin.writer.waiting == 0)
        proxy.hole = True
        assert await call(gateway) == 200
        await until(lambda: not plugin.health().ok)
        assert "no answer within 0.3 s" in plugin.health().detail
        proxy.reset()
        proxy.hole = False
        await until(lambda: plugin.writer.waiting == 0)
    assert len(place.rows("SELECT id FROM receipts")) == 2


async def test_a_connection_that_the_server_ends_is_told_as_that(
    place: PostgresPlace, impatient: None, caplog: pytest.LogCaptureFixture
) -> None:
    """And not as what the client's library could then not do any more."""
    ends = "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE application_name = 'qlens ledger'"
    async with running(config(place.url)) as gateway:
        plugin = gateway.plugin("cost", "ledger")
        assert await call(gateway) == 200
        await until(lambda: plugin.writer.waiting == 0)
        await asyncio.to_thread(place.execute, ends)
        assert await call(gateway) == 200
        await until(lambda: plugin.writer.waiting == 0)
        # While it waits for somebody's lock, too.
        other = await asyncpg.connect(place.url)
        async with other.transaction():
            await other.execute("LOCK TABLE usage_days")
            assert await call(gateway) == 200
            waits = "SELECT pid FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
            await until(lambda: place.rows(waits))
            await asyncio.to_thread(place.execute, ends)
        await other.close()
        await until(lambda: plugin.writer.waiting == 0 and plugin.health().ok)
    told = [record.message.partition("try again: ")[2] for record in caplog.records if "cannot write" in record.message]
    assert len(told) == 2, told
    assert told[0] == "the server has closed the connection"
    assert told[1].endswith("terminating connection due to administrator command")


# --- writers at once ---------------------------------------------------------------------------


def test_writers_of_the_same_groups_never_wait_for_each_other(place: PostgresPlace) -> None:
    """Each writes the same calls in an order of its own, in batches: one of each is kept, and nobody gives up."""
    calls, writers = 240, 6

    def write(number: int) -> None:
        ledger = place.store()
        order = sorted(range(calls), key=lambda n: (n * (2 * number + 1) * 7919) % 1009)
        for batch in range(8):
            part = [rows.row(receipt(n)) for n in order[batch * 30 : batch * 30 + 30]]
            ledger.write(
                f"writer-{number}", Batch(batch + 1, part, {("2026-11-28", "acme", "chat", None, 429, None): 1})
            )
        ledger.close()

    with ThreadPoolExecutor(writers) as threads:
        for done in [threads.submit(write, number) for number in range(writers)]:
            done.result()
    assert place.rows("SELECT count(*) AS n FROM receipts") == [{"n": calls}]
    for table in ("usage_hours", "usage_coarse_days"):
        assert place.rows(f"SELECT sum(calls) AS n, sum(cost) AS cost FROM {table}") == [
            {"n": calls, "cost": sum(10**18 + n for n in range(calls))}
        ]
    assert place.rows("SELECT sum(calls) AS n FROM rejections") == [{"n": 8 * writers}]
    assert place.rows("SELECT count(*) AS n FROM usage_groups") == [{"n": 35}]


# --- partitions --------------------------------------------------------------------------------


def partitions_of(place: PostgresPlace) -> dict[str, int]:
    found = place.rows("SELECT tableoid::regclass::text AS name, count(*) AS n FROM receipts GROUP BY 1")
    return {row["name"]: row["n"] for row in found}


def test_an_id_is_unique_whatever_its_receipt_says_of_the_time(place: PostgresPlace) -> None:
    ledger = place.store()
    first = Month(2026, 11).first_id
    ids = ["x", "", "019a", f"{first}-7000-8000-000000000001", f"{first}-7000-8000-000000000001.adj", "zzz"]
    for number, shift in enumerate((0, 40 * 86_400 * 10**9, -(10**18))):
        made = [rows.row(receipt(n, id=each, wall_ns=NOON * 10**9 + shift)) for n, each in enumerate(ids)]
        ledger.write("one", Batch(number + 1, made, {}))
    assert partitions_of(place) == {"receipts_2026_11": 2, "receipts_other": 4}
    assert place.rows("SELECT sum(calls) AS n FROM usage_days") == [{"n": 6}]
    ledger.close()


def test_what_came_before_its_partition_is_moved_into_it(place: PostgresPlace) -> None:
    ledger = place.store()
    month = Month(2031, 12)
    assert (month.next, month.table) == (Month(2032, 1), "receipts_2031_12")
    ids = [f"{each.first_id}-7000-8000-00000000000{n}" for n, each in enumerate((month, month, month.next))]
    assert [Month.of_id(each) for each in ids] == [month, month, month.next]
    made = [rows.row(receipt(n, id=each)) for n, each in enumerate(ids)]
    ledger.connect()
    ledger._next_try = time.monotonic() + 1000  # as after somebody who read for long
    ledger.write("one", Batch(1, made, {}))
    assert partitions_of(place) == {"receipts_other": 3}
    ledger._next_try = 0
    ledger.write("one", Batch(2, made, {}))
    assert partitions_of(place) == {"receipts_2031_12": 2, "receipts_2032_01": 1}
    assert place.rows("SELECT sum(calls) AS n FROM usage_days") == [{"n": 3}]
    ledger.close()


def test_somebody_who_reads_for_long_keeps_no_receipt_waiting(
    place: PostgresPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schema, "LOCK_MILLISECONDS", 100)
    ledger = place.store()
    ledger.write("one", Batch(1, [rows.row(receipt(1))], {}))
    reads, ends = threading.Event(), threading.Event()

    def read(database: Any) -> int:
        database.rows("SELECT count(*) FROM receipts")
        reads.set()
        ends.wait(10)
        return len(database.rows("SELECT id FROM receipts"))

    with ThreadPoolExecutor(1) as threads:
        answer = threads.submit(ledger.reading(30).run, read)
        reads.wait(10)
        later = f"{Month(2030, 1).first_id}-7000-8000-000000000000"
        ledger.write("one", Batch(2, [rows.row(receipt(2, id=later))], {}))
        assert not ledger.forget(2**62)
        ends.set()
        assert answer.result() == 1
    assert partitions_of(place) == {"receipts_2025_11": 1, "receipts_other": 1}
    ledger.close()


async def test_a_user_who_may_not_make_partitions_still_writes_receipts(place: PostgresPlace) -> None:
    """The tables are another's, who made a month's partition before it came, so far."""
    owner = place.store()
    await asyncio.to_thread(owner.connect)
    place.execute("CREATE ROLE clerk LOGIN PASSWORD 'example-password'")
    try:
        place.execute("GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO clerk")
        async with running(config(place.url.replace("qlens:", "clerk:"))) as gateway:
            assert await call(gateway) == 200
            await until(lambda: partitions_of(place) == {"receipts_other": 1})
            assert gateway.plugin("cost", "ledger").health().ok
        await asyncio.to_thread(owner.write, "one", Batch(1, [rows.row(receipt(1))], {}))
        await asyncio.to_thread(owner.close)
        assert partitions_of(place) == {Month.at(time.time()).table: 1, "receipts_2025_11": 1}
    finally:
        place.execute("DROP OWNED BY clerk")
        place.execute("DROP ROLE clerk")


async def test_a_partition_that_takes_too_long_to_be_made_keeps_no_receipt_waiting(
    place: PostgresPlace, impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = place.store()
    await asyncio.to_thread(ledger.connect)
    ledger._next_try = time.monotonic() + 1000
    await asyncio.to_thread(
        ledger.write, "one", Batch(1, [rows.row(receipt(1, id=f"{Month.at(time.time()).first_id}-7"))], {})
    )
    await asyncio.to_thread(ledger.close)
    # As with many receipts that have to be moved.
    place.execute(
        "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(20); RETURN OLD; END'"
    )
    place.execute("CREATE TRIGGER slow BEFORE DELETE ON receipts_other FOR EACH ROW EXECUTE FUNCTION slow()")
    monkeypatch.setattr(store, "WRITE_SECONDS", 1)
    async with running(config(place.url)) as gateway:
        assert await call(gateway) == 200
        await until(lambda: partitions_of(place) == {"receipts_other": 2})
        await until(lambda: gateway.plugin("cost", "ledger").health().ok)


async def test_a_gateway_whose_clock_is_ahead_deletes_nothing_that_others_keep(
    place: PostgresPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_ns, month = time.time_ns, Month.at(time.time())
    old = Month.at(month.begin.timestamp() - 86_400 * 200)
    ledger = place.store()
    made = [receipt(n, id=f"{each.first_id}-7", wall_ns=now_ns()) for n, each in enumerate((old, month))]
    await asyncio.to_thread(ledger.write, "one", Batch(1, [rows.row(each) for each in made], {}))
    await asyncio.to_thread(ledger.close)
    monkeypatch.setattr(time, "time_ns", lambda: now_ns() + 730 * 86_400 * 10**9)
    async with running(config(place.url, "flush_seconds: 0.01, keep_days: 30")) as gateway:
        assert await call(gateway) == 200
        await until(lambda: gateway.plugin("cost", "ledger").writer._next_look > 0)
    # By the server's clock it is long ago, too.
    assert old.table not in partitions_of(place)
    assert partitions_of(place)[month.table] > 0


async def test_what_is_asked_while_a_month_is_dropped_misses_nothing(place: PostgresPlace, tmp_path: Path) -> None:
    """A client is refused rather than told of less, `verify` finds no difference, and a backup has what is left."""
    day, copy = NOON // DAY * DAY, tmp_path / "ledger.jsonl"
    waits = "SELECT count(*) AS n FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
    async with running(config(place.url).replace("plugin: anonymous", "plugin: anonymous, roles: [admin]")) as gateway:
        ledger = place.store()
        await asyncio.to_thread(ledger.write, "one", Batch(1, [rows.row(receipt(n)) for n in range(50)], {}))
        other = await asyncpg.connect(place.url)
        async with other.transaction():
            await schema.forget(other, 2**62)
            answer = asyncio.create_task(gateway.get(f"/v1/usage/summary?group_by=user_id&start_time={day}"))
            verdict = asyncio.create_task(asyncio.to_thread(ledger.reading(30).run, verifying.verify))
            saved = asyncio.create_task(
                asyncio.to_thread(ledger.reading(30).run, lambda database: backup.write(database, copy))
            )
            await until(lambda: place.rows(waits) == [{"n": 3}])
        await other.close()
        assert "receipts_deleted" in (await answer).text
        assert (await verdict).told == []
        assert (await saved).rests > 0
        await asyncio.to_thread(ledger.close)
    new = SqlitePlace(tmp_path / "new.db")
    restored = new.store()
    restored.connect()
    backup.Source(copy).restore(restored, lambda: None)
    restored.close()
    assert new.rows("SELECT sum(calls) AS n FROM usage_days") == [{"n": 50}]


def test_a_name_that_is_too_long_for_a_key_is_cut_and_still_another_s(place: PostgresPlace) -> None:
    ledger = place.store()
    seed = random.Random(7)
    one, other = ("é" * 50 + seed.randbytes(4000).hex() for _ in range(2))
    callers = [Caller(tenant, "bob", "keys", tenant, tenant) for tenant in (one, other, one, "acme")]
    made = [rows.row(receipt(n, caller=caller, model=caller.tenant)) for n, caller in enumerate(callers)]
    refused: dict[rows.Rejection, int] = {
        ("2026-11-28", tenant, "chat", tenant, 429, None): 1 for tenant in (one, other)
    }
    ledger.write("one", Batch(1, made, refused))
    ledger.close()
    found = place.rows("SELECT tenant, count(*) AS n FROM receipts GROUP BY 1 ORDER BY 1")
    assert sorted(row["n"] for row in found) == [1, 1, 2]
    assert all(row["tenant"] == "acme" or row["tenant"].startswith("é" * 50) for row in found)
    assert place.rows("SELECT count(*) AS n FROM usage_groups") == [{"n": 3}]
    assert place.rows("SELECT count(*) AS n FROM rejections") == [{"n": 2}]


# --- questions ---------------------------------------------------------------------------------


@pytest.fixture
def questions(place: PostgresPlace) -> Iterator[Reader]:
    ledger = place.store()
    ledger.connect()
    yield Reader(ledger)
    ledger.close()


async def test_a_question_that_nobody_waits_for_ends_at_the_server_too(place: PostgresPlace, questions: Reader) -> None:
    asking = (
        "SELECT count(*) AS n FROM pg_stat_activity WHERE query LIKE '%pg_sleep(20)%' AND state = 'active' "
        "AND pid <> pg_backend_pid()"
    )
    waiting = [
        asyncio.create_task(questions.ask(lambda database: database.rows("SELECT pg_sleep(20)"))) for _ in range(4)
    ]
    await until(lambda: place.rows(asking) == [{"n": reading.AT_ONCE}])
    for task in waiting:
        task.cancel()
    found = await asyncio.gather(*waiting, return_exceptions=True)
    assert all(isinstance(one, asyncio.CancelledError) for one in found)
    await until(lambda: place.rows(asking) == [{"n": 0}])
    assert await questions.ask(lambda database: tuple(database.one("SELECT 7") or ())) == (7,)


def test_a_command_may_take_its_time_between_two_statements(
    place: PostgresPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qlens.stores.postgres._SETTINGS", "SET idle_in_transaction_session_timeout = '100ms'")
    ledger = place.store()
    ledger.connect()

    def slow(database: Database) -> Any:
        time.sleep(0.5)
        return database.one("SELECT 1")

    with pytest.raises(StoreAway):
        ledger.reading(10).run(slow)
    assert tuple(ledger.reading(math.inf).run(slow)) == (1,)
    ledger.close()


async def test_a_connection_that_was_lost_while_it_waited_costs_no_question(
    place: PostgresPlace, questions: Reader
) -> None:
    def pid(database: Any) -> int:
        return int(database.rows("SELECT pg_backend_pid()")[0][0])

    first = await questions.ask(pid)
    assert await questions.ask(pid) == first
    await asyncio.to_thread(place.execute, f"SELECT pg_terminate_backend({first}, 5000)")
    assert await questions.ask(pid) != first


def test_a_question_that_is_stopped_at_its_end_stops_no_other(place: PostgresPlace) -> None:
    ledger = place.store()
    ledger.connect()
    for _ in range(3):
        late = ledger.reading(10)

        def question(database: Any, late: Any = late) -> int:
            found = len(database.rows("SELECT 1"))
            late.stop()
            return found

        with pytest.raises(TookTooLong):
            late.run(question)
        late.stop()
        assert ledger.reading(10).run(lambda database: len(database.rows("SELECT 1"))) == 1
    ledger.close()


async def test_a_question_that_takes_too_long_is_refused_and_none_can_write(
    questions: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "LONGEST_SECONDS", 0.1)
    with pytest.raises(InvalidRequest, match="too much to read"):
        await questions.ask(lambda database: database.rows("SELECT pg_sleep(20)"))
    monkeypatch.setattr(reading, "LONGEST_SECONDS", 10)
    with pytest.raises(Unavailable):
        await questions.ask(lambda database: database.rows("DELETE FROM receipts"))
    question = Question(0, 2**32, None, GROUPS)
    assert await questions.ask(lambda database: sums.read(database, question)) == {}


# --- who may, and what is there ----------------------------------------------------------------


async def refused(url: str) -> str:
    with pytest.raises(StartupError) as error:
        async with running(config(url)):
            pass
    return str(error.value)


async def test_what_an_operator_must_mend_stops_the_start_and_never_shows_the_password(
    place: PostgresPlace, caplog: pytest.LogCaptureFixture
) -> None:
    server = place.server
    place.execute("CREATE ROLE reader LOGIN PASSWORD 'example-password'")
    told = {
        "the user or the password is wrong": server.url(place.name, password="hunter2%2Fexample"),
        "the database does not exist": server.url("nowhere"),
        "has not the rights it needs": place.url.replace("qlens:", "reader:"),
        "a setting in the URL is unknown": f"{place.url}?colour=red",
    }
    try:
        for message, url in told.items():
            found = await refused(url)
            assert message in found
            assert "cost[1]" in found
            assert PASSWORD not in found
            assert "hunter2" not in found
        # Later, when others run on it, it is no reason to end: a question is answered with 503.
        ledger = place.store()
        await asyncio.to_thread(ledger.connect)
        await asyncio.to_thread(ledger.close)
        questions = Reader(PostgresStore(Secret(told["has not the rights it needs"])))
        with pytest.raises(Unavailable):
            await questions.ask(lambda database: database.rows("SELECT id FROM receipts"))
        assert PASSWORD not in caplog.text
        await asyncio.to_thread(questions.store.close)
    finally:
        place.execute("DROP ROLE reader")
    settings = LedgerConfig(url=Url(place.url))
    assert PASSWORD not in repr(settings) + repr(place.store()) + caplog.text


async def test_without_its_extra_it_says_which_one(place: PostgresPlace, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("qlens_plugins.cost.ledger.postgres")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "asyncpg", None)
    assert "pip install 'qlens[postgres]'" in await refused(place.url)


def test_a_schema_of_its_own_can_be_named(place: PostgresPlace) -> None:
    place.execute("CREATE SCHEMA billing")
    ledger = PostgresStore(Secret(f"{place.url}?search_path=billing"))
    ledger.write("one", Batch(1, [rows.row(receipt(1))], {}))
    ledger.close()
    assert place.rows("SELECT count(*) AS n FROM billing.receipts") == [{"n": 1}]
    assert place.rows("SELECT count(*) AS n FROM receipts") == []
    missing = PostgresStore(Secret(f"{place.url}?search_path=nowhere"))
    with pytest.raises(StartupError, match="the schema does not exist"):
        missing.connect()
    missing.close()


def test_tables_of_another_program_are_left_alone(place: PostgresPlace) -> None:
    place.execute("CREATE TABLE receipts (id integer)")
    ledger = place.store()
    with pytest.raises(StartupError, match="of another program"):
        ledger.connect()
    ledger.close()
    assert place.rows("SELECT count(*) AS n FROM receipts") == [{"n": 0}]


def test_a_newer_version_s_tables_are_written_when_it_says_so(
    place: PostgresPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = place.store()
    old.write("old", Batch(1, [rows.row(receipt(1))], {}))
    tables = ("receipts", "rejections", "writers", "usage_groups", "usage_hours", "usage_days", "usage_latencies")
    columns = [f"ALTER TABLE {table} ADD COLUMN later text NOT NULL DEFAULT 'x'" for table in tables]
    added = PostgresMigration(columns, oldest=len(MIGRATIONS))
    with monkeypatch.context() as patch:
        patch.setattr(schema, "MIGRATIONS", (*MIGRATIONS, added))
        new = place.store()
        new.connect()
        new.close()
    # The one that runs goes on, and one that starts anew does as well.
    refused: dict[rows.Rejection, int] = {("2026-11-28", "acme", "chat", None, 429, None): 1}
    for number, ledger in enumerate((old, place.store()), 2):
        ledger.write("old", Batch(number, [rows.row(receipt(number))], refused))
        assert ledger.reading(30).run(verifying.verify).told == []
        ledger.close()
    assert place.rows("SELECT count(*) AS n, min(later) AS later FROM receipts") == [{"n": 3, "later": "x"}]
    place.execute(f"UPDATE versions SET oldest = {len(MIGRATIONS) + 1}")
    ledger = place.store()
    with pytest.raises(StartupError, match="upgrade QLens"):
        ledger.connect()
    ledger.close()


async def test_an_upgrade_may_take_longer_than_other_plugins_may_to_open(
    place: PostgresPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qlens.gateway.OPEN_SECONDS", 0.5)
    with monkeypatch.context() as patch:
        patch.setattr(schema, "MIGRATIONS", MIGRATIONS[:1])
        old = place.store()
        await asyncio.to_thread(old.write, "old", Batch(1, [rows.row(receipt(1))], {}))
        await asyncio.to_thread(old.close)
    other = await asyncpg.connect(place.url)
    transaction = other.transaction()
    await transaction.start()
    await other.execute("LOCK TABLE usage_groups")

    async def slow() -> None:
        await asyncio.sleep(1)
        await transaction.rollback()
        await other.close()

    upgrading = asyncio.create_task(slow())
    async with running(config(place.url)) as gateway:
        assert upgrading.done()
        assert gateway.plugin("cost", "ledger").health().ok
        assert place.rows("SELECT sum(calls) AS n FROM usage_coarse_days") == [{"n": 1}]
    await upgrading


def test_what_is_written_is_on_the_disk_whatever_the_server_does_for_others(place: PostgresPlace) -> None:
    ledger = place.store()
    ledger.connect()
    assert place.rows("SHOW synchronous_commit") == [{"synchronous_commit": "off"}]
    assert ledger._line is not None
    assert ledger._line.rows("SHOW synchronous_commit", (), 5)[0][0] == "on"
    ledger.close()


def test_a_store_that_is_closed_leaves_no_connection(place: PostgresPlace) -> None:
    ledger = place.store()
    ledger.connect()
    assert ledger.reading(5).run(lambda database: len(database.rows("SELECT id FROM receipts"))) == 0
    ledger.close()
    connections = (
        "SELECT count(*) AS n FROM pg_stat_activity "
        "WHERE datname = current_database() AND application_name LIKE 'qlens%'"
    )
    assert place.rows(connections) == [{"n": 0}]


def test_an_away_store_says_why(caplog: pytest.LogCaptureFixture) -> None:
    ledger = PostgresStore(Secret("postgresql://qlens:example-password@127.0.0.1:1/qlens"))
    with pytest.raises(StoreAway, match="Connect call failed"):
        ledger.connect()
    with pytest.raises(StoreAway):
        ledger.reading(1).run(lambda database: database.rows("SELECT 1"))
    ledger.close()
    assert PASSWORD not in caplog.text
