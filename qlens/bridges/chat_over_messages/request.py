"""From a chat to messages."""

from __future__ import annotations

from hashlib import sha256
from typing import Any

import orjson
from attrs import frozen

from qlens.bridges import claude
from qlens.bridges.chat_over_messages import caching, formats, tools
from qlens.bridges.chat_over_messages.conversation import Conversation
from qlens.bridges.chat_over_messages.formats import Format
from qlens.bridges.chat_over_messages.thinking import Thinking, thinking
from qlens.bridges.chat_over_messages.tools import Names
from qlens.bridges.claude import Claude
from qlens.dialects import Body, chat
from qlens.dialects.messages import Chosen
from qlens.errors import NotOffered

Block = dict[str, Any]

_SAID = frozenset(
    {
        *("cache_control", "function_call", "functions", "max_completion_tokens", "max_tokens", "messages", "model"),
        *("parallel_tool_calls", "reasoning_effort", "response_format", "safety_identifier", "service_tier", "stop"),
        *("stream", "stream_options", "temperature", "thinking", "tool_choice", "tools", "top_k", "top_p", "user"),
    }
)
# Messages have no equal of these, and an answer without them is an answer still: they nudge the model, or are notes.
_ADVICE = frozenset(
    {
        *("frequency_penalty", "logit_bias", "metadata", "prediction", "presence_penalty", "prompt_cache_key"),
        *("prompt_cache_options", "prompt_cache_retention", "seed", "store", "verbosity"),
    }
)
# What asks for nothing with this value, and for what cannot be had with any other.
_NOTHING: dict[str, tuple[Any, ...]] = {
    "audio": (None,),
    "logprobs": (None, False),
    "modalities": (None, [], ["text"]),
    "n": (None, 1),
    "top_logprobs": (None, 0),
}
_TIERS = {"auto": "auto", "default": "standard_only", "priority": "auto", "fast": "auto"}
_MOST_USER_ID = 256


def written(body: Body) -> Body:
    """The chat as messages, sharing nothing with it."""
    _refuse_what_has_no_equal(body)
    model, names, body = claude.of(body["model"]), Names(), _modern(body)
    offered = tools.offered(body, names, model)
    talk = Conversation(names)
    talk.read(body["messages"])
    form = formats.format_of(body, model, names)
    limit = chat.output_bound(body)[1] or model.most_output
    mind = thinking(body, model, limit, talk.turns)
    draft = _Draft(body, model, talk, form, mind)
    # Nothing may be shared with the client's own body, which is asked again when this provider fails.
    found: Body = orjson.loads(orjson.dumps(draft.written(offered, limit)))
    if type(mind.config) is Chosen:
        found["thinking"] = Chosen(found["thinking"])  # its budget follows a limit that is lowered later
    return found


def _refuse_what_has_no_equal(body: Body) -> None:
    for name, value in body.items():
        if name in _SAID or name in _ADVICE or value is None or value in _NOTHING.get(name, ()):
            continue
        raise NotOffered(f"has no equal of '{name[:64]}'.", param=name[:64], code="unsupported_parameter")


def _modern(body: Body) -> Body:
    """The chat with tools where it has functions."""
    if body.get("tools") or not body.get("functions"):
        return body
    made = [{"type": "function", "function": each} for each in body["functions"]]
    given = body.get("function_call")
    choice = {"type": "function", "function": given} if isinstance(given, dict) else given
    return {**body, "tools": made, "tool_choice": choice, "parallel_tool_calls": False}


@frozen
class _Draft:
    """A chat that was read, on its way to messages."""

    body: Body
    model: Claude
    talk: Conversation
    form: Format
    mind: Thinking

    def written(self, offered: list[Block], limit: int) -> Body:
        body, talk = self.body, self.talk
        if self.form.hint is not None:
            talk.system.append({"type": "text", "text": self.form.hint})
        specs, choice = self._tools(offered)
        whole = caching.mark(body)
        caching.keep_within_limits(specs, talk.system, talk.turns, spare=whole is not None)
        fields = {
            "max_tokens": limit,
            "system": talk.system,
            "messages": talk.turns,
            "tools": specs,
            "tool_choice": choice,
            "stop_sequences": _stops(body),
            "thinking": self.mind.config,
            "output_config": {**self.mind.output, **self.form.output},
            "metadata": _metadata(body),
            "service_tier": _TIERS.get(str(body.get("service_tier"))),
            "cache_control": whole,
        }
        stream = {"stream": True} if body.get("stream") else {}
        said = {name: value for name, value in fields.items() if value}
        return {"model": body["model"], **said, **self._sampling(), **stream}

    def _sampling(self) -> Body:
        body = self.body
        if not self.model.sampling or self.mind.config:
            return {}  # refused there, and a nudge only
        found: Body = {}
        if body.get("temperature") is not None:
            found["temperature"] = min(body["temperature"], 1)  # OpenAI's goes up to 2
        if body.get("top_p") is not None and not (found and self.model.one_sampler):
            found["top_p"] = body["top_p"]
        if type(body.get("top_k")) is int:
            found["top_k"] = body["top_k"]
        return found

    def _tools(self, specs: list[Block]) -> tuple[list[Block], Block | None]:
        choice = tools.choice(self.body, self.talk.names) if specs else None
        if not specs and (specs := tools.from_history(self.talk.turns)):
            choice = {"type": "none"}  # they are there for the history alone
        if self.form.tool is not None:
            may_call = bool(specs) and (choice is None or choice["type"] != "none")
            specs = [*specs, self.form.tool]
            if not may_call:
                choice = {"type": "tool", "name": self.form.tool["name"]}
            elif choice is None or choice["type"] == "auto":
                choice = {**(choice or {}), "type": "any"}
        if choice is not None and self.mind.config and choice["type"] in {"any", "tool"}:
            choice = {**choice, "type": "auto"}  # a model that thinks cannot be forced
            choice.pop("name", None)
        return specs, choice


def _stops(body: Body) -> list[str]:
    stop = body.get("stop") or []
    # Blank ones are refused there.
    return [text for text in ([stop] if isinstance(stop, str) else stop) if text.strip()]


def _metadata(body: Body) -> Body | None:
    user = body.get("safety_identifier") or body.get("user")
    if not user:
        return None
    return {"user_id": user if len(user) <= _MOST_USER_ID else sha256(user.encode(errors="replace")).hexdigest()}
