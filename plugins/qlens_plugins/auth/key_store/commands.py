"""The commands `qlens keys` and `qlens audit`, which work on the database beside gateways that run."""

from __future__ import annotations

import argparse
import json
import secrets
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

from attrs import define, evolve

from qlens import Actor, Allowance, AuditEntry, Command, Gateway, StartupError, unicode_argument
from qlens_plugins.auth.arguments import expiry, table, tag
from qlens_plugins.auth.credentials import STORED, new_key, written
from qlens_plugins.auth.key_store import bodies
from qlens_plugins.auth.key_store.events import event_of
from qlens_plugins.auth.key_store.records import Key, at, hint, limits_or_none
from qlens_plugins.auth.key_store.store import AuditQuery, Page, Store, StoreAway

NewStore = Callable[[Gateway], Store]
Hashed = Callable[[str], bytes]

_ROWS = 500
_KEYS = ("id", "name", "tenant", "project", "roles", "models", "hint", "created_at", "expires_at", "state")
_AUDIT = ("at", "actor", "action", "object", "tenant", "outcome")
_KEY_EXAMPLES = """\
examples:
  KEY=$(qlens keys create --tenant acme)
  qlens keys create --tenant acme --project search --model 'gpt-4o*' --tag team=search --expires 90d --budget-usd 25
  qlens keys create --tenant ops --role admin     the first key for the admin API
  qlens keys list --tenant acme
  qlens keys rotate key-1f0c9a52d3b4e5f6 --overlap 24h
  qlens keys revoke key-1f0c9a52d3b4e5f6
"""
_AUDIT_EXAMPLES = """\
examples:
  qlens audit --since 2027-01-01 --action keys.revoke
  qlens audit --verify     whether every row is as it was written
"""


def keys_command(new_store: NewStore, hashed: Hashed) -> Command:
    """The command for the keys in a database."""

    async def run(gateway: Gateway, args: argparse.Namespace) -> int:
        work: Callable[[_Desk, argparse.Namespace], Awaitable[int]]
        work = {"create": _create, "list": _list, "rotate": _rotate, "revoke": _revoke}[args.action]
        async with opened(new_store(gateway)) as store:
            return await work(_Desk(gateway, store, hashed), args)

    return Command("keys", "make, list, rotate and revoke the keys of callers", _add_key_arguments, run)


def audit_command(new_store: NewStore) -> Command:
    """The command that shows the audit log."""

    async def run(gateway: Gateway, args: argparse.Namespace) -> int:
        async with opened(new_store(gateway)) as store:
            return await (_verify(store) if args.verify else _show(store, args))

    return Command("audit", "show what operators did", _add_audit_arguments, run)


@asynccontextmanager
async def opened(store: Store) -> AsyncIterator[Store]:
    """A store while a command works on it; raises StartupError when it is away."""
    try:
        await store.open()
        yield store
    except StoreAway as away:
        raise StartupError(f"the database of keys cannot be asked: {away}") from away
    finally:
        await store.close()


@define(eq=False)
class _Desk:
    """Where a command works: as the user who runs it, whom nothing binds."""

    gateway: Gateway
    store: Store
    hashed: Hashed

    @property
    def now(self) -> int:
        return int(self.gateway.clock.time())

    async def note(self, action: str, key: Key, before: Key | None) -> AuditEntry:
        return await self.gateway.note(
            *(action, key.id),
            before=None if before is None else before.row(self.now),
            after=key.row(self.now),
            tenant=key.tenant,
            but=self.store,
        )

    async def change(self, action: str, id_: str, make: Callable[[Key], Key]) -> Key:
        """Change a key; raises StartupError when there is none that works, or somebody else changes it just now."""
        # Not every database takes what no id has: PostgreSQL has no room for what is no Unicode.
        key = await self.store.key(id_, None) if id_.isprintable() else None
        if key is None:
            raise StartupError(f"no key with the id {id_!r}; `qlens keys list` shows them")
        if key.revoked_at is not None:
            raise StartupError(f"the key {id_} is revoked since {at(key.revoked_at)}, for good")
        changed = make(key)
        entry = await self.note(action, changed, key)
        if not await self.store.put_key(changed, entry, event_of(entry)):
            raise StartupError(f"somebody else has just changed the key {id_}: please try again")
        return changed


# --- keys --------------------------------------------------------------------------------------


