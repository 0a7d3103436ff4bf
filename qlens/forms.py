"""Forms (multipart/form-data): read into fields and spooled files, and written again for a provider."""

from __future__ import annotations

import logging
import re
import secrets
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from attrs import define, field, frozen
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from qlens import dialects
from qlens.dialects.fields import missing
from qlens.dialects.plain import Plain
from qlens.errors import InvalidRequest, UnsupportedMedia
from qlens.spool import Spool

if TYPE_CHECKING:
    from qlens.call import Body, Call

MEDIA_TYPE = "multipart/form-data"
MOST_PARTS = 128
MOST_FIELD_BYTES = 1024 * 1024
"""Of all fields that are no files together: they are kept in memory."""
MOST_PREAMBLE_BYTES = 4096
"""Of what may stand in front of the first part."""

_NUMBER = re.compile(r"-?\d{1,18}(\.\d{1,18})?")
_ANY_TYPE = "application/octet-stream"
_TYPE = re.compile(r"[\x21-\x7e]+/[\x20-\x7e]+")
_ESCAPED = {'"': "%22", "\r": "%0D", "\n": "%0A"}

# What is wrong with a client's form is the client's to hear; the library would write it to stderr as well.
logging.getLogger("python_multipart").setLevel(logging.CRITICAL + 1)


@frozen
class File:
    """A file of a form. Reading it starts at its beginning each time, and works until the call ends."""

    name: str
    """The field it was sent in, without the brackets of a list."""
    filename: str
    content_type: str
    size: int
    _spool: Spool = field(repr=False)
    _start: int = field(repr=False)

    def pieces(self) -> AsyncIterator[bytes]:
        """Read it piece by piece."""
        return self._spool.pieces(self._start, self.size)

    async def read(self) -> bytes:
        """Read it as a whole: only what is known to be small."""
        return b"".join([piece async for piece in self.pieces()])


@define(eq=False)
class Form:
    """The files that came with a call."""

    files: tuple[File, ...] = ()
    spool: Spool = field(factory=Spool)

    def close(self) -> None:
        """Remove what was kept."""
        self.spool.close()


# --- reading -----------------------------------------------------------------------------------


@define(eq=False)
class _Part:
    # What is known of a part before its content has come.
    headers: dict[str, bytes] = field(factory=dict)
    name: str = ""
    filename: str | None = None
    content: bytearray = field(factory=bytearray)
    start: int = 0
    size: int = 0


