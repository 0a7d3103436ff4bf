"""From a request for a response to a request for a chat completion."""

from __future__ import annotations

from typing import Any

import orjson

from qlens.bridges.responses_over_chat.messages import messages_of
from qlens.bridges.responses_over_chat.refusals import unsupported
from qlens.dialects import Body

# What chat has under the same name and with the same meaning; beside OpenAI's own, what its API does not have in
# Responses and others take everywhere.
_SAME = frozenset(
    {
        *("model", "stream", "temperature", "top_p", "top_logprobs", "user", "service_tier", "safety_identifier"),
        *("prompt_cache_key", "prompt_cache_options", "prompt_cache_retention", "moderation"),
        *("seed", "stop", "frequency_penalty", "presence_penalty", "logit_bias", "top_k", "min_p"),
    }
)

# What changes nothing in an answer that is made in one go by the model alone.
_MOOT = frozenset(
    {
        "max_tool_calls",  # counts calls of hosted tools
        "metadata",  # comes back with the answer
        "stream_options",  # obfuscation of a stream's lengths
        "truncation",  # without it, too long an input is an error, which says so
    }
)
_TRANSLATED = frozenset(
    {
        *("input", "instructions", "tools", "tool_choice", "parallel_tool_calls", "text", "reasoning", "include"),
        *("max_output_tokens", "store", "background"),
    }
)
_LACKING = {
    "previous_response_id": "responses that are kept: send the earlier items again, in 'input'",
    "conversation": "conversations that are kept: send the earlier items again, in 'input'",
    "prompt": "prompts that are kept: send the text itself, in 'instructions' and 'input'",
    "background_options": "calls in the background",
    "context_management": "a way to shorten the context: send fewer or shorter items in 'input'",
}
_LOGPROBS = "message.output_text.logprobs"


def asked_of_chat(body: Body) -> Body:
    """The body of a chat call; raises InvalidRequest, with the client's own param, for what chat does not have."""
    _refuse(body)
    body = orjson.loads(orjson.dumps(body))  # nothing is to be shared with the client's own
    chat: Body = {name: value for name, value in body.items() if name in _SAME and value is not None}
    chat["messages"] = messages_of(body)
    if body.get("max_output_tokens") is not None:
        chat["max_completion_tokens"] = body["max_output_tokens"]
    if _LOGPROBS in (body.get("include") or ()) or body.get("top_logprobs"):
        chat["logprobs"] = True
    else:
        chat.pop("top_logprobs", None)  # none are asked for, and chat refuses the number alone
    if body.get("stream"):
        chat["stream_options"] = {"include_usage": True}
    _put_tools(chat, body)
    _put_text(chat, body.get("text") or {})
    _put_reasoning(chat, body.get("reasoning") or {})
    return chat


def _refuse(body: Body) -> None:
    for name, value in body.items():
        if value is None or name in _SAME or name in _MOOT or name in _TRANSLATED:
            continue
        raise unsupported(name, _LACKING.get(name, "it in its chat API"))
    if body.get("background"):
        raise unsupported("background", "calls in the background: leave it out, and wait for the answer")
    if body.get("store"):
        # Left out it means the same to OpenAI, but nobody who leaves it out says that he counts on it.
        raise unsupported("store", "responses that are kept: set it to false")


# --- tools -------------------------------------------------------------------------------------


def _put_tools(chat: Body, body: Body) -> None:
    tools = [_tool(tool, f"tools[{position}]") for position, tool in enumerate(body.get("tools") or ())]
    choice = body.get("tool_choice")
    if choice is not None:
        choice = _choice(choice)
    if tools:
        chat["tools"] = tools
        if body.get("parallel_tool_calls") is not None:
            chat["parallel_tool_calls"] = body["parallel_tool_calls"]
    # Chat refuses these two where there are no tools to choose from, even when they say nothing.
    if choice is not None and (tools or choice not in ("auto", "none")):
        chat["tool_choice"] = choice


def _tool(tool: dict[str, Any], param: str) -> dict[str, Any]:
    kind = tool["type"]
    if kind == "function":
        names = ("name", "description", "parameters", "strict")
        return {"type": kind, kind: {name: tool[name] for name in names if tool.get(name) is not None}}
    if kind == "custom":
        custom = {name: tool[name] for name in ("name", "description") if tool.get(name) is not None}
        if tool.get("format") is not None:
            custom["format"] = _grammar(tool["format"])
        return {"type": kind, kind: custom}
    raise unsupported(
        f"{param}.type", f"the tool '{kind[:64]}': tools of the types 'function' and 'custom' are run by you"
    )


def _grammar(form: dict[str, Any]) -> dict[str, Any]:
    if form.get("type") != "grammar":
        return form
    rest = {name: value for name, value in form.items() if name != "type"}
    return {"type": "grammar", "grammar": rest}


def _choice(choice: Any) -> Any:
    if type(choice) is str:
        return choice
    kind = choice["type"]
    if kind in {"function", "custom"}:
        return _named(choice)
    if kind == "allowed_tools":
        allowed = [_allowed(tool, f"tool_choice.tools[{at}]") for at, tool in enumerate(choice.get("tools") or ())]
        return {"type": kind, kind: {"mode": choice.get("mode") or "auto", "tools": allowed}}
    raise unsupported("tool_choice.type", f"the tool '{kind[:64]}'")


def _allowed(tool: Any, param: str) -> dict[str, Any]:
    if type(tool) is not dict or tool.get("type") not in ("function", "custom"):
        raise unsupported(param, "such a tool")
    return _named(tool)


def _named(tool: dict[str, Any]) -> dict[str, Any]:
    return {"type": tool["type"], tool["type"]: {"name": tool.get("name")}}


# --- text and reasoning ------------------------------------------------------------------------


def _put_text(chat: Body, text: dict[str, Any]) -> None:
    if text.get("verbosity") is not None:
        chat["verbosity"] = text["verbosity"]
    form = text.get("format") or {"type": "text"}
    match form["type"]:
        case "text":
            pass
        case "json_object":
            chat["response_format"] = {"type": "json_object"}
        case "json_schema":
            names = ("name", "description", "schema", "strict")
            schema = {name: form[name] for name in names if form.get(name) is not None}
            chat["response_format"] = {"type": "json_schema", "json_schema": schema}
        case other:
            raise unsupported("text.format.type", f"the format '{other[:64]}'")


def _put_reasoning(chat: Body, reasoning: dict[str, Any]) -> None:
    # How it is summed up is no matter of the model here, and which of the earlier reasoning it reads is its own.
    if reasoning.get("mode") not in {None, "standard"}:
        raise unsupported("reasoning.mode", "more than one mode of reasoning")
    if reasoning.get("effort") is not None:
        chat["reasoning_effort"] = reasoning["effort"]
