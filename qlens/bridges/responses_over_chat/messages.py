"""From the items of a response's input to the messages of a chat."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from attrs import define, field

from qlens.bridges.responses_over_chat import thoughts
from qlens.bridges.responses_over_chat.refusals import unsupported
from qlens.dialects import Body, fields

Item = dict[str, Any]
Message = dict[str, Any]
Part = dict[str, Any]


def messages_of(body: Body) -> list[Message]:
    """All that the model is to read; raises InvalidRequest for items that chat does not have."""
    given = body.get("input")
    items = [{"role": "user", "content": given}] if type(given) is str else given or []
    conversation = _Conversation()
    if body.get("instructions"):
        conversation.messages.append({"role": _role_of_instructions(items), "content": body["instructions"]})
    for position, item in enumerate(items):
        conversation.read(item, f"input[{position}]")
    fields.check_length(conversation.messages, (None, "input"), 1, None)
    return conversation.messages


def _role_of_instructions(items: list[Item]) -> str:
    # Every chat server knows `system`; some models refuse it beside `developer`.
    return "developer" if any(item.get("role") == "developer" for item in items) else "system"


@define(eq=False)
class _Conversation:
    """The messages so far. What the model said in one turn stands in several items, and in one message of a chat."""

    messages: list[Message] = field(factory=list)
    _turn: Message | None = None
    """The assistant's message that is being put together."""
    _thoughts: list[Any] = field(factory=list)
    """Of the turn that comes next."""

    def read(self, item: Item, param: str) -> None:
        """Add an item."""
        kind = item.get("type") or ("message" if "role" in item else "item_reference")
        match kind:
            case "message" if item["role"] == "assistant":
                self._say(item, param)
            case "message":
                content = _content(item["content"], f"{param}.content")
                self._add({"role": item["role"], "content": content})
            case "function_call":
                called = {"name": item["name"], "arguments": item["arguments"]}
                self._call({"id": item["call_id"], "type": "function", "function": called})
            case "custom_tool_call":
                called = {"name": item["name"], "input": item["input"]}
                self._call({"id": item["call_id"], "type": "custom", "custom": called})
            case "function_call_output" | "custom_tool_call_output":
                if not item.get("call_id"):
                    raise unsupported(param, "results without the 'call_id' of their call")
                content = _content(item["output"], f"{param}.output")
                self._add({"role": "tool", "tool_call_id": item["call_id"], "content": content})
            case "reasoning":
                self._think(item)
            case "item_reference":
                raise unsupported(param, "items that are kept: send the item itself")
            case _:
                raise unsupported(f"{param}.type", f"items of the type '{kind[:64]}'")

    def _add(self, message: Message) -> None:
        self._turn, self._thoughts = None, []
        self.messages.append(message)

    def _assistant(self) -> Message:
        if self._turn is None:
            self._turn = {"role": "assistant", "content": None}
            self.messages.append(self._turn)
        if self._thoughts:
            self._turn["thinking_blocks"] = [*self._turn.get("thinking_blocks", ()), *self._thoughts]
            self._thoughts = []
        return self._turn

    def _say(self, item: Item, param: str) -> None:
        # Whether it was a commentary or the final answer, its `phase`, has no place in chat and is only a hint.
        said = _content(item["content"], f"{param}.content")
        message = self._assistant()
        before = message["content"]
        message["content"] = said if before is None else [*_parts(before), *_parts(said)]

    def _call(self, call: dict[str, Any]) -> None:
        self._assistant().setdefault("tool_calls", []).append(call)

    def _think(self, item: Item) -> None:
        # What another provider has encrypted, and what is not signed, no provider of chat can read: it is of use to
        # the model that thought it, and nothing is wrong without it.
        self._thoughts += thoughts.opened(item.get("encrypted_content"))


# --- content -----------------------------------------------------------------------------------


def _content(content: str | list[Part], param: str) -> str | list[Part]:
    """A text, or parts; a text that stands alone is said in the form that every server reads."""
    if isinstance(content, str):
        return content
    parts = [_part(part, f"{param}[{position}]") for position, part in enumerate(content)]
    if not parts:
        return ""
    return parts[0]["text"] if len(parts) == 1 and parts[0].keys() == {"type", "text"} else parts


def _parts(content: str | list[Part]) -> list[Part]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)


def _part(part: Part, param: str) -> Part:
    read = _READ.get(part["type"])
    if read is None:
        raise unsupported(f"{param}.type", f"content of the type '{part['type'][:64]}'")
    marked = {"prompt_cache_breakpoint": part["prompt_cache_breakpoint"]} if part.get("prompt_cache_breakpoint") else {}
    return {**read(part, param), **marked}


def _text(part: Part, param: str) -> Part:
    return {"type": "text", "text": part["text"]}


def _refusal(part: Part, param: str) -> Part:
    return {"type": "refusal", "refusal": part["refusal"]}


def _image(part: Part, param: str) -> Part:
    if part.get("file_id"):
        raise unsupported(f"{param}.file_id", "images that are kept: send the image in 'image_url'")
    if not part.get("image_url"):
        raise unsupported(param, "images without an 'image_url'")
    return {"type": "image_url", "image_url": _given(part, {"image_url": "url", "detail": "detail"})}


def _file(part: Part, param: str) -> Part:
    if part.get("file_url"):
        raise unsupported(f"{param}.file_url", "files that it fetches: send the file itself in 'file_data'")
    return {"type": "file", "file": _given(part, {name: name for name in ("file_data", "file_id", "filename")})}


def _audio(part: Part, param: str) -> Part:
    return {"type": "input_audio", "input_audio": part["input_audio"]}


def _given(part: Part, names: Mapping[str, str]) -> dict[str, Any]:
    return {chat: part[name] for name, chat in names.items() if part.get(name) is not None}


_READ: Mapping[str, Callable[[Part, str], Part]] = {
    "input_text": _text,
    "output_text": _text,
    "text": _text,
    "refusal": _refusal,
    "input_image": _image,
    "input_file": _file,
    "input_audio": _audio,
}
