"""The settings of the provider `azure_openai`."""

from __future__ import annotations

import re
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from attrs import field, frozen, validators

from qlens import Network, Secret, header_value, http_url, path_patterns

if TYPE_CHECKING:
    from attrs import Attribute

LOGIN = "https://login.microsoftonline.com"
AKS_TOKEN_FILE = Path("/var/run/secrets/azure/tokens/azure-identity-token")
INSTANCE_METADATA = "http://169.254.169.254"

_TENANT = re.compile(r"[\w.-]+", re.ASCII)


def _resource(config: object, attribute: Attribute[str], value: str) -> None:
    http_url(config, attribute, value)
    if re.search(r"/openai(/v1)?/?$", value):
        raise ValueError("must not end in /openai or /openai/v1: the path is added by the surface")


def _authority(config: object, attribute: Attribute[str], value: str) -> None:
    http_url(config, attribute, value)
    parts = urlsplit(value)
    if parts.scheme != "https" and not _is_loopback(parts.hostname or ""):
        raise ValueError("must begin with https://: a credential is sent there")


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def _tenant(_config: object, _attribute: object, value: str) -> None:
    if not _TENANT.fullmatch(value):
        raise ValueError(f"{value!r} is no tenant: its id, or one of its domains")


def _said(_config: object, _attribute: object, value: Any) -> None:
    if not (value.reveal() if isinstance(value, Secret) else value).strip():
        raise ValueError("must not be empty")


def _scope(_config: object, _attribute: object, value: str | None) -> None:
    if value is not None and not re.fullmatch(r"https://\S+/\.default", value):
        raise ValueError("must be the resource with /.default at its end: https://cognitiveservices.azure.com/.default")


def _one_credential(config: AzureOpenAIConfig, _attribute: object, value: Identity | None) -> None:
    if config.api_key is None and value is None:
        raise ValueError("a credential is missing: set api_key or identity")
    if config.api_key is not None and value is not None:
        raise ValueError("set api_key or identity, not both")


def _one_identity(config: ManagedIdentity | AppServiceIdentity, _attribute: object, _value: Any) -> None:
    if sum(name is not None for name in (config.client_id, config.object_id, config.resource_id)) > 1:
        raise ValueError("client_id, object_id and resource_id each name the identity: set one of them")


@frozen
class ClientCredentials:
    """A service principal with a secret."""

    kind: Literal["client_credentials"] = "client_credentials"
    """Tokens for a client id and its secret."""
    tenant_id: str = field(kw_only=True, validator=_tenant)
    """The Entra tenant: its id, or one of its domains."""
    client_id: str = field(kw_only=True, validator=_said)
    """The application's (client) id."""
    client_secret: Secret = field(kw_only=True, validator=_said)
    """One of the application's secrets."""
    authority: str = field(default=LOGIN, kw_only=True, validator=_authority)
    """Entra's address; another one for national clouds."""


@frozen
class WorkloadIdentity:
    """A Kubernetes service account that Entra trusts (AKS workload identity)."""

    kind: Literal["workload_identity"] = "workload_identity"
    """Tokens for the service account's own token."""
    tenant_id: str = field(kw_only=True, validator=_tenant)
    """The Entra tenant; AKS sets AZURE_TENANT_ID."""
    client_id: str = field(kw_only=True, validator=_said)
    """The client id of the identity that trusts the service account; AKS sets AZURE_CLIENT_ID."""
    token_file: Path = field(default=AKS_TOKEN_FILE, kw_only=True)
    """Where the service account's token is; it is read again for each token, because it changes."""
    authority: str = field(default=LOGIN, kw_only=True, validator=_authority)
    """Entra's address; another one for national clouds."""


@frozen
class ManagedIdentity:
    """The identity of the virtual machine or the node that the gateway runs on."""

    kind: Literal["managed_identity"] = "managed_identity"
    """Tokens of the instance metadata service."""
    client_id: str | None = field(default=None, kw_only=True)
    """The client id of a user-assigned identity; without any of the three ids it is the system-assigned one."""
    object_id: str | None = field(default=None, kw_only=True)
    """The object id of a user-assigned identity."""
    resource_id: str | None = field(default=None, kw_only=True, validator=_one_identity)
    """The Azure resource id of a user-assigned identity."""
    endpoint: str = field(default=INSTANCE_METADATA, kw_only=True, validator=http_url)
    """The address of the metadata service."""


@frozen
class AppServiceIdentity:
    """The identity of an App Service, a Function or a Container App."""

    kind: Literal["app_service_identity"] = "app_service_identity"
    """Tokens of the service's own endpoint."""
    endpoint: str = field(kw_only=True, validator=http_url)
    """Where tokens are asked for: `${IDENTITY_ENDPOINT}`."""
    header: Secret = field(kw_only=True, validator=header_value, metadata={"lasting": False})
    """What proves that the request comes from inside: `${IDENTITY_HEADER}`."""
    client_id: str | None = field(default=None, kw_only=True)
    """The client id of a user-assigned identity; without any of the three ids it is the system-assigned one."""
    object_id: str | None = field(default=None, kw_only=True)
    """The object id of a user-assigned identity."""
    resource_id: str | None = field(default=None, kw_only=True, validator=_one_identity)
    """The Azure resource id of a user-assigned identity."""


Identity = ClientCredentials | WorkloadIdentity | ManagedIdentity | AppServiceIdentity


@frozen
class AzureOpenAIConfig:
    """Sends calls to the deployments of an Azure OpenAI resource."""

    endpoint: str = field(validator=_resource)
    """The resource's address: `https://NAME.openai.azure.com`."""
    api_key: Secret | None = field(default=None, validator=header_value)
    """One of the resource's two keys, sent as `api-key`; or set `identity`."""
    identity: ClientCredentials | WorkloadIdentity | ManagedIdentity | AppServiceIdentity | None = field(
        default=None, validator=_one_credential
    )
    """Who the gateway is to Entra, whose tokens are then sent instead of a key."""
    scope: str | None = field(default=None, validator=_scope)
    """What tokens are for: `https://cognitiveservices.azure.com/.default`, on v1 `https://ai.azure.com/.default`."""
    surface: Literal["classic", "v1"] = "classic"
    """Which of Azure's two APIs to use: `classic` has the deployment in the path, `v1` as the body's model."""
    api_version: str | None = None
    """The query parameter `api-version`. If it is not set: on the classic surface 2024-10-21, or 2025-04-01-preview for
    what that lacks; on v1 none."""
    unsupported: Literal["drop", "reject"] = "drop"
    """What happens to a field that a reasoning model does not have: it is left out, or the call is refused."""
    stream_options: bool = True
    """Ask streams for their usage; false for api-versions that refuse the field `stream_options`."""
    passthrough: tuple[str, ...] = field(default=(), validator=path_patterns)
    """What clients may ask of the resource as it is, at `/v1/providers/{name}/...`: `GET /models`, `POST /evals/**`. It
    runs auth and limits, is billed by what the answer says it used, and objects there belong to all tenants."""
    network: Network | None = None
    """How Azure is reached, where it is not as `server.network` says."""
    connect_seconds: float = field(default=5.0, validator=validators.gt(0))
    """How long a connection may take to open."""
    first_byte_seconds: float = field(default=120.0, validator=validators.gt(0))
    """How long Azure may think before the first byte of its answer."""
    idle_seconds: float = field(default=60.0, validator=validators.gt(0))
    """How long Azure may pause within its answer."""

    @property
    def token_scope(self) -> str:
        """The scope in use."""
        surface = "cognitiveservices" if self.surface == "classic" else "ai"
        return self.scope or f"https://{surface}.azure.com/.default"