def _add_key_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _KEY_EXAMPLES
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    creating = actions.add_parser(
        "create",
        help="make a key and print it, this once",
        epilog="example: qlens keys create --tenant acme --project search --expires 90d",
    )
    _add_create_arguments(creating)

    listing = actions.add_parser(
        "list", help="list keys, without their hashes", epilog="example: qlens keys list --json"
    )
    listing.add_argument("--tenant", type=unicode_argument, help="only this tenant's")
    listing.add_argument("--json", action="store_true", help="print JSON")

    rotating = actions.add_parser(
        "rotate",
        help="give a key another secret, under the same id, and print it",
        epilog="example: qlens keys rotate key-1f0c9a52 --overlap 24h",
    )
    rotating.add_argument("id", metavar="ID", help="as `qlens keys list` shows it")
    rotating.add_argument(
        "--overlap",
        type=_overlap,
        default=bodies.OVERLAP_SECONDS,
        metavar="TIME",
        help="how long the old one still works: 24h, 2d, 0h for not at all (default: 1h)",
    )

    revoking = actions.add_parser(
        "revoke",
        help="refuse a key from now on; it stays in the list",
        epilog="example: qlens keys revoke key-1f0c9a52",
    )
    revoking.add_argument("id", metavar="ID", help="as `qlens keys list` shows it")


def _add_create_arguments(create: argparse.ArgumentParser) -> None:
    create.add_argument("--tenant", type=_TEXT, required=True, help="who the key belongs to")
    create.add_argument("--name", type=_TEXT, help="what the key is for")
    create.add_argument("--project", type=_TEXT, help="a part of the tenant")
    create.add_argument("--role", action="append", metavar="ROLE", help="may be repeated (default: member)")
    create.add_argument(
        "--model",
        action="append",
        type=_MODEL,
        metavar="MODEL",
        help="a model or prefix* the key may use; may be repeated",
    )
    create.add_argument(
        "--tag",
        action="append",
        type=_TAG,
        default=[],
        metavar="NAME=VALUE",
        help="kept with each call; may be repeated",
    )
    create.add_argument(
        "--metadata",
        action="append",
        type=_NOTE,
        default=[],
        metavar="NAME=VALUE",
        help="a note about the key, for operators; may be repeated",
    )
    create.add_argument("--expires", type=expiry, metavar="WHEN", help="90d, 12h, 2027-01-31 or 2027-01-31T00:00:00Z")
    for name in ("requests_per_minute", "tokens_per_minute", "concurrency"):
        create.add_argument(f"--{name.replace('_', '-')}", type=_COUNT, metavar="N", help="a limit of this key's own")
    create.add_argument("--budget-usd", type=_MONEY, metavar="USD", help="what this key may spend in a window")
    create.add_argument(
        "--budget-window", choices=("day", "week", "month", "total"), default="month", help="(default: month)"
    )


def _read(reader: bodies.Reader) -> Callable[[str], Any]:
    """An option that is read as the admin API reads the same field."""

    def read(text: str) -> Any:
        try:
            return reader(text)
        except (ValueError, ArithmeticError) as error:
            raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None

    return read


def _tag(text: str) -> tuple[str, str]:
    name, value = tag(text)
    return bodies.text(name), bodies.text(value)


def _note(text: str) -> tuple[str, str]:
    return bodies.note(*tag(text))


_TEXT = _read(bodies.text)
_MODEL = _read(bodies.model)
_TAG = _read(_tag)
_NOTE = _read(_note)
_COUNT = _read(bodies.digits(bodies.count))
_MONEY = _read(bodies.money)
_MOMENT = _read(bodies.nanoseconds)


def _overlap(text: str) -> int:
    span = expiry(text)
    if not isinstance(span, timedelta):
        raise argparse.ArgumentTypeError(f"{text!r} is no time like 24h or 2d")
    return int(span.total_seconds())


async def _create(desk: _Desk, args: argparse.Namespace) -> int:
    expires = args.expires
    if isinstance(expires, timedelta):
        expires = datetime.fromtimestamp(desk.now, UTC) + expires
    if expires is not None and expires.timestamp() <= desk.now:
        raise StartupError(f"--expires: {written(expires)} is not in the future")
    known = desk.gateway.roles.names
    for role in args.role or ():
        if role not in known:
            raise StartupError(f"--role: there is no role {role!r}; roles: {', '.join(known)}")
    plain, id_ = new_key(STORED), f"key-{secrets.token_hex(8)}"
    key = Key(
        id=id_,
        hash=desk.hashed(plain),
        hint=hint(plain),
        tenant=args.tenant,
        subject=id_,
        name=args.name,
        project=args.project,
        roles=tuple(args.role or ("member",)),
        models=tuple(args.model) if args.model else None,
        tags=dict(args.tag),
        limits=limits_or_none(
            Allowance(
                args.requests_per_minute, args.tokens_per_minute, args.concurrency, args.budget_usd, args.budget_window
            )
        ),
        metadata=_notes(args.metadata),
        created_at=desk.now,
        created_by=Actor.user().subject,
        expires_at=None if expires is None else int(expires.timestamp()),
    )
    entry = await desk.note("keys.create", key, None)
    await desk.store.add_key(key, entry, event_of(entry))
    _handed_over(plain, key)
    return 0


