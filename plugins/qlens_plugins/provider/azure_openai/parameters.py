"""What a deployment's model accepts: by its base model, and by what Azure has refused before."""

from __future__ import annotations

import re
from collections.abc import Iterable, Set
from functools import lru_cache
from typing import Any, Literal

from attrs import define, field, frozen

from qlens import InvalidRequest, UpstreamRejected, speaks_responses_only

Policy = Literal["drop", "reject"]

# o1, o3-mini, gpt-5, gpt-5.1-codex, gpt-12, but not gpt-4o, and not gpt-35-turbo, which is how Azure writes 3.5.
_SERIES = re.compile(r"(?P<o>o\d+)(-.*)?|gpt-(?!35\b)(?P<major>[5-9]|[1-9]\d)(\.(?P<minor>\d+))?(?P<rest>-.*)?")

_SAMPLING: dict[str, tuple[object, ...]] = {
    "temperature": (None, 1),
    "top_p": (None, 1),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "logprobs": (None, False),
    "top_logprobs": (None,),
    "logit_bias": (None, {}),
}
"""What reasoning models do not have, with the values that say nothing."""

_SPARED = frozenset({*_SAMPLING, "parallel_tool_calls"})
"""What a call can do without; not `stop`, without which it would get more than it asked for."""
_UNRECOGNIZED = re.compile(r"Unrecognized request arguments? supplied: ([\w, ]+)")
PREVIEWED = frozenset(
    {"audio", "metadata", "modalities", "prediction", "reasoning_effort", "store", "user_security_context"}
)
"""The fields of a chat that the classic surface knows behind previews of its api-version alone."""
OF_V1 = frozenset({"prompt_cache_key", "prompt_cache_retention", "safety_identifier", "service_tier", "verbosity"})
"""Those that the surface v1 alone knows."""
_OTHER_NAME = {"max_tokens": "max_completion_tokens", "max_completion_tokens": "max_tokens"}


@frozen
class Family:
    """What of a base model decides about parameters."""

    reasons: bool = False
    series: Literal["o", "gpt", "other"] = "other"
    sampled_without_effort: bool = False
    """Whether it takes sampling parameters while it does not reason (gpt-5.1 and later)."""
    chats: bool = True
    """Whether it speaks chat at all; codex and pro models speak Responses only."""
    responds: bool = False
    """Whether it speaks Responses."""
    newest: bool = False
    """Whether the classic surface has all of it behind its last previews alone."""
    completes: bool = False
    """Whether it has the legacy completions, which Azure refuses for every model that chats."""


# https://learn.microsoft.com/azure/ai-foundry/openai/how-to/responses lists them.
_RESPONDS = re.compile(r"gpt-4o(-mini)?(-\d{4}-\d\d-\d\d)?|gpt-4\.1(-mini|-nano)?(-\d{4}-\d\d-\d\d)?|gpt-5-chat.*")
# Images of gpt-image and sounds of gpt-4o came with 2025-03-01-preview and 2025-04-01-preview.
_NEWEST = re.compile(r"gpt-image-.*|gpt-4o-(mini-)?(transcribe|tts)(-.*)?")
_COMPLETES = re.compile(r"gpt-3\.?5-turbo-instruct(-\d+)?|(davinci|babbage)-002")


@lru_cache(maxsize=256)
def family(base_model: str | None) -> Family | None:
    """The family of a base model; None when nobody says what the model is."""
    if base_model is None:
        return None
    name = base_model.lower()
    match = _SERIES.fullmatch(name)
    if match is None or name.startswith("gpt-5-chat"):
        if speaks_responses_only(name):
            return Family(chats=False, responds=True)
        return Family(
            responds=bool(_RESPONDS.fullmatch(name)),
            completes=bool(_COMPLETES.fullmatch(name)),
            newest=bool(_NEWEST.fullmatch(name)),
        )
    chats, responds = not speaks_responses_only(name), not re.match(r"o1-(mini|preview)\b", name)
    if match["o"] is not None:
        return Family(reasons=True, series="o", chats=chats, responds=responds, newest=True)
    later = int(match["major"]) > 5 or int(match["minor"] or 0) >= 1
    return Family(reasons=True, series="gpt", sampled_without_effort=later, chats=chats, responds=responds, newest=True)


