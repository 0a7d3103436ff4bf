"""Pieces for the tests of messages: configurations with one provider, calls, and the two official clients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import anthropic
import openai
import orjson

from qlens import Deadlines
from qlens.call import Call
from qlens.dialects import Body
from qlens.operations import OPERATIONS, Operation
from qlens.testing import Running
from qlens.testing.anthropic import KEY, MODEL

DEADLINES = Deadlines(connect_seconds=2, first_byte_seconds=5, idle_seconds=5)
OPERATION: dict[str, Operation] = {operation.name: operation for operation in OPERATIONS}


def config(provider: Mapping[str, Any], model: str, *, pipeline: Mapping[str, Any] | None = None, **target: Any) -> str:
    """One model `ours` with one target, at this provider."""
    content = {
        "pipeline": {"auth": [{"plugin": "anonymous"}], **(pipeline or {})},
        "providers": {"theirs": dict(provider)},
        "models": {"ours": {"max_output_tokens": 8000, "targets": [{"provider": "theirs", "model": model, **target}]}},
    }
    return orjson.dumps(content).decode()


def claude(url: str, *, model: str = MODEL, pipeline: Mapping[str, Any] | None = None, **settings: Any) -> str:
    """One model `ours` at a fake Anthropic."""
    return config({"plugin": "anthropic", "base_url": url, "api_key": KEY, **settings}, model, pipeline=pipeline)


def compatible(url: str, *, model: str = "gpt-4o") -> str:
    """One model `ours` at a server that speaks chat."""
    return config({"plugin": "openai", "base_url": url}, model)


def openai_client(gateway: Running) -> openai.AsyncOpenAI:
    """OpenAI's own client of a gateway."""
    return openai.AsyncOpenAI(api_key="sk-example", base_url=f"{gateway.url}/v1", max_retries=0)


def anthropic_client(gateway: Running) -> anthropic.AsyncAnthropic:
    """Anthropic's own client of a gateway."""
    return anthropic.AsyncAnthropic(api_key="sk-example", base_url=gateway.url, max_retries=0, timeout=30)


def call_of(body: Body, operation: str, *, keep: int = 0) -> Call:
    """A call with this body."""

    async def reader() -> bytes:
        return orjson.dumps(body)

    call = Call(
        id="1", operation=OPERATION[operation], path="", path_params={}, query={}, headers={}, peer=None,
        credential=None, started=0, wall_ns=0, deadline=0, reader=reader, stream=bool(body.get("stream")), keep=keep,
    )  # fmt: skip
    call.body, call.estimated_input = body, 11
    return call


def plain(body: Mapping[str, Any]) -> dict[str, Any]:
    """An answer, or an event of one, without what is different each time."""
    return {name: value for name, value in body.items() if name not in {"id", "created"}}
