"""Realtime sessions through the front door: who may open one, what passes, how it ends, what it costs."""

from __future__ import annotations

import asyncio
import gc
import resource
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any

import aiohttp
import orjson
import pytest
from plugs import Probe
from yamls import config, probe

from qlens.call import Receipt
from qlens.testing import Running, Scripted, running, upstream
from qlens.testing.realtime import KEY, FakeRealtime, Joined, realtime
from qlens.usage import Usage

PRICES = {
    "plugin": "prices",
    "table": [
        {"provider": "*", "model": "gpt-realtime", "input": 4, "cached_input": 0.4, "output": 16}
        | {"audio_in": 32, "audio_out": 64, "meters": {"transcribed_seconds": 0.0001}}
    ],
}
ANSWER_PICOS = 30 * 4_000_000 + 30 * 400_000 + 20 * 16_000_000 + 60 * 32_000_000 + 30 * 64_000_000
ANSWER = Usage(input=30, cached_input=30, output=20, audio_in=60, audio_out=30, source="provider")
CREATE = {"type": "response.create"}


def yaml(
    *providers: FakeRealtime,
    pipeline: Mapping[str, Any] | None = None,
    model: Mapping[str, Any] | None = None,
    **server: Any,
) -> str:
    """One model `voice` behind these providers."""
    entries = {
        f"openai-{place}": {"plugin": "openai", "base_url": up.url, "api_key": KEY}
        for place, up in enumerate(providers)
    }
    targets = [{"provider": name, "model": "gpt-realtime"} for name in entries]
    return config(
        {"cost": [PRICES], **(pipeline or {})}, entries, {"voice": {"targets": targets, **(model or {})}}, **server
    )


@asynccontextmanager
async def joined(gateway: Running, query: str = "model=voice", **options: Any) -> AsyncIterator[Any]:
    """A client's socket whose first event was read."""
    async with gateway.session.ws_connect(f"{gateway.url}/v1/realtime?{query}", max_msg_size=0, **options) as socket:
        assert (await event(socket))["type"] == "session.created"
        yield socket


async def event(socket: Any) -> Any:
    """The next event, parsed."""
    return orjson.loads(await socket.receive_str(timeout=5))


async def say(socket: Any, *events: Mapping[str, Any]) -> None:
    for each in events:
        await socket.send_str(orjson.dumps(each).decode())


async def until(socket: Any, kind: str) -> Any:
    """Read up to an event of a kind."""
    while (found := await event(socket))["type"] != kind:
        pass
    return found


async def refused(gateway: Running, query: str = "model=voice", **options: Any) -> aiohttp.WSServerHandshakeError:
    """How the gateway refuses an upgrade."""
    with pytest.raises(aiohttp.WSServerHandshakeError) as raised:
        async with gateway.session.ws_connect(f"{gateway.url}/v1/realtime?{query}", **options):
            pass
    return raised.value


async def only_receipt(gateway: Running) -> Receipt:
    (receipt,) = await gateway.settled(1)
    return receipt


# --- what passes -------------------------------------------------------------------------------


async def test_a_session_is_one_receipt_with_the_sum_of_its_answers_and_their_exact_cost() -> None:
    async with realtime() as up, running(yaml(up)) as gateway:
        async with joined(gateway) as socket:
            for _ in range(3):
                await say(socket, CREATE)
                done = await until(socket, "response.done")
                assert done["response"]["usage"] == up.usage
        receipt = await only_receipt(gateway)
        assert (receipt.outcome, receipt.status, receipt.operation, receipt.model) == (
            "complete",
            101,
            "realtime",
            "voice",
        )
        assert receipt.usage == Usage(90, 90, output=60, audio_in=180, audio_out=90, source="provider")
        assert (receipt.cost.picos, receipt.cost.state) == (3 * ANSWER_PICOS, "exact")
        assert (receipt.streamed, len(receipt.attempts)) == (True, 1)
        assert receipt.bytes_out > 3 * 12_800
        assert up.sessions[0].close_code == 1000


async def test_a_session_in_which_nothing_is_asked_costs_nothing() -> None:
    async with realtime() as up, running(yaml(up)) as gateway:
        async with joined(gateway):
            pass
        receipt = await only_receipt(gateway)
        assert (receipt.outcome, receipt.usage.total, receipt.cost.picos, receipt.cost.state) == (
            "complete",
            0,
            0,
            "exact",
        )


