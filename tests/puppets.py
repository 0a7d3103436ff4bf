"""Plugins for tests whose hooks do whatever the test puts into them, nonsense included."""

from __future__ import annotations

import asyncio
import math
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any, Literal

from attrs import define, field, frozen

from qlens import Call, Endpoint, Gateway, Outgoing, Receipt, Reply, Target, hookimpl


@define(eq=False)
class Puppet:
    """A plugin for any stage but provider; `does` maps a hook to what it does, the others pass on."""

    config: None
    name: str
    does: dict[str, Callable[..., Any]] = field(factory=dict, init=False)
    settled: list[Receipt] = field(factory=list, init=False)
    held: set[str] = field(factory=set, init=False)

    async def _do(self, hook: str, *args: object) -> Any:
        if hook not in self.does:
            return None
        result = self.does[hook](*args)
        return await result if isinstance(result, Awaitable) else result

    @hookimpl
    async def authenticate(self, call: Call) -> Any:
        return await self._do("authenticate", call)

    @hookimpl
    async def admit(self, call: Call) -> object | None:
        await self._do("admit", call)
        self.held.add(call.id)
        return call.id

    @hookimpl
    async def wrap_call(self, call: Call, proceed: Callable[[], Awaitable[Reply]]) -> Any:
        return await (self._do("wrap_call", call, proceed) if "wrap_call" in self.does else proceed())

    @hookimpl
    async def lookup(self, call: Call) -> Any:
        return await self._do("lookup", call)

    @hookimpl
    async def choose(self, call: Call) -> Any:
        return await self._do("choose", call)

    @hookimpl
    def retry(self, call: Call) -> Any:
        return self.does["retry"](call) if "retry" in self.does else math.inf

    @hookimpl
    async def wrap_send(self, call: Call, target: Target, proceed: Callable[[Target], Awaitable[Reply]]) -> Any:
        return await (self._do("wrap_send", target, proceed) if "wrap_send" in self.does else proceed(target))

    @hookimpl
    async def store(self, call: Call, reply: Reply) -> None:
        await self._do("store", call, reply)

    @hookimpl
    def price(self, call: Call) -> Any:
        return self.does["price"](call) if "price" in self.does else None

    @hookimpl
    def health(self) -> Any:
        return self.does["health"]() if "health" in self.does else None

    @hookimpl
    async def settle(self, call: Call, receipt: Receipt, hold: object | None) -> None:
        self.settled.append(receipt)
        self.held.discard(str(hold))
        await self._do("settle", receipt)


@define(eq=False)
class Speaker:
    """A provider that answers with what the test puts into `answer`."""

    config: None
    name: str
    answer: Callable[[Call, Target, Outgoing], Any] = field(init=False)
    closed: int = field(default=0, init=False)

    @hookimpl
    async def send(self, call: Call, target: Target, outgoing: Outgoing) -> Any:
        result = self.answer(call, target, outgoing)
        return await result if isinstance(result, Awaitable) else result

    async def close(self) -> None:
        self.closed += 1


@frozen
class ResidentConfig:
    """How its lifespan opens and closes."""

    opening: Literal["", "raise", "cancel", "hang"] = ""
    closing: Literal["", "raise", "cancel", "hang"] = ""


@define(eq=False)
class Resident:
    """A plugin with a lifespan that misbehaves, and two paths that do what the test puts into `answer`."""

    config: ResidentConfig
    name: str
    events: list[str] = field(factory=list, init=False)
    answer: Callable[[Call], Awaitable[Any]] = field(init=False)
    adopting: Callable[[], None] | None = field(default=None, init=False)
    """What the instance that takes over from this one does first."""

    Config = ResidentConfig

    @hookimpl
    @asynccontextmanager
    async def lifespan(self, gateway: Gateway) -> AsyncIterator[None]:
        await _misbehave(self.config.opening)
        self.events.append("open")
        yield
        self.events.append("close")
        await _misbehave(self.config.closing)

    @hookimpl
    def adopt(self, old: object) -> None:
        assert isinstance(old, Resident)
        if old.adopting is not None:
            old.adopting()

    @hookimpl
    def endpoints(self) -> Iterable[Endpoint]:
        return [
            Endpoint("GET", f"/{self.name}", None, self._handle),
            Endpoint("GET", f"/admin/{self.name}", "member", self._handle, "admin"),
        ]

    async def _handle(self, call: Call) -> Any:
        return await self.answer(call)


async def _misbehave(how: str) -> None:
    if how == "raise":
        raise RuntimeError("no")
    if how == "cancel":
        raise asyncio.CancelledError  # as awaiting a task of one's own does that was cancelled
    if how == "hang":
        print("hangs", file=sys.stderr, flush=True)
        await asyncio.Event().wait()
