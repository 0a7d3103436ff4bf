"""The bench itself: two cores, the mock upstream and the load generator on one of them, the gateway on the other."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from attrs import define, frozen

ROOT = Path(__file__).parents[1]
TOOLS = ROOT / ".tools" / "bench"
OPEN_FILES = 65536
PATIENCE_SECONDS = 30


class Fault(Exception):
    """Something that makes a measurement worthless, in words for the person who reads the screen."""


@frozen
class Cores:
    """Where everything runs. Nothing else should."""

    gateway: int
    rig: int

    @contextmanager
    def for_gateway(self) -> Iterator[None]:
        """What is started in here runs on the gateway's core, with all of its threads and children."""
        os.sched_setaffinity(0, {self.gateway})
        try:
            yield
        finally:
            os.sched_setaffinity(0, {self.rig})


def take_cores() -> Cores:
    """Choose the cores and move this process, and so all that it starts, onto the rig's."""
    if sys.platform != "linux":
        raise Fault("the benchmarks read /proc and pin processes to cores: they need Linux")
    allowed = sorted(os.sched_getaffinity(0))
    if len(allowed) < 2:
        raise Fault("the benchmarks need two cores: one for the gateway, one for the load and the mock upstream")
    cores = Cores(gateway=allowed[0], rig=allowed[1])
    os.sched_setaffinity(0, {cores.rig})
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, OPEN_FILES), hard))
    return cores


def compiled(name: str) -> Path:
    """The program made from benchmarks/NAME.c, compiled when its source has changed."""
    source = Path(__file__).with_name(f"{name}.c")
    program = TOOLS / f"{name}-{hashlib.sha256(source.read_bytes()).hexdigest()[:12]}"
    if program.exists():
        return program
    compiler = os.environ.get("CC") or next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        raise Fault(
            "no C compiler: the load generator and the mock upstream are written in C, so that they are never what is "
            "measured. Install one (on Debian: apt-get install gcc libc6-dev), or name one: CC=/path/to/cc make bench"
        )
    TOOLS.mkdir(parents=True, exist_ok=True)
    command = [compiler, "-O2", "-std=gnu11", "-Wall", "-Wextra", "-o", str(program), str(source), "-lm"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise Fault(f"{' '.join(command)}\n{result.stderr}")
    return program


@define(eq=False)
class Mock:
    """The mock upstream, running."""

    process: subprocess.Popen[str]
    port: int

    def set(self, chunks: int = 1, gap_seconds: float = 0, fail_every: int = 0) -> int:
        """Say how the calls to come are answered; return how many there were so far."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{chunks} {round(gap_seconds * 1e6)} {fail_every}\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise Fault("the mock upstream has ended")
        return int(answer)


@contextmanager
def mock_upstream() -> Iterator[Mock]:
    """Run the mock upstream; it ends with its stdin."""
    process = subprocess.Popen([compiled("mock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    with process:
        yield Mock(process, int(process.stdout.readline()))
        process.stdin.close()


@frozen
class Way:
    """How calls reach what is measured."""

    port: int
    path: str = "/v1/chat/completions"
    headers: Sequence[str] = ()

    def arguments(self) -> list[str]:
        """For the load generator."""
        headers = [part for header in self.headers for part in ("--header", header)]
        return ["--port", str(self.port), "--path", self.path, *headers]


@frozen
class Load:
    """What is asked: how many at a time, how long, at which rate, and streams of how many events."""

    connections: int
    seconds: float
    rate: float = 0
    """Calls a second; 0: each connection makes its next call as soon as the last one is answered."""
    chunks: int = 0
    """Events of each stream; 0: whole answers."""
    gap_seconds: float = 0
    fail_every: int = 0
    """The upstream fails one call of so many, and the gateway has to ask again; 0: none."""

    def arguments(self) -> list[str]:
        """For the load generator. Streams begin one after another, or their events would come in herds."""
        options: dict[str, float] = {"connections": self.connections, "seconds": self.seconds, "rate": self.rate}
        options |= {"chunks": self.chunks, "ramp": self.chunks * self.gap_seconds} if self.chunks else {}
        return [part for name, value in options.items() for part in (f"--{name}", str(value))]


def put(load: Load, way: Way, mock: Mock) -> dict[str, Any]:
    """Make the calls; return what the load generator saw. Every call must be answered, and by the upstream."""
    before = mock.set(load.chunks or 1, load.gap_seconds, load.fail_every)
    command = [str(compiled("load")), *way.arguments(), *load.arguments()]
    try:
        run = subprocess.run(
            command, capture_output=True, text=True, timeout=load.seconds + PATIENCE_SECONDS, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise Fault(f"the load generator did not end: {' '.join(command)}") from error
    if run.returncode:
        raise Fault(run.stderr.strip())
    seen: dict[str, Any] = json.loads(run.stdout)
    if seen["errors"]:
        raise Fault(f"{seen['errors']} calls failed; the first: {seen['first_error']}")
    asked = mock.set() - before
    if not seen["unfinished"] and not load.fail_every and asked != seen["calls"]:
        raise Fault(f"{seen['calls']} calls were answered, but the upstream was asked {asked} times")
    return seen


@contextmanager
def open_streams(count: int, seconds: float, way: Way, mock: Mock) -> Iterator[None]:
    """Hold that many streams open, an event a second in each; hang up afterwards."""
    mock.set(1000, 1.0)
    options = ["--connections", str(count), "--seconds", str(seconds), "--chunks", "1000", "--ramp", "1", "--hold"]
    command = [str(compiled("load")), *way.arguments(), *options]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    with process:
        line = process.stdout.readline()
        if line != "open\n":
            raise Fault(f"{count} streams could not be held open: {line.strip()}")
        yield
        process.stdin.close()
        process.stdout.read()
