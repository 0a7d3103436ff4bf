"""Watches an answer of plain bytes on its way to the client: whether it comes to its end, and what it used."""

from __future__ import annotations

from attrs import define, evolve

from qlens.metering import estimated
from qlens.usage import Usage
from qlens.watching import Watcher


@define(eq=False)
class RawMeter(Watcher):
    """Passes bytes on as they come; nothing in them says what was used, so that the request tells it."""

    def usage(self) -> Usage:
        """What was used: the provider's word, or else an estimate; it is used up with the request."""
        if (said := self.said()) is not None:
            return said
        guess = estimated(self.call, self.reply.dialect, {})
        return guess if self.reply.complete else evolve(guess, source="partial")
