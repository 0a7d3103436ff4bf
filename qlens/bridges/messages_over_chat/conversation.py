"""Messages with their blocks as messages of a chat."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from qlens.bridges.messages_over_chat.content import arguments_of, content_of, marked, parts_of, parts_of_block, refused

Block = dict[str, Any]


def system_of(system: Any) -> Iterator[Block]:
    """The system prompt, as a chat's first message."""
    parts = list(parts_of(system, "system"))
    if any(part["text"] for part in parts):
        yield {"role": "system", "content": content_of(parts)}


def told(message: Block, param: str) -> Iterator[Block]:
    """What one message becomes: a user's may be results of tools and what is said after them."""
    match message["role"]:
        case "assistant":
            yield _assistant(message["content"], f"{param}.content")
        case "user":
            yield from _user(message["content"], f"{param}.content")
        case role:
            yield {"role": role, "content": content_of(list(parts_of(message["content"], f"{param}.content")))}


# --- the user ----------------------------------------------------------------------------------


def _user(content: Any, param: str) -> Iterator[Block]:
    if isinstance(content, str):
        yield {"role": "user", "content": content}
        return
    results: list[Block] = []
    said: list[Block] = []
    for position, block in enumerate(content):
        where = f"{param}[{position}]"
        if block["type"] != "tool_result":
            said += parts_of_block(block, where)
            continue
        result, shown = _result(block, where)
        results.append(result)
        said += shown
    yield from results
    if said or not results:
        yield {"role": "user", "content": content_of(said) if said else ""}


def _result(block: Block, param: str) -> tuple[Block, list[Block]]:
    """A tool's result, which is text in a chat, and what else it shows, which the user tells."""
    parts = list(parts_of(block.get("content"), f"{param}.content"))
    texts = [part for part in parts if part["type"] == "text"]
    shown = [part for part in parts if part["type"] != "text"]
    if block.get("is_error"):
        # A chat knows results only: that a tool failed stands in the text.
        texts.insert(0, {"type": "text", "text": "The tool failed."})
    if shown:
        told = f"The result of the call {block['tool_use_id']} goes on in the user's message."
        texts.append({"type": "text", "text": told})
        shown.insert(0, {"type": "text", "text": f"The result of the call {block['tool_use_id']}:"})
    content = content_of(texts) if texts else ""
    return marked({"role": "tool", "tool_call_id": block["tool_use_id"], "content": content}, block), shown


# --- the assistant -----------------------------------------------------------------------------


def _assistant(content: Any, param: str) -> Block:
    if isinstance(content, str):
        return {"role": "assistant", "content": content}
    said: list[Block] = []
    calls: list[Block] = []
    thoughts: list[Block] = []
    for position, block in enumerate(content):
        match block["type"]:
            case "text":
                said.append(marked({"type": "text", "text": block["text"]}, block))
            case "tool_use":
                calls.append(_call(block))
            case "redacted_thinking":
                thoughts.append({"type": "redacted_thinking", "data": block["data"]})
            case "thinking":
                # An unsigned one was made from an answer of a model that takes none back.
                if block["signature"]:
                    thoughts.append({name: block[name] for name in ("type", "thinking", "signature")})
            case other:
                kind = str(other)[:64]
                raise refused(f"takes no block of type '{kind}' here.", f"{param}[{position}].type")
    message: Block = {"role": "assistant", "content": content_of(said) if said else None}
    if calls:
        message["tool_calls"] = calls
    elif not said:
        message["content"] = ""
    if thoughts:
        message["thinking_blocks"] = thoughts
    return message


def _call(block: Block) -> Block:
    function = {"name": block["name"], "arguments": arguments_of(block["input"])}
    return marked({"id": block["id"], "type": "function", "function": function}, block)
