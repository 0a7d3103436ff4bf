"""Limits of models that have several names: all names take from the buckets of one."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from qlens.cli import main
from qlens.testing import Response, Running, running
from qlens.testing.redis import RedisServer

PATH = "/v1/chat/completions"
CALL = {"max_tokens": 10, "messages": [{"role": "user", "content": "hello"}]}
OPS = "sk-example-ops"
KEYS = {"sk-example-a": "id: a, tenant: acme", OPS: "id: ops, tenant: ops, roles: [operator]"}
MODELS = {
    "gpt": "{max_output_tokens: 1000, targets: [{provider: up, model: gpt-4o}, {provider: eu, model: x, weight: 0}]}",
    "fast": "{max_output_tokens: 50, targets: [{provider: eu, model: X}, {provider: up, model: GPT-4o}]}",
    "apart": "{max_output_tokens: 1000, targets: [{provider: up, model: gpt-4o}]}",
    '"open/*"': '{max_output_tokens: 1000, targets: [{provider: up, model: "*"}]}',
}


@pytest.fixture(params=["memory", "redis"])
def store(request: pytest.FixtureRequest) -> str:
    """Each place where buckets may be, as a configuration says it."""
    if request.param == "memory":
        return "{kind: memory}"
    server: RedisServer = request.getfixturevalue("server")
    asyncio.run(server.command("FLUSHALL"))
    return f'{{kind: redis, url: "{server.url}", timeout_ms: 2000}}'


def config(limits: str, store: str = "{kind: memory}", *names: str) -> str:
    rows = "\n".join(f"  {name}: {MODELS[name]}" for name in names or MODELS)
    return f"""
pipeline:
  auth: [{{plugin: api_keys, file: keys.yaml}}]
  rate_limit: [{{plugin: token_bucket, store: {store}, limits: [{limits}]}}]
providers: {{up: {{plugin: echo}}, eu: {{plugin: echo}}}}
models:
{rows}
"""


@asynccontextmanager
async def serving(text: str) -> AsyncIterator[Running]:
    rows = [f"- {{hash: 'sha256:{hashlib.sha256(key.encode()).hexdigest()}', {said}}}" for key, said in KEYS.items()]
    async with running(text, files={"keys.yaml": "\n".join(["keys:", *rows])}) as gateway:
        yield gateway


async def call(gateway: Running, model: str) -> Response:
    return await gateway.post(PATH, {**CALL, "model": model}, key="sk-example-a")


async def statuses(gateway: Running, *models: str) -> list[int]:
    return [(await call(gateway, model)).status for model in models]


async def shown(gateway: Running) -> dict[str, Any]:
    """What is left, by owner."""
    rows = (await gateway.get("/admin/limits", key=OPS)).json()["data"]
    return {row["owner"]: row["remaining"] for row in rows}


async def test_all_names_of_a_model_take_from_one_bucket(store: str) -> None:
    """T29."""
    async with serving(config("{per: model, requests_per_minute: 3}", store)) as gateway:
        assert await statuses(gateway, "gpt", "fast", "gpt", "gpt", "fast") == [200, 200, 200, 429, 429]
        answer = await call(gateway, "fast")
        assert "for model gpt" in answer.json()["error"]["message"]
        assert answer.headers["x-ratelimit-remaining-requests"] == "0"
        asked = ("apart", "open/gpt-4o", "open/GPT-4o", "open/gpt-4o", "apart", "open/other")
        assert await statuses(gateway, *asked) == [200, 200, 200, 429, 429, 200]
        assert await shown(gateway) == {"gpt": 0, "apart": 0, "open/*": 2}


async def test_tokens_are_counted_together_whatever_names_come_and_go() -> None:
    limits = "{per: model, tokens_per_minute: 1000}"
    async with serving(config(limits)) as gateway:
        left = [int((await call(gateway, name)).headers["x-ratelimit-remaining-tokens"]) for name in ("gpt", "fast")]
        assert left[1] < left[0] < 1000
        await gateway.settled(2)
        await gateway.reload(config(limits, "{kind: memory}", "gpt"))
        before = (await shown(gateway))["gpt"]
        await gateway.reload(config(limits, "{kind: memory}", "gpt", "fast"))
        assert int((await call(gateway, "fast")).headers["x-ratelimit-remaining-tokens"]) < before


async def test_what_is_said_of_one_name_holds_for_the_others() -> None:
    limits = """{per: tenant, requests_per_minute: 2, match: {model: [fast]}},
      {per: key, requests_per_minute: 1, match: {model: ["open/*"]}}"""
    async with serving(config(limits)) as gateway:
        assert await statuses(gateway, "gpt", "gpt", "gpt", "fast") == [200, 200, 429, 429]
        assert await statuses(gateway, "open/gpt-4o", "open/other", "apart", "apart") == [200, 429, 200, 200]


async def test_a_reload_that_adds_a_name_gives_no_fresh_bucket(store: str) -> None:
    limits = "{per: model, requests_per_minute: 3}"
    async with serving(config(limits, store, "gpt", "apart")) as gateway:
        assert await statuses(gateway, "gpt", "gpt") == [200, 200]
        await gateway.reload(config(limits, store, "apart", "gpt", "fast"))
        assert await statuses(gateway, "fast", "fast", "gpt") == [200, 429, 429]


def test_explain_says_which_name_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "qlens.yaml").write_text(config("{per: model, requests_per_minute: 3}"))
    (tmp_path / "keys.yaml").write_text("keys: []")
    for asked, counts in (("fast", True), ("gpt", False)):
        (tmp_path / "body.json").write_text(json.dumps({**CALL, "model": asked}))
        assert main(["explain", str(tmp_path / "qlens.yaml"), str(tmp_path / "body.json")]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert ("counts as  gpt" in lines) is counts
        assert "rate_limit.token_bucket: takes 1 of 3 requests a minute from model gpt" in lines
