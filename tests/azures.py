"""Pieces for the tests of the provider `azure_openai`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson

from qlens.testing.azure import KEY
from qlens.testing.entra import CLIENT, SECRET, TENANT, FakeEntra

CHAT = "/v1/chat/completions"
DEPLOYMENT = "my-deployment"


def config(
    endpoint: str,
    *,
    deployment: str = DEPLOYMENT,
    base_model: str | None = None,
    params: Mapping[str, Any] | None = None,
    pipeline: Mapping[str, Any] | None = None,
    name: str = "ours",
    **settings: Any,
) -> str:
    """One model with one deployment behind it; with a key, unless settings say otherwise."""
    provider = {"plugin": "azure_openai", "endpoint": endpoint, **({} if "identity" in settings else {"api_key": KEY})}
    target = {"provider": "azure", "model": deployment, "params": params or {}}
    content = {
        "pipeline": {"auth": [{"plugin": "anonymous"}], **(pipeline or {})},
        "providers": {"azure": {**provider, **settings}},
        "models": {
            name: {
                "max_output_tokens": 1000,
                "targets": [{**target, **({"base_model": base_model} if base_model else {})}],
            }
        },
    }
    return orjson.dumps(content).decode()


def chat(**fields: Any) -> dict[str, Any]:
    """A small chat."""
    return {"model": "ours", "messages": [{"role": "user", "content": "Hello"}], **fields}


def credentials(server: FakeEntra, **changes: Any) -> dict[str, Any]:
    """The settings of an application with a secret."""
    known = {"kind": "client_credentials", "tenant_id": TENANT, "client_id": CLIENT, "client_secret": SECRET}
    return {**known, "authority": server.url, **changes}


def text(events: list[Any]) -> str:
    """What a stream says."""
    return "".join(choice["delta"].get("content") or "" for event in events[:-1] for choice in event["choices"])
