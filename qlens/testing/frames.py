"""Frames of AWS's event streams (application/vnd.amazon.eventstream), as a service writes them."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any
from zlib import crc32

import orjson

MEDIA_TYPE = "application/vnd.amazon.eventstream"

_TEXT = 7


def frame(headers: Mapping[str, str], payload: bytes) -> bytes:
    """One frame with headers of text, with both of its checksums."""
    block = b"".join(_header(name, value) for name, value in headers.items())
    prelude = struct.pack(">II", 16 + len(block) + len(payload), len(block))
    body = prelude + struct.pack(">I", crc32(prelude)) + block + payload
    return body + struct.pack(">I", crc32(body))


def _header(name: str, value: str) -> bytes:
    return (
        struct.pack(">B", len(name)) + name.encode() + struct.pack(">BH", _TEXT, len(value.encode())) + value.encode()
    )


def event(name: str, payload: Any) -> bytes:
    """An event of a stream."""
    headers = {":event-type": name, ":content-type": "application/json", ":message-type": "event"}
    return frame(headers, orjson.dumps(payload))


def exception(name: str, message: str, **fields: Any) -> bytes:
    """An exception that ends a stream: throttlingException, say."""
    headers = {":exception-type": name, ":content-type": "application/json", ":message-type": "exception"}
    return frame(headers, orjson.dumps({"message": message, **fields}))


def error(code: str, message: str) -> bytes:
    """An error that the service has no model of."""
    return frame({":message-type": "error", ":error-code": code, ":error-message": message}, b"")
