"""What the fake OpenAI keeps in collections: conversations with their items, vector stores with their files.

https://platform.openai.com/docs/api-reference/conversations
https://platform.openai.com/docs/api-reference/vector-stores
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from attrs import define, field

from qlens.testing.responses import Refused
from qlens.testing.upstreams import Recorded, Scripted

Body = dict[str, Any]

_STORE_FIELDS = frozenset({"chunking_strategy", "description", "expires_after", "file_ids", "metadata", "name"})
_FILE_FIELDS = frozenset({"attributes", "chunking_strategy", "file_id"})
_BATCH_FIELDS = frozenset({"attributes", "chunking_strategy", "file_ids", "files"})
_SEARCH_FIELDS = frozenset({"filters", "max_num_results", "query", "ranking_options", "rewrite_query"})
MOST_ITEMS = 20
"""How many items may be added to a conversation at a time."""


@define(eq=False)
class Conversations:
    """The conversations of one account."""

    kept: dict[str, Body] = field(factory=dict)
    items: dict[str, list[Body]] = field(factory=dict)

    def answer(self, request: Recorded, steps: list[str]) -> Scripted:
        """What is said to a request below `/conversations`."""
        match request.method, steps:
            case "POST", []:
                return Scripted(body=self._create(request.body))
            case "GET", [name]:
                return Scripted(body=self._find(name))
            case "POST", [name]:
                checked(request.body, {"metadata"}, ("metadata",))
                self._find(name)["metadata"] = request.body["metadata"]
                return Scripted(body=self._find(name))
            case "DELETE", [name]:
                del self.kept[self._find(name)["id"]]
                return Scripted(body={"id": name, "object": "conversation.deleted", "deleted": True})
            case "POST", [name, "items"]:
                self._find(name)
                checked(request.body, {"items"}, ("items",))
                return _page(self._add(name, request.body["items"]))
            case "GET", [name, "items"]:
                self._find(name)
                found = self.items[name]
                return _page(found if request.query.get("order") == "asc" else found[::-1])
            case "GET", [name, "items", item]:
                return Scripted(body=self._item(name, item))
            case "DELETE", [name, "items", item]:
                self.items[name].remove(self._item(name, item))
                return Scripted(body=self._find(name))
        raise unknown(request)

    def _create(self, body: Body) -> Body:
        checked(body, {"items", "metadata"})
        name = f"conv_{len(self.kept) + 1:048x}"
        self.kept[name] = {
            "id": name,
            "object": "conversation",
            "created_at": 1700000000,
            "metadata": body.get("metadata") or {},
        }
        self.items[name] = []
        self._add(name, body.get("items") or [])
        return self.kept[name]

    def _add(self, name: str, items: list[Body]) -> list[Body]:
        if len(items) > MOST_ITEMS:
            raise Refused(f"Invalid 'items': at most {MOST_ITEMS} at a time.", "items", "array_above_max_length")
        start = len(self.items[name])
        made = []
        for number, item in enumerate(items, start):
            content = item.get("content")
            parts = [{"type": "input_text", "text": content}] if isinstance(content, str) else content
            read = {"content": parts, "status": "completed"} if content is not None else {}
            made.append({"id": f"msg_{name[5:]}{number:04x}", "type": "message", **item, **read})
        self.items[name] += made
        return made

    def _find(self, name: str) -> Body:
        if name not in self.kept:
            raise Refused(f"Conversation with id '{name}' not found.", status=404)
        return self.kept[name]

    def _item(self, name: str, item: str) -> Body:
        self._find(name)
        found = next((each for each in self.items[name] if each["id"] == item), None)
        if found is None:
            raise Refused(f"Item with id '{item}' not found in conversation.", status=404)
        return found


@define(eq=False)
class VectorStores:
    """The vector stores of one account."""

    file: Callable[[str], Body]
    """A file of the account by its id; raises Refused when there is none."""
    kept: dict[str, Body] = field(factory=dict)
    files: dict[str, dict[str, Body]] = field(factory=dict)
    """Those in each store, by the id of the file."""
    batches: dict[str, Body] = field(factory=dict)

    def answer(self, request: Recorded, steps: list[str]) -> Scripted:
        """What is said to a request below `/vector_stores`."""
        match request.method, steps:
            case "POST", []:
                return Scripted(body=self._create(request.body))
            case "GET", []:
                return _page([*self.kept.values()][::-1])
            case "GET", [name]:
                return Scripted(body=self._find(name))
            case "POST", [name]:
                checked(request.body, {"expires_after", "metadata", "name"})
                self._find(name).update(request.body)
                return Scripted(body=self._find(name))
            case "DELETE", [name]:
                del self.kept[self._find(name)["id"]]
                return Scripted(body={"id": name, "object": "vector_store.deleted", "deleted": True})
            case "POST", [name, "search"]:
                return self._search(name, request.body)
            case _, [name, "files", *rest]:
                self._find(name)
                return self._files(request, name, rest)
            case _, [name, "file_batches", *rest]:
                self._find(name)
                return self._batches(request, name, rest)
        raise unknown(request)

    def _create(self, body: Body) -> Body:
        checked(body, _STORE_FIELDS)
        name = f"vs_{len(self.kept) + 1:024x}"
        self.files[name] = {}
        for file in body.get("file_ids") or ():
            self._put(name, file, {})
        self.kept[name] = {
            "id": name,
            "object": "vector_store",
            "created_at": 1700000000,
            "name": body.get("name"),
            "usage_bytes": 0,
            "file_counts": {"in_progress": 0, "completed": 0, "failed": 0, "cancelled": 0, "total": 0},
            "status": "completed",
            "metadata": body.get("metadata") or {},
        }
        return self.kept[name]

    def _find(self, name: str) -> Body:
        if name not in self.kept:
            raise Refused(f"Vector store with id '{name}' not found.", status=404)
        return self.kept[name]

    def _put(self, name: str, file: str, attributes: Any) -> Body:
        made = {
            "id": self.file(file)["id"],
            "object": "vector_store.file",
            "created_at": 1700000000,
            "usage_bytes": 1,
            "vector_store_id": name,
            "status": "completed",
            "last_error": None,
            "attributes": attributes or {},
        }
        self.files[name][file] = made
        return made

    def _search(self, name: str, body: Body) -> Scripted:
        self._find(name)
        checked(body, _SEARCH_FIELDS, ("query",))
        found = [
            {
                "file_id": file,
                "filename": self.file(file)["filename"],
                "score": 0.5,
                "attributes": {},
                "content": [{"type": "text", "text": "found"}],
            }
            for file in self.files[name]
        ]
        head = {"object": "vector_store.search_results.page", "search_query": [body["query"]], "next_page": None}
        return Scripted(body={**head, "data": found, "has_more": False})

    def _files(self, request: Recorded, name: str, steps: list[str]) -> Scripted:
        match request.method, steps:
            case "POST", []:
                checked(request.body, _FILE_FIELDS, ("file_id",))
                return Scripted(body=self._put(name, request.body["file_id"], request.body.get("attributes")))
            case "GET", []:
                return _page([*self.files[name].values()], request.query)
            case "GET", [file]:
                return Scripted(body=self._in(name, file))
            case "POST", [file]:
                checked(request.body, {"attributes"}, ("attributes",))
                self._in(name, file)["attributes"] = request.body["attributes"]
                return Scripted(body=self._in(name, file))
            case "DELETE", [file]:
                del self.files[name][self._in(name, file)["id"]]
                return Scripted(body={"id": file, "object": "vector_store.file.deleted", "deleted": True})
            case "GET", [file, "content"]:
                self._in(name, file)
                text = {"type": "text", "text": "found"}
                page = {"object": "vector_store.file_content.page", "data": [text], "has_more": False}
                return Scripted(body={**page, "next_page": None})
        raise unknown(request)

    def _in(self, name: str, file: str) -> Body:
        if file not in self.files[name]:
            raise Refused(f"No file found with id '{file}' in vector store '{name}'.", status=404)
        return self.files[name][file]

    def _batches(self, request: Recorded, name: str, steps: list[str]) -> Scripted:
        match request.method, steps:
            case "POST", []:
                checked(request.body, _BATCH_FIELDS)
                files = request.body.get("file_ids") or [each["file_id"] for each in request.body.get("files") or ()]
                for file in files:
                    self._put(name, file, {})
                number = len(self.batches) + 1
                made: Body = {
                    "id": f"vsfb_{number:024x}",
                    "object": "vector_store.file_batch",
                    "created_at": 1700000000,
                    "vector_store_id": name,
                    "status": "completed",
                    "file_counts": {"in_progress": 0, "completed": 1, "failed": 0, "cancelled": 0, "total": 1},
                }
                self.batches[made["id"]] = made
                return Scripted(body=made)
            case "GET", [batch]:
                return Scripted(body=self._batch(batch))
            case "POST", [batch, "cancel"]:
                self._batch(batch)["status"] = "cancelled"
                return Scripted(body=self._batch(batch))
            case "GET", [batch, "files"]:
                self._batch(batch)
                return _page([*self.files[name].values()], request.query)
        raise unknown(request)

    def _batch(self, name: str) -> Body:
        if name not in self.batches:
            raise Refused(f"Vector store file batch with id '{name}' not found.", status=404)
        return self.batches[name]


def checked(body: Any, known: set[str] | frozenset[str], required: tuple[str, ...] = ()) -> None:
    """Refuse a body with a field that is not known, or without one that is required."""
    for name in body:
        if name not in known:
            raise Refused(f"Unknown parameter: '{name}'.", name, "unknown_parameter")
    for name in required:
        if name not in body:
            raise Refused(f"Missing required parameter: '{name}'.", name, "missing_required_parameter")


def unknown(request: Recorded) -> Refused:
    """The answer for a path that is not there."""
    return Refused(f"Unknown request URL: {request.method} {request.path}", code="unknown_url", status=404)


def _page(found: list[Body], query: Mapping[str, str] | None = None) -> Scripted:
    ids = [each["id"] for each in found]
    after = (query or {}).get("after")
    if after is not None and after not in ids:
        raise Refused(f"No such object: {after}", "after")
    page = found[ids.index(after) + 1 :] if after is not None else found
    ends = {"first_id": page[0]["id"] if page else None, "last_id": page[-1]["id"] if page else None}
    return Scripted(body={"object": "list", "data": page, **ends, "has_more": False})
