"""Old and new gateways on one database: what a newer version has added disturbs no older one that it is for."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from keystores import ADMIN, CALL, config, key_file, made, send, status
from receivers import Receiver, endpoint, eventually, receiving

from qlens import StartupError, open_sqlite
from qlens.cli import main
from qlens.testing import Running, running
from qlens_plugins.auth.key_store import schema as key_store
from qlens_plugins.cost.budgets import sqlite as budgets
from qlens_plugins.cost.ledger.sqlite import schema as ledger
from qlens_plugins.observe.webhooks import statements as webhooks

OWNERS: Sequence[ModuleType] = (key_store, budgets, ledger, webhooks)


def settings(folder: Path, receiver: Receiver) -> str:
    """Each owner of tables has a file of its own, named after it."""
    urls = {owner.OWNER: f"sqlite:///{folder}/{owner.OWNER}.db" for owner in OWNERS}
    content = yaml.safe_load(config(f"poll_seconds: 0.05, url: '{urls['key_store']}'"))
    limits, store = [{"per": "tenant", "usd": 100, "window": "month"}], {"kind": "sqlite", "url": urls["budgets"]}
    content["pipeline"]["cost"] = [
        {"plugin": "prices", "catalogue": False, "table": [{"model": "*", "input": 1, "output": 1}]},
        {"plugin": "budgets", "limits": limits, "store": store},
        {"plugin": "ledger", "url": urls["ledger"], "flush_seconds": 0.01},
    ]
    hooks = {"plugin": "webhooks", "url": urls["webhooks"], "endpoints": [endpoint(receiver)], "allow": ["127.0.0.0/8"]}
    content["pipeline"]["observe"] = [hooks]
    return yaml.safe_dump(content)


def upgrade(folder: Path, owner: ModuleType, oldest: int) -> None:
    """Upgrade a file as a next version would: a column more in each table, and a table more."""
    path = folder / f"{owner.OWNER}.db"
    with closing(sqlite3.connect(path)) as database:
        found = database.execute("SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%'")
        tables = sorted({name for (name,) in found} - {"versions"})
    columns = [f"ALTER TABLE {table} ADD COLUMN later TEXT NOT NULL DEFAULT 'x'" for table in tables]
    migrations = (*owner.MIGRATIONS, (*columns, "CREATE TABLE later (x)"))
    open_sqlite(path, owner.OWNER, migrations, oldest=oldest).close()


async def use(gateway: Running, receiver: Receiver) -> None:
    """What writes to all the tables: a key, a call with it, more of its budget, the key's end."""
    key = await made(gateway, roles=["member"])
    answer = await gateway.post("/v1/chat/completions", CALL, key=key["key"])
    assert answer.status == 200
    (budget,) = (await gateway.get("/v1/budgets", key=key["key"])).json()["data"]
    assert budget["spent_usd"] != "0"
    more = {"usd": "1", "expires_at": 4_000_000_000, "reason": "more"}
    assert (await send(gateway, "POST", f"/admin/budgets/{budget['id']}/increase", more)).status == 200
    assert (await send(gateway, "DELETE", f"/admin/keys/{key['id']}")).status == 200
    async with asyncio.timeout(10):
        while await status(gateway, key["key"]) != 401:
            await asyncio.sleep(0.02)
    await eventually(lambda: answer.headers["x-request-id"] in {each.id for each in receiver.got}, 10)


async def calls(gateway: Running) -> int:
    """How many calls the ledger has added up."""
    return int((await gateway.get("/v1/usage/summary", key=ADMIN)).json()["total"]["calls"])


async def test_a_gateway_goes_on_with_tables_that_a_newer_one_has_upgraded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with receiving() as receiver:
        text, files = settings(tmp_path, receiver), {"keys.yaml": key_file()}
        async with running(text, files=files) as gateway:
            await use(gateway, receiver)
            for owner in OWNERS:
                upgrade(tmp_path, owner, owner.OLDEST)
            await use(gateway, receiver)
        # One that starts only now does as well.
        async with running(text, files=files) as gateway:
            await use(gateway, receiver)
            async with asyncio.timeout(10):
                while await calls(gateway) != 3:
                    await asyncio.sleep(0.02)
    for name, content in {"qlens.yaml": text, **files}.items():
        (tmp_path / name).write_text(content)
    assert await asyncio.to_thread(main, ["ledger", "verify", "-c", str(tmp_path / "qlens.yaml")]) == 0
    assert "3 receipts" in capsys.readouterr().out


@pytest.mark.parametrize("owner", OWNERS, ids=lambda owner: str(owner.OWNER))
async def test_a_gateway_does_not_start_on_tables_that_are_not_for_it(owner: ModuleType, tmp_path: Path) -> None:
    async with receiving() as receiver:
        text, files = settings(tmp_path, receiver), {"keys.yaml": key_file()}
        async with running(text, files=files):
            pass
        upgrade(tmp_path, owner, len(owner.MIGRATIONS) + 1)
        with pytest.raises(
            StartupError, match=r"are not for a QLens that knows .* upgrade QLens, or name another file"
        ):
            async with running(text, files=files):
                pass
