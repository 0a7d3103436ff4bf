"""The command `qlens` as a process: what it prints, and with which code it leaves."""

from __future__ import annotations

import json
import shlex
import socket
import subprocess
import time
from pathlib import Path

import httpx2
import pytest
from e2e.serving import CONFIG, QLENS, ROOT, Served, changed, receipts, run_qlens

import qlens

BODY = {"model": "gpt-4o", "max_tokens": 50, "messages": [{"role": "user", "content": "Explain yourself."}]}


def chat(served: Served, key: str) -> httpx2.Response:
    """One chat call with a key."""
    return httpx2.post(
        f"{served.url}/v1/chat/completions",
        json=BODY | {"model": "gpt-4o-mini"},
        headers={"authorization": f"Bearer {key}"},
        timeout=10,
    )


def test_help_names_every_command_with_an_example() -> None:
    result = run_qlens("--help")
    assert result.returncode == 0
    for command in ("serve", "check", "plugins", "routes", "explain", "version", "keys"):
        assert command in result.stdout


def test_version_is_the_packages() -> None:
    assert run_qlens("version").stdout == f"{qlens.__version__}\n"


@pytest.mark.parametrize(
    "name", ["qlens.yaml", "minimal.yaml", "claude.yaml", "production.yaml", "llm.yaml", "webhooks.yaml"]
)
def test_check_finds_the_shipped_configurations_good(name: str) -> None:
    result = run_qlens("check", "--no-env", f"config/{name}")
    assert (result.returncode, result.stderr) == (0, "")


def test_check_names_the_variables_that_are_not_set() -> None:
    result = run_qlens("check", "config/production.yaml")
    assert result.returncode == 2
    assert "AZURE_OPENAI_API_KEY_EU" in result.stderr


def test_check_lists_all_faults_at_once_and_leaves_with_2(tmp_path: Path) -> None:
    config = tmp_path / "qlens.yaml"
    config.write_text(
        changed(
            {
                "server": {"port": "eighty", "drain": 3},
                "pipeline": {"cache": [{"plugin": "exacts"}], "route": [{"plugin": "retry", "attempts": "3.5"}]},
                "models": {"gpt-4o": {"targets": [{"provider": "nobody", "model": "x"}]}},
            }
        )
    )
    for command in (["check"], ["serve"], ["routes"]):
        result = run_qlens(*command, str(config))
        assert result.returncode == 2, result.stdout
        assert "Traceback" not in result.stderr
        for place in (
            "server.port",
            "server.drain",
            "pipeline.cache[0]",
            "pipeline.route[0].attempts",
            "models.gpt-4o",
        ):
            assert place in result.stderr, f"{command}: {place} is not among the faults:\n{result.stderr}"


def test_file_that_is_not_there_is_one_line_and_2(tmp_path: Path) -> None:
    result = run_qlens("serve", str(tmp_path / "none.yaml"))
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert "none.yaml" in result.stderr


def test_port_that_is_taken_is_one_line_and_2(tmp_path: Path) -> None:
    config = tmp_path / "qlens.yaml"
    config.write_text(CONFIG.read_text())
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        result = run_qlens("serve", str(config), env={"QLENS_PORT": port, "QLENS_ADMIN_PORT": "0"})
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert port in result.stderr


def test_plugins_lists_what_is_installed_by_stage() -> None:
    rows = json.loads(run_qlens("plugins", "--json").stdout)
    assert {("auth", "api_keys"), ("provider", "echo"), ("cost", "ledger")} <= {(r["stage"], r["name"]) for r in rows}
    assert {row["version"] for row in rows if row["package"] == "qlens"} == {qlens.__version__}


def test_routes_prints_each_path_with_the_hooks_it_runs() -> None:
    result = run_qlens("routes", "config/qlens.yaml")
    assert result.returncode == 0
    lines = result.stdout.splitlines()
    (chat_line,) = (line for line in lines if " /v1/chat/completions " in line)
    hooks = ("api_keys", "token_bucket", "pattern", "exact", "weighted", "retry", "circuit_breaker", "echo", "ledger")
    found = [chat_line.find(hook) for hook in hooks]
    assert -1 not in found, chat_line
    for path in (
        "/v1/completions",
        "/v1/embeddings",
        "/v1/models",
        "/v1/models/{id}",
        "/healthz",
        "/readyz",
        "/metrics",
    ):
        assert any(f" {path} " in line for line in lines), f"{path} is missing:\n{result.stdout}"


