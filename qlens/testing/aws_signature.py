"""Checks signatures as AWS does; botocore's own signer is the judge."""

from __future__ import annotations

import calendar
import hmac
import re
import time
from collections.abc import Callable

from attrs import define, field, frozen
from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from qlens.testing.upstreams import Recorded

SKEW_SECONDS = 300

_AUTHORIZATION = re.compile(
    r"AWS4-HMAC-SHA256 Credential=(?P<key>[^/]+)/(?P<day>\d{8})/(?P<region>[^/]+)/(?P<service>[^/]+)/aws4_request, ?"
    r"SignedHeaders=(?P<names>[a-z0-9;-]+), ?Signature=(?P<signature>[0-9a-f]{64})"
)


@frozen
class Identity:
    """An access key that AWS has given out."""

    access_key: str
    secret_key: str
    token: str | None = None
    expires_at: float | None = None
    """Unix seconds."""


@frozen
class Refusal:
    """Why a request is not let in, in AWS's words."""

    status: int
    name: str
    message: str


@define(eq=False)
class Identities:
    """The access keys and API keys that are known, and the check of who asks."""

    clock: Callable[[], float] = time.time
    api_keys: set[str] = field(factory=set)
    """Bearer keys of Bedrock."""
    _known: dict[str, Identity] = field(factory=dict, init=False)

    def add(self, identity: Identity) -> Identity:
        """Let an access key in."""
        self._known[identity.access_key] = identity
        return identity

    def refusal(self, request: Recorded, service: str, region: str) -> Refusal | None:
        """Why this request is refused; None for one that is signed, or has an API key, as it must."""
        given = request.headers.get("authorization")
        if given is None:
            return Refusal(403, "MissingAuthenticationTokenException", "Missing Authentication Token")
        if given.startswith("Bearer "):
            if given[7:] in self.api_keys:
                return None
            return Refusal(403, "AccessDeniedException", "Authentication failed: invalid API Key")
        found = _AUTHORIZATION.fullmatch(given)
        if found is None:
            return Refusal(403, "IncompleteSignatureException", "Authorization header is malformed.")
        return self._scope_fault(found, service, region) or self._signature_fault(found, request, service, region)

    def _scope_fault(self, found: re.Match[str], service: str, region: str) -> Refusal | None:
        if found["service"] != service:
            text = f"Credential should be scoped to correct service: '{service}'. "
            return Refusal(403, "InvalidSignatureException", text)
        if found["region"] != region:
            return Refusal(403, "InvalidSignatureException", "Credential should be scoped to a valid region. ")
        return None

    def _signature_fault(self, found: re.Match[str], request: Recorded, service: str, region: str) -> Refusal | None:
        identity = self._known.get(found["key"])
        invalid = Refusal(403, "UnrecognizedClientException", "The security token included in the request is invalid.")
        if identity is None or request.headers.get("x-amz-security-token") != identity.token:
            return invalid
        if identity.expires_at is not None and identity.expires_at <= self.clock():
            text = "The security token included in the request is expired"
            return Refusal(403, "ExpiredTokenException", text)
        if fault := self._header_fault(found, request, identity):
            return Refusal(403, "InvalidSignatureException", fault)
        stamp = request.headers["x-amz-date"]
        auth = SigV4Auth(Credentials(identity.access_key, identity.secret_key, identity.token), service, region)
        asked = AWSRequest(request.method, f"https://{request.headers['host']}{request.path}", data=request.content)
        for name in found["names"].split(";"):
            asked.headers[name] = request.headers[name]
        asked.context["timestamp"] = stamp
        right = auth.signature(auth.string_to_sign(asked, auth.canonical_request(asked)), asked)
        if not hmac.compare_digest(right, found["signature"]):
            text = (
                "The request signature we calculated does not match the signature you provided. "
                "Check your AWS Secret Access Key and signing method."
            )
            return Refusal(403, "InvalidSignatureException", text)
        return None

    def _header_fault(self, found: re.Match[str], request: Recorded, identity: Identity) -> str | None:
        names = found["names"].split(";")
        if names != sorted(names):
            return "SignedHeaders are not sorted."
        needed = {"host", "x-amz-date", *({"x-amz-security-token"} if identity.token else ())}
        if missing := needed - {*names}:
            return f"'{min(missing)}' must be a 'SignedHeader' in the AWS Authorization."
        if absent := [name for name in names if name not in request.headers]:
            return f"Signed header {absent[0]} is not there."
        stamp = request.headers["x-amz-date"]
        if not re.fullmatch(r"\d{8}T\d{6}Z", stamp) or stamp[:8] != found["day"]:
            return "Date in Credential scope does not match YYYYMMDD from ISO-8601 version of date from HTTP."
        signed_at = calendar.timegm(time.strptime(stamp, "%Y%m%dT%H%M%SZ"))
        if signed_at < self.clock() - SKEW_SECONDS:
            return f"Signature expired: {stamp} is now earlier than 5 min. before now."
        if signed_at > self.clock() + SKEW_SECONDS:
            return f"Signature not yet current: {stamp} is still later than 5 min. from now."
        return None
