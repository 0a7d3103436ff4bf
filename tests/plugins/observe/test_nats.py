"""Events reach a real NATS: each of them, under subjects that hold, however often it goes away, and no call waits."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import logging
import os
import re
import signal
import ssl
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trustme
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import example, given
from hypothesis import strategies as st
from keepers import ACME, kept, sdk, settings

from qlens import ConfigError, Spool, StartupError
from qlens.registry import Health
from qlens.testing import Running, check_plugin, running
from qlens.testing.faults import fault_proxy
from qlens.testing.nats import nats_server
from qlens.testing.objects import keeper
from qlens_plugins.observe.nats import Nats
from qlens_plugins.observe.nats.credentials import Signer, seed_of
from qlens_plugins.observe.nats.messages import Message, record
from qlens_plugins.observe.nats.subjects import LONGEST, subject, token, untoken

CHAT = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "hello"}]}
PASSWORD = "sk-example-" + "password"
KEYS = {"sk-example-acme": "acme", "sk-example-dots": "a.b > *"}


def config(url: str, more: str = "", *, stream: str = "{create: true}", cost: str = "") -> str:
    return f"""
pipeline:
  auth: [{{plugin: api_keys, file: keys.yaml}}]
  cost: [{cost}]
  observe: [{{plugin: nats, servers: ["{url}"], stream: {stream}{more}}}]
