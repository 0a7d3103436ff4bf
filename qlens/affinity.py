"""Operations about objects that a provider keeps: each goes to whoever made the object, and to nobody else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import aclosing
from functools import partial
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import orjson
from attrs import define, evolve, field, frozen

from qlens import batches, kept_bodies
from qlens.call import FREE, UNPRICED, Body, Call, Caller, Model, Outgoing, Reply, Request, Target
from qlens.dialects import unnamed
from qlens.dialects.uploads import UPLOADS
from qlens.errors import (
    CallError,
    InvalidRequest,
    ObjectMissing,
    Unavailable,
    UpstreamInvalid,
    UpstreamModelMissing,
    UpstreamRejected,
)
from qlens.forms import Form, FormBody
from qlens.metering_passed import MOST_BYTES, passed_meter
from qlens.metering_raw import RawMeter
from qlens.object_ids import Kept, Origin
from qlens.objects import Claims, Sealer, file_missing, missing
from qlens.operations import model_not_found, unknown_path
from qlens.passthrough import escaped, matching
from qlens.returned import mistakes, success
from qlens.spool import Spool
from qlens.surrogates import json_of
from qlens.usage import NO_USAGE, Usage

if TYPE_CHECKING:
    from qlens.account import Account
    from qlens.pipeline import Pipeline
    from qlens.registry import Provider

_PASSED = ("accept", "content-type", "openai-beta")
"""The headers of a client that pass through: what the body is, and what is wanted."""
MOST_PAGES = 10
"""How many pages of a provider's list are looked through for the objects of one tenant."""
MARK = "qlens_tenant"
"""Under which name a batch's metadata say whose it is."""

_MOST_METADATA = 16
_PLACES = {
    "response": "responses",
    "file": "files",
    "batch": "batches",
    "conversation": "conversations",
    "vector_store": "vector_stores",
}
_MARKED = frozenset({"batch", "vector_store"})
"""The objects whose metadata say whose they are."""
_OURS = frozenset({"api-version", "model"})
"""Parameters of the query that are for the gateway."""
_PAGE = {"batch": (20, 100), "file": (10_000, 10_000), "vector_store": (20, 100)}
"""How many objects a list has by default, and at most."""


@frozen
class Errand:
    """What one call asks of one target."""

    target: Target
    request: Request
    missing: CallError
    """What the client is told when the provider has no such thing."""
    polish: Callable[[Reply], None]
    """Makes the provider's answer ready for the client."""
    stream: bool = False
    is_metered: bool = True
    """Whether all that it sets going is known when it is answered; if not, its cost is unknown, and not 0."""


async def answer(pipeline: Pipeline, account: Account) -> Reply:
    """Find out whose the object is, admit the call, ask the provider that keeps it."""
    call = account.call
    operation = call.operation
    if operation.name in _LISTS:
        return await _list(pipeline, account, operation.kind)
    errand = _ERRANDS.get(operation.name, _about)(pipeline, call)
    if operation.name == "passthrough":
        errand = evolve(errand, request=evolve(errand.request, body=await _given(call)))
    elif errand.is_metered:
        call.bound_cost = FREE  # to keep and to give back what was made costs nothing more
    await pipeline.admit(account)
    account.reply = account.picked(await ask(pipeline, account, errand))
    return account.reply


async def ask(pipeline: Pipeline, account: Account, errand: Errand) -> Reply:
    """Ask the one target that can answer, inside `wrap_send`; nobody asks it twice."""
    return await pipeline.inside_layers(partial(_attempt, pipeline, errand))(account, errand.target)


async def _attempt(pipeline: Pipeline, errand: Errand, account: Account, target: Target) -> Reply:
    call, provider = account.call, pipeline.providers[errand.target.provider]
    if target.provider != provider.name:
        raise Unavailable("The object is kept by one provider, and a plugin asks another one for it.")
    place = account.begin(errand.target)
    try:
        outgoing = Outgoing(call.operation, "", {}, errand.stream, errand.request)
        reply = success(account.take(await provider.send.fn(call, errand.target, outgoing)))
        reply.target, reply.usage = errand.target, NO_USAGE
        errand.polish(reply)
        meter = _passing(pipeline, provider, call, reply)
    except UpstreamModelMissing as error:
        account.failed(place, errand.missing)
        raise errand.missing from error
    except CallError as error:
        account.failed(place, error)
        raise
    except mistakes() as error:
        account.failed(place, "provider_failed")
        raise pipeline.provider_failure(provider, error) from error
    except asyncio.CancelledError as error:
        account.cut_off(place, error)
        raise
    account.answered(place, reply, meter)
    if not errand.is_metered:
        call.attempts[place].cost = UNPRICED
    return reply


