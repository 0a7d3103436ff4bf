"""One program with the Responses of OpenAI's own SDK, unchanged: wherever the model is, what it reads is alike."""

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
    schema = {
        "type": "object",
        "properties": {parameter: {"type": "string"}},
        "required": [parameter],
        "additionalProperties": False,
    }
    return {"type": "function", "name": name, "description": f"Does {name}.", "parameters": schema, "strict": True}


TOOLS: Any = [_tool("get_weather", "city"), _tool("get_time", "zone")]
SUNNY = Said("It is sunny.")
WEATHER = Said(calls=(("get_weather", {"city": "Oslo"}),))
BOTH = Said(calls=(("get_weather", {"city": "Oslo"}), ("get_time", {"zone": "Europe/Oslo"})))
THOUGHT = Said("Two.", thought="One and one.")


class City(BaseModel):
    """What an answer is to be parsed into."""

    name: str


@frozen
class Asking:
    """The program's whole knowledge of where its models are: their names."""

    sdk: openai.AsyncOpenAI
    talks: str
    thinks: str
    told: Transcript = field(factory=Transcript)

    async def response(self, given: Any, **fields: Any) -> Any:
        """Ask for a response and write down what came."""
        answer = await self.sdk.responses.create(**self._asked(given, fields))
        self.told.response(answer)
        return answer

    async def stream(self, given: Any, **fields: Any) -> Any:
        """Ask for a stream, and write down its events and the response that the last one has."""
        events = [event async for event in await self.sdk.responses.create(**self._asked(given, fields), stream=True)]
        self.told.response_events(events)
        self.told.response(events[-1].response)
        return events[-1].response

    def _asked(self, given: Any, fields: Mapping[str, Any]) -> Any:
        # Not every provider keeps responses, so that none is asked to.
        return {"model": self.talks, "input": given, "store": False, **fields}


def _turns(answer: Any) -> list[Any]:
    """An answer that calls tools, and what they gave."""
    calls = [item for item in answer.output if item.type == "function_call"]
    results = [{"type": "function_call_output", "call_id": call.call_id, "output": "sunny"} for call in calls]
    return [*(item.to_dict() for item in answer.output), *results]


# --- the program -------------------------------------------------------------------------------


async def text(ask: Asking) -> None:
    answer = await ask.response("Hello", instructions="Be brief.", max_output_tokens=100, temperature=0.5)
    assert answer.output_text


async def stream(ask: Asking) -> None:
    await ask.stream([{"role": "user", "content": [{"type": "input_text", "text": "Hello"}]}])


async def tools_over_several_turns(ask: Asking) -> None:
    talk: list[Any] = [{"role": "user", "content": "Call get_weather for Oslo"}]
    talk += _turns(await ask.response(talk, tools=TOOLS, tool_choice="auto"))
    talk += _turns(await ask.response(talk, tools=TOOLS))
    talk += [{"role": "user", "content": "Call get_weather for Rome"}]
    talk += _turns(await ask.stream(talk, tools=TOOLS))
    await ask.stream(talk, tools=TOOLS)


async def parallel_tools(ask: Asking) -> None:
    question = {"role": "user", "content": "Call get_weather and get_time"}
    called = await ask.response([question], tools=TOOLS, parallel_tool_calls=True)
    await ask.response([question, *_turns(called)], tools=TOOLS)
    await ask.stream([question], tools=TOOLS)


async def image(ask: Asking) -> None:
    url = f"data:image/png;base64,{bedrocks.PNG}"
    parts = [{"type": "input_text", "text": "What is it?"}, {"type": "input_image", "image_url": url, "detail": "auto"}]
    await ask.response([{"role": "user", "content": parts}])


async def schema(ask: Asking) -> None:
    answer = await ask.sdk.responses.parse(model=ask.talks, input="A city", text_format=City, store=False)
    assert isinstance(answer.output_parsed, City)
    ask.told.response(answer)


async def reasoning(ask: Asking) -> None:
    asked: Any = {
        "model": ask.thinks,
        "reasoning": {"effort": "low", "summary": "auto"},
        "include": ["reasoning.encrypted_content"],
        "max_output_tokens": 4000,
    }
    first = await ask.response("Think", **asked)
    await ask.stream(
        [{"role": "user", "content": "Think"}, *_turns(first), {"role": "user", "content": "And?"}], **asked
    )


async def cut(ask: Asking) -> None:
    await ask.response(" ".join(["word"] * 30), max_output_tokens=16)


