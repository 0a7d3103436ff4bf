"""Golden fixtures of the wire: what a client asks, what leaves, what the provider answers, what comes back.

One file per operation of a provider that speaks its clients' own dialect, and one for each surface of Azure.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import pytest
from attrs import asdict

from qlens import sse
from qlens.testing import Response, Running, Scripted, running, upstream
from qlens.testing.upstreams import FakeUpstream

GOLDEN = Path(__file__).with_name("golden")
HEADERS = {
    "anthropic": {"x-api-key": "sk-example-theirs", "anthropic-version": "2023-06-01"},
    "azure_openai": {"api-key": "sk-example-theirs"},
    "openai": {"authorization": "Bearer sk-example-theirs"},
}
"""The credential that leaves for each provider."""


def _cases(provider: str) -> list[Any]:
    files = sorted((GOLDEN / provider).glob("*.json"))
    read = [(path.stem, name, case) for path in files for name, case in orjson.loads(path.read_bytes()).items()]
    return [pytest.param(case, id=f"{stem}: {name}") for stem, name, case in read]


def _config(provider: str, root: str, case: dict[str, Any]) -> str:
    addresses: dict[str, dict[str, str]] = {"openai": {"base_url": f"{root}/v1"}, "anthropic": {"base_url": root}}
    address = addresses.get(provider, {"endpoint": root})
    target: dict[str, Any] = {
        "provider": "up",
        **{name: case[name] for name in ("model", "base_model") if name in case},
    }
    content: dict[str, Any] = {
        "pipeline": {"auth": [{"plugin": "anonymous"}]},
        "providers": {"up": {"plugin": provider, "api_key": "sk-example-theirs", **address}},
        "models": {"ours": {"targets": [target]}},
    }
    return orjson.dumps(content).decode()


def _answer(case: dict[str, Any]) -> Scripted:
    """What the provider says: JSON, the events of a stream, or bytes under their content-type."""
    answer = case["answer"]
    if isinstance(answer, list):
        return Scripted(events=[_written(event) for event in answer])
    if isinstance(answer, str):
        return Scripted(body=answer.encode(), headers={"content-type": case["content_type"]})
    return Scripted(body=answer)


def _written(event: Any) -> bytes:
    """An event on the wire: those of typed streams are named after their type."""
    name = f"event: {event['type']}\n".encode() if isinstance(event, dict) and "type" in event else b""
    return name + (sse.write(event) if isinstance(event, dict) else f"data: {event}\n\n".encode())


async def _ask(gateway: Running, case: dict[str, Any]) -> Response:
    if "files" not in case:
        return await gateway.post(case["path"], case["client"])
    return await gateway.post_form(
        case["path"], case["client"], {name: text.encode() for name, text in case["files"].items()}
    )


def _sent(up: FakeUpstream) -> dict[str, Any]:
    (request,) = up.requests
    is_form = request.headers["content-type"].startswith("multipart/")
    files = [part for part in request.form if part.filename] if is_form else []
    uploads = {"files": {part.name: part.content.decode() for part in files}} if files else {}
    return {"path": request.path, "body": dict(request.fields), **uploads}


def _told(case: dict[str, Any], answer: Response) -> Any:
    if isinstance(case["answer"], str):
        return answer.text
    return answer.events() if isinstance(case["answer"], list) else answer.json()


def _plain(told: Any, changing: list[str]) -> Any:
    """What was told, without fields that differ each time, and without the price that QLens puts beside the usage."""
    if isinstance(told, list):
        return [_plain(each, changing) for each in told]
    if not isinstance(told, dict):
        return told
    left = {name: value for name, value in told.items() if name not in changing and name != "cost_usd"}
    nested = {name: _plain(left[name], changing) for name in ("response", "usage") if name in left}
    return {**left, **nested}


async def _passes(provider: str, case: dict[str, Any]) -> None:
    async with upstream() as up, running(_config(provider, up.root, case)) as gateway:
        up.script(_answer(case))
        answer = await _ask(gateway, case)
        assert answer.status == 200, answer.text
        assert _sent(up) == case["wire"]
        headers = {name: up.requests[0].headers.get(name) for name in HEADERS[provider]}
        assert headers == HEADERS[provider]
        changing = case.get("changing", [])
        assert _plain(_told(case, answer), changing) == _plain(case.get("reply", case["answer"]), changing)
        (receipt,) = await gateway.settled(1)
        used = {name: value for name, value in asdict(receipt.usage).items() if value}
        assert (receipt.outcome, used) == ("complete", case["usage"])


@pytest.mark.parametrize("case", _cases("openai"))
async def test_openai(case: dict[str, Any]) -> None:
    await _passes("openai", case)


@pytest.mark.parametrize("case", _cases("anthropic"))
async def test_anthropic(case: dict[str, Any]) -> None:
    await _passes("anthropic", case)


@pytest.mark.parametrize("case", _cases("azure_openai"))
async def test_azure_openai(case: dict[str, Any]) -> None:
    await _passes("azure_openai", case)
