"""The table of operations: the only place where one is declared."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Generic, Literal, TypeVar
from urllib.parse import unquote

from attrs import define, field, frozen

from qlens.errors import ModelNotFound, UnknownPath, WrongMethod
from qlens.passthrough import METHODS

if TYPE_CHECKING:
    from qlens.call import Call, Model
    from qlens.dialects import Body
    from qlens.models import Models


Kind = Literal["", "response", "file", "batch", "conversation", "vector_store"]
"""What a provider keeps for clients."""


@frozen
class Operation:
    """One thing clients can ask for, and how it runs."""

    name: str
    method: str
    path: str
    """A `{parameter}` stands for one segment; the last of them for all that are left, slashes included."""
    runs: Literal["full", "affinity", "count", "local", "session"]
    """full: all stages; affinity: bound to the target that made an object; count: as full, or answered by the gateway
    where no target can; local: answered by the gateway; session: a WebSocket, without the stages for bodies."""
    dialect: str = ""
    body: Literal["json", "form", "none"] = "none"
    streams: bool = False
    meters: tuple[str, ...] = ()
    kind: Kind = ""
    """What an operation with affinity is about."""
    local: Callable[[Call, Models], Body] | None = field(default=None, repr=False)

    @property
    def paths(self) -> tuple[str, ...]:
        """Where it is served: at OpenAI's path, and at Azure's two surfaces, so that Azure's clients find it.

        `{deployment}` is the name of the model asked for; it wins over the body's.
        """
        if self.dialect in {"count_tokens", "messages"} or self.name == "passthrough":
            return (self.path,)  # no API of OpenAI's or Azure's
        place = self.path.removeprefix("/v1")
        classic = "/openai/deployments/{deployment}" if place in _OF_DEPLOYMENTS else "/openai"
        return self.path, f"/openai/v1{place}", classic + place


# As Azure's SDK builds its URLs; all else stands under /openai itself. The api-version in the query says nothing here.
_OF_DEPLOYMENTS = {
    *("/chat/completions", "/completions", "/embeddings", "/images/generations", "/images/edits"),
    *("/audio/transcriptions", "/audio/translations", "/audio/speech"),
}


def _card(model: Model) -> Body:
    return {"id": model.name, "object": "model", "created": 0, "owned_by": "qlens"}


def _list_models(call: Call, models: Models) -> Body:
    """OpenAI's list of models, of those the caller may use."""
    allowed = [_card(model) for model in models.listed() if call.known.may_use(model.name)]
    return {"object": "list", "data": allowed}


def _retrieve_model(call: Call, models: Models) -> Body:
    """One model of the list; one that is only matched by a wildcard is found by its own name."""
    name = call.path_params["id"]
    model = models.resolve(name)
    if model is None or not call.known.may_use(name):
        raise model_not_found(name)
    return {**_card(model), "id": name}


def model_not_found(name: str) -> ModelNotFound:
    """The one answer for a model that does not exist and for one that the caller may not use."""
    return ModelNotFound(f"The model `{name[:256]}` does not exist or you do not have access to it.", param="model")


def unknown_path(method: str, path: str) -> UnknownPath:
    """The one answer for a path that does not exist and for one that may not pass through."""
    return UnknownPath(f"Invalid URL ({shown(method)} {shown(path)})")


def shown(text: str, most: int = 200) -> str:
    """A piece of a request that is safe to show: short, printable."""
    return "".join(char if char.isprintable() else "?" for char in text[:most])


_IMAGES = (
    Operation("images", "POST", "/v1/images/generations", "full", "images", "json", True, ("images", "tokens")),
    Operation("image_edits", "POST", "/v1/images/edits", "full", "image_edits", "form", True, ("images", "tokens")),
    Operation(
        "image_variations", "POST", "/v1/images/variations", "full", "image_variations", "form", False, ("images",)
    ),
)
_AUDIO = (
    Operation("speech", "POST", "/v1/audio/speech", "full", "speech", "json", False, ("characters", "tokens")),
    Operation(
        "transcriptions",
        "POST",
        "/v1/audio/transcriptions",
        "full",
        "transcriptions",
        "form",
        True,
        ("seconds", "tokens"),
    ),
    Operation(
        "translations", "POST", "/v1/audio/translations", "full", "translations", "form", False, ("seconds", "tokens")
    ),
)


