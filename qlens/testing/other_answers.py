"""What a provider says to operations beside chat: verdicts, orders, pictures, sounds, transcripts."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable, Mapping
from email.parser import BytesParser
from email.policy import HTTP
from typing import Any, cast

from attrs import field, frozen

PICTURE = b"\x89PNG a picture"
SPEECH = b"ID3 a recording " * 512
TRANSCRIPT = "Hello from upstream."
IMAGE_USAGE = {"input_tokens": 5, "output_tokens": 272, "total_tokens": 277}
SECONDS = {"type": "duration", "seconds": 3}


@frozen
class Part:
    """A part of a form that arrived."""

    name: str
    filename: str | None
    content_type: str
    content: bytes = field(repr=False)

    @property
    def text(self) -> str:
        """The content of a field."""
        return self.content.decode()


def parts_of(content_type: str, content: bytes) -> list[Part]:
    """The parts of a form, as a parser that is not the gateway's reads them."""
    message = BytesParser(policy=HTTP).parsebytes(b"content-type: %b\r\n\r\n%b" % (content_type.encode(), content))
    return [
        Part(
            name=str(part.get_param("name", header="content-disposition")),
            filename=part.get_filename(),
            content_type=part.get_content_type(),
            content=bytes(cast(bytes, part.get_payload(decode=True))),
        )
        for part in message.iter_parts()
    ]


@frozen
class Told:
    """An answer: JSON, or bytes with their content-type, or the events of a stream."""

    body: bytes | dict[str, Any] | None = None
    content_type: str | None = None
    events: list[dict[str, Any]] | None = None


def told(path: str, fields: Callable[[], Mapping[str, Any]]) -> Told | None:
    """The answer at a path to a request with these fields; None for a path that is none of these."""
    return next((answer(fields()) for end, answer in _ANSWERS.items() if path.endswith(end)), None)


def _moderation(fields: Mapping[str, Any]) -> Told:
    given = fields["input"]
    count = len(given) if isinstance(given, list) and isinstance(given[0], str) else 1
    verdict = {"flagged": False, "categories": {"hate": False}, "category_scores": {"hate": 0.01}}
    verdict |= {"category_applied_input_types": {"hate": ["text"]}}
    return Told({"id": "modr-upstream", "model": "upstream", "results": [verdict] * count})


def _rerank(fields: Mapping[str, Any]) -> Told:
    """In the order given, as Cohere writes it."""
    count = min(len(fields["documents"]), fields.get("top_n") or len(fields["documents"]))
    results = [{"index": index, "relevance_score": 1 / (1 + index)} for index in range(count)]
    return Told({"id": "rerank-upstream", "results": results, "meta": {"billed_units": {"search_units": 1}}})


def _image(kind: str) -> Callable[[Mapping[str, Any]], Told]:
    def answer(fields: Mapping[str, Any]) -> Told:
        picture = b64encode(PICTURE).decode()
        if str(fields.get("stream")).lower() == "true":
            head = {"b64_json": picture, "created_at": 1700000000, "size": "1024x1024", "quality": "low"}
            head |= {"background": "opaque", "output_format": "png"}
            partial = {"type": f"{kind}.partial_image", **head, "partial_image_index": 0}
            return Told(events=[partial, {"type": f"{kind}.completed", **head, "usage": IMAGE_USAGE}])
        data = [{"b64_json": picture}] * int(fields.get("n") or 1)
        return Told({"created": 1700000000, "data": data, "usage": IMAGE_USAGE})

    return answer


def _speech(fields: Mapping[str, Any]) -> Told:
    return Told(SPEECH, "audio/mpeg")


def _transcript(fields: Mapping[str, Any]) -> Told:
    form = fields.get("response_format", "json")
    if str(fields.get("stream")).lower() == "true":
        deltas = [{"type": "transcript.text.delta", "delta": word} for word in ("Hello ", "from ", "upstream.")]
        usage = {"type": "tokens", "input_tokens": 14, "output_tokens": 5, "total_tokens": 19}
        usage |= {"input_token_details": {"audio_tokens": 14, "text_tokens": 0}}
        return Told(events=[*deltas, {"type": "transcript.text.done", "text": TRANSCRIPT, "usage": usage}])
    if form in {"text", "srt", "vtt"}:
        return Told(f"{TRANSCRIPT}\n".encode(), "text/vtt" if form == "vtt" else "text/plain; charset=utf-8")
    return Told({"text": TRANSCRIPT, "usage": SECONDS})


_ANSWERS: Mapping[str, Callable[[Mapping[str, Any]], Told]] = {
    "/moderations": _moderation,
    "/rerank": _rerank,
    "/images/generations": _image("image_generation"),
    "/images/edits": _image("image_edit"),
    "/images/variations": _image("image_generation"),
    "/audio/speech": _speech,
    "/audio/transcriptions": _transcript,
    "/audio/translations": _transcript,
}
