"""Azure OpenAI, on its classic surface (a deployment in the path) and on v1 (the deployment as the model)."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import quote

from attrs import define, field, frozen, validators

from qlens import (
    Deadlines,
    Gateway,
    Mend,
    Outgoing,
    Reply,
    Secret,
    Target,
    Upstream,
    header_value,
    hookimpl,
    http_url,
    post_openai,
)

if TYPE_CHECKING:
    from attrs import Attribute

PATHS = {"chat": "chat/completions", "completions": "completions", "embeddings": "embeddings"}

# o1, o3-mini, gpt-5, gpt-5.1-codex, gpt-12, but not gpt-4o, and not gpt-35-turbo, which is how Azure writes 3.5.
_REASONING = re.compile(r"(o\d+|gpt-(?!35\b)([5-9]|[1-9]\d)(\.\d+)?)(-.*)?")


def _resource(config: object, attribute: Attribute[str], value: str) -> None:
    http_url(config, attribute, value)
    if re.search(r"/openai(/v1)?/?$", value):
        raise ValueError("must not end in /openai or /openai/v1: the path is added by the surface")


@frozen
class AzureOpenAIConfig:
    """Sends calls to the deployments of an Azure OpenAI resource."""

    endpoint: str = field(validator=_resource)
    """The resource's address: `https://NAME.openai.azure.com`."""
    api_key: Secret = field(validator=header_value)
    """One of the resource's two keys; sent as `api-key`."""
    surface: Literal["classic", "v1"] = "classic"
    """Which of Azure's two APIs to use: `classic` has the deployment in the path, `v1` as the body's model."""
    api_version: str | None = None
    """The query parameter `api-version`: on the classic surface 2024-10-21 if it is not set, on v1 left out."""
    stream_options: bool = True
    """Ask streams for their usage; false for api-versions that refuse the field `stream_options`."""
    connect_seconds: float = field(default=5.0, validator=validators.gt(0))
    """How long a connection may take to open."""
    first_byte_seconds: float = field(default=120.0, validator=validators.gt(0))
    """How long Azure may think before the first byte of its answer."""
    idle_seconds: float = field(default=60.0, validator=validators.gt(0))
    """How long Azure may pause within its answer."""


@define(eq=False)
class AzureOpenAI:
    """Sends a call to a deployment; a target's `model` is the deployment, its `base_model` what stands behind it."""

    config: AzureOpenAIConfig
    name: str
    _http: Upstream | None = field(default=None, init=False, repr=False)
    _headers: Mapping[str, str] = field(init=False, repr=False)
    _deadlines: Deadlines = field(init=False, repr=False)

    Config = AzureOpenAIConfig

    def __attrs_post_init__(self) -> None:
        config = self.config
        self._headers = {"api-key": config.api_key.reveal()}
        self._deadlines = Deadlines(config.connect_seconds, config.first_byte_seconds, config.idle_seconds)

    def dialects(self, target: Target) -> tuple[str, ...]:
        """The dialects spoken for a target: v1 has no completions."""
        return tuple(PATHS) if self.config.surface == "classic" else ("chat", "embeddings")

    @hookimpl
    @asynccontextmanager
    async def lifespan(self, gateway: Gateway) -> AsyncIterator[None]:
        """Take the gateway's connections."""
        self._http = gateway.http
        yield

    @hookimpl
    async def send(self, target: Target, outgoing: Outgoing) -> Reply:
        """Post the body to the target's deployment."""
        assert self._http is not None, "the lifespan is not open"
        if outgoing.dialect == "chat" and target.base_model and _REASONING.fullmatch(target.base_model.lower()):
            _rename_max_tokens(outgoing.body)
        return await post_openai(
            self._http,
            self._url(target.model, PATHS[outgoing.dialect]),
            headers=self._headers,
            outgoing=outgoing,
            deadlines=self._deadlines,
            ask_usage=self.config.stream_options,
            mend=Mend(b"content_filter_offsets", _add_deltas),
        )

    def _url(self, deployment: str, path: str) -> str:
        endpoint, version = self.config.endpoint.rstrip("/"), self.config.api_version
        if self.config.surface == "classic":
            place = f"{endpoint}/openai/deployments/{quote(deployment, safe='')}/{path}"
            version = version or "2024-10-21"
        else:
            place = f"{endpoint}/openai/v1/{path}"
        return f"{place}?api-version={quote(version, safe='')}" if version else place


def _rename_max_tokens(body: dict[str, Any]) -> None:
    """Reasoning models refuse max_tokens, which most clients still send."""
    limit = body.pop("max_tokens", None)
    if limit is not None:
        body.setdefault("max_completion_tokens", limit)


def _add_deltas(event: dict[str, Any]) -> None:
    """Results of the asynchronous content filter come as choices without the delta that clients read."""
    choices = event.get("choices")
    for choice in choices if isinstance(choices, list) else []:
        if isinstance(choice, dict):
            choice.setdefault("delta", {})
