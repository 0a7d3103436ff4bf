"""What can no longer be answered: of receipts that were deleted the roll-ups alone tell, and they do not tell all."""

from __future__ import annotations

from datetime import UTC, datetime

from attrs import frozen

from qlens import InvalidRequest
from qlens_plugins.cost.ledger import sums
from qlens_plugins.cost.ledger.hours import has_calls
from qlens_plugins.cost.ledger.rests import kept_since_ns
from qlens_plugins.cost.ledger.rollups import HOUR
from qlens_plugins.cost.ledger.store import Database
from qlens_plugins.cost.ledger.sums import SECOND_NS, Found, Question, is_rolled

_SHOWN = {"subject": "user_id", "tier": "service_tier"}


@frozen
class Gone:
    """Why a question has no answer."""

    since: int
    """From when on all receipts are there, in Unix seconds."""
    dimensions: tuple[str, ...]
    """What of the question roll-ups do not know; nothing when it is parts of hours."""

    def __str__(self) -> str:
        return f"receipts from before {datetime.fromtimestamp(self.since, UTC):%Y-%m-%d %H:%M} UTC were deleted"


def gone(database: Database, question: Question) -> Gone | None:
    """Why a question has no answer any more; None when it has one."""
    parts = [(start, end) for table, start, end in sums.parts(question) if table is None]
    since = -(-kept_since_ns(database) // SECOND_NS) if parts else 0
    for start, end in parts:
        # Where there were no calls the answer is as it was.
        if start < since and has_calls(database, question.where, start, min(end, since)):
            dimensions = (name for name in (*question.by, *question.where) if not is_rolled(name))
            return Gone(since, tuple(dict.fromkeys(dimensions)))
    return None


def read(database: Database, question: Question) -> Found:
    """Add up for a client; raises InvalidRequest rather than leave out what was deleted."""
    if found := gone(database, question):
        text = str(found)
        raise InvalidRequest(
            f"{text[0].upper()}{text[1:]}, and only they know {_known_by_receipts(found, question)}, or let "
            f"`start_time` be {found.since} at the earliest.",
            param="start_time",
            code="receipts_deleted",
        )
    return sums.read(database, question)


def _known_by_receipts(found: Gone, question: Question) -> str:
    """What it is, and the other way out."""
    if found.dimensions:
        names = " and ".join(_SHOWN.get(name, name) for name in found.dimensions)
        return f"{names}: leave that out"
    if question.width is not None and question.width < HOUR:
        return "minutes: ask for buckets of an hour"
    return "parts of an hour: let `start_time` and `end_time` be whole hours"
