"""Golden fixtures: for each family, what the client says, what Bedrock gets, what it answers, what the client gets.

Written by hand-checked runs against the strict fake; a change of a translation shows here as a change of a file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import pytest
from bedrocks import CHAT, config, events, plain

from qlens.dialects import chat
from qlens.testing import Scripted, running
from qlens.testing.bedrock import bedrock, stream, streamed, whole
from qlens.testing.service_model import fault, service_model

FILES = sorted(Path(__file__).with_name("golden").glob("*.json"))
EMBEDDINGS = [path for path in FILES if "embed" in path.name]
PATHS = {"canvas": "/v1/images/generations", "stability": "/v1/images/generations", "rerank": "/v1/rerank"}
OTHERS = [path for path in FILES if path.stem.partition("-")[0] in PATHS]
CONVERSATIONS = [path for path in FILES if path not in EMBEDDINGS and path not in OTHERS]


def _read(path: Path) -> tuple[str, dict[str, Any]]:
    content = orjson.loads(path.read_bytes())
    return content["model"], content["cases"]


def _spelled(body: dict[str, Any]) -> bytes:
    return orjson.dumps(body, option=orjson.OPT_SORT_KEYS)


def test_every_family_has_one() -> None:
    assert len(CONVERSATIONS) >= 20
    assert len(EMBEDDINGS) == 3
    assert len(OTHERS) == 4


@pytest.mark.parametrize("path", CONVERSATIONS, ids=lambda path: path.stem)
async def test_whole_answers(path: Path) -> None:
    model, cases = _read(path)
    async with bedrock() as aws, running(config(aws.root, model)) as gateway:
        for name, case in cases.items():
            aws.script(whole(case["answer"]))
            answer = await gateway.post(CHAT, {"model": "ours", **case["client"]})
            assert aws.requests[-1].body == case["wire"], name
            assert plain(answer.json()) == case["reply"], name
        assert {*aws.models} == {model}
        assert aws.requests[-1].path.endswith("/converse")


@pytest.mark.parametrize("path", CONVERSATIONS, ids=lambda path: path.stem)
async def test_streams(path: Path) -> None:
    model, cases = _read(path)
    async with bedrock() as aws, running(config(aws.root, model)) as gateway:
        for name, case in cases.items():
            aws.script(stream(streamed(case["answer"])))
            body = {"model": "ours", **case["client"], "stream": True, "stream_options": {"include_usage": True}}
            answer = await gateway.post(CHAT, body)
            assert [plain(event) for event in events(answer)] == case["stream"], name
            sent = aws.requests[-1].body
            if "guardrailConfig" in sent:
                assert sent["guardrailConfig"].pop("streamProcessingMode") == "sync"
            assert sent == case["wire"], name
        assert aws.requests[-1].path.endswith("/converse-stream")


@pytest.mark.parametrize("path", CONVERSATIONS, ids=lambda path: path.stem)
def test_a_stream_adds_up_to_the_whole_answer(path: Path) -> None:
    _, cases = _read(path)
    for name, case in cases.items():
        added = chat.assemble(case["stream"])
        (one,), (other,) = added["choices"], case["reply"]["choices"]
        for field in ("content", "tool_calls", "reasoning_content", "thinking_blocks"):
            assert (one["message"].get(field) or None) == (other["message"].get(field) or None), name
        assert one["finish_reason"] == other["finish_reason"], name
        assert {**added["usage"], "cost_usd": None} == {**case["reply"]["usage"], "cost_usd": None}, name


@pytest.mark.parametrize("path", CONVERSATIONS, ids=lambda path: path.stem)
def test_answers_are_such_as_the_service_model_allows(path: Path) -> None:
    shape = service_model("bedrock-runtime").operation_model("Converse").output_shape
    _, cases = _read(path)
    for name, case in cases.items():
        assert fault(shape, case["answer"]) is None, name


@pytest.mark.parametrize("path", EMBEDDINGS, ids=lambda path: path.stem)
async def test_embeddings(path: Path) -> None:
    model, cases = _read(path)
    for case in cases.values():
        async with bedrock() as aws, running(config(aws.root, model)) as gateway:
            answer = await gateway.post("/v1/embeddings", {"model": "ours", **case["client"]})
            content = answer.json()
            for entry in content["data"]:
                entry["embedding"] = [*entry["embedding"][:3], len(entry["embedding"])]
            assert content == case["reply"]
            # Those of several requests are sent at once, and may come in any order.
            assert sorted(_spelled(request.body) for request in aws.requests) == sorted(map(_spelled, case["wire"]))
            assert {*aws.models} == {model}


@pytest.mark.parametrize("path", OTHERS, ids=lambda path: path.stem)
async def test_images_and_rerank(path: Path) -> None:
    model, cases = _read(path)
    for name, case in cases.items():
        async with bedrock() as aws, running(config(aws.root, model)) as gateway:
            aws.script(*(Scripted(body=answer) for answer in case["answers"]))
            answer = await gateway.post(PATHS[path.stem.partition("-")[0]], {"model": "ours", **case["client"]})
            content = answer.json()
            for changing in ("created", "id"):
                content.pop(changing, None)
            assert content == case["reply"], name
            assert [request.body for request in aws.requests] == case["wire"], name
            assert aws.requests[-1].path.endswith("/invoke")
            assert {*aws.models} == {model}
