"""OpenAI's API of an organization's usage and costs, answered from the ledger.

https://platform.openai.com/docs/api-reference/usage
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import orjson
from attrs import evolve, frozen

from qlens import Call, InvalidRequest, Reply, usd
from qlens_plugins.cost.ledger import kept, parameters, sums
from qlens_plugins.cost.ledger.answers import reply, written
from qlens_plugins.cost.ledger.reader import Reader
from qlens_plugins.cost.ledger.rollups import DAY, HOUR
from qlens_plugins.cost.ledger.rows import BUCKETS
from qlens_plugins.cost.ledger.sums import LAST_SECOND, Group, Question, Sums
from qlens_plugins.cost.ledger.view import Where, narrowed

Result = dict[str, Any]
Answer = Callable[[Call, Reader, Where], Awaitable[Reply]]

_WIDTHS = {"1m": (60, 60, 1440), "1h": (HOUR, 24, 168), "1d": (DAY, 7, 31)}
"""Seconds of a bucket, how many buckets a page has, and how many it may have."""
_COSTS_WIDTHS = {"1d": (DAY, 7, 180)}
_FIELDS = {
    "project_id": "project_id",
    "user_id": "subject",
    "api_key_id": "key_id",
    "model": "model",
    "service_tier": "tier",
    "source": "operation",
    "line_item": "model",
    "batch": sums.BATCH,
}
"""The ledger's dimension behind each of OpenAI's."""
_SOURCES = {"images": "image.generation", "image_edits": "image.edit", "image_variations": "image.variation"}
_SAME = {"api_source": "unlabeled"}
"""What is the same for all calls of a gateway."""


def _completions(found: Sums) -> Result:
    written = found["cache_write_5m"] + found["cache_write_1h"]
    fresh = found["input"] + found["audio_in"]
    return {
        "input_tokens": fresh + found["cached_input"] + written,
        "output_tokens": found["output"] + found["reasoning"] + found["audio_out"],
        "input_cached_tokens": found["cached_input"],
        "input_cache_write_tokens": written,
        "input_uncached_tokens": fresh,
        "input_audio_tokens": found["audio_in"],
        "output_audio_tokens": found["audio_out"],
        "num_model_requests": found["calls"],
    }


def _inputs(found: Sums) -> Result:
    return {"input_tokens": _completions(found)["input_tokens"], "num_model_requests": found["calls"]}


@frozen
class Kind:
    """One of OpenAI's paths."""

    result: str
    """The kind of result, in the names of its objects."""
    operations: tuple[str, ...] | None
    """The operations it is about; None: all."""
    fields: Callable[[Sums], Result]
    """A result's numbers, of the sums in `names`."""
    names: tuple[str, ...]
    by: tuple[str, ...]
    """What results can be grouped by."""
    widths: Mapping[str, tuple[int, int, int]] = _WIDTHS
    filters: tuple[str, ...] = ("project_ids", "user_ids", "api_key_ids", "models")


def _costs(found: Sums) -> Result:
    picos = found.cost_picos
    # Its digits, which a float could not hold.
    amount = None if picos is None else {"value": orjson.Fragment(usd(picos)), "currency": "usd"}
    return {"amount": amount, "quantity": None, "quantity_unit": None, "unpriced_calls": found["unpriced"]}


_WHO = ("project_id", "user_id", "api_key_id", "model")
_TOKENS = ("calls", *BUCKETS)
_CHAT = (
    "chat",
    "completions",
    "responses",
    "messages",
    "realtime",
    "batch_chat",
    "batch_completions",
    "batch_responses",
)


def _metered(path: str, operations: tuple[str, ...], name: str) -> Kind:
    """A path about what is not counted in tokens."""

    def fields(found: Sums) -> Result:
        return {name: found[name], "num_model_requests": found["calls"]}

    return Kind(f"usage.{path}", operations, fields, ("calls", name), _WHO)