async def test_what_another_model_writes_down_is_metered_apart() -> None:
    async with realtime() as up, running(yaml(up)) as gateway:
        async with joined(gateway) as socket:
            for _ in range(3):
                await say(
                    socket,
                    {"type": "input_audio_buffer.append", "audio": "AAAA"},
                    {"type": "input_audio_buffer.commit"},
                )
                await until(socket, "conversation.item.input_audio_transcription.completed")
        receipt = await only_receipt(gateway)
        assert receipt.usage.meters == {"transcribed_seconds": 5}
        assert receipt.cost.picos == 5 * 100_000_000


@pytest.mark.parametrize(
    ("wanted", "headers"),
    [
        ({"type": "transcription", "audio": {"input": {"transcription": {"model": "another", "language": "de"}}}}, {}),
        ({"input_audio_transcription": {"model": "another", "language": "de"}}, {"openai-beta": "realtime=v1"}),
    ],
    ids=["the API", "its beta"],
)
async def test_a_session_that_only_transcribes_keeps_to_the_model_it_was_let_in_for(
    wanted: Mapping[str, Any], headers: Mapping[str, str]
) -> None:
    async with realtime() as up, running(yaml(up)) as gateway:
        async with joined(gateway, "intent=transcription&model=voice", headers=headers) as socket:
            assert up.sessions[0].query == {"intent": "transcription"}  # OpenAI refuses a model here
            twice = b'{"type": "x", "type": "session.update", "session": %b}' % orjson.dumps(wanted)
            for update in (orjson.dumps({"type": "session.update", "session": wanted}), twice):
                await socket.send_str(update.decode())
                said = (await until(socket, "session.updated"))["session"]
                heard = said.get("input_audio_transcription") or said["audio"]["input"]["transcription"]
                assert heard == {"model": "gpt-realtime", "language": "de"}
            await say(
                socket, {"type": "input_audio_buffer.append", "audio": "AAAA"}, {"type": "input_audio_buffer.commit"}
            )
            await until(socket, "conversation.item.input_audio_transcription.completed")
        receipt = await only_receipt(gateway)
        assert (receipt.outcome, receipt.model, bool(receipt.usage.meters)) == ("complete", "voice", True)


async def test_a_session_that_only_transcribes_names_its_model_to_the_gateway() -> None:
    async with realtime() as up, running(yaml(up)) as gateway:
        answer = await gateway.get("/v1/realtime?intent=transcription", headers=UPGRADE)
        error = answer.json()["error"]
        assert (answer.status, error["param"]) == (400, "model")
        assert "/v1/realtime?intent=transcription&model=NAME" in error["message"]
        assert up.requests == 0


async def test_an_answer_without_usage_is_estimated_and_not_free() -> None:
    async with realtime(usage=None) as up, running(yaml(up)) as gateway:
        async with joined(gateway) as socket:
            await say(socket, CREATE)
            await until(socket, "response.done")
        receipt = await only_receipt(gateway)
        assert (receipt.outcome, receipt.usage.source, receipt.cost.state) == ("complete", "estimated", "estimated")
        assert receipt.usage.audio_out == 3
        assert receipt.usage.output > 0


async def test_a_thousand_messages_pass_each_way_in_their_order() -> None:
    async with realtime() as up, running(yaml(up)) as gateway:
        async with joined(gateway) as socket:

            async def send() -> None:
                for number in range(1000):
                    item = {"id": f"mine_{number}", "type": "message", "role": "user", "content": []}
                    await say(socket, {"type": "conversation.item.create", "item": item})

            sending = asyncio.create_task(send())
            got = [await event(socket) for _ in range(2000)]
            await sending
        assert [each["item"]["id"] for each in up.sessions[0].events] == [f"mine_{n}" for n in range(1000)]
        assert [each["item"]["id"] for each in got] == [f"mine_{n // 2}" for n in range(2000)]
        assert (await only_receipt(gateway)).outcome == "complete"


async def test_pings_are_answered_by_the_provider_and_not_on_its_behalf() -> None:
    async with realtime() as up, running(yaml(up)) as gateway, joined(gateway, autoping=False) as socket:
        await socket.ping(b"are you there")
        answer = await socket.receive(timeout=5)
        assert (answer.type, bytes(answer.data)) == (aiohttp.WSMsgType.PONG, b"are you there")
        up.reading.clear()  # who does not read, does not answer
        await say(socket, {"type": "nonsense"})
        assert (await event(socket))["error"]["code"] == "invalid_value"
        await socket.ping(b"and now")
        with pytest.raises(TimeoutError):
            await socket.receive(timeout=0.2)
        up.reading.set()
        assert (await socket.receive(timeout=5)).type is aiohttp.WSMsgType.PONG


