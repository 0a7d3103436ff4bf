"""config/production.yaml as it stands: each of its nine models is called by its alias, with OpenAI's own SDK."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack
from decimal import Decimal
from typing import Any

import openai
import pytest
import pytest_asyncio
from attrs import frozen
from e2e.serving import QLENS, ROOT, Served, receipts, run_qlens, started

from qlens.testing import azure as clouds
from qlens.testing import bedrock as converse
from qlens.testing import upstreams
from qlens.testing.azure import Deployment, FakeAzure, azure
from qlens.testing.bedrock import FakeBedrock, bedrock
from qlens.testing.nats import nats_server
from qlens.testing.oidc import oidc
from qlens.testing.redis import redis_server

pytestmark = pytest.mark.asyncio(loop_scope="module")

CONFIG = ROOT / "config" / "production.yaml"
EU = {
    "gpt-4o-prod": Deployment("gpt-4o"),
    "gpt-4o-mini-prod": Deployment("gpt-4o-mini"),
    "embeddings-prod": Deployment("text-embedding-3-small"),
}
US = {
    "gpt-4o-prod": Deployment("gpt-4o"),
    "gpt-41-prod": Deployment("gpt-4.1"),
    "gpt-5-mini-prod": Deployment("gpt-5-mini"),
}


@frozen
class Listed:
    """A model of the file, and what is known of it elsewhere."""

    alias: str
    providers: frozenset[str]
    """Those that may answer when nothing fails."""
    behind: str
    """Its deployment, or its id at Bedrock."""
    usd: tuple[str, str]
    """The list price of a million tokens of input, and of output."""
    vectors: int = 0
    """How many numbers an embedding of it has; 0: it chats."""

    def cost(self, tokens: tuple[int, int]) -> Decimal:
        """What so many tokens of input and of output cost, in USD."""
        asked, told = (count * Decimal(price) / 1_000_000 for count, price in zip(tokens, self.usd, strict=True))
        return asked + told


AZURE_EU, AZURE_US, BEDROCK = frozenset({"azure-eu"}), frozenset({"azure-us"}), frozenset({"bedrock"})
# The prices are those of the vendors' own pages: what comes from an inference profile of a region costs a tenth more.
MODELS = (
    Listed("gpt-4o", AZURE_EU | AZURE_US, "gpt-4o-prod", ("2.50", "10")),
    Listed("gpt-4o-mini", AZURE_EU, "gpt-4o-mini-prod", ("0.15", "0.60")),
    Listed("gpt-4.1", AZURE_US, "gpt-41-prod", ("2", "8")),
    Listed("gpt-5-mini", AZURE_US, "gpt-5-mini-prod", ("0.25", "2")),
    Listed("text-embedding-3-small", AZURE_EU, "embeddings-prod", ("0.02", "0"), vectors=3),
    Listed("claude-sonnet", BEDROCK, "us.anthropic.claude-sonnet-4-5-20250929-v1:0", ("3.30", "16.50")),
    Listed("claude-haiku", BEDROCK, "us.anthropic.claude-haiku-4-5-20251001-v1:0", ("1.10", "5.50")),
    Listed("nova-lite", BEDROCK, "amazon.nova-lite-v1:0", ("0.06", "0.24")),
    Listed("titan-embed", BEDROCK, "amazon.titan-embed-text-v2:0", ("0.02", "0"), vectors=1024),
)
CHATS = [model for model in MODELS if not model.vectors]
EMBEDDINGS = [model for model in MODELS if model.vectors]
TEXTS = {"azure": upstreams.TEXT, "bedrock": converse.TEXT}
TOKENS = {
    "azure": (upstreams.USAGE["prompt_tokens"], upstreams.USAGE["completion_tokens"]),
    "bedrock": (converse.USAGE["inputTokens"], converse.USAGE["outputTokens"]),
}


def named(model: Listed) -> str:
    return model.alias


@frozen
class Production:
    """The gateway, and everything that it finds through the variables of its environment."""

    served: Served
    env: Mapping[str, str]
    azures: Mapping[str, FakeAzure]
    aws: FakeBedrock

    def key(self, *arguments: str) -> str:
        """A key that `qlens keys create` makes, as an operator does."""
        made = run_qlens("keys", "create", "-c", str(CONFIG), *arguments, env=self.env)
        assert made.returncode == 0, made.stderr
        return made.stdout.strip()

    def sdk(self, key: str) -> openai.AsyncOpenAI:
        """OpenAI's client with this key; it repeats nothing."""
        return openai.AsyncOpenAI(base_url=f"{self.served.url}/v1", api_key=key, max_retries=0)

    def asked_for(self, provider: str) -> str:
        """What the last request to a provider was for: its deployment, or its model."""
        if provider == "bedrock":
            return self.aws.models[-1]
        request = self.azures[provider].requests[-1]
        return str(request.body["model"]) if provider == "azure-us" else request.path.split("/")[3]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def production(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Production]:
    """`qlens serve config/production.yaml`, unchanged, among the backends that its variables name.

    OpenAI itself is asked only when all others fail, which would be a fault here.
    """
    folder = tmp_path_factory.mktemp("production")
    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        redis, nats, issuer = await enter(redis_server()), await enter(nats_server()), await enter(oidc())
        eu, us = await enter(azure(EU)), await enter(azure(US))
        aws = await enter(bedrock())
        env = {
            "QLENS_HOST": "127.0.0.1",
            "QLENS_LEDGER": f"sqlite:///{folder}/qlens.db",
            "QLENS_LEDGER_DATABASE": f"sqlite:///{folder}/qlens.db",
            "QLENS_OUTBOX": str(folder / "outbox"),
            "QLENS_ISSUER": issuer.issuer,
            "REDIS_URL": redis.url,
            "QLENS_REPLICAS": "1",
            "NATS_URL": nats.url,
            "AZURE_OPENAI_ENDPOINT_EU": eu.root,
            "AZURE_OPENAI_API_KEY_EU": clouds.KEY,
            "AZURE_OPENAI_ENDPOINT_US": us.root,
            "AZURE_OPENAI_API_KEY_US": clouds.KEY,
            "OPENAI_API_KEY": "sk-example-openai",
            "AWS_ENDPOINT_URL_BEDROCK_RUNTIME": aws.root,
            "AWS_ACCESS_KEY_ID": converse.KEY.access_key,
            "AWS_SECRET_ACCESS_KEY": converse.KEY.secret_key,
        }
        served = stack.enter_context(started([*QLENS, "serve", str(CONFIG)], folder, env))
        yield Production(served, env, {"azure-eu": eu, "azure-us": us}, aws)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def sdk(production: Production) -> AsyncIterator[openai.AsyncOpenAI]:
    """A client that may use all models."""
    async with production.sdk(production.key("--tenant", "acme", "--project", "search")) as client:
        yield client


