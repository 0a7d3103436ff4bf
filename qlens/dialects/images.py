"""OpenAI's images: made, edited and varied (https://platform.openai.com/docs/api-reference/images)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attrs import evolve

from qlens.dialects import Body, Ref, fields
from qlens.dialects.plain import Meters, Plain, tokens_of
from qlens.errors import InvalidRequest
from qlens.usage import Usage, with_image_tokens

_SIZE = fields.string(least=1, most=32)
_VARIED: Mapping[str, fields.Rule] = {
    "model": fields.MODEL,
    "n": fields.integer(1, 10),
    "response_format": fields.one_of("url", "b64_json"),
    "size": _SIZE,
    "user": fields.text,
}
_MADE: Mapping[str, fields.Rule] = {
    **_VARIED,
    "background": fields.text,
    "moderation": fields.text,
    "output_compression": fields.integer(0, 100),
    "output_format": fields.text,
    "partial_images": fields.integer(0, 3),
    "prompt": fields.string(least=1, most=32_000),
    "quality": fields.text,
    "safety_identifier": fields.text,
    "stream": fields.flag,
    "style": fields.text,
}


def _streamable(rule: fields.Rule) -> fields.Rule:
    """The rule, and that a stream has one image: its end is that image's event."""

    def check(value: Any, path: fields.Path) -> None:
        rule(value, path)
        if value.get("stream") and (value.get("n") or 1) > 1:
            raise InvalidRequest("Only one image can be streamed: leave 'n' out.", param="n", code="unsupported_value")

    return check


def _prompt(body: Body) -> list[tuple[Ref, str]]:
    return [(("prompt",), body["prompt"])] if isinstance(body.get("prompt"), str) else []


def _revised(body: Body) -> list[tuple[Ref, str]]:
    """The prompts that the provider made of the client's."""
    return [
        (("data", index, "revised_prompt"), image["revised_prompt"])
        for index, image in enumerate(body.get("data") or ())
        if isinstance(image, dict) and isinstance(image.get("revised_prompt"), str)
    ]


def _asked(body: Body) -> Meters:
    return {"images": body.get("n") or 1}


def _used(body: Body) -> Usage | None:
    """The tokens, for models that count them, and the images that are there; else these alone."""
    images = body.get("data")
    # A stream's last event is an image itself.
    made = len(images) if isinstance(images, list) else int("b64_json" in body)
    if body.get("usage") and (said := tokens_of(body)) is not None and said.total:
        used = with_image_tokens(said, body["usage"])
        return evolve(used, meters={**used.meters, "output_images": made}) if made else used
    return Usage(meters={"images": made}, source="provider") if made and images else None


IMAGES = Plain(
    rule=_streamable(fields.record(_MADE, required=("model", "prompt"))),
    asked_texts=_prompt,
    meters=_asked,
    used=_used,
    answer_texts=_revised,
    last_event="image_generation.completed",
)
"""Images made from a prompt."""

_NUMBERS: Mapping[str, type] = {"n": int, "output_compression": int, "partial_images": int, "stream": bool}


def _reference(value: Any, path: fields.Path) -> None:
    _NAMED(value, path)
    if (value.get("image_url") is None) is (value.get("file_id") is None):
        raise InvalidRequest(
            f"'{fields.written(path)}' must have either 'image_url' or 'file_id'.",
            param=fields.written(path),
            code="invalid_value",
        )


_NAMED = fields.record({"image_url": fields.text, "file_id": fields.text})
_EDITED: Mapping[str, fields.Rule] = {
    **_MADE,
    "images": fields.array(_reference, of="objects", least=1, most=16),
    "input_fidelity": fields.text,
    "mask": _reference,
}

IMAGE_EDITS = Plain(
    rule=_streamable(fields.record(_EDITED, required=("model", "prompt"))),
    asked_texts=_prompt,
    meters=_asked,
    used=_used,
    answer_texts=_revised,
    last_event="image_edit.completed",
    files={"image": 16, "mask": 1, "markup": 1},
    by_reference="images",
    form=_NUMBERS,
)
"""Images made from images and a prompt."""

IMAGE_VARIATIONS = Plain(
    rule=fields.record(_VARIED, required=("model",)),
    meters=_asked,
    used=_used,
    files={"image": 1},
    form=_NUMBERS,
)
"""Images like another."""
