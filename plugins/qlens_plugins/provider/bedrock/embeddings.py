"""Embeddings by InvokeModel: Titan, one text a request, and Cohere, up to 96."""

from __future__ import annotations

import struct
from base64 import b64encode
from collections.abc import Iterator
from functools import partial
from operator import attrgetter
from typing import Any

import orjson
from attrs import frozen

from qlens import InvalidRequest, Reply, UpstreamInvalid, Usage
from qlens_plugins.provider.bedrock import usage as usages
from qlens_plugins.provider.bedrock.exchange import Told, ToldBy, Wire
from qlens_plugins.provider.bedrock.families import Family
from qlens_plugins.provider.bedrock.fan_out import gathered
from qlens_plugins.provider.bedrock.invoke import invoked
from qlens_plugins.provider.bedrock.model_ids import ModelId

Block = dict[str, Any]
Vector = list[float]

_BYTES_PER_TOKEN = 3
_COHERE_TEXTS = 96
_TITAN_DIMENSIONS = (1024, 512, 256)
_COHERE_DIMENSIONS = (1536, 1024, 512, 256)
_INPUT_TYPES = ("search_document", "search_query", "classification", "clustering")


@frozen
class _Part:
    """The answer to one request."""

    vectors: list[Vector]
    usage: Usage | None
    request_id: str | None


async def embed(wire: Wire, model: ModelId, family: Family, body: Block, estimate: int) -> Reply:
    """Answer an embeddings call, in as many requests as the model needs for its texts.

    `estimate` is how many tokens they may have, for models that do not say.
    """
    texts = _texts(body)
    requests = list(_titan(texts, body, model) if family.vectors == "titan" else _cohere(texts, body, family))
    sends = [partial(_asked, wire, model, request, count) for request, count in requests]
    parts = await gathered(sends, attrgetter("usage"), lambda place: _guessed(requests[place][0]), alike=False)
    vectors = [vector for part in parts for vector in part.vectors]
    usage = usages.total([part.usage for part in parts]) or Usage(input=estimate, source="estimated")
    packed = body.get("encoding_format") == "base64"
    content: Block = {
        "object": "list",
        "data": [
            {"object": "embedding", "index": index, "embedding": _packed(vector) if packed else vector}
            for index, vector in enumerate(vectors)
        ],
        "model": model.shown,
        "usage": {"prompt_tokens": usage.prompt, "total_tokens": usage.total},
    }
    return Reply(
        body=orjson.dumps(content),
        dialect="embeddings",
        usage=usage,
        complete=True,
        upstream_id=parts[0].request_id,
    )


def _texts(body: Block) -> list[str]:
    given = body["input"]
    texts = [given] if isinstance(given, str) else given
    if not all(isinstance(text, str) for text in texts):
        raise InvalidRequest(
            "The model behind this name takes texts only, not tokens.", param="input", code="unsupported_value"
        )
    return texts


# --- requests ----------------------------------------------------------------------------------


def _titan(texts: list[str], body: Block, model: ModelId) -> Iterator[tuple[Block, int]]:
    settings: Block = {}
    if "embed-text-v2" in model.base:
        settings = {"normalize": True, **_dimensions(body, "dimensions", _TITAN_DIMENSIONS)}
    elif body.get("dimensions"):
        raise _wrong_dimensions(())
    return (({"inputText": text, **settings}, 1) for text in texts)


def _cohere(texts: list[str], body: Block, family: Family) -> Iterator[tuple[Block, int]]:
    input_type = body.get("input_type") or _INPUT_TYPES[0]
    if input_type not in _INPUT_TYPES:
        raise InvalidRequest(
            f"Invalid value for 'input_type'. Supported values are: {', '.join(_INPUT_TYPES)}.",
            param="input_type",
            code="invalid_value",
        )
    settings: Block = {"input_type": input_type, "embedding_types": ["float"]}
    if family.vectors == "cohere_v4":
        settings.update(_dimensions(body, "output_dimension", _COHERE_DIMENSIONS))
    elif body.get("dimensions") not in (None, 1024):
        raise _wrong_dimensions((1024,))
    if isinstance(body.get("truncate"), str):
        settings["truncate"] = body["truncate"]
    slices = (texts[start : start + _COHERE_TEXTS] for start in range(0, len(texts), _COHERE_TEXTS))
    return (({"texts": part, **settings}, len(part)) for part in slices)


def _dimensions(body: Block, name: str, allowed: tuple[int, ...]) -> Block:
    asked = body.get("dimensions")
    if asked is None:
        return {}
    if asked not in allowed:
        raise _wrong_dimensions(allowed)
    return {name: asked}


def _wrong_dimensions(allowed: tuple[int, ...]) -> InvalidRequest:
    sizes = ", ".join(map(str, allowed))
    message = f"The model behind this name makes vectors of these dimensions only: {sizes}." if sizes else ""
    return InvalidRequest(
        message or "The model behind this name makes vectors of one size only: leave dimensions out.",
        param="dimensions",
        code="invalid_value",
    )


# --- answers -----------------------------------------------------------------------------------


async def _asked(wire: Wire, model: ModelId, request: Block, count: int) -> _Part:
    answer = await invoked(wire, model, request)
    usage = _used(answer)
    with ToldBy(answer.request_id, usage):
        return _Part(_vectors(answer.body, count), usage, answer.request_id)


def _vectors(answer: Block, count: int) -> list[Vector]:
    vectors = [answer["embedding"]] if "embedding" in answer else answer.get("embeddings")
    if isinstance(vectors, dict):
        vectors = vectors.get("float")
    if not isinstance(vectors, list) or len(vectors) != count or not all(map(_is_vector, vectors)):
        raise UpstreamInvalid("The provider's answer does not have a vector for each text.")
    return vectors


def _used(told: Told) -> Usage | None:
    tokens, counted = told.body.get("inputTextTokenCount"), told.headers.get("x-amzn-bedrock-input-token-count")
    if type(tokens) is not int or tokens < 0:
        tokens = int(counted) if counted is not None and counted.isdecimal() and len(counted) < 10 else None
    return None if tokens is None else Usage(input=tokens, source="provider")


def _guessed(request: Block) -> Usage:
    """What the texts of a request are likely to use, by their size."""
    texts = request.get("texts") or [request["inputText"]]
    size = sum(len(text.encode(errors="surrogatepass")) for text in texts)
    return Usage(input=-(-size // _BYTES_PER_TOKEN), source="estimated")


def _is_vector(vector: object) -> bool:
    return isinstance(vector, list) and bool(vector) and set(map(type, vector)) <= {float, int}


def _packed(vector: Vector) -> str:
    """As OpenAI packs them: little-endian float32 in base64."""
    return b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
