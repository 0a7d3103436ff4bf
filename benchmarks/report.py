"""The report: what was measured where, medians with their spread, the goals, as JSON, Markdown and a plot."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

from attrs import frozen

from benchmarks.gateways import python
from benchmarks.rig import ROOT, Cores

RESULTS = ROOT / "benchmarks" / "results"
NOISE = 0.05


@frozen
class Metric:
    """A row of the table."""

    name: str
    title: str
    digits: int = 0


METRICS = (
    Metric("cpu_us_4", "CPU per call, 4 connections, us", 1),
    Metric("cpu_us_16", "CPU per call, 16 connections, us", 1),
    Metric("cpu_us_64", "CPU per call, 64 connections, us", 1),
    Metric("calls_per_second_64", "calls/s, 64 connections"),
    Metric("busy_64", "share of its core that it used, 64 connections", 2),
    Metric("rig_busy_64", "share of the rig's core that load and mock used, 64 connections", 2),
    Metric("cpu_us_rate_300", "CPU per call at 300/s, us", 1),
    Metric("cpu_us_rate_1000", "CPU per call at 1,000/s, us", 1),
    Metric("cpu_us_rate_3000", "CPU per call at 3,000/s, us", 1),
    Metric("added_p50_us_300", "p50 added at 300/s, us"),
    Metric("added_p99_us_300", "p99 added at 300/s, us"),
    Metric("added_p50_us_1000", "p50 added at 1,000/s, us"),
    Metric("added_p99_us_1000", "p99 added at 1,000/s, us"),
    Metric("added_p50_us_3000", "p50 added at 3,000/s, us"),
    Metric("added_p99_us_3000", "p99 added at 3,000/s, us"),
    Metric("added_ttft_us", "first token added, p50, 4 streams, us"),
    Metric("cpu_us_chunk", "CPU per chunk, 128 streams, 5 ms apart, us", 2),
    Metric("added_chunk_delay_us", "delay of a chunk added, p50, same load, us"),
    Metric("cpu_us_chunk_burst", "CPU per chunk, bursts of 100, us", 2),
    Metric("rss_idle_mb", "RSS at rest, MB", 1),
    Metric("pss_idle_mb", "PSS at rest, MB", 1),
    Metric("rss_stream_kib", "RSS per open stream (500), KiB", 1),
    Metric("rss_after_mb", "RSS after the round, MB", 1),
    Metric("start_ms", "start to first answer, ms"),
    Metric("others_share", "most that other programs took of either core", 2),
)


@frozen
class Goal:
    """What QLens with every stage shall reach: a ratio to another gateway in the same round, or a bare number."""

    text: str
    metric: str
    at_most: float
    against: str | None = None
    difference: bool = False
    """Latencies that are added may be near zero: their difference is looked at, not their ratio."""


GOALS = (
    Goal("CPU per call, 64 connections, to Envoy", "cpu_us_64", 1.0, "envoy"),
    Goal("CPU per call, 64 connections, to nginx", "cpu_us_64", 4.0, "nginx"),
    Goal("CPU per call, 4 connections, to Portkey", "cpu_us_4", 1 / 15, "portkey"),
    Goal("CPU per call, 4 connections, to LiteLLM", "cpu_us_4", 1 / 60, "litellm"),
    Goal("CPU per chunk, 128 streams, to Envoy", "cpu_us_chunk", 1.0, "envoy"),
    Goal("CPU per chunk, 128 streams, to nginx", "cpu_us_chunk", 1.3, "nginx"),
    Goal("CPU per chunk, bursts, to Envoy", "cpu_us_chunk_burst", 1.0, "envoy"),
    Goal("CPU per chunk, bursts, to nginx", "cpu_us_chunk_burst", 1.3, "nginx"),
    Goal("RSS per open stream, to Envoy", "rss_stream_kib", 0.5, "envoy"),
    Goal("first token added, us more than Envoy", "added_ttft_us", 0, "envoy", difference=True),
    Goal("p50 added at 3,000/s, us more than Envoy", "added_p50_us_3000", 0, "envoy", difference=True),
    Goal("start to first answer, ms", "start_ms", 500),
    Goal("RSS at rest, MB", "rss_idle_mb", 45),
)
INSTALL_GOALS = (("installed size, MB", "mb", 60), ("installed packages", "count", 30))


def circumstances(cores: Cores) -> dict[str, Any]:
    """What a number is worth nothing without: date, machine, versions, commit."""
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": output_of("git", "describe", "--always", "--dirty", "--abbrev=12") or None,
        "machine": {
            "cpu": next((line.partition(": ")[2] for line in cpuinfo if line.startswith("model name")), "unknown"),
            "cores": os.cpu_count(),
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
            "kernel": platform.release(),
            "system": platform.freedesktop_os_release().get("PRETTY_NAME", "unknown"),
            "load_before": os.getloadavg()[0],
            "gateway_core": cores.gateway,
            "rig_core": cores.rig,
        },
        "python": python(),
    }


def file_name(result: Mapping[str, Any]) -> str:
    """The date, as a file may be called."""
    return str(result["date"]).replace(":", "").replace("+0000", "Z")


def output_of(*command: str) -> str:
    """What a command prints; nothing when it fails."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


