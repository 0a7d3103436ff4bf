"""Keys in PostgreSQL: what becomes of them when the server, or the way to it, is lost, and who else is there."""

from __future__ import annotations

import asyncio
import itertools
import logging
import signal
import sys
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from cuts import CommitCut, Hushed
from keystores import ADMIN, CALL, config, made, send, status, stored
from ledgers import PostgresPlace

from qlens import StartupError, Url
from qlens.cli import main
from qlens.testing import Running
from qlens.testing.postgres import PostgresServer, postgres_server
from qlens_plugins.auth.credentials import STORED
from qlens_plugins.auth.key_store import postgres as opening
from qlens_plugins.auth.key_store.plugin import KeyStoreConfig

PASSWORD = "example-password"
LEDGER = "{{plugin: ledger, url: '{}', flush_seconds: 0.01}}"


@pytest.fixture
def place(postgres: PostgresServer) -> PostgresPlace:
    return PostgresPlace(postgres, postgres.new_database())


async def eventually(holds: Callable[[], Awaitable[bool]], seconds: float = 15) -> None:
    async with asyncio.timeout(seconds):
        while not await holds():
            await asyncio.sleep(0.02)


async def answered(gateway: Running, key: str, expected: int) -> None:
    """Wait until a call with a key is answered so."""

    async def holds() -> bool:
        return await status(gateway, key) == expected

    await eventually(holds)


async def well(gateway: Running, *, ok: bool) -> str:
    """Wait until the plugin says that it is well, or that it is not; what it says."""
    said = ""

    async def holds() -> bool:
        nonlocal said
        health = (await gateway.get("/admin/health", key=ADMIN)).json()["plugins"]["auth.key_store"]
        said = health["detail"]
        return bool(health["ok"]) is ok

    await eventually(holds)
    return said


def settings(url: str, more: str = "poll_seconds: 0.05") -> str:
    return config(f"{more}, url: '{url}'")


# --- the server is away ------------------------------------------------------------------------