# --- whose it is -------------------------------------------------------------------------------


def _about(pipeline: Pipeline, call: Call) -> Errand:
    """The errand for an operation about one object."""
    kind, given = call.operation.kind, call.path_params["id"]
    origin = pipeline.ids.open(kind, call.known.tenant, given)
    target = _reached(pipeline, call, origin) if origin is not None else None
    if origin is None or target is None:
        raise missing(kind, given)
    if origin.provider not in pipeline.providers:
        raise ObjectMissing(f"The provider {origin.provider}, which keeps this object, is not configured any more.")
    call.kept = Kept(origin.provider, {origin.id: given})
    own = quote(origin.id, safe="")
    if kind in ("conversation", "vector_store"):
        return _about_kept(pipeline, call, target, own)
    # What a file holds is handed on as it comes, whatever it is.
    call.stream = call.operation.name == "file_content" or call.query.get("stream") == "true"
    rest = call.operation.path.partition("{id}")[2]
    return Errand(
        target,
        Request(call.operation.method, f"/{_PLACES[kind]}/{own}{rest}", _asked(call), _said(call, "accept")),
        missing(kind, given),
        partial(_polish, pipeline, call, target),
        stream=call.stream,
    )


def _about_kept(pipeline: Pipeline, call: Call, target: Target, own: str) -> Errand:
    """The errand for an operation about a conversation or a vector store, or about something in it."""
    operation, claims = call.operation, Claims(call, pipeline.ids)
    assert call.kept is not None
    claims.origin, claims.param = Origin(target.provider, "", ""), "the path"
    within = {name: value for name, value in call.path_params.items() if name != "id"}
    rest = kept_bodies.rest_of(operation.path, within, claims)
    query = kept_bodies.query_of(_asked(call), claims, of_files=operation.name in _OF_FILES)
    headers, content = _said(call, "accept", "openai-beta"), None
    if operation.body == "json":
        _open_kept(pipeline, call, claims, target)
        headers["content-type"], content = "application/json", orjson.dumps(call.body)
    call.kept = Kept(target.provider, {**call.kept.given, **claims.given})
    call.stream = False
    return Errand(
        target,
        Request(operation.method, f"/{_PLACES[operation.kind]}/{own}{rest}", query, headers, content),
        missing(operation.kind, call.path_params["id"]),
        partial(_polish, pipeline, call, target),
        # Nobody says what storing and searching cost.
        is_metered=operation.kind != "vector_store" or operation.method != "POST",
    )


def _open_kept(pipeline: Pipeline, call: Call, claims: Claims, target: Target) -> None:
    """Make a body about a conversation or a vector store one that its provider reads."""
    body = call.body
    if body.get("items"):
        pipeline.refuse_unseen("Conversations cannot be filled")
    kept_bodies.open_body(body, claims)
    kept_bodies.open_items(body.get("items"), claims, target.provider)
    if call.operation.name in ("vector_store_create", "vector_store_update") and (
        call.operation.name == "vector_store_create" or body.get("metadata") is not None
    ):
        body["metadata"] = _marked(pipeline, call, target, body.get("metadata"))


def _reached(pipeline: Pipeline, call: Call, origin: Origin) -> Target | None:
    """A target of the provider that keeps an object: any will do; None when the caller may use none of its models."""
    if origin.model:
        if not call.known.may_use(origin.model):
            return None
        model = pipeline.models.resolve(origin.model)
        models = [model] if model is not None else []
    else:
        models = _usable(pipeline, call.known)
    found = [each for model in models for each in model.candidates if each.provider == origin.provider]
    if not found and not origin.model and call.known.models is not None:
        return None
    # The model may be gone from the configuration: the provider has the object all the same.
    target = found[0] if found else Target(origin.provider, origin.model, origin.model)
    call.model, call.targets = pipeline.models.named(target.public), (target,)
    call.asked_model = origin.model or target.public
    return target


