"""Where a call's CPU time goes: in Python, in its C libraries, in the kernel; and what it costs a bare proxy in all."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

from attrs import frozen

from benchmarks.gateways import CONTENDERS, Gateway, running
from benchmarks.rig import Cores, Fault, Load, Mock, mock_upstream, put

CONNECTIONS = 64
WARM_UP_SECONDS, SECONDS = 2.0, 8.0
SAMPLES_PER_SECOND = 1999
MOST_SHOWN = 30
NAMES = ("qlens", "bare", "envoy")
METHOD = """\
perf samples the gateway's process 2,000 times a second by the CPU clock while 64 connections call it, and says for each
sample in which library and function it was. CPU per call is the system's own account, taken without perf. Python is
libpython, the interpreter and its objects; libraries are what Python calls in C and Rust (parsers, JSON, TLS, SQLite,
memory); the kernel is system calls and sockets."""

_LINE = re.compile(r"\s*(?P<share>\d+\.\d+)%\s+(?P<library>\S+)\s+\[[.k]\]\s+(?P<function>\S.*?)\s*(-\s+-\s*)?$")


@frozen
class Profile:
    """What one gateway's call costs, and where."""

    cpu_us: float
    functions: Mapping[tuple[str, str], float]
    """The share of each function, by library and name."""

    def where(self) -> dict[str, float]:
        """Microseconds of a call: in Python, in libraries, in the kernel, and in the program itself."""
        total = sum(self.functions.values())
        found: dict[str, float] = {}
        for (library, _), share in self.functions.items():
            kind = _kind(library)
            found[kind] = found.get(kind, 0.0) + share / total * self.cpu_us
        return found


def _kind(library: str) -> str:
    if library.startswith("["):
        return "kernel"
    if library.startswith(("libpython", "python")):
        return "Python"
    return "program" if library == "envoy" else "libraries"


def measure(cores: Cores) -> str:
    """Profile QLens with every stage and with none, and Envoy for comparison; raises Fault without perf."""
    if shutil.which("perf") is None:
        raise Fault("perf is not installed: apt-get install linux-perf")
    profiles: dict[str, Profile] = {}
    with mock_upstream() as mock:
        for name in NAMES:
            contender = CONTENDERS[name]
            if contender.version() is None:
                contender.install()
            with running(contender, mock.port, cores) as gateway:
                profiles[name] = _profiled(gateway, mock)
    return _told(profiles)


def _profiled(gateway: Gateway, mock: Mock) -> Profile:
    put(Load(CONNECTIONS, WARM_UP_SECONDS), gateway.way, mock)
    before = gateway.tree.cpu_seconds()
    calls = put(Load(CONNECTIONS, SECONDS), gateway.way, mock)["calls"]
    cpu_us = (gateway.tree.cpu_seconds() - before) / calls * 1e6
    with tempfile.TemporaryDirectory(prefix="qlens-profile-") as folder:
        data = str(Path(folder) / "perf.data")
        pids = ",".join(map(str, gateway.tree.pids()))
        record = ["perf", "record", "--quiet", "-e", "cpu-clock", "-F", str(SAMPLES_PER_SECOND), "-p", pids]
        recording = subprocess.Popen([*record, "-o", data, "--", "sleep", str(SECONDS)], stderr=subprocess.PIPE)
        put(Load(CONNECTIONS, SECONDS), gateway.way, mock)
        _, problem = recording.communicate(timeout=60)
        report = ["perf", "report", "--stdio", "--quiet", "-i", data, "--sort", "dso,symbol"]
        told = subprocess.run(report, capture_output=True, text=True, timeout=60, check=False).stdout
    lines = [found for line in told.splitlines() if (found := _LINE.match(line))]
    if not lines:
        raise Fault(f"perf could not look into the gateway: {problem.decode(errors='replace').strip()[-300:]}")
    functions = {(line["library"], line["function"]): float(line["share"]) for line in lines}
    return Profile(cpu_us, functions)


def _told(profiles: Mapping[str, Profile]) -> str:
    kinds = ("Python", "libraries", "program", "kernel")
    places = {name: profile.where() for name, profile in profiles.items()}
    lines = [METHOD, "", f"| us of a call | in all | {' | '.join(kinds)} |", "|---|---|---|---|---|---|"]
    for name, profile in profiles.items():
        parts = " | ".join(f"{places[name].get(kind, 0):.1f}" for kind in kinds)
        lines.append(f"| {CONTENDERS[name].title} | {profile.cpu_us:.1f} | {parts} |")
    envoy = profiles["envoy"].cpu_us
    for name in ("qlens", "bare"):
        least = places[name].get("kernel", 0) + places[name].get("libraries", 0)
        lines += [
            "",
            f"{CONTENDERS[name].title}: kernel and libraries alone are {least / envoy:.2f} of all that a call costs "
            f"Envoy. To cost no more than Envoy, Python would have {max(0.0, envoy - least):.1f} us for a call; "
            f"it takes {places[name]['Python']:.1f}.",
        ]
    lines += [
        "",
        f"{CONTENDERS['qlens'].title}, by function:",
        "",
        "| library | function | us of a call |",
        "|---|---|---|",
    ]
    every = profiles["qlens"]
    total = sum(every.functions.values())
    for (library, function), share in sorted(every.functions.items(), key=lambda each: -each[1])[:MOST_SHOWN]:
        lines.append(f"| {library} | {function} | {share / total * every.cpu_us:.1f} |")
    return "\n".join(lines)