def test_explain_says_what_would_happen_without_asking_anybody(tmp_path: Path) -> None:
    body = tmp_path / "body.json"
    body.write_text(json.dumps(BODY))
    result = run_qlens("explain", "config/qlens.yaml", str(body))
    assert result.returncode == 0, result.stderr
    for word in ("gpt-4o-2024-11-20", "gpt-4o-mini", "USD"):
        assert word in result.stdout
    refused = tmp_path / "refused.json"
    refused.write_text(json.dumps(BODY | {"model": "gpt-none"}))
    result = run_qlens("explain", "config/qlens.yaml", str(refused))
    assert result.returncode == 1
    assert "model_not_found" in result.stdout


def test_key_works_from_its_making_to_its_end(served: Served) -> None:
    made = served.qlens("keys", "create", "--tenant", "acme", "--id", "acme-one", "--tag", "team=search")
    assert made.returncode == 0, made.stderr
    key = made.stdout.strip()
    assert key not in (served.folder / "keys.yaml").read_text()

    wait_for(served, key, 200)
    (row,) = (row for row in json.loads(served.qlens("keys", "list", "--json").stdout) if row["id"] == "acme-one")
    assert row["tenant"] == "acme"

    assert served.qlens("keys", "revoke", "acme-one").returncode == 0
    wait_for(served, key, 401)


def test_command_needs_only_its_own_plugins_variables(tmp_path: Path) -> None:
    (tmp_path / "house.yaml").write_text(
        "pipeline:\n  auth: [{plugin: api_keys, file: '${KEYS_FILE}'}]\n"
        "  cost: [{plugin: ledger, url: 'sqlite:///x.db'}]\n"
        "providers: {up: {plugin: openai, api_key: '${NOBODY_SET_THIS}'}}\n"
        "models: {m: {targets: [{provider: up, model: m}]}}\n"
    )
    usage = run_qlens("usage", "-c", str(tmp_path / "house.yaml"))
    assert (usage.returncode, usage.stderr) == (0, "")
    keys = run_qlens("keys", "list", "-c", str(tmp_path / "house.yaml"))
    assert keys.returncode == 2
    assert "KEYS_FILE" in keys.stderr


def wait_for(served: Served, key: str, status: int) -> None:
    """Call until the answer has this status: the gateway looks at the file of keys once a second."""
    ends = time.monotonic() + 60
    while (got := chat(served, key).status_code) != status:
        assert time.monotonic() < ends, f"still {got}"
        time.sleep(0.2)


def test_usage_adds_up_what_was_asked(served: Served) -> None:
    made = served.qlens("keys", "create", "--tenant", "usage-test")
    key = made.stdout.strip()
    wait_for(served, key, 200)
    answers = [chat(served, key) for _ in range(3)]
    tokens = sum(answer.json()["usage"]["prompt_tokens"] for answer in [*answers[:1], *answers])
    ends = time.monotonic() + 60
    while not (rows := receipts(served, "--tenant", "usage-test")) or rows[0]["calls"] < 4:
        assert time.monotonic() < ends, rows
        time.sleep(0.2)
    (row,) = rows
    assert row["model"] == "gpt-4o-mini"
    assert row["prompt_tokens"] in {tokens, tokens // 4}  # answers of the cache use nothing
    assert float(row["cost_usd"]) > 0
    text = served.qlens("usage", "--by", "tenant").stdout
    assert "usage-test" in text


def test_command_that_nobody_has_is_2_and_says_which_there_are() -> None:
    result = run_qlens("nonsense")
    assert result.returncode == 2
    assert "keys" in result.stderr
    assert "Traceback" not in result.stderr


def test_output_into_a_closed_pipe_is_no_traceback() -> None:
    script = f"{shlex.join(QLENS)} plugins | true"
    result = subprocess.run(["sh", "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=30, check=False)
    assert "Traceback" not in result.stderr
