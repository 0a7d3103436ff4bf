"""HTTP as clients meet it: errors in OpenAI's words, bodies that are wrong, framing that lies."""

from __future__ import annotations

import asyncio
import gzip
import json
from typing import Any

import orjson
import pytest
from yamls import CHAT, HELLO, STREAM, config, probe

from qlens.connection import new_id
from qlens.heads import duration
from qlens.testing import Running, running


async def _raw(gateway: Running, sent: bytes, *, more: bytes = b"", wait_for: bytes = b"") -> bytes:
    """Send bytes as they are; read until the gateway closes, or stops for a moment."""
    host, port = gateway.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(sent)
    got = b""
    if wait_for:
        got = await asyncio.wait_for(reader.readuntil(wait_for), 5)
        writer.write(more)
    try:
        while part := await asyncio.wait_for(reader.read(65536), 1):
            got += part
    except TimeoutError:
        pass
    writer.close()
    return got


def _http(body: bytes = orjson.dumps(HELLO), path: str = CHAT, *headers: str, method: str = "POST") -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "host: x", "connection: close", *headers]
    if not any(header.lower().startswith(("content-length", "transfer-encoding")) for header in headers):
        lines.append(f"content-length: {len(body)}")
    if not any(header.lower().startswith("content-type") for header in headers):
        lines.append("content-type: application/json")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "status", "code", "param"),
    [
        ("POST", "/v1/nothing", b"{}", {}, 404, "unknown_url", None),
        ("GET", CHAT, None, {}, 405, "method_not_supported", None),
        ("DELETE", "/v1/models/gpt-4o-mini", None, {}, 405, "method_not_supported", None),
        ("POST", CHAT, b"{", {}, 400, None, None),
        ("POST", CHAT, b"", {}, 400, None, None),
        ("POST", CHAT, b"[]", {}, 400, None, None),
        ("POST", CHAT, b"\xff\xfe{}", {}, 400, None, None),
        ("POST", CHAT, b"{}", {}, 400, "missing_required_parameter", "model"),
        ("POST", CHAT, b'{"model":"gpt-4o-mini"}', {}, 400, "missing_required_parameter", "messages"),
        ("POST", CHAT, b'{"model":1,"messages":[]}', {}, 400, "invalid_type", "model"),
        ("POST", CHAT, b'{"model":"gpt-4o-mini","messages":"hi"}', {}, 400, "invalid_type", "messages"),
        ("POST", CHAT, b"{}", {"content-type": "text/plain"}, 415, "unsupported_content_type", None),
        ("POST", CHAT, b"{}", {"content-encoding": "br"}, 415, "unsupported_content_type", None),
        ("GET", "/v1/models/none", None, {}, 404, "model_not_found", "model"),
    ],
)
async def test_what_is_wrong_with_a_request_is_said_in_openais_words(
    method: str,
    path: str,
    body: bytes | None,
    headers: dict[str, str],
    status: int,
    code: str | None,
    param: str | None,
) -> None:
    async with running(config()) as gateway:
        answer = await gateway.request(method, path, body=body, headers=headers)
        error = answer.json()["error"]
        assert (answer.status, error["code"], error["param"]) == (status, code, param)
        assert error["type"] == "invalid_request_error"
        assert set(error) == {"message", "type", "param", "code"}
        assert answer.headers["x-request-id"]
        if status == 405:
            assert answer.headers["allow"]


@pytest.mark.parametrize(
    "body",
    [
        b'{"model":"gpt-4o-mini","messages":[{"role":"user","content":"x"}],"temperature":NaN}',
        b'{"model":"gpt-4o-mini","messages":[{"role":"user","content":"x"}],"temperature":1e400}',
        b'{"model":"gpt-4o-mini","messages":[{"role":"user","content":"\\ud800"}]}',
        b'{"model":"gpt-4o-mini","messages":[{"role":"user","content":"x"}],"max_tokens":1e23}',
        b'{"model":"gpt-4o-mini","messages":[{"role":"user","content":"x"}],"max_tokens":1.5}',
        b'{"model":"gpt-4o-mini","messages":[{"role":"user","content":"x"}],"max_tokens":"100"}',
        b'{"model":"gpt-4o-mini","messages":[{"role":"user","content":"x"}],"max_tokens":-1}',
        b'{"model":"gpt-4o-mini","messages":[{"role":"user","content":"x"}],"n":true}',
        b'{"a":' * 2000 + b"1" + b"}" * 2000,
        b"[" * 1_000_000,
        b'{"model":"gpt-4o-mini","messages":[{"role":"user","content":"x"}],"seed":123456789012345678901234567890}',
    ],
    ids=["NaN", "infinity", "surrogate", "1e23", "1.5", "text", "negative", "bool", "deep", "deeper", "big integer"],
)
async def test_json_traps_are_400(body: bytes) -> None:
    async with running(config()) as gateway:
        answer = await gateway.post(CHAT, body)
        assert answer.status == 400
        assert answer.json()["error"]["type"] == "invalid_request_error"
        (receipt,) = await gateway.settled(1)
        assert receipt.outcome == "rejected"


