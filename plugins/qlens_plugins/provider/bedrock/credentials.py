"""What proves to Bedrock who asks: a bearer key, or an access key that signs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Protocol

from attrs import define, field

from qlens import UpstreamAuth
from qlens_plugins.provider.bedrock.settings import BedrockConfig
from qlens_plugins.provider.bedrock.signing import Keys, Proof, Signer, bearer

BEARER_VARIABLE = "AWS_BEARER_TOKEN_BEDROCK"


@define(eq=False)
class Bearer:
    """A Bedrock API key."""

    _key: str = field(repr=False)

    def prove(self, host: str, path: str, body: bytes, accept: str, own: Mapping[str, str]) -> Proof:
        """The headers of a request."""
        return bearer(self._key, host, accept, own)

    async def renew(self, refused: Proof) -> bool:
        """There is no other key."""
        return False


class Source(Protocol):
    """Has the access key of the moment."""

    @property
    def keys(self) -> Keys | None:
        """The access key; None when there is none."""

    async def renew(self) -> bool:
        """Get a fresh one now; False when it is the same or there is none."""


@define(eq=False)
class Fixed:
    """An access key that the configuration holds."""

    keys: Keys | None = field(repr=False)

    async def renew(self) -> bool:
        """There is no other key."""
        return False


@define(eq=False)
class Signed:
    """Signs with the access key of the moment."""

    signer: Signer
    source: Source

    def prove(self, host: str, path: str, body: bytes, accept: str, own: Mapping[str, str]) -> Proof:
        """The headers of a request; raises UpstreamAuth while no access key was found."""
        keys = self.source.keys
        if keys is None:
            raise UpstreamAuth("The gateway has no credentials for AWS.")
        return self.signer.sign(keys, host, path, body, accept, own=own)

    async def renew(self, refused: Proof) -> bool:
        """Get a fresh access key, unless there is another one than that of the refused request already."""
        keys = self.source.keys
        if keys is not None and f"Credential={keys.access_key}/" not in refused.authorization:
            return True
        return await self.source.renew()


def bearer_of(config: BedrockConfig) -> str | None:
    """The Bedrock API key, of the configuration or else of the environment; None when another credential is set."""
    if config.api_key is not None:
        return config.api_key.reveal()
    if config.access_key_id or config.profile or config.role_arn:
        return None
    return os.environ.get(BEARER_VARIABLE) or None


def fixed_of(config: BedrockConfig) -> Keys | None:
    """The access key that the configuration holds."""
    if config.access_key_id is None or config.secret_access_key is None:
        return None
    token = config.session_token.reveal() if config.session_token else None
    return Keys(config.access_key_id, config.secret_access_key.reveal(), token)
