"""A real HTTP server that plays an Azure OpenAI resource: strict where Azure is, and odd where Azure is.

https://learn.microsoft.com/azure/ai-services/openai/reference
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, Literal
from urllib.parse import unquote

import orjson
from attrs import define, evolve, field, frozen

from qlens.testing import azure_fields
from qlens.testing.entra import FakeEntra
from qlens.testing.objects import FakeKeeper
from qlens.testing.upstreams import (
    TEXT,
    USAGE,
    Event,
    FakeUpstream,
    Recorded,
    Scripted,
    chat_events,
    serving,
    usual_answer,
)

KEY = "example-azure-key"
RESPONSES_VERSIONS = ("2025-03-01-preview", "2025-04-01-preview")
CLASSIC_VERSIONS = (
    *("2023-05-15", "2024-02-01", "2024-06-01", "2024-10-01-preview", "2024-10-21", "2024-12-01-preview"),
    *("2025-01-01-preview", *RESPONSES_VERSIONS),
)
V1_VERSIONS = (None, "v1", "preview")
AUDIENCES = ("https://cognitiveservices.azure.com", "https://ai.azure.com")

BLOCKED = "a forbidden phrase"
"""A prompt with these words is refused by the content filter."""

SAFE = {name: {"filtered": False, "severity": "safe"} for name in ("hate", "self_harm", "sexual", "violence")}
FILTERED = {**SAFE, "violence": {"filtered": True, "severity": "medium"}}
OFFSETS = {"check_offset": 44, "start_offset": 44, "end_offset": 64}

_NAMELESS = {"id": "", "object": "", "created": 0, "model": ""}
_PLACE = re.compile(r"/openai/(?:deployments/(?P<deployment>[^/]+)|(?P<v1>v1))/(?P<operation>.+)")
_RESPONSES = re.compile(r"/openai/(?P<v1>v1/)?(?P<rest>responses(?:/.*)?)")
_KEPT = re.compile(r"/openai/(?P<v1>v1/)?(?P<rest>(?P<kind>batches|conversations|files|vector_stores)(?:/.*)?)")


@frozen
class BaseModel:
    """What Azure knows of a model."""

    kind: Literal[
        "chat",
        "completions",
        "embeddings",
        "responses",
        "both",
        "images",
        "image edits",
        "speech",
        "transcriptions",
        "translations",
    ] = "both"
    """What it does; both: chat and Responses, image edits: images too, translations: transcriptions too."""
    series: Literal["gpt", "o", "reasoning"] = "gpt"
    """gpt: takes sampling parameters; o and reasoning: do not."""
    default_effort: str | None = None
    version: str = "2025-04-14"


MODELS: Mapping[str, BaseModel] = {
    "gpt-35-turbo": BaseModel(kind="chat", version="0125"),
    "gpt-35-turbo-instruct": BaseModel(kind="completions", version="0914"),
    "gpt-4o": BaseModel(version="2024-11-20"),
    "gpt-4o-mini": BaseModel(version="2024-07-18"),
    "gpt-4.1": BaseModel(),
    "gpt-5-chat": BaseModel(version="2025-08-07"),
    "o3-mini": BaseModel(series="o", version="2025-01-31"),
    "o4-mini": BaseModel(series="o", version="2025-04-16"),
    "gpt-5": BaseModel(series="reasoning", default_effort="medium", version="2025-08-07"),
    "gpt-5-mini": BaseModel(series="reasoning", default_effort="medium", version="2025-08-07"),
    "gpt-5.1": BaseModel(series="reasoning", default_effort="none", version="2025-11-13"),
    "gpt-5.1-codex": BaseModel(kind="responses", series="reasoning"),
    "text-embedding-3-small": BaseModel(kind="embeddings", version="1"),
    "dall-e-3": BaseModel(kind="images", version="3.0"),
    "gpt-image-1": BaseModel(kind="image edits", version="2025-04-15"),
    "gpt-4o-mini-tts": BaseModel(kind="speech", version="2025-03-20"),
    "tts": BaseModel(kind="speech", version="001"),
    "gpt-4o-transcribe": BaseModel(kind="transcriptions", version="2025-03-20"),
    "whisper": BaseModel(kind="translations", version="001"),
    "model-router": BaseModel(kind="chat", version="2025-08-07"),
}


@frozen
class Deployment:
    """A model under a name of the operator's own."""

    model: str = "gpt-4o"
    filter: Literal["default", "asynchronous"] = "default"
    """Whether the content filter holds text back until it is checked, or checks it later."""
    ends_with_done: bool = True
    """Whether its streams end with `[DONE]`."""
    busy: bool = False
    """Whether it answers 429, or spills over where the request allows it."""
    routes_to: str = "gpt-4.1"
    """The model that answers for a model router."""
    late_block: bool = False
    """Whether the asynchronous filter blocks the text after it was sent."""
    context_tokens: int = 128_000

    @property
    def base(self) -> BaseModel:
        """The model's own card."""
        return MODELS[self.model]

    @property
    def answers_as(self) -> str:
        """What answers call the model: with its version, and for a router the one behind it."""
        name = self.routes_to if self.model == "model-router" else self.model
        return f"{name}-{MODELS[name].version}"


