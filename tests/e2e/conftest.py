"""What the end-to-end tests share: a gateway that runs as a process of its own."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest
import pytest_asyncio
from e2e.places import World, world
from e2e.serving import Served, serving


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """`qlens serve` on an untouched copy of config/qlens.yaml."""
    with serving(tmp_path_factory.mktemp("served")) as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def everywhere() -> AsyncIterator[World]:
    """A gateway in this process with every provider behind it; its tests share the module's event loop."""
    async with world() as found:
        yield found
