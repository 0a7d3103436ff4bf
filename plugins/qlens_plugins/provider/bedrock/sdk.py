"""AWS's SDK, imported only by those who need its chain; everything here blocks now and then."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from qlens import StartupError
from qlens_plugins.provider.bedrock.credentials import fixed_of
from qlens_plugins.provider.bedrock.settings import BedrockConfig

_NEEDS_SDK = (
    "AWS's credential chain needs the package aiobotocore: install qlens[bedrock], "
    "or set api_key, or access_key_id and secret_access_key without a role"
)


def session_of(config: BedrockConfig, proxy: str | None = None) -> Any:
    """A session of AWS's SDK; blocks while it is imported. Raises StartupError when it is not installed.

    Without a proxy the SDK takes the environment's.
    """
    try:
        from aiobotocore.config import AioConfig
        from aiobotocore.session import AioSession
    except ImportError:
        raise StartupError(_NEEDS_SDK) from None
    session = AioSession(profile=config.profile)
    proxies = None if proxy is None else {"http": proxy, "https": proxy}
    session.set_default_client_config(AioConfig(connect_timeout=5, read_timeout=20, proxies=proxies))
    return session


def region_of(config: BedrockConfig) -> str | None:
    """The region of the profile; blocks."""
    region = session_of(config).get_config_variable("region")
    return region if isinstance(region, str) else None


async def find(config: BedrockConfig, region: str, proxy: str | None) -> Any:
    """Go through the chain with a new session: the configuration's access key or AWS's own search, then the role."""
    session = session_of(config, proxy)
    if config.web_identity_token_file is not None:
        return _web_identity(session, config, region)
    keys = fixed_of(config)
    if keys is not None:
        session.set_credentials(keys.access_key, keys.secret_key, keys.token)
    found = await session.get_credentials()
    if found is None or config.role_arn is None:
        return found
    return _assumed(session, config, region, found)


def _client_creator(session: Any, config: BedrockConfig, region: str) -> Callable[..., Any]:
    return partial(session.create_client, region_name=region, endpoint_url=config.sts_endpoint)


def _role_arguments(config: BedrockConfig) -> dict[str, Any]:
    given = {
        "RoleSessionName": config.role_session_name,
        "ExternalId": config.external_id,
        "DurationSeconds": config.role_seconds,
    }
    return {name: value for name, value in given.items() if value is not None}


def _assumed(session: Any, config: BedrockConfig, region: str, source: Any) -> Any:
    from aiobotocore.credentials import AioAssumeRoleCredentialFetcher, AioDeferredRefreshableCredentials

    fetcher = AioAssumeRoleCredentialFetcher(
        client_creator=_client_creator(session, config, region),
        source_credentials=source,
        role_arn=config.role_arn,
        extra_args=_role_arguments(config),
    )
    return AioDeferredRefreshableCredentials(method="assume-role", refresh_using=fetcher.fetch_credentials)


def _web_identity(session: Any, config: BedrockConfig, region: str) -> Any:
    from aiobotocore.credentials import (
        AioAssumeRoleWithWebIdentityCredentialFetcher,
        AioDeferredRefreshableCredentials,
    )

    path = config.web_identity_token_file
    assert path is not None
    fetcher = AioAssumeRoleWithWebIdentityCredentialFetcher(
        client_creator=_client_creator(session, config, region),
        web_identity_token_loader=lambda: path.read_text().strip(),
        role_arn=config.role_arn,
        extra_args={name: value for name, value in _role_arguments(config).items() if name != "ExternalId"},
    )
    method = "assume-role-with-web-identity"
    return AioDeferredRefreshableCredentials(method=method, refresh_using=fetcher.fetch_credentials)
