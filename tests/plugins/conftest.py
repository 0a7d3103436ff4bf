"""Databases for tests of plugins that keep something: one PostgreSQL for all, a database of its own for each test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from ledgers import Place, PostgresPlace, SqlitePlace

from qlens.testing.postgres import PostgresServer, postgres_server

if TYPE_CHECKING:
    from _pytest.fixtures import SubRequest


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    with postgres_server() as server:
        yield server


@pytest.fixture(params=["sqlite", "postgres"])
def place(request: SubRequest, tmp_path: Path) -> Place:
    if request.param == "sqlite":
        return SqlitePlace(tmp_path / "x.db")
    server: PostgresServer = request.getfixturevalue("postgres")
    return PostgresPlace(server, server.new_database())
