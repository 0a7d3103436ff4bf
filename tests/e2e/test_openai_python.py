"""OpenAI's own Python SDK, unchanged, against a running gateway: synchronous and asynchronous."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, cast

import openai
import pytest
from e2e.serving import Served, serving
from openai import AsyncOpenAI, OpenAI
from openai.types.chat import (
    ChatCompletionMessageFunctionToolCall,
    ChatCompletionMessageParam,
    ChatCompletionToolParam,
)

MODEL = "gpt-4o-mini"
HELLO: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Say hello to the gateway."}]
WEATHER: ChatCompletionToolParam = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}

# What the tests of errors need beyond config/qlens.yaml.
CHANGES: dict[str, Any] = {
    "server": {"max_body_bytes": 65536},
    "pipeline": {"guard": [{"plugin": "pattern", "rules": [{"name": "words", "words": ["open sesame"]}]}]},
    "models": {
        "vendor/model:one": {"max_output_tokens": 100, "targets": [{"provider": "echo", "model": "one"}]},
        "nowhere": {"max_output_tokens": 100, "targets": [{"provider": "nowhere", "model": "any"}]},
    },
    "providers": {"nowhere": {"plugin": "openai", "base_url": "http://127.0.0.1:9/v1", "api_key": "sk-example-none"}},
}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The default configuration with a small body limit, a guard that blocks, and some models more."""
    with serving(tmp_path_factory.mktemp("served"), changes=CHANGES) as running:
        yield running


@pytest.fixture
def client(served: Served) -> Iterator[OpenAI]:
    """The synchronous client."""
    with OpenAI(base_url=f"{served.url}/v1", api_key=served.key, max_retries=0) as sdk:
        yield sdk


@pytest.fixture
async def async_client(served: Served) -> AsyncIterator[AsyncOpenAI]:
    """The asynchronous client."""
    async with AsyncOpenAI(base_url=f"{served.url}/v1", api_key=served.key, max_retries=0) as sdk:
        yield sdk


# --- answers ------------------------------------------------------------------------------------


def test_chat_answers_with_text_and_usage(client: OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=HELLO)
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens > 0


async def test_async_chat_answers_as_the_synchronous_one_does(client: OpenAI, async_client: AsyncOpenAI) -> None:
    theirs = await async_client.chat.completions.create(model=MODEL, messages=HELLO)
    ours = client.chat.completions.create(model=MODEL, messages=HELLO)
    assert theirs.choices[0].message.content == ours.choices[0].message.content


def test_stream_adds_up_to_the_answer_without_streaming(client: OpenAI) -> None:
    whole = client.chat.completions.create(model=MODEL, messages=HELLO).choices[0].message.content
    stream = client.chat.completions.create(model=MODEL, messages=HELLO, stream=True)
    chunks = list(stream)
    assert all(chunk.choices for chunk in chunks), "a chunk without choices reached a client that did not ask for usage"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert all(chunk.usage is None for chunk in chunks)


def test_stream_carries_usage_and_cost_at_its_end_when_asked(client: OpenAI) -> None:
    # A question of its own: an answer from the cache costs nothing.
    stream = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "What do you cost?"}],
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert [bool(chunk.choices) for chunk in chunks[-2:]] == [True, False]
    usage = chunks[-1].usage
    assert usage is not None
    assert usage.total_tokens > 0
    assert float((usage.model_extra or {})["cost_usd"]) > 0


async def test_async_stream_adds_up(async_client: AsyncOpenAI) -> None:
    whole = (await async_client.chat.completions.create(model=MODEL, messages=HELLO)).choices[0].message.content
    stream = await async_client.chat.completions.create(model=MODEL, messages=HELLO, stream=True)
    assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == whole


def test_stream_manager_of_the_sdk_assembles_the_answer(client: OpenAI) -> None:
    with client.chat.completions.stream(model=MODEL, messages=HELLO) as stream:
        final = stream.get_final_completion()
    whole = client.chat.completions.create(model=MODEL, messages=HELLO)
    assert final.choices[0].message.content == whole.choices[0].message.content


