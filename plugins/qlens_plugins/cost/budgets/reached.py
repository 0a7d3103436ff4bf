"""What is told when a share of a budget is spent."""

from __future__ import annotations

from qlens import Gateway, usd
from qlens_plugins.cost.budgets.tills import Till
from qlens_plugins.cost.budgets.windows import NEVER, written


def announce(gateway: Gateway, till: Till, percent: int) -> None:
    """Tell it once for a window and a limit: processes that share a budget each see it, and all give it one id."""
    account, line, window = till.purse.account, till.purse.line, till.window
    limit, has_end = till.told.limit or line.limit, window.end < NEVER
    gateway.events.announce(
        "qlens.budget.exhausted" if percent >= 100 else "qlens.budget.threshold",
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
        id=f"{account.id}-{window.start}-{limit}-{percent}",
    )