def _usable(pipeline: Pipeline, caller: Caller) -> list[Model]:
    """The models that a caller may use, and the wildcards under which it may use some."""
    return [model for name, model in pipeline.models.items() if _may_use_some(caller, name)]


def _may_use_some(caller: Caller, name: str) -> bool:
    if caller.models is None or not name.endswith("*"):
        return caller.may_use(name)
    stem = name[:-1]
    return any(
        allowed.removesuffix("*").startswith(stem) or (allowed.endswith("*") and stem.startswith(allowed[:-1]))
        for allowed in caller.models
    )


def _asked(call: Call) -> tuple[tuple[str, str], ...]:
    """The client's query, without what is for the gateway."""
    return tuple((name, value) for name, value in call.query.items() if name not in _OURS)


def _said(call: Call, *names: str) -> dict[str, str]:
    """The client's headers of these names, as far as they can be sent on."""
    found = {name: call.headers.get(name) for name in names}
    return {name: value for name, value in found.items() if value and value.isascii() and value.isprintable()}


def _chosen(pipeline: Pipeline, call: Call, named: str | None = None) -> Target:
    """The target that is to keep an object: of the model that the client names, or of the only provider there is."""
    kind = call.operation.kind
    name = named or call.headers.get("x-qlens-model") or call.query.get("model")
    if name:
        model = pipeline.models.resolve(name)
        if model is None or not call.known.may_use(name):
            raise model_not_found(name)
        call.model, call.asked_model = model, name
        found = [each for each in model.candidates if keeps(pipeline.providers[each.provider], kind)]
        if not found:
            raise _unsupported(call, f"No provider of the model `{name}` ({_named(model.candidates)})")
        return _sealable(pipeline, found[0])
    targets = [each for model in _usable(pipeline, call.known) for each in model.candidates]
    able = [each for each in targets if keeps(pipeline.providers[each.provider], kind)]
    if not able:
        raise _unsupported(call, f"No provider of the models that you may use ({_named(targets)})")
    if len({each.provider for each in able}) > 1:
        raise InvalidRequest(
            f"Several providers keep {_PLACES[kind]}: name a model, whose provider is to be asked, in the header "
            "x-qlens-model, in the query parameter model or, with an upload, in the form field model.",
            param="model",
            code="missing_required_parameter",
        )
    call.asked_model = able[0].public
    call.model = pipeline.models.named(able[0].public)
    return _sealable(pipeline, able[0])


def _named(targets: Iterable[Target]) -> str:
    return ", ".join(sorted({target.provider for target in targets})) or "none"


def keeps(provider: Provider, kind: str) -> bool:
    """Whether a provider keeps objects of a kind for clients: its plugin says so in `objects`."""
    return kind in getattr(provider.plugin, "objects", ())


def _sealable(pipeline: Pipeline, target: Target) -> Target:
    if pipeline.ids.keeps(target.provider):
        return target
    raise InvalidRequest(
        f"The provider {target.provider} keeps nothing for clients here: it has no secret to seal ids with; the "
        "operator can set server.id_key.",
        code="unsupported_operation",
    )


def _unsupported(call: Call, who: str) -> InvalidRequest:
    return InvalidRequest(f"{who} does {call.operation.name}.", code="unsupported_operation")


# --- what is made ------------------------------------------------------------------------------


