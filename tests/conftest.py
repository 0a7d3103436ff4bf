"""What holds for all tests."""

from __future__ import annotations

import gc

from hypothesis import HealthCheck, settings

# Tests say nothing about speed: not of the code, and not of drawing examples on a busy machine.
settings.register_profile("qlens", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("qlens")


def pytest_collection_finish() -> None:
    """Take what thousands of collected tests consist of out of the search for garbage, which they would slow down."""
    gc.collect()
    gc.freeze()
