"""Stores for tests of plugins: a PostgreSQL for all with a database for each test, a Redis for each file that asks."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from ledgers import Place, PostgresPlace, SqlitePlace

from qlens.testing.postgres import PostgresServer, postgres_server
from qlens.testing.redis import RedisServer

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


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with tempfile.TemporaryDirectory(prefix="qlens-redis-") as folder:
        server = RedisServer(Path(folder))
        asyncio.run(server.start())
        yield server
        server.kill()
