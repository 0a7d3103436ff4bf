"""Guard by patterns: blocks prompts and answers, or redacts what must not pass, by regular expression or word list."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from operator import itemgetter
from typing import Literal

from attrs import Attribute, define, field, frozen
from attrs.validators import ge, min_len

from qlens import Blocked, Call, Gateway, Reply, hookimpl


@frozen
class Rule:
    """What to look for, where, and what to do about it."""

    name: str = field(validator=min_len(1))
    """Named in the error message and in metrics; the text that matched never is."""
    regex: str | None = None
    """A regular expression of Python's `re`. Give this or `words`."""
    words: tuple[str, ...] | None = None
    """Words or phrases that match where they stand as whole words."""
    action: Literal["block", "redact"] = "block"
    """`block` refuses the call with code `content_filter`; `redact` puts `replacement` in the place of each match."""
    replacement: str = "[redacted]"
    """Taken literally."""
    on: tuple[Literal["request", "reply"], ...] = ("request", "reply")
    """Whether prompts, answers or both are looked at."""
    ignore_case: bool = False
    """Whether capital and small letters are the same."""

    def __attrs_post_init__(self) -> None:
        if (self.regex is None) == (self.words is None):
            raise ValueError(f"rule {self.name!r} needs either `regex` or `words`")
        if self.words is not None and not all(word.strip() for word in self.words or ("",)):
            raise ValueError(f"rule {self.name!r}: `words` needs words that are not empty")
        if not self.on:
            raise ValueError(f"rule {self.name!r}: `on` is empty; it takes request, reply or both")
        try:
            empty = self.compiled().search("")
        except re.error as error:
            raise ValueError(f"rule {self.name!r}: the regular expression is wrong: {error}") from None
        if empty:
            raise ValueError(f"rule {self.name!r}: the regular expression matches the empty text, so it matches always")

    def compiled(self) -> re.Pattern[str]:
        """The pattern that finds what this rule is about."""
        flags = re.IGNORECASE if self.ignore_case else 0
        if self.regex is not None:
            return re.compile(self.regex, flags)
        longest_first = [re.escape(word) for word in sorted(self.words or (), key=len, reverse=True)]
        if self.ignore_case:
            return re.compile(rf"(?<!\w)(?:{'|'.join(longest_first)})(?!\w)", flags)
        # What stands before a word is looked at after it: an expression that begins with letters is searched by them,
        # many times faster than one that begins with a lookbehind and is tried at every place.
        alone = "|".join(rf"{word}(?<!\w{word})" for word in longest_first)
        return re.compile(rf"(?:{alone})(?!\w)", flags)


def _fit(config: PatternConfig, attribute: Attribute[int], hold_back: int) -> None:
    names = Counter(rule.name for rule in config.rules)
    if twice := [name for name, count in names.items() if count > 1]:
        raise ValueError(f"two rules are called {twice[0]!r}")
    for rule in config.rules:
        longest = max(map(len, rule.words or ("",)))
        if longest > hold_back:
            raise ValueError(
                f"rule {rule.name!r} has a word of {longest} characters; raise hold_back to {longest} or more"
            )


@frozen
class PatternConfig:
    """Blocks or redacts prompts and answers by regular expressions and word lists."""

    rules: tuple[Rule, ...] = field(validator=min_len(1))
    """Applied in this order, each to what the one before left."""
    hold_back: int = field(default=64, validator=[ge(1), _fit])
    """The longest match in characters that is sure to be found in a stream, which is kept back by as many."""
    realtime: Literal["refuse", "pass"] = "refuse"
    """Realtime sessions, lines of batches, items put into conversations and arrays of tokens cannot be looked into:
    they are refused with a 400, or pass unseen."""


Compiled = tuple[tuple[Rule, re.Pattern[str]], ...]
_TEXT = itemgetter(1)
"""The text of a reference with its text."""


