"""Parts of a chat's messages as blocks: texts, images, documents."""

from __future__ import annotations

from typing import Any

from qlens.bridges import data_urls
from qlens.bridges.chat_over_messages.caching import mark, marked
from qlens.errors import InvalidRequest, NotOffered

Block = dict[str, Any]

PLACEHOLDER = "."
"""What stands where a text is wanted and the client has none: blank ones are refused."""

_MAGIC = (*(("iVBORw0KGgo", "image/png"), ("/9j/", "image/jpeg"), ("R0lGOD", "image/gif"), ("UklGR", "image/webp")),)
_IMAGES = {"image/png", "image/jpeg", "image/gif", "image/webp"}


def blocks_of(content: Any, param: str) -> list[Block]:
    """The blocks of a content: a text, or parts; blank texts are left out."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}] if content.strip() else []
    found: list[Block] = []
    for position, part in enumerate(content or ()):
        block = _block(part, f"{param}[{position}]")
        if block is not None:
            found.append(marked(block, part))
        elif found and (ttl := mark(part)) is not None:
            found[-1]["cache_control"] = ttl  # the mark of a blank text belongs to what is in front of it
    return found


def _block(part: Block, param: str) -> Block | None:
    match part["type"]:
        case "text" | "refusal":
            text = part[part["type"]]
            return {"type": "text", "text": text} if text.strip() else None
        case "image_url":
            return {"type": "image", "source": _image(part["image_url"].get("url"), f"{param}.image_url.url")}
        case "file":
            return _document(part["file"], f"{param}.file")
        case other:
            raise NotOffered(
                f"takes no content of type '{str(other)[:64]}'.",
                param=f"{param}.type",
                code="unsupported_value",
            )


def _image(url: Any, param: str) -> Block:
    if not isinstance(url, str) or not url:
        raise InvalidRequest("An image needs a url.", param=param, code="invalid_image_url")
    if url.partition(":")[0].lower() in {"http", "https"}:
        return {"type": "url", "url": url}
    media, encoded = data_urls.read(url, param)
    # What the bytes are counts, not what they are called.
    media = next((kind for magic, kind in _MAGIC if encoded.startswith(magic)), media)
    if media not in _IMAGES:
        raise NotOffered(
            "takes images of these types only: gif, jpeg, png, webp.",
            param=param,
            code="unsupported_value",
        )
    return {"type": "base64", "media_type": media, "data": encoded}


def _document(file: Block, param: str) -> Block:
    data = file.get("file_data")
    if not data:
        raise NotOffered(
            "does not have this file: send the file itself, as a data URL in 'file_data'.",
            param=f"{param}.file_id" if file.get("file_id") else f"{param}.file_data",
            code="unsupported_value",
        )
    media, encoded = data_urls.read(data, f"{param}.file_data")
    title = {"title": file["filename"]} if file.get("filename") else {}
    if media == "application/pdf":
        source = {"type": "base64", "media_type": media, "data": encoded}
    elif media.startswith("text/"):
        text = data_urls.decoded(encoded, f"{param}.file_data")
        source = {"type": "text", "media_type": "text/plain", "data": text}
    else:
        raise NotOffered(
            "takes documents in PDF and plain text only.",
            param=f"{param}.file_data",
            code="unsupported_value",
        )
    return {"type": "document", "source": source, **title}
