"""Decodes AWS's binary event streams (application/vnd.amazon.eventstream), however the bytes arrive."""

from __future__ import annotations

from struct import Struct
from struct import error as StructError
from zlib import crc32

from attrs import define, field, frozen

from qlens import UpstreamInvalid

MEDIA_TYPE = "application/vnd.amazon.eventstream"

_MAX_HEADERS = 128 * 1024
_MAX_PAYLOAD = 24 * 1024 * 1024
_PRELUDE = Struct(">III")
_CRC = Struct(">I")
_SHORT = Struct(">H")
_AROUND = _PRELUDE.size + _CRC.size
# The bytes of a header's value by its type; types 6 and 7 say their length themselves.
_FIXED = {0: 0, 1: 0, 2: 1, 3: 2, 4: 4, 5: 8, 8: 8, 9: 16}
_TEXT = 7
# A service sends the same few header blocks again and again.
_KNOWN_HEADERS = 64


@frozen
class Frame:
    """One message of a stream."""

    headers: dict[str, str]
    """Those of its headers that are text."""
    payload: bytes = field(repr=False)


@define(eq=False)
class FrameReader:
    """Cuts a byte stream into frames, and checks their lengths and checksums."""

    _pending: bytearray = field(init=False, factory=bytearray, repr=False)
    _headers: dict[bytes, dict[str, str]] = field(init=False, factory=dict, repr=False)

    @property
    def is_between(self) -> bool:
        """Whether no frame has begun that is not whole: a stream may end only here."""
        return not self._pending

    def feed(self, data: bytes) -> list[Frame]:
        """Take bytes; return the frames that are whole now; raises UpstreamInvalid for what is no frame."""
        pending = self._pending
        pending += data
        frames: list[Frame] = []
        start = 0
        while len(pending) - start >= _PRELUDE.size:
            size, headers_size, checksum = _PRELUDE.unpack_from(pending, start)
            if checksum != crc32(pending[start : start + 8]):
                raise _broken("checksum of its beginning")
            if headers_size > _MAX_HEADERS or not 0 <= size - headers_size - _AROUND <= _MAX_PAYLOAD:
                raise _broken("length")
            end = start + size
            if len(pending) < end:
                break
            frames.append(self._frame(bytes(pending[start:end]), headers_size))
            start = end
        del pending[:start]
        return frames

    def _frame(self, frame: bytes, headers_size: int) -> Frame:
        if _CRC.unpack_from(frame, len(frame) - _CRC.size)[0] != crc32(frame[: -_CRC.size]):
            raise _broken("checksum")
        end = _PRELUDE.size + headers_size
        block = frame[_PRELUDE.size : end]
        headers = self._headers.get(block)
        if headers is None:
            headers = _text_headers(block)
            if len(self._headers) < _KNOWN_HEADERS:
                self._headers[block] = headers
        return Frame(headers, frame[end : -_CRC.size])


def _text_headers(block: bytes) -> dict[str, str]:
    headers: dict[str, str] = {}
    position = 0
    try:
        while position < len(block):
            name_end = position + 1 + block[position]
            name, kind = block[position + 1 : name_end].decode(), block[name_end]
            position = name_end + 1
            length = _FIXED.get(kind)
            if length is None:
                if kind not in {6, _TEXT}:
                    raise _broken("type of a header")
                length = _SHORT.unpack_from(block, position)[0]
                position += _SHORT.size
            value = block[position : position + length]
            if len(value) != length:
                raise _broken("length of a header")
            if kind == _TEXT:
                headers[name] = value.decode()
            position += length
    except (IndexError, StructError, UnicodeDecodeError) as error:
        raise _broken("header") from error
    return headers


def _broken(what: str) -> UpstreamInvalid:
    return UpstreamInvalid(f"The provider's event stream is broken: wrong {what} of a frame.")
