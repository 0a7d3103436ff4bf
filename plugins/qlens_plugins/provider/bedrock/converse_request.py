"""From OpenAI's chat to a body for Converse and ConverseStream."""

from __future__ import annotations

import re
from collections.abc import Mapping
from operator import itemgetter
from typing import Any

from attrs import define, frozen

from qlens import InvalidRequest
from qlens_plugins.provider.bedrock import caching, fields, tools
from qlens_plugins.provider.bedrock.families import Family
from qlens_plugins.provider.bedrock.formats import Format, format_of
from qlens_plugins.provider.bedrock.messages import Conversation, spoken
from qlens_plugins.provider.bedrock.reasoning import Thinking, thinking
from qlens_plugins.provider.bedrock.settings import GuardrailSettings
from qlens_plugins.provider.bedrock.tools import Names
from qlens_plugins.provider.bedrock.usage import DETAILS

Block = dict[str, Any]

_TIERS = {"default": "default", "flex": "flex", "priority": "priority", "fast": "priority"}
_METADATA = re.compile(r"[^a-zA-Z0-9\s:_@$#=/+,\-.]")
_MOST_METADATA = 16
# What OpenAI takes and Bedrock has no equal of, with the value that asks for nothing.
_NO_EQUAL: Mapping[str, Any] = {
    "audio": None,
    "frequency_penalty": 0,
    "logit_bias": {},
    "prediction": None,
    "presence_penalty": 0,
    "seed": None,
    "verbosity": "medium",
}
_PLAIN = frozenset(
    {"model", "messages", "max_completion_tokens", "max_tokens", "n", "stop", "stream", "stream_options", "temperature"}
    | {"top_p"}
)
"""The fields of a chat that asks for nothing but an answer."""
_TELLING = {"adaptive", "budget", "openai"}
_LATENCIES = {"standard", "optimized"}
_VERSION = re.compile(r"[1-9][0-9]{0,7}|DRAFT")
_MODES = {"sync", "async"}
_ADDITIONAL = "additional_model_request_fields"


@frozen(slots=False)  # made for every call
class Asked:
    """A body for Converse, and what is needed to read the answer as the client wants it."""

    body: Block
    names: Names
    helper: str | None = None
    """The tool whose input is the answer's text, and all of it: what the model says beside it is not."""
    one_tool: bool = False
    """Whether only the first call of a tool may pass."""
    older: bool = False
    """Whether the client speaks of functions, not of tools."""


@frozen
class Rules:
    """What the operator says about every call of a target."""

    guardrail: GuardrailSettings | None = None
    reject: bool = False
    """Whether a field that Bedrock has no equal of is refused."""
    schema: str | None = None
    """How answers are made to fit a schema, where the family's way is not the model's."""


def written(body: Block, params: Mapping[str, Any], family: Family, rules: Rules, *, stream: bool) -> Asked:
    """Write a chat for Converse; `params` are those fields of the body that the operator set."""
    if body.keys() <= _PLAIN and rules.guardrail is None and (said := spoken(body["messages"], family)):
        return _plain(body, family, *said)
    _refuse_what_has_no_equal(body, family, rules.reject)
    names = Names()
    offered = tools.offered(body) if body.get("tools") or body.get("functions") else []
    if offered and not family.tools:
        raise _unsupported("tools", "The model behind this name takes no tools.")
    specs = tools.specifications(offered, names, family)
    talk = Conversation(family, names)
    talk.read(body["messages"])
    form = format_of(body, family, names, rules.schema)
    limit = body.get("max_completion_tokens") or body.get("max_tokens")
    mind = thinking(body, family, limit, talk.turns)
    draft = _Draft(body, params, family, talk=talk, form=form, mind=mind)
    guardrail = guardrail_of(body, params, rules.guardrail, stream)
    one_tool = body.get("parallel_tool_calls") is False
    older = "functions" in body and "tools" not in body
    return Asked(draft.written(specs, limit, guardrail), names, form.helper, one_tool, older)


