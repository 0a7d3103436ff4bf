"""Golden fixtures of the wire: what a client asks, what leaves, what the provider answers, what comes back.

One file per operation of a provider that speaks its clients' own dialect, on both surfaces of Azure.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import goldens
import orjson
import pytest
from attrs import asdict
from goldens import GOLDEN, HEADERS, Case, cases, plain

from qlens.operations import OPERATIONS
from qlens.testing import running, upstream
from qlens_plugins.provider import azure_openai, openai


async def _passes(provider: str, case: Case) -> None:
    async with upstream() as up, running(goldens.config(provider, up.root, case)) as gateway:
        up.script(goldens.answer(case))
        answer = await goldens.ask(gateway, case)
        assert answer.status == 200, answer.text
        (request,) = up.requests
        assert goldens.sent(request) == case["wire"]
        assert goldens.credentials(provider, request) == HEADERS[provider]
        changing = case.get("changing", [])
        assert plain(goldens.told(case, answer), changing) == plain(case.get("reply", case["answer"]), changing)
        (receipt,) = await gateway.settled(1)
        used = {name: value for name, value in asdict(receipt.usage).items() if value}
        assert (receipt.outcome, used) == ("complete", case["usage"])


@pytest.mark.parametrize("case", cases("openai"))
async def test_openai(case: Case) -> None:
    await _passes("openai", case)


@pytest.mark.parametrize("case", cases("anthropic"))
async def test_anthropic(case: Case) -> None:
    await _passes("anthropic", case)


@pytest.mark.parametrize("case", cases("azure_openai"))
async def test_azure_openai(case: Case) -> None:
    await _passes("azure_openai", case)


# --- that they are all there -------------------------------------------------------------------

SPOKEN = {
    "anthropic": ("chat", "count_tokens", "messages"),
    "azure_openai": (*azure_openai.plugin.PATHS,),
    "openai": (*openai.PATHS,),
}
"""The dialects of each provider."""


def _asked(provider: str) -> Iterator[tuple[str, bool]]:
    """The paths of a provider's fixtures, each with whether it is asked to stream."""
    for file in goldens.files_of(provider).values():
        for case in file.values():
            for step in case.get("steps", [case]):
                if "path" in step:
                    yield step["path"], isinstance(step["answer"], list)


@pytest.mark.parametrize("provider", SPOKEN)
def test_every_operation_of_a_provider_has_one_whole_and_streamed(provider: str) -> None:
    spoken = [operation for operation in OPERATIONS if operation.dialect in SPOKEN[provider]]
    wanted = {(operation.path, streams) for operation in spoken for streams in {False, operation.streams}}
    assert wanted - {*_asked(provider)} == set()


FILES = sorted({*GOLDEN.glob("*/*.json"), *GOLDEN.parent.glob("*/golden/*.json")})


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(GOLDEN.parent)))
def test_every_file_says_where_its_wire_is_described(path: Any) -> None:
    source = orjson.loads(path.read_bytes())["source"]
    assert source
    assert all(page.startswith("https://") for page in source)
