"""Whether a ledger's roll-ups say what its receipts say, to the last picodollar."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

from attrs import define, evolve, field

from qlens import usd
from qlens_plugins.cost.ledger import sums
from qlens_plugins.cost.ledger.rests import kept_since_ns
from qlens_plugins.cost.ledger.rollups import COARSE, COUNTS, DAY, GROUPED, HOUR, SUMS
from qlens_plugins.cost.ledger.rows import DAY_NS
from qlens_plugins.cost.ledger.store import Database
from qlens_plugins.cost.ledger.sums import SECOND_NS, Group, Question, Sums

NAMES = (*COUNTS, *SUMS)
MONEY = ("cost", "saved")
HOURS, DAYS = "%Y-%m-%d %H:00", "%Y-%m-%d"
SHOWN = 100
"""Differences that are told one by one."""


@define
class Verdict:
    """What was compared, and what differs."""

    receipts: int = 0
    cost_picos: int = 0
    differences: int = 0
    told: list[str] = field(factory=list)

    def add(self, line: str) -> None:
        """One more difference."""
        self.differences += 1
        if len(self.told) < SHOWN:
            self.told.append(line)


def verify(database: Database) -> Verdict:
    """Add up the receipts of each day, and compare: with its hours, with the day and its latencies, also the coarse."""
    verdict = Verdict()
    for start in _days(database):
        question = Question(start, start + DAY, HOUR, GROUPED)
        receipts = dict(sums.part(database, question, None, start, start + DAY))
        for found in receipts.values():
            verdict.receipts += found["calls"]
            verdict.cost_picos += found["cost"]
        _compare(verdict, GROUPED, receipts, dict(sums.part(database, question, HOUR, start, start + DAY)), HOURS)
        latencies = sums.latencies(database, question, receipts=True)
        for names in (GROUPED, COARSE):
            by_day: dict[tuple[int, Group], Sums] = {}
            for (_, group), found in receipts.items():
                by_day.setdefault((start, _fewer(group, names)), Sums.none()).add(found)
            day = evolve(question, width=DAY, by=names)
            _compare(verdict, names, by_day, dict(sums.part(database, day, DAY, start, start + DAY)), DAYS)
            _compare_latencies(verdict, database, day, latencies)
    return verdict


def _fewer(group: Group, names: Sequence[str]) -> Group:
    """A group's values of some of GROUPED."""
    return tuple(value for name, value in zip(GROUPED, group, strict=True) if name in names)


def _days(database: Database) -> list[int]:
    """The days that have receipts or roll-ups, of those whose receipts are all there."""
    since = kept_since_ns(database)
    found = {
        *database.rows("SELECT DISTINCT start FROM usage_days WHERE start >= ?", [since // SECOND_NS]),
        *database.rows(
            f"SELECT DISTINCT wall_ns / {DAY_NS} * {DAY} FROM receipts WHERE wall_ns >= ?",  # noqa: S608 - numbers
            [since],
        ),
    }
    return sorted(start for (start,) in found)


def _compare(
    verdict: Verdict,
    names: Sequence[str],
    receipts: Mapping[tuple[int, Group], Sums],
    rolled: Mapping[tuple[int, Group], Sums],
    format_: str,
) -> None:
    for key in sorted({*receipts, *rolled}):
        start, group = key
        mine, other = receipts.get(key, Sums.none()), rolled.get(key, Sums.none())
        for name in NAMES:
            if mine[name] != other[name]:
                when = datetime.fromtimestamp(start, UTC).strftime(format_)
                verdict.add(
                    f"{when} {_named(names, group)}: {name} is {_shown(name, mine[name])} in the receipts, "
                    f"{_shown(name, other[name])} in the roll-ups"
                )


def _compare_latencies(
    verdict: Verdict, database: Database, question: Question, receipts: Mapping[Group, Mapping[int, int]]
) -> None:
    fewer: dict[Group, Counter[int]] = {}
    for group, counts in receipts.items():
        fewer.setdefault(_fewer(group, question.by), Counter()).update(counts)
    rolled = sums.latencies(database, question, receipts=False)
    for group in sorted({*fewer, *rolled}):
        if fewer.get(group) != rolled.get(group):
            when = datetime.fromtimestamp(question.start, UTC).strftime(DAYS)
            verdict.add(
                f"{when} {_named(question.by, group)}: the latencies in the roll-ups are not those of the receipts"
            )


def _named(names: Sequence[str], group: Group) -> str:
    return ", ".join(f"{name} {value!r}" for name, value in zip(names, group, strict=True) if value not in {"", "{}"})


def _shown(name: str, value: int) -> str:
    return f"{usd(value)} USD" if name in MONEY else str(value)
