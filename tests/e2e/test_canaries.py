"""Secrets in every place where a process could let go of them when it fails: none is in what it writes or keeps."""

from __future__ import annotations

import base64
import json
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from e2e.serving import QLENS, clean_env

from qlens.testing.processes import free_port

CANARY = "canary-Zm9vYmFyYmF6cXV4"
"""What may be nowhere; each place has one with another end."""
HOUSE = f'''
import asyncio, logging, sys, threading
from attrs import frozen
from contextlib import asynccontextmanager
from qlens import Secret, hookimpl

CANARY = "{CANARY[:10]}" + "{CANARY[10:]}"

@frozen
class HouseConfig:
    secret: Secret
    fails: str = ""

class House:
    Config = HouseConfig

    def __init__(self, config, name):
        self.config, self.tasks = config, []
        if config.fails == "constructor":
            raise RuntimeError(f"cannot use {{config.secret.reveal()}}")

    @hookimpl
    @asynccontextmanager
    async def lifespan(self, gateway):
        local = f"{{CANARY}}-local"
        if self.config.fails == "lifespan":
            raise ValueError(f"cannot reach https://user:{{self.config.secret.reveal()}}@house")
        yield
        raise ValueError(f"{{local}} at the end")

    def wrong(self, where):
        local = f"{{CANARY}}-local"
        try:
            raise KeyError(f"{{CANARY}}-cause")
        except KeyError as error:
            raise RuntimeError(f"{{CANARY}}-{{where}} {{local}}") from error

    async def later(self):
        self.wrong("task")

    def settle_now(self, call):
        class Ghost:
            def __del__(ghost):
                self.wrong("finaliser")
        Ghost()
        threading.Thread(target=self.wrong, args=("thread",)).start()
        asyncio.get_running_loop().call_soon(self.wrong, "callback")
        asyncio.create_task(self.later(), name="later")
        try:
            self.wrong("log")
        except RuntimeError:
            logging.getLogger("house").exception("it failed")

    async def _raise(self, call):
        where = call.body["user"] if call.body else "nowhere"
        if where == "settle":
            self.settle_now(call)
        self.wrong(where)

    @hookimpl
    async def admit(self, call):
        if call.body.get("user") == "admit":
            await self._raise(call)

    @hookimpl
    async def lookup(self, call):
        if call.body.get("user") == "lookup":
            await self._raise(call)

    @hookimpl
    async def wrap_call(self, call, proceed):
        if call.body.get("user") == "wrap_call":
            await self._raise(call)
        return await proceed()

    @hookimpl
    async def settle(self, call, receipt, hold):
        if call.body.get("user") == "settle":
            await self._raise(call)
'''


def config(folder: Path, *, workers: int = 1, secret: str = f"{CANARY}-config", fails: str = "", **more: Any) -> Path:
    (folder / "house_of_canaries.py").write_text(HOUSE)
    house = {"plugin": "house_of_canaries:House", "secret": secret, "fails": fails, **more}
    told = {
        "server": {"port": free_port(), "admin": {"port": free_port()}, "workers": workers},
        "pipeline": {"auth": [{"plugin": "anonymous"}], "observe": [house], "cost": [{"plugin": "ledger"}]},
        "providers": {"twin": {"plugin": "openai", "base_url": "http://127.0.0.1:9", "api_key": f"{CANARY}-provider"},
                      "echo": {"plugin": "echo"}},
        "models": {"m": {"max_output_tokens": 9, "targets": [{"provider": "echo", "model": "m"}]},
                   "down": {"max_output_tokens": 9, "targets": [{"provider": "twin", "model": "m"}]}},
    }  # fmt: skip
    (folder / "qlens.yaml").write_text(json.dumps(told))
    return folder / "qlens.yaml"


def clean(content: bytes, where: str) -> None:
    """Nothing of a canary is in it, plain or encoded."""
    for canary in (CANARY, CANARY[:12]):
        for encoded in (canary.encode(), base64.b64encode(canary.encode())[:14], canary.encode().hex().encode()):
            begin = content.find(encoded)
            assert begin < 0, f"{where}: {content[max(0, begin - 300) : begin + 60]!r}"


