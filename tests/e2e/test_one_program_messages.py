"""One program with Anthropic's own SDK, unchanged: wherever the model is, what it reads has the same shape."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import anthropic
import bedrocks
import orjson
import pytest
from attrs import field, frozen
from e2e.places import AZURES, OTHERS, PLACES, Place, World
from e2e.programs import Program, Scene
from e2e.transcripts import Difference, Transcript, changed, instead
from e2e.voices import Said

pytestmark = pytest.mark.asyncio(loop_scope="module")


def _tool(name: str, parameter: str) -> dict[str, Any]:
    schema = {"type": "object", "properties": {parameter: {"type": "string"}}, "required": [parameter]}
    return {"name": name, "description": f"Does {name}.", "input_schema": schema}


TOOLS: Any = [_tool("get_weather", "city"), _tool("get_time", "zone")]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}},
    "required": ["name"],
    "additionalProperties": False,
}
SOURCE = {"type": "base64", "media_type": "image/png", "data": bedrocks.PNG}
THINKING = {"type": "enabled", "budget_tokens": 1024}
SUNNY = Said("It is sunny.")
WEATHER = Said(calls=(("get_weather", {"city": "Oslo"}),))
BOTH = Said(calls=(("get_weather", {"city": "Oslo"}), ("get_time", {"zone": "Europe/Oslo"})))
THOUGHT = Said("Two.", thought="One and one.")


@frozen
class Asking:
    """The program's whole knowledge of where its models are: their names."""

    sdk: anthropic.AsyncAnthropic
    talks: str
    thinks: str
    told: Transcript = field(factory=Transcript)

    async def message(self, *messages: Any, **fields: Any) -> Any:
        """Ask for a message and write down what came."""
        answer = await self.sdk.messages.create(**self._asked(messages, fields))
        self.told.message(answer)
        return answer

    async def stream(self, *messages: Any, **fields: Any) -> Any:
        """Ask for a stream, and write down its events and what the SDK makes of them."""
        events = [event async for event in await self.sdk.messages.create(**self._asked(messages, fields), stream=True)]
        self.told.message_events(events)

    async def assembled(self, *messages: Any, **fields: Any) -> Any:
        """Ask for a stream that the SDK puts together, and write down what it made."""
        async with self.sdk.messages.stream(**self._asked(messages, fields)) as told:
            answer = await told.get_final_message()
        self.told.message(answer)
        return answer

    def _asked(self, messages: tuple[Any, ...], fields: Mapping[str, Any]) -> Any:
        talk = [{"role": "user", "content": each} if isinstance(each, str) else each for each in messages]
        return {"model": self.talks, "max_tokens": 2000, "messages": talk, **fields}


def _turns(answer: Any) -> list[Any]:
    """An answer that calls tools, and what they gave."""
    results = [
        {"type": "tool_result", "tool_use_id": block.id, "content": "sunny"}
        for block in answer.content
        if block.type == "tool_use"
    ]
    return [{"role": "assistant", "content": answer.content}, {"role": "user", "content": results}]


# --- the program -------------------------------------------------------------------------------


async def text(ask: Asking) -> None:
    # The SDK has no sampling parameters of its own any more.
    more = {"temperature": 0.5, "top_k": 40}
    await ask.message("Hello", system="Be brief.", metadata={"user_id": "u-1"}, extra_body=more)


async def stream(ask: Asking) -> None:
    await ask.stream("Hello", system=[{"type": "text", "text": "Be brief."}])
    await ask.assembled("Hello")


async def tools_over_two_turns(ask: Asking) -> None:
    question = "Call get_weather for Oslo"
    called = await ask.message(question, tools=TOOLS, tool_choice={"type": "auto"})
    await ask.message(question, *_turns(called), tools=TOOLS)


async def parallel_tools_streamed(ask: Asking) -> None:
    question = "Call get_weather and get_time"
    await ask.stream(question, tools=TOOLS)
    called = await ask.assembled(question, tools=TOOLS)
    await ask.assembled(question, *_turns(called), tools=TOOLS)


async def forced_tool(ask: Asking) -> None:
    choice = {"type": "tool", "name": "get_weather", "disable_parallel_tool_use": True}
    await ask.message("Oslo?", tools=TOOLS, tool_choice=choice)


async def image(ask: Asking) -> None:
    parts = [{"type": "text", "text": "What is it?"}, {"type": "image", "source": SOURCE}]
    await ask.message({"role": "user", "content": parts})


async def schema(ask: Asking) -> None:
    form = {"format": {"type": "json_schema", "schema": SCHEMA}}
    answer = await ask.message("A city", output_config=form)
    assert orjson.loads(answer.content[0].text).keys() == {"name"}


