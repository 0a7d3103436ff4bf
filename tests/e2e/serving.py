"""Runs `qlens serve` as an operator does: a process of its own, a folder of its own, free ports."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from attrs import define

from qlens.testing.processes import free_port

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "config" / "qlens.yaml"
QLENS = [sys.executable, "-m", "qlens"]
READY_SECONDS = 60
STOP_SECONDS = 60
WAIT_SECONDS = 60
"""How long is waited for what takes a moment: others work on the machine, and a disk may be busy for seconds."""


@define(eq=False)
class Served:
    """A gateway that runs on a copy of config/qlens.yaml, or on another file."""

    process: subprocess.Popen[bytes]
    folder: Path
    url: str
    admin_url: str
    key: str = ""
    told_to_stop: bool = False
    leaves_with: int = 0
    """The exit code that is right."""

    @property
    def config(self) -> Path:
        """The YAML file it was started with."""
        return self.folder / "qlens.yaml"

    @property
    def env(self) -> dict[str, str]:
        """What a client needs that reads its base URL and key from the environment."""
        return clean_env() | {"OPENAI_BASE_URL": f"{self.url}/v1", "OPENAI_API_KEY": self.key}

    @property
    def output(self) -> str:
        """What it wrote so far, to both of its outputs."""
        return (self.folder / "output.txt").read_text()

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self.told_to_stop |= number in {signal.SIGTERM, signal.SIGINT}
        self.process.send_signal(number)

    def get(self, path: str, url: str = "") -> tuple[int, str]:
        """Get a path of the client listener, or of another one, without a key."""
        try:
            with urllib.request.urlopen(f"{url or self.url}{path}", timeout=5) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def qlens(self, *arguments: str, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """Run a `qlens` command against its configuration."""
        return run_qlens(*arguments, env={"QLENS_CONFIG": str(self.config)} | dict(env or {}))


def clean_env() -> dict[str, str]:
    """The environment without what would point a client or the gateway elsewhere, or have it compile itself anew."""
    unwanted = ("AWS_", "OPENAI_", "QLENS_", "PYTHONDONTWRITEBYTECODE")
    return {name: value for name, value in os.environ.items() if not name.startswith(unwanted)}


def run_qlens(
    *arguments: str, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run the command to its end."""
    return subprocess.run(
        [*QLENS, *arguments],
        env=clean_env() | dict(env or {}),
        cwd=cwd or ROOT,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def changed(changes: Mapping[str, Any]) -> str:
    """config/qlens.yaml with some values changed; a mapping changes what is in the mapping it meets."""

    def merge(old: Any, new: Any) -> Any:
        if not (isinstance(old, dict) and isinstance(new, Mapping)):
            return new
        return old | {name: merge(old.get(name), value) for name, value in new.items()}

    # JSON is YAML too, and has no text that must be quoted to stay one.
    return json.dumps(merge(yaml.load(CONFIG.read_text(), _Yaml12), changes), indent=2)


class _Yaml12(yaml.SafeLoader):
    """PyYAML's loader, to whom `on` is a word and not a boolean."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - so does PyYAML
        first: [pair for pair in pairs if first not in "yYnNoO"]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


@contextmanager
def serving(
    folder: Path, *, changes: Mapping[str, Any] | None = None, env: Mapping[str, str] | None = None
) -> Iterator[Served]:
    """Run `qlens serve` on config/qlens.yaml, as it is or with changes."""
    config = folder / "qlens.yaml"
    config.write_text(CONFIG.read_text() if changes is None else changed(changes))
    with started([*QLENS, "serve", str(config)], folder, env or {}) as served:
        yield served


@contextmanager
def started(command: list[str], folder: Path, env: Mapping[str, str]) -> Iterator[Served]:
    """Start a gateway and stop it as an operator would; it must leave with 0 and without a traceback."""
    port, admin_port = free_port(), free_port()
    with (folder / "output.txt").open("wb") as output:
        process = subprocess.Popen(
            command,
            env=clean_env() | {"QLENS_PORT": str(port), "QLENS_ADMIN_PORT": str(admin_port)} | dict(env),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    served = Served(process, folder, f"http://127.0.0.1:{port}", f"http://127.0.0.1:{admin_port}")
    try:
        _wait_until_ready(served)
        if (demo := folder / "demo.key").exists():
            served.key = demo.read_text().strip()
        yield served
        if not served.told_to_stop:
            process.terminate()
        assert process.wait(STOP_SECONDS) == served.leaves_with, served.output
        assert "Traceback" not in served.output, served.output
    except BaseException:
        print(served.output)  # whoever reads of a failure wants to know what the gateway said
        raise
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Stop a process that a failed test left running; SIGTERM first, so that it can stop what it started."""
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _wait_until_ready(served: Served) -> None:
    ends = time.monotonic() + READY_SECONDS
    while time.monotonic() < ends:
        if served.process.poll() is not None:
            raise AssertionError(f"the gateway ended with {served.process.returncode}:\n{served.output}")
        try:
            # Of several workers the one that was asked is ready, or all of them.
            if served.get("/readyz")[0] == 200 and served.get("/readyz", served.admin_url)[0] == 200:
                return
        except OSError:
            pass
        time.sleep(0.05)
    raise AssertionError(f"the gateway was not ready after {READY_SECONDS} s:\n{served.output}")


def until(holds: Callable[[], bool], what: str) -> None:
    """Wait for something to become true."""
    ends = time.monotonic() + WAIT_SECONDS
    while not holds():
        assert time.monotonic() < ends, f"{what} did not happen within {WAIT_SECONDS} s"
        time.sleep(0.05)


def receipts(served: Served, *arguments: str, env: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
    """The rows that `qlens usage` prints."""
    result = served.qlens("usage", "--json", *arguments, env=env)
    assert result.returncode == 0, result.stderr
    rows: list[dict[str, Any]] = json.loads(result.stdout)["rows"]
    return rows
