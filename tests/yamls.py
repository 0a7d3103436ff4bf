"""Pieces of configuration that several tests use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson

from qlens.operations import Operation
from qlens.testing import Response, Running

HELLO = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "Hello there!"}]}
"""A small chat call."""

STREAM = {**HELLO, "stream": True}

CHAT = "/v1/chat/completions"

BODIES: dict[str, dict[str, object]] = {
    "chat": {"messages": [{"role": "user", "content": "hello"}]},
    "completions": {"prompt": "hello"},
    "embeddings": {"input": "hello"},
    "responses": {"input": "hello"},
    "compaction": {"input": "hello"},
    "input_tokens": {"input": "hello"},
    "messages": {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 10},
    "count_tokens": {"messages": [{"role": "user", "content": "hello"}]},
    "moderations": {"input": "hello"},
    "rerank": {"query": "hello", "documents": ["hello there", "goodbye"]},
    "images": {"prompt": "hello"},
    "image_edits": {"prompt": "hello"},
    "image_variations": {},
    "speech": {"input": "hello", "voice": "alloy"},
    "transcriptions": {},
    "translations": {},
}
"""The least that an operation of each dialect wants, without the model."""

FILES: dict[str, dict[str, bytes]] = {
    "image_edits": {"image": b"a picture"},
    "image_variations": {"image": b"a picture"},
    "transcriptions": {"file": b"a recording"},
    "translations": {"file": b"a recording"},
}
"""The files that go with it, for operations that take a form."""


async def ask(gateway: Running, operation: Operation, path: str, **fields: object) -> Response:
    """Ask for an operation, at this path, with the least it wants."""
    if operation.method != "POST":
        return await gateway.request(operation.method, path)
    body = {**BODIES[operation.dialect], **fields}
    if operation.body != "form":
        return await gateway.post(path, body)
    texts = {name: value if isinstance(value, str) else orjson.dumps(value).decode() for name, value in body.items()}
    return await gateway.post_form(path, texts, FILES[operation.dialect])


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
