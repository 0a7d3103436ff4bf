"""Signs requests to Bedrock: AWS Signature Version 4, or a bearer key."""

from __future__ import annotations

import hmac
import time
from collections.abc import Callable, Mapping
from functools import lru_cache
from hashlib import sha256
from typing import Any
from urllib.parse import quote

from attrs import define, field, frozen

SERVICE = "bedrock"
NOTHING: Mapping[str, str] = {}
_JSON = "application/json"
_BLOCK_BYTES = sha256().block_size
_INNER, _OUTER = (bytes(byte ^ pad for byte in range(256)) for pad in (0x36, 0x5C))


@frozen
class Keys:
    """An access key of AWS with its secret."""

    access_key: str
    secret_key: str = field(repr=False)
    token: str | None = field(default=None, repr=False)
    """The session token of temporary credentials."""


@frozen(slots=False)  # made for every call
class Proof:
    """What a request's head says of who asks, and of what."""

    headers: Mapping[str, str] = field(repr=False)
    """Those that other requests have as well."""
    authorization: str = field(repr=False)
    """The value of one more, which may be this request's alone."""


@frozen
class _Alike:
    """The part of a signature that does not depend on the body: what is hashed with it, as far as it goes."""

    headers: Mapping[str, str] = field(repr=False)
    authorization: str
    request: Any
    """The canonical request, up to the body's own hash."""
    inner: Any = field(repr=False)
    """The inner hash of the signature's HMAC, up to the request's hash."""
    outer: Any = field(repr=False)


@define(eq=False)
class Signer:
    """Signs for one region; what stays the same from request to request is computed once.

    The signature covers content-type, host, x-amz-date, the session token and the headers of Bedrock's own:
    https://docs.aws.amazon.com/IAM/latest/UserGuide/reference_sigv-create-signed-request.html
    """

    region: str
    clock: Callable[[], float] = time.time
    _second: int = field(init=False, default=-1)
    _stamp: str = field(init=False, default="")
    _keys: Keys | None = field(init=False, default=None, repr=False)
    _signing_of: tuple[str, Keys] | None = field(init=False, default=None, repr=False)
    _signing: tuple[Any, Any] = field(init=False, repr=False)
    """The HMAC with the day's key."""
    _alike: dict[tuple[object, ...], _Alike] = field(init=False, factory=dict, repr=False)
    """What the requests of this second have in common: most differ in nothing but their body."""

    def sign(
        self, keys: Keys, host: str, path: str, body: bytes, accept: str, *, own: Mapping[str, str] = NOTHING
    ) -> Proof:
        """Sign a POST of JSON; `path` is as it stands in the request line, without a query.

        The names of Bedrock's `own` headers are lowercase, in order, and come after `x-amz-`; no value has spaces.
        """
        second = int(self.clock())
        if second != self._second or keys is not self._keys:
            self._begin(second, keys)
        like = (path, host, accept, *own.items())
        alike = self._alike.get(like)
        if alike is None:
            alike = self._alike[like] = self._begun(keys, host, path, accept, own)
        request, inner, outer = alike.request.copy(), alike.inner.copy(), alike.outer.copy()
        request.update(sha256(body).hexdigest().encode())
        inner.update(request.hexdigest().encode())
        outer.update(inner.digest())
        return Proof(alike.headers, alike.authorization + outer.hexdigest())

    def _begin(self, second: int, keys: Keys) -> None:
        self._alike.clear()
        self._second, self._keys = second, keys
        self._stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(second))

    def _begun(self, keys: Keys, host: str, path: str, accept: str, own: Mapping[str, str]) -> _Alike:
        """What all requests like this have in common as long as the second lasts."""
        stamp, token = self._stamp, keys.token
        scope = f"{stamp[:8]}/{self.region}/{SERVICE}/aws4_request"
        headers = {"content-type": _JSON, "accept": accept, "host": host, "x-amz-date": stamp, **own}
        security, names = "", "content-type;host;x-amz-date"
        if token is not None:
            security, names = f"x-amz-security-token:{token}\n", f"{names};x-amz-security-token"
            headers["x-amz-security-token"] = token
        for name, value in own.items():
            security, names = f"{security}{name}:{value}\n", f"{names};{name}"
        request = (
            f"POST\n{_canonical(path)}\n\ncontent-type:{_JSON}\nhost:{host}\nx-amz-date:{stamp}\n{security}\n{names}\n"
        )
        inner, outer = self._hmac(keys)
        inner = inner.copy()
        inner.update(f"AWS4-HMAC-SHA256\n{stamp}\n{scope}\n".encode())
        return _Alike(
            headers,
            f"AWS4-HMAC-SHA256 Credential={keys.access_key}/{scope}, SignedHeaders={names}, Signature=",
            sha256(request.encode()),
            inner,
            outer,
        )

    def _hmac(self, keys: Keys) -> tuple[Any, Any]:
        """The two hashes that an HMAC consists of (RFC 2104), begun: to copy them costs a fifth of `hmac.digest`."""
        day = self._stamp[:8]
        if self._signing_of != (day, keys):
            key = f"AWS4{keys.secret_key}".encode()
            for part in (day, self.region, SERVICE, "aws4_request"):
                key = hmac.digest(key, part.encode(), "sha256")
            block = key.ljust(_BLOCK_BYTES, b"\0")
            self._signing_of = day, keys
            self._signing = sha256(block.translate(_INNER)), sha256(block.translate(_OUTER))
        return self._signing


# A gateway asks for few models, again and again.
@lru_cache(maxsize=1024)
def _canonical(path: str) -> str:
    # AWS encodes the path once more for its canonical form: %3A on the wire is %253A here.
    return quote(path, safe="/~")


def bearer(api_key: str, host: str, accept: str, own: Mapping[str, str] = NOTHING) -> Proof:
    """What a request with a Bedrock API key says."""
    return Proof({"content-type": _JSON, "accept": accept, "host": host, **own}, f"Bearer {api_key}")