def run(path: Path, *words: str, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[bytes]:
    command = [*QLENS, *words, str(path)]
    return subprocess.run(command, env=clean_env() | dict(env or {}), capture_output=True, timeout=30, check=False)


async def _ready(session: aiohttp.ClientSession, url: str, process: subprocess.Popen[bytes]) -> None:
    ends = time.monotonic() + 60
    while time.monotonic() < ends and process.poll() is None:
        try:
            async with session.get(f"{url}/readyz") as answer:
                if answer.status == 200:
                    return
        except aiohttp.ClientError:
            pass
    raise AssertionError("the gateway did not start")


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGABRT], ids=["stopped", "crashed"])
async def test_whatever_fails_while_it_serves_says_where_and_no_secret(tmp_path: Path, end: signal.Signals) -> None:
    path, output = config(tmp_path), tmp_path / "output.txt"
    server = json.loads(path.read_text())["server"]
    url, admin = f"http://127.0.0.1:{server['port']}", f"http://127.0.0.1:{server['admin']['port']}"
    with output.open("wb") as told:
        # A core would hold the memory, secrets included: whether there are cores is the system's to say.
        process = subprocess.Popen(
            ["/bin/sh", "-c", 'ulimit -c 0; exec "$@"', "sh", *QLENS, "serve", str(path)],
            env=clean_env() | {"PYTHONFAULTHANDLER": "1"}, stdout=told, stderr=subprocess.STDOUT, cwd=tmp_path,
        )  # fmt: skip
        try:
            async with aiohttp.ClientSession() as session:
                await _ready(session, url, process)
                for user in ("admit", "lookup", "wrap_call", "settle"):
                    body = {"model": "m", "user": user, "messages": [{"role": "user", "content": f"{CANARY}-prompt"}]}
                    async with session.post(f"{url}/v1/chat/completions", json=body) as answer:
                        if answer.status != 200:
                            clean(await answer.read(), user)
                async with session.post(f"{url}/v1/chat/completions", json={**body, "model": "down"}) as answer:
                    assert answer.status == 502
                    clean(await answer.read(), "down")
                for page in ("/metrics", "/admin/health"):
                    async with session.get(f"{admin}{page}") as answer:
                        clean(await answer.read(), page)
                ends = time.monotonic() + 60
                while b"(later)" not in output.read_bytes():
                    assert time.monotonic() < ends, output.read_text()
            process.send_signal(end)
            process.wait(30)
        finally:
            process.kill()
            process.wait()
    written = output.read_bytes()
    for place in (b"wrong", b"later", b"callback", b"a thread failed", b"nobody could be told of", b"KeyError"):
        assert place in written, (place, output.read_text())
    if end == signal.SIGABRT:
        assert (process.returncode, b"Fatal Python error: Aborted" in written) == (-signal.SIGABRT, True)
    else:
        assert (process.returncode, b"failed while closing" in written) == (0, True)
    for file in tmp_path.rglob("*"):
        if file.is_file() and file.suffix not in {".py", ".pyc", ".yaml"}:
            clean(file.read_bytes(), file.name)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("fails", ["constructor", "lifespan", "converter", "environment"])
def test_what_cannot_start_says_why_and_no_secret(tmp_path: Path, fails: str, workers: int) -> None:
    if fails == "converter":
        # A secret that is no text, beside a key that is not known.
        path = config(tmp_path, workers=workers)
        told = json.loads(path.read_text())
        told["pipeline"]["observe"][0] |= {"secret": [f"{CANARY}-list"], "secert": f"{CANARY}-misspelled"}
        path.write_text(json.dumps(told))
    elif fails == "environment":
        path = config(tmp_path, workers=workers, secret="${HOUSE_SECRET}", fails="lifespan")
    else:
        path = config(tmp_path, workers=workers, fails=fails)
    done = run(path, "serve", env={"HOUSE_SECRET": f"{CANARY}-env"} if fails == "environment" else None)
    assert done.returncode != 0
    clean(done.stdout + done.stderr, fails)
    said = {"converter": b"secert", "constructor": b"cannot be constructed"}
    assert said.get(fails, b"failed to open: ValueError: cannot reach https://user:***@house") in done.stderr


def test_the_command_that_checks_says_no_secret(tmp_path: Path) -> None:
    done = run(config(tmp_path, fails="constructor"), "check")
    assert (done.returncode, b"cannot be constructed" in done.stderr) == (2, True)
    clean(done.stdout + done.stderr, "check")