@define(eq=False)
class FakeAzure(FakeUpstream):
    """A running resource; made by `azure()`. `script` overrides what it says by itself."""

    deployments: dict[str, Deployment] = field(factory=lambda: {"my-deployment": Deployment()})
    keys: tuple[str, ...] = (KEY,)
    entra: FakeEntra | None = None
    """Whose tokens it accepts; None: keys alone."""
    region: str = "swedencentral"
    keeper: FakeKeeper = field(factory=FakeKeeper)
    """Its responses, files and batches."""

    def _usual(self, request: Recorded) -> Scripted:
        found = self._kept(request) or self._responding(request) or self._refused(request) or self._answered(request)
        return Scripted(
            found.status,
            headers={
                "apim-request-id": f"apim-{len(self.requests)}",
                "x-ms-region": self.region,
                "x-ratelimit-remaining-requests": "-1",
                "x-ratelimit-remaining-tokens": "0",
                **found.headers,
            },
            body=found.body,
            events=found.events,
        )

    def _kept(self, request: Recorded) -> Scripted | None:
        """The answer about what the resource keeps, which belongs to no deployment; None for all else."""
        place = _KEPT.fullmatch(request.path)
        if place is None:
            return None
        if not self._known(request):
            return access_denied()
        version = request.query.get("api-version")
        if version not in (V1_VERSIONS if place["v1"] else CLASSIC_VERSIONS):
            return resource_not_found()
        if not place["v1"] and (
            place["kind"] == "conversations"
            or (place["kind"] == "vector_stores" and not (version or "").endswith("-preview"))
        ):
            return resource_not_found()
        return self.keeper.answer(evolve(request, path=f"/v1/{place['rest']}"))

    def _responding(self, request: Recorded) -> Scripted | None:
        """The answer about responses, whose deployment is the body's model on both surfaces; None for all else."""
        place = _RESPONSES.fullmatch(request.path)
        if place is None:
            return None
        if not self._known(request):
            return access_denied()
        if request.query.get("api-version") not in (V1_VERSIONS if place["v1"] else RESPONSES_VERSIONS):
            return resource_not_found()
        if place["rest"] == "responses/input_tokens":
            return resource_not_found()
        asked = evolve(request, path=f"/v1/{place['rest']}")
        if request.method != "POST" or place["rest"] not in {"responses", "responses/compact"}:
            return self.keeper.answer(asked)
        if place["rest"] == "responses/compact" and not place["v1"]:
            return resource_not_found()
        deployment = self.deployments.get(request.body.get("model"))
        if deployment is None:
            return deployment_not_found()
        if deployment.busy:
            spillover = request.headers.get("x-ms-spillover-deployment", "")
            if spillover not in self.deployments:
                return throttled(1200)
            told = self._respond(self.deployments[spillover], asked)
            return evolve(told, headers={**told.headers, "x-ms-spillover-from-deployment": request.body["model"]})
        return self._respond(deployment, asked)

    def _respond(self, deployment: Deployment, request: Recorded) -> Scripted:
        body = request.body
        if deployment.base.kind not in {"responses", "both"}:
            return not_supported("responses", deployment)
        found = _unfit_response(deployment.base, body)
        if found is not None:
            return found
        self.keeper.names[body["model"]] = deployment.answers_as
        told = self.keeper.answer(request)
        if isinstance(told.body, dict) and told.status == 200:
            filters = [{"blocked": False, "source_type": "completion", "content_filter_results": SAFE}]
            return evolve(told, body={**told.body, "content_filters": filters})
        return told

    # --- who, where -----------------------------------------------------------------------------

    def _refused(self, request: Recorded) -> Scripted | None:
        if not self._known(request):
            return access_denied()
        place = _PLACE.fullmatch(request.path)
        versions = CLASSIC_VERSIONS if place is not None and place["deployment"] else V1_VERSIONS
        if place is None or request.method != "POST" or request.query.get("api-version") not in versions:
            return resource_not_found()
        wanted = "multipart/form-data" if place["operation"] in _FORMS else "application/json"
        if not request.headers.get("content-type", "").startswith(wanted):
            return refusal("Unsupported content type", status=415)
        try:
            body = request.fields
        except orjson.JSONDecodeError:
            return refusal("Your request contained invalid JSON.")
        if place["v1"] and not isinstance(body.get("model"), str):
            return refusal("you must provide a model parameter", param="model")
        return None if self._deployment(request) is not None else deployment_not_found()

    def _known(self, request: Recorded) -> bool:
        key = request.headers.get("api-key")
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if key is not None:
            return key in self.keys
        if scheme != "Bearer":
            return False
        v1 = request.path.startswith("/openai/v1/")
        return (v1 and token in self.keys) or (
            self.entra is not None and self.entra.refusal(token, AUDIENCES if v1 else AUDIENCES[:1]) is None
        )

    def _deployment(self, request: Recorded) -> Deployment | None:
        place = _PLACE.fullmatch(request.path)
        assert place is not None, "a place that is not known was refused before"
        return self.deployments.get(unquote(place["deployment"] or "") or request.fields["model"])

    # --- what -----------------------------------------------------------------------------------

    def _answered(self, request: Recorded) -> Scripted:
        deployment = self._deployment(request)
        place = _PLACE.fullmatch(request.path)
        assert deployment is not None
        assert place is not None
        headers: dict[str, str] = {}
        if deployment.busy:
            spillover = self.deployments.get(request.headers.get("x-ms-spillover-deployment", ""))
            if spillover is None:
                return throttled(1200)
            deployment = spillover
            headers["x-ms-spillover-from-deployment"] = unquote(place["deployment"] or "") or request.fields["model"]
        version = None if place["v1"] else request.query["api-version"]
        answer = _operate(place["operation"], deployment, request, version)
        return Scripted(answer.status, {**answer.headers, **headers}, body=answer.body, events=answer.events)


