"""Asks identity services for tokens: Entra, the metadata service of a machine, the endpoint of an App Service.

https://learn.microsoft.com/entra/identity-platform/v2-oauth2-client-creds-grant-flow
https://learn.microsoft.com/entra/identity/managed-identities-azure-resources/how-to-use-vm-token
https://learn.microsoft.com/azure/app-service/overview-managed-identity
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, assert_never
from urllib.parse import urlencode

import orjson
from attrs import field, frozen

from qlens import Answer, Deadlines, Upstream, UpstreamAuth, UpstreamError, UpstreamUnavailable
from qlens_plugins.provider.azure_openai.settings import (
    AppServiceIdentity,
    ClientCredentials,
    Identity,
    ManagedIdentity,
    WorkloadIdentity,
)
from qlens_plugins.provider.azure_openai.tokens import Grant

log = logging.getLogger("qlens.azure_openai")

JWT_BEARER = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"

_DEADLINES = Deadlines(connect_seconds=5, first_byte_seconds=10, idle_seconds=10)
_ANSWER_BYTES = 64 * 1024
_PAUSES = (0.2, 0.5, 1)
# The metadata service may be away for as long as 70 s while a machine is updated.
_METADATA_PAUSES = (0.5, 1, 2, 4, 8, 16, 32, 8)
_LONGEST_PAUSE = 10.0
_FORM = "application/x-www-form-urlencoded"
_TOKEN = re.compile(r"[!-~]+")
_CODE = re.compile(r"AADSTS\d+")


@frozen
class _Question:
    method: str
    url: str
    headers: Mapping[str, str] = field(repr=False)
    body: bytes | None = field(default=None, repr=False)


async def fetch(http: Upstream, provider: str, identity: Identity, scope: str, wall: Callable[[], float]) -> Grant:
    """A new token; raises UpstreamAuth when the service refuses the identity, else UpstreamUnavailable.

    What a service says of a refusal goes into the log by its code alone: its wording names tenants and applications.
    """
    question = await _question(provider, identity, scope)
    metadata = isinstance(identity, ManagedIdentity)
    for pause in (*(_METADATA_PAUSES if metadata else _PAUSES), None):
        wanted = 0.0
        try:
            answer = await http.open(
                question.method, question.url, headers=question.headers, body=question.body, deadlines=_DEADLINES
            )
            said = await _json(answer)
        except UpstreamError as error:
            reason = error.message
        else:
            if answer.status == 200:
                return _grant(provider, said, wall())
            reason = _named(answer.status, said)
            if not _may_pass(answer.status, metadata):
                log.error("%s: no token: the identity was refused: %s", provider, reason)
                raise UpstreamAuth("The gateway's identity was refused a token for the provider.")
            wanted = _seconds(answer.headers.get("retry-after")) or 0.0
        if pause is None:
            break
        await asyncio.sleep(max(pause, min(wanted, _LONGEST_PAUSE)))
    log.error("%s: no token: %s", provider, reason)
    raise UpstreamUnavailable("The gateway could not get a token for the provider.")


def _may_pass(status: int, metadata: bool) -> bool:
    return status == 429 or status >= 500 or (metadata and status in {404, 410})


async def _question(provider: str, identity: Identity, scope: str) -> _Question:
    match identity:
        case ClientCredentials():
            secret = {"client_secret": identity.client_secret.reveal()}
            return _entra(identity.authority, identity.tenant_id, identity.client_id, scope, secret)
        case WorkloadIdentity():
            assertion = await _assertion(provider, identity.token_file)
            proof = {"client_assertion_type": JWT_BEARER, "client_assertion": assertion}
            return _entra(identity.authority, identity.tenant_id, identity.client_id, scope, proof)
        case ManagedIdentity():
            query = {"api-version": "2018-02-01", "resource": _resource(scope)}
            query |= _named_by(identity, object_id="object_id", resource_id="msi_res_id")
            url = f"{identity.endpoint.rstrip('/')}/metadata/identity/oauth2/token"
            return _Question("GET", f"{url}?{urlencode(query)}", {"metadata": "true"})
        case AppServiceIdentity():
            query = {"api-version": "2019-08-01", "resource": _resource(scope)}
            query |= _named_by(identity, object_id="principal_id", resource_id="mi_res_id")
            headers = {"x-identity-header": identity.header.reveal()}
            return _Question("GET", f"{identity.endpoint}?{urlencode(query)}", headers)
        case _:
            assert_never(identity)


def _entra(authority: str, tenant: str, client_id: str, scope: str, proof: Mapping[str, str]) -> _Question:
    form = {"grant_type": "client_credentials", "client_id": client_id, "scope": scope, **proof}
    url = f"{authority.rstrip('/')}/{tenant}/oauth2/v2.0/token"
    return _Question("POST", url, {"content-type": _FORM, "accept": "application/json"}, urlencode(form).encode())


async def _assertion(provider: str, file: Path) -> str:
    try:
        text = await asyncio.to_thread(file.read_text)
    except (OSError, UnicodeDecodeError) as error:
        log.error("%s: no token: the service account's token cannot be read: %s", provider, type(error).__name__)
        raise UpstreamAuth("The gateway could not read its own identity for the provider.") from None
    return text.strip()


def _resource(scope: str) -> str:
    return scope.removesuffix("/.default")


def _named_by(identity: ManagedIdentity | AppServiceIdentity, *, object_id: str, resource_id: str) -> dict[str, str]:
    names = {"client_id": identity.client_id, object_id: identity.object_id, resource_id: identity.resource_id}
    return {name: value for name, value in names.items() if value is not None}


# --- the answer ---------------------------------------------------------------------------------


async def _json(answer: Answer) -> Mapping[str, Any]:
    raw = await answer.read(_ANSWER_BYTES)
    try:
        said = orjson.loads(raw)
    except orjson.JSONDecodeError:
        return {}
    return said if isinstance(said, dict) else {}


def _named(status: int, said: Mapping[str, Any]) -> str:
    """What is safe to log of an error: its status, its kind, its AADSTS number."""
    kind, wording = said.get("error"), said.get("error_description")
    code = _CODE.match(wording) if isinstance(wording, str) else None
    shown = [f"status {status}"]
    if isinstance(kind, str) and re.fullmatch(r"[a-z_]{1,40}", kind):
        shown.append(kind)
    if code is not None:
        shown.append(code[0])
    return ", ".join(shown)


def _grant(provider: str, said: Mapping[str, Any], wall: float) -> Grant:
    value, lifetime = said.get("access_token"), _seconds(said.get("expires_in"))
    if lifetime is None and (ends := _seconds(said.get("expires_on"))) is not None:
        lifetime = ends - wall
    if not isinstance(value, str) or not _TOKEN.fullmatch(value) or lifetime is None or lifetime <= 0:
        log.error("%s: no token: the identity service answered without one", provider)
        raise UpstreamUnavailable("The gateway could not get a token for the provider.")
    return Grant(value, lifetime, _seconds(said.get("refresh_in")))


def _seconds(value: object) -> float | None:
    """Seconds as a number or a text: the services write both."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        seconds = float(value)
    except ValueError:
        return None
    return seconds if 0 < seconds < 1e11 else None
