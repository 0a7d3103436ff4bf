"""The command `qlens usage`: what was used and what it cost, read beside a gateway that runs."""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, date, datetime
from functools import partial

from attrs import define, frozen

from qlens import StartupError, unicode_argument, usd
from qlens_plugins.cost.columns import aligned
from qlens_plugins.cost.ledger import kept, sums
from qlens_plugins.cost.ledger.rollups import DAY
from qlens_plugins.cost.ledger.store import Database, Store, StoreAway
from qlens_plugins.cost.ledger.sums import LAST_SECOND

HELP = "Show calls, tokens and cost from the ledger, by tenant, model, day and more."
_EXAMPLES = """\
examples:
  qlens usage
  qlens usage --by project,day --since 2026-11-01 --tenant acme
  qlens usage --by model --json
"""
COLUMNS = {
    "tenant": "tenant",
    "project": "project",
    "key": "key_id",
    "operation": "operation",
    "model": "model",
    "provider": "provider",
    "outcome": "outcome",
    "day": "day",
}
"""What usage can be grouped by, and what roll-ups and receipts call it."""
REJECTION_COLUMNS = {"tenant": "tenant", "operation": "operation", "model": "model", "day": "day"}
"""What of it is known of a refused call."""

_PROMPT = ("input", "cached_input", "cache_write_5m", "cache_write_1h", "audio_in")
_COMPLETION = ("output", "reasoning", "audio_out")
_NAMES = ("calls", "estimated", "unpriced", *_PROMPT, *_COMPLETION, "cost", "saved")
_EPOCH = date(1970, 1, 1)
_END = LAST_SECOND // DAY * DAY


@frozen
class Question:
    """What is asked of the ledger."""

    by: tuple[str, ...]
    since: date | None = None
    until: date | None = None
    tenant: str | None = None
    model: str | None = None

    def of_calls(self) -> sums.Question:
        """The same, as it is asked of roll-ups and receipts: of whole days."""
        start = 0 if self.since is None else _seconds(self.since)
        end = _END if self.until is None else _seconds(self.until, 1)
        by = tuple(COLUMNS[name] for name in self.by if name != "day")
        where = {name: (said,) for name, said in (("tenant", self.tenant), ("model", self.model)) if said is not None}
        return sums.Question(start, end, DAY if "day" in self.by else None, by, where, _NAMES)

    def of_rejections(self) -> tuple[str, list[str]]:
        """The condition in SQL, and its values, for refused calls."""
        asked: dict[str, str | None] = {
            "day >= ?": self.since.isoformat() if self.since else None,
            "day <= ?": self.until.isoformat() if self.until else None,
            "tenant = ?": self.tenant,
            "model = ?": self.model,
        }
        values = {condition: value for condition, value in asked.items() if value is not None}
        return " AND ".join(values) or "1 = 1", list(values.values())


@define
class Sums:
    """What a group of calls used and cost."""

    calls: int = 0
    rejected: int = 0
    prompt: int = 0
    cached: int = 0
    completion: int = 0
    cost_picos: int = 0
    saved_picos: int = 0
    estimated: int = 0
    unpriced: int = 0

    def add(self, other: Sums) -> None:
        """Put another group into this one."""
        self.calls += other.calls
        self.rejected += other.rejected
        self.prompt += other.prompt
        self.cached += other.cached
        self.completion += other.completion
        self.cost_picos += other.cost_picos
        self.saved_picos += other.saved_picos
        self.estimated += other.estimated
        self.unpriced += other.unpriced

    @property
    def cost_usd(self) -> str | None:
        """What the priced calls cost; None when there are only others: that is not 0."""
        return None if self.calls and self.calls == self.unpriced else usd(self.cost_picos)


def _seconds(day: date, more: int = 0) -> int:
    """When a day begins, or one that many days later; there are no calls before or after what is added up."""
    return max(0, min(((day - _EPOCH).days + more) * DAY, _END))


Group = tuple[str | None, ...]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EXAMPLES
    parser.add_argument(
        "--by",
        type=_names,
        default=("tenant", "model"),
        metavar="NAMES",
        help=f"group by these, separated by commas: {', '.join(COLUMNS)} (default: tenant,model)",
    )
    parser.add_argument("--since", type=_day, metavar="DAY", help="first day, YYYY-MM-DD in UTC")
    parser.add_argument("--until", type=_day, metavar="DAY", help="last day, YYYY-MM-DD in UTC")
    parser.add_argument("--tenant", type=unicode_argument, help="only this tenant")
    parser.add_argument("--model", type=unicode_argument, help="only this model, by its public name")
    parser.add_argument("--json", action="store_true", help="print JSON; money as decimal text")


