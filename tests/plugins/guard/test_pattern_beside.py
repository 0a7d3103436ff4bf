"""The plugin `pattern` and what stands beside the words of an answer: citations, results of tools, documents, names."""

from __future__ import annotations

from typing import Any

import pytest

from qlens.testing import Scripted, running, upstream
from qlens.testing.anthropic import KEY, MODEL, anthropic, message, stream, text, whole
from qlens.testing.upstreams import Event

CONFIG = r"""
pipeline:
  auth: [{plugin: anonymous}]
  guard: [{plugin: pattern, rules: [{name: card, words: [falcon], action: redact, replacement: hawk, on: [reply]}]}]
  cost: []
providers:
  up: {plugin: openai, base_url: "URL", api_key: sk-example-upstream}
  claude: {plugin: anthropic, base_url: "ROOT", api_key: KEY}
models:
  small: {max_output_tokens: 1000, targets: [{provider: up, model: small}]}
  rank: {targets: [{provider: up, model: rank}]}
  claude: {max_output_tokens: 1000, targets: [{provider: claude, model: MODEL}]}
"""
SAID = "the falcon flies"


def config(url: str = "http://127.0.0.1:9", root: str = "http://127.0.0.1:9") -> str:
    return CONFIG.replace("URL", url).replace("ROOT", root).replace("KEY", KEY).replace("MODEL", MODEL)


CITED = {"type": "char_location", "cited_text": SAID, "document_title": SAID, "document_index": 0}
FOUND = {"type": "web_search_result", "title": SAID, "url": "https://a.example", "encrypted_content": "x"}
RAN = {"type": "bash_code_execution_result", "stdout": SAID, "stderr": SAID, "return_code": 0, "content": []}
BLOCKS: list[dict[str, Any]] = [
    text("ok", citations=[CITED]),
    {"type": "web_search_tool_result", "tool_use_id": "srvtoolu_1", "content": [FOUND]},
    {"type": "mcp_tool_result", "tool_use_id": "m", "is_error": False, "content": [text(SAID)]},
    {"type": "mcp_tool_use", "id": "m", "name": "f", "server_name": "s", "input": {"a": [SAID], "b": {"c": "d"}}},
    {"type": "bash_code_execution_tool_result", "tool_use_id": "srvtoolu_2", "content": RAN},
]


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block["type"])
async def test_messages_are_looked_through_in_streams_as_in_whole(block: dict[str, Any]) -> None:
    asked = {"model": "claude", "max_tokens": 100, "messages": [{"role": "user", "content": "q"}]}
    async with anthropic() as up, running(config(root=up.root)) as gateway:
        for scripted, streams in (
            (whole(message(block, text(SAID))), False),
            (stream(message(block, text(SAID))), True),
        ):
            up.script(scripted)
            answer = await gateway.post("/v1/messages", {**asked, "stream": streams})
            assert answer.status == 200, answer.text
            assert "falcon" not in answer.text
            assert "the hawk flies" in answer.text


async def test_names_in_a_block_that_is_whole_when_it_begins_must_stay() -> None:
    asked = {"model": "claude", "max_tokens": 100, "messages": [{"role": "user", "content": "q"}], "stream": True}
    async with anthropic() as up, running(config(root=up.root)) as gateway:
        up.script(stream(message({**BLOCKS[3], "input": {"falcon": "x"}})))
        answer = await gateway.post("/v1/messages", asked)
        assert "must stay as it is" in answer.events()[-1]["error"]["message"]
        assert "falcon" not in answer.text


@pytest.mark.parametrize("document", [SAID, {"text": SAID}])
async def test_documents_that_a_reranker_gives_back(document: Any) -> None:
    async with upstream() as up, running(config(up.url)) as gateway:
        up.script(Scripted(body={"results": [{"index": 0, "relevance_score": 1, "document": document}]}))
        asked = {"model": "rank", "query": "q", "documents": [SAID], "return_documents": True}
        answer = await gateway.post("/v1/rerank", asked)
        assert answer.json()["results"][0]["document"] in ("the hawk flies", {"text": "the hawk flies"})
        (receipt,) = await gateway.settled(1)
        assert receipt.usage.output == 0  # nobody wrote them


async def test_what_files_are_called_in_a_response() -> None:
    note = {"type": "file_citation", "file_id": "f", "filename": SAID, "index": 0}
    part = {"type": "output_text", "text": "ok", "annotations": [note], "logprobs": []}
    items = [
        {"id": "fs", "type": "file_search_call", "status": "completed", "results": [{"filename": SAID, "score": 1}]},
        {"id": "m", "type": "message", "role": "assistant", "status": "completed", "content": [part]},
    ]
    full = {"id": "resp_1", "object": "response", "created_at": 1, "model": "m", "status": "completed", "output": items}
    events: list[Event] = [{"type": "response.created", "response": {**full, "status": "in_progress", "output": []}}]
    events += [
        {"type": "response.output_item.done", "output_index": index, "item": item} for index, item in enumerate(items)
    ]
    events.append({"type": "response.completed", "response": full})
    async with upstream() as up, running(config(up.url)) as gateway:
        for streams in (False, True):
            up.script(Scripted(events=events) if streams else Scripted(body=full))
            answer = await gateway.post("/v1/responses", {"model": "small", "input": "q", "stream": streams})
            assert "falcon" not in answer.text
            assert answer.text.count("the hawk flies") == (4 if streams else 2)