def _about(kind: Kind, folder: str, *asked: tuple[str, str, str, bool]) -> tuple[Operation, ...]:
    """Operations about what a provider keeps in a folder: name, method, path in the folder, whether there is a body."""
    return tuple(
        Operation(name, method, f"/v1/{folder}{rest}", "affinity", body="json" if has_body else "none", kind=kind)
        for name, method, rest, has_body in asked
    )


_CONVERSATIONS = _about(
    "conversation",
    "conversations",
    ("conversation_item", "GET", "/{id}/items/{item}", False),
    ("conversation_item_delete", "DELETE", "/{id}/items/{item}", False),
    ("conversation_items", "GET", "/{id}/items", False),
    ("conversation_items_create", "POST", "/{id}/items", True),
    ("conversation", "GET", "/{id}", False),
    ("conversation_update", "POST", "/{id}", True),
    ("conversation_delete", "DELETE", "/{id}", False),
    ("conversation_create", "POST", "", True),
)
_VECTOR_STORES = _about(
    "vector_store",
    "vector_stores",
    ("vector_store_file_content", "GET", "/{id}/files/{file}/content", False),
    ("vector_store_file", "GET", "/{id}/files/{file}", False),
    ("vector_store_file_update", "POST", "/{id}/files/{file}", True),
    ("vector_store_file_delete", "DELETE", "/{id}/files/{file}", False),
    ("vector_store_batch_cancel", "POST", "/{id}/file_batches/{batch}/cancel", False),
    ("vector_store_batch_files", "GET", "/{id}/file_batches/{batch}/files", False),
    ("vector_store_batch", "GET", "/{id}/file_batches/{batch}", False),
    ("vector_store_batch_create", "POST", "/{id}/file_batches", True),
    ("vector_store_files", "GET", "/{id}/files", False),
    ("vector_store_file_create", "POST", "/{id}/files", True),
    ("vector_store_search", "POST", "/{id}/search", True),
    ("vector_store", "GET", "/{id}", False),
    ("vector_store_update", "POST", "/{id}", True),
    ("vector_store_delete", "DELETE", "/{id}", False),
    ("vector_stores", "GET", "", False),
    ("vector_store_create", "POST", "", True),
)
OPERATIONS = (
    Operation("chat", "POST", "/v1/chat/completions", "full", "chat", "json", True, ("tokens",)),
    Operation("completions", "POST", "/v1/completions", "full", "completions", "json", True, ("tokens",)),
    Operation("responses", "POST", "/v1/responses", "full", "responses", "json", True, ("tokens",)),
    Operation("input_tokens", "POST", "/v1/responses/input_tokens", "count", "input_tokens", "json"),
    Operation("compaction", "POST", "/v1/responses/compact", "full", "compaction", "json", meters=("tokens",)),
    Operation("messages", "POST", "/v1/messages", "full", "messages", "json", True, ("tokens",)),
    Operation("count_tokens", "POST", "/v1/messages/count_tokens", "count", "count_tokens", "json"),
    Operation("embeddings", "POST", "/v1/embeddings", "full", "embeddings", "json", False, ("tokens",)),
    Operation("moderations", "POST", "/v1/moderations", "full", "moderations", "json", False, ("tokens",)),
    Operation("rerank", "POST", "/v1/rerank", "full", "rerank", "json", False, ("queries", "tokens")),
    *_IMAGES,
    *_AUDIO,
    Operation("realtime", "GET", "/v1/realtime", "session", meters=("tokens",)),
    # Of two patterns the longer comes first: a last parameter takes all segments that are left.
    Operation("response_input_items", "GET", "/v1/responses/{id}/input_items", "affinity", kind="response"),
    Operation("response_cancel", "POST", "/v1/responses/{id}/cancel", "affinity", kind="response"),
    Operation("response", "GET", "/v1/responses/{id}", "affinity", kind="response"),
    Operation("response_delete", "DELETE", "/v1/responses/{id}", "affinity", kind="response"),
    Operation("file_upload", "POST", "/v1/files", "affinity", "uploads", "form", kind="file"),
    Operation("files", "GET", "/v1/files", "affinity", kind="file"),
    Operation("file_content", "GET", "/v1/files/{id}/content", "affinity", kind="file"),
    Operation("file", "GET", "/v1/files/{id}", "affinity", kind="file"),
    Operation("file_delete", "DELETE", "/v1/files/{id}", "affinity", kind="file"),
    Operation("batches", "GET", "/v1/batches", "affinity", kind="batch"),
    Operation("batch_create", "POST", "/v1/batches", "affinity", body="json", kind="batch"),
    Operation("batch_cancel", "POST", "/v1/batches/{id}/cancel", "affinity", kind="batch"),
    Operation("batch", "GET", "/v1/batches/{id}", "affinity", kind="batch"),
    *_CONVERSATIONS,
    *_VECTOR_STORES,
    *(Operation("passthrough", method, "/v1/providers/{provider}/{path}", "affinity") for method in METHODS),
    Operation("models", "GET", "/v1/models", "local", local=_list_models),
    Operation("model", "GET", "/v1/models/{id}", "local", local=_retrieve_model),
)

