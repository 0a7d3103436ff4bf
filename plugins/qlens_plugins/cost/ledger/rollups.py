"""Roll-ups: what is summed up by hour and by day in the transaction that writes the receipts."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from qlens_plugins.cost.ledger.rows import BUCKETS

HALF = 10**9
"""SQLite's sums may need more than 64 bits (money in picodollars from 9.2 million USD on), so each is kept as two whole
numbers: `_high` of this many and `_low` below it."""
HOUR, DAY = 3600, 86_400
TABLES = {HOUR: "usage_hours", DAY: "usage_days"}
"""By the seconds that one row sums up."""

GROUPS = ("tenant", "project", "key_id", "operation", "model", "provider")
"""What calls are told apart by. Groups have no NULL, so that they are found again: there nothing is an empty text."""
GROUPED = (*GROUPS, "tags")
"""The columns of a group. Tags belong to keys, so that there are hardly more groups for them."""
COARSE = ("tenant", "operation", "model", "provider")
"""Days and latencies are summed up by these alone, too: of such groups there are few, however many keys there are."""
COARSE_TABLES = {"usage_days": "usage_coarse_days", "usage_latencies": "usage_coarse_latencies"}
"""By the table that has the same by all of GROUPED. The database keeps them itself, whoever writes: a trigger does."""
COUNTS = {
    "calls": "1 = 1",
    "failed": "outcome IN ('failed', 'cut')",
    "abandoned": "outcome = 'abandoned'",
    "blocked": "outcome = 'blocked'",
    "cached": "cache IN ('hit', 'semantic')",
    "estimated": "cost_picos IS NOT NULL AND cost_state = 'estimated'",
    "unpriced": "cost_picos IS NULL",
}
"""How many of the calls: the name, and when a receipt is one of them."""
METERS: Mapping[str, tuple[str, ...]] = {
    "images": ("images", "output_images"),
    "seconds": ("seconds", "input_seconds"),
    "characters": ("characters",),
}
"""By sum, the meters of which a receipt has one: what is billed, or what is only counted, since tokens are billed."""
SUMS = (*BUCKETS, *METERS, "cost", "saved")
"""How much in all; money in picodollars."""


def terms(meter: Callable[[str], str]) -> dict[str, str]:
    """What of a receipt is added to each sum, in SQL."""
    return {
        **{name: name for name in BUCKETS},
        **{name: _first(list(map(meter, meters))) for name, meters in METERS.items()},
        "cost": "coalesce(cost_picos, 0)",
        "saved": "saved_picos",
    }


def _first(meters: list[str]) -> str:
    """The first of them that is not 0. Not their sum, which may need more than 64 bits."""
    *others, found = meters
    for each in reversed(others):
        found = f"CASE {each} WHEN 0 THEN {found} ELSE {each} END"
    return f"({found})"


def of_none(name: str, table: str = "") -> str:
    """A dimension of a receipt as it is in a group."""
    return f"{table}{name}" if name in {"tenant", "operation", "tags"} else f"coalesce({table}{name}, '')"


STEPS = 4
"""Latencies are counted in ranges of a fixed scale: this many to each doubling, so that a range is 1/4 wide at most."""
_TOP = 36
"""Latencies of 2**36 microseconds (19 hours) and more are in the last range."""


def _range_of(microseconds: str) -> str:
    """The number of a latency's range in SQL, where no logarithm can be relied on."""
    doublings = (
        f"WHEN {microseconds} < {2 ** (e + 1)} THEN {(e - 1) * STEPS} + (({microseconds} >> {e - 2}) & {STEPS - 1})"
        for e in range(3, _TOP)
    )
    return (
        f"CASE WHEN {microseconds} < 0 THEN 0 WHEN {microseconds} < {2 * STEPS} THEN {microseconds} "
        f"{' '.join(doublings)} ELSE {(_TOP - 1) * STEPS} END"
    )


LATENCY = _range_of("total_us")


def middle(number: int) -> int:
    """The middle of a latency's range, in microseconds: off by 1/8 at most."""
    if number < 2 * STEPS:
        return number
    doubling, step = divmod(number, STEPS)
    width = 1 << (doubling - 1)
    return (STEPS + step) * width + width // 2