providers: {{echo: {{plugin: echo}}}}
models: {{gpt-4o-mini: {{max_output_tokens: 1000, targets: [{{provider: echo, model: gpt-4o-mini}}]}}}}
"""


def key_file() -> dict[str, str]:
    rows = [
        f"- {{id: k{number}, hash: 'sha256:{hashlib.sha256(key.encode()).hexdigest()}', tenant: '{tenant}'}}"
        for number, (key, tenant) in enumerate(KEYS.items())
    ]
    return {"keys.yaml": "\n".join(["keys:", *rows])}


@asynccontextmanager
async def serving(url: str, more: str = "", **rest: str) -> AsyncIterator[Running]:
    async with running(config(url, more, **rest), files=key_file()) as gateway:
        yield gateway


async def call(gateway: Running, key: str = "sk-example-acme") -> str:
    """Make a call; the id of its receipt."""
    answer = await gateway.post("/v1/chat/completions", CHAT, key=key)
    assert answer.status == 200, answer.text
    return answer.headers["x-request-id"]


def health(gateway: Running) -> Health:
    return gateway.gateway.health()["observe.nats"]


async def until(condition: Any, seconds: float = 60) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.02)


async def metric(gateway: Running, line: str) -> float:
    text = (await gateway.get("/metrics", key="sk-example-acme")).text
    return sum(float(row.rpartition(" ")[2]) for row in text.splitlines() if row.startswith(line))


def ids(messages: list[Any]) -> list[str]:
    return [message.headers["Nats-Msg-Id"] for message in messages]


def test_it_keeps_the_contract_of_its_stage() -> None:
    check_plugin("observe", Nats)


# --- what arrives ------------------------------------------------------------------------------


async def test_events_of_every_kind_arrive_as_cloudevents_and_no_message_says_more_than_its_event() -> None:
    budgets = "{plugin: budgets, limits: [{per: tenant, usd: 0.000001, hard: false, warn_at: [50]}]}"
    prices = "{plugin: prices, table: [{model: gpt-4o-mini, input: 0, output: 1}]}"
    async with nats_server() as nats, serving(nats.url, cost=f"{prices}, {budgets}") as gateway:
        id_ = await call(gateway)
        await gateway.reload(config(nats.url, cost=f"{prices}, {budgets}").replace("1000", "2000"))
        gateway.gateway.events.announce("acme.quota.used_up", "", {}, tenant="a.b > *")
        await nats.reached(4)
        messages = await nats.messages()
        assert await metric(gateway, 'qlens_nats_sent_total{plugin="nats"}') == 4
    assert [message.subject for message in messages] == [
        *("qlens.budget.threshold.acme", "qlens.receipt.acme", "qlens.config.reloaded.-"),
        "qlens.acme.quota.used_up.a%2Eb%20%3E%20%2A",
    ]
    for message in messages:
        event = json.loads(message.data)
        # https://github.com/cloudevents/spec/blob/v1.0.2/cloudevents/bindings/nats-protocol-binding.md
        assert message.headers["Content-Type"] == "application/cloudevents+json"
        assert message.headers["Nats-Msg-Id"] == event["id"]
        assert event["specversion"] == "1.0"
        assert event["source"] == "/qlens"
        assert event["type"] in message.subject or event["type"] == "acme.quota.used_up"
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", event["time"])
        assert event.get("tenant") == untoken(message.subject.rpartition(".")[2])
        assert isinstance(event["data"], dict)
    receipt = json.loads(messages[1].data)
    assert (receipt["id"], receipt["data"]["cost_usd"]) == (id_, "0.000001")


async def test_only_what_is_wanted_is_sent_to_a_stream_as_it_is_wanted() -> None:
    stream = "{name: calls, create: true, max_age_days: 2, max_bytes: 1000000, duplicate_seconds: 7}"
    more = ", events: [qlens.receipt, qlens.key.*], tenants: ['a.*'], subject_prefix: llm.prod, source: 'urn:eu'"
    async with nats_server() as nats, serving(nats.url, more, stream=stream) as gateway:
        await call(gateway)
        await call(gateway, "sk-example-dots")
        gateway.gateway.events.announce("qlens.key.created", "key-1", {}, tenant="a.c")
        gateway.gateway.events.announce("qlens.key.created", "key-1", {})
        gateway.gateway.events.announce("qlens.budget.threshold", "b", {}, tenant="a.c")
        assert (await gateway.post("/v1/chat/completions", {**CHAT, "model": "?"}, key="sk-example-dots")).status == 404
        await nats.reached(2, "calls")
        messages = await nats.messages("calls")
        async with nats.client() as client:
            made = (await client.jetstream().stream_info("calls")).config
    assert [message.subject for message in messages] == [
        "llm.prod.receipt.a%2Eb%20%3E%20%2A",
        "llm.prod.key.created.a%2Ec",
    ]
    assert json.loads(messages[0].data)["source"] == "urn:eu"
    assert (made.subjects, made.max_age, made.max_bytes, made.duplicate_window) == (["llm.prod.>"], 172_800, 10**6, 7)


async def test_a_batch_that_is_over_is_an_event_of_one_id_however_often_one_asks() -> None:
    async with nats_server() as nats, keeper() as fake:
        plugin = f'{{plugin: nats, servers: ["{nats.url}"], events: [qlens.receipt], stream: {{create: true}}}}'
        text = settings(fake, fake).replace("cost: []", f"cost: []\n  observe: [{plugin}]")
        async with kept(text) as gateway, sdk(gateway) as client:
            file = await client.files.create(file=("in.jsonl", b"{}"), purpose="batch", extra_body={"model": "first"})
            made = await client.batches.create(input_file_id=file.id, endpoint="/v1/responses", completion_window="24h")
            ended = int(time.time()) - 3600
            used = {"input_tokens": 1000, "output_tokens": 100, "total_tokens": 1100}
            fake.complete(list(fake.batches)[-1], b"{}\n", completed_at=ended, model="upstream", usage=used)
            for _ in range(2):
                assert (await gateway.get(f"/v1/batches/{made.id}", key=ACME)).status == 200
            # The file, the batch, two who ask for it, and once what it used: the stream keeps one of two of an id.
            await nats.reached(5)
            await until(lambda: gateway.gateway.health()["observe.nats"].detail == "0 events wait")
        events = [json.loads(message.data) for message in await nats.messages()]
    (event,) = [each for each in events if each["data"]["operation"] == "batch_responses"]
    assert len(events) == 5
    assert (event["id"], event["tenant"]) == (event["data"]["id"], "acme")
    assert (event["data"]["outcome"], event["data"]["upstream_model"]) == ("complete", "upstream")
    assert event["data"]["usage"] == {"input": 1000, "output": 100}


@given(st.none() | st.text(st.characters(), max_size=LONGEST // 12))
@example("-")
@example("")
@example("%")
@example("a.b")
@example("~.*> \t\r\n\x00\ud800é")
def test_a_tenant_cannot_leave_its_token_and_is_read_back(tenant: str | None) -> None:
    encoded = token(tenant)
    assert re.fullmatch("[A-Za-z0-9_%-]+", encoded)
    assert untoken(encoded) == tenant
    assert subject("qlens.receipt", tenant) == f"receipt.{encoded}"
    assert subject("acme.*..", tenant) == f"acme.%2A.%.%.{encoded}"


@given(st.text(st.characters(), min_size=LONGEST + 1, max_size=LONGEST * 20), st.text(st.characters(), max_size=500))
def test_long_names_stay_apart_and_short(long: str, other: str) -> None:
    assert len(token(long)) <= LONGEST
    assert (token(long) == token(other)) is (long == other)
    with pytest.raises(ValueError, match="hashed"):
        untoken(token(long))


@given(st.text(st.characters()), st.binary())
@example("a\nb", b"\n\n")
def test_a_record_is_read_back_and_its_id_fits_a_header(id_: str, body: bytes) -> None:
    read = Message.read(record(b"qlens.receipt.acme", id_, body))
    assert (read.subject, read.body) == ("qlens.receipt.acme", body)
    assert re.fullmatch("[ -~]{1,256}", read.id)


# --- NATS goes away ----------------------------------------------------------------------------


async def test_nats_is_killed_under_load_and_nothing_is_lost_nor_doubled_nor_slowed() -> None:
    """R15, in short."""
    async with nats_server() as nats, serving(nats.url) as gateway:
        made: list[str] = []
        waits: list[float] = []

        async def load(until_: float) -> None:
            while time.monotonic() < until_:
                began = time.monotonic()
                made.append(await call(gateway))
                waits.append(time.monotonic() - began)
                await asyncio.sleep(0.005)

        loads = [asyncio.create_task(load(time.monotonic() + 3)) for _ in range(4)]
        for _ in range(2):
            await asyncio.sleep(0.5)
            nats.kill()
            await until(lambda: not health(gateway).ok)
            assert "cannot send since" in health(gateway).detail
            await asyncio.sleep(0.4)
            await nats.start()
        await asyncio.gather(*loads)
        await nats.reached(len(made), seconds=20)
        await until(lambda: health(gateway) == Health(True, "0 events wait"))
        messages = await nats.messages()
        assert await metric(gateway, "qlens_nats_lost_total") == 0
    assert Counter(ids(messages)) == Counter(made)
    assert len(made) > 100
    assert max(waits) < 2  # none has waited for NATS, whose connections take longer to fail


async def test_a_server_that_hangs_slows_no_call_and_no_shutdown_and_gets_what_it_missed() -> None:
    async with nats_server() as nats:
        more = ", ack_seconds: 0.2, close_seconds: 0.2, spool: outbox"
        async with serving(nats.url, more.replace("outbox", str(nats.folder / "outbox"))) as gateway:
            first = await call(gateway)
            await nats.reached(1)
            nats.signal(signal.SIGSTOP)
            hung = [await call(gateway) for _ in range(20)]
            await until(lambda: not health(gateway).ok)
            assert "20 events wait" in health(gateway).detail
            began = time.monotonic()
        assert time.monotonic() - began < 5
        nats.signal(signal.SIGCONT)
        async with serving(nats.url, more.replace("outbox", str(nats.folder / "outbox"))) as gateway:
            last = await call(gateway)
            await nats.reached(22)
            await until(lambda: health(gateway).detail == "0 events wait")
        assert Counter(ids(await nats.messages())) == Counter([first, *hung, last])
        assert not (nats.folder / "outbox").exists()


async def test_events_whose_acknowledgements_are_late_are_sent_again_and_kept_once() -> None:
    async with nats_server() as nats, fault_proxy(nats.port) as between:
        async with serving(f"nats://127.0.0.1:{between.port}", ", ack_seconds: 0.1") as gateway:
            first = await call(gateway)
            await nats.reached(1)
            between.latency = 0.4
            ids_ = [await call(gateway) for _ in range(3)]
            await nats.reached(4)
            await until(lambda: "no acknowledgement within 0.1 s" in health(gateway).detail)
            assert health(gateway).detail.endswith("; 3 events wait")
            between.latency = 0
            await until(lambda: health(gateway) == Health(True, "0 events wait"))
            assert await metric(gateway, 'qlens_nats_sent_total{plugin="nats"}') == 4
        assert Counter(ids(await nats.messages())) == Counter([first, *ids_])


async def test_one_of_several_servers_will_do() -> None:
    async with nats_server() as nats, serving(f'nats://127.0.0.1:1", "{nats.url}", "tls://127.0.0.1:2') as gateway:
        await until(lambda: health(gateway).detail.startswith("cannot send"))
        assert "the server has no TLS" in health(gateway).detail  # with one tls:// in the list there is TLS or nothing
        await gateway.reload(config(f'nats://127.0.0.1:1", "{nats.url}'))
        made = await call(gateway)
        await nats.reached(2)
        assert made in ids(await nats.messages())


async def test_a_full_outbox_counts_what_is_lost_and_goes_on_when_there_is_room() -> None:
    async with nats_server() as nats:
        nats.kill()
        async with serving(nats.url, ", spool_bytes: 4000") as gateway:
            made = [await call(gateway) for _ in range(10)]
            waiting = int(re.findall(r"(\d+) events wait", health(gateway).detail)[0])
            assert 1 <= waiting <= 4
            assert f"{10 - waiting} are lost, the outbox takes nothing" in health(gateway).detail
            assert await metric(gateway, 'qlens_nats_lost_total{plugin="nats",reason="full"}') == 10 - waiting
            await nats.start()
            await nats.reached(waiting)
            await until(lambda: health(gateway).detail.startswith("0 events wait"))
            last = await call(gateway)
            await nats.reached(waiting + 1)
            await until(lambda: health(gateway) == Health(True, "0 events wait"))
        assert ids(await nats.messages()) == [*made[:waiting], last]


async def test_a_stream_that_is_missing_is_said_and_filled_when_it_is_there(caplog: pytest.LogCaptureFixture) -> None:
    async with nats_server() as nats, serving(nats.url, stream="{name: QLENS}") as gateway:
        made = await call(gateway)
        await until(lambda: "there is no stream QLENS: make one with the subjects qlens.>" in health(gateway).detail)
        async with nats.client() as client:
            stream = client.jetstream()
            await stream.add_stream(name="QLENS", subjects=["elsewhere"])
            await until(lambda: "QLENS must have the subjects qlens.>" in health(gateway).detail)
            await stream.add_stream(name="OTHER", subjects=["qlens.receipt.*"])
            await until(lambda: "another stream than QLENS takes qlens.receipt.acme" in health(gateway).detail)
            await stream.delete_stream("OTHER")
            await stream.update_stream(name="QLENS", subjects=["qlens.>"])
        await nats.reached(1)
        assert ids(await nats.messages()) == [made]
        await until(lambda: health(gateway).ok)
    assert sum("cannot send, will try again" in line.getMessage() for line in caplog.records) == 1


@pytest.mark.parametrize("fault", ["another subject", "a full tenant"])
async def test_what_the_stream_does_not_take_holds_up_no_others_and_comes_when_it_does(fault: str) -> None:
    quota = {"max_msgs_per_subject": 1, "discard": "new", "discard_new_per_subject": True}
    cases: dict[str, tuple[dict[str, Any], str]] = {
        "another subject": ({"subjects": ["qlens.receipt.>"]}, "have the subjects"),
        "a full tenant": ({"subjects": ["qlens.>"], **quota}, "maximum messages"),
    }
    made, why = cases[fault]
    async with nats_server() as nats, nats.client() as client:
        stream = client.jetstream()
        await stream.add_stream(name="QLENS", **made)
        async with serving(nats.url, ", in_flight: 4", stream="{name: QLENS}") as gateway:
            first = await call(gateway)
            await nats.reached(1)
            for number in range(40):
                gateway.gateway.events.announce("qlens.test", f"{number}", {}, tenant="acme")
                if fault == "a full tenant":
                    await call(gateway)
            other = await call(gateway, "sk-example-dots")
            async with asyncio.timeout(30):
                while not {first, other} <= {*ids(await nats.messages())}:
                    await asyncio.sleep(0.05)
            await until(lambda: "events are not taken" in health(gateway).detail)
            assert why in health(gateway).detail
            assert not health(gateway).ok
            await stream.update_stream(name="QLENS", subjects=["qlens.>"])
            await nats.reached(42 if fault == "another subject" else 82, seconds=30)
            await until(lambda: health(gateway) == Health(True, "0 events wait"))


async def test_a_shutdown_waits_for_nothing_that_is_not_taken(tmp_path: Path) -> None:
    own = f", spool: {tmp_path / 'outbox'}"
    async with nats_server() as nats, nats.client() as client:
        await client.jetstream().add_stream(name="QLENS", subjects=["qlens.receipt.>"])
        async with serving(nats.url, own, stream="{name: QLENS}") as gateway:
            made = []
            for number in range(20):
                gateway.gateway.events.announce("qlens.test", f"{number}", {}, tenant="acme")
                made.append(await call(gateway))
            await until(lambda: "events are not taken" in health(gateway).detail)
            await nats.reached(20)
        assert not [thread for thread in threading.enumerate() if thread.name == "qlens-nats"]
        await client.jetstream().update_stream(name="QLENS", subjects=["qlens.>"])
        async with serving(nats.url, own, stream="{name: QLENS}"):
            await nats.reached(40, seconds=30)
        assert {*made} <= {*ids(await nats.messages())}


async def test_a_subject_that_nobody_answers_for_holds_up_no_others() -> None:
    gateway_may = "{user: gateway, password: sk-example-a, permissions: {publish: {deny: ['qlens.receipt.acme']}}}"
    users = f"authorization: {{users: [{gateway_may}, {{user: test, password: sk-example-b}}]}}"
    async with nats_server(users, user="test", password="sk-example-b") as nats:
        more = ", user: gateway, password: sk-example-a, in_flight: 4, ack_seconds: 0.5"
        async with serving(nats.url, more) as gateway:
            for _ in range(12):
                await call(gateway)
            other = await call(gateway, "sk-example-dots")
            await nats.reached(1, seconds=30)
            assert ids(await nats.messages()) == [other]
            assert not health(gateway).ok


async def test_an_event_that_no_server_takes_is_counted_and_holds_up_no_other() -> None:
    async with nats_server("max_payload: 4096") as nats, serving(nats.url) as gateway:
        events = gateway.gateway.events
        first = await call(gateway)
        events.announce("qlens.test", "large", {"text": "x" * 8192}, tenant="acme")
        await nats.reached(1)
        async with nats.client() as client:
            stream = client.jetstream()
            made = (await stream.stream_info("QLENS")).config
            await stream.update_stream(made, max_msg_size=2000)
        events.announce("qlens.test", "not small", {"text": "x" * 3000}, tenant="acme")
        last = await call(gateway)
        await nats.reached(2)
        await until(lambda: health(gateway) == Health(True, "0 events wait"))
        assert await metric(gateway, 'qlens_nats_lost_total{plugin="nats",reason="refused"}') == 2
        assert ids(await nats.messages()) == [first, last]


async def test_a_record_that_is_no_event_is_counted_and_holds_up_no_other(tmp_path: Path) -> None:
    spool = Spool.open(tmp_path / "outbox")
    spool.append(b"not an event")
    spool.append(record(b"test.-", "fine", b"{}"))
    spool.close()
    async with nats_server() as nats, serving(nats.url, f", spool: '{tmp_path / 'outbox'}'") as gateway:
        await nats.reached(1)
        await until(lambda: health(gateway) == Health(True, "0 events wait"))
        assert await metric(gateway, 'qlens_nats_lost_total{plugin="nats",reason="refused"}') == 1
        assert ids(await nats.messages()) == ["fine"]


# --- reload ------------------------------------------------------------------------------------


async def test_over_a_reload_every_event_comes_once_and_a_refused_one_changes_nothing() -> None:
    async with nats_server() as nats, nats_server() as other, serving(nats.url) as gateway:
        made = [await call(gateway)]
        with pytest.raises(StartupError):
            await gateway.reload(config(other.url) + "models: {}")
        broken = ', {plugin: nats, name: broken, servers: ["nats://127.0.0.1:1"], spool: keys.yaml}]'
        with pytest.raises(StartupError, match=r"the outbox .*keys.yaml cannot be used"):
            await gateway.reload(config(other.url).replace("}}]\nproviders", "}}" + broken + "\nproviders"))
        made.append(await call(gateway))
        await nats.reached(4)
        loads = [asyncio.create_task(call(gateway)) for _ in range(20)]
        await gateway.reload(config(other.url, ", subject_prefix: later"))
        made += await asyncio.gather(*loads)
        made.append(await call(gateway))
        await other.reached(2, seconds=15)
        await until(lambda: health(gateway) == Health(True, "0 events wait"))
        before, after = await nats.messages(), await other.messages()
    assert Counter(id_ for id_ in ids(before + after) if "-" in id_) == Counter(made)
    assert after[-1].subject == "later.receipt.acme"


# --- who the gateway is ------------------------------------------------------------------------


USERS = f"""
authorization {{users: [
    {{user: qlens, password: "{PASSWORD}"}},
    {{user: narrow, password: "{PASSWORD}", permissions: {{publish: ["elsewhere"], subscribe: ["_INBOX.>"]}}}}
]}}
"""


async def test_a_password_is_shown_to_nobody_and_what_the_server_forbids_is_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    login = {"user": "qlens", "password": PASSWORD}
    async with nats_server(USERS, **login) as nats:
        who = f", user: qlens, password: '{PASSWORD}'"
        async with serving(nats.url, who.replace(PASSWORD, f"{PASSWORD}x")) as gateway:
            made = await call(gateway)
            await until(lambda: "Authorization Violation" in health(gateway).detail)
            await gateway.reload(config(nats.url, who))
            await nats.reached(1)
            assert made in ids(await nats.messages())
            await gateway.reload(config(nats.url, who.replace("user: qlens", "user: narrow") + ", ack_seconds: 0.2"))
            await call(gateway)
            await until(lambda: "permissions violation for publish" in health(gateway).detail)
            shown = (await gateway.get("/metrics", key="sk-example-acme")).text + repr(gateway.gateway.config)
    assert PASSWORD not in caplog.text + shown


async def test_a_token_and_the_seed_of_a_key_open_the_door() -> None:
    seed = seed_text(20 << 3, key := Ed25519PrivateKey.generate())
    signer = Signer(seed_of(seed))
    guarded = nats_server(f'authorization {{token: "{PASSWORD}"}}', token=PASSWORD)
    async with guarded as nats, serving(nats.url, f", token: '{PASSWORD}'") as gateway:
        await call(gateway)
        await nats.reached(1)
    users = f'authorization {{users: [{{nkey: {signer.public}}}, {{user: tests, password: "{PASSWORD}"}}]}}'
    guarded = nats_server(users, user="tests", password=PASSWORD)
    async with guarded as nats, serving(nats.url, f", nkey: '{seed}'") as gateway:
        await call(gateway)
        await nats.reached(1)
        assert seed not in repr(gateway.gateway.config)
    assert repr(signer) == "Signer()"
    assert key.private_bytes_raw() == signer.seed


async def test_a_file_of_credentials_opens_the_door_and_is_read_anew(tmp_path: Path) -> None:
    operator, account, user, system = (Ed25519PrivateKey.generate() for _ in range(4))
    limits = {"subs": -1, "data": -1, "payload": -1, "conn": -1, "leaf": -1, "imports": -1, "exports": -1}
    storage = {"mem_storage": -1, "disk_storage": -1, "streams": -1, "consumer": -1, "wildcards": True}
    claims = {"limits": limits | storage, "type": "account", "version": 2}
    signed_account = signed(operator, "O", account, "A", claims)
    signed_system = signed(operator, "O", system, "A", {**claims, "limits": limits})
    signed_user = signed(account, "A", user, "U", {"type": "user", "version": 2, "subs": -1, "data": -1, "payload": -1})
    server = f"""