@asynccontextmanager
async def azure(
    deployments: Mapping[str, Deployment] | None = None, *, entra: FakeEntra | None = None
) -> AsyncIterator[FakeAzure]:
    """Serve as a resource on a free loopback port until the block is left."""
    fake = FakeAzure(entra=entra)
    if deployments is not None:
        fake.deployments = dict(deployments)
    async with serving(fake) as running:
        yield running


# --- operations ---------------------------------------------------------------------------------

_FORMS = {"images/edits", "audio/transcriptions", "audio/translations"}
_OTHER: Mapping[str, frozenset[str]] = {
    "images/generations": frozenset({"images", "image edits"}),
    "images/edits": frozenset({"image edits"}),
    "audio/speech": frozenset({"speech"}),
    "audio/transcriptions": frozenset({"transcriptions", "translations"}),
    "audio/translations": frozenset({"translations"}),
}
"""The kinds of models that have each operation beside those that write."""
_IN_PREVIEWS = {"images/edits", "audio/speech"}
_CALLED = {
    "audio/speech": "audioSpeech",
    "audio/transcriptions": "audioTranscription",
    "audio/translations": "audioTranslation",
    "chat/completions": "chatCompletion",
    "completions": "completion",
    "images/edits": "imageEdit",
    "images/generations": "imageGeneration",
}
"""What Azure calls operations that a model does not have."""
_SAMPLING = {"temperature": 1, "top_p": 1, "presence_penalty": 0, "frequency_penalty": 0}
_SAMPLED = ("temperature", "top_p", "top_logprobs")
_WITHOUT_SAMPLING = ("logprobs", "top_logprobs", "logit_bias")


def _operate(operation: str, deployment: Deployment, request: Recorded, version: str | None) -> Scripted:
    if operation in _IN_PREVIEWS and version is not None and not version.endswith("-preview"):
        return resource_not_found()
    if operation in _OTHER:
        fits = deployment.base.kind in _OTHER[operation]
        return usual_answer(request) if fits else not_supported(operation, deployment)
    if operation not in azure_fields.OPERATIONS or (operation == "completions" and version is None):
        return resource_not_found()
    kind = "chat" if operation == "chat/completions" else operation
    if deployment.base.kind not in {kind, *(("both",) if kind == "chat" else ())}:
        return not_supported(operation, deployment)
    body = request.body
    found = _unknown_field(operation, deployment, body, version)
    if found is None and operation == "chat/completions":
        found = _unfit(deployment, body, version) or _filtered(body)
    if found is not None:
        return found
    if operation == "chat/completions":
        return _chat(deployment, body)
    answer = usual_answer(request)
    if isinstance(answer.body, dict):
        return Scripted(body={**answer.body, "model": deployment.answers_as})
    return answer


