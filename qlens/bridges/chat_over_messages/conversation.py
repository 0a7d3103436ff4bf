"""Messages of a chat as turns of user and assistant, with the system prompts apart."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import orjson
from attrs import define, field

from qlens.bridges.chat_over_messages.caching import mark, marked
from qlens.bridges.chat_over_messages.content import PLACEHOLDER, blocks_of
from qlens.bridges.chat_over_messages.tools import Names, call_id
from qlens.errors import InvalidRequest, NotOffered

Block = dict[str, Any]


@define(eq=False)
class Conversation:
    """A chat's messages, read one after another."""

    names: Names
    system: list[Block] = field(factory=list, init=False)
    turns: list[Block] = field(factory=list, init=False)
    """Of the roles user and assistant in turn, each with content."""
    _called: list[str] = field(factory=list, init=False)
    """Ids made for calls of the older `function_call`, which has none."""

    def read(self, messages: list[Block]) -> None:
        """Read all messages, then see to it that they begin and end as messages must."""
        for position, message in enumerate(messages):
            self._read(message, f"messages[{position}]")
        if not self.turns or self.turns[0]["role"] != "user":
            self.turns.insert(0, {"role": "user", "content": [{"type": "text", "text": PLACEHOLDER}]})
        for turn in self.turns:
            # Results come first, whatever was said between a call and them; the rest stays in its order.
            turn["content"].sort(key=lambda block: turn["role"] == "user" and block["type"] != "tool_result")
            turn["content"] = turn["content"] or [{"type": "text", "text": PLACEHOLDER}]
        last = self.turns[-1]
        if last["role"] == "assistant" and last["content"][-1]["type"] == "text":
            # An answer that is to be continued may not end in blanks.
            last["content"][-1]["text"] = last["content"][-1]["text"].rstrip()

    def _read(self, message: Block, param: str) -> None:
        blocks = list(self._blocks(message, param))
        if (found := mark(message)) is not None and blocks and blocks[-1]["type"] not in _UNMARKED:
            blocks[-1]["cache_control"] = found
        role = message["role"]
        if role in {"system", "developer"} and not self.turns:
            self.system += blocks
            return
        # A later system prompt is told by the user: its place in the conversation matters.
        role = "assistant" if role == "assistant" else "user"
        if not self.turns or self.turns[-1]["role"] != role:
            self.turns.append({"role": role, "content": []})
        self.turns[-1]["content"] += blocks

    def _blocks(self, message: Block, param: str) -> Iterator[Block]:
        match message["role"]:
            case "assistant":
                yield from _thoughts(message)
                yield from self._said(message, param)
            case "tool":
                yield self._result(call_id(message["tool_call_id"]), message, param)
            case "function":
                made = self._called.pop(0) if self._called else call_id(str(message["name"]))
                yield self._result(made, message, param)
            case "system" | "developer":
                for block in blocks_of(message.get("content"), f"{param}.content"):
                    if block["type"] != "text":
                        raise _unsupported("takes a system prompt of text only.", f"{param}.content")
                    yield block
            case _:
                yield from blocks_of(message.get("content"), f"{param}.content")

    def _said(self, message: Block, param: str) -> Iterator[Block]:
        said = blocks_of(message.get("content"), f"{param}.content")
        if not said:
            said = blocks_of(message.get("refusal"), f"{param}.refusal")
        for block in said:
            if block["type"] != "text":
                raise _unsupported("takes text only from the assistant.", f"{param}.content")
            yield block
        if message.get("audio"):
            raise _unsupported("takes no spoken answers.", f"{param}.audio")
        for position, call in enumerate(message.get("tool_calls") or ()):
            where = f"{param}.tool_calls[{position}]"
            if call.get("type", "function") != "function":
                raise _unsupported("takes calls of functions only.", f"{where}.type")
            yield marked(self._use(call_id(call["id"]), call["function"], f"{where}.function"), call)
        if message.get("function_call"):
            self._called.append(f"call_{len(self.turns)}")
            yield self._use(self._called[-1], message["function_call"], f"{param}.function_call")

    def _use(self, identifier: str, function: Block, param: str) -> Block:
        text = function["arguments"]
        try:
            given = orjson.loads(text) if text.strip() else {}
        except orjson.JSONDecodeError:
            given = None
        if not isinstance(given, dict):
            raise InvalidRequest(
                "The arguments of a call must be a JSON object for this provider.",
                param=f"{param}.arguments",
                code="invalid_value",
            )
        return {"type": "tool_use", "id": identifier, "name": self.names.sent(function["name"]), "input": given}

    def _result(self, identifier: str, message: Block, param: str) -> Block:
        content = message.get("content")
        found = content if isinstance(content, str) else blocks_of(content, f"{param}.content")
        result: Block = {"type": "tool_result", "tool_use_id": identifier, "content": found}
        # Not OpenAI's: its clients write into the text that a tool failed.
        if message.get("is_error") is True:
            result["is_error"] = True
        return result


_UNMARKED = {"thinking", "redacted_thinking"}


def _thoughts(message: Block) -> Iterator[Block]:
    """The model's own signed thoughts, as an earlier answer gave them; unsigned ones are no use to it."""
    given = message.get("thinking_blocks")
    for each in given if isinstance(given, list) else ():
        if not isinstance(each, dict):
            continue
        if each.get("type") == "redacted_thinking" and isinstance(each.get("data"), str):
            yield {"type": "redacted_thinking", "data": each["data"]}
        elif isinstance(each.get("signature"), str) and each["signature"]:
            text = each.get("thinking")
            thought = text if isinstance(text, str) else ""
            yield {"type": "thinking", "thinking": thought, "signature": each["signature"]}


def _unsupported(what: str, param: str) -> NotOffered:
    return NotOffered(what, param=param, code="unsupported_value")
