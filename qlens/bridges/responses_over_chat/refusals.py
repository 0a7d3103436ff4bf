"""What Responses have and chat does not."""

from __future__ import annotations

from qlens.errors import NotOffered


def unsupported(param: str, lacking: str) -> NotOffered:
    """The client's 400 for what cannot be said in chat; `lacking` is what the provider does not have."""
    return NotOffered(
        f"does not have {lacking}.",
        lead=f"Unsupported parameter: '{param}'. ",
        param=param,
        code="unsupported_parameter",
    )