def _empty(result: str, by: tuple[str, ...] = ("project_id",), filters: tuple[str, ...] = ("project_ids",)) -> Kind:
    """A path about what the ledger does not count: it is there for tools that ask for all."""
    return Kind(result, (), _inputs, (), by, filters=filters)


KINDS = {
    "usage/completions": Kind(
        "usage.completions",
        _CHAT,
        _completions,
        _TOKENS,
        (*_WHO, "batch", "service_tier", "api_source"),
        filters=("project_ids", "user_ids", "api_key_ids", "models", "batch"),
    ),
    "usage/embeddings": Kind("usage.embeddings", ("embeddings", "batch_embeddings"), _inputs, _TOKENS, _WHO),
    "usage/moderations": Kind("usage.moderations", ("moderations", "batch_moderations"), _inputs, _TOKENS, _WHO),
    "usage/images": evolve(
        _metered("images", tuple(_SOURCES), "images"),
        by=(*_WHO, "source"),
        filters=("project_ids", "user_ids", "api_key_ids", "models", "sources"),
    ),
    "usage/audio_speeches": _metered("audio_speeches", ("speech",), "characters"),
    "usage/audio_transcriptions": _metered("audio_transcriptions", ("transcriptions", "translations"), "seconds"),
    "usage/vector_stores": _empty("usage.vector_stores"),
    "usage/code_interpreter_sessions": _empty("usage.code_interpreter_sessions"),
    "usage/web_search_calls": _empty(
        "usage.web_search_calls",
        (*_WHO, "context_level", "api_source"),
        ("project_ids", "user_ids", "api_key_ids", "models", "context_levels"),
    ),
    "usage/file_search_calls": _empty(
        "usage.file_search_calls",
        ("project_id", "user_id", "api_key_id", "vector_store_id"),
        ("project_ids", "user_ids", "api_key_ids", "vector_store_ids"),
    ),
    "usage/decisions": _empty(
        "usage.decisions",
        (*_WHO, "batch", "service_tier", "api_source"),
        ("project_ids", "user_ids", "api_key_ids", "models", "batch"),
    ),
    "costs": Kind(
        "costs",
        None,
        _costs,
        ("calls", "unpriced", "cost"),
        ("project_id", "user_id", "line_item", "api_key_id", "api_source"),
        _COSTS_WIDTHS,
        ("project_ids", "user_ids", "api_key_ids", "line_items"),
    ),
}
"""By path, below /v1/organization."""
_FILTERS = {
    "project_ids": "project_id",
    "user_ids": "user_id",
    "api_key_ids": "api_key_id",
    "models": "model",
    "line_items": "line_item",
}


@frozen
class Page:
    """The buckets of one answer."""

    start: int
    """Where it begins: at the time that was asked for, or at the beginning of a bucket."""
    end: int
    last: int
    """Where the last page ends."""
    width: int

    def buckets(self) -> list[tuple[int, int]]:
        """The beginning and end of each, aligned to UTC; the first and the last may be a part of one."""
        first = self.start // self.width * self.width
        return [
            (max(start, self.start), min(start + self.width, self.end)) for start in range(first, self.end, self.width)
        ]

    @property
    def next(self) -> str | None:
        """What `page` takes for the next one. It says where the last page ends, so that a walk through pages does."""
        return None if self.end >= self.last else f"page_{self.end}_{self.last}"


async def answer(kind: Kind, call: Call, reader: Reader, own: Where) -> Reply:
    """Answer one of OpenAI's paths, with what the caller may see."""
    asked = parameters.asked(call, _ones(kind), _lists(kind))
    page, by = _page(asked, kind), asked.get("group_by", ())
    question = _question(kind, asked, page, own)
    if question is None:
        return reply(_written(kind, by, page, {}))
    return reply(await reader.ask(lambda database: _written(kind, by, page, kept.read(database, question))))


