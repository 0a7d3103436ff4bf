"""A real HTTP server that plays an OpenID Connect issuer: discovery, key set, tokens with any claims, rotation.

Needs `qlens[jwt]`. https://openid.net/specs/openid-connect-discovery-1_0.html
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from functools import lru_cache
from typing import Any

import jwt
from attrs import define, field, frozen
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from jwt.algorithms import get_default_algorithms

from qlens.clock import Clock
from qlens.testing.upstreams import FakeUpstream, Recorded, Scripted, serving

AUDIENCE = "qlens"
DISCOVERY = "/.well-known/openid-configuration"
KEYS = "/keys"

_CURVES: Mapping[str, ec.EllipticCurve] = {"ES256": ec.SECP256R1(), "ES384": ec.SECP384R1(), "ES512": ec.SECP521R1()}


@frozen
class SigningKey:
    """A key pair of an issuer, with the one algorithm it is for."""

    kid: str
    algorithm: str
    private: Any = field(repr=False)

    def jwk(self) -> dict[str, Any]:
        """The public key, as a key set has it."""
        algorithm: Any = get_default_algorithms()[self.algorithm]
        public = algorithm.to_jwk(self.private.public_key(), as_dict=True)
        return {**public, "kid": self.kid, "alg": self.algorithm, "use": "sig"}

    def pem(self) -> str:
        """The public key as PEM."""
        return str(self.private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode())

    def private_pem(self) -> str:
        """The private key as PEM, to look for where it must not be."""
        return str(self.private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode())

    def sign(self, claims: Mapping[str, Any], header: Mapping[str, Any] | None = None) -> str:
        """A token with exactly these claims; `header` adds to its header."""
        return jwt.encode(dict(claims), self.private, self.algorithm, {"kid": self.kid, **(header or {})})


def signing_key(kid: str, algorithm: str = "RS256") -> SigningKey:
    """A key pair; the same one for the same name, because RSA keys take long to make."""
    return SigningKey(kid, algorithm, _private(kid, algorithm))


@lru_cache(maxsize=64)
def _private(_kid: str, algorithm: str) -> Any:
    if algorithm in _CURVES:
        return ec.generate_private_key(_CURVES[algorithm])
    return ed25519.Ed25519PrivateKey.generate() if algorithm == "EdDSA" else rsa.generate_private_key(65537, 2048)


@define(eq=False)
class FakeIssuer(FakeUpstream):
    """A running server; made by `oidc()`. Answers that are scripted come first, whatever is asked."""

    clock: Clock = field(factory=Clock)
    key: SigningKey = field(factory=lambda: signing_key("key-1"))
    """The key that signs."""
    published: list[SigningKey] = field(factory=list)
    """The keys in the key set."""
    broken: Scripted | None = None
    """What is answered to every request, until this is None again."""
    key_set: bytes | dict[str, Any] | None = None
    """What the key set is instead of the published keys: JSON, or bytes as they are."""
    discovery: Mapping[str, Any] = field(factory=dict)
    """What the discovery document says differently."""

    def __attrs_post_init__(self) -> None:
        self.published = self.published or [self.key]

    @property
    def issuer(self) -> str:
        """What stands in the tokens' `iss`."""
        return self.root

    @property
    def keys_url(self) -> str:
        """Where the key set is."""
        return f"{self.root}{KEYS}"

    @property
    def fetches(self) -> int:
        """How often the key set was asked for."""
        return sum(request.path == KEYS for request in self.requests)

    def claims(self, **changes: Any) -> dict[str, Any]:
        """The claims of an hour's token for a caller of tenant `acme`, in the claim `org`; None takes one out."""
        now = int(self.clock.time())
        usual = {"iss": self.issuer, "aud": AUDIENCE, "sub": "alice", "org": "acme", "iat": now, "exp": now + 3600}
        return {name: value for name, value in {**usual, **changes}.items() if value is not None}

    def token(self, header: Mapping[str, Any] | None = None, **changes: Any) -> str:
        """A token that the key signs: the usual claims with these changes."""
        return self.key.sign(self.claims(**changes), header)

    def rotate(self, *, keep: bool = True) -> None:
        """Sign with a new key from now on, and publish it; without `keep`, the old ones are withdrawn."""
        self.key = signing_key(f"key-{int(self.key.kid.rpartition('-')[2]) + 1}", self.key.algorithm)
        self.published = [*(self.published if keep else ()), self.key]

    def _answer(self, request: Recorded) -> Scripted:
        return self.broken if self.broken is not None else super()._answer(request)

    def _usual(self, request: Recorded) -> Scripted:
        if request.path == DISCOVERY:
            return Scripted(body={"issuer": self.issuer, "jwks_uri": self.keys_url, **self.discovery})
        if request.path != KEYS:
            return Scripted(404)
        if self.key_set is not None:
            return Scripted(body=self.key_set)
        return Scripted(body={"keys": [key.jwk() for key in self.published]})


@asynccontextmanager
async def oidc(*, clock: Clock | None = None, algorithm: str = "RS256") -> AsyncIterator[FakeIssuer]:
    """Serve on a free loopback port until the block is left."""
    async with serving(FakeIssuer(clock=clock or Clock(), key=signing_key("key-1", algorithm))) as fake:
        yield fake
