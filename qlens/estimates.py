"""Guesses what an answer used whose provider does not say; never less than what the request surely has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from qlens import dialects, vocabularies
from qlens.call import Call
from qlens.dialects.plain import Plain
from qlens.usage import Usage

BYTES_PER_TOKEN = 4


def estimated(call: Call, dialect: str, body: dict[str, Any]) -> Usage:
    """A guess at what a whole answer used."""
    spoken = dialects.named(dialect)
    written = spoken.answer_texts if isinstance(spoken, Plain) else spoken.reply_texts
    texts = [text for _, text in written(body)]
    counted = vocabularies.estimated_output(call, "\n".join(texts))
    if counted is None:
        counted = -(-sum(len(text.encode(errors="surrogatepass")) for text in texts) // BYTES_PER_TOKEN)
    if isinstance(spoken, Plain):
        meters = spoken.guessed_meters(call.bound.meters, texts)
        return Usage(input=vocabularies.estimated_input(call), output=counted, meters=meters, source="estimated")
    return delivered(call, counted, "estimated")


def delivered(call: Call, output: int, source: Literal["estimated", "partial"]) -> Usage:
    """A guess at what was used where so many tokens were delivered."""
    return Usage(input=vocabularies.estimated_input(call), output=output, meters=_read(call), source=source)


def _read(call: Call) -> Mapping[str, int]:
    """The images, files and whatever else is no text that a request has, by which a budget has reserved for it.

    Without a price for them all would be unpriced: then only the texts are guessed, as if there was nothing else.
    """
    meters = call.bound.meters
    return meters if meters and call.bound_cost.picos is not None else {}
