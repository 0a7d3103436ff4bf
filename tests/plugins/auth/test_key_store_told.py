"""What is changed of keys is told by one of the gateways on a database: at the command line as over the admin API."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest
from keystores import config, key_file, made, send, stored
from ledgers import Place, PostgresPlace

from qlens import Event
from qlens.cli import main
from qlens.testing import ManualClock, Running, running
from qlens_plugins.auth.key_store import postgres_schema, schema
from qlens_plugins.auth.key_store.telling import OWN_SECONDS, UNHEARD_SECONDS

WAITING = "SELECT n, event FROM untold_events ORDER BY n"


EAR = """
import asyncio
from contextlib import asynccontextmanager

from qlens import hookimpl


class Ear:
    def __init__(self, config, name):
        self.name, self.heard = name, []

    @hookimpl
    @asynccontextmanager
    async def lifespan(self, gateway):
        await asyncio.sleep(0.5)  # key_store looks meanwhile
        with gateway.events.listen(self.heard.append, self.name):
            yield
"""


@pytest.fixture
def house(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The configuration that the commands find."""
    (tmp_path / "qlens.yaml").write_text(config(place=place))
    (tmp_path / "keys.yaml").write_text(key_file())
    monkeypatch.setenv("QLENS_CONFIG", str(tmp_path / "qlens.yaml"))
    return tmp_path


