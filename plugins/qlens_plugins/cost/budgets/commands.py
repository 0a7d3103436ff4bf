"""The command `qlens budgets`, which reads the store beside gateways that run."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlens import Command, Gateway, StartupError, picos, usd
from qlens_plugins.cost.budgets.endpoints import by_model, row
from qlens_plugins.cost.budgets.lines import is_allowance
from qlens_plugins.cost.budgets.redis import RedisBudgets
from qlens_plugins.cost.budgets.settings import Memory
from qlens_plugins.cost.budgets.sqlite import SqliteStore
from qlens_plugins.cost.budgets.store import Account, Store, StoreAway
from qlens_plugins.cost.columns import aligned

if TYPE_CHECKING:
    from qlens_plugins.cost.budgets.plugin import Budgets

_COLUMNS = ("per", "owner", "window", "limit_usd", "spent_usd", "reserved_usd", "remaining_usd", "resets_at", "id")
_PRINTED = "`qlens budgets --json` has printed"
_Sum = tuple[Account, int, int, int]
"""A budget, its window, its limit and what was spent."""
_EXAMPLES = """\
examples:
  qlens budgets
  qlens budgets --tenant acme --json
  qlens budgets --begin last-known.json
"""


def command(plugin: Budgets) -> Command:
    """The command for the budgets in a store."""

    async def run(gateway: Gateway, args: argparse.Namespace) -> int:
        if args.begin is not None:
            sys.stdout.write(await _begin(plugin, gateway, args.begin))
            return 0
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
    parser.add_argument(
        "--begin",
        nargs="?",
        const="",
        metavar="FILE",
        help="for a Redis without a ledger that is new or has lost what it knew: nothing was spent, or what FILE says, "
        "which is what --json printed",
    )
    parser.add_argument("--json", action="store_true", help="print JSON; money as decimal text")


async def _rows(plugin: Budgets, gateway: Gateway) -> list[dict[str, Any]]:
    if isinstance(plugin.config.store, Memory):
        raise StartupError("these budgets are in the memory of the gateway that runs: ask it for GET /admin/budgets")
    now = int(gateway.clock.time())
    async with _opened(plugin, gateway) as store:
        states = by_model(await store.states(now), plugin.lines, gateway)
    lines = {line.name: line for line in plugin.lines}
    return [
        row(state, lines.get(state.account.rule), now, plugin.zone)
        for state in states
        if state.account.rule in lines or is_allowance(state.account.rule)
    ]


@asynccontextmanager
async def _opened(plugin: Budgets, gateway: Gateway) -> AsyncIterator[Store]:
    async with plugin.open_store(gateway) as store:
        try:
            if isinstance(store, SqliteStore):
                await store.open()
            yield store
        except StoreAway as away:
            raise StartupError(f"the store of budgets cannot be asked: {away}") from away
        finally:
            await store.close()


async def _begin(plugin: Budgets, gateway: Gateway, file: str) -> str:
    """Begin with the sums of a file; what there is to say about it."""
    sums = await asyncio.to_thread(_sums, Path(file)) if file else []
    spent = sum(each[-1] for each in sums)

    async def noted() -> None:
        after = {"file": file or None, "budgets": len(sums), "spent_usd": usd(spent)}
        await gateway.note("budgets.begin", plugin.name, after=after)

    async with _opened(plugin, gateway) as store:
        if not isinstance(store, RedisBudgets):
            raise StartupError("only a Redis loses what was spent: these budgets are kept elsewhere")
        if not await store.begin(sums, noted):
            raise StartupError("Redis knows what was spent: nothing is to be set")
        seconds = store.gather_seconds
    return f"{len(sums)} budgets are set, all others have spent nothing; calls are admitted in {seconds:g} s\n"


def _sums(path: Path) -> list[_Sum]:
    """What a file says of budgets; raises StartupError for one that says nothing of them."""
    try:
        return [_sum(each) for each in json.loads(path.read_text("utf-8"))["budgets"]]
    except OSError as error:
        raise StartupError(f"{path} cannot be read: {error.strerror}; name a file that {_PRINTED}") from error
    except (ValueError, ArithmeticError, KeyError, TypeError, RecursionError) as error:
        what = f"nothing is called {error}" if isinstance(error, KeyError) else str(error) or type(error).__name__
        raise StartupError(f"{path} is no list of budgets ({what}); name a file that {_PRINTED}") from error


def _sum(each: dict[str, Any]) -> _Sum:
    account = Account(each["id"], each["budget"], each["per"], each["owner"], each["tenant"], each["window"])
    start = 0 if each["starts_at"] is None else int(datetime.fromisoformat(each["starts_at"]).timestamp())
    spent = picos(Decimal(each["spent_usd"])) + picos(Decimal(each["reserved_usd"]))
    return account, start, picos(Decimal(each["limit_usd"])), spent
