"""A duplex session: frames both ways until one side closes."""

from __future__ import annotations

from typing import Literal, Protocol, runtime_checkable

from attrs import field, frozen

LOST = 1006
"""The code of a session that ended without a closing frame; it is never sent."""
UNSAID = 1005
"""The code of a closing frame without one; it is never sent."""


@frozen
class Frame:
    """One message of a session, or a control frame.

    A text is its UTF-8 bytes. Whoever gets a ping answers with a pong of the same data.
    """

    kind: Literal["text", "bytes", "ping", "pong"]
    data: bytes = field(repr=False)


class SessionClosed(Exception):
    """The other side of a session closed it, or is gone.

    https://datatracker.ietf.org/doc/html/rfc6455#section-7.4
    """

    def __init__(self, code: int = LOST, reason: str = "", *, clean: bool = False) -> None:
        super().__init__(f"the session was closed with {code}")
        self.code = code
        self.reason = reason
        self.clean = clean
        """Whether it was closed in good order: by a closing frame, and not by a broken one."""


@runtime_checkable
class Session(Protocol):
    """What `connect` returns: an open session with a provider.

    One task sends and another receives at the same time; neither is called by two tasks at once.
    """

    async def send(self, frame: Frame) -> None:
        """Send one frame; wait while the other side does not read. Raises SessionClosed."""
        ...

    async def receive(self) -> Frame:
        """Wait for the next frame, whole and of a bounded size; may be cancelled. Raises SessionClosed."""
        ...

    async def close(self, code: int = 1000, reason: str = "") -> None:
        """Tell the other side, let go of everything within a few seconds; may be called more than once."""
        ...
