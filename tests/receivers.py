"""Receivers of webhooks: real HTTP servers on loopback that note what they are sent; and gateways that send."""

from __future__ import annotations

import asyncio
import base64
import ssl
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import orjson
import yaml
from aiohttp import web
from attrs import define, field, frozen

from qlens.testing import Running
from qlens_plugins.observe.webhooks.courier import Courier

SECRET = "whsec_" + base64.b64encode(b"an example of 32 bytes, not real").decode()
OLD = "whsec_" + base64.b64encode(b"an old example of thirty-two by.").decode()


@frozen
class Taken:
    """A request as it arrived."""

    headers: Mapping[str, str]
    body: bytes

    @property
    def id(self) -> str:
        """What it is known by."""
        return self.headers["webhook-id"]

    def json(self) -> Any:
        """The parsed body."""
        return orjson.loads(self.body)


@define(eq=False)
class Receiver:
    """A server that answers everything with `status`, or not at all while it `hangs`."""

    port: int = 0
    scheme: str = "http"
    status: int = 204
    headers: dict[str, str] = field(factory=dict)
    hangs: bool = False
    got: list[Taken] = field(factory=list)
    busy: int = 0
    most_busy: int = 0
    _came: asyncio.Condition = field(factory=asyncio.Condition)

    @property
    def url(self) -> str:
        """Where it is."""
        return f"{self.scheme}://127.0.0.1:{self.port}/hook"

    async def reached(self, count: int, seconds: float = 5) -> list[Taken]:
        """Wait for so many requests."""
        async with asyncio.timeout(seconds), self._came:
            await self._came.wait_for(lambda: len(self.got) >= count)
        return self.got

    async def take(self, request: web.Request) -> web.Response:
        """Note a request and answer it."""
        self.busy += 1
        self.most_busy = max(self.most_busy, self.busy)
        try:
            taken = Taken({name.lower(): value for name, value in request.headers.items()}, await request.read())
            async with self._came:
                self.got.append(taken)
                self._came.notify_all()
            while self.hangs:
                await asyncio.sleep(0.02)
            return web.Response(status=self.status, headers=self.headers)
        finally:
            self.busy -= 1


@asynccontextmanager
async def receiving(context: ssl.SSLContext | None = None, **state: Any) -> AsyncIterator[Receiver]:
    """Run a receiver on a free loopback port."""
    receiver = Receiver(scheme="https" if context else "http", **state)
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", receiver.take)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", receiver.port, ssl_context=context)
    await site.start()
    receiver.port = runner.addresses[0][1]
    try:
        yield receiver
    finally:
        receiver.hangs = False
        await runner.cleanup()


def endpoint(receiver: Receiver, name: str = "billing", events: str = "qlens.*", **more: Any) -> dict[str, Any]:
    return {"name": name, "url": receiver.url, "secrets": [SECRET], "events": [events], **more}


def config(*endpoints: dict[str, Any], **settings: Any) -> str:
    plugin = {"plugin": "webhooks", "endpoints": list(endpoints), "allow": ["127.0.0.0/8"], **settings}
    return yaml.safe_dump(
        {
            "pipeline": {"auth": [{"plugin": "anonymous"}], "observe": [plugin]},
            "providers": {"echo": {"plugin": "echo"}},
            "models": {
                "gpt-4o-mini": {
                    "max_output_tokens": 1000,
                    "targets": [{"provider": "echo", "model": "gpt-4o-mini"}],
                }
            },
        }
    )


def courier_of(gateway: Running) -> Courier:
    courier = gateway.plugin("observe", "webhooks")._courier
    assert isinstance(courier, Courier)
    return courier


def tell(
    gateway: Running, count: int = 1, *, tenant: str | None = "acme", type_: str = "qlens.budget.exhausted"
) -> None:
    for number in range(count):
        gateway.gateway.events.announce(type_, f"budget-{number}", {"n": number}, tenant=tenant)


async def eventually(holds: Callable[[], bool], seconds: float = 5) -> None:
    async with asyncio.timeout(seconds):
        while not holds():
            await asyncio.sleep(0.01)