def _create(pipeline: Pipeline, call: Call) -> Errand:
    """The errand for a new conversation or vector store: it goes to the provider that keeps the files it names."""
    operation, claims = call.operation, Claims(call, pipeline.ids)
    named = Claims(call, pipeline.ids)
    kept_bodies.open_body(orjson.loads(orjson.dumps(call.body)), named)
    if named.origin is None:
        target = _chosen(pipeline, call)
    else:
        found = _reached(pipeline, call, named.origin)
        if found is None or not keeps(pipeline.providers[found.provider], operation.kind):
            raise _unsupported(call, f"The provider {named.origin.provider}, which keeps the file in {named.param},")
        target = found
    _open_kept(pipeline, call, claims, target)
    call.kept = Kept(target.provider, claims.given)
    headers = {"content-type": "application/json", **_said(call, "accept", "openai-beta")}
    return Errand(
        target,
        Request("POST", f"/{_PLACES[operation.kind]}", (), headers, orjson.dumps(call.body)),
        InvalidRequest(
            f"The provider {target.provider} does not do {operation.name}: it knows no such path.",
            code="unsupported_operation",
        ),
        partial(_polish, pipeline, call, target),
        is_metered=operation.kind != "vector_store",
    )


def _batch_create(pipeline: Pipeline, call: Call) -> Errand:
    """The errand for a new batch: it goes to the provider that keeps its input."""
    body = call.body
    _refuse_unbounded(pipeline, call)
    for name in ("input_file_id", "endpoint", "completion_window"):
        if type(body.get(name)) is not str:
            code = "missing_required_parameter" if body.get(name) is None else "invalid_type"
            raise InvalidRequest(f"'{name}' is required and must be a string.", param=name, code=code)
    claims = Claims(call, pipeline.ids)
    own = claims.file(body["input_file_id"], "input_file_id")
    gone = file_missing(body["input_file_id"], "input_file_id")
    origin = claims.origin
    target = _reached(pipeline, call, origin) if origin is not None else None
    if origin is None or target is None or origin.provider not in pipeline.providers:
        raise gone
    call.kept = Kept(origin.provider, claims.given)
    sent = {**body, "input_file_id": own, "metadata": _marked(pipeline, call, target, body.get("metadata"))}
    request = Request("POST", "/batches", (), {"content-type": "application/json"}, orjson.dumps(sent))
    # What its lines will use is known when it is over.
    return Errand(target, request, gone, partial(_polish, pipeline, call, target), is_metered=False)


def _file_upload(pipeline: Pipeline, call: Call) -> Errand:
    """The errand for a new file: it goes to the provider of the model that the client names."""
    UPLOADS.validate(call.body)
    target = _chosen(pipeline, call, call.body.get("model"))
    mark = pipeline.ids.mark(target.provider, call.known.tenant)
    # A provider lists the files of its whole account, and nothing but their names can say whose they are.
    files = tuple(evolve(file, filename=f"{mark}-{file.filename or 'upload'}") for file in call.files)
    fields = {name: value for name, value in call.body.items() if name != "model"}
    form = FormBody.of(fields, files)
    request = Request("POST", "/files", (), {"content-type": form.content_type}, form)
    gone = InvalidRequest("The provider keeps no files.", code="unsupported_operation")
    return Errand(target, request, gone, partial(_polish, pipeline, call, target))


def _refuse_unbounded(pipeline: Pipeline, call: Call) -> None:
    """A batch does what the lines of its file say, which nobody reads here: no limit and no guard would hold."""
    pipeline.refuse_unseen("Batches cannot be created")
    if call.known.models is not None:
        raise InvalidRequest(
            "A key that may use some models only cannot create batches: their lines could ask for any model.",
            code="unsupported_operation",
        )
    limiting = [hook.plugin for hook in pipeline.hooks.admit if hook.bounded]
    if limiting:
        raise InvalidRequest(
            f"Batches cannot be created here: {limiting[0]} must know how much a call can generate, and what the lines "
            "of a batch ask for is not known.",
            code="unsupported_operation",
        )


def _marked(pipeline: Pipeline, call: Call, target: Target, metadata: Any) -> dict[str, Any]:
    """The metadata of a batch with whose it is; one that has no room for it is in no list."""
    if metadata is not None and type(metadata) is not dict:
        raise InvalidRequest("'metadata' must be an object.", param="metadata", code="invalid_type")
    given = {name: value for name, value in (metadata or {}).items() if name != MARK}
    mark = pipeline.ids.mark(target.provider, call.known.tenant)
    return {**given, MARK: mark} if len(given) < _MOST_METADATA else given


# --- what passes through -----------------------------------------------------------------------


