"""The fake that keeps files and batches is as strict as OpenAI itself; OpenAI's own client is content with it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI

from qlens.testing.objects import FakeKeeper, keeper


@pytest.fixture
async def up() -> AsyncIterator[FakeKeeper]:
    async with keeper() as up:
        yield up


@pytest.fixture
async def client(up: FakeKeeper) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=up.url, api_key="sk-example-client", max_retries=0) as client:
        yield client


async def test_it_keeps_files(up: FakeKeeper, client: AsyncOpenAI) -> None:
    made = [await client.files.create(file=(f"{n}.txt", b"x" * n), purpose="user_data") for n in range(1, 4)]
    assert [each.id async for each in client.files.list(limit=2)] == [each.id for each in made[::-1]]
    assert (await client.files.content(made[1].id)).content == b"xx"
    assert (await client.files.delete(made[1].id)).deleted
    with pytest.raises(openai.NotFoundError, match="No such File object"):
        await client.files.retrieve(made[1].id)


async def test_it_runs_batches(up: FakeKeeper, client: AsyncOpenAI) -> None:
    file = up.keep_file(b"{}")
    batch = await client.batches.create(
        input_file_id=file["id"], endpoint="/v1/responses", completion_window="24h", metadata={"a": "b"}
    )
    assert (batch.status, batch.metadata) == ("validating", {"a": "b"})
    up.complete(batch.id, b"done")
    done = await client.batches.retrieve(batch.id)
    assert done.status == "completed"
    assert (await client.files.content(done.output_file_id or "")).text == "done"


@pytest.mark.parametrize(
    "changes",
    [
        {"endpoint": "/v1/none"},
        {"completion_window": "1h"},
        {"input_file_id": "file-none"},
        {"metadata": {f"k{number}": "v" for number in range(17)}},
        {"extra_body": {"model": "m"}},
    ],
)
async def test_it_refuses_a_batch_that_openai_would(
    up: FakeKeeper, client: AsyncOpenAI, changes: dict[str, Any]
) -> None:
    file = up.keep_file(b"{}")
    asked: dict[str, Any] = {"input_file_id": file["id"], "endpoint": "/v1/responses", "completion_window": "24h"}
    with pytest.raises(openai.APIStatusError):
        await client.batches.create(**{**asked, **changes})
    assert not up.batches


async def test_it_refuses_fields_of_a_form_that_openai_does_not_know(up: FakeKeeper, client: AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="Unknown parameter: 'model'"):
        await client.files.create(file=("a", b"a"), purpose="user_data", extra_body={"model": "m"})
    with pytest.raises(openai.BadRequestError, match="purpose"):
        await client.files.create(file=("a", b"a"), purpose="none")  # type: ignore[arg-type]
    assert not up.files
