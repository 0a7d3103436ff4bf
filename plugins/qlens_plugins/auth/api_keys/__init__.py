"""Authentication by API keys, which the gateway knows by their hashes alone."""

from qlens_plugins.auth.api_keys.plugin import ApiKeys, ApiKeysConfig

__all__ = ["ApiKeys", "ApiKeysConfig"]
