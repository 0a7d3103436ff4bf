"""The provider `bedrock`: from the gateway's lifespan and calls to Bedrock's API."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import re
import time
from collections.abc import AsyncIterator, Awaitable, Iterable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from attrs import define, field

from qlens import (
    Call,
    Deadlines,
    Gateway,
    Health,
    NotCounted,
    Outgoing,
    Reply,
    StartupError,
    Target,
    UpstreamModelMissing,
    UpstreamRejected,
    Usage,
    hookimpl,
)
from qlens_plugins.provider.bedrock import credentials, model_ids, sdk
from qlens_plugins.provider.bedrock.chain import Chain, apart
from qlens_plugins.provider.bedrock.converse import converse, converse_stream
from qlens_plugins.provider.bedrock.converse_request import Asked, Rules, guardrail_of, written
from qlens_plugins.provider.bedrock.counting import NOT_THIS_MODEL, count
from qlens_plugins.provider.bedrock.credentials import Bearer, Fixed, Signed
from qlens_plugins.provider.bedrock.embeddings import embed
from qlens_plugins.provider.bedrock.endpoints import endpoint_of
from qlens_plugins.provider.bedrock.exchange import Credentials, Wire
from qlens_plugins.provider.bedrock.families import Family, family_of
from qlens_plugins.provider.bedrock.images import Images
from qlens_plugins.provider.bedrock.model_ids import ModelId
from qlens_plugins.provider.bedrock.passing import pass_on
from qlens_plugins.provider.bedrock.pictures import paint
from qlens_plugins.provider.bedrock.rerank import rerank
from qlens_plugins.provider.bedrock.settings import BedrockConfig
from qlens_plugins.provider.bedrock.signing import Signer

log = logging.getLogger("qlens.bedrock")

FIRST_LOOK_SECONDS = 10
"""How long the start waits for AWS's chain; calls that come before it answers fail with 502."""
UNCOUNTED_SECONDS = 3600
"""How long Bedrock is not asked again to count for a model for which it did not."""

_NO_NATIVE_FORM = re.compile(r"output_?config|text_?format|structured output|json_?schema", re.IGNORECASE)
_NOT_AT_ALL = re.compile(r"(doesn.t|does not) support|extraneous key", re.IGNORECASE)
_MOST_UNCOUNTED = 256
_SCHEMA_WAYS = ("native", "tool", "prompt")


