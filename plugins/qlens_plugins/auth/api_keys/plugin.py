"""Authentication by API keys, which the gateway knows by their hashes alone."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

from attrs import define, field, frozen
from attrs.validators import ge

from qlens import (
    Call,
    Caller,
    Command,
    Fault,
    FileState,
    Gateway,
    Health,
    StartupError,
    file_state,
    hookimpl,
    is_being_written,
)
from qlens_plugins.auth.api_keys.commands import keys_command
from qlens_plugins.auth.api_keys.demo import demo_key, introduction
from qlens_plugins.auth.api_keys.key_file import Key, hash_text, read
from qlens_plugins.auth.credentials import STORED, digest, is_jwt, masked, refused

log = logging.getLogger(__name__)

_DEMO_ID = "demo"


@frozen
class ApiKeysConfig:
    """Knows callers by their API keys, of which a file holds the hashes."""

    file: Path
    """The file of hashed keys, changed by `qlens keys` or by hand; a running gateway follows it without a restart."""
    demo_key_file: Path | None = None
    """Keeps one plain key for trying things out, made at the first start. Only for a gateway on a loopback address."""
    reload_seconds: float = field(default=1.0, validator=ge(0.01))
    """How often the file is looked at for changes, which is how long a revoked key may still be accepted."""


@define(eq=False)
class ApiKeys:
    """Finds the caller by the SHA-256 of the whole key."""

    config: ApiKeysConfig
    name: str
    demo_key: str | None = field(default=None, init=False, repr=False)
    """The demo key, once the gateway serves."""
    _gateway: Gateway = field(init=False, repr=False)
    _keys: Mapping[bytes, tuple[Key, Caller]] = field(factory=dict, init=False, repr=False)
    """By hash, with the caller that each key stands for."""
    _seen: FileState | None = field(default=None, init=False, repr=False)
    """The state of the file that was read last, good or bad; None when it could not be read."""
    _loaded: bool = field(default=False, init=False, repr=False)
    _trouble: str = field(default="", init=False, repr=False)

    Config = ApiKeysConfig

    @property
    def loopback_only(self) -> bool:
        """A plain key on disk is for this machine alone."""
        return self.config.demo_key_file is not None

    @hookimpl
    @asynccontextmanager
    async def lifespan(self, gateway: Gateway) -> AsyncIterator[None]:
        """Read the keys, and follow their file while calls are served."""
        self._gateway = gateway
        if not gateway.url:  # a command runs, which looks at the file itself; it may be the one that makes it
            yield
            return
        await asyncio.to_thread(self._start)
        watching = asyncio.create_task(self._watch(), name=f"{self.name}: watch {self.config.file}")
        try:
            yield
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)

    @hookimpl
    def commands(self) -> Iterable[Command]:
        """Make, list and revoke keys."""
        return [keys_command(self.config.file)]

    @hookimpl
    def banner(self) -> Iterable[str]:
        """Show whoever started the gateway how to use it with the demo key."""
        if self.demo_key is None:
            return []
        models = self._gateway.models.listed()
        return introduction(self._gateway.url, self.demo_key, models[0].name if models else "MODEL")

    @hookimpl
    def health(self) -> Health:
        """Say how many keys are known, and why the file's newest state is not in use."""
        count = f"{len(self._keys)} keys"
        return Health(False, f"{self._trouble}; still using {count}") if self._trouble else Health(True, count)

    @hookimpl
    async def authenticate(self, call: Call) -> Caller | None:
        """Take every credential for a key that is no JWT and none of `key_store`: those pass on unless known."""
        credential = call.credential
        if credential is None:
            return None
        # Looked up by hash: how long that takes says nothing about the keys.
        known = self._keys.get(digest(credential))
        if known is None:
            if is_jwt(credential) or credential.startswith(STORED):
                return None
            raise refused(
                f"Incorrect API key provided: {masked(credential)}. Ask the operator of this gateway for a key."
            )
        key, caller = known
        if key.revoked is not None:
            raise refused(f"This API key ({key.id}) was revoked. Ask the operator of this gateway for a new one.")
        if caller.expires_at is not None and caller.expires_at <= self._gateway.clock.time():
            raise refused(f"This API key ({key.id}) has expired. Ask the operator of this gateway for a new one.")
        return caller

    def _caller(self, key: Key) -> Caller:
        return Caller(
            tenant=key.tenant,
            subject=key.id,
            by=self.name,
            project=key.project,
            key_id=key.id,
            roles=frozenset(key.roles),
            models=key.models,
            tags=key.tags,
            expires_at=key.expires_at.timestamp() if key.expires_at else None,
        )

    # --- the file ------------------------------------------------------------------------------

    def _start(self) -> None:
        """Read the files for the first time; raises StartupError when nobody could be let in."""
        if self.config.demo_key_file is not None:
            self.demo_key = demo_key(self.config.demo_key_file)
        try:
            self._load()
        except FileNotFoundError:
            if self.demo_key is None:
                hint = "does not exist; make the first key with: qlens keys create -c CONFIG --tenant NAME"
                raise StartupError([Fault(str(self.config.file), hint)]) from None
            self._keys = self._table(())
        except OSError as error:
            raise StartupError([Fault(str(self.config.file), f"cannot be read: {error.strerror}")]) from error

    def _load(self) -> None:
        """Take the file's keys; raises StartupError or OSError and keeps what is known."""
        self._seen = file_state(self.config.file)
        self._keys = self._table(read(self.config.file))
        self._loaded = True

    def _table(self, keys: Iterable[Key]) -> Mapping[bytes, tuple[Key, Caller]]:
        """The table in which callers are looked up."""
        return {key.digest: (key, self._caller(key)) for key in self._with_demo(tuple(keys))}

    def _with_demo(self, keys: tuple[Key, ...]) -> tuple[Key, ...]:
        if self.demo_key is None:
            return keys
        if any(key.id == _DEMO_ID for key in keys):
            raise StartupError(
                [Fault(str(self.config.file), f"the id {_DEMO_ID!r} belongs to the demo key; give the key another one")]
            )
        # Whoever can read the file owns the gateway, which nobody else reaches: the key opens the operators' paths too.
        demo = Key(id=_DEMO_ID, hash=hash_text(self.demo_key), tenant=_DEMO_ID, roles=("member", "admin"))
        return (*keys, demo)

    async def _watch(self) -> None:
        """Follow the file until the lifespan ends."""
        while True:
            await asyncio.sleep(self.config.reload_seconds)
            await asyncio.to_thread(self._follow)

    def _follow(self) -> None:
        """Read the file again if it changed. A bad one is refused once, and the keys stay as they are."""
        now = file_state(self.config.file)
        if now == self._seen or is_being_written(self.config.file, now):
            return
        try:
            self._load()
        except StartupError as error:
            self._complain(str(error.faults[0]))
            return
        except OSError as error:
            self._seen = None
            if self._loaded:  # otherwise there was none at the start: the demo key is enough
                self._complain(f"{self.config.file}: {error.strerror}")
            return
        except Exception as error:  # noqa: BLE001 - whatever is in there, what is revoked next must be heard of
            self._complain(f"{self.config.file}: {type(error).__name__} over what is in it")
            return
        self._trouble = ""
        log.info("%s: read %d keys from %s", self.name, len(self._keys), self.config.file)

    def _complain(self, trouble: str) -> None:
        if trouble != self._trouble:
            log.error("%s: the keys stay as they are: %s", self.name, trouble)
        self._trouble = trouble
