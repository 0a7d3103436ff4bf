"""All that a provider asks goes the way of its network, and the proxy's password goes nowhere else."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import azures
import bedrocks
import pytest
import trustme
from attrs import define, field
from listeners import listening
from proxies import Forwarding, joined
from yamls import CHAT, HELLO, STREAM, config, targets

from qlens import StartupError
from qlens.testing import Running, running
from qlens.testing.aws import ROLE, aws
from qlens.testing.azure import azure
from qlens.testing.bedrock import bedrock
from qlens.testing.entra import entra
from qlens.testing.realtime import KEY, TEXT, realtime

PASSWORD = "sesame-network"
CREDENTIAL = base64.b64encode(f"user:{PASSWORD}".encode()).decode()
REFUSING = b"HTTP/1.1 407 Proxy Authentication Required\r\ncontent-length: 0\r\n\r\n"
MODELS = {
    "gpt-4o-mini": {"max_output_tokens": 100, "targets": targets("up")},
    "voice": {"targets": [{"provider": "up", "model": "gpt-realtime"}]},
}


@asynccontextmanager
async def proxied(answer: bytes | None = None) -> AsyncIterator[tuple[Forwarding, str]]:
    """A proxy with its URL."""
    proxy = Forwarding() if answer is None else Forwarding(answer)
    async with listening(proxy.talk) as port:
        yield proxy, f"http://user:{PASSWORD}@127.0.0.1:{port}"


@asynccontextmanager
async def secured(inner: int, authority: trustme.CA) -> AsyncIterator[str]:
    """The URL of a server that speaks TLS in front of one that does not."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await joined(f"127.0.0.1:{inner}", b"", reader, writer)

    async with listening(talk, context) as port:
        yield f"https://localhost:{port}"


async def _session(gateway: Running) -> str:
    """What a realtime session says."""
    async with gateway.session.ws_connect(f"{gateway.url}/v1/realtime?model=voice") as socket:
        assert json.loads(await socket.receive_str(timeout=5))["type"] == "session.created"
        await socket.send_str(json.dumps({"type": "response.create"}))
        while (event := json.loads(await socket.receive_str(timeout=5)))["type"] != "response.output_text.delta":
            pass
        return str(event["delta"])


@pytest.mark.parametrize("where", ["provider", "server"])
async def test_a_realtime_session_goes_through_the_proxy_and_trusts_the_authority(where: str, tmp_path: Path) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    async with realtime() as up, secured(up.port, authority) as url, proxied() as (proxy, at):
        network = {"proxy": at, "tls": {"ca_file": str(tmp_path / "ca.pem")}}
        provider: dict[str, Any] = {"plugin": "openai", "base_url": f"{url}/v1", "api_key": KEY}
        if where == "provider":
            yaml = config(None, {"up": {**provider, "network": network}}, MODELS)
        else:
            yaml = config(None, {"up": provider}, MODELS, network=network)
        async with running(yaml) as gateway:
            assert await _session(gateway) == TEXT
        assert [head.split()[:2] for head in proxy.heads] == [["CONNECT", url.removeprefix("https://")]]
        assert f"proxy-authorization: basic {CREDENTIAL}".lower() in proxy.heads[0].lower()
        assert "proxy-authorization" not in {name.lower() for name in up.sessions[0].headers}


async def test_azure_s_tokens_are_fetched_through_the_proxy_too() -> None:
    async with entra() as identity, azure(entra=identity) as cloud, proxied() as (proxy, at):
        yaml = azures.config(cloud.root, identity=azures.credentials(identity), network={"proxy": at})
        async with running(yaml) as gateway:
            assert (await gateway.post(azures.CHAT, azures.chat())).status == 200
        asked = [head.split()[1] for head in proxy.heads]
        assert asked[0].startswith(identity.url)
        assert asked[1].startswith(cloud.root)
        for request in (*identity.requests, *cloud.requests):
            assert "proxy-authorization" not in request.headers


async def test_a_machine_s_own_identity_service_is_not_asked_through_a_proxy() -> None:
    async with entra() as identity, azure(entra=identity) as cloud, proxied() as (proxy, at):
        managed = {"kind": "managed_identity", "endpoint": identity.url}
        async with running(azures.config(cloud.root, identity=managed, network={"proxy": at})) as gateway:
            assert (await gateway.post(azures.CHAT, azures.chat())).status == 200
        assert len(identity.requests) == 1
        assert [head.split()[1].startswith(cloud.root) for head in proxy.heads] == [True]


async def test_aws_s_roles_are_assumed_through_the_proxy_too() -> None:
    async with bedrock() as fake, aws(identities=fake.identities) as sts, proxied() as (proxy, at):
        yaml = bedrocks.config(fake.root, role_arn=ROLE, sts_endpoint=sts.root, network={"proxy": at})
        async with running(yaml) as gateway:
            assert (await gateway.post(bedrocks.CHAT, bedrocks.chat())).status == 200
        asked = [head.split()[1] for head in proxy.heads]
        assert asked[0].startswith(sts.root)
        assert asked[-1].startswith(fake.root)
        assert all(CREDENTIAL in head for head in proxy.heads)
        for request in (*sts.requests, *fake.requests):
            assert "proxy-authorization" not in request.headers


