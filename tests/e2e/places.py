"""One gateway with every provider behind it, and the names of the models there."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import anthropic
import bedrocks
import openai
import orjson
from attrs import frozen
from claudes import anthropic_client, openai_client
from e2e.transcripts import Transcript
from e2e.voices import AnthropicVoice, AzureVoice, BedrockVoice, OpenAIVoice, Said, Script, Voice

from qlens.testing import Running, Scripted, azure, running
from qlens.testing import anthropic as claude
from qlens.testing.azure import Deployment
from qlens.testing.upstreams import serving

# Of their families, those that look at pictures.
LLAMA = "us.meta.llama4-maverick-17b-instruct-v1:0"
MISTRAL = "mistral.mistral-large-3-675b-instruct"
MISTRAL_7B = "mistral.mistral-7b-instruct-v0:2"
"""A model without system prompts and tools."""
DEPLOYMENTS = {
    "our-chat": Deployment("gpt-4o"),
    "our-thinker": Deployment("gpt-5-mini"),
    "our-vectors": Deployment("text-embedding-3-small"),
}


@frozen
class Place:
    """Where models are: a provider with a family of them."""

    name: str
    provider: str
    talks: str
    """The model that talks, as the provider names it."""
    thinks: str
    embeds: str


PLACES = (
    Place("echo", "echo", "gpt-4o", "gpt-5-mini", "text-embedding-3-small"),
    Place("openai", "openai", "gpt-4o", "gpt-5-mini", "text-embedding-3-small"),
    Place("openai-compatible", "compatible", "gpt-4o", "gpt-5-mini", "text-embedding-3-small"),
    Place("azure-default", "azure-default", "our-chat", "our-thinker", "our-vectors"),
    Place("azure-classic", "azure", "our-chat", "our-thinker", "our-vectors"),
    Place("azure-v1", "azure-v1", "our-chat", "our-thinker", "our-vectors"),
    Place("azure-older", "azure-older", "our-chat", "our-thinker", "our-vectors"),
    Place("bedrock-claude", "aws", bedrocks.CLAUDE, bedrocks.CLAUDE, "cohere.embed-v4:0"),
    Place("bedrock-nova", "aws", bedrocks.NOVA, "amazon.nova-2-lite-v1:0", "amazon.titan-embed-text-v2:0"),
    Place("bedrock-llama", "aws", LLAMA, LLAMA, "amazon.titan-embed-text-v2:0"),
    Place("bedrock-mistral", "aws", MISTRAL, MISTRAL, "cohere.embed-english-v3"),
    Place("bedrock-mistral-7b", "aws", MISTRAL_7B, MISTRAL_7B, "cohere.embed-multilingual-v3"),
    Place("anthropic", "claude", claude.MODEL, claude.MODEL, claude.MODEL),
)
AZURES = frozenset(place.name for place in PLACES if place.provider.startswith("azure"))
"""The surfaces of Azure, and api-versions of the classic one: the default, the last, and one before Responses."""
REFERENCE = PLACES[0]
"""What the others are compared with."""
OTHERS = PLACES[1:]


@frozen
class World:
    """The gateway, the clients, and what the providers are to say."""

    gateway: Running
    openai: openai.AsyncOpenAI
    anthropic: anthropic.AsyncAnthropic
    voices: Mapping[str, Voice]
    """By provider; the echo needs none."""

    def fails(self, place: Place, failure: Scripted) -> None:
        """Let a place fail at the next request, whatever an earlier test has left there."""
        voice = self.voices[place.provider]
        voice._answers.clear()
        voice.script(failure)

    async def play(self, place: Place, lines: Sequence[Said], told: Transcript, scene: Awaitable[None]) -> list[str]:
        """Let a program talk with a place that has these lines to say, all of them, and what it wrote down."""
        voice = self.voices.get(place.provider)
        script = voice.script_of if voice is not None else Script()
        script.lines = deque(lines if voice is not None else ())
        try:
            await scene
        except (openai.APIStatusError, anthropic.APIStatusError) as refusal:
            error = refusal.body if isinstance(refusal.body, dict) else {}
            told.write(f"{type(refusal).__name__} {error.get('code')} {error.get('param')}")
            script.lines.clear()
        assert not script.lines, "the program asked fewer questions than there were answers"
        return told.lines


@asynccontextmanager
async def world() -> AsyncIterator[World]:
    """Run the fakes and the gateway."""
    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        ours, cloud = await enter(serving(OpenAIVoice())), await enter(serving(AzureVoice()))
        aws, theirs = await enter(serving(BedrockVoice())), await enter(serving(AnthropicVoice()))
        cloud.deployments = DEPLOYMENTS
        gateway = await enter(running(_config(ours.url, cloud.root, aws.root, theirs.url)))
        behind: Mapping[str, Voice] = {
            "openai": ours,
            "compatible": ours,
            "azure-default": cloud,
            "azure": cloud,
            "azure-v1": cloud,
            "azure-older": cloud,
            "aws": aws,
            "claude": theirs,
        }
        yield World(gateway, await enter(openai_client(gateway)), await enter(anthropic_client(gateway)), behind)


def _config(ours: str, cloud: str, aws: str, theirs: str) -> str:
    resource = {"plugin": "azure_openai", "endpoint": cloud, "api_key": azure.KEY}
    providers = {
        "echo": {"plugin": "echo"},
        "openai": {"plugin": "openai", "base_url": ours},
        "compatible": {"plugin": "openai", "base_url": ours, "responses": False},
        "azure-default": resource,
        "azure": {**resource, "api_version": "2025-04-01-preview"},
        "azure-v1": {**resource, "surface": "v1"},
        # From before there were Responses, which are therefore spoken over chat.
        "azure-older": {**resource, "api_version": "2024-12-01-preview"},
        "aws": {"plugin": "bedrock", "region": "us-east-1", "endpoint": aws, **bedrocks.STATIC},
        "claude": {"plugin": "anthropic", "base_url": theirs, "api_key": claude.KEY},
    }
    content = {
        "pipeline": {
            "auth": [{"plugin": "anonymous"}],
            "cost": [{"plugin": "prices", "table": [{"model": "*", "input": 1, "cached_input": 0.5, "output": 2}]}],
        },
        "providers": providers,
        "models": {
            f"{place.name}/{use}": {"max_output_tokens": 8000, "max_n": 4, "targets": [_target(place, model)]}
            for place in PLACES
            for use, model in (("talks", place.talks), ("thinks", place.thinks), ("embeds", place.embeds))
        },
    }
    return orjson.dumps(content).decode()


def _target(place: Place, model: str) -> dict[str, Any]:
    behind = DEPLOYMENTS.get(model)
    return {"provider": place.provider, "model": model, **({"base_model": behind.model} if behind else {})}
