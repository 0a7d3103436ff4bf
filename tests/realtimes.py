"""Plugins for the tests of realtime sessions, named in YAML by import path."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

from attrs import define, field, frozen

from qlens import Call, Caller, Frame, Outgoing, Reply, Session, SessionClosed, Target, Unavailable, hookimpl


@define(eq=False)
class Keys:
    """Knows one key, which may use one model."""

    config: None
    name: str

    @hookimpl
    async def authenticate(self, call: Call) -> Caller | None:
        right = call.credential == "sk-example-right"
        return Caller("right", "test", self.name, models=("voice", "other")) if right else None


@frozen
class OddConfig:
    """How its sessions are."""

    kind: Literal["echoes", "raises", "returns", "breaks"] = "echoes"
    """echoes: say what they are told; raises, returns: cannot be opened; breaks: fail at the first frame."""


@define(eq=False)
class Odd:
    """A provider whose sessions are no connections."""

    config: OddConfig
    name: str
    closed: list[int] = field(factory=list, init=False)

    Config = OddConfig

    @hookimpl
    async def send(self, outgoing: Outgoing) -> Reply:
        raise Unavailable("not here")

    @hookimpl
    async def connect(self, call: Call, target: Target) -> Session:
        if self.config.kind == "raises":
            raise RuntimeError("no")
        session: Any = None if self.config.kind == "returns" else Mirror(self)
        return session  # type: ignore[no-any-return]


@define(eq=False)
class Mirror:
    """Says what it is told."""

    owner: Odd
    _frames: asyncio.Queue[Frame] = field(factory=lambda: asyncio.Queue(1), init=False)
    _open: bool = field(default=True, init=False)

    async def send(self, frame: Frame) -> None:
        if self.owner.config.kind == "breaks":
            raise RuntimeError("broken")
        if not self._open:
            raise SessionClosed
        await self._frames.put(frame)

    async def receive(self) -> Frame:
        return await self._frames.get()

    async def close(self, code: int = 1000, reason: str = "") -> None:
        if self._open:
            self._open = False
            self.owner.closed.append(code)
