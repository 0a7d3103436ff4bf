"""Authentication by virtual keys in a database, which operators make, change and revoke while the gateway runs."""

from qlens_plugins.auth.key_store.plugin import KeyStore, KeyStoreConfig

__all__ = ["KeyStore", "KeyStoreConfig"]
