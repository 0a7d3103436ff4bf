"""Events of changes, as rows that are there until they are told: those of commands, which a gateway is to tell, too."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence

from attrs import asdict

from qlens import Event
from qlens_plugins.auth.key_store.database import Database

log = logging.getLogger("qlens.key_store")

AT_ONCE = 100
"""How many are told in one transaction."""


def append(database: Database, event: Event, own_seconds: float) -> None:
    """Leave an event for any gateway, some time after it was made, within the transaction that is open."""
    wall_ns = event.time + int(own_seconds * 1_000_000_000)
    database.rows("INSERT INTO untold_events (wall_ns, event) VALUES (?, ?)", wall_ns, _written(event))


def forget(database: Database, events: Sequence[Event]) -> None:
    """Take out of the table what is told."""
    for event in events:
        # Without a transaction: whoever changes something would wait for it.
        database.rows("DELETE FROM untold_events WHERE event = ?", _written(event))


def state(database: Database) -> tuple[int, int | None]:
    """The number of the last change of a key or a tenant, and from when on the first event is anybody's to tell."""
    question = "SELECT change, (SELECT min(wall_ns) FROM untold_events) FROM key_state"
    ((change, wall_ns),) = database.rows(question)
    return int(change), wall_ns


def take(database: Database, before: int) -> list[Event]:
    """Take the first events that were anybody's before a time out of the table, within the transaction that is open."""
    found = database.rows("SELECT n, event FROM untold_events WHERE wall_ns < ? ORDER BY n LIMIT ?", before, AT_ONCE)
    for n, _ in found:
        database.rows("DELETE FROM untold_events WHERE n = ?", n)
    return list(_read(text for _, text in found))


def _written(event: Event) -> str:
    return json.dumps(asdict(event, recurse=False), default=dict)


def _read(texts: Iterator[str]) -> Iterator[Event]:
    for text in texts:
        try:
            event = Event(**json.loads(text))
            if not (isinstance(event.type, str) and isinstance(event.time, int) and isinstance(event.data, dict)):
                raise TypeError  # noqa: TRY301 - as for one that has other fields
            yield event
        except (TypeError, ValueError) as error:
            # Of a version that writes them otherwise; kept, it would hold up all behind it.
            log.error("an event that was not told cannot be read, and is not told: %s", type(error).__name__)