def hello(model: Listed, way: str) -> Any:
    """A question that no other test asks, so that no cache answers it."""
    return [{"role": "user", "content": f"Hello {model.alias}, {way}"}]


def kind(provider: str) -> str:
    """What sort of provider it is."""
    return provider.partition("-")[0]


async def test_the_models_are_these_nine(sdk: openai.AsyncOpenAI) -> None:
    assert {model.id async for model in sdk.models.list()} == {model.alias for model in MODELS}
    assert len(MODELS) == 9


@pytest.mark.parametrize("model", CHATS, ids=named)
async def test_each_model_that_chats_answers_to_its_alias_and_says_what_it_cost(
    production: Production, sdk: openai.AsyncOpenAI, model: Listed
) -> None:
    # Reasoning models know no max_tokens and no temperature: what the gateway sends is for it to know.
    asked: Any = {"model": model.alias, "messages": hello(model, "whole"), "max_tokens": 50, "temperature": 0.2}
    raw = await sdk.chat.completions.with_raw_response.create(**asked)
    provider = raw.headers["x-qlens-provider"]
    assert provider in model.providers
    assert production.asked_for(provider) == model.behind
    assert raw.headers["x-qlens-model"] == model.alias
    assert Decimal(raw.headers["x-qlens-cost-usd"]) == model.cost(TOKENS[kind(provider)])
    assert raw.parse().choices[0].message.content == TEXTS[kind(provider)]


