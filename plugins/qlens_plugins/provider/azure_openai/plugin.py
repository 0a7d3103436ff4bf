"""The plugin: a call's body to a deployment's address, with a key or a token, and its answer back."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from urllib.parse import quote, urlencode

from attrs import define, evolve, field

from qlens import (
    Call,
    Deadlines,
    Gateway,
    Health,
    InvalidRequest,
    Network,
    Outgoing,
    Reply,
    Session,
    Target,
    Upstream,
    UpstreamAuth,
    UpstreamModelMissing,
    UpstreamRejected,
    hookimpl,
    json_of,
    post_openai,
    send_request,
)
from qlens_plugins.provider.azure_openai import identities
from qlens_plugins.provider.azure_openai.parameters import (
    OF_V1,
    PREVIEWED,
    Lessons,
    apply_lessons,
    family,
    fit_chat,
    fit_response,
    refused,
    unrecognized,
)
from qlens_plugins.provider.azure_openai.settings import AppServiceIdentity, AzureOpenAIConfig, ManagedIdentity
from qlens_plugins.provider.azure_openai.stream import Mender, Tiered
from qlens_plugins.provider.azure_openai.tokens import Tokens

log = logging.getLogger("qlens.azure_openai")

PATHS = {
    "chat": "chat/completions",
    "compaction": "responses/compact",
    "completions": "completions",
    "embeddings": "embeddings",
    "image_edits": "images/edits",
    "images": "images/generations",
    "responses": "responses",
    "speech": "audio/speech",
    "transcriptions": "audio/transcriptions",
    "translations": "audio/translations",
}
LAST_GA = "2024-10-21"
"""The classic surface's last api-version that is no preview."""
LAST_PREVIEW = "2025-04-01-preview"
"""Its last preview; realtime sessions, Responses and `reasoning_effort` are in previews alone."""
FIRST_RESPONSES = "2025-03-01"
"""The date of the first api-version with Responses."""
PROVISIONED = "provisioned"
"""The price tier of tokens that are paid for by the hour."""
TARGET_PARAMS = ("provisioned", "spillover_deployment")
"""What a target's `params` may say to this plugin; they are no fields of the body."""

_SPOKEN = tuple(dialect for dialect in PATHS if dialect not in {"compaction", "completions", "responses"})
"""The dialects of a deployment of which nobody knows that its model speaks more."""
_IN_PREVIEWS = frozenset({"image_edits", "speech"})
"""The dialects that are in previews alone, on the classic surface."""
_OF_RESPONSES = frozenset({"compaction", "responses"})
"""The dialects whose paths belong to no deployment."""
_MENDED = ("chat", "completions")
"""The dialects whose streams are odd."""
_FITS = {"chat": fit_chat, "responses": fit_response}
"""What gives a body of each dialect the fields that a model accepts."""
_HIDDEN = (None, "model-router")
"""Base models that do not say which model answers."""
_SPILLED = "x-ms-spillover-from-deployment"
_FORWARDED = frozenset({"x-ms-region", _SPILLED})


