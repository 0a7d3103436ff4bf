"""One program with OpenAI's own SDK, unchanged: wherever the model is, what it reads has the same shape."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import bedrocks
import openai
import pytest
from attrs import field, frozen
from e2e.places import AZURES, OTHERS, PLACES, Place, World
from e2e.programs import Program, Scene
from e2e.transcripts import Difference, Transcript, changed, instead
from e2e.voices import Said
from pydantic import BaseModel

pytestmark = pytest.mark.asyncio(loop_scope="module")


def _tool(name: str, parameter: str) -> dict[str, Any]:
    schema = {"type": "object", "properties": {parameter: {"type": "string"}}, "required": [parameter]}
    return {"type": "function", "function": {"name": name, "description": f"Does {name}.", "parameters": schema}}


TOOLS: Any = [_tool("get_weather", "city"), _tool("get_time", "zone")]
SUNNY = Said("It is sunny.")
WEATHER = Said(calls=(("get_weather", {"city": "Oslo"}),))
BOTH = Said(calls=(("get_weather", {"city": "Oslo"}), ("get_time", {"zone": "Europe/Oslo"})))


class City(BaseModel):
    """What an answer is to be parsed into."""

    name: str
    people: int


@frozen
class Asking:
    """The program's whole knowledge of where its models are: their names."""

    sdk: openai.AsyncOpenAI
    talks: str
    thinks: str
    embeds: str
    told: Transcript = field(factory=Transcript)

    async def chat(self, *messages: Any, **fields: Any) -> Any:
        """Ask for a chat completion and write down what came."""
        answer = await self.sdk.chat.completions.create(
            **{"model": self.talks, "messages": _conversation(messages), **fields}
        )
        self.told.chat(answer)
        return answer.choices[0].message

    async def stream(self, *messages: Any, **fields: Any) -> list[Any]:
        """Ask for a stream and write down what came."""
        asked = {"model": self.talks, "messages": _conversation(messages), "stream": True, **fields}
        chunks = [chunk async for chunk in await self.sdk.chat.completions.create(**asked)]
        self.told.chunks(chunks)
        return chunks


def _conversation(messages: tuple[Any, ...]) -> list[Any]:
    return [{"role": "user", "content": each} if isinstance(each, str) else each for each in messages]


def _results(message: Any) -> list[dict[str, str]]:
    return [{"role": "tool", "tool_call_id": call.id, "content": "sunny"} for call in message.tool_calls]


# --- the program -------------------------------------------------------------------------------


async def text(ask: Asking) -> None:
    await ask.chat(
        {"role": "system", "content": "Be brief."},
        {"role": "developer", "content": "Be kind."},
        "Hello",
        max_tokens=100,
        temperature=0.5,
        user="u-1",
    )


async def stream(ask: Asking) -> None:
    await ask.stream("Hello", max_completion_tokens=100, stream_options={"include_usage": True})


async def stream_without_usage(ask: Asking) -> None:
    await ask.stream("Hello")


async def stream_assembled(ask: Asking) -> None:
    asked: Any = {"model": ask.talks, "messages": _conversation(("Hello",))}
    async with ask.sdk.chat.completions.stream(**asked, stream_options={"include_usage": True}) as told:
        async for _ in told:
            pass
        ask.told.chat(await told.get_final_completion())


async def tools_over_several_turns(ask: Asking) -> None:
    talk: list[Any] = ["Call get_weather for Oslo"]
    for question in ("Call get_weather for Rome", None):
        called = await ask.chat(*talk, tools=TOOLS, tool_choice="auto")
        talk += [called, *_results(called)]
        talk += [await ask.chat(*talk, tools=TOOLS)]
        if question:
            talk.append(question)
    talk.append("Thank you")
    await ask.chat(*talk)  # the history has tools, the question has none


async def parallel_tools(ask: Asking) -> None:
    called = await ask.chat("Call get_weather and get_time", tools=TOOLS, parallel_tool_calls=True)
    await ask.chat("Call get_weather and get_time", called, *_results(called), tools=TOOLS)


async def parallel_tools_streamed(ask: Asking) -> None:
    await ask.stream("Call get_weather and get_time", tools=TOOLS, stream_options={"include_usage": True})


