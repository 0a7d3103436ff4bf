"""OpenAI's legacy completions (https://platform.openai.com/docs/api-reference/completions)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import orjson

from qlens import usage as usages
from qlens.dialects import Body, Ref, Strand, chunks, fields, texts
from qlens.usage import Usage

GENERATES = True

_OBJECT = "text_completion"

# --- the request -------------------------------------------------------------------------------

_FIELDS = {
    **fields.SAMPLING,
    "best_of": fields.integer(1, 128),
    "echo": fields.flag,
    "logprobs": fields.integer(0, 5),
    "prompt": fields.prompts(),
    "suffix": fields.text,
}
_REQUEST = fields.record(_FIELDS, required=("model",))


def validate(body: Body) -> None:
    """Refuse a request body with OpenAI's 400: InvalidRequest with its param and code."""
    _REQUEST(body, None)
    fields.check_stream_options(body)


def request_texts(body: Body) -> list[tuple[Ref, str]]:
    """List the texts a model will read: prompts and suffix."""
    return texts.prompts(body, "prompt") + texts.prompts(body, "suffix")


def input_bound(body: Body) -> tuple[int, int]:
    """The most input tokens this body can have, and an estimate of them; token arrays are counted exactly."""
    hard, estimate = texts.prompts_bound(body.get("prompt"))
    for name, value in body.items():
        # What no API knows may still reach the model.
        if value is not None and (name == "suffix" or name not in _FIELDS):
            size = len(orjson.dumps(value))
            hard, estimate = hard + size, estimate + -(-size // 3)
    return hard, estimate


def media(body: Body) -> dict[str, int]:
    """Completions read text only."""
    return {}


def measured(body: Body, validated: int | None = None) -> tuple[int, int, dict[str, int]]:
    """Its `input_bound` and its `media`."""
    return *input_bound(body), media(body)


def output_bound(body: Body) -> tuple[str | None, int | None]:
    """The field and the number by which the client limits each choice.

    OpenAI takes an absent max_tokens as 16, other servers do not: absent is no limit here.
    """
    asked = body.get("max_tokens")
    return ("max_tokens", asked) if asked is not None else (None, None)


def choices(body: Body) -> int:
    """How many choices are generated: for each prompt n, or best_of when that is more."""
    return _prompts(body) * max(body.get("n") or 1, body.get("best_of") or 1)


def returned(body: Body) -> int:
    """How many of them come back: the best n for each prompt."""
    return _prompts(body) * (body.get("n") or 1)


def _prompts(body: Body) -> int:
    prompt = body.get("prompt")
    return len(prompt) if type(prompt) is list and type(prompt[0]) is not int else 1


def clamp(body: Body, max_output_tokens: int | None, max_n: int) -> int | None:
    """Lower what is asked to what the model allows, under the client's own field names; gives the limit after it."""
    limits = {"max_tokens": max_output_tokens, "n": max_n, "best_of": max_n}
    for name, limit in limits.items():
        if limit is not None and body.get(name) is not None:
            body[name] = min(body[name], limit)
    return output_bound(body)[1]


# --- the answer --------------------------------------------------------------------------------


def usage(body: Body) -> Usage | None:
    """Read the usage of an answer, or of one event of a stream."""
    return usages.from_openai(body.get("usage"), body.get("service_tier"))


finish = chunks.finish
event_ends = chunks.ends


def reply_texts(body: Body) -> list[tuple[Ref, str]]:
    """List the texts of an answer."""
    return [(ref, text) for _, ref, text in event_texts(body)]


def event_texts(event: Body) -> list[tuple[Strand, Ref, str]]:
    """List the text deltas of one event of a stream."""
    return [
        ((index, "text"), ("choices", position, "text"), choice["text"])
        for position, index, choice in chunks.choices_of(event)
        if type(choice.get("text")) is str
    ]


def text_event(event: Body, strand: Strand, text: str) -> Body:
    """An event like `event` that carries only this text for this strand."""
    choice = {"index": strand[0], "text": text, "finish_reason": None}
    return {**chunks.head(event, _OBJECT), "choices": [choice]}


# --- streams -----------------------------------------------------------------------------------


def explode(body: Body) -> Iterator[Body]:
    """Turn a complete answer into the events of a stream, the usage event last if there is usage."""
    parts = (part for _, index, choice in chunks.choices_of(body) for part in _parts(index, choice))
    return chunks.events_of(body, _OBJECT, parts)


def _parts(index: int, choice: chunks.Choice) -> Iterator[chunks.Choice]:
    spelled = {"logprobs": choice["logprobs"]} if "logprobs" in choice else {}
    yield {"index": index, "text": choice.get("text") or "", **spelled, "finish_reason": None}
    end = {"logprobs": None} if spelled else {}
    yield {
        "index": index,
        "text": "",
        **end,
        **chunks.choice_extras(choice),
        "finish_reason": choice.get("finish_reason"),
    }


def assemble(events: Iterable[Body]) -> Body:
    """Turn the events of a complete stream into the answer it would have been without streaming."""
    body, parts = chunks.gathered(events)
    choices = [
        {**chunks.around(index, parts[index]), "text": chunks.joined(part.get("text") for part in parts[index]) or ""}
        for index in sorted(parts)
    ]
    return {**body, "object": _OBJECT, "choices": choices}
