"""The plugin `key_store`: who is let in, how it follows its database, and what it does while that is away."""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import sqlite3
import stat
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from keystores import ADMIN, CALL, config, key_file, made, send, status, stored
from ledgers import Place

from qlens import ConfigError, StartupError
from qlens.testing import ManualClock, Running, check_plugin, running
from qlens_plugins.auth.credentials import STORED
from qlens_plugins.auth.key_store import KeyStore
from qlens_plugins.auth.key_store.keyring import ANSWER_SECONDS
from qlens_plugins.auth.key_store.plugin import KeyStoreConfig

LEDGER = "{plugin: ledger, flush_seconds: 0.01}"


async def eventually(holds: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(5):
        while not await holds():
            await asyncio.sleep(0.02)


def keyring(gateway: Running) -> Any:
    return gateway.plugin("auth", "key_store").keyring


def test_it_keeps_the_contract_of_its_stage() -> None:
    check_plugin("auth", KeyStore)


# --- who is let in -----------------------------------------------------------------------------


async def test_a_key_tells_everything_about_its_caller(place: Place) -> None:
    async with stored(place=place) as gateway:
        key = await made(
            gateway,
            name="search",
            project="search",
            subject="joe",
            roles=["member", "viewer"],
            models=["gpt-4o*"],
            tags={"team": "search"},
            limits={"requests_per_minute": 60, "budget_usd": "25.00", "budget_window": "day"},
            expires_at="2100-01-01T01:00:00+01:00",
        )
        assert (await gateway.post("/v1/chat/completions", CALL, key=key["key"])).status == 200
        (receipt,) = await gateway.settled(1)
        caller = receipt.caller
        assert (caller.tenant, caller.project, caller.subject, caller.by) == ("acme", "search", "joe", "key_store")
        assert (caller.key_id, set(caller.roles), caller.models) == (key["id"], {"member", "viewer"}, ("gpt-4o*",))
        assert (caller.tags, caller.expires_at) == ({"team": "search"}, 4102444800)
        assert caller.allowance is not None
        assert caller.allowance.row() == {"requests_per_minute": 60, "budget_usd": "25", "budget_window": "day"}
        models = (await gateway.get("/v1/models", key=key["key"])).json()["data"]
        assert [model["id"] for model in models] == ["gpt-4o-mini", "gpt-4o"]
        assert (await gateway.post("/v1/chat/completions", {**CALL, "model": "claude"}, key=key["key"])).status == 404


async def test_only_the_whole_key_is_the_key_and_of_a_wrong_one_little_is_shown(place: Place) -> None:
    async with stored(place=place) as gateway:
        key = (await made(gateway))["key"]
        assert key.startswith(STORED)
        for wrong in (key[:-1], key + "x", key.swapcase(), STORED, STORED + "ключ", STORED + "x" * 4000):
            answer = await gateway.get("/v1/models", key=wrong)
            assert answer.status == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
            assert wrong not in answer.text
        assert await status(gateway, key) == 200


async def test_what_is_not_shaped_like_its_keys_is_left_to_others_wherever_it_stands() -> None:
    behind = config().replace(
        "[{plugin: key_store, poll_seconds: 0.05}, {plugin: api_keys, file: keys.yaml}]",
        "[{plugin: api_keys, file: keys.yaml}, {plugin: key_store, poll_seconds: 0.05}]",
    )
    assert behind != config()
    for text in (config(), behind):
        async with stored(text) as gateway:
            assert await status(gateway, ADMIN) == 200
            assert await status(gateway, "sk-example-unknown-unknown-unknown") == 401
            assert await status(gateway, (await made(gateway))["key"]) == 200


async def test_an_expired_key_is_refused_and_told_so(place: Place) -> None:
    clock = ManualClock()
    async with stored(place=place, clock=clock) as gateway:
        key = await made(gateway, expires_at="2027-01-15T09:00:00Z")
        assert await status(gateway, key["key"]) == 200
        clock.advance(86_400)
        answer = await gateway.get("/v1/models", key=key["key"])
        assert answer.status == 401
        assert "expired" in answer.json()["error"]["message"]
        clock.advance(-86_400)  # the clock goes back: what was right then is right again
        assert await status(gateway, key["key"]) == 200


async def test_a_rotated_key_works_beside_the_new_one_until_the_overlap_ends(place: Place) -> None:
    clock = ManualClock()
    async with stored(place=place, clock=clock) as gateway:
        old = await made(gateway)
        new = (await send(gateway, "POST", f"/admin/keys/{old['id']}/rotate", {"overlap_seconds": 60})).json()
        assert new["id"] == old["id"]
        assert new["key"] != old["key"]
        assert new["rotated_from"]["hint"] == old["hint"]
        assert [await status(gateway, key["key"]) for key in (old, new)] == [200, 200]
        clock.advance(61)
        assert [await status(gateway, key["key"]) for key in (old, new)] == [401, 200]
        last = (await send(gateway, "POST", f"/admin/keys/{old['id']}/rotate", {"overlap_seconds": 0})).json()
        assert last["rotated_from"] is None
        assert [await status(gateway, key["key"]) for key in (old, new, last)] == [401, 401, 200]


async def test_a_disabled_tenant_loses_its_keys_and_its_models_and_limits_are_the_keys(place: Place) -> None:
    async with stored(place=place) as gateway:
        key, other = await made(gateway, limits={"concurrency": 3}), await made(gateway, tenant="globex")
        settings = {"name": "acme", "models": ["gpt-4o*"], "limits": {"concurrency": 9, "tokens_per_minute": 50}}
        assert (await send(gateway, "POST", "/admin/tenants", settings)).status == 200
        me = (await gateway.get("/admin/whoami", key=key["key"])).json()
        assert (me["models"], me["limits"]) == (["gpt-4o*"], {"concurrency": 3, "tokens_per_minute": 50})
        assert (await send(gateway, "PATCH", "/admin/tenants/acme", {"disabled": True})).status == 200
        answer = await gateway.get("/v1/models", key=key["key"])
        assert (answer.status, "disabled" in answer.text) == (401, True)
        assert await status(gateway, other["key"]) == 200
        assert (await send(gateway, "PATCH", "/admin/tenants/acme", {"disabled": False})).status == 200
        assert await status(gateway, key["key"]) == 200


# --- following the database --------------------------------------------------------------------


async def test_what_one_gateway_changes_another_one_follows(place: Place) -> None:
    async with stored(place=place) as one, stored(place=place) as two:
        key = await made(one)
        assert await status(two, key["key"]) == 200  # at once: an unknown key makes it look
        assert (await send(two, "DELETE", f"/admin/keys/{key['id']}")).status == 200
        assert await status(two, key["key"]) == 401
        await eventually(lambda: _is(one, key["key"], 401))
        assert "revoked" in (await one.get("/v1/models", key=key["key"])).text


async def _is(gateway: Running, key: str, expected: int) -> bool:
    return await status(gateway, key) == expected


async def test_a_key_that_is_made_while_somebody_looks_is_found(place: Place) -> None:
    async with stored(place=place) as one, stored(config("poll_seconds: 4", place=place)) as two:
        for _ in range(3):
            wrong = asyncio.gather(*(status(two, f"{STORED}wrong-{each:030}") for each in range(20)))
            key = await made(one)
            assert await status(two, key["key"]) == 200
            assert set(await wrong) == {401}


async def test_a_flood_of_wrong_keys_asks_the_database_a_few_times_and_is_remembered_in_bounds(
    place: Place,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("qlens_plugins.auth.key_store.keyring.MOST_UNKNOWN", 100)
    async with stored(config("poll_seconds: 4", place=place)) as gateway:
        ring = keyring(gateway)
        asked = 0
        changes = ring.store.changes

        async def counted(since: int | None) -> Any:
            nonlocal asked
            asked += 1
            return await changes(since)

        ring.store = _Counting(ring.store, counted)
        begun = asyncio.get_running_loop().time()
        answers = await asyncio.gather(*(status(gateway, f"{STORED}wrong-{each:030}") for each in range(300)))
        again = await asyncio.gather(*(status(gateway, f"{STORED}wrong-{each:030}") for each in range(225, 300)))
        took = asyncio.get_running_loop().time() - begun
        assert set(answers) | set(again) == {401}
        assert asked <= 2 + took / 0.1
        assert len(ring._unknown) <= 100


class _Counting:
    def __init__(self, store: Any, changes: Any) -> None:
        self._store, self.changes = store, changes

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


async def test_a_reload_keeps_what_is_known_and_another_pepper_is_refused(place: Place) -> None:
    async with stored(place=place) as gateway:
        key, ring = await made(gateway), keyring(gateway)
        await gateway.reload(config("poll_seconds: 0.1", place=place))
        assert keyring(gateway) is ring
        assert await status(gateway, key["key"]) == 200
        assert len((await send(gateway, "GET", "/admin/audit")).json()["data"]) == 1
        await made(gateway)
        assert len((await send(gateway, "GET", "/admin/audit")).json()["data"]) == 2  # each once
        with pytest.raises(StartupError, match="another `pepper`"):
            await gateway.reload(config("pepper: example-pepper-example-pepper", place=place))
        assert await status(gateway, key["key"]) == 200


async def test_with_a_pepper_a_key_works_and_the_database_has_no_hash_that_could_be_tried(place: Place) -> None:
    async with stored(config("pepper: example-pepper-example-pepper", place=place)) as gateway:
        key = (await made(gateway))["key"]
        assert await status(gateway, key) == 200
        content = repr([place.rows(f"SELECT * FROM {table}") for table in ("keys", "key_state", "audit")])
        assert key[-4:] in content  # its hint: it is the right place to look
        assert repr(hashlib.sha256(key.encode()).digest()) not in content
        assert "example-pepper" not in content


# --- the database is away ----------------------------------------------------------------------


async def test_while_the_database_is_away_known_keys_work_for_a_while_and_then_it_is_503(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("qlens_plugins.auth.key_store.keyring.ANSWER_SECONDS", 0.3)
    async with stored(config("poll_seconds: 0.05, outage_seconds: 0.5")) as gateway:
        key = await made(gateway)
        _move(gateway.folder, away=True)
        await eventually(lambda: _unhealthy(gateway))
        assert (await send(gateway, "GET", "/admin/keys")).status == 503
        assert (await send(gateway, "POST", "/admin/keys", {"tenant": "acme"})).status == 503
        assert await status(gateway, STORED + "x" * 30) == 503  # nobody knows whether it is wrong
        await eventually(lambda: _is(gateway, key["key"], 503))
        assert not (gateway.folder / "qlens.db").exists()  # it is not made anew, without keys
        _move(gateway.folder, away=False)
        await eventually(lambda: _is(gateway, key["key"], 200))
        assert (await send(gateway, "GET", "/admin/keys")).status == 200


def test_a_gateway_without_the_database_accepts_a_revoked_key_for_a_minute_at_most() -> None:
    slowest = KeyStoreConfig(poll_seconds=4.0)
    assert slowest.poll_seconds + ANSWER_SECONDS + slowest.outage_seconds <= 60


async def _unhealthy(gateway: Running) -> bool:
    plugins = (await gateway.get("/admin/health", key=ADMIN)).json()["plugins"]
    return not plugins["auth.key_store"]["ok"]


def _move(folder: Path, *, away: bool) -> None:
    for name in ("qlens.db", "qlens.db-wal", "qlens.db-shm"):
        here, there = folder / name, folder / f"away-{name}"
        source, target = (here, there) if away else (there, here)
        if source.exists():
            os.rename(source, target)


async def test_a_row_that_cannot_be_read_is_trouble_and_does_not_end_the_following(place: Place) -> None:
    async with stored(place=place) as gateway:
        key = await made(gateway)
        place.execute("UPDATE keys SET limits = '{\"from_the_future\": 1}', change = 9")
        place.execute("UPDATE key_state SET change = 9")
        await eventually(lambda: _unhealthy(gateway))
        assert await status(gateway, key["key"]) == 200
        place.execute("UPDATE keys SET limits = NULL, revoked_at = 1")
        await eventually(lambda: _is(gateway, key["key"], 401))


async def test_a_database_that_does_not_answer_holds_up_nobody_whose_key_is_known(
    place: Place,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("qlens_plugins.auth.key_store.keyring.ANSWER_SECONDS", 0.3)
    async with stored(place=place) as gateway:
        key = await made(gateway)
        stuck = threading.Event()
        keyring(gateway).store._following._thread.submit(stuck.wait, 5)
        assert await status(gateway, STORED + "x" * 30) == 503
        assert await status(gateway, key["key"]) == 200
        stuck.set()
        await eventually(lambda: _is(gateway, STORED + "x" * 30, 401))


async def test_whatever_operators_ask_for_a_revocation_is_heard_of_in_time(place: Place) -> None:
    async with stored(place=place) as gateway:
        key, other = await made(gateway), await made(gateway)
        stuck = threading.Event()
        keyring(gateway).store._lists._thread.submit(stuck.wait, 5)
        assert (await send(gateway, "DELETE", f"/admin/keys/{other['id']}")).status == 200
        keyring(gateway).store._desk._thread.submit(stuck.wait, 5)
        place.execute("UPDATE keys SET revoked_at = 1, change = 9")
        place.execute("UPDATE key_state SET change = 9")
        await eventually(lambda: _is(gateway, key["key"], 401))
        assert not stuck.is_set()
        stuck.set()


async def test_the_file_is_for_its_owner_alone() -> None:
    async with stored() as gateway:
        for path in gateway.folder.glob("qlens.db*"):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600, path


async def test_an_older_copy_of_the_database_is_believed_when_it_is_put_back() -> None:
    async with stored() as gateway:
        kept = await made(gateway)
        with sqlite3.connect(gateway.folder / "qlens.db") as database:
            database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        database.close()
        shutil.copy(gateway.folder / "qlens.db", gateway.folder / "older.db")
        lost = await made(gateway)
        assert await status(gateway, lost["key"]) == 200
        for name in ("qlens.db-wal", "qlens.db-shm"):
            (gateway.folder / name).unlink()
        os.replace(gateway.folder / "older.db", gateway.folder / "qlens.db")
        await eventually(lambda: _is(gateway, lost["key"], 401))
        assert await status(gateway, kept["key"]) == 200


@pytest.mark.parametrize("first", ["key_store", "ledger"])
async def test_it_shares_a_file_with_the_ledger_whoever_comes_first(first: str) -> None:
    files = {"keys.yaml": key_file()}
    ledger_alone = config(cost=LEDGER).replace("{plugin: key_store, poll_seconds: 0.05}, ", "")
    both = config(cost=LEDGER)
    async with running(config() if first == "key_store" else ledger_alone, files=files) as gateway:
        await gateway.reload(both)
        key = await made(gateway)
        assert (await gateway.post("/v1/chat/completions", CALL, key=key["key"])).status == 200
        await gateway.settled(1)
        await eventually(lambda: asyncio.sleep(0, _count(gateway.folder / "qlens.db", "receipts") == 1))
        assert _count(gateway.folder / "qlens.db", "keys") == 1


def _count(path: Path, table: str) -> int:
    database = sqlite3.connect(path)
    try:
        return int(database.execute(f"SELECT count(*) FROM {table}").fetchone()[0])
    finally:
        database.close()


async def test_another_programs_database_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "theirs.db"
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE theirs (x)")
    database.close()
    before = path.read_bytes()
    with pytest.raises(StartupError, match="another program"):
        async with stored(config(f"url: 'sqlite:///{path}'")):
            pass
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("url: 'mysql://user:example-password@db/keys'", "keys at mysql:... are not supported"),
        ("url: 'postgresql://user:example-password@db'", "names no host and database"),
        ("url: 'postgresql://db/keys?password=example-password'", "a password belongs before the host"),
        ("url: 'sqlite:///:memory:'", "names no file"),
        ("pepper: short", "at least 16 characters"),
        ("poll_seconds: 9", "poll_seconds"),
    ],
)
async def test_settings_that_cannot_be_are_refused(settings: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        async with stored(config(settings)):
            pass
    assert "example-password" not in str(caught.value)
