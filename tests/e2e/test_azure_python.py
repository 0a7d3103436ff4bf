"""OpenAI's own Python SDK with its Azure classes: only the endpoint and the key are the gateway's."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import openai
import pytest
from azures import CHAT, config
from e2e.serving import Served, serving
from openai import AsyncAzureOpenAI, AzureOpenAI, OpenAI
from openai.types.chat import ChatCompletionMessageParam, ChatCompletionToolParam

from qlens.testing import running
from qlens.testing.azure import BLOCKED, KEY, Deployment, FakeAzure, azure, high_demand, throttled
from qlens.testing.entra import entra
from qlens.testing.upstreams import TEXT

MODEL = "gpt-4o-mini"
VERSION = "2024-10-21"
HELLO: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Say hello to the gateway."}]
WEATHER: ChatCompletionToolParam = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The default configuration, and a model with a slash and a colon in its name."""
    models = {"vendor/model:one": {"max_output_tokens": 100, "targets": [{"provider": "echo", "model": "one"}]}}
    with serving(tmp_path_factory.mktemp("served"), changes={"models": models}) as running:
        yield running


@pytest.fixture
def client(served: Served) -> Iterator[AzureOpenAI]:
    """The synchronous client, which sends `api-key`."""
    with AzureOpenAI(azure_endpoint=served.url, api_key=served.key, api_version=VERSION, max_retries=0) as sdk:
        yield sdk


@pytest.fixture
async def async_client(served: Served) -> AsyncIterator[AsyncAzureOpenAI]:
    """The asynchronous client, which sends a token."""
    async with AsyncAzureOpenAI(
        azure_endpoint=served.url, azure_ad_token=served.key, api_version=VERSION, max_retries=0
    ) as sdk:
        yield sdk


def test_chat_answers_with_text_and_usage(client: AzureOpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=HELLO)
    assert answer.choices[0].message.content
    assert answer.usage is not None
    assert answer.usage.total_tokens > 0


async def test_a_token_is_as_good_as_a_key(async_client: AsyncAzureOpenAI) -> None:
    stream = await async_client.chat.completions.create(model=MODEL, messages=HELLO, stream=True)
    chunks = [chunk async for chunk in stream]
    assert all(chunk.choices for chunk in chunks)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


@pytest.mark.parametrize("body_model", [MODEL, "whatever"])
def test_a_deployment_of_the_client_wins_over_the_model_of_a_call(served: Served, body_model: str) -> None:
    with AzureOpenAI(
        azure_endpoint=served.url, azure_deployment=MODEL, api_key=served.key, api_version=VERSION, max_retries=0
    ) as sdk:
        answer = sdk.chat.completions.with_raw_response.create(model=body_model, messages=HELLO)
        assert answer.headers["x-qlens-model"] == MODEL
        assert answer.parse().choices[0].message.content


def test_a_models_name_may_have_slashes(client: AzureOpenAI) -> None:
    answer = client.chat.completions.with_raw_response.create(model="vendor/model:one", messages=HELLO)
    assert answer.headers["x-qlens-model"] == "vendor/model:one"


def test_the_other_operations_are_there(client: AzureOpenAI) -> None:
    assert client.completions.create(model=MODEL, prompt="Hello").choices[0].text
    vectors = client.embeddings.create(model="text-embedding-3-small", input=["a", "b"]).data
    assert [len(vector.embedding) for vector in vectors] == [1536, 1536]
    assert MODEL in [model.id for model in client.models.list()]
    assert client.models.retrieve(MODEL).id == MODEL


def test_tools_make_the_round_trip(client: AzureOpenAI) -> None:
    asked = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "What is the weather in Oslo?"}],
        tools=[WEATHER],
        tool_choice="required",
    )
    assert asked.choices[0].finish_reason == "tool_calls"


def test_what_goes_wrong_has_the_sdks_own_exceptions(served: Served, client: AzureOpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="no-such-deployment", messages=HELLO)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model=MODEL, messages=HELLO, temperature=5)
    with (
        AzureOpenAI(azure_endpoint=served.url, api_key="sk-example-wrong", api_version=VERSION, max_retries=0) as sdk,
        pytest.raises(openai.AuthenticationError),
    ):
        sdk.chat.completions.create(model=MODEL, messages=HELLO)


