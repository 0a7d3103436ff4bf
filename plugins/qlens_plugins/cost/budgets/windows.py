"""Calendar windows: where the one of a moment begins and ends."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, tzinfo
from typing import Literal

from attrs import frozen

Period = Literal["day", "week", "month", "total"]

NEVER = 2**53
"""The end of what has none, in Unix seconds."""


_LONGEST_DAYS = {"day": 1, "week": 7, "month": 31}


@frozen
class Window:
    """From its first second up to, but without, its end; Unix seconds."""

    start: int
    end: int


TOTAL = Window(0, NEVER)


def window_of(period: Period, now: float, zone: tzinfo) -> Window:
    """The window of a moment. A week begins on Monday; days have 23 or 25 hours where clocks are changed."""
    if period == "total":
        return TOTAL
    day = datetime.fromtimestamp(now, zone).replace(hour=0, minute=0, second=0, microsecond=0, tzinfo=None)
    if period == "day":
        return Window(_begin(day, zone), _begin(day + timedelta(days=1), zone))
    if period == "week":
        monday = day - timedelta(days=day.weekday())
        return Window(_begin(monday, zone), _begin(monday + timedelta(days=7), zone))
    first = day.replace(day=1)
    return Window(_begin(first, zone), _begin((first + timedelta(days=32)).replace(day=1), zone))


def is_over(period: Period, start: int, now: float) -> bool:
    """Whether the window that began then is over for as long as it lasted, and more: nobody asks for it again."""
    days = _LONGEST_DAYS.get(period)
    return days is not None and start + 2 * days * 86_400 < now


def _begin(midnight: datetime, zone: tzinfo) -> int:
    """The first second of a day. Where clocks skip midnight, or show it twice, that is when the date changes."""
    # The time zone is put in only now: arithmetic on times with a zone counts hours of the wall, not of the day.
    return int(midnight.replace(tzinfo=zone, fold=0).timestamp())


def written(seconds: int) -> str:
    """A moment as answers have it."""
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")