T = TypeVar("T")


@define(eq=False)
class Paths(Generic[T]):
    """Finds what is served at a method and a raw path; never looks at the Host header."""

    _exact: dict[str, dict[str, T]] = field(factory=dict)
    _patterns: dict[tuple[str, ...], tuple[tuple[str, ...], dict[str, T]]] = field(factory=dict)
    """By their shapes, in their order: patterns that differ in the names of parameters alone are the same."""

    @classmethod
    def of(cls, entries: Iterable[tuple[str, str, T]]) -> Paths[T]:
        """A table of (method, path, what)."""
        paths = cls()
        for method, path, what in entries:
            paths.add(method, path, what)
        return paths

    def add(self, method: str, path: str, what: T) -> None:
        """Serve a path; ValueError when it is taken."""
        methods = self._methods(path)
        if method in methods:
            raise ValueError(f"{method} {path} is taken")
        methods[method] = what

    def _methods(self, path: str) -> dict[str, T]:
        if "{" not in path:
            return self._exact.setdefault(path, {})
        parts = tuple(path.split("/"))
        return self._patterns.setdefault(_shape(parts), (parts, {}))[1]

    def exactly(self, method: str, path: str) -> T | None:
        """What is served at a path without parameters; None: `find` knows more."""
        methods = self._exact.get(path)
        return None if methods is None else methods.get(method)

    def find(self, method: str, path: str) -> tuple[T, Mapping[str, str]]:
        """What is served at a path, with the path's parameters; raises UnknownPath or WrongMethod."""
        methods, params = self._exact.get(path), {}
        if methods is None:
            given = path.split("/")
            for parts, candidates in self._patterns.values():
                found = _match(parts, given)
                if found is not None:
                    methods, params = candidates, found
                    break
        if methods is None:
            raise unknown_path(method, path)
        if method not in methods:
            allowed = ", ".join(sorted(methods))
            raise WrongMethod(
                f"Not allowed to {shown(method)} on {shown(path)} (allowed: {allowed})", headers={"allow": allowed}
            )
        return methods[method], params


def _shape(parts: tuple[str, ...]) -> tuple[str, ...]:
    return tuple("{}" if part.startswith("{") else part for part in parts)


def _match(parts: tuple[str, ...], given: list[str]) -> dict[str, str] | None:
    """The parameters of a path that fits; the last parameter takes all segments that are left."""
    spare = len(given) - len(parts)
    if spare < 0:
        return None
    last = max(index for index, part in enumerate(parts) if part.startswith("{"))
    values = [*given[:last], "/".join(given[last : last + spare + 1]), *given[last + spare + 1 :]]
    params = {}
    for part, value in zip(parts, values, strict=True):
        if part.startswith("{") and value:
            params[part[1:-1]] = unquote(value)
        elif part != value:
            return None
    return params
