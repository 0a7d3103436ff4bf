"""The command `qlens keys`: create, list and revoke keys in the file of hashes."""

from __future__ import annotations

import argparse
import asyncio
import json
import secrets
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

from qlens import Command, Gateway, StartupError
from qlens_plugins.auth.api_keys.key_file import Key, Noted, add, hash_text, read, revoke
from qlens_plugins.auth.arguments import expiry, table, tag
from qlens_plugins.auth.credentials import new_key, written

_EXAMPLES = """\
examples:
  KEY=$(qlens keys create --tenant acme)
  qlens keys create --tenant acme --project search --model 'gpt-4o*' --tag team=search --expires 90d
  qlens keys list
  qlens keys revoke key-1f0c9a52
"""
_SHOWN = ("id", "tenant", "project", "roles", "models", "created", "expires_at", "state")


def keys_command(path: Path) -> Command:
    """The command for one file of keys."""

    async def run(gateway: Gateway, args: argparse.Namespace) -> int:
        now = datetime.fromtimestamp(int(gateway.clock.time()), UTC)
        action = {"create": _create, "list": _list, "revoke": _revoke}[args.action]
        loop = asyncio.get_running_loop()

        def noted(before: Key | None, after: Key) -> None:
            work = gateway.note(
                *(f"keys.{args.action}", after.id),
                before=None if before is None else _row(before, now),
                after=_row(after, now),
                tenant=after.tenant,
            )
            asyncio.run_coroutine_threadsafe(work, loop).result()

        try:
            # Locks and disks are waited for; that belongs on a thread.
            return await asyncio.to_thread(action, path, args, now, noted)
        except OSError as error:
            raise StartupError(f"{error.filename or path}: {error.strerror}") from error

    return Command("keys", "make, list and revoke the keys of callers", _add_arguments, run)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EXAMPLES
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    create = actions.add_parser(
        "create",
        help="make a key and print it, this once",
        epilog="example: qlens keys create --tenant acme --project search --expires 90d",
    )
    create.add_argument("--tenant", required=True, help="who the key belongs to")
    create.add_argument("--id", help="a name for the key; it may be seen in logs and metrics (default: random)")
    create.add_argument("--project", help="a part of the tenant")
    create.add_argument("--role", action="append", metavar="ROLE", help="may be repeated (default: member)")
    create.add_argument(
        "--model", action="append", metavar="MODEL", help="a model or prefix* the key may use; may be repeated"
    )
    create.add_argument(
        "--tag",
        action="append",
        type=tag,
        default=[],
        metavar="NAME=VALUE",
        help="kept with each call; may be repeated",
    )
    create.add_argument("--expires", type=expiry, metavar="WHEN", help="90d, 12h, 2027-01-31 or 2027-01-31T00:00:00Z")

    listing = actions.add_parser(
        "list", help="list keys, without their hashes", epilog="example: qlens keys list --json"
    )
    listing.add_argument("--json", action="store_true", help="print JSON")

    revoking = actions.add_parser(
        "revoke", help="refuse a key from now on; its id stays taken", epilog="example: qlens keys revoke key-1f0c9a52"
    )
    revoking.add_argument("id", metavar="ID", help="as `qlens keys list` shows it")


def _create(path: Path, args: argparse.Namespace, now: datetime, noted: Noted) -> int:
    expires_at = now + args.expires if isinstance(args.expires, timedelta) else args.expires
    if expires_at is not None and expires_at <= now:
        raise StartupError(f"--expires: {written(expires_at)} is not in the future")
    plain = new_key()
    key = Key(
        id=args.id or f"key-{secrets.token_hex(4)}",
        hash=hash_text(plain),
        tenant=args.tenant,
        project=args.project,
        roles=tuple(args.role or ("member",)),
        models=tuple(args.model) if args.model else None,
        tags=dict(args.tag),
        created=now,
        expires_at=expires_at,
    )
    add(path, key, noted)
    # The key alone goes to standard output, so that KEY=$(qlens keys create ...) works.
    sys.stdout.write(plain + "\n")
    sys.stderr.write(f"key {key.id} of tenant {key.tenant} is in {path}; the key itself is shown this once\n")
    return 0


def _list(path: Path, args: argparse.Namespace, now: datetime, _noted: Noted) -> int:
    keys = read(path) if path.exists() else ()
    rows = [_row(key, now) for key in keys]
    if args.json:
        sys.stdout.write(json.dumps(rows, indent=2, ensure_ascii=False) + "\n")
    elif rows:
        sys.stdout.write(table(_SHOWN, rows))
    else:
        sys.stderr.write(f"no keys in {path}; make one with: qlens keys create --tenant NAME\n")
    return 0


def _revoke(path: Path, args: argparse.Namespace, now: datetime, noted: Noted) -> int:
    key = revoke(path, args.id, now, noted)
    assert key.revoked is not None
    sys.stderr.write(f"key {key.id} of tenant {key.tenant} is revoked since {written(key.revoked)}\n")
    return 0


def _row(key: Key, now: datetime) -> dict[str, object]:
    """A key as operators see it: without its hash."""
    return {name: value for name, value in key.row().items() if name != "hash"} | {"state": _state(key, now)}


def _state(key: Key, now: datetime) -> str:
    if key.revoked is not None:
        return "revoked"
    return "expired" if key.expires_at is not None and key.expires_at <= now else "active"