async def test_bytes_pass_as_bytes_and_the_providers_close_reaches_the_client() -> None:
    async with realtime() as up, running(yaml(up)) as gateway:
        async with joined(gateway) as socket:
            await socket.send_bytes(b"\x00\xff")
            message = await socket.receive(timeout=5)
            assert (message.type, message.data, message.extra) == (aiohttp.WSMsgType.CLOSE, 1003, "events are text")
        receipt = await only_receipt(gateway)
        assert (receipt.outcome, receipt.error) == ("failed", "upstream_truncated")


async def test_the_clients_close_code_reaches_the_provider() -> None:
    async with realtime() as up, running(yaml(up)) as gateway:
        async with joined(gateway) as socket:
            await socket.close(code=4321, message=b"enough")
        session = await up.joined()
        await asyncio.wait_for(session.closed.wait(), 5)
        assert session.close_code == 4321
        assert (await only_receipt(gateway)).outcome == "complete"


async def test_an_error_event_passes_without_what_names_the_gateways_account() -> None:
    async with realtime(hangs=True) as up, running(yaml(up)) as gateway:
        async with joined(gateway) as socket:
            await say(socket, CREATE, {**CREATE, "event_id": "mine"})
            error = (await until(socket, "error"))["error"]
            assert error["code"] == "conversation_already_has_active_response"
            assert error["event_id"] == "mine"
            assert "active response in progress" in error["message"]
            assert "example.com" not in error["message"]
            assert "org-" not in error["message"]
            await say(socket, {"type": "response.cancel"})
            await until(socket, "response.done")
        assert (await only_receipt(gateway)).usage == ANSWER


# --- who may open one --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "brought",
    [
        {"headers": {"authorization": "Bearer sk-example-right"}},
        {"headers": {"api-key": "sk-example-right"}},
        {"protocols": ("realtime", "openai-insecure-api-key.sk-example-right")},
    ],
    ids=["bearer", "api-key", "subprotocol"],
)
@pytest.mark.parametrize("path", ["/v1/realtime?model=voice", "/openai/realtime?api-version=x&deployment=voice"])
async def test_a_key_may_come_in_any_of_the_ways_that_clients_have(brought: dict[str, Any], path: str) -> None:
    async with realtime() as up, running(yaml(up, pipeline={"auth": [{"plugin": "realtimes:Keys"}]})) as gateway:
        async with gateway.session.ws_connect(gateway.url + path, **brought) as socket:
            assert (await event(socket))["type"] == "session.created"
            assert socket.protocol == ("realtime" if "protocols" in brought else None)
        assert (await only_receipt(gateway)).caller.tenant == "right"
        assert "sk-example-right" not in str(up.sessions[0].headers)


@pytest.mark.parametrize(
    "brought",
    [
        {},
        {"headers": {"authorization": "Bearer sk-example-wrong"}},
        {"protocols": ("realtime", "openai-insecure-api-key.sk-example-wrong")},
        {"protocols": ("realtime", "openai-insecure-api-key.")},
    ],
)
async def test_without_the_right_key_the_upgrade_is_refused_with_401(brought: dict[str, Any]) -> None:
    async with realtime() as up, running(yaml(up, pipeline={"auth": [{"plugin": "realtimes:Keys"}]})) as gateway:
        assert (await refused(gateway, **brought)).status == 401
        assert (up.requests, gateway.receipts) == (0, [])


async def test_a_page_in_a_browser_may_not_use_a_gateway_that_asks_for_no_key() -> None:
    async with realtime() as up, running(yaml(up)) as gateway:
        error = await refused(gateway, headers={"origin": "https://evil.example.com"})
        assert (error.status, up.requests) == (403, 0)
    async with realtime() as up, running(yaml(up, pipeline={"auth": [{"plugin": "realtimes:Keys"}]})) as gateway:
        brought = ("realtime", "openai-insecure-api-key.sk-example-right")
        async with joined(gateway, protocols=brought, headers={"origin": "https://app.example.com"}):
            pass


@pytest.mark.parametrize(
    ("query", "status", "code"),
    [
        ("model=other", 404, "model_not_found"),
        ("model=hidden", 404, "model_not_found"),
        ("", 400, None),
        ("model=", 400, None),
        ("model=voice&call_id=rtc_1", 400, None),
    ],
)
async def test_what_cannot_be_opened_is_refused_before_the_upgrade(query: str, status: int, code: str | None) -> None:
    async with realtime() as up:
        text = yaml(up, pipeline={"auth": [{"plugin": "realtimes:Keys"}]})
        loaded = orjson.loads(text)
        loaded["models"]["hidden"] = loaded["models"]["voice"]
        async with running(orjson.dumps(loaded).decode()) as gateway:
            answer = await gateway.get(f"/v1/realtime?{query}", key="sk-example-right", headers=UPGRADE)
            assert (answer.status, answer.json()["error"]["code"]) == (status, code)
            assert answer.headers["connection"] == "close"
            assert (await only_receipt(gateway)).outcome == "rejected"
            assert up.requests == 0


