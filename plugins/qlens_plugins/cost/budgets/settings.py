"""What the file may say about budgets."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING, Any, Literal
from zoneinfo import ZoneInfo

from attrs import asdict, field, frozen
from attrs.validators import and_, deep_iterable, ge, gt, le, min_len

from qlens import Call, Caller, Model, RedisSettings, Url, fits, picos, sqlite_path
from qlens_plugins.cost.budgets.windows import Period

if TYPE_CHECKING:
    from pathlib import Path

    from attrs import Attribute

MOST_USD = 4_000_000
"""A sum of picodollars fits 64 bits up to 9.2 million USD; what is reserved and increased comes on top."""


def _amount(owner: object, attribute: Attribute[Any], value: Decimal) -> None:
    if picos(value) < 0 or value > MOST_USD:
        raise ValueError(f"{value} USD is no budget: it must be from 0 to {MOST_USD}")


def _zone(owner: object, attribute: Attribute[Any], value: str) -> None:
    try:
        ZoneInfo(value)
    except (KeyError, OSError, ValueError):
        raise ValueError(f"{value!r} is no time zone; write it like UTC or Europe/Berlin") from None


def _tolerable(owner: object, attribute: Attribute[Any], value: str) -> None:
    tolerated(value, 0)


def _file(owner: object, attribute: Attribute[Any], value: str) -> None:
    from pathlib import Path

    sqlite_path(value, Path())


def tolerated(text: str, limit: int) -> int:
    """How much may be spent beyond a limit, both in picodollars; ValueError for what is neither USD nor a share."""
    number, is_share = text.strip().removesuffix("%").strip(), text.strip().endswith("%")
    wrong = ValueError(f"{text!r} is no tolerance; write USD like 0.50, or a share of the limit like 5%")
    try:
        value = Decimal(number)
    except InvalidOperation:
        raise wrong from None
    if not value.is_finite() or not 0 <= value <= (100 if is_share else MOST_USD):
        raise wrong
    if not is_share:
        return picos(value)
    over, under = value.as_integer_ratio()
    return over * limit // (under * 100)


@frozen
class Memory:
    """Keeps what is spent in the memory of one process: a restart forgets it."""

    kind: Literal["memory"] = "memory"
    """Where it is kept."""


@frozen
class Sqlite:
    """Keeps what is spent in a file that the workers and gateways of one machine share."""

    kind: Literal["sqlite"]
    """Where it is kept."""
    url: Url = field(default=Url("sqlite:///qlens.db"), validator=_file)
    """The file, as `sqlite:///FILE`, which may be that of the ledger; a relative one is in the YAML file's folder."""
    lease_seconds: float = field(default=1, validator=[ge(0), le(60)])
    """How long a process may hold a part of a budget that no call needs yet; 0: it asks for every call."""
    crash_seconds: float = field(default=60, validator=ge(3))
    """After how long without a sign of life what a process had reserved is charged."""


@frozen(kw_only=True)
class Redis(RedisSettings):
    """Keeps what is spent in a Redis that all replicas and workers share."""

    kind: Literal["redis"]
    """Where it is kept."""
    lease_seconds: float = field(default=1, validator=[ge(0), le(60)])
    """How long a process may hold a part of a budget that no call needs yet; 0: it asks for every call."""
    crash_seconds: float = field(default=60, validator=ge(3))
    """After how long without a sign of life what a process had reserved is charged."""
    gather_seconds: float = field(default=1, validator=[ge(0), le(3000)])
    """How long hard budgets refuse calls after Redis has lost its sums, so that all gateways can say again what their
    running calls hold."""


@frozen
class Match:
    """Narrows a budget to some callers and models; a pattern may end in `*`."""

    tenant: tuple[str, ...] | None = None
    """Tenants it is for."""
    project: tuple[str, ...] | None = None
    """Projects it is for; a caller without a project is not meant."""
    key: tuple[str, ...] | None = None
    """Key ids it is for; a caller without a key is not meant."""
    model: tuple[str, ...] | None = None
    """Models it is for, by their names in `models`; of several names for the same targets one is enough."""

    def fits(self, call: Call) -> bool:
        """Whether it is for this call."""
        return self.fits_caller(call.known) and self.fits_model(call.model)

    def fits_model(self, model: Model | None) -> bool:
        """Whether it is for calls of a model, or for those without one."""
        return self.model is None if model is None else model.fits(self.model)

    def fits_caller(self, caller: Caller) -> bool:
        """Whether it is for some call of this caller."""
        return fits(caller.tenant, self.tenant) and fits(caller.project, self.project) and fits(caller.key_id, self.key)

    def named(self) -> str:
        """What it says, in one text."""
        said: Mapping[str, tuple[str, ...]] = asdict(self, filter=lambda _, value: value is not None)
        return " ".join(f"{name}={','.join(patterns)}" for name, patterns in said.items())


@frozen
class Rule:
    """How much each tenant, project, key, model or value of a tag may spend."""

    per: Literal["tenant", "project", "key", "model", "tag"]
    """Whose calls are counted together. Without a project that is the tenant, without a key the subject."""
    usd: Decimal = field(validator=_amount)
    """The limit in USD."""
    window: Period = "month"
    """In which time: a calendar day, week (from Monday) or month, or in all."""
    hard: bool = True
    """Refuse what might cost more than is left; `false` only warns."""
    warn_at: tuple[int, ...] = field(default=(80, 100), validator=deep_iterable(and_(gt(0), le(100))))
    """At which percentages of the limit a warning is logged and counted, once a window."""
    tag: str | None = None
    """The tag whose values have budgets, with `per: tag`; callers without the tag have none."""
    match: Match = field(factory=Match)
    """Narrows the budget to some callers and models."""

    def __attrs_post_init__(self) -> None:
        if (self.per == "tag") is (self.tag is None):
            raise ValueError("`tag` names the tag of a budget `per: tag`, and stands nowhere else")


@frozen
class BudgetsConfig:
    """Holds spending below limits: reserved by what a call can cost at most, settled to what it cost."""

    limits: tuple[Rule, ...] = field(validator=min_len(1))
    """All budgets that fit a call must have room for it."""
    store: Memory | Sqlite | Redis = field(factory=Memory)
    """Where it is kept what was spent."""
    time_zone: str = field(default="UTC", validator=_zone)
    """In which time zone days, weeks and months begin: `UTC`, `Europe/Berlin`."""
    tolerance: str = field(default="0", validator=_tolerable)
    """How far a budget may be overspent at most: `0` never, a share of the limit like `5%`, or USD like `0.50`."""

    @property
    def file(self) -> Url | None:
        """The file of the store, if it has one."""
        return self.store.url if isinstance(self.store, Sqlite) else None


def place(url: Url, folder: Path) -> Path:
    """Where a store's file is."""
    return sqlite_path(url, folder)
