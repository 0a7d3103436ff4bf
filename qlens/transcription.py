"""Realtime sessions that only write down what they hear: their model is said in the session, and not in its address.

https://platform.openai.com/docs/guides/realtime-transcription
"""

from __future__ import annotations

from typing import Any

import orjson

from qlens.call import Call
from qlens.session import Frame

INTENT = "transcription"
"""What the query of such a session says under `intent`."""


def is_transcription(call: Call) -> bool:
    """Whether a session is of this kind."""
    return call.query.get("intent") == INTENT


def pinned(frame: Frame, model: str) -> Frame:
    """A client's frame with this model wherever it names one: the one that it was let in for, and that is priced."""
    if frame.kind != "text":
        return frame
    try:
        event = orjson.loads(frame.data)
    except orjson.JSONDecodeError:
        return frame  # for the provider to refuse
    session = event.get("session") if isinstance(event, dict) else None
    if not isinstance(session, dict):
        # Written anew all the same: of two fields of one name, the provider may read the other.
        return Frame(frame.kind, orjson.dumps(event))
    for heard in (_below(session, "audio", "input", "transcription"), _below(session, "input_audio_transcription")):
        if heard is not None:
            heard["model"] = model
    return Frame(frame.kind, orjson.dumps(event))


def _below(node: Any, *names: str) -> dict[str, Any] | None:
    for name in names:
        node = node.get(name) if isinstance(node, dict) else None
    return node if isinstance(node, dict) else None
