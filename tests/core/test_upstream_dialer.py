"""New connections: names, TLS with good and bad certificates, an HTTP proxy."""

from __future__ import annotations

import asyncio
import socket
import ssl
import threading
from base64 import b64encode
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import trustme
from listeners import listening
from proxies import Proxy

from qlens import Deadlines, Upstream, UpstreamTimedOut, UpstreamUnreachable
from qlens.config import Tls
from qlens.names import literal
from qlens.testing import Scripted, upstream
from qlens.testing.upstreams import FakeUpstream

PATIENT = Deadlines()
LONG_AGO = datetime.now(UTC) - timedelta(days=2)
YESTERDAY = datetime.now(UTC) - timedelta(days=1)


@pytest.fixture
async def http() -> AsyncIterator[Upstream]:
    http = Upstream()
    yield http
    await http.aclose()


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def trusting(authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> Tls:
    """What a provider with a certificate of this authority needs."""
    file = tmp_path_factory.mktemp("authority") / "ca.pem"
    authority.cert_pem.write_to_path(str(file))
    return Tls(ca_file=file)


def serving(certificate: trustme.LeafCert) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificate.configure_cert(context)
    return context


async def answer_all(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer each request with its own head."""
    while head := await reader.readuntil(b"\r\n\r\n"):
        await reader.readexactly(int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0] or 0))
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(head), head))


async def fetch(
    http: Upstream, url: str, *, deadlines: Deadlines = PATIENT, tls: Tls | None = None, method: str = "POST"
) -> bytes:
    answer = await http.open(method, url, headers={}, body=b"{}", deadlines=deadlines, tls=tls)
    return await answer.read()


# --- TLS ---------------------------------------------------------------------------------------


async def test_certificate_of_a_named_authority_is_trusted_and_its_connection_kept(
    http: Upstream, authority: trustme.CA, trusting: Tls
) -> None:
    connections: set[object] = set()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.add(writer)
        await answer_all(reader, writer)

    async with listening(talk, serving(authority.issue_cert("localhost"))) as port:
        for _ in range(3):
            assert f"host: localhost:{port}".encode() in await fetch(http, f"https://localhost:{port}/", tls=trusting)
    assert len(connections) == 1


@pytest.mark.parametrize("bad", ["untrusted", "wrong name", "expired"])
async def test_certificate_that_is_not_good_is_refused_before_a_byte_is_sent(
    http: Upstream, authority: trustme.CA, trusting: Tls, bad: str
) -> None:
    heard: list[bytes] = []

    async def listen(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        heard.append(await reader.read())

    dates: dict[str, Any] = {"not_before": LONG_AGO, "not_after": YESTERDAY} if bad == "expired" else {}
    certificate = authority.issue_cert("elsewhere.example" if bad == "wrong name" else "localhost", **dates)
    async with listening(listen, serving(certificate)) as port:
        with pytest.raises(UpstreamUnreachable, match="its certificate is not trusted") as caught:
            await fetch(http, f"https://localhost:{port}/", tls=None if bad == "untrusted" else trusting)
    assert (caught.value.code, caught.value.again) == ("upstream_tls", False)
    assert not any(heard)


async def test_connections_with_different_trust_are_not_shared(
    http: Upstream, authority: trustme.CA, trusting: Tls
) -> None:
    async with listening(answer_all, serving(authority.issue_cert("localhost"))) as port:
        assert await fetch(http, f"https://localhost:{port}/", tls=trusting)
        with pytest.raises(UpstreamUnreachable, match="not trusted"):
            await fetch(http, f"https://localhost:{port}/")


async def test_server_name_is_asked_for_and_checked_instead_of_the_host(
    http: Upstream, authority: trustme.CA, trusting: Tls
) -> None:
    asked: list[str | None] = []
    context = serving(authority.issue_cert("provider.example"))
    context.sni_callback = lambda _socket, name, _context: asked.append(name)
    tls = Tls(ca_file=trusting.ca_file, server_name="provider.example")
    async with listening(answer_all, context) as port:
        assert await fetch(http, f"https://localhost:{port}/", tls=tls)
    assert asked == ["provider.example"]


async def test_client_certificate_is_shown_to_a_provider_that_wants_one(
    http: Upstream, authority: trustme.CA, trusting: Tls, tmp_path: Path
) -> None:
    ours = authority.issue_cert("gateway@qlens.example")
    ours.private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "ours.pem"))
    context = serving(authority.issue_cert("localhost"))
    context.verify_mode = ssl.CERT_REQUIRED
    authority.configure_trust(context)
    async with listening(answer_all, context) as port:
        url = f"https://localhost:{port}/"
        assert await fetch(http, url, tls=Tls(trusting.ca_file, cert_file=tmp_path / "ours.pem"))
        with pytest.raises(UpstreamUnreachable):
            await fetch(http, url, tls=trusting)


async def test_missing_file_of_an_authority_is_a_tls_error(http: Upstream, tmp_path: Path) -> None:
    with pytest.raises(UpstreamUnreachable, match="TLS files cannot be read") as caught:
        await fetch(http, "https://127.0.0.1:1/", tls=Tls(ca_file=tmp_path / "missing.pem"))
    assert caught.value.code == "upstream_tls"
    assert str(tmp_path) not in str(caught.value)


async def test_stream_over_tls_that_is_not_read_stops_the_provider(
    http: Upstream, authority: trustme.CA, trusting: Tls
) -> None:
    total, sent = 32 << 20, 0

    async def pour(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        await reader.readuntil(b"\r\n\r\n")
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % total)
        while sent < total:
            writer.write(b"x" * 65536)
            await writer.drain()
            sent += 65536
        await reader.read()

    async with listening(pour, serving(authority.issue_cert("localhost"))) as port:
        answer = await http.open(
            "GET", f"https://localhost:{port}/", headers={}, body=None, deadlines=PATIENT, tls=trusting
        )
        received = len(await anext(answer.chunks()))
        before = -1
        while before != sent:
            before = sent
            await asyncio.sleep(0.25)
        assert sent < total / 2
        assert received + len(await answer.read()) == total


# --- names -------------------------------------------------------------------------------------


class Names:
    """Stands in for the machine's resolver."""

    def __init__(self, *addresses: tuple[str, int]) -> None:
        self.addresses = list(addresses)
        self.asked: list[str] = []

    def getaddrinfo(self, host: str, _port: int, **_options: Any) -> list[tuple[Any, ...]]:
        self.asked.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", address) for address in self.addresses]

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(socket, "getaddrinfo", self.getaddrinfo)


@contextmanager
def silent(monkeypatch: pytest.MonkeyPatch, known: Mapping[str, tuple[str, int]] | None = None) -> Iterator[list[str]]:
    """Let no name but those that are known be answered for; which were asked for, in vain."""
    over, asked, real = threading.Event(), list[str](), socket.getaddrinfo

    def getaddrinfo(host: str, *arguments: Any, **options: Any) -> list[Any]:
        if known is not None and host in known:
            return real(*known[host], **options)
        if literal(host) is not None:
            return real(host, *arguments, **options)
        asked.append(host)
        over.wait(30)
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    try:
        yield asked
    finally:
        over.set()


CLOSING = {"connection": "close"}


async def test_name_without_an_address_is_unreachable(http: Upstream, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(*_arguments: Any, **_options: Any) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", nothing)
    with pytest.raises(UpstreamUnreachable, match="its host name has no address"):
        await fetch(http, "http://provider.example/")


async def test_silent_resolver_times_out_as_a_connection(http: Upstream, monkeypatch: pytest.MonkeyPatch) -> None:
    with silent(monkeypatch), pytest.raises(UpstreamTimedOut, match=r"No connection to the provider within 0\.2 s"):
        await fetch(http, "http://provider.example/", deadlines=Deadlines(connect_seconds=0.2))


async def test_names_whose_servers_are_silent_hold_up_no_other_and_are_asked_for_once_at_a_time(
    http: Upstream, up: FakeUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    with silent(monkeypatch, {"good.example": ("127.0.0.1", up.port)}) as asked:
        short = Deadlines(connect_seconds=0.2)
        calls = [fetch(http, f"http://{name}.example/", deadlines=short) for name in range(40) for _ in range(2)]
        ends = await asyncio.gather(*calls, return_exceptions=True)
        assert {type(end) for end in ends} == {UpstreamTimedOut}
        with pytest.raises(UpstreamTimedOut):
            await fetch(http, "http://0.example/", deadlines=short)
        assert sorted(asked) == sorted(f"{name}.example" for name in range(40))
        await fetch(http, "http://good.example/")
        await fetch(http, f"http://127.0.0.1:{up.port}/")


async def test_addresses_that_were_good_until_now_are_used_while_nobody_says_whether_they_are(
    http: Upstream, up: FakeUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qlens.upstream_dialer._NAME_SECONDS", 0.0)
    monkeypatch.setattr("qlens.upstream_dialer._PATIENCE_SECONDS", 0.05)
    up.script(*[Scripted(headers=CLOSING)] * 3)
    with monkeypatch.context() as patched:
        Names(("127.0.0.1", up.port)).install(patched)
        await fetch(http, "http://provider.example/")
    with silent(monkeypatch):
        await fetch(http, "http://provider.example/")

    def unknown(*_arguments: Any, **_options: Any) -> None:
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    await fetch(http, "http://provider.example/")
    assert len(up.requests) == 3


async def test_name_is_asked_for_once_by_many_calls(
    http: Upstream, up: FakeUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = Names(("127.0.0.1", up.port))
    names.install(monkeypatch)
    up.script(*[Scripted(headers=CLOSING)] * 21)
    await asyncio.gather(*(fetch(http, "http://provider.example/") for _ in range(20)))
    await fetch(http, "http://provider.example/")
    assert (names.asked, up.connections) == (["provider.example"], 21)


async def test_new_address_of_a_name_is_found_soon(
    http: Upstream, up: FakeUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qlens.upstream_dialer._NAME_SECONDS", 0.05)
    names = Names(("127.0.0.1", up.port))
    names.install(monkeypatch)
    async with upstream() as other:
        up.script(Scripted(headers=CLOSING))
        await fetch(http, "http://provider.example/")
        names.addresses = [("127.0.0.1", other.port)]
        await asyncio.sleep(0.1)
        await fetch(http, "http://provider.example/")
        assert (len(up.requests), len(other.requests)) == (1, 1)


async def test_address_that_refuses_is_asked_for_again(
    http: Upstream, up: FakeUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        names = Names(unused.getsockname())
        names.install(monkeypatch)
        with pytest.raises(UpstreamUnreachable, match="refused"):
            await fetch(http, "http://provider.example/")
        names.addresses = [("127.0.0.1", up.port)]
        assert await fetch(http, "http://provider.example/")
    assert len(names.asked) == 2


async def test_one_dead_address_of_a_name_is_passed_over(
    http: Upstream, up: FakeUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A full backlog drops connection attempts: to the client, this address is a hole.
    with socket.socket() as hole, socket.socket() as first:
        hole.bind(("127.0.0.1", 0))
        hole.listen(0)
        first.connect(hole.getsockname())
        with socket.socket() as second:
            second.setblocking(False)
            with suppress(BlockingIOError):
                second.connect(hole.getsockname())
            Names(hole.getsockname(), ("127.0.0.1", up.port)).install(monkeypatch)
            assert await fetch(http, "http://provider.example/", deadlines=Deadlines(connect_seconds=3))
    assert len(up.requests) == 1


@pytest.mark.parametrize(
    "url",
    [
        "http:///v1",
        "ftp://provider.example/",
        "http://user:sk-example-a@provider.example/",
        "http://provider.example:99999/",
        "http://provider.example/a b",
        "http://provider.example/\r\nx: y",
        "http://[::1/",
        "http://" + "a" * 80 + ".example/",
    ],
)
async def test_url_that_leads_nowhere_is_unreachable_and_not_shown(http: Upstream, url: str) -> None:
    with pytest.raises(UpstreamUnreachable, match="URL is not valid") as caught:
        await fetch(http, url)
    assert "example" not in str(caught.value)


# --- a proxy -----------------------------------------------------------------------------------


async def test_http_goes_through_the_proxy_with_its_whole_url_and_the_credential() -> None:
    proxy = Proxy()
    async with listening(proxy.talk) as port:
        http = Upstream(proxy=f"http://user:p%40ss@127.0.0.1:{port}")
        assert "p%40ss" not in repr(http)
        assert await fetch(http, "http://provider.example/v1?a=b") == b"ok"
        await http.aclose()
    (head,) = proxy.heads
    assert head.startswith("POST http://provider.example/v1?a=b HTTP/1.1\r\n")
    assert "\r\nhost: provider.example\r\n" in head
    assert f"proxy-authorization: Basic {b64encode(b'user:p@ss').decode()}\r\n" in head


async def test_https_goes_through_a_tunnel_that_sees_neither_path_nor_body(
    authority: trustme.CA, trusting: Tls
) -> None:
    proxy = Proxy()
    async with (
        listening(answer_all, serving(authority.issue_cert("localhost"))) as port,
        listening(proxy.talk) as proxy_port,
    ):
        http = Upstream(proxy=f"http://user:secret@127.0.0.1:{proxy_port}")
        for _ in range(2):
            seen = await fetch(http, f"https://localhost:{port}/v1/chat", tls=trusting)
            assert b"POST /v1/chat HTTP/1.1" in seen
            assert b"proxy-authorization" not in seen
        await http.aclose()
    (head,) = proxy.heads
    assert head.startswith(f"CONNECT localhost:{port} HTTP/1.1\r\n")
    assert "proxy-authorization: Basic " in head
    assert "/v1/chat" not in head


async def test_certificate_is_checked_through_a_tunnel_too(authority: trustme.CA) -> None:
    proxy = Proxy()
    async with (
        listening(answer_all, serving(authority.issue_cert("localhost"))) as port,
        listening(proxy.talk) as proxy_port,
    ):
        http = Upstream(proxy=f"http://127.0.0.1:{proxy_port}")
        with pytest.raises(UpstreamUnreachable, match="not trusted"):
            await fetch(http, f"https://localhost:{port}/")
        await http.aclose()


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (
            b"HTTP/1.1 407 Proxy Authentication Required\r\ncontent-length: 0\r\n\r\n",
            "the proxy answered with status 407",
        ),
        (b"SOCKS5 only\r\n\r\n", "the proxy does not answer in HTTP"),
        (b"", "closed the connection"),
    ],
    ids=["407", "no HTTP", "nothing"],
)
async def test_proxy_that_makes_no_tunnel_is_named(answer: bytes, words: str) -> None:
    async with listening(Proxy(answer).talk) as port:
        http = Upstream(proxy=f"http://127.0.0.1:{port}")
        with pytest.raises(UpstreamUnreachable, match=words):
            await fetch(http, "https://provider.example/")
        await http.aclose()


async def test_silent_proxy_times_out_as_a_connection() -> None:
    left = asyncio.Event()

    async def mute(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        await reader.read()
        left.set()

    async with listening(mute) as port:
        http = Upstream(proxy=f"http://127.0.0.1:{port}")
        with pytest.raises(UpstreamTimedOut, match="No connection"):
            await fetch(http, "https://provider.example/", deadlines=Deadlines(connect_seconds=0.2))
        await asyncio.wait_for(left.wait(), 5)
        await http.aclose()


@pytest.mark.parametrize("proxy", ["127.0.0.1:3128", "https://proxy.example", "http://proxy.example/path", "http://"])
async def test_proxy_must_be_an_http_url(proxy: str) -> None:
    with pytest.raises(ValueError, match="of the form http://"):
        Upstream(proxy=proxy)
