"""Buckets and places as operators see them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from attrs import evolve, frozen

from qlens import Caller
from qlens_plugins.rate_limit.token_bucket.meters import ALLOWANCE, SECOND, Cap, Key, Meter, Rules


@frozen
class Used:
    """A bucket, or the places of one owner, from which something was taken."""

    key: Key
    slot: str
    limit: Meter | Cap | None
    """None: it is of a credential's allowance, whose numbers this process has not met."""

    @property
    def tenant(self) -> str | None:
        """Whose it is to see; None: everybody's, as a model's or a provider's."""
        kind, _, name = self.slot.partition("=")
        return name if kind == "tenant" else None

    @property
    def is_allowance(self) -> bool:
        """Whether a credential brought it."""
        return self.key[0].endswith(ALLOWANCE)

    @property
    def kind(self) -> str:
        """What is counted."""
        return self.key[0].partition(" ")[0]

    def under(self, rules: Rules) -> Used | None:
        """The same under the rules of now; None when no rule counts it any more."""
        if self.is_allowance:
            return self
        limits: tuple[Meter | Cap, ...] = (*rules.meters, *rules.caps)
        limit = next((each for each in limits if each.name == self.key[0]), None)
        return None if limit is None else evolve(self, limit=limit)

    def binds(self, caller: Caller) -> bool:
        """Whether some calls of this caller count in it, or those of keys that it could have made for itself."""
        if self.is_allowance:
            return caller.allowance is not None
        _, per, owner, *rest = self.key
        match per:
            case "tenant":
                return owner == caller.tenant
            case "project":
                return (owner, *rest) == (caller.project, caller.tenant)
            case "key":
                return (owner, *rest) == (caller.key_id, caller.by)
            case "subject":
                return (owner, *rest) == (caller.subject, caller.by, caller.tenant)
        return True  # a model's or a provider's

    def id(self, limiter: str) -> str:
        """Names it in paths: the same at every replica."""
        digest = hashlib.blake2b("\0".join((limiter, *self.key)).encode(errors="surrogatepass"), digest_size=10)
        return f"limit-{digest.hexdigest()}"


class Shown(Protocol):
    """Where buckets and places are, for those who look at them: implemented in memory and for a store."""

    async def used(self) -> list[Used]:
        """All that there are."""

    async def taken(self, used: Sequence[Used]) -> list[int]:
        """Of each bucket the picoseconds until it is full, of places how many are taken."""

    async def clear(self, used: Used) -> None:
        """Make a bucket full."""


def row(limiter: str, used: Used, taken: int, room: Callable[[Meter], int]) -> dict[str, Any]:
    """A bucket, or places, as answers have it."""
    limit, is_places = used.limit, used.kind == "concurrency"
    most = limit.most if isinstance(limit, Cap) else limit.per_minute if limit else None
    burst = room(limit) // limit.unit if isinstance(limit, Meter) else None
    if isinstance(limit, Meter):
        remaining: int | None = max(0, (room(limit) - taken) // limit.unit)
    else:
        remaining = max(0, limit.most - taken) if limit else None
    return {
        "id": used.id(limiter),
        "object": "limit",
        "limiter": limiter,
        "per": used.key[1],
        "owner": used.key[2],
        "tenant": used.tenant,
        "name": used.key[0],
        "kind": used.kind,
        "limit": most,
        "window": None if is_places else "minute",
        "burst": burst,
        "remaining": remaining,
        "running": taken if is_places else None,
        "reset_seconds": None if is_places else round(taken / SECOND, 3),
    }
