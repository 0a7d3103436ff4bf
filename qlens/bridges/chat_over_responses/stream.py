"""From the events of Responses to the chunks of a chat stream."""

from __future__ import annotations

from typing import Any

import orjson
from attrs import define, field

from qlens import sse
from qlens.bridges.chat_over_responses.answer import CALLS, Head, called, counted, filtered, finish_of, note_of
from qlens.dialects import responses
from qlens.errors import UpstreamInvalid
from qlens.provider_errors import error_from
from qlens.usage import Usage

Event = dict[str, Any]

_OF_CALLS = {"response.function_call_arguments.delta", "response.custom_tool_call_input.delta"}
_OF_THOUGHTS = {"response.reasoning_text.delta", "response.reasoning_summary_text.delta"}
_ENDS = {"response.completed", "response.incomplete"}


@define(eq=False)
class _Call:
    """A call of a tool that is being written."""

    index: int
    kind: str
    given: str
    """What chat calls that which is given to the tool."""
    sent: int = 0
    """How much of it went to the client."""


@define(eq=False)
class Chunks:
    """Writes a chat stream, event by event."""

    older: bool
    """Whether the client speaks of functions, not of tools."""
    used: Usage | None = field(init=False, default=None)
    _before: bytes = field(init=False, default=b"", repr=False)
    """How every chunk begins; empty until the response is known."""
    _done: bool = field(init=False, default=False)
    _calls: dict[int, _Call] = field(init=False, factory=dict)
    """By the index of their item."""

    def feed(self, event: bytes) -> bytes:
        """The chunks for an event; raises the error that it carries."""
        data = sse.data(event)
        if data is None:
            return event  # a comment keeps the connection alive
        if not data.strip() or self._done or data.startswith(b"[DONE]"):
            return b""
        payload = sse.parsed(data)
        self.used = responses.event_usage(payload, self.used)
        if (error := responses.event_error(payload)) is not None:
            raise error_from(error)
        try:
            return self._event(payload)
        except (AttributeError, KeyError, TypeError) as mistake:
            raise UpstreamInvalid("The provider sent an event that is not as its API promises.") from mistake

    def end(self) -> bytes:
        """Nothing: a stream without its last event is not over."""
        return b""

    def _event(self, event: Event) -> bytes:
        kind = event.get("type")
        if kind == "response.output_text.delta":
            spelled = event.get("logprobs")
            return self._chunk({"content": event["delta"]}, spelled if isinstance(spelled, list) else ())
        if kind in _OF_CALLS:
            return self._given(self._calls[event["output_index"]], event["delta"])
        if kind in _OF_THOUGHTS:
            return self._chunk({"reasoning_content": event["delta"]})
        if kind == "response.refusal.delta":
            return self._chunk({"refusal": event["delta"]})
        if kind == "response.output_item.added" and event["item"]["type"] in CALLS:
            return self._call(event["output_index"], event["item"])
        if kind == "response.output_item.done" and event["item"]["type"] in CALLS:
            return self._rest(event["output_index"], event["item"])
        if kind == "response.output_text.annotation.added" and (note := note_of(event["annotation"])) is not None:
            return self._chunk({"annotations": [note]})
        if kind in _ENDS:
            return self._end(event["response"])
        if kind == "response.created":
            return self._begin(event["response"])
        return b""  # says nothing that others do not, or is what a later version of the API may bring

    # --- the response --------------------------------------------------------------------------

    def _begin(self, response: Event) -> bytes:
        head = Head.of(response)
        self._before = b'data: {"id":%b,"object":"chat.completion.chunk","created":%d,"model":%b,' % (
            orjson.dumps(head.id),
            head.created,
            orjson.dumps(head.model),
        )
        return self._chunk({"role": "assistant", "content": ""})

    def _end(self, response: Event) -> bytes:
        self._done = True
        said = counted(response)
        finish = finish_of(response, len(self._calls), older=self.older)
        ending = self._chunk({}, finish=finish, beside=filtered(response))
        if said.get("usage"):
            # OpenAI's usage event; whoever did not ask for it is not shown it.
            ending += b'%b"choices":[],%b\n\n' % (self._before, orjson.dumps(said)[1:])
        return ending + sse.DONE

    # --- calls of tools ------------------------------------------------------------------------

    def _call(self, index: int, item: Event) -> bytes:
        kind, given = CALLS[item["type"]]
        call = self._calls[index] = _Call(len(self._calls), kind, given)
        whole = called(item)
        call.sent = len(whole[kind][given])  # compatible servers may send all of it at once
        return self._called(call, whole)

    def _given(self, call: _Call, text: str) -> bytes:
        call.sent += len(text)
        return self._called(call, {call.kind: {call.given: text}}) if text else b""

    def _rest(self, index: int, item: Event) -> bytes:
        """What of a call was not sent yet: mostly nothing."""
        opening = b"" if index in self._calls else self._call(index, {**item, CALLS[item["type"]][1]: ""})
        call = self._calls[index]
        return opening + self._given(call, (item.get(call.given) or "")[call.sent :])

    def _called(self, call: _Call, part: Event) -> bytes:
        if not self.older:
            return self._chunk({"tool_calls": [{"index": call.index, **part}]})
        return self._chunk({"function_call": part[call.kind]}) if not call.index else b""

    # --- chunks --------------------------------------------------------------------------------

    def _chunk(self, delta: Event, spelled: Any = (), finish: str | None = None, beside: Event | None = None) -> bytes:
        if not self._before:
            raise UpstreamInvalid("The provider's stream does not begin with a response.")
        more = b"," + orjson.dumps(beside)[1:-1] if beside else b""
        return b'%b"choices":[{"index":0,"delta":%b,"logprobs":%b,"finish_reason":%b%b}]}\n\n' % (
            self._before,
            orjson.dumps(delta),
            orjson.dumps({"content": spelled, "refusal": None} if spelled else None),
            orjson.dumps(finish),
            more,
        )