async def test_of_duplicate_keys_the_last_wins_and_only_the_edited_body_travels() -> None:
    raw = b'{"model":"nope","messages":[{"role":"user","content":"x"}],"user":"a","user":"b","model":"gpt-4o-mini"}'
    async with running(config()) as gateway:
        assert (await gateway.post(CHAT, raw)).status == 200
        (body,) = gateway.plugin("provider", "talker").bodies
        assert (body["model"], body["user"]) == ("gpt-4o-mini", "b")


async def test_unknown_and_not_allowed_models_get_the_same_answer() -> None:
    import hashlib

    digest = hashlib.sha256(b"sk-example-a").hexdigest()
    keys = f"keys:\n- {{id: k, hash: 'sha256:{digest}', tenant: acme, models: [nothing-yet]}}\n"
    stages = {"auth": [{"plugin": "api_keys", "file": "keys.yaml"}]}
    async with running(config(stages), files={"keys.yaml": keys}) as gateway:
        answers = [
            await gateway.post(CHAT, {**HELLO, "model": name}, key="sk-example-a")
            for name in ("gpt-4o-mini", "gpt-9x-mini")
        ]
        assert [answer.status for answer in answers] == [404, 404]
        first, second = (answer.text.replace("gpt-4o", "*").replace("gpt-9x", "*") for answer in answers)
        assert first == second
        assert (await gateway.get("/v1/models", key="sk-example-a")).json()["data"] == []
        assert (await gateway.get("/v1/models/gpt-4o-mini", key="sk-example-a")).status == 404


async def test_model_ids_may_contain_slashes_and_colons() -> None:
    models = {
        "openai/gpt-4o:latest": {"targets": [{"provider": "talker", "model": "m"}]},
        "wild/*": {"targets": [{"provider": "talker", "model": "*"}]},
    }
    async with running(config({}, None, models)) as gateway:
        for path in ("openai/gpt-4o:latest", "openai%2Fgpt-4o%3Alatest"):
            assert (await gateway.get(f"/v1/models/{path}")).json()["id"] == "openai/gpt-4o:latest"
        assert [m["id"] for m in (await gateway.get("/v1/models")).json()["data"]] == ["openai/gpt-4o:latest"]
        answer = await gateway.post(CHAT, {**HELLO, "model": "wild/a/b"})
        assert answer.json()["model"] == "a/b"
        assert answer.headers["x-qlens-model"] == "wild/*"


async def test_a_body_over_the_cap_is_413_whether_it_says_so_or_not() -> None:
    async with running(config({"auth": [{"plugin": "anonymous"}]}, max_body_bytes=1000)) as gateway:
        big = orjson.dumps({**HELLO, "user": "x" * 2000})
        assert (await gateway.post(CHAT, big)).status == 413
        chunked = b"800\r\n" + b"x" * 0x800 + b"\r\n0\r\n\r\n"
        answer = await _raw(gateway, _http(chunked, CHAT, "transfer-encoding: chunked"))
        assert answer.startswith(b"HTTP/1.1 413 ")
        squeezed = gzip.compress(orjson.dumps({**HELLO, "user": "x" * 1_000_000}))
        assert (await gateway.post(CHAT, squeezed, headers={"content-encoding": "gzip"})).status in {413, 400}
        fits = gzip.compress(orjson.dumps(HELLO))
        assert (await gateway.post(CHAT, fits, headers={"content-encoding": "gzip"})).status == 200


async def test_the_body_is_not_read_before_authentication() -> None:
    async with running(config({"auth": [probe("nobody")]}, max_body_bytes=10)) as gateway:
        assert (await gateway.post(CHAT, b"x" * 1000)).status == 401


async def test_100_continue_is_answered_after_authentication_only() -> None:
    body = orjson.dumps(HELLO)
    head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\n"
    head += f"expect: 100-continue\r\ncontent-length: {len(body)}\r\n\r\n"
    async with running(config()) as gateway:
        got = await _raw(gateway, head.encode(), more=body, wait_for=b"100 Continue\r\n\r\n")
        assert b"HTTP/1.1 200 OK" in got
    async with running(config({"auth": [probe("nobody")]})) as gateway:
        got = await _raw(gateway, head.encode())
        assert got.startswith(b"HTTP/1.1 401 ")


