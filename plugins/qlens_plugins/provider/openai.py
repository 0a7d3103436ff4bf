"""OpenAI itself, and every server that speaks its API."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from urllib.parse import urlencode, urlsplit

from attrs import define, field, frozen, validators

from qlens import (
    Call,
    Deadlines,
    Gateway,
    Network,
    Outgoing,
    Reply,
    Secret,
    Session,
    Target,
    Upstream,
    extra_headers,
    fits,
    header_value,
    hookimpl,
    http_url,
    path_patterns,
    post_openai,
    send_request,
    speaks_responses_only,
)

PATHS = {
    "chat": "/chat/completions",
    "compaction": "/responses/compact",
    "completions": "/completions",
    "embeddings": "/embeddings",
    "image_edits": "/images/edits",
    "image_variations": "/images/variations",
    "images": "/images/generations",
    "input_tokens": "/responses/input_tokens",
    "moderations": "/moderations",
    "rerank": "/rerank",
    "responses": "/responses",
    "speech": "/audio/speech",
    "transcriptions": "/audio/transcriptions",
    "translations": "/audio/translations",
}

_OF_RESPONSES = frozenset({"compaction", "input_tokens", "responses"})

BETA = {"openai-beta": "realtime=v1"}
"""What asks for the first version of realtime sessions."""
_BETA_PROTOCOL = "openai-beta.realtime-v1"
_COMPLETES = re.compile(r"(ft:)?(gpt-3\.5-turbo-instruct|davinci-002|babbage-002)\b")
"""The models of OpenAI itself that have the legacy completions; it refuses them for all others."""


@frozen
class OpenAIConfig:
    """Sends calls to OpenAI, or to any server with an OpenAI-compatible API (vLLM, llama.cpp, Ollama, ...)."""

    base_url: str = field(default="https://api.openai.com/v1", validator=http_url)
    """The address in front of `/chat/completions`, as an SDK wants it: usually it ends in `/v1`."""
    api_key: Secret | None = field(default=None, validator=header_value)
    """Sent as `Authorization: Bearer`; leave it out for servers that want none."""
    organization: str | None = field(default=None, validator=header_value)
    """Sent as `OpenAI-Organization`."""
    project: str | None = field(default=None, validator=header_value)
    """Sent as `OpenAI-Project`."""
    headers: Mapping[str, Secret] = field(
        factory=dict, hash=False, validator=extra_headers("authorization"), metadata={"lasting": False}
    )
    """More headers for every request."""
    stream_options: bool = True
    """Ask streams for their usage; false for servers that refuse the field `stream_options`."""
    responses: bool = True
    """Send calls of the Responses API as they are, and keep conversations; false for servers without it: they are then
    asked by chat."""
    responses_only: tuple[str, ...] = ()
    """Models with the Responses API alone, as `my-codex` or `gpt-9-pro*`: their chats are asked by it. OpenAI's codex,
    pro and deep research models are known, at OpenAI itself and wherever a target's `base_model` names them."""
    files: bool = True
    """Keep files, batches and vector stores for clients; false for servers without them."""
    passthrough: tuple[str, ...] = field(default=(), validator=path_patterns)
    """What clients may ask of the server as it is, at `/v1/providers/{name}/...`: `GET /models`, `POST /evals/**`. It
    runs auth and limits, is billed by what the answer says it used, and objects there belong to all tenants."""
    network: Network | None = None
    """How the server is reached, where it is not as `server.network` says."""
    connect_seconds: float = field(default=5.0, validator=validators.gt(0))
    """How long a connection may take to open."""
    first_byte_seconds: float = field(default=120.0, validator=validators.gt(0))
    """How long the server may think before the first byte of its answer."""
    idle_seconds: float = field(default=60.0, validator=validators.gt(0))
    """How long the server may pause within its answer."""


