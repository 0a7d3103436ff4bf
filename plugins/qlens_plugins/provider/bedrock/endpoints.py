"""Where Bedrock's runtime is: as the configuration says, as AWS's own variables say, or as the region has it."""

from __future__ import annotations

import os

from qlens import StartupError, http_url
from qlens_plugins.provider.bedrock.settings import BedrockConfig

VARIABLES = ("AWS_ENDPOINT_URL_BEDROCK_RUNTIME", "AWS_ENDPOINT_URL")
"""In the order in which AWS's SDKs look: the service's own address, and one for all services."""
IGNORED_VARIABLE = "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS"
"""Set to true, neither counts."""

_SUFFIXES = (("cn-", "amazonaws.com.cn"), ("eusc-", "amazonaws.eu"))


def endpoint_of(config: BedrockConfig, region: str) -> str:
    """The address of Bedrock's runtime; raises StartupError when a variable has one that is no URL.

    https://docs.aws.amazon.com/sdkref/latest/guide/feature-ss-endpoints.html
    """
    if config.endpoint is not None:
        return config.endpoint
    # What the environment says must not lead past the FIPS endpoint that the configuration asks for.
    if not config.fips and (given := _given()) is not None:
        return given
    suffix = next((suffix for prefix, suffix in _SUFFIXES if region.startswith(prefix)), "amazonaws.com")
    return f"https://bedrock-runtime{'-fips' if config.fips else ''}.{region}.{suffix}"


def _given() -> str | None:
    if os.environ.get(IGNORED_VARIABLE, "").lower() == "true":
        return None
    for variable in VARIABLES:
        if value := os.environ.get(variable):
            try:
                http_url(None, None, value)
            except ValueError as error:
                raise StartupError(f"{variable} {error}: mend it, or unset it") from None
            return value
    return None
