"""Messages of a chat as Converse wants them: system prompts apart, user and assistant in turn."""

from __future__ import annotations

from typing import Any

import orjson
from attrs import define, field

from qlens import InvalidRequest
from qlens_plugins.provider.bedrock.caching import Block, Entry, expanded, mark
from qlens_plugins.provider.bedrock.content import PLACEHOLDER, Reader, beside_documents
from qlens_plugins.provider.bedrock.families import Family
from qlens_plugins.provider.bedrock.tools import Names, call_id

Message = dict[str, Any]

_OPENING = frozenset({"system", "developer"})
_SPEAKERS = frozenset({"user", "assistant"})


def spoken(messages: list[Message], family: Family) -> tuple[list[Block], list[Block]] | None:
    """The system prompts and turns of a chat of texts alone that user begins and ends, as most are.

    None for every other chat, which takes a Conversation.
    """
    system: list[Block] = []
    turns: list[Block] = []
    for message in messages:
        role, blocks = message["role"], _texts(message)
        if blocks is None:
            return None
        if role in _SPEAKERS:
            if turns and turns[-1]["role"] == role:
                turns[-1]["content"] += blocks
            else:
                turns.append({"role": role, "content": blocks})
        elif role in _OPENING and not turns and family.system:
            system += blocks
        else:
            return None
    return (system, turns) if turns and turns[0]["role"] == turns[-1]["role"] == "user" else None


def _texts(message: Message) -> list[Block] | None:
    content = message.get("content")
    if len(message) != 2 or not content:
        return None
    if isinstance(content, str):
        return [{"text": content}] if content.strip() else None
    if all(len(part) == 2 and part["type"] == "text" and part["text"].strip() for part in content):
        return [{"text": part["text"]} for part in content]
    return None