@define(eq=False)
class Bedrock:
    """Sends calls to AWS Bedrock; a target's `model` is a model id, an inference profile or an ARN."""

    config: BedrockConfig
    name: str
    _wire: Wire | None = field(default=None, init=False, repr=False)
    _chain: Chain | None = field(default=None, init=False, repr=False)
    _images: Images | None = field(default=None, init=False, repr=False)
    _rules: dict[str, Rules] = field(init=False, repr=False)
    """By the way in which answers are made to fit a schema."""
    _by_tool: set[str] = field(factory=set, init=False, repr=False)
    """The models that refused to make an answer fit a schema by themselves."""
    _uncounted: dict[str, float] = field(factory=dict, init=False, repr=False)
    """The models that Bedrock does not count for, and until when (monotonic) it is not asked again."""

    Config = BedrockConfig
    takes_extensions = True
    on_disconnect = "drain"
    """Bedrock bills all that a model generates, whether somebody reads it or not."""

    def __attrs_post_init__(self) -> None:
        guardrail, reject = self.config.guardrail, self.config.unsupported == "reject"
        self._rules = {way: Rules(guardrail, reject, way) for way in _SCHEMA_WAYS}

    def dialects(self, target: Target) -> tuple[str, ...]:
        """The dialects spoken for a target, whose model either chats, or makes embeddings or images, or ranks."""
        return family_of(_model(target).base).speaks

    @property
    def passthrough(self) -> tuple[str, ...]:
        """The patterns of requests that pass as they are."""
        return self.config.passthrough

    def check(self, target: Target) -> Iterable[str]:
        """What is wrong with a target, asked at start-up."""
        where = f"target {self.name}/{target.model}"
        if fault := model_ids.fault(target.model, target.base_model, self.config.region):
            yield f"{where}: {fault}"
        if target.params.get("structured_output", "tool") not in _SCHEMA_WAYS:
            yield f"{where}: structured_output must be one of {', '.join(_SCHEMA_WAYS)}"
        if not isinstance(target.params.get("additional_model_request_fields", {}), dict):
            yield f"{where}: additional_model_request_fields must be a mapping"

    @hookimpl
    @asynccontextmanager
    async def lifespan(self, gateway: Gateway) -> AsyncIterator[None]:
        """Find region and credentials, and keep the credentials fresh while serving."""
        config = self.config
        deadlines = Deadlines(config.connect_seconds, config.first_byte_seconds, config.idle_seconds)
        region = config.region or await self._region()
        self._images = Images(gateway.http) if config.fetch_images else None
        async with gateway.reach(config.network) as http:
            self._wire = Wire(http, endpoint_of(config, region), self._credentials(region, http.proxy), deadlines)
            if self._chain is None:
                yield
                return
            async with self._watched(self._chain):
                yield

    @asynccontextmanager
    async def _watched(self, chain: Chain) -> AsyncIterator[None]:
        """Keep the access key fresh."""
        watching = asyncio.create_task(chain.watch(), name=f"AWS credentials of {self.name}")
        try:
            looked = asyncio.create_task(chain.looked.wait())
            await asyncio.wait({looked, watching}, timeout=FIRST_LOOK_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            looked.cancel()
            if watching.done():
                watching.result()  # a fault of the installation
            yield
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)

    @hookimpl
    def health(self) -> Health:
        """Whether there are credentials."""
        return self._chain.health() if self._chain is not None else Health(True)

    @hookimpl
    async def send(self, call: Call, target: Target, outgoing: Outgoing) -> Reply:
        """Write the call for the target's model, send it, and write the answer back."""
        assert self._wire is not None, "the lifespan is not open"
        if outgoing.request is not None:
            return await pass_on(self._wire, target, outgoing)
        if target.model in {".", ".."}:
            # Behind a wildcard, clients choose the name; these two would lead to another path.
            raise UpstreamModelMissing("The provider does not know the model that is configured for this name.")
        model = _model(target)
        family = family_of(model.base)
        if outgoing.dialect == "count_tokens":
            return await self._count(model, family, outgoing.fields())
        if outgoing.dialect == "embeddings":
            return await embed(self._wire, model, family, outgoing.body, call.estimated_input)
        if family.ranks:
            return await rerank(self._wire, model, outgoing.body)
        if family.paints:
            guardrail = guardrail_of(outgoing.body, target.params, self.config.guardrail, stream=False)
            return await paint(self._wire, model, family.paints, outgoing.body, guardrail)
        if self._images is not None:
            await self._images.put_in(outgoing.body["messages"])
        way = target.params.get("structured_output") or family.schema
        if way == "native" and model.base in self._by_tool:
            way = "tool"
        body = outgoing.fields()  # what is written for Bedrock is new
        if way != "native" or not body.get("response_format"):
            return await self._chat(call, target, model, body, way, stream=outgoing.stream)
        # Which models make an answer fit a schema by themselves is not written down everywhere, nor what schemas.
        try:
            return await self._chat(call, target, model, body, way, stream=outgoing.stream)
        except UpstreamRejected as error:
            if not _NO_NATIVE_FORM.search(error.message):
                raise
            if _NOT_AT_ALL.search(error.message):
                self._by_tool.add(model.base)
        return await self._chat(call, target, model, body, "tool", stream=outgoing.stream)

    def _chat(
        self, call: Call, target: Target, model: ModelId, body: dict[str, Any], way: str, *, stream: bool
    ) -> Awaitable[Reply]:
        assert self._wire is not None, "the lifespan is not open"
        asked = written(body, target.params, family_of(model.base), self._rules[way], stream=stream)
        choices = body.get("n") or 1
        most = partial(_most, call, asked, choices)
        return (converse_stream if stream else converse)(self._wire, model, asked, choices, most)

    async def _count(self, model: ModelId, family: Family, body: dict[str, Any]) -> Reply:
        assert self._wire is not None, "the lifespan is not open"
        if self._uncounted.get(model.base, -math.inf) > time.monotonic():
            raise NotCounted(NOT_THIS_MODEL)
        try:
            return await count(self._wire, model, family, body)
        except NotCounted as error:
            if len(self._uncounted) >= _MOST_UNCOUNTED:
                self._uncounted.clear()  # behind a wildcard, clients choose the names
            self._uncounted[model.base] = time.monotonic() + UNCOUNTED_SECONDS
            log.warning("%s: the tokens of %r are estimated: %s", self.name, model.base, error)
            raise

    def _credentials(self, region: str, proxy: str | None) -> Credentials:
        config = self.config
        if (bearer := credentials.bearer_of(config)) is not None:
            return Bearer(bearer)
        fixed = credentials.fixed_of(config)
        if fixed is not None and config.role_arn is None:
            return Signed(Signer(region), Fixed(fixed))
        self._chain = Chain(partial(sdk.find, config, region, proxy))
        return Signed(Signer(region), self._chain)

    async def _region(self) -> str:
        """The region that the environment or the profile gives."""
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        if region is None and credentials.bearer_of(self.config) is None:
            region = await apart(partial(sdk.region_of, self.config))
        if region is None:
            raise StartupError(f"provider {self.name} has no region: set it, or AWS_REGION")
        return region


def _most(call: Call, asked: Asked, choices: int, _: int) -> Usage:
    """The most that one of the choices of a call can use: they are all asked alike."""
    limit = asked.body.get("inferenceConfig", {}).get("maxTokens")
    output = call.bound.output // choices if limit is None else limit
    return Usage(input=call.estimated_input, output=output, source="estimated")


def _model(target: Target) -> ModelId:
    return model_ids.read(target.model, target.base_model)
