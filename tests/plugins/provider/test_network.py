"""How providers are reached: through a proxy, with certificates of the operator's own, by so many connections."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import orjson
import pytest
import trustme
from attrs import define, field
from listeners import listening
from proxies import Proxy
from yamls import CHAT, HELLO, config, targets

from qlens import ConfigError, StartupError
from qlens.testing import running

KEY = "sk-example-network"
PASSWORD = "sesame-network"
MODELS = {"gpt-4o-mini": {"max_output_tokens": 100, "targets": targets("up")}}
PROVIDERS: dict[str, dict[str, Any]] = {
    "openai": {"plugin": "openai", "base_url": "{url}/v1", "api_key": KEY},
    "anthropic": {"plugin": "anthropic", "base_url": "{url}", "api_key": KEY},
    "azure_openai": {"plugin": "azure_openai", "endpoint": "{url}", "api_key": KEY},
    "bedrock": {"plugin": "bedrock", "endpoint": "{url}", "region": "us-east-1", "api_key": KEY},
}


@define(eq=False)
class Provider:
    """A provider behind TLS that has nothing to say; it remembers what it was asked, and by how many at a time."""

    heads: list[str] = field(factory=list)
    bodies: list[dict[str, Any]] = field(factory=list)
    open: int = 0
    most: int = 0
    hold_seconds: float = 0

    async def talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Refuse each request."""
        self.open += 1
        self.most = max(self.most, self.open)
        try:
            while head := (await reader.readuntil(b"\r\n\r\n")).decode().lower():
                self.heads.append(head)
                size = int(head.partition("content-length: ")[2].partition("\r\n")[0])
                self.bodies.append(orjson.loads(await reader.readexactly(size)))
                await asyncio.sleep(self.hold_seconds)
                writer.write(b"HTTP/1.1 500 Oh\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}")
        finally:
            self.open -= 1


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def ca_file(authority: trustme.CA, tmp_path: Path) -> Path:
    file = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(str(file))
    return file


