"""What the streams of chat and of completions have in common: events with choices, and how they add up."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from qlens import usage as usages
from qlens.dialects import Body

Choice = dict[str, Any]

_EVERY_EVENT = ("id", "object", "created", "model", "system_fingerprint", "service_tier")
_NOT_EXTRA = frozenset({*_EVERY_EVENT, "choices", "usage", "obfuscation", "error"})
_OWN_FIELDS = frozenset({"index", "delta", "message", "text", "finish_reason", "logprobs"})


def choices_of(body: Body) -> list[tuple[int, int, Choice]]:
    """The choices of a body or an event: position, index and the choice itself; what is no choice is left out."""
    choices = body.get("choices")
    found: list[tuple[int, int, Choice]] = []
    for position, choice in enumerate(choices if type(choices) is list else ()):
        if type(choice) is dict:
            index = choice.get("index")
            found.append((position, index if type(index) is int else 0, choice))
    return found


def finish(body: Body) -> str | None:
    """The first choice's finish reason."""
    try:
        reason = body["choices"][0]["finish_reason"]
    except (IndexError, KeyError, TypeError):  # there is none, or what stands first is no choice
        reason = next((choice.get("finish_reason") for _, _, choice in choices_of(body)), None)
    return reason if type(reason) is str else None


def ends(event: Body) -> list[int]:
    """The choices that an event finishes."""
    return [index for _, index, choice in choices_of(event) if choice.get("finish_reason")]


# --- an answer into events ---------------------------------------------------------------------


def head(body: Body, kind: str) -> Body:
    """What every event of a stream repeats."""
    shared = {name: body[name] for name in _EVERY_EVENT if name in body}
    return {**shared, "object": kind}


def extras(body: Body) -> Body:
    """Fields beside OpenAI's own, such as Azure's prompt_filter_results: the first event carries them."""
    if _NOT_EXTRA.issuperset(body):
        return {}
    return {name: value for name, value in body.items() if name not in _NOT_EXTRA}


def choice_extras(choice: Choice) -> Choice:
    """Fields of a choice beside OpenAI's own, such as Azure's content_filter_results: its last event carries them."""
    if _OWN_FIELDS.issuperset(choice):
        return {}
    return {name: value for name, value in choice.items() if name not in _OWN_FIELDS}


def events_of(body: Body, kind: str, choices: Iterable[Choice]) -> Iterator[Body]:
    """One event for each of these parts of choices, then the usage event if there is usage."""
    every, more = head(body, kind), extras(body)
    for choice in choices:
        yield {**every, **more, "choices": [choice]}
        more = {}
    if body.get("usage"):
        yield {**every, **more, "choices": [], "usage": body["usage"]}


# --- events into an answer ---------------------------------------------------------------------


def gathered(events: Iterable[Body]) -> tuple[Body, dict[int, list[Choice]]]:
    """What all events share, added up, and each choice's parts in their order."""
    body: Body = {}
    parts: dict[int, list[Choice]] = {}
    for event in events:
        for name in _EVERY_EVENT:
            # Azure's first event has an empty id and model and the year 1970: the first real value counts.
            if name in event and not body.get(name):
                body[name] = event[name]
        if more := extras(event):
            body.update({name: value for name, value in more.items() if value is not None})
        if type(event.get("usage")) is dict:
            body["usage"] = larger(body.get("usage"), event["usage"])
        for _, index, choice in choices_of(event):
            parts.setdefault(index, []).append(choice)
    return body, parts


def around(index: int, parts: list[Choice]) -> Choice:
    """A choice made of its parts, without its text."""
    choice: Choice = {"index": index, "finish_reason": None}
    for part in parts:
        choice["finish_reason"] = part.get("finish_reason") or choice["finish_reason"]
        for name, value in choice_extras(part).items():
            choice[name] = _later(choice.get(name), value)
    if any("logprobs" in part for part in parts):
        choice["logprobs"] = joined([part.get("logprobs") for part in parts])
    return choice


def _later(old: Any, new: Any) -> Any:
    if type(old) is dict and type(new) is dict:
        return {**old, **new}
    return old if new is None else new


def joined(values: Iterable[Any]) -> Any:
    """The parts of one value: texts and lists put end to end, objects field by field; of anything else the last."""
    real = [value for value in values if value is not None]
    kinds = set(map(type, real))
    if kinds == {str}:
        return "".join(real)
    if kinds == {list}:
        return [item for part in real for item in part]
    if kinds == {dict}:
        names = dict.fromkeys(name for part in real for name in part)
        return {name: joined(part.get(name) for part in real) for name in names}
    return real[-1] if real else None


def larger(old: Body | None, new: Body) -> Body:
    """The larger of two running totals, as they are written; prompt and completion are each taken as one."""
    if old is None:
        return new
    one, other = usages.from_openai(old), usages.from_openai(new)
    if one is None or other is None:
        return new if one is None else old
    both = {**old, **{name: value for name, value in new.items() if value is not None}}
    stays = {"prompt": usages.prompt_stays(one, other), "completion": usages.completion_stays(one, other)}
    for side, is_kept in stays.items():
        for name in (f"{side}_tokens", f"{side}_tokens_details"):
            if (said := (old if is_kept else new).get(name)) is not None:
                both[name] = said
            else:
                both.pop(name, None)
    if any(stays.values()) or new.get("total_tokens") is None:
        both["total_tokens"] = usages.larger(one, other).total
    return both
