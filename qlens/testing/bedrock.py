"""A real HTTP server that plays AWS Bedrock's runtime, as strict as the real one; needs qlens[bedrock]."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import unquote
from uuid import uuid4

import orjson
from attrs import define, evolve, field
from botocore.model import OperationModel

from qlens.testing import bedrock_claude, converse_rules, frames
from qlens.testing.aws_signature import Identities, Identity, Refusal
from qlens.testing.service_model import fault, service_model
from qlens.testing.upstreams import FakeUpstream, Recorded, Scripted, serving

KEY = Identity("AKIAIOSFODNN7EXAMPLE", "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY")
"""An access key that every fake knows; it is AWS's own example."""
API_KEY = "bedrock-api-key-example"
"""A bearer key that every fake knows."""
TEXT = "Hello from Bedrock."
PICTURE = "iVBORw0KGgo="
"""The image of every answer."""
USAGE = {"inputTokens": 9, "outputTokens": 4, "totalTokens": 13}

_PATH = re.compile(
    r"/model/(?P<model>[^/]+)/(?P<operation>converse|converse-stream|invoke|invoke-with-response-stream|count-tokens)"
)
_OPERATIONS = {
    "converse": "Converse",
    "converse-stream": "ConverseStream",
    "invoke": "InvokeModel",
    "invoke-with-response-stream": "InvokeModelWithResponseStream",
    "count-tokens": "CountTokens",
}
_GUARD = re.compile(r"/guardrail/(?P<guardrailIdentifier>[^/]+)/version/(?P<guardrailVersion>[^/]+)/apply")
_MOST_BYTES = 25_000_000
_GUARD_UNITS = ("topicPolicyUnits", "contentPolicyUnits", "wordPolicyUnits", "contextualGroundingPolicyUnits")
_GUARDRAIL = {f"guardrail{part}": f"x-amzn-bedrock-guardrail{part.lower()}" for part in ("Identifier", "Version")}


@define(eq=False)
class FakeBedrock(FakeUpstream):
    """A running server; made by `bedrock()`. Whoever is not let in is answered as AWS does, scripted or not."""

    region: str = "us-east-1"
    identities: Identities = field(factory=Identities)
    refused: list[Refusal] = field(factory=list)
    """Why requests were refused so far."""
    models: list[str] = field(factory=list)
    """The models that requests were for so far, unescaped."""

    def __attrs_post_init__(self) -> None:
        self.identities.add(KEY)
        self.identities.api_keys.add(API_KEY)

    def _answer(self, request: Recorded) -> Scripted:
        refusal = self._refusal(request)
        if refusal is None:
            answered = super()._answer(request)
        else:
            self.refused.append(refusal)
            answered = failure(refusal.name, refusal.message, status=refusal.status)
        return evolve(answered, headers={"x-amzn-requestid": str(uuid4()), **answered.headers})

    def _usual(self, request: Recorded) -> Scripted:
        if _GUARD.fullmatch(request.path):
            return Scripted(body={"usage": dict.fromkeys(_GUARD_UNITS, 1), "action": "NONE", "outputs": []})
        found = _PATH.fullmatch(request.path)
        return _usual_of(found["operation"], unquote(found["model"]), request.body) if found else Scripted()

    def _refusal(self, request: Recorded) -> Refusal | None:
        if refusal := self.identities.refusal(request, "bedrock", self.region):
            return refusal
        if request.method == "POST" and (guarding := _GUARD.fullmatch(request.path)):
            shape = service_model("bedrock-runtime").operation_model("ApplyGuardrail").input_shape
            message = fault(shape, {**guarding.groupdict(), **request.body})
            return Refusal(400, "ValidationException", message) if message else None
        found = _PATH.fullmatch(request.path)
        if found is None or request.method != "POST":
            return Refusal(404, "UnknownOperationException", "")
        model = unquote(found["model"])
        self.models.append(model)
        if request.headers.get("content-type") != "application/json":
            return Refusal(400, "ValidationException", "The content type is invalid.")
        if len(request.content) > _MOST_BYTES:
            return Refusal(400, "ValidationException", "Request body is too large.")
        message = invalid(_OPERATIONS[found["operation"]], model, request.content, request.headers)
        return Refusal(400, "ValidationException", message) if message else None


@asynccontextmanager
async def bedrock(region: str = "us-east-1", identities: Identities | None = None) -> AsyncIterator[FakeBedrock]:
    """Serve on a free loopback port until the block is left.

    Unscripted, it answers with a text, with the call of a tool that is forced, or with vectors.
    """
    async with serving(FakeBedrock(region=region, identities=identities or Identities())) as fake:
        yield fake


# --- judging requests --------------------------------------------------------------------------


