"""A real HTTP server that plays Entra and the identity endpoints of Azure's machines, as strict as they are.

https://learn.microsoft.com/entra/identity-platform/reference-error-codes
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from base64 import urlsafe_b64decode, urlsafe_b64encode
from binascii import Error as NotBase64
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import parse_qs

import orjson
from attrs import define, field, frozen

from qlens.clock import Clock
from qlens.testing.upstreams import FakeUpstream, Recorded, Scripted, serving

TENANT = "00000000-0000-4000-8000-00000000feed"
CLIENT = "00000000-0000-4000-8000-0000000000c1"
SECRET = "example-client-secret"  # noqa: S105 - an example
SUBJECT = "system:serviceaccount:qlens:gateway"
IDENTITY_HEADER = "example-identity-header"
RESOURCES = ("https://cognitiveservices.azure.com", "https://ai.azure.com")

FEDERATED = "api://AzureADTokenExchange"
"""The audience that a service account's token must have."""
JWT_BEARER = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"


@frozen
class Application:
    """What Entra knows of an application or a user-assigned identity."""

    secret: str | None = SECRET
    subject: str | None = SUBJECT
    """The service account whose tokens it trusts."""
    resources: tuple[str, ...] = RESOURCES
    """What it gets tokens for."""


@define(eq=False)
class FakeEntra(FakeUpstream):
    """A running server; made by `entra()`. Its tokens are signed: a resource asks `refusal` about them."""

    clock: Clock = field(factory=Clock)
    lifetime: int = 3600
    """How many seconds a token lives."""
    tenant: str = TENANT
    applications: dict[str, Application] = field(factory=lambda: {CLIENT: Application()})
    identity_header: str = IDENTITY_HEADER
    issued: list[str] = field(factory=list, init=False, repr=False)
    """Every token that was given, in order."""
    _key: bytes = field(factory=lambda: secrets.token_bytes(32), init=False, repr=False)

    @property
    def url(self) -> str:
        """Entra's address, an authority; also that of the machine's metadata service."""
        return self.root

    @property
    def app_service(self) -> str:
        """What App Service calls IDENTITY_ENDPOINT."""
        return f"{self.root}/msi/token"

    def assertion(self, *, subject: str = SUBJECT, audience: str = FEDERATED, seconds: float = 3600) -> str:
        """A service account's own token, as a cluster that Entra trusts signs it."""
        return self._signed({"sub": subject, "aud": audience, "exp": self.clock.time() + seconds})

    def token(self, audience: str, *, seconds: float | None = None) -> str:
        """A token for a resource."""
        lifetime = self.lifetime if seconds is None else seconds
        claims = {"aud": audience, "tid": self.tenant, "exp": self.clock.time() + lifetime, "jti": len(self.issued)}
        self.issued.append(self._signed(claims))
        return self.issued[-1]

    def refusal(self, token: str, audiences: tuple[str, ...]) -> str | None:
        """Why a resource would refuse a token; None: it takes it."""
        claims = self._claims(token)
        if claims is None:
            return "the token is malformed or signed by somebody else"
        if claims["exp"] <= self.clock.time():
            return "the token is expired"
        if claims["aud"] not in audiences:
            return "the token is for another audience"
        return None

    # --- answers --------------------------------------------------------------------------------

    def _usual(self, request: Recorded) -> Scripted:
        if request.path == "/metadata/identity/oauth2/token":
            return self._metadata(request)
        if request.path == "/msi/token":
            return self._app_service(request)
        tenant, _, rest = request.path.removeprefix("/").partition("/")
        if rest == "v2.0/.well-known/openid-configuration":
            return _configuration(f"https://{request.headers['host']}/{tenant}")
        if rest != "oauth2/v2.0/token":
            return Scripted(404)
        return self._entra(tenant, request)

    def _entra(self, tenant: str, request: Recorded) -> Scripted:
        if request.method != "POST":
            return _aadsts(400, "invalid_request", 900561, "The endpoint only accepts POST requests.")
        if not request.headers.get("content-type", "").startswith("application/x-www-form-urlencoded"):
            return _aadsts(400, "invalid_request", 900144, "The request body must contain: 'grant_type'.")
        form = {name: values[-1] for name, values in parse_qs(request.content.decode()).items()}
        for name in ("grant_type", "client_id", "scope"):
            if name not in form:
                return _aadsts(400, "invalid_request", 900144, f"The request body must contain: '{name}'.")
        if tenant != self.tenant:
            return _aadsts(400, "invalid_request", 90002, f"Tenant '{tenant}' not found.")
        if form["grant_type"] != "client_credentials":
            return _aadsts(400, "unsupported_grant_type", 70003, "The app requested an unsupported grant type.")
        application = self.applications.get(form["client_id"])
        if application is None:
            client = form["client_id"]
            return _aadsts(
                400, "unauthorized_client", 700016, f"Application '{client}' was not found in the directory."
            )
        refused = self._unproven(application, form) or _out_of_scope(application, form["scope"])
        if refused is not None:
            return refused
        token = self.token(form["scope"].removesuffix("/.default"))
        seconds = self.lifetime - 1
        body = {"token_type": "Bearer", "expires_in": seconds, "ext_expires_in": seconds, "access_token": token}
        return Scripted(body=body)

    def _unproven(self, application: Application, form: Mapping[str, str]) -> Scripted | None:
        if "client_assertion" not in form:
            if "client_secret" not in form:
                wording = "The request body must contain: 'client_assertion' or 'client_secret'."
                return _aadsts(401, "invalid_client", 7000218, wording)
            if application.secret is None or not hmac.compare_digest(form["client_secret"], application.secret):
                return _aadsts(401, "invalid_client", 7000215, "Invalid client secret provided.")
            return None
        if form.get("client_assertion_type") != JWT_BEARER:
            return _aadsts(400, "invalid_request", 50027, "The client_assertion_type is not supported.")
        claims = self._claims(form["client_assertion"])
        if claims is None:
            return _aadsts(401, "invalid_client", 50027, "JWT token is invalid or malformed.")
        if claims["exp"] <= self.clock.time():
            return _aadsts(401, "invalid_client", 700024, "Client assertion is not within its valid time range.")
        if claims["aud"] != FEDERATED:
            return _aadsts(401, "invalid_client", 700212, "No matching federated identity record for the audience.")
        if claims["sub"] != application.subject:
            return _aadsts(401, "invalid_client", 700213, "No matching federated identity record for the subject.")
        return None

    def _metadata(self, request: Recorded) -> Scripted:
        query = request.query
        if request.headers.get("metadata", "").lower() != "true":
            return _plain(400, "bad_request_102", "Required metadata header not specified")
        if "x-forwarded-for" in request.headers:
            return _plain(400, "bad_request_104", "The request went through a proxy")
        if request.method != "GET" or query.get("api-version") != "2018-02-01":
            return _plain(400, "invalid_request", "The api-version is missing or not supported")
        named = query.get("client_id") or query.get("object_id") or query.get("msi_res_id")
        return self._managed(query.get("resource"), named, {"expires_in": str(self.lifetime - 1)})

    def _app_service(self, request: Recorded) -> Scripted:
        query = request.query
        if request.headers.get("x-identity-header") != self.identity_header:
            return _plain(401, "unauthorized", "The X-IDENTITY-HEADER is missing or wrong")
        if request.method != "GET" or query.get("api-version") != "2019-08-01":
            return _plain(400, "invalid_request", "The api-version is missing or not supported")
        named = next(
            (query[name] for name in ("client_id", "principal_id", "object_id", "mi_res_id") if name in query), None
        )
        return self._managed(query.get("resource"), named, {"client_id": named or CLIENT})

    def _managed(self, resource: str | None, named: str | None, more: Mapping[str, str]) -> Scripted:
        application = self.applications.get(named or CLIENT)
        if application is None:
            return _plain(400, "invalid_request", "Identity not found")
        if resource not in application.resources:
            return _plain(
                400, "invalid_resource", f"AADSTS500011: The resource principal named {resource} was not found"
            )
        body = {
            "access_token": self.token(resource),
            "expires_on": str(int(self.clock.time()) + self.lifetime),
            "resource": resource,
            "token_type": "Bearer",
            **more,
        }
        return Scripted(body=body)

    # --- signatures -----------------------------------------------------------------------------

    def _signed(self, claims: Mapping[str, Any]) -> str:
        parts = [_packed(orjson.dumps(part)) for part in ({"alg": "HS256", "typ": "JWT"}, dict(claims))]
        return ".".join([*parts, self._signature(".".join(parts))])

    def _signature(self, text: str) -> str:
        return _packed(hmac.digest(self._key, text.encode(), hashlib.sha256))

    def _claims(self, token: str) -> dict[str, Any] | None:
        text, _, signature = token.rpartition(".")
        if not hmac.compare_digest(signature.encode(), self._signature(text).encode()):
            return None
        try:
            claims = orjson.loads(urlsafe_b64decode(text.partition(".")[2] + "=="))
        except (NotBase64, orjson.JSONDecodeError):
            return None
        return claims if isinstance(claims, dict) else None


