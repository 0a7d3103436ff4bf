"""Events that commands have made, and cannot tell themselves: rows that a gateway takes, tells and deletes."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

from attrs import asdict

from qlens import Event
from qlens_plugins.auth.key_store.database import Database

log = logging.getLogger("qlens.key_store")

AT_ONCE = 100
"""How many are told in one transaction."""


def append(database: Database, event: Event) -> None:
    """Leave an event for a gateway, within the transaction that is open."""
    text = json.dumps(asdict(event, recurse=False), default=dict)
    database.rows("INSERT INTO untold_events (wall_ns, event) VALUES (?, ?)", event.time, text)


def state(database: Database) -> tuple[int, int | None]:
    """The number of the last change of a key or a tenant, and the time of the event that waits longest."""
    question = "SELECT change, (SELECT wall_ns FROM untold_events ORDER BY n LIMIT 1) FROM key_state"
    ((change, wall_ns),) = database.rows(question)
    return int(change), wall_ns


def take(database: Database, before: int) -> list[Event]:
    """Take the first events of before a time out of the table, within the transaction that is open."""
    found = database.rows("SELECT n, event FROM untold_events WHERE wall_ns < ? ORDER BY n LIMIT ?", before, AT_ONCE)
    for n, _ in found:
        database.rows("DELETE FROM untold_events WHERE n = ?", n)
    return list(_read(text for _, text in found))


def _read(texts: Iterator[str]) -> Iterator[Event]:
    for text in texts:
        try:
            event = Event(**json.loads(text))
            if not (isinstance(event.type, str) and isinstance(event.time, int) and isinstance(event.data, dict)):
                raise TypeError  # noqa: TRY301 - as for one that has other fields
            yield event
        except (TypeError, ValueError) as error:
            # Of a version that writes them otherwise; kept, it would hold up all behind it.
            log.error("an event of a command cannot be read, and is not told: %s", type(error).__name__)
