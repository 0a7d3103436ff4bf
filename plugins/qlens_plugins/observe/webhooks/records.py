"""What a delivery is, and what becomes of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal

from attrs import field, frozen

Lost = Counter[tuple[str, str]]
"""How many events were lost, by endpoint and reason."""


@frozen
class Delivery:
    """An event on its way to an endpoint."""

    endpoint: str
    event: str
    type: str
    tenant: str | None
    body: bytes = field(repr=False)
    since: float
    """From when on it is tried, in Unix seconds."""
    attempts: int
    """How many have failed."""
    due: float = 0.0
    problem: str | None = None


@frozen
class Ended:
    """How a delivery that was claimed has ended."""

    delivery: Delivery
    state: Literal["delivered", "again", "dead", "untried"]
    due: float = 0.0
    """When to try again; of a dead one, when it died."""
    problem: str | None = None


@frozen
class Count:
    """What lies in the file for one endpoint."""

    waiting: int = 0
    oldest: float | None = None
    """Since when the oldest of those waits."""
    dead: int = 0


@frozen
class Bounds:
    """How much may lie there for each endpoint."""

    waiting: int
    dead: int


@frozen
class Turn:
    """What one transaction has brought."""

    claimed: Sequence[Delivery]
    lost: Mapping[tuple[str, str], int]
    next_due: float | None
    """When something is due at an endpoint that has room for it."""
    counts: Mapping[str, Count] | None
    """None: it is not long since they were counted."""
    more: bool
    """Whether more waits to be taken in."""
