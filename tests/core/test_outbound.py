"""The client for URLs of others: what it reaches, and all that it does not."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from ipaddress import IPv6Address, ip_address, ip_network
from pathlib import Path
from typing import Any

import pytest
import trustme
from hypothesis import given
from hypothesis import strategies as st
from listeners import listening
from receivers import receiving

from qlens import Outbound, OutboundFailed, Reach, Received, outbound_url
from qlens.outbound import is_public

LOOPBACK = ("127.0.0.0/8",)


async def post(url: str, reach: Reach, seconds: float = 3.0, **more: Any) -> Received:
    outbound = Outbound(reach)
    try:
        return await outbound.send("POST", url, headers={}, body=b"{}", seconds=seconds, **more)
    finally:
        await outbound.aclose()


Names = Callable[[str], Sequence[str]]


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Callable[[Names], list[str]]:
    """Let a function say what names stand for, in place of the system's resolver; the names asked for are noted."""
    real = socket.getaddrinfo

    def install(answers: Names) -> list[str]:
        asked: list[str] = []

        def getaddrinfo(host: str, port: int, *args: Any, **kwargs: Any) -> list[Any]:
            asked.append(host)
            return [found for address in answers(host) for found in real(address, port, *args, **kwargs)]

        monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
        return asked

    return install


# --- where it goes ------------------------------------------------------------------------------

LITERALS = (
    *("127.0.0.1", "127.1", "127.0.1", "2130706433", "017700000001", "0177.1", "0x7f000001", "0x7f.1", "0x7F.0.0.0x1"),
    *("0.0.0.0", "0", "[::1]", "[::]", "[0:0:0:0:0:0:0:1]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[::127.0.0.1]"),
    *("localhost", "LOCALHOST", "localhost.", "127.0.0.1.", "[64:ff9b::7f00:1]", "[2002:7f00:1::]"),
)


