"""Translations between dialects: for a client whose dialect the provider does not speak. Pure, without I/O."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Protocol

from qlens.dialects import Body
from qlens.usage import Usage


class Translation(Protocol):
    """One stream on its way back: events of the provider's dialect in, events of the client's out."""

    @property
    def used(self) -> Usage | None:
        """What the provider has said so far was used: the client's dialect may have no place for it before the end."""

    def feed(self, event: bytes) -> bytes:
        """What a whole event, with its blank line, becomes: none, one or several whole events.

        Raises UpstreamInvalid for what is no event of the dialect, and the mapped error for an error event.
        """

    def end(self) -> bytes:
        """What the stream ends with, once its last event was fed; b"" when it has ended already."""


class Bridge(Protocol):
    """From one dialect to another, and the answers back."""

    def request(self, body: Body) -> Body:
        """The body as the provider's dialect says it: a new dict that shares nothing with the given one.

        Raises InvalidRequest, with the client's own param, for what cannot be said there.
        """

    def answer(self, body: Body, asked: Body) -> Body:
        """A complete answer in the client's dialect; `asked` is the client's request body."""

    def stream(self, asked: Body) -> Translation:
        """The state of one stream."""


@cache
def between(client: str, provider: str) -> Bridge | None:
    """The bridge for a client's dialect over a provider's; None when there is none."""
    from qlens.bridges import (
        chat_over_messages,
        chat_over_responses,
        completions_over_chat,
        composed,
        messages_over_chat,
        responses_over_chat,
    )

    table: dict[tuple[str, str], Callable[[], Bridge]] = {
        ("chat", "messages"): chat_over_messages.bridge,
        ("chat", "responses"): chat_over_responses.bridge,
        ("completions", "chat"): completions_over_chat.bridge,
        ("completions", "messages"): lambda: composed.Composed(
            "completions", completions_over_chat.bridge(), chat_over_messages.bridge()
        ),
        ("completions", "responses"): lambda: composed.Composed(
            "completions", completions_over_chat.bridge(), chat_over_responses.bridge()
        ),
        ("messages", "chat"): messages_over_chat.bridge,
        ("messages", "responses"): lambda: composed.Composed(
            "messages", messages_over_chat.bridge(), chat_over_responses.bridge()
        ),
        ("responses", "chat"): responses_over_chat.bridge,
        ("responses", "messages"): lambda: composed.Composed(
            "responses", responses_over_chat.bridge(), chat_over_messages.bridge()
        ),
    }
    make = table.get((client, provider))
    return make() if make is not None else None