def _names(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if name not in COLUMNS:
            raise argparse.ArgumentTypeError(f"cannot group by {name!r}; known: {', '.join(COLUMNS)}")
    return names


def _day(text: str) -> date:
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no day; write YYYY-MM-DD") from None


async def run(store: Store, args: argparse.Namespace) -> int:
    """Answer the command; 1 when the ledger cannot be read."""
    if args.since is not None and args.until is not None and args.since > args.until:
        raise StartupError(f"--since {args.since} is after --until {args.until}")
    question = Question(args.by, args.since, args.until, args.tenant, args.model)
    try:
        groups = await asyncio.to_thread(store.reading(math.inf).run, partial(read, question=question))
    except StoreAway as error:
        sys.stderr.write(f"qlens: the ledger {store} cannot be read: {error}\n")
        return 1
    sys.stdout.write(_as_json(question, groups) if args.json else _as_text(question, groups))
    return 0


# --- reading -----------------------------------------------------------------------------------


def read(database: Database, question: Question) -> dict[Group, Sums]:
    """Ask the ledger; groups in order."""
    groups = dict(_calls(database, question))
    for group, refused in _rejections(database, question):
        groups.setdefault(group, Sums()).add(refused)
    return dict(sorted(groups.items(), key=lambda item: [(name is not None, name or "") for name in item[0]]))


def _calls(database: Database, question: Question) -> Iterable[tuple[Group, Sums]]:
    """From the roll-ups, which know all but the outcome; raises StartupError where only deleted receipts would know."""
    asked = question.of_calls()
    if gone := kept.gone(database, asked):
        raise StartupError(
            f"{gone}, and only they know the outcome: leave it out of --by, or ask for days after it, --since"
        )
    for (start, group), found in sums.read(database, asked).items():
        day = datetime.fromtimestamp(start, UTC).date().isoformat()
        values = {**dict(zip(asked.by, group, strict=True)), "day": day}
        yield tuple(values[COLUMNS[name]] or None for name in question.by), _used(found)


def _used(found: sums.Sums) -> Sums:
    return Sums(
        calls=found["calls"],
        prompt=sum(found[name] for name in _PROMPT),
        cached=found["cached_input"],
        completion=sum(found[name] for name in _COMPLETION),
        cost_picos=found["cost"],
        saved_picos=found["saved"],
        estimated=found["estimated"],
        unpriced=found["unpriced"],
    )


def _rejections(database: Database, question: Question) -> Iterable[tuple[Group, Sums]]:
    known = [_known(name) for name in question.by]
    where, values = question.of_rejections()
    found = database.rows(
        f"SELECT {', '.join(known)}, sum(calls) FROM rejections WHERE {where} "  # noqa: S608 - only names from above
        f"GROUP BY {', '.join(str(place + 1) for place in range(len(known)))}",
        values,
    )
    for row in found:
        yield tuple(row[:-1]), Sums(rejected=row[-1])


def _known(name: str) -> str:
    if name == "outcome":
        return "'rejected'"
    # Counts have no NULL, so that they can be found again: there nothing is an empty text.
    return f"nullif({REJECTION_COLUMNS[name]}, '')" if name in REJECTION_COLUMNS else "NULL"


# --- showing -----------------------------------------------------------------------------------


def _as_json(question: Question, groups: dict[Group, Sums]) -> str:
    rows = [{**dict(zip(question.by, group, strict=True)), **_values(found)} for group, found in groups.items()]
    return json.dumps({"by": question.by, "rows": rows, "total": _values(_total(groups))}, indent=2) + "\n"


def _values(found: Sums) -> dict[str, int | str | None]:
    return {
        "calls": found.calls,
        "rejected": found.rejected,
        "prompt_tokens": found.prompt,
        "cached_tokens": found.cached,
        "completion_tokens": found.completion,
        "cost_usd": found.cost_usd,
        "estimated_calls": found.estimated,
        "unpriced_calls": found.unpriced,
        "saved_usd": usd(found.saved_picos),
    }


def _total(groups: dict[Group, Sums]) -> Sums:
    total = Sums()
    for found in groups.values():
        total.add(found)
    return total


def _as_text(question: Question, groups: dict[Group, Sums]) -> str:
    if not groups:
        return "no calls\n"
    heads = [name.upper() for name in (*question.by, *_values(Sums()))]
    lines = [_cells(group, found) for group, found in groups.items()]
    if len(lines) > 1:
        lines.append(_cells(("total", *([""] * (len(question.by) - 1))), _total(groups)))
    return aligned([heads, *lines])


def _cells(group: Sequence[str | None], found: Sums) -> list[str]:
    values = (*group, *_values(found).values())
    return ["-" if value is None else str(value) for value in values]