UPGRADE = {
    "connection": "Upgrade",
    "upgrade": "websocket",
    "sec-websocket-version": "13",
    "sec-websocket-key": "AAAAAAAAAAAAAAAAAAAAAA==",
}


@pytest.mark.parametrize(
    ("changed", "status"),
    [
        ({"upgrade": "h2c"}, 426),
        ({"connection": "keep-alive"}, 426),
        ({"sec-websocket-version": "8"}, 426),
        ({"sec-websocket-key": "short"}, 400),
        ({"sec-websocket-key": "AAAA"}, 400),
        ({"sec-websocket-key": "ÄÄÄÄ"}, 400),
    ],
)
async def test_a_request_that_is_no_upgrade_is_told_so(changed: dict[str, str], status: int) -> None:
    async with realtime() as up, running(yaml(up)) as gateway:
        answer = await gateway.get("/v1/realtime?model=voice", headers={**UPGRADE, **changed})
        assert (answer.status, up.requests) == (status, 0)
        assert answer.headers.get("sec-websocket-version") == ("13" if status == 426 else None)


async def test_a_session_counts_as_a_running_call_until_its_end() -> None:
    limits = [{"plugin": "token_bucket", "limits": [{"per": "tenant", "concurrency": 1}]}]
    async with realtime() as up, running(yaml(up, pipeline={"rate_limit": limits})) as gateway:
        async with joined(gateway):
            assert (await refused(gateway)).status == 429
        await gateway.settled(2)
        async with joined(gateway):
            pass


async def test_tokens_of_a_session_are_taken_from_the_limit_when_it_ends_even_without_a_bound() -> None:
    limits = [{"plugin": "token_bucket", "limits": [{"per": "tenant", "tokens_per_minute": 160}]}]
    async with realtime() as up, running(yaml(up, pipeline={"rate_limit": limits})) as gateway:
        async with joined(gateway) as socket:
            await say(socket, CREATE)
            await until(socket, "response.done")
        await gateway.settled(1)
        assert (await refused(gateway)).status == 429  # 170 of 160 are used


async def test_a_session_holds_one_answer_of_the_models_length() -> None:
    limits = [{"plugin": "token_bucket", "limits": [{"per": "tenant", "tokens_per_minute": 1000}]}]
    async with realtime() as up:
        text = yaml(up, pipeline={"rate_limit": limits}, model={"max_output_tokens": 600})
        async with running(text) as gateway, joined(gateway):
            assert (await refused(gateway)).status == 429


GUARD = {"plugin": "pattern", "rules": [{"name": "secret", "words": ["swordfish"]}]}


async def test_a_guard_that_cannot_look_into_sessions_refuses_them_unless_told_to_let_them_pass() -> None:
    async with realtime() as up:
        async with running(yaml(up, pipeline={"guard": [GUARD]})) as gateway:
            answer = await gateway.get("/v1/realtime?model=voice", headers=UPGRADE)
            assert (answer.status, answer.json()["error"]["code"]) == (400, "unsupported_operation")
            assert "pattern" in answer.json()["error"]["message"]
            assert up.requests == 0
        async with running(yaml(up, pipeline={"guard": [{**GUARD, "realtime": "pass"}]})) as gateway, joined(gateway):
            pass


# --- targets -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answers", "status", "code"),
    [
        (401, 502, "upstream_auth_error"),
        (404, 404, "model_not_found"),
        (429, 429, "rate_limit_exceeded"),
        (500, 502, "upstream_error"),
        (302, 502, "upstream_invalid_response"),
        (200, 502, "upstream_invalid_response"),
    ],
)
async def test_a_provider_that_refuses_is_mapped_before_the_upgrade(answers: int, status: int, code: str) -> None:
    async with realtime(refuses_with=answers) as up, running(yaml(up)) as gateway:
        answer = await gateway.get("/v1/realtime?model=voice", headers=UPGRADE)
        assert (answer.status, answer.json()["error"]["code"]) == (status, code)
        if answers == 429:
            assert answer.headers["retry-after"] == "2"
        receipt = await only_receipt(gateway)
        assert (receipt.outcome, receipt.error, receipt.cost.picos) == ("failed", code, 0)


