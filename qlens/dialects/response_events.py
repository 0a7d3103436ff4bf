"""The events of a stream of OpenAI's Responses: which there are, in which order, and how they are numbered."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from attrs import define, frozen

from qlens.dialects import Body

Item = dict[str, Any]
"""One item of a response's output: a message, a tool call, reasoning."""
Part = dict[str, Any]
"""One part of a message or of reasoning."""


@frozen
class PartKind:
    """How the parts of one type are streamed."""

    place: str
    """Where they stand in their item."""
    text: str
    """Where in the part its text stands."""
    events: str
    """How the events of the part itself begin."""
    text_events: str
    """How the events of its text begin."""
    index: str
    """Under which name the events say which part it is."""
    spelled: bool = False
    """Whether log probabilities stand beside the text."""


_CONTENT = ("response.content_part", "content_index")
_SUMMARY = ("response.reasoning_summary_part", "summary_index")
PARTS = {
    "output_text": PartKind("content", "text", _CONTENT[0], "response.output_text", _CONTENT[1], spelled=True),
    "refusal": PartKind("content", "refusal", _CONTENT[0], "response.refusal", _CONTENT[1]),
    "reasoning_text": PartKind("content", "text", _CONTENT[0], "response.reasoning_text", _CONTENT[1]),
    "summary_text": PartKind("summary", "text", _SUMMARY[0], "response.reasoning_summary_text", _SUMMARY[1]),
}
"""The parts whose text is streamed, by type."""
CALLS = {
    "function_call": ("arguments", "response.function_call_arguments"),
    "custom_tool_call": ("input", "response.custom_tool_call_input"),
}
"""The items that are a text themselves, by type: where it stands, and how its events begin."""
ENDS = {
    "completed": "response.completed",
    "incomplete": "response.incomplete",
    "failed": "response.failed",
    "queued": "response.queued",
    "in_progress": "response.in_progress",
}
"""The last event of a stream by the status of its response; what runs in the background has not ended with it."""


@define(eq=False)
class Writer:
    """Writes the events of one response, numbered from 0 unless others went before."""

    _number: int = 0

    def event(self, kind: str, /, **fields: Any) -> Body:
        """The next event."""
        number, self._number = self._number, self._number + 1
        return {"type": kind, "sequence_number": number, **fields}

    def begun(self, response: Body) -> Iterator[Body]:
        """The response as it is before there is any output."""
        yield self.event("response.created", response=response)
        yield self.event("response.in_progress", response=response)

    def ended(self, response: Body) -> Body:
        """The response as it is in the end."""
        status = response.get("status")
        return self.event(ENDS.get(status if type(status) is str else "", ENDS["completed"]), response=response)

    # --- items ---------------------------------------------------------------------------------

    def item_added(self, index: int, item: Item) -> Body:
        """An item begins: it is empty still."""
        return self.event("response.output_item.added", output_index=index, item=item)

    def item_done(self, index: int, item: Item) -> Body:
        """An item is whole."""
        return self.event("response.output_item.done", output_index=index, item=item)

    def call_delta(self, index: int, item: Item, text: str) -> Body:
        """More of what a tool is called with."""
        return self.event(f"{CALLS[item['type']][1]}.delta", item_id=item.get("id"), output_index=index, delta=text)

    def call_done(self, index: int, item: Item) -> Body:
        """What a tool is called with is whole."""
        name, kind = CALLS[item["type"]]
        return self.event(f"{kind}.done", item_id=item.get("id"), output_index=index, **{name: item.get(name)})

    # --- parts ---------------------------------------------------------------------------------

    def part_added(self, place: Place, part: Part) -> Body:
        """A part begins: it is empty still."""
        kind = PARTS[part["type"]]
        return self.event(f"{kind.events}.added", **place.fields(kind), part=part)

    def part_delta(self, place: Place, part: Part, text: str, logprobs: list[Any] | None = None) -> Body:
        """More of a part's text."""
        kind = PARTS[part["type"]]
        spelled = {"logprobs": logprobs or []} if kind.spelled else {}
        return self.event(f"{kind.text_events}.delta", **place.fields(kind), delta=text, **spelled)

    def annotated(self, place: Place, part: Part, number: int, annotation: Any) -> Body:
        """A note to a part's text."""
        fields = place.fields(PARTS[part["type"]])
        return self.event(
            "response.output_text.annotation.added", **fields, annotation_index=number, annotation=annotation
        )

    def part_done(self, place: Place, part: Part) -> Iterator[Body]:
        """A part is whole."""
        kind = PARTS[part["type"]]
        fields = place.fields(kind)
        spelled = {"logprobs": part.get("logprobs") or []} if kind.spelled else {}
        yield self.event(f"{kind.text_events}.done", **fields, **{kind.text: part.get(kind.text)}, **spelled)
        yield self.event(f"{kind.events}.done", **fields, part=part)


@frozen
class Place:
    """Which part of which item an event is about."""

    item_id: str | None
    output_index: int
    number: int

    def fields(self, kind: PartKind) -> Body:
        """How an event says it."""
        return {"item_id": self.item_id, "output_index": self.output_index, kind.index: self.number}


def empty_part(part: Part) -> Part:
    """A part as it begins."""
    kind = PARTS[part["type"]]
    notes: Part = {"annotations": [], "logprobs": []} if kind.spelled else {}
    return {**part, **notes, kind.text: ""}


# --- an answer into events ---------------------------------------------------------------------


def item_events(writer: Writer, index: int, item: Item) -> Iterator[Body]:
    """The events of a whole item."""
    begins = {**item, "status": "in_progress"} if "status" in item else item
    if item.get("type") in CALLS:
        yield from _call_events(writer, index, item, begins)
    elif places := _streamed(item):
        yield from _part_events(writer, index, item, {**begins, **{place: [] for place in places}})
    else:
        # What hosted tools give has events of its own, which say nothing that the whole item does not.
        yield writer.item_added(index, begins)
    yield writer.item_done(index, item)


def _streamed(item: Item) -> list[str]:
    """Where an item has parts, if it is one whose parts are all streamed."""
    places = [place for place in ("summary", "content") if type(item.get(place)) is list]
    parts = [part for place in places for part in item[place]]
    return places if all(type(part) is dict and part.get("type") in PARTS for part in parts) else []


def _call_events(writer: Writer, index: int, item: Item, begins: Item) -> Iterator[Body]:
    name, _ = CALLS[item["type"]]
    yield writer.item_added(index, {**begins, name: ""})
    if text := item.get(name):
        yield writer.call_delta(index, item, text)
    yield writer.call_done(index, item)


def _part_events(writer: Writer, index: int, item: Item, begins: Item) -> Iterator[Body]:
    yield writer.item_added(index, begins)
    for place in ("summary", "content"):
        for number, part in enumerate(item.get(place) or ()):
            at = Place(item.get("id"), index, number)
            yield writer.part_added(at, empty_part(part))
            if text := part.get(PARTS[part["type"]].text):
                yield writer.part_delta(at, part, text, part.get("logprobs"))
            for position, annotation in enumerate(part.get("annotations") or ()):
                yield writer.annotated(at, part, position, annotation)
            yield from writer.part_done(at, part)
