"""Keeps a receipt of every call in SQLite or PostgreSQL, exactly once."""

from qlens_plugins.cost.ledger.plugin import Ledger, LedgerConfig

__all__ = ["Ledger", "LedgerConfig"]