@asynccontextmanager
async def secured(authority: trustme.CA, *, wants_client: bool = False) -> AsyncIterator[tuple[Provider, str]]:
    """A provider with a certificate of the authority, and its URL."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    if wants_client:
        authority.configure_trust(context)
        context.verify_mode = ssl.CERT_REQUIRED
    provider = Provider()
    async with listening(provider.talk, context) as port:
        yield provider, f"https://localhost:{port}"


def reached(kind: str, url: str, own: dict[str, Any] | None, **server: Any) -> str:
    """A configuration with one provider of a kind, reached in a way."""
    settings = {name: value.format(url=url) for name, value in PROVIDERS[kind].items()}
    return config(None, {"up": settings if own is None else {**settings, "network": own}}, MODELS, **server)


async def asked(yaml: str) -> tuple[int, str]:
    """What a chat is answered."""
    async with running(yaml) as gateway:
        answer = await gateway.post(CHAT, HELLO)
        return answer.status, str(answer.json()["error"]["code"])


@pytest.mark.parametrize("kind", PROVIDERS)
async def test_a_provider_is_reached_through_its_proxy_and_trusted_by_its_authority(
    kind: str, authority: trustme.CA, ca_file: Path
) -> None:
    proxy = Proxy()
    async with secured(authority) as (provider, url), listening(proxy.talk) as port:
        network = {"proxy": f"http://user:{PASSWORD}@127.0.0.1:{port}", "tls": {"ca_file": str(ca_file)}}
        assert (await asked(reached(kind, url, network)))[0] == 502
        assert [head.split()[:2] for head in proxy.heads] == [["CONNECT", url.removeprefix("https://")]]
        assert "proxy-authorization: Basic " in proxy.heads[0]
        (head,) = provider.heads
        assert KEY in head
        assert "proxy-authorization" not in head


@pytest.mark.parametrize("kind", PROVIDERS)
async def test_without_the_authority_no_provider_is_trusted(kind: str, authority: trustme.CA) -> None:
    async with secured(authority) as (provider, url):
        assert await asked(reached(kind, url, None)) == (502, "upstream_tls")
        assert not provider.heads


async def test_the_gateway_s_network_is_every_provider_s_that_has_none_of_its_own(
    authority: trustme.CA, ca_file: Path
) -> None:
    proxy, tls = Proxy(), {"ca_file": str(ca_file)}
    async with secured(authority) as (provider, url), listening(proxy.talk) as port:
        common = {"proxy": f"http://127.0.0.1:{port}", "tls": tls}
        await asked(reached("openai", url, None, network=common))
        assert (len(proxy.heads), len(provider.heads)) == (1, 1)
        await asked(reached("openai", url, {"tls": tls}, network=common))
        assert (len(proxy.heads), len(provider.heads)) == (1, 2)


async def test_the_gateway_shows_its_own_certificate_to_a_provider_that_asks_for_one(
    authority: trustme.CA, ca_file: Path, tmp_path: Path
) -> None:
    ours = authority.issue_cert("gateway.example")
    ours.private_key_pem.write_to_path(str(tmp_path / "key.pem"))
    ours.cert_chain_pems[0].write_to_path(str(tmp_path / "cert.pem"))
    tls = {"ca_file": str(ca_file)}
    async with secured(authority, wants_client=True) as (provider, url):
        await asked(reached("openai", url, {"tls": tls}))
        assert not provider.heads
        files = {"cert_file": str(tmp_path / "cert.pem"), "key_file": str(tmp_path / "key.pem")}
        await asked(reached("openai", url, {"tls": {**tls, **files}}))
        assert len(provider.heads) == 1


async def test_files_are_read_again_when_they_have_changed(authority: trustme.CA, ca_file: Path) -> None:
    async with secured(authority) as (provider, url):
        good = ca_file.read_bytes()
        trustme.CA().cert_pem.write_to_path(str(ca_file))
        async with running(reached("openai", url, {"tls": {"ca_file": str(ca_file)}})) as gateway:
            assert (await gateway.post(CHAT, HELLO)).json()["error"]["code"] == "upstream_tls"
            ca_file.write_bytes(b"half of a file")  # an authority that is being written is not believed
            assert (await gateway.post(CHAT, HELLO)).json()["error"]["code"] == "upstream_tls"
            ca_file.write_bytes(good)
            await gateway.post(CHAT, HELLO)
            assert len(provider.heads) == 1


async def test_no_more_connections_than_said_are_open_and_calls_wait_for_one(
    authority: trustme.CA, ca_file: Path
) -> None:
    async with secured(authority) as (provider, url):
        provider.hold_seconds = 0.05
        network = {"max_connections": 2, "tls": {"ca_file": str(ca_file)}}
        async with running(reached("openai", url, network)) as gateway:
            await asyncio.gather(*(gateway.post(CHAT, HELLO) for _ in range(8)))
        assert len(provider.heads) == 8
        assert provider.most == 2


@pytest.mark.parametrize("where", ["provider", "server"])
async def test_a_file_that_is_missing_is_named_at_the_start(where: str, tmp_path: Path) -> None:
    network = {"tls": {"ca_file": str(tmp_path / "missing.pem")}}
    yaml = (
        reached("openai", "https://localhost:1", network)
        if where == "provider"
        else reached("openai", "https://localhost:1", None, network=network)
    )
    with pytest.raises(StartupError) as caught:
        async with running(yaml):
            pass
    (fault,) = caught.value.faults
    assert where in fault.path
    assert "network: the files of `tls` cannot be used" in fault.message
    assert "missing.pem" in fault.message


@pytest.mark.parametrize(
    ("network", "words"),
    [
        ({"proxy": f"socks5://user:{PASSWORD}@proxy.example:1080"}, "must be a URL of the form http://"),
        ({"tls": {"key_file": "key.pem"}}, "`key_file` belongs to a `cert_file`"),
        ({"max_connections": 0}, "max_connections"),
    ],
)
async def test_a_network_that_cannot_be_is_a_fault_of_the_file(network: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        async with running(reached("openai", "https://localhost:1", network)):
            pass
    assert words in str(caught.value)
    assert PASSWORD not in str(caught.value)


async def test_the_environment_s_proxies_are_not_used(
    monkeypatch: pytest.MonkeyPatch, authority: trustme.CA, ca_file: Path
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:1")
    async with secured(authority) as (provider, url):
        await asked(reached("openai", url, {"tls": {"ca_file": str(ca_file)}}))
        assert len(provider.heads) == 1


async def test_openai_itself_is_told_what_was_reserved_in_the_field_that_all_its_models_know(
    authority: trustme.CA, ca_file: Path
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("api.openai.com").configure_cert(context)
    provider = Provider()
    async with listening(provider.talk, context) as port, listening(Proxy(to=port).talk) as proxy_port:
        settings = {
            "plugin": "openai",
            "api_key": KEY,
            "network": {"proxy": f"http://127.0.0.1:{proxy_port}", "tls": {"ca_file": str(ca_file)}},
        }
        budgets = [{"plugin": "prices"}, {"plugin": "budgets", "limits": [{"per": "tenant", "usd": 5}]}]
        await asked(config({"cost": budgets}, {"up": settings}, MODELS))
        (body,) = provider.bodies
        assert body["max_completion_tokens"] == 100
        assert "max_tokens" not in body
