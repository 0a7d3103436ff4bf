"""What a call will be billed by, as far as its request says it: what a strict table must have prices of."""

from __future__ import annotations

from collections.abc import Mapping

from qlens import Call

Way = tuple[str, ...]
"""Buckets and meters of a usage: what is billed in this way needs a price of each."""

_READ: tuple[Way, ...] = (("input",),)
_WRITTEN: tuple[Way, ...] = (("input", "output"),)
_TOLD_IN_BODY = (None, "json", "verbose_json", "diarized_json")
"""The formats of a transcript that say what was used."""

_ALWAYS: Mapping[str, tuple[Way, ...]] = {
    "batch_create": _WRITTEN,
    "embeddings": _READ,
    "moderations": _READ,
    "rerank": (("queries",), *_READ),
    "images": (("images",), *_WRITTEN),
    "image_edits": (("images",), *_WRITTEN),
    "image_variations": (("images",),),
    # Which of them a session uses is said in it.
    "realtime": (("input", "output", "audio_in", "audio_out"),),
}


def needed(call: Call) -> tuple[Way, ...]:
    """The ways in which a call may be billed, of which one is enough; none for what costs nothing."""
    operation = call.operation
    if (always := _ALWAYS.get(operation.name)) is not None:
        return always
    if not operation.meters:
        return ()
    if operation.name == "speech":
        # Only the last event of speech that comes in events says how many tokens there were.
        return (("characters",), *(_WRITTEN if call.body.get("stream_format") == "sse" else ()))
    if operation.name in {"transcriptions", "translations"}:
        told = call.body.get("response_format") in _TOLD_IN_BODY
        return (("seconds",), *((("input", "audio_in", "output"),) if told else ()))
    return (_generated(call),)


def _generated(call: Call) -> Way:
    """What a chat and its like use: audio has prices of its own."""
    modalities = call.body.get("modalities")
    heard = ("audio_in",) if call.bound.meters.get("audio") else ()
    spoken = ("audio_out",) if type(modalities) is list and "audio" in modalities else ()
    return ("input", "output", *heard, *spoken)
