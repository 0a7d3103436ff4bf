"""Routing by the order of the YAML file: the first target is asked first, the others when it fails."""

from __future__ import annotations

from attrs import define

from qlens import Model, Target, hookimpl


@define(eq=False)
class Ordered:
    """Asks a model's targets in the order in which they are listed. This is also what happens without a plugin."""

    config: None
    name: str

    @hookimpl
    async def choose(self, model: Model) -> tuple[Target, ...]:
        """The targets as listed."""
        return model.candidates
