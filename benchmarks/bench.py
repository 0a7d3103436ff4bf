"""Measures what a call costs the gateway: CPU time of its process, with every stage of config/qlens.yaml on.

Three processes on one machine, loopback only: a load generator (this one), the gateway, and a scripted model server.
The wall-clock numbers depend on how the three share the cores; the CPU time of the gateway's process does so much less.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import aiohttp
from attrs import frozen
from e2e.serving import ROOT, serving

TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
MAX_CALLS = 100_000
WARM_UP = 200
NO_LIMIT = {"per": "tenant", "requests_per_minute": 1_000_000_000, "tokens_per_minute": 1_000_000_000_000}


# --- the gateway and the load -------------------------------------------------------------------


@frozen
class Load:
    """What is asked: whom, how often, how many at a time."""

    url: str
    key: str
    calls: int
    concurrency: int
    stream: bool


@contextmanager
def model_server() -> Iterator[str]:
    """Run the model server; it ends with its stdin."""
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("model_server.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    with process:
        yield f"http://127.0.0.1:{process.stdout.readline().strip()}/v1"
        process.stdin.close()


def changes(model_url: str) -> dict[str, Any]:
    """What is different from config/qlens.yaml: the provider behind one model, and limits that nobody reaches."""
    return {
        "providers": {"bench": {"plugin": "openai", "base_url": model_url, "api_key": "sk-example-bench"}},
        "models": {"gpt-4o-mini": {"targets": [{"provider": "bench", "model": "gpt-4o-mini"}]}},
        "pipeline": {"rate_limit": [{"plugin": "token_bucket", "store": {"kind": "memory"}, "limits": [NO_LIMIT]}]},
    }


async def put_load(load: Load) -> tuple[float, list[float]]:
    """Make the calls, each with a prompt of its own so that no cache answers; return wall seconds and latencies."""
    latencies: list[float] = []
    numbers = iter(range(load.calls))
    headers = {"authorization": f"Bearer {load.key}"}
    salt = time.time_ns()

    async def client(session: aiohttp.ClientSession) -> None:
        for number in numbers:
            prompt = {"role": "user", "content": f"Say something about {salt}-{number}. " + "Be brief. " * 20}
            body = {"model": "gpt-4o-mini", "stream": load.stream, "messages": [prompt]}
            started = time.perf_counter()
            async with session.post(f"{load.url}/chat/completions", json=body, headers=headers) as response:
                answer = await response.read()
            if response.status != 200 or (load.stream and not answer.endswith(b"[DONE]\n\n")):
                raise SystemExit(f"call {number} failed with {response.status}: {answer[:300]!r}")
            latencies.append(time.perf_counter() - started)

    connector = aiohttp.TCPConnector(limit=load.concurrency)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(60)) as session:
        started = time.perf_counter()
        await asyncio.gather(*(client(session) for _ in range(load.concurrency)))
        return time.perf_counter() - started, latencies


def cpu_seconds(pid: int) -> float:
    """User and system time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_SECOND


def peak_mib(pid: int) -> float:
    """The most memory a process ever had resident."""
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM"))
    return round(int(line.split()[1]) / 1024, 1)


def milliseconds(latencies: list[float], percent: float) -> float:
    """A percentile of the latencies."""
    ordered = sorted(latencies)
    return round(ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))] * 1000, 2)


def measure(load: Load, pid: int | None) -> dict[str, Any]:
    """Put the load; say what it cost the process, if one is watched."""
    before = cpu_seconds(pid) if pid else 0.0
    wall, latencies = asyncio.run(put_load(load))
    result: dict[str, Any] = {
        "stream": load.stream,
        "calls_per_second": round(load.calls / wall),
        "p50_ms": milliseconds(latencies, 50),
        "p99_ms": milliseconds(latencies, 99),
    }
    if pid:
        result["gateway_cpu_us_per_call"] = round((cpu_seconds(pid) - before) / load.calls * 1e6)
        result["gateway_peak_mib"] = peak_mib(pid)
    return result


def run(calls: int, concurrency: int) -> dict[str, Any]:
    """Measure bodies and streams, without the gateway and through it."""
    results: dict[str, Any] = {"direct": [], "gateway": []}
    with (
        tempfile.TemporaryDirectory() as folder,
        model_server() as model_url,
        serving(Path(folder), changes=changes(model_url)) as gateway,
    ):
        for stream in (False, True):
            warm_up = Load(f"{gateway.url}/v1", gateway.key, WARM_UP, concurrency, stream)
            measure(warm_up, None)
            results["direct"].append(measure(Load(model_url, "none", calls, concurrency, stream), None))
            load = Load(f"{gateway.url}/v1", gateway.key, calls, concurrency, stream)
            results["gateway"].append(measure(load, gateway.process.pid))
    return results


# --- the report ---------------------------------------------------------------------------------


def circumstances() -> dict[str, Any]:
    """What a number is worth nothing without: date, machine, versions, commit."""
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": git.stdout.strip() or None,
        "machine": {
            "cpu": next((line.partition(": ")[2] for line in cpuinfo if line.startswith("model name")), "unknown"),
            "cores": os.cpu_count(),
            "kernel": platform.release(),
        },
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("qlens", "aiohttp", "orjson")},
    }


def main() -> None:
    """Measure, print and write benchmarks/results/DATE.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=3000, help=f"calls of each measurement (at most {MAX_CALLS})")
    parser.add_argument("--concurrency", type=int, default=16, help="calls at a time")
    args = parser.parse_args()
    load = {"calls": min(args.calls, MAX_CALLS), "concurrency": args.concurrency}
    report = circumstances() | {"load": load} | run(**load)
    folder = ROOT / "benchmarks" / "results"
    folder.mkdir(exist_ok=True)
    path = folder / f"{report['date'].replace(':', '').replace('+0000', 'Z')}.json"
    path.write_text(json.dumps(report, indent=2) + "\n")
    print(path.read_text(), end="")


if __name__ == "__main__":
    main()
