"""What happens is told to all who listen, as CloudEvents have it, and nobody who tells it hears of their troubles."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from typing import Any

import orjson
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from keystores import key_of, made, send, stored

from qlens import Event, StartupError
from qlens.events import Events
from qlens.metrics import Metrics
from qlens.testing import ManualClock, running
from qlens.testing.processes import free_port

PLAIN = """
pipeline: {auth: [{plugin: anonymous}]}
providers: {echo: {plugin: echo}}
models: {gpt-4o-mini: {max_output_tokens: 1000, targets: [{provider: echo, model: gpt-4o-mini}]}}
"""
CHAT = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "the secret plan"}]}
ATTRIBUTES = {"specversion", "id", "source", "type", "time", "datacontenttype", "subject", "tenant"}
SAID = "sk-example-" + "secret"


def new_events() -> Events:
    metrics = Metrics()
    return Events(ManualClock(), metrics.counter("failures_total", "Failures.", ("plugin", "hook")))


def failures(events: Events) -> dict[str, float]:
    (family,) = events._failures.collect()
    return {sample.labels["plugin"]: sample.value for sample in family.samples if sample.name.endswith("_total")}


def event(**changed: Any) -> Event:
    plain = {"id": "e1", "type": "qlens.key.created", "time": 0, "tenant": "acme", "subject": "key-1", "data": {"a": 1}}
    return Event(**{**plain, **changed})


def test_an_event_is_a_cloudevent_with_all_that_the_specification_asks_for() -> None:
    told = json.loads(event(time=1_800_000_000_123_456_789).cloudevent_json("/qlens/eu"))
    assert told == {
        "specversion": "1.0",
        "id": "e1",
        "source": "/qlens/eu",
        "type": "qlens.key.created",
        "subject": "key-1",
        "time": "2027-01-15T08:00:00.123456Z",
        "datacontenttype": "application/json",
        "tenant": "acme",
        "data": {"a": 1},
    }
    assert set(told) - {"data"} == ATTRIBUTES


@given(
    tenant=st.none() | st.text(st.characters()),
    subject=st.text(st.characters()),
    number=st.integers(),
    text=st.text(st.characters()),
)
@example(tenant="\ud800\x00\uffff\U0010fffe", subject="", number=2**64, text="\ud800")
def test_whatever_a_tenant_is_called_the_attributes_are_valid_and_the_data_comes_through(
    tenant: str | None, subject: str, number: int, text: str
) -> None:
    written = event(tenant=tenant, subject=subject, data={"number": number, "text": text}).cloudevent_json("/qlens")
    told = json.loads(written)
    assert told["data"] == {"number": number, "text": text}
    for name, value in told.items():
        assert re.fullmatch("[a-z0-9]{1,20}", name)
        assert name == "data" or (isinstance(value, str) and value)
        assert name == "data" or not re.search("[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]", value)
    assert ("tenant" in told, "subject" in told) == (bool(tenant), bool(subject))
    assert b"\n" not in written


def test_every_listener_hears_each_once_as_long_as_it_listens() -> None:
    events = new_events()
    one: list[Event] = []
    two: list[Event] = []
    events.announce("qlens.test", "nobody hears it", {})
    with events.listen(one.append, "one"):
        with events.listen(two.append, "two"), events.listen(one.append, "one"):
            events.announce("qlens.test", "s", {"n": 1}, tenant="acme")
        events.announce("qlens.test", "s", {"n": 2}, id="given")
    events.announce("qlens.test", "s", {"n": 3})
    assert [event.data["n"] for event in one] == [1, 2]
    assert two == one[:1]
    assert (one[0].tenant, one[0].time, len(one[0].id)) == ("acme", 1_800_000_000_000_000_000, 32)
    assert one[1].id == "given"


def test_a_listener_that_fails_is_counted_and_the_others_hear_it_still(caplog: pytest.LogCaptureFixture) -> None:
    events = new_events()
    heard: list[Event] = []

    def broken(event: Event) -> None:
        raise RuntimeError(SAID)

    with events.listen(broken, "broken"), events.listen(heard.append, "fine"):
        events.publish(event())
        events.publish(event())
    assert len(heard) == 2
    assert failures(events) == {"broken": 2}
    assert "broken failed to take an event qlens.key.created: RuntimeError" in caplog.text
    assert SAID not in caplog.text


def test_who_hears_of_an_event_may_stop_to_listen() -> None:
    events = new_events()
    heard: list[str] = []
    listening: Any = None

    def once(event: Event) -> None:
        heard.append(event.id)
        listening.__exit__(None, None, None)

    listening = events.listen(once, "once")
    listening.__enter__()
    events.publish(event())
    events.publish(event())
    assert heard == ["e1"]


async def test_a_receipt_says_all_but_what_was_said() -> None:
    async with running(PLAIN) as gateway:
        answer = await gateway.post("/v1/chat/completions", CHAT)
        (receipt,) = await gateway.settled(1)
    told = Event.of_receipt(receipt)
    assert told == Event.of_receipt(receipt)
    assert (told.id, told.type, told.tenant, told.subject) == (receipt.id, "qlens.receipt", "anonymous", receipt.id)
    written = told.cloudevent_json("/qlens")
    assert b"plan" not in written
    assert answer.json()["choices"][0]["message"]["content"].encode() not in written
    data = orjson.loads(written)["data"]
    assert data["usage"] == {"input": receipt.usage.input, "output": receipt.usage.output}
    assert (data["model"], data["provider"], data["outcome"], data["status"]) == (
        "gpt-4o-mini",
        "echo",
        "complete",
        200,
    )
    assert [attempt["provider"] for attempt in data["attempts"]] == ["echo"]


async def test_a_receipt_is_told_as_the_usage_api_shows_it() -> None:
    """But for when it came, which is the event's own time."""
    text = f"""
pipeline:
  auth: [{{plugin: anonymous, roles: [admin]}}]
  cost: [{{plugin: prices, table: [{{model: m, input: 1, output: 2}}]}}, {{plugin: ledger, flush_seconds: 0.02}}]
providers: {{echo: {{plugin: echo}}, gone: {{plugin: openai, base_url: "http://127.0.0.1:{free_port()}/v1"}}}}
models:
  gpt-4o-mini: {{max_output_tokens: 9, targets: [{{provider: gone, model: m}}], fallbacks: [other]}}
  other: {{max_output_tokens: 9, targets: [{{provider: echo, model: m}}]}}
"""
    async with running(text) as gateway:
        await gateway.post("/v1/chat/completions", CHAT)
        (receipt,) = await gateway.settled(1)
        async with asyncio.timeout(10):
            while (shown := await gateway.get(f"/v1/usage/calls/{receipt.id}")).status == 404:
                await asyncio.sleep(0.02)
    told = orjson.loads(Event.of_receipt(receipt).cloudevent_json("/qlens"))
    expected = {key: value for key, value in shown.json().items() if key not in {"object", "created_at", "time"}}
    assert told["data"] == expected
    assert told["time"] == shown.json()["time"]
    assert [attempt["billed"] for attempt in expected["attempts"]] == [False, True]


