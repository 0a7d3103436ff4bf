"""Which version a ledger's tables have, and the note that a command has upgraded them."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from qlens import StartupError
from qlens_plugins.cost.ledger.store import Store, StoreAway, TookTooLong

if TYPE_CHECKING:
    from qlens import Gateway

SECONDS = 20
_VERSION = "SELECT version FROM versions WHERE owner = 'ledger'"


def version(store: Store) -> int:
    """The version of the tables; 0 where there are none yet, or nobody can be asked. Raises StartupError."""
    try:
        found = store.reading(SECONDS).run(lambda database: database.one(_VERSION))
    except StoreAway:
        return 0
    except TookTooLong:
        raise StartupError(f"the ledger {store} has not answered within {SECONDS} s: somebody may lock it") from None
    return int(found[0]) if found else 0


async def note_upgrade(gateway: Gateway, store: Store, before: int) -> None:
    """Note that the tables were made or upgraded, if they were; raises StartupError when that cannot be noted."""
    after = await asyncio.to_thread(version, store)
    if after == before:
        return
    try:
        await gateway.note("ledger.migrate", store.name, before={"version": before}, after={"version": after})
    except StartupError as error:
        raise StartupError(
            f"the tables of the ledger {store} have version {after} now, which cannot be noted: {error}"
        ) from error
