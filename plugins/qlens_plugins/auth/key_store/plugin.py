"""Authentication by virtual keys in a database, which operators make, change and revoke while the gateway runs."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from attrs import define, field, frozen
from attrs.validators import ge, le

from qlens import Call, Caller, Command, Endpoint, Gateway, Health, Secret, Url, hookimpl
from qlens_plugins.auth.credentials import STORED, digest, peppered
from qlens_plugins.auth.key_store.commands import audit_command, keys_command, opened
from qlens_plugins.auth.key_store.endpoints import Admin
from qlens_plugins.auth.key_store.keyring import Keyring
from qlens_plugins.auth.key_store.places import check, places
from qlens_plugins.auth.key_store.sql_store import SqlStore
from qlens_plugins.auth.key_store.store import Store
from qlens_plugins.auth.key_store.telling import Teller

if TYPE_CHECKING:
    from attrs import Attribute

LEAST_PEPPER_CHARS = 16


def _supported(_config: KeyStoreConfig, _attribute: Attribute[Any], value: Url) -> None:
    check(value)


def _long(_config: KeyStoreConfig, _attribute: Attribute[Any], value: Secret | None) -> None:
    if value is not None and len(value.reveal()) < LEAST_PEPPER_CHARS:
        raise ValueError(f"must have at least {LEAST_PEPPER_CHARS} characters, at random: openssl rand -base64 32")


@frozen
class KeyStoreConfig:
    """Knows callers by virtual keys in a database, which are managed over `/admin/keys` and with `qlens keys`."""

    url: Url = field(default=Url("sqlite:///qlens.db"), validator=_supported)
    """Database with the keys, which may be the ledger's: `sqlite:///FILE`, a relative one in the folder of the YAML
    file, or `postgresql://USER:PASSWORD@HOST:PORT/DATABASE`, which needs the extra `postgres`."""
    pepper: Secret | None = field(default=None, validator=_long)
    """Hashed with every key: whoever has the database and not this cannot even tell whether a key is in it. Without it
    the hash is plain SHA-256. It cannot change: no key would be known any more."""
    poll_seconds: float = field(default=1.0, validator=[ge(0.01), le(4.0)])
    """How often the database is looked at for changes, which is how long a revoked key may still be accepted."""
    outage_seconds: float = field(default=50.0, validator=ge(0))
    """How long keys that are known go on working while the database is away; then calls are answered 503. A gateway
    that is cut off from it does not hear of revoked keys: with the default it accepts none for more than a minute."""


@define(eq=False)
class KeyStore:
    """Finds the caller by the hash of the whole key, in memory."""

    config: KeyStoreConfig
    name: str
    _keyring: Keyring | None = field(default=None, init=False, repr=False)
    _gateway: Gateway = field(init=False, repr=False)

    Config = KeyStoreConfig
    shares = "store"

    @hookimpl
    def adopt(self, old: KeyStore) -> None:
        """Go on with what the old instance knows, if it is of the same database."""
        if (old.config.url, old.config.pepper) == (self.config.url, self.config.pepper):
            self._keyring = old._keyring

    @hookimpl
    @asynccontextmanager
    async def lifespan(self, gateway: Gateway) -> AsyncIterator[None]:
        """Follow the database, and keep the audit log, while calls are served."""
        self._gateway = gateway
        if not gateway.url:  # a command runs, which opens the database itself
            yield
            return
        if self._keyring is None or self._keyring.closed:
            self._keyring = self._new_keyring(gateway)
        keyring = self._keyring
        keyring.poll_seconds, keyring.outage_seconds = self.config.poll_seconds, self.config.outage_seconds
        await keyring.open()
        try:
            with gateway.audit.into(keyring.store):
                yield
        finally:
            await keyring.close()

    def _new_keyring(self, gateway: Gateway) -> Keyring:
        store = self._store(gateway)
        teller = Teller(gateway, store)
        return Keyring(store, teller, self._hashed(), self.name, self.config.poll_seconds, self.config.outage_seconds)

    def _store(self, gateway: Gateway) -> Store:
        pepper = self._hashed()("the pepper of this database")
        return SqlStore(places(self.config.url, gateway.config.folder), hashlib.sha256(pepper).hexdigest())

    def _hashed(self) -> Callable[[str], bytes]:
        """How keys are hashed."""
        if self.config.pepper is None:
            return digest
        return partial(peppered, pepper=self.config.pepper.reveal().encode())

    @property
    def keyring(self) -> Keyring:
        """The keys, from the time the lifespan has opened."""
        assert self._keyring is not None, "the store of keys is not open"
        return self._keyring

    @hookimpl
    async def authenticate(self, call: Call) -> Caller | None:
        """Take what begins as a key of a store for one; anything else is left to the next plugin."""
        credential = call.credential
        if credential is None or not credential.startswith(STORED):
            return None
        keyring = self._keyring
        assert keyring is not None
        # Looked up by hash: how long that takes says nothing about the keys.
        digest_ = keyring.hashed(credential)
        held = keyring.held.get(digest_)
        if held is None:
            held = await keyring.find(digest_, credential)
        elif held.endless is not None and call.started <= keyring.stale:
            return held.endless
        return keyring.caller(held, call.started, self._gateway.clock.time())

    @hookimpl
    def endpoints(self) -> Iterable[Endpoint]:
        """Keys, tenants and the audit log, for operators."""
        return Admin(self).endpoints()

    @property
    def gateway(self) -> Gateway:
        """The gateway, from the time the lifespan has opened."""
        return self._gateway

    @hookimpl
    def commands(self) -> Iterable[Command]:
        """Make, list, rotate and revoke keys; show the audit log."""
        return [keys_command(self._store, self._hashed()), audit_command(self._store)]

    @hookimpl
    @asynccontextmanager
    async def audit_log(self, gateway: Gateway) -> AsyncIterator[None]:
        """Keep what commands do in the audit log, too."""
        async with opened(self._store(gateway)) as store:
            with gateway.audit.into(store):
                yield

    @hookimpl
    def health(self) -> Health:
        """Whether the database is at hand, and how many keys are known."""
        return Health(not self.keyring.trouble, self.keyring.state())
