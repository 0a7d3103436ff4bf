"""What is told when a key has been made or changed: from its entry in the audit log, once that is in force."""

from __future__ import annotations

from qlens import AuditEntry, Event

_TYPES = {
    "keys.create": "qlens.key.created",
    "keys.change": "qlens.key.changed",
    "keys.rotate": "qlens.key.rotated",
    "keys.revoke": "qlens.key.revoked",
}
_LEFT_OUT = frozenset({"object", "hint", "rotated_from"})
"""What there is of a key's secret stays where keys are managed."""


def event_of(entry: AuditEntry) -> Event:
    """What is told, under the entry's id: what a key is now, which of that has changed, and who did it."""
    before, after = entry.before or {}, entry.after or {}
    data = {name: value for name, value in after.items() if name not in _LEFT_OUT}
    data["changed"] = sorted(name for name in data if before and data[name] != before.get(name))
    data["actor"], data["request_id"] = entry.actor.subject, entry.actor.call
    return Event(entry.id, _TYPES[entry.action], entry.wall_ns, entry.tenant, entry.object, data)
