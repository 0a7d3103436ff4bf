"""What Anthropic refuses of a request for a message, in its own words."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import orjson
from attrs import frozen

from qlens.testing.messages_content import Block, merged, turn_faults

LAST_WITH_SAMPLING = "2023-06-01"
VERSIONS = (LAST_WITH_SAMPLING, "2026-10-21")
MOST_MARKS = 4


@frozen
class Card:
    """What Anthropic knows of a model."""

    thinking: Literal["none", "budget", "both", "adaptive"] = "budget"
    sampling: bool = True
    one_sampler: bool = True
    prefill: bool = True
    schema: bool = True
    context_tokens: int = 200_000
    max_tokens: int = 64_000


MODELS: Mapping[str, Card] = {
    "claude-3-5-haiku-20241022": Card("none", one_sampler=False, schema=False, max_tokens=8192),
    "claude-3-7-sonnet-20250219": Card("budget", one_sampler=False, schema=False),
    "claude-sonnet-4-5-20250929": Card(),
    "claude-haiku-4-5-20251001": Card(),
    "claude-opus-4-6": Card("both", prefill=False, max_tokens=128_000),
    "claude-sonnet-5": Card("adaptive", sampling=False, prefill=False, context_tokens=1_000_000, max_tokens=128_000),
}

_FIELDS = {
    *("cache_control", "container", "inference_geo", "max_tokens", "messages", "metadata", "model", "output_config"),
    *("service_tier", "speed", "stop_sequences", "stream", "system", "temperature", "thinking", "tool_choice"),
    *("tools", "top_k", "top_p"),
}
_SAMPLING = ("temperature", "top_p", "top_k")
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,128}")


def refusal(body: Any, version: str) -> str | None:
    """The first thing that is wrong with a body; None: it is answered."""
    if not isinstance(body, dict):
        return "The body must be a JSON object."
    try:
        return next(_faults(body, version), None)
    except (TypeError, AttributeError, LookupError, ValueError):
        return "The body has a value of a wrong type."


def _faults(body: Block, version: str) -> Iterator[str]:
    for name in ("model", "messages", "max_tokens"):
        if name not in body:
            yield f"{name}: Field required"
    for name in body:
        if name not in _FIELDS or (name in _SAMPLING and version > LAST_WITH_SAMPLING):
            yield f"{name}: Extra inputs are not permitted"
    card = MODELS.get(body["model"], Card(one_sampler=False))
    yield from _plain(body, card)
    yield from _system(body.get("system"))
    turns = merged(body["messages"])
    yield from turn_faults(body["messages"], turns, prefill=card.prefill)
    yield from _tools(body, turns)
    yield from _thinking(body, turns, card)
    yield from _marks(body)
    size = sum(len(orjson.dumps(turn["content"])) for turn in turns) // 4
    if size > card.context_tokens:
        yield f"prompt is too long: {size} tokens > {card.context_tokens} maximum"


# --- settings ----------------------------------------------------------------------------------


def _plain(body: Block, card: Card) -> Iterator[str]:
    if type(body["max_tokens"]) is not int:
        yield "max_tokens: Input should be a valid integer"
    if body["max_tokens"] < 1:
        yield "max_tokens: Input should be greater than or equal to 1"
    if body["max_tokens"] > card.max_tokens:
        yield (
            f"max_tokens: {body['max_tokens']} > {card.max_tokens}, which is the maximum allowed number of output "
            f"tokens for {body['model']}"
        )
    if not 0 <= body.get("temperature", 1) <= 1:
        yield "temperature: range: 0..1"
    if not card.sampling and any(body.get(name) is not None for name in _SAMPLING):
        yield "`temperature` is deprecated for this model."
    if card.one_sampler and "temperature" in body and "top_p" in body:
        yield "`temperature` and `top_p` cannot both be specified for this model. Please use only one."
    if type(body.get("stream", False)) is not bool:
        yield "stream: Input should be a valid boolean"
    if any(not text.strip() for text in body.get("stop_sequences", ())):
        yield "stop_sequences: each stop sequence must contain non-whitespace"
    if body.get("service_tier", "auto") not in {"auto", "standard_only"}:
        yield "service_tier: Input should be 'auto' or 'standard_only'"
    if body.get("metadata", {}).keys() - {"user_id"}:
        yield f"metadata.{min(body['metadata'].keys() - {'user_id'})}: Extra inputs are not permitted"
    if len(body.get("metadata", {}).get("user_id") or "") > 256:
        yield "metadata.user_id: String should have at most 256 characters"
    yield from _output(body.get("output_config", {}), card)


def _output(config: Block, card: Card) -> Iterator[str]:
    if extra := config.keys() - {"effort", "format"}:
        yield f"output_config.{min(extra)}: Extra inputs are not permitted"
    if config.get("effort") is not None and config["effort"] not in {"low", "medium", "high", "xhigh", "max"}:
        yield "output_config.effort: Input should be 'low', 'medium', 'high', 'xhigh' or 'max'"
    form = config.get("format")
    if form is not None and not card.schema:
        yield "This model does not support output_config.format."
    if form is not None and not _closed(form.get("schema")):
        yield ("output_config.format.schema: For 'object' type, 'additionalProperties' must be explicitly set to false")


def _closed(node: Any) -> bool:
    if isinstance(node, list):
        return all(map(_closed, node))
    if not isinstance(node, dict):
        return True
    opened = node.get("type") == "object" and node.get("additionalProperties") is not False
    return not opened and all(map(_closed, node.values()))


def _system(system: Any) -> Iterator[str]:
    for at, block in enumerate(system if isinstance(system, list) else ()):
        if block.get("type") != "text":
            yield f"system.{at}.type: Input should be 'text'"
        if not block["text"]:
            yield "system: text content blocks must be non-empty"


# --- tools and thinking ------------------------------------------------------------------------


def _tools(body: Block, turns: list[Block]) -> Iterator[str]:
    tools, choice = body.get("tools") or [], body.get("tool_choice")
    for at, tool in enumerate(tools):
        if tool.get("type") not in {None, "custom"}:
            continue
        where = f"tools.{at}.custom"
        if extra := tool.keys() - {"type", "name", "description", "input_schema", "cache_control", "strict"}:
            yield f"{where}.{min(extra)}: Extra inputs are not permitted"
        if not _NAME.fullmatch(tool.get("name", "")):
            yield f"{where}.name: String should match pattern '^[a-zA-Z0-9_-]{{1,128}}$'"
        if (tool.get("input_schema") or {}).get("type") != "object":
            yield f"{where}.input_schema.type: Input should be 'object'"
    names = [tool.get("name") for tool in tools]
    if len({*names}) != len(names):
        yield "tools: Tool names must be unique."
    if any(block.get("type") == "tool_use" for turn in turns for block in turn["content"]) and not tools:
        yield "Requests which include `tool_use` or `tool_result` blocks must define tools."
    if choice is None:
        return
    if not tools:
        yield "tool_choice may only be specified while providing tools."
    if choice.get("type") not in {"auto", "any", "tool", "none"}:
        yield "tool_choice.type: Input should be 'auto', 'any', 'tool' or 'none'"
    if choice["type"] == "tool" and choice.get("name") not in names:
        yield f"Tool '{choice.get('name')}' not found in provided tools"
    known = {"type", "name"} if choice["type"] == "tool" else {"type"}
    if extra := choice.keys() - known - ({"disable_parallel_tool_use"} if choice["type"] != "none" else set()):
        yield f"tool_choice.{choice['type']}.{min(extra)}: Extra inputs are not permitted"


def _thinking(body: Block, turns: list[Block], card: Card) -> Iterator[str]:
    thinking = body.get("thinking")
    if thinking is None or thinking.get("type") == "disabled":
        return
    if thinking.get("type") not in {"enabled", "adaptive"}:
        yield "thinking: Input tag does not match any of the expected tags: 'enabled', 'disabled', 'adaptive'"
    if thinking["type"] == "enabled" and card.thinking in {"none", "adaptive"}:
        yield (
            '"thinking.type.enabled" is not supported for this model. Use "thinking.type.adaptive" and '
            '"output_config.effort" to control thinking behavior.'
        )
    if thinking["type"] == "adaptive" and card.thinking not in {"both", "adaptive"}:
        yield "adaptive thinking is not supported on this model"
    if thinking["type"] == "enabled":
        if thinking.get("budget_tokens", 0) < 1024:
            yield "thinking.enabled.budget_tokens: Input should be greater than or equal to 1024"
        if thinking["budget_tokens"] >= body["max_tokens"]:
            yield "`max_tokens` must be greater than `thinking.budget_tokens`."
    if (body.get("tool_choice") or {}).get("type") in {"any", "tool"}:
        yield "Thinking may not be enabled when tool_choice forces tool use."
    if body.get("temperature", 1) != 1 or "top_k" in body:
        yield "`temperature` may only be set to 1 when thinking is enabled."
    results = any(block.get("type") == "tool_result" for block in turns[-1]["content"])
    if results and turns[-2]["content"][0].get("type") not in {"thinking", "redacted_thinking"}:
        yield (
            f"messages.{len(turns) - 2}.content.0.type: Expected `thinking` or `redacted_thinking`, but found "
            "`tool_use`. When `thinking` is enabled, a final `assistant` message must start with a thinking block."
        )


def _marks(body: Block) -> Iterator[str]:
    found = [*_marked(body.get("tools")), *_marked(body.get("system"))]
    for message in body["messages"]:
        found += _marked(message.get("content"))
    if body.get("cache_control"):
        found.append(body["cache_control"])
    if len(found) > MOST_MARKS:
        yield f"A maximum of {MOST_MARKS} blocks with cache_control may be provided. Found {len(found)}."
    lives = [mark.get("ttl", "5m") for mark in found]
    if "5m" in lives and "1h" in lives[lives.index("5m") :]:
        yield "a ttl='1h' cache_control block must not come after a ttl='5m' cache_control block."
    if any(mark.get("type") != "ephemeral" or mark.keys() - {"type", "ttl"} for mark in found):
        yield "cache_control: Input tag does not match any of the expected tags: 'ephemeral'"


def _marked(content: Any) -> Iterator[Block]:
    for block in content if isinstance(content, list) else ():
        yield from _marked(block.get("content"))
        if block.get("cache_control"):
            yield block["cache_control"]
