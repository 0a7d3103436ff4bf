"""What is changed of keys reaches JetStream, through gateways of their own processes that are killed at the worst."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import urllib.request
from collections.abc import Iterator
from http.client import RemoteDisconnected
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from e2e.serving import Served, serving
from ledgers import Place, PostgresPlace, SqlitePlace

from qlens.testing.nats import NatsServer, nats_server
from qlens.testing.postgres import postgres_server

if TYPE_CHECKING:
    from _pytest.fixtures import SubRequest

HEARER = '''
"""Notes what a gateway publishes; where a file says so, it ends the process after that."""
import os
import signal
from contextlib import asynccontextmanager
from pathlib import Path

from qlens import hookimpl

FOLDER = Path(__file__).parent


class Hearer:
    def __init__(self, config, name):
        self.name = name

    @hookimpl
    @asynccontextmanager
    async def lifespan(self, gateway):
        with gateway.events.listen(self.take, self.name):
            yield

    def take(self, event):
        if event.type.startswith("qlens.key."):
            with (FOLDER / "heard.txt").open("a") as file:
                file.write(f"{event.id} {event.type}\\n")
            if (FOLDER / "dies").exists():
                os.kill(os.getpid(), signal.SIGKILL)
'''


@pytest.fixture(params=["sqlite", "postgres"])
def place(request: SubRequest, tmp_path: Path) -> Iterator[Place]:
    if request.param == "sqlite":
        yield SqlitePlace(tmp_path / "qlens.db")
        return
    with postgres_server() as server:
        yield PostgresPlace(server, server.new_database())


def house(folder: Path) -> Path:
    """A folder for a gateway, with the plugin that hears."""
    folder.mkdir()
    (folder / "hearer.py").write_text(HEARER)
    return folder


def settings(place: Place, nats: NatsServer, workers: int = 1, *, hearer_first: bool = False) -> dict[str, Any]:
    demo = {"plugin": "api_keys", "file": "keys.yaml", "demo_key_file": "demo.key"}
    outbox = {"plugin": "nats", "servers": [nats.url], "stream": {"create": True}, "spool": "outbox"}
    observe = [outbox, {"plugin": "hearer:Hearer"}]
    return {
        "server": {"workers": workers},
        "pipeline": {
            "auth": [demo, {"plugin": "key_store", "url": place.url}],
            "observe": observe[::-1] if hearer_first else observe,
            **{stage: [] for stage in ("rate_limit", "cache", "cost")},
        },
    }


def keys(served: Served, *words: str) -> str:
    """Run `qlens keys`; the id of the key, as it says."""
    found = served.qlens("keys", "--plugin", "key_store", *words)
    assert found.returncode == 0, found.stderr
    return next(word for word in found.stderr.split() if word.startswith("key-"))


def asked(served: Served, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """Ask the admin API; its answer."""
    request = urllib.request.Request(
        f"{served.admin_url}{path}",
        None if body is None else json.dumps(body).encode(),
        {"Authorization": f"Bearer {served.key}", "Content-Type": "application/json"},
        method=method,
    )
    with urllib.request.urlopen(request, timeout=20) as response:
        found: dict[str, Any] = json.load(response)
        return found


def heard(*folders: Path) -> list[str]:
    """What gateways published, by id and type."""
    files = [folder / "heard.txt" for folder in folders]
    return [line for file in files if file.exists() for line in file.read_text().splitlines()]


async def gone(place: Place) -> None:
    async with asyncio.timeout(20):
        while place.rows("SELECT n FROM untold_events"):
            await asyncio.sleep(0.05)


async def test_what_a_command_changes_is_one_event_of_two_gateways(place: Place, tmp_path: Path) -> None:
    one, two = house(tmp_path / "one"), house(tmp_path / "two")
    async with nats_server() as nats:
        with (
            serving(one, changes=settings(place, nats, 2)) as first,
            serving(two, changes=settings(place, nats)) as second,
        ):
            made = [await asyncio.to_thread(keys, first, "create", "--tenant", "acme") for _ in range(3)]
            await asyncio.to_thread(keys, second, "revoke", made[0])
            await gone(place)
            await nats.reached(4)
        entries = place.rows("SELECT id FROM audit")
        told = heard(one, two)
        assert sorted(line.split()[0] for line in told) == sorted(row["id"] for row in entries)
        messages = await nats.messages()
        assert sorted(message.headers["Nats-Msg-Id"] for message in messages) == sorted(row["id"] for row in entries)
        subjects = sorted(message.subject for message in messages)
        assert subjects == [*["qlens.key.created.acme"] * 3, "qlens.key.revoked.acme"]
        data = [json.loads(message.data) for message in messages]
        assert {each["subject"] for each in data} == set(made)
        assert {each["data"]["request_id"] for each in data} == {None}


async def test_a_gateway_killed_before_it_lets_go_of_an_event_is_followed_by_one_that_tells_it_under_its_id(
    place: Place, tmp_path: Path
) -> None:
    folder = house(tmp_path / "one")
    async with nats_server() as nats:
        nats.kill()  # so that the outbox keeps what the killed gateway has published
        with serving(folder, changes=settings(place, nats)) as served:
            (folder / "dies").touch()
            served.told_to_stop, served.leaves_with = True, -signal.SIGKILL
            await asyncio.to_thread(keys, served, "create", "--tenant", "acme")
            await asyncio.to_thread(served.process.wait, 20)
        (told,) = heard(folder)
        assert len(place.rows("SELECT n FROM untold_events")) == 1
        (folder / "dies").unlink()
        await nats.start()
        with serving(folder, changes=settings(place, nats)):
            await gone(place)
            await nats.reached(1)
        assert heard(folder) == [told, told]
        (message,) = await nats.messages()
        assert [message.headers["Nats-Msg-Id"], "qlens.key.created"] == told.split()


async def test_what_operators_change_at_several_gateways_is_told_once_by_the_one_they_asked(
    place: Place, tmp_path: Path
) -> None:
    one, two = house(tmp_path / "one"), house(tmp_path / "two")

    def changes(served: Served) -> list[str]:
        ids = [asked(served, "POST", "/admin/keys", {"tenant": "acme"})["id"] for _ in range(5)]
        for id_ in ids:
            asked(served, "PATCH", f"/admin/keys/{id_}", {"name": "other"})
            asked(served, "POST", f"/admin/keys/{id_}/rotate", {})
            asked(served, "DELETE", f"/admin/keys/{id_}")
        return ids

    async with nats_server() as nats:
        with (
            serving(one, changes=settings(place, nats, 2)) as first,
            serving(two, changes=settings(place, nats)) as second,
        ):
            ids = await asyncio.gather(asyncio.to_thread(changes, first), asyncio.to_thread(changes, second))
            told = heard(one), heard(two)  # by now, and not with a later look
            await gone(place)
            await nats.reached(40)
        entries = {row["id"]: row["object"] for row in place.rows("SELECT id, object FROM audit")}
        assert (heard(one), heard(two)) == told
        for mine, lines in zip(ids, told, strict=True):
            assert sorted(entries[line.split()[0]] for line in lines) == sorted(mine * 4)
        assert len({line.split()[0] for line in (*told[0], *told[1])}) == len(entries) == 40


@pytest.mark.parametrize("teller", ["another", "the next to start"])
async def test_what_a_gateway_was_killed_over_that_had_just_changed_it_is_told_under_its_id(
    place: Place, tmp_path: Path, teller: str
) -> None:
    one, two = house(tmp_path / "one"), house(tmp_path / "two")
    async with nats_server() as nats:
        changes = settings(place, nats, hearer_first=True)  # it dies before the outbox has heard of it
        with contextlib.ExitStack() as stack:
            if teller == "another":
                stack.enter_context(serving(two, changes=changes))
            with serving(one, changes=changes) as served:
                (one / "dies").touch()
                served.told_to_stop, served.leaves_with = True, -signal.SIGKILL
                with pytest.raises((RemoteDisconnected, ConnectionError)):
                    await asyncio.to_thread(asked, served, "POST", "/admin/keys", {"tenant": "acme"})
                await asyncio.to_thread(served.process.wait, 20)
            (entry,) = place.rows("SELECT id FROM audit")  # it is in force
            if teller != "another":
                stack.enter_context(serving(two, changes=changes))
            await nats.reached(1)
            await gone(place)
            (message,) = await nats.messages()
        assert message.headers["Nats-Msg-Id"] == entry["id"]
        assert heard(two) == heard(one) == [f"{entry['id']} qlens.key.created"]
