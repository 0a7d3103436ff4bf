"""What operators change is noted, in one line each or by whoever keeps it, and otherwise does not happen."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlens import Actor, AuditEntry, Secret, Unavailable
from qlens.audit import LONGEST_LINE, Audit, line
from qlens.testing import ManualClock

SAID = "no space left on sk-example-" + "secret"
ACTOR = Actor("joe", "acme", "key-1", "api_keys", "10.0.0.1", "call-1")


class Kept:
    def __init__(self) -> None:
        self.entries: list[AuditEntry] = []

    async def keep(self, entry: AuditEntry) -> None:
        self.entries.append(entry)


class Full:
    async def keep(self, entry: AuditEntry) -> None:
        raise OSError(SAID)


async def test_without_a_sink_an_action_is_one_line_of_json_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "qlens.audit")
    entry = await Audit(ManualClock()).record(ACTOR, "budgets.change", "b1", before={"usd": "1"}, tenant="acme")
    (record,) = caplog.records
    assert json.loads(record.getMessage()) == entry.row()
    assert entry.row() == {
        "id": entry.id,
        "at": "2027-01-15T08:00:00.000000Z",
        "action": "budgets.change",
        "object": "b1",
        "tenant": "acme",
        "outcome": "done",
        "request_id": "call-1",
        "before": {"usd": "1"},
        "after": None,
        "actor": {"subject": "joe", "tenant": "acme", "key_id": "key-1", "by": "api_keys", "peer": "10.0.0.1"},
    }


async def test_every_sink_gets_it_once_but_the_one_that_writes_it_itself(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "qlens.audit")
    audit, one, two = Audit(ManualClock()), Kept(), Kept()
    with audit.into(one), audit.into(two), audit.into(one):
        first = await audit.record(ACTOR, "keys.create", "k")
        await audit.record(ACTOR, "keys.create", "k", but=two)
    assert (len(one.entries), two.entries) == (2, [first])
    with audit.into(one):
        await audit.record(ACTOR, "keys.create", "k", but=one)
    assert len(one.entries) == 2
    assert not caplog.records


async def test_what_a_sink_cannot_keep_raises_and_says_nothing_of_its_text(caplog: pytest.LogCaptureFixture) -> None:
    audit = Audit(ManualClock())
    with audit.into(Full()), pytest.raises(Unavailable) as caught:
        await audit.record(ACTOR, "keys.create", "k")
    assert (caught.value.status, caught.value.code) == (503, "audit_unavailable")
    assert SAID not in caught.value.message + caplog.text
    assert "keys.create of k cannot be noted: OSError" in caplog.text


async def test_values_are_plain_and_secrets_stay_hidden() -> None:
    east = timezone(timedelta(hours=1))
    after = {
        "key": Secret("sk-example-secret"),
        "at": datetime(2027, 1, 1, 1, tzinfo=east),
        "utc": datetime(2027, 1, 1, tzinfo=UTC),
        "roles": frozenset({"b", "a"}),
        "models": ("x",),
    }
    entry = await Audit(ManualClock()).record(ACTOR, "keys.create", "k", after=after)
    assert entry.after == {
        "key": "***",
        "at": "2027-01-01T00:00:00Z",
        "utc": "2027-01-01T00:00:00Z",
        "roles": ["a", "b"],
        "models": ["x"],
    }


@given(st.text(), st.text(max_size=20_000))
def test_a_line_is_one_line_of_bounded_ascii(subject: str, value: str) -> None:
    entry = AuditEntry("id", 0, Actor(subject[:200]), "a.b", "o", None, None, {"v": value})
    text = line(entry)
    assert text.isascii()
    assert text.isprintable()
    assert len(text) <= LONGEST_LINE
    assert json.loads(text)["actor"]["subject"] == subject[:200]