def _written(kind: Kind, by: tuple[str, ...], page: Page, found: sums.Found) -> bytes:
    """The page as JSON."""
    results: dict[int, list[Result]] = {}
    for (start, group), added in sorted(found.items(), key=lambda item: item[0]):
        results.setdefault(start, []).append(_result(kind, by, group, added))
    buckets = [
        {
            "object": "bucket",
            "start_time": start,
            "end_time": end,
            "results": results.get(start // page.width * page.width, []),
        }
        for start, end in page.buckets()
    ]
    return written({"object": "page", "data": buckets, "has_more": page.next is not None, "next_page": page.next})


def _ones(kind: Kind) -> dict[str, parameters.Reader]:
    most = max(width[2] for width in kind.widths.values())
    ones = {
        "start_time": parameters.time,
        "end_time": parameters.time,
        "bucket_width": parameters.one_of(kind.widths),
        "limit": parameters.number(1, most),
        "page": parameters.text,
    }
    return {**ones, "batch": parameters.yes_or_no} if "batch" in kind.filters else ones


def _lists(kind: Kind) -> dict[str, parameters.Reader]:
    lists: dict[str, parameters.Reader] = {name: parameters.texts for name in kind.filters if name != "batch"}
    if "sources" in lists:
        lists["sources"] = parameters.some_of(_SOURCES.values())
    return {"group_by": parameters.some_of(kind.by), **lists}


def _page(asked: Mapping[str, Any], kind: Kind) -> Page:
    start: int = parameters.required(asked, "start_time")
    said = asked.get("bucket_width", "1d")
    width, usual, most = kind.widths[said]
    limit = asked.get("limit", usual)
    if limit > most:
        raise parameters.wrong("limit", f"must be a whole number from 1 to {most} with buckets of {said}")
    last = asked.get("end_time")
    if last is not None and last <= start:
        raise parameters.wrong("end_time", "must be after `start_time`")
    if "page" in asked:
        start, last = _place(asked["page"], start, last)
    elif last is None:
        # The bucket of the present moment, whole.
        last = max(int(time.time()), start) // width * width + width
    return Page(start, min(start // width * width + limit * width, last), last, width)


def _place(page: str, start: int, last: int | None) -> tuple[int, int]:
    """Where a page begins, and where the last one ends; raises InvalidRequest for what no answer said."""
    word, *places = page.split("_")
    numbers = [int(place) for place in places if place.isascii() and place.isdigit() and len(place) <= 16]
    if word == "page" and len(numbers) == len(places) == 2:
        next_, end = numbers
        if start < next_ < end <= LAST_SECOND + DAY and last in (None, end):
            return next_, end
    raise InvalidRequest(
        "`page` is no `next_page` of an answer to these parameters.", param="page", code="invalid_value"
    )


def _question(kind: Kind, asked: Mapping[str, Any], page: Page, own: Where) -> Question | None:
    """What is to be added up; None when there can be nothing."""
    if kind.operations == ():
        return None
    where = {_FIELDS[_FILTERS[name]]: asked[name] for name in _FILTERS if name in asked}
    if "batch" in asked:
        where[sums.BATCH] = ("true",) if asked["batch"] else ("",)
    operations = kind.operations
    if "sources" in asked:
        operations = tuple(name for name, source in _SOURCES.items() if source in asked["sources"])
    if operations is not None:
        where["operation"] = operations
    by = tuple(dict.fromkeys(_FIELDS[name] for name in asked.get("group_by", ()) if name not in _SAME))
    return Question(page.start, page.end, page.width, by, narrowed(own, where), kind.names)


def _result(kind: Kind, by: tuple[str, ...], group: Group, found: Sums) -> Result:
    dimensions = tuple(dict.fromkeys(_FIELDS[name] for name in by if name not in _SAME))
    values = dict(zip(dimensions, group, strict=True))
    result = {"object": f"organization.{kind.result}.result", **kind.fields(found)}
    for name in kind.by:
        if name not in by:
            result[name] = None
        elif name in _SAME:
            result[name] = _SAME[name]
        else:
            value = values[_FIELDS[name]] or None
            result[name] = _SOURCES.get(value or "") if name == "source" else value
            if name == sums.BATCH:
                result[name] = value == "true"
    return result
