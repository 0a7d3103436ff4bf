"""The plugin: a token's signature and claims checked once, and known by the hash of the whole token for a while."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from hashlib import sha256
from typing import Any

from attrs import define, field

from qlens import Call, Caller, Fault, Gateway, Health, StartupError, Unauthenticated, Unavailable, hookimpl
from qlens_plugins.auth.jwt import issuer
from qlens_plugins.auth.jwt.claims import MOST_BYTES, Refused, Token, caller_of, check
from qlens_plugins.auth.jwt.keyring import Keyring
from qlens_plugins.auth.jwt.keys import Key, KeysUnfit, from_pem
from qlens_plugins.auth.jwt.settings import JwtConfig

KNOWN_SECONDS = 300
"""How long a token that was verified is not verified again, at most."""
REFUSED_SECONDS = 10
"""How long one that was refused is refused at once."""
MOST_KNOWN = 10_000
"""How many tokens of each sort are known; those not used for the longest time go first."""

_KEY_SETTINGS = ("issuer", "jwks_url", "public_key", "public_key_file", "secret")
_VERDICT_SETTINGS = (
    *_KEY_SETTINGS,
    *("audience", "leeway_seconds", "tenant_claim", "subject_claim", "project_claim", "roles_claim", "roles"),
    *("default_roles", "models_claim", "tag_claims"),
)


@define(eq=False)
class _Verdicts:
    """What is known of tokens, by the SHA-256 of the whole token: nothing shorter tells them apart."""

    accepted: OrderedDict[bytes, tuple[Caller, float]] = field(factory=OrderedDict)
    """Callers, each with the Unix second until which it stands."""
    refused: OrderedDict[bytes, tuple[str, float]] = field(factory=OrderedDict)
    """Reasons, each with the same."""

    def clear(self) -> None:
        self.accepted.clear()
        self.refused.clear()


def _put(known: OrderedDict[bytes, Any], digest: bytes, verdict: Any) -> None:
    known[digest] = verdict
    known.move_to_end(digest)
    if len(known) > MOST_KNOWN:
        known.popitem(last=False)


@define(eq=False)
class Jwt:
    """Finds the caller in a token's claims, once its signature is that of the issuer."""

    config: JwtConfig
    name: str
    _now: Callable[[], float] = field(default=time.time, init=False, repr=False)
    """Unix seconds."""
    _verdicts: _Verdicts = field(factory=_Verdicts, init=False, repr=False)
    _accepted: OrderedDict[bytes, tuple[Caller, float]] = field(init=False, repr=False)
    """Those of the verdicts that most calls ask for."""
    _keyring: Keyring = field(init=False, repr=False)
    _fixed: Key | None = field(default=None, init=False, repr=False)
    """The key that stands in the configuration, if one does."""
    _before: Keyring | None = field(default=None, init=False, repr=False)

    Config = JwtConfig

    def __attrs_post_init__(self) -> None:
        self._accepted = self._verdicts.accepted

    @hookimpl
    @asynccontextmanager
    async def lifespan(self, gateway: Gateway) -> AsyncIterator[None]:
        """Begin to fetch keys, without waiting for an issuer, and follow them while calls are served."""
        self._now = gateway.clock.time
        self._keyring = keyring = self._keyring_of(gateway)
        if self._before is not None:
            keyring.take_over(self._before)
            self._before = None
        self._fixed = self._of_config()
        if self._fixed is not None:
            keyring.held = (self._fixed,)
            yield
            return
        if self.config.public_key_file is not None:
            keyring.take(await self._first_of_file())
        else:
            keyring.renew()
        following = asyncio.create_task(keyring.follow(self.config.refresh_seconds), name=f"{self.name}: follow keys")
        try:
            yield
        finally:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
            await keyring.aclose()

    @hookimpl
    def adopt(self, old: object) -> None:
        """Go on with the keys of the same issuer, and with what is known of tokens where nothing changes it."""
        if not isinstance(old, Jwt):
            return
        if self.config.same(old.config, _KEY_SETTINGS):
            self._before = old._keyring
        if self.config.same(old.config, _VERDICT_SETTINGS):
            self._verdicts, self._accepted = old._verdicts, old._accepted

    @hookimpl
    def health(self) -> Health:
        """Whether there are keys, and why the newest could not be fetched."""
        if self._fixed is not None:
            return Health(True, "one key, which stands in the configuration")
        return Health(bool(self._keyring.held) and not self._keyring.trouble, self._keyring.state())

    @hookimpl
    async def authenticate(self, call: Call) -> Caller | None:
        """Take the issuer's tokens; anything else, and tokens of others, pass on to the next plugin."""
        credential = call.credential
        if credential is None:
            return None
        digest = sha256(credential.encode("utf-8", "surrogatepass")).digest()
        known = self._accepted.get(digest)
        if known is not None and self._now() < known[1]:
            self._accepted.move_to_end(digest)
            return known[0]
        return await self._judge(credential, digest)

    # --- one token -----------------------------------------------------------------------------

    async def _judge(self, credential: str, digest: bytes) -> Caller | None:
        """Whether it is the issuer's, and then whose; raises Unauthenticated, or Unavailable while no key is known."""
        refused = self._verdicts.refused.get(digest)
        # A clock that was ahead, and is set right, must not keep a good token out.
        if refused is not None and 0 < refused[1] - self._now() <= REFUSED_SECONDS:
            raise _unauthenticated(refused[0])
        if len(credential) > MOST_BYTES:
            if credential.count(".") == 2:
                # Whose it is stands in what is not looked at.
                raise _unauthenticated(f"it is longer than {MOST_BYTES} bytes")
            return None
        token = Token.read(credential)
        if token is None or token.claims.get("iss") != self.config.issuer:
            return None
        try:
            key, algorithm = await self._key(token.header())
        except Refused as reason:
            # Not remembered: the key may come a moment later.
            raise _unauthenticated(str(reason)) from None
        return self._verified(token, digest, key, algorithm)

    def _verified(self, token: Token, digest: bytes, key: Key, algorithm: str) -> Caller:
        """The caller, who is remembered; raises Unauthenticated, which is remembered too."""
        now = self._now()
        try:
            token.prove(key, algorithm)
            ends = check(token.claims, self.config, now)
            caller = caller_of(token.claims, self.config, self.name, ends)
        except Refused as reason:
            _put(self._verdicts.refused, digest, (str(reason), now + REFUSED_SECONDS))
            raise _unauthenticated(str(reason)) from None
        _put(self._accepted, digest, (caller, min(ends, now + KNOWN_SECONDS)))
        return caller

    async def _key(self, header: Mapping[str, Any]) -> tuple[Key, str]:
        """The key that a token's header names, and the algorithm; a key or an address in the header is nothing."""
        algorithm, kid = header.get("alg"), header.get("kid")
        if algorithm not in self.config.accepted:
            raise Refused("it is signed in a way (alg) that is not accepted here")
        if not isinstance(kid, str | None):
            raise Refused("it is malformed")
        if "crit" in header:
            raise Refused("it needs an extension (crit) that is not known here")
        key = self._keyring.find(kid, algorithm)
        if key is None:
            await self._keyring.renewed()
            key = self._keyring.find(kid, algorithm)
        if key is not None:
            return key, algorithm
        if not self._keyring.held:
            # Never a 401: the client would blame its token.
            raise Unavailable("The keys that tokens are checked with cannot be had at the moment.", retry_after=1)
        raise Refused("its issuer has no such key (kid)")

    # --- keys ----------------------------------------------------------------------------------

    def _of_config(self) -> Key | None:
        config = self.config
        if config.secret is not None:
            return Key(config.secret.reveal().encode(), frozenset(config.accepted))
        return from_pem(config.public_key.encode(), config.accepted) if config.public_key is not None else None

    def _keyring_of(self, gateway: Gateway) -> Keyring:
        http, config = gateway.http, self.config
        counter = gateway.metrics.counter(
            "qlens_jwt_fetches_total", "Keys asked for, by plugin and by how it ended.", ("plugin", "outcome")
        )
        return Keyring(
            name=self.name,
            fetch=lambda: issuer.fetch(http, config) if config.public_key_file is None else self._of_file(),
            now=gateway.clock.monotonic,
            changed=self._verdicts.clear,
            counted=lambda outcome: counter.labels(self.name, outcome).inc(),
        )

    async def _of_file(self) -> tuple[Key, ...]:
        assert self.config.public_key_file is not None
        try:
            pem = await asyncio.to_thread(self.config.public_key_file.read_bytes)
            return (from_pem(pem, self.config.accepted),)
        except OSError as error:
            raise KeysUnfit(f"{self.config.public_key_file} cannot be read: {error.strerror}") from None
        except ValueError as error:
            raise KeysUnfit(f"{self.config.public_key_file} {error}") from None

    async def _first_of_file(self) -> tuple[Key, ...]:
        try:
            return await self._of_file()
        except KeysUnfit as unfit:
            raise StartupError([Fault("", str(unfit))]) from None


def _unauthenticated(reason: str) -> Unauthenticated:
    return Unauthenticated(f"This token is not accepted: {reason}.", code="invalid_api_key")
