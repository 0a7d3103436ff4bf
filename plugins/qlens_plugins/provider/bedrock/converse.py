"""Chat by Converse and ConverseStream: one call of the client, one request for each of its choices."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from functools import partial
from typing import Any

import orjson
from attrs import define, field

from qlens import Answer, CallError, Reply, UpstreamTruncated, Usage
from qlens_plugins.provider.bedrock import usage as usages
from qlens_plugins.provider.bedrock.converse_reply import Head, choice_of
from qlens_plugins.provider.bedrock.converse_request import Asked
from qlens_plugins.provider.bedrock.converse_stream import DONE, ChunkWriter, event_name, usage_chunk
from qlens_plugins.provider.bedrock.eventstream import MEDIA_TYPE, Frame, FrameReader
from qlens_plugins.provider.bedrock.exchange import Told, ToldBy, Wire, dumped, request_id_of
from qlens_plugins.provider.bedrock.fan_out import gathered, merged
from qlens_plugins.provider.bedrock.model_ids import ModelId

Block = dict[str, Any]

_END_SECONDS = 1.0
"""How long a stream may stay open behind its last event; then its connection is closed instead of used again."""


# --- whole answers -----------------------------------------------------------------------------


async def converse(wire: Wire, model: ModelId, asked: Asked, choices: int, most: Callable[[int], Usage]) -> Reply:
    """Ask for whole answers; their usage adds up. `most` is what one of them can use."""
    path, body = f"/model/{model.segment}/converse", dumped(asked.body)
    answers = await gathered([partial(wire.ask, path, body)] * choices, _used, most)
    request_id = answers[0].request_id
    head = Head.of(model.shown, request_id)
    said = [_used(answer) for answer in answers]
    with ToldBy(request_id, usages.together(said)):
        written = [choice_of(answer.body, asked, index) for index, answer in enumerate(answers)]
    usage = usages.total(said)
    content: Block = {
        "id": head.id,
        "object": "chat.completion",
        "created": head.created,
        "model": head.model,
        "choices": written,
    }
    if usage is not None:
        thought = any("reasoning_content" in choice["message"] for choice in written)
        content["usage"] = usages.as_openai(usage, thought=thought)
        if usage.tier is not None:
            content["service_tier"] = usage.tier
    return Reply(
        body=orjson.dumps(content),
        dialect="chat",
        usage=usage,
        finish=written[0]["finish_reason"],
        complete=True,
        upstream_id=request_id,
    )


def _used(told: Told) -> Usage | None:
    answer = told.body
    more = answer.get("additionalModelResponseFields")
    return usages.read(answer.get("usage"), _tier(answer), usages.reasoning(more))


def _tier(answer: Block) -> str | None:
    tier = answer.get("serviceTier")
    kind = tier.get("type") if isinstance(tier, dict) else None
    return kind if isinstance(kind, str) else None


# --- streams -----------------------------------------------------------------------------------


@define(eq=False)
class _Stream:
    """One stream from its first frame on."""

    answer: Answer
    writer: ChunkWriter
    _reader: FrameReader = field(factory=FrameReader, init=False)
    _begun: list[Frame] = field(factory=list, init=False)
    _pieces: AsyncIterator[bytes] = field(init=False)

    def __attrs_post_init__(self) -> None:
        self._pieces = self.answer.chunks()

    async def begin(self) -> None:
        """Wait for the first frame; raises when it, or what came together with it, is an error."""
        async for piece in self._pieces:
            if frames := self._reader.feed(piece):
                self._begun = frames
                break
        else:
            raise UpstreamTruncated("The provider ended its stream before the first event.")
        for frame in self._begun:
            if event_name(frame) != "messageStart":
                break

    async def chunks(self) -> AsyncGenerator[bytes]:
        """What the client gets of it, without usage and end mark; raises UpstreamTruncated when it stops early."""
        frames, self._begun = self._begun, []
        while True:
            written: list[bytes] = []
            error = self._write(frames, written)
            if error is not None and (held := self.writer.rest()):
                written.append(held)
            if written:
                yield b"".join(written)
            if error is not None:
                raise error
            try:
                piece = await self._next()
            except CallError:
                if held := self.writer.rest():
                    yield held
                raise
            if piece is None:
                break
            frames = self._reader.feed(piece)
        if held := self.writer.rest():
            yield held
        if self.writer.finish is None or not self._reader.is_between:
            raise UpstreamTruncated("The provider's answer stopped before its end.")

    def _write(self, frames: list[Frame], written: list[bytes]) -> CallError | None:
        """Write the chunks of the frames; what was good before an error still reaches the client."""
        try:
            for frame in frames:
                if chunk := self.writer.write(frame):
                    written.append(chunk)
        except CallError as error:
            return error
        return None

    async def _next(self) -> bytes | None:
        if not self.writer.ended:
            return await anext(self._pieces, None)
        try:
            async with asyncio.timeout(_END_SECONDS):
                return await anext(self._pieces, None)
        except TimeoutError:
            return None


async def converse_stream(
    wire: Wire, model: ModelId, asked: Asked, choices: int, most: Callable[[int], Usage]
) -> Reply:
    """Ask for streams; the reply comes once the first frame of each is in hand.

    Where one fails, the others are taken to use the `most`: they say at their end what they used, and are closed.
    """
    path, body = f"/model/{model.segment}/converse-stream", dumped(asked.body)
    answers: list[Answer] = []
    head: Head | None = None

    async def open_one() -> Answer:
        answer = await wire.post(path, body, MEDIA_TYPE)
        answers.append(answer)
        return answer

    async def close() -> None:
        for answer in answers:
            await answer.close()

    try:
        opened = await gathered([open_one] * choices, most=most)
        request_id = request_id_of(opened[0])
        head = Head.of(model.shown, request_id)
        streams = [_Stream(answer, ChunkWriter(asked, head, index)) for index, answer in enumerate(opened)]
        await gathered([stream.begin for stream in streams], most=most)
    except BaseException as error:
        await close()
        if isinstance(error, CallError) and answers:
            error.upstream_id = error.upstream_id or request_id_of(answers[0])
        raise
    reply = Reply(dialect="chat", close=close, upstream_id=request_id)
    reply.chunks = _told(reply, streams, head)
    return reply


async def _told(reply: Reply, streams: list[_Stream], head: Head) -> AsyncIterator[bytes]:
    source = streams[0].chunks() if len(streams) == 1 else merged([stream.chunks() for stream in streams])
    async with aclosing(source):
        async for chunk in source:
            yield chunk
    usage = usages.total([stream.writer.usage for stream in streams])
    if usage is not None:
        reply.usage = usage
        yield usage_chunk(head, usage, thought=any(stream.writer.thought for stream in streams))
    yield DONE
