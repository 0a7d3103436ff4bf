"""Anthropic's own Python SDK, unchanged, against every kind of provider: one program, the same transcript."""

from __future__ import annotations

import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anthropic
import azures
import bedrocks
import orjson
import pytest
from attrs import field, frozen
from claudes import anthropic_client, claude, compatible
from e2e.serving import Served, serving

from qlens import sse
from qlens.dialects import chat
from qlens.testing import Running, Scripted, running, upstream
from qlens.testing import anthropic as claude_fake
from qlens.testing import azure as azure_fake
from qlens.testing import bedrock as bedrock_fake
from qlens.testing.upstreams import FakeUpstream
from qlens_plugins.cost.prices.catalogue import Catalogue

HELLO: dict[str, Any] = {"role": "user", "content": "Hello"}
WEATHER = {
    "name": "get_weather",
    "description": "The weather of a city.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": bedrocks.PNG}}
Calls = Mapping[str, Mapping[str, Any]]
"""What tools are called with, by the ids of the calls."""


# --- the providers -----------------------------------------------------------------------------


def as_messages(said: str, calls: Calls, *, stream: bool) -> Scripted:
    """What Anthropic says."""
    blocks = [claude_fake.text(said)] if said else []
    blocks += [claude_fake.tool_use(identifier, "get_weather", given) for identifier, given in calls.items()]
    told = claude_fake.message(*blocks, stop="tool_use" if calls else "end_turn")
    return claude_fake.stream(told) if stream else claude_fake.whole(told)


def as_chat(said: str, calls: Calls, *, stream: bool) -> Scripted:
    """What OpenAI, Azure and their like say."""
    functions = [
        {
            "id": identifier,
            "type": "function",
            "function": {"name": "get_weather", "arguments": orjson.dumps(given).decode()},
        }
        for identifier, given in calls.items()
    ]
    message = {"role": "assistant", "content": said or None, **({"tool_calls": functions} if calls else {})}
    told = {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "gpt-4o-2024-11-20",
        "choices": [{"index": 0, "message": message, "finish_reason": "tool_calls" if calls else "stop"}],
        "usage": {"prompt_tokens": 9, "completion_tokens": 4, "total_tokens": 13},
    }
    return Scripted(events=[*chat.explode(told), sse.DONE]) if stream else Scripted(body=told)


def as_converse(said: str, calls: Calls, *, stream: bool) -> Scripted:
    """What Bedrock says."""
    blocks: list[dict[str, Any]] = [{"text": said}] if said else []
    blocks += [
        {"toolUse": {"toolUseId": identifier, "name": "get_weather", "input": given}}
        for identifier, given in calls.items()
    ]
    told = bedrock_fake.answer(*blocks, stop="tool_use" if calls else "end_turn")
    return bedrock_fake.stream(bedrock_fake.streamed(told)) if stream else bedrock_fake.whole(told)


@frozen
class Place:
    """A provider to ask: a fake of it, how it is configured, and what it says."""

    name: str
    serve: Callable[[], Any] = field(repr=False)
    config: Callable[[Any], str] = field(repr=False)
    says: Callable[..., Scripted] = field(repr=False)


PLACES = [
    Place("anthropic", claude_fake.anthropic, lambda up: claude(up.url), as_messages),
    Place("openai", upstream, lambda up: compatible(up.url), as_chat),
    Place("azure", azure_fake.azure, lambda up: azures.config(up.root, base_model="gpt-4o"), as_chat),
    Place("azure v1", azure_fake.azure, lambda up: azures.config(up.root, base_model="gpt-4o", surface="v1"), as_chat),
    Place("bedrock claude", bedrock_fake.bedrock, lambda up: bedrocks.config(up.root, bedrocks.CLAUDE), as_converse),
    Place("bedrock nova", bedrock_fake.bedrock, lambda up: bedrocks.config(up.root, bedrocks.NOVA), as_converse),
    Place("bedrock llama", bedrock_fake.bedrock, lambda up: bedrocks.config(up.root, bedrocks.LLAMA), as_converse),
]


