"""Receipts as rows of the ledger's tables."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from operator import attrgetter, itemgetter
from typing import Any

import orjson

from qlens import Attempt, Call, Caller, Cost, Receipt, Target, Usage, usd

log = logging.getLogger("qlens.ledger")

LARGEST = 2**63 - 1
"""A column's integers have 64 bits: 9.2 million USD in picodollars."""
AT_ONCE = 25
"""Rows that are made, or written in one statement, before a thread lets go of Python's lock."""
DAY_NS = 86_400 * 10**9

Rejection = tuple[str, str, str, str | None, int, str | None]
"""Day, tenant, operation, model, status, error: what refused calls are counted by."""
Value = str | int | None
Row = tuple[Value, ...]
Facts = Sequence[Any]
"""Values in an order that the function says which made them."""
SAME = 0
"""Stands for the usage or the cost of the whole call."""

BUCKETS = (
    "input",
    "cached_input",
    "cache_write_5m",
    "cache_write_1h",
    "output",
    "reasoning",
    "audio_in",
    "audio_out",
)
_COUNT = itemgetter(1)
COLUMNS = (
    *("id", "wall_ns", "day", "tenant", "project", "key_id", "subject", "operation", "model", "provider"),
    *("upstream_model", "outcome", "status", "error", "streamed", "cache"),
    *BUCKETS,
    *("meters", "usage_source", "tier", "cost_picos", "cost_state", "price_id", "saved_picos"),
    *("ttft_us", "total_us", "overhead_us", "bytes_out", "config_version", "tags", "attempts"),
)

OPTIONAL = frozenset(
    ("project", "key_id", "model", "provider", "upstream_model", "error", "tier", "cost_picos", "price_id", "ttft_us")
)
"""The columns that may be NULL."""


