"""What happens in the gateway, for whoever is to hear of it: calls, budgets, keys, configurations."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import compress
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import orjson
from attrs import define, field, frozen

from qlens.audit import written
from qlens.call import Attempt, Cost, Receipt
from qlens.clock import Clock
from qlens.errors import frames
from qlens.money import usd
from qlens.usage import BUCKETS, Usage, counts_of

if TYPE_CHECKING:
    from prometheus_client import Counter

log = logging.getLogger("qlens")

RECEIPT = "qlens.receipt"

# https://github.com/cloudevents/spec/blob/v1.0.2/cloudevents/spec.md#type-system: what no attribute may contain.
_NO_TEXT = re.compile(
    "[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef"
    + "".join(chr(plane << 16 | last) for plane in range(17) for last in (0xFFFE, 0xFFFF))
    + "]"
)


@frozen(slots=False)  # like Usage
class Event:
    """Something that has happened: it is told once, and may be delivered again under the same id."""

    id: str
    type: str
    """What happened, as `qlens.<thing>` or `qlens.<thing>.<what became of it>`."""
    time: int
    """Unix nanoseconds."""
    tenant: str | None
    """Whose it is; None: the gateway's own."""
    subject: str
    """The id of what it happened to."""
    data: Mapping[str, Any] = field(hash=False)
    """Plain JSON values, never a secret and never what a client or a model wrote."""

    @classmethod
    def of_receipt(cls, receipt: Receipt) -> Event:
        """The event that a call has settled. Its id is the call's: whoever makes it makes the same."""
        tenant = receipt.caller.tenant
        return cls(receipt.id, RECEIPT, receipt.wall_ns, tenant, receipt.id, _receipt_data(receipt))

    def cloudevent(self, source: str) -> dict[str, Any]:
        """The event as CloudEvents 1.0 has it in JSON; `source` says which gateway it comes from, as a URI-reference.

        https://github.com/cloudevents/spec/blob/v1.0.2/cloudevents/formats/json-format.md
        """
        told: dict[str, Any] = {
            "specversion": "1.0",
            "id": self.id,
            "source": source,
            "type": self.type,
            "time": written(self.time),
            "datacontenttype": "application/json",
        }
        # Attributes must not be empty.
        if self.subject:
            told["subject"] = _attribute(self.subject)
        if self.tenant:
            told["tenant"] = _attribute(self.tenant)
        told["data"] = self.data
        return told

    def cloudevent_json(self, source: str) -> bytes:
        """The same as one line of JSON in UTF-8, in structured mode: `application/cloudevents+json`."""
        told = self.cloudevent(source)
        try:
            return orjson.dumps(told, default=dict)
        except TypeError:
            # It is stricter: no lone surrogates, no integers beyond 64 bits.
            return json.dumps(told, default=dict).encode()


Listener = Callable[[Event], None]
"""Takes an event on the event loop's thread: it must not wait, and keeps what it needs."""


@define(eq=False)
class Events:
    """Hands what is published to every listener.

    A plugin that listens holds `with gateway.events.listen(listener, name)` open for its lifespan.
    """

    clock: Clock
    _failures: Counter = field(repr=False)
    all_listen: bool = field(default=False, init=False)
    """Whether the plugins are open: who does not listen by now does not want to. Never in a command."""
    _listeners: list[tuple[Listener, str]] = field(factory=list, init=False)

    @contextmanager
    def listen(self, listener: Listener, plugin: str) -> Iterator[None]:
        """Hand events to a listener as long as this is open; one that is opened twice gets each once.

        `plugin` is the name of the instance. Two instances that follow each other over a reload share a listener when
        one adopts the other's, as they share what the listener puts events into.
        """
        entry = listener, plugin
        self._listeners.append(entry)
        try:
            yield
        finally:
            self._listeners.remove(entry)

    @property
    def is_heard(self) -> bool:
        """Whether anybody listens."""
        return bool(self._listeners)

    def publish(self, event: Event) -> None:
        """Tell an event; never waits and never raises. A listener that fails is logged and counted."""
        for listener, plugin in list(dict.fromkeys(self._listeners)):
            try:
                listener(event)
            except Exception as error:  # noqa: BLE001 - what listeners do is no matter of whom they listen to
                self._failures.labels(plugin, "listen").inc()
                log.error("%s failed to take an event %s: %s", plugin, event.type, frames(error))

    def announce(
        self,
        type: str,  # noqa: A002 - the word for it
        subject: str,
        data: Mapping[str, Any],
        *,
        tenant: str | None = None,
        id: str | None = None,  # noqa: A002
    ) -> None:
        """Publish what happens just now; `id` is for what several processes see, each by itself, and is one event."""
        if self._listeners:
            time = int(self.clock.time() * 1_000_000_000)
            self.publish(Event(id or uuid4().hex, type, time, tenant, subject, data))


def _attribute(text: str) -> str:
    """A text as an attribute may have it."""
    return text if text.isascii() and text.isprintable() else _NO_TEXT.sub("\ufffd", text)


# --- a receipt ---------------------------------------------------------------------------------


def _receipt_data(receipt: Receipt) -> dict[str, Any]:
    """A receipt under the names it has in `/v1/usage/calls`; money is decimal text, what was not used is left out."""
    caller, target, usage = receipt.caller, receipt.target, receipt.usage
    return {
        "id": receipt.id,
        "tenant": caller.tenant,
        "project": caller.project,
        "api_key_id": caller.key_id,
        "user_id": caller.subject,
        "operation": receipt.operation,
        "model": receipt.model,
        "provider": None if target is None else target.provider,
        "upstream_model": None if target is None else target.model,
        "outcome": receipt.outcome,
        "status": receipt.status,
        "error": receipt.error,
        "streamed": receipt.streamed,
        "cache": receipt.cache,
        "usage": _buckets(usage),
        "meters": usage.meters,
        "usage_source": usage.source,
        "service_tier": usage.tier,
        **_money(receipt.cost),
        "saved_usd": usd(receipt.saved_picos) if receipt.saved_picos else "0",
        "ttft_us": receipt.ttft_us,
        "total_us": receipt.total_us,
        "overhead_us": receipt.overhead_us,
        "bytes_out": receipt.bytes_out,
        "config_version": receipt.config_version,
        "tags": receipt.tags,
        "attempts": [_attempt_data(attempt) for attempt in receipt.attempts],
    }


def _attempt_data(attempt: Attempt) -> dict[str, Any]:
    """An attempt under the names it has there."""
    target, usage = attempt.target, attempt.usage
    return {
        "n": attempt.n,
        "kind": attempt.kind,
        "provider": target.provider,
        "model": target.model,
        "status": attempt.status,
        "error": attempt.error,
        "first_byte_us": _micros(attempt.started, attempt.first_byte),
        "total_us": _micros(attempt.started, attempt.ended),
        "upstream_id": attempt.upstream_id,
        "billed": attempt.billed,
        "usage": None if usage is None else {**_buckets(usage), **usage.meters, "source": usage.source},
        **_money(attempt.cost),
        "cost_lines": attempt.cost.lines,
    }


def _micros(began: float, ended: float | None) -> int | None:
    return None if ended is None else round((ended - began) * 1_000_000)


def _buckets(usage: Usage) -> dict[str, int]:
    counts = counts_of(usage)
    return dict(compress(zip(BUCKETS, counts, strict=True), counts))


def _money(cost: Cost) -> dict[str, Any]:
    picos = cost.picos
    return {"cost_usd": None if picos is None else usd(picos), "cost_state": cost.state, "price_id": cost.price_id}