async def thinking(ask: Asking) -> None:
    answer = await ask.message("Think", model=ask.thinks, thinking=THINKING)
    await ask.stream("Think", model=ask.thinks, thinking=THINKING)
    thought = {"role": "assistant", "content": answer.content}
    await ask.message("Think", thought, "And?", model=ask.thinks, thinking=THINKING)


async def stop(ask: Asking) -> None:
    await ask.message("Count to END and on", stop_sequences=["END"])


async def cut(ask: Asking) -> None:
    await ask.message("one two three four five six seven", max_tokens=2)


async def headers(ask: Asking) -> None:
    asked: Any = {"model": ask.talks, "max_tokens": 50, "messages": [{"role": "user", "content": "Hello"}]}
    whole = await ask.sdk.messages.with_raw_response.create(**asked)
    ask.told.headers(whole.headers)
    async with ask.sdk.messages.with_streaming_response.create(**asked, stream=True) as told:
        ask.told.headers(told.headers)
        await told.read()


async def mistakes(ask: Asking) -> None:
    wrong: list[dict[str, Any]] = [
        {"model": f"{ask.talks}-none"},
        {"messages": []},
        {"max_tokens": -1},
        {"tools": [{"input_schema": {}}]},
    ]
    for fields in wrong:
        with pytest.raises(anthropic.APIStatusError) as caught:
            await ask.message("Hello", **fields)
        ask.told.write(f"{type(caught.value).__name__} {caught.value.type}")


SCENES: Mapping[Scene[Asking], tuple[Said, ...]] = {
    text: (SUNNY,),
    stream: (SUNNY, SUNNY),
    tools_over_two_turns: (WEATHER, SUNNY),
    parallel_tools_streamed: (BOTH, BOTH, SUNNY),
    forced_tool: (WEATHER,),
    image: (SUNNY,),
    schema: (Said('{"name":"Oslo"}'),),
    thinking: (THOUGHT, THOUGHT, THOUGHT),
    stop: (SUNNY,),
    cut: (Said("one two", cut=True),),
    headers: (SUNNY, SUNNY),
    mistakes: (),
}
"""The program, and what the models say in it."""


# --- what differs, and why ---------------------------------------------------------------------

SIGNED = changed(
    {
        "block 0: text": ("block 0: thinking, signed", "block 1: text"),
        "0 start text": ("0 start thinking", "0 thinking_delta", "0 signature_delta", "0 stop", "1 start text"),
        "0 text_delta": "1 text_delta",
        "0 stop": "1 stop",
    }
)
UNSIGNED = changed(
    {
        "block 0: text": ("block 0: thinking", "block 1: text"),
        "0 start text": ("0 start thinking", "0 thinking_delta", "0 stop", "1 start text"),
        "0 text_delta": "1 text_delta",
        "0 stop": "1 stop",
    }
)
CLAUDE = Difference("OpenAI and Azure keep thoughts to themselves; Claude shows and signs them.", SIGNED)
NOVA = Difference("Nova shows its thoughts, and does not sign them.", UNSIGNED)
NO_TOOLS = Difference("This model takes no tools.", instead("BadRequestError None None"))
REGION = Difference("Azure says where it answered.", changed({"x-qlens-attempts": ("x-ms-region", "x-qlens-attempts")}))

DIFFERENCES: Mapping[Scene[Asking], Mapping[str, Difference]] = {
    tools_over_two_turns: {"bedrock-mistral-7b": NO_TOOLS},
    parallel_tools_streamed: {"bedrock-mistral-7b": NO_TOOLS},
    forced_tool: {"bedrock-mistral-7b": NO_TOOLS},
    thinking: {"bedrock-claude": CLAUDE, "bedrock-nova": NOVA, "anthropic": CLAUDE},
    headers: dict.fromkeys(AZURES, REGION),
}
"""All there is: whatever stands here must differ, and nothing else may."""

UNKNOWN: Mapping[str, set[str]] = {}
"""The fields that Anthropic's SDK does not know, and where they come from: none."""


# --- the tests ---------------------------------------------------------------------------------


def _asking(everywhere: World, place: Place, told: Transcript) -> Asking:
    return Asking(everywhere.anthropic, f"{place.name}/talks", f"{place.name}/thinks", told)


PROGRAM = Program(_asking, SCENES, DIFFERENCES, UNKNOWN)


@pytest.mark.parametrize("place", OTHERS, ids=lambda place: place.name)
@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.__name__)
async def test_the_program_reads_the_same_wherever_the_model_is(
    everywhere: World, scene: Scene[Asking], place: Place
) -> None:
    found, wanted = await PROGRAM.compared(everywhere, place, scene)
    assert found == wanted


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.name)
async def test_no_place_adds_fields_but_these(everywhere: World, place: Place) -> None:
    found, wanted = await PROGRAM.added(everywhere, place)
    assert found == wanted
