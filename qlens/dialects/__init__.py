"""The APIs a body can be written in: for each dialect a module of pure functions over parsed JSON."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import Any, Protocol

from qlens.usage import Usage

Body = dict[str, Any]
Ref = tuple[str | int, ...]
"""Where a text stands in a body: the keys and indices that lead to it."""


class Fixed(tuple[str | int, ...]):
    """A Ref to what is read and cannot be another text: a name, a value of an enum, a signed thought.

    The last step may be a key that is such a name itself.
    """

    __slots__ = ()


class Within(tuple[str | int, ...]):
    """A Ref to a text within a text that is JSON: the last step is its number among the texts and numbers in that."""

    __slots__ = ()


Strand = tuple[str | int, ...]
"""Which of a stream's interleaved texts a delta belongs to: choice index, field, tool index. An empty one stands for a
text that is whole in its event."""


class Dialect(Protocol):
    """What the core asks of a dialect: a module of this package, or a `plain.Plain` in one, with these functions."""

    GENERATES: bool
    """Whether answers are generated token by token, so that an output bound is needed."""

    def validate(self, body: Body) -> int | None:
        """Refuse a request body with OpenAI's 400: InvalidRequest with its param and code.

        What it gives, if anything, is what `measured` need not find out again, as long as nobody changes the body.
        """

    def request_texts(self, body: Body) -> list[tuple[Ref, str]]:
        """List the texts a model will read; the ref of one that nobody may rewrite is Fixed."""

    def input_bound(self, body: Body) -> tuple[int, int]:
        """The most input tokens this body can have, and an estimate of them."""

    def media(self, body: Body) -> dict[str, int]:
        """Count what a model reads beside text, by kind: images, audio, files; a kind that is absent is left out."""

    def measured(self, body: Body, validated: int | None = None, /) -> tuple[int, int, dict[str, int]]:
        """Both numbers of `input_bound`, and `media`; with what `validate` gave for this body."""

    def output_bound(self, body: Body) -> tuple[str | None, int | None]:
        """The field and the number by which the client limits generated tokens of one choice; None: it does not."""

    def choices(self, body: Body) -> int:
        """How many choices are generated (and billed)."""

    def returned(self, body: Body) -> int:
        """How many of them come back."""

    def clamp(self, body: Body, max_output_tokens: int | None, max_n: int) -> int | None:
        """Lower what is asked to what the model allows, under the client's own field names.

        Gives the number of `output_bound` after it.
        """

    def usage(self, body: Body) -> Usage | None:
        """Read the usage of an answer, or of one event of a stream."""

    def finish(self, body: Body) -> str | None:
        """The finish reason of a complete answer."""

    def reply_texts(self, body: Body) -> list[tuple[Ref, str]]:
        """List the texts of an answer."""

    def event_texts(self, event: Body) -> list[tuple[Strand, Ref, str]]:
        """List the text deltas of one event of a stream."""

    def event_ends(self, event: Body) -> list[int]:
        """The choices that this event finishes."""

    def text_event(self, event: Body, strand: Strand, text: str) -> Body:
        """An event like `event` that carries only this text for this strand."""

    def explode(self, body: Body) -> Iterator[Body]:
        """Turn a complete answer into the events of a stream, the usage event last if there is usage."""

    def assemble(self, events: Iterable[Body]) -> Body:
        """Turn the events of a complete stream into the answer it would have been without streaming."""


@cache
def named(name: str) -> Dialect:
    """The dialect of this name; KeyError if there is none."""
    from qlens.dialects import (
        audio,
        chat,
        compaction,
        completions,
        embeddings,
        images,
        messages,
        moderations,
        rerank,
        responses,
    )
    from qlens.dialects.count_tokens import COUNT_TOKENS
    from qlens.dialects.input_tokens import INPUT_TOKENS
    from qlens.dialects.uploads import UPLOADS

    table: dict[str, Dialect] = {
        "chat": chat,
        "compaction": compaction,
        "completions": completions,
        "count_tokens": COUNT_TOKENS,
        "embeddings": embeddings,
        "image_edits": images.IMAGE_EDITS,
        "image_variations": images.IMAGE_VARIATIONS,
        "images": images.IMAGES,
        "input_tokens": INPUT_TOKENS,
        "messages": messages,
        "moderations": moderations.MODERATIONS,
        "rerank": rerank.RERANK,
        "responses": responses,
        "speech": audio.SPEECH,
        "transcriptions": audio.TRANSCRIPTIONS,
        "translations": audio.TRANSLATIONS,
        "uploads": UPLOADS,
    }
    return table[name]


def put(body: Body, ref: Ref, text: str) -> None:
    """Put a text at its place in a body."""
    if type(ref) is Within:
        put_within(body, ref[:-1], {int(ref[-1]): text})
        return
    node: Any = body
    for step in ref[:-1]:
        node = node[step]
    node[ref[-1]] = text


def put_within(body: Body, ref: Ref, texts: Mapping[int, str]) -> None:
    """Put texts at their places in the JSON that stands at this one."""
    from qlens.dialects import jsons

    source: Any = body
    for step in ref:
        source = source[step]
    put(body, ref, jsons.exchanged(source, texts))
