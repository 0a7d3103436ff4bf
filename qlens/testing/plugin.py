"""The pytest plugin: fixtures for plugin authors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractAsyncContextManager

    from qlens.testing import Running


@pytest.fixture
def qlens_running() -> Callable[..., AbstractAsyncContextManager[Running]]:
    """`qlens.testing.running`: run a gateway from a YAML text."""
    from qlens.testing import running

    return running


@pytest.fixture
def qlens_upstream() -> Callable[..., AbstractAsyncContextManager[Any]]:
    """`qlens.testing.upstream`: a scripted OpenAI-compatible server."""
    from qlens.testing import upstream

    return upstream
