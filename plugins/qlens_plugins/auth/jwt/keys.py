"""The keys that signatures are checked with: what a PEM or a JSON Web Key means, and which algorithms fit it.

https://www.rfc-editor.org/rfc/rfc7517, https://www.rfc-editor.org/rfc/rfc8725#section-3
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jwt
from attrs import field, frozen
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed448 import Ed448PublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from jwt.algorithms import get_default_algorithms

HASH_BYTES = {"HS256": 32, "HS384": 48, "HS512": 64}
MOST_KEYS = 100
"""How many keys of a set are looked at."""

_ALGORITHMS = get_default_algorithms()
_RSA = frozenset({"RS256", "RS384", "RS512", "PS256", "PS384", "PS512"})
_RSA_BITS = range(2048, 16385)
"""Less is weak (NIST SP 800-131A), more is only slow."""
_CURVES = {"secp256r1": "ES256", "secp384r1": "ES384", "secp521r1": "ES512"}
_BY_TYPE = {"RSA": "RS256", "EC": "ES256", "OKP": "EdDSA"}
_CURVES_OF_JWK = {"P-384": "ES384", "P-521": "ES512"}


@frozen
class Key:
    """A key with the algorithms that it is accepted for."""

    value: Any = field(repr=False)
    algorithms: frozenset[str]
    kid: str | None = None
    """Its name in a key set; None: it is the only one, whatever a token calls it."""

    def has_signed(self, message: bytes, signature: bytes, algorithm: str) -> bool:
        """Whether a signature is this key's; the algorithm is one of those that fit it."""
        try:
            return bool(_ALGORITHMS[algorithm].verify(message, self.value, signature))
        except ValueError:
            return False


class KeysUnfit(Exception):
    """Keys cannot be had or used; the message is safe to log."""


def fits_hmac(secret: bytes, algorithms: Iterable[str]) -> None:
    """Check a secret for HMAC; raises ValueError, whose message does not show it."""
    least = max(HASH_BYTES.get(name, 0) for name in algorithms)
    if len(secret) < least:
        raise ValueError(f"must have at least {least} bytes for these algorithms (RFC 7518, 3.2)")
    try:
        _ALGORITHMS["HS256"].prepare_key(secret)
    except jwt.PyJWTError:
        raise ValueError("must be a text that issuer and gateway share, not a key or certificate") from None


def from_pem(pem: bytes, algorithms: Iterable[str]) -> Key:
    """The public key in a PEM; raises ValueError when there is none, or when no algorithm fits it."""
    try:
        value: Any = load_pem_public_key(pem)
    except Exception:  # noqa: BLE001 - whatever is in there instead, a private key say, it is not to be shown
        raise ValueError("must be a public key as PEM, which begins with -----BEGIN PUBLIC KEY-----") from None
    fitting = _fitting(value)
    if not fitting:
        raise ValueError("must be a key of RSA with 2048 bits or more, P-256, P-384, P-521, Ed25519 or Ed448")
    usable = fitting.intersection(algorithms)
    if not usable:
        names = ", ".join(sorted(fitting))
        raise ValueError(f"is a key for {names}, but algorithms are {', '.join(algorithms)}: set `algorithms`")
    return Key(value, usable)


def from_jwks(document: Mapping[str, Any], algorithms: Iterable[str]) -> tuple[Key, ...]:
    """The usable keys of a key set; raises KeysUnfit when there is none."""
    listed = document.get("keys")
    if not isinstance(listed, list):
        raise KeysUnfit("the key set is malformed: it has no list of keys")
    accepted = frozenset(algorithms)
    found = tuple(key for each in listed[:MOST_KEYS] if (key := _from_jwk(each, accepted)) is not None)
    if not found:
        raise KeysUnfit(f"the key set has no key for {', '.join(sorted(accepted))}")
    return found


def _from_jwk(jwk: Any, accepted: frozenset[str]) -> Key | None:
    """A key of a set; None for one that is malformed, private, symmetric, weak, or for something else."""
    if not isinstance(jwk, dict) or not _is_for_signatures(jwk):
        return None
    kid, algorithm = jwk.get("kid"), jwk.get("alg")
    if not isinstance(kid, str | None):
        return None
    by_type = _CURVES_OF_JWK.get(str(jwk.get("crv")), _BY_TYPE[jwk["kty"]])
    try:
        value = jwt.PyJWK(jwk, by_type).key
    except Exception:  # noqa: BLE001 - one bad key must not take the others with it
        return None
    usable = _fitting(value) & accepted
    if algorithm is not None:
        usable &= {str(algorithm)}
    return Key(value, usable, kid) if usable else None


def _is_for_signatures(jwk: Mapping[str, Any]) -> bool:
    operations = jwk.get("key_ops", ["verify"])
    # A symmetric or private key that somebody publishes is everybody's.
    return (
        jwk.get("kty") in tuple(_BY_TYPE)  # it may be anything, hashable or not
        and "d" not in jwk
        and jwk.get("use", "sig") == "sig"
        and isinstance(operations, list)
        and "verify" in operations
    )


def _fitting(key: Any) -> frozenset[str]:
    """The algorithms for a public key."""
    if isinstance(key, RSAPublicKey):
        return _RSA if key.key_size in _RSA_BITS else frozenset()
    if isinstance(key, EllipticCurvePublicKey):
        return frozenset({_CURVES[key.curve.name]} if key.curve.name in _CURVES else ())
    return frozenset({"EdDSA"} if isinstance(key, Ed25519PublicKey | Ed448PublicKey) else ())
