"""The plugin `webhooks`: who is sent what, how it is signed, and what becomes of what is not taken."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import re
import sqlite3
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from keepers import ACME, kept, sdk, settings
from receivers import OLD, SECRET, Taken, config, courier_of, endpoint, eventually, receiving, tell
from standardwebhooks import Webhook, WebhookVerificationError
from yamls import CHAT, HELLO

from qlens import Event, Health, StartupError
from qlens.testing import ManualClock, Running, check_plugin, running
from qlens.testing.objects import keeper
from qlens_plugins.observe.webhooks import Webhooks
from qlens_plugins.observe.webhooks.schedule import LATEST_SECONDS, next_try
from qlens_plugins.observe.webhooks.signing import signed

DAY = 86_400.0


def health(gateway: Running) -> Health:
    return gateway.gateway.health()["observe.webhooks"]


def turn(gateway: Running, clock: ManualClock, seconds: float) -> None:
    """Turn the hands, and let the courier see it at once."""
    clock.advance(seconds)
    courier_of(gateway).wake()


def metric(gateway: Running, name: str, **labels: str) -> float:
    return gateway.gateway.metrics.registry.get_sample_value(name, labels) or 0.0


def judged(taken: Taken, secret: str = SECRET) -> None:
    """Have the official package say whether a signature is right, at whatever time it was made."""
    sent = datetime.fromtimestamp(int(taken.headers["webhook-timestamp"]), UTC)
    expected = Webhook(secret).sign(taken.id, sent, taken.body.decode())
    assert expected in taken.headers["webhook-signature"].split(" ")


def test_it_keeps_the_contract_of_its_stage() -> None:
    check_plugin("observe", Webhooks)


# --- signatures ---------------------------------------------------------------------------------


@given(
    st.binary(min_size=24, max_size=64),
    st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1),
    st.text(),
)
def test_signatures_are_those_of_the_official_package(key: bytes, id_: str, body: str) -> None:
    body = body.encode("utf-8", "replace").decode()
    headers = signed([b"x" * 24, key], id_, int(time.time()), body.encode())
    judge = Webhook("whsec_" + base64.b64encode(key).decode())
    judge.verify(body, headers, json_parse=False)
    with pytest.raises(WebhookVerificationError):
        judge.verify(body + " ", headers, json_parse=False)


async def test_an_event_arrives_signed_as_a_cloudevent() -> None:
    async with receiving() as receiver:
        text = config(endpoint(receiver, headers={"Authorization": "Bearer sk-example-token"}), source="/qlens/eu")
        async with running(text) as gateway:
            tell(gateway, tenant="ácme")
            (taken,) = await receiver.reached(1)
    told = Webhook(SECRET).verify(taken.body, dict(taken.headers))
    assert (told["type"], told["tenant"], told["source"], told["data"]) == (
        *("qlens.budget.exhausted", "ácme", "/qlens/eu", {"n": 0}),
    )
    assert told["id"] == taken.id
    assert taken.headers["content-type"] == "application/cloudevents+json"
    assert taken.headers["authorization"] == "Bearer sk-example-token"


async def test_while_a_secret_is_replaced_both_sign() -> None:
    async with receiving() as receiver:
        plain = endpoint(receiver, events="qlens.budget.*")
        async with running(config({**plain, "secrets": [OLD]})) as gateway:
            tell(gateway)
            await receiver.reached(1)
            await gateway.reload(config({**plain, "secrets": [SECRET, OLD]}))
            tell(gateway)
            await receiver.reached(2)
            await gateway.reload(config(plain))
            tell(gateway)
            taken = await receiver.reached(3)
    known: list[list[str]] = []
    for each in taken:
        known.append([])
        for secret in (OLD, SECRET):
            with contextlib.suppress(WebhookVerificationError):
                Webhook(secret).verify(each.body, dict(each.headers))
                known[-1].append(secret)
    assert known == [[OLD], [OLD, SECRET], [SECRET]]


# --- who is sent what ---------------------------------------------------------------------------


async def test_each_endpoint_is_sent_its_types_of_its_tenants() -> None:
    async with receiving() as acme, receiving() as budgets, receiving() as everything:
        text = config(
            endpoint(acme, "acme", tenants=["acme", "acme-*"]),
            endpoint(budgets, "budgets", "qlens.budget.*"),
            endpoint(everything, "everything", "*"),
        )
        async with running(text) as gateway:
            for tenant in ("acme", "acme-eu", "acmee", None):
                for type_ in ("qlens.budget.threshold", "qlens.key.created"):
                    tell(gateway, tenant=tenant, type_=type_)
            await everything.reached(8)
            await eventually(lambda: len(acme.got) == len(budgets.got) == 4)
        assert {(each.json()["tenant"]) for each in acme.got} == {"acme", "acme-eu"}
        assert {each.json()["type"] for each in budgets.got} == {"qlens.budget.threshold"}


async def test_the_receipt_of_a_call_is_an_event_and_a_refused_call_is_none() -> None:
    async with receiving() as receiver, running(config(endpoint(receiver, events="qlens.receipt"))) as gateway:
        assert (await gateway.post(CHAT, {**HELLO, "model": "unknown"})).status == 404
        answer = await gateway.post(CHAT, HELLO)
        (taken,) = await receiver.reached(1)
        assert taken.id == answer.headers["x-request-id"]
        assert taken.json()["data"]["outcome"] == "complete"


async def test_a_batch_that_is_over_is_an_event_of_one_id_however_often_one_asks() -> None:
    async with receiving() as receiver, keeper() as fake:
        told = yaml.safe_load(config(endpoint(receiver, events="qlens.receipt")))["pipeline"]["observe"]
        text = settings(fake, fake).replace("cost: []", f"cost: []\n  observe: {told}")
        async with kept(text) as gateway, sdk(gateway) as client:
            file = await client.files.create(file=("in.jsonl", b"{}"), purpose="batch", extra_body={"model": "first"})
            made = await client.batches.create(input_file_id=file.id, endpoint="/v1/responses", completion_window="24h")
            ended = int(time.time()) - 3600
            used = {"input_tokens": 1000, "output_tokens": 100, "total_tokens": 1100}
            fake.complete(list(fake.batches)[-1], b"{}\n", completed_at=ended, model="upstream", usage=used)
            for count in (4, 6):  # the file and the batch, then each time the call that asks, and what it used
                assert (await gateway.get(f"/v1/batches/{made.id}", key=ACME)).status == 200
                taken = await receiver.reached(count)
    over = [each for each in taken if each.json()["data"]["operation"] == "batch_responses"]
    assert len(over) == 2
    assert len({each.id for each in over}) == 1
    assert over[0].json()["tenant"] == "acme"
    assert over[0].json()["data"]["usage"] == {"input": 1000, "output": 100}


# --- what is not taken --------------------------------------------------------------------------


@given(st.integers(1, 1000), st.floats(0, DAY), st.floats(0, 1), st.none() | st.floats(0, 1e9))
def test_the_next_try_is_later_and_never_after_the_end(
    attempts: int, passed: float, chance: float, asked: float | None
) -> None:
    due = next_try(attempts, passed, DAY, asked, chance=lambda: chance)
    if passed >= DAY:
        assert due is None
    else:
        assert due is not None
        assert passed < due <= min(DAY, passed + LATEST_SECONDS)
        assert due == DAY or due >= passed + min(asked or 0, LATEST_SECONDS)


def test_tries_come_further_and_further_apart_for_a_day() -> None:
    now, times = 0.0, [0.0]
    while (due := next_try(len(times), now, DAY, chance=lambda: 0.5)) is not None:
        times.append(now := due)
    assert times[1:5] == [5, 20, 65, 200]
    assert times[-1] == DAY
    assert 12 < len(times) < 20


async def test_what_fails_is_tried_again_under_the_same_id_until_the_day_is_over_and_can_be_sent_again(
    tmp_path: Path,
) -> None:
    clock = ManualClock()
    async with receiving(status=500) as receiver:
        text = config(endpoint(receiver), url=f"sqlite:///{tmp_path}/hooks.db")
        async with running(text, clock=clock) as gateway:
            tell(gateway)
            await receiver.reached(1)
            for hours in range(1, 7):
                await eventually(lambda: not courier_of(gateway)._flying and not courier_of(gateway)._ended)
                turn(gateway, clock, 4 * 3600)
                await receiver.reached(hours + 1)
            await eventually(lambda: metric(gateway, "qlens_webhooks_dead_total", endpoint="billing") == 1)
            turn(gateway, clock, 2 * DAY)
            assert len({each.id for each in receiver.got}) == 1
            assert len({each.headers["webhook-timestamp"] for each in receiver.got}) == 7
            for each in receiver.got:
                judged(each)
            assert "last failure: answered with status 500" in health(gateway).detail
            receiver.status = 200
            tell(gateway)  # a dead one does not hold up those that come
            await receiver.reached(8)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ({"status": 302, "headers": {"location": "https://127.0.0.1/"}}, "redirects are not followed"),
        ({"status": 429, "headers": {"retry-after": "3600"}}, "answered with status 429"),
    ],
)
async def test_an_endpoint_that_does_not_take_an_event_is_left_alone_as_long_as_it_wants(
    answer: dict[str, Any], said: str, tmp_path: Path
) -> None:
    clock = ManualClock()
    async with receiving(**answer) as receiver:
        text = config(endpoint(receiver), url=f"sqlite:///{tmp_path}/hooks.db")
        async with running(text, clock=clock) as gateway:
            tell(gateway)
            await eventually(lambda: said in courier_of(gateway).problems.get("billing", ""))
            with contextlib.closing(sqlite3.connect(tmp_path / "hooks.db")) as database:
                rows: list[float] = []
                while not rows:
                    rows = [due for (due,) in database.execute("SELECT due FROM webhook_deliveries WHERE attempts = 1")]
                    await asyncio.sleep(0.01)
            wait = 3600 if receiver.status == 429 else 5
            assert 0.8 * wait <= rows[0] - clock.now <= 1.2 * wait


async def test_what_is_gone_is_given_up_at_once() -> None:
    async with receiving(status=410) as receiver, running(config(endpoint(receiver))) as gateway:
        tell(gateway)
        await eventually(lambda: metric(gateway, "qlens_webhooks_dead_total", endpoint="billing") == 1)
        assert len(receiver.got) == 1


async def test_a_clock_that_goes_back_holds_nothing_up(tmp_path: Path) -> None:
    clock = ManualClock()
    async with receiving(status=500) as receiver, running(config(endpoint(receiver)), clock=clock) as gateway:
        tell(gateway)
        await receiver.reached(1)
        await eventually(lambda: not courier_of(gateway)._flying and not courier_of(gateway)._ended)
        receiver.status = 200
        turn(gateway, clock, -2 * DAY)
        await receiver.reached(2)


# --- R35: receivers that hang or fail -----------------------------------------------------------


async def test_a_receiver_that_hangs_costs_its_own_events_and_nobody_elses() -> None:
    async with receiving(hangs=True) as hanging, receiving(status=500) as failing, receiving() as good:
        text = config(
            endpoint(hanging, "hanging"),
            endpoint(failing, "failing"),
            endpoint(good, "good"),
            concurrency=3,
            queue_size=20,
            timeout_seconds=1,
        )
        async with running(text) as gateway:
            for number in range(1, 7):
                answers = await asyncio.gather(*(gateway.post(CHAT, HELLO) for _ in range(10)))
                assert {answer.status for answer in answers} == {200}
                await good.reached(10 * number)
            assert (hanging.most_busy, failing.most_busy <= 3) == (3, True)
            await eventually(lambda: sum(courier_of(gateway).lost.values()) >= 60)
            lost = metric(gateway, "qlens_webhooks_lost_total", endpoint="hanging", reason="queue_full")
            assert lost == 40
            told = health(gateway)
            assert not told.ok
            assert re.search("hanging: .*40 lost because there was no room", told.detail)
            assert "good: " not in told.detail
            await eventually(lambda: metric(gateway, "qlens_webhooks_delivered_total", endpoint="good") == 60)


async def test_a_disk_that_takes_nothing_costs_no_call(monkeypatch: pytest.MonkeyPatch) -> None:
    async with receiving() as receiver, running(config(endpoint(receiver))) as gateway:
        spool = courier_of(gateway)._spool
        assert spool is not None
        spool.most_bytes = 10
        assert (await gateway.post(CHAT, HELLO)).status == 200
        await eventually(lambda: courier_of(gateway).lost == {"billing": 1})
        assert metric(gateway, "qlens_webhooks_lost_total", endpoint="billing", reason="spool") == 1
        spool.most_bytes = 10_000_000
        tell(gateway)
        await receiver.reached(1)


async def test_a_file_that_is_locked_holds_events_up_and_loses_none(tmp_path: Path) -> None:
    async with receiving() as receiver:
        text = config(endpoint(receiver), url=f"sqlite:///{tmp_path}/hooks.db")
        async with running(text) as gateway:
            with contextlib.closing(sqlite3.connect(tmp_path / "hooks.db", isolation_level=None)) as other:
                other.execute("BEGIN IMMEDIATE")
                tell(gateway, 50)
                await eventually(lambda: bool(courier_of(gateway).trouble))
                assert (await gateway.post(CHAT, HELLO)).status == 200
                other.execute("ROLLBACK")
            assert len(await receiver.reached(51)) == 51
            await eventually(lambda: not courier_of(gateway).trouble)


async def test_what_comes_while_the_file_is_gone_is_delivered_after_the_next_start(tmp_path: Path) -> None:
    async with receiving() as receiver:
        text = config(endpoint(receiver, events="qlens.key.*"), url=f"sqlite:///{tmp_path}/hooks.db")
        async with running(text) as gateway:
            tell(gateway, type_="qlens.key.created")
            await receiver.reached(1)
            (tmp_path / "hooks.db").rename(tmp_path / "elsewhere.db")
            await eventually(lambda: not health(gateway).ok)
            tell(gateway, 5, type_="qlens.key.created")
            assert (await gateway.post(CHAT, HELLO)).status == 200
            assert len(receiver.got) == 1
        async with running(text):
            assert len({each.id for each in await receiver.reached(6)}) == 6


# --- restarts, reloads, several processes --------------------------------------------------------


async def test_what_was_under_way_at_the_end_is_delivered_after_the_start_under_the_same_id(tmp_path: Path) -> None:
    clock = ManualClock()
    async with receiving(hangs=True) as receiver:
        text = config(endpoint(receiver), url=f"sqlite:///{tmp_path}/hooks.db", timeout_seconds=0.5)
        async with running(text, clock=clock) as gateway:
            tell(gateway, 30)
            await receiver.reached(3)
        before = {each.id for each in receiver.got}
        receiver.hangs = False
        receiver.got.clear()
        clock.advance(10)
        async with running(text, clock=clock):
            await eventually(lambda: len({each.id for each in receiver.got}) == 30, 8)
            assert before <= {each.id for each in receiver.got}


async def test_two_gateways_with_one_file_deliver_each_event_once(tmp_path: Path) -> None:
    async with receiving() as receiver:
        text = config(endpoint(receiver), url=f"sqlite:///{tmp_path}/hooks.db")
        async with running(text) as one, running(text) as two:
            for _ in range(5):
                tell(one, 10)
                tell(two, 10)
                await asyncio.sleep(0.03)
            await receiver.reached(100)
            await eventually(lambda: not courier_of(one)._flying and not courier_of(two)._flying)
        assert len(receiver.got) == len({each.id for each in receiver.got}) == 100


@contextlib.asynccontextmanager
async def telling(gateway: Running) -> AsyncIterator[list[str]]:
    """Publish events all the time."""
    told: list[str] = []

    async def work() -> None:
        while True:
            told.append(f"event-{len(told)}")
            now = gateway.gateway.clock.time()
            gateway.gateway.events.publish(Event(told[-1], "qlens.key.created", int(now * 1e9), "acme", "key", {}))
            await asyncio.sleep(0.002)

    task = asyncio.create_task(work())
    try:
        yield told
    finally:
        task.cancel()


async def test_reloads_lose_nothing_and_double_nothing(tmp_path: Path) -> None:
    async with receiving() as receiver:
        url, keys = f"sqlite:///{tmp_path}/hooks.db", endpoint(receiver, events="qlens.key.*")
        async with running(config(keys, url=url)) as gateway:
            async with telling(gateway) as told:
                for number in range(10):
                    await gateway.reload(config(keys, url=url, concurrency=number + 1))
            await receiver.reached(len(told))
            await eventually(lambda: not courier_of(gateway)._flying)
            assert sorted(each.id for each in receiver.got) == sorted(told)


async def test_a_reload_that_is_refused_changes_nothing(tmp_path: Path) -> None:
    async with receiving() as receiver:
        good = endpoint(receiver, events="qlens.key.*")
        async with running(config(good, url=f"sqlite:///{tmp_path}/hooks.db")) as gateway:
            text = config({**good, "tenants": ["nobody"]}, url=f"sqlite:///{tmp_path}/hooks.db")
            broken = {"plugin": "webhooks", "name": "broken", "url": f"sqlite:///{tmp_path}/no/x.db"}
            found = yaml.safe_load(text)
            found["pipeline"]["observe"].append({**found["pipeline"]["observe"][0], **broken})
            with pytest.raises(StartupError, match="does not exist"):
                await gateway.reload(yaml.safe_dump(found))
            tell(gateway, type_="qlens.key.created")
            await receiver.reached(1)


async def test_a_reload_that_allows_less_holds_from_then_on(tmp_path: Path) -> None:
    async with receiving() as receiver:
        url, port = f"sqlite:///{tmp_path}/hooks.db", receiver.port
        there = {**endpoint(receiver, events="qlens.key.*"), "url": f"http://localhost:{port}/"}
        async with running(config(there, url=url, allow=["127.0.0.0/8", "::1/128"])) as gateway:
            tell(gateway, type_="qlens.key.created")
            await receiver.reached(1)
            await gateway.reload(config(there, url=url, allow=["10.0.0.0/8"]))
            tell(gateway, type_="qlens.key.created")
            await eventually(lambda: "is not a public address" in courier_of(gateway).problems.get("billing", ""))
            assert len(receiver.got) == 1


# --- what the file may not say ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"url": "https://2130706433/"}, "127.0.0.1 is not a public address, and in no network that `allow` lists"),
        ({"url": "http://hooks.example.com/"}, "must begin with https://"),
        ({"url": "https://hooks.example.com:8443/"}, "port 8443 is none of `ports`"),
        ({"url": "https://user@hooks.example.com/"}, "without user"),
        ({"secrets": []}, "secrets"),
        ({"secrets": [SECRET, OLD, SECRET]}, "secrets"),
        ({"secrets": ["whsec_" + "c2hvcnQ="]}, "24 to 64 random bytes"),
        ({"secrets": [SECRET.removeprefix("whsec_")]}, "must be whsec_"),
        ({"headers": {"webhook-id": "mine"}}, "is set by the gateway itself"),
        ({"name": "a b"}, "name"),
        ({"events": []}, "events"),
        ({"tenants": []}, "tenants"),
    ],
)
async def test_a_wrong_endpoint_stops_the_start(change: dict[str, Any], said: str) -> None:
    plain = {"name": "a", "url": "https://hooks.example.com/", "secrets": [SECRET], "events": ["*"]}
    with pytest.raises(StartupError) as caught:
        async with running(config({**plain, **change}, allow=[])):
            pass
    assert said in str(caught.value)
    assert SECRET not in str(caught.value)


async def test_two_endpoints_need_two_names() -> None:
    plain = {"name": "a", "url": "https://hooks.example.com/", "secrets": [SECRET], "events": ["*"]}
    with pytest.raises(StartupError, match="two endpoints are called 'a'"):
        async with running(config(plain, plain)):
            pass


async def test_a_name_that_leads_to_an_inner_address_is_not_reached() -> None:
    async with receiving() as receiver:
        text = config(
            {**endpoint(receiver), "url": f"https://localhost:{receiver.port}/"}, allow=[], ports=[receiver.port]
        )
        async with running(text) as gateway:
            tell(gateway)
            await eventually(lambda: "is not a public address" in courier_of(gateway).problems.get("billing", ""))
        assert not receiver.got
