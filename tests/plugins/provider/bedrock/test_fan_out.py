"""One call in several requests, of which one fails: AWS bills the others, and so does the receipt."""

from __future__ import annotations

from typing import Any

import pytest
from attrs import evolve
from bedrocks import CHAT, chat, config

from qlens import Usage
from qlens.testing import Scripted, frames, running
from qlens.testing.bedrock import PICTURE, answer, bedrock, failure, stream, streamed, whole

PRICES = {
    "plugin": "prices",
    "catalogue": False,
    "table": [{"model": "*", "input": 3, "output": 7, "meters": {"images": 0.04}}],
}
COST = [PRICES, {"plugin": "budgets", "limits": [{"per": "tenant", "usd": 9}]}]
BUSY = evolve(failure("ThrottlingException", "slow down", status=429), delay=0.3)
"""It comes behind what is answered at once."""
WRONG = evolve(failure("ValidationException", "temperature is out of range"), delay=0.3)
SILENT = Scripted(hang=True)
ONE = 9 * 3_000_000 + 4 * 7_000_000
"""What one usual answer costs, in picodollars."""


async def test_choices_that_were_answered_are_billed_with_the_attempt_that_failed() -> None:
    pipeline = {"route": [{"plugin": "retry", "attempts": 2, "backoff_seconds": 0.01}], "cost": COST}
    async with bedrock() as aws, running(config(aws.root, pipeline=pipeline)) as gateway:
        aws.script(whole(answer()), whole(answer()), BUSY)
        assert (await gateway.post(CHAT, chat(n=3))).status == 200
        (receipt,) = await gateway.settled(1)
        assert [attempt.usage for attempt in receipt.attempts] == [
            Usage(input=18, output=8, source="provider"),
            Usage(input=27, output=12, source="provider"),
        ]
        assert (receipt.cost.picos, receipt.cost.state) == (5 * ONE, "exact")
        (row,) = (await gateway.get("/v1/budgets")).json()["data"]
        assert (round(float(row["spent_usd"]) * 10**12), row["reserved_usd"]) == (5 * ONE, "0")


async def used(scripted: list[Scripted], expected: int, body: dict[str, Any], **settings: Any) -> Usage:
    """What a call is billed for whose only attempt fails so."""
    pipeline = {"cost": COST}
    async with bedrock() as aws, running(config(aws.root, pipeline=pipeline, **settings)) as gateway:
        aws.script(*scripted)
        path = "/v1/embeddings" if "input" in body else "/v1/images/generations" if "prompt" in body else CHAT
        assert (await gateway.post(path, body)).status == expected
        (receipt,) = await gateway.settled(1)
        assert len(receipt.attempts) == 1
        assert receipt.attempts[0].billed == bool(receipt.usage.total or receipt.usage.meters)
        if receipt.attempts[0].billed:
            assert (receipt.cost.state == "exact") == (receipt.usage.source == "provider")
        return receipt.usage


GUESSED = 11
"""The tokens of the usual prompt, as the gateway guesses them."""


