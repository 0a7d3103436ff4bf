"""Parts of messages as blocks of Converse: texts, images, documents."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from attrs import define, field

from qlens import InvalidRequest
from qlens_plugins.provider.bedrock.caching import Block, Entry, mark
from qlens_plugins.provider.bedrock.families import Family

PLACEHOLDER = "."
"""What stands where Bedrock wants a text and the client has none: blank ones are refused."""

_DATA_URL = re.compile(r"data:(?P<media>[^;,]*)(?P<options>(;[^;,]*)*),", re.IGNORECASE)
_BASE64 = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
_BLANKS = str.maketrans("", "", " \t\r\n")
_MAGIC = (("iVBORw0KGgo", "png"), ("/9j/", "jpeg"), ("R0lGOD", "gif"))
_IMAGES = {"image/png": "png", "image/jpeg": "jpeg", "image/jpg": "jpeg", "image/gif": "gif", "image/webp": "webp"}
_DOCUMENTS = {
    "application/pdf": "pdf",
    "text/csv": "csv",
    "application/msword": "doc",
    "application/vnd.openxmlformats-officedocument.wordprocessingml.document": "docx",
    "application/vnd.ms-excel": "xls",
    "application/vnd.openxmlformats-officedocument.spreadsheetml.sheet": "xlsx",
    "text/html": "html",
    "text/plain": "txt",
    "text/markdown": "md",
}
_SUFFIXES = {*_DOCUMENTS.values()}
_NOT_IN_NAME = re.compile(r"[^A-Za-z0-9 \-()\[\]]+")


@define(eq=False)
class Reader:
    """Reads the parts of one request's messages; documents get names that are unique in it."""

    family: Family
    marked: bool = field(init=False, default=False)
    """Whether a part asked for a cache point."""
    _documents: set[str] = field(init=False, factory=set)

    def entries(self, content: Any, param: str) -> list[Entry]:
        """The blocks of a content: a text, or parts; blank texts are left out."""
        if isinstance(content, str):
            return [({"text": content}, None)] if content.strip() else []
        found: list[Entry] = []
        for position, part in enumerate(content or ()):
            place = f"{param}[{position}]"
            ttl = mark(part, place)
            self.marked = self.marked or ttl is not None
            block = self._block(part, place)
            if block is not None:
                found.append((block, ttl))
            elif ttl is not None and found:
                found[-1] = (found[-1][0], ttl)  # the mark of a blank text belongs to what is in front of it
        return found

    def _block(self, part: Block, param: str) -> Block | None:
        match part["type"]:
            case "text" | "refusal":
                text = part[part["type"]]
                return {"text": text} if text.strip() else None
            case "image_url":
                return _image(part["image_url"].get("url"), f"{param}.image_url.url")
            case "file":
                return self._document(part["file"], f"{param}.file")
            case "input_audio":
                # Converse has blocks of audio, and Bedrock no model that takes them there.
                raise InvalidRequest(
                    "Bedrock takes no audio in a chat: send a transcript of it as text.",
                    param=f"{param}.type",
                    code="unsupported_value",
                )
            case other:
                raise InvalidRequest(
                    f"The model behind this name takes no content of type '{str(other)[:64]}'.",
                    param=f"{param}.type",
                    code="unsupported_value",
                )

    def _document(self, file: Block, param: str) -> Block:
        data = file.get("file_data")
        if not data:
            raise InvalidRequest(
                "The provider keeps no files: send the file itself, as a data URL in 'file_data'.",
                param=f"{param}.file_data",
                code="unsupported_value",
            )
        media, encoded = _data_url(data, f"{param}.file_data")
        name, _, suffix = str(file.get("filename") or "").rpartition(".")
        kind = _DOCUMENTS.get(media) or (suffix.lower() if suffix.lower() in _SUFFIXES else None)
        if kind is None:
            raise InvalidRequest(
                f"The provider takes documents of these types only: {', '.join(sorted(_SUFFIXES))}.",
                param=f"{param}.file_data",
                code="unsupported_value",
            )
        return {"document": {"format": kind, "name": self._named(name or suffix), "source": {"bytes": encoded}}}

    def _named(self, given: str) -> str:
        """A name as Bedrock takes it: letters, digits, single blanks, hyphens and brackets, unique in the request."""
        name = base = " ".join(_NOT_IN_NAME.sub(" ", given).split())[:190].strip() or "document"
        number = 1
        while name in self._documents:
            number += 1
            name = f"{base} {number}"
        self._documents.add(name)
        return name


def beside_documents(entries: list[Entry]) -> Iterator[Entry]:
    """The entries, with a text where there are documents and none: Bedrock wants one beside them."""
    yield from entries
    if any("document" in block for block, _ in entries) and not any("text" in block for block, _ in entries):
        yield {"text": PLACEHOLDER}, None


def _image(url: Any, param: str) -> Block:
    if not isinstance(url, str) or not url:
        raise InvalidRequest("An image needs a url.", param=param, code="invalid_image_url")
    if url.partition(":")[0].lower() in {"http", "https"}:
        raise InvalidRequest(
            "This image is not fetched: send the image itself, as a data URL (data:image/png;base64,...).",
            param=param,
            code="unsupported_value",
        )
    media, encoded = _data_url(url, param)
    # What the bytes are counts, not what they are called.
    kind = next((kind for magic, kind in _MAGIC if encoded.startswith(magic)), None)
    if kind is None and encoded.startswith("UklGR"):
        kind = "webp"
    kind = kind or _IMAGES.get(media)
    if kind is None:
        raise InvalidRequest(
            "The provider takes images of these types only: gif, jpeg, png, webp.",
            param=param,
            code="unsupported_value",
        )
    return {"image": {"format": kind, "source": {"bytes": encoded}}}


def _data_url(url: str, param: str) -> tuple[str, str]:
    """The media type and the base64 text of a data URL; a bare base64 text has no media type."""
    found = _DATA_URL.match(url)
    if found is None:
        return "", _checked(url, param)
    if ";base64" not in found["options"].lower():
        raise InvalidRequest("A data URL must be in base64: data:TYPE;base64,...", param=param, code="invalid_value")
    return found["media"].strip().lower(), _checked(url[found.end() :], param)


def _checked(encoded: str, param: str) -> str:
    """A base64 text as it is, once it is known to be one: Bedrock takes it encoded exactly once."""
    text = encoded if encoded.isalnum() else encoded.translate(_BLANKS)
    bare = text.rstrip("=")
    padding = len(text) - len(bare)
    whole = len(text) % 4 == 0 and padding <= 2 and bool(bare)
    if not whole or not text.isascii() or bare.encode().translate(None, _BASE64):
        raise InvalidRequest("This is not valid base64.", param=param, code="invalid_base64")
    return text
