"""The client side against real sockets: deadlines, reuse, and everything a server can do wrong."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import suppress

import pytest

from qlens import (
    Deadlines,
    Secret,
    Upstream,
    UpstreamError,
    UpstreamInvalid,
    UpstreamTimedOut,
    UpstreamTruncated,
    UpstreamUnavailable,
    UpstreamUnreachable,
    header_value,
    http_url,
)
from qlens.testing import Scripted
from qlens.testing.upstreams import FakeUpstream

OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"transfer-encoding: chunked\r\n\r\n"
QUICK = Deadlines(connect_seconds=2, first_byte_seconds=0.2, idle_seconds=0.2)
PATIENT = Deadlines()
EVENTS = [{"n": n} for n in range(5)]


@pytest.fixture
async def http() -> AsyncIterator[Upstream]:
    http = Upstream()
    yield http
    await http.aclose()


async def fetch(http: Upstream, url: str, *, body: bytes | None = b"{}", deadlines: Deadlines = PATIENT) -> bytes:
    answer = await http.open("POST", url, headers={}, body=body, deadlines=deadlines)
    return await answer.read()


async def _eventually(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not true():
            await asyncio.sleep(0.005)


# --- what servers get wrong --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "error"),
    [
        pytest.param(b"", UpstreamUnreachable, id="nothing"),
        pytest.param(b"HTTP/1.1 20", UpstreamUnreachable, id="half a status line"),
        pytest.param(OK + b"content-le", UpstreamUnreachable, id="half a head"),
        pytest.param(b"hello\r\n\r\n", UpstreamInvalid, id="HTTP/0.9"),
        pytest.param(b"SSH-2.0-OpenSSH_9.6\r\n", UpstreamInvalid, id="not HTTP"),
        pytest.param(OK + b"content-length: 5\r\ncontent-length: 6\r\n\r\nhello", UpstreamInvalid, id="two lengths"),
        pytest.param(
            OK + b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
            UpstreamInvalid,
            id="length and chunks",
        ),
        pytest.param(OK + b"a: b\r\n" * 200 + b"\r\n", UpstreamInvalid, id="200 headers"),
        pytest.param(OK + b"a: " + b"b" * 9000 + b"\r\n\r\n", UpstreamInvalid, id="a header of 9 kB"),
        pytest.param(b"HTTP/1.1 204 No Content\r\n\r\nbody", UpstreamInvalid, id="204 with a body"),
        pytest.param(OK + b"content-length: 9\r\n\r\nhello", UpstreamTruncated, id="short body"),
        pytest.param(CHUNKED + b"5\r\nhello\r\n", UpstreamTruncated, id="no last chunk"),
        pytest.param(CHUNKED + b"9\r\nhello", UpstreamTruncated, id="half a chunk"),
        pytest.param(CHUNKED + b"5\r\nhello\r\nZZ\r\nabc", UpstreamInvalid, id="no chunk size"),
        pytest.param(
            OK + b"content-encoding: gzip\r\ncontent-length: 5\r\n\r\nhello", UpstreamInvalid, id="not the gzip it says"
        ),
    ],
)
async def test_broken_answer_is_one_of_our_errors(
    http: Upstream, up: FakeUpstream, raw: bytes, error: type[UpstreamError]
) -> None:
    up.script(Scripted(raw=raw))
    with pytest.raises(error) as caught:
        await fetch(http, up.url)
    assert type(caught.value) is error
    assert len(up.requests) == 1


@pytest.mark.parametrize("cut_at", [0, 1, 10])
async def test_reset_within_the_body_is_a_truncated_answer(http: Upstream, up: FakeUpstream, cut_at: int) -> None:
    up.script(Scripted(body=b"x" * 100, cut_at=cut_at, reset=True, gap=0.02))
    with pytest.raises(UpstreamTruncated):
        await fetch(http, up.url)


async def test_interim_answers_are_skipped(http: Upstream, up: FakeUpstream) -> None:
    interim = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n"
    up.script(Scripted(raw=interim + OK + b"content-length: 2\r\n\r\nok"))
    assert await fetch(http, up.url) == b"ok"


async def test_body_without_a_length_ends_with_the_connection(http: Upstream, up: FakeUpstream) -> None:
    up.script(Scripted(raw=OK + b"\r\nall of it"))
    assert await fetch(http, up.url) == b"all of it"


async def test_body_over_the_limit_is_refused_and_the_connection_closed(http: Upstream, up: FakeUpstream) -> None:
    up.script(Scripted(events=[b"x" * 1000] * 5, hang=True))
    answer = await http.open("GET", up.url, headers={}, body=None, deadlines=PATIENT)
    with pytest.raises(UpstreamInvalid, match="more than 3000 bytes"):
        await answer.read(limit=3000)
    await asyncio.wait_for(up.requests[0].closed.wait(), 5)


async def test_nobody_listening_is_unreachable(http: Upstream) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    with pytest.raises(UpstreamUnreachable, match="refused") as caught:
        await fetch(http, f"http://127.0.0.1:{port}/v1?key=sk-example-canary")
    assert "canary" not in str(caught.value)
    assert str(port) not in str(caught.value)
    assert caught.value.__notes__ == ["host: 127.0.0.1"]


async def test_server_without_tls_fails_the_handshake_and_is_not_asked_again(http: Upstream) -> None:
    async def plain(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(plain, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(UpstreamUnreachable, match="TLS") as caught:
            await fetch(http, f"https://127.0.0.1:{port}/")
    assert caught.value.code == "upstream_tls"
    assert not caught.value.again


# --- deadlines ---------------------------------------------------------------------------------


async def test_silent_server_times_out_before_the_head(http: Upstream, up: FakeUpstream) -> None:
    up.script(Scripted(hang=True))
    with pytest.raises(UpstreamTimedOut, match=r"did not answer within 0\.2 s"):
        await fetch(http, up.url, deadlines=QUICK)
    await asyncio.wait_for(up.requests[0].closed.wait(), 5)


async def test_server_that_sends_only_a_head_times_out(http: Upstream, up: FakeUpstream) -> None:
    up.script(Scripted(events=[], hang=True))
    with pytest.raises(UpstreamTimedOut, match="did not answer"):
        await fetch(http, up.url, deadlines=QUICK)
    await asyncio.wait_for(up.requests[0].closed.wait(), 5)


async def test_pause_within_the_body_times_out(http: Upstream, up: FakeUpstream) -> None:
    up.script(Scripted(events=EVENTS, hang=True))
    with pytest.raises(UpstreamTimedOut, match=r"paused for 0\.2 s in the middle"):
        await fetch(http, up.url, deadlines=QUICK)
    await asyncio.wait_for(up.requests[0].closed.wait(), 5)


async def test_pause_is_not_granted_the_time_for_the_first_byte(http: Upstream, up: FakeUpstream) -> None:
    deadlines = Deadlines(connect_seconds=2, first_byte_seconds=60, idle_seconds=0.2)
    up.script(Scripted(events=EVENTS, hang=True))
    with pytest.raises(UpstreamTimedOut):
        await asyncio.wait_for(fetch(http, up.url, deadlines=deadlines), 20)


async def test_slow_handshake_times_out_as_a_connection(http: Upstream) -> None:
    async def mute(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    async with await asyncio.start_server(mute, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(UpstreamTimedOut, match=r"No connection to the provider within 0\.2 s"):
            await fetch(http, f"https://127.0.0.1:{port}/", deadlines=Deadlines(connect_seconds=0.2))


async def test_steady_stream_may_last_longer_than_every_deadline(http: Upstream, up: FakeUpstream) -> None:
    deadlines = Deadlines(connect_seconds=1, first_byte_seconds=1, idle_seconds=1)
    up.script(Scripted(events=EVENTS, gap=0.3))
    assert (await fetch(http, up.url, deadlines=deadlines)).count(b"data: ") == len(EVENTS)


async def test_first_byte_of_the_body_may_take_longer_than_a_pause(http: Upstream, up: FakeUpstream) -> None:
    deadlines = Deadlines(connect_seconds=1, first_byte_seconds=5, idle_seconds=0.05)
    up.script(Scripted(events=[b"", b"slow thinker"], gap=0.3))
    answer = await http.open("POST", up.url, headers={}, body=b"{}", deadlines=deadlines)
    assert await anext(answer.chunks()) == b"slow thinker"
    await answer.close()


# --- connections -------------------------------------------------------------------------------


async def test_connection_is_used_again_after_a_whole_answer(http: Upstream, up: FakeUpstream) -> None:
    up.script(Scripted(body=b"one"), Scripted(events=EVENTS), Scripted(body=b"three"))
    for _ in range(3):
        await fetch(http, up.url)
    assert [request.connection for request in up.requests] == [1, 1, 1]


@pytest.mark.parametrize(
    "broken",
    [
        pytest.param(Scripted(body=b"x" * 50, cut_at=10), id="cut"),
        pytest.param(Scripted(body=b"ok, and more", headers={"content-length": "2"}), id="bytes after the end"),
        pytest.param(Scripted(events=EVENTS, hang=True), id="idle"),
    ],
)
async def test_connection_is_not_used_again_after_a_broken_answer(
    http: Upstream, up: FakeUpstream, broken: Scripted
) -> None:
    up.script(broken, Scripted(body=b"fine"))
    with suppress(UpstreamError):
        await fetch(http, up.url, deadlines=QUICK)
    assert await fetch(http, up.url) == b"fine"
    assert [request.connection for request in up.requests] == [1, 2]


async def test_an_answer_that_is_whole_gives_its_connection_back_before_it_is_read(
    http: Upstream, up: FakeUpstream
) -> None:
    up.script(Scripted(body=b"one"), Scripted(body=b"two"), Scripted(body=b"six"))
    first, second, third = [
        await http.open("POST", up.url, headers={}, body=b"{}", deadlines=PATIENT) for _ in range(3)
    ]
    assert up.connections == 1
    with pytest.raises(UpstreamInvalid, match="more than 2 bytes"):
        await second.read(2)
    await third.close()
    with pytest.raises(UpstreamTruncated):
        await third.read()
    assert await first.read() == b"one"
    assert [piece async for piece in first.chunks()] == []


async def test_answer_closed_in_the_middle_closes_the_connection(http: Upstream, up: FakeUpstream) -> None:
    up.script(Scripted(events=EVENTS, hang=True))
    answer = await http.open("POST", up.url, headers={}, body=b"{}", deadlines=PATIENT)
    await anext(answer.chunks())
    assert not up.requests[0].closed.is_set()
    await answer.close()
    await answer.close()
    await asyncio.wait_for(up.requests[0].closed.wait(), 5)


async def test_cancellation_while_waiting_for_the_head_closes_the_connection(http: Upstream, up: FakeUpstream) -> None:
    up.script(Scripted(hang=True))
    waiting = asyncio.create_task(fetch(http, up.url))
    await up.arrived(1)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await asyncio.wait_for(up.requests[0].closed.wait(), 5)


async def test_cancellation_while_reading_the_body_closes_the_connection(http: Upstream, up: FakeUpstream) -> None:
    up.script(Scripted(events=EVENTS, hang=True))
    answer = await http.open("POST", up.url, headers={}, body=b"{}", deadlines=PATIENT)
    reading = asyncio.create_task(answer.read())
    await asyncio.sleep(0.05)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    await asyncio.wait_for(up.requests[0].closed.wait(), 5)


async def test_150_streams_are_open_at_once(http: Upstream, up: FakeUpstream) -> None:
    up.script(*[Scripted(events=EVENTS, hang=True)] * 150)
    answers = await asyncio.gather(
        *(http.open("POST", up.url, headers={}, body=b"{}", deadlines=PATIENT) for _ in range(150))
    )
    assert up.open == 150
    assert all([await anext(answer.chunks()) for answer in answers])
    for answer in answers:
        await answer.close()


async def test_new_connection_that_dies_is_not_tried_again(http: Upstream, up: FakeUpstream) -> None:
    up.script(Scripted(raw=b""))
    with pytest.raises(UpstreamUnreachable):
        await fetch(http, up.url)
    assert len(up.requests) == 1


async def test_200_streams_keep_their_bytes_apart(http: Upstream, up: FakeUpstream) -> None:
    up.script(*[Scripted(events=[f"{number} {n}" for n in range(20)], split=7) for number in range(200)])
    bodies = await asyncio.gather(*(fetch(http, up.url) for _ in range(200)))
    expected = {b"".join(b"data: %d %d\n\n" % (number, n) for n in range(20)) for number in range(200)}
    assert set(bodies) == expected


async def test_connection_used_last_is_used_next(http: Upstream, up: FakeUpstream) -> None:
    up.script(Scripted(delay=0.1), Scripted(delay=0.2))
    await asyncio.gather(fetch(http, up.url), fetch(http, up.url))
    for _ in range(3):
        await fetch(http, up.url)
    _, longest, *next_ones = [request.connection for request in up.requests]
    assert up.connections == 2
    assert next_ones == [longest] * 3


async def test_idle_connection_is_closed_after_a_while(
    http: Upstream, up: FakeUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qlens.upstream_connection._IDLE_SECONDS", 0.1)
    await fetch(http, up.url)
    assert up.open == 1
    await _eventually(lambda: up.open == 0)
    await fetch(http, up.url)
    assert up.connections == 2


async def test_idle_connection_that_the_peer_closed_is_not_used(http: Upstream, up: FakeUpstream) -> None:
    up.script(Scripted(raw=OK + b"content-length: 2\r\n\r\nok"), Scripted(body=b"fine"))
    assert await fetch(http, up.url) == b"ok"
    await _eventually(lambda: up.open == 0)
    assert await fetch(http, up.url) == b"fine"
    assert [request.connection for request in up.requests] == [1, 2]


async def test_answer_whose_end_was_received_but_not_read_leaves_its_connection(
    http: Upstream, up: FakeUpstream
) -> None:
    up.script(Scripted(status=307), Scripted(body=b"fine"))
    answer = await http.open("POST", up.url, headers={}, body=b"{}", deadlines=PATIENT)
    await answer.close()
    assert await fetch(http, up.url) == b"fine"
    assert up.connections == 1


async def test_connection_is_free_when_the_end_was_taken_though_the_answer_is_open(
    http: Upstream, up: FakeUpstream
) -> None:
    up.script(Scripted(body=b"one"), Scripted(body=b"two"))
    answer = await http.open("POST", up.url, headers={}, body=b"{}", deadlines=PATIENT)
    pieces = answer.chunks()
    assert await anext(pieces) == b"one"
    assert await fetch(http, up.url) == b"two"
    assert up.connections == 1
    assert [piece async for piece in pieces] == []
    assert await answer.read() == b""


async def test_piece_that_was_put_back_comes_again(http: Upstream, up: FakeUpstream) -> None:
    up.script(Scripted(body=b"one"), Scripted(events=EVENTS, hang=True))
    answer = await http.open("POST", up.url, headers={}, body=b"{}", deadlines=PATIENT)
    answer.put_back(await anext(answer.chunks()))
    assert await answer.read() == b"one"
    answer = await http.open("POST", up.url, headers={}, body=b"{}", deadlines=PATIENT)
    answer.put_back(await anext(answer.chunks()))
    assert (await anext(answer.chunks())).startswith(b"data: ")
    await answer.close()


async def test_kept_connection_that_died_after_a_byte_is_not_tried_again(http: Upstream, up: FakeUpstream) -> None:
    up.script(Scripted(body=b"first"), Scripted(raw=b"HTTP/1.1 2"), Scripted(body=b"never"))
    await fetch(http, up.url)
    with pytest.raises(UpstreamUnreachable):
        await fetch(http, up.url)
    assert len(up.requests) == 2


async def test_calls_beyond_the_bound_wait_for_a_connection(up: FakeUpstream) -> None:
    http = Upstream(max_connections=2)
    up.script(*[Scripted(body=b"ok", delay=0.02)] * 8)
    assert await asyncio.gather(*(fetch(http, up.url) for _ in range(8))) == [b"ok"] * 8
    assert up.connections == 2
    await http.aclose()


async def test_call_that_gets_no_connection_in_time_times_out_and_takes_no_place(up: FakeUpstream) -> None:
    http = Upstream(max_connections=1)
    up.script(Scripted(events=EVENTS, hang=True), Scripted(body=b"fine"))
    answer = await http.open("POST", up.url, headers={}, body=b"{}", deadlines=PATIENT)
    with pytest.raises(UpstreamUnavailable, match=r"within 0\.1 s: all 1 .*`max_connections`"):
        await fetch(http, up.url, deadlines=Deadlines(connect_seconds=0.1))
    waiting = asyncio.create_task(fetch(http, up.url))
    await asyncio.sleep(0.01)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    await answer.close()
    assert await fetch(http, up.url) == b"fine"
    await http.aclose()


async def test_bound_holds_after_every_kind_of_failure(up: FakeUpstream) -> None:
    http = Upstream(max_connections=1)
    up.script(Scripted(raw=b""), Scripted(raw=b"?"), Scripted(hang=True), Scripted(body=b"x", cut_at=0), Scripted())
    for _ in range(4):
        with pytest.raises(UpstreamError):
            await fetch(http, up.url, deadlines=QUICK)
    with pytest.raises(UpstreamUnreachable):
        await fetch(http, "http://127.0.0.1:1/")
    assert await fetch(http, up.url) == b""
    await http.aclose()


@pytest.mark.parametrize("kept", [False, True], ids=["new connection", "kept connection"])
async def test_cancellation_at_any_point_leaves_no_connection_and_no_task(
    http: Upstream, up: FakeUpstream, kept: bool
) -> None:
    tasks = asyncio.all_tasks()
    scripted = Scripted(events=EVENTS, gap=0, headers={} if kept else {"connection": "close"})
    up.script(*[scripted] * 200)
    whole = await fetch(http, up.url)
    cancelled = 0
    for turns in range(1, 100):
        task = asyncio.create_task(fetch(http, up.url, body=b"x" * 200_000))
        for _ in range(turns):
            await asyncio.sleep(0)
        if task.done():
            break
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        cancelled += 1
        await _eventually(lambda: up.open <= kept)  # one that was just free again may stay
        if kept:
            assert await fetch(http, up.url) == whole
    assert cancelled > 10
    await http.aclose()
    await _eventually(lambda: up.open == 0)
    await _eventually(lambda: asyncio.all_tasks() == tasks)


async def test_closing_ends_what_is_under_way_and_lets_nothing_begin(http: Upstream, up: FakeUpstream) -> None:
    up.script(Scripted(hang=True), Scripted(events=EVENTS, hang=True))
    waiting = asyncio.create_task(fetch(http, up.url))
    await up.arrived(1)
    answer = await http.open("POST", up.url, headers={}, body=b"{}", deadlines=PATIENT)
    await anext(answer.chunks())
    await http.aclose()
    with pytest.raises(UpstreamUnreachable):
        await waiting
    with pytest.raises(UpstreamTruncated):
        await answer.read()
    for url in (up.url, "http://127.0.0.1:1/"):
        with pytest.raises(UpstreamUnreachable, match="stopping"):
            await fetch(http, url)
    await _eventually(lambda: up.open == 0)


# --- requests ----------------------------------------------------------------------------------


async def test_path_and_query_arrive_as_written(http: Upstream, up: FakeUpstream) -> None:
    await fetch(http, up.root + "/a%2Fb%3Ac/d?api-version=2024-10-21")
    assert up.requests[0].path == "/a%2Fb%3Ac/d"
    assert up.requests[0].query == {"api-version": "2024-10-21"}


async def test_request_names_the_gateway_and_asks_for_no_compression(http: Upstream, up: FakeUpstream) -> None:
    await fetch(http, up.url)
    assert up.requests[0].headers["user-agent"].startswith("qlens/")
    assert up.requests[0].headers["accept-encoding"] == "identity"


async def test_redirects_are_not_followed_and_cookies_not_kept(http: Upstream, up: FakeUpstream) -> None:
    url = up.url.replace("127.0.0.1", "localhost")  # a cookie jar takes nothing from an address
    up.script(Scripted(status=307, headers={"location": url, "set-cookie": "session=1; path=/"}))
    answer = await http.open("POST", url, headers={"authorization": "Bearer x"}, body=b"{}", deadlines=PATIENT)
    assert answer.status == 307
    await answer.read()
    await fetch(http, url)
    assert len(up.requests) == 2
    assert "cookie" not in up.requests[1].headers


async def test_proxies_of_the_environment_are_ignored(
    http: Upstream, up: FakeUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    up.script(Scripted(body=b"direct"))
    assert await fetch(http, up.url) == b"direct"


@pytest.mark.parametrize("value", ["a\r\nx-injected: 1", "a\nb", "a\rb", "a\0b"])
async def test_header_with_a_line_break_is_refused_without_showing_it(
    http: Upstream, up: FakeUpstream, value: str
) -> None:
    with pytest.raises(ValueError, match="'x-key'") as caught:
        await http.open("GET", up.url, headers={"x-key": value}, body=None, deadlines=PATIENT)
    assert value not in str(caught.value)
    assert not up.requests


async def test_header_value_that_is_no_text_is_refused_by_its_name(http: Upstream, up: FakeUpstream) -> None:
    with pytest.raises(TypeError, match="'x-count' is of type int"):
        await http.open("GET", up.url, headers={"x-count": 5}, body=None, deadlines=PATIENT)  # type: ignore[dict-item]
    assert not up.requests


@pytest.mark.parametrize("name", ["Content-Length", "transfer-encoding", "Connection", "Expect"])
async def test_header_that_would_frame_the_request_twice_is_refused(
    http: Upstream, up: FakeUpstream, name: str
) -> None:
    with pytest.raises(ValueError, match=f"{name.lower()!r} follows from the body"):
        await http.open("POST", up.url, headers={name: "5"}, body=b"{}", deadlines=PATIENT)
    assert not up.requests


async def test_headers_of_the_caller_win_over_the_usual_ones(http: Upstream, up: FakeUpstream) -> None:
    answer = await http.open(
        "GET", up.url, headers={"User-Agent": "me", "HOST": "provider.example"}, body=None, deadlines=PATIENT
    )
    await answer.close()
    headers = up.requests[0].headers
    assert (headers["user-agent"], headers["host"], headers.get("content-length")) == ("me", "provider.example", None)


async def test_signatures_go_with_their_own_request_and_are_not_remembered(http: Upstream, up: FakeUpstream) -> None:
    shared = {"x-amz-date": "20260102T030405Z"}
    for signature in ("one", None, "two"):
        answer = await http.open("POST", up.url, headers=shared, authorization=signature, body=b"{}", deadlines=PATIENT)
        await answer.read()
    assert [request.headers.get("authorization") for request in up.requests] == ["one", None, "two"]
    assert [(request.headers["x-amz-date"], request.content) for request in up.requests] == [
        ("20260102T030405Z", b"{}")
    ] * 3
    assert len(http._known) == 1


@pytest.mark.parametrize("value", ["a\r\nx-injected: 1", "a\nb", "a\rb", "a\0b"])
async def test_signature_with_a_line_break_is_refused_without_showing_it(
    http: Upstream, up: FakeUpstream, value: str
) -> None:
    with pytest.raises(ValueError, match="'authorization'") as caught:
        await http.open("POST", up.url, headers={}, authorization=value, body=b"{}", deadlines=PATIENT)
    assert value not in str(caught.value)
    assert not up.requests


async def test_requests_that_differ_in_one_header_or_the_body_are_told_apart(http: Upstream, up: FakeUpstream) -> None:
    asked: list[tuple[str, str, bytes | None]] = [
        ("POST", "1", b"a"), ("POST", "2", b"a"), ("POST", "1", b"bc"), ("POST", "1", None), ("GET", "1", None)
    ]  # fmt: skip
    for method, number, body in asked:
        answer = await http.open(method, up.url, headers={"x-n": number}, body=body, deadlines=PATIENT)
        await answer.read()
    received = [(request.method, request.headers["x-n"], request.content) for request in up.requests]
    assert received == [(method, number, body or b"") for method, number, body in asked]
    assert [request.headers.get("content-length") for request in up.requests] == ["1", "1", "2", "0", None]


async def test_headers_that_change_with_every_call_are_not_remembered_for_ever(
    http: Upstream, up: FakeUpstream
) -> None:
    for number in range(600):
        answer = await http.open("GET", up.url, headers={"x-n": str(number)}, body=None, deadlines=PATIENT)
        await answer.read()
    assert [request.headers["x-n"] for request in up.requests] == [str(number) for number in range(600)]
    assert len(http._known) < 300


async def test_headers_of_an_answer_are_found_in_any_case(http: Upstream, up: FakeUpstream) -> None:
    up.script(Scripted(headers={"X-Request-ID": "abc"}))
    answer = await http.open("GET", up.url, headers={}, body=None, deadlines=PATIENT)
    assert answer.headers["x-request-id"] == answer.headers.get("X-REQUEST-id") == "abc"
    assert "x-REQUEST-id" in answer.headers
    assert "x-request" not in answer.headers
    assert dict(answer.headers)["x-request-id"] == "abc"
    await answer.close()


# --- validators --------------------------------------------------------------------------------


@pytest.mark.parametrize("url", ["https://api.openai.com/v1", "http://127.0.0.1:8000", "https://x.example/v1/"])
def test_url_to_which_a_path_can_be_added_is_fine(url: str) -> None:
    http_url(None, None, url)


@pytest.mark.parametrize(
    "url",
    [
        "api.openai.com/v1",
        "ftp://x.example",
        "https://",
        "https://user:sk-example-key@x.example",
        "https://x.example/v1?key=1",
        "https://x.example/#a",
        "https://x.example:0/",
        "https://x.example/a b",
        "https://ä.example",
    ],
)
def test_url_to_which_no_path_can_be_added_is_a_fault(url: str) -> None:
    with pytest.raises(ValueError, match="must be a URL"):
        http_url(None, None, url)


@pytest.mark.parametrize("value", ["", "sk-example-key\n", " sk-example-key", "sk-exämple-key", "sk-example\0key"])
def test_key_that_cannot_be_a_header_is_a_fault_that_does_not_show_it(value: str) -> None:
    with pytest.raises(ValueError, match="printable ASCII") as caught:
        header_value(None, None, Secret(value))
    assert "sk-" not in str(caught.value)


def test_missing_header_value_is_fine() -> None:
    header_value(None, None, None)