def invalid(operation: str, model: str, content: bytes, headers: Mapping[str, str] | None = None) -> str | None:
    """Why Bedrock would refuse a body: by its service model, and by what else it is known to check."""
    known: OperationModel = service_model("bedrock-runtime").operation_model(operation)
    try:
        body = orjson.loads(content)
    except orjson.JSONDecodeError:
        return "The request body is not valid JSON."
    if operation.startswith("InvokeModel"):
        guardrail = {name: headers[header] for name, header in _GUARDRAIL.items() if headers and header in headers}
        if len(guardrail) == 1:
            return "A guardrail needs both its identifier and its version."
        found = fault(known.input_shape, {"modelId": model, **guardrail})
        return found or _invalid_body(model, body)
    found = fault(known.input_shape, {"modelId": model, **body} if isinstance(body, dict) else body)
    refusal = bedrock_claude.count_refusal if operation == "CountTokens" else converse_rules.refusal
    return found or refusal(model, body)


def _invalid_body(model: str, body: Any) -> str | None:
    if ".rerank-" in model:
        known = {"query", "documents", "top_n", *(["api_version", "max_tokens_per_doc"] if "cohere" in model else [])}
        texts = [body.get("query"), *(body.get("documents") or [None])]
        good = "cohere" not in model or body.get("api_version") == 2
    elif "nova-canvas" in model or "titan-image" in model:
        known = {"taskType", "textToImageParams", "imageGenerationConfig"}
        config = body.get("imageGenerationConfig", {})
        texts, good = [body.get("textToImageParams", {}).get("text")], 1 <= config.get("numberOfImages", 1) <= 5
    elif model.startswith("stability."):
        known = {"prompt", "negative_prompt", "mode", "aspect_ratio", "output_format", "seed"}
        texts, good = [body.get("prompt")], body.get("output_format", "png") in {"png", "jpeg"}
    elif "titan-embed-text-v2" in model:
        known = {"inputText", "dimensions", "normalize", "embeddingTypes"}
        texts, good = [body.get("inputText")], body.get("dimensions", 1024) in {1024, 512, 256}
    elif "cohere.embed" in model:
        known = {"texts", "input_type", "truncate", "embedding_types", *(["output_dimension"] if "v4" in model else [])}
        texts, good = body.get("texts") or [None], "input_type" in body and len(body.get("texts") or ()) <= 96
    elif "anthropic." in model:
        return bedrock_claude.body_refusal(model, body)
    else:
        return "The provided model identifier is invalid."
    if unknown := body.keys() - known:
        return (
            f"Malformed input request: #: extraneous key [{min(unknown)}] is not permitted, please reformat your input"
        )
    if not good or not all(isinstance(text, str) and text for text in texts):
        return "Malformed input request: expected minLength: 1, actual: 0, please reformat your input and try again."
    return None


# --- answers -----------------------------------------------------------------------------------


def answer(
    *blocks: Mapping[str, Any], stop: str = "end_turn", usage: Mapping[str, Any] = USAGE, **fields: Any
) -> dict[str, Any]:
    """An answer of Converse with these blocks of content."""
    content = [dict(block) for block in blocks] or [{"text": TEXT}]
    message = {"role": "assistant", "content": content}
    return {
        "output": {"message": message},
        "stopReason": stop,
        "usage": dict(usage),
        "metrics": {"latencyMs": 12},
        **fields,
    }


def streamed(answer: Mapping[str, Any], size: int = 6) -> list[bytes]:
    """The frames of ConverseStream that tell an answer of Converse, its texts in pieces of `size` characters."""
    told = [frames.event("messageStart", {"role": "assistant", "p": "abcdefghij"})]
    for index, block in enumerate(answer["output"]["message"]["content"]):
        told += _told(index, block, size)
    own = ("stopReason", "additionalModelResponseFields")
    stop = {name: answer[name] for name in own if name in answer}
    rest = {name: answer[name] for name in ("usage", "metrics", "serviceTier", "performanceConfig") if name in answer}
    return [*told, frames.event("messageStop", stop), frames.event("metadata", {**rest, "p": "abc"})]


