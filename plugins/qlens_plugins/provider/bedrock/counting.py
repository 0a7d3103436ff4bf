"""How long messages are, by Bedrock's own count: CountTokens, for the models that it counts for."""

from __future__ import annotations

import re
from base64 import b64encode
from typing import Any
from urllib.parse import quote

import orjson

from qlens import NO_USAGE, CallError, NotCounted, Reply, UpstreamModelMissing, UpstreamRejected
from qlens_plugins.provider.bedrock.content import PLACEHOLDER
from qlens_plugins.provider.bedrock.exchange import ToldBy, Wire, dumped
from qlens_plugins.provider.bedrock.failures import NotPermitted
from qlens_plugins.provider.bedrock.families import Family
from qlens_plugins.provider.bedrock.model_ids import ModelId
from qlens_plugins.provider.bedrock.reasoning import LEAST_BUDGET

Block = dict[str, Any]

VERSION = "bedrock-2023-05-31"
"""What InvokeModel wants to hear as Claude's `anthropic_version`."""

NOT_THIS_MODEL = "Bedrock does not count tokens for the model behind this name."

_ADDITIONAL = "additional_model_request_fields"
_UNSUPPORTED = re.compile(r"support counting tokens", re.IGNORECASE)
_TOO_LONG = re.compile(r"prompt is too long: (\d{1,9}) tokens")


async def count(wire: Wire, model: ModelId, family: Family, body: Block) -> Reply:
    """Count Anthropic's messages as InvokeModel takes them; raises NotCounted where Bedrock does not count.

    Counted is for the model itself: inference profiles are refused, as if their models could not be counted for.
    https://docs.aws.amazon.com/bedrock/latest/userguide/count-tokens.html
    """
    asked = b64encode(dumped(_invoked(body, family))).decode()
    path = f"/model/{quote(model.base, safe='')}/count-tokens"
    try:
        told = await wire.ask(path, dumped({"input": {"invokeModel": {"body": asked}}}))
    except UpstreamRejected as error:
        # Bedrock counts up to 200,000 tokens and no further, for models that take a million as well, but says how many
        # there are: https://github.com/boto/botocore/issues/3707
        if (found := _TOO_LONG.search(error.message)) is not None:
            return _counted(int(found[1]), error.upstream_id)
        if _UNSUPPORTED.search(error.message):
            raise _uncounted(NOT_THIS_MODEL, error) from error
        raise
    except UpstreamModelMissing as error:
        # A chat goes to the profile, which is there when the model itself is not.
        raise _uncounted(NOT_THIS_MODEL, error) from error
    except NotPermitted as error:
        raise _uncounted("AWS does not permit bedrock:CountTokens, which chats do without.", error) from error
    with ToldBy(told.request_id):
        tokens = told.body["inputTokens"]
        if type(tokens) is not int or tokens < 0:
            raise TypeError
    return _counted(tokens, told.request_id)


def _counted(tokens: int, request_id: str | None) -> Reply:
    content = orjson.dumps({"input_tokens": tokens})
    return Reply(body=content, dialect="count_tokens", usage=NO_USAGE, complete=True, upstream_id=request_id)


def _uncounted(why: str, error: CallError) -> NotCounted:
    uncounted = NotCounted(why)
    uncounted.upstream_id = error.upstream_id
    return uncounted


# --- the body ----------------------------------------------------------------------------------


def _invoked(body: Block, family: Family) -> Block:
    """The messages as a body of InvokeModel, without what counts nothing and may be refused."""
    messages = [_message(message) for message in body["messages"]]
    fields: Block = {"anthropic_version": VERSION, "max_tokens": 1, "messages": messages}
    if body.get("system"):
        fields["system"] = _said(body["system"])
    if body.get("tools"):
        fields["tools"] = [_unmarked(tool) for tool in body["tools"]]
    if _thinks(body, messages, family):
        # How much is all the same to the count, and all that are counted for take a budget.
        fields["thinking"] = {"type": "enabled", "budget_tokens": LEAST_BUDGET}
        fields["max_tokens"] = LEAST_BUDGET + 1
    elif body.get("tools") and body.get("tool_choice"):
        fields["tool_choice"] = body["tool_choice"]
    form = (body.get("output_config") or {}).get("format")
    if form and family.schema == "native":
        fields["output_config"] = {"format": form}
    own = body.get(_ADDITIONAL)
    return {**fields, **own} if isinstance(own, dict) else fields


def _thinks(body: Block, messages: list[Block], family: Family) -> bool:
    """Whether a chat would have the model think: not on from the call of a tool without the thoughts before it."""
    thinking = body.get("thinking")
    if family.reasoning == "none" or not thinking or thinking.get("type") not in {"enabled", "adaptive"}:
        return False
    if not _has(messages[-1], "tool_result"):
        return True
    calling = next((message for message in reversed(messages) if message["role"] == "assistant"), messages[-1])
    return _has(calling, "thinking", "redacted_thinking")


def _has(message: Block, *kinds: str) -> bool:
    content = message["content"]
    return isinstance(content, list) and any(block["type"] in kinds for block in content)


def _message(message: Block) -> Block:
    # A later system prompt is told by the user, as a chat does it.
    role = "assistant" if message["role"] == "assistant" else "user"
    return {"role": role, "content": _said(message["content"])}


def _said(content: Any) -> Any:
    """A content as a chat would send it on: without blank texts, and thoughts that nobody signed."""
    if isinstance(content, str):
        return content if content.strip() else PLACEHOLDER
    blocks = [_block(block) for block in content if not _is_nothing(block)]
    return blocks or PLACEHOLDER


def _block(block: Block) -> Block:
    plain = _unmarked(block)
    if block["type"] == "tool_result" and isinstance(block.get("content"), list):
        plain["content"] = _said(block["content"])
    return plain


def _is_nothing(block: Block) -> bool:
    match block["type"]:
        case "text":
            return not block["text"].strip()
        case "thinking":
            return not block.get("signature")
    return False


def _unmarked(block: Block) -> Block:
    """Without a mark for the cache, which older models do not take in every form."""
    return {name: value for name, value in block.items() if name != "cache_control"}
