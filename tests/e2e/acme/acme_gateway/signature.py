"""Puts a signature in the place of a mark in answers."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from attrs import define, frozen

from qlens import Call, Reply, hookimpl


@frozen
class SignatureConfig:
    """Replaces a mark in answers with a signature."""

    text: str
    """The signature."""
    mark: str = "@@"
    """What it replaces."""


@define(eq=False)
class Signature:
    """Rewrites answers, bodies and streams alike."""

    config: SignatureConfig
    name: str

    Config = SignatureConfig

    @hookimpl
    async def wrap_call(self, call: Call, proceed: Callable[[], Awaitable[Reply]]) -> Reply:
        """Sign the answer."""
        reply = await proceed()
        reply.rewrite_text(lambda text: text.replace(self.config.mark, self.config.text), len(self.config.mark))
        return reply