async def test_keys_go_on_working_while_the_server_is_away_and_hear_of_what_was_changed_when_it_is_back(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with postgres_server() as server:
        place = PostgresPlace(server, server.new_database())
        async with stored(place=place) as gateway:
            key, other = await made(gateway), await made(gateway)
            for how, unknown in ((signal.SIGQUIT, STORED + "x" * 30), (signal.SIGINT, STORED + "y" * 30)):
                await asyncio.to_thread(server.stop, how)
                assert PASSWORD not in await well(gateway, ok=False)
                assert (await gateway.post("/v1/chat/completions", CALL, key=key["key"])).status == 200
                assert await status(gateway, unknown) == 503  # nobody knows whether it is wrong
                assert (await send(gateway, "GET", "/admin/keys")).status == 503
                assert (await send(gateway, "DELETE", f"/admin/keys/{key['id']}")).status == 503
                await asyncio.to_thread(server.start)
                assert await well(gateway, ok=True) == "2 keys"
                assert await status(gateway, key["key"]) == 200
                assert await status(gateway, unknown) == 401
            await asyncio.to_thread(server.stop, signal.SIGQUIT)
            await well(gateway, ok=False)
            await asyncio.to_thread(server.start)
            place.execute(f"UPDATE keys SET revoked_at = 1 WHERE id = '{key['id']}'")  # no number tells of it
            await answered(gateway, key["key"], 401)
            assert await status(gateway, other["key"]) == 200
            assert await made(gateway)
    assert PASSWORD not in caplog.text


async def test_after_the_outage_that_is_allowed_no_key_works_until_the_server_is_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("qlens_plugins.auth.key_store.keyring.ANSWER_SECONDS", 0.3)
    with postgres_server() as server:
        place = PostgresPlace(server, server.new_database())
        async with stored(config("poll_seconds: 0.05, outage_seconds: 0.5", place=place)) as gateway:
            key = await made(gateway)
            await asyncio.to_thread(server.stop, signal.SIGQUIT)
            await answered(gateway, key["key"], 503)
            await asyncio.to_thread(server.start)
            await answered(gateway, key["key"], 200)


async def test_a_server_that_is_away_at_the_start_does_not_stop_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qlens_plugins.auth.key_store.keyring.PATIENCE_SECONDS", 0.2)
    with postgres_server() as server:
        place = PostgresPlace(server, server.new_database())
        server.stop()
        async with stored(place=place) as gateway:
            assert await status(gateway, STORED + "x" * 30) == 503
            assert await status(gateway, ADMIN) == 200  # of the file
            await asyncio.to_thread(server.start)
            await well(gateway, ok=True)
            assert await status(gateway, (await made(gateway))["key"]) == 200


# --- the way to it is lost ---------------------------------------------------------------------

_END_ALL = (
    "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity "
    "WHERE application_name = 'qlens keys' AND datname = current_database()"
)
"""Ends all connections of gateways to a database."""


async def test_a_connection_that_falls_silent_delays_a_revocation_a_little_and_fails_no_operator(
    place: PostgresPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening, "PROBE_SECONDS", 0.3)
    proxy = Hushed(place.server.port)
    await proxy.up()
    try:
        async with stored(settings(place.server.url(place.name, port=proxy.port))) as one, stored(place=place) as two:
            key, other = await made(one), await made(one)
            await send(one, "GET", "/admin/keys")
            for each in (key, other):
                proxy.hush()
                assert (await send(two, "DELETE", f"/admin/keys/{each['id']}")).status == 200
                await answered(one, each["key"], 401)
            assert (await send(one, "GET", "/admin/health")).json()["plugins"]["auth.key_store"]["ok"]
            proxy.hush()
            assert await status(one, (await made(one))["key"]) == 200
            proxy.hush()
            assert len((await send(one, "GET", "/admin/keys")).json()["data"]) == 3
    finally:
        await proxy.close()


async def test_a_connection_that_the_server_has_ended_is_noticed_by_nobody(place: PostgresPlace) -> None:
    async with stored(place=place) as gateway:
        key = await made(gateway)
        await send(gateway, "GET", "/admin/keys")
        for _ in range(3):
            place.execute(_END_ALL)
            assert (await send(gateway, "POST", f"/admin/keys/{key['id']}/rotate", {})).status == 200
            assert (await send(gateway, "GET", "/admin/keys")).status == 200
            assert await status(gateway, key["key"] + "x") == 401
        await well(gateway, ok=True)


async def test_what_another_connection_leads_to_is_read_anew(place: PostgresPlace) -> None:
    async with stored(config("poll_seconds: 4", place=place)) as gateway:
        key = await made(gateway)
        # As in a copy of the database, in which the same number means another change.
        place.execute("UPDATE keys SET revoked_at = 1")
        place.execute(_END_ALL)
        assert await status(gateway, key["key"] + "x") == 401  # it looks
        assert await status(gateway, key["key"]) == 401


async def test_a_change_whose_commit_nobody_answered_is_made_once(place: PostgresPlace) -> None:
    proxy = CommitCut(place.server.port, every=2, commit=b"COMMIT\0")
    await proxy.up()
    try:
        async with stored(settings(place.server.url(place.name, port=proxy.port))) as gateway:
            keys = [await made(gateway, name=f"n{n}") for n in range(6)]
            for n, key in enumerate(keys):
                path = f"/admin/keys/{key['id']}"
                assert (await send(gateway, "PATCH", path, {"name": f"m{n}"})).status == 200
                turned = await send(gateway, "POST", f"{path}/rotate", {"overlap_seconds": 600})
                assert turned.status == 200
                # Turned twice, the old one would be another one.
                assert [await status(gateway, each) for each in (key["key"], turned.json()["key"])] == [200, 200]
            assert (await send(gateway, "POST", "/admin/tenants", {"name": "acme"})).status == 200
            assert proxy.cuts >= 6
            assert len((await send(gateway, "GET", "/admin/keys")).json()["data"]) == 6
            entries = (await send(gateway, "GET", "/admin/audit?limit=100")).json()["data"]
            assert len(entries) == 19
    finally:
        await proxy.close()
    assert place.rows("SELECT change FROM key_state") == [{"change": 19}]


async def test_whoever_holds_the_tables_locked_keeps_no_call_waiting(place: PostgresPlace) -> None:
    async with stored(place=place) as gateway:
        key = await made(gateway)
        theirs = await asyncpg.connect(place.url)
        async with theirs.transaction():
            await theirs.execute("SELECT FROM key_state FOR UPDATE")
            async with asyncio.timeout(15):
                assert (await send(gateway, "DELETE", f"/admin/keys/{key['id']}")).status == 503
            assert await status(gateway, key["key"]) == 200
            assert await status(gateway, STORED + "x" * 30) == 401
        await theirs.close()
        assert (await send(gateway, "DELETE", f"/admin/keys/{key['id']}")).status == 200


# --- several at a time -------------------------------------------------------------------------


async def test_gateways_that_start_at_a_time_make_the_tables_once_beside_their_ledgers(place: PostgresPlace) -> None:
    text = config(cost=LEDGER.format(place.url), place=place)
    async with AsyncExitStack() as stack:
        gateways = await asyncio.gather(*(stack.enter_async_context(stored(text)) for _ in range(4)))
        for gateway in gateways:
            await well(gateway, ok=True)
        owners = place.rows("SELECT owner, version FROM versions ORDER BY owner")
        assert [row["owner"] for row in owners] == ["key_store", "ledger"]
        key = await made(gateways[0])
        for gateway in gateways:
            assert (await gateway.post("/v1/chat/completions", CALL, key=key["key"])).status == 200
            await gateway.settled(1)

        async def are_kept() -> bool:
            found = place.rows(f"SELECT count(*) AS n FROM receipts WHERE key_id = '{key['id']}'")
            return found == [{"n": 4}]

        await eventually(are_kept)


async def test_operators_at_two_gateways_lose_no_change_of_each_other(place: PostgresPlace) -> None:
    async with stored(place=place) as one, stored(place=place) as two:
        key = await made(one)
        path = f"/admin/keys/{key['id']}"
        done: list[str] = []

        async def change(gateway: Running, n: int) -> None:
            answer = await send(gateway, "PATCH", path, {"name": f"n{n}"})
            assert answer.status in (200, 409)
            done.extend([answer.json()["name"]] if answer.status == 200 else [])
            await made(gateway, name=f"beside {n}")

        await asyncio.gather(*(change((one, two)[n % 2], n) for n in range(12)))
        assert done
        entries = (await send(one, "GET", "/admin/audit?action=keys.change&limit=100")).json()["data"]
        assert sorted(entry["after"]["name"] for entry in entries) == sorted(done)
        # Each began where the one before it had ended.
        for later, earlier in itertools.pairwise(entries):
            assert later["before"] == earlier["after"]
        store: Any = one.plugin("auth", "key_store").keyring.store
        assert (await store.chain())[:2] == (13 + len(done), None)
        for gateway in (one, two):
            assert len((await send(gateway, "GET", "/admin/keys?limit=100")).json()["data"]) == 13
        assert [row["change"] for row in place.rows("SELECT change FROM key_state")] == [13 + len(done)]


async def test_a_long_log_is_checked_in_parts(place: PostgresPlace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qlens_plugins.auth.key_store.audit.AT_ONCE", 2)
    async with stored(place=place) as gateway:
        for _ in range(5):
            await made(gateway)
        store: Any = gateway.plugin("auth", "key_store").keyring.store
        assert (await store.chain())[:2] == (5, None)
        place.execute("ALTER TABLE audit DISABLE TRIGGER ALL")
        place.execute("DELETE FROM audit WHERE n = 3")
        assert (await store.chain())[0] == 3


# --- who may, and what is there ----------------------------------------------------------------


async def refused(url: str) -> str:
    with pytest.raises(StartupError) as error:
        async with stored(settings(url)):
            pass
    return str(error.value)


async def test_what_an_operator_must_mend_stops_the_start_and_never_shows_the_password(
    place: PostgresPlace, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    server = place.server
    place.execute("CREATE ROLE key_reader LOGIN PASSWORD 'example-password'")
    try:
        for message, url in {
            "the user or the password is wrong": server.url(place.name, password="hunter2%2Fexample"),
            "the database does not exist": server.url("nowhere"),
            "has not the rights it needs": place.url.replace("qlens:", "key_reader:"),
            "the schema does not exist": f"{place.url}?search_path=nowhere",
        }.items():
            found = await refused(url)
            assert message in found
            assert "key_store: postgresql://127.0.0.1" in found
            assert PASSWORD not in found
            assert "hunter2" not in found
    finally:
        place.execute("DROP ROLE key_reader")
    assert PASSWORD not in repr(KeyStoreConfig(url=Url(place.url))) + repr(opening.PostgresPlace) + caplog.text


async def test_without_its_extra_it_says_which_one(place: PostgresPlace, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("qlens_plugins.auth.key_store.postgres")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "qlens_plugins.auth.key_store.postgres", None)
    assert "pip install 'qlens[postgres]'" in await refused(place.url)


@pytest.mark.parametrize("table", ["keys", "audit", "versions"])
async def test_tables_of_another_program_are_left_alone_and_a_schema_of_its_own_can_be_named(
    place: PostgresPlace, table: str
) -> None:
    place.execute(f"CREATE TABLE {table} (id integer)")
    assert f"has a table `{table}` of another program" in await refused(place.url)
    place.execute("CREATE SCHEMA gateway")
    async with stored(settings(f"{place.url}?search_path=gateway")) as gateway:
        assert await status(gateway, (await made(gateway))["key"]) == 200
    assert place.rows("SELECT count(*) AS n FROM gateway.keys") == [{"n": 1}]
    assert place.rows(f"SELECT count(*) AS n FROM public.{table}") == [{"n": 0}]


async def test_what_no_name_can_have_is_unknown(place: PostgresPlace) -> None:
    async with stored(place=place) as gateway:
        await made(gateway)
        for path in ("/admin/keys/a%00b", "/admin/keys/%ff", "/admin/tenants/a%00b"):
            assert (await send(gateway, "GET", path)).status == 404, path
        await well(gateway, ok=True)


def test_the_commands_say_where_no_database_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "qlens.yaml"
    text = settings("postgresql://joe:example-password@127.0.0.1:1/keys")
    path.write_text(text.replace(", {plugin: api_keys, file: keys.yaml}", ""))
    monkeypatch.setenv("QLENS_CONFIG", str(path))
    assert main(["keys", "list"]) == 2
    said = capsys.readouterr().err
    assert "the database of keys cannot be asked" in said
    assert PASSWORD not in said