def test_tools_make_the_round_trip(client: OpenAI) -> None:
    messages: list[ChatCompletionMessageParam] = [{"role": "user", "content": "What is the weather in Oslo?"}]
    asked = client.chat.completions.create(model=MODEL, messages=messages, tools=[WEATHER], tool_choice="required")
    assert asked.choices[0].finish_reason == "tool_calls"
    calls = asked.choices[0].message.tool_calls
    assert calls
    call = calls[0]
    assert isinstance(call, ChatCompletionMessageFunctionToolCall)
    assert call.function.name == "weather"
    json.loads(call.function.arguments)

    messages.append(cast(ChatCompletionMessageParam, asked.choices[0].message.model_dump(exclude_none=True)))
    messages.append({"role": "tool", "tool_call_id": call.id, "content": "12 degrees and rain"})
    answer = client.chat.completions.create(model=MODEL, messages=messages, tools=[WEATHER])
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].message.content


async def test_streamed_tool_call_is_the_one_of_the_whole_answer(async_client: AsyncOpenAI) -> None:
    asked: list[ChatCompletionMessageParam] = [{"role": "user", "content": "What is the weather in Rome?"}]
    whole = await async_client.chat.completions.create(
        model=MODEL, messages=asked, tools=[WEATHER], tool_choice="required"
    )
    async with async_client.chat.completions.stream(
        model=MODEL, messages=asked, tools=[WEATHER], tool_choice="required"
    ) as stream:
        streamed = (await stream.get_final_completion()).choices[0].message.tool_calls or []
    expected = whole.choices[0].message.tool_calls or []
    assert [call.function.arguments for call in streamed] == [
        call.function.arguments for call in expected if call.type == "function"
    ]


