"""Reads a stream on its way to the client: usage, completeness, what must be withheld, what a cache keeps."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import orjson
from attrs import define, field

from qlens import dialects, returned, sse
from qlens.call import Call, Cost, Reply
from qlens.errors import CallError, UpstreamInvalid, UpstreamTruncated
from qlens.exchange import error_from
from qlens.money import usd
from qlens.returned import mistakes
from qlens.usage import Usage, larger

# What makes an event worth parsing. Inside a JSON string the quotes would be escaped, so text never matches; and
# what matches is parsed before it is believed.
_NOTABLE = re.compile(
    rb'"usage"\s*:\s*\{|"choices"\s*:\s*\[\s*\]|"finish_reason"\s*:\s*"|"error"\s*:\s*["{\[t]|\[DONE\]'
)
_BYTES_PER_TOKEN = 4


@define(eq=False)
class Meter:
    """Watches one stream. Bytes pass as they come, in whole events; only notable events are parsed."""

    call: Call
    reply: Reply
    price: Callable[[Usage], Cost]
    ended: Callable[[bytes], Awaitable[None]]
    """Awaited with the assembled answer before the end event passes, when the call asked to `keep` it."""
    failed: Callable[[BaseException], CallError]
    """What a provider's mistake means for the client."""
    events: int = 0
    """Events with data that passed."""
    passed: int = 0
    """Their bytes."""
    _envelope: int = 0
    _finished: set[int] = field(factory=set)
    _usage_event: dict[str, Any] | None = None
    _head: dict[str, Any] = field(factory=dict)
    _kept: list[bytes] = field(factory=list)
    _kept_bytes: int = 0
    _done: bool = False

    async def watch(self, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """Pass a stream on; raises UpstreamTruncated when it ends before it is complete."""
        try:
            async for events in sse.batches(chunks):
                passing, error = self._look(events)
                if passing:
                    yield self._pass(passing)
                if error is not None:
                    raise error
                if self._done:
                    break
        except CallError:
            raise
        except mistakes() as mistake:
            raise self.failed(mistake) from mistake
        if not self._done and len(self._finished) < dialects.named(self.reply.dialect).returned(self.call.body):
            raise UpstreamTruncated("The provider's answer stopped before its end.")
        # A finish reason followed by the end of the stream is complete: some servers send no [DONE].
        self.reply.complete = True
        if self.call.keep and self._kept_bytes <= self.call.keep:
            await self._hand_over()
        yield self._usage() + sse.DONE

    def _look(self, events: list[bytes]) -> tuple[list[bytes], CallError | None]:
        """The events that go to the client, and what ends the stream after them."""
        self._keep(events)
        passing: list[bytes] = []
        try:
            for event in events:
                if seen := self._see(event):
                    passing.append(seen)
        except CallError as error:
            return passing, error
        return passing, None

    def _pass(self, events: list[bytes]) -> bytes:
        """Count what goes to the client."""
        if not self._envelope:
            self._envelope = len(events[0])  # the first event carries the role and hardly any text
        self.events += len(events)
        block = b"".join(events)
        self.passed += len(block)
        return block

    def _keep(self, events: list[bytes]) -> None:
        if self.call.keep and self._kept_bytes <= self.call.keep:
            self._kept.extend(events)
            self._kept_bytes += sum(map(len, events))

    def _see(self, event: bytes) -> bytes:
        """Look into one event; what is returned goes to the client."""
        if not _NOTABLE.search(event):
            return b"" if self._done else event
        data = sse.data(event)
        if data is None or self._done:
            return b"" if self._done else event
        if data.startswith(b"[DONE]"):
            self._done = self.reply.complete = True
            return b""
        payload = parsed(data)
        if payload.get("error"):
            raise error_from(payload, None)
        return self._read(event, payload)

    def _read(self, event: bytes, payload: dict[str, Any]) -> bytes:
        dialect = dialects.named(self.reply.dialect)
        if usage := dialect.usage(payload):
            self.reply.usage = larger(self.reply.usage, usage)
        choices = payload.get("choices")
        if not choices:
            # OpenAI's usage event, or Azure's first event with its filter results: the first is kept for the end, the
            # second would break clients that read choices[0].
            if usage:
                self._usage_event = payload
            return b""
        self._head = {key: payload[key] for key in ("id", "object", "created", "model") if key in payload}
        self._finished.update(dialect.event_ends(payload))
        for choice in choices:
            if isinstance(choice, dict) and choice.get("finish_reason"):
                self.reply.finish = choice["finish_reason"]
        return event

    def _usage(self) -> bytes:
        """The usage event for a client that asked for it, with the exact cost; else nothing."""
        if not self.call.wants_usage:
            return b""
        usage = self.usage()
        event = self._usage_event
        if event is None or usage.source != "provider":
            event = {**self._head, "choices": [], "usage": as_openai(usage)}
        event["usage"]["cost_usd"] = cost_text(self.price(usage))
        return sse.write(event)

    def _said(self) -> Usage | None:
        try:
            return returned.usage(self.reply.usage)  # the provider may set it at any time
        except TypeError:
            return None

    def usage(self) -> Usage:
        """What the stream used so far: the provider's word, or else an estimate from what passed."""
        said = self._said()
        if said is not None and (said.total or not self.events):
            return said
        text = max(0, self.passed - self.events * self._envelope)
        return Usage(
            input=self.call.estimated_input,
            # Most servers send a token an event; those that send more are caught by the size of the text.
            output=max(self.events - 1, text // _BYTES_PER_TOKEN, 0),
            source="estimated" if self.reply.complete else "partial",
        )

    async def _hand_over(self) -> None:
        try:
            body = self._assembled()
        except (CallError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
            return  # good enough for the client, who reads the events one by one, and nothing to keep
        await self.ended(body)

    def _assembled(self) -> bytes:
        payloads = [parsed(data) for event in self._kept if (data := sse.data(event)) and not data.startswith(b"[DONE")]
        return orjson.dumps(dialects.named(self.reply.dialect).assemble(payloads))


def parsed(data: bytes) -> dict[str, Any]:
    """The JSON object in an event's data; raises UpstreamInvalid for anything else."""
    try:
        payload = orjson.loads(data)
    except orjson.JSONDecodeError:
        raise UpstreamInvalid("The provider sent an event that is not JSON.") from None
    if not isinstance(payload, dict):
        raise UpstreamInvalid("The provider sent an event that is not a JSON object.")
    return payload


def as_openai(usage: Usage) -> dict[str, Any]:
    """OpenAI's usage object."""
    return {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.completion,
        "total_tokens": usage.total,
        "prompt_tokens_details": {"cached_tokens": usage.cached_input, "audio_tokens": usage.audio_in},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning, "audio_tokens": usage.audio_out},
    }


def cost_text(cost: Cost) -> str | None:
    """A cost as clients see it: a decimal text, null when the price is unknown."""
    return None if cost.picos is None else usd(cost.picos)


def estimated(call: Call, dialect: str, body: dict[str, Any]) -> Usage:
    """A guess at what a whole answer used, for providers that do not say."""
    texts = dialects.named(dialect).reply_texts(body)
    size = sum(len(text.encode()) for _, text in texts)
    return Usage(input=call.estimated_input, output=-(-size // _BYTES_PER_TOKEN), source="estimated")


def exploded(call: Call, reply: Reply, cost: Cost) -> list[bytes]:
    """A whole answer as the events of the stream it would have been."""
    assert reply.body is not None
    payloads = list(dialects.named(reply.dialect).explode(orjson.loads(reply.body)))
    events = [sse.write(payload) for payload in payloads if payload.get("choices")]
    if call.wants_usage and payloads:
        head = {key: payloads[0][key] for key in ("id", "object", "created", "model") if key in payloads[0]}
        said = next((payload["usage"] for payload in payloads if payload.get("usage")), None)
        usage = {**(said or as_openai(reply.usage or Usage())), "cost_usd": cost_text(cost)}
        events.append(sse.write({**head, "choices": [], "usage": usage}))
    return [*events, sse.DONE]
