"""OpenAI's moderations (https://platform.openai.com/docs/api-reference/moderations)."""

from __future__ import annotations

from qlens.dialects import Body, Ref, fields
from qlens.dialects.plain import Plain
from qlens.dialects.texts import gather

_PART = fields.tagged(
    "type",
    {
        "text": fields.record({"text": fields.text}, required=("text",)),
        "image_url": fields.record(
            {"image_url": fields.record({"url": fields.string(least=1)}, required=("url",))}, required=("image_url",)
        ),
    },
)
_INPUTS = fields.array(
    fields.either("a string or an object", {str: fields.text, dict: _PART}), of="strings or objects", least=1, most=2048
)


def _texts(body: Body) -> list[tuple[Ref, str]]:
    found: list[tuple[Ref, str]] = []
    gather(body.get("input"), ("input",), found)
    return found


MODERATIONS = Plain(
    rule=fields.record(
        {
            "input": fields.either("a string or an array", {str: fields.text, list: _INPUTS}),
            "model": fields.MODEL,
        },
        required=("model", "input"),
    ),
    asked_texts=_texts,
    default_model="omni-moderation-latest",
)
"""Whether a text, or an image, is harmful."""
