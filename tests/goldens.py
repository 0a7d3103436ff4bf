"""Pieces for the golden fixtures of the wire: what stands in a file of them, and how a case is played.

A file is about one operation of a provider, or about one thing that all of them have: errors, kept objects, sessions.
Beside its cases, by name, it says under `source` which pages of the provider describe what is on the wire.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson
import pytest

from qlens import sse
from qlens.testing import Response, Running, Scripted
from qlens.testing.upstreams import Recorded

GOLDEN = Path(__file__).parent / "plugins" / "provider" / "golden"
KEY = "sk-example-theirs"
HEADERS: Mapping[str, Mapping[str, str]] = {
    "anthropic": {"x-api-key": KEY, "anthropic-version": "2023-06-01"},
    "azure_openai": {"api-key": KEY},
    "openai": {"authorization": f"Bearer {KEY}"},
}
"""The credential that leaves for each provider."""
APART = ("errors", "objects", "realtime")
"""The files that are played in another way than operations."""

Case = dict[str, Any]


def files_of(provider: str) -> dict[str, dict[str, Case]]:
    """The cases of each file, by its name."""
    paths = sorted((GOLDEN / provider).glob("*.json"))
    read = {path.stem: orjson.loads(path.read_bytes()) for path in paths}
    return {stem: {name: case for name, case in file.items() if name != "source"} for stem, file in read.items()}


def cases(provider: str, only: str | None = None) -> list[Any]:
    """The cases of one file as a test's parameters; without a name, those of all operations."""
    return [
        pytest.param(case, id=f"{stem}: {name}")
        for stem, file in files_of(provider).items()
        if (stem == only if only else stem not in APART)
        for name, case in file.items()
    ]


def config(provider: str, root: str, case: Case) -> str:
    """One model `ours` behind the provider, as a case wants it."""
    addresses: dict[str, dict[str, str]] = {"openai": {"base_url": f"{root}/v1"}, "anthropic": {"base_url": root}}
    address = addresses.get(provider, {"endpoint": root})
    told = {name: case[name] for name in ("model", "base_model") if name in case}
    content: dict[str, Any] = {
        "pipeline": {"auth": [{"plugin": "anonymous"}]},
        "providers": {"up": {"plugin": provider, "api_key": KEY, **address, **case.get("settings", {})}},
        "models": {"ours": {"targets": [{"provider": "up", "model": "ours", **told}]}},
    }
    return orjson.dumps(content).decode()


def answer(case: Case) -> Scripted:
    """What the provider says: JSON, the events of a stream, or bytes under their content-type."""
    told = case["answer"]
    if isinstance(told, list):
        return Scripted(events=[written(event) for event in told])
    if isinstance(told, str):
        return Scripted(body=told.encode(), headers={"content-type": case["content_type"]})
    return Scripted(body=told)


def written(event: Any) -> bytes:
    """An event on the wire: those of typed streams are named after their type."""
    name = f"event: {event['type']}\n".encode() if isinstance(event, dict) and "type" in event else b""
    return name + (sse.write(event) if isinstance(event, dict) else f"data: {event}\n\n".encode())


async def ask(gateway: Running, case: Case) -> Response:
    """What the client gets for what it asks: JSON, or a form where there are files."""
    if "files" not in case:
        return await gateway.post(case["path"], case["client"])
    files = {name: text.encode() for name, text in case["files"].items()}
    return await gateway.post_form(case["path"], case["client"], files)


def sent(request: Recorded) -> dict[str, Any]:
    """What arrived at the provider: its path and query, the body or the fields of the form, and the files in it."""
    is_form = request.headers.get("content-type", "").startswith("multipart/")
    files = [part for part in request.form if part.filename] if is_form else []
    uploads = {"files": {part.name: part.content.decode() for part in files}} if files else {}
    query = {"query": dict(request.query)} if request.query else {}
    return {"path": request.path, **query, "body": dict(request.fields), **uploads}


def credentials(provider: str, request: Recorded) -> dict[str, str | None]:
    """The headers of a request that say who asks."""
    return {name: request.headers.get(name) for name in HEADERS[provider]}


def told(case: Case, response: Response) -> Any:
    """What the client got, in the form in which the case has the provider's answer."""
    if isinstance(case["answer"], str):
        return response.text
    return response.events() if isinstance(case["answer"], list) else response.json()


def plain(said: Any, changing: list[str]) -> Any:
    """What was told, without fields that differ each time, and without the price that QLens puts beside the usage."""
    if isinstance(said, list):
        return [plain(each, changing) for each in said]
    if not isinstance(said, dict):
        return said
    left = {name: value for name, value in said.items() if name not in changing and name != "cost_usd"}
    nested = {name: plain(left[name], changing) for name in ("response", "usage") if name in left}
    return {**left, **nested}