def test_the_v1_surface_is_there_for_the_plain_client(served: Served) -> None:
    with OpenAI(base_url=f"{served.url}/openai/v1/", api_key=served.key, max_retries=0) as sdk:
        answer = sdk.chat.completions.create(model=MODEL, messages=HELLO)
        assert answer.choices[0].message.content
        assert MODEL in [model.id for model in sdk.models.list()]


# --- Azure's client in front, Azure behind ------------------------------------------------------


@asynccontextmanager
async def between(cloud: FakeAzure, *, max_retries: int = 0) -> AsyncIterator[AsyncAzureOpenAI]:
    """Azure's client in front of a gateway in front of a fake Azure."""
    async with (
        running(config(cloud.root, deployment="deployed", base_model="gpt-4o")) as gateway,
        AsyncAzureOpenAI(
            azure_endpoint=gateway.url, api_key="sk-example-a", api_version=VERSION, max_retries=max_retries
        ) as sdk,
    ):
        yield sdk


@pytest.mark.parametrize("filtering", ["default", "asynchronous"])
async def test_azures_client_reads_azures_streams_through_the_gateway(filtering: Any) -> None:
    async with azure({"deployed": Deployment(filter=filtering)}) as cloud, between(cloud) as sdk:
        stream = await sdk.chat.completions.create(
            model="ours", messages=HELLO, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == TEXT
        assert chunks[-1].usage is not None
        assert cloud.requests[0].headers["api-key"] != "sk-example-a"


@pytest.mark.parametrize("by_token", [False, True])
async def test_the_fake_azure_is_one_to_azures_own_client(by_token: bool) -> None:
    async with entra() as identity, azure({"deployed": Deployment()}, entra=identity) as cloud:
        token = identity.token("https://cognitiveservices.azure.com")
        credential: Any = {"azure_ad_token": token} if by_token else {"api_key": KEY}
        async with AsyncAzureOpenAI(azure_endpoint=cloud.root, api_version=VERSION, max_retries=0, **credential) as sdk:
            answer = await sdk.chat.completions.create(model="deployed", messages=HELLO)
            assert answer.choices[0].message.content == TEXT
            with pytest.raises(openai.NotFoundError) as missing:
                await sdk.chat.completions.create(model="other", messages=HELLO)
            assert missing.value.code == "DeploymentNotFound"


async def test_azures_errors_are_the_exceptions_azures_client_knows() -> None:
    async with azure({"deployed": Deployment()}) as cloud, between(cloud) as sdk:
        with pytest.raises(openai.BadRequestError) as blocked:
            await sdk.chat.completions.create(model="ours", messages=[{"role": "user", "content": BLOCKED}])
        assert blocked.value.code == "content_filter"
        assert isinstance(blocked.value.body, dict)
        assert blocked.value.body["innererror"]["content_filter_result"]["violence"]["filtered"] is True
        for scripted in (throttled(1500), high_demand()):
            cloud.script(scripted)
            with pytest.raises(openai.RateLimitError):
                await sdk.chat.completions.create(model="ours", messages=HELLO)
        cloud.deployments.clear()
        with pytest.raises(openai.NotFoundError):
            await sdk.chat.completions.create(model="ours", messages=HELLO)
        cloud.keys = ()
        with pytest.raises(openai.InternalServerError) as refused:
            await sdk.chat.completions.create(model="ours", messages=HELLO)
        assert refused.value.code == "upstream_auth_error"


async def test_the_sdk_waits_as_long_as_azure_says() -> None:
    async with azure({"deployed": Deployment()}) as cloud, between(cloud, max_retries=1) as sdk:
        cloud.script(throttled(20))
        answer = await sdk.chat.completions.create(model="ours", messages=HELLO)
        assert answer.choices[0].message.content == TEXT
        assert [request.path.endswith(CHAT[3:]) for request in cloud.requests] == [True, True]
