"""Keeps a receipt of every call in an SQLite file, exactly once."""

from qlens_plugins.cost.ledger.plugin import Ledger, LedgerConfig

__all__ = ["Ledger", "LedgerConfig"]
