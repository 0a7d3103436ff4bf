"""`qlens webhooks`: trying endpoints, and what becomes of what they did not take."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from receivers import SECRET, Receiver, config, courier_of, endpoint, eventually, receiving, tell
from standardwebhooks import Webhook

from qlens.cli import main
from qlens.testing import running

Run = Callable[..., Any]


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command on qlens.yaml: its exit code and what it said; with --json, what that means."""

    async def work(*words: str) -> tuple[int, Any]:
        capsys.readouterr()
        code = await asyncio.to_thread(main, ["webhooks", *words, "-c", str(tmp_path / "qlens.yaml")])
        out, err = capsys.readouterr()
        return code, json.loads(out) if "--json" in words else out + err

    return work


def write(folder: Path, *endpoints: dict[str, Any], **settings: Any) -> str:
    text = config(*endpoints, url=f"sqlite:///{folder}/hooks.db", **settings)
    (folder / "qlens.yaml").write_text(text)
    return text


async def test_a_test_event_is_sent_once_and_says_how_it_was_taken(tmp_path: Path, run: Run) -> None:
    async with receiving() as receiver:
        write(tmp_path, endpoint(receiver, headers={"x-token": "sk-example"}))
        code, said = await run("test", "billing")
        assert code == 0
        assert "billing: status 204 after " in said
        told = Webhook(SECRET).verify(receiver.got[0].body, dict(receiver.got[0].headers))
        assert (told["type"], told["data"]) == ("qlens.webhook.test", {"endpoint": "billing"})
        receiver.status = 302
        assert (await run("test", "billing"))[0] == 1
        assert len(receiver.got) == 2
        code, said = await run("test", "billling")
        assert (code, "endpoints: billing" in said) == (2, True)
        write(tmp_path, {**endpoint(receiver), "url": f"https://localhost:{receiver.port}/"}, allow=["10.0.0.0/8"])
        code, said = await run("test", "billing")
        assert code == 1
        assert "is not a public address" in said
        assert not (tmp_path / "hooks.db").exists()


async def test_what_was_given_up_is_listed_sent_again_and_dropped_beside_a_gateway_that_runs(
    tmp_path: Path, run: Run
) -> None:
    async with receiving(status=410) as receiver:
        text = write(tmp_path, endpoint(receiver, events="qlens.budget.*"))
        async with running(text) as gateway:
            tell(gateway, 4)
            await eventually(lambda: _dead(tmp_path) == 4)
            code, rows = await run("dead", "billing", "--json")
            assert (code, {row["problem"] for row in rows}) == (0, {"answered with status 410"})
            assert {row["event"] for row in rows} == {each.id for each in receiver.got}
            assert {row["body"]["data"]["n"] for row in rows} == {0, 1, 2, 3}
            assert rows[0]["event"] in (await run("dead"))[1]
            _, endpoints = await run("list", "--json")
            assert [(row["endpoint"], row["waiting"], row["dead"]) for row in endpoints] == [("billing", 0, 4)]
            assert "/hook" not in json.dumps(endpoints)  # a path may be what opens an endpoint

            first, second, *rest = [row["event"] for row in rows]
            assert (await run("drop", "billing", first))[0] == 0
            assert _dead(tmp_path) == 3
            code, said = await run("resend", "billing", first)
            assert (code, f"{first!r} for 'billing' was not given up" in said) == (2, True)

            receiver.status = 204
            receiver.got.clear()
            assert "1 events are tried again" in (await run("resend", "billing", second))[1]
            await receiver.reached(1)
            assert "2 events are tried again" in (await run("resend", "billing"))[1]
            await receiver.reached(3)
            assert {each.id for each in receiver.got} == {second, *rest}
            await eventually(lambda: not courier_of(gateway)._flying)
        assert _dead(tmp_path) == 0
        assert "nothing was given up" in (await run("dead"))[1]


async def test_the_oldest_of_those_given_up_go_when_there_are_too_many(tmp_path: Path) -> None:
    async with receiving(status=410) as receiver:
        async with running(write(tmp_path, endpoint(receiver, events="qlens.budget.*"), dead_size=3)) as gateway:
            for number in range(5):
                tell(gateway)
                await receiver.reached(number + 1)
                await eventually(lambda: not courier_of(gateway)._flying)
            await eventually(lambda: courier_of(gateway).lost == {"billing": 2})
        with contextlib.closing(sqlite3.connect(tmp_path / "hooks.db")) as database:
            kept = {event for (event,) in database.execute("SELECT event FROM webhook_deliveries")}
        assert kept == {each.id for each in receiver.got[2:]}


async def test_what_waits_for_an_endpoint_that_left_the_file_is_shown_and_kept(tmp_path: Path, run: Run) -> None:
    gone, here = Receiver(port=9), Receiver(port=9)
    async with running(write(tmp_path, endpoint(gone, "gone"), endpoint(here, "here"))) as gateway:
        tell(gateway)
        await eventually(lambda: len(courier_of(gateway).problems) == 2)
    write(tmp_path, endpoint(here, "here"))
    _, rows = await run("list", "--json")
    assert [(row["endpoint"], row["waiting"], row["host"]) for row in rows] == [
        ("here", 1, "127.0.0.1:9"),
        ("gone", 1, "not in the configuration"),
    ]
    assert "ENDPOINT" in (await run("list"))[1]


def _dead(folder: Path) -> int:
    with contextlib.closing(sqlite3.connect(folder / "hooks.db")) as database:
        return int(database.execute("SELECT count(*) FROM webhook_deliveries WHERE dead = 1").fetchone()[0])