async def test_configurations_that_are_taken_and_refused_are_told_without_what_stands_in_them(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.CRITICAL)
    heard: list[Event] = []
    async with running(PLAIN) as gateway:
        first = gateway.gateway.config.version
        with gateway.gateway.events.listen(heard.append, "test"):
            await gateway.reload(PLAIN.replace("1000", "2000"))
            second = gateway.gateway.config.version
            with pytest.raises(StartupError):
                await gateway.reload(PLAIN.replace("echo: {plugin: echo}", f"echo: {{plugin: {SAID}}}"))
    assert first != second
    assert [(event.type, event.subject) for event in heard] == [
        ("qlens.config.reloaded", second),
        ("qlens.config.rejected", second),
    ]
    assert heard[1].data["faults"] == ["qlens.yaml:3 providers.echo"]
    assert SAID not in repr(heard)


async def test_what_becomes_of_keys_is_told_once_it_is_in_force_and_without_their_secrets() -> None:
    heard: list[Event] = []
    async with stored() as gateway:
        with gateway.gateway.events.listen(heard.append, "test"):
            key = await made(gateway, name="one")
            path = f"/admin/keys/{key['id']}"
            await send(gateway, "PATCH", path, {"models": ["gpt-4o"]})
            await send(gateway, "PATCH", path, {"models": ["gpt-4o"]})  # changes nothing
            await send(gateway, "PATCH", path, {"roles": ["admin"]}, key=key_of("tenant_operator"))  # refused
            rotated = (await send(gateway, "POST", f"{path}/rotate", {})).json()
            await send(gateway, "DELETE", path)
        entries = {row["id"]: row for row in (await send(gateway, "GET", "/admin/audit")).json()["data"]}
    assert [event.type.rpartition(".")[2] for event in heard] == ["created", "changed", "rotated", "revoked"]
    for event in heard:
        assert (event.tenant, event.subject, event.data["id"]) == ("acme", key["id"], key["id"])
        assert entries[event.id]["outcome"] == "done"
        assert event.data["request_id"] == entries[event.id]["request_id"]
        told = event.cloudevent_json("/qlens").decode()
        for secret in (key["key"], rotated["key"], key["hint"], rotated["hint"], "hint"):
            assert secret not in told
    assert [event.data["changed"] for event in heard[:2]] == [[], ["models"]]
    assert [event.data["state"] for event in heard] == ["active", "active", "active", "revoked"]


async def test_budgets_tell_their_thresholds_and_that_they_are_spent_once_a_window() -> None:
    heard: list[Event] = []
    budgets = "{plugin: budgets, limits: [{per: tenant, usd: 0.000001, hard: false, warn_at: [50, 100]}]}"
    priced = f"[{{plugin: prices, table: [{{model: gpt-4o-mini, input: 0, output: 1}}]}}, {budgets}]"
    text = PLAIN.replace("auth:", f"cost: {priced}, auth:")
    async with running(text) as gateway:
        with gateway.gateway.events.listen(heard.append, "test"):
            for count in range(3):
                await gateway.post("/v1/chat/completions", CHAT)
                await gateway.settled(count + 1)
    assert [(event.type, event.data["percent"]) for event in heard] == [
        ("qlens.budget.threshold", 50),
        ("qlens.budget.exhausted", 100),
    ]
    assert len({event.id for event in heard}) == 2
    for event in heard:
        assert (event.tenant, event.subject) == ("anonymous", event.data["id"])
        assert (event.data["limit_usd"], event.data["hard"]) == ("0.000001", False)
