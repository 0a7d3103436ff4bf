"""Tokens counted by a model's own vocabulary, where the provider does not count: nearly what it would have said."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiktoken

from qlens import Receipt, vocabularies
from qlens.testing import Scripted, running, upstream

FILES = Path(__file__).parents[2] / ".tools" / "vocabularies"
"""`make test` puts OpenAI's own files there."""
PROMPT = "Translate into German: the quick brown fox jumps over the lazy dog, again and again. " * 20
ANSWER = "Der schnelle braune Fuchs springt immer wieder über den faulen Hund. " * 5
CHAT = {"model": "m", "messages": [{"role": "user", "content": PROMPT}]}


@pytest.fixture(autouse=True)
def apart(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What one test has read is not there for the next one."""
    monkeypatch.setattr(vocabularies, "_loaded", {})
    vocabularies._name_of.cache_clear()
    yield
    vocabularies._name_of.cache_clear()


@pytest.fixture
def at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    assert FILES.is_dir(), "make test fetches the vocabularies into .tools"
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(FILES))


def config(url: str, base_model: str = "gpt-4o") -> str:
    target = {"provider": "up", "model": "our-deployment", "base_model": base_model}
    return json.dumps(
        {
            "pipeline": {"auth": [{"plugin": "anonymous"}]},
            "providers": {"up": {"plugin": "openai", "base_url": url, "api_key": "sk-example-up"}},
            "models": {"m": {"targets": [target]}},
        }
    )


def answer(text: str) -> Scripted:
    """An answer without a word about usage."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    return Scripted(body={"id": "x", "object": "chat.completion", "created": 1, "model": "x", "choices": [choice]})


async def receipt_of(scripted: Scripted, base_model: str, body: dict[str, Any] = CHAT) -> Receipt:
    async with upstream() as up, running(config(up.url, base_model)) as gateway:
        up.script(scripted)
        assert (await gateway.post("/v1/chat/completions", body)).status == 200
        (receipt,) = await gateway.settled(1)
        return receipt


@pytest.mark.parametrize(("base_model", "name"), [("gpt-4o", "o200k_base"), ("gpt-35-turbo", "cl100k_base")])
@pytest.mark.usefixtures("at_hand")
async def test_an_answer_without_usage_counts_what_its_vocabulary_says(base_model: str, name: str) -> None:
    receipt = await receipt_of(answer(ANSWER), base_model)
    encode = tiktoken.get_encoding(name).encode_ordinary
    assert receipt.usage.source == "estimated"
    assert receipt.usage.output == len(encode(ANSWER))
    # Around a message stand a few tokens more.
    assert len(encode(PROMPT)) < receipt.usage.input <= len(encode(PROMPT)) + 16


async def test_without_the_folder_and_for_others_models_it_is_an_estimate_by_size(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    by_size = -(-len(ANSWER.encode()) // 4)
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
    assert (await receipt_of(answer(ANSWER), "gpt-4o")).usage.output == by_size
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    vocabularies._name_of.cache_clear()
    assert (await receipt_of(answer(ANSWER), "gpt-4o")).usage.output == by_size
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(FILES))
    vocabularies._name_of.cache_clear()
    assert (await receipt_of(answer(ANSWER), "claude-sonnet-4-5")).usage.output == by_size


async def test_a_damaged_file_is_left_where_it_is_and_nothing_is_fetched(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / vocabularies._O200K[0]
    file.write_bytes(b"nonsense")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    receipt = await receipt_of(answer(ANSWER), "gpt-4o")
    assert receipt.usage.output == -(-len(ANSWER.encode()) // 4)
    assert file.read_bytes() == b"nonsense"
    assert "is damaged" in caplog.text


@pytest.mark.usefixtures("at_hand")
async def test_a_stream_that_says_nothing_has_its_prompt_counted_and_a_long_one_is_counted_in_part() -> None:
    delta = {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "x"}
    events = [{**delta, "choices": [{"index": 0, "delta": {"content": word}}]} for word in ("", "one", " two")]
    events.append({**delta, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    long = PROMPT * 40
    assert len(long) > vocabularies.MOST_COUNTED
    body = {"model": "m", "stream": True, "messages": [{"role": "user", "content": long}]}
    receipt = await receipt_of(Scripted(events=[*events, b"data: [DONE]\n\n"]), "gpt-4.1", body)
    exact = len(tiktoken.get_encoding("o200k_base").encode_ordinary(long))
    assert abs(receipt.usage.input - exact) < exact / 50
    assert receipt.usage.source == "estimated"