def _plain(body: Block, family: Family, system: list[Block], turns: list[Block]) -> Asked:
    """A chat that says nothing but how it is to be sampled, as most do: there is nothing else to look for."""
    asked: Block = {"messages": turns}
    if system:
        asked["system"] = system
    if config := _sampling(body, family, body.get("max_completion_tokens") or body.get("max_tokens")):
        asked["inferenceConfig"] = config
    return Asked(asked, Names())


def _sampling(body: Block, family: Family, limit: int | None, *, barred: bool = False) -> Block:
    """What Converse's inferenceConfig says; `barred`: a model that thinks takes no sampling."""
    config: Block = {}
    if limit is not None:
        config["maxTokens"] = limit
    if family.sampling and not barred:
        temperature, top_p = body.get("temperature"), body.get("top_p")
        if temperature is not None:
            config["temperature"] = min(temperature, 1)  # OpenAI's goes up to 2
        if top_p is not None and not (family.one_sampler and temperature is not None):
            config["topP"] = top_p
    if stop := body.get("stop"):
        texts = [stop] if isinstance(stop, str) else stop
        if kept := [text for text in texts if text.strip() and re.fullmatch(family.stop, text, re.DOTALL)]:
            config["stopSequences"] = kept
    return config


def _refuse_what_has_no_equal(body: Block, family: Family, reject: bool) -> None:
    if body.get("logprobs") or body.get("top_logprobs"):
        raise _unsupported("logprobs", "The provider gives no log probabilities.")
    if "audio" in (body.get("modalities") or ()):
        raise _unsupported("modalities", "The provider answers with text only.")
    if not reject:
        return
    for name, nothing in _NO_EQUAL.items():
        if body.get(name) not in (None, nothing):
            raise _unsupported(name, f"The provider has no equal of '{name}'.")
    if body.get("reasoning_effort") not in (None, "none") and family.reasoning == "none":
        raise _unsupported("reasoning_effort", "The model behind this name cannot be told how much to think.")
    if body.get("web_search_options") is not None and family.reasoning != "nova":
        raise _unsupported("web_search_options", "The model behind this name does not search the web.")


def _unsupported(param: str, message: str) -> InvalidRequest:
    return InvalidRequest(message, param=param, code="unsupported_parameter")


# --- the body ----------------------------------------------------------------------------------


@define(eq=False)
class _Draft:
    """A call that was read, on its way to Converse's body."""

    body: Block
    params: Mapping[str, Any]
    family: Family
    talk: Conversation
    form: Format
    mind: Thinking

    def written(self, specs: list[Block], limit: int | None, guardrail: Block | None) -> Block:
        talk = self.talk
        if self.form.hint is not None and self.family.system:
            talk.system.append({"text": self.form.hint})
        elif self.form.hint is not None:
            talk.turns[0]["content"].insert(0, {"text": self.form.hint})
        config = self._tool_config(specs)
        if talk.marked or any("cachePoint" in spec for spec in specs):
            specs = config["tools"] if config else []
            caching.keep_within_limits([specs, talk.system, *(turn["content"] for turn in talk.turns)])
        body = self.body
        latency = fields.text(body, "latency")
        parts = {
            "messages": talk.turns,
            "system": talk.system,
            "inferenceConfig": _sampling(body, self.family, limit, barred=self.mind.bars_sampling),
            "toolConfig": config,
            "guardrailConfig": guardrail,
            "additionalModelRequestFields": self._additional(config),
            "additionalModelResponseFieldPaths": [DETAILS] if self._tells_thoughts() else None,
            "outputConfig": self._output(),
            "requestMetadata": _metadata(body),
            "serviceTier": _tier(body, self.params),
            "performanceConfig": {"latency": latency} if latency in _LATENCIES else None,
        }
        return dict(filter(itemgetter(1), parts.items()))

    def _tool_config(self, specs: list[Block]) -> Block | None:
        body, form = self.body, self.form
        searches = body.get("web_search_options") is not None and self.family.reasoning == "nova"
        if not (specs or self.talk.has_tools or form.tool is not None or searches):
            return None
        silent = body.get("tool_choice", body.get("function_call")) == "none"
        if self.talk.has_tools:
            specs = specs or tools.from_history(self.talk.turns)
        elif silent:
            specs = []
        forced = None if silent else tools.choice(body, self.talk.names)
        if form.tool is not None:
            specs = [*specs, form.tool]
            if forced is None or "auto" in forced:
                forced = {"any": {}} if len(specs) > 1 else {"tool": {"name": form.helper}}
        if searches:
            specs = [*specs, tools.grounding()]
        if not specs:
            return None
        if forced is None or not self.family.tool_choice:
            return {"tools": specs}
        return {"tools": specs, "toolChoice": {"auto": {}} if self.mind.bars_choice else forced}

    def _additional(self, config: Block | None) -> Block:
        more: Block = dict(self.mind.fields)
        top_k = self.body.get("top_k")
        if type(top_k) is int and self.family.sampling and not self.mind.bars_sampling:
            if self.family.top_k == "plain":
                more["top_k"] = top_k
            elif self.family.top_k == "nova":
                more["inferenceConfig"] = {"topK": top_k}
        one_tool = self.body.get("parallel_tool_calls") is False
        if one_tool and self.family.native_tool_choice and config and "toolChoice" not in config:
            more["tool_choice"] = {"type": "auto", "disable_parallel_tool_use": True}
        own = self.params.get(_ADDITIONAL)
        return {**more, **own} if isinstance(own, dict) else more

    def _tells_thoughts(self) -> bool:
        """Whether the model thinks, and may say in its own answer how much: Converse passes over what is not there."""
        return bool(self.mind.fields) and self.family.reasoning in _TELLING

    def _output(self) -> Block:
        fields = {"textFormat": self.form.text_format, "effort": self.mind.effort}
        return {name: value for name, value in fields.items() if value is not None}


