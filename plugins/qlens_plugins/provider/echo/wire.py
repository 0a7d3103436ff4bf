"""Writes the echo's answers the way OpenAI does: bodies, events of a stream, vectors."""

from __future__ import annotations

import math
import struct
import time
from base64 import b64encode
from collections.abc import Iterator
from hashlib import shake_256
from itertools import zip_longest
from typing import Any, Literal
from uuid import uuid4

import orjson
from attrs import field, frozen

from qlens import Usage
from qlens_plugins.provider.echo.answers import Said, Token

FINGERPRINT = "fp_echo"
Part = Literal["opening", "token", "ending"]
DONE = b"data: [DONE]\n\n"


@frozen
class Event:
    """One event of a stream."""

    data: bytes
    part: Part
    """A token's event carries exactly one."""


@frozen
class ChatWire:
    """OpenAI's chat completions."""

    model: str
    id: str = field(factory=lambda: f"chatcmpl-{uuid4().hex}")
    created: int = field(factory=lambda: int(time.time()))

    def body(self, choices: list[Said], usage: Usage) -> bytes:
        """A complete answer."""
        return orjson.dumps(
            {
                **self._head("chat.completion"),
                "choices": [self._choice(index, said) for index, said in enumerate(choices)],
                "usage": usage_object(usage),
            }
        )

    def events(self, choices: list[Said], usage: Usage) -> Iterator[Event]:
        """The events of a stream, one for each token, the usage event and the end mark last."""
        head = {**self._head("chat.completion.chunk"), "usage": None}
        ids = [[f"call_{uuid4().hex[:24]}" for _ in said.tools()] for said in choices]
        for index, said in enumerate(choices):
            content = None if said.text is None else ""
            yield _event("opening", head, index, {"role": "assistant", "content": content, "refusal": None})
        for step in zip_longest(*(said.tokens for said in choices)):
            for index, token in enumerate(step):
                if token is not None:
                    yield _event("token", head, index, _delta(token, ids[index]))
        for index, said in enumerate(choices):
            yield _event("ending", head, index, {}, said.finish)
        yield Event(_data({**head, "choices": [], "usage": usage_object(usage)}), "ending")
        yield Event(DONE, "ending")

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "service_tier": "default",
            "system_fingerprint": FINGERPRINT,
        }

    def _choice(self, index: int, said: Said) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": said.text, "refusal": None, "annotations": []}
        if calls := said.tools():
            message["tool_calls"] = [
                {
                    "id": f"call_{uuid4().hex[:24]}",
                    "type": "function",
                    "function": {"name": name, "arguments": arguments},
                }
                for name, arguments in calls
            ]
        return {"index": index, "message": message, "logprobs": None, "finish_reason": said.finish}


@frozen
class CompletionsWire:
    """OpenAI's older completions."""

    model: str
    id: str = field(factory=lambda: f"cmpl-{uuid4().hex}")
    created: int = field(factory=lambda: int(time.time()))

    def body(self, choices: list[Said], usage: Usage) -> bytes:
        """A complete answer."""
        return orjson.dumps(
            {
                **self._head(),
                "choices": [self._choice(index, said.text, said.finish) for index, said in enumerate(choices)],
                "usage": usage_object(usage),
            }
        )

    def events(self, choices: list[Said], usage: Usage) -> Iterator[Event]:
        """The events of a stream, one for each token, the usage event and the end mark last."""
        head = {**self._head(), "usage": None}
        for step in zip_longest(*(said.tokens for said in choices)):
            for index, token in enumerate(step):
                if token is not None:
                    yield Event(_data({**head, "choices": [self._choice(index, token.text, None)]}), "token")
        for index, said in enumerate(choices):
            yield Event(_data({**head, "choices": [self._choice(index, "", said.finish)]}), "ending")
        yield Event(_data({**head, "choices": [], "usage": usage_object(usage)}), "ending")
        yield Event(DONE, "ending")

    def _head(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
            "system_fingerprint": FINGERPRINT,
        }

    def _choice(self, index: int, text: str | None, finish: str | None) -> dict[str, Any]:
        return {"text": text, "index": index, "logprobs": None, "finish_reason": finish}


def embeddings_body(model: str, vectors: list[list[float] | str], usage: Usage) -> bytes:
    """A complete answer to an embeddings call."""
    return orjson.dumps(
        {
            "object": "list",
            "data": [
                {"object": "embedding", "index": index, "embedding": vector} for index, vector in enumerate(vectors)
            ],
            "model": model,
            "usage": {"prompt_tokens": usage.prompt, "total_tokens": usage.total},
        }
    )


def vector(text: str, dimensions: int, *, packed: bool) -> list[float] | str:
    """The unit vector that stands for a text; packed, as OpenAI does for base64, into little-endian float32."""
    digest = shake_256(text.encode()).digest(2 * dimensions)
    raw = struct.unpack(f"<{dimensions}h", digest)
    # All zeros can come out of a hash, once in a very long while, and have no direction.
    length = math.sqrt(sum(number * number for number in raw)) or 1.0
    floats = struct.pack(f"<{dimensions}f", *(number / length for number in raw))
    if packed:
        return b64encode(floats).decode()
    return list(struct.unpack(f"<{dimensions}f", floats))


def usage_object(usage: Usage) -> dict[str, Any]:
    """OpenAI's usage object."""
    return {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.completion,
        "total_tokens": usage.total,
        "prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 0},
        "completion_tokens_details": {
            "reasoning_tokens": 0,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }


def _event(part: Part, head: dict[str, Any], index: int, delta: dict[str, Any], finish: str | None = None) -> Event:
    choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}
    return Event(_data({**head, "choices": [choice]}), part)


def _delta(token: Token, ids: list[str]) -> dict[str, Any]:
    if token.tool is None:
        return {"content": token.text}
    if token.names_tool:
        function = {"name": token.text, "arguments": ""}
        return {"tool_calls": [{"index": token.tool, "id": ids[token.tool], "type": "function", "function": function}]}
    return {"tool_calls": [{"index": token.tool, "function": {"arguments": token.text}}]}


def _data(payload: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(payload) + b"\n\n"
