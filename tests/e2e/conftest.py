"""What the end-to-end tests share: a gateway that runs as a process of its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from e2e.serving import Served, serving


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """`qlens serve` on an untouched copy of config/qlens.yaml."""
    with serving(tmp_path_factory.mktemp("served")) as running:
        yield running
