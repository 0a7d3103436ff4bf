"""What the file may say about limits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from attrs import asdict, field, frozen
from attrs.validators import ge, gt, le, min_len, optional

from qlens import Call, RedisSettings, fits


@frozen
class Memory:
    """Keeps the buckets in the memory of each process."""

    kind: Literal["memory"] = "memory"
    """Where the buckets are."""
    per_worker: bool = False
    """Allows several workers, each with buckets of its own that hold its share: the limit divided by the workers."""


@frozen(kw_only=True)
class Redis(RedisSettings):
    """Keeps the buckets in a Redis that all replicas and workers share."""

    kind: Literal["redis"]
    """Where the buckets are."""
    replicas: int = field(default=1, validator=ge(1))
    """How many gateways share the limits; while Redis is away each enforces its share of them alone."""
    lease_seconds: float = field(default=1, validator=[ge(0), le(60)])
    """How long a process may hold units in advance, which spares it most calls to Redis; 0: it asks for every call."""
    slot_seconds: float = field(default=15, validator=ge(1))
    """How long the places of calls at a time outlast a process that crashed."""


@frozen
class Match:
    """Narrows a rule to some callers, models and providers; a pattern may end in `*`."""

    tenant: tuple[str, ...] | None = None
    """Tenants the rule is for."""
    project: tuple[str, ...] | None = None
    """Projects the rule is for; a caller without a project is not meant."""
    key: tuple[str, ...] | None = None
    """Key ids the rule is for; a caller without a key is not meant."""
    model: tuple[str, ...] | None = None
    """Models the rule is for, by their names in `models`; of several names for the same targets one is enough."""
    provider: tuple[str, ...] | None = None
    """Providers the rule is for, by their names in `providers`; only for rules `per: provider`."""

    def fits(self, call: Call, provider: str | None = None) -> bool:
        """Whether the rule is for this call, and for the provider it is about to be sent to."""
        caller = call.known
        return (
            fits(caller.tenant, self.tenant)
            and fits(caller.project, self.project)
            and fits(caller.key_id, self.key)
            and (self.model is None if call.model is None else call.model.fits(self.model))
            and (provider is None or fits(provider, self.provider))
        )

    def named(self) -> str:
        """What it says, in one text."""
        said: Mapping[str, tuple[str, ...]] = asdict(self, filter=lambda _, value: value is not None)
        return " ".join(f"{name}={','.join(patterns)}" for name, patterns in said.items())


@frozen
class Rule:
    """How much each tenant, project, key, model or provider may do."""

    per: Literal["tenant", "project", "key", "model", "provider"]
    """Whose calls are counted together. Without a project that is the tenant, without a key the subject."""
    requests_per_minute: int | None = field(default=None, validator=optional(ge(1)))
    """Calls a minute."""
    tokens_per_minute: int | None = field(default=None, validator=optional(ge(1)))
    """Tokens a minute: held at admission by what a call may use, corrected by what it used."""
    concurrency: int | None = field(default=None, validator=optional(ge(1)))
    """Calls at a time; a stream counts until its end."""
    burst_seconds: float = field(default=60, validator=gt(0))
    """How many seconds' worth of requests and tokens a full bucket holds, to be used at once."""
    match: Match = field(factory=Match)
    """Narrows the rule to some callers, models and providers."""

    def __attrs_post_init__(self) -> None:
        if self.requests_per_minute is None and self.tokens_per_minute is None and self.concurrency is None:
            raise ValueError("the rule limits nothing: give requests_per_minute, tokens_per_minute or concurrency")
        if self.match.provider is not None and self.per != "provider":
            raise ValueError(
                "match.provider is for rules `per: provider`: before a call is sent nobody knows its provider"
            )


@frozen
class TokenBucketConfig:
    """Limits requests a minute, tokens a minute and calls at a time."""

    limits: tuple[Rule, ...] = field(validator=min_len(1))
    """All rules that fit a call must let it pass."""
    store: Memory | Redis = field(factory=Memory)
    """Where the buckets are kept."""
