"""What the README tells a new user to paste works against a running gateway."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from e2e.serving import ROOT, Served, changed, run_qlens, serving, until
from openai import OpenAI

README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    """The README's fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def block_with(language: str, text: str) -> str:
    """The one block that contains a text."""
    (found,) = (block for block in blocks(language) if text in block)
    return found


def test_curl_is_answered(served: Served) -> None:
    line = block_with("bash", "curl ").replace("http://127.0.0.1:8080", served.url).replace("config/", "")
    answer = subprocess.run(
        ["sh", "-c", line], cwd=served.folder, capture_output=True, text=True, timeout=20, check=True
    )
    assert json.loads(answer.stdout)["choices"][0]["message"]["content"] == "Hello, gateway."


def test_sdk_program_streams_an_answer_with_its_tokens_and_cost(served: Served) -> None:
    done = subprocess.run(
        [sys.executable, "-c", block_with("python", "OpenAI()")],
        env=served.env,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    text, last = done.stdout.splitlines()
    assert text == "Say hello in three languages."
    assert re.fullmatch(r"\d+ tokens, 0\.\d+ USD", last)


def test_environment_of_the_sdk_names_the_default_address() -> None:
    assert "export OPENAI_BASE_URL=http://127.0.0.1:8080/v1 OPENAI_API_KEY=$(cat config/demo.key)" in README


@pytest.mark.parametrize("number", range(len(blocks("yaml"))))
def test_yaml_is_a_whole_configuration(tmp_path: Path, number: int) -> None:
    config = tmp_path / "qlens.yaml"
    config.write_text(blocks("yaml")[number])
    result = run_qlens("check", "--no-env", str(config))
    assert (result.returncode, result.stderr) == (0, "")


def test_own_plugin_in_a_file_beside_the_yaml_changes_answers_after_a_sighup(tmp_path: Path) -> None:
    plugin = block_with("python", "class Shout")
    assert len([line for line in plugin.splitlines() if line.strip()]) <= 15
    with serving(tmp_path) as served, OpenAI(base_url=f"{served.url}/v1", api_key=served.key) as client:
        (tmp_path / "shout.py").write_text(plugin)
        served.config.write_text(changed({"pipeline": {"guard": [{"plugin": "shout:Shout"}]}}))
        served.signal(signal.SIGHUP)
        until(lambda: "loaded configuration" in served.output, "the reload")
        answer = client.chat.completions.create(model="gpt-4o-mini", messages=[{"role": "user", "content": "quietly"}])
        assert answer.choices[0].message.content == "QUIETLY"
        stream = client.chat.completions.create(
            model="gpt-4o-mini", messages=[{"role": "user", "content": "quietly, in pieces"}], stream=True
        )
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "QUIETLY, IN PIECES"


def test_links_lead_to_files() -> None:
    targets = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert targets
    missing = [target for target in targets if not (ROOT / target).exists()]
    assert not missing


EVERY_COMMAND = """
pipeline:
  auth: [{plugin: key_store, url: "sqlite:///qlens.db"}]
  cost:
    - {plugin: prices}
    - {plugin: budgets, limits: [{per: tenant, usd: 1, window: day}]}
    - {plugin: ledger, url: "sqlite:///qlens.db"}
providers: {echo: {plugin: echo}}
models: {gpt-4o-mini: {max_output_tokens: 100, targets: [{provider: echo, model: gpt-4o-mini}]}}
"""


def test_commands_of_the_readme_exist(tmp_path: Path) -> None:
    config = tmp_path / "qlens.yaml"
    config.write_text(EVERY_COMMAND)
    listed = set(re.findall(r"^qlens ([\w-]+)", block_with("text", "qlens serve"), re.MULTILINE))
    for command in listed:
        result = run_qlens(command, "--help", env={"QLENS_CONFIG": str(config)})
        assert result.returncode == 0, f"{command}: {result.stderr}"


def test_make_targets_of_the_readme_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"make ([a-z-]+)", README)) - {"it"}
    assert named <= targets
