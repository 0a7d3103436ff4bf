"""From the messages of a chat to the items of a response's input."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from attrs import define, field

from qlens.errors import NotOffered

Item = dict[str, Any]
Message = dict[str, Any]
Part = dict[str, Any]


def items_of(messages: list[Message]) -> list[Item]:
    """All that the model is to read; raises NotOffered for what Responses do not have."""
    conversation = _Conversation()
    return [
        item
        for position, message in enumerate(messages)
        for item in conversation.read(message, f"messages[{position}]")
    ]


@define(eq=False)
class _Conversation:
    """What of earlier messages is needed to read later ones."""

    _custom: set[str] = field(factory=set)
    """The ids of calls whose input is a free text."""
    _called: list[str] = field(factory=list)
    """The ids made up for calls of functions, which have none in the older form, and are not answered yet."""
    _made: int = 0

    def read(self, message: Message, param: str) -> Iterator[Item]:
        """The items of one message. A speaker's `name` has no place in them and is only a hint."""
        match message["role"]:
            case "assistant":
                yield from self._said(message, param)
            case "tool":
                yield self._result(message["tool_call_id"], message.get("content"), f"{param}.content")
            case "function":
                identifier = self._called.pop(0) if self._called else self._new_id()
                yield self._result(identifier, message.get("content"), f"{param}.content")
            case role:
                content = _content(message.get("content"), f"{param}.content", "input_text")
                yield {"type": "message", "role": role, "content": content}

    def _said(self, message: Message, param: str) -> Iterator[Item]:
        if message.get("audio"):
            raise _unsupported("takes no spoken answers.", f"{param}.audio")
        said = _parts(message.get("content"), f"{param}.content", "output_text")
        if message.get("refusal"):
            said.append({"type": "refusal", "refusal": message["refusal"]})
        if said:
            yield {"type": "message", "role": "assistant", "content": said}
        for call in message.get("tool_calls") or ():
            yield self._call(call)
        if message.get("function_call"):
            self._called.append(self._new_id())
            yield {"type": "function_call", "call_id": self._called[-1], **message["function_call"]}

    def _call(self, call: dict[str, Any]) -> Item:
        if call.get("type") == "custom":
            self._custom.add(call["id"])
            called = call["custom"]
            return {
                "type": "custom_tool_call",
                "call_id": call["id"],
                "name": called["name"],
                "input": called["input"],
            }
        called = call["function"]
        return {
            "type": "function_call",
            "call_id": call["id"],
            "name": called["name"],
            "arguments": called["arguments"],
        }

    def _result(self, identifier: str, content: Any, param: str) -> Item:
        kind = "custom_tool_call_output" if identifier in self._custom else "function_call_output"
        return {"type": kind, "call_id": identifier, "output": _content(content, param, "input_text")}

    def _new_id(self) -> str:
        self._made += 1
        return f"call_{self._made}"


# --- content -----------------------------------------------------------------------------------


def _content(content: Any, param: str, text: str) -> str | list[Part]:
    """A text as it is, or parts."""
    return content or "" if content is None or isinstance(content, str) else _parts(content, param, text)


def _parts(content: Any, param: str, text: str) -> list[Part]:
    """The parts of a content; `text` is what Responses call a text there."""
    if not content:
        return []
    if isinstance(content, str):
        return [{"type": text, "text": content}]
    return [_part(part, f"{param}[{position}]", text) for position, part in enumerate(content)]


def _part(part: Part, param: str, text: str) -> Part:
    marked = {"prompt_cache_breakpoint": part["prompt_cache_breakpoint"]} if part.get("prompt_cache_breakpoint") else {}
    kind = part["type"]
    if kind == "text":
        return {"type": text, "text": part["text"], **marked}
    if kind == "refusal" and text == "output_text":
        return {"type": "refusal", "refusal": part["refusal"]}
    read = _READ.get(kind)
    if read is None or text == "output_text":
        raise _unsupported(f"takes no content of the type '{str(kind)[:64]}' there.", f"{param}.type")
    return {**read(part), **marked}


def _image(part: Part) -> Part:
    image = part["image_url"]
    return {"type": "input_image", "image_url": image["url"], "detail": image.get("detail") or "auto"}


def _file(part: Part) -> Part:
    names = ("file_data", "file_id", "filename")
    return {"type": "input_file", **{name: part["file"][name] for name in names if part["file"].get(name) is not None}}


def _audio(part: Part) -> Part:
    return {"type": "input_audio", "input_audio": part["input_audio"]}


_READ: Mapping[str, Callable[[Part], Part]] = {"image_url": _image, "file": _file, "input_audio": _audio}


def _unsupported(what: str, param: str) -> NotOffered:
    return NotOffered(what, param=param, code="unsupported_value")
