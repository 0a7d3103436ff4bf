"""The ledger in PostgreSQL; needs the extra `postgres`."""

from qlens_plugins.cost.ledger.postgres.store import PostgresStore

__all__ = ["PostgresStore"]
