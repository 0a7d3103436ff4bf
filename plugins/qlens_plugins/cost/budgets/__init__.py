"""Budgets in USD for a day, a week, a month or in all: reserved before a call, settled to what it cost."""

from qlens_plugins.cost.budgets.plugin import Budgets
from qlens_plugins.cost.budgets.settings import BudgetsConfig, Match, Memory, Redis, Rule, Sqlite

__all__ = ["Budgets", "BudgetsConfig", "Match", "Memory", "Redis", "Rule", "Sqlite"]