@pytest.mark.parametrize("model", CHATS, ids=named)
async def test_each_model_that_chats_streams_and_says_at_the_end_what_it_cost(
    production: Production, sdk: openai.AsyncOpenAI, model: Listed
) -> None:
    stream = await sdk.chat.completions.create(
        model=model.alias, messages=hello(model, "streamed"), stream=True, stream_options={"include_usage": True}
    )
    provider = stream.response.headers["x-qlens-provider"]
    *chunks, last = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == TEXTS[kind(provider)]
    assert last.usage is not None
    assert last.usage.model_extra is not None
    assert Decimal(last.usage.model_extra["cost_usd"]) == model.cost(TOKENS[kind(provider)])
    assert provider in model.providers
    assert production.asked_for(provider) == model.behind


@pytest.mark.parametrize("model", EMBEDDINGS, ids=named)
async def test_each_model_for_embeddings_answers_to_its_alias_and_says_what_it_cost(
    production: Production, sdk: openai.AsyncOpenAI, model: Listed
) -> None:
    raw = await sdk.embeddings.with_raw_response.create(model=model.alias, input=["one text", "another"])
    answer = raw.parse()
    assert [len(entry.embedding) for entry in answer.data] == [model.vectors] * 2
    assert {raw.headers["x-qlens-provider"]} == model.providers
    assert production.asked_for(raw.headers["x-qlens-provider"]) == model.behind
    cost = Decimal(raw.headers["x-qlens-cost-usd"])
    assert cost == model.cost((answer.usage.prompt_tokens, 0)) > 0


async def test_a_key_lists_and_calls_the_models_that_it_may_use_and_no_others(production: Production) -> None:
    key = production.key("--tenant", "globex", "--model", "claude-haiku", "--model", "gpt-4o*")
    async with production.sdk(key) as sdk:
        assert {model.id async for model in sdk.models.list()} == {"claude-haiku", "gpt-4o", "gpt-4o-mini"}
        assert (await sdk.models.retrieve("claude-haiku")).id == "claude-haiku"
        answer = await sdk.chat.completions.create(model="claude-haiku", messages=hello(CHATS[0], "globex"))
        assert answer.choices[0].message.content == converse.TEXT
        for refused in ("claude-sonnet", "none-of-ours"):
            with pytest.raises(openai.NotFoundError):
                await sdk.models.retrieve(refused)
            with pytest.raises(openai.NotFoundError) as caught:
                await sdk.chat.completions.create(model=refused, messages=hello(CHATS[0], "globex"))
            assert caught.value.code == "model_not_found"


async def test_what_it_cost_is_in_the_ledger_though_commands_run_beside_the_gateway(production: Production) -> None:
    async with production.sdk(production.key("--tenant", "initech")) as sdk:
        raw = await sdk.chat.completions.with_raw_response.create(
            model="nova-lite", messages=hello(CHATS[0], "initech")
        )
    env = {**production.env, "QLENS_CONFIG": str(CONFIG)}
    async with asyncio.timeout(10):
        while not (rows := receipts(production.served, "--tenant", "initech", env=env)):
            await asyncio.sleep(0.1)
    (row,) = rows
    assert (row["model"], row["calls"]) == ("nova-lite", 1)
    assert Decimal(row["cost_usd"]) == Decimal(raw.headers["x-qlens-cost-usd"])
