"""What the operating system knows of a gateway: the CPU time and memory of all its processes."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

from attrs import define, frozen

TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
MIB = 1024 * 1024
STOP_SECONDS = 15


@frozen
class Memory:
    """In bytes, over all processes."""

    rss: int
    pss: int
    """Shared pages count in parts: a fork does not look like a second program."""


@define(eq=False)
class Tree:
    """A process started in a session of its own, and every process that came of it."""

    leader: subprocess.Popen[bytes]

    def pids(self) -> list[int]:
        """All that are alive. They are found by their session: a daemon that left its parent still counts."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and _session(int(entry.name)) == self.leader.pid:
                found.append(int(entry.name))
        return found

    def cpu_seconds(self) -> float:
        """User and system time so far: all processes, all threads, and children that have ended."""
        return sum(map(cpu_seconds_of, self.pids()))

    def memory(self) -> Memory:
        """What they hold now."""
        totals = [_memory(pid) for pid in self.pids()]
        return Memory(sum(one.rss for one in totals), sum(one.pss for one in totals))

    def stop(self) -> None:
        """End them all; SIGTERM first."""
        self.leader.terminate()
        try:
            self.leader.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.leader.kill()
            self.leader.wait()
        for pid in self.pids():
            os.kill(pid, signal.SIGKILL)


def _stat(pid: int) -> list[str]:
    # The name stands in parentheses and may hold anything.
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _session(pid: int) -> int | None:
    try:
        return int(_stat(pid)[3])
    except OSError:
        return None


def cpu_seconds_of(pid: int) -> float:
    """User and system time of one process so far, with its threads and the children it has seen end."""
    try:
        fields = _stat(pid)
        ended_children = (int(fields[13]) + int(fields[14])) / TICKS_PER_SECOND
        # The process's CPU clock: the same time as fields 11 and 12, in nanoseconds instead of ticks of 10 ms.
        return time.clock_gettime((~pid << 3) | 2) + ended_children
    except OSError:
        return 0.0


def _memory(pid: int) -> Memory:
    sizes = {"Rss": 0, "Pss": 0}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name in sizes:
            sizes[name] = int(rest.split()[0]) * 1024
    return Memory(sizes["Rss"], sizes["Pss"])


def busy_seconds(core: int) -> float:
    """How long a core has run any program so far, interrupts left out."""
    for line in Path("/proc/stat").read_text().splitlines():
        name, *ticks = line.split()
        if name == f"cpu{core}":
            user, nice, system = map(int, ticks[:3])
            stolen = int(ticks[7])
            return (user + nice + system + stolen) / TICKS_PER_SECOND
    return 0.0
