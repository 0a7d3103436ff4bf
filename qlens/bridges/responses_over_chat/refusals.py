"""What Responses have and chat does not."""

from __future__ import annotations

from qlens.errors import InvalidRequest


def unsupported(param: str, lacking: str) -> InvalidRequest:
    """The client's 400 for what cannot be said in chat; `lacking` is what the provider does not have."""
    return InvalidRequest(
        f"Unsupported parameter: '{param}'. The provider of this model does not have {lacking}.",
        param=param,
        code="unsupported_parameter",
    )