def _unknown_field(
    operation: str, deployment: Deployment, body: Mapping[str, Any], version: str | None
) -> Scripted | None:
    known = azure_fields.known(operation, version)
    if deployment.base.series == "gpt":
        known.discard("reasoning_effort")
    unknown = sorted(body.keys() - known)
    if unknown:
        plural = "s" if len(unknown) > 1 else ""
        return refusal(f"Unrecognized request argument{plural} supplied: {', '.join(unknown)}", code=None)
    if "stream_options" in body and not body.get("stream"):
        wording = "The 'stream_options' parameter is only allowed when 'stream' is enabled."
        return refusal(wording, param="stream_options", code="invalid_value")
    return None


def _unfit(deployment: Deployment, body: Mapping[str, Any], version: str | None) -> Scripted | None:
    """What this model refuses of a chat."""
    base = deployment.base
    roles = {message.get("role") for message in body["messages"]}
    if base.series != "gpt":
        if refused := _unsupported(base, body):
            return refused
        if {"system", "developer"} <= roles:
            return refusal("Developer and system messages cannot both be present.", param="messages")
    elif "developer" in roles and version is not None and version < "2024-12-01":
        wording = "Invalid value: 'developer'. Supported values are: 'system', 'assistant', 'user', 'function', 'tool'."
        return refusal(wording, param="messages[0].role", code="invalid_value")
    tokens = sum(len(str(message.get("content") or "")) for message in body["messages"]) // 4
    if tokens > deployment.context_tokens:
        wording = f"This model's maximum context length is {deployment.context_tokens} tokens. However, your messages "
        return refusal(f"{wording}resulted in {tokens} tokens.", param="messages", code="context_length_exceeded")
    return None


def _unsupported(base: BaseModel, body: Mapping[str, Any]) -> Scripted | None:
    if "max_tokens" in body:
        wording = "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens'."
        return refusal(wording, param="max_tokens", code="unsupported_parameter")
    effort = body.get("reasoning_effort") or base.default_effort
    if "parallel_tool_calls" in body and (base.series == "o" or effort == "minimal"):
        return _unsupported_parameter("parallel_tool_calls")
    if effort == "none":
        return None
    for name, default in _SAMPLING.items():
        if body.get(name, default) != default:
            wording = f"Unsupported value: '{name}' does not support {body[name]} with this model."
            return refusal(f"{wording} Only the default value is supported.", param=name, code="unsupported_value")
    return next((_unsupported_parameter(name) for name in _WITHOUT_SAMPLING if name in body), None)


def _unfit_response(base: BaseModel, body: Mapping[str, Any]) -> Scripted | None:
    """What this model refuses of a request for a response."""
    if BLOCKED in orjson.dumps(body.get("input")).decode():
        return filtered_prompt()
    effort = (body.get("reasoning") or {}).get("effort") or base.default_effort
    if base.series == "gpt":
        return _unsupported_parameter("reasoning.effort") if "reasoning" in body else None
    return None if effort == "none" else next((_unsupported_parameter(name) for name in _SAMPLED if name in body), None)


def _unsupported_parameter(name: str) -> Scripted:
    wording = f"Unsupported parameter: '{name}' is not supported with this model."
    return refusal(wording, param=name, code="unsupported_parameter")


def _filtered(body: Mapping[str, Any]) -> Scripted | None:
    return filtered_prompt() if BLOCKED in orjson.dumps(body["messages"]).decode() else None


def _chat(deployment: Deployment, body: Mapping[str, Any]) -> Scripted:
    asked = bool((body.get("stream_options") or {}).get("include_usage"))
    if body.get("stream"):
        return Scripted(events=list(_stream(deployment, asked)))
    message = {"role": "assistant", "content": TEXT, "refusal": None}
    choice = {
        "index": 0,
        "message": message,
        "finish_reason": "stop",
        "logprobs": None,
        "content_filter_results": SAFE,
    }
    return Scripted(
        body={
            "id": "chatcmpl-azure",
            "object": "chat.completion",
            "created": 1700000000,
            "model": deployment.answers_as,
            "prompt_filter_results": [{"prompt_index": 0, "content_filter_results": SAFE}],
            "choices": [choice],
            "usage": USAGE,
        }
    )


