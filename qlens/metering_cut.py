"""Ends a stream of typed events before its time, so that its client sees a valid answer that reached its length."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

from attrs import define, evolve, field

from qlens import sse
from qlens.bridges.counts import as_anthropic, as_openai
from qlens.bridges.responses_over_chat.answer import usage_of
from qlens.dialects import Body, typed
from qlens.dialects.response_events import CALLS, PARTS, Item, Part, Place, Writer
from qlens.errors import CallError
from qlens.usage import Usage

_FOLD_BYTES = 65_536
"""So many bytes of events are remembered as they came; they are many times as long as the texts in them."""
_DELTA = re.compile(rb"event: content_block_delta\b")


class Ending(Protocol):
    """What is remembered of a stream, so that it can be ended at any event."""

    finish: str
    """What the reply's `finish` is then."""

    def heard(self, event: bytes) -> None:
        """Remember an event that passed."""

    def events(self, used: Usage) -> Iterator[Body]:
        """The events that end the stream here."""


def ending(dialect: str) -> Ending | None:
    """What can end a stream of this dialect; None for one that is never too long."""
    match dialect:
        case "messages":
            return _OfMessages()
        case "responses":
            return _OfResponses()
    return None


def within(used: Usage, most: int) -> Usage:
    """The usage of a stream that was cut: it had more, and what was reserved for it was generated."""
    reasoning = min(used.reasoning, most)
    audio = min(used.audio_out, most - reasoning)
    return evolve(used, reasoning=reasoning, audio_out=audio, output=most - reasoning - audio)


def written(events: Iterable[Body]) -> bytes:
    """These events, as bytes of the stream."""
    return b"".join(map(typed.write, events))


def _payload(event: bytes) -> Body:
    """What an event says; nothing for one that says nothing a client could read."""
    data = sse.data(event)
    if data is None or not data.strip():
        return {}
    try:
        return sse.parsed(data)
    except CallError:
        return {}


@define(eq=False)
class _OfMessages:
    """Remembers which blocks are open."""

    finish = "max_tokens"
    _open: dict[int, None] = field(init=False, factory=dict)

    def heard(self, event: bytes) -> None:
        if _DELTA.match(event):
            return
        payload = _payload(event)
        index = payload.get("index")
        if type(index) is not int:
            return
        if payload.get("type") == "content_block_start":
            self._open[index] = None
        elif payload.get("type") == "content_block_stop":
            self._open.pop(index, None)

    def events(self, used: Usage) -> Iterator[Body]:
        for index in self._open:
            yield {"type": "content_block_stop", "index": index}
        delta = {"stop_reason": self.finish, "stop_sequence": None}
        yield {"type": "message_delta", "delta": delta, "usage": as_anthropic(used)}
        yield {"type": "message_stop"}


