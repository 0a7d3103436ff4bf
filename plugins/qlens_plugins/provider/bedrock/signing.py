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


@frozen
class Keys:
    """An access key of AWS with its secret."""

    access_key: str
    secret_key: str = field(repr=False)
    token: str | None = field(default=None, repr=False)
    """The session token of temporary credentials."""


@frozen
class _Alike:
    """The part of a signature that does not depend on the body."""

    begun: Any
    """The hash of the canonical request up to the body's own."""
    text: str
    authorization: str
    headers: Mapping[str, str] = field(repr=False)


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
    _scope: str = field(init=False, default="")
    _key_of: tuple[str, Keys] | None = field(init=False, default=None, repr=False)
    _key: bytes = field(init=False, default=b"", repr=False)
    _alike: dict[tuple[object, ...], _Alike] = field(init=False, factory=dict, repr=False)
    """What the requests of this second have in common: most differ in nothing but their body."""

    def headers(
        self, keys: Keys, host: str, path: str, body: bytes, accept: str, *, own: Mapping[str, str] = NOTHING
    ) -> dict[str, str]:
        """The headers of a POST of JSON; `path` is as it stands in the request line, without a query.

        The names of Bedrock's `own` headers are lowercase, in order, and come after `x-amz-`; no value has spaces.
        """
        self._tick()
        like = (path, host, accept, keys.access_key, keys.token, *own.items())
        alike = self._alike.get(like)
        if alike is None:
            alike = self._alike[like] = self._begun(keys, host, path, accept, own)
        request = alike.begun.copy()
        request.update(sha256(body).hexdigest().encode())
        text = f"{alike.text}{request.hexdigest()}"
        signature = hmac.digest(self._signing_key(keys), text.encode(), "sha256").hex()
        return {**alike.headers, "authorization": f"{alike.authorization}{signature}"}

    def _begun(self, keys: Keys, host: str, path: str, accept: str, own: Mapping[str, str]) -> _Alike:
        """What all requests like this have in common as long as the second lasts."""
        stamp, token = self._stamp, keys.token
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
        return _Alike(
            sha256(request.encode()),
            f"AWS4-HMAC-SHA256\n{stamp}\n{self._scope}\n",
            f"AWS4-HMAC-SHA256 Credential={keys.access_key}/{self._scope}, SignedHeaders={names}, Signature=",
            headers,
        )

    def _tick(self) -> None:
        second = int(self.clock())
        if second != self._second:
            self._alike.clear()
            self._second = second
            self._stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(second))
            self._scope = f"{self._stamp[:8]}/{self.region}/{SERVICE}/aws4_request"

    def _signing_key(self, keys: Keys) -> bytes:
        day = self._stamp[:8]
        if self._key_of != (day, keys):
            key = f"AWS4{keys.secret_key}".encode()
            for part in (day, self.region, SERVICE, "aws4_request"):
                key = hmac.digest(key, part.encode(), "sha256")
            self._key_of, self._key = (day, keys), key
        return self._key


# A gateway asks for few models, again and again.
@lru_cache(maxsize=1024)
def _canonical(path: str) -> str:
    # AWS encodes the path once more for its canonical form: %3A on the wire is %253A here.
    return quote(path, safe="/~")


def bearer_headers(api_key: str, host: str, accept: str, own: Mapping[str, str] = NOTHING) -> dict[str, str]:
    """The headers of a request with a Bedrock API key."""
    return {"content-type": _JSON, "accept": accept, "host": host, "authorization": f"Bearer {api_key}", **own}