@frozen
class Asked:
    """A gateway with one provider behind it."""

    place: Place
    provider: FakeUpstream
    gateway: Running
    sdk: anthropic.AsyncAnthropic

    def say(self, said: str = "", calls: Calls | None = None, *, stream: bool = False) -> None:
        """What the provider answers to the next request."""
        self.provider.script(self.place.says(said, calls or {}, stream=stream))


@asynccontextmanager
async def asking(place: Place) -> AsyncIterator[Asked]:
    async with place.serve() as fake, running(place.config(fake)) as gateway, anthropic_client(gateway) as sdk:
        yield Asked(place, fake, gateway, sdk)


@pytest.fixture(params=PLACES, ids=[place.name for place in PLACES])
async def asked(request: pytest.FixtureRequest) -> AsyncIterator[Asked]:
    async with asking(request.param) as found:
        yield found


async def heard(asked: Asked, **fields: Any) -> Any:
    """The answer to a stream, put together by the SDK."""
    async with asked.sdk.messages.stream(**_known(fields)) as events:
        return await events.get_final_message()


async def answered(asked: Asked, **fields: Any) -> Any:
    """The answer in one piece."""
    return await asked.sdk.messages.create(**_known(fields))


def _known(fields: Mapping[str, Any]) -> Any:
    return {"model": "ours", "max_tokens": 2000, "messages": [HELLO], **fields}


@pytest.fixture(params=[answered, heard], ids=["whole", "stream"])
def ask(request: pytest.FixtureRequest) -> Any:
    return request.param


# --- the program -------------------------------------------------------------------------------


async def test_a_text_and_what_it_used(asked: Asked, ask: Any) -> None:
    asked.say("Hello from there.", stream=ask is heard)
    answer = await ask(asked, system="Be brief.", stop_sequences=["END"], metadata={"user_id": "u-1"})
    assert [(block.type, block.text) for block in answer.content] == [("text", "Hello from there.")]
    assert (answer.type, answer.role, answer.stop_reason) == ("message", "assistant", "end_turn")
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (9, 4)
    assert answer.id.startswith("msg_")
    receipt = (await asked.gateway.settled(1))[0]
    assert (receipt.operation, receipt.outcome, receipt.usage.total) == ("messages", "complete", 13)
    assert receipt.usage.source == "provider"


async def test_parallel_tools_over_two_turns(asked: Asked, ask: Any) -> None:
    calls = {"call_1": {"city": "Oslo"}, "call_2": {"city": "Ålesund"}}
    asked.say("I look.", calls, stream=ask is heard)
    asked.say("Both are sunny.", stream=ask is heard)
    first = await ask(asked, tools=[WEATHER], tool_choice={"type": "auto"})
    assert first.stop_reason == "tool_use"
    called = {block.id: block.input for block in first.content if block.type == "tool_use"}
    assert called == calls
    results = [{"type": "tool_result", "tool_use_id": name, "content": "sunny"} for name in called]
    history = [HELLO, {"role": "assistant", "content": first.content}, {"role": "user", "content": results}]
    last = await ask(asked, messages=history, tools=[WEATHER])
    assert [block.text for block in last.content] == ["Both are sunny."]
    raw = asked.provider.requests[-1].content.decode()
    assert raw.count("call_1") == raw.count("call_2") == 2


async def test_a_forced_tool_a_failed_one_and_one_at_a_time(asked: Asked) -> None:
    failed = {"type": "tool_result", "tool_use_id": "call_1", "content": "no network", "is_error": True}
    called = claude_fake.tool_use("call_1", "get_weather", {"city": "Oslo"})
    history = [HELLO, {"role": "assistant", "content": [called]}, {"role": "user", "content": [failed]}]
    asked.say("", {"call_2": {"city": "Oslo"}})
    choice = {"type": "tool", "name": "get_weather", "disable_parallel_tool_use": True}
    answer = await answered(asked, messages=history, tools=[WEATHER], tool_choice=choice)
    assert [block.id for block in answer.content] == ["call_2"]
    assert "no network" in asked.provider.requests[-1].content.decode()


