"""OpenAI's audio: texts spoken, and speech written down (https://platform.openai.com/docs/api-reference/audio)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from attrs import evolve

from qlens import usage as usages
from qlens.dialects import Body, Ref, fields
from qlens.dialects.plain import Meters, Plain
from qlens.usage import Usage

if TYPE_CHECKING:
    from qlens.forms import File

_FEWEST_BYTES = 1000
"""Of a second of speech: what compresses it further is hardly used."""
_CHARACTERS = 15
"""Of the text of a second of speech, about."""
_MOST_SECONDS = 2**31
_FORMATS = ("json", "text", "srt", "verbose_json", "vtt")


def _texts_of(names: Iterable[str], body: Body) -> list[tuple[Ref, str]]:
    return [((name,), body[name]) for name in names if isinstance(body.get(name), str)]


# --- spoken ------------------------------------------------------------------------------------


def _spoken(body: Body) -> list[tuple[Ref, str]]:
    return _texts_of(("input", "instructions"), body)


SPEECH = Plain(
    rule=fields.record(
        {
            "input": fields.string(least=1),
            "instructions": fields.text,
            "model": fields.MODEL,
            "response_format": fields.one_of("mp3", "opus", "aac", "flac", "wav", "pcm"),
            "speed": fields.number(0.25, 4),
            "stream_format": fields.one_of("sse", "audio"),
            "voice": fields.either("a string or an object", {str: fields.string(least=1), dict: fields.free_form}),
        },
        required=("model", "input", "voice"),
    ),
    asked_texts=_spoken,
    meters=lambda body: {"characters": len(body["input"])},
)
"""A text spoken; what was used is told by the text, unless speech comes in events, whose last one says it."""


# --- written down ------------------------------------------------------------------------------


def _seconds(files: Iterable[File]) -> Meters:
    return {"seconds": sum(-(-file.size // _FEWEST_BYTES) for file in files)}


def _heard(bound: Mapping[str, int], said: list[str]) -> Meters:
    """About as long as it takes to say it, and not longer than the file can be."""
    spoken = -(-sum(map(len, said)) // _CHARACTERS)
    return {"seconds": max(1, min(bound.get("seconds", 1), spoken))}


def _used(body: Body) -> Usage | None:
    """Tokens or seconds, whichever the model is billed by."""
    said, tier = body.get("usage"), body.get("service_tier")
    if isinstance(said, dict) and said.get("type") != "duration":
        details = said.get("input_token_details", said.get("input_tokens_details"))
        counted, length = usages.from_responses({**said, "input_tokens_details": details}, tier), body.get("duration")
        lasting = _lasting(length) if counted is not None else None
        return counted if counted is None or lasting is None else evolve(counted, meters=_counted(lasting))
    used = _lasting(said.get("seconds") if isinstance(said, dict) else body.get("duration"))
    return evolve(used, tier=tier) if used is not None and isinstance(tier, str) else used


def _counted(lasting: Usage) -> Meters:
    """The seconds of what is billed by tokens."""
    return {"input_seconds": lasting.meters["seconds"]}


def _lasting(seconds: object) -> Usage | None:
    try:
        length = float(seconds) if isinstance(seconds, int | float | str) else math.nan
    except ValueError:
        return None
    return Usage(meters={"seconds": math.ceil(length)}, source="provider") if 0 < length < _MOST_SECONDS else None


def _written(body: Body) -> list[tuple[Ref, str]]:
    found = _texts_of(("text",), body)
    for name, field in (("segments", "text"), ("words", "word")):
        parts = body.get(name)
        found += [
            ((name, index, field), part[field])
            for index, part in enumerate(parts if isinstance(parts, list) else ())
            if isinstance(part, dict) and isinstance(part.get(field), str)
        ]
    return found


def _event_text(event: Body) -> str | None:
    return {"transcript.text.delta": "delta", "transcript.text.done": "text"}.get(str(event.get("type")))


_TRANSLATED: Mapping[str, fields.Rule] = {
    "model": fields.MODEL,
    "prompt": fields.text,
    "response_format": fields.one_of(*_FORMATS, "diarized_json"),
    "temperature": fields.number(0, 1),
}

TRANSCRIPTIONS = Plain(
    rule=fields.record(
        {
            **_TRANSLATED,
            "include": fields.array(fields.text, of="strings"),
            "language": fields.text,
            "stream": fields.flag,
            "timestamp_granularities": fields.array(fields.one_of("word", "segment"), of="strings"),
        },
        required=("model",),
    ),
    asked_texts=lambda body: _texts_of(("prompt",), body),
    meters=lambda _body: {"seconds": 0},
    file_meters=_seconds,
    guessed_meters=_heard,
    used=_used,
    answer_texts=_written,
    event_text=_event_text,
    last_event="transcript.text.done",
    files={"file": 1},
    form={"temperature": float, "stream": bool, "include": list, "timestamp_granularities": list},
)
"""Speech written down in its own language."""

TRANSLATIONS = Plain(
    rule=fields.record(_TRANSLATED, required=("model",)),
    asked_texts=lambda body: _texts_of(("prompt",), body),
    meters=lambda _body: {"seconds": 0},
    file_meters=_seconds,
    guessed_meters=_heard,
    used=_used,
    answer_texts=_written,
    files={"file": 1},
    form={"temperature": float},
)
"""Speech written down in English."""
