"""Images by URL: fetched only when the operator says so, only by https, only from the open internet."""

from __future__ import annotations

import ssl
from base64 import b64decode
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
import trustme
from aiohttp import web
from bedrocks import CHAT, PNG, chat, config, refused, user

from qlens.testing import running
from qlens.testing.bedrock import bedrock
from qlens_plugins.provider.bedrock.images import is_public

IMAGE = b64decode(PNG)


def _asking(url: str) -> dict[str, Any]:
    return chat(user([{"type": "text", "text": "?"}, {"type": "image_url", "image_url": {"url": url}}]))


@pytest.mark.parametrize(
    ("address", "public"),
    [
        *((text, True) for text in ("93.184.216.34", "8.8.8.8", "2606:4700::1111")),
        *((text, False) for text in ("127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254")),
        *((text, False) for text in ("100.64.0.1", "0.0.0.0", "224.0.0.1", "255.255.255.255", "192.0.2.1")),
        *((text, False) for text in ("::1", "::", "fe80::1", "fd00:ec2::254", "::ffff:127.0.0.1", "ff02::1")),
        *((text, False) for text in ("64:ff9b::7f00:1", "2002:7f00:1::", "2001:0:1::")),
    ],
)
def test_which_addresses_are_on_the_open_internet(address: str, public: bool) -> None:
    assert is_public(ip_address(address)) is public


async def test_nothing_is_fetched_unless_the_operator_says_so() -> None:
    error = await refused(_asking("https://example.com/x.png"))
    assert "data URL" in error["message"]


@pytest.mark.parametrize(
    "url",
    ["https://127.0.0.1/x.png", "https://localhost/x.png", "https://[::1]/x.png", "https://169.254.169.254/latest"],
)
async def test_private_addresses_are_refused_without_a_word_about_them(url: str) -> None:
    error = await refused(_asking(url), fetch_images=True)
    assert (error["code"], error["message"]) == ("invalid_image_url", "The image could not be fetched.")
    assert error["param"] == "messages[0].content[1].image_url.url"


async def test_plain_http_is_refused() -> None:
    assert (await refused(_asking("http://example.com/x.png"), fetch_images=True))["code"] == "unsupported_value"


# --- a real https server -----------------------------------------------------------------------


@asynccontextmanager
async def images(monkeypatch: pytest.MonkeyPatch, folder: Path) -> AsyncIterator[str]:
    """Serve images on this machine, with a certificate that the gateway trusts."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(folder / "ca.pem"))
    monkeypatch.setenv("SSL_CERT_FILE", str(folder / "ca.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)

    async def handle(request: web.BaseRequest) -> web.Response:
        path = request.path
        if path == "/x.png":
            return web.Response(body=IMAGE, content_type="image/png")
        if path == "/moved":
            raise web.HTTPFound("/x.png")
        if path == "/round":
            raise web.HTTPFound("/round")
        if path == "/inside":
            raise web.HTTPFound("http://127.0.0.1:1/x.png")
        if path == "/large":
            return web.Response(body=b"x" * 20_000_001)
        if path == "/text":
            return web.Response(text="<html>")
        raise web.HTTPNotFound

    runner = web.ServerRunner(web.Server(handle))
    await runner.setup()
    site = web.TCPSite(runner, "localhost", 0, ssl_context=context)
    await site.start()
    try:
        yield f"https://localhost:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@pytest.mark.parametrize("path", ["/x.png", "/moved"])
async def test_an_image_is_fetched(path: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async with (
        images(monkeypatch, tmp_path) as root,
        bedrock() as aws,
        running(config(aws.root, fetch_images=True)) as gateway,
    ):
        gateway.plugin("provider", "aws")._images.allowed = lambda address: True
        assert (await gateway.post(CHAT, _asking(root + path))).status == 200
        block = aws.requests[0].body["messages"][0]["content"][1]["image"]
        assert block == {"format": "png", "source": {"bytes": PNG}}


@pytest.mark.parametrize("path", ["/none", "/round", "/inside", "/large", "/text"])
async def test_what_is_no_image_is_refused(path: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async with (
        images(monkeypatch, tmp_path) as root,
        bedrock() as aws,
        running(config(aws.root, fetch_images=True)) as gateway,
    ):
        gateway.plugin("provider", "aws")._images.allowed = lambda address: True
        answer = await gateway.post(CHAT, _asking(root + path))
        assert (answer.status, aws.requests) == (400, [])
        assert answer.json()["error"]["param"] == "messages[0].content[1].image_url.url"


async def test_too_many_images_are_refused() -> None:
    parts = [{"type": "image_url", "image_url": {"url": "https://example.com/x.png"}}] * 21
    assert "At most 20" in (await refused(chat(user(parts)), fetch_images=True))["message"]
