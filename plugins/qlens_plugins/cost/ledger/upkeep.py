"""The command `qlens ledger`: upgrade, backup, restore and verify, beside gateways that run."""

from __future__ import annotations

import argparse
import asyncio
import math
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

from qlens import Command, Gateway, StartupError, usd
from qlens_plugins.cost.ledger import backup, verifying
from qlens_plugins.cost.ledger.sqlite import SqliteStore
from qlens_plugins.cost.ledger.store import Store, StoreAway
from qlens_plugins.cost.ledger.versions import note_upgrade, version

HELP = "Look after the ledger: upgrade its tables, back it up, restore it, verify its sums."
_EXAMPLES = """\
examples:
  qlens ledger migrate                make or upgrade the tables, as a gateway does when it starts
  qlens ledger backup ledger.jsonl    receipts, refused calls, older roll-ups as JSON lines, for any database
  qlens ledger backup ledger.db       a copy of the whole SQLite file, while gateways write to it
  qlens ledger restore ledger.jsonl   into an empty ledger, be it SQLite or PostgreSQL; also from an SQLite file
  qlens ledger verify                 whether the roll-ups say what the receipts say, to the last picodollar
"""
_COPIES = (".db", ".sqlite")
_READING = ("backup", "verify")

NewStore = Callable[[Gateway], Store]
Noted = Callable[[], None]
"""Notes what is about to be done, from the thread that does it; raises StartupError when it cannot be noted."""


def command(new_store: NewStore, found: Callable[[], int], caught_up: Callable[[], Awaitable[None]]) -> Command:
    """The command, given what makes the ledger's store, the version that its tables had, and what waits for the spool.

    A `restore` does not wait: what is in the spool would make an empty ledger another one.
    """

    async def run(gateway: Gateway, args: argparse.Namespace) -> int:
        work = {"migrate": _migrate, "backup": _backup, "restore": _restore, "verify": _verify}[args.action]
        if args.action in _READING:
            await caught_up()
        store, loop = new_store(gateway), asyncio.get_running_loop()

        def noted() -> None:
            noting = gateway.note(f"ledger.{args.action}", store.name, after={"file": str(args.file)})
            asyncio.run_coroutine_threadsafe(noting, loop).result()

        if not found():
            await note_upgrade(gateway, store, 0)  # they were made a moment ago
        before = await asyncio.to_thread(version, store)
        code = await asyncio.to_thread(_run, work, store, args, noted)
        await note_upgrade(gateway, store, before)
        return code

    return Command("ledger", HELP, _add_arguments, run)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EXAMPLES
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    actions.add_parser("migrate", help="make or upgrade the tables")
    saved = actions.add_parser("backup", help="write the ledger to a file")
    saved.add_argument("file", type=Path, help="JSON lines; with .db or .sqlite a copy of an SQLite file")
    restored = actions.add_parser("restore", help="fill an empty ledger from a file")
    restored.add_argument("file", type=Path, help="what `backup` wrote")
    actions.add_parser("verify", help="compare the roll-ups with the receipts; 1 when they differ")


_Work = Callable[[Store, argparse.Namespace, Noted], int]


def _run(work: _Work, store: Store, args: argparse.Namespace, noted: Noted) -> int:
    try:
        try:
            store.connect()
        except StoreAway:
            if args.action not in _READING:
                raise
            # It may be a standby, which has all there is to read. If nobody is there, reading tells.
        return work(store, args, noted)
    except (StoreAway, StartupError) as error:
        sys.stderr.write(f"qlens: the ledger {store}: {str(error).removeprefix('ledger: ')}\n")
        return 1
    finally:
        store.close()


def _migrate(store: Store, _args: argparse.Namespace, _noted: Noted) -> int:
    sys.stdout.write(f"{store} has the tables of this version\n")
    return 0


def _backup(store: Store, args: argparse.Namespace, _noted: Noted) -> int:
    path: Path = args.file
    if path.suffix not in _COPIES:
        counts = store.reading(math.inf).run(lambda database: backup.write(database, path))
    elif isinstance(store, SqliteStore):
        counts = backup.copy_sqlite(store.path, path)
    else:
        raise StartupError(f"{path} would be a copy of an SQLite file; name it {path.with_suffix('.jsonl').name}, say")
    sys.stdout.write(f"{counts} are in {path}\n")
    return 0


def _restore(store: Store, args: argparse.Namespace, noted: Noted) -> int:
    counts = backup.Source(args.file).restore(store, noted)
    sys.stdout.write(f"{counts} are in {store}\n")
    return 0


def _verify(store: Store, _args: argparse.Namespace, _noted: Noted) -> int:
    verdict = store.reading(math.inf).run(verifying.verify)
    for line in verdict.told:
        sys.stdout.write(f"{line}\n")
    if verdict.differences > len(verdict.told):
        sys.stdout.write(f"... and {verdict.differences - len(verdict.told)} more\n")
    state = f"{verdict.differences} differences" if verdict.differences else "the roll-ups agree"
    sys.stdout.write(f"{verdict.receipts} receipts, {usd(verdict.cost_picos)} USD: {state}\n")
    return 1 if verdict.differences else 0
