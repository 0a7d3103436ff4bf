"""How the admin API answers: JSON, OpenAI's lists and its errors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson

from qlens import CallError, InvalidRequest, Reply


class Missing(CallError):
    """There is no such thing, or it is another tenant's: one answer, which does not repeat the question. 404."""

    status, type, code = 404, "invalid_request_error", "not_found"


class Conflict(CallError):
    """It cannot be done as things stand: 409."""

    status, type, code = 409, "invalid_request_error", "conflict"


def json(answer: object) -> Reply:
    """An answer that nobody on the way may keep."""
    return Reply(headers={"content-type": "application/json", "cache-control": "no-store"}, body=orjson.dumps(answer))


def listed(rows: Sequence[dict[str, Any]], id_: str, *, more: bool) -> Reply:
    """A part of a list: what `after` takes for the next part is `last_id`."""
    ids = [row[id_] for row in rows]
    first, last = (ids[0], ids[-1]) if ids else (None, None)
    return json({"object": "list", "data": rows, "first_id": first, "last_id": last, "has_more": more})


def no_place_to_begin() -> InvalidRequest:
    """The answer to an `after` that is not in the list."""
    return InvalidRequest("There is nothing in this list that is called as `after` says.", param="after")
