"""Images made by InvokeModel: Amazon's Nova Canvas and Titan, up to five a request, and Stability's models, one."""

from __future__ import annotations

import re
import time
from functools import partial
from typing import Any, Literal

import orjson

from qlens import CallError, InvalidRequest, Reply, UpstreamInvalid, Usage, error_from
from qlens_plugins.provider.bedrock import usage as usages
from qlens_plugins.provider.bedrock.exchange import Told, ToldBy, Wire
from qlens_plugins.provider.bedrock.fan_out import gathered
from qlens_plugins.provider.bedrock.invoke import guarded, invoked
from qlens_plugins.provider.bedrock.model_ids import ModelId

Block = dict[str, Any]
Painter = Literal["amazon", "stability"]

_MOST_A_REQUEST = 5
_SIZE = re.compile(r"(\d{2,4})x(\d{2,4})")
_RATIOS = ("16:9", "1:1", "21:9", "2:3", "3:2", "4:5", "5:4", "9:16", "9:21")
_PREMIUM = ("hd", "high")
_NO_MATTER = (None, "auto")
_GUARDED = "amazon-bedrock-guardrailAction"


async def paint(wire: Wire, model: ModelId, painter: Painter, body: Block, guardrail: Block | None) -> Reply:
    """Answer an images call, in as many requests as the model needs for its images."""
    if body.get("response_format") == "url":
        raise InvalidRequest(
            "The model behind this name returns images as b64_json only.", param="response_format",
            code="unsupported_value",
        )  # fmt: skip
    asked = _amazon(body) if painter == "amazon" else _stability(body)
    own = guarded(guardrail)
    sends = [partial(invoked, wire, model, each, own) for each in asked]
    answers = await gathered(sends, _used, lambda place: _most(asked[place]))
    images: list[str] = []
    made = usages.together(map(_used, answers))
    for answer in answers:
        with ToldBy(answer.request_id, made):
            images += _images(answer)
    content = {"created": int(time.time()), "data": [{"b64_json": image} for image in images]}
    return Reply(
        body=orjson.dumps(content),
        dialect="images",
        usage=Usage(meters={"images": len(images)}, source="provider"),
        complete=True,
        upstream_id=answers[0].request_id,
    )


def _amazon(body: Block) -> list[Block]:
    width, height = _size(body)
    text = {"text": body["prompt"], **({"negativeText": body["negative_prompt"]} if _is_said(body) else {})}
    config: Block = {"width": width, "height": height}
    config["quality"] = "premium" if body.get("quality") in _PREMIUM else "standard"
    config |= {name: body[given] for name, given in (("cfgScale", "cfg_scale"), ("seed", "seed")) if given in body}
    count = body.get("n") or 1
    counts = [min(_MOST_A_REQUEST, count - done) for done in range(0, count, _MOST_A_REQUEST)]
    return [
        {
            "taskType": "TEXT_IMAGE",
            "textToImageParams": text,
            "imageGenerationConfig": {**_apart(config, place), "numberOfImages": number},
        }
        for place, number in enumerate(counts)
    ]


def _stability(body: Block) -> list[Block]:
    width, height = _size(body)
    ratio = min(_RATIOS, key=lambda name: abs(_ratio(name) - width / height))
    asked: Block = {"prompt": body["prompt"], "aspect_ratio": ratio, "output_format": _format(body)}
    if _is_said(body):
        asked["negative_prompt"] = body["negative_prompt"]
    if "seed" in body:
        asked["seed"] = body["seed"]
    return [_apart(asked, place) for place in range(body.get("n") or 1)]


def _is_said(body: Block) -> bool:
    return bool(body.get("negative_prompt"))


def _apart(asked: Block, place: int) -> Block:
    """A request of its own: the same seed would give the same picture again."""
    return {**asked, "seed": asked["seed"] + place} if isinstance(asked.get("seed"), int) else asked


def _ratio(name: str) -> float:
    width, height = name.split(":")
    return int(width) / int(height)


def _size(body: Block) -> tuple[int, int]:
    asked = body.get("size")
    if asked in _NO_MATTER:
        return 1024, 1024
    found = _SIZE.fullmatch(asked)
    if found is None or not int(found[1]) or not int(found[2]):
        raise InvalidRequest(
            "Invalid 'size'. Expected WIDTHxHEIGHT in pixels: 1024x1024.", param="size", code="invalid_value"
        )
    return int(found[1]), int(found[2])


def _format(body: Block) -> str:
    asked = body.get("output_format") or "png"
    if asked not in ("png", "jpeg"):
        raise InvalidRequest(
            "Invalid 'output_format'. Supported values are: 'png', 'jpeg'.", param="output_format", code="invalid_value"
        )
    return str(asked)


def _used(answer: Told) -> Usage:
    """What an answer counts for: nothing where an image was held back, or there is none."""
    try:
        return Usage(meters={"images": len(_images(answer))}, source="provider")
    except CallError:
        return Usage(source="provider")


def _most(asked: Block) -> Usage:
    count = asked.get("imageGenerationConfig", {}).get("numberOfImages", 1)
    return Usage(meters={"images": count}, source="estimated")


def _images(answer: Told) -> list[str]:
    """The images of an answer; raises when one was held back, for whatever the model says."""
    images = answer.body.get("images")
    reasons = answer.body.get("finish_reasons")
    filtered = next((reason for reason in reasons or () if reason), None) if isinstance(reasons, list) else None
    if filtered is not None or answer.body.get("error") or answer.body.get(_GUARDED) == "INTERVENED":
        raise _held_back()
    if not isinstance(images, list) or not images or not all(isinstance(image, str) and image for image in images):
        raise UpstreamInvalid("The provider's answer has no images.")
    return images


def _held_back() -> CallError:
    said = "The provider's content filter held the image back: change the prompt."
    return error_from({"error": {"message": said, "code": "content_filter", "param": "prompt"}}, 400)