@asynccontextmanager
async def entra(*, clock: Clock | None = None, lifetime: int = 3600) -> AsyncIterator[FakeEntra]:
    """Serve on a free loopback port until the block is left: token endpoint, metadata service, App Service."""
    async with serving(FakeEntra(clock=clock or Clock(), lifetime=lifetime)) as fake:
        yield fake


def _configuration(tenant: str) -> Scripted:
    """What Microsoft's own libraries read first; they insist on https, which then ends in front of this server."""
    return Scripted(
        body={
            "issuer": f"{tenant}/v2.0",
            "authorization_endpoint": f"{tenant}/oauth2/v2.0/authorize",
            "token_endpoint": f"{tenant}/oauth2/v2.0/token",
        }
    )


def _out_of_scope(application: Application, scope: str) -> Scripted | None:
    if not scope.endswith("/.default"):
        return _aadsts(400, "invalid_scope", 1002012, f"The provided value for scope {scope} is not valid.")
    resource = scope.removesuffix("/.default")
    if resource not in application.resources:
        return _aadsts(400, "invalid_resource", 500011, f"The resource principal named {resource} was not found.")
    return None


def _aadsts(status: int, error: str, number: int, wording: str) -> Scripted:
    body = {
        "error": error,
        "error_description": f"AADSTS{number}: {wording} Trace ID: 00000000-0000-4000-8000-00000000ace1",
        "error_codes": [number],
    }
    return Scripted(status, body=body)


def _plain(status: int, error: str, wording: str) -> Scripted:
    return Scripted(status, body={"error": error, "error_description": wording})


def _packed(raw: bytes) -> str:
    return urlsafe_b64encode(raw).decode().rstrip("=")
