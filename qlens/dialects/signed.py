"""Thoughts that a model has signed: one of which a letter was changed would be refused when it comes back.

A client sends them back as it got them, so an answer that is rewritten must not say that they are signed still.
"""

from __future__ import annotations

from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Callable
from functools import partial
from typing import Any

import orjson

from qlens.dialects import Body, Ref, Strand

REWRITTEN = "qlens-rewritten-1"
"""Stands for the signature of a thought that was rewritten, where no block may be without one."""

_CLOSED = "qlens-thoughts-1."
"""Tells what was closed here from what a provider of Responses has encrypted."""
_CLOSED_BYTES = _CLOSED.encode()


def is_signed(body: Body, ref: Ref) -> bool:
    """Whether the text there is a thought that is whole, with its signature beside it."""
    if ref[-1] != "thinking" or "input" in ref:  # what a tool is called with may have any names
        return False
    block = _at(body, ref[:-1])
    return block.get("type") == "thinking" and bool(block.get("signature"))


def strand_of(event: Body) -> Strand:
    """The thought whose signature this event of messages brings; empty when it brings none."""
    delta = event.get("delta")
    if type(delta) is not dict or type(delta.get("signature")) is not str:
        return ()
    return (event.get("index", 0), "thinking")


def unsign(body: Body, ref: Ref, *, whole: bool = True) -> None:
    """Take back the signature of the thought there; a block of chat that stands in `body` as a `whole` goes with it."""
    block = _at(body, ref[:-1])
    if "thinking_blocks" not in ref:
        block["signature"] = REWRITTEN
    elif not whole:
        del block["signature"]
    else:
        blocks = _at(body, ref[:-2])
        del blocks[ref[-2]]
        if not blocks:
            del _at(body, ref[:-3])["thinking_blocks"]


def _at(node: Any, ref: Ref) -> Any:
    for step in ref:
        node = node[step]
    return node


# --- what comes back of messages ---------------------------------------------------------------


def without_rewritten(body: Body) -> None:
    """Take out of a request of messages the thoughts that were rewritten: the model would not know them as its own."""
    kept, gone = [], False
    for message in body["messages"]:
        content = message["content"]
        if message["role"] == "assistant" and type(content) is list and any(map(_is_rewritten, content)):
            gone, message["content"] = True, [block for block in content if not _is_rewritten(block)]
            if not message["content"]:
                continue
        kept.append(message)
    if gone:
        body["messages"] = kept
        if _lacks_thoughts(kept):
            # A model refuses to think on where the call of a tool stands without the thoughts that led to it.
            body.pop("thinking", None)


def _is_rewritten(block: Body) -> bool:
    return block.get("signature") == REWRITTEN


def _lacks_thoughts(messages: list[Body]) -> bool:
    """Whether the tools whose results stand at the end were called without thoughts."""
    results = messages[-1]["content"] if messages and messages[-1]["role"] == "user" else ()
    calling = next((message["content"] for message in reversed(messages) if message["role"] == "assistant"), ())
    return _has(results, "tool_result") and not _has(calling, "thinking", "redacted_thinking")


def _has(content: Any, *kinds: str) -> bool:
    return type(content) is list and any(block["type"] in kinds for block in content)


# --- closed ------------------------------------------------------------------------------------


def closed(blocks: list[Any]) -> str:
    """Signed thoughts as one text that says nothing to a client."""
    return _CLOSED + urlsafe_b64encode(orjson.dumps(blocks)).decode()


def is_closed(content: str) -> bool:
    """Whether a text is what `closed` makes."""
    return content.startswith(_CLOSED)


def opened(content: object) -> list[Any]:
    """The thoughts in such a text; none when somebody else has made it."""
    if type(content) is not str or not is_closed(content):
        return []
    try:
        blocks = orjson.loads(urlsafe_b64decode(content.removeprefix(_CLOSED)))
    except ValueError:
        return []
    return [block for block in blocks if _is_provable(block)] if type(blocks) is list else []


def _is_provable(block: Any) -> bool:
    """Whether the provider itself can tell that the thought is its own: a client might have made this one up."""
    if type(block) is not dict:
        return False
    proof = {"thinking": "signature", "redacted_thinking": "data"}.get(str(block.get("type")))
    return proof is not None and bool(block.get(proof)) and type(block[proof]) is str


def without_closed(node: Any, fn: Callable[[str], str]) -> bool:
    """Remove from an answer the closed thoughts that `fn` would rewrite; tell whether there were such."""
    if type(node) is list:
        return any(list(map(partial(without_closed, fn=fn), node)))
    if type(node) is not dict:
        return False
    found = without_closed([*node.values()], fn)
    thoughts = [block.get("thinking") for block in opened(node.get("encrypted_content"))]
    if any(type(thought) is str and fn(thought) != thought for thought in thoughts):
        del node["encrypted_content"]
        return True
    return found


def may_have_closed(answer: bytes) -> bool:
    """Whether an answer, or an event, may have closed thoughts in it."""
    return _CLOSED_BYTES in answer
