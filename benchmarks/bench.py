"""Measures what a gateway costs, several gateways side by side: `make bench`."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from attrs import asdict, define, evolve, field, frozen

from benchmarks import instructions, profiling, providers, report, scaling, soak, stages
from benchmarks.gateways import CONTENDERS, DEFAULT, PEERS, Contender, Gateway, config_of, running
from benchmarks.install import default_install
from benchmarks.processes import MIB, busy_seconds, cpu_seconds_of
from benchmarks.rig import Cores, Fault, Load, Mock, Way, mock_upstream, open_streams, put, take_cores

Values = dict[str, float]
RATES = (300, 1000, 3000)
CONNECTIONS = (4, 16, 64)
OPEN_STREAMS = 500
STREAM_CHUNKS = 100
GAP_SECONDS = 0.005
# A rate that the closed loop did not reach by far is not tried: it would only fill a queue.
HEADROOM = 1.1


@frozen
class Plan:
    """How long each part of a round takes, in seconds."""

    rounds: int = 5
    warm_up: float = 1.0
    closed: float = 1.5
    fixed_rate: float = 2.0
    few_streams: float = 1.0
    streams: float = 1.5
    burst: float = 1.0


QUICK = Plan(rounds=1, warm_up=0.5, closed=0.7, fixed_rate=0.7, few_streams=0.6, streams=0.7, burst=0.5)


@define(eq=False)
class Round:
    """One round on one gateway: each part adds its values, by name."""

    plan: Plan
    mock: Mock
    cores: Cores
    gateway: Gateway
    values: Values = field(factory=dict)
    faults: list[str] = field(factory=list)

    def run(self) -> None:
        """All parts, from the smallest heap to the largest; a part that fails leaves its values out."""
        parts: list[Callable[[], None]] = [self.memory, self.warm_up]
        parts += [partial(self.closed, count) for count in CONNECTIONS]
        parts += [partial(self.fixed_rate, rate) for rate in RATES]
        parts += [self.few_streams, self.streams, self.burst, self.memory_at_the_end]
        self.values["start_ms"] = self.gateway.start_seconds * 1000
        for part in parts:
            try:
                part()
            except Fault as fault:
                self.faults.append(str(fault))
                self.gateway.count_anew()

    def memory(self) -> None:
        """At rest, and with streams open, before any load has made the heap grow."""
        time.sleep(0.3)
        at_rest = self.gateway.tree.memory()
        self.values |= {"rss_idle_mb": at_rest.rss / MIB, "pss_idle_mb": at_rest.pss / MIB}
        self.put(Load(1, self.plan.warm_up / 4))
        self.put(Load(1, self.plan.warm_up / 4, chunks=10))
        before = self.gateway.tree.memory()
        with open_streams(OPEN_STREAMS, 10, self.gateway.way, self.mock):
            self.gateway.answered += OPEN_STREAMS
            time.sleep(0.3)
            self.values["rss_stream_kib"] = (self.gateway.tree.memory().rss - before.rss) / 1024 / OPEN_STREAMS
        self.gateway.settle()

    def warm_up(self) -> None:
        """Not measured."""
        self.put(Load(16, self.plan.warm_up))

    def closed(self, connections: int) -> None:
        """As fast as it goes."""
        seen, cpu = self.measured(Load(connections, self.plan.closed))
        self.values |= {
            f"cpu_us_{connections}": cpu / seen["calls"] * 1e6,
            f"calls_per_second_{connections}": seen["calls"] / seen["seconds"],
            f"busy_{connections}": cpu / seen["seconds"],
            f"rig_busy_{connections}": seen["rig_share"],
        }

    def fixed_rate(self, rate: int) -> None:
        """What a call waits longer than it must, and what it costs where other gateways are given as many."""
        if self.values.get("calls_per_second_64", 0) < rate * HEADROOM:
            return
        seen, cpu = self.measured(Load(64, self.plan.fixed_rate, rate=rate))
        if not seen["unfinished"]:
            self.values |= {
                f"p50_us_{rate}": seen["latency_us"]["p50"],
                f"p99_us_{rate}": seen["latency_us"]["p99"],
                f"cpu_us_rate_{rate}": cpu / seen["calls"] * 1e6,
            }

    def few_streams(self) -> None:
        """How long the first token takes."""
        seen, _ = self.measured(Load(4, self.plan.few_streams, chunks=10, gap_seconds=GAP_SECONDS))
        self.values["ttft_us"] = seen["first_us"]["p50"]

    def streams(self) -> None:
        """Many streams at the pace of a model."""
        seen, cpu = self.measured(Load(128, self.plan.streams, chunks=STREAM_CHUNKS, gap_seconds=GAP_SECONDS))
        self.values["cpu_us_chunk"] = cpu / seen["chunks"] * 1e6
        self.values["chunk_delay_us"] = seen["delay_us"]["p50"]

    def burst(self) -> None:
        """Streams whose events all come at once."""
        seen, cpu = self.measured(Load(16, self.plan.burst, chunks=STREAM_CHUNKS))
        self.values["cpu_us_chunk_burst"] = cpu / seen["chunks"] * 1e6

    def memory_at_the_end(self) -> None:
        """After everything."""
        self.values["rss_after_mb"] = self.gateway.tree.memory().rss / MIB

    def put(self, load: Load) -> dict[str, Any]:
        """Put a load and wait until its receipts are on disk."""
        seen = put(load, self.gateway.way, self.mock)
        self.gateway.answered += seen["calls"]
        if seen["unfinished"]:
            self.gateway.count_anew()
        self.gateway.settle()
        return seen

    def measured(self, load: Load) -> tuple[dict[str, Any], float]:
        """The same, with the CPU time that the gateway took; what others took is kept as a sign of noise."""
        self.gateway.settle()
        before, began = self.spent(), time.perf_counter()
        seen = self.put(load)
        gateway, rig, gateway_core, rig_core = (now - then for now, then in zip(self.spent(), before, strict=True))
        took = time.perf_counter() - began
        rig += seen["cpu_seconds"]
        seen["rig_share"] = rig / took
        others = max(gateway_core - gateway, rig_core - rig, 0.0) / took
        self.values["others_share"] = max(others, self.values.get("others_share", 0.0))
        return seen, gateway

    def spent(self) -> tuple[float, float, float, float]:
        """Seconds so far: of the gateway, of the rig without the load generator, and of all programs on either core."""
        rig = cpu_seconds_of(self.mock.process.pid) + time.process_time()
        cores = busy_seconds(self.cores.gateway), busy_seconds(self.cores.rig)
        return self.gateway.tree.cpu_seconds(), rig, *cores


def direct(plan: Plan, mock: Mock) -> Values:
    """The same load without a gateway: the ceiling of the rig, and what its latencies start from."""
    way = Way(mock.port)
    put(Load(16, plan.warm_up / 2), way, mock)
    seen = put(Load(64, plan.closed), way, mock)
    values = {"calls_per_second_64": seen["calls"] / seen["seconds"]}
    for rate in RATES:
        seen = put(Load(64, plan.fixed_rate, rate=rate), way, mock)
        values |= {f"p50_us_{rate}": seen["latency_us"]["p50"], f"p99_us_{rate}": seen["latency_us"]["p99"]}
    few = put(Load(4, plan.few_streams, chunks=10, gap_seconds=GAP_SECONDS), way, mock)
    many = put(Load(128, plan.streams, chunks=STREAM_CHUNKS, gap_seconds=GAP_SECONDS), way, mock)
    burst = put(Load(16, plan.burst, chunks=STREAM_CHUNKS), way, mock)
    return values | {
        "ttft_us": few["first_us"]["p50"],
        "chunk_delay_us": many["delay_us"]["p50"],
        "chunks_per_second_burst": burst["chunks"] / burst["seconds"],
    }


def added(values: Values, without: Values) -> Values:
    """What a gateway adds to the latencies of the rig, in the same round."""
    names = [name for name in values if name.startswith(("p50_", "p99_", "ttft_", "chunk_delay_"))]
    return {f"added_{name}": values[name] - without[name] for name in names if name in without}


def measure(contenders: Sequence[Contender], plan: Plan, cores: Cores) -> dict[str, Any]:
    """All rounds; in each of them every gateway has its turn, and each time another one begins."""
    rounds: list[dict[str, Values]] = []
    faults: dict[str, list[str]] = {}
    with mock_upstream() as mock:
        for number in range(plan.rounds):
            say(f"round {number + 1} of {plan.rounds}: direct")
            row = {"direct": direct(plan, mock)}
            start = number % len(contenders)
            for contender in [*contenders[start:], *contenders[:start]]:
                say(f"round {number + 1} of {plan.rounds}: {contender.title}")
                try:
                    with running(contender, mock.port, cores) as gateway:
                        part = Round(plan, mock, cores, gateway)
                        part.run()
                except Fault as fault:
                    faults.setdefault(contender.name, []).append(str(fault))
                    continue
                row[contender.name] = part.values | added(part.values, row["direct"])
                faults.setdefault(contender.name, []).extend(part.faults)
            rounds.append(row)
    return {"rounds": rounds, "faults": {name: list(dict.fromkeys(texts)) for name, texts in faults.items() if texts}}


def installed(names: Sequence[str]) -> list[Contender]:
    """Those that can be measured; the others are named, with the way to get them."""
    found = []
    for contender in map(CONTENDERS.__getitem__, names):
        try:
            if contender.version() is None:
                say(f"installing {contender.title}" if not contender.missing else f"looking for {contender.title}")
                contender.install()
        except Fault as fault:
            say(f"without {contender.title}: {fault}")
            continue
        if contender.version() is None:
            say(f"without {contender.title}: it is not installed; to measure it too: {contender.missing}")
            continue
        found.append(contender)
    return found


def say(text: str) -> None:
    """Tell how far it is."""
    print(f"bench: {text}", file=sys.stderr, flush=True)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one short round, in about a minute: a look, no result")
    parser.add_argument("--rounds", type=int, help=f"rounds (default: {Plan().rounds}, quick: {QUICK.rounds})")
    parser.add_argument("--gateways", default=",".join(DEFAULT), help="which ones (default: %(default)s)")
    parser.add_argument("--peers", default="", help=f"more of them, installed first: {','.join(PEERS)}")
    parser.add_argument("--stages", action="store_true", help="what each stage of config/qlens.yaml costs, and no more")
    parser.add_argument("--goals", action="store_true", help="with --stages: only those with a goal of their own")
    parser.add_argument("--instructions", action="store_true", help="the same in Python instructions, and no more")
    parser.add_argument(
        "--chunks", type=int, default=0, help="with --stages or --instructions: streams of that many events"
    )
    parser.add_argument("--workers", action="store_true", help="two workers against one, and no more")
    parser.add_argument("--providers", action="store_true", help="what bedrock costs beside openai, and no more")
    parser.add_argument("--profile", action="store_true", help="where a call's CPU time goes (needs perf), and no more")
    parser.add_argument("--soak", action="store_true", help="whether memory grows over many calls, and no more")
    parser.add_argument("--calls", type=int, default=soak.CALLS, help="with --soak (default: %(default)s)")
    parser.add_argument(
        "--results",
        type=Path,
        help="the folder to write to (default: benchmarks/results; a --quick run is written only where told)",
    )
    args = parser.parse_args()
    args.names = [name for name in (*args.gateways.split(","), *args.peers.split(",")) if name]
    if unknown := [name for name in args.names if name not in CONTENDERS]:
        parser.error(f"no gateway called {', '.join(unknown)}; there are: {', '.join(CONTENDERS)}")
    return args


def main() -> None:
    """Measure, print, and write benchmarks/results/DATE.json, .md and .svg."""
    args = arguments()
    # So that every gateway is stopped, whoever ends the run.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("bench: told to stop"))
    try:
        if args.instructions:
            print(instructions.measure(args.chunks))
            return
        cores = take_cores()
        if args.providers:
            print(providers.measure(args.rounds or providers.ROUNDS))
            return
        if args.stages:
            rounds = args.rounds or (3 if args.quick else stages.ROUNDS)
            print(stages.measure(cores, rounds, args.chunks, goals=args.goals))
            return
        if args.workers:
            print(scaling.measure(cores, args.rounds or scaling.ROUNDS, say))
            return
        if args.profile:
            print(profiling.measure(cores))
            return
        if args.soak:
            print(soak.measure(cores, args.calls, say))
            return
        contenders = installed(args.names)
        plan = QUICK if args.quick else Plan()
        plan = evolve(plan, rounds=args.rounds or plan.rounds)
        began = time.monotonic()
        result = report.circumstances(cores) | {
            "plan": asdict(plan),
            "gateways": {one.name: {"title": one.title, "version": one.version()} for one in contenders},
            "configurations": {one.name: config_of(one) for one in contenders},
        }
        result |= measure(contenders, plan, cores)
        result["install"] = None if args.quick else default_install()
        result["minutes"] = round((time.monotonic() - began) / 60, 1)
    except Fault as fault:
        sys.exit(f"bench: {fault}")
    result = report.summarised(result)
    print(report.markdown(result))
    if args.results or not args.quick:
        say(f"written: {report.write(result, args.results or report.RESULTS)}")


if __name__ == "__main__":
    main()