# --- the rest ----------------------------------------------------------------------------------


def _tier(body: Block, params: Mapping[str, Any]) -> Block | None:
    # Reserved is bought capacity: the operator's to spend.
    asked = body.get("service_tier")
    if asked is None:
        return None
    tier = "reserved" if params.get("service_tier") == "reserved" else _TIERS.get(str(asked))
    return {"type": tier} if tier is not None else None


def _metadata(body: Block) -> dict[str, str]:
    own = body.get("metadata") or {}
    if not (own or body.get("user") or body.get("safety_identifier")):
        return {}
    given = {name: body[name] for name in ("user", "safety_identifier") if body.get(name)} | own
    clean = {
        _METADATA.sub("_", str(name))[:256]: _METADATA.sub("_", str(value))[:256]
        for name, value in given.items()
        if name and isinstance(value, str)
    }
    return dict(list(clean.items())[:_MOST_METADATA])


def guardrail_of(
    body: Block, params: Mapping[str, Any], configured: GuardrailSettings | None, stream: bool
) -> Block | None:
    """The operator's guardrail, or else the client's: nobody can choose a weaker one than is configured.

    Raises InvalidRequest for one whose version or mode Bedrock has no such of.
    """
    asked = body.get("guardrail")
    if configured is not None and "guardrail" not in params:
        if asked is not None:
            raise _unsupported("guardrail", "This gateway's configuration chooses the guardrail: leave the field out.")
        asked = {"id": configured.id, "version": configured.version, "stream": configured.stream}
    if asked is None:
        return None
    if not isinstance(asked, dict) or not isinstance(asked.get("id"), str):
        raise InvalidRequest("guardrail must be an object with an id.", param="guardrail", code="invalid_value")
    version, mode = asked.get("version", "DRAFT"), asked.get("stream", "sync")
    if type(version) not in {int, str} or not _VERSION.fullmatch(str(version)):
        raise InvalidRequest(
            "The version of a guardrail must be its number or 'DRAFT'.", param="guardrail.version", code="invalid_value"
        )
    if not isinstance(mode, str) or mode not in _MODES:
        raise InvalidRequest(
            "A guardrail stands in a stream in the mode 'sync' or 'async'.",
            param="guardrail.stream",
            code="invalid_value",
        )
    return {
        "guardrailIdentifier": asked["id"],
        "guardrailVersion": str(version),
        # What a guardrail saw would go to clients: it stays in AWS's logs.
        "trace": "disabled",
        **({"streamProcessingMode": mode} if stream else {}),
    }
