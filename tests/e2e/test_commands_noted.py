"""What is done at the command line is in the audit log, or on standard error; what cannot be noted is not done."""

from __future__ import annotations

import json
import sqlite3
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import yaml
from e2e.serving import run_qlens
from receivers import SECRET

from qlens.testing.redis import RedisServer, redis_server

KEYS = {"plugin": "key_store", "url": "sqlite:///keys.db"}
FILE = {"plugin": "api_keys", "file": "keys.yaml"}
MODELS = {"m": {"max_output_tokens": 10, "targets": [{"provider": "echo", "model": "m"}]}}


class House:
    """A folder with a configuration, on which commands are run as an operator runs them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.said = ""

    def write(self, **stages: list[dict[str, Any]]) -> None:
        content = {"pipeline": stages, "providers": {"echo": {"plugin": "echo"}}, "models": MODELS}
        (self.folder / "qlens.yaml").write_text(yaml.safe_dump(content))

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        found = run_qlens(*words, "-c", str(self.folder / "qlens.yaml"))
        assert "Traceback" not in found.stderr, found.stderr
        return found

    def does(self, *words: str) -> str:
        """Run a command that succeeds; what it says."""
        found = self.run(*words)
        assert found.returncode == 0, found.stderr
        self.said = found.stderr
        return found.stdout

    def noted(self) -> list[dict[str, Any]]:
        """The audit log, the oldest first."""
        entries: list[dict[str, Any]] = json.loads(self.does("audit", "--json"))
        assert {entry["actor"]["by"] for entry in entries} <= {"command line"}
        return entries[::-1]


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path)


@pytest.fixture
async def server() -> AsyncIterator[RedisServer]:
    async with redis_server() as server:
        yield server


def said(entries: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
    return [(entry["action"], entry["object"], entry["outcome"]) for entry in entries]


def lines(text: str) -> list[dict[str, Any]]:
    """The entries that are lines of standard error."""
    found = (line.partition("qlens.audit ")[2] for line in text.splitlines())
    return [json.loads(line) for line in found if line]


def test_keys_of_a_file_are_noted_where_there_is_a_log_and_else_on_standard_error(house: House) -> None:
    house.write(auth=[FILE])
    plain = house.does("keys", "create", "--tenant", "acme", "--id", "one").strip()
    (entry,) = lines(house.said)
    assert (entry["action"], entry["object"], entry["tenant"]) == ("keys.create", "one", "acme")
    assert "hash" not in entry["after"]
    assert plain not in house.said
    house.write(auth=[FILE, KEYS])
    assert house.run("keys", "create", "--plugin", "api_keys", "--tenant", "a", "--id", "one").returncode == 2
    house.does("keys", "revoke", "--plugin", "api_keys", "one")
    assert lines(house.said) == []
    house.does("keys", "revoke", "--plugin", "api_keys", "one")  # which changes nothing
    (revoked,) = house.noted()
    assert said([revoked]) == [("keys.revoke", "one", "done")]
    assert (revoked["before"]["state"], revoked["after"]["state"]) == ("active", "revoked")


def test_what_cannot_be_noted_is_not_done(house: House) -> None:
    house.write(auth=[FILE, KEYS | {"url": "sqlite:///nowhere/keys.db"}])
    found = house.run("keys", "create", "--plugin", "api_keys", "--tenant", "acme")
    assert (found.returncode, found.stdout) == (2, "")
    assert "the folder" in found.stderr
    assert not (house.folder / "keys.yaml").exists()
    house.write(auth=[FILE, KEYS | {"pepper": "${QLENS_TEST_NO_SUCH}"}])
    found = house.run("keys", "create", "--plugin", "api_keys", "--tenant", "acme")
    assert found.returncode == 2
    assert "has the audit log, and names environment variables that are not set" in found.stderr
    assert not (house.folder / "keys.yaml").exists()
    assert "no keys" in house.run("keys", "list", "--plugin", "api_keys").stderr  # what only reads needs no log


def test_the_ledger_is_noted_when_its_tables_are_made_and_before_it_is_filled(house: House) -> None:
    ledger = {"plugin": "ledger", "url": "sqlite:///ledger.db"}
    house.write(auth=[KEYS], cost=[ledger])
    house.does("ledger", "migrate")
    (made,) = house.noted()
    assert said([made]) == [("ledger.migrate", "ledger.db", "done")]
    assert made["before"] == {"version": 0}
    assert made["after"]["version"] > 0
    house.does("ledger", "migrate")
    house.does("ledger", "verify")
    house.does("ledger", "backup", str(house.folder / "all.jsonl"))
    assert house.noted() == [made]

    house.write(auth=[KEYS], cost=[ledger | {"url": "sqlite:///other.db"}])
    assert house.run("ledger", "restore", str(house.folder / "nothing.jsonl")).returncode == 1
    house.does("ledger", "restore", str(house.folder / "all.jsonl"))
    assert said(house.noted())[1:] == [("ledger.migrate", "other.db", "done"), ("ledger.restore", "other.db", "done")]
    assert house.noted()[-1]["after"] == {"file": str(house.folder / "all.jsonl")}

    house.write(auth=[FILE], cost=[ledger | {"url": "sqlite:///third.db"}])
    house.does("ledger", "restore", str(house.folder / "all.jsonl"))
    assert [entry["action"] for entry in lines(house.said)] == ["ledger.migrate", "ledger.restore"]


def test_what_is_resent_and_dropped_of_webhooks_is_noted(house: House) -> None:
    endpoint = {"name": "billing", "url": "https://hooks.example.com/", "secrets": [SECRET], "events": ["*"]}
    house.write(auth=[KEYS], observe=[{"plugin": "webhooks", "url": "sqlite:///hooks.db", "endpoints": [endpoint]}])
    house.does("webhooks", "drop", "billing")  # where there is nothing to drop
    give_up(house.folder / "hooks.db", "e1", "e2")
    house.does("webhooks", "drop", "billing", "e1")
    house.does("webhooks", "resend", "billing")
    assert said(house.noted()) == [("webhooks.drop", "billing", "done"), ("webhooks.resend", "billing", "done")]
    assert [entry["before"] for entry in house.noted()] == [{"events": ["e1"]}, {"events": ["e2"]}]


def give_up(path: Path, *events: str) -> None:
    """Leave events that were given up."""
    with closing(sqlite3.connect(path)) as database, database:
        for event in events:
            database.execute(
                "INSERT INTO webhook_deliveries (endpoint, event, type, body, since, due, dead) "
                "VALUES ('billing', ?, 'qlens.test', '{}', 1, 1, 1)",
                (event,),
            )


async def test_a_beginning_of_budgets_is_noted_when_it_is_one(house: House, server: RedisServer) -> None:
    budgets = {
        "plugin": "budgets",
        "limits": [{"per": "tenant", "usd": 1, "window": "month"}],
        "store": {"kind": "redis", "url": server.url},
    }
    prices = {"plugin": "prices", "table": [{"model": "*", "input": 1, "output": 1}]}
    house.write(auth=[KEYS | {"url": "sqlite:///nowhere/keys.db"}], cost=[prices, budgets])
    assert house.run("budgets", "--begin").returncode == 2  # it cannot be noted: Redis admits nothing still
    house.write(auth=[KEYS], cost=[prices, budgets])
    house.does("budgets", "--begin")
    assert "knows what was spent" in house.run("budgets", "--begin").stderr
    (entry,) = house.noted()
    assert said([entry]) == [("budgets.begin", "budgets", "done")]
    assert entry["after"] == {"file": None, "budgets": 0, "spent_usd": "0"}

    row = {
        "id": "b-1", "budget": "tenant month", "per": "tenant", "owner": "acme", "tenant": "acme", "window": "month",
        "starts_at": "2026-01-01T00:00:00Z", "limit_usd": "1", "spent_usd": "0.25", "reserved_usd": "0.5",
    }  # fmt: skip
    (house.folder / "last.json").write_text(json.dumps({"budgets": [row]}))
    await server.command("FLUSHALL")
    house.does("budgets", "--begin", str(house.folder / "last.json"))
    after = house.noted()[-1]["after"]
    assert after == {"file": str(house.folder / "last.json"), "budgets": 1, "spent_usd": "0.75"}


WRONG: list[tuple[str, Callable[[Path], object], str]] = [
    ("missing", lambda path: None, "cannot be read: No such file or directory"),
    ("folder", lambda path: path.mkdir(), "cannot be read: Is a directory"),
    ("empty", lambda path: path.touch(), "is no list of budgets"),
    ("binary", lambda path: path.write_bytes(b"\xff\xfe\x00"), "is no list of budgets"),
    ("other", lambda path: path.write_text("{}"), "is no list of budgets (nothing is called 'budgets')"),
    ("list", lambda path: path.write_text("[1]"), "is no list of budgets"),
    ("deep", lambda path: path.write_text("[" * 200_000), "is no list of budgets"),
    ("amount", lambda path: path.write_text('{"budgets": [{"id": 1}]}'), "is no list of budgets"),
]


@pytest.mark.parametrize(("make", "message"), [each[1:] for each in WRONG], ids=[each[0] for each in WRONG])
def test_a_file_that_is_no_list_of_budgets_is_one_line_with_the_way_out(
    house: House, make: Callable[[Path], object], message: str
) -> None:
    store = {"kind": "redis", "url": "redis://127.0.0.1:1"}
    limits = [{"per": "tenant", "usd": 1, "window": "month"}]
    house.write(auth=[FILE], cost=[{"plugin": "budgets", "limits": limits, "store": store}])
    make(house.folder / "last.json")
    found = house.run("budgets", "--begin", str(house.folder / "last.json"))
    (line,) = found.stderr.splitlines()
    assert (found.returncode, found.stdout) == (2, "")
    assert line.startswith(f"qlens: {house.folder / 'last.json'} {message}")
    assert line.endswith("name a file that `qlens budgets --json` has printed")
