"""What holds for all tests."""

from __future__ import annotations

import gc
from collections.abc import AsyncIterator

import pytest
from hypothesis import HealthCheck, settings

from qlens.testing import upstream
from qlens.testing.upstreams import FakeUpstream

# Tests say nothing about speed: not of the code, and not of drawing examples on a busy machine.
settings.register_profile("qlens", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("qlens")


def pytest_collection_finish() -> None:
    """Take what thousands of collected tests consist of out of the search for garbage, which they would slow down."""
    gc.collect()
    gc.freeze()


@pytest.fixture
async def up() -> AsyncIterator[FakeUpstream]:
    """A provider that answers by its script."""
    async with upstream() as up:
        yield up
