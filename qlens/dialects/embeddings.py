"""OpenAI's embeddings (https://platform.openai.com/docs/api-reference/embeddings)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from qlens import usage as usages
from qlens.dialects import Body, Ref, Strand, fields, texts
from qlens.usage import Usage

GENERATES = False

_REQUEST = fields.record(
    {
        "dimensions": fields.integer(1, fields.MAX_TOKENS),
        "encoding_format": fields.one_of("float", "base64"),
        "input": fields.prompts(least_text=1, most=2048),
        "model": fields.MODEL,
        "user": fields.text,
    },
    required=("model", "input"),
)


def validate(body: Body) -> None:
    """Refuse a request body with OpenAI's 400: InvalidRequest with its param and code."""
    _REQUEST(body, None)


def request_texts(body: Body) -> list[tuple[Ref, str]]:
    """List the texts a model will read."""
    return texts.prompts(body, "input")


def input_bound(body: Body) -> tuple[int, int]:
    """The most input tokens this body can have, and an estimate of them; token arrays are counted exactly."""
    return texts.prompts_bound(body.get("input"))


def media(body: Body) -> dict[str, int]:
    """Embeddings read text only."""
    return {}


def measured(body: Body, validated: int | None = None) -> tuple[int, int, dict[str, int]]:
    """Its `input_bound` and its `media`."""
    return *input_bound(body), media(body)


def output_bound(body: Body) -> tuple[str | None, int | None]:
    """Nothing is generated."""
    return None, 0


def choices(body: Body) -> int:
    """Nothing is generated, once."""
    return 1


def returned(body: Body) -> int:
    """One list of vectors."""
    return 1


def clamp(body: Body, max_output_tokens: int | None, max_n: int) -> int | None:
    """There is nothing to lower."""
    return output_bound(body)[1]


def usage(body: Body) -> Usage | None:
    """Read the usage of an answer."""
    return usages.from_openai(body.get("usage"), body.get("service_tier"), generates=False)


def finish(body: Body) -> str | None:
    """Embeddings have no finish reason: there is nothing that could have been cut."""
    return None


def reply_texts(body: Body) -> list[tuple[Ref, str]]:
    """An answer of numbers has no text."""
    return []


def event_texts(event: Body) -> list[tuple[Strand, Ref, str]]:
    """An answer of numbers has no text."""
    return []


def event_ends(event: Body) -> list[int]:
    """Embeddings have no choices."""
    return []


def text_event(event: Body, strand: Strand, text: str) -> Body:
    """Raise LookupError, because no event of embeddings has a text."""
    raise LookupError(f"embeddings have no text at {strand}")


def explode(body: Body) -> Iterator[Body]:
    """Embeddings do not stream: the answer is its own only event."""
    yield body


def assemble(events: Iterable[Body]) -> Body:
    """Embeddings do not stream: the only event is the answer."""
    body: Body = {}
    for event in events:
        body = event
    return body