@define(eq=False)
class AzureOpenAI:
    """Sends a call to a deployment; a target's `model` is the deployment, its `base_model` what stands behind it."""

    config: AzureOpenAIConfig
    name: str
    _http: Upstream | None = field(default=None, init=False, repr=False)
    _key: Mapping[str, str] = field(init=False, repr=False)
    _place: str = field(init=False, repr=False)
    """The address in front of a deployment's name, or on v1 in front of the operation."""
    _query: str = field(init=False, repr=False)
    _newest_query: str = field(init=False, repr=False)
    """The same for what only previews have, where the operator has chosen no api-version."""
    _root: str = field(init=False, repr=False)
    """The address of what belongs to no deployment."""
    _responses_query: str = field(init=False, repr=False)
    _responses_only: tuple[str, ...] = field(init=False, repr=False)
    """The dialects of a model that has no chat."""
    _lacks_previews: bool = field(init=False, repr=False)
    """Whether the operator has chosen an api-version that is no preview."""
    _spoken_with_completions: tuple[str, ...] = field(init=False, repr=False)
    _spoken_with_responses: tuple[str, ...] = field(init=False, repr=False)
    _deadlines: Deadlines = field(init=False, repr=False)
    _tokens: Tokens | None = field(default=None, init=False, repr=False)
    _before: Tokens | None = field(default=None, init=False, repr=False)
    _lessons: Lessons = field(factory=Lessons, init=False, repr=False)
    _missing: set[str] = field(factory=set, init=False, repr=False)
    """Deployments that Azure did not know when it was last asked."""

    Config = AzureOpenAIConfig

    @property
    def objects(self) -> tuple[str, ...]:
        """What is kept for clients: conversations on v1 alone, vector stores on the classic surface by previews."""
        if self.config.surface == "v1":
            return ("response", "file", "batch", "conversation", "vector_store")
        return ("response", "file", "batch", *(() if self._lacks_previews else ("vector_store",)))

    @property
    def passthrough(self) -> tuple[str, ...]:
        """The patterns of requests that pass as they are."""
        return self.config.passthrough

    def __attrs_post_init__(self) -> None:
        config = self.config
        self._key = {"api-key": config.api_key.reveal()} if config.api_key is not None else {}
        classic, resource = config.surface == "classic", config.endpoint.rstrip("/")
        version = config.api_version or (LAST_GA if classic else None)
        self._root = f"{resource}/openai" if classic else f"{resource}/openai/v1"
        self._place = f"{self._root}/deployments/" if classic else f"{self._root}/"
        self._query = _versioned(version)
        self._newest_query = _versioned(LAST_PREVIEW) if classic and not config.api_version else self._query
        self._spoken_with_completions = (*_SPOKEN, "completions") if classic else _SPOKEN
        chosen = config.api_version
        has_responses = not classic or chosen is None or chosen >= FIRST_RESPONSES
        self._responses_only = ("responses",) if classic else ("responses", "compaction")
        self._spoken_with_responses = (*_SPOKEN, *self._responses_only) if has_responses else _SPOKEN
        # A model that speaks nothing else is not refused for an api-version that was chosen for the others.
        self._responses_query = self._query if not classic or (chosen and has_responses) else _versioned(LAST_PREVIEW)
        self._lacks_previews = classic and chosen is not None and not chosen.endswith("-preview")
        self._deadlines = Deadlines(config.connect_seconds, config.first_byte_seconds, config.idle_seconds)

    def dialects(self, target: Target) -> tuple[str, ...]:
        """The dialects spoken for a target, by the surface, its api-version and the model behind the deployment."""
        model = family(target.base_model)
        if model is None or not (model.completes or model.responds):
            return _SPOKEN
        if model.completes:
            return self._spoken_with_completions
        return self._spoken_with_responses if model.chats else self._responses_only

    @hookimpl
    @asynccontextmanager
    async def lifespan(self, gateway: Gateway) -> AsyncIterator[None]:
        """Take the gateway's connections, and fetch a first token without waiting for it."""
        self._warn_of_unknown_models(gateway)
        async with gateway.reach(self.config.network) as self._http:
            if self.config.identity is None:
                yield
                return
            async with gateway.reach(self._network_of_tokens()) as http, self._renewed(gateway, http):
                yield

    def _network_of_tokens(self) -> Network | None:
        """How tokens are fetched: through the same proxy, from a server that is not Azure's resource."""
        if isinstance(self.config.identity, ManagedIdentity | AppServiceIdentity):
            return Network()  # a machine's own identity service is never reached through a proxy
        network = self.config.network
        return None if network is None else Network(proxy=network.proxy)

    @asynccontextmanager
    async def _renewed(self, gateway: Gateway, http: Upstream) -> AsyncIterator[None]:
        """Keep a token fresh."""
        self._tokens = tokens = self._tokens_of(gateway, http)
        if self._before is not None:
            tokens.take_over(self._before)
            self._before = None
        if not tokens.left():
            tokens.renew()
        try:
            yield
        finally:
            await tokens.aclose()

    def _tokens_of(self, gateway: Gateway, http: Upstream) -> Tokens:
        identity, scope, wall = self.config.identity, self.config.token_scope, gateway.clock.time
        assert identity is not None, "tokens are for an identity"
        counter = gateway.metrics.counter(
            "qlens_azure_tokens_total", "Tokens asked for, by provider and by how it ended.", ("provider", "outcome")
        )
        return Tokens(
            provider=self.name,
            fetch=lambda: identities.fetch(http, self.name, identity, scope, wall),
            now=gateway.clock.monotonic,
            waiting=http.unsent.waiting,
            counted=lambda outcome: counter.labels(self.name, outcome).inc(),
        )

    def _warn_of_unknown_models(self, gateway: Gateway) -> None:
        nameless = sorted(
            target.model
            for model in gateway.models.values()
            for target in model.candidates
            if target.provider == self.name and target.base_model is None
        )
        if nameless:
            log.warning(
                "%s: no base_model for %s: a deployment's name does not say which model it is, so that its price and "
                "its parameters are only guessed",
                self.name,
                ", ".join(nameless),
            )

    @hookimpl
    def adopt(self, old: object) -> None:
        """Go on with the token of the same identity, and with what Azure refused."""
        if not isinstance(old, AzureOpenAI):
            return
        mine, other = self.config, old.config
        if (mine.identity, mine.token_scope) == (other.identity, other.token_scope):
            self._before = old._tokens
        if (mine.endpoint, mine.surface, mine.api_version) == (other.endpoint, other.surface, other.api_version):
            self._lessons = old._lessons

    @hookimpl
    def health(self) -> Health:
        """Whether there is a token, and whether Azure knows the deployments."""
        faults = [f"unknown deployments: {', '.join(sorted(self._missing))}"] if self._missing else []
        if self._tokens is None:
            return Health(not faults, "; ".join(faults) or "uses a key")
        left = self._tokens.left()
        if self._tokens.failure is not None:
            faults.append(self._tokens.failure.message)
        told = [f"token for {left / 60:.0f} min" if left else "no token", *faults]
        return Health(bool(left) and not self._missing, "; ".join(told))

    @hookimpl
    async def connect(self, call: Call, target: Target) -> Session:
        """Open a realtime session with the target's deployment."""
        assert self._http is not None, "the lifespan is not open"
        headers = await self._credential()
        try:
            opened = await self._http.connect(
                self._realtime_url(call, target), headers=headers, deadlines=self._deadlines
            )
        except UpstreamAuth:
            self._doubt(headers)
            raise
        except UpstreamModelMissing:
            self._not_found(target)
            raise
        self._missing.discard(target.model)
        return opened

    def _realtime_url(self, call: Call, target: Target) -> str:
        """Where sessions are opened: on v1 as OpenAI's, on the classic surface by a preview, for it has no other."""
        resource, version = self.config.endpoint.rstrip("/"), self.config.api_version
        asked = {"intent": call.query["intent"]} if "intent" in call.query else {}
        if self.config.surface == "v1":
            # A session that only transcribes is told its model later, as OpenAI's.
            model = {} if asked.get("intent") == "transcription" else {"model": target.model}
            asked |= {**model, **({"api-version": version} if version else {})}
            return f"{resource}/openai/v1/realtime?{urlencode(asked)}"
        preview = version if version is not None and version.endswith("-preview") else LAST_PREVIEW
        asked |= {"api-version": preview, "deployment": target.model}
        return f"{resource}/openai/realtime?{urlencode(asked)}"

    async def _credential(self) -> Mapping[str, str]:
        """The header that says who the gateway is."""
        return self._key if self._tokens is None else {"authorization": f"Bearer {await self._tokens.get()}"}

    def _doubt(self, headers: Mapping[str, str]) -> None:
        """Renew a token that Azure refused."""
        if self._tokens is not None:
            self._tokens.doubt(headers["authorization"].removeprefix("Bearer "))

    @hookimpl
    async def send(self, call: Call, target: Target, outgoing: Outgoing) -> Reply:
        """Post the body to the target's deployment, or send a request to the resource itself."""
        if outgoing.request is not None:
            return await self._send_request(outgoing)
        self._fit(target, outgoing)
        while True:
            try:
                reply = await self._post(target, outgoing)
            except UpstreamRejected as error:
                # Each turn learns a field that this deployment refuses: there are few, and none comes twice.
                if not self._learned(target, outgoing, error):
                    self._explain(error)
                    raise
            except UpstreamModelMissing:
                self._not_found(target)
                raise
            else:
                self._missing.discard(target.model)
                return self._finished(call, target, outgoing, reply)

    # --- the request ----------------------------------------------------------------------------

    def _fit(self, target: Target, outgoing: Outgoing) -> None:
        """Give the body the fields that the deployment's model accepts."""
        model, lessons = family(target.base_model), self._lessons.of(target.model)
        fit = _FITS.get(outgoing.dialect) if model is not None else None
        if fit is None and not lessons and not target.params:
            return
        body = outgoing.fields()
        for name in TARGET_PARAMS:
            if name in target.params:
                body.pop(name, None)
        if fit is not None and model is not None:
            fit(body, model, self.config.unsupported)
        apply_lessons(body, lessons)
        outgoing.body = body

    def _learned(self, target: Target, outgoing: Outgoing, error: UpstreamRejected) -> bool:
        body = outgoing.fields()
        sent = {*body, *(("stream_options",) if outgoing.stream else ())}
        new = refused(error, sent, self.config.unsupported) - self._lessons.of(target.model)
        if not new:
            return False
        self._lessons.learn(target.model, new)
        apply_lessons(body, self._lessons.of(target.model))
        outgoing.body = body
        log.warning("%s: %s refuses %s: not sent from now on", self.name, target.model, ", ".join(sorted(new)))
        return True

    def _explain(self, error: UpstreamRejected) -> None:
        """Say of a field that the api-version does not know which one does."""
        if self.config.surface != "classic":
            return
        new = unrecognized(error)
        found, known_by = new & OF_V1, "the surface v1"
        if not found and self._lacks_previews:
            found, known_by = new & PREVIEWED, f"the api_version {LAST_PREVIEW}"
        if found:
            named = ", ".join(sorted(found))
            error.message = f"{error.message.rstrip('.')}. Of the provider {self.name}, {known_by} knows {named}."

    async def _post(self, target: Target, outgoing: Outgoing) -> Reply:
        assert self._http is not None, "the lifespan is not open"
        headers = await self._credential()
        spillover = target.params.get("spillover_deployment")
        if spillover:
            headers = {**headers, "x-ms-spillover-deployment": str(spillover)}
        try:
            return await post_openai(
                self._http,
                self._url(target, outgoing),
                headers=headers,
                outgoing=outgoing,
                deadlines=self._deadlines,
                ask_usage=self.config.stream_options and "stream_options" not in self._lessons.of(target.model),
                forward=_FORWARDED,
            )
        except UpstreamAuth:
            self._doubt(headers)
            raise

    async def _send_request(self, outgoing: Outgoing) -> Reply:
        """Ask the resource: what it keeps belongs to no deployment."""
        assert self._http is not None, "the lifespan is not open"
        assert outgoing.request is not None
        headers = await self._credential()
        query = {"responses": self._responses_query, "vector_stores": self._newest_query}.get(
            outgoing.request.path.split("/")[1], self._query
        )
        try:
            return await send_request(
                self._http,
                f"{self._root}{query}",
                headers=headers,
                outgoing=outgoing,
                deadlines=self._deadlines,
                forward=_FORWARDED - {_SPILLED},
            )
        except UpstreamAuth:
            self._doubt(headers)
            raise

    def _url(self, target: Target, outgoing: Outgoing) -> str:
        dialect = outgoing.dialect
        if dialect in _OF_RESPONSES:
            return f"{self._root}/{PATHS[dialect]}{self._responses_query}"
        if self.config.surface == "v1":
            return f"{self._place}{PATHS[dialect]}{self._query}"
        if target.model in {".", ".."}:
            # Behind a wildcard, clients choose the name; these two would lead to another path.
            raise UpstreamModelMissing("The provider does not know the model that is configured for this name.")
        model = family(target.base_model)
        if dialect in _IN_PREVIEWS and self._lacks_previews:
            raise InvalidRequest(
                f"The provider {self.name} does {dialect} behind previews of the api-version alone, and its "
                f"api_version is {self.config.api_version}: set it to {LAST_PREVIEW}, leave it out, or use the "
                "surface v1.",
                code="unsupported_operation",
            )
        newest = dialect in _IN_PREVIEWS or (model is not None and model.newest)
        if dialect == "chat" and not newest:
            newest = not PREVIEWED.isdisjoint(outgoing.body)
        query = self._newest_query if newest else self._query
        return f"{self._place}{quote(target.model, safe='')}/{PATHS[dialect]}{query}"

    def _not_found(self, target: Target) -> None:
        # Behind a wildcard, clients choose the name: what they invent is no fault of the configuration.
        if target.model not in self._missing and not target.public.endswith("*"):
            self._missing.add(target.model)
            log.error("%s: Azure does not know the deployment %r; a new one takes minutes", self.name, target.model)

    # --- the answer -----------------------------------------------------------------------------

    def _finished(self, call: Call, target: Target, outgoing: Outgoing, reply: Reply) -> Reply:
        """Note where it was answered and by what, and mend a stream."""
        headers = dict(reply.headers)
        spilled = headers.pop(_SPILLED, None)
        reply.headers = headers
        if spilled:
            call.tags["azure_spillover_from"] = spilled
        # Tokens that spilled over were answered, and are billed, by a standard deployment.
        tier = PROVISIONED if target.params.get("provisioned") and not spilled else None
        if reply.chunks is not None and outgoing.dialect not in _MENDED:
            if tier is not None and not reply.raw:
                reply.replace(chunks=Tiered(outgoing.dialect, tier).mend(reply.chunks))
            return reply
        if reply.chunks is not None:
            mender = Mender(
                outgoing.dialect, tier, lambda model: _answered_by(reply, target, model), model=target.public
            )
            reply.replace(chunks=mender.mend(reply.chunks))
            return reply
        if tier is not None and reply.usage is not None:
            reply.usage = evolve(reply.usage, tier=tier)
        if target.base_model in _HIDDEN and reply.body is not None and not reply.raw:
            _answered_by(reply, target, json_of(reply.body).get("model"))
        return reply


def _versioned(version: str | None) -> str:
    return f"?api-version={quote(version, safe='')}" if version else ""


def _answered_by(reply: Reply, target: Target, model: object) -> None:
    """Where nobody knows the model beforehand, the answer says which one is to be priced."""
    if target.base_model in _HIDDEN and isinstance(model, str) and model:
        reply.target = evolve(target, base_model=model)
