"""The ledger in an SQLite file."""

from qlens_plugins.cost.ledger.sqlite.store import SqliteStore

__all__ = ["SqliteStore"]