async def test_an_image(asked: Asked, ask: Any) -> None:
    asked.say("A dot.", stream=ask is heard)
    question = {"role": "user", "content": [{"type": "text", "text": "What is it?"}, IMAGE]}
    answer = await ask(asked, messages=[question])
    assert answer.content[0].text == "A dot."
    assert bedrocks.PNG in asked.provider.requests[-1].content.decode()


async def test_an_answer_that_fits_a_schema(asked: Asked) -> None:
    asked.say('{"city":"Oslo"}')
    answer = await answered(asked, output_config={"format": {"type": "json_schema", "schema": SCHEMA}})
    assert orjson.loads(answer.content[0].text) == {"city": "Oslo"}
    assert '"city"' in orjson.dumps(asked.provider.requests[-1].body).decode().replace('\\"', '"')


async def test_caching_and_thinking_are_no_mistake_anywhere(asked: Asked, ask: Any) -> None:
    # Not scripted: each fake answers by itself, once it has found nothing to refuse.
    cached = [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]
    answer = await ask(asked, system=cached, thinking={"type": "enabled", "budget_tokens": 1024})
    assert answer.content[-1].text.startswith("Hello from")


async def test_what_the_provider_refuses_is_the_sdks_exception(asked: Asked) -> None:
    asked.provider.script(Scripted(503, body=b"<html>"))
    with pytest.raises(anthropic.InternalServerError) as caught:
        await answered(asked)
    assert caught.value.type == "overloaded_error"
    with pytest.raises(anthropic.NotFoundError):
        await answered(asked, model="nobody")
    with pytest.raises(anthropic.BadRequestError, match="Supported values"):
        await answered(asked, messages=[{"role": "tool", "content": "x"}])


# --- the gateway itself ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The default configuration, as a process of its own."""
    with serving(tmp_path_factory.mktemp("served")) as found:
        yield found


@pytest.fixture
def client(served: Served) -> Iterator[anthropic.Anthropic]:
    """The synchronous client, with the key that the gateway made."""
    with anthropic.Anthropic(base_url=served.url, api_key=served.key, max_retries=0) as sdk:
        yield sdk


def test_the_first_call_after_the_start(client: anthropic.Anthropic) -> None:
    answer = client.messages.create(
        model="gpt-4o-mini", max_tokens=50, messages=[{"role": "user", "content": "Say hello."}]
    )
    assert [block.to_dict()["text"] for block in answer.content] == ["Say hello."]
    with client.messages.stream(
        model="gpt-4o-mini", max_tokens=50, messages=[{"role": "user", "content": "Say hello."}]
    ) as told:
        assert "".join(told.text_stream) == "Say hello."


def test_a_key_that_is_wrong_is_the_clients_mistake(served: Served) -> None:
    with (
        anthropic.Anthropic(base_url=served.url, api_key="sk-example-wrong", max_retries=0) as sdk,
        pytest.raises(anthropic.AuthenticationError) as caught,
    ):
        sdk.messages.create(model="gpt-4o-mini", max_tokens=5, messages=[{"role": "user", "content": "x"}])
    assert caught.value.type == "authentication_error"


def test_a_key_in_the_older_header_is_taken_too(served: Served) -> None:
    # As SDKs before 2.0 send it.
    headers = {"content-type": "application/json", "x-api-key": served.key}
    body = orjson.dumps({"model": "gpt-4o-mini", "max_tokens": 5, "messages": [HELLO]})
    request = urllib.request.Request(f"{served.url}/v1/messages", data=body, headers=headers)
    with urllib.request.urlopen(request, timeout=10) as answer:
        assert orjson.loads(answer.read())["type"] == "message"


def test_the_configuration_for_claude_names_models_that_have_prices() -> None:
    catalogue = Catalogue.read()
    for line in (Path(__file__).parents[2] / "config" / "claude.yaml").read_text().splitlines():
        if "model: claude" in line:
            assert catalogue.find("anthropic", line.split("model: ")[1].strip("} "))
