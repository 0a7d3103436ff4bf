"""Clients that several plugins share."""
