"""Each of the forty faults that gateways like this one are known for has a test that is named after it.

A name says the numbers: `test_pitfall_12_...`, `test_pitfalls_28_and_29_...`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
NAMED = re.compile(r"test_pitfalls?_(?P<numbers>\d+(?:_and_\d+)*)_\w+")

PITFALLS: Mapping[int, str] = {
    1: "a usage event that has choices, or comes unasked",
    2: "usage on an event with choices: not read, or its text lost",
    3: "reading that ends with the finish reason",
    4: "streams that cost nothing",
    5: "a prompt counted without what was cached",
    6: "cached tokens billed twice",
    7: "cache writes for an hour at the price of those for five minutes",
    8: "counts read in one of two spellings only",
    9: "more cached than input, once translated",
    10: "throttling in mid-stream taken for the client's mistake",
    11: "an error as a stream's first frame, told as 200",
    12: "a truncated stream taken for an answer",
    13: "a second end after the end of a failed response",
    14: "a provider that goes on when the client has left",
    15: "a fallback after something was sent",
    16: "connections kept that the peer has closed",
    17: "retries that nobody sees, each of them paid",
    18: "retry-after lost on the way",
    19: "the price of a deployment's name",
    20: "events without id or delta",
    21: "a stream without [DONE]",
    22: "max_tokens for models that know it by another name",
    23: "rate-limit headers that say -1",
    24: "a response asked for at an account that did not make it",
    25: "a history with tools in a request without",
    26: "results of parallel calls in several messages",
    27: "empty arguments that are no JSON",
    28: "arguments of two calls in one",
    29: "calls counted together with blocks of text",
    30: "names and ids of tools that are too long, or collide",
    31: "schemas that contain themselves; `strict` where it is refused",
    32: "thoughts sent without their proof, or to another model",
    33: "temperature and top_p both",
    34: "images under a wrong type, without a URL, or encoded twice",
    35: "blank texts",
    36: "conversations that do not begin with the user",
    37: "names of documents; cache points where they are refused",
    38: "an ARN in a path",
    39: "an error's text in a header; a context that is too long taken for throttling",
    40: "embeddings in the wrong encoding",
}

NOT_YET: Mapping[int, str] = {}
"""What cannot be tested yet, and why: the feature is missing."""


def _tests() -> Iterator[tuple[int, str]]:
    """Every number that a test's name has, with the test."""
    for path in sorted({*TESTS.rglob("test_*.py")} - {Path(__file__)}):
        if "pitfall" not in (text := path.read_text()):
            continue  # parsing takes long, and every process that runs tests collects all of them
        for node in ast.parse(text).body:
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or "pitfall" not in node.name:
                continue
            found = NAMED.fullmatch(node.name)
            if found is not None:
                for number in found["numbers"].split("_and_"):
                    yield int(number), f"{path.relative_to(TESTS)}::{node.name}"
            else:
                yield 0, f"{path.relative_to(TESTS)}::{node.name}"


FOUND = list(_tests())


@pytest.mark.parametrize("number", PITFALLS)
def test_every_pitfall_has_a_test_that_is_named_after_it(number: int) -> None:
    tests = [test for at, test in FOUND if at == number]
    if number in NOT_YET:
        assert not tests, f"pitfall {number} is listed in NOT_YET, but there is {tests[0]}"
    else:
        assert tests, f"no test is named test_pitfall_{number:02d}_...: {PITFALLS[number]}"


def test_every_test_of_a_pitfall_names_one_that_there_is() -> None:
    strays = [test for number, test in FOUND if number not in PITFALLS]
    assert not strays, "name it test_pitfall_NUMBER_..., with a number of 1 to 40"


def test_there_are_forty() -> None:
    assert [*PITFALLS] == [*range(1, 41)]
    assert NOT_YET.keys() <= PITFALLS.keys()
