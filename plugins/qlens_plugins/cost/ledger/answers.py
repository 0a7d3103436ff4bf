"""How questions about usage are answered."""

from __future__ import annotations

from typing import Any

import orjson

from qlens import CallError, Reply


class NothingThere(CallError):
    """There is no such call, or it is another's: one answer, which does not repeat the question. 404."""

    status, type, code = 404, "invalid_request_error", "not_found"


def json(found: object) -> Reply:
    """An answer that nobody on the way may keep."""
    return reply(written(found))


def reply(body: bytes) -> Reply:
    """The same of JSON that is written already: a large answer is made on the thread that reads, beside the calls."""
    return Reply(headers={"content-type": "application/json", "cache-control": "no-store"}, body=body)


def written(found: object) -> bytes:
    """JSON, with whole numbers of any size."""
    try:
        return orjson.dumps(found)
    except TypeError:
        return orjson.dumps(_digits(found))  # it takes 64 bits as they are


def _digits(found: Any) -> Any:
    if isinstance(found, dict):
        return {name: _digits(value) for name, value in found.items()}
    if isinstance(found, list):
        return [_digits(value) for value in found]
    return orjson.Fragment(str(found)) if type(found) is int else found
