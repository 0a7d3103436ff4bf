"""Signatures by which a receiver knows who sent an event, and when.

https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md
"""

from __future__ import annotations

import binascii
import hmac
from base64 import b64decode, b64encode
from collections.abc import Sequence

from qlens import Secret

PREFIX = "whsec_"
HEADERS = ("webhook-id", "webhook-timestamp", "webhook-signature")
_LEAST_BYTES, _MOST_BYTES = 24, 64


def key_of(secret: Secret) -> bytes:
    """The bytes of a secret; raises ValueError, which never shows it."""
    text = secret.reveal()
    try:
        key = b64decode(text.removeprefix(PREFIX), validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if not text.startswith(PREFIX) or not _LEAST_BYTES <= len(key) <= _MOST_BYTES:
        raise ValueError(
            f"must be {PREFIX} and {_LEAST_BYTES} to {_MOST_BYTES} random bytes in base64; make one with: "
            f"echo {PREFIX}$(openssl rand -base64 32)"
        )
    return key


def signed(keys: Sequence[bytes], id_: str, now: int, body: bytes) -> dict[str, str]:
    """The headers of a request that is sent now, in Unix seconds: one signature for each key."""
    content = b"%b.%d.%b" % (id_.encode(), now, body)
    signatures = (b64encode(hmac.digest(key, content, "sha256")).decode() for key in keys)
    return dict(zip(HEADERS, (id_, str(now), " ".join(f"v1,{each}" for each in signatures)), strict=True))
