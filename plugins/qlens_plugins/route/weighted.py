"""Routing by weight: each call draws the order of its targets."""

from __future__ import annotations

import random
from collections.abc import Sequence

from attrs import define, field, frozen

from qlens import Model, Target, hookimpl


@frozen
class WeightedConfig:
    """Spreads calls over a model's targets in proportion to their `weight`."""

    seed: int | None = None
    """Makes the draws repeatable, for tests; without it they differ from start to start."""


@define(eq=False)
class Weighted:
    """Draws targets without replacement, so that the second choice is spread as fairly as the first."""

    config: WeightedConfig
    name: str
    _random: random.Random = field(init=False)

    Config = WeightedConfig

    @_random.default
    def _seeded(self) -> random.Random:
        return random.Random(self.config.seed)  # noqa: S311 - spreads load, guards nothing

    @hookimpl
    async def choose(self, model: Model) -> Sequence[Target]:
        """The targets in drawn order; those of weight 0 come last, as listed."""
        if len(model.candidates) == 1:
            return model.candidates
        # Exponential arrival times with the weights as rates: to sort by them is to draw by weight without replacement.
        arrivals = [
            (self._random.expovariate(target.weight), place, target)
            for place, target in enumerate(model.candidates)
            if target.weight > 0
        ]
        arrivals.sort()  # no two have the same place, so targets are never compared
        drawn = [target for _, _, target in arrivals]
        return drawn + [target for target in model.candidates if target.weight <= 0]