def _told(index: int, block: Mapping[str, Any], size: int) -> list[bytes]:
    start: dict[str, Any] | None = None
    deltas: list[dict[str, Any]] = []
    if "toolUse" in block:
        use = block["toolUse"]
        start = {"toolUse": {name: use[name] for name in ("toolUseId", "name", "type") if name in use}}
        text = orjson.dumps(use["input"]).decode() if use["input"] else ""
        deltas = [{"toolUse": {"input": piece}} for piece in _pieces(text, size)]
    elif "reasoningContent" in block:
        content = block["reasoningContent"]
        said = content.get("reasoningText", {})
        deltas = [{"reasoningContent": {"text": piece}} for piece in _pieces(said.get("text", ""), size)]
        if "signature" in said:
            deltas.append({"reasoningContent": {"signature": said["signature"]}})
        if "redactedContent" in content:
            deltas.append({"reasoningContent": {"redactedContent": content["redactedContent"]}})
    elif "citationsContent" in block:
        content = block["citationsContent"]
        texts = [part["text"] for part in content["content"]]
        deltas = [{"text": piece} for text in texts for piece in _pieces(text, size)]
        deltas += [{"citation": citation} for citation in content["citations"]]
    else:
        deltas = [{"text": piece} for piece in _pieces(block["text"], size)]
    events = [frames.event("contentBlockStart", {"contentBlockIndex": index, "start": start})] if start else []
    events += [frames.event("contentBlockDelta", {"contentBlockIndex": index, "delta": delta}) for delta in deltas]
    return [*events, frames.event("contentBlockStop", {"contentBlockIndex": index})]


def _pieces(text: str, size: int) -> list[str]:
    return [text[start : start + size] for start in range(0, len(text), size)]


def whole(answer: Mapping[str, Any]) -> Scripted:
    """A scripted answer of Converse."""
    return Scripted(body=dict(answer))


def stream(events: Iterable[bytes], **options: Any) -> Scripted:
    """A scripted event stream; `options` are those of Scripted."""
    return Scripted(events=list(events), headers={"content-type": frames.MEDIA_TYPE}, **options)


def failure(name: str, message: str = "", *, status: int = 400, in_header: bool = False, **fields: Any) -> Scripted:
    """A scripted exception; `in_header`: the body is empty and the text stands in a header."""
    headers = {"x-amzn-errortype": f"{name}:http://internal.amazon.com/coral/com.amazon.bedrock/"}
    if in_header:
        return Scripted(status, {**headers, "x-amzn-errormessage": message}, body={})
    return Scripted(status, headers, body={"message": message, **fields})


def _usual_of(operation: str, model: str, body: Any) -> Scripted:
    if operation == "invoke":
        return _invoked(model, body)
    if operation == "invoke-with-response-stream":
        return stream(bedrock_claude.chunks(TEXT, USAGE))
    if operation == "count-tokens":
        return Scripted(body={"inputTokens": USAGE["inputTokens"]})
    told = _usual_answer(body)
    return whole(told) if operation == "converse" else stream(streamed(told))


def _usual_answer(body: Any) -> dict[str, Any]:
    config = body.get("toolConfig") or {}
    choice = config.get("toolChoice") or {}
    forced = choice.get("tool", {}).get("name")
    if forced is None and "any" in choice:
        forced = config["tools"][0]["toolSpec"]["name"]
    if forced is None:
        return answer()
    use = {"toolUseId": f"tooluse_{uuid4().hex[:22]}", "name": forced, "input": {}}
    return answer({"toolUse": use}, stop="tool_use")


def _invoked(model: str, body: Any) -> Scripted:
    if ".rerank-" in model:
        order = range(min(len(body["documents"]), body.get("top_n", len(body["documents"]))))
        return Scripted(body={"results": [{"index": index, "relevance_score": 1 / (1 + index)} for index in order]})
    if "imageGenerationConfig" in body:
        return Scripted(body={"images": [PICTURE] * body["imageGenerationConfig"]["numberOfImages"], "error": None})
    if "anthropic." in model:
        counts = {f"x-amzn-bedrock-{name}-token-count": str(USAGE[f"{name}Tokens"]) for name in ("input", "output")}
        return Scripted(body=bedrock_claude.message(TEXT, USAGE), headers=counts)
    if model.startswith("stability."):
        return Scripted(body={"images": [PICTURE], "seeds": [1], "finish_reasons": [None]})
    return _vectors(model, body)


def _vectors(model: str, body: Any) -> Scripted:
    if "titan" in model:
        vector = _vector(body["inputText"], body.get("dimensions", 1024))
        tokens = len(body["inputText"].split())
        return Scripted(body={"embedding": vector, "inputTextTokenCount": tokens})
    texts = body["texts"]
    size = body.get("output_dimension", 1536 if "v4" in model else 1024)
    vectors = {"float": [_vector(text, size) for text in texts]}
    tokens = sum(len(text.split()) for text in texts)
    content = {"id": str(uuid4()), "texts": texts, "embeddings": vectors, "response_type": "embeddings_by_type"}
    return Scripted(body=content, headers={"x-amzn-bedrock-input-token-count": str(tokens)})


def _vector(text: str, size: int) -> list[float]:
    """The same for the same text; its first number is the text's length, so that the order can be seen."""
    return [float(len(text)), *(0.5 for _ in range(size - 1))]