def test_legacy_completions_answer_and_stream(client: OpenAI) -> None:
    whole = client.completions.create(model=MODEL, prompt="Once upon a time")
    assert whole.choices[0].text
    stream = client.completions.create(model=MODEL, prompt="Once upon a time", stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == whole.choices[0].text


def test_embeddings_in_base64_equal_those_in_floats(client: OpenAI) -> None:
    # Without encoding_format the SDK asks for base64 and decodes it itself.
    packed = client.embeddings.create(model="text-embedding-3-small", input=["one text", "another"])
    plain = client.embeddings.create(
        model="text-embedding-3-small", input=["one text", "another"], encoding_format="float"
    )
    assert len(packed.data) == 2
    assert packed.data[0].embedding == pytest.approx(plain.data[0].embedding, abs=1e-6)
    assert packed.data[1].embedding == pytest.approx(plain.data[1].embedding, abs=1e-6)
    assert packed.data[0].embedding != packed.data[1].embedding
    assert packed.usage.prompt_tokens > 0


async def test_async_embeddings_equal_the_synchronous_ones(client: OpenAI, async_client: AsyncOpenAI) -> None:
    theirs = await async_client.embeddings.create(model="text-embedding-3-small", input="a text", dimensions=8)
    ours = client.embeddings.create(model="text-embedding-3-small", input="a text", dimensions=8)
    assert theirs.data[0].embedding == ours.data[0].embedding
    assert len(ours.data[0].embedding) == 8


def test_models_are_listed_and_found(client: OpenAI) -> None:
    names = {model.id for model in client.models.list()}
    assert {MODEL, "text-embedding-3-small", "vendor/model:one"} <= names
    assert not any("*" in name for name in names)
    assert client.models.retrieve("vendor/model:one").id == "vendor/model:one"


async def test_async_models_are_listed_and_found(async_client: AsyncOpenAI) -> None:
    assert MODEL in {model.id async for model in async_client.models.list()}
    assert (await async_client.models.retrieve(MODEL)).object == "model"


def test_raw_response_shows_the_gateways_headers(client: OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model=MODEL, messages=[{"role": "user", "content": "Show me your headers."}]
    )
    assert raw.headers["x-request-id"]
    assert raw.headers["x-qlens-provider"] == "echo"
    assert raw.headers["x-qlens-model"] == MODEL
    assert raw.headers["x-qlens-cache"] == "miss"
    assert raw.headers["x-qlens-attempts"] == "1"
    assert float(raw.headers["x-qlens-cost-usd"]) > 0
    assert float(raw.headers["x-qlens-overhead-ms"]) >= 0
    assert int(raw.headers["x-ratelimit-remaining-requests"]) < int(raw.headers["x-ratelimit-limit-requests"])
    assert int(raw.headers["x-ratelimit-remaining-tokens"]) < int(raw.headers["x-ratelimit-limit-tokens"])
    assert raw.headers["x-ratelimit-reset-requests"]


def test_same_question_twice_is_answered_from_the_cache(client: OpenAI) -> None:
    ask: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Ask me twice."}]
    first, second = (
        client.chat.completions.with_raw_response.create(model=MODEL, messages=ask, temperature=0) for _ in range(2)
    )
    assert [first.headers["x-qlens-cache"], second.headers["x-qlens-cache"]] == ["miss", "hit"]
    assert first.parse().choices[0].message.content == second.parse().choices[0].message.content


# --- errors: every class the SDK has for what a gateway can answer -------------------------------


@pytest.mark.parametrize("key", ["sk-example-wrong", "no-key-at-all"])
def test_wrong_key_is_an_authentication_error(served: Served, key: str) -> None:
    with (
        OpenAI(base_url=f"{served.url}/v1", api_key=key, max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError) as caught,
    ):
        stranger.chat.completions.create(model=MODEL, messages=HELLO)
    assert caught.value.code == "invalid_api_key"
    assert key not in str(caught.value)


async def test_async_wrong_key_is_an_authentication_error(served: Served) -> None:
    async with AsyncOpenAI(base_url=f"{served.url}/v1", api_key="sk-example-wrong", max_retries=0) as stranger:
        with pytest.raises(openai.AuthenticationError):
            await stranger.models.list()


def test_unknown_model_is_a_not_found_error(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-none", messages=HELLO)
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-none")


def test_key_for_some_models_gets_the_same_not_found_for_the_others(served: Served) -> None:
    made = served.qlens("keys", "create", "--tenant", "small", "--model", MODEL)
    assert made.returncode == 0, made.stderr
    key = made.stdout.strip()
    with OpenAI(base_url=f"{served.url}/v1", api_key=key, max_retries=0) as small:
        wait_until_known(small)
        assert small.chat.completions.create(model=MODEL, messages=HELLO).choices
        with pytest.raises(openai.NotFoundError) as refused:
            small.chat.completions.create(model="gpt-4o", messages=HELLO)
        with pytest.raises(openai.NotFoundError) as unknown:
            small.chat.completions.create(model="gpt-none", messages=HELLO)
    assert refused.value.message.replace("gpt-4o", "X") == unknown.value.message.replace("gpt-none", "X")


def wait_until_known(client: OpenAI) -> None:
    """Wait until the gateway has read the new key: it looks at the file once a second."""
    ends = time.monotonic() + 60
    while True:
        try:
            client.models.list()
        except openai.AuthenticationError:
            assert time.monotonic() < ends, "the key is still unknown"
            time.sleep(0.1)
        else:
            return


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"model": MODEL}, "messages"),
        ({"messages": HELLO}, "model"),
        ({"model": MODEL, "messages": HELLO, "max_tokens": "many"}, "max_tokens"),
        ({"model": MODEL, "messages": HELLO, "n": 0}, "n"),
        ({"model": MODEL, "messages": "hello"}, "messages"),
    ],
)
def test_wrong_body_is_a_bad_request_error_that_names_the_parameter(
    client: OpenAI, body: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.post("/chat/completions", body=body, cast_to=object)
    assert caught.value.param == param
    assert caught.value.type == "invalid_request_error"


async def test_async_wrong_body_is_a_bad_request_error(async_client: AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError):
        await async_client.chat.completions.create(model=MODEL, messages=[])


def test_blocked_prompt_is_a_bad_request_error_that_does_not_repeat_it(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "Please open sesame now."}])
    assert caught.value.code == "content_filter"
    assert "sesame" not in str(caught.value)


