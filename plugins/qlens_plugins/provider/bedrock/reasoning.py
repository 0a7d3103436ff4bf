"""How much a model is to think, told in the way of its family."""

from __future__ import annotations

from typing import Any

from attrs import field, frozen

from qlens_plugins.provider.bedrock import fields
from qlens_plugins.provider.bedrock.families import Family

Block = dict[str, Any]

LEAST_BUDGET = 1024
_BUDGETS = {"minimal": 1024, "low": 1024, "medium": 4096, "high": 16384, "xhigh": 32768, "max": 32768}
_THREE = {"minimal": "low", "low": "low", "medium": "medium", "high": "high", "xhigh": "high", "max": "high"}
_FOUR = {**_THREE, "max": "max"}


@frozen
class Thinking:
    """What a request says about thinking."""

    fields: Block = field(factory=dict)
    """For additionalModelRequestFields."""
    effort: str | None = None
    """For outputConfig."""
    bars_sampling: bool = False
    """Whether temperature, top_p and top_k are refused beside it."""
    bars_choice: bool = False
    """Whether a tool may not be forced beside it."""


NO_THINKING = Thinking()


def thinking(body: Block, family: Family, limit: int | None, turns: list[Block]) -> Thinking:
    """What the client's `reasoning_effort` (or Anthropic's `thinking`) means to this family.

    Raises InvalidRequest for a `thinking` that Claude is to read and whose type is no text.
    """
    own, asked = body.get("thinking"), body.get("reasoning_effort")
    if own is None and asked is None:
        return NO_THINKING
    effort = str(asked or "none").lower()
    if family.reasoning in {"budget", "adaptive"}:
        return _claude(own if isinstance(own, dict) else None, effort, family, limit, turns)
    if effort not in _THREE:
        return NO_THINKING
    match family.reasoning:
        case "nova":
            # Nova refuses its highest effort beside a limit of tokens: the limit is kept.
            wanted = "medium" if _THREE[effort] == "high" and limit is not None else _THREE[effort]
            config = {"type": "enabled", "maxReasoningEffort": wanted}
            return Thinking({"reasoningConfig": config}, bars_sampling=wanted == "high")
        case "effort":
            return Thinking({"reasoning_effort": _THREE[effort]})
        case "openai":
            return Thinking({"reasoning": {"effort": effort}})
    return NO_THINKING


def _claude(own: Block | None, effort: str, family: Family, limit: int | None, turns: list[Block]) -> Thinking:
    kind = fields.text(own, "type", "thinking") if own is not None else None
    if (own is None and effort not in _BUDGETS) or (own is not None and kind not in {"enabled", "adaptive"}):
        return NO_THINKING
    if _lacks_thoughts(turns):
        # Claude refuses to think on where the call of a tool stands without the thoughts that led to it.
        return NO_THINKING
    if family.reasoning == "adaptive" and (own is None or kind == "adaptive"):
        told = _FOUR.get(effort)
        return Thinking({"thinking": {"type": "adaptive"}}, effort=told, bars_sampling=True, bars_choice=True)
    asked = own.get("budget_tokens") if own is not None else None
    if isinstance(asked, int):
        budget = asked if limit is None else min(asked, limit - 1)
    else:
        # Half of what may be said is for the answer, if thinking is not to end before it began.
        budget = _BUDGETS.get(effort, _BUDGETS["medium"])
        budget = budget if limit is None else min(budget, limit // 2)
    if budget < LEAST_BUDGET:
        return NO_THINKING  # there is no room to think
    config = {"type": "enabled", "budget_tokens": budget}
    return Thinking({"thinking": config}, bars_sampling=True, bars_choice=True)


def _lacks_thoughts(turns: list[Block]) -> bool:
    """Whether the tools whose results stand at the end were called without thoughts."""
    calling: list[Block] = next((turn["content"] for turn in reversed(turns) if turn["role"] == "assistant"), [])
    results = turns[-1]["role"] == "user" and "toolResult" in turns[-1]["content"][0]
    return results and not any("reasoningContent" in block for block in calling)
