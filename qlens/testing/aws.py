"""A real HTTP server that gives out AWS credentials: STS, instance metadata, container, SSO; needs qlens[bedrock]."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import parse_qs
from uuid import uuid4
from xml.sax.saxutils import escape

from attrs import define, field

from qlens.testing.aws_signature import Identities, Identity
from qlens.testing.upstreams import FakeUpstream, Recorded, Scripted, serving

WEB_TOKEN = "example-web-identity-token"  # noqa: S105 - known to everybody
CONTAINER_TOKEN = "example-container-token"  # noqa: S105
SSO_TOKEN = "example-sso-token"  # noqa: S105
ROLE = "arn:aws:iam::123456789012:role/example"
SSO_CLIENT = {"clientId": "example-client", "clientSecret": "example-client-secret"}
"""The client that a token of single sign-on is kept with, which may renew it."""
SSO_REFRESH_TOKEN = "example-sso-refresh-token"  # noqa: S105

_ECS = "/v2/credentials/"
_META = "/latest/meta-data/iam/security-credentials/"
_STS = "https://sts.amazonaws.com/doc/2011-06-15/"


@define(eq=False)
class FakeAws(FakeUpstream):
    """A running server; made by `aws()`. What it gives out is known to `identities`, until it expires."""

    region: str = "us-east-1"
    identities: Identities = field(factory=Identities)
    seconds: float = 3600
    """How long what it gives out is good."""
    external_id: str | None = None
    """What AssumeRole must know."""
    issued: list[Identity] = field(factory=list)
    """What was given out so far."""
    asked: list[Mapping[str, str]] = field(factory=list)
    """The parameters of calls of STS so far."""
    container_token: str = CONTAINER_TOKEN
    """What the container's endpoint wants to see; at EKS it is a file's, which changes."""
    sso_tokens: set[str] = field(factory=lambda: {SSO_TOKEN})
    """The access tokens of single sign-on that are good."""
    _sessions: set[str] = field(factory=set)

    @property
    def container_url(self) -> str:
        """For AWS_CONTAINER_CREDENTIALS_FULL_URI."""
        return f"{self.root}/credentials"

    @property
    def container_path(self) -> str:
        """For AWS_CONTAINER_CREDENTIALS_RELATIVE_URI, as ECS has it: no token is wanted there."""
        return f"{_ECS}00000000-example"

    def _usual(self, request: Recorded) -> Scripted:
        if request.method == "PUT" and request.path == "/latest/api/token":
            return self._session(request)
        if request.path.startswith(_META):
            return self._instance(request)
        if request.path == "/credentials" or request.path.startswith(_ECS):
            return self._container(request)
        if request.path == "/federation/credentials":
            return self._sso(request)
        if request.path == "/token":
            return self._sso_token(request)
        return self._sts(request)

    # --- where AWS has it ----------------------------------------------------------------------

    def _session(self, request: Recorded) -> Scripted:
        if "x-aws-ec2-metadata-token-ttl-seconds" not in request.headers:
            return Scripted(400)
        token = uuid4().hex
        self._sessions.add(token)
        return Scripted(body=token.encode())

    def _instance(self, request: Recorded) -> Scripted:
        if request.headers.get("x-aws-ec2-metadata-token") not in self._sessions:
            return Scripted(401)
        if request.path == _META:
            return Scripted(body=b"example-instance-role")
        return Scripted(body={"Code": "Success", "Type": "AWS-HMAC", **self._as_json(self.issue())})

    def _container(self, request: Recorded) -> Scripted:
        wanted = None if request.path.startswith(_ECS) else self.container_token
        if request.headers.get("authorization") != wanted:
            return Scripted(401)
        return Scripted(body={"RoleArn": ROLE, **self._as_json(self.issue())})

    def _sso(self, request: Recorded) -> Scripted:
        if request.headers.get("x-amz-sso_bearer_token") not in self.sso_tokens:
            return Scripted(401, {"x-amzn-errortype": "UnauthorizedException"}, body={"message": "no session"})
        if {"role_name", "account_id"} - request.query.keys():
            message = {"message": "role_name and account_id are required"}
            return Scripted(400, {"x-amzn-errortype": "InvalidRequestException"}, body=message)
        identity = self.issue()
        assert identity.expires_at is not None
        given = {
            "accessKeyId": identity.access_key,
            "secretAccessKey": identity.secret_key,
            "sessionToken": identity.token,
            "expiration": int(identity.expires_at * 1000),
        }
        return Scripted(body={"roleCredentials": given})

    def _sso_token(self, request: Recorded) -> Scripted:
        """CreateToken of the OpenID Connect service beside the portal, by a refresh token."""
        wanted = {**SSO_CLIENT, "grantType": "refresh_token", "refreshToken": SSO_REFRESH_TOKEN}
        if request.body != wanted:
            return Scripted(400, {"x-amzn-errortype": "InvalidGrantException"}, body={"error": "invalid_grant"})
        token = f"sso-{uuid4().hex}"
        self.sso_tokens.add(token)
        return Scripted(body={"accessToken": token, "tokenType": "Bearer", "expiresIn": 28_800})

    def _sts(self, request: Recorded) -> Scripted:
        form = {name: values[0] for name, values in parse_qs(request.content.decode()).items()}
        self.asked.append(form)
        action = form.get("Action")
        if action == "AssumeRole":
            if refusal := self.identities.refusal(request, "sts", self.region):
                return _sts_error(refusal.status, refusal.name, refusal.message)
            if self.external_id is not None and form.get("ExternalId") != self.external_id:
                return _sts_error(403, "AccessDenied", f"not authorized to perform: sts:AssumeRole on {ROLE}")
        elif action != "AssumeRoleWithWebIdentity":
            return _sts_error(400, "InvalidAction", "no such action")
        elif form.get("WebIdentityToken") != WEB_TOKEN:
            return _sts_error(400, "InvalidIdentityToken", "the token is not one of ours")
        return _sts_answer(str(action), form, self._as_json(self.issue()))

    # --- what it gives out ---------------------------------------------------------------------

    def issue(self) -> Identity:
        """Give out an access key with a session token."""
        number = uuid4().hex
        identity = Identity(
            f"ASIA{number[:16].upper()}", number, f"token-{number}", self.identities.clock() + self.seconds
        )
        self.issued.append(identity)
        return self.identities.add(identity)

    @staticmethod
    def _as_json(identity: Identity) -> dict[str, Any]:
        return {
            "AccessKeyId": identity.access_key,
            "SecretAccessKey": identity.secret_key,
            "Token": identity.token,
            "Expiration": _iso(identity.expires_at),
        }


@asynccontextmanager
async def aws(region: str = "us-east-1", identities: Identities | None = None) -> AsyncIterator[FakeAws]:
    """Serve on a free loopback port until the block is left; share `identities` with a fake Bedrock."""
    async with serving(FakeAws(region=region, identities=identities or Identities())) as fake:
        yield fake


def _iso(seconds: float | None) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def _sts_answer(action: str, form: Mapping[str, str], given: Mapping[str, str]) -> Scripted:
    fields = {name if name != "Token" else "SessionToken": value for name, value in given.items()}
    inner = "".join(f"<{name}>{escape(value)}</{name}>" for name, value in fields.items())
    user = f"{form['RoleArn'].replace('iam', 'sts').replace('role/', 'assumed-role/')}/{form['RoleSessionName']}"
    text = (
        f'<{action}Response xmlns="{_STS}"><{action}Result><AssumedRoleUser><Arn>{escape(user)}</Arn>'
        f"<AssumedRoleId>AROAEXAMPLE:{escape(form['RoleSessionName'])}</AssumedRoleId></AssumedRoleUser>"
        f"<Credentials>{inner}</Credentials></{action}Result></{action}Response>"
    )
    return Scripted(body=text.encode(), headers={"content-type": "text/xml"})


def _sts_error(status: int, code: str, message: str) -> Scripted:
    text = (
        f'<ErrorResponse xmlns="{_STS}"><Error><Type>Sender</Type><Code>{code}</Code>'
        f"<Message>{escape(message)}</Message></Error><RequestId>example</RequestId></ErrorResponse>"
    )
    return Scripted(status, body=text.encode(), headers={"content-type": "text/xml"})
