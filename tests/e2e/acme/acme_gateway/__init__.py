"""Acme's plugins for QLens."""
