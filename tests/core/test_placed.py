"""Plugins that fail where no call waits for them: a fault at their place in the file, and never a traceback."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from yamls import CHAT, HELLO, config

from qlens import StartupError
from qlens.cli import main
from qlens.testing import running

HOUSE = """
import sys

from attrs import define

from qlens import Command, hookimpl


def fail():
    raise TypeError("no such window")


class Base:
    def __init__(self, config, name): ...


class Endpoints(Base):
    @hookimpl
    def endpoints(self):
        return [fail()]


class NoEndpoints(Base):
    @hookimpl
    def endpoints(self):
        return ["/home"]


class Exits(Base):
    @hookimpl
    def endpoints(self):
        sys.exit("a library gives up")


class Banner(Base):
    @hookimpl
    def banner(self):
        return [fail()]


class Explain(Base):
    @hookimpl
    def explain(self, call):
        yield "this"
        fail()


class Commands(Base):
    @hookimpl
    def commands(self):
        fail()


class NoCommands(Base):
    @hookimpl
    def commands(self):
        return ["build"]


class Arguments(Base):
    @hookimpl
    def commands(self):
        return [Command("build", "Build.", lambda parser: fail(), None)]


class Run(Base):
    @hookimpl
    def commands(self):
        return [Command("build", "Build.", lambda parser: None, self.build)]

    async def build(self, gateway, args):
        fail()


class Serve(Base):
    @hookimpl
    def commands(self):
        return [Command("serve", "Serve.", lambda parser: None, None)]


class Code(Run):
    async def build(self, gateway, args):
        sys.exit(7)
"""
FILE = """
pipeline:
  auth: [{plugin: anonymous}]
  rate_limit:
    - {plugin: "house:CLASS"}
providers: {echo: {plugin: echo}}
models: {m: {max_output_tokens: 10, targets: [{provider: echo, model: m}]}}
"""
SAID = "TypeError: no such window (house.py, line 10)"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "house.py").write_text(HOUSE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("house", None)


@pytest.mark.parametrize(
    ("kind", "command", "says"),
    [
        ("Endpoints", "check", f"failed in endpoints: {SAID}"),
        ("Endpoints", "routes", f"failed in endpoints: {SAID}"),
        ("NoEndpoints", "check", "failed in endpoints: AttributeError: 'str' object has no attribute 'method'"),
        ("Exits", "check", "failed in endpoints: SystemExit: a library gives up (house.py, line 32)"),
        ("Explain", "explain", f"failed in explain: {SAID}"),
        ("Commands", "build", f"failed in commands: {SAID}"),
        ("Commands", "check", f"failed in commands: {SAID}"),
        ("NoCommands", "build", "failed in commands: AttributeError: 'str' object has no attribute 'name'"),
        ("Arguments", "build", f"failed in the arguments of the command build: {SAID}"),
        ("Run", "build", f"failed in the command build: {SAID}"),
    ],
)
def test_a_plugin_that_fails_at_the_command_line_is_a_fault_at_its_place(
    folder: Path, capsys: pytest.CaptureFixture[str], kind: str, command: str, says: str
) -> None:
    file, body = folder / "qlens.yaml", folder / "body.json"
    file.write_text(FILE.replace("CLASS", kind))
    body.write_text('{"model": "m", "messages": [{"role": "user", "content": "hi"}]}')
    words = ["build", "-c", str(file)] if command == "build" else [command, str(file)]
    assert main([*words, str(body)] if command == "explain" else words) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"qlens: {file}:5 pipeline.rate_limit[0]: house:{kind} {says}")
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize("words", [["check"], ["build", "-c"]])
def test_a_command_with_a_name_of_the_core_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    file = folder / "qlens.yaml"
    file.write_text(FILE.replace("CLASS", "Serve"))
    assert main([*words, str(file)]) == 2
    said = "house:Serve: the command 'serve' is qlens' own: give it another name"
    assert capsys.readouterr().err == f"qlens: {file}:5 pipeline.rate_limit[0]: {said}\n"


def test_a_command_may_end_with_a_code_of_its_own(folder: Path) -> None:
    (folder / "qlens.yaml").write_text(FILE.replace("CLASS", "Code"))
    assert main(["build", "-c", str(folder / "qlens.yaml")]) == 7


def test_a_banner_that_fails_ends_the_start(folder: Path) -> None:
    file = folder / "qlens.yaml"
    file.write_text("server: {port: 0, admin: {port: 0}}\n" + FILE.replace("CLASS", "Banner").lstrip())
    words = [sys.executable, "-m", "qlens", "serve", str(file)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=50)
    assert done.returncode == 2
    assert f"qlens: {file}:5 pipeline.rate_limit[0]: house:Banner failed in banner: {SAID}" in done.stderr
    assert "Traceback" not in done.stderr


async def test_endpoints_that_fail_refuse_a_reload_and_it_is_told(folder: Path) -> None:
    stages = {"observe": [{"plugin": "plugs:Hearer", "name": "ear"}]}
    async with running(config(stages)) as gateway:
        ear = gateway.plugin("observe", "ear")
        with pytest.raises(StartupError, match=r"house:Endpoints failed in endpoints: TypeError: no such window"):
            await gateway.reload(config({**stages, "guard": [{"plugin": "house:Endpoints"}]}))
        (event,) = [event for event in ear.heard if event.type == "qlens.config.rejected"]
        assert len(event.data["faults"]) == 1
        assert "pipeline.guard[0]" in event.data["faults"][0]
        assert (await gateway.post(CHAT, HELLO)).status == 200
