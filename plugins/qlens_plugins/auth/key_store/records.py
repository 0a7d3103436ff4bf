"""What is kept: keys and tenants, as frozen records, and as operators see them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from attrs import evolve, field, frozen

from qlens import Allowance, fits
from qlens_plugins.auth.credentials import STORED, written

Models = tuple[str, ...] | None


@frozen
class Key:
    """A virtual key: who calls with it, and what it may do. Times are Unix seconds."""

    id: str
    hash: bytes = field(repr=False)
    hint: str
    """Its first and last characters, to tell which one somebody holds."""
    tenant: str
    subject: str
    name: str | None = None
    project: str | None = None
    roles: tuple[str, ...] = ("member",)
    models: Models = None
    tags: Mapping[str, str] = field(factory=dict, hash=False)
    limits: Allowance | None = None
    metadata: Mapping[str, str] = field(factory=dict, hash=False)
    """What operators note about it; it goes along with no call."""
    created_at: int = 0
    created_by: str = ""
    expires_at: int | None = None
    revoked_at: int | None = None
    rotated_at: int | None = None
    old_hash: bytes | None = field(default=None, repr=False)
    """The hash before the rotation, which works until `old_until`."""
    old_hint: str | None = None
    old_until: int | None = None
    change: int = 0
    """The number of the change that made it what it is."""

    def rotated(self, secret: bytes, shown: str, now: int, overlap: int) -> Key:
        """The key with the hash and hint of another secret; the present one works for some seconds more."""
        changed = evolve(self, hash=secret, hint=shown, rotated_at=now, old_hash=None, old_hint=None, old_until=None)
        if not overlap:
            return changed
        return evolve(changed, old_hash=self.hash, old_hint=self.hint, old_until=now + overlap)

    def state(self, now: float) -> str:
        """Whether it works, or why not."""
        if self.revoked_at is not None:
            return "revoked"
        return "expired" if self.expires_at is not None and self.expires_at <= now else "active"

    def row(self, now: float) -> dict[str, Any]:
        """The key as operators see it: without its hashes."""
        overlap = self.old_until is not None and self.old_until > now
        return {
            "object": "key",
            "id": self.id,
            "name": self.name,
            "hint": self.hint,
            "tenant": self.tenant,
            "project": self.project,
            "subject": self.subject,
            "roles": list(self.roles),
            "models": None if self.models is None else list(self.models),
            "tags": dict(self.tags),
            "limits": None if self.limits is None else self.limits.row(),
            "metadata": dict(self.metadata),
            "state": self.state(now),
            "created_at": at(self.created_at),
            "created_by": self.created_by,
            "expires_at": at(self.expires_at),
            "revoked_at": at(self.revoked_at),
            "rotated_at": at(self.rotated_at),
            "rotated_from": {"hint": self.old_hint, "works_until": at(self.old_until)} if overlap else None,
        }


@frozen
class Tenant:
    """What holds for all keys of a tenant."""

    name: str
    disabled: bool = field(default=False, converter=bool)
    models: Models = None
    """What its keys may use at most."""
    limits: Allowance | None = None
    """What holds for each of its keys that has no such limit of its own, and a budget of all of them together."""
    metadata: Mapping[str, Any] = field(factory=dict, hash=False)
    created_at: int = 0
    created_by: str = ""
    deleted_at: int | None = None
    change: int = 0

    def row(self) -> dict[str, Any]:
        """The tenant as operators see it."""
        return {
            "object": "tenant",
            "name": self.name,
            "disabled": self.disabled,
            "models": None if self.models is None else list(self.models),
            "limits": None if self.limits is None else self.limits.row(),
            "metadata": dict(self.metadata),
            "created_at": at(self.created_at),
            "created_by": self.created_by,
        }


def at(seconds: int | None) -> str | None:
    """Unix seconds as answers have them."""
    return None if seconds is None else written(datetime.fromtimestamp(seconds, UTC))


def hint(key: str) -> str:
    """Enough of a key to tell it from others, and never enough to use it."""
    return f"{STORED}...{key[-4:]}"


# --- what a key has together with its tenant ---------------------------------------------------


def models_within(models: Models, most: Models) -> Models:
    """What of some models lies within others."""
    if models is None or most is None:
        return most if models is None else models
    narrowed = [model for model in models if fits(model, most)]
    return tuple(dict.fromkeys([*narrowed, *(model for model in most if fits(model, models))]))


_LIMITS = ("requests_per_minute", "tokens_per_minute", "concurrency", "budget_picos")
"""What a key may have of its own."""
_OF_TENANT = "tenant_budget_picos"
_WINDOWS = ("day", "week", "month", "total")


def limits_together(own: Allowance | None, default: Allowance | None) -> Allowance | None:
    """A key's own limits, the tenant's defaults where it has none, and the tenant's own budget."""
    if own is None or default is None:
        return default if own is None else own
    missing = {name: getattr(default, name) for name in (*_LIMITS, _OF_TENANT) if getattr(own, name) is None}
    if missing.get("budget_picos") is not None:
        missing["budget_window"] = default.budget_window
    return evolve(own, **missing, tenant_budget_window=default.tenant_budget_window)


def wider_limits(limits: Allowance | None, most: Allowance | None, *, of_tenant: bool = False) -> list[str]:
    """The names of what is not within other limits; no limit is the widest. A budget for longer is narrower.

    A tenant's own budget is none of what a key gives to another: `of_tenant` compares that as well.
    """
    if most is None:
        return []
    given = limits or Allowance()
    wider = []
    for name in (*_LIMITS, _OF_TENANT) if of_tenant else _LIMITS:
        bound, value = getattr(most, name), getattr(given, name)
        if bound is not None and (value is None or value > bound or _is_shorter(name, given, most)):
            wider.append(name)
    return wider


def _is_shorter(name: str, given: Allowance, most: Allowance) -> bool:
    """Whether a budget is for a shorter window than another one."""
    if not name.endswith("_picos"):
        return False
    window = name.replace("_picos", "_window")
    return _WINDOWS.index(getattr(given, window)) < _WINDOWS.index(getattr(most, window))


def narrowed_limits(limits: Allowance | None, names: Iterable[str], most: Allowance) -> Allowance:
    """Limits with some of them taken from others."""
    taken: dict[str, Any] = {name: getattr(most, name) for name in names}
    if "budget_picos" in taken:
        taken["budget_window"] = most.budget_window
    return evolve(limits or Allowance(), **taken)


def limits_or_none(limits: Allowance | None) -> Allowance | None:
    """Limits, or None when nothing is said in them."""
    said = limits is not None and any(getattr(limits, name) is not None for name in (*_LIMITS, _OF_TENANT))
    return limits if said else None