@define(eq=False)
class OpenAI:
    """Sends a call as it is, with the gateway's own credential."""

    config: OpenAIConfig
    name: str
    _http: Upstream | None = field(default=None, init=False, repr=False)
    _spoken: tuple[str, ...] = field(init=False, repr=False)
    _spoken_by_chats: tuple[str, ...] = field(init=False, repr=False)
    """The dialects of the models that OpenAI has no completions for."""
    _spoken_by_others: tuple[str, ...] = field(init=False, repr=False)
    """The dialects of the models that have no chat either."""
    _urls: Mapping[str, str] = field(init=False, repr=False)
    _headers: Mapping[str, str] = field(init=False, repr=False)
    _deadlines: Deadlines = field(init=False, repr=False)

    Config = OpenAIConfig

    def __attrs_post_init__(self) -> None:
        config = self.config
        self._spoken = tuple(dialect for dialect in PATHS if dialect not in _OF_RESPONSES or config.responses)
        others = self.kind != "openai"
        self._spoken_by_chats = tuple(dialect for dialect in self._spoken if others or dialect != "completions")
        no_chats = {"chat", "completions"} if config.responses else set[str]()
        self._spoken_by_others = tuple(dialect for dialect in self._spoken if dialect not in no_chats)
        self._urls = {dialect: config.base_url.rstrip("/") + path for dialect, path in PATHS.items()}
        named = {
            "authorization": f"Bearer {config.api_key.reveal()}" if config.api_key else None,
            "openai-organization": config.organization,
            "openai-project": config.project,
        }
        extra = {name.lower(): secret.reveal() for name, secret in config.headers.items()}
        self._headers = {**{name: value for name, value in named.items() if value}, **extra}
        self._deadlines = Deadlines(config.connect_seconds, config.first_byte_seconds, config.idle_seconds)

    @property
    def kind(self) -> str | None:
        """OpenAI's own models are behind its own address only; others speak its API too."""
        return "openai" if urlsplit(self.config.base_url).hostname == "api.openai.com" else None

    def dialects(self, target: Target) -> tuple[str, ...]:
        """The dialects spoken for a target."""
        if self._has_no_chat(target):
            return self._spoken_by_others
        return self._spoken if _COMPLETES.match(target.model) else self._spoken_by_chats

    def _has_no_chat(self, target: Target) -> bool:
        name = target.base_model or target.model
        if fits(name, self.config.responses_only) or fits(target.model, self.config.responses_only):
            return True
        # Another server may well speak chat for a model of that name.
        is_openais = target.base_model is not None or self.kind == "openai"
        return is_openais and speaks_responses_only(name)

    @property
    def passthrough(self) -> tuple[str, ...]:
        """The patterns of requests that pass as they are."""
        return self.config.passthrough

    @property
    def objects(self) -> tuple[str, ...]:
        """What is kept for clients."""
        of_responses = ("response", "conversation") if self.config.responses else ()
        return (*of_responses, *(("file", "batch", "vector_store") if self.config.files else ()))

    @hookimpl
    @asynccontextmanager
    async def lifespan(self, gateway: Gateway) -> AsyncIterator[None]:
        """Take the gateway's connections."""
        async with gateway.reach(self.config.network) as self._http:
            yield

    @hookimpl
    async def connect(self, call: Call, target: Target) -> Session:
        """Open a realtime session, of the kind that the client speaks: the events of the beta are others."""
        assert self._http is not None, "the lifespan is not open"
        intent = call.query.get("intent")
        # A session that only transcribes is told its model later: OpenAI refuses one that names it here.
        model = {} if intent == "transcription" else {"model": target.model}
        asked = {**model, **({"intent": intent} if intent is not None else {})}
        headers = {**self._headers, **(BETA if _is_beta(call) else {})}
        place = f"{self.config.base_url.rstrip('/')}/realtime?{urlencode(asked)}"
        return await self._http.connect(place, headers=headers, deadlines=self._deadlines)

    @hookimpl
    async def send(self, outgoing: Outgoing) -> Reply:
        """Post the body to the path of its dialect."""
        assert self._http is not None, "the lifespan is not open"
        if outgoing.request is not None:
            return await send_request(
                self._http,
                self.config.base_url,
                headers=self._headers,
                outgoing=outgoing,
                deadlines=self._deadlines,
            )
        return await post_openai(
            self._http,
            self._urls[outgoing.dialect],
            headers=self._headers,
            outgoing=outgoing,
            deadlines=self._deadlines,
            ask_usage=self.config.stream_options,
        )


def _is_beta(call: Call) -> bool:
    """Whether the client asks for the beta: by its header, or as a page in a browser does."""
    offered = call.headers.get("sec-websocket-protocol", "").split(",")
    named = call.headers.get("openai-beta", "").split(",")
    return BETA["openai-beta"] in map(str.strip, named) or _BETA_PROTOCOL in map(str.strip, offered)
