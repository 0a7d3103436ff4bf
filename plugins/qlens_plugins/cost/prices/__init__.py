"""Prices every call exactly, from a table and a catalogue; what has no row is unpriced, never free."""

from qlens_plugins.cost.prices.plugin import Prices, PricesConfig

__all__ = ["Prices", "PricesConfig"]