@pytest.mark.parametrize(
    "sent",
    [
        b"GARBAGE\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        _http(b"0\r\n\r\n", CHAT, "transfer-encoding: chunked", "content-length: 5"),
        _http(b"{}", CHAT, "content-length: 2", "content-length: 2"),
        _http(b"{}", CHAT, "content-length: +2"),
        _http(b"{}", CHAT, "content-length : 2"),
        _http(b"{}", CHAT, "transfer-encoding: xchunked"),
        _http(b"{}", CHAT, "x: a\x00b"),
        _http(b"{}", CHAT, "x: a\r\n folded: b"),
        _http(b"0\r\n\r\n", CHAT, "transfer-encoding: chunked").replace(b"HTTP/1.1", b"HTTP/1.0"),
        _http(b"zz\r\n\r\n", CHAT, "transfer-encoding: chunked"),
    ],
    ids=[
        "garbage", "tls", "CL and TE", "two CL", "+CL", "space before colon", "xchunked", "NUL", "folded", "TE on 1.0",
        "bad chunk",
    ],
)  # fmt: skip
async def test_malformed_http_is_400_in_openais_words_and_echoes_nothing(sent: bytes) -> None:
    async with running(config()) as gateway:
        got = await _raw(gateway, sent)
        head, _, body = got.partition(b"\r\n\r\n")
        assert head.startswith((b"HTTP/1.1 400 ", b"HTTP/1.0 400 "))
        assert b"application/json" in head.lower()
        error = json.loads(body)["error"]
        assert error["type"] == "invalid_request_error"
        assert "Traceback" not in error["message"]
        assert "aaaa" not in error["message"]
        assert (await gateway.post(CHAT, HELLO)).status == 200


@pytest.mark.parametrize("where", ["credential", "header", "line"])
async def test_a_header_that_is_too_long_is_named_as_such_and_not_echoed(where: str) -> None:
    long = "eyJ" + "a" * 8190
    sent = {
        "credential": _http(b"{}", CHAT, f"authorization: Bearer {long}"),
        "header": _http(b"{}", CHAT, f"x: {long}"),
        "line": _http(b"{}", f"{CHAT}?{long}"),
    }[where]
    async with running(config()) as gateway:
        head, _, body = (await _raw(gateway, sent)).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 431 Request Header Fields Too Large\r\n")
        error = json.loads(body)["error"]
        assert (error["type"], error["code"]) == ("invalid_request_error", "header_too_large")
        assert "8190 bytes" in error["message"]
        assert long[:40].encode() not in head + body
        fits = f"authorization: Bearer {long[: 8190 - len('authorization: Bearer ')]}"
        assert (await _raw(gateway, _http(b"{}", CHAT, fits, "connection: close"))).startswith(b"HTTP/1.1 4")


@pytest.mark.parametrize("host", ["x/?", "x/v1/models#", "evil@x", "[::1", "x:99999", ""])
async def test_what_is_served_never_depends_on_the_host_header(host: str) -> None:
    async with running(config({"auth": [probe("nobody")]})) as gateway:
        for path, status in (("/v1/models", 401), ("/healthz", 200), ("/admin/health", 404)):
            request = f"GET {path} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n".encode()
            got = await _raw(gateway, request)
            assert got.startswith(f"HTTP/1.1 {status} ".encode()), (host, path, got[:40])