def fit_chat(body: dict[str, Any], model: Family, policy: Policy) -> None:
    """Make a chat body one that the model accepts; what is nested in it is replaced, never edited.

    Raises InvalidRequest for a field that the model does not have, where those are to be refused.
    """
    if not model.reasons:
        _as_system(body)
        return
    _rename(body, "max_tokens")
    if not (model.sampled_without_effort and body.get("reasoning_effort") in (None, "none")):
        _without_sampling(body, policy)
    if "parallel_tool_calls" in body and (model.series == "o" or body.get("reasoning_effort") == "minimal"):
        # They call one tool at a time, which is what false asks for, and true only allows more.
        del body["parallel_tool_calls"]
    _as_developer(body)


def fit_response(body: dict[str, Any], model: Family, policy: Policy) -> None:
    """The same for a request for a response; what is nested in it stays as it is."""
    effort = (body.get("reasoning") or {}).get("effort")
    if not model.reasons or (model.sampled_without_effort and effort in (None, "none")):
        return
    _without_sampling(body, policy)


def _without_sampling(body: dict[str, Any], policy: Policy) -> None:
    _leave_out(body, [name for name, silent in _SAMPLING.items() if body.get(name) not in silent], policy)
    for name in _SAMPLING:
        body.pop(name, None)


def _rename(body: dict[str, Any], name: str) -> None:
    limit = body.pop(name, None)
    if limit is not None:
        body.setdefault(_OTHER_NAME[name], limit)


def _leave_out(body: dict[str, Any], names: Iterable[str], policy: Policy) -> None:
    for name in names:
        if policy == "reject":
            raise InvalidRequest(
                f"Unsupported parameter: '{name}' is not supported with this model.",
                param=name,
                code="unsupported_parameter",
            )
        del body[name]


def _as_developer(body: dict[str, Any]) -> None:
    """Reasoning models refuse a conversation with both roles; for them they mean the same."""
    if {"system", "developer"} <= {message.get("role") for message in body["messages"]}:
        body["messages"] = _with_role(body["messages"], "system", "developer")


def _as_system(body: dict[str, Any]) -> None:
    """Other models know the newer name only behind newer api-versions; for them they mean the same."""
    if any(message.get("role") == "developer" for message in body["messages"]):
        body["messages"] = _with_role(body["messages"], "developer", "system")


def _with_role(messages: list[dict[str, Any]], old: str, new: str) -> list[dict[str, Any]]:
    return [{**message, "role": new} if message.get("role") == old else message for message in messages]


# --- what was refused before --------------------------------------------------------------------


@define(eq=False)
class Lessons:
    """The fields that Azure refused for each deployment; few deployments, few fields, so nothing is ever dropped."""

    _learned: dict[str, frozenset[str]] = field(factory=dict)

    def of(self, deployment: str) -> frozenset[str]:
        """What one deployment refuses."""
        return self._learned.get(deployment, frozenset())

    def learn(self, deployment: str, refused: frozenset[str]) -> None:
        """Remember that a deployment refuses fields."""
        self._learned[deployment] = self.of(deployment) | refused


def refused(error: UpstreamRejected, sent: Set[str], policy: Policy) -> frozenset[str]:
    """The fields that were sent, that Azure says the model does not have, and that can be done without."""
    if error.status != 400:
        return frozenset()
    named = unrecognized(error)
    if error.code in {"unsupported_parameter", "unsupported_value"} and error.param:
        named.add(error.param)
    dispensable = {*_OTHER_NAME, "stream_options", *(_SPARED if policy == "drop" else ())}
    return frozenset(named & sent & dispensable)


def unrecognized(error: UpstreamRejected) -> set[str]:
    """The fields that Azure says its api-version does not have."""
    match = _UNRECOGNIZED.search(error.message)
    return {name.strip() for name in match[1].split(",")} if match else set()


def apply_lessons(body: dict[str, Any], lessons: frozenset[str]) -> None:
    """Leave out, or call by its other name, what a deployment refused before."""
    for name in lessons:
        if name not in _OTHER_NAME:
            body.pop(name, None)
        elif _OTHER_NAME[name] not in lessons:
            _rename(body, name)
