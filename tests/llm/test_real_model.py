"""A real model behind the gateway: what `make llm` starts, asked by the README's program and by the SDK."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from e2e.serving import ROOT, Served, receipts, started
from openai import OpenAI

PAIR = Path(__file__).with_name("pair.py")
# What the configuration asks of the environment; a command that only reads the ledger needs no true values.
MODEL_ENV = {"QLENS_LLM_URL": "http://127.0.0.1:9/v1", "QLENS_LLM_KEY": "sk-example-unused"}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The model server and the gateway, on a copy of config/llm.yaml."""
    folder = tmp_path_factory.mktemp("llm")
    config = Path(shutil.copy(ROOT / "config" / "llm.yaml", folder / "qlens.yaml"))
    with started([sys.executable, str(PAIR), str(config)], folder, {}) as served:
        yield served


def readme_program() -> str:
    """The README's SDK program."""
    blocks: list[str] = re.findall(
        r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL
    )
    (program,) = (block for block in blocks if "OpenAI()" in block)
    return program


def test_readme_program_streams_the_models_answer_with_usage_and_cost(pair: Served) -> None:
    done = subprocess.run(
        [sys.executable, "-c", readme_program()], env=pair.env, capture_output=True, text=True, timeout=50, check=False
    )
    assert done.returncode == 0, done.stderr
    answer, last = done.stdout.rstrip().rsplit("\n", 1)
    assert answer
    assert answer != "Say hello in three languages.", "this is an echo, not a model"
    found = re.fullmatch(r"(\d+) tokens, (0\.\d+) USD", last)
    assert found
    assert int(found[1]) > 10
    assert float(found[2]) > 0


def test_call_has_usage_cost_limits_and_a_row_in_the_ledger(pair: Served) -> None:
    with OpenAI(base_url=f"{pair.url}/v1", api_key=pair.key, max_retries=0) as client:
        raw = client.chat.completions.with_raw_response.create(
            model="smollm2",
            messages=[{"role": "user", "content": "Name one colour of the sky."}],
            temperature=0,
            max_tokens=24,
        )
    answer = raw.parse()
    assert answer.choices[0].message.content
    assert answer.usage is not None
    assert answer.usage.completion_tokens > 0
    assert raw.headers["x-qlens-provider"] == "llama"
    assert raw.headers["x-qlens-model"] == "smollm2"
    assert int(raw.headers["x-ratelimit-limit-requests"]) == 600
    assert int(raw.headers["x-ratelimit-remaining-tokens"]) < 1_000_000

    ends = time.monotonic() + 60
    while not (rows := receipts(pair, "--model", "smollm2", env=MODEL_ENV)):
        assert time.monotonic() < ends, "the ledger has no row"
        time.sleep(0.2)
    (row,) = rows
    assert row["calls"] == 1
    assert row["prompt_tokens"] == answer.usage.prompt_tokens
    assert row["completion_tokens"] == answer.usage.completion_tokens
    assert row["cost_usd"] == raw.headers["x-qlens-cost-usd"]
    # 0.01 and 0.02 USD per million tokens are 10,000 and 20,000 picodollars for one.
    cached = row["cached_tokens"]
    picos = (row["prompt_tokens"] - cached) * 10_000 + cached * 5_000 + row["completion_tokens"] * 20_000
    assert float(row["cost_usd"]) == pytest.approx(picos / 1e12, rel=1e-9)


def test_stream_that_is_abandoned_stops_the_model(pair: Served) -> None:
    with OpenAI(base_url=f"{pair.url}/v1", api_key=pair.key, max_retries=0) as client:
        stream = client.chat.completions.create(
            model="smollm2", messages=[{"role": "user", "content": "Tell a long story."}], stream=True, max_tokens=500
        )
        next(iter(stream))
        stream.close()
        # The model server has two places: were the story still told, these would wait for it.
        for word in ("red", "green"):
            answer = client.chat.completions.create(
                model="smollm2", messages=[{"role": "user", "content": f"Say {word}."}], max_tokens=5
            )
            assert answer.usage is not None
            assert answer.usage.completion_tokens <= 5


def test_json_schema_reaches_the_model(pair: Served) -> None:
    schema: dict[str, object] = {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "blue"]}},
        "required": ["colour"],
    }
    with OpenAI(base_url=f"{pair.url}/v1", api_key=pair.key, max_retries=0) as client:
        answer = client.chat.completions.create(
            model="smollm2",
            messages=[{"role": "user", "content": "What colour is the sky?"}],
            response_format={"type": "json_schema", "json_schema": {"name": "colour", "schema": schema}},
            max_tokens=40,
        )
    assert re.fullmatch(r'\s*\{\s*"colour"\s*:\s*"(red|blue)"\s*\}\s*', answer.choices[0].message.content or "")
