"""Does memory grow? A million calls with failures, rejections, hang-ups and reloads mixed in."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import linear_regression

from attrs import define, evolve, field

from benchmarks.gateways import BUDGETS, CONTENDERS, Gateway, qlens_full, running
from benchmarks.processes import MIB
from benchmarks.rig import Cores, Fault, Load, Mock, Way, compiled, mock_upstream, open_streams, put

CALLS = 1_000_000
WARM_UP_SHARE = 0.2
TURN_SECONDS = 3.0
HANG_UPS = 200
REJECTIONS = 300
# A prime number, so that no rhythm of the load meets the rhythm of the failures.
FAIL_EVERY = 997
GOAL_MIB = 5.0
LONGEST_SECONDS = 3600


@define(eq=False)
class Soak:
    """What has happened so far."""

    gateway: Gateway
    mock: Mock
    calls: int = 0
    streams: int = 0
    hung_up: int = 0
    rejected: int = 0
    reloads: int = 0
    samples: list[tuple[int, float]] = field(factory=list)
    """After each turn: calls, and MiB resident."""

    def turn(self) -> None:
        """A few seconds of everything."""
        self._calls(Load(64, TURN_SECONDS, fail_every=FAIL_EVERY))
        self.streams += self._calls(Load(16, TURN_SECONDS / 6, chunks=20, fail_every=FAIL_EVERY))
        with open_streams(HANG_UPS, 10, self.gateway.way, self.mock):
            self.gateway.answered += HANG_UPS
            self.hung_up += HANG_UPS
        self.rejected += self._rejected(evolve(self.gateway.way, headers=["authorization: Bearer sk-example-unknown"]))
        self._reload()
        self.gateway.settle()
        self.samples.append((self.calls, self.gateway.tree.memory().rss / MIB))

    def _calls(self, load: Load) -> int:
        count = int(put(load, self.gateway.way, self.mock)["calls"])
        self.gateway.answered += count
        self.calls += count
        return count

    def _rejected(self, way: Way) -> int:
        """Calls with a key that nobody has: each is an error, as it should be."""
        options = ["--connections", "8", "--calls", str(REJECTIONS), "--seconds", "5"]
        command = [str(compiled("load")), *way.arguments(), *options]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        if '"calls": 0,' not in output or "status 401" not in output:
            raise Fault(f"calls with an unknown key were not refused: {output}")
        return REJECTIONS

    def _reload(self) -> None:
        """Change the file and have it read while the next calls come."""
        path, text = self.gateway.folder / "qlens.yaml", ("attempts: 3", "attempts: 4")
        here, there = text if self.reloads % 2 == 0 else text[::-1]
        config = path.read_text()
        if here not in config:
            raise Fault(f"the configuration has no {here!r} to change")
        path.write_text(config.replace(here, there))
        self.gateway.tree.leader.send_signal(signal.SIGHUP)
        self.reloads += 1


def growth(samples: Sequence[tuple[int, float]], warm_up: float) -> float:
    """MiB that memory grows in a million calls, by the line through all samples after the warm-up."""
    late = [(calls / 1e6, mib) for calls, mib in samples if calls >= warm_up]
    if len(late) < 3:
        raise Fault("too few calls to see a slope; ask for more of them")
    return linear_regression([calls for calls, _ in late], [mib for _, mib in late]).slope


def measure(cores: Cores, calls: int, say: Callable[[str], None]) -> str:
    """Make the calls, on every stage and a budget; return what is to be said about them."""
    contender = evolve(CONTENDERS["qlens"], start=partial(qlens_full, cost=[BUDGETS]))
    with mock_upstream() as mock, running(contender, mock.port, cores) as gateway:
        soak = Soak(gateway, mock)
        ends = time.monotonic() + LONGEST_SECONDS
        while soak.calls < calls and time.monotonic() < ends:
            soak.turn()
            say(f"{soak.calls:,} of {calls:,} calls, {soak.samples[-1][1]:.1f} MiB")
        slope = growth(soak.samples, calls * WARM_UP_SHARE)
        lowest, highest = (choose(mib for _, mib in soak.samples) for choose in (min, max))
    return (
        f"{soak.calls:,} calls ({soak.streams:,} of them streams; one in {FAIL_EVERY} failed upstream at first), "
        f"{soak.hung_up:,} streams hung up, {soak.rejected:,} calls rejected, {soak.reloads} reloads.\n"
        f"RSS {lowest:.1f} to {highest:.1f} MiB; after the first {WARM_UP_SHARE:.0%} it grows by {slope:.2f} MiB "
        f"in a million calls (goal: at most {GOAL_MIB:g}): {'met' if slope <= GOAL_MIB else 'missed'}."
    )
