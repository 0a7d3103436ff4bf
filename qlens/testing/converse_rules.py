"""What Bedrock refuses although its service model allows it, in Bedrock's words."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import orjson

Block = dict[str, Any]

_PROFILE = re.compile(r"(us|eu|apac|jp|au|ca|in|us-gov|global)\.")
_ANY_FIRST = ("anthropic.", "qwen.", "deepseek.", "openai.")
_NO_TOOLS = ("amazon.titan", "deepseek.r1", "ai21.", "mistral.mistral-7b", "mistral.mixtral")
_NO_SYSTEM = ("amazon.titan", "mistral.mistral-7b", "mistral.mixtral")
_NO_CHOICE = ("meta.", "cohere.", "ai21.")
_NO_CACHE = ("meta.", "mistral.", "cohere.", "deepseek.", "openai.", "qwen.", "ai21.", "amazon.titan")
_DOCUMENT_NAME = re.compile(r"[A-Za-z0-9\-()\[\]]+( [A-Za-z0-9\-()\[\]]+)*")
_CLOSED_SAMPLERS = re.compile(r"anthropic\.claude-(opus-4-[1-9]|sonnet-4-[5-9]|haiku-4-[5-9]|opus-5|sonnet-5)")
_NO_SAMPLERS = re.compile(r"anthropic\.claude-(opus-4-[7-9]|opus-5|sonnet-5)")
_LIMITS = ("minimum", "maximum", "minLength", "maxLength", "minItems", "maxItems", "pattern")


def refusal(model: str, body: Block) -> str | None:
    """The message of the ValidationException for a body of Converse; None for a good one."""
    plain = model.rpartition("/")[2]
    found = _PROFILE.match(plain)
    plain = plain[found.end() :] if found else plain
    rules = (_turns(plain, body), _texts(body), _tools(plain, body), _documents(body), _caching(plain, body))
    return next((message for rule in (*rules, _generation(plain, body)) for message in rule), None)


def _turns(model: str, body: Block) -> Iterator[str]:
    roles = [message["role"] for message in body.get("messages") or ()]
    if not roles or (roles[0] != "user" and not model.startswith(_ANY_FIRST)):
        yield (
            "A conversation must start with a user message. Try again with a conversation that starts with a user "
            "message."
        )
    if any(one == other for one, other in pairwise(roles)):
        yield (
            "A conversation must alternate between user and assistant roles. Make sure the conversation alternates "
            "between user and assistant roles and try again."
        )
    if body.get("system") and model.startswith(_NO_SYSTEM):
        yield "This model doesn't support the system field. Remove system and try again."


def _texts(body: Block) -> Iterator[str]:
    for at, message in enumerate(body.get("messages") or ()):
        if not message["content"]:
            yield (
                f"The content field in the Message object at messages.{at} is empty. Add a ContentBlock object and try "
                "again."
            )
        for place, block in enumerate(message["content"]):
            inner = block.get("toolResult", {}).get("content", []) if "toolResult" in block else [block]
            if any("text" in each and not each["text"].strip() for each in inner):
                yield (
                    f"The text field in the ContentBlock object at messages.{at}.content.{place} is blank. "
                    "Add text to the text field, and try again."
                )
    messages = body.get("messages") or [{"role": "", "content": []}]
    last = messages[-1]
    if last["role"] == "assistant" and "text" in last["content"][-1] and last["content"][-1]["text"][-1:].isspace():
        yield "messages: final assistant content cannot end with trailing whitespace"


# --- tools -------------------------------------------------------------------------------------


def _tools(model: str, body: Block) -> Iterator[str]:
    config = body.get("toolConfig")
    if config is not None and model.startswith(_NO_TOOLS):
        yield "This model doesn't support tool use."
    blocks = [block for message in body.get("messages") or () for block in message["content"]]
    if config is None and any("toolUse" in block or "toolResult" in block for block in blocks):
        yield "The toolConfig field must be defined when using toolUse and toolResult content blocks."
    choice = (config or {}).get("toolChoice")
    if choice is not None and model.startswith(_NO_CHOICE):
        name = next(iter(choice))
        yield (
            f"This model doesn't support the toolConfig.toolChoice.{name} field. "
            f"Remove toolConfig.toolChoice.{name} and try again."
        )
    specs = [tool["toolSpec"] for tool in (config or {}).get("tools") or () if "toolSpec" in tool]
    names = [spec["name"] for spec in specs]
    if len({*names}) != len(names):
        yield "The toolConfig.tools contains duplicate names."
    if choice and "tool" in choice and choice["tool"]["name"] not in names:
        yield "The toolConfig.toolChoice.tool.name is not one of the tools."
    for spec in specs:
        schema = spec["inputSchema"].get("json")
        if not isinstance(schema, dict) or schema.get("type") != "object":
            yield "The value at toolConfig.tools.0.toolSpec.inputSchema.json.type must be one of the following: object."
        if b'"$ref"' in orjson.dumps(schema) or b'"$defs"' in orjson.dumps(schema):
            yield "The schema of a tool has references."
    yield from _results(body.get("messages") or [])


def _results(messages: list[Block]) -> Iterator[str]:
    for at, message in enumerate(messages):
        given = [block["toolResult"]["toolUseId"] for block in message["content"] if "toolResult" in block]
        before = messages[at - 1] if at else {"content": []}
        called = [block["toolUse"]["toolUseId"] for block in before["content"] if "toolUse" in block]
        if message["role"] == "user" and {*given} != {*called}:
            yield (
                f"Expected toolResult blocks at messages.{at}.content for the following Ids: {', '.join(called)}, "
                f"but found: {', '.join(given)}"
            )
        kinds = ["toolResult" in block for block in message["content"] if "cachePoint" not in block]
        if kinds != sorted(kinds, reverse=True):
            yield f"The toolResult blocks at messages.{at}.content must come first."
        if message["role"] == "assistant":
            order = [_rank(block) for block in message["content"]]
            if order != sorted(order):
                yield f"The blocks at messages.{at}.content must be in the order reasoning, text, toolUse."


def _rank(block: Block) -> int:
    return 0 if "reasoningContent" in block else 2 if "toolUse" in block else 1


# --- documents and cache points ----------------------------------------------------------------


def _documents(body: Block) -> Iterator[str]:
    names: list[str] = []
    for message in body.get("messages") or ():
        found = [block["document"] for block in message["content"] if "document" in block]
        if found and not any("text" in block for block in message["content"]):
            yield "A text block is required when documents are used."
        if found and message["role"] != "user":
            yield "Documents are allowed in user messages only."
        names += [document["name"] for document in found]
    if any(not _DOCUMENT_NAME.fullmatch(name) for name in names):
        yield (
            "The value at document.name contains invalid characters. It can only contain alphanumeric characters, "
            "whitespace characters, hyphens, parentheses, and square brackets. The name can't contain more than one "
            "consecutive whitespace character."
        )
    if len({*names}) != len(names):
        yield "Duplicate document names are not allowed."


def _caching(model: str, body: Block) -> Iterator[str]:
    tools = (body.get("toolConfig") or {}).get("tools") or []
    lists = [tools, body.get("system") or [], *(message["content"] for message in body.get("messages") or ())]
    points = [block["cachePoint"] for blocks in lists for block in blocks if "cachePoint" in block]
    if points and model.startswith(_NO_CACHE):
        yield "You invoked an unsupported model or your request did not allow prompt caching."
    if any("cachePoint" in tool for tool in tools) and model.startswith("amazon.nova"):
        yield "Prompt caching of tools is not supported by this model."
    if len(points) > 4:
        yield "A maximum of 4 blocks with cache_control may be provided."
    lives = [point.get("ttl", "5m") for point in points]
    if lives != sorted(lives):
        yield "a ttl='1h' cache_control block must not come after a ttl='5m' cache_control block."
    for blocks in lists:
        for before, block in zip([{}, *blocks], blocks, strict=False):
            if "cachePoint" not in block:
                continue
            document = before.get("document")
            if not before or "reasoningContent" in before or (document and document.get("format") != "pdf"):
                yield "A cachePoint may not stand here."


# --- generation --------------------------------------------------------------------------------


def _generation(model: str, body: Block) -> Iterator[str]:
    config = body.get("inferenceConfig") or {}
    more = body.get("additionalModelRequestFields") or {}
    samplers = {"temperature", "topP"} & config.keys()
    if _NO_SAMPLERS.match(model) and samplers:
        yield f"{min(samplers)} is not supported by this model"
    elif _CLOSED_SAMPLERS.match(model) and len(samplers) == 2:
        yield "`temperature` and `top_p` cannot both be specified for this model. Please use only one."
    if any(not text.strip() for text in config.get("stopSequences") or ()):
        yield "stop_sequences: each stop sequence must contain non-whitespace"
    if model.startswith("openai.gpt-5") and config.get("stopSequences"):
        yield "stopSequences is not supported by this model"
    if model.startswith("amazon.titan") and not {*(config.get("stopSequences") or ())} <= {"|", "User:"}:
        yield "Malformed input request: string does not match pattern ^(\\|+|User:)$, please reformat your input"
    yield from _thinking(model, body, more, config)
    if "reasoning_effort" in more and not model.startswith(("openai.", "deepseek.v3")):
        yield "extraneous key [reasoning_effort] is not permitted"
    if (form := (body.get("outputConfig") or {}).get("textFormat")) is not None:
        yield from _schema(orjson.loads(form["structure"]["jsonSchema"]["schema"]))


def _thinking(model: str, body: Block, more: Block, config: Block) -> Iterator[str]:
    thinking = more.get("thinking")
    if thinking is None:
        return
    if not model.startswith("anthropic."):
        yield "extraneous key [thinking] is not permitted"
    budget = thinking.get("budget_tokens")
    if thinking["type"] == "enabled" and (type(budget) is not int or budget < 1024):
        yield "thinking.enabled.budget_tokens: Input should be greater than or equal to 1024"
    if budget is not None and budget >= config.get("maxTokens", 2**31):
        yield "`max_tokens` must be greater than `thinking.budget_tokens`."
    if "temperature" in config or "top_k" in more:
        yield "`temperature` may only be set to 1 when thinking is enabled."
    choice = (body.get("toolConfig") or {}).get("toolChoice") or {}
    if "any" in choice or "tool" in choice:
        yield "Thinking may not be enabled when tool_choice forces tool use."
    last = [message["content"] for message in body["messages"] if message["role"] == "assistant"][-1:]
    ends_with_results = "toolResult" in body["messages"][-1]["content"][0]
    if ends_with_results and last and "reasoningContent" not in last[0][0]:
        yield "Expected `thinking` or `redacted_thinking`, but found `tool_use`."


def _schema(schema: Any) -> Iterator[str]:
    if isinstance(schema, list):
        for item in schema:
            yield from _schema(item)
    if not isinstance(schema, dict):
        return
    if schema.get("type") == "object" and schema.get("additionalProperties") is not False:
        yield "output_config.format.schema: For 'object' type, 'additionalProperties' must be explicitly set to false"
    if "$ref" in schema or any(name in schema for name in _LIMITS if not isinstance(schema.get(name), dict)):
        yield "output_config.format.schema: contains unsupported keywords"
    for value in schema.values():
        yield from _schema(value)
