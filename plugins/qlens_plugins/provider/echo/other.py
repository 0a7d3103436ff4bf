"""The echo's answers that are no texts and no vectors: verdicts, orders, pictures, sounds, and what was heard."""

from __future__ import annotations

import re
import struct
import time
import zlib
from base64 import b64encode
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from hashlib import sha256
from typing import Any

import orjson

from qlens import Outgoing, Reply, Usage
from qlens_plugins.provider.echo.tokens import count

Body = Mapping[str, Any]

_SIDE = 8
"""Pixels."""
_IMAGE_TOKENS = 16
_RATE = 8000
_BYTES_PER_SECOND = 2 * _RATE
_SAMPLES_PER_LETTER = 400
_CATEGORIES = ("harassment", "hate", "illicit", "self-harm", "sexual", "violence")
_WORDS = re.compile(r"\w+")
_SILENT_FRAME = b"\xff\xfb\x90\x64" + bytes(413)
"""A frame of MP3 in which nothing is heard."""


async def answer_other(model: str, outgoing: Outgoing) -> Reply:
    """Answer in the dialect of the call, which is one of OTHER."""
    return await OTHER[outgoing.dialect](model, outgoing)


def _whole(outgoing: Outgoing, body: Body, usage: Usage | None) -> Reply:
    return Reply(body=orjson.dumps(body), dialect=outgoing.dialect, usage=usage, complete=True)


async def _moderate(model: str, outgoing: Outgoing) -> Reply:
    """A text is flagged when it names the category."""
    given = outgoing.body["input"]
    inputs = given if isinstance(given, list) and isinstance(given[0], str) else [given]
    verdicts = [_verdict(orjson.dumps(one).decode()) for one in inputs]
    body = {"id": "modr-echo", "model": model, "results": verdicts}
    return _whole(outgoing, body, Usage(input=sum(count(str(one)) for one in inputs), source="provider"))


def _verdict(text: str) -> dict[str, Any]:
    categories = {name: name in text for name in _CATEGORIES}
    return {
        "flagged": any(categories.values()),
        "categories": categories,
        "category_scores": {name: float(named) for name, named in categories.items()},
        "category_applied_input_types": {name: ["text"] if named else [] for name, named in categories.items()},
    }


async def _rerank(model: str, outgoing: Outgoing) -> Reply:
    """A document is as relevant as it has words of the query."""
    body = outgoing.body
    asked = set(_words(body["query"]))
    documents = [one if isinstance(one, str) else str(one.get("text", one)) for one in body["documents"]]
    scores = [len(asked.intersection(_words(text))) / max(1, len(asked)) for text in documents]
    order = sorted(range(len(documents)), key=lambda index: -scores[index])[: body.get("top_n")]
    results = [
        {
            "index": index,
            "relevance_score": scores[index],
            **({"document": {"text": documents[index]}} if body.get("return_documents") else {}),
        }
        for index in order
    ]
    tokens = count(body["query"]) + sum(map(count, documents))
    answer = {"id": "rerank-echo", "model": model, "results": results, "usage": {"total_tokens": tokens}}
    return _whole(outgoing, answer, Usage(input=tokens, source="provider"))


def _words(text: str) -> list[str]:
    return _WORDS.findall(text.lower())


# --- pictures ----------------------------------------------------------------------------------


async def _picture(model: str, outgoing: Outgoing) -> Reply:
    """Squares in the colour of what was asked: the same for the same prompt and files."""
    body, copies = outgoing.body, outgoing.body.get("n") or 1
    seen = [await _digest(file.pieces()) for file in outgoing.files] or list(map(str, body.get("images") or ()))
    prompt = str(body.get("prompt", ""))
    squares = [b64encode(_square(f"{prompt}{seen}{index}")).decode() for index in range(copies)]
    read, painted = count(prompt) + _IMAGE_TOKENS * len(seen), _IMAGE_TOKENS * copies
    told = {
        "input_tokens": read,
        "input_tokens_details": {"text_tokens": count(prompt), "image_tokens": _IMAGE_TOKENS * len(seen)},
        "output_tokens": painted,
        "total_tokens": read + painted,
    }
    if outgoing.stream:
        kind = "image_edit" if outgoing.dialect == "image_edits" else "image_generation"
        events = _picture_events(kind, squares[0], body.get("partial_images") or 0, told)
        return Reply(chunks=_stream(events), dialect=outgoing.dialect)
    as_url = body.get("response_format") == "url"
    data = [{"url": f"data:image/png;base64,{one}"} if as_url else {"b64_json": one} for one in squares]
    return _whole(outgoing, {"created": int(time.time()), "data": data, "usage": told}, None)


def _picture_events(kind: str, square: str, partial: int, usage: Body) -> Iterator[dict[str, Any]]:
    head = {"b64_json": square, "created_at": int(time.time()), "size": f"{_SIDE}x{_SIDE}", "quality": "low"}
    head |= {"background": "opaque", "output_format": "png"}
    for index in range(partial):
        yield {"type": f"{kind}.partial_image", **head, "partial_image_index": index}
    yield {"type": f"{kind}.completed", **head, "usage": usage}