@define(eq=False)
class _OfResponses:
    """Remembers the response as far as it has come: its last events repeat all of it."""

    finish = "max_output_tokens"
    _recent: list[bytes] = field(init=False, factory=list, repr=False)
    _recent_bytes: int = field(init=False, default=0)
    _number: int = field(init=False, default=0)
    """The number of the next event."""
    _response: Body = field(init=False, factory=dict, repr=False)
    _items: dict[int, Item] = field(init=False, factory=dict, repr=False)
    _open: dict[int, None] = field(init=False, factory=dict)
    """The items that are not whole."""
    _parts: dict[tuple[int, str, int], Part] = field(init=False, factory=dict, repr=False)
    """The parts of each item, by their place in it."""
    _open_parts: dict[tuple[int, str, int], str] = field(init=False, factory=dict)
    """Those of them that are not whole, with the id of their item."""
    _texts: dict[tuple[Any, ...], list[str]] = field(init=False, factory=dict, repr=False)
    """What was heard of the texts that are not whole, by the place of their part or the index of their item."""

    def heard(self, event: bytes) -> None:
        self._recent.append(event)
        self._recent_bytes += len(event)
        if self._recent_bytes > _FOLD_BYTES:
            self._fold()

    def events(self, used: Usage) -> Iterator[Body]:
        self._fold()
        writer = Writer(self._number)
        for place, item_id in list(self._open_parts.items()):
            index, _, number = place
            yield from writer.part_done(Place(item_id, index, number), self._whole_part(place))
        for index in sorted(self._open):
            item = self._whole_item(index)
            if item.get("type") in CALLS:
                yield writer.call_done(index, item)
            yield writer.item_done(index, item)
        yield writer.ended(
            {
                **self._response,
                "status": "incomplete",
                "incomplete_details": {"reason": self.finish},
                "output": [self._items[index] for index in sorted(self._items)],
                "usage": usage_of(as_openai(used)),
            }
        )

    # --- what was heard ------------------------------------------------------------------------

    def _fold(self) -> None:
        """Put what came lately to what came before."""
        for event in self._recent:
            payload = _payload(event)
            number = payload.get("sequence_number")
            self._number = number + 1 if type(number) is int else self._number + bool(payload)
            try:
                self._take(str(payload.get("type")), payload)
            except (AttributeError, LookupError, TypeError):
                continue  # not as the API promises: the client has it, and the end can do without it
        self._recent, self._recent_bytes = [], 0

    def _take(self, kind: str, event: Body) -> None:
        if type(event.get("response")) is dict:
            self._response = event["response"]
        elif kind == "response.output_item.added":
            index, item = _number(event["output_index"]), {**event["item"], "type": str(event["item"].get("type"))}
            self._items[index] = item
            self._open[index] = None
        elif kind == "response.output_item.done":
            self._item_done(_number(event["output_index"]), event["item"])
        elif kind in _PART_EVENTS and event["part"].get("type") in PARTS:
            self._part(kind.endswith(".done"), event)
        elif kind in _TEXT_DELTAS:
            place, name = _TEXT_DELTAS[kind]
            self._said((_number(event["output_index"]), place, _number(event[name])), event["delta"])
        elif kind in _CALL_DELTAS:
            self._said((_number(event["output_index"]),), event["delta"])

    def _said(self, place: tuple[Any, ...], delta: Any) -> None:
        if type(delta) is str:
            self._texts.setdefault(place, []).append(delta)

    def _part(self, is_done: bool, event: Body) -> None:
        kind = PARTS[event["part"]["type"]]
        place = _number(event["output_index"]), kind.place, _number(event[kind.index])
        self._parts[place] = {**event["part"]}
        if is_done:
            self._open_parts.pop(place, None)
            self._texts.pop(place, None)
        else:
            self._open_parts[place] = event.get("item_id") or ""

    def _item_done(self, index: int, item: Item) -> None:
        self._items[index] = item
        self._open.pop(index, None)
        self._texts.pop((index,), None)
        for places in (self._parts, self._open_parts):
            for place in [place for place in places if place[0] == index]:
                del places[place]

    # --- what is made whole --------------------------------------------------------------------

    def _whole_part(self, place: tuple[int, str, int]) -> Part:
        part = self._parts[place]
        part[PARTS[part["type"]].text] = "".join(self._texts.get(place, ()))
        return part

    def _whole_item(self, index: int) -> Item:
        item = self._items[index]
        if item.get("type") in CALLS:
            item[CALLS[item["type"]][0]] = "".join(self._texts.get((index,), ()))
        parts = sorted(place for place in self._parts if place[0] == index)
        item.update({name: [] for _, name, _ in parts})
        for place in parts:
            item[place[1]].append(self._parts[place])
        if "status" in item:
            item["status"] = "incomplete"
        return item


def _number(value: Any) -> int:
    """A number as it stands in an event; TypeError for what is none."""
    if type(value) is not int:
        raise TypeError(value)
    return value


_PART_EVENTS = frozenset(f"{kind.events}.{what}" for kind in PARTS.values() for what in ("added", "done"))
_TEXT_DELTAS = {f"{kind.text_events}.delta": (kind.place, kind.index) for kind in PARTS.values()}
_CALL_DELTAS = frozenset(f"{events}.delta" for _, events in CALLS.values())
