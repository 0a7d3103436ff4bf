"""The settings of the provider `bedrock`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from attrs import field, frozen, validators

from qlens import Network, Secret, header_value, http_url, path_patterns

if TYPE_CHECKING:
    from attrs import Attribute

_REGION = re.compile(r"[a-z]{2,4}(-[a-z]+)+-\d{1,2}")


def _region(_config: object, _attribute: object, value: str | None) -> None:
    if value is not None and not _REGION.fullmatch(value):
        raise ValueError(f"{value!r} is no region of AWS: us-east-1, say")


def _optional_url(config: object, attribute: object, value: str | None) -> None:
    if value is not None:
        http_url(config, attribute, value)


def _together(config: BedrockConfig, _attribute: object, value: Secret | None) -> None:
    if (config.access_key_id is None) != (value is None):
        raise ValueError("access_key_id and secret_access_key belong together: set both or none")


def _needs_role(config: BedrockConfig, attribute: Attribute[Any], value: Any) -> None:
    if value is not None and config.role_arn is None:
        raise ValueError(f"has no meaning without role_arn: set {attribute.name} beside a role")


def _posts(config: BedrockConfig, _attribute: object, value: tuple[str, ...]) -> None:
    if any(not pattern.startswith("POST ") for pattern in value):
        raise ValueError("must list requests that POST, as in 'POST /model/*/converse': no others pass")
    if value and config.guardrail is not None:
        raise ValueError("lets requests pass beside the guardrail: leave one of them out")


@frozen
class GuardrailSettings:
    """A guardrail of Bedrock that every chat and every image to be made passes."""

    id: str = field(validator=header_value)
    """The guardrail's id or ARN."""
    version: str = field(default="DRAFT", validator=header_value)
    """Its version: a number, or DRAFT."""
    stream: Literal["sync", "async"] = "sync"
    """Whether a stream waits for the guardrail (sync), or may show text before it is checked (async)."""


@frozen
class BedrockConfig:
    """Sends calls to AWS Bedrock: chat by Converse for every family of models, embeddings by InvokeModel."""

    region: str | None = field(default=None, validator=_region)
    """The AWS region; left out, it is AWS_REGION, AWS_DEFAULT_REGION or the profile's."""
    endpoint: str | None = field(default=None, validator=_optional_url)
    """The address of Bedrock's runtime, for a VPC endpoint; left out, it is AWS_ENDPOINT_URL_BEDROCK_RUNTIME,
    AWS_ENDPOINT_URL or the region's."""
    fips: bool = False
    """Use the FIPS endpoint of the region."""
    api_key: Secret | None = field(default=None, validator=header_value)
    """A Bedrock API key, sent as bearer; AWS_BEARER_TOKEN_BEDROCK is used when no credential is set here."""
    access_key_id: str | None = field(default=None, validator=header_value)
    """An access key; left out, AWS's chain finds one: environment, profile, SSO, web identity, container, instance."""
    secret_access_key: Secret | None = field(default=None, validator=_together)
    """The access key's secret."""
    session_token: Secret | None = field(default=None, validator=header_value)
    """The session token of a temporary access key."""
    profile: str | None = None
    """A profile of the AWS configuration files."""
    role_arn: str | None = None
    """A role to assume with the credentials found; it is assumed anew long before its session ends."""
    external_id: str | None = field(default=None, validator=_needs_role)
    """The external id that the role asks for."""
    role_session_name: str = "qlens"
    """The name of the role's sessions in AWS's logs."""
    role_seconds: int | None = field(
        default=None, validator=validators.optional([validators.ge(900), validators.le(43200)])
    )
    """How long a session of the role lasts; left out, an hour."""
    web_identity_token_file: Path | None = field(default=None, validator=_needs_role)
    """A file with a token for which STS gives a session of the role; it is read again each time."""
    sts_endpoint: str | None = field(default=None, validator=_optional_url)
    """The address of STS, for a VPC endpoint; else it follows from the region."""
    guardrail: GuardrailSettings | None = None
    """A guardrail for chats and images; clients can then choose none of their own. Embeddings and rerank pass none."""
    fetch_images: bool = False
    """Fetch images that clients name by an https URL, from public addresses only; else they are refused."""
    unsupported: Literal["drop", "reject"] = "drop"
    """Whether a field that Bedrock has no equal of (seed, penalties, ...) is left out, or the call refused."""
    network: Network | None = None
    """How Bedrock is reached, where it is not as `server.network` says. AWS's own
    credential chain goes through the same proxy, with the system's certificates."""
    passthrough: tuple[str, ...] = field(default=(), validator=[path_patterns, _posts])
    """What clients may ask of the runtime as it is, at `/v1/providers/{name}/...`: `POST /model/*/converse`. It runs
    auth and limits, and is billed by the tokens that the answer tells."""
    connect_seconds: float = field(default=5.0, validator=validators.gt(0))
    """How long a connection may take to open."""
    first_byte_seconds: float = field(default=120.0, validator=validators.gt(0))
    """How long Bedrock may think before the first byte of its answer."""
    idle_seconds: float = field(default=60.0, validator=validators.gt(0))
    """How long Bedrock may pause within its answer."""
