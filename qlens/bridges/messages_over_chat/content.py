"""Blocks of messages as parts of a chat's messages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import orjson

from qlens.bridges import data_urls
from qlens.errors import NotOffered

Block = dict[str, Any]


def refused(what: str, param: str) -> NotOffered:
    """What cannot be said in a chat."""
    return NotOffered(what, param=param, code="unsupported_value")


def content_of(parts: list[Block]) -> str | list[Block]:
    """The content of a message: one plain text as a string, everything else as parts."""
    if len(parts) == 1 and parts[0].keys() == {"type", "text"}:
        return str(parts[0]["text"])
    return parts


def parts_of(content: Any, param: str) -> Iterator[Block]:
    """The parts of a content: a text, or blocks."""
    if isinstance(content, str):
        yield {"type": "text", "text": content}
        return
    for position, block in enumerate(content or ()):
        yield from parts_of_block(block, f"{param}[{position}]")


def parts_of_block(block: Block, param: str) -> Iterator[Block]:
    """The parts of one block: a document may have several."""
    match block["type"]:
        case "text":
            yield marked({"type": "text", "text": block["text"]}, block)
        case "image":
            url = _url_of(block["source"], f"{param}.source", None)
            yield marked({"type": "image_url", "image_url": {"url": url}}, block)
        case "document":
            *parts, last = _document(block, param)
            yield from parts
            yield marked(last, block)
        case "search_result":
            texts = [each["text"] for each in block["content"]]
            text = "\n".join([f"{block['title']} ({block['source']})", *texts])
            yield marked({"type": "text", "text": text}, block)
        case other:
            raise refused(f"takes no block of type '{str(other)[:64]}'.", f"{param}.type")


def marked(part: Block, block: Mapping[str, Any]) -> Block:
    """The part with the block's mark for caching."""
    if block.get("cache_control") is not None:
        part["cache_control"] = block["cache_control"]
    return part


def _url_of(source: Block, param: str, media: str | None) -> str:
    match source["type"]:
        case "base64":
            return data_urls.write(source["media_type"], source["data"])
        case "url" if media is None:
            return str(source["url"])
        case "file":
            raise refused(
                "does not have this file: send the file itself, in base64.",
                f"{param}.file_id",
            )
    raise refused(f"takes no source of type '{source['type'][:64]}' here.", f"{param}.type")


def _document(block: Block, param: str) -> list[Block]:
    if (block.get("citations") or {}).get("enabled"):
        raise refused("cannot cite documents.", f"{param}.citations")
    source, title = block["source"], block.get("title")
    about = [text for text in (title, block.get("context")) if text]
    if source["type"] == "text":
        return [{"type": "text", "text": "\n".join([*about, source["data"]])}]
    if source["type"] == "content":
        inside = list(parts_of(source.get("content"), f"{param}.source.content"))
        return [{"type": "text", "text": text} for text in about] + inside or [{"type": "text", "text": ""}]
    url = _url_of(source, f"{param}.source", "application/pdf")
    name = title or "document.pdf"
    context = [{"type": "text", "text": block["context"]}] if block.get("context") else []
    return [*context, {"type": "file", "file": {"filename": name, "file_data": url}}]


def arguments_of(given: Any) -> str:
    """What a tool is called with, as chat writes it."""
    return orjson.dumps(given).decode()