async def forced_tool(ask: Asking) -> None:
    chosen = {"type": "function", "function": {"name": "get_weather"}}
    await ask.chat("Oslo?", tools=TOOLS, tool_choice=chosen, parallel_tool_calls=False)


async def image(ask: Asking) -> None:
    await ask.chat({"role": "user", "content": [{"type": "text", "text": "What is it?"}, bedrocks.image()]})


async def schema(ask: Asking) -> None:
    answer = await ask.sdk.chat.completions.parse(
        model=ask.talks, messages=_conversation(("A city",)), response_format=City
    )
    assert isinstance(answer.choices[0].message.parsed, City)
    answer.choices[0].message.parsed = None
    ask.told.chat(answer)


async def schema_streamed(ask: Asking) -> None:
    asked: Any = {"model": ask.talks, "messages": _conversation(("A city",))}
    async with ask.sdk.chat.completions.stream(**asked, response_format=City) as told:
        answer = await told.get_final_completion()
    assert isinstance(answer.choices[0].message.parsed, City)
    answer.choices[0].message.parsed = None
    ask.told.chat(answer)


async def reasoning(ask: Asking) -> None:
    await ask.chat("Think", model=ask.thinks, reasoning_effort="low", max_completion_tokens=4000)
    await ask.stream(
        "Think",
        model=ask.thinks,
        reasoning_effort="low",
        max_completion_tokens=4000,
        stream_options={"include_usage": True},
    )


async def several_choices(ask: Asking) -> None:
    await ask.chat("Hello", n=2)


async def several_choices_streamed(ask: Asking) -> None:
    await ask.stream("Hello", n=2, stream_options={"include_usage": True})


async def stop(ask: Asking) -> None:
    await ask.chat("Count to END and on", stop=["END"], seed=7)


async def cut(ask: Asking) -> None:
    await ask.chat("one two three four five six seven", max_tokens=2)


async def older_completions(ask: Asking) -> None:
    answer = await ask.sdk.completions.create(model=ask.talks, prompt="Once", max_tokens=20)
    ask.told.meet(answer)
    ask.told.write(f"{answer.object}, {answer.choices[0].finish_reason}")
    stream = await ask.sdk.completions.create(model=ask.talks, prompt="Once", max_tokens=20, stream=True)
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].text for chunk in chunks)
    ask.told.write(f"{chunks[-1].object}, {chunks[-1].choices[0].finish_reason}")


async def best_of_two_completions(ask: Asking) -> None:
    answer = await ask.sdk.completions.create(model=ask.talks, prompt="Once", max_tokens=20, best_of=2)
    ask.told.write(answer.object)


async def embeddings(ask: Asking) -> None:
    found = await ask.sdk.embeddings.create(model=ask.embeds, input=["one text", "another"])
    ask.told.meet(found)
    assert found.usage.total_tokens == found.usage.prompt_tokens > 0
    for entry in found.data:
        assert {type(number) for number in entry.embedding} == {float}
        ask.told.write(f"{found.object}, {entry.object} {entry.index}")


async def headers(ask: Asking) -> None:
    asked: Any = {"model": ask.talks, "messages": _conversation(("Hello",))}
    whole = await ask.sdk.chat.completions.with_raw_response.create(**asked)
    ask.told.headers(whole.headers)
    async with ask.sdk.chat.completions.with_streaming_response.create(**asked, stream=True) as told:
        ask.told.headers(told.headers)
        await told.read()


async def mistakes(ask: Asking) -> None:
    wrong: list[dict[str, Any]] = [
        {"model": f"{ask.talks}-none"},
        {"messages": []},
        {"temperature": 9},
        {"max_tokens": 0},
        {"tools": [{"type": "function"}]},
    ]
    for fields in wrong:
        asked: Any = {"model": ask.talks, "messages": _conversation(("Hello",)), **fields}
        with pytest.raises(openai.APIStatusError) as caught:
            await ask.sdk.chat.completions.create(**asked)
        error = caught.value
        ask.told.write(f"{type(error).__name__} {error.type} {error.code} {error.param}")