async def test_the_password_of_a_proxy_that_refuses_is_shown_nowhere(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    seen = []
    async with entra() as identity, aws() as sts, proxied(REFUSING) as (proxy, at):
        yamls = [
            config(
                None, {"up": {"plugin": "openai", "base_url": url, "api_key": KEY, "network": {"proxy": at}}}, MODELS
            )
            for url in ("http://localhost:1/v1", "https://localhost:1/v1")
        ]
        yamls.append(azures.config("https://x.example", identity=azures.credentials(identity), network={"proxy": at}))
        yamls.append(bedrocks.config("https://x.example", role_arn=ROLE, sts_endpoint=sts.root, network={"proxy": at}))
        for yaml in yamls:
            async with running(yaml) as gateway:
                model = next(iter(gateway.gateway.models))
                answers = [await gateway.post(CHAT, {**HELLO, "model": model}), await gateway.get("/readyz")]
                answers.append(await gateway.get("/admin/health"))
                assert answers[0].status == 502, answers[0].text
                seen += [str(answer.headers) + answer.text for answer in answers]
                seen.append(repr(gateway.gateway.config))
                if "openai" in yaml:
                    with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
                        await _session(gateway)
                    seen.append(str(refused.value) + str(refused.value.headers))
        assert len(proxy.heads) >= 6
    for word in (PASSWORD, CREDENTIAL):
        assert word not in caplog.text
        assert not [text for text in seen if word in text]


# --- connections of a provider's own -----------------------------------------------------------


@define(eq=False)
class Kept:
    """A provider that keeps its connections, and streams until it is told to end."""

    open: int = 0
    most: int = 0
    requests: int = 0
    ends: asyncio.Event = field(factory=asyncio.Event)

    async def talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Stream to each that asks for a stream, and refuse others."""
        self.open += 1
        self.most = max(self.most, self.open)
        try:
            while head := (await reader.readuntil(b"\r\n\r\n")).decode().lower():
                self.requests += 1
                asked = await reader.readexactly(int(head.partition("content-length: ")[2].partition("\r\n")[0]))
                if b'"stream":true' not in asked.replace(b" ", b""):
                    writer.write(b"HTTP/1.1 500 Oh\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}")
                    continue
                writer.write(
                    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
                )
                for text in ('"delta":{"content":"a"}', '"delta":{},"finish_reason":"stop"'):
                    event = b'data: {"choices":[{"index":0,%b}]}\n\n' % text.encode()
                    writer.write(b"%x\r\n%b\r\n" % (len(event), event))
                    await writer.drain()
                    await self.ends.wait()
                writer.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")
        finally:
            self.open -= 1

    async def has(self, count: int) -> None:
        """Wait until so many connections are open."""
        async with asyncio.timeout(5):
            while self.open != count:
                await asyncio.sleep(0.01)


def _own(port: int, **network: Any) -> str:
    provider = {"plugin": "openai", "base_url": f"http://127.0.0.1:{port}/v1", "api_key": KEY, "connect_seconds": 0.5}
    return config(None, {"up": {**provider, "network": network}}, MODELS)


async def test_a_provider_s_own_connections_close_after_the_last_call_of_its_configuration() -> None:
    kept = Kept()
    async with listening(kept.talk) as port, running(_own(port)) as gateway:
        async with gateway.session.post(gateway.url + CHAT, json=STREAM) as streaming:
            await streaming.content.readuntil(b"\n\n")
            await gateway.post(CHAT, HELLO)
            assert kept.open == 2
            await gateway.reload(_own(port, max_connections=5))
            await gateway.post(CHAT, HELLO)
            assert kept.open == 3  # the old ones are needed still
            kept.ends.set()
            assert b"[DONE]" in await streaming.read()
        await kept.has(1)


async def test_calls_that_wait_for_a_connection_may_leave_and_time_out_and_the_next_one_gets_it() -> None:
    kept = Kept()
    async with listening(kept.talk) as port, running(_own(port, max_connections=1)) as gateway:
        async with gateway.session.post(gateway.url + CHAT, json=STREAM) as streaming:
            await streaming.content.readuntil(b"\n\n")
            leaving = [asyncio.create_task(gateway.post(CHAT, HELLO)) for _ in range(3)]
            await asyncio.sleep(0.1)
            for each in leaving:
                each.cancel()
            answer = await gateway.post(CHAT, HELLO)
            assert (answer.status, answer.json()["error"]["code"]) == (503, "upstream_connections")
            waiting = asyncio.create_task(gateway.post(CHAT, HELLO))
            await asyncio.sleep(0.1)
            assert kept.requests == 1
            kept.ends.set()
            assert b"[DONE]" in await streaming.read()
            assert (await waiting).status == 502
        assert (kept.requests, kept.most) == (2, 1)


async def test_a_key_with_a_passphrase_is_a_fault_and_no_question(tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization

    ours = trustme.CA().issue_cert("gateway.example")
    ours.cert_chain_pems[0].write_to_path(str(tmp_path / "cert.pem"))
    key = serialization.load_pem_private_key(ours.private_key_pem.bytes(), None)
    hidden = serialization.BestAvailableEncryption(b"sesame")
    (tmp_path / "key.pem").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, hidden)
    )
    tls = {"cert_file": str(tmp_path / "cert.pem"), "key_file": str(tmp_path / "key.pem")}
    with pytest.raises(StartupError, match=r"cannot be used: .* a certificate and its key, which has no passphrase"):
        async with asyncio.timeout(20), running(_own(1, tls=tls)):
            pass
