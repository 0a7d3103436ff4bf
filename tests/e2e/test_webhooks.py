"""Webhooks of a gateway that is killed: what it had taken is delivered by the next one."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import aiohttp
from e2e.serving import serving
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


def _kept(folder: Path) -> bytes:
    """All that is on disk of what is to be delivered."""
    files = [*folder.glob("webhooks.db*"), *folder.glob("webhooks.db.spool/*/*.log")]
    return b"".join(path.read_bytes() for path in files if path.is_file())
