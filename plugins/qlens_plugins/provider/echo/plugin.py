"""The echo provider: takes a call, waits and fails as it is told, and answers."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Iterator

from attrs import define, field, frozen, validators

from qlens import (
    Call,
    Outgoing,
    Reply,
    Session,
    Target,
    UpstreamRejected,
    UpstreamTruncated,
    Usage,
    error_from,
    hookimpl,
)
from qlens_plugins.provider.echo.answers import (
    Said,
    answer_chat,
    answer_completion,
    count_messages,
    prompts,
)
from qlens_plugins.provider.echo.behaviour import Behaviour, faults
from qlens_plugins.provider.echo.other import OTHER, answer_other
from qlens_plugins.provider.echo.session import EchoSession
from qlens_plugins.provider.echo.wire import ChatWire, CompletionsWire, Event, embeddings_body, vector

MAX_DIMENSIONS = 8192


@frozen
class EchoConfig:
    """A model that needs no account: it answers with what it was asked, always the same, and counts its tokens."""

    dimensions: int = field(default=1536, validator=[validators.ge(1), validators.le(MAX_DIMENSIONS)])
    """How long an embedding is when the client does not say."""


@define(eq=False)
class Echo:
    """Answers from the request itself; a target's `params` make it slow, failing or breaking off."""

    config: EchoConfig
    name: str
    _failures: Counter[tuple[str, str]] = field(factory=Counter, init=False, repr=False)

    Config = EchoConfig

    def dialects(self, target: Target) -> tuple[str, ...]:
        """The dialects spoken for a target."""
        return ("chat", "completions", "embeddings", *OTHER)

    def check(self, target: Target) -> Iterable[str]:
        """What is wrong with a target, asked at start-up."""
        return [f"target {self.name}/{target.model}: {fault}" for fault in faults(target.params)]

    @hookimpl
    async def send(self, call: Call, target: Target, outgoing: Outgoing) -> Reply:
        """Answer, after the time and with the failures that the target's params ask for."""
        behaviour = Behaviour.of(target.params)
        await asyncio.sleep(behaviour.first_byte_ms / 1000)
        self._fail(behaviour, target)
        if outgoing.dialect == "embeddings":
            return await self._embed(target, outgoing, behaviour)
        if outgoing.dialect in OTHER:
            _break_off(behaviour)
            return await answer_other(target.model, outgoing)
        wire, choices, usage = _answer(target, outgoing, _limit(call, outgoing))
        if outgoing.stream:
            chunks = _stream(wire.events(choices, usage), behaviour)
            return Reply(chunks=chunks, dialect=outgoing.dialect, upstream_id=wire.id)
        await asyncio.sleep(max((len(said.tokens) for said in choices), default=0) * behaviour.token_ms / 1000)
        _break_off(behaviour)
        return Reply(
            body=wire.body(choices, usage),
            dialect=outgoing.dialect,
            usage=usage,
            finish=choices[0].finish if choices else None,
            complete=True,
            upstream_id=wire.id,
        )

    @hookimpl
    async def connect(self, target: Target) -> Session:
        """Open a realtime session, after the time and with the failures that the target's params ask for."""
        behaviour = Behaviour.of(target.params)
        await asyncio.sleep(behaviour.first_byte_ms / 1000)
        self._fail(behaviour, target)
        session = EchoSession(target.model)
        await session.begin()
        return session

    def _fail(self, behaviour: Behaviour, target: Target) -> None:
        key = (target.public, target.model)
        if not behaviour.fails(self._failures[key]):
            return
        self._failures[key] += 1
        status = behaviour.fail_status or 503
        said = {"message": f"The echo was told to fail with status {status}.", "code": behaviour.fail_code}
        raise error_from({"error": said}, status, behaviour.retry_after)

    async def _embed(self, target: Target, outgoing: Outgoing, behaviour: Behaviour) -> Reply:
        dimensions = outgoing.body.get("dimensions") or self.config.dimensions
        if dimensions > MAX_DIMENSIONS:
            raise UpstreamRejected(f"dimensions must be at most {MAX_DIMENSIONS}.", param="dimensions")
        inputs = prompts(outgoing.body)
        vectors = []
        for text, _ in inputs:
            vectors.append(vector(text, dimensions, packed=outgoing.body.get("encoding_format") == "base64"))
            await asyncio.sleep(0)  # thousands of vectors would hold everyone else up
        _break_off(behaviour)
        usage = Usage(input=sum(tokens for _, tokens in inputs), source="provider")
        body = embeddings_body(target.model, vectors, usage)
        return Reply(body=body, dialect=outgoing.dialect, usage=usage, complete=True)


def _limit(call: Call, outgoing: Outgoing) -> int | None:
    """How many tokens may be generated: a model that has a longest answer keeps to it unasked, as real ones do."""
    asked = outgoing.body.get("max_completion_tokens") or outgoing.body.get("max_tokens")
    return asked or (call.model.max_output_tokens if call.model else None)


def _answer(
    target: Target, outgoing: Outgoing, limit: int | None
) -> tuple[ChatWire | CompletionsWire, list[Said], Usage]:
    body, copies = outgoing.body, outgoing.body.get("n") or 1
    wire: ChatWire | CompletionsWire
    if outgoing.dialect == "chat":
        wire, choices = ChatWire(target.model), [answer_chat(body, limit)] * copies
        asked = count_messages(body["messages"])
    else:
        given = prompts(body)
        wire = CompletionsWire(target.model)
        choices = [said for text, _ in given for said in [answer_completion(text, body, limit)] * copies]
        asked = sum(tokens for _, tokens in given)
    said = sum(len(choice.tokens) for choice in choices)
    return wire, choices, Usage(input=asked, output=said, source="provider")


async def _stream(events: Iterator[Event], behaviour: Behaviour) -> AsyncIterator[bytes]:
    told = 0
    for event in events:
        if event.part == "ending" or (event.part == "token" and told == behaviour.break_after_tokens):
            _break_off(behaviour)
        if event.part == "token":
            told += 1
            # Without a pause set, others still get their turn between two tokens.
            await asyncio.sleep(behaviour.token_ms / 1000)
        yield event.data


def _break_off(behaviour: Behaviour) -> None:
    if behaviour.break_after_tokens is not None:
        raise UpstreamTruncated(f"The echo was told to break off after {behaviour.break_after_tokens} tokens.")