@define(eq=False)
class Pattern:
    """Looks at prompts before a cache or provider sees them, and at answers before the client does."""

    config: PatternConfig
    name: str
    _gateway: Gateway = field(init=False, repr=False)
    _on_request: Compiled = field(init=False, repr=False)
    _on_reply: Compiled = field(init=False, repr=False)

    Config = PatternConfig

    def __attrs_post_init__(self) -> None:
        rules = [(rule, rule.compiled()) for rule in self.config.rules]
        self._on_request = tuple((rule, pattern) for rule, pattern in rules if "request" in rule.on)
        self._on_reply = tuple((rule, pattern) for rule, pattern in rules if "reply" in rule.on)

    @property
    def passes_sessions(self) -> bool:
        """Whether realtime sessions and batches run though nothing in them is looked at."""
        return self.config.realtime == "pass"

    @property
    def reads_requests(self) -> bool:
        """Whether prompts are looked at, and so must be texts."""
        return bool(self._on_request)

    @hookimpl
    @asynccontextmanager
    async def lifespan(self, gateway: Gateway) -> AsyncIterator[None]:
        """Take the metrics."""
        self._gateway = gateway
        yield

    @hookimpl
    async def wrap_call(self, call: Call, proceed: Callable[[], Awaitable[Reply]]) -> Reply:
        """Clean the request on its way in and the answer, cached or not, on its way out."""
        if self._on_request:
            self._clean(call)
        reply = await proceed()
        if self._on_reply:  # without such a rule a stream passes unparsed
            reply.rewrite_text(_Cleaner(self._on_reply, "answer", self._count), self.config.hold_back)
        return reply

    @hookimpl
    def explain(self, call: Call) -> list[str]:
        """Say which rules the request meets."""
        texts, said = call.texts(), []
        for rule, pattern in self._on_request:
            found = [(ref, text) for ref, text in texts if _matches(pattern, text)]
            if rule.action == "redact" and any(_would_refuse(call, rule, pattern, *each) for each in found):
                said.append(f"the rule {rule.name} would refuse the request: what it would redact must stay as it is")
            elif found:
                said.append(f"the rule {rule.name} would {rule.action} the request")
        return said

    def _clean(self, call: Call) -> None:
        texts = call.texts()
        for _, pattern in self._on_request:
            # Most prompts meet no rule, and no rule changes them for the next.
            if any(map(pattern.search, map(_TEXT, texts))):
                call.rewrite_text(_Cleaner(self._on_request, "prompt", self._count))
                return

    def _count(self, rule: Rule) -> None:
        self._gateway.metrics.counter(
            "qlens_guard_matches_total",
            "Prompts and answers in which a guard's rule found something.",
            ("guard", "rule", "action"),
        ).labels(self.name, rule.name, rule.action).inc()


@define(eq=False)
class _Cleaner:
    """Applies rules to the texts of one prompt or answer; raises Blocked where a rule says so."""

    rules: Compiled
    where: str
    count: Callable[[Rule], None]
    _counted: set[str] = field(factory=set, init=False)

    def __call__(self, text: str) -> str:
        for rule, pattern in self.rules:
            if not _matches(pattern, text):
                continue
            if rule.name not in self._counted:  # what a stream holds back is looked at more than once
                self._counted.add(rule.name)
                self.count(rule)
            if rule.action == "block":
                raise Blocked(f"The {self.where} was blocked by the rule {rule.name!r} of this gateway.")
            text = _redacted(pattern, rule.replacement, text)
        return text


def _matches(pattern: re.Pattern[str], text: str) -> bool:
    """Whether a text has a match that is not empty; a lookahead alone would match everywhere and say nothing."""
    first = pattern.search(text)
    return first is not None and (first.group() != "" or any(match.group() for match in pattern.finditer(text)))


def _would_refuse(call: Call, rule: Rule, pattern: re.Pattern[str], ref: tuple[str | int, ...], text: str) -> bool:
    """Whether a text that this rule would redact cannot be another."""
    if _redacted(pattern, rule.replacement, text) == text:
        return False
    try:
        call.replace_text(ref, text)  # with itself
    except Blocked:
        return True
    return False


def _redacted(pattern: re.Pattern[str], replacement: str, text: str) -> str:
    return pattern.sub(lambda match: replacement if match.group() else "", text)
