"""Webhooks of a gateway that is killed: what it had taken is delivered by the next one."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import aiohttp
from e2e.serving import serving
from ledgers import SqlitePlace
from receivers import SECRET, receiving
from standardwebhooks import Webhook

HELLO = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "hello"}]}


async def test_every_receipt_of_a_killed_gateway_is_delivered_by_the_next_under_its_id(tmp_path: Path) -> None:
    async with receiving(hangs=True) as receiver:
        endpoint = {"name": "a", "url": receiver.url, "secrets": [SECRET], "events": ["qlens.receipt"]}
        plugin = {"plugin": "webhooks", "endpoints": [endpoint], "allow": ["127.0.0.0/8"], "timeout_seconds": 0.5}
        changes = {"pipeline": {"observe": [plugin]}}
        with serving(tmp_path, changes=changes) as served:
            async with aiohttp.ClientSession(headers={"authorization": f"Bearer {served.key}"}) as client:

                async def call(number: int) -> str:
                    body = {**HELLO, "user": f"user-{number}"}
                    async with client.post(f"{served.url}/v1/chat/completions", json=body) as answer:
                        assert answer.status == 200
                        return str(answer.headers["x-request-id"])

                calls = {await call(number) for number in range(5)}
                await receiver.reached(3)  # some are on their way, some wait in the file, some in the spool
                calls |= set(await asyncio.gather(*map(call, range(5, 40))))
                # A call settles a moment after its answer.
                while not all(each.encode() in _kept(tmp_path) for each in calls):
                    await asyncio.sleep(0)
            served.told_to_stop, served.leaves_with = True, -signal.SIGKILL
            served.process.kill()
        receiver.hangs = False
        receiver.got.clear()
        with serving(tmp_path, changes=changes):
            async with asyncio.timeout(30):
                while {each.id for each in receiver.got} != calls:
                    await asyncio.sleep(0.05)
        for each in receiver.got:
            assert Webhook(SECRET).verify(each.body, dict(each.headers))["id"] == each.id


async def test_calls_in_flight_of_a_killed_gateway_are_told_by_the_next_as_its_ledger_has_them(tmp_path: Path) -> None:
    hangs = {"provider": "echo", "model": "gpt-4o-mini", "params": {"first_byte_ms": 60_000}}
    async with receiving() as receiver:
        endpoint = {"name": "a", "url": receiver.url, "secrets": [SECRET], "events": ["qlens.receipt"]}
        plugin = {"plugin": "webhooks", "endpoints": [endpoint], "allow": ["127.0.0.0/8"]}
        ledger = {"plugin": "ledger", "url": "sqlite:///ledger.db", "flush_seconds": 0.01}
        models = {"hangs": {"max_output_tokens": 100, "targets": [hangs]}}
        changes = {"pipeline": {"observe": [plugin], "cost": [ledger]}, "models": models}
        with serving(tmp_path, changes=changes) as served:
            headers = {"authorization": f"Bearer {served.key}"}
            async with aiohttp.ClientSession(headers=headers, connector=aiohttp.TCPConnector(limit=0)) as client:
                url = f"{served.url}/v1/chat/completions"
                calls = [asyncio.create_task(client.post(url, json={**HELLO, "model": "hangs"})) for _ in range(30)]
                for _ in range(5):
                    async with client.post(url, json=HELLO) as answer:
                        assert answer.status == 200
                await receiver.reached(5)
                while b"".join(each.read_bytes() for each in _spooled(tmp_path)).count(b'"hangs"') < len(calls):
                    await asyncio.sleep(0.02)
                served.told_to_stop, served.leaves_with = True, -signal.SIGKILL
                served.process.kill()
                await asyncio.wait(calls)
        with serving(tmp_path, changes=changes):
            async with asyncio.timeout(30):
                while len({each.id for each in receiver.got}) < 35:
                    await asyncio.sleep(0.05)
        told = {(each.id, each.json()["data"]["outcome"], each.json()["data"]["error"]) for each in receiver.got}
        rows = SqlitePlace(tmp_path / "ledger.db").rows("SELECT id, outcome, error FROM receipts")
        assert told == {(row["id"], row["outcome"], row["error"]) for row in rows}
        assert len(told) == len(rows) == 35
        assert not _spooled(tmp_path)


def _spooled(folder: Path) -> list[Path]:
    return list(folder.glob("ledger.db.spool/*/*.log"))


def _kept(folder: Path) -> bytes:
    """All that is on disk of what is to be delivered."""
    files = [*folder.glob("webhooks.db*"), *folder.glob("webhooks.db.spool/*/*.log")]
    return b"".join(path.read_bytes() for path in files if path.is_file())