operator: {signed(operator, "O", operator, "O", {"type": "operator", "version": 2})}
system_account: {name("A", system)}
resolver: MEMORY
resolver_preload: {{
  {name("A", account)}: {signed_account}
  {name("A", system)}: {signed_system}
}}
"""
    file = tmp_path / "gateway.creds"
    stranger = Ed25519PrivateKey.generate()
    file.write_text(credentials(signed_user, stranger))
    good = Signer(user.private_bytes_raw(), signed_user)
    tests = {"signature_cb": good.sign, "user_jwt_cb": lambda: bytearray(signed_user.encode())}
    async with nats_server(server, **tests) as nats, serving(nats.url, f", credentials: '{file}'") as gateway:
        made = await call(gateway)
        await until(lambda: "Authorization Violation" in health(gateway).detail)
        file.unlink()
        await until(lambda: "No such file" in health(gateway).detail)
        file.write_text("nothing")
        await until(lambda: "has no credentials of a user of NATS in it" in health(gateway).detail)
        file.write_text(credentials(signed_user, user))
        await nats.reached(1)
        assert ids(await nats.messages()) == [made]


def encoded(prefix: int, raw: bytes, more: bytes = b"") -> str:
    import binascii

    text = bytes([prefix]) + more + raw
    return base64.b32encode(text + binascii.crc_hqx(text, 0).to_bytes(2, "little")).decode().rstrip("=")


def seed_text(kind: int, key: Ed25519PrivateKey) -> str:
    return encoded(18 << 3 | kind >> 5, key.private_bytes_raw(), bytes([(kind & 31) << 3]))


def name(kind: str, key: Ed25519PrivateKey) -> str:
    return encoded({"O": 14, "A": 0, "U": 20}[kind] << 3, key.public_key().public_bytes_raw())


def signed(by: Ed25519PrivateKey, its_kind: str, whose: Ed25519PrivateKey, kind: str, claims: dict[str, Any]) -> str:
    """A JSON Web Token as NATS has them."""

    def part(value: object) -> bytes:
        return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=")

    told = {"jti": os.urandom(8).hex(), "iat": 1, "iss": name(its_kind, by), "sub": name(kind, whose), "nats": claims}
    head = part({"typ": "JWT", "alg": "ed25519-nkey"}) + b"." + part(told)
    return (head + b"." + base64.urlsafe_b64encode(by.sign(head)).rstrip(b"=")).decode()


def credentials(jwt: str, key: Ed25519PrivateKey) -> str:
    seed = seed_text(20 << 3, key)
    return (
        f"-----BEGIN NATS USER JWT-----\n{jwt}\n------END NATS USER JWT------\n\nkeep it\n\n"
        f"-----BEGIN USER NKEY SEED-----\n{seed}\n------END USER NKEY SEED------\n"
    )


async def test_tls_is_used_with_the_authority_that_is_named_and_nothing_is_said_without_it(tmp_path: Path) -> None:
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    ca, key, chain = tmp_path / "ca.pem", tmp_path / "key.pem", tmp_path / "chain.pem"
    authority.cert_pem.write_to_path(str(ca))
    certificate.private_key_pem.write_to_path(str(key))
    chain.write_bytes(b"".join(each.bytes() for each in certificate.cert_chain_pems))
    context = ssl.create_default_context(cafile=ca)
    server = f'tls {{cert_file: "{chain}", key_file: "{key}"}}\nauthorization {{token: "{PASSWORD}"}}'
    token_ = f", token: '{PASSWORD}'"
    guarded = nats_server(server, token=PASSWORD, tls=context)
    async with guarded as nats, serving(f"tls://127.0.0.1:{nats.port}", token_) as gateway:
        await call(gateway)
        await until(lambda: "certificate verify failed" in health(gateway).detail)
        await gateway.reload(config(nats.url, f"{token_}, tls: {{ca_file: '{ca}'}}"))
        await nats.reached(1)
    heard: list[bytes] = []

    async def stripped(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Somebody in between, who says that there is no TLS."""
        writer.write(b'INFO {"server_id": "x", "version": "2.15.1", "max_payload": 1048576, "headers": true}\r\n')
        heard.append(await reader.read(1000))
        writer.close()

    listening = await asyncio.start_server(stripped, "127.0.0.1", 0)
    port = listening.sockets[0].getsockname()[1]
    async with listening, serving(f"tls://127.0.0.1:{port}", token_) as gateway:
        await until(lambda: "the server has no TLS" in health(gateway).detail)
        await until(lambda: heard)
    assert set(heard) == {b""}