def _passed(pipeline: Pipeline, call: Call) -> Errand:
    """The errand for a request that its provider's configuration lets through as it is."""
    name, path = call.path_params["provider"], call.path_params["path"]
    provider = pipeline.providers.get(name)
    patterns = getattr(provider.plugin, "passthrough", ()) if provider is not None else ()
    pattern = matching(patterns, call.operation.method, path)
    # A key that may use some models only could use any of them here.
    if pattern is None or call.known.models is not None:
        raise unknown_path(call.operation.method, call.path)
    call.stream = True  # whatever it is, it is handed on as it comes
    # One token at least: limits correct at the end what they have taken something from.
    call.estimated_input, call.bound = 1, Usage(input=1, source="estimated")
    target = Target(name, pattern, "")  # no model and no price, unless the answer says what it used
    query = tuple((key, value) for key, value in call.query.items() if key != "api-version")
    request = Request(call.operation.method, escaped(path), query, _said(call, *_PASSED))
    gone = UpstreamRejected("The provider has nothing at this path.", status=404)
    return Errand(target, request, gone, lambda _reply: None, stream=True)


async def _given(call: Call) -> Spooled | None:
    """The body of a request that passes through, kept until the call ends; None when there is none."""
    call.form = Form()
    async with aclosing(call.pieces()) as pieces:
        async for piece in pieces:
            await call.form.spool.write(piece)
    await call.form.spool.end()
    return Spooled(call.form.spool) if call.form.spool.size else None


async def _model_asked(call: Call) -> str:
    """The model that a request which passes names, in Azure's path or else in its JSON; empty: it names none."""
    places = call.path_params["path"].split("/")
    if "deployments" in places[:-1]:
        return unnamed.a_model(places[places.index("deployments") + 1])
    media_type = call.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json" or call.form is None or not 0 < call.form.spool.size <= MOST_BYTES:
        return ""
    try:
        text = b"".join([piece async for piece in call.form.spool.pieces(0, call.form.spool.size)])
        body = orjson.loads(text) if b'"model"' in text else None
    except (CallError, orjson.JSONDecodeError):
        return ""  # it has passed already, whatever it is
    return unnamed.a_model(body.get("model")) if type(body) is dict else ""


@define(eq=False)
class Spooled:
    """A body that was spooled, to be sent."""

    spool: Spool

    def __len__(self) -> int:
        return self.spool.size

    async def __aiter__(self) -> AsyncGenerator[bytes]:
        async for piece in self.spool.pieces(0, self.spool.size):
            yield piece


# --- lists -------------------------------------------------------------------------------------


async def _list(pipeline: Pipeline, account: Account, kind: str) -> Reply:
    """The tenant's own objects of those in a provider's account, which lists them all."""
    call = account.call
    limit = _limit(call, kind)
    target = _chosen(pipeline, call)
    if call.query.get("before") is not None:
        raise InvalidRequest(
            "'before' is not taken here: go on with 'after'.", param="before", code="unsupported_parameter"
        )
    after = call.query.get("after")
    if after is not None:
        origin = pipeline.ids.open(kind, call.known.tenant, after)
        if origin is None or origin.provider != target.provider:
            raise missing(kind, after)
        after = origin.id
    call.bound_cost = FREE
    await pipeline.admit(account)
    kept = [(name, value) for name, value in _asked(call) if name not in {"after", "limit"}]
    mark = pipeline.ids.mark(target.provider, call.known.tenant)
    found: list[Body] = []
    more = True
    for _ in range(MOST_PAGES):
        if not more or len(found) > limit:
            break
        query = [*kept, ("limit", str(_PAGE[kind][1])), *([("after", after)] if after else [])]
        page = _Page()
        request = Request("GET", f"/{_PLACES[kind]}", tuple(query), {"accept": "application/json"})
        await ask(pipeline, account, Errand(target, request, missing(kind, after or ""), page.read))
        found += [each for each in page.data if _is_of(each, mark)]
        more, after = page.more, page.last
    sealer = Sealer.of(call, target, pipeline.ids)
    own = found[:limit]
    _cleared(own, mark)
    sealer.seal(own)
    ends = {"first_id": own[0].get("id"), "last_id": own[-1].get("id")} if own else {}
    body = {"object": "list", "data": own, **ends, "has_more": more or len(found) > limit}
    account.open(Reply(body=orjson.dumps(body), dialect="", target=target, usage=NO_USAGE, complete=True))
    assert account.reply is not None
    return account.reply


