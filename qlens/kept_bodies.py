"""What clients say about conversations and vector stores: ids are opened wherever they may stand.

Bodies may name files and hold what a provider has encrypted; paths and queries name files by their sealed ids.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from qlens.bridges.responses_over_chat import thoughts
from qlens.call import Body
from qlens.errors import InvalidRequest, ObjectMissing
from qlens.object_ids import is_sealed
from qlens.objects import Claims, missing

_CURSORS = frozenset({"after", "before"})


def rest_of(path: str, params: Mapping[str, str], claims: Claims) -> str:
    """What stands behind an object's own id in a path, as the provider knows it; raises ObjectMissing for no id."""
    rest = path.partition("{id}")[2]
    for name, given in params.items():
        if given in {".", ".."}:
            raise ObjectMissing(f"No such {name}: {given}")  # it would lead to another path
        own = _file(given, claims) if name == "file" else given
        rest = rest.replace(f"{{{name}}}", quote(own, safe=""))
    return rest


def _file(given: str, claims: Claims) -> str:
    try:
        return claims.file(given, "file")
    except InvalidRequest:
        raise missing("file", given) from None


def query_of(asked: tuple[tuple[str, str], ...], claims: Claims, *, of_files: bool) -> tuple[tuple[str, str], ...]:
    """A query as the provider knows it: in a list of files, the cursors are ids of files."""
    if not of_files:
        return asked
    return tuple((name, claims.file(value, name) if name in _CURSORS else value) for name, value in asked)


def open_body(body: Body, claims: Claims) -> None:
    """Open the ids of files in a body, at any depth."""
    for name, child in body.items():
        if name == "file_id" and type(child) is str:
            body[name] = claims.file(child, name)
        elif name == "file_ids" and type(child) is list:
            body[name] = [claims.file(each, name) if type(each) is str else each for each in child]
        elif name not in {"attributes", "filters", "metadata"}:
            claims.files(child, name)


def open_items(items: Any, claims: Claims, provider: str) -> None:
    """Give back to a provider, in the items of a conversation, what it has encrypted itself."""
    for place, item in enumerate(items if type(items) is list else ()):
        content = item.get("encrypted_content") if type(item) is dict else None
        if type(content) is not str or not content:
            continue
        opened = claims.ids.open_content(claims.call.known.tenant, content)
        if (
            thoughts.is_closed(content)
            or (opened or (provider, ""))[0] != provider
            or (not opened and is_sealed(content))
        ):
            raise InvalidRequest(
                f"The encrypted content in items[{place}] was not made by the provider that keeps this conversation: "
                "leave the item out.",
                param=f"items[{place}].encrypted_content",
                code="invalid_encrypted_content",
            )
        if opened and opened[1]:
            item["encrypted_content"] = opened[1]
        elif opened:
            del item["encrypted_content"]  # the provider keeps the item under its id


def set_ends(body: Body) -> None:
    """Say in a list of files which are its first and its last, as the list itself does."""
    data = body.get("data")
    if type(data) is not list or not data or type(data[0]) is not dict or data[0].get("object") != "vector_store.file":
        return
    for name, each in (("first_id", data[0]), ("last_id", data[-1])):
        if type(body.get(name)) is str:
            body[name] = each.get("id")
