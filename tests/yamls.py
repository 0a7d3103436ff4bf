"""Pieces of configuration that several tests use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson

HELLO = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "Hello there!"}]}
"""A small chat call."""

STREAM = {**HELLO, "stream": True}

CHAT = "/v1/chat/completions"

BODIES: dict[str, dict[str, object]] = {
    "chat": {"messages": [{"role": "user", "content": "hello"}]},
    "completions": {"prompt": "hello"},
    "embeddings": {"input": "hello"},
    "responses": {"input": "hello"},
    "messages": {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 10},
}
"""The least that an operation of each dialect wants, without the model."""


def config(
    pipeline: Mapping[str, Any] | None = None,
    providers: Mapping[str, Any] | None = None,
    models: Mapping[str, Any] | None = None,
    **server: Any,
) -> str:
    """A configuration as text; without arguments: anonymous callers, one model, one talker behind it."""
    stages = {"auth": [{"plugin": "anonymous"}], **(pipeline or {})}
    talker = {"talker": {"plugin": "plugs:Talker"}}
    model = {"gpt-4o-mini": {"max_output_tokens": 1000, "targets": [{"provider": "talker", "model": "gpt-4o-mini"}]}}
    content = {"server": server, "pipeline": stages, "providers": providers or talker, "models": models or model}
    return orjson.dumps(content).decode()


def probe(name: str = "probe", **settings: Any) -> dict[str, Any]:
    """A probe plugin's entry."""
    return {"plugin": "plugs:Probe", "name": name, **settings}


def targets(*names: str) -> list[dict[str, str]]:
    """Targets by provider name."""
    return [{"provider": name, "model": "gpt-4o-mini"} for name in names]