def rejection(receipt: Receipt) -> Rejection:
    """What a refused call is counted by: names from the configuration and codes, never a client's text."""
    return (
        _day(receipt.wall_ns // DAY_NS),
        receipt.caller.tenant,
        receipt.operation,
        receipt.model,
        receipt.status,
        receipt.error,
    )


def row(receipt: Receipt) -> Row:
    """A receipt as a row."""
    return ended(facts_of(receipt), facts_after(receipt))


# --- what is noted of a call, as JSON can hold it ------------------------------------------------


def facts_before(call: Call) -> Facts:
    """What is known of a call before it is sent: who makes it, and what it can use and cost at most."""
    caller, model, bound, cost = call.caller, call.model, call.bound, call.bound_cost
    assert caller is not None, "the call is not authenticated yet"
    return (
        call.id,
        call.wall_ns,
        caller.tenant,
        caller.project,
        caller.key_id,
        caller.subject,
        call.operation.name,
        None if model is None else model.name,
        call.config,
        {**caller.tags, **call.tags} if call.tags else caller.tags,
        bound.input,
        bound.output,
        bound.meters,
        cost.picos,
        cost.price_id,
    )


def facts_of(receipt: Receipt) -> Facts:
    """The same, of a call that has ended; what it could have cost matters no more."""
    caller = receipt.caller
    return (
        receipt.id,
        receipt.wall_ns,
        caller.tenant,
        caller.project,
        caller.key_id,
        caller.subject,
        receipt.operation,
        receipt.model,
        receipt.config_version,
        receipt.tags,
    )


# Attributes of these are in a dict: all of them in one go take less time than one by one.
_buckets: Callable[[Usage], Facts] = attrgetter(*BUCKETS, "meters", "source", "tier")
_price: Callable[[Cost], Facts] = attrgetter("picos", "state", "price_id", "lines")


def facts_after(receipt: Receipt) -> Facts:
    """How it ended. Made on the event loop, so only what is needed, and none of it twice."""
    target, usage, cost, attempts, tags = receipt.target, receipt.usage, receipt.cost, receipt.attempts, receipt.tags
    return (
        None if target is None else target.provider,
        None if target is None else target.model,
        receipt.outcome,
        receipt.status,
        receipt.error,
        receipt.streamed,
        receipt.cache,
        _buckets(usage),
        _price(cost),
        receipt.saved_picos,
        receipt.ttft_us,
        receipt.total_us,
        receipt.overhead_us,
        receipt.bytes_out,
        None if tags is receipt.caller.tags else tags,
        # Nearly all have one, for which a loop costs as much as what is in it.
        (_attempt_facts(attempts[0], usage, cost),)
        if len(attempts) == 1
        else [_attempt_facts(attempt, usage, cost) for attempt in attempts],
    )


def _attempt_facts(attempt: Attempt, usage: Usage, cost: Cost) -> Facts:
    """An attempt; most calls have one, whose usage and cost are the call's own."""
    target, used, price = attempt.target, attempt.usage, attempt.cost
    return (
        attempt.n,
        attempt.kind,
        target.provider,
        target.model,
        attempt.status,
        attempt.error,
        attempt.started,
        attempt.first_byte,
        attempt.ended,
        attempt.upstream_id,
        attempt.billed,
        SAME if used is usage else None if used is None else _buckets(used),
        SAME if price is cost else _price(price),
    )


def interrupted(before: Facts) -> Facts:
    """How a call ended whose process died: it may have been sent, so what it can have used at most is charged."""
    input_, output, meters, picos, price_id = before[10:]
    used = (input_, 0, 0, 0, output, 0, 0, 0, meters, "estimated", None)
    cost = (picos, "unpriced" if picos is None else "estimated", price_id, ())
    return (None, None, "failed", 503, "interrupted", False, "off", used, cost, 0, None, 0, 0, 0, None, ())


# --- rows of it ----------------------------------------------------------------------------------


def ended(before: Facts, after: Facts) -> Row:
    """The row of a call that has ended."""
    id_, wall_ns, tenant, project, key_id, subject, operation, model, config, known = before[:10]
    provider, upstream, outcome, status, error, streamed, cache, used, cost, saved, ttft, total = after[:12]
    overhead, bytes_out, own, attempts = after[12:]
    picos, state, price_id, _ = cost
    if picos is not None and picos > LARGEST:
        log.error("ledger: receipt %s costs %s USD, more than a row can hold: cut off", id_, usd(picos))
        picos, state = LARGEST, "estimated"
    return (
        id_,
        wall_ns,
        _day(wall_ns // DAY_NS),
        tenant,
        project,
        key_id,
        subject,
        operation,
        model,
        provider,
        upstream,
        outcome,
        status,
        error,
        streamed,
        cache,
        *used[:8],
        _json(used[8]),
        used[9],
        used[10],
        picos,
        state,
        price_id,
        saved,
        ttft,
        total,
        overhead,
        bytes_out,
        config,
        _json(known if own is None else own),
        _json([_attempt(facts, used, cost) for facts in attempts]),
    )


def _attempt(facts: Facts, used: Facts, cost: Facts) -> dict[str, object]:
    n, kind, provider, model, status, error, started, first_byte, over, upstream_id, billed, own_use, own_cost = facts
    picos, state, price_id, lines = cost if own_cost == SAME else own_cost
    return {
        "n": n,
        "kind": kind,
        "provider": provider,
        "model": model,
        "status": status,
        "error": error,
        "first_byte_us": None if first_byte is None else round((first_byte - started) * 1_000_000),
        "total_us": None if over is None else round((over - started) * 1_000_000),
        "upstream_id": upstream_id,
        "billed": billed,
        "usage": None if own_use is None else _usage(used if own_use == SAME else own_use),
        "cost_usd": None if picos is None else usd(picos),
        "cost_state": state,
        "price_id": price_id,
        "cost_lines": lines,
    }


def _usage(used: Facts) -> dict[str, object]:
    """The buckets that were used; they stand in front."""
    found: dict[str, object] = dict(filter(_COUNT, zip(BUCKETS, used, strict=False)))
    if used[8]:
        found.update(used[8])
    found["source"] = used[9]
    return found


# --- receipts of it ------------------------------------------------------------------------------


def receipt(before: Facts, after: Facts) -> Receipt:
    """The receipt of a call that has ended, as far as it is noted: who vouched for the caller, say, is not."""
    id_, wall_ns, tenant, project, key_id, subject, operation, model, config, known = before[:10]
    provider, upstream, *ending, used, price, saved, ttft, total, overhead, bytes_out, own, attempts = after
    outcome, status, error, streamed, cache = ending
    usage, cost, tags = _used(used), _cost(price), known if own is None else own
    return Receipt(
        id=id_,
        caller=Caller(tenant, subject, "", project=project, key_id=key_id, tags=known),
        operation=operation,
        model=model,
        target=None if provider is None else Target(provider, upstream, model or ""),
        outcome=outcome,
        status=status,
        error=error,
        usage=usage,
        cost=cost,
        saved_picos=saved,
        cache=cache,
        streamed=streamed,
        attempts=tuple(_tried(facts, model or "", usage, cost) for facts in attempts),
        tags=tags,
        wall_ns=wall_ns,
        ttft_us=ttft,
        total_us=total,
        overhead_us=overhead,
        bytes_out=bytes_out,
        config_version=config,
    )


def _tried(facts: Facts, model: str, usage: Usage, cost: Cost) -> Attempt:
    n, kind, provider, upstream, status, error, started, first_byte, over, upstream_id, billed, used, price = facts
    return Attempt(
        n,
        Target(provider, upstream, model),
        started,
        kind=kind,
        first_byte=first_byte,
        ended=over,
        status=status,
        error=error,
        usage=usage if used == SAME else None if used is None else _used(used),
        cost=cost if price == SAME else _cost(price),
        billed=billed,
        upstream_id=upstream_id,
    )


def _used(facts: Facts) -> Usage:
    *buckets, meters, source, tier = facts
    return Usage(**dict(zip(BUCKETS, buckets, strict=True)), meters=meters, source=source, tier=tier)


def _cost(facts: Facts) -> Cost:
    picos, state, price_id, lines = facts
    return Cost(picos, state, price_id, tuple((meter, quantity, each) for meter, quantity, each in lines))


@lru_cache(maxsize=8)
def _day(days: int) -> str:
    return datetime.fromtimestamp(days * 86_400, UTC).date().isoformat()


def _json(value: object) -> str:
    if not value:  # as meters and tags nearly always: no more than a look
        return "{}" if value == {} else "[]"
    try:
        return orjson.dumps(value, default=dict).decode()
    except TypeError:
        # It is stricter: no lone surrogates, no integers beyond 64 bits.
        return json.dumps(value, default=dict)
