"""The command `qlens budgets`, which reads the store beside gateways that run."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from qlens import Command, Gateway, StartupError
from qlens_plugins.cost.budgets.endpoints import row
from qlens_plugins.cost.budgets.lines import ALLOWANCE
from qlens_plugins.cost.budgets.settings import Sqlite
from qlens_plugins.cost.budgets.sqlite import SqliteStore
from qlens_plugins.cost.budgets.store import StoreAway
from qlens_plugins.cost.columns import aligned

if TYPE_CHECKING:
    from qlens_plugins.cost.budgets.plugin import Budgets

_COLUMNS = ("per", "owner", "window", "limit_usd", "spent_usd", "reserved_usd", "remaining_usd", "resets_at", "id")
_EXAMPLES = """\
examples:
  qlens budgets
  qlens budgets --tenant acme --json
"""


def command(plugin: Budgets) -> Command:
    """The command for the budgets in a store."""

    async def run(gateway: Gateway, args: argparse.Namespace) -> int:
        rows = [each for each in await _rows(plugin, gateway) if args.tenant in (None, each["tenant"])]
        if args.json:
            sys.stdout.write(json.dumps({"budgets": rows}, indent=2) + "\n")
            return 0
        heads = tuple(name.upper() for name in _COLUMNS)
        lines = [tuple(str("-" if each[name] is None else each[name]) for name in _COLUMNS) for each in rows]
        sys.stdout.write(aligned([heads, *lines]))
        return 0

    return Command("budgets", "show what is spent and left of each budget", _add_arguments, run)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EXAMPLES
    parser.add_argument("--tenant", help="only this tenant's")
    parser.add_argument("--json", action="store_true", help="print JSON; money as decimal text")


async def _rows(plugin: Budgets, gateway: Gateway) -> list[dict[str, Any]]:
    if not isinstance(plugin.config.store, Sqlite):
        raise StartupError("these budgets are in the memory of the gateway that runs: ask it for GET /admin/budgets")
    store = plugin.new_store(gateway)
    assert isinstance(store, SqliteStore)
    now = int(gateway.clock.time())
    try:
        await store.open()
        states = await store.states(now)
    except StoreAway as away:
        raise StartupError(f"the file of budgets cannot be asked: {away}") from away
    finally:
        await store.close()
    lines = {line.name: line for line in plugin.lines}
    return [
        row(state, lines.get(state.account.rule), now, plugin.zone)
        for state in states
        if state.account.rule in lines or state.account.rule.startswith(ALLOWANCE)
    ]
