"""What rules and allowances count, and for whom."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator

from attrs import field, frozen

from qlens import Allowance, Call, Caller, Gateway, Model, fits, picos
from qlens_plugins.cost.budgets.settings import Match, Rule, tolerated
from qlens_plugins.cost.budgets.store import Account
from qlens_plugins.cost.budgets.windows import Period

KEYS = "key's allowance"
TENANTS = "tenant's allowance"
"""How the names of lines begin that no rule brought."""


@frozen
class Line:
    """One rule, with its amounts in picodollars."""

    name: str
    """What it counts, not how much: a reload that changes numbers keeps it."""
    per: str
    period: Period
    limit: int
    tolerance: int = 0
    hard: bool = True
    warn_at: tuple[int, ...] = (80, 100)
    tag: str | None = None
    match: Match = field(factory=Match)

    def account(self, caller: Caller, model: str | None) -> Account | None:
        """Whose budget a call of this caller counts in, of the model that counts as this; None: nobody's."""
        whose = self._whose(caller, model)
        return None if whose is None else self._account(whose, caller.tenant)

    def of_model(self, name: str) -> Account:
        """The budget of a model, where each has one."""
        return self._account(("model", name), None)

    def _account(self, whose: tuple[str, ...], caller_tenant: str | None) -> Account:
        digest = hashlib.blake2b("\0".join((self.name, *whose)).encode(errors="surrogatepass"), digest_size=10)
        tenant = None if self.per in {"model", "tag"} else caller_tenant
        kind = whose[0]
        return Account(f"budget-{digest.hexdigest()}", self.name, kind, whose[1], tenant, self.period)

    def _whose(self, caller: Caller, model: str | None) -> tuple[str, ...] | None:
        """The first two words name the owner; the others tell namesakes apart."""
        if self.per == "model":
            # A name of the configuration, of several for the same targets the first, for a wildcard the pattern: what a
            # client chooses or spells makes no budget of its own.
            return None if model is None else ("model", model)
        if self.per == "tag":
            value = caller.tags.get(self.tag or "")
            return None if value is None else (f"tag {self.tag}", value)
        if self.per == "key":
            return (
                ("key", caller.key_id, caller.by)
                if caller.key_id is not None
                else ("subject", caller.subject, caller.by, caller.tenant)
            )
        if self.per == "project" and caller.project is not None:
            return ("project", caller.project, caller.tenant)
        return ("tenant", caller.tenant)


def lines_of(rules: Iterable[Rule], tolerance: str) -> tuple[Line, ...]:
    """The lines of a configuration."""
    return tuple(
        Line(
            *(name, rule.per, rule.window, picos(rule.usd), tolerated(tolerance, picos(rule.usd)), rule.hard),
            *(tuple(sorted(rule.warn_at)), rule.tag, rule.match),
        )
        for name, rule in _named(rules)
    )


def _named(rules: Iterable[Rule]) -> Iterator[tuple[str, Rule]]:
    seen: Counter[str] = Counter()
    for rule in rules:
        per = rule.per if rule.tag is None else f"tag {rule.tag}"
        name = f"{per} {rule.window} {rule.match.named()}".rstrip()
        seen[name] += 1
        yield (name if seen[name] == 1 else f"{name} #{seen[name]}"), rule


def is_allowance(rule: str) -> bool:
    """Whether a line of this name is a credential's or its tenant's, and not a rule's."""
    return rule.startswith((KEYS, TENANTS))


def allowed(allowance: Allowance | None) -> tuple[Line, ...]:
    """What a credential, and all of its tenant together, may spend beside the rules."""
    if allowance is None:
        return ()
    found = (
        (KEYS, "key", allowance.budget_window, allowance.budget_picos),
        (TENANTS, "tenant", allowance.tenant_budget_window, allowance.tenant_budget_picos),
    )
    return tuple(
        Line(f"{name} {window}", per, window, limit) for name, per, window, limit in found if limit is not None
    )


def lines_for(lines: Iterable[Line], call: Call) -> Iterator[tuple[Line, Account]]:
    """The lines that count a call, each with the budget it counts in."""
    caller, model = call.known, call.model.counts_as if call.model else None
    for line in (*lines, *allowed(caller.allowance)):
        account = line.account(caller, model) if line.match.fits(call) else None
        if account is not None:
            yield line, account


def lines_of_caller(lines: Iterable[Line], caller: Caller, gateway: Gateway) -> Iterator[tuple[Line, Account]]:
    """The lines that count some call of a caller for a model, each with the budget it counts in."""
    usable = counting(caller, gateway)
    for line in (*lines, *allowed(caller.allowance)):
        if not line.match.fits_caller(caller):
            continue
        fits_model = line.match.fits_model
        meant: list[str | None] = [model.counts_as for asked, model in usable if fits_model(asked) or fits_model(model)]
        if line.per != "model":
            meant = [None] if meant or line.match.model is None else []
        for model in dict.fromkeys(meant):
            account = line.account(caller, model)
            if account is not None:
                yield line, account


def counting(caller: Caller, gateway: Gateway) -> list[tuple[Model, Model]]:
    """The models and wildcards that a caller may ask for, each with one that some of these calls count as."""
    models = gateway.models
    return [
        (entry, model)
        for name, entry in models.items()
        for asked, model in ((name, entry), *models.reached(name))
        if _may_use(caller, asked)
    ]


def _may_use(caller: Caller, model: str) -> bool:
    """Whether a caller may ask for a model, or for some of those behind a wildcard."""
    return caller.may_use(model) or any(fits(each, (model,)) for each in caller.models or ())
