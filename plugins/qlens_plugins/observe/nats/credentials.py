"""Who the gateway is to NATS, where that is a key: it signs what the server asks, and the key stays here.

https://docs.nats.io/running-a-nats-service/configuration/securing_nats/auth_intro/nkey_auth
"""

from __future__ import annotations

import base64
import binascii
import re
from pathlib import Path

from attrs import field, frozen

_SEED = 18 << 3
"""The first five bits of a seed: S."""
_USER = 20 << 3
"""U: a user."""
_BLOCK = "-----BEGIN {0}-----\\s*(\\S+)\\s*-+END {0}-----"
_JWT = re.compile(_BLOCK.format("NATS USER JWT"))
_KEY = re.compile(_BLOCK.format("USER NKEY SEED"))


@frozen
class Signer:
    """A user's key, and the token that says what the user may do, if there is one."""

    seed: bytes = field(repr=False)
    jwt: str | None = field(default=None, repr=False)

    @classmethod
    def of_file(cls, path: Path) -> Signer:
        """The credentials in a file; raises ValueError or OSError, without what is in it."""
        text = path.read_text("utf-8", "replace")
        jwt, key = _JWT.search(text), _KEY.search(text)
        if jwt is None or key is None:
            raise ValueError(f"{path} has no credentials of a user of NATS in it")
        return cls(seed_of(key[1]), jwt[1])

    @property
    def public(self) -> str:
        """The public key, as servers know it: `U...`."""
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        raw = bytes([_USER]) + Ed25519PrivateKey.from_private_bytes(self.seed).public_key().public_bytes_raw()
        return base64.b32encode(raw + _sum_of(raw)).decode().rstrip("=")

    def sign(self, nonce: str) -> bytes:
        """The signature of what a server asks."""
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        return base64.b64encode(Ed25519PrivateKey.from_private_bytes(self.seed).sign(nonce.encode()))


def seed_of(text: str) -> bytes:
    """The secret bytes of a user's seed; raises ValueError, without what it is."""
    wrong = ValueError("this is no seed of a user's NKey: that begins with SU and has 58 characters")
    text = text.strip()
    try:
        raw = base64.b32decode(text + "=" * (-len(text) % 8))
    except binascii.Error:
        raise wrong from None
    if len(raw) != 36 or raw[-2:] != _sum_of(raw[:-2]):
        raise wrong
    first, second = raw[0] & 0xF8, (raw[0] & 0x07) << 5 | raw[1] >> 3
    if (first, second) != (_SEED, _USER):
        raise wrong
    return raw[2:-2]


def _sum_of(raw: bytes) -> bytes:
    """CRC-16 of XMODEM, little-endian."""
    return binascii.crc_hqx(raw, 0).to_bytes(2, "little")
