"""Faults that other gateways had with any provider, each by its number in the list of forty, read by the SDKs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from decimal import Decimal
from typing import Any

import anthropic
import claudes
import openai
import orjson
import pytest
from azures import config as azure_config
from bedrocks import called, result, user
from bedrocks import config as bedrock_config
from claudes import openai_client
from e2e.places import OTHERS, PLACES, Place, World
from e2e.voices import Said

from qlens.testing import Running, Scripted, frames, running, upstream
from qlens.testing import anthropic as claude
from qlens.testing import bedrock as converse
from qlens.testing.azure import KEY as AZURE_KEY
from qlens.testing.azure import Deployment, azure
from qlens.testing.bedrock import bedrock
from qlens.testing.responses import THOUGHT, FakeResponses, responses_upstream

everyone = pytest.mark.parametrize("place", OTHERS, ids=lambda place: place.name)
on_one_loop = pytest.mark.asyncio(loop_scope="module")
BROKEN = Said("It is sunny today.", broken=True)
HELLO: Any = [{"role": "user", "content": "Hello"}]


# --- usage -------------------------------------------------------------------------------------

CACHED = 3059
"""Far more than what was not cached."""
PRICE = {"model": "*", "input": 10, "cached_input": 1, "output": 20}


def _converse() -> Scripted:
    counts = {"inputTokens": 5, "cacheReadInputTokens": CACHED, "outputTokens": 4, "totalTokens": 9}
    return converse.whole(converse.answer(usage=counts))


def _messages() -> Scripted:
    return claude.whole(claude.message(usage={**claude.USAGE, "input_tokens": 5, "cache_read_input_tokens": CACHED}))


def _chat(prompt: int) -> Scripted:
    message = {"role": "assistant", "content": "Hello"}
    usage = {"prompt_tokens": prompt, "completion_tokens": 4, "total_tokens": prompt + 4}
    return Scripted(
        body={
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "created": 1,
            "model": "gpt-4o",
            "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
            "usage": {**usage, "prompt_tokens_details": {"cached_tokens": CACHED}},
        }
    )


PRICED: Any = {"pipeline": {"cost": [{"plugin": "prices", "catalogue": False, "table": [PRICE]}]}}


def _compatible(url: str) -> str:
    return claudes.config({"plugin": "openai", "base_url": url, "responses": False}, "gpt-4o", **PRICED)


# An OpenAI-compatible server may leave what was cached out of its prompt tokens, which OpenAI does not.
COUNTS = {
    "bedrock": (bedrock, lambda up: bedrock_config(up.root, **PRICED), _converse),
    "anthropic": (claude.anthropic, lambda up: claudes.claude(up.url, **PRICED), _messages),
    "chat": (upstream, lambda up: _compatible(up.url), lambda: _chat(CACHED + 5)),
    "chat, cached apart": (upstream, lambda up: _compatible(up.url), lambda: _chat(5)),
}


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
async def test_pitfall_06_what_was_cached_is_billed_once_however_it_is_counted(counts: Any) -> None:
    serve, config, answer = counts
    async with serve() as up, running(config(up)) as gateway, openai_client(gateway) as sdk:
        up.script(answer())
        raw = await sdk.chat.completions.with_raw_response.create(model="ours", messages=HELLO)
        picos = 5 * 10_000_000 + CACHED * 1_000_000 + 4 * 20_000_000
        assert Decimal(raw.headers["x-qlens-cost-usd"]) * 10**12 == picos
        (receipt,) = await gateway.settled(1)
        assert (receipt.cost.picos, receipt.cost.state) == (picos, "exact")


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
async def test_pitfall_09_what_was_cached_is_within_the_input_and_never_more(counts: Any) -> None:
    serve, config, answer = counts
    async with serve() as up, running(config(up)) as gateway, openai_client(gateway) as sdk:
        up.script(answer(), answer(), answer())
        response = await sdk.responses.create(model="ours", input="Hello", store=False)
        assert response.usage is not None
        assert response.usage.input_tokens == CACHED + 5
        assert response.usage.input_tokens_details.cached_tokens == CACHED
        async with claudes.anthropic_client(gateway) as theirs:
            message = await theirs.messages.create(model="ours", max_tokens=50, messages=HELLO)
        # Anthropic's count is exclusive, and stays so.
        assert (message.usage.input_tokens, message.usage.cache_read_input_tokens) == (5, CACHED)
        for receipt in await gateway.settled(2):
            assert (receipt.usage.input, receipt.usage.cached_input, receipt.usage.output) == (5, CACHED, 4)


# --- streams -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("exception", "expected"),
    [
        ("throttlingException", openai.RateLimitError),
        ("validationException", openai.BadRequestError),
        ("serviceUnavailableException", openai.InternalServerError),
        ("internalServerException", openai.InternalServerError),
    ],
)
async def test_pitfall_11_an_exception_as_the_first_frame_has_its_true_status(
    exception: str, expected: type[openai.APIStatusError]
) -> None:
    async with bedrock() as aws, running(bedrock_config(aws.root)) as gateway, openai_client(gateway) as sdk:
        aws.script(converse.stream([frames.exception(exception, "no")]))
        with pytest.raises(expected):
            await sdk.chat.completions.create(model="ours", messages=HELLO, stream=True)


@on_one_loop
@everyone
async def test_pitfall_12_no_sdk_takes_a_truncated_stream_for_an_answer(everywhere: World, place: Place) -> None:
    name, before = f"{place.name}/talks", len(everywhere.gateway.receipts)
    everywhere.voices[place.provider].script_of.lines.extend([BROKEN] * 3)
    read: list[str] = []

    async def all_of(stream: Any) -> None:
        async for event in await stream:
            read.append(getattr(event, "type", "chunk"))

    with pytest.raises(openai.APIError):
        await all_of(everywhere.openai.chat.completions.create(model=name, messages=HELLO, stream=True))
    with pytest.raises(openai.APIError):
        await all_of(everywhere.openai.responses.create(model=name, input="Hello", stream=True))
    with pytest.raises(anthropic.APIStatusError):
        await all_of(everywhere.anthropic.messages.create(model=name, max_tokens=9, messages=HELLO, stream=True))
    assert {"chunk", "response.output_text.delta", "content_block_delta"} <= {*read}
    assert not {"response.completed", "response.incomplete", "message_stop"} & {*read}
    receipts = (await everywhere.gateway.settled(before + 3))[before:]
    assert {(receipt.outcome, receipt.error) for receipt in receipts} == {("failed", "upstream_truncated")}


BEGUN = (
    "response.created",
    "response.in_progress",
    "response.output_item.added",
    "response.content_part.added",
    "response.output_text.delta",
)
TERMINAL = {"response.completed", "response.incomplete", "response.failed", "error"}


def _events(*kinds: str) -> list[bytes]:
    """Events of a response that has begun to speak."""
    response = {"id": "resp_1", "object": "response", "status": "in_progress", "model": "m", "output": []}
    error = {"code": "server_error", "message": "It failed."}
    item = {"id": "msg_1", "type": "message", "role": "assistant", "status": "in_progress", "content": []}
    part = {"type": "output_text", "text": "", "annotations": []}
    delta = {"item_id": "msg_1", "output_index": 0, "content_index": 0}
    known: Mapping[str, dict[str, Any]] = {
        "response.created": {"response": response},
        "response.in_progress": {"response": response},
        "response.output_item.added": {"output_index": 0, "item": item},
        "response.content_part.added": {**delta, "part": part},
        "response.output_text.delta": {**delta, "delta": "Hello", "logprobs": []},
        "response.completed": {"response": {**response, "status": "completed"}},
        "response.failed": {"response": {**response, "status": "failed", "error": error}},
        "error": {**error, "param": None},
    }
    told = [{"type": kind, "sequence_number": number, **known[kind]} for number, kind in enumerate([*BEGUN, *kinds])]
    return [b"event: %s\ndata: %s\n\n" % (str(event["type"]).encode(), orjson.dumps(event)) for event in told]


@pytest.mark.parametrize(
    "kinds",
    [
        ("response.failed", "error"),
        ("error", "response.failed"),
        ("response.failed", "response.completed"),
        ("response.completed", "error"),
    ],
    ids=" then ".join,
)
async def test_pitfall_13_a_response_has_one_end(kinds: tuple[str, ...]) -> None:
    async with (
        responses_upstream() as up,
        running(claudes.compatible(up.url)) as gateway,
        openai_client(gateway) as sdk,
    ):
        up.script(Scripted(events=_events(*kinds)), Scripted(events=_events(*kinds)))
        raw = await gateway.post("/v1/responses", {"model": "ours", "input": "Hello", "stream": True})
        assert [event["type"] in TERMINAL for event in raw.events()].count(True) == 1
        assert raw.events()[-1]["type"] in TERMINAL
        read: list[str] = []

        async def all_events() -> None:
            async for event in await sdk.responses.create(model="ours", input="Hello", stream=True):
                read.append(event.type)

        if kinds[0] == "response.completed":
            await all_events()
            assert read[-1] == "response.completed"
            assert {receipt.outcome for receipt in await gateway.settled(2)} == {"complete"}
            return
        with pytest.raises(openai.APIError):
            await all_events()
        assert read == [*BEGUN]
        assert {receipt.outcome for receipt in await gateway.settled(2)} == {"failed"}


async def test_pitfall_13_a_chat_that_fails_makes_a_response_with_one_end() -> None:
    async with azure() as cloud, running(azure_config(cloud.root)) as gateway:
        head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "gpt-4o"}
        begun = {**head, "choices": [{"index": 0, "delta": {"content": "Hel"}, "finish_reason": None}]}
        failed = {"error": {"message": "It failed.", "code": "500"}}
        cloud.script(Scripted(events=[begun, failed, failed, "[DONE]"]))
        raw = await gateway.post("/v1/responses", {"model": "ours", "input": "Hello", "stream": True})
        assert [event["type"] for event in raw.events() if event["type"] in TERMINAL] == ["error"]


RESPONSES = {
    "native": (responses_upstream, lambda up: claudes.compatible(up.url), 5),
    "over chat": (azure, lambda up: azure_config(up.root), 2),
    "over messages": (claude.anthropic, lambda up: claudes.claude(up.url), 4),
}


@pytest.mark.parametrize("begun", [False, True], ids=["before the first token", "in mid-stream"])
@pytest.mark.parametrize("way", RESPONSES.values(), ids=RESPONSES)
async def test_pitfall_14_a_client_that_leaves_a_response_closes_the_connection(way: Any, begun: bool) -> None:
    serve, config, count = way
    async with serve() as up, running(config(up)) as gateway:
        up.script(Scripted(events=_begun(up, count) if begun else [], hang=True))
        body = {"model": "ours", "input": "Hello", "stream": True}
        leaving = asyncio.create_task(gateway.post("/v1/responses", body))
        (request,) = await up.arrived(1)
        await asyncio.sleep(0.05)
        leaving.cancel()
        await asyncio.wait_for(request.closed.wait(), 1)
        (receipt,) = await gateway.settled(1)
        assert receipt.outcome == "abandoned"


def _begun(up: Any, count: int) -> list[Any]:
    if isinstance(up, FakeResponses):
        return _events()
    told = list(claude.streamed(claude.message())) if isinstance(up, claude.FakeAnthropic) else _chunks()
    return told[:count]


def _chunks() -> list[Any]:
    head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "gpt-4o"}
    deltas: list[dict[str, str]] = [{"role": "assistant", "content": ""}, {"content": "Hello"}]
    return [{**head, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]


# --- requests that one provider or another refuses as they are ----------------------------------

WEATHER: Any = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}
SIGNED = {"type": "thinking", "thinking": "I must look.", "signature": claude.thinking("I must look.")["signature"]}
with_tools = pytest.mark.parametrize(
    "place", [place for place in OTHERS if place.name != "bedrock-mistral-7b"], ids=lambda place: place.name
)


async def taken(everywhere: World, place: Place, messages: list[Any], **fields: Any) -> Any:
    """The message with which a place answers; what it gets has to be in order."""
    answer = await everywhere.openai.chat.completions.create(
        model=f"{place.name}/talks", messages=messages, max_tokens=3000, **fields
    )
    return answer.choices[0].message


@on_one_loop
@with_tools
async def test_pitfall_26_results_of_parallel_calls_are_taken_in_any_order_with_words_between(
    everywhere: World, place: Place
) -> None:
    talk = [
        user("Both?"),
        called(("call_1", "get_weather", "{}"), ("call_2", "get_weather", '{"city":"Oslo"}')),
        result("call_2"),
        {"role": "system", "content": "Be brief."},
        result("call_1", [{"type": "text", "text": "rainy"}]),
        user("Well?"),
    ]
    assert (await taken(everywhere, place, talk, tools=[WEATHER])).content


@on_one_loop
@with_tools
async def test_pitfall_27_empty_arguments_and_results_are_taken(everywhere: World, place: Place) -> None:
    talk = [user("?"), called(("call_1", "get_weather", "")), result("call_1", "")]
    assert (await taken(everywhere, place, talk, tools=[WEATHER])).content


@on_one_loop
@with_tools
async def test_pitfall_30_long_and_odd_names_come_back_as_they_were(everywhere: World, place: Place) -> None:
    names = ["files/read.all", "x" * 64 + "1", "x" * 64 + "2"]
    tools: Any = [{"type": "function", "function": {"name": name}} for name in names]
    identifier = "call|1|" + "y" * 80
    talk = [user("?"), called((identifier, names[1], "{}")), result(identifier)]
    choice = {"type": "function", "function": {"name": names[2]}}
    message = await taken(everywhere, place, talk, tools=tools, tool_choice=choice)
    # Fakes call a tool that they must call, where models can be made to.
    if place.name in {"bedrock-claude", "bedrock-nova", "bedrock-mistral", "anthropic"}:
        assert [call.function.name for call in message.tool_calls] == [names[2]]


@on_one_loop
@pytest.mark.parametrize("place", OTHERS, ids=[place.name for place in OTHERS])
async def test_pitfall_32_thoughts_of_another_model_are_no_mistake_and_go_nowhere(
    everywhere: World, place: Place
) -> None:
    message = {"role": "assistant", "content": "Two.", "thinking_blocks": [SIGNED]}
    assert (await taken(everywhere, place, [user("?"), message, user("And?")])).content
    sent = everywhere.voices[place.provider].requests[-1].content
    signs = place.name in {"bedrock-claude", "anthropic"}
    assert (SIGNED["signature"].encode() in sent) == signs


@on_one_loop
@everyone
async def test_pitfall_33_temperature_and_top_p_together_are_taken(everywhere: World, place: Place) -> None:
    assert (await taken(everywhere, place, HELLO, temperature=1.5, top_p=0.9)).content


@on_one_loop
@everyone
async def test_pitfalls_35_and_36_blank_texts_and_an_assistant_that_begins_are_taken(
    everywhere: World, place: Place
) -> None:
    talk = [
        {"role": "system", "content": " "},
        {"role": "assistant", "content": "Welcome! "},
        user([{"type": "text", "text": " \n"}, {"type": "text", "text": "Hi"}]),
        {"role": "assistant", "content": ""},
        user("\n"),
    ]
    assert (await taken(everywhere, place, talk)).content


# --- affinity ----------------------------------------------------------------------------------


@asynccontextmanager
async def two_accounts() -> AsyncIterator[tuple[FakeResponses, FakeResponses, Running]]:
    """One model at two accounts; the first is down for a moment, so that the second makes the first response."""
    async with responses_upstream() as first, responses_upstream() as second:
        accounts = {"first": first, "second": second}
        content = {
            "pipeline": {"auth": [{"plugin": "anonymous"}]},
            "providers": {
                name: {"plugin": "openai", "base_url": up.url, "api_key": f"sk-example-account-{name}"}
                for name, up in accounts.items()
            },
            "models": {
                "ours": {"max_output_tokens": 1000, "targets": [{"provider": name, "model": "m"} for name in accounts]}
            },
        }
        first.script(Scripted(503, body={"error": {"message": "busy"}}))
        async with running(orjson.dumps(content).decode()) as gateway:
            yield first, second, gateway


async def test_pitfall_24_a_response_goes_on_where_it_was_made_and_nowhere_else() -> None:
    async with two_accounts() as (first, second, gateway), openai_client(gateway) as sdk:
        made = await sdk.responses.create(model="ours", input="Hello")
        assert (len(first.requests), len(second.requests)) == (1, 1)
        follow: Any = {"model": "ours", "input": "And?", "previous_response_id": made.id}
        await sdk.responses.create(**follow)
        async for _ in await sdk.responses.create(**follow, stream=True):
            pass
        assert (len(first.requests), len(second.requests)) == (1, 3)
        second.script(Scripted(503, body={"error": {"message": "busy"}}))
        with pytest.raises(openai.InternalServerError):
            await sdk.responses.create(**follow)
        assert len(first.requests) == 1, "another account does not know the response"
        await sdk.responses.create(model="ours", input="A new one")
        assert len(first.requests) == 2


async def test_pitfall_24_encrypted_reasoning_goes_back_to_the_account_that_made_it() -> None:
    async with two_accounts() as (first, second, gateway), openai_client(gateway) as sdk:
        asked: Any = {
            "model": "ours",
            "store": False,
            "reasoning": {"effort": "low"},
            "include": ["reasoning.encrypted_content"],
        }
        made = await sdk.responses.create(**asked, input="Hello")
        items = [item.to_dict() for item in made.output]
        assert THOUGHT not in str(items[0]["encrypted_content"])
        await sdk.responses.create(**asked, input=[*HELLO, *items, *HELLO])
        assert (len(first.requests), len(second.requests)) == (1, 2)


@pytest.mark.parametrize("store", [False, True])
@pytest.mark.parametrize("serve", ["openai", "azure"])
async def test_pitfall_24_an_agent_over_two_accounts_loops_without_a_failure(serve: str, store: bool) -> None:
    tool: Any = {"type": "function", "name": "look", "parameters": {"type": "object"}, "strict": False}
    asked: Any = {
        "model": "ours",
        "store": store,
        "reasoning": {"effort": "low"},
        "tools": [tool],
        **({} if store else {"include": ["reasoning.encrypted_content"]}),
    }
    async with balanced(serve) as (gateway, count), openai_client(gateway) as sdk:
        create: Any = sdk.responses.create
        for _ in range(2):
            talk: list[Any] = [*HELLO]
            before = count()
            for turn in range(8):
                choice = "required" if turn % 2 == 0 else "none"
                if turn % 3:
                    answer = await create(**asked, input=talk, tool_choice=choice)
                else:
                    stream = await create(**asked, input=talk, tool_choice=choice, stream=True)
                    answer = [event async for event in stream][-1].response
                assert answer.output[0].type == "reasoning"
                talk += [item.to_dict() for item in answer.output]
                talk += [
                    {"type": "function_call_output", "call_id": item.call_id, "output": "sunny"}
                    for item in answer.output
                    if item.type == "function_call"
                ]
                talk += HELLO if choice == "none" else []
            # A conversation stays where it began.
            assert sorted(now - then for now, then in zip(count(), before, strict=True)) == [0, 8]
        assert {receipt.outcome for receipt in await gateway.settled(16)} == {"complete"}


@asynccontextmanager
async def balanced(serve: str) -> AsyncIterator[tuple[Running, Callable[[], list[int]]]]:
    """One model at two accounts, taken in turns, and how many requests each has had."""
    async with AsyncExitStack() as stack:
        ups: list[Any] = [
            await stack.enter_async_context(
                responses_upstream() if serve == "openai" else azure({"m": Deployment("gpt-5-mini")})
            )
            for _ in range(2)
        ]
        providers = [
            {"plugin": "openai", "base_url": up.url, "api_key": f"sk-example-account-{place}"}
            if serve == "openai"
            else {
                "plugin": "azure_openai",
                "endpoint": up.root,
                "api_key": AZURE_KEY,
                "surface": ("classic", "v1")[place],
            }
            for place, up in enumerate(ups)
        ]
        if serve == "azure":
            providers[0]["api_version"] = "2025-04-01-preview"
        targets = [{"provider": f"account-{place}", "model": "m", "base_model": "gpt-5-mini"} for place in range(2)]
        content = {
            "pipeline": {"auth": [{"plugin": "anonymous"}], "route": [{"plugin": "weighted"}]},
            "providers": {f"account-{place}": provider for place, provider in enumerate(providers)},
            "models": {"ours": {"max_output_tokens": 1000, "targets": targets}},
        }
        gateway = await stack.enter_async_context(running(orjson.dumps(content).decode()))
        yield gateway, lambda: [len(up.requests) for up in ups]


# --- embeddings --------------------------------------------------------------------------------


@on_one_loop
@pytest.mark.parametrize(
    "place", [place for place in PLACES if place.name != "anthropic"], ids=lambda place: place.name
)
async def test_pitfall_40_the_sdks_default_gives_the_right_vectors(everywhere: World, place: Place) -> None:
    asked: Any = {"model": f"{place.name}/embeds", "input": ["one text", "another one"]}
    packed = await everywhere.openai.embeddings.create(**asked)
    plain = await everywhere.openai.embeddings.create(**asked, encoding_format="float")
    for one, other in zip(packed.data, plain.data, strict=True):
        assert one.embedding == pytest.approx(other.embedding, abs=1e-6)
        assert any(other.embedding)