# --- the file ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (f", servers: ['nats://user:{PASSWORD}@nats:4222']", "has no user in it"),
        (", servers: [http://nats]", "is no server of NATS"),
        (", servers: ['nats://nats:x']", "is no server of NATS"),
        (", servers: []", "servers"),
        (", servers: [nats://n], user: a", "`user` and `password` belong together"),
        (", servers: [nats://n], token: a, credentials: b", "choose one"),
        (f", servers: [nats://n], nkey: {PASSWORD}", "no seed of a user's NKey"),
        (", servers: [nats://n], tls: {key_file: k}", "`key_file` belongs to a `cert_file`"),
        (", servers: [nats://n], stream: {name: 'a.b'}", "stream.name"),
        (", servers: [nats://n], subject_prefix: 'a.>'", "subject_prefix"),
        (", servers: [nats://n], stream: {max_age_days: 0.001}", "`duplicate_seconds` must not be more"),
    ],
)
async def test_what_is_wrong_is_said_with_its_place_and_without_secrets(more: str, said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)) as caught:
        async with running(config("X").replace(', servers: ["X"], stream: {create: true}', more), files=key_file()):
            pass
    assert "pipeline.observe[0]" in str(caught.value)
    assert PASSWORD not in str(caught.value)


async def test_an_outbox_that_cannot_be_is_a_fault_of_the_start() -> None:
    with pytest.raises(StartupError, match="make it and its folder writable, or name another one in `spool`"):
        async with serving("nats://127.0.0.1:1", ", spool: nowhere/outbox"):
            pass


def test_the_library_is_imported_only_where_it_is_used() -> None:
    import subprocess
    import sys

    program = "import sys, qlens_plugins.observe.nats; print('nats' in sys.modules, 'cryptography' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