@asynccontextmanager
async def bait() -> AsyncIterator[tuple[int, list[int]]]:
    """A listener at every address of this machine, and how many have connected."""
    seen: list[int] = []

    async def talk(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(1)
        writer.close()

    listener = socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    server = await asyncio.start_server(talk, sock=listener)
    async with server:
        yield listener.getsockname()[1], seen


@pytest.mark.parametrize("scheme", ["https", "http"])
async def test_no_way_of_writing_loopback_leads_there(scheme: str) -> None:
    async with bait() as (port, seen):
        for host in LITERALS:
            with pytest.raises(OutboundFailed):
                await post(f"{scheme}://{host}:{port}/", Reach(ports=(port,)), 1.0)
        assert not seen
        # The trap would have noticed.
        with pytest.raises(OutboundFailed):
            await post(f"https://127.0.0.1:{port}/", Reach(allow=LOOPBACK))
        assert seen


PRIVATE = (
    *("10.0.0.1", "10.255.255.255", "100.64.0.1", "100.100.100.200", "127.0.0.1", "127.255.255.254", "0.0.0.0"),
    *(
        "169.254.169.254",
        "169.254.170.2",
        "168.63.129.16",
        "172.16.0.1",
        "172.31.255.255",
        "192.168.0.1",
        "192.0.0.192",
    ),
    *("192.0.2.1", "192.88.99.1", "198.18.0.1", "198.51.100.7", "203.0.113.9", "224.0.0.1", "239.255.255.250"),
    *("240.0.0.1", "255.255.255.255", "::", "::1", "::127.0.0.1", "::ffff:127.0.0.1", "::ffff:8.8.8.8"),
    *("::ffff:169.254.169.254", "64:ff9b::a9fe:a9fe", "64:ff9b::808:808", "64:ff9b:1::1", "100::1", "2001::1"),
    *("2001:db8::1", "2002:a9fe:a9fe::", "2002:808:808::", "3fff::1", "5f00::1", "fc00::1", "fd00:ec2::254"),
    *("fe80::1", "fec0::1", "ff02::1", "4000::1"),
)
PUBLIC = ("8.8.8.8", "1.1.1.1", "172.15.255.255", "172.32.0.0", "100.63.255.255", "2606:4700::1111", "2a00:1450::1")


@pytest.mark.parametrize("address", PRIVATE)
async def test_a_name_that_stands_for_an_inner_address_is_not_reached(
    address: str, names: Callable[[Names], list[str]]
) -> None:
    names(lambda _: [address])
    with pytest.raises(OutboundFailed, match="is not a public address, and in no network that `allow` lists"):
        await post("https://metadata.google.internal/", Reach())


def test_public_addresses_are_public() -> None:
    assert all(is_public(ip_address(each)) for each in PUBLIC)
    assert not any(is_public(ip_address(each)) for each in PRIVATE)


@given(st.ip_addresses(v=4))
def test_no_disguise_of_an_address_is_public(inner: Any) -> None:
    number = int(inner)
    for disguise in (number, 0xFFFF << 32 | number, 0x64FF9B << 96 | number, 0x2002 << 112 | number << 80):
        assert not is_public(IPv6Address(disguise))


@pytest.mark.parametrize(
    ("address", "listed", "reached"),
    [
        ("10.1.2.3", "10.1.0.0/16", True),
        ("10.2.2.3", "10.1.0.0/16", False),
        ("::ffff:10.1.2.3", "10.1.0.0/16", False),
        ("64:ff9b::808:808", "64:ff9b::/96", True),  # DNS64 in a cluster that speaks IPv6 alone
        ("64:ff9b::a9fe:a9fe", "64:ff9b::/96", False),
        ("2002:7f00:1::", "2002::/16", False),
        ("169.254.169.254", "0.0.0.0/0", True),
    ],
)
def test_the_operator_allows_networks_and_no_more(address: str, listed: str, *, reached: bool) -> None:
    assert Reach(allow=(listed,)).leads_to(ip_address(address), 443) is reached
    assert ip_network(listed)


def test_ports_and_plain_http_are_for_networks_that_are_listed() -> None:
    public, inner = ip_address("8.8.8.8"), ip_address("10.1.2.3")
    assert Reach().leads_to(public, 443)
    assert not Reach().leads_to(public, 6379)
    assert not Reach(ports=(80, 443)).leads_to(public, 80, "http")
    assert Reach(allow=("10.1.0.0/16",)).leads_to(inner, 6379, "http")


async def test_addresses_are_checked_one_by_one(names: Callable[[Names], list[str]]) -> None:
    names(lambda _: ["10.0.0.1", "127.0.0.1", "::1"])
    async with receiving() as receiver:
        answer = await post(f"http://hooks.example:{receiver.port}/", Reach(allow=LOOPBACK))
        assert answer.status == 204
        assert receiver.got[0].headers["host"] == f"hooks.example:{receiver.port}"


async def test_a_name_that_changes_after_it_was_checked_leads_nowhere_else(
    names: Callable[[Names], list[str]],
) -> None:
    answers = iter([["127.0.0.2"], ["127.0.0.1"]])
    asked = names(lambda _: next(answers))
    async with receiving() as receiver:
        # Nobody listens at the address that was checked; the next answer is where somebody does.
        with pytest.raises(OutboundFailed):
            await post(f"http://hooks.example:{receiver.port}/", Reach(allow=("127.0.0.2/32",)))
        assert len(asked) == 1
        with pytest.raises(OutboundFailed, match="is not a public address"):
            await post(f"http://hooks.example:{receiver.port}/", Reach(allow=("127.0.0.2/32",)))
        assert not receiver.got


# --- what it does not do ------------------------------------------------------------------------


async def test_redirects_are_not_followed() -> None:
    async with receiving() as inner, receiving(status=307, headers={"location": ""}) as outer:
        outer.headers["location"] = inner.url
        answer = await post(outer.url, Reach(allow=LOOPBACK))
        assert answer.status == 307
        assert not inner.got


async def test_proxies_of_the_environment_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    async with receiving() as receiver, bait() as (port, seen):
        for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{port}")
        assert (await post(receiver.url, Reach(allow=LOOPBACK))).status == 204
        assert not seen


async def test_a_body_without_end_is_not_read_to_its_end() -> None:
    gone = asyncio.Event()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        try:
            while True:
                writer.write(b"1000\r\n" + b"x" * 0x1000 + b"\r\n")
                await writer.drain()
        finally:
            gone.set()

    async with listening(talk) as port:
        answer = await post(f"http://127.0.0.1:{port}/", Reach(allow=LOOPBACK), most_bytes=100_000)
        assert (answer.status, answer.body) == (200, None)
        await asyncio.wait_for(gone.wait(), 5)


HEAD = b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n"


@pytest.mark.parametrize("said", [b"", HEAD[:17], HEAD])
async def test_an_answer_that_drips_is_waited_for_no_longer_than_said(said: bytes) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(said)
        while said:
            await asyncio.sleep(0.02)
            writer.write(b"x" if said.endswith(b"\r\n\r\n") else b"x-a: b\r\n")
        await asyncio.sleep(10)

    async with listening(talk) as port:
        async with asyncio.timeout(5):
            answering = post(f"http://127.0.0.1:{port}/", Reach(allow=LOOPBACK), 0.3)
            if said == HEAD:
                answer = await answering
                assert (answer.status, answer.body) == (200, None)
            else:
                with pytest.raises(OutboundFailed, match=r"within 0\.3 s"):
                    await answering


async def test_a_silent_name_server_is_waited_for_no_longer_than_said(
    names: Callable[[Names], list[str]],
) -> None:
    from threading import Event

    free = Event()

    def silent(_host: str) -> Sequence[str]:
        free.wait(10)
        return ["127.0.0.1"]

    names(silent)
    try:
        with pytest.raises(OutboundFailed, match=r"within 0\.2 s"):
            await post("https://hooks.example/", Reach(), 0.2)
    finally:
        free.set()


# --- TLS and URLs -------------------------------------------------------------------------------


async def test_the_certificate_is_that_of_the_name(
    names: Callable[[Names], list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("hooks.example").configure_cert(context)
    asked_for: list[str | None] = []
    context.sni_callback = lambda _socket, name, _context: asked_for.append(name)
    names(lambda _: ["127.0.0.1"])
    async with receiving(context) as receiver:
        reach = Reach(allow=LOOPBACK)
        assert (await post(f"https://hooks.example:{receiver.port}/", reach)).status == 204
        assert asked_for == ["hooks.example"]
        with pytest.raises(OutboundFailed, match="certificate is not trusted"):
            await post(f"https://other.example:{receiver.port}/", reach)
        assert len(receiver.got) == 1


@pytest.mark.parametrize(
    "url",
    [
        *("https://hooks.example@127.0.0.1/", "https://user:pass@hooks.example/", "https://@127.0.0.1/"),
        *("https://hooks.example\\@127.0.0.1/", "https://127.0.0.1\\.hooks.example/", "https:///127.0.0.1/"),
        *("https://hooks.example/ x", "https://hooks.example/#x", "https://①②⑦.⓪.⓪.①/", "https://hooks.example:0/"),
        *("https://hooks.example:99999/", "ftp://hooks.example/", "file:///etc/passwd", "//hooks.example/", "https:"),
        *("https://[::1/", "https://hooks.example\r\nx: y/", "gopher://127.0.0.1:6379/_INFO"),
    ],
)
def test_urls_that_play_tricks_are_refused(url: str) -> None:
    with pytest.raises(ValueError, match="must be a URL"):
        outbound_url(None, None, url)


@pytest.mark.parametrize("url", ["https://hooks.example", "https://hooks.example:443/a/b?token=x%20y", "http://a/b"])
def test_urls_with_a_query_are_taken(url: str) -> None:
    outbound_url(None, None, url)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("http://hooks.example/", "must begin with https://"),
        ("https://hooks.example:6379/", "port 6379 is none of `ports`"),
        *(
            (f"https://{host}/", "is not a public address")
            for host in LITERALS
            if host[0].lower() != "l" and host[-1] != "."
        ),
    ],
)
def test_urls_that_cannot_be_reached_are_found_without_asking_for_their_names(url: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Reach().check(url)
    Reach(allow=("0.0.0.0/0", "::/0")).check(url)