def _square(asked: str) -> bytes:
    colour = sha256(asked.encode()).digest()[:3]
    rows = (b"\0" + colour * _SIDE) * _SIDE
    header = struct.pack(">IIBBBBB", _SIDE, _SIDE, 8, 2, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in parts
    )


# --- sounds ------------------------------------------------------------------------------------


async def _speak(model: str, outgoing: Outgoing) -> Reply:
    """Silence, as long as the text: MP3, bare samples, or else WAV."""
    form = outgoing.body.get("response_format") or "mp3"
    letters = len(outgoing.body["input"])
    samples = bytes(2 * _SAMPLES_PER_LETTER * letters)
    if form == "mp3":
        media, sound = "audio/mpeg", _SILENT_FRAME * (2 * letters)
    elif form == "pcm":
        media, sound = "audio/pcm", samples
    else:
        media, sound = "audio/wav", _wav_head(len(samples)) + samples
    return Reply(chunks=_pieces(sound), dialect=outgoing.dialect, raw=True, headers={"content-type": media})


def _wav_head(size: int) -> bytes:
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, _RATE, _BYTES_PER_SECOND, 2, 16)
    return struct.pack("<4sI4s", b"RIFF", 36 + size, b"WAVE") + form + struct.pack("<4sI", b"data", size)


async def _pieces(sound: bytes, size: int = 4096) -> AsyncIterator[bytes]:
    for start in range(0, len(sound), size):
        yield sound[start : start + size]


async def _listen(model: str, outgoing: Outgoing) -> Reply:
    """What it hears is the file's name, size and fingerprint."""
    (file,) = outgoing.files
    text = f"{file.filename}: {file.size} bytes, {(await _digest(file.pieces()))[:16]}"
    seconds = max(1, -(-file.size // _BYTES_PER_SECOND))
    usage = Usage(meters={"seconds": seconds}, source="provider")
    told = {"type": "duration", "seconds": seconds}
    form = outgoing.body.get("response_format") or "json"
    if outgoing.stream:
        events = [{"type": "transcript.text.delta", "delta": piece} for piece in re.findall(r"\S+\s*", text)]
        done = {"type": "transcript.text.done", "text": text, "usage": told}
        return Reply(chunks=_stream(iter([*events, done])), dialect=outgoing.dialect)
    if form in _WRITTEN:
        media, write = _WRITTEN[form]
        return Reply(
            body=write(text, seconds).encode(),
            dialect=outgoing.dialect,
            usage=usage,
            complete=True,
            raw=True,
            headers={"content-type": f"{media}; charset=utf-8"},
        )
    if form == "json":
        return _whole(outgoing, {"text": text, "usage": told}, usage)
    segment = {"id": 0, "start": 0.0, "end": float(seconds), "text": text}
    verbose = {"task": outgoing.dialect, "language": "english", "duration": seconds, "segments": [segment]}
    return _whole(outgoing, {**verbose, "text": text, "usage": told}, usage)


def _clock(seconds: int, mark: str) -> str:
    return f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}{mark}000"


_WRITTEN: Mapping[str, tuple[str, Callable[[str, int], str]]] = {
    "text": ("text/plain", lambda text, _seconds: f"{text}\n"),
    "srt": ("text/plain", lambda text, seconds: f"1\n{_clock(0, ',')} --> {_clock(seconds, ',')}\n{text}\n"),
    "vtt": ("text/vtt", lambda text, seconds: f"WEBVTT\n\n{_clock(0, '.')} --> {_clock(seconds, '.')}\n{text}\n"),
}


async def _digest(pieces: AsyncIterator[bytes]) -> str:
    digest = sha256()
    async for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


async def _stream(events: Iterator[dict[str, Any]]) -> AsyncIterator[bytes]:
    for event in events:
        yield b"event: %b\ndata: %b\n\n" % (event["type"].encode(), orjson.dumps(event))


async def _compact(model: str, outgoing: Outgoing) -> Reply:
    """What the user has said is all that an echo needs to go on."""
    given = outgoing.body.get("input") or ""
    items = [{"role": "user", "content": given}] if isinstance(given, str) else given
    said = [{"type": "message", **item} for item in items if item.get("role") == "user"]
    usage = Usage(input=count(orjson.dumps(items).decode()), source="provider")
    told = {"input_tokens": usage.input, "output_tokens": 0, "total_tokens": usage.input}
    details = {"input_tokens_details": {"cached_tokens": 0}, "output_tokens_details": {"reasoning_tokens": 0}}
    head = {"id": "resp_echo", "object": "response.compaction", "created_at": int(time.time())}
    return _whole(outgoing, {**head, "output": said, "usage": {**told, **details}}, usage)


OTHER: Mapping[str, Callable[[str, Outgoing], Awaitable[Reply]]] = {
    "compaction": _compact,
    "image_edits": _picture,
    "image_variations": _picture,
    "images": _picture,
    "moderations": _moderate,
    "rerank": _rerank,
    "speech": _speak,
    "transcriptions": _listen,
    "translations": _listen,
}
"""How each of these dialects is answered."""
