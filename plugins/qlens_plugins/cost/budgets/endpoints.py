"""What is spent and left of budgets, and how one is raised for a time."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from datetime import datetime
from decimal import Decimal, InvalidOperation
from functools import partial
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import orjson
from attrs import define, evolve

from qlens import Call, Caller, CallError, Endpoint, Forbidden, InvalidRequest, Reply, picos, usd
from qlens_plugins.cost.budgets import refusals
from qlens_plugins.cost.budgets.lines import TENANTS, Line, counting, is_allowance, lines_of_caller
from qlens_plugins.cost.budgets.settings import MOST_USD
from qlens_plugins.cost.budgets.store import Account, Increase, State, StoreAway
from qlens_plugins.cost.budgets.windows import NEVER, window_of, written

if TYPE_CHECKING:
    from zoneinfo import ZoneInfo

    from qlens import Gateway
    from qlens_plugins.cost.budgets.plugin import Budgets

MOST_BYTES = 64 * 1024
MOST_REASON = 256
MOST_ROWS = 1000
"""On one page of a list."""
_FIELDS = ("usd", "expires_at", "reason")
_PLAIN = re.compile(r"[0-9]+(\.[0-9]+)?")
"""An amount as text. Decimal takes digits of other scripts, underscores and blanks as well."""


class Missing(CallError):
    """There is no such budget, or it is another tenant's: one answer. 404."""

    status, type, code = 404, "invalid_request_error", "not_found"


@define(eq=False)
class BudgetApi:
    """Handlers, each for one path and method."""

    plugin: Budgets

    def endpoints(self) -> Iterable[Endpoint]:
        """Where they are served. Nobody who rules one tenant raises its budgets."""
        yield Endpoint("GET", "/v1/budgets", "member", self.own, scoped=True)
        yield Endpoint("POST", "/admin/budgets/{id}/increase", "operator", self.increase, "admin")
        yield Endpoint("GET", "/admin/budgets", "viewer", self.all, "admin", scoped=True)
        yield Endpoint("GET", "/admin/budgets/{id}", "viewer", self.one, "admin", scoped=True)

    async def own(self, call: Call) -> Reply:
        """The budgets that the caller's calls count in."""
        caller, plugin = call.known, self.plugin
        known = {state.account.id: state for state in await self._states()}
        rows = []
        for line, account in lines_of_caller(plugin.lines, caller, plugin.gateway):
            state = known.get(account.id) or State(account, 0, line.limit, 0, 0)
            rows.append(row(state, line, self._now, plugin.zone))
        return _json({"object": "list", "data": rows})

    async def all(self, call: Call) -> Reply:
        """Budgets that were used, by id, a page at a time; those of one tenant for who rules that alone."""
        most, after = _page(call)
        states = [each for each in await self._states() if each.account.id > after and self._is_open(call, each)]
        rows = [self._row(state) for state in states[:most]]
        ids = [each["id"] for each in rows] or [None]
        ends = {"first_id": ids[0], "last_id": ids[-1], "has_more": len(states) > most}
        return _json({"object": "list", "data": rows, **ends})

    async def one(self, call: Call) -> Reply:
        """One budget."""
        return _json(self._row(await self._state(call)))

    async def increase(self, call: Call) -> Reply:
        """Raise a budget until a moment; only who may give `admin` raises one that binds whoever asks."""
        state, now, gateway, tills = await self._state(call), self._now, self.plugin.gateway, self.plugin.tills
        amount, expires_at, reason = await _asked(call, now)
        raised = Increase(
            *(f"increase-{uuid4().hex}", state.account.id, amount, expires_at, reason),
            *(call.known.subject, now),
        )
        after = {"usd": usd(amount), "expires_at": written(expires_at), "reason": reason}
        noted = partial(
            gateway.audit.record, call, "budgets.increase", state.account.id, before=self._row(state), after=after
        )
        if not gateway.roles.may_give(call.known.roles, "admin") and self._binds(state, call.known):
            await noted(tenant=call.known.tenant, outcome="refused")
            raise Forbidden("You may not raise a budget that binds you yourself: ask an admin.")
        await noted(tenant=state.account.tenant)
        try:
            await tills.through(lambda: tills.store.increase(raised))
        except StoreAway as away:
            await noted(tenant=state.account.tenant, outcome="failed")  # as far as anybody can tell
            raise refusals.away() from away
        return _json(self._row(await self._state(call)))

    def _binds(self, state: State, caller: Caller) -> bool:
        """Whether some calls of this caller count in it, or those of keys that it could have made for itself."""
        line, model = self._line(state), None
        if line is None:  # a key's allowance is no more than that of the key that made it
            if state.account.rule.startswith(TENANTS):
                return state.account.owner == caller.tenant
            return caller.allowance is not None and caller.allowance.budget_picos is not None
        if line.per == "model":
            model = state.account.owner
            if not any(each.counts_as == model for _, each in counting(caller, self.plugin.gateway)):
                return False
        account = line.account(caller, model) if line.match.fits_caller(caller) else None
        return account is not None and account.id == state.account.id

    @property
    def _now(self) -> int:
        return int(self.plugin.gateway.clock.time())

    async def _states(self, id_: str | None = None) -> list[State]:
        plugin, tills = self.plugin, self.plugin.tills
        try:
            # What this process holds in advance is no reservation of anybody's.
            for till in list(tills.dirty):
                till.want = 0
            await tills.tell_all()
            ids = [None] if id_ is None else self._with_beside(id_)
            states = [each for one in ids for each in await tills.through(partial(tills.store.states, self._now, one))]
            return by_model(states, plugin.lines, plugin.gateway)
        except StoreAway as away:
            raise refusals.away() from away

    def _with_beside(self, id_: str) -> list[str | None]:
        """The id of a budget, and those of the budgets that count in it."""
        lines = [line for line in self.plugin.lines if line.per == "model"]
        for model in self.plugin.gateway.models.values() if lines else ():
            for line in lines if len(model.names) > 1 else ():
                if line.of_model(model.counts_as).id == id_:
                    return [line.of_model(name).id for name in model.names]
        return [id_]

    async def _state(self, call: Call) -> State:
        id_ = call.path_params["id"]
        for state in await self._states(id_):
            if state.account.id == id_ and self._is_open(call, state):
                return state
        raise Missing("No such budget.")

    def _is_open(self, call: Call, state: State) -> bool:
        if call.scope is not None and state.account.tenant != call.scope:
            return False
        return is_allowance(state.account.rule) or self._line(state) is not None

    def _line(self, state: State) -> Line | None:
        return next((line for line in self.plugin.lines if line.name == state.account.rule), None)

    def _row(self, state: State) -> dict[str, Any]:
        return row(state, self._line(state), self._now, self.plugin.zone)