def _notes(given: list[tuple[str, str]]) -> dict[str, str]:
    try:
        return bodies.notes(dict(given))
    except ValueError as error:
        raise StartupError(f"--metadata: {error}") from None


async def _rotate(desk: _Desk, args: argparse.Namespace) -> int:
    plain = new_key(STORED)
    secret = desk.hashed(plain)
    key = await desk.change(
        "keys.rotate", args.id, lambda key: key.rotated(secret, hint(plain), desk.now, args.overlap)
    )
    _handed_over(plain, key)
    if key.old_until is not None:
        sys.stderr.write(f"the old one works until {at(key.old_until)}\n")
    return 0


def _handed_over(plain: str, key: Key) -> None:
    # The key alone goes to standard output, so that KEY=$(qlens keys create ...) works.
    sys.stdout.write(plain + "\n")
    sys.stderr.write(f"key {key.id} of tenant {key.tenant}; the key itself is shown this once\n")


async def _list(desk: _Desk, args: argparse.Namespace) -> int:
    rows: list[dict[str, Any]] = []
    more, after = True, None
    while more:
        found = await desk.store.keys(Page(_ROWS, after), args.tenant)
        if found is None:
            break
        rows += [key.row(desk.now) for key in found.rows]
        more, after = found.more, rows[-1]["id"] if rows else None
    _print(rows, _KEYS, "no keys; make one with: qlens keys create --tenant NAME", as_json=args.json)
    return 0


async def _revoke(desk: _Desk, args: argparse.Namespace) -> int:
    key = await desk.change("keys.revoke", args.id, lambda key: evolve(key, revoked_at=desk.now))
    sys.stderr.write(f"key {key.id} of tenant {key.tenant} is revoked; gateways refuse it within seconds\n")
    return 0


# --- the audit log -----------------------------------------------------------------------------


def _add_audit_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _AUDIT_EXAMPLES
    for name, what in (
        ("tenant", "whose keys and settings were touched"),
        ("actor", "the subject of who did it"),
        ("action", "what was done: keys.revoke, say"),
        ("object", "the id of what it was done to"),
    ):
        parser.add_argument(f"--{name}", type=unicode_argument, help=what)
    parser.add_argument("--since", type=_MOMENT, metavar="WHEN", help="2027-01-31 or 2027-01-31T00:00:00Z")
    parser.add_argument("--until", type=_MOMENT, metavar="WHEN", help="before this time")
    parser.add_argument(
        "--limit",
        type=_COUNT,
        default=100,
        metavar="N",
        help="the newest so many (default: 100)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, with what was before and after")
    parser.add_argument("--verify", action="store_true", help="check that no row was changed, taken out or put between")


async def _show(store: Store, args: argparse.Namespace) -> int:
    query = AuditQuery(args.tenant, args.actor, args.action, args.object, args.since, args.until)
    found = await store.entries(Page(args.limit), query)
    rows = [json.loads(text) for text in found.rows] if found else []
    if not args.json:
        rows = [{**row, "actor": row["actor"]["subject"]} for row in rows]
    _print(rows, _AUDIT, "nothing was done", as_json=args.json)
    return 0


async def _verify(store: Store) -> int:
    count, wrong, last = await store.chain()
    if wrong is not None:
        sys.stderr.write(f"the entry {wrong}, the {count}. of the log, is not as it was written, or one before it is\n")
        return 1
    sys.stdout.write(f"{count} entries, each as it was written; the last hash is {last or '-'}\n")
    return 0


def _print(rows: Sequence[dict[str, Any]], names: Sequence[str], nothing: str, *, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json.dumps(rows, indent=2, ensure_ascii=False) + "\n")
    elif rows:
        sys.stdout.write(table(names, rows))
    else:
        sys.stderr.write(nothing + "\n")
