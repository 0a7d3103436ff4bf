"""Claude's own bodies at Bedrock: what InvokeModel and CountTokens take of them, and how they are answered.

https://docs.aws.amazon.com/bedrock/latest/userguide/count-tokens.html
"""

from __future__ import annotations

import re
from base64 import b64decode, b64encode
from typing import Any

import orjson

from qlens.testing import converse_rules, frames, messages_rules

Block = dict[str, Any]

VERSION = "bedrock-2023-05-31"
UNSUPPORTED = "The provided model doesn't support counting tokens."

_NAME = re.compile(r"(.*/)?([a-z-]+\.)?anthropic\.(?P<name>claude-[a-z0-9-]+?)(-v\d+(:\d+)?)?")
# Claude from 3.5 to 4.6, by the id of the model itself: profiles and ARNs of profiles are refused like other models.
_COUNTED = re.compile(
    r"(arn:aws(-[a-z-]+)?:bedrock:[a-z0-9-]+::foundation-model/)?"
    r"anthropic\.claude-(3-[57]-\w+|(opus|sonnet|haiku)-4(-[1-6])?)(-\d{8})?(-v\d+(:\d+)?)?"
)
_NOT_IN_A_BODY = ("model", "stream")


def count_refusal(model: str, asked: Block) -> str | None:
    """The message of the ValidationException for a request of CountTokens; None for a good one."""
    if not _COUNTED.fullmatch(model):
        return UNSUPPORTED
    if "converse" in asked["input"]:
        return converse_rules.refusal(model, asked["input"]["converse"])
    try:
        body = orjson.loads(b64decode(asked["input"]["invokeModel"]["body"]))
    except orjson.JSONDecodeError:
        body = None
    return body_refusal(model, body)


def body_refusal(model: str, body: Any) -> str | None:
    """The message of the ValidationException for a body of Claude's; None for a good one."""
    found = _NAME.fullmatch(model)
    if found is None or not isinstance(body, dict):
        return "Malformed input request, please reformat your input and try again."
    if body.get("anthropic_version") != VERSION:
        return "anthropic_version: Field required"
    for name in _NOT_IN_A_BODY:
        if name in body:
            return f"{name}: Extra inputs are not permitted"
    native = {name: value for name, value in body.items() if not name.startswith("anthropic_")}
    return messages_rules.refusal({**native, "model": found["name"]}, messages_rules.LAST_WITH_SAMPLING)


def message(text: str, usage: Block) -> Block:
    """Claude's own answer, by the counts of Converse."""
    told = {"input_tokens": usage["inputTokens"], "output_tokens": usage["outputTokens"]}
    return {
        "id": "msg_bdrk_example",
        "type": "message",
        "role": "assistant",
        "content": [{"type": "text", "text": text}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": told,
    }


def chunks(text: str, usage: Block) -> list[bytes]:
    """The frames of InvokeModelWithResponseStream that tell a text, in Claude's own events."""
    delta = {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": text}}
    counts = {"inputTokenCount": usage["inputTokens"], "outputTokenCount": usage["outputTokens"]}
    last = {"type": "message_stop", "amazon-bedrock-invocationMetrics": {**counts, "invocationLatency": 12}}
    return [_chunk({"type": "message_start", "message": message("", usage)}), _chunk(delta), _chunk(last)]


def _chunk(event: Block) -> bytes:
    return frames.event("chunk", {"bytes": b64encode(orjson.dumps(event)).decode(), "p": "abc"})
