"""The kit for plugin authors: run a real gateway, script an upstream, check a plugin against its contract.

Everything here is public. The pytest plugin (`qlens.testing.plugin`) is loaded by itself when qlens is installed.
"""

from __future__ import annotations

import asyncio
import io
import os
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import orjson
from attrs import define, evolve, field, frozen

from qlens import sse
from qlens.call import Receipt
from qlens.clock import Clock, ManualClock
from qlens.config import Config, Draft, PluginEntry, draft
from qlens.gateway import Gateway
from qlens.server import Server, served
from qlens.testing.contract import check_plugin
from qlens.testing.recorder import Recorder
from qlens.testing.upstreams import Scripted, upstream

__all__ = [
    "ManualClock",
    "Recorder",
    "Response",
    "Running",
    "Scripted",
    "check_plugin",
    "running",
    "upstream",
]

_LARGE_BYTES = 1024 * 1024
"""Of which aiohttp warns that they hold the loop up, given as one piece."""


@frozen
class Response:
    """What a client got."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        """The parsed body."""
        return orjson.loads(self.body)

    @property
    def text(self) -> str:
        """The body as text."""
        return self.body.decode()

    def events(self) -> list[Any]:
        """The data of each event of a stream, parsed; the end mark stays the text `[DONE]`."""
        found = [data for event in sse.Splitter().feed(self.body) if (data := sse.data(event)) is not None]
        return [data.decode() if data == b"[DONE]" else orjson.loads(data) for data in found]


@define(eq=False)
class Running:
    """A gateway that serves on free loopback ports."""

    gateway: Gateway
    server: Server
    folder: Path
    session: aiohttp.ClientSession
    recorder: Recorder
    env: Mapping[str, str] = field(factory=dict)

    @property
    def url(self) -> str:
        """Where clients reach it, without /v1."""
        return self.gateway.url

    @property
    def admin_url(self) -> str:
        """Where operators reach it."""
        return self.server.admin_url

    @property
    def receipts(self) -> list[Receipt]:
        """Every receipt that was settled so far, rejected calls' included."""
        return self.recorder.receipts

    def plugin(self, stage: str, name: str) -> Any:
        """A live plugin instance."""
        key = f"{stage}.{name}"
        return next(i.plugin for i in self.gateway.registration.instances if i.key == key)

    async def settled(self, count: int, seconds: float = 5) -> list[Receipt]:
        """Wait for this many receipts; TimeoutError when they do not come."""
        await asyncio.wait_for(self.recorder.reached(count), seconds)
        return self.receipts

    async def reload(self, text: str) -> None:
        """Change to another configuration, as SIGHUP does."""
        (self.folder / "qlens.yaml").write_text(text)
        found = draft(text, folder=self.folder, env=self.env)
        await self.gateway.reload(_for_tests(found, self.gateway.config))

    async def post(
        self, path: str, payload: Any = None, *, key: str | None = None, headers: Mapping[str, str] | None = None
    ) -> Response:
        """POST JSON, or bytes as they are."""
        body = payload if isinstance(payload, bytes) else orjson.dumps(payload)
        return await self.request("POST", path, body=body, key=key, headers=headers)

    async def post_form(
        self,
        path: str,
        fields: Mapping[str, str],
        files: Mapping[str, bytes],
        *,
        key: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Response:
        """POST a form of fields and files, each file under its field's name."""
        form = aiohttp.FormData(dict(fields))
        for name, content in files.items():
            form.add_field(name, io.BytesIO(content), filename=f"{name}.bin", content_type="application/octet-stream")
        return await self.request("POST", path, body=form(), key=key, headers=headers)

    async def get(self, path: str, *, key: str | None = None, headers: Mapping[str, str] | None = None) -> Response:
        """GET a path; one that starts with /admin or is /metrics goes to the admin listener."""
        return await self.request("GET", path, key=key, headers=headers)

    async def request(
        self,
        method: str,
        path: str,
        *,
        body: bytes | aiohttp.payload.Payload | None = None,
        key: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Response:
        """Send one request and read the whole answer."""
        base = self.admin_url if path.startswith("/admin") or path == "/metrics" else self.url
        sent = {**({"authorization": f"Bearer {key}"} if key else {}), **(headers or {})}
        data: Any = body
        if isinstance(body, bytes):
            sent.setdefault("content-type", "application/json")
            data = io.BytesIO(body) if len(body) >= _LARGE_BYTES else body
        async with self.session.request(method, base + path, data=data, headers=sent) as answer:
            return Response(answer.status, answer.headers, await answer.read())


def _for_tests(found: Draft, like: Config | None = None) -> Draft:
    """The configuration on free ports, with a recorder at its end."""
    config = found.config
    recorder = PluginEntry("observe", "recorder", "qlens.testing.recorder:Recorder", {}, "pipeline.observe")
    pipeline = {**config.pipeline, "observe": (*config.pipeline.get("observe", ()), recorder)}
    server = config.server
    admin = evolve(server.admin, port=0)
    server = evolve(server, port=0, admin=admin)
    if like is not None:
        server = evolve(server, host=like.server.host, admin=like.server.admin)
    return evolve(found, config=evolve(config, pipeline=pipeline, server=server))


@asynccontextmanager
async def running(
    text: str,
    *,
    files: Mapping[str, str] | None = None,
    env: Mapping[str, str] | None = None,
    clock: Clock | None = None,
) -> AsyncIterator[Running]:
    """Run a gateway in this process from a YAML text, on free loopback ports, and stop it at the end.

    `files` are written next to the YAML first. Raises StartupError as `qlens serve` would.
    """
    seen = dict(os.environ if env is None else env)
    with tempfile.TemporaryDirectory(prefix="qlens-") as name:
        folder = Path(name)
        for path, content in (files or {}).items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(content)
        (folder / "qlens.yaml").write_text(text)
        found = _for_tests(draft(text, folder=folder, env=seen))
        gateway = Gateway(clock=clock or Clock())
        async with (
            served(gateway, found) as server,
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as web,
        ):
            await server.start()
            recorder = next(i.plugin for i in gateway.registration.instances if i.key == "observe.recorder")
            yield Running(gateway, server, folder, web, recorder, seen)