async def test_a_provider_that_is_down_is_502_before_the_upgrade() -> None:
    async with realtime() as up:
        text = yaml(up)
    async with running(text) as gateway:
        assert (await refused(gateway)).status == 502
        assert (await only_receipt(gateway)).error == "upstream_unreachable"


async def test_the_next_target_is_asked_when_one_cannot_be_opened() -> None:
    async with realtime(refuses_with=503) as broken, realtime() as well, running(yaml(broken, well)) as gateway:
        async with joined(gateway):
            pass
        receipt = await only_receipt(gateway)
        assert [(each.target.provider, each.error) for each in receipt.attempts] == [
            ("openai-0", "upstream_unavailable"),
            ("openai-1", None),
        ]
        assert receipt.target is not None
        assert (receipt.target.provider, receipt.outcome) == ("openai-1", "complete")


async def test_a_provider_without_sessions_is_named() -> None:
    async with running(config()) as gateway:
        answer = await gateway.get("/v1/realtime?model=gpt-4o-mini", headers=UPGRADE)
        assert answer.status == 400
        assert (
            answer.json()["error"]["message"] == "The provider talker of the model `gpt-4o-mini` does not do realtime."
        )


@pytest.mark.parametrize("kind", ["raises", "returns"])
async def test_a_provider_plugin_that_fails_is_502_and_the_next_target_is_asked(kind: str) -> None:
    async with realtime() as up:
        loaded = orjson.loads(yaml(up))
        loaded["providers"]["odd"] = {"plugin": "realtimes:Odd", "kind": kind}
        loaded["models"]["voice"]["targets"].insert(0, {"provider": "odd", "model": "x"})
        async with running(orjson.dumps(loaded).decode()) as gateway:
            async with joined(gateway):
                pass
            receipt = await only_receipt(gateway)
            assert [each.error for each in receipt.attempts] == ["provider_failed", None]


async def test_a_session_that_is_no_websocket_is_joined_just_the_same() -> None:
    providers, models = (
        {"echo": {"plugin": "realtimes:Odd"}},
        {"voice": {"targets": [{"provider": "echo", "model": "x"}]}},
    )
    async with running(config({}, providers, models)) as gateway:
        async with gateway.session.ws_connect(f"{gateway.url}/v1/realtime?model=voice", autoping=False) as socket:
            await socket.send_str("hello")
            assert await socket.receive_str(timeout=5) == "hello"
            await socket.send_bytes(b"hello")
            assert await socket.receive_bytes(timeout=5) == b"hello"
        assert (await only_receipt(gateway)).outcome == "complete"
        assert gateway.plugin("provider", "echo").closed == [1000]


async def test_a_session_that_breaks_by_itself_is_a_failed_call_and_a_counted_mistake() -> None:
    providers = {"odd": {"plugin": "realtimes:Odd", "kind": "breaks"}}
    models = {"voice": {"targets": [{"provider": "odd", "model": "x"}]}}
    async with running(config({}, providers, models)) as gateway:
        async with gateway.session.ws_connect(f"{gateway.url}/v1/realtime?model=voice") as socket:
            await socket.send_str("hello")
            assert (await socket.receive(timeout=5)).data == 1011
        receipt = await only_receipt(gateway)
        assert (receipt.outcome, receipt.error) == ("failed", "upstream_error")
        failures = (await gateway.get("/metrics")).text
        assert 'qlens_plugin_failures_total{hook="connect",plugin="odd"} 1.0' in failures


# --- how it ends -------------------------------------------------------------------------------


async def _lost(socket: Any) -> None:
    """Let a client vanish without a word."""
    socket._response.connection.transport.abort()


async def test_a_client_that_vanishes_is_abandoned_and_the_provider_closed() -> None:
    async with realtime() as up, running(yaml(up)) as gateway:
        with suppress(aiohttp.ClientError):
            async with joined(gateway) as socket:
                await say(socket, CREATE)
                await until(socket, "response.done")
                await _lost(socket)
        receipt = await only_receipt(gateway)
        assert (receipt.outcome, receipt.status, receipt.error) == ("abandoned", 499, "client_closed")
        assert (receipt.usage, receipt.cost.picos) == (ANSWER, ANSWER_PICOS)
        await asyncio.wait_for(up.sessions[0].closed.wait(), 5)


