"""A real HTTP server that plays OpenAI as far as it keeps things: responses, files, batches and collections.

https://platform.openai.com/docs/api-reference/files
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from attrs import define, field

from qlens.testing.collections import Conversations, VectorStores
from qlens.testing.responses import FakeResponses, Refused
from qlens.testing.upstreams import Recorded, Scripted, serving

Body = dict[str, Any]

PURPOSES = frozenset({"assistants", "batch", "evals", "fine-tune", "user_data", "vision"})
ENDPOINTS = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/moderations", "/v1/responses"})
_BATCH_FIELDS = frozenset({"completion_window", "endpoint", "input_file_id", "metadata", "output_expires_after"})


@define(eq=False)
class FakeKeeper(FakeResponses):
    """A running server; made by `keeper()`. Responses and all else it answers as `responses_upstream()` does."""

    files: dict[str, Body] = field(factory=dict)
    contents: dict[str, bytes] = field(factory=dict)
    batches: dict[str, Body] = field(factory=dict)
    conversations: Conversations = field(factory=Conversations)
    vector_stores: VectorStores = field(init=False)

    def __attrs_post_init__(self) -> None:
        self.vector_stores = VectorStores(self._file)

    def keep_file(self, content: bytes, filename: str = "input.jsonl", purpose: str = "batch") -> Body:
        """Put a file into the account, as an upload does."""
        number = len(self.contents) + 1
        file: Body = {
            "id": f"file-{self.port:05d}{number:019d}",
            "object": "file",
            "bytes": len(content),
            "created_at": 1700000000 + number,
            "filename": filename,
            "purpose": purpose,
            "status": "processed",
        }
        self.files[file["id"]], self.contents[file["id"]] = file, content
        return file

    def complete(self, name: str, output: bytes, **more: Any) -> None:
        """Let a batch end with this output; `more` is what else it says: `usage`, `model`, `completed_at`."""
        written = self.keep_file(output, f"{name}_output.jsonl", "batch_output")
        self.batches[name].update(
            {"status": "completed", "output_file_id": written["id"], "completed_at": 1700000100, **more}
        )

    def answer(self, request: Recorded) -> Scripted:
        """What it says to a request, for fakes that keep the same things at other addresses."""
        return self._usual(request)

    def _usual(self, request: Recorded) -> Scripted:
        steps = [step for step in request.path.removeprefix("/v1").split("/") if step]
        try:
            if steps[:1] == ["files"]:
                return self._files(request, steps[1:])
            if steps[:1] == ["batches"]:
                return self._batches(request, steps[1:])
            if steps[:1] == ["conversations"]:
                return self.conversations.answer(request, steps[1:])
            if steps[:1] == ["vector_stores"]:
                return self.vector_stores.answer(request, steps[1:])
            if request.path == "/v1/models":
                return Scripted(body={"object": "list", "data": [{"id": "upstream", "object": "model"}]})
        except Refused as refused:
            return refused.answer()
        return super()._usual(request)

    # --- files ---------------------------------------------------------------------------------

    def _files(self, request: Recorded, steps: list[str]) -> Scripted:
        match request.method, steps:
            case "POST", []:
                return Scripted(body=self._upload(request))
            case "GET", []:
                wanted = request.query.get("purpose")
                found = [file for file in self.files.values() if wanted in {None, file["purpose"]}]
                return listed(found[::-1], request.query, 10_000)
            case "GET", [name]:
                return Scripted(body=self._file(name))
            case "DELETE", [name]:
                del self.files[self._file(name)["id"]]
                return Scripted(body={"id": name, "object": "file", "deleted": True})
            case "GET", [name, "content"]:
                media = {"content-type": "application/octet-stream"}
                return Scripted(body=self.contents[self._file(name)["id"]], headers=media)
        raise Refused(f"Unknown request URL: {request.method} {request.path}", code="unknown_url", status=404)

    def _file(self, name: str) -> Body:
        if name not in self.files:
            raise Refused(f"No such File object: {name}", "id", status=404)
        return self.files[name]

    def _upload(self, request: Recorded) -> Body:
        parts = {part.name: part for part in request.form}
        if not parts:
            raise Refused("The body is not a form.")
        for name in ("file", "purpose"):
            if name not in parts:
                raise Refused(f"Missing required parameter: '{name}'.", name, "missing_required_parameter")
        for name in parts:
            if name not in {"file", "purpose", "expires_after[anchor]", "expires_after[seconds]"}:
                raise Refused(f"Unknown parameter: '{name}'.", name, "unknown_parameter")
        purpose = parts["purpose"].text
        if purpose not in PURPOSES:
            raise Refused(f"'{purpose}' is not one of {sorted(PURPOSES)} - 'purpose'", "purpose")
        file = parts["file"]
        return self.keep_file(file.content, file.filename or "upload", purpose)

    # --- batches -------------------------------------------------------------------------------

    def _batches(self, request: Recorded, steps: list[str]) -> Scripted:
        match request.method, steps:
            case "POST", []:
                return Scripted(body=self._create_batch(request.body))
            case "GET", []:
                return listed(list(self.batches.values())[::-1], request.query, 100)
            case "GET", [name]:
                return Scripted(body=self._batch(name))
            case "POST", [name, "cancel"]:
                self._batch(name)["status"] = "cancelling"
                return Scripted(body=self._batch(name))
        raise Refused(f"Unknown request URL: {request.method} {request.path}", code="unknown_url", status=404)

    def _batch(self, name: str) -> Body:
        if name not in self.batches:
            raise Refused(f"No batch found with id '{name}'.", status=404)
        return self.batches[name]

    def _create_batch(self, body: Body) -> Body:
        for name in body:
            if name not in _BATCH_FIELDS:
                raise Refused(f"Unknown parameter: '{name}'.", name, "unknown_parameter")
        if body.get("completion_window") != "24h":
            raise Refused("Invalid value for 'completion_window'.", "completion_window", "invalid_value")
        if body.get("endpoint") not in ENDPOINTS:
            raise Refused("Invalid value for 'endpoint'.", "endpoint", "invalid_value")
        if self._file(body["input_file_id"])["purpose"] != "batch":
            raise Refused("Invalid purpose of the input file.", "input_file_id")
        if len(body.get("metadata") or {}) > 16:
            raise Refused("Invalid 'metadata': too many properties.", "metadata")
        number = len(self.batches) + 1
        batch: Body = {
            "id": f"batch_{self.port:05d}{number:027x}",
            "object": "batch",
            "endpoint": body["endpoint"],
            "errors": None,
            "input_file_id": body["input_file_id"],
            "completion_window": "24h",
            "status": "validating",
            "output_file_id": None,
            "error_file_id": None,
            "created_at": 1700000000 + number,
            "request_counts": {"total": 0, "completed": 0, "failed": 0},
            "metadata": body.get("metadata"),
        }
        self.batches[batch["id"]] = batch
        return batch


@asynccontextmanager
async def keeper() -> AsyncIterator[FakeKeeper]:
    """Serve all that it keeps on a free loopback port until the block is left."""
    async with serving(FakeKeeper()) as fake:
        yield fake


def listed(found: list[Body], query: Mapping[str, str], most: int) -> Scripted:
    """A page of a list, the newest first."""
    limit = int(query.get("limit", 20))
    if not 1 <= limit <= most:
        raise Refused(f"Invalid 'limit': expected 1 to {most}.", "limit", "invalid_value")
    ids = [each["id"] for each in found]
    if "after" in query and query["after"] not in ids:
        raise Refused(f"No such object: {query['after']}", "after", status=400)
    start = ids.index(query["after"]) + 1 if "after" in query else 0
    page = found[start : start + limit]
    ends = {"first_id": page[0]["id"] if page else None, "last_id": page[-1]["id"] if page else None}
    return Scripted(body={"object": "list", "data": page, **ends, "has_more": start + limit < len(found)})
