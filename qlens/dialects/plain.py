"""Dialects whose answers are not generated token by token: what they share, and what each says for itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from attrs import field, frozen

from qlens import usage as usages
from qlens.dialects import Body, Ref, Strand, fields, texts
from qlens.usage import Usage

if TYPE_CHECKING:
    from qlens.forms import File

Meters = dict[str, int]
Texts = list[tuple[Ref, str]]


def _no_meters(_body: Body) -> Meters:
    return {}


def _no_files_meters(_files: Iterable[File]) -> Meters:
    return {}


def _no_texts(_body: Body) -> Texts:
    return []


def _as_bound(bound: Mapping[str, int], _texts: list[str]) -> Meters:
    return dict(bound)


def tokens_of(body: Body) -> Usage | None:
    """The tokens that an answer says it used, under either of OpenAI's two sets of names."""
    said, tier = body.get("usage"), body.get("service_tier")
    return usages.from_openai(said, tier, generates=False) or usages.from_responses(said, tier)


@frozen
class Plain:
    """A dialect that is asked and answers once; where it streams, it does so in events that name their types."""

    rule: fields.Rule
    """What a request body must keep to."""
    asked_texts: Callable[[Body], Texts] = _no_texts
    meters: Callable[[Body], Meters] = _no_meters
    """What is counted beside tokens, as far as the body bounds it."""
    file_meters: Callable[[Iterable[File]], Meters] = _no_files_meters
    """The same of what is uploaded with it; `meters` names them too, as 0."""
    guessed_meters: Callable[[Mapping[str, int], list[str]], Meters] = _as_bound
    """What was probably used of these bounds, when the answer with these texts does not say."""
    used: Callable[[Body], Usage | None] = tokens_of
    answer_texts: Callable[[Body], Texts] = _no_texts
    """The texts of an answer that the model wrote."""
    repeated_texts: Callable[[Body], Texts] = _no_texts
    """Those that repeat the request."""
    event_text: Callable[[Body], str | None] = field(default=lambda _event: None)
    """The field of an event that holds a text."""
    last_event: str = ""
    """The type of the event with which a stream ends; empty: there are no streams."""
    default_model: str | None = None
    """Which model is meant when the client names none."""
    files: Mapping[str, int] = field(factory=dict, hash=False)
    """The files of a form: how many of each name there may be; the first name is required."""
    by_reference: str = ""
    """The field of a JSON body that says where the files are; empty: they come as a form only."""
    form: Mapping[str, type] = field(factory=dict, hash=False)
    """The fields of a form that are no text."""

    GENERATES = False
    QUIET = ()
    QUIET_KEPT = False
    MARKS = ()

    def validate(self, body: Body) -> None:
        """Refuse a request body with OpenAI's 400: InvalidRequest with its param and code."""
        if self.default_model is not None and body.get("model") is None:
            body["model"] = self.default_model
        self.rule(body, None)

    def request_texts(self, body: Body) -> Texts:
        """List the texts a model will read."""
        return self.asked_texts(body)

    def input_bound(self, body: Body) -> tuple[int, int]:
        """The most input tokens of the texts, and an estimate of them."""
        sizes = [texts.size(text) for _, text in self.asked_texts(body)]
        return sum(sizes) + texts.MESSAGE_TOKENS * len(sizes), sum(-(-size // 3) + 1 for size in sizes)

    def media(self, body: Body) -> Meters:
        """What is counted beside tokens."""
        return self.meters(body)

    def measured(self, body: Body, validated: int | None = None) -> tuple[int, int, Meters]:
        """Its `input_bound` and its `media`."""
        return *self.input_bound(body), self.media(body)

    def output_bound(self, body: Body) -> tuple[str | None, int | None]:
        """No tokens are asked for."""
        return None, 0

    def choices(self, body: Body) -> int:
        """One answer."""
        return 1

    def returned(self, body: Body) -> int:
        """One answer."""
        return 1

    def clamp(self, body: Body, max_output_tokens: int | None, max_n: int) -> int | None:
        """Lower how many are asked for to what the model allows."""
        if isinstance(body.get("n"), int):
            body["n"] = min(body["n"], max_n)
        return self.output_bound(body)[1]

    def usage(self, body: Body) -> Usage | None:
        """Read the usage of an answer."""
        return self.used(body)

    def finish(self, body: Body) -> str | None:
        """There is no finish reason."""
        return None

    def reply_texts(self, body: Body) -> Texts:
        """List the texts of an answer."""
        return [*self.answer_texts(body), *self.repeated_texts(body)]

    # --- streams of typed events ---------------------------------------------------------------

    def event_texts(self, event: Body) -> list[tuple[Strand, Ref, str]]:
        """List the text of an event; the last one has all of it once more."""
        name = self.event_text(event)
        if name is None or not isinstance(event.get(name), str):
            return []
        return [(() if event.get("type") == self.last_event else (0, name), (name,), event[name])]

    def event_ends(self, event: Body) -> list[int]:
        """The only answer ends with the stream."""
        return [0] if event.get("type") == self.last_event else []

    def text_event(self, event: Body, strand: Strand, text: str) -> Body:
        """An event like `event` that carries only this text; LookupError where none can."""
        if not strand or "type" not in event:
            raise LookupError(f"no event has a text at {strand}")
        return {"type": event["type"], str(strand[-1]): text}

    def event_usage(self, payload: Body, before: Usage | None) -> Usage | None:
        """What was used so far, by an event and those before it; None when none of them says so."""
        said = self.used(payload) if payload.get("usage") else None
        return before if said is None else usages.larger(before, said)

    def event_ends_stream(self, payload: Body) -> bool:
        """Whether this event is the last one of a stream that came to its end."""
        return payload.get("type") == self.last_event

    def event_error(self, payload: Body) -> Body | None:
        """The error that an event or a body carries; None when it carries none."""
        return payload if payload.get("error") else None

    def explode(self, body: Body) -> Iterator[Body]:
        """Turn a complete answer into the only event of a stream."""
        first: Any = body["data"][0] if isinstance(body.get("data"), list) and body["data"] else {}
        rest = {name: value for name, value in body.items() if name != "data"}
        yield {"type": self.last_event, **rest, **first} if self.last_event else body

    def assemble(self, events: Iterable[Body]) -> Body:
        """Turn the events of a complete stream into the answer it would have been without streaming."""
        last: Body = {}
        for event in events:
            last = event
        body = {name: value for name, value in last.items() if name not in {"type", "b64_json"}}
        return {**body, "data": [{"b64_json": last["b64_json"]}]} if "b64_json" in last else body