async def test_an_answer_that_was_still_coming_is_charged_by_estimate() -> None:
    async with realtime() as up, running(yaml(up)) as gateway:
        async with joined(gateway) as socket:
            await say(socket, CREATE)
            await until(socket, "response.done")
            up.hangs = True
            await say(socket, CREATE)
            await until(socket, "response.output_audio.delta")
        receipt = await only_receipt(gateway)
        assert (receipt.outcome, receipt.usage.source) == ("abandoned", "partial")
        assert receipt.usage.input >= 30 + 170  # all of the conversation so far was read again
        assert receipt.usage.audio_out == 30 + 3
        assert receipt.cost.state == "estimated"


async def test_a_provider_that_vanishes_is_a_failed_call() -> None:
    async with realtime() as up, running(yaml(up)) as gateway:
        async with joined(gateway) as socket:
            await say(socket, CREATE)
            await until(socket, "response.done")
            transport = up.sessions[0].socket._req.transport  # type: ignore[union-attr]
            assert transport is not None
            transport.abort()
            message = await socket.receive(timeout=5)
            assert (message.type, message.data) == (aiohttp.WSMsgType.CLOSE, 1011)
        receipt = await only_receipt(gateway)
        assert (receipt.outcome, receipt.error, receipt.usage) == ("failed", "upstream_truncated", ANSWER)


@pytest.mark.parametrize("code", [1000, 1001])
async def test_a_provider_that_ends_a_session_in_good_order_makes_it_complete(code: int) -> None:
    async with realtime() as up, running(yaml(up)) as gateway:
        async with joined(gateway) as socket:
            up.reading.clear()
            closing = asyncio.create_task(up.sessions[0].socket.close(code=code, message=b"time is over"))
            message = await socket.receive(timeout=5)
            assert (message.data, message.extra) == (code, "time is over")
            await closing
        assert (await only_receipt(gateway)).outcome == "complete"


@pytest.mark.parametrize(
    ("server", "code"),
    [({"session_seconds": 0.3}, "session_expired"), ({"session_idle_seconds": 0.3}, "session_idle")],
)
async def test_a_session_is_cut_when_its_time_is_over(server: dict[str, Any], code: str) -> None:
    async with realtime() as up, running(yaml(up, **server)) as gateway:
        async with joined(gateway) as socket:
            message = await socket.receive(timeout=5)
            assert (message.type, message.data) == (aiohttp.WSMsgType.CLOSE, 1001)
        receipt = await only_receipt(gateway)
        assert (receipt.outcome, receipt.error) == ("cut", code)
        await asyncio.wait_for(up.sessions[0].closed.wait(), 5)


async def test_messages_of_either_side_keep_a_session_open_and_pings_do_not() -> None:
    async with realtime() as up, running(yaml(up, session_idle_seconds=0.6)) as gateway:
        async with joined(gateway) as socket:
            for _ in range(8):
                await asyncio.sleep(0.1)
                await say(socket, {"type": "input_audio_buffer.append", "audio": "AAAA"})  # is not answered
            for _ in range(8):
                await asyncio.sleep(0.1)
                await up.sessions[0].say("rate_limits.updated")
                await event(socket)
            for _ in range(12):
                with suppress(ConnectionError):
                    await socket.ping()
                await asyncio.sleep(0.1)
            assert (await socket.receive(timeout=0.3)).data == 1001  # has been there for long
        assert (await only_receipt(gateway)).error == "session_idle"


async def test_a_session_may_be_longer_than_other_calls() -> None:
    async with realtime() as up, running(yaml(up, call_seconds=0.2)) as gateway:
        async with joined(gateway) as socket:
            await asyncio.sleep(0.4)
            await say(socket, CREATE)
            await until(socket, "response.done")
        assert (await only_receipt(gateway)).outcome == "complete"


async def test_shutdown_lets_a_session_go_on_for_the_grace_and_then_says_going_away() -> None:
    async with realtime() as up, running(yaml(up, drain_seconds=0.5)) as gateway:
        async with joined(gateway) as socket:
            stopping = asyncio.create_task(gateway.server.stop(0.5))
            await asyncio.sleep(0.1)
            await say(socket, CREATE)
            await until(socket, "response.done")
            message = await socket.receive(timeout=5)
            assert (message.type, message.data) == (aiohttp.WSMsgType.CLOSE, 1001)
            await stopping
        receipt = await only_receipt(gateway)
        assert (receipt.outcome, receipt.error, receipt.usage) == ("failed", "shutting_down", ANSWER)


async def test_what_a_plugin_held_comes_back_however_a_session_ends() -> None:
    stages = {"rate_limit": [probe("may", hold="h")]}
    async with realtime() as up, running(yaml(up, pipeline=stages)) as gateway:
        may: Probe = gateway.plugin("rate_limit", "may")
        with suppress(aiohttp.ClientError):
            async with joined(gateway) as socket:
                assert len(may.holds) == 1
                await _lost(socket)
        await gateway.settled(1)
        assert (may.holds, may.events[-1]) == ([], "settle abandoned")


