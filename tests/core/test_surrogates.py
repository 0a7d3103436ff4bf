"""Half of a surrogate pair in a provider's JSON: the answer is one, reaches the client as it came, and is guarded."""

from __future__ import annotations

from typing import Any

import pytest
from priced import EXACT, WHOLE
from yamls import CHAT, HELLO, STREAM, config

from qlens import json_of, sse
from qlens.testing import Scripted, running, upstream
from qlens.testing.upstreams import USAGE, FakeUpstream

JSON = {"content-type": "application/json"}
GUARD = {"guard": [{"plugin": "pattern", "rules": [{"name": "r", "words": ["secret"], "action": "redact"}]}]}


def yaml(up: FakeUpstream, stages: dict[str, Any] | None = None) -> str:
    cost = [{"plugin": "prices", "catalogue": False, "table": [{"model": "*", "input": 3, "output": 7}]}]
    provider = {"plugin": "openai", "base_url": up.url, "api_key": "sk-example-up"}
    models = {"gpt-4o-mini": {"max_output_tokens": 50, "targets": [{"provider": "up", "model": "mini"}]}}
    return config({"cost": cost, **(stages or {})}, {"up": provider}, models)


def saying(text: str) -> bytes:
    """A whole answer with a text as it stands in JSON."""
    return sse.write(WHOLE)[6:-2].replace(b'"Hi"', b'"%b"' % text.encode())


def events(*texts: str) -> list[bytes]:
    """A stream of these texts, with its usage in the event that ends it."""
    said: dict[str, Any] = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    pieces = [
        sse.write({**said, "choices": [{"index": 0, "delta": {"content": "?"}, "finish_reason": None}]}).replace(
            b'"?"', b'"%b"' % text.encode()
        )
        for text in texts
    ]
    last = pieces.pop().replace(b'"finish_reason":null', b'"finish_reason":"stop"')
    return [*pieces, last, sse.write({**said, "choices": [], "usage": USAGE}), sse.DONE]


async def test_a_whole_answer_passes_as_it_came() -> None:
    async with upstream() as up, running(yaml(up)) as gateway:
        body = saying(r"a \ud83d b")
        up.script(Scripted(body=body, headers=JSON))
        answer = await gateway.post(CHAT, HELLO)
        assert (answer.status, answer.body) == (200, body)
        (receipt,) = await gateway.settled(1)
        assert (receipt.outcome, receipt.cost.picos, receipt.cost.state) == ("complete", EXACT, "exact")


async def test_a_stream_passes_as_it_came_from_its_first_event_to_its_last() -> None:
    async with upstream() as up, running(yaml(up)) as gateway:
        said = events(r"\ud83d", r"\ude00", r"\ud83d")
        up.script(Scripted(events=said))
        answer = await gateway.post(CHAT, STREAM)
        assert answer.status == 200
        assert answer.body.startswith(b"".join(said[:3]))
        assert answer.body.endswith(sse.DONE)
        (receipt,) = await gateway.settled(1)
        assert (receipt.outcome, receipt.cost.picos, receipt.cost.state) == ("complete", EXACT, "exact")


@pytest.mark.parametrize("body", [HELLO, STREAM], ids=["body", "stream"])
async def test_a_guard_sees_it(body: dict[str, Any]) -> None:
    async with upstream() as up, running(yaml(up, GUARD)) as gateway:
        text = r"\ud83d secret \\ud800"
        up.script(Scripted(events=events(text)) if body is STREAM else Scripted(body=saying(text), headers=JSON))
        answer = await gateway.post(CHAT, body)
        assert answer.status == 200
        assert "secret" not in answer.text
        assert r"\\ud800" in answer.text  # a backslash with letters behind it


def test_only_halves_are_read_otherwise() -> None:
    assert json_of(rb'"\ud83d\ude00 \ud83d \uDE00 \ud83d\ud83d\ude00 \\ud83d \\\ud83d \n"') == (
        "\U0001f600 \ufffd \ufffd \ufffd\U0001f600 \\ud83d \\\ufffd \n"
    )
    for wrong in (b'{"a": NaN}', rb'"\ud83d', rb"\ud83d", b""):
        with pytest.raises(ValueError):
            json_of(wrong)