JSON = Said('{"name":"Oslo","people":700000}')
SCENES: Mapping[Scene[Asking], tuple[Said, ...]] = {
    text: (SUNNY,),
    stream: (SUNNY,),
    stream_without_usage: (SUNNY,),
    stream_assembled: (SUNNY,),
    tools_over_several_turns: (WEATHER, SUNNY, WEATHER, SUNNY, SUNNY),
    parallel_tools: (BOTH, SUNNY),
    parallel_tools_streamed: (BOTH,),
    forced_tool: (WEATHER,),
    image: (SUNNY,),
    schema: (JSON,),
    schema_streamed: (JSON,),
    reasoning: (Said("Two.", thought="One and one."),) * 2,
    several_choices: (SUNNY,),
    several_choices_streamed: (SUNNY,),
    stop: (SUNNY,),
    cut: (Said("one two", cut=True),),
    older_completions: (),
    best_of_two_completions: (),
    embeddings: (),
    headers: (SUNNY, SUNNY),
    mistakes: (),
}
"""The program, and what the models say in it."""


# --- what differs, and why ---------------------------------------------------------------------

THOUGHTS = changed(
    {"choice 0: assistant, text; stop": "choice 0: assistant, thought, text; stop", "0 text": ("0 thought", "0 text")}
)
SHOWN = Difference("OpenAI and Azure keep thoughts to themselves; these models show them.", THOUGHTS)
REGION = Difference("Azure says where it answered.", changed({"x-qlens-attempts": ("x-ms-region", "x-qlens-attempts")}))
ONE = Difference("Anthropic gives one answer to a call.", instead("BadRequestError unsupported_parameter n"))
AS_CHAT = Difference(
    "These models only chat, so that a prompt is put to them as a chat.",
    instead("BadRequestError unsupported_parameter best_of"),
)
NO_VECTORS = Difference("Anthropic makes no embeddings.", instead("BadRequestError unsupported_operation None"))

NO_TOOLS = Difference("This model takes no tools.", instead("BadRequestError unsupported_parameter tools"))

DIFFERENCES: Mapping[Scene[Asking], Mapping[str, Difference]] = {
    tools_over_several_turns: {"bedrock-mistral-7b": NO_TOOLS},
    parallel_tools: {"bedrock-mistral-7b": NO_TOOLS},
    parallel_tools_streamed: {"bedrock-mistral-7b": NO_TOOLS},
    forced_tool: {"bedrock-mistral-7b": NO_TOOLS},
    reasoning: {"bedrock-claude": SHOWN, "bedrock-nova": SHOWN, "anthropic": SHOWN},
    several_choices: {"anthropic": ONE},
    several_choices_streamed: {"anthropic": ONE},
    best_of_two_completions: {
        place.name: AS_CHAT for place in OTHERS if place.name not in {"openai", "openai-compatible"}
    },
    embeddings: {"anthropic": NO_VECTORS},
    headers: dict.fromkeys(AZURES, REGION),
}
"""All there is: whatever stands here must differ, and nothing else may."""

THINKERS = {"bedrock-claude", "bedrock-nova", "anthropic"}
SIGNERS = {"bedrock-claude", "anthropic"}
UNKNOWN: Mapping[str, set[str]] = {
    "usage.cost_usd": {place.name for place in PLACES},  # the gateway's own: what a stream cost
    "prompt_filter_results": {*AZURES},  # what Azure's content filter found
    "choices.content_filter_results": {*AZURES},
    "choices.message.reasoning_content": THINKERS,  # thoughts, as most servers write them
    "choices.delta.reasoning_content": THINKERS,
    "choices.message.thinking_blocks": SIGNERS,  # the same with what proves them, to be sent back
    "choices.delta.thinking_blocks": SIGNERS,
}
"""The fields that OpenAI's SDK does not know, and where they come from."""


# --- the tests ---------------------------------------------------------------------------------


def _asking(everywhere: World, place: Place, told: Transcript) -> Asking:
    talks, thinks, embeds = (f"{place.name}/{use}" for use in ("talks", "thinks", "embeds"))
    return Asking(everywhere.openai, talks, thinks, embeds, told)


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
