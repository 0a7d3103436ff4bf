"""Golden fixtures of what providers keep: files, batches and responses, asked for again under the gateway's own ids.

In a fixture `{name}` is an id of the gateway: it is what it was when it came up first.
"""

from __future__ import annotations

import re
from typing import Any

import goldens
import orjson
import pytest
from goldens import HEADERS, Case, cases

from qlens.testing import Response, Running, running, upstream

NAME = re.compile(r"{(\w+)}")
THEIRS = re.compile(r"(?:file|batch|resp)[-_]\w+")


def _known(given: Any, ids: dict[str, str]) -> Any:
    """The same with the ids in place of their names."""
    text = orjson.dumps(given).decode()
    return orjson.loads(NAME.sub(lambda found: ids[found[1]], text))


def _learned(expected: Any, said: Any, ids: dict[str, str]) -> Any:
    """What is expected, with the ids that were said where a name comes up for the first time."""
    if isinstance(expected, dict):
        return {name: _learned(value, said.get(name), ids) for name, value in expected.items()}
    if isinstance(expected, list):
        return [_learned(*pair, ids) for pair in zip(expected, said, strict=True)]
    named = NAME.fullmatch(expected) if isinstance(expected, str) else None
    return ids.setdefault(named[1], said) if named else expected


async def _ask(gateway: Running, step: Case, ids: dict[str, str]) -> Response:
    path = _known(step["path"], ids)
    if "files" in step:
        return await goldens.ask(gateway, {**step, "path": path})
    body = orjson.dumps(_known(step["client"], ids)) if "client" in step else None
    return await gateway.request(step["method"], path, body=body)


async def _keeps(provider: str, case: Case) -> None:
    ids: dict[str, str] = {}
    async with upstream() as up, running(goldens.config(provider, up.root, case)) as gateway:
        for step in case["steps"]:
            up.script(goldens.answer(step))
            answer = await _ask(gateway, step, ids)
            assert answer.status == 200, answer.text
            request = up.requests[-1]
            assert {"method": request.method, **goldens.sent(request)} == step["wire"]
            assert goldens.credentials(provider, request) == HEADERS[provider]
            said = goldens.plain(goldens.told(step, answer), [])
            assert said == _learned(step["reply"], said, ids)
        assert len(up.requests) == len(case["steps"])
        # A client never sees the id that its provider gave.
        assert {*THEIRS.findall(orjson.dumps(case["steps"]).decode())}.isdisjoint(ids.values())


@pytest.mark.parametrize("case", cases("openai", "objects"))
async def test_openai(case: Case) -> None:
    await _keeps("openai", case)


@pytest.mark.parametrize("case", cases("azure_openai", "objects"))
async def test_azure_openai(case: Case) -> None:
    await _keeps("azure_openai", case)