@pytest.mark.parametrize(
    ("scripted", "expected", "body", "usage"),
    [
        (
            [whole(answer()), SILENT, BUSY],
            429,
            chat(n=3),
            Usage(input=9 + GUESSED, output=4 + 8000, source="estimated"),
        ),
        ([SILENT, BUSY], 429, chat(n=2, max_tokens=50), Usage(input=GUESSED, output=50, source="estimated")),
        ([whole({**answer(), "usage": None}), BUSY], 429, chat(n=2), Usage(GUESSED, output=8000, source="estimated")),
        (
            [stream(streamed(answer()), hang=True), BUSY],
            429,
            chat(n=2, stream=True),
            Usage(input=GUESSED, output=8000, source="estimated"),
        ),
        (
            [stream(streamed(answer()), hang=True), stream([frames.exception("throttlingException", "slow down")])],
            429,
            chat(n=2, stream=True),
            Usage(input=GUESSED, output=8000, source="estimated"),
        ),
        (
            [whole(answer()), evolve(whole(answer()), cut_at=20, delay=0.2)],
            502,
            chat(n=2),
            Usage(input=9 + GUESSED, output=4 + 8000, source="estimated"),
        ),
        (
            [whole(answer()), Scripted(body=b'{"output": {"mess', delay=0.2)],
            502,
            chat(n=2),
            Usage(input=9 + GUESSED, output=4 + 8000, source="estimated"),
        ),
        # Who is too busy for one of them is mostly too busy for the others, whoever is told first.
        ([BUSY, evolve(BUSY, delay=0.32), evolve(BUSY, delay=0.4)], 429, chat(n=3), Usage()),
        # What is wrong with one of them is wrong with all.
        ([SILENT, SILENT, WRONG], 400, chat(n=3), Usage()),
        ([whole({"usage": answer()["usage"]})], 502, chat(), Usage(input=9, output=4, source="provider")),
    ],
    ids=[
        "cancelled",
        "as much as was asked for",
        "untold",
        "streamed",
        "an exception comes first",
        "cut",
        "unreadable",
        "busy",
        "wrong",
        "nonsense",
    ],
)
async def test_what_a_failed_attempt_has_used(
    scripted: list[Scripted], expected: int, body: dict[str, Any], usage: Usage
) -> None:
    assert await used(scripted, expected, body) == usage


@pytest.mark.parametrize(("most", "settings"), [(8, {}), (2, {"network": {"max_connections": 2}})])
async def test_a_choice_that_was_not_sent_has_used_nothing(most: int, settings: dict[str, Any]) -> None:
    usage = await used([*[SILENT] * (most - 1), BUSY, *[SILENT] * 5], 429, chat(n=most + 5), **settings)
    # The next may go out in the place of the one that failed, before that is seen.
    assert usage.output in {8000 * (most - 1), 8000 * most}


TITAN = "amazon.titan-embed-text-v2:0"
STABLE = "stability.stable-image-core-v1:1"
VECTOR = Scripted(body={"embedding": [0.5], "inputTextTokenCount": 2})
IMAGE = Scripted(body={"images": [PICTURE], "seeds": [1], "finish_reasons": [None]})
FILTERED = Scripted(body={"images": [], "finish_reasons": ["Filter reason: output image"]})
TEXTS: dict[str, Any] = {"model": "ours", "input": ["one two", "and three", "four"]}
CATS: dict[str, Any] = {"model": "ours", "prompt": "a cat", "n": 3}


@pytest.mark.parametrize(
    ("model", "scripted", "expected", "body", "usage"),
    [
        (TITAN, [VECTOR, VECTOR, BUSY], 429, TEXTS, Usage(input=4, source="provider")),
        (TITAN, [VECTOR, SILENT, BUSY], 429, TEXTS, None),
        # A text that is wrong says nothing of the others.
        (TITAN, [VECTOR, SILENT, WRONG], 400, TEXTS, None),
        (STABLE, [IMAGE, IMAGE, BUSY], 429, CATS, Usage(meters={"images": 2}, source="provider")),
        (STABLE, [IMAGE, SILENT, BUSY], 429, CATS, Usage(meters={"images": 2}, source="estimated")),
        (STABLE, [IMAGE, FILTERED, IMAGE], 400, CATS, Usage(meters={"images": 2}, source="provider")),
    ],
)
async def test_vectors_and_images_that_were_made_are_billed_though_others_fail(
    model: str, scripted: list[Scripted], expected: int, body: dict[str, Any], usage: Usage | None
) -> None:
    found = await used(scripted, expected, body, model=model)
    if usage is not None:
        assert found == usage
    else:
        # Of which text is the one that hangs depends on what arrives first; a guess is a token for three bytes.
        assert found.source == "estimated"
        assert found.input - 2 in {2, 3}