def test_too_large_a_body_is_a_413(client: OpenAI) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "x" * 1_000_000}])
    assert caught.value.status_code == 413


def test_wrong_media_type_is_a_415(client: OpenAI) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        client.post(
            "/chat/completions",
            body={"model": MODEL, "messages": HELLO},
            options={"headers": {"content-type": "text/plain"}},
            cast_to=object,
        )
    assert caught.value.status_code == 415


def test_wrong_method_is_a_405_and_unknown_path_a_404(client: OpenAI) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        client.get("/chat/completions", cast_to=object)
    assert caught.value.status_code == 405
    assert caught.value.response.headers["allow"] == "POST"
    with pytest.raises(openai.NotFoundError) as unknown:
        client.get("/nothing/here", cast_to=object)
    assert unknown.value.code == "unknown_url"


def test_unreachable_provider_is_an_internal_server_error(client: OpenAI) -> None:
    with pytest.raises(openai.InternalServerError) as caught:
        client.chat.completions.create(model="nowhere", messages=HELLO)
    assert caught.value.status_code == 502
    assert caught.value.code == "upstream_unreachable"
    assert "127.0.0.1" not in str(caught.value)


def test_stream_that_breaks_is_an_api_error_after_its_first_chunks(client: OpenAI) -> None:
    stream = client.chat.completions.create(model="echo-broken", messages=HELLO, stream=True)
    chunks = []
    with pytest.raises(openai.APIError) as caught:  # noqa: PT012 - the error comes out of the loop
        for chunk in stream:
            chunks.append(chunk)
    assert chunks
    assert caught.value.code == "upstream_truncated"


async def test_async_stream_that_breaks_is_an_api_error(async_client: AsyncOpenAI) -> None:
    stream = await async_client.chat.completions.create(model="echo-broken", messages=HELLO, stream=True)
    with pytest.raises(openai.APIError):
        _ = [chunk async for chunk in stream]


def test_abandoned_stream_leaves_the_client_usable(client: OpenAI) -> None:
    stream = client.chat.completions.create(model="echo-slow", messages=HELLO, stream=True)
    next(iter(stream))
    stream.close()
    assert client.models.list().data


def test_limit_is_a_rate_limit_error_and_the_sdk_waits_as_told(tmp_path: Path) -> None:
    limit = {"per": "tenant", "requests_per_minute": 60}
    limiter = {"plugin": "token_bucket", "store": {"kind": "memory"}, "limits": [limit]}
    with (
        serving(tmp_path, changes={"pipeline": {"rate_limit": [limiter]}}) as served,
        OpenAI(base_url=f"{served.url}/v1", api_key=served.key, max_retries=0) as client,
    ):
        with pytest.raises(openai.RateLimitError) as caught:  # noqa: PT012 - one of them is refused
            for _ in range(200):
                client.chat.completions.create(model=MODEL, messages=HELLO)
        headers = caught.value.response.headers
        assert caught.value.code == "rate_limit_exceeded"
        assert caught.value.type == "requests"
        assert headers["x-ratelimit-limit-requests"] == "60"
        assert headers["x-ratelimit-remaining-requests"] == "0"
        assert 0 < float(headers["retry-after-ms"]) <= 1000 * float(headers["retry-after"])
        patient = client.with_options(max_retries=5)
        assert patient.chat.completions.create(model=MODEL, messages=HELLO).choices