# --- sizes -------------------------------------------------------------------------------------


async def test_a_message_that_is_too_long_ends_the_session_with_1009() -> None:
    async with realtime() as up, running(yaml(up)) as gateway:
        async with joined(gateway) as socket:
            await socket.send_str("x" * (16 * 1024 * 1024 + 1))
            message = await socket.receive(timeout=10)
            assert (message.type, message.data) == (aiohttp.WSMsgType.CLOSE, 1009)
        assert (await only_receipt(gateway)).outcome == "abandoned"


async def test_a_provider_that_does_not_read_stops_the_client_from_sending() -> None:
    async with realtime() as up, running(yaml(up)) as gateway, joined(gateway) as socket:
        up.reading.clear()
        await say(socket, {"type": "nonsense"})
        sent = await _sent_until_it_stalls(socket)
        assert sent < MOST_BUFFERED
        up.reading.set()
        assert (await event(socket))["type"] == "error"


async def test_a_client_that_does_not_read_stops_the_provider_from_sending() -> None:
    async with realtime() as up, running(yaml(up)) as gateway, joined(gateway) as socket:
        session: Joined = up.sessions[0]
        sent = await _sent_until_it_stalls(session.socket)
        assert sent < MOST_BUFFERED
        total = 0
        while total < sent:
            total += len(await socket.receive_str(timeout=5))


MOST_BUFFERED = 40 * 1024 * 1024
"""What kernels keep for four sockets is a part of it; without backpressure it would be all that is offered."""
_PIECE = "x" * 65536
_PIECES = 2048


async def _sent_until_it_stalls(socket: Any) -> int:
    """How many bytes a side can send to one that does not read."""
    sent = 0
    with suppress(TimeoutError):
        for _ in range(_PIECES):
            async with asyncio.timeout(0.5):
                await socket.send_str(_PIECE)
            sent += len(_PIECE)
    return sent


async def test_memory_stays_flat_while_much_passes() -> None:
    async with realtime() as up, running(yaml(up)) as gateway, joined(gateway) as socket:
        session: Joined = up.sessions[0]

        async def pass_on(pieces: int) -> None:
            async def send() -> None:
                for _ in range(pieces):
                    await session.socket.send_str(_PIECE)

            sending = asyncio.create_task(send())
            for _ in range(pieces):
                await socket.receive_str(timeout=10)
            await sending

        await pass_on(200)
        gc.collect()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        await pass_on(1000)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 16 * 1024


# --- the beta ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "sent"),
    [
        ({}, None),
        ({"headers": {"openai-beta": "realtime=v1"}}, "realtime=v1"),
        ({"headers": {"openai-beta": "assistants=v2, realtime=v1"}}, "realtime=v1"),
        ({"protocols": ("realtime", "openai-beta.realtime-v1")}, "realtime=v1"),
        ({"headers": {"openai-beta": "assistants=v2"}}, None),
    ],
)
async def test_the_kind_of_session_that_the_client_speaks_is_asked_of_openai(
    asked: dict[str, Any], sent: str | None
) -> None:
    async with realtime() as up, running(yaml(up)) as gateway:
        async with joined(gateway, **asked) as socket:
            await say(socket, CREATE)
            await until(socket, "response.audio.delta" if sent else "response.output_audio.delta")
            await until(socket, "response.done")
        assert up.sessions[0].headers.get("openai-beta") == sent
        assert (await only_receipt(gateway)).usage == ANSWER


async def test_a_redirect_is_not_followed_with_the_gateways_key() -> None:
    async with realtime() as up, upstream() as first:
        text = yaml(up).replace(up.url, first.url)
        first.script(Scripted(307, headers={"location": f"{up.url}/realtime?model=gpt-realtime"}))
        async with running(text) as gateway:
            assert (await refused(gateway)).status == 502
            assert (len(first.requests), up.requests) == (1, 0)


# --- what is rare ------------------------------------------------------------------------------


async def test_a_session_keeps_its_configuration_through_a_reload() -> None:
    async with realtime() as up, running(yaml(up)) as gateway:
        async with joined(gateway) as socket:
            await gateway.reload(yaml(up, model={"max_output_tokens": 7}))
            await say(socket, CREATE)
            await until(socket, "response.done")
        receipt = await only_receipt(gateway)
        assert receipt.config_version != gateway.gateway.current.pipeline.version
        assert (receipt.outcome, receipt.usage) == ("complete", ANSWER)


