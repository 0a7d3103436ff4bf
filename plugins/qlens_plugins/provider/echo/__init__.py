"""A model that needs no account: it answers with what it was asked."""

from qlens_plugins.provider.echo.plugin import Echo, EchoConfig

__all__ = ["Echo", "EchoConfig"]
