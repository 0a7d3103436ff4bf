"""The command `qlens webhooks`, which works on the file beside gateways that run."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from uuid import uuid4

from qlens import Command, Event, Gateway, Outbound, OutboundFailed, StartupError, unicode_argument
from qlens_plugins.observe.webhooks import statements
from qlens_plugins.observe.webhooks.records import Bounds, Count, Delivery
from qlens_plugins.observe.webhooks.route import Route
from qlens_plugins.observe.webhooks.store import Store, StoreAway

if TYPE_CHECKING:
    from qlens_plugins.observe.webhooks.plugin import Webhooks

_ENDPOINTS = ("endpoint", "waiting", "oldest", "dead", "events", "tenants", "host")
_DEAD = ("endpoint", "event", "type", "tenant", "since", "died", "attempts", "problem")
_EXAMPLES = """\
examples:
  qlens webhooks list
  qlens webhooks test billing              send an event of type qlens.webhook.test, once and now
  qlens webhooks dead billing --json
  qlens webhooks resend billing            all that is dead; or one event: qlens webhooks resend billing ID
  qlens webhooks drop billing ID ID
"""


def command(plugin: Webhooks) -> Command:
    """The command for the endpoints of a configuration, and what waits for them."""

    async def run(gateway: Gateway, args: argparse.Namespace) -> int:
        if args.action == "test":
            return await _test(plugin, gateway, args.endpoint)
        work = {"list": _list, "dead": _dead, "resend": _resend, "drop": _drop}[args.action]
        async with _opened(plugin, gateway) as store:
            return await work(plugin, gateway, store, args)

    return Command("webhooks", "test endpoints, and list, resend or drop what they did not take", _add_arguments, run)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EXAMPLES
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    listing = actions.add_parser("list", help="show the endpoints and what waits for each")
    testing = actions.add_parser("test", help="send an endpoint a test event and say how it answers")
    testing.add_argument("endpoint", metavar="NAME", help="an endpoint of the configuration")
    dead = actions.add_parser("dead", help="show what was given up")
    dead.add_argument("endpoint", type=unicode_argument, metavar="NAME", nargs="?", help="only for this endpoint")
    for listed in (listing, dead):
        listed.add_argument("--json", action="store_true", help="print JSON")
    for name, what in (("resend", "try again what was given up, for a day"), ("drop", "forget what was given up")):
        action = actions.add_parser(name, help=what)
        action.add_argument("endpoint", type=unicode_argument, metavar="NAME", help="as `qlens webhooks dead` shows it")
        action.add_argument(
            "events", type=unicode_argument, metavar="ID", nargs="*", help="of an event (default: all of this endpoint)"
        )


@asynccontextmanager
async def _opened(plugin: Webhooks, gateway: Gateway) -> AsyncIterator[Store]:
    store = Store(plugin.path(gateway), Bounds(0, 0), 0)
    try:
        await store.open()
        yield store
    except StoreAway as away:
        raise StartupError(f"the file of webhooks cannot be used: {away}") from away
    finally:
        await store.close()


async def _test(plugin: Webhooks, gateway: Gateway, name: str) -> int:
    endpoint = next((each for each in plugin.config.endpoints if each.name == name), None)
    if endpoint is None:
        known = ", ".join(each.name for each in plugin.config.endpoints)
        raise StartupError(f"no endpoint is called {name!r}; endpoints: {known}")
    now = gateway.clock.time()
    event = Event(uuid4().hex, "qlens.webhook.test", int(now * 1e9), None, name, {"endpoint": name})
    outbound = Outbound(plugin.config.reach)
    started = time.monotonic()
    try:
        received = await Route.to(endpoint).send(
            outbound, event.id, now, event.cloudevent_json(plugin.config.source), plugin.config.timeout_seconds
        )
    except OutboundFailed as failure:
        sys.stderr.write(f"{name}: {failure}\n")
        return 1
    finally:
        await outbound.aclose()
    milliseconds = (time.monotonic() - started) * 1000
    sys.stdout.write(f"{name}: status {received.status} after {milliseconds:.0f} ms, event {event.id}\n")
    return 0 if 200 <= received.status < 300 else 1


async def _list(plugin: Webhooks, _gateway: Gateway, store: Store, args: argparse.Namespace) -> int:
    counts = await store.ask(statements.counts)
    configured = {each.name: each for each in plugin.config.endpoints}
    rows = []
    for name in [*configured, *(name for name in counts if name not in configured)]:
        endpoint, count = configured.get(name), counts.get(name, Count())
        rows.append(
            {
                "endpoint": name,
                "waiting": count.waiting,
                "oldest": _moment(count.oldest),
                "dead": count.dead,
                "events": None if endpoint is None else list(endpoint.events),
                "tenants": None if endpoint is None or endpoint.tenants is None else list(endpoint.tenants),
                # The path and the query of a URL may be what opens it.
                "host": "not in the configuration" if endpoint is None else urlsplit(endpoint.url).netloc,
            }
        )
    _print(rows, _ENDPOINTS, as_json=args.json)
    return 0


async def _dead(_plugin: Webhooks, _gateway: Gateway, store: Store, args: argparse.Namespace) -> int:
    found = await store.ask(lambda database: statements.dead(database, args.endpoint))
    rows = [
        {
            "endpoint": each.endpoint,
            "event": each.event,
            "type": each.type,
            "tenant": each.tenant,
            "since": _moment(each.since),
            "died": _moment(each.due),
            "attempts": each.attempts,
            "problem": each.problem,
            **({"body": json.loads(each.body)} if args.json else {}),
        }
        for each in found
    ]
    _print(rows, _DEAD, as_json=args.json)
    return 0


async def _resend(_plugin: Webhooks, gateway: Gateway, store: Store, args: argparse.Namespace) -> int:
    now = gateway.clock.time()
    chosen = await _chosen(store, args)
    await _note(gateway, "webhooks.resend", args.endpoint, chosen)
    count = await store.ask(lambda database: statements.revive(database, args.endpoint, _ids(chosen), now))
    sys.stderr.write(f"{count} events are tried again; a gateway that runs sends them within seconds\n")
    return 0


async def _drop(_plugin: Webhooks, gateway: Gateway, store: Store, args: argparse.Namespace) -> int:
    chosen = await _chosen(store, args)
    await _note(gateway, "webhooks.drop", args.endpoint, chosen)
    count = await store.ask(lambda database: statements.drop(database, args.endpoint, _ids(chosen)))
    sys.stderr.write(f"{count} events are forgotten\n")
    return 0


async def _chosen(store: Store, args: argparse.Namespace) -> list[Delivery]:
    """What of an endpoint's dead deliveries a command means; raises StartupError when an event is not among them."""
    found = await store.ask(lambda database: statements.dead(database, args.endpoint))
    missing = set(args.events) - {each.event for each in found}
    if missing:
        raise StartupError(
            f"event {sorted(missing)[0]!r} for {args.endpoint!r} was not given up; `qlens webhooks dead` lists what was"
        )
    return [each for each in found if not args.events or each.event in args.events]


async def _note(gateway: Gateway, action: str, endpoint: str, chosen: Sequence[Delivery]) -> None:
    if chosen:
        await gateway.note(action, endpoint, before={"events": _ids(chosen)})


def _ids(chosen: Iterable[Delivery]) -> list[str]:
    return [each.event for each in chosen]


def _moment(seconds: float | None) -> str | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _print(rows: Sequence[dict[str, Any]], names: Sequence[str], *, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json.dumps(rows, indent=2, ensure_ascii=False) + "\n")
        return
    if not rows:
        sys.stderr.write("nothing was given up\n")
        return
    lines = [[name.upper() for name in names], *([_cell(row[name]) for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        sys.stdout.write("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() + "\n")


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