# --- medians ------------------------------------------------------------------------------------


def spread(values: Sequence[float]) -> dict[str, float]:
    """The median, the least and the most."""
    return {"median": median(values), "min": min(values), "max": max(values)}


def over_rounds(rounds: Sequence[Mapping[str, Any]], value: Callable[[Mapping[str, Any]], float]) -> list[float]:
    """A value of each round that has it."""
    found = []
    for row in rounds:
        try:
            found.append(value(row))
        except KeyError:
            continue
    return found


def summarised(result: dict[str, Any]) -> dict[str, Any]:
    """The result with medians over the rounds, and the goals."""
    rounds = result["rounds"]
    names = ["direct", *result["gateways"]]
    summary: dict[str, dict[str, Any]] = {}
    for metric in sorted({metric for row in rounds for values in row.values() for metric in values}):
        by_name = {name: over_rounds(rounds, partial(_value, name, metric)) for name in names}
        summary[metric] = {name: spread(values) for name, values in by_name.items() if values}
    return result | {"summary": summary, "goals": goals(result)}


def _value(name: str, metric: str, row: Mapping[str, Any]) -> float:
    return float(row[name][metric])


def goals(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each goal with what was measured: ratios within a round first, then their median."""
    rows = []
    for goal in GOALS:
        if values := over_rounds(result["rounds"], partial(_reached, goal)):
            rows.append(_goal_row(goal.text, goal.at_most, **spread(values)))
    install = result["install"] or {}
    rows += [_goal_row(text, limit, install[name]) for text, name, limit in INSTALL_GOALS if name in install]
    return rows


def _reached(goal: Goal, row: Mapping[str, Any]) -> float:
    own = float(row["qlens"][goal.metric])
    if goal.against is None:
        return own
    other = float(row[goal.against][goal.metric])
    return own - other if goal.difference else own / other


def _goal_row(text: str, at_most: float, median: float, **rest: float) -> dict[str, Any]:
    return {"goal": text, "at_most": at_most, "median": median, **rest, "met": median <= at_most}


# --- Markdown -----------------------------------------------------------------------------------


def markdown(result: Mapping[str, Any]) -> str:
    """The report for people."""
    machine, plan = result["machine"], result["plan"]
    lines = [
        f"# Benchmark of {result['date']}",
        "",
        f"Commit {result['commit']}; {machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB, "
        f"{machine['system']}, kernel {machine['kernel']}; load before the start {machine['load_before']:.2f}. "
        f"The gateway had core {machine['gateway_core']}, load generator and mock upstream core {machine['rig_core']}.",
        "",
        f"Median of {plan['rounds']} rounds, least and most in brackets. How it was measured: "
        "[benchmarks/README.md](../README.md).",
        "",
        *_table(result),
        "",
        f"![The main rows as bars]({file_name(result)}.svg)",
        "",
        *_goals_table(result),
        *_remarks(result),
        "## Configurations",
        "",
    ]
    for name, text in result["configurations"].items():
        lines += [f"### {result['gateways'][name]['title']}", "", "```", text.rstrip(), "```", ""]
    return "\n".join(lines)


def _table(result: Mapping[str, Any]) -> list[str]:
    names = ["direct", *result["gateways"]]
    titles = ["direct", *(f"{one['title']} {one['version']}" for one in result["gateways"].values())]
    lines = ["| | " + " | ".join(titles) + " |", "|---" * (len(names) + 1) + "|"]
    for metric in METRICS:
        if row := result["summary"].get(metric.name):
            cells = [_cell(row.get(name), metric.digits) for name in names]
            lines.append(f"| {metric.title} | " + " | ".join(cells) + " |")
    return lines


def _cell(values: Mapping[str, float] | None, digits: int) -> str:
    if values is None:
        return ""
    text = {name: f"{value:,.{digits}f}" for name, value in values.items()}
    return text["median"] if values["min"] == values["max"] else f"{text['median']} ({text['min']} - {text['max']})"


def _goals_table(result: Mapping[str, Any]) -> list[str]:
    lines = ["## Goals", "", "QLens with every stage; ratios are taken within a round.", ""]
    lines += ["| goal | at most | measured | |", "|---|---|---|---|"]
    for row in result["goals"]:
        values = {name: row[name] for name in ("median", "min", "max") if name in row}
        cell = _cell({"min": row["median"], "max": row["median"]} | values, 2)
        lines.append(f"| {row['goal']} | {row['at_most']:,.3g} | {cell} | {'met' if row['met'] else 'missed'} |")
    return [*lines, ""]


def _remarks(result: Mapping[str, Any]) -> list[str]:
    remarks = []
    for name, values in result["summary"].get("others_share", {}).items():
        if values["max"] > NOISE:
            remarks.append(
                f"Noise: other programs took up to {values['max']:.0%} of a core while {name} was measured; "
                "run it again on a quiet machine."
            )
    for name, faults in result["faults"].items():
        remarks += [f"{name}: {fault}" for fault in faults]
    if install := result["install"]:
        remarks.append(
            f"The default install: {install['mb']} MB, {install['count']} packages ({', '.join(install['packages'])})."
            if "mb" in install
            else f"The default install could not be measured: {install['fault']}"
        )
    return ["## Remarks", "", *(f"* {' '.join(remark.split())}" for remark in remarks), ""] if remarks else []


# --- the plot -----------------------------------------------------------------------------------

PLOTTED = ("cpu_us_64", "cpu_us_chunk", "added_p50_us_1000", "rss_idle_mb")
WIDTH, BAR, LABEL = 640, 18, 190


def plot(result: Mapping[str, Any]) -> str:
    """Bars of some rows of the table, with a line from the least to the most, as SVG."""
    parts, y = [], 10
    for metric in (metric for name in PLOTTED for metric in METRICS if metric.name == name):
        rows = {name: row for name, row in result["summary"].get(metric.name, {}).items() if name != "direct"}
        most = max((row["max"] for row in rows.values()), default=0)
        if most <= 0:
            continue
        parts.append(f'<text x="0" y="{y + 14}" font-weight="bold">{escape(metric.title)}</text>')
        y += 22
        for name, row in rows.items():
            parts += _bar(y, result["gateways"][name]["title"], row, (WIDTH - LABEL - 80) / most, metric.digits)
            y += BAR + 4
        y += 12
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" font-family="sans-serif" font-size="12">\n'
        f'<rect width="{WIDTH}" height="{y}" fill="#fff"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def _bar(y: int, title: str, row: Mapping[str, float], scale: float, digits: int) -> list[str]:
    least, middle, most = (LABEL + max(0.0, row[name]) * scale for name in ("min", "median", "max"))
    color = "#2563eb" if title.startswith("QLens") else "#94a3b8"
    return [
        f'<text x="0" y="{y + 13}">{escape(title)}</text>',
        f'<rect x="{LABEL}" y="{y}" width="{middle - LABEL:.1f}" height="{BAR}" fill="{color}"/>',
        f'<path d="M{least:.1f} {y + BAR / 2} H{most:.1f}" stroke="#111"/>',
        f'<text x="{most + 6:.1f}" y="{y + 13}">{row["median"]:,.{digits}f}</text>',
    ]


def write(result: Mapping[str, Any], folder: Path) -> Path:
    """Write the three files; return the one for people."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / file_name(result)
    stem.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")
    stem.with_suffix(".svg").write_text(plot(result))
    path = stem.with_suffix(".md")
    path.write_text(markdown(result))
    return path
