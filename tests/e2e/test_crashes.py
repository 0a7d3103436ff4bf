"""A plugin that fails however it likes: what is said of it is quick, says where, and has no password in it."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
from e2e.serving import run_qlens

from qlens.testing.processes import free_port

PASSWORD = "hunter2-%40example"
MEANT = "hunter2-@example"
PLUGIN = """
import asyncio, logging, threading
from contextlib import asynccontextmanager
from attrs import frozen
from qlens import Command, StartupError, Url, hookimpl

class Rude(BaseException):
    pass

@frozen
class HouseConfig:
    url: Url
    how: str = ""

class House:
    Config = HouseConfig

    def __init__(self, config, name):
        self.config = config
        self.fail("constructor")

    def fail(self, where):
        from urllib.parse import unquote, urlsplit
        said = unquote(urlsplit(self.config.url).password)
        if self.config.how == where:
            raise RuntimeError(f"{where}: {self.config.url} as {said}")
        if self.config.how == f"{where} told":
            raise StartupError(f"{where}: {self.config.url} as {said}")
        if self.config.how == f"{where} rude":
            raise Rude(f"{where}: {self.config.url} as {said}")

    @hookimpl
    @asynccontextmanager
    async def lifespan(self, gateway):
        self.fail("lifespan")
        yield

    @hookimpl
    def commands(self):
        yield Command("house", "fails", lambda parser: None, self.run)

    async def later(self):
        self.fail("task")

    async def run(self, gateway, args):
        try:
            self.fail("log")
        except RuntimeError:
            logging.getLogger("house").exception("it failed")
        asyncio.create_task(self.later(), name="later")
        thread = threading.Thread(target=self.fail, args=("thread",))
        thread.start()
        thread.join()
        await asyncio.sleep(0.05)
        import gc
        gc.collect()
        self.fail("command")
        return 0
"""


def config(folder: Path, how: str, url: str = f"postgresql://joe:{PASSWORD}@house/x") -> Path:
    (folder / "house_of_crashes.py").write_text(PLUGIN)
    told: dict[str, Any] = {
        "server": {"port": free_port(), "admin": {"port": free_port()}},
        "pipeline": {
            "auth": [{"plugin": "anonymous"}],
            "observe": [{"plugin": "house_of_crashes:House", "how": how, "url": url}],
        },
        "providers": {"echo": {"plugin": "echo"}},
        "models": {"m": {"targets": [{"provider": "echo", "model": "m"}]}},
    }
    (folder / "qlens.yaml").write_text(json.dumps(told))
    return folder / "qlens.yaml"


def clean(text: str) -> str:
    """Nothing of a password is in it, as it is written or as it is meant."""
    assert "hunter2" not in text, text
    return text


@pytest.mark.parametrize("how", ["constructor", "lifespan", "lifespan told", "lifespan rude"])
def test_what_cannot_start_says_why_at_once_and_no_password_of_a_url(tmp_path: Path, how: str) -> None:
    path, began = config(tmp_path, how), time.monotonic()
    done = run_qlens("serve", str(path), cwd=tmp_path)
    assert time.monotonic() - began < 25  # it waits 30 s for a plugin that says nothing
    assert done.returncode == 2
    said = clean(done.stdout + done.stderr)
    assert ("it raised Rude" if how == "lifespan rude" else "postgresql://joe:***@house/x as ***") in said


@pytest.mark.parametrize("how", ["lifespan", "lifespan told", "lifespan rude", "log", "task", "thread", "command"])
def test_a_command_that_fails_says_where_and_no_password(tmp_path: Path, how: str) -> None:
    path = config(tmp_path, how)
    done = run_qlens("house", "-c", str(path), cwd=tmp_path)
    said = clean(done.stdout + done.stderr)
    if how.startswith("lifespan"):
        assert (done.returncode, "lifespan" in said or "it raised Rude" in said) == (2, True)
    else:
        assert done.returncode == (2 if how == "command" else 0)
        place = re.search(r'house_of_crashes\.py"?, line', said)
        assert ("RuntimeError" in said, place is not None) == (True, True), said


@pytest.mark.parametrize(
    "url",
    [f"postgresql:/joe:{PASSWORD}@house", f"postgresql://joe:a {PASSWORD}@house", f"joe:{PASSWORD}@house: 1"],
)
def test_what_is_no_url_is_shown_without_what_may_be_a_password(tmp_path: Path, url: str) -> None:
    done = run_qlens("check", str(config(tmp_path, "", url)), cwd=tmp_path)
    assert done.returncode == 2
    said = clean(done.stdout + done.stderr)
    assert "expected a URL such as https://example.com" in said
    assert "house" in said
