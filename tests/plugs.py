"""Plugins for tests, named in YAML by import path: they note what happens, and fail or hang on demand."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import orjson
from attrs import define, field, frozen

from qlens import (
    Attempt,
    Call,
    Caller,
    Cost,
    Event,
    Gateway,
    Health,
    Model,
    Outgoing,
    RateLimited,
    Receipt,
    Reply,
    StartupError,
    Target,
    Unauthenticated,
    Usage,
    hookimpl,
)

SECRET = "sk-example-secret-in-an-exception"

HANGING = ("authenticate", "admit", "wrap_call", "lookup", "choose", "wrap_send", "send", "store")
"""The hooks a call can wait in."""


@frozen
class ProbeConfig:
    """What the probe does in which hook."""

    fail: tuple[str, ...] = ()
    """Hooks that raise something that is no CallError."""
    refuse: tuple[str, ...] = ()
    """Hooks that raise a CallError."""
    hang: tuple[str, ...] = ()
    """Hooks that wait until they are cancelled."""
    answer: tuple[str, ...] = ()
    """Hooks that answer, where others would pass on."""
    hold: str | None = None
    """What `admit` returns."""
    tenant: str = "probe"
    """The tenant `authenticate` answers with."""
    break_lifespan: bool = False
    """Whether the lifespan refuses to open."""


@define(eq=False)
class Probe:
    """A plugin for any stage but provider."""

    config: ProbeConfig
    name: str
    events: list[str] = field(factory=list, init=False)
    holds: list[object] = field(factory=list, init=False)
    """What was admitted and not yet settled."""
    stored: list[Reply] = field(factory=list, init=False)
    adopted: list[object] = field(factory=list, init=False)
    hanging: asyncio.Event = field(factory=asyncio.Event, init=False)

    Config = ProbeConfig

    def _plain(self, hook: str) -> bool:
        self.events.append(hook)
        if hook in self.config.fail:
            raise RuntimeError(SECRET)
        return hook in self.config.answer

    async def _at(self, hook: str) -> bool:
        self.events.append(hook)
        if hook in self.config.hang:
            self.hanging.set()
            await asyncio.Event().wait()
        if hook in self.config.fail:
            raise RuntimeError(SECRET)
        if hook in self.config.refuse:
            raise Unauthenticated("refused") if hook == "authenticate" else RateLimited("refused", retry_after=1.5)
        return hook in self.config.answer

    @hookimpl
    @asynccontextmanager
    async def lifespan(self, gateway: Gateway) -> AsyncIterator[None]:
        if self.config.break_lifespan:
            raise StartupError("the probe's backend is misconfigured")
        self.events.append("open")
        yield
        self.events.append("close")

    @hookimpl
    def adopt(self, old: object) -> None:
        self.adopted.append(old)

    @hookimpl
    def health(self) -> Health:
        self._plain("health")
        return Health(True, "fine")

    @hookimpl
    async def authenticate(self, call: Call) -> Caller | None:
        answers = await self._at("authenticate")
        return Caller(self.config.tenant, "probe", self.name) if answers else None

    @hookimpl
    async def admit(self, call: Call) -> object | None:
        await self._at("admit")
        if self.config.hold is None:
            return None
        hold = f"{self.config.hold}-{call.id}"
        self.holds.append(hold)
        return hold

    @hookimpl
    async def wrap_call(self, call: Call, proceed: Callable[[], Awaitable[Reply]]) -> Reply:
        answers = await self._at("wrap_call")
        if answers:
            return _reply("from wrap_call")
        reply = await proceed()
        self.events.append("wrap_call done")
        return reply

    @hookimpl
    async def lookup(self, call: Call) -> Reply | None:
        answers = await self._at("lookup")
        call.keep = 1_000_000
        return _reply("from lookup") if answers else None

    @hookimpl
    async def choose(self, call: Call, model: Model) -> list[Target] | None:
        answers = await self._at("choose")
        return list(reversed(model.candidates)) if answers else None

    @hookimpl
    def retry(self, call: Call, attempt: Attempt) -> float | None:
        return 0.0 if self._plain("retry") else None

    @hookimpl
    async def wrap_send(self, call: Call, target: Target, proceed: Callable[[Target], Awaitable[Reply]]) -> Reply:
        await self._at("wrap_send")
        return await proceed(target)

    @hookimpl
    async def store(self, call: Call, reply: Reply) -> None:
        await self._at("store")
        self.stored.append(reply)

    @hookimpl
    def price(self, call: Call, target: Target, usage: Usage) -> Cost | None:
        return Cost(usage.total * 1_000_000) if self._plain("price") else None

    @hookimpl
    async def settle(self, call: Call, receipt: Receipt, hold: object | None) -> None:
        self.events.append(f"settle {receipt.outcome}")
        if hold is not None:
            self.holds.remove(hold)
        if "settle" in self.config.fail:
            raise RuntimeError(SECRET)


@frozen
class TalkerConfig:
    """What the provider does."""

    words: tuple[str, ...] = ("Hello", " there", "!")
    """What it answers, a word an event."""
    fail: bool = False
    """Raise something that is no CallError."""
    hang: bool = False
    """Wait until cancelled, before any answer."""
    stall: bool = False
    """Stream one word, then wait until cancelled."""
    usage: bool = True
    """Say what was used."""
    dialects: tuple[str, ...] = ("chat", "completions", "embeddings")
    """What it speaks."""


@define(eq=False)
class Talker:
    """A provider that always says the same, as a real one would."""

    config: TalkerConfig
    name: str
    bodies: list[dict[str, object]] = field(factory=list, init=False)
    closed: int = field(default=0, init=False)
    hanging: asyncio.Event = field(factory=asyncio.Event, init=False)

    Config = TalkerConfig

    def dialects(self, target: Target) -> tuple[str, ...]:
        return self.config.dialects

    @hookimpl
    async def send(self, call: Call, target: Target, outgoing: Outgoing) -> Reply:
        self.bodies.append(outgoing.body)
        if self.config.fail:
            raise RuntimeError(SECRET)
        if self.config.hang:
            self.hanging.set()
            await asyncio.Event().wait()
        if outgoing.stream:
            return Reply(chunks=self._stream(target.model), close=self._close)
        return _reply("".join(self.config.words), usage=self.config.usage, target=target)

    async def _close(self) -> None:
        self.closed += 1

    async def _stream(self, model: str) -> AsyncIterator[bytes]:
        for place, word in enumerate(self.config.words):
            yield _chunk(model, {"role": "assistant", "content": word} if not place else {"content": word})
            if self.config.stall:
                self.hanging.set()
                await asyncio.Event().wait()
        yield _chunk(model, {}, finish="stop")
        if self.config.usage:
            yield b"data: " + orjson.dumps({**_head(model), "choices": [], "usage": _USAGE}) + b"\n\n"
        yield b"data: [DONE]\n\n"


@frozen
class HearerConfig:
    """How long it takes to open."""

    seconds: float = 0


@define(eq=False)
class Hearer:
    """Notes the events that it hears, and has something done at the end of each call."""

    config: HearerConfig
    name: str
    heard: list[Event] = field(factory=list, init=False)
    at_settle: list[Callable[[], None]] = field(factory=list, init=False)

    Config = HearerConfig

    @hookimpl
    @asynccontextmanager
    async def lifespan(self, gateway: Gateway) -> AsyncIterator[None]:
        await asyncio.sleep(self.config.seconds)
        with gateway.events.listen(self.heard.append, self.name):
            yield

    @hookimpl
    async def settle(self, call: Call, receipt: Receipt) -> None:
        for each in self.at_settle:
            each()


_USAGE = {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8}


def _head(model: str) -> dict[str, object]:
    return {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": model}


def _chunk(model: str, delta: dict[str, object], finish: str | None = None) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return b"data: " + orjson.dumps({**_head(model), "choices": [choice]}) + b"\n\n"


def _reply(text: str, *, usage: bool = True, target: Target | None = None) -> Reply:
    message = {"role": "assistant", "content": text}
    body = {
        **_head(target.model if target else "gpt-4o-mini"),
        "object": "chat.completion",
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        **({"usage": _USAGE} if usage else {}),
    }
    return Reply(body=orjson.dumps(body), complete=True)
