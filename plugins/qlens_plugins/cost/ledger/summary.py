"""Usage at a glance: by model, tenant, tag and more, with cache savings, latencies and rates of errors."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from functools import partial
from typing import Any

from qlens import Call, Reply, usd
from qlens_plugins.cost.ledger import kept, parameters, sums
from qlens_plugins.cost.ledger.answers import reply, written
from qlens_plugins.cost.ledger.calls import FILTERS, LISTS, TIMES, asked_of
from qlens_plugins.cost.ledger.reader import Reader
from qlens_plugins.cost.ledger.rollups import DAY, middle
from qlens_plugins.cost.ledger.rows import BUCKETS
from qlens_plugins.cost.ledger.store import Database
from qlens_plugins.cost.ledger.sums import Group, Question, Sums
from qlens_plugins.cost.ledger.view import Where

DAYS = 30
ROWS, MOST_ROWS = 100, 1000
_BY = {FILTERS[name]: name.removesuffix("s") for name in FILTERS if name != "outcomes"}
_DIMENSIONS = {shown: name for name, shown in _BY.items()}
PERCENTILES = (50, 95, 99)
Latencies = Mapping[int, int]
Refused = Mapping[str, int]
"""Refused calls by status."""
_OF_REFUSED = frozenset({"tenant", "operation", "model"})
"""What is known of a refused call."""


async def summarised(call: Call, reader: Reader, own: Where) -> Reply:
    """The groups with most calls first, and the sum of all."""
    ones = {**TIMES, "limit": parameters.number(1, MOST_ROWS)}
    by = parameters.some_of(_DIMENSIONS, tags=True)
    asked = parameters.asked(call, ones, {**LISTS, "group_by": by})
    question = _question(asked, own)
    names, limit = asked.get("group_by", ()), asked.get("limit", ROWS)
    return reply(await reader.ask(partial(_written, question, names, limit)))


def _written(question: Question, names: tuple[str, ...], limit: int, database: Database) -> bytes:
    """The summary as JSON."""
    groups = {group: added for (_, group), added in kept.read(database, question).items()}
    latencies = sums.latencies(database, question)
    refused = _refused(database, question)
    groups |= {group: Sums.none() for group in refused or () if group not in groups}
    first = sorted(groups, key=lambda group: (-groups[group]["calls"], group))
    data = [
        {**{name: value or None for name, value in zip(names, group, strict=True)}}
        | _row(groups[group], latencies.get(group, {}), None if refused is None else refused.get(group, {}))
        for group in first[:limit]
    ]
    total, all_latencies = Sums.none(), dict[int, int]()
    all_refused = None if refused is None else _together(refused.values())
    for group, found in groups.items():
        total.add(found)
        for number, calls in latencies.get(group, {}).items():
            all_latencies[number] = all_latencies.get(number, 0) + calls
    return written(
        {
            "object": "usage.summary",
            "start_time": question.start,
            "end_time": question.end,
            "data": data,
            "has_more": len(first) > limit,
            "total": _row(total, all_latencies, all_refused),
        }
    )


def _question(asked: Mapping[str, Any], own: Where) -> Question:
    """Whole days: those that the times are in; without times, the last thirty."""
    now, where = int(time.time()), asked_of(asked, own).where
    end = asked.get("end_time", now + 1)
    start = asked.get("start_time", max(0, end - 1 - (DAYS - 1) * DAY))
    if end <= start:
        raise parameters.wrong("start_time", "must not be in the future where there is no `end_time`")
    by = tuple(_DIMENSIONS.get(name, name) for name in asked.get("group_by", ()))
    return Question(start // DAY * DAY, -(-end // DAY) * DAY, None, by, where)


def _refused(database: Database, question: Question) -> dict[Group, dict[str, int]] | None:
    """Refused calls by the dimensions and status; None where what is asked about is not known of them."""
    if not {*question.by, *question.where} <= _OF_REFUSED:
        return None
    conditions, values = sums.where(question.where, database.dialect, receipts=False)
    rows = database.rows(
        f"SELECT {', '.join(('status', 'sum(calls)', *question.by))} FROM rejections "  # noqa: S608 - only names above
        f"WHERE day >= ? AND day < ?{conditions} GROUP BY {', '.join(('status', *question.by))}",
        [_date(question.start), _date(question.end), *values],
    )
    found: dict[Group, dict[str, int]] = {}
    for status, calls, *group in rows:
        found.setdefault(tuple(group), {})[str(status)] = int(calls)
    return found


def _date(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).date().isoformat()


def _together(refused: Iterable[Refused]) -> dict[str, int]:
    found: dict[str, int] = {}
    for each in refused:
        for status, calls in each.items():
            found[status] = found.get(status, 0) + calls
    return found


def _row(found: Sums, latencies: Latencies, refused: Refused | None) -> dict[str, Any]:
    calls = found["calls"]
    turned_away = 0 if refused is None else sum(refused.values())
    prompt = sum(found[name] for name in (*BUCKETS[:4], "audio_in"))
    completion = sum(found[name] for name in ("output", "reasoning", "audio_out"))
    cost = found.cost_picos
    return {
        "calls": calls,
        "failed_calls": found["failed"],
        "abandoned_calls": found["abandoned"],
        "blocked_calls": found["blocked"],
        "cached_calls": found["cached"],
        "estimated_calls": found["estimated"],
        "unpriced_calls": found["unpriced"],
        "rejected_calls": None if refused is None else turned_away,
        "rejected_by_status": None if refused is None else dict(sorted(refused.items())),
        "error_rate": _share(found["failed"] + turned_away, calls + turned_away),
        "cache_hit_rate": _share(found["cached"], calls),
        "input_tokens": prompt,
        "input_cached_tokens": found["cached_input"],
        "output_tokens": completion,
        "total_tokens": prompt + completion,
        "cost_usd": None if cost is None else usd(cost),
        "saved_usd": usd(found["saved"]),
        "latency_ms": {f"p{percent}": percentile(latencies, percent) for percent in PERCENTILES},
    }


def _share(part: int, whole: int) -> float | None:
    return round(part / whole, 6) if whole else None


def percentile(latencies: Latencies, percent: int) -> float | None:
    """The milliseconds within which so many of a hundred calls ended, to 1/8; None without calls."""
    rank = -(-sum(latencies.values()) * percent // 100)
    for number in sorted(latencies):
        rank -= latencies[number]
        if rank <= 0:
            return middle(number) / 1000
    return None