async def headers(ask: Asking) -> None:
    asked: Any = {"model": ask.talks, "input": "Hello", "store": False}
    whole = await ask.sdk.responses.with_raw_response.create(**asked)
    ask.told.headers(whole.headers)
    async with ask.sdk.responses.with_streaming_response.create(**asked, stream=True) as told:
        ask.told.headers(told.headers)
        await told.read()


async def mistakes(ask: Asking) -> None:
    wrong: list[dict[str, Any]] = [
        {"model": f"{ask.talks}-none"},
        {"input": [{"role": "nobody", "content": "x"}]},
        {"temperature": 9},
        {"max_output_tokens": 1},
        {"tools": [{"type": "function"}]},
    ]
    for fields in wrong:
        with pytest.raises(openai.APIStatusError) as caught:
            await ask.response("Hello", **fields)
        error = caught.value
        ask.told.write(f"{type(error).__name__} {error.type} {error.code} {error.param}")


SCENES: Mapping[Scene[Asking], tuple[Said, ...]] = {
    text: (SUNNY,),
    stream: (SUNNY,),
    tools_over_several_turns: (WEATHER, SUNNY, WEATHER, SUNNY),
    parallel_tools: (BOTH, SUNNY, BOTH),
    image: (SUNNY,),
    schema: (Said('{"name":"Oslo"}'),),
    reasoning: (THOUGHT, THOUGHT),
    cut: (Said("word word", cut=True),),
    headers: (SUNNY, SUNNY),
    mistakes: (),
}
"""The program, and what the models say in it."""


# --- what differs, and why ---------------------------------------------------------------------

THOUGHTS = changed(
    {
        "item 0: message assistant completed: output_text": (
            "item 0: reasoning: summary_text",
            "item 1: message assistant completed: output_text",
        ),
        "response.output_item.added 0": (
            "response.output_item.added 0",
            "response.reasoning_summary_part.added 0 0",
            "response.reasoning_summary_text.delta 0 0",
            "response.reasoning_summary_text.done 0 0",
            "response.reasoning_summary_part.done 0 0",
            "response.output_item.done 0",
            "response.output_item.added 1",
        ),
        "response.content_part.added 0 0": "response.content_part.added 1 0",
        "response.output_text.delta 0 0": "response.output_text.delta 1 0",
        "response.output_text.done 0 0": "response.output_text.done 1 0",
        "response.content_part.done 0 0": "response.content_part.done 1 0",
        "response.output_item.done 0": "response.output_item.done 1",
    }
)
SHOWN = Difference(
    "By chat, OpenAI and Azure keep thoughts to themselves; Responses and other models do not.", THOUGHTS
)
NO_TOOLS = Difference("This model takes no tools.", instead("BadRequestError unsupported_parameter tools"))
REGION = Difference("Azure says where it answered.", changed({"x-qlens-attempts": ("x-ms-region", "x-qlens-attempts")}))

SHOWING = ("openai", "azure-default", "azure-classic", "azure-v1", "bedrock-claude", "bedrock-nova", "anthropic")

DIFFERENCES: Mapping[Scene[Asking], Mapping[str, Difference]] = {
    tools_over_several_turns: {"bedrock-mistral-7b": NO_TOOLS},
    parallel_tools: {"bedrock-mistral-7b": NO_TOOLS},
    reasoning: dict.fromkeys(SHOWING, SHOWN),
    headers: dict.fromkeys(AZURES, REGION),
}
"""All there is: whatever stands here must differ, and nothing else may."""

EVERYWHERE = {place.name for place in PLACES}
BRIDGED = EVERYWHERE - {"openai", "azure-default", "azure-classic", "azure-v1"}
UNKNOWN: Mapping[str, set[str]] = {
    "store": EVERYWHERE,  # OpenAI's API has it
    "frequency_penalty": BRIDGED,  # OpenAI's API has them, its fakes here leave them out
    "presence_penalty": BRIDGED,
    "usage.input_tokens_details.audio_tokens": BRIDGED,  # counts that chat has and Responses do not
    "usage.output_tokens_details.audio_tokens": BRIDGED,
    "usage.output_tokens_details.accepted_prediction_tokens": {"echo"},
    "usage.output_tokens_details.rejected_prediction_tokens": {"echo"},
}
"""The fields that OpenAI's SDK does not know, and where they come from."""


# --- the tests ---------------------------------------------------------------------------------


def _asking(everywhere: World, place: Place, told: Transcript) -> Asking:
    return Asking(everywhere.openai, f"{place.name}/talks", f"{place.name}/thinks", told)


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
