"""Which calls may get an answer that was given before, and which answers may be given again."""

from __future__ import annotations

import re

import orjson

from qlens.call import Call, Reply
from qlens.surrogates import json_of

# Inside a JSON string the quotes would be escaped, so text never matches.
_FAILED = re.compile(rb'"finish_reason"\s*:\s*"error"')


def may_be_known(call: Call) -> bool:
    """Whether a call only asks: one that goes on with a conversation, or has its answer stored, changes something."""
    body = call.body
    # What was uploaded is no part of the body by which caches know a call.
    if call.form is not None or ("store" in body and body["store"] is True):
        return False
    return "conversation" not in body or body["conversation"] is None


def may_be_repeated(call: Call, reply: Reply) -> bool:
    """Whether an answer to a call that only asks is one to the next who asks the same.

    One in the background says only that it was begun. One that a provider stores is its client's own, who may go on
    from it or delete it. One that a provider broke off is none.
    """
    dialect, body = call.operation.dialect, reply.body or b""
    if dialect in ("chat", "completions"):
        return b'"error"' not in body or _FAILED.search(body) is None
    if dialect == "responses":
        is_begun = call.body.get("background") is True
        return not is_begun and (call.body.get("store") is False or _says_unstored(body))
    return True


def _says_unstored(answer: bytes) -> bool:
    """Whether a response says that nobody stores it: OpenAI does, unless the request says `store: false`."""
    try:
        said = json_of(answer)
    except orjson.JSONDecodeError:
        return False
    return isinstance(said, dict) and said.get("store") is False
