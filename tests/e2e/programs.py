"""A program of one SDK, played at every place: what it is to read there."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Generic, TypeVar

from attrs import frozen
from e2e.places import REFERENCE, Place, World
from e2e.transcripts import Difference, Lines, Transcript
from e2e.voices import TOKENS, Said

A = TypeVar("A")
Scene = Callable[[A], Awaitable[None]]
"""A question or some to the models of a place."""


@frozen
class Program(Generic[A]):
    """Its scenes, and in what they differ from place to place."""

    asking: Callable[[World, Place, Transcript], A]
    scenes: Mapping[Scene[A], tuple[Said, ...]]
    """With what the models say in them."""
    differences: Mapping[Scene[A], Mapping[str, Difference]]
    """By the name of the place. All there is: whatever stands here must differ, and nothing else may."""
    unknown: Mapping[str, set[str]]
    """The fields that the SDK does not know, and the names of the places where they come from."""

    async def compared(self, everywhere: World, place: Place, scene: Scene[A]) -> tuple[Lines, Lines]:
        """What a scene reads at a place, and what it is to read there."""
        expected = await self._played(everywhere, REFERENCE, scene, Transcript())
        told = Transcript()
        found = await self._played(everywhere, place, scene, told)
        assert expected
        assert told.counts <= {TOKENS}, told.counts
        difference = self.differences.get(scene, {}).get(place.name)
        if difference is None:
            return found, expected
        wanted = difference.shows(expected)
        assert wanted != expected, f"nothing differs here any more: {difference.reason}"
        return found, wanted

    async def added(self, everywhere: World, place: Place) -> tuple[set[str], set[str]]:
        """The fields unknown to the SDK that all scenes meet at a place, and those that they are to meet there."""
        told = Transcript()
        for scene in self.scenes:
            await self._played(everywhere, place, scene, told)
        return told.unknown, {name for name, places in self.unknown.items() if place.name in places}

    async def _played(self, everywhere: World, place: Place, scene: Scene[A], told: Transcript) -> Lines:
        return await everywhere.play(place, self.scenes[scene], told, scene(self.asking(everywhere, place, told)))
