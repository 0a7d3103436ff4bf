"""Who changed what: actions of operators, handed to whoever keeps them; what cannot be noted does not happen."""

from __future__ import annotations

import json
import logging
import os
import pwd
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, Literal, Protocol
from uuid import uuid4

from attrs import define, field, frozen

from qlens.call import Call
from qlens.clock import Clock
from qlens.errors import CallError, Unavailable, frames

log = logging.getLogger("qlens")
lines = logging.getLogger("qlens.audit")
"""Where actions go that nothing else keeps: one line of JSON each."""

LONGEST_LINE = 16 * 1024

AuditOutcome = Literal["done", "refused", "failed"]


@frozen
class Actor:
    """Who acts: a caller of the admin API, or somebody at the command line."""

    subject: str
    tenant: str | None = None
    """None: somebody at the command line, who belongs to none."""
    key_id: str | None = None
    by: str = "command line"
    """The auth plugin instance that vouches for the actor."""
    peer: str | None = None
    call: str | None = None
    """The id of the call, as in x-request-id."""

    @classmethod
    def of(cls, call: Call) -> Actor:
        """The authenticated caller of a call."""
        caller = call.known
        return cls(caller.subject, caller.tenant, caller.key_id, caller.by, call.peer, call.id)

    @classmethod
    def user(cls) -> Actor:
        """The user whose command this is."""
        try:
            return cls(pwd.getpwuid(os.getuid()).pw_name)  # what the environment says, anybody can set
        except KeyError:  # a number that has no name, as in a container
            return cls(f"uid {os.getuid()}")


@frozen
class AuditEntry:
    """One action: who did what to which object, what it was before and after, and how that ended."""

    id: str
    """Unique: a sink that is handed an entry twice keeps it once."""
    wall_ns: int
    actor: Actor
    action: str
    """What was done, as `<objects>.<verb>`: `keys.create`."""
    object: str
    """The id of what it was done to."""
    tenant: str | None
    """Whose object it is; None: the gateway's own."""
    before: Mapping[str, Any] | None = field(default=None, hash=False)
    after: Mapping[str, Any] | None = field(default=None, hash=False)
    """Plain JSON values, never a secret."""
    outcome: AuditOutcome = "done"

    def row(self) -> dict[str, Any]:
        """The entry as JSON has it; times are RFC 3339 in UTC."""
        actor = self.actor
        return {
            "id": self.id,
            "at": written(self.wall_ns),
            "action": self.action,
            "object": self.object,
            "tenant": self.tenant,
            "outcome": self.outcome,
            "actor": {
                "subject": actor.subject,
                "tenant": actor.tenant,
                "key_id": actor.key_id,
                "by": actor.by,
                "peer": actor.peer,
            },
            "request_id": actor.call,
            "before": self.before,
            "after": self.after,
        }


class AuditSink(Protocol):
    """What keeps entries for good."""

    async def keep(self, entry: AuditEntry) -> None:
        """Keep an entry, append-only; raise when that is not certain."""


@define(eq=False)
class Audit:
    """Takes actions from plugins and hands each to every sink.

    A plugin that keeps entries holds `with gateway.audit.into(sink)` open for its lifespan. Without any they are lines
    of the log `qlens.audit`.
    """

    clock: Clock
    _sinks: list[AuditSink] = field(factory=list, init=False)

    @contextmanager
    def into(self, sink: AuditSink) -> Iterator[None]:
        """Hand entries to a sink as long as this is open; one that is opened twice gets each once."""
        self._sinks.append(sink)
        try:
            yield
        finally:
            self._sinks.remove(sink)

    async def record(
        self,
        who: Call | Actor,
        action: str,
        object: str,  # noqa: A002 - the word for it
        *,
        before: Mapping[str, Any] | None = None,
        after: Mapping[str, Any] | None = None,
        tenant: str | None = None,
        outcome: AuditOutcome = "done",
        but: AuditSink | None = None,
    ) -> AuditEntry:
        """Note an action, before it takes effect; raises Unavailable when it cannot be noted: then do not do it.

        `tenant` is whose object it is. A plugin whose own database is the sink names it as `but`, and writes the entry
        that is returned in the transaction that makes the change.
        """
        actor = who if isinstance(who, Actor) else Actor.of(who)
        wall_ns = int(self.clock.time() * 1_000_000_000)
        entry = AuditEntry(
            uuid4().hex, wall_ns, actor, action, object, tenant, _plain(before), _plain(after), outcome
        )  # fmt: skip
        sinks = list(dict.fromkeys(self._sinks))
        if not sinks and but is None:
            lines.info("%s", line(entry))
        for sink in sinks:
            if sink is not but:
                await _kept(sink, entry)
        return entry


async def _kept(sink: AuditSink, entry: AuditEntry) -> None:
    try:
        await sink.keep(entry)
    except CallError:
        raise
    except Exception as error:
        log.error("audit: %s of %s cannot be noted: %s", entry.action, entry.object, frames(error))
        raise Unavailable(
            "This change cannot be noted in the audit log at present, so it was not made. Please try again later.",
            code="audit_unavailable",
        ) from error


def line(entry: AuditEntry) -> str:
    """An entry as one line of ASCII: nothing in it can begin another line."""
    row = entry.row()
    text = json.dumps(row)
    if len(text) > LONGEST_LINE:
        text = json.dumps({**row, "before": None, "after": None, "cut": True})
    return text


def _plain(value: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """A copy in JSON's own types. Whatever is none of them is said by its `str`, which hides a Secret."""
    if value is None:
        return None
    copy: dict[str, Any] = json.loads(json.dumps(dict(value), default=_said))
    return copy


def _said(value: object) -> object:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, set | frozenset):
        return sorted(value, key=str)
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat().replace("+00:00", "Z")
    return str(value)


def written(wall_ns: int) -> str:
    """Unix nanoseconds as answers have them: RFC 3339, in UTC."""
    seconds, fraction = divmod(wall_ns, 1_000_000_000)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(seconds))}.{fraction // 1000:06d}Z"