@pytest.mark.parametrize(
    "path", ["//v1/models", "/v1/models/", "/v1/../v1/models", "/v1/models;x", "/V1/models", "/%761/models"]
)
async def test_only_the_exact_path_is_served(path: str) -> None:
    async with running(config()) as gateway:
        got = await _raw(gateway, f"GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode())
        assert got.startswith(b"HTTP/1.1 404 ")


async def test_an_answer_tells_how_it_came_about() -> None:
    stages = {"cost": [probe("p", answer=["price"])]}
    async with running(config(stages)) as gateway:
        answer = await gateway.post(CHAT, HELLO)
        assert answer.headers["x-qlens-provider"] == "talker"
        assert answer.headers["x-qlens-model"] == "gpt-4o-mini"
        assert answer.headers["x-qlens-cache"] == "off"
        assert answer.headers["x-qlens-attempts"] == "1"
        assert float(answer.headers["x-qlens-overhead-ms"]) > 0
        assert answer.headers["x-qlens-cost-usd"] == "0.000008"
        (receipt,) = await gateway.settled(1)
        assert receipt.id == answer.headers["x-request-id"]
        assert (receipt.usage.input, receipt.usage.output, receipt.cost.picos) == (5, 3, 8_000_000)
        streamed = await gateway.post(CHAT, {**STREAM, "stream_options": {"include_usage": True}})
        usage = streamed.events()[-2]
        assert usage["choices"] == []
        assert usage["usage"]["cost_usd"] == "0.000008"


async def test_an_unpriced_answer_has_no_cost_header_and_a_null_in_the_usage_event() -> None:
    async with running(config()) as gateway:
        answer = await gateway.post(CHAT, HELLO)
        assert "x-qlens-cost-usd" not in answer.headers
        streamed = await gateway.post(CHAT, {**STREAM, "stream_options": {"include_usage": True}})
        assert streamed.events()[-2]["usage"]["cost_usd"] is None
        receipts = await gateway.settled(2)
        assert {(receipt.cost.picos, receipt.cost.state) for receipt in receipts} == {(None, "unpriced")}


async def test_the_api_key_header_of_azure_clients_is_a_credential_too() -> None:
    import hashlib

    digest = hashlib.sha256(b"sk-example-a").hexdigest()
    keys = f"keys:\n- {{id: k, hash: 'sha256:{digest}', tenant: acme}}\n"
    stages = {"auth": [{"plugin": "api_keys", "file": "keys.yaml"}]}
    async with running(config(stages), files={"keys.yaml": keys}) as gateway:
        assert (await gateway.post(CHAT, HELLO, headers={"api-key": "sk-example-a"})).status == 200
        assert (await gateway.post(CHAT, HELLO, headers={"authorization": "Basic c2s="})).status == 401
        assert (await gateway.post(CHAT, HELLO, headers={"authorization": "Bearer "})).status == 401


DRIPS = {
    "small": ("content-length: 100", b'{"model'),
    "large": ("content-length: 1000000", b'{"model'),
    "chunked": ("transfer-encoding: chunked", b'7\r\n{"model\r\n'),
}


@pytest.mark.parametrize(("framing", "part"), DRIPS.values(), ids=DRIPS)
async def test_a_body_that_drips_is_408(framing: str, part: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qlens.connection.BODY_GRACE_SECONDS", 0.2)
    async with running(config()) as gateway:
        head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n{framing}\r\n\r\n"
        got = await _raw(gateway, head.encode() + part)
        assert got.startswith(b"HTTP/1.1 408 ")
        (receipt,) = await gateway.settled(1)
        assert (receipt.outcome, receipt.status) == ("rejected", 408)


@pytest.mark.parametrize("at_once", [0, 100_000])
@pytest.mark.parametrize(("pause", "status"), [(0.6, 200), (1.8, 408)])
async def test_a_body_may_take_the_longer_the_more_of_it_is_there(
    at_once: int, pause: float, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qlens.connection.AT_ONCE_BYTES", at_once)
    monkeypatch.setattr("qlens.connection.BODY_GRACE_SECONDS", 0.2)
    monkeypatch.setattr("qlens.connection.BODY_BYTES_PER_SECOND", 1000)
    body = orjson.dumps({**HELLO, "user": "x" * 2000})
    async with running(config()) as gateway:
        host, port = gateway.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        request = _http(body)
        writer.write(request[:-1000])  # more than 1,000 bytes of the body: a second more than at first
        await asyncio.sleep(pause)
        writer.write(request[-1000:])
        assert (await asyncio.wait_for(reader.read(13), 5)).startswith(f"HTTP/1.1 {status} ".encode())
        writer.close()


@pytest.mark.parametrize("at_once", [0, 100_000])
async def test_a_body_in_pieces_is_read_whole(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qlens.connection.AT_ONCE_BYTES", at_once)
    async with running(config()) as gateway:
        for cut in (-1, -10, -len(orjson.dumps(HELLO))):
            request = _http()
            host, port = gateway.url.removeprefix("http://").split(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            for part in (request[:cut], request[cut:]):
                writer.write(part)
                await asyncio.sleep(0.02)
            assert (await asyncio.wait_for(reader.read(), 5)).startswith(b"HTTP/1.1 200 ")
            writer.close()


async def test_answers_do_not_tell_what_they_run_on() -> None:
    async with running(config()) as gateway:
        for answer in (await gateway.get("/healthz"), await gateway.post(CHAT, STREAM), await gateway.get("/x")):
            assert answer.headers["server"] == "qlens"


async def test_two_calls_on_one_connection_and_pipelined_ones_are_all_answered() -> None:
    one = _http().replace(b"connection: close\r\n", b"")
    async with running(config()) as gateway:
        got = await _raw(gateway, one + one + _http())
        assert got.count(b"HTTP/1.1 200 OK") == 3
        assert len(await gateway.settled(3)) == 3


def test_ids_are_unique_and_in_the_order_of_time() -> None:
    import uuid

    ids = [new_id() for _ in range(1000)]
    assert len(set(ids)) == 1000
    assert [i[:13] for i in ids] == sorted(i[:13] for i in ids)
    assert {uuid.UUID(i).version for i in ids} == {7}
    assert {uuid.UUID(i).variant for i in ids} == {uuid.RFC_4122}


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.0, "0ms"), (0.012, "12ms"), (1, "1s"), (1.5, "1.5s"), (360, "6m0s"), (3723, "1h2m3s")]
)
def test_durations_are_written_as_openai_does(seconds: float, text: str) -> None:
    assert duration(seconds) == text


async def test_metrics_have_no_label_from_a_clients_text() -> None:
    async with running(config({}, None, {"m*": {"targets": [{"provider": "talker", "model": "*"}]}})) as gateway:
        before: list[Any] = []
        for round_ in range(2):
            for n in range(30):
                await gateway.post(CHAT, {**HELLO, "model": f"m{round_}{n}"})
                await gateway.get(f"/v1/x{round_}{n}")
                await gateway.post(CHAT, {**HELLO, "model": f"unknown{round_}{n}"})
            before.append((await gateway.get("/metrics")).text.count("\n"))
        assert before[0] == before[1]


async def test_calls_that_are_on_their_way_when_the_gateway_stops_are_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qlens.server.LAST_SECONDS", 30)
    async with running(config()) as gateway:
        host, port = gateway.url.removeprefix("http://").split(":")
        clients = [await asyncio.open_connection(host, int(port)) for _ in range(3)]
        # They are connected, though the gateway had no turn of the loop in which to take them.
        stopping = asyncio.create_task(gateway.server.stop(30))
        await asyncio.sleep(0.05)
        for reader, writer in clients:
            writer.write(b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n")
            answer = (await reader.read()).lower()  # to the end: the connection closes by itself
            assert answer.startswith(b"http/1.1 200 ok")
            assert b"connection: close" in answer
            writer.close()
        await asyncio.wait_for(stopping, 10)
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection(host, int(port))


async def test_a_body_that_is_still_arriving_when_the_gateway_stops_is_read() -> None:
    async with running(config()) as gateway:
        host, port = gateway.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        request = _http()
        writer.write(request[:-10])
        while not gateway.gateway.current.running:
            await asyncio.sleep(0.01)
        stopping = asyncio.create_task(gateway.server.stop(30))
        await asyncio.sleep(0.05)
        assert gateway.gateway.draining
        writer.write(request[-10:])
        assert (await asyncio.wait_for(reader.read(), 5)).startswith(b"HTTP/1.1 200 OK")
        writer.close()
        await asyncio.wait_for(stopping, 5)


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/gpt-4o-mini", "/v1/models/unknown", "/healthz"])
async def test_head_is_told_what_get_is_without_its_body(path: str) -> None:
    async with running(config()) as gateway:
        got = await gateway.get(path)
        head = await _raw(gateway, _http(b"", path, method="HEAD"))
        lines, _, body = head.decode().partition("\r\n\r\n")
        assert lines.startswith(f"HTTP/1.1 {got.status} ")
        assert f"content-length: {len(got.body)}\r\n" in lines
        assert body == ""


@pytest.mark.parametrize("path", [CHAT, "/v1/realtime"])
async def test_head_is_no_method_where_a_provider_would_be_asked(path: str) -> None:
    async with running(config()) as gateway:
        assert (await _raw(gateway, _http(b"", path, method="HEAD"))).startswith(b"HTTP/1.1 405 ")


async def test_a_body_of_too_many_objects_is_refused_and_braces_in_a_text_are_none() -> None:
    parts: list[Any] = [{"type": "text", "text": "a"}] * 49_998  # beside the message and the body
    async with running(config()) as gateway:
        enough = await gateway.post(CHAT, {**HELLO, "messages": [{"role": "user", "content": parts}]})
        assert enough.status == 200
        text = await gateway.post(CHAT, {**HELLO, "messages": [{"role": "user", "content": "{" * 300_000}]})
        assert text.status == 200
        parts.append(parts[0])
        answer = await gateway.post(CHAT, {**HELLO, "messages": [{"role": "user", "content": parts}]})
        assert answer.status == 400
        assert "more than 50000 JSON objects" in answer.json()["error"]["message"]
