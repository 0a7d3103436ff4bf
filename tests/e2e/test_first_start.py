"""What a new user sees at the first start, and that it works when pasted."""

from __future__ import annotations

import json
import re
import stat
import subprocess
import sys

import httpx2
from e2e.serving import Served, clean_env


def run(*command: str) -> str:
    """Run something as a user would paste it, with nothing in the environment that helps it."""
    done = subprocess.run(command, env=clean_env(), capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_printed_curl_is_answered(served: Served) -> None:
    found = re.search(r"^curl (?:.*\\\n)*.*$", served.output, re.MULTILINE)
    assert found, served.output
    answer = json.loads(run("sh", "-c", found[0]))
    assert answer["choices"][0]["message"]["content"] == "Hello!"


def test_printed_program_streams_an_answer(served: Served) -> None:
    found = re.search(r"^from openai import OpenAI\n(?:.*\n)*?    print\(.*$", served.output, re.MULTILINE)
    assert found, served.output
    assert run(sys.executable, "-c", found[0]) == "Hello!"


def test_base_url_and_key_are_printed_and_only_the_owner_can_read_the_key(served: Served) -> None:
    assert f"{served.url}/v1" in served.output
    assert served.key in served.output
    assert stat.S_IMODE((served.folder / "demo.key").stat().st_mode) == 0o600


def test_admin_listener_serves_metrics_and_the_clients_one_does_not(served: Served) -> None:
    metrics = httpx2.get(f"{served.admin_url}/metrics", timeout=5)
    assert metrics.status_code == 200
    assert "qlens_" in metrics.text
    assert httpx2.get(f"{served.url}/metrics", timeout=5).status_code == 404


def test_gateway_does_not_say_what_it_is_made_of(served: Served) -> None:
    for path in ("/healthz", "/v1/models", "/nothing"):
        answer = httpx2.get(f"{served.url}{path}", timeout=5)
        assert "aiohttp" not in str(answer.headers).lower()
        assert "python" not in str(answer.headers).lower()
