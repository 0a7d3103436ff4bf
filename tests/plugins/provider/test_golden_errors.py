"""Golden fixtures of errors: what a provider answers when it refuses or fails, and what the client is told of it."""

from __future__ import annotations

from typing import Any

import goldens
import pytest
from attrs import evolve
from bedrocks import config as bedrock_config
from goldens import Case, cases

from qlens.testing import Response, Scripted, frames, running, upstream
from qlens.testing.bedrock import bedrock, stream

TIMES = ("retry-after", "retry-after-ms")
PROVIDERS = ("anthropic", "azure_openai", "bedrock", "openai")
CHANGING = ["created", "id"]


def _answer(case: Case) -> Scripted:
    """A whole answer, JSON or not; the events of a stream; or the frames of AWS's."""
    answer = case["answer"]
    if "frames" in answer:
        return stream(_frame(*frame) for frame in answer["frames"])
    if "events" in answer:
        return Scripted(events=[goldens.written(event) for event in answer["events"]])
    headers = answer.get("headers", {})
    body = answer["text"].encode() if "text" in answer else answer["body"]
    return Scripted(answer["status"], headers, body=body)


def _frame(kind: str, name: str, payload: Any) -> bytes:
    return (
        frames.event(name, payload) if kind == "event" else frames.exception(name, payload["message"], **_rest(payload))
    )


def _rest(payload: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in payload.items() if name != "message"}


def _told(answer: Response, provider: str) -> dict[str, Any]:
    """What the client got, in the form of a fixture, with `{request}` for the id of its request."""
    body = answer.body.replace(answer.headers["x-request-id"].encode(), b"{request}")
    answer = evolve(answer, body=body)
    times = {name: answer.headers[name] for name in TIMES if name in answer.headers}
    told: dict[str, Any] = {"status": answer.status, **({"headers": times} if times else {})}
    if not answer.headers["content-type"].startswith("text/event-stream"):
        return {**told, "body": answer.json()}
    changing = CHANGING if provider == "bedrock" else []
    return {**told, "events": goldens.plain(answer.events(), changing)}


async def _fails(provider: str, case: Case) -> None:
    is_aws = provider == "bedrock"
    async with bedrock() if is_aws else upstream() as up:
        config = bedrock_config(up.root, case["model"]) if is_aws else goldens.config(provider, up.root, case)
        async with running(config) as gateway:
            up.script(_answer(case))
            answer = await goldens.ask(gateway, case)
            assert _told(answer, provider) == case["told"]
            (receipt,) = await gateway.settled(1)
            assert (receipt.outcome, len(receipt.attempts)) == ("failed", 1)


@pytest.mark.parametrize("case", cases("openai", "errors"))
async def test_openai(case: Case) -> None:
    await _fails("openai", case)


@pytest.mark.parametrize("case", cases("azure_openai", "errors"))
async def test_azure_openai(case: Case) -> None:
    await _fails("azure_openai", case)


@pytest.mark.parametrize("case", cases("anthropic", "errors"))
async def test_anthropic(case: Case) -> None:
    await _fails("anthropic", case)


@pytest.mark.parametrize("case", cases("bedrock", "errors"))
async def test_bedrock(case: Case) -> None:
    await _fails("bedrock", case)
