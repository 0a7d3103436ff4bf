"""How far the `params` of targets raise what a call can use there above what its own body says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import orjson
from attrs import evolve, frozen

from qlens.call import Call, Model
from qlens.dialects import Dialect, chat, messages, responses, texts

_LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens", "max_new_tokens")
"""The fields by which APIs bound what is generated."""
_CHOICES = ("n", "best_of")
_UNREAD = chat.SETTINGS | messages.SETTINGS | responses.SETTINGS | {*_LIMITS, *_CHOICES}


@frozen
class Raised:
    """What the params of one target ask for, as far as its model allows it; they are known at start-up."""

    output: int
    """The most tokens of one choice; 0: they do not say."""
    choices: Mapping[str, int]
    """How many choices, by field."""
    size: int
    """The bytes of what a model reads."""
    items: int


def raises_of(model: Model) -> tuple[Raised, ...]:
    """What the targets of a model may add to the bound of its calls; nothing for those that set other things."""
    return tuple(found for target in model.candidates if (found := _raised(target.params, model)) is not None)


def _raised(params: Mapping[str, Any], model: Model) -> Raised | None:
    output = max((value for name in _LIMITS if type(value := params.get(name)) is int), default=0)
    choices = {name: min(value, model.max_n) for name in _CHOICES if type(value := params.get(name)) is int}
    read = [value for name, value in params.items() if name not in _UNREAD and type(value) in {str, dict, list}]
    if not output and not choices and not read:
        return None
    if model.max_output_tokens is not None:
        output = min(output, model.max_output_tokens)
    size = sum(len(orjson.dumps(value, default=str)) for value in read)
    return Raised(output, choices, size, sum(len(value) if type(value) is list else 1 for value in read))


def raise_bound(call: Call, dialect: Dialect, raises: Sequence[Raised], most: int | None) -> None:
    """Let a call's bound hold at these targets too; `most` is that of one choice, None: nobody has limited it."""
    if not raises:
        return
    bound, size, items = call.bound, 0, 0
    output, meters = bound.output, bound.meters
    for each in raises:
        told = {**call.body, **each.choices}
        if dialect.GENERATES:
            if most is not None:
                choices = max(dialect.choices(told), *each.choices.values(), 1)
                output = max(output, max(most, each.output) * choices)
            size, items = max(size, each.size), max(items, each.items)
        elif each.choices:
            more = dialect.media(told)
            meters = {**meters, **{name: max(count, meters.get(name, 0)) for name, count in more.items()}}
    call.bound = evolve(bound, input=bound.input + size + items * texts.MESSAGE_TOKENS, output=output, meters=meters)
    call.estimated_input += -(-size // 3) + items * 4