async def keys(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Run `qlens keys`; what it prints."""
    capsys.readouterr()
    assert await asyncio.to_thread(main, ["keys", "--plugin", "key_store", *words]) == 0
    return capsys.readouterr().out.strip()


@contextmanager
def heard(gateway: Running) -> Iterator[list[Event]]:
    """What a plugin hears that listens to a gateway."""
    events: list[Event] = []
    with gateway.gateway.events.listen(events.append, "test"):
        yield events


async def gone(place: Place) -> None:
    """Wait until nothing waits to be told."""
    async with asyncio.timeout(10):
        while place.rows(WAITING):
            await asyncio.sleep(0.02)


async def id_of(gateway: Running, key: str) -> str:
    return str((await gateway.get("/admin/whoami", key=key)).json()["key_id"])


@asynccontextmanager
async def pair(place: Place) -> AsyncIterator[tuple[Running, Running]]:
    """Two gateways on one database."""
    async with stored(place=place) as one, stored(place=place) as two:
        yield one, two


async def test_what_a_command_changes_one_of_two_gateways_tells_as_the_admin_api_does(
    house: Path, place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    async with pair(place) as (one, two):
        with heard(one) as first, heard(two) as second:
            id_ = await id_of(one, await keys(capsys, "create", "--tenant", "acme", "--project", "web"))
            await keys(capsys, "rotate", id_)
            await keys(capsys, "revoke", id_)
            for n in range(20):
                await keys(capsys, "create", "--tenant", f"t{n}")
            await gone(place)
            for gateway in (one, two):  # one look more of each: nobody tells it again
                await gateway.plugin("auth", "key_store").keyring.look()
            told = first + second
            entries = (await send(one, "GET", "/admin/audit?limit=100")).json()["data"]
            assert sorted(event.id for event in told) == sorted(entry["id"] for entry in entries)
            mine = sorted((event for event in told if event.subject == id_), key=lambda event: event.time)
            assert [event.type for event in mine] == ["qlens.key.created", "qlens.key.rotated", "qlens.key.revoked"]
            assert {event.tenant for event in mine} == {"acme"}
            created, _, revoked = mine
            assert (created.data["project"], created.data["changed"]) == ("web", [])
            assert revoked.data["changed"] == ["revoked_at", "state"]
            first.clear()
            other = await made(one, project="web")
            (by_api,) = first
            assert by_api.subject == other["id"]
            assert created.data.keys() == by_api.data.keys()
            assert (created.data["request_id"], by_api.data["actor"]) == (None, "root")
            assert not any(name in created.data for name in ("hint", "hash", "key"))


async def test_what_was_changed_while_no_gateway_ran_is_told_by_the_next_to_start(
    house: Path, place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("one", "two"):
        await keys(capsys, "create", "--tenant", "acme", "--name", name)
    assert len(place.rows(WAITING)) == 2
    async with stored(place=place) as gateway:
        with heard(gateway) as events:
            await gone(place)
            assert [event.data["name"] for event in events] == ["one", "two"]


async def test_more_than_are_told_at_once_are_told_in_their_order(
    house: Path, place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    await keys(capsys, "create", "--tenant", "acme")
    (row,) = place.rows(WAITING)
    for n in range(250):
        text = row["event"].replace('"type": "qlens.key.created"', f'"type": "qlens.key.{n}"')
        place.execute(f"INSERT INTO untold_events (wall_ns, event) VALUES (1, '{text}')")
    for text in ("{}", "x", json.dumps({**json.loads(row["event"]), "time": "late"})):  # of a version that is not ours
        place.execute(f"INSERT INTO untold_events (wall_ns, event) VALUES (1, '{text}')")
    async with stored(place=place) as gateway:
        with heard(gateway) as events:
            await gone(place)
            assert [event.type for event in events[1:]] == [f"qlens.key.{n}" for n in range(250)]


async def test_events_that_nobody_hears_wait_for_a_gateway_that_has_listeners_and_not_for_good(
    house: Path, place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = ManualClock(now=time.time() + UNHEARD_SECONDS - 60)
    async with stored(place=place, clock=clock) as gateway:
        await keys(capsys, "create", "--tenant", "acme")
        for _ in range(3):
            await gateway.plugin("auth", "key_store").keyring.look()
        await asyncio.sleep(0.2)
        assert len(place.rows(WAITING)) == 1
        async with stored(place=place) as other:
            with heard(other) as events:
                await gone(place)
                assert [event.type for event in events] == ["qlens.key.created"]
        await keys(capsys, "create", "--tenant", "globex")
        clock.advance(120)
        await gone(place)


async def test_what_waited_for_long_is_told_by_a_plugin_that_opens_after_this_one(
    house: Path, place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    await keys(capsys, "create", "--tenant", "acme")
    (row,), long_ago = place.rows(WAITING), int((time.time() - 2 * UNHEARD_SECONDS) * 1e9)
    event = json.dumps({**json.loads(row["event"]), "time": long_ago})
    place.execute(f"UPDATE untold_events SET wall_ns = {long_ago}, event = '{event}'")
    text = config("poll_seconds: 0.01", place=place)
    text = text.replace("  cost: []", "  cost: []\n  observe: [{plugin: told_ear:Ear, name: ear}]")
    async with running(text, files={"keys.yaml": key_file(), "told_ear.py": EAR}) as gateway:
        await gone(place)
        assert [event.tenant for event in gateway.plugin("observe", "ear").heard] == ["acme"]


@pytest.mark.parametrize("place", ["postgres"], indirect=True)
async def test_what_cannot_be_let_go_of_is_told_again_under_the_same_id(
    house: Path, place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    await keys(capsys, "create", "--tenant", "acme")
    place.execute("CREATE FUNCTION no() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'no'; END $$")
    place.execute(
        "CREATE CONSTRAINT TRIGGER no AFTER DELETE ON untold_events DEFERRABLE INITIALLY DEFERRED "
        "FOR EACH ROW EXECUTE FUNCTION no()"  # it fails at COMMIT
    )
    async with stored(place=place) as gateway:
        with heard(gateway) as events:
            async with asyncio.timeout(10):
                while len(events) < 3:
                    await asyncio.sleep(0.02)
            assert len(place.rows(WAITING)) == 1
            place.execute("DROP TRIGGER no ON untold_events")
            await gone(place)
            assert len({event.id for event in events}) == 1
            # Calls and the admin API go on meanwhile.
            await made(gateway)


async def test_a_database_of_before_there_were_untold_events_is_taken_over(
    house: Path, place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    async with stored(place=place) as gateway:
        await made(gateway)
    is_postgres = isinstance(place, PostgresPlace)
    before = len((postgres_schema if is_postgres else schema).MIGRATIONS) - 1
    place.execute("DROP TABLE untold_events")
    place.execute(f"UPDATE versions SET version = {before} WHERE owner = 'key_store'")
    await keys(capsys, "create", "--tenant", "acme")
    assert place.rows("SELECT oldest FROM versions WHERE owner = 'key_store'") == [{"oldest": 1}]
    async with stored(place=place) as gateway:
        with heard(gateway) as events:
            await gone(place)
            assert [event.tenant for event in events] == ["acme"]


# --- the admin API -----------------------------------------------------------------------------

_KEEPS = {
    "SqlitePlace": (
        ("CREATE TRIGGER no BEFORE DELETE ON untold_events BEGIN SELECT RAISE(ABORT, 'no'); END",),
        "DROP TRIGGER no",
    ),
    "PostgresPlace": (
        (
            "CREATE FUNCTION no() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'no'; END $$",
            "CREATE TRIGGER no BEFORE DELETE ON untold_events FOR EACH ROW EXECUTE FUNCTION no()",
        ),
        "DROP TRIGGER no ON untold_events",
    ),
}
"""How nothing can be let go of, and how it can again."""


async def looked(*gateways: Running) -> None:
    """Let gateways look a few times, and do what they then do."""
    for _ in range(5):
        for gateway in gateways:
            await gateway.plugin("auth", "key_store").keyring.look()
        await asyncio.sleep(0.05)


async def test_what_the_gateway_that_made_it_cannot_let_go_of_yet_nobody_tells_again(place: Place) -> None:
    clock = ManualClock(now=time.time())
    async with stored(place=place, clock=clock) as one, stored(place=place, clock=clock) as two:
        with heard(one) as first, heard(two) as second:
            keeps, lets = _KEEPS[type(place).__name__]
            for statement in keeps:
                place.execute(statement)
            key = await made(one)
            assert (await send(one, "DELETE", f"/admin/keys/{key['id']}")).status == 200
            await looked(one, two)
            assert len(place.rows(WAITING)) == 2
            place.execute(lets)
            await gone(place)
            clock.advance(OWN_SECONDS + 1)
            await looked(one, two)
            assert [event.type for event in first] == ["qlens.key.created", "qlens.key.revoked"]
            assert second == []


async def test_what_a_gateway_made_that_has_nobody_to_tell_it_to_another_tells_after_a_while(place: Place) -> None:
    clock = ManualClock(now=time.time())
    async with stored(place=place, clock=clock) as one, stored(place=place, clock=clock) as two:
        with heard(two) as events:
            by_one = await made(one, project="web")
            clock.advance(OWN_SECONDS - 1)
            await looked(one, two)
            assert events == []
            clock.advance(2)
            await gone(place)
            by_two = await made(two, project="web")
            assert [event.subject for event in events] == [by_one["id"], by_two["id"]]
            found, expected = ({**event.data, "changed": []} for event in events)
            assert found.keys() == expected.keys()
            assert found["request_id"] is not None
            (entry,) = (await send(two, "GET", f"/admin/audit?object={by_one['id']}")).json()["data"]
            assert entry["id"] == events[0].id


async def test_what_a_command_changed_does_not_wait_for_what_another_gateway_made_before(
    house: Path, place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = ManualClock(now=time.time())
    async with stored(place=place, clock=clock) as gateway:
        await made(gateway)  # whom nobody hears
        clock.advance(1)
        await keys(capsys, "create", "--tenant", "globex")
        with heard(gateway) as events:
            async with asyncio.timeout(10):
                while len(place.rows(WAITING)) > 1:
                    await asyncio.sleep(0.02)
            assert [event.tenant for event in events] == ["globex"]


async def test_a_gateway_that_stops_or_goes_to_another_database_lets_go_of_what_it_has_told(
    place: Place, tmp_path: Path
) -> None:
    async with stored(place=place) as gateway:
        with heard(gateway) as events:
            for _ in range(3):
                await made(gateway)
    assert len(events) == 3
    assert place.rows(WAITING) == []
    async with stored(config("poll_seconds: 4", place=place)) as gateway:
        with heard(gateway) as events:
            await made(gateway)
            # The instance goes, and what it follows stays.
            await gateway.reload(config("poll_seconds: 0.05", place=place))
            await made(gateway)
            await gone(place)
            await made(gateway)
            await gateway.reload(config(f"poll_seconds: 0.05, url: 'sqlite:///{tmp_path}/other.db'"))
            await gone(place)
            await made(gateway)
            told = [event.id for event in events if event.type == "qlens.key.created"]
            assert len(set(told)) == len(told) == 4


async def test_a_listener_that_fails_holds_nothing_up(place: Place) -> None:
    def fails(_: Event) -> None:
        raise ValueError

    async with stored(place=place) as gateway:
        with gateway.gateway.events.listen(fails, "test"), heard(gateway) as events:
            await made(gateway)
            await gone(place)
            assert len(events) == 1
