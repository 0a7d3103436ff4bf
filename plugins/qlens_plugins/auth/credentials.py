"""What plugins of this stage share: how keys are made, hashed and shown, and how times are written."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from datetime import UTC, date, datetime

from qlens import Unauthenticated

PREFIX = "sk-qlens-"
STORED = f"{PREFIX}v-"
"""How the keys of `key_store` begin: whoever does not know one leaves it to that plugin."""

_JWT = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]*")
_MASKABLE = re.compile(r"[A-Za-z0-9_-]{20,}")


def new_key(prefix: str = PREFIX) -> str:
    """A key of 256 random bits."""
    return f"{prefix}{secrets.token_urlsafe(32)}"


def digest(key: str) -> bytes:
    """The hash of a whole key, as bytes.

    Plain SHA-256 is enough here: a key is 256 random bits, so nobody finds it by trying what people would choose,
    which is what slow and salted hashes are for.
    """
    return hashlib.sha256(key.encode(errors="surrogatepass")).digest()


def peppered(key: str, pepper: bytes) -> bytes:
    """The hash of a whole key together with a secret that is not kept where the hashes are, as bytes."""
    return hmac.digest(pepper, key.encode(errors="surrogatepass"), "sha256")


def is_jwt(credential: str) -> bool:
    """Whether a credential is shaped like a JWT."""
    return _JWT.fullmatch(credential) is not None


def masked(credential: str) -> str:
    """Enough of a wrong key to tell which one was sent, and never enough to use it."""
    return f"{credential[:3]}...{credential[-4:]}" if _MASKABLE.fullmatch(credential) else "***"


def refused(message: str) -> Unauthenticated:
    """The answer to a key that is not accepted."""
    return Unauthenticated(message, code="invalid_api_key")


def instant(text: str) -> datetime:
    """Read an ISO 8601 time with its zone, or a date for its first moment in UTC; ValueError if it is neither."""
    try:
        return datetime.combine(date.fromisoformat(text), datetime.min.time(), UTC)
    except ValueError:
        pass
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(f"{text!r} is no ISO 8601 time; write it like 2027-01-31T00:00:00Z") from None
    if at.tzinfo is None:
        raise ValueError(f"{text!r} has no time zone; end it with Z for UTC")
    try:
        return at.astimezone(UTC)
    except OverflowError:
        raise ValueError(f"{text!r} is before the year 1 or after 9999 in UTC") from None


def written(at: datetime) -> str:
    """A time as files and answers have it."""
    return at.astimezone(UTC).isoformat().replace("+00:00", "Z")