def by_model(states: Sequence[State], lines: Iterable[Line], gateway: Gateway) -> list[State]:
    """The same, where what was spent under other names of a model is in the budget of the one that it counts as."""
    named = {line.name: line for line in lines if line.per == "model"}
    found: dict[str, State] = {}
    for state in states:
        line, model = named.get(state.account.rule), gateway.models.named(state.account.owner)
        its = state
        if line is not None and model is not None and model.counts_as != state.account.owner:
            its = evolve(state, account=line.of_model(model.counts_as), increases=())
        other = found.get(its.account.id)
        found[its.account.id] = its if other is None else _added(its, other)
    return [found[id_] for id_ in sorted(found)]


def _added(one: State, other: State) -> State:
    """Two states of one budget as one, of the latest window."""
    increases = (*one.increases, *other.increases)
    if one.window != other.window:
        return evolve(max(one, other, key=lambda each: each.window), increases=increases)
    return evolve(one, spent=one.spent + other.spent, held=one.held + other.held, increases=increases)


def row(state: State, line: Line | None, now: int, zone: ZoneInfo) -> dict[str, Any]:
    """A budget as answers have it: money as decimal text."""
    account: Account = state.account
    window = window_of(account.period, now, zone)
    is_over = state.window < window.start
    spent, held = (0, 0) if is_over else (state.spent, state.held)
    raised = sum(each.picos for each in state.increases)
    limit = (line.limit if line is not None else state.limit) + raised
    has_end = window.end < NEVER
    elapsed, whole = max(1, now - window.start), window.end - window.start
    return {
        "id": account.id,
        "object": "budget",
        "per": account.per,
        "owner": account.owner,
        "tenant": account.tenant,
        "budget": account.rule,
        "hard": line.hard if line is not None else True,
        "window": account.period,
        "limit_usd": usd(limit),
        "spent_usd": usd(spent),
        "reserved_usd": usd(held),
        "remaining_usd": usd(max(0, limit - spent - held)),
        "projected_usd": usd(spent * whole // elapsed) if has_end else None,
        "starts_at": written(window.start) if has_end else None,
        "resets_at": written(window.end) if has_end else None,
        "resets_at_unix": window.end if has_end else None,
        "increases": [
            {
                "id": each.id,
                "usd": usd(each.picos),
                "expires_at": written(each.expires_at),
                "reason": each.reason,
                "by": each.by,
                "created_at": written(each.created_at),
            }
            for each in state.increases
        ],
    }


def _page(call: Call) -> tuple[int, str]:
    """How many budgets are asked for, and after which id."""
    given = [name for name, _ in call.query.items()]
    for name in given:
        if name not in {"limit", "after"}:
            raise InvalidRequest("Unknown parameter; known: limit, after.", param=name[:64], code="unknown_parameter")
        if given.count(name) > 1:
            raise InvalidRequest(f"`{name}` may be said once.", param=name, code="invalid_value")
    text = call.query.get("limit", str(MOST_ROWS))
    if not (text.isascii() and text.isdigit() and len(text) < 6 and 1 <= int(text) <= MOST_ROWS):
        raise _wrong("limit", f"a whole number from 1 to {MOST_ROWS}")
    return int(text), call.query.get("after", "")


async def _asked(call: Call, now: int) -> tuple[int, int, str]:
    """Amount, end and reason; raises InvalidRequest with the field's name."""
    raw = await call.read()
    try:
        given = orjson.loads(raw) if len(raw) <= MOST_BYTES else None
    except orjson.JSONDecodeError:
        given = None
    if not isinstance(given, dict):
        raise InvalidRequest("The request body must be a JSON object with usd, expires_at and reason.")
    for name in given:
        if name not in _FIELDS:
            known = ", ".join(_FIELDS)
            raise InvalidRequest(f"Unknown field; known: {known}.", param=name[:64], code="unknown_parameter")
    for name in _FIELDS:
        if name not in given:
            raise InvalidRequest(f"The field `{name}` is missing.", param=name, code="missing_required_parameter")
    return _amount(given["usd"]), _end(given["expires_at"], now), _reason(given["reason"])


def _wrong(name: str, must: str) -> InvalidRequest:
    return InvalidRequest(f"`{name}` must be {must}.", param=name, code="invalid_value")


def _amount(value: object) -> int:
    must = f'an amount of USD as text, like "25.00", above 0 and up to {MOST_USD}'
    if type(value) is not str and type(value) is not int:
        raise _wrong("usd", must)  # a JSON number with a point is a float, and no exact money
    if not _PLAIN.fullmatch(str(value)):
        raise _wrong("usd", must)
    try:
        amount = Decimal(value)
        if not amount.is_finite() or not 0 < amount <= MOST_USD:
            raise _wrong("usd", must)
        return picos(amount)
    except (InvalidOperation, ValueError):
        raise _wrong("usd", must) from None


def _end(value: object, now: int) -> int:
    must = "a time to come with its zone, like 2027-01-31T00:00:00Z, or Unix seconds"
    if isinstance(value, str):
        try:
            at = datetime.fromisoformat(value)
        except ValueError:
            raise _wrong("expires_at", must) from None
        if at.tzinfo is None:
            raise _wrong("expires_at", must)
        value = int(at.timestamp())  # also of the last hours of the year 9999, which other zones do not have
    if type(value) is not int or not now < value < 32503680000:
        raise _wrong("expires_at", must)
    return value


def _reason(value: object) -> str:
    if not isinstance(value, str) or not value.strip() or len(value) > MOST_REASON:
        raise _wrong("reason", f"a text of up to {MOST_REASON} characters")
    return value


def _json(answer: object) -> Reply:
    return Reply(headers={"content-type": "application/json", "cache-control": "no-store"}, body=orjson.dumps(answer))