@define(eq=False)
class _Reader:
    """Puts the parser's pieces where they belong."""

    spool: Spool
    parts: list[_Part] = field(factory=list)
    ended: bool = False
    unwritten: list[bytes] = field(factory=list)
    """Content of files that the spool has not taken yet: the parser does not wait."""
    _field: bytes = b""
    _value: bytes = b""
    _field_bytes: int = 0
    _file_bytes: int = 0

    def parser(self, boundary: bytes) -> MultipartParser:
        """A parser that calls this object."""
        return MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin,
                "on_header_field": self._name,
                "on_header_value": self._text,
                "on_header_end": self._header,
                "on_headers_finished": self._known,
                "on_part_data": self._data,
                "on_end": self._end,
            },
        )

    def _begin(self) -> None:
        if len(self.parts) >= MOST_PARTS:
            raise InvalidRequest(f"The form has more than {MOST_PARTS} parts.")
        self.parts.append(_Part())

    def _name(self, data: bytes, start: int, end: int) -> None:
        self._field += data[start:end]

    def _text(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header(self) -> None:
        self.parts[-1].headers[self._field.decode("latin-1").lower()] = self._value
        self._field = self._value = b""

    def _known(self) -> None:
        part = self.parts[-1]
        kind, options = parse_options_header(part.headers.get("content-disposition", b""))
        if kind != b"form-data" or b"name" not in options:
            raise InvalidRequest("A part of the form has no name.")
        part.name = _decoded(options[b"name"])
        part.filename = _decoded(options[b"filename"]) if b"filename" in options else None
        part.start = self._file_bytes

    def _data(self, data: bytes, start: int, end: int) -> None:
        part, size = self.parts[-1], end - start
        if part.filename is not None:
            part.size += size
            self._file_bytes += size
            self.unwritten.append(data[start:end])
            return
        self._field_bytes += size
        if self._field_bytes > MOST_FIELD_BYTES:
            raise InvalidRequest(f"The fields of the form have more than {MOST_FIELD_BYTES} bytes.")
        part.content += data[start:end]

    def _end(self) -> None:
        self.ended = True


@define(eq=False)
class _Preamble:
    """Skips what stands in front of the first part (RFC 2046, section 5.1.1), which the parser does not know."""

    mark: bytes
    """How the line begins that ends it."""
    over: bool = field(default=False, init=False)
    _start: bytes = field(default=b"", init=False)

    def after(self, piece: bytes) -> bytes:
        """The part of a piece that is the form's; raises InvalidRequest where none begins."""
        if self.over:
            return piece
        start = self._start + piece
        place = 0 if start.lstrip(b"\r\n").startswith(self.mark) else start.find(b"\r\n" + self.mark)
        if place < 0 and len(start) <= MOST_PREAMBLE_BYTES:
            self._start = start
            return b""
        if not 0 <= place <= MOST_PREAMBLE_BYTES:
            raise _malformed()
        self.over = True
        return start[place:]


def meters_of(call: Call) -> dict[str, int]:
    """What is counted of the files, as far as they bound it."""
    return _dialect(call).file_meters(call.files)


def _dialect(call: Call) -> Plain:
    found = dialects.named(call.operation.dialect)
    assert isinstance(found, Plain), "only dialects of this kind have forms"
    return found


async def read_form(call: Call) -> Body:
    """Read the body of a call: its fields are returned as JSON would have them, its files are spooled in `call.form`.

    Raises InvalidRequest when there is another file than the dialect knows, or not the one it needs.
    """
    dialect, reader = _dialect(call), _Reader(Spool())
    call.form = Form(spool=reader.spool)  # at once, so that it is closed with the account
    boundary = _boundary(call.headers.get("content-type", ""))
    parser, preamble = reader.parser(boundary), _Preamble(b"--" + boundary)
    try:
        async with aclosing(call.pieces()) as pieces:
            async for piece in pieces:
                parser.write(preamble.after(piece))
                await reader.spool.write(b"".join(reader.unwritten))
                reader.unwritten.clear()
        parser.finalize()
    except FormParserError:
        raise _malformed() from None
    if not reader.ended:
        raise _malformed()
    await reader.spool.end()
    call.form.files = tuple(_file(part, reader.spool) for part in reader.parts if part.filename is not None)
    _check_files(call.form.files, dialect.files)
    return _fields(reader.parts, dialect.form)


def _boundary(content_type: str) -> bytes:
    kind, options = parse_options_header(content_type.encode("utf-8", "surrogateescape"))
    if kind != MEDIA_TYPE.encode():
        raise UnsupportedMedia(f"Unsupported content type. This API accepts '{MEDIA_TYPE}' only.")
    boundary = options.get(b"boundary", b"")
    if not 0 < len(boundary) <= 200:
        raise InvalidRequest("The Content-Type header names no boundary of the form's parts.")
    return boundary


def _malformed() -> InvalidRequest:
    return InvalidRequest("We could not parse the form in the body of your request.")


def _decoded(raw: bytes | bytearray) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise InvalidRequest("The form has a name or a field that is not valid UTF-8.") from None


def _file(part: _Part, spool: Spool) -> File:
    media = part.headers.get("content-type", b"").decode("latin-1")
    return File(
        name=part.name.removesuffix("[]"),
        filename=part.filename or "",
        content_type=media if _TYPE.fullmatch(media) else _ANY_TYPE,
        size=part.size,
        spool=spool,
        start=part.start,
    )


def _fields(parts: list[_Part], types: Mapping[str, type]) -> Body:
    body: Body = {}
    for part in parts:
        if part.filename is not None:
            continue
        name, text = part.name.removesuffix("[]"), _decoded(part.content)
        if name != part.name or types.get(name) is list:
            known = body.get(name)
            body[name] = [*known, text] if isinstance(known, list) else [text]
        else:
            body[name] = _typed(text, types.get(name))
    return body


def _typed(text: str, kind: type | None) -> object:
    """A field as its JSON would be; what does not look like it stays a text, which the dialect then refuses."""
    if kind is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    if kind in {int, float} and _NUMBER.fullmatch(text):
        return float(text) if "." in text else int(text)
    return text


def _check_files(files: tuple[File, ...], allowed: Mapping[str, int]) -> None:
    counts = Counter(file.name for file in files)
    for name, count in counts.items():
        if count > allowed.get(name, 0):
            wanted = f"at most {allowed[name]}" if name in allowed else "none"
            message = f"Invalid '{name[:64]}': expected {wanted} of these files, but got {count} instead."
            raise InvalidRequest(message, param=name[:64], code="invalid_value")
    required = next(iter(allowed), None)
    if required is not None and not counts[required]:
        raise missing((None, required))


# --- writing -----------------------------------------------------------------------------------


@define(eq=False)
class FormBody:
    """A form as a request's body: of known length, and from its beginning each time it is iterated."""

    content_type: str
    _size: int
    _parts: list[tuple[bytes, File | None]] = field(repr=False)
    """What is sent before each file, and the file."""

    @classmethod
    def of(cls, fields: Body, files: tuple[File, ...]) -> FormBody:
        """The form of these fields and files."""
        # A boundary that clients could know would let a file say what the fields are.
        boundary = secrets.token_hex(24)
        parts: list[tuple[bytes, File | None]] = []
        lead = b""
        for name, value in fields.items():
            many = isinstance(value, list)
            for text in value if many else [value]:
                lead += _head(boundary, f"{name}[]" if many else name) + b"\r\n" + _text(text) + b"\r\n"
        counts = Counter(file.name for file in files)
        for file in files:
            lead += _head(boundary, f"{file.name}[]" if counts[file.name] > 1 else file.name, file)
            parts.append((lead + b"\r\n", file))
            lead = b"\r\n"
        parts.append((lead + f"--{boundary}--\r\n".encode(), None))
        size = sum(len(lead) + (file.size if file else 0) for lead, file in parts)
        return cls(f"{MEDIA_TYPE}; boundary={boundary}", size, parts)

    def __len__(self) -> int:
        return self._size

    async def __aiter__(self) -> AsyncGenerator[bytes]:
        for lead, file in self._parts:
            yield lead
            if file is not None:
                async for piece in file.pieces():
                    yield piece


def _head(boundary: str, name: str, file: File | None = None) -> bytes:
    said = f'--{boundary}\r\ncontent-disposition: form-data; name="{_quoted(name)}"'
    if file is None:
        return f"{said}\r\n".encode()
    return f'{said}; filename="{_quoted(file.filename)}"\r\ncontent-type: {file.content_type}\r\n'.encode()


def _quoted(text: str) -> str:
    """A name as browsers write it (https://html.spec.whatwg.org/#multipart-form-data)."""
    return "".join(_ESCAPED.get(char, char) for char in text)


def _text(value: Any) -> bytes:
    if isinstance(value, bool):
        return b"true" if value else b"false"
    return str(value).encode("utf-8", "surrogatepass")