def _limit(call: Call, kind: str) -> int:
    usual, most = _PAGE[kind]
    said = call.query.get("limit")
    if said is None:
        return usual
    if not (said.isascii() and said.isdigit()) or len(said) > 6 or not 1 <= int(said) <= most:
        raise InvalidRequest(f"'limit' must be a number from 1 to {most}.", param="limit", code="invalid_value")
    return int(said)


@define(eq=False)
class _Page:
    """One page of a provider's list."""

    data: list[Body] = field(factory=list)
    more: bool = False
    last: str | None = None

    def read(self, reply: Reply) -> None:
        """Take what a page says."""
        body = _object(reply)
        data = body.get("data")
        if type(data) is not list or not all(type(each) is dict for each in data):
            raise UpstreamInvalid("The provider's list has no data.")
        self.data = data
        last = data[-1].get("id") if data else None
        self.last = last if type(last) is str else None
        self.more = body.get("has_more") is True and self.last is not None


def _is_of(each: Body, mark: str | None) -> bool:
    if mark is None:
        return False
    if each.get("object") in _MARKED:
        metadata = each.get("metadata")
        return type(metadata) is dict and metadata.get(MARK) == mark
    name = each.get("filename")
    return type(name) is str and name.startswith(f"{mark}-")


def _cleared(node: Any, mark: str | None) -> None:
    """Take out of objects what says whose they are: it was put in here."""
    for each in node if type(node) is list else (node,):
        if type(each) is not dict:
            continue
        metadata, name = each.get("metadata"), each.get("filename")
        if each.get("object") in _MARKED and type(metadata) is dict:
            metadata.pop(MARK, None)
        if type(name) is str and mark is not None:
            each["filename"] = name.removeprefix(f"{mark}-")


# --- the answer --------------------------------------------------------------------------------


def _polish(pipeline: Pipeline, call: Call, target: Target, reply: Reply) -> None:
    """Seal the ids of an answer about an object; a file's content is nobody's to look into."""
    if call.operation.name == "file_content":
        return
    sealer = Sealer.of(call, target, pipeline.ids)
    if reply.chunks is not None:
        sealer.reply(reply)
        return
    body = _object(reply)
    if body.get("object") == "batch":
        batches.settle(pipeline, call, target, body)
    mark = pipeline.ids.mark(target.provider, call.known.tenant)
    _cleared(body, mark)
    _cleared(body.get("data"), mark)  # what was found in files names them too
    sealer.seal(body)
    kept_bodies.set_ends(body)
    reply.body = orjson.dumps(body)


def _object(reply: Reply) -> Body:
    try:
        body = json_of(reply.body or b"")
    except orjson.JSONDecodeError:
        raise UpstreamInvalid("The provider's answer is not JSON.") from None
    if type(body) is not dict:
        raise UpstreamInvalid("The provider's answer is not a JSON object.")
    return body


def _passing(pipeline: Pipeline, provider: Provider, call: Call, reply: Reply) -> RawMeter | None:
    if reply.chunks is None:
        reply.complete = True
        return None

    def failed(error: BaseException) -> CallError:
        return pipeline.provider_failure(provider, error)

    if call.operation.name == "passthrough":
        billed = partial(pipeline.models.billed, provider.name)
        meter = passed_meter(call, reply, failed, partial(_model_asked, call), billed)
    else:
        meter = RawMeter(call, reply, failed)
    reply.replace(chunks=meter.watch(reply.chunks))
    return meter


_LISTS = frozenset({"files", "batches", "vector_stores"})
_OF_FILES = frozenset({"vector_store_files", "vector_store_batch_files"})
_ERRANDS = {
    "batch_create": _batch_create,
    "conversation_create": _create,
    "file_upload": _file_upload,
    "passthrough": _passed,
    "vector_store_create": _create,
}