async def test_frames_that_come_with_the_request_are_not_lost() -> None:
    async with realtime() as up, running(yaml(up)) as gateway:
        host, port = gateway.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        lines = "".join(f"{name}: {value}\r\n" for name, value in UPGRADE.items())
        text = b'{"type":"nonsense"}'
        frame = bytes([0x81, 0x80 | len(text), 0, 0, 0, 0]) + text
        writer.write(f"GET /v1/realtime?model=voice HTTP/1.1\r\nhost: x\r\n{lines}\r\n".encode() + frame + frame)
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 101 Switching Protocols\r\n")
        assert b"\r\nsec-websocket-accept: ICX+Yqv66kxgM0FcWaLWlFLwTAI=\r\n" in head
        assert b"permessage-deflate" not in head
        received = b""
        while received.count(b'"code":"invalid_value"') < 2:
            received += await asyncio.wait_for(reader.read(65536), 5)
        writer.transport.abort()
        assert (await only_receipt(gateway)).outcome == "abandoned"


TEXT = b'{"type":"nonsense"}'


def _sent(data: bytes, *, mask: bool = True, opcode: int = 0x81) -> bytes:
    """A frame as a client sends it, or as none may."""
    flag, size = 0x80 if mask else 0, len(data)
    if size < 126:
        length = bytes([flag | size])
    else:
        length = (
            bytes([flag | 127]) + size.to_bytes(8, "big") if size > 999 else bytes([flag | 126, size >> 8, size & 255])
        )
    return bytes([opcode]) + length + (bytes(4) if mask else b"") + data


@pytest.mark.parametrize("step", [1, 3, 70_000, 10**6])
@pytest.mark.parametrize(
    ("good", "bad", "code"),
    [
        ([], _sent(TEXT, mask=False), 1002),
        ([_sent(TEXT), _sent(b" " * 300 + TEXT), _sent(TEXT)], _sent(TEXT, mask=False), 1002),
        ([_sent(b" " * 70_000 + TEXT)], _sent(b"", mask=False), 1002),
        ([], _sent(b"{\xff\xfe}"), 1007),
        (
            [_sent('{"type":"\u00e4"}'.encode()), _sent(TEXT)],
            _sent(b"\xc3", opcode=1) + _sent(b"(", opcode=0x80),
            1007,
        ),
    ],
    ids=["unmasked", "unmasked later", "unmasked after a long one", "no UTF-8", "no UTF-8 in pieces"],
)
async def test_frames_that_no_client_may_send_end_the_session_and_are_the_clients(
    good: list[bytes], bad: bytes, code: int, step: int
) -> None:
    step = 997 if len(b"".join(good)) > 1000 and step < 100 else step
    async with realtime() as up, running(yaml(up)) as gateway:
        host, port = gateway.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        lines = "".join(f"{name}: {value}\r\n" for name, value in UPGRADE.items())
        writer.write(f"GET /v1/realtime?model=voice HTTP/1.1\r\nhost: x\r\n{lines}\r\n".encode())
        await reader.readuntil(b"\r\n\r\n")
        received = b""
        for wire, awaited, times in (b"".join(good), b'"invalid_value"', len(good)), (bad, code.to_bytes(2, "big"), 1):
            for place in range(0, len(wire), step):
                writer.write(wire[place : place + step])
                await asyncio.sleep(0.001)
            while received.count(awaited) < times:
                more = await asyncio.wait_for(reader.read(65536), 5)
                assert more, received[-200:]
                received += more
        writer.transport.abort()
        receipt = await only_receipt(gateway)
        assert (receipt.outcome, receipt.status, receipt.error) == ("abandoned", 499, "client_closed")
        (session,) = up.sessions
        await asyncio.wait_for(session.closed.wait(), 5)


async def test_an_upgrade_in_http_1_0_is_refused_and_no_session_left_open() -> None:
    async with realtime() as up, running(yaml(up)) as gateway:
        host, port = gateway.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        lines = "".join(f"{name}: {value}\r\n" for name, value in UPGRADE.items())
        writer.write(f"GET /v1/realtime?model=voice HTTP/1.0\r\nhost: x\r\n{lines}\r\n".encode())
        answer = await asyncio.wait_for(reader.read(), 5)
        writer.close()
        assert answer.startswith(b"HTTP/1.0 426 Upgrade Required\r\n")
        assert (await only_receipt(gateway)).outcome == "failed"
        for session in up.sessions:
            await asyncio.wait_for(session.closed.wait(), 5)
