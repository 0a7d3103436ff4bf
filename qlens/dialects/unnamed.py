"""Which dialect an answer is in that nobody has named: told by the answer itself, for what passes through."""

from __future__ import annotations

from collections.abc import Mapping

from attrs import evolve

from qlens import dialects
from qlens.dialects import Body, messages
from qlens.usage import Usage, larger

_BYTES_PER_TOKEN = 4
_MOST_CHARACTERS = 256
"""Of the name of a model."""
_TYPES: Mapping[str, str] = {
    "message": "messages",
    "message_delta": "messages",
    "message_start": "messages",
    "speech.audio.done": "speech",
    "transcript.text.done": "transcriptions",
}
_BEGINNINGS: Mapping[str, str] = {"response.": "responses", "image_generation.": "images", "image_edit.": "images"}
"""How the types of a dialect's events begin."""
_FIELDS: Mapping[str, str] = {"results": "rerank", "data": "images", "text": "transcriptions"}
"""What only one dialect has of those whose answers have no type."""


def answer_of(body: Body) -> Body:
    """The answer that an event of a stream is about; what is no such event is an answer itself."""
    kind = str(body.get("type"))
    found = body.get("message" if kind == "message_start" else "response" if kind.startswith("response.") else "")
    return found if type(found) is dict else body


def usage(body: Body, before: Usage | None = None) -> Usage | None:
    """Read the usage of an answer, or of an event of a stream and those before it; None when none can be told."""
    name = _dialect_of(body)
    if name is None:
        return before
    said = messages.usage(body, before) if name == "messages" else dialects.named(name).usage(body)
    return before if said is None or not (said.total or said.meters) else larger(before, _at_least(said, name, body))


def _at_least(said: Usage, name: str, body: Body) -> Usage:
    """Usage that counts nothing of an answer with texts, with an estimate of them: never a silent zero."""
    dialect = dialects.named(name)
    if said.completion or not dialect.GENERATES:
        return said
    size = sum(len(text.encode(errors="surrogatepass")) for _, text in dialect.reply_texts(body))
    return evolve(said, output=-(-size // _BYTES_PER_TOKEN), source="estimated") if size else said


def model(body: Body) -> str:
    """The model that an answer, or an event, says it is of; empty: it says none."""
    return a_model(answer_of(body).get("model"))


def a_model(said: object) -> str:
    """A name that can be a model's; empty: it cannot."""
    return said if type(said) is str and len(said) <= _MOST_CHARACTERS and said.isprintable() else ""


def _dialect_of(body: Body) -> str | None:
    said, kind = answer_of(body).get("usage"), body.get("type")
    if type(said) is not dict:
        return None
    if type(kind) is str:
        if kind in _TYPES:
            return _TYPES[kind]
        if (found := next((name for begun, name in _BEGINNINGS.items() if kind.startswith(begun)), None)) is not None:
            return found
    if str(body.get("object")).startswith("response"):
        return "responses"
    if "prompt_tokens" in said:
        # All that count like it say what was generated (completions) or generate nothing (embeddings, moderations).
        return "chat" if "choices" in body else "embeddings"
    # OpenAI and Anthropic both count input_tokens, one with what was cached and one without: it must be clear whose.
    return next((name for field, name in _FIELDS.items() if field in body), None)