def _stream(deployment: Deployment, usage: bool) -> Iterator[Event]:
    """Prompt results without choices first; results of the filter in every chunk, or late and without delta."""
    yield {**_NAMELESS, "choices": [], "prompt_filter_results": [{"prompt_index": 0, "content_filter_results": SAFE}]}
    late = deployment.filter == "asynchronous"
    for event in chat_events(usage=USAGE if usage else None):
        if not isinstance(event, dict):
            break
        choices = [{**choice, **({} if late else {"content_filter_results": SAFE})} for choice in event["choices"]]
        yield {**event, "id": "chatcmpl-azure", "model": deployment.answers_as, "choices": choices}
        if late and choices and choices[0]["delta"].get("content"):
            yield _verdict(SAFE)
    if late:
        yield _verdict(FILTERED, finish="content_filter") if deployment.late_block else _verdict(SAFE)
    if deployment.ends_with_done:
        yield "[DONE]"


def _verdict(results: Mapping[str, Any], *, finish: str | None = None) -> Event:
    """What the asynchronous filter says about text that was sent before."""
    choice = {"index": 0, "finish_reason": finish, "content_filter_results": results, "content_filter_offsets": OFFSETS}
    return {**_NAMELESS, "choices": [choice], "usage": None}


# --- errors -------------------------------------------------------------------------------------


def refusal(message: str, *, status: int = 400, param: str | None = None, code: str | None = "BadRequest") -> Scripted:
    """An error in OpenAI's shape."""
    error = {"message": message, "type": "invalid_request_error", "param": param, "code": code}
    return Scripted(status, body={"error": error})


def access_denied() -> Scripted:
    """A wrong key or token: no error object, as the gateway in front of Azure says it."""
    wording = "Unauthorized. Access token is missing, invalid, audience is incorrect, or have expired."
    return Scripted(401, body={"statusCode": 401, "message": wording})


def forbidden() -> Scripted:
    """A network rule of the resource."""
    return Scripted(403, body={"error": {"code": "403", "message": "Access denied due to Virtual Network rules."}})


def resource_not_found() -> Scripted:
    """A wrong path or api-version."""
    return Scripted(404, body={"error": {"code": "404", "message": "Resource not found"}})


def deployment_not_found() -> Scripted:
    """A deployment that does not exist, or was made a moment ago."""
    wording = "The API deployment for this resource does not exist."
    return Scripted(404, body={"error": {"code": "DeploymentNotFound", "message": wording}})


def throttled(milliseconds: int) -> Scripted:
    """The deployment's own limit."""
    headers = {"retry-after-ms": str(milliseconds), "retry-after": str(-(-milliseconds // 1000))}
    error = {"code": "429", "message": "Requests have exceeded the call rate limit of your current pricing tier."}
    return Scripted(429, headers, body={"error": error})


def high_demand() -> Scripted:
    """A shortage of Azure's own."""
    wording = "The system is currently experiencing high demand and cannot process your request."
    return Scripted(429, body={"error": {"message": wording, "type": "too_many_requests", "code": "too_many_requests"}})


def not_supported(operation: str, deployment: Deployment) -> Scripted:
    """An operation that the deployment's model does not have."""
    called = _CALLED.get(operation, operation)
    wording = f"The {called} operation does not work with the specified model, {deployment.model}."
    return refusal(f"{wording} Please choose different model and try again.", code="OperationNotSupported")


def filtered_prompt(*, inner: str = "innererror") -> Scripted:
    """A prompt that the content filter blocks; some endpoints write `inner_error`."""
    verdict = {"code": "ResponsibleAIPolicyViolation", "content_filter_result": FILTERED}
    error = {
        "message": "The response was filtered due to the prompt triggering Azure OpenAI's content management policy.",
        "type": None,
        "param": "prompt",
        "code": "content_filter",
        "status": 400,
        inner: verdict,
    }
    return Scripted(400, body={"error": error})


def failed(status: int) -> Scripted:
    """Azure's own failures: 408, 424, 500 and 503 with an error object, 502 and 504 as a page of its front door."""
    if status in {502, 504}:
        page = b"<html><head><title>Azure Front Door</title></head><body>Our services aren't available</body></html>"
        return Scripted(status, {"content-type": "text/html"}, body=page)
    return Scripted(status, body={"error": {"message": "The server had an error.", "type": "server_error"}})
