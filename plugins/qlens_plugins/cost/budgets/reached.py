"""What is told when a share of a budget is spent, or so much that callers are refused."""

from __future__ import annotations

import logging

from qlens import Gateway, usd
from qlens_plugins.cost.budgets.tills import Till, describe
from qlens_plugins.cost.budgets.windows import NEVER, written

log = logging.getLogger("qlens.budgets")


def announce(gateway: Gateway, till: Till, percent: int) -> None:
    """Tell that a share is spent, once for a window and a limit."""
    limit = _limit(till)
    if percent == 100:
        if till.exhausted == limit:
            return  # callers were refused before
        till.exhausted = limit
    _tell(gateway, till, percent, percent)


def exhaust(gateway: Gateway, till: Till) -> None:
    """Tell that a caller was refused for what is spent, once for a window and a limit.

    What the next call may cost at most no longer fits, so that a hard budget hardly ever comes to all of its limit.
    """
    limit = _limit(till)
    if till.exhausted == limit:
        return
    till.exhausted = limit
    log.warning("%s: calls are refused, %s USD are spent", describe(till), usd(till.all_spent))
    _tell(gateway, till, 100, till.all_spent * 100 // limit)


def _limit(till: Till) -> int:
    return till.told.limit or till.purse.line.limit


def _tell(gateway: Gateway, till: Till, share: int, percent: int) -> None:
    """Processes that share a budget each see it, and all give it one id."""
    account, line, window = till.purse.account, till.purse.line, till.window
    limit, has_end = _limit(till), window.end < NEVER
    gateway.events.announce(
        "qlens.budget.exhausted" if share >= 100 else "qlens.budget.threshold",
        account.id,
        {
            "id": account.id,
            "per": account.per,
            "owner": account.owner,
            "tenant": account.tenant,
            "budget": account.rule,
            "hard": line.hard,
            "window": account.period,
            "percent": percent,
            "limit_usd": usd(limit),
            "spent_usd": usd(till.all_spent),
            "starts_at": written(window.start) if has_end else None,
            "resets_at": written(window.end) if has_end else None,
        },
        tenant=account.tenant,
        id=f"{account.id}-{window.start}-{limit}-{share}",
    )
