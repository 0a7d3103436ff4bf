"""How calls are refused: what is spent, until when, and the way out."""

from __future__ import annotations

from qlens import Call, CallError, InvalidRequest, QuotaExceeded, RateLimited, Unavailable, usd
from qlens_plugins.cost.budgets.store import Need
from qlens_plugins.cost.budgets.tills import Till
from qlens_plugins.cost.budgets.windows import NEVER, Period, written

_NAMES: dict[Period, str] = {"day": "daily", "week": "weekly", "month": "monthly", "total": "total"}
RETRY_SECONDS = 1.0


def shown(text: str) -> str:
    """An owner's name as a message can have it."""
    return "".join(each if each.isprintable() else "?" for each in text[:64])


def is_spent(till: Till, need: Need) -> bool:
    """Whether a budget refuses for what is spent: waiting for others is no help, and the limit would be enough."""
    limit = till.told.limit or till.purse.line.limit
    left = limit - till.told.spent - till.told.beside
    return need.likely + need.excess <= limit and not (need.likely <= left and till.told.held)


def spent(till: Till, need: Need) -> CallError:
    """A budget has not enough left: for good, until its window ends, or only as long as other calls run.

    Running calls hold the most that they can cost, and give most of it back within seconds: that is a limit's refusal,
    which official clients try again by themselves. A budget that is spent tells them not to.
    """
    account, told = till.purse.account, till.told
    limit = told.limit or till.purse.line.limit
    cost = need.likely + need.excess
    what = f"The {_NAMES[account.period]} budget of {account.per} {shown(account.owner)} ({usd(limit)} USD)"
    again = "" if till.window.end >= NEVER else f" It begins anew at {written(till.window.end)}."
    if cost > limit:
        return QuotaExceeded(
            f"{what} is less than what this call may cost, which is up to {usd(cost)} USD. Lower max_tokens or n, or "
            "shorten the prompt."
        )
    left = limit - told.spent - told.beside
    # What others spend of a budget that is everybody's is in no message, which clients log: GET /v1/budgets has it.
    sums = "" if account.tenant is None else f": {usd(max(0, left))} USD are left"
    if not is_spent(till, need):
        held = "" if account.tenant is None else f", of which calls that are running hold {usd(told.held)} USD"
        return RateLimited(
            f"{what} has no room at present{sums}{held}, and this call may cost up to {usd(cost)} USD. Try again when "
            "they have ended, or lower max_tokens.",
            kind="tokens",
            retry_after=RETRY_SECONDS,
        )
    tail = f"{sums}, and this call may cost up to {usd(cost)} USD" if left > 0 else ""
    return QuotaExceeded(f"{what} is spent{tail}.{again} An operator can raise it until then.")


def away() -> Unavailable:
    """The store does not answer."""
    return Unavailable(
        "Budgets cannot be checked at present, so no call under one is accepted. Please try again later.",
        code="budget_unavailable",
        retry_after=RETRY_SECONDS,
    )


def unpriced(call: Call) -> InvalidRequest:
    """Nobody knows what a call can cost at most."""
    if call.model is not None and not call.bounded:
        field = "max_output_tokens" if call.operation.dialect == "responses" else "max_tokens"
        return InvalidRequest(
            f"{field} is required: the model `{call.model.name}`, or a fallback of it, has no max_output_tokens in "
            "this gateway's configuration, and a budget must know how much a call can cost at most.",
            param=field,
            code="missing_required_parameter",
        )
    if call.model is None or call.operation.runs == "session":
        return InvalidRequest(
            "Nobody knows beforehand what this can cost, and a budget with a hard limit applies: it is not served "
            "here. Its operator can exempt it with `match`, or make the budget `hard: false`.",
            code="cost_unknown",
        )
    return InvalidRequest(
        f"The model `{call.model.name}`, or a fallback of it, has no price for what is asked, and a budget with a hard "
        "limit applies. Its operator can add a row to the price table (`qlens prices` shows what is missing), or make "
        "the budget `hard: false`.",
        param="model",
        code="model_unpriced",
    )
