"""How much a model is to think, told in its own way."""

from __future__ import annotations

from typing import Any

from attrs import field, frozen

from qlens.bridges.claude import Claude
from qlens.dialects import Body
from qlens.dialects.messages import BUDGETED, LEAST_BUDGET, Chosen

Block = dict[str, Any]

_BUDGETS = {"minimal": 1024, "low": 1024, "medium": 4096, "high": 16384, "xhigh": 32768, "max": 32768}
_NEAREST = {"minimal": "low", "xhigh": "high"}


@frozen
class Thinking:
    """What a request says about thinking. With a `config`, neither sampling nor a forced tool is allowed."""

    config: Block | None = None
    output: Block = field(factory=dict)
    """For output_config."""


NO_THINKING = Thinking()


def thinking(body: Body, model: Claude, limit: int, turns: list[Block]) -> Thinking:
    """What the client's `reasoning_effort` means to this model; the field `thinking` of messages is taken as it is."""
    own, effort = body.get("thinking"), str(body.get("reasoning_effort") or "none").lower()
    if isinstance(own, dict):
        BUDGETED(own, (None, "thinking"))
        told = own.get("type") != "disabled"
        if not told or (own.get("type") == "enabled" and "budget_tokens" in own):
            return Thinking(own if told else None)
    elif effort not in _BUDGETS:
        return NO_THINKING
    if model.thinking == "none" or _lacks_thoughts(turns):
        # A model refuses to think on where the call of a tool stands without the thoughts that led to it.
        return NO_THINKING
    if model.thinking == "adaptive":
        said = effort if effort in model.efforts else _NEAREST.get(effort)
        return Thinking({"type": "adaptive"}, {"effort": said} if said else {})
    # Half of what may be said is for the answer, if thinking is not to end before it began.
    budget = min(_BUDGETS.get(effort, _BUDGETS["medium"]), limit // 2)
    if budget < LEAST_BUDGET:
        return NO_THINKING  # there is no room to think
    return Thinking(Chosen({"type": "enabled", "budget_tokens": budget}))


def _lacks_thoughts(turns: list[Block]) -> bool:
    """Whether the tools whose results stand at the end were called without thoughts."""
    calling: list[Block] = next((turn["content"] for turn in reversed(turns) if turn["role"] == "assistant"), [])
    results = turns[-1]["role"] == "user" and turns[-1]["content"][0]["type"] == "tool_result"
    return results and not any(block["type"] in {"thinking", "redacted_thinking"} for block in calling)
