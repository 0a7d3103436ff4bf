"""Providers that keep a bill: they do with a request what its text says, and charge for what they answer."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from attrs import define, evolve, field, frozen

from qlens.testing import Scripted
from qlens.testing.upstreams import Event, FakeUpstream, Recorded, error

BUCKETS = ("input", "cached_input", "output", "reasoning")
# Picodollars for a token, in the order of the buckets; the longer prompts' in the second line.
PRICES = {
    "small": ([150_001, 75_000, 600_000, 600_000],),
    "large": ([2_500_000, 1_250_000, 10_000_000, 12_000_006], [5_000_002, 2_500_000, 15_000_000, 18_000_000]),
    "spare": ([3_000_000, 300_000, 15_000_000, 15_000_000],),
    "vectors": ([20_000, 20_000, 0, 0],),
}
METERS = ("images", "queries", "characters", "seconds")
UNITS = {
    "painter": ("images", 40_000_000_003),
    "judge": ("queries", 2_000_000_001),
    "speaker": ("characters", 15_000_007),
    "writer": ("seconds", 100_000_013),
}
"""By model that is not paid by tokens: what is counted, and picodollars for one."""
LONG = 4000
"""Prompts of more tokens pay the second line."""
TIERS = {None: (1, 1), "default": (1, 1), "flex": (1, 2), "priority": (2, 1)}
"""By service tier, the factor on `large`."""


def price_rows() -> str:
    rows = []
    for model, lines in PRICES.items():
        for place, line in enumerate(lines):
            row: dict[str, Any] = {name: Decimal(each) / 10**6 for name, each in zip(BUCKETS, line, strict=True)}
            row |= {"model": model, **({"above_prompt_tokens": LONG} if place else {})}
            if model == "large":
                row["tiers"] = "{flex: 0.5, priority: 2}"
            rows.append("{" + ", ".join(f"{name}: {value}" for name, value in row.items()) + "}")
    for model, (meter, picos) in UNITS.items():
        # What is spoken is counted in tokens as well, by the gateway alone.
        rows.append(f"{{model: {model}, input: 0, meters: {{{meter}: {Decimal(picos).scaleb(-12):f}}}}}")
    return f"[{', '.join(rows)}]"


@frozen
class Used:
    """What a provider says that a call used."""

    counts: tuple[int, ...]
    """In the order of BUCKETS."""
    tier: str | None = None
    units: Mapping[str, int] = field(factory=dict)
    """What is not counted in tokens, by meter."""

    @property
    def said(self) -> dict[str, Any]:
        """As OpenAI says it."""
        fresh, cached, output, reasoning = self.counts
        return {
            "prompt_tokens": fresh + cached,
            "completion_tokens": output + reasoning,
            "total_tokens": sum(self.counts),
            "prompt_tokens_details": {"cached_tokens": cached},
            "completion_tokens_details": {"reasoning_tokens": reasoning},
        }

    @property
    def said_in_responses(self) -> dict[str, Any]:
        """The same, as Responses have it."""
        said = self.said
        return {
            "input_tokens": said["prompt_tokens"],
            "input_tokens_details": said["prompt_tokens_details"],
            "output_tokens": said["completion_tokens"],
            "output_tokens_details": said["completion_tokens_details"],
            "total_tokens": said["total_tokens"],
        }

    def picos(self, model: str) -> int:
        """What it costs, worked out here once more."""
        if model in UNITS:
            meter, each = UNITS[model]
            return self.units[meter] * each
        lines = PRICES[model]
        line = lines[-1] if sum(self.counts[:2]) > LONG else lines[0]
        over, under = TIERS[self.tier] if model == "large" else (1, 1)
        return sum(count * (each * over // under) for count, each in zip(self.counts, line, strict=True))


@frozen
class Served:
    """An answer that was charged for."""

    text: str
    """What was asked."""
    port: int
    """Of the provider."""
    connection: int
    seconds: float
    """Monotonic."""


@define(eq=False)
class Bill:
    """What the providers will charge, by what they know."""

    picos: Counter[tuple[str, str, str]] = field(factory=Counter)
    """By their own model, the model that was asked for, and tenant."""
    tokens: Counter[str] = field(factory=Counter)
    """By bucket and meter, models without a price included."""
    unclaimed: dict[str, Served] = field(factory=dict)
    """What no receipt has named yet, by the id that was sent with it."""
    _served: int = field(default=0, init=False)

    def by(self, place: int) -> Counter[str]:
        """The sums by one of the names."""
        found: Counter[str] = Counter()
        for names, picos in self.picos.items():
            found[names[place]] += picos
        return found

    def charge(self, model: str, asked: str, tenant: str, used: Used) -> None:
        """Charge for an answer."""
        if model in PRICES or model in UNITS:
            self.picos[model, asked, tenant] += used.picos(model)
        self.tokens.update(dict(zip(BUCKETS, used.counts, strict=True)))
        self.tokens.update(used.units)

    def note(self, served: Served) -> str:
        """Give an answer that is charged for an id."""
        self._served += 1
        self.unclaimed[name := f"served-{self._served}"] = served
        return name


@define(eq=False)
class Till(FakeUpstream):
    """A provider that does with a request what its text says, and charges for what it answers."""

    bill: Bill = field(kw_only=True)
    heard: dict[str, asyncio.Event] = field(kw_only=True)
    """By the text of a request whose client waits to know that it has arrived."""
    _seen: Counter[str] = field(factory=Counter, init=False)

    def _answer(self, request: Recorded) -> Scripted:
        self.requests.clear()  # nobody looks at them, and there are many
        body = request.fields
        text = _text(body)
        fate, asked, tenant, counts, tier = json.loads(text)["say"]
        self._seen[text] += 1
        fails = {"busy": True, "fails once": self._seen[text] == 1, "falls back": body["model"] == "large"}
        if fails.get(fate):
            return error(503, "Try again.")
        if fate == "refused":
            return error(400, "Not like this.")
        if fate == "gone":
            self.heard.pop(text).set()
            return Scripted(hang=True)
        used = Used(tuple(counts), tier)
        if (unit := UNITS.get(body["model"])) is not None:
            # Characters are counted where they arrive; the others are what the request says they will be.
            used = Used((0, 0, 0, 0), units={unit[0]: len(text) if unit[0] == "characters" else counts[0]})
        self.bill.charge(body["model"], asked, tenant, used)
        name = self.bill.note(Served(text, self.port, request.connection, time.monotonic()))
        answer = _ANSWERS[fate](used) if fate in _ANSWERS else _chat(fate, used, stream=bool(body.get("stream")))
        return evolve(answer, headers={**answer.headers, "x-request-id": name})


def _text(body: Mapping[str, Any]) -> str:
    """What the client wrote, in whichever field the operation has it."""
    for name in ("input", "prompt", "query"):
        if name in body:
            return str(body[name])
    content = body["messages"][0]["content"]
    return str(content if isinstance(content, str) else content[0]["text"])


def _chat(fate: str, used: Used, *, stream: bool) -> Scripted:
    return _stream(fate, used) if stream else _whole(used)


def _vectors(used: Used) -> Scripted:
    data, count = [{"object": "embedding", "index": 0, "embedding": [0.5]}], used.counts[0]
    usage = {"prompt_tokens": count, "total_tokens": count}
    return Scripted(body={"object": "list", "data": data, "model": "vectors", "usage": usage})


def _whole(used: Used) -> Scripted:
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "hi"}}
    body = {"id": "x", "object": "chat.completion", "model": "m", "usage": used.said, "choices": [choice]}
    return Scripted(body=body if used.tier is None else {**body, "service_tier": used.tier})


def _stream(fate: str, used: Used) -> Scripted:
    head: dict[str, Any] = {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    if used.tier is not None:
        head["service_tier"] = used.tier

    def piece(text: str | None, finish: str | None = None) -> dict[str, Any]:
        delta = {} if text is None else {"content": text}
        return {**head, "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}

    told: list[Event] = [piece("a"), {**piece("told"), "usage": used.said}]
    if fate == "left":
        return Scripted(events=told, hang=True)
    if fate == "breaks off":
        return Scripted(events=told)
    return Scripted(events=[piece("a"), piece(None, "stop"), {**head, "choices": [], "usage": used.said}, "[DONE]"])


def _response(used: Used) -> Scripted:
    content = [{"type": "output_text", "text": "hi", "annotations": []}]
    message = {"type": "message", "id": "msg_x", "role": "assistant", "status": "completed", "content": content}
    body = {"id": "resp_x", "object": "response", "created_at": 1, "status": "completed", "model": "m"}
    body |= {"output": [message], "usage": used.said_in_responses}
    return Scripted(body=body if used.tier is None else {**body, "service_tier": used.tier})


def _images(used: Used) -> Scripted:
    return Scripted(body={"created": 1, "data": [{"b64_json": "cGljdHVyZQ=="}] * used.units["images"]})


def _ranks(used: Used) -> Scripted:
    meta = {"billed_units": {"search_units": used.units["queries"]}}
    return Scripted(body={"id": "x", "results": [{"index": 0, "relevance_score": 0.5}], "meta": meta})


def _speech(used: Used) -> Scripted:
    return Scripted(body=b"a recording" * 20, headers={"content-type": "audio/mpeg"})


def _transcript(used: Used) -> Scripted:
    return Scripted(body={"text": "hi", "usage": {"type": "duration", "seconds": used.units["seconds"]}})


_ANSWERS = {
    "vectors": _vectors,
    "response": _response,
    "images": _images,
    "ranks": _ranks,
    "speech": _speech,
    "transcript": _transcript,
}
"""By what a request wants to happen; all else is a chat."""