@define(eq=False)
class Conversation:
    """A chat's messages, read one after another."""

    family: Family
    names: Names
    system: list[Block] = field(factory=list, init=False)
    turns: list[Block] = field(factory=list, init=False)
    """Of the roles user and assistant in turn, each with content."""
    marked: bool = field(init=False, default=False)
    """Whether something asked for a cache point."""
    has_tools: bool = field(init=False, default=False)
    """Whether a tool was called in an earlier turn."""
    _reader: Reader = field(init=False)
    _system: list[Entry] = field(factory=list, init=False)
    _turns: list[tuple[str, list[Entry]]] = field(factory=list, init=False)
    _called: list[str] = field(factory=list, init=False)
    """Ids made for calls of the older `function_call`, which has none."""

    def __attrs_post_init__(self) -> None:
        self._reader = Reader(self.family)

    def read(self, messages: list[Message]) -> None:
        """Read all messages, then put them into Converse's order."""
        for position, message in enumerate(messages):
            self._read(message, position)
        self.marked = self.marked or self._reader.marked
        self._lead()
        self.system = expanded(self._system, self.family)
        self.turns = turns = [self._turn(role, entries) for role, entries in self._turns]
        last = turns[-1]
        if last["role"] == "assistant" and "text" in last["content"][-1]:
            # An answer that is to be continued may not end in blanks.
            last["content"][-1] = {"text": last["content"][-1]["text"].rstrip()}

    # --- one message ---------------------------------------------------------------------------

    def _read(self, message: Message, position: int) -> None:
        role, place = message["role"], f"messages[{position}]"
        entries = self._entries(message, place)
        ttl = mark(message, place)
        if ttl is not None and entries:
            self.marked = True
            entries[-1] = (entries[-1][0], ttl)
        if not self._turns and role in _OPENING:
            self._system += entries
        else:
            # A later system prompt is told by the user: its place in the conversation matters.
            self._add("assistant" if role == "assistant" else "user", entries)

    def _entries(self, message: Message, param: str) -> list[Entry]:
        match message["role"]:
            case "assistant":
                return [(block, None) for block in self._thoughts(message)] + self._said(message, param)
            case "tool":
                return [(self._result(call_id(message["tool_call_id"]), message, param), None)]
            case "function":
                made = self._called.pop(0) if self._called else call_id(str(message["name"]))
                return [(self._result(made, message, param), None)]
        content = message.get("content")
        entries = self._reader.entries(content, f"{param}.content")
        return entries if isinstance(content, str) else list(beside_documents(entries))

    def _said(self, message: Message, param: str) -> list[Entry]:
        entries = self._reader.entries(message.get("content"), f"{param}.content")
        if not entries and isinstance(message.get("refusal"), str):
            entries = self._reader.entries(message["refusal"], f"{param}.refusal")
        for position, call in enumerate(message.get("tool_calls") or ()):
            place = f"{param}.tool_calls[{position}]"
            if call["type"] != "function":
                raise InvalidRequest(
                    f"The provider takes calls of functions only, not of type '{call['type'][:64]}'.",
                    param=f"{place}.type",
                    code="unsupported_value",
                )
            entries.append((self._use(call_id(call["id"]), call["function"], f"{place}.function"), mark(call, place)))
        if message.get("function_call"):
            self._called.append(f"call_{len(self._turns)}")
            entries.append((self._use(self._called[-1], message["function_call"], f"{param}.function_call"), None))
        return entries

    def _use(self, identifier: str, function: dict[str, Any], param: str) -> Block:
        text = function["arguments"]
        try:
            arguments = orjson.loads(text) if text.strip() else {}
        except orjson.JSONDecodeError:
            arguments = None
        if not isinstance(arguments, dict):
            raise InvalidRequest(
                "The arguments of a call must be a JSON object for this provider.",
                param=f"{param}.arguments",
                code="invalid_value",
            )
        self.has_tools = True
        return {"toolUse": {"toolUseId": identifier, "name": self.names.sent(function["name"]), "input": arguments}}

    def _result(self, identifier: str, message: Message, param: str) -> Block:
        entries = self._reader.entries(message.get("content"), f"{param}.content")
        self.has_tools = True
        blocks = [block for block, _ in entries if not block.keys().isdisjoint({"text", "image", "document"})]
        return {"toolResult": {"toolUseId": identifier, "content": blocks or [{"text": PLACEHOLDER}]}}

    def _thoughts(self, message: Message) -> list[Block]:
        """The model's own signed thoughts, as an earlier answer gave them; unsigned ones are no use to it."""
        given = message.get("thinking_blocks")
        if not self.family.replays_reasoning or not isinstance(given, list):
            return []
        return [block for each in given if isinstance(each, dict) and (block := _thought(each)) is not None]

    # --- turns ---------------------------------------------------------------------------------

    def _add(self, role: str, entries: list[Entry]) -> None:
        if not self._turns or self._turns[-1][0] != role:
            self._turns.append((role, []))
        self._turns[-1][1].extend(entries)

    def _lead(self) -> None:
        """Begin as the family wants it: a system prompt that it does not take goes to the user, who may come first."""
        lead: list[Entry] = []
        if self._system and not self.family.system:
            lead, self._system = self._system, []
        if lead or not self._turns or (self.family.user_first and self._turns[0][0] != "user"):
            if self._turns and self._turns[0][0] == "user":
                self._turns[0] = ("user", [*lead, *self._turns[0][1]])
            else:
                self._turns.insert(0, ("user", lead))

    def _turn(self, role: str, entries: list[Entry]) -> Block:
        # Of messages that were merged: thoughts stand in front and calls at the end; results come first, whatever
        # was said between a call and them.
        entries.sort(key=_rank)
        return {"role": role, "content": expanded(entries, self.family) or [{"text": PLACEHOLDER}]}


def _rank(entry: Entry) -> int:
    block = entry[0]
    return 0 if "reasoningContent" in block or "toolResult" in block else 2 if "toolUse" in block else 1


def _thought(given: dict[str, Any]) -> Block | None:
    if given.get("type") == "redacted_thinking" and isinstance(given.get("data"), str):
        return {"reasoningContent": {"redactedContent": given["data"]}}
    text, signature = given.get("thinking"), given.get("signature")
    if not isinstance(signature, str) or not signature:
        return None
    return {
        "reasoningContent": {"reasoningText": {"text": text if isinstance(text, str) else "", "signature": signature}}
    }
