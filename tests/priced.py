"""An answer of a fake provider that says what it used, whole and as a stream, and what that costs."""

from __future__ import annotations

from qlens.testing.upstreams import USAGE, chat_events

INPUT, OUTPUT = 3_000_000, 7_000_000
"""Picodollars for a token."""
EXACT = USAGE["prompt_tokens"] * INPUT + USAGE["completion_tokens"] * OUTPUT
SAID = chat_events(usage=USAGE)
WHOLE = {
    "id": "1",
    "object": "chat.completion",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "Hi"}, "finish_reason": "stop"}],
    "usage": USAGE,
}
