"""A growing text comes out as it would whole, and nothing passes that a later piece could change."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from attrs import frozen
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qlens import Blocked
from qlens.dialects.growing import Growing


@frozen
class Redaction:
    pattern: str
    replacement: str
    longest: int

    def __call__(self, text: str) -> str:
        return re.sub(self.pattern, lambda match: self.replacement, text)

    def refuse(self, text: str) -> str:
        if re.search(self.pattern, text):
            raise Blocked("not this")
        return text


REDACTIONS = [
    Redaction("secret", "", 6),
    Redaction("secret", "[redacted]", 6),
    Redaction("(?i)SECRET", "secret", 6),
    Redaction(r"\b\d{3}\b", "N", 3),
    Redaction(r"\d{1,4}", "#", 4),
    Redaction(r"(?<!\w)ab(?!\w)", "-", 2),
    Redaction(r"(?<=a)b", "", 1),
    Redaction(r"(?=ab)a", "q", 1),
    Redaction("aa", "b", 2),
    Redaction("a{2,4}", "", 4),
    Redaction("[ab]{1,2}", "a", 2),
    Redaction("(?!a)[ab][ab]{0,2}", "", 3),
    Redaction("a|aba", "y", 3),
    Redaction("aba|ba", "a", 3),
    Redaction("ab|bc?", "aX", 2),
    Redaction("^a", "Z", 1),
    Redaction("b$", "Z", 1),
    Redaction(r"\bb$", "", 1),
    Redaction("(?<=a)b$", "", 1),
    Redaction("(?m)^ab$", "", 2),
    Redaction(r"\b\w", "W", 1),
    Redaction(r"a\n", "", 2),
]
PIECES = st.lists(
    st.sampled_from(["secret", "ab", "aba", "123", "1234", " ", "\n", "sec", "b", "bbb", "a", "aa", "c", "é", ""]),
    max_size=30,
)


def grown(pieces: list[str], fn: Callable[[str], str], longest: int) -> list[str]:
    growing = Growing(fn, longest)
    return [*map(growing.grow, pieces), growing.end()]


@settings(max_examples=1000)
@given(PIECES, st.sampled_from(REDACTIONS))
@example(["secretsec", "ret"], Redaction("secret", "", 6))
@example(["xxxxx", "123 "], Redaction(r"\b\d{3}\b", "N", 3))
@example(["123123123", "123"], Redaction(r"\d{1,4}", "#", 4))
@example(["aabbbabaaab123bbbbbb", "baa"], Redaction("(?!a)[ab][ab]{0,2}", "", 3))
def test_it_comes_out_as_it_would_whole_and_never_runs_ahead(pieces: list[str], redact: Redaction) -> None:
    passed = ""
    for piece in grown(pieces, redact, redact.longest):
        passed += piece
        assert redact("".join(pieces)).startswith(passed)
    assert passed == redact("".join(pieces))


@settings(max_examples=1000)
@given(PIECES, st.sampled_from(REDACTIONS))
@example(["ccccccc ab", "a"], Redaction(r"(?<!\w)ab(?!\w)", "-", 2))
@example(["secretab", "ab"], Redaction("^a", "", 1))
@example(["ccccccc ab\n", "c"], Redaction("(?<=a)b$", "", 1))
@example(["c\n\nb\n", "b\n", "a"], Redaction("b$", "", 1))
def test_it_is_refused_when_it_would_be_whole_and_shows_nothing_of_the_match(
    pieces: list[str], redact: Redaction
) -> None:
    growing, passed, refused = Growing(redact.refuse, redact.longest), "", False
    try:
        for piece in pieces:
            passed += growing.grow(piece)
        passed += growing.end()
    except Blocked:
        refused = True
    match = re.search(redact.pattern, "".join(pieces))
    assert refused == (match is not None)
    assert "".join(pieces)[: match.start() if match else None].startswith(passed)


@given(st.lists(st.text(max_size=5)))
def test_a_function_that_looks_at_single_characters_holds_nothing_back(pieces: list[str]) -> None:
    assert grown(pieces, str.upper, 0) == [*(piece.upper() for piece in pieces), ""]


def test_nothing_is_left_after_the_end() -> None:
    growing = Growing(str.upper, 10)
    growing.grow("abc")
    assert growing.end() == "ABC"
    assert growing.end() == ""


def test_a_match_is_refused_as_soon_as_it_cannot_become_harmless() -> None:
    growing = Growing(Redaction("bomb", "", 4).refuse, 4)
    assert growing.grow("a word and a bomb") == ""
    with pytest.raises(Blocked):
        growing.grow(" and more")


@pytest.mark.parametrize("redact", [Redaction("secret", "SECRET", 6), Redaction("[st]", "*", 1)])
def test_little_is_held_back(redact: Redaction) -> None:
    growing = Growing(redact, redact.longest)
    for word in ["words ", "and ", "secrets "] * 100:
        growing.grow(word)
        assert len(growing.held) <= 2 * redact.longest + len("secrets ")


def test_a_function_that_changes_every_character_holds_back_no_more() -> None:
    growing = Growing(str.upper, 10)
    for _ in range(100):
        growing.grow("words ")
        assert len(growing.held) <= 12


def test_it_goes_on_after_a_stretch_without_a_place_to_cut() -> None:
    calls = 0

    def capitals(text: str) -> str:
        nonlocal calls
        calls += 1
        return re.sub(r"\b\w", lambda match: match.group().upper(), text)

    growing = Growing(capitals, 1)
    assert "".join(growing.grow("ab") for _ in range(500)) == ""
    assert len(growing.held) == 1000
    # Looking for a place after every piece would take thousands of calls.
    assert calls < 300
    passed = "".join(growing.grow(" words and") for _ in range(300))
    assert passed == capitals("ab" * 500 + " words and" * 300)[: len(passed)]
    assert len(growing.held) < 50


def test_an_error_of_the_function_itself_is_not_swallowed() -> None:
    growing = Growing(lambda text: str(1 // len(text[5:])), 2)
    with pytest.raises(ZeroDivisionError):
        growing.grow("12345")
