"""Decides what the echo says: the same answer for the same request, token by token."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from itertools import takewhile
from typing import Any

import orjson
from attrs import frozen

from qlens import UpstreamRejected
from qlens_plugins.provider.echo.schema import sample, sample_object
from qlens_plugins.provider.echo.tokens import count, tokens

Body = Mapping[str, Any]


@frozen
class Token:
    """One token of an answer, and where it belongs."""

    text: str
    tool: int | None = None
    """Which of the answer's tool calls; None: its text."""
    names_tool: bool = False
    """The tool's name, with which its call begins."""


@frozen
class Said:
    """One choice of an answer."""

    tokens: tuple[Token, ...]
    finish: str

    @property
    def text(self) -> str | None:
        """The text; None for an answer that consists of tool calls."""
        if any(token.tool is not None for token in self.tokens):
            return None
        return "".join(token.text for token in self.tokens)

    def tools(self) -> list[tuple[str, str]]:
        """The tool calls: each name with its arguments."""
        calls: list[tuple[str, str]] = []
        for token in self.tokens:
            if token.names_tool:
                calls.append((token.text, ""))
            elif token.tool is not None:
                calls[-1] = (calls[-1][0], calls[-1][1] + token.text)
        return calls


def answer_chat(body: Body, limit: int | None) -> Said:
    """The last user message's text, or the tools it asks for, in at most `limit` tokens."""
    messages = body["messages"]
    results = _tool_results(messages)
    if results:
        return _say(_formatted(body, "\n".join(results)), body, limit)
    asked = _asked(messages)
    if calls := _calls(body, asked):
        return _cut(_call_tokens(calls, asked), "tool_calls", limit)
    return _say(_formatted(body, asked), body, limit)


def answer_completion(prompt: str, body: Body, limit: int | None) -> Said:
    """The prompt's own text, in at most `limit` tokens."""
    said = _say(prompt, body, limit)
    if not body.get("echo"):
        return said
    return Said((*(Token(text) for text in tokens(prompt)), *said.tokens), said.finish)


def prompts(body: Body) -> list[tuple[str, int]]:
    """The prompts of a completion or the inputs of an embedding: each with its number of tokens."""
    given = body.get("prompt")
    if given is None:
        given = body.get("input") or ""  # a completion may go on from nothing
    if isinstance(given, str) or (given and isinstance(given[0], int)):
        given = [given]
    return [_prompt(one) for one in given]


def _prompt(given: str | list[int]) -> tuple[str, int]:
    # Token ids mean nothing here: they are read as numbers.
    return (given, count(given)) if isinstance(given, str) else (" ".join(map(str, given)), len(given))


def count_messages(messages: Iterable[Body]) -> int:
    """The tokens of all texts of a conversation; a message costs nothing beyond its text."""
    return sum(count(text) for message in messages for text in _texts(message.get("content")))


# --- text --------------------------------------------------------------------------------------


def _say(text: str, body: Body, limit: int | None) -> Said:
    return _cut([Token(piece) for piece in tokens(_stopped(text, body.get("stop")))], "stop", limit)


def _cut(said: list[Token], finish: str, limit: int | None) -> Said:
    if limit is None or len(said) <= limit:
        return Said(tuple(said), finish)
    return Said(tuple(said[:limit]), "length")


def _stopped(text: str, stop: str | list[str] | None) -> str:
    sequences = [stop] if isinstance(stop, str) else stop or []
    places = [place for sequence in sequences if sequence and (place := text.find(sequence)) >= 0]
    return text[: min(places)] if places else text


def _formatted(body: Body, text: str) -> str:
    form = body.get("response_format") or {}
    if form.get("type") == "json_object":
        return orjson.dumps({"answer": text}).decode()
    if form.get("type") == "json_schema":
        return orjson.dumps(sample((form.get("json_schema") or {}).get("schema", {}), text)).decode()
    return text


def _asked(messages: list[Body]) -> str:
    user = next((message for message in reversed(messages) if message.get("role") == "user"), messages[-1])
    content = user.get("content")
    # A picture is answered by its kind, so that the answer to a message without text is not empty.
    return "".join(_texts(content)) or " ".join(f"[{part.get('type')}]" for part in content or [])


def _tool_results(messages: list[Body]) -> list[str]:
    last = takewhile(lambda message: message.get("role") in {"tool", "function"}, reversed(messages))
    return ["".join(_texts(message.get("content"))) for message in last][::-1]


def _texts(content: str | list[Body] | None) -> list[str]:
    if isinstance(content, str):
        return [content]
    return [part["text"] for part in content or [] if part.get("type") == "text"]


# --- tools -------------------------------------------------------------------------------------


def _calls(body: Body, asked: str) -> list[tuple[str, Any]]:
    """The tools to call, each with the schema of its parameters."""
    tools = {
        tool["function"]["name"]: tool["function"].get("parameters")
        for tool in body.get("tools") or []
        if tool.get("type") == "function"
    }
    choice = body.get("tool_choice") or "auto"
    if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        allowed = choice.get("allowed_tools") or {}
        names = {(tool.get("function") or {}).get("name") for tool in allowed.get("tools") or []}
        tools, choice = {name: tools[name] for name in tools if name in names}, allowed.get("mode", "auto")
    if isinstance(choice, dict):
        return [_named(tools, choice)]
    if not tools or choice == "none":
        return []
    called = _mentioned(tools, asked) or (list(tools)[:1] if choice == "required" else [])
    if body.get("parallel_tool_calls") is False:
        called = called[:1]
    return [(name, tools[name]) for name in called]


def _named(tools: Mapping[str, Any], choice: Body) -> tuple[str, Any]:
    name = str((choice.get("function") or {}).get("name"))
    if name not in tools:
        raise UpstreamRejected(
            f"tool_choice names the function {name[:64]!r}, which is not among tools.", param="tool_choice"
        )
    return name, tools[name]


def _mentioned(names: Iterable[str], text: str) -> list[str]:
    found = {name: re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", text) for name in names}
    return [
        name for name, _ in sorted(((name, at.start()) for name, at in found.items() if at), key=lambda pair: pair[1])
    ]


def _call_tokens(calls: list[tuple[str, Any]], asked: str) -> list[Token]:
    said: list[Token] = []
    for number, (name, parameters) in enumerate(calls):
        arguments = orjson.dumps(sample_object(parameters, asked)).decode()
        said.append(Token(name, number, names_tool=True))
        said.extend(Token(piece, number) for piece in tokens(arguments))
    return said
