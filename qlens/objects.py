"""Ids in bodies: those that clients give are opened on the way in, those that providers give sealed on the way out."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import orjson
from attrs import define, evolve, field, frozen

from qlens import sse
from qlens.bridges.responses_over_chat import thoughts
from qlens.call import Body, Call, Reply, Target
from qlens.dialects import responses, typed
from qlens.errors import InvalidRequest, ObjectMissing
from qlens.object_ids import MOST_CHARS, Kept, ObjectIds, Origin, is_sealed
from qlens.operations import shown
from qlens.surrogates import json_of

OF_RESPONSES = frozenset({"compaction", "input_tokens", "responses"})
"""The dialects whose bodies name what Responses keep."""
_FREE = frozenset({"arguments", "format", "metadata", "parameters", "schema"})
"""Fields whose content is the client's own, or a schema: what looks like an id in there is none."""
_FILE_FIELDS = frozenset({"error_file_id", "file_id", "input_file_id", "output_file_id"})
_RESPONSE_FIELDS = frozenset({"previous_response_id", "response_id"})
_OF_CONTAINERS = "cfile_"
"""How ids of files begin that exist only within a container, which nobody can ask for here."""
_OBJECTS = {
    "response": "response",
    "response.deleted": "response",
    "file": "file",
    "batch": "batch",
    "conversation": "conversation",
    "conversation.deleted": "conversation",
    "vector_store": "vector_store",
    "vector_store.deleted": "vector_store",
    # What stands in a vector store has the id of the file that it was made of.
    "vector_store.file": "file",
    "vector_store.file.deleted": "file",
}
# Inside a JSON string the quotes would be escaped, so text never matches.
_MAY_HAVE_IDS = re.compile(rb'"(?:(?:response|response_id|file_ids?|encrypted_content)"\s*:|type"\s*:\s*"reasoning")')


def missing(kind: str, given: str) -> ObjectMissing:
    """The one answer for an object that does not exist and for one of another tenant, in OpenAI's words."""
    said = shown(given, MOST_CHARS)
    if kind == "file":
        return ObjectMissing(f"No such File object: {said}", param="id")
    if kind == "batch":
        return ObjectMissing(f"No batch found with id '{said}'.")
    if kind == "vector_store":
        return ObjectMissing(f"Vector store with id '{said}' not found.")
    return ObjectMissing(f"{kind.capitalize()} with id '{said}' not found.")


def file_missing(given: str, param: str) -> InvalidRequest:
    """The one answer for a file that a body names and this tenant does not have."""
    return InvalidRequest(f"No such File object: {shown(given, MOST_CHARS)}", param=param)


# --- on the way in -----------------------------------------------------------------------------


def claim(call: Call, ids: ObjectIds, native: Callable[[Target], bool]) -> None:
    """Open the ids in a call's body and bind the call to the provider that keeps these objects.

    `native` says whether a target speaks Responses itself, and so reads what was encrypted. Raises InvalidRequest for
    an id that this tenant cannot have, and for objects that no target of the model has.
    """
    body, claims = call.body, Claims(call, ids)
    if call.operation.dialect == "chat":
        for place, message in enumerate(body["messages"]):
            claims.files(message.get("content"), f"messages[{place}].content")
    elif call.operation.dialect in OF_RESPONSES:
        if body.get("conversation") is not None:
            claims.conversation(body)
        if body.get("previous_response_id") is not None:
            claims.response(body, "previous_response_id")
        for name in ("input", "tools", "prompt"):
            claims.files(body.get(name), name)
        if type(body.get("input")) is list:
            body["input"] = claims.encrypted(body["input"], native)
            claims.references(body["input"], native)
    elif call.operation.dialect == "image_edits":
        claims.files(body.get("images"), "images")
        claims.files(body.get("mask"), "mask")
    if claims.origin is not None:
        _bind(call, claims)


@define(eq=False)
class Claims:
    """The objects that a body names, all of one provider."""

    call: Call
    ids: ObjectIds
    origin: Origin | None = field(default=None, init=False)
    param: str = field(default="", init=False)
    """Where the first of them was named."""
    given: dict[str, str] = field(factory=dict, init=False)

    def response(self, node: Body, name: str) -> None:
        """Put the provider's own id in the place of a response's."""
        said = node[name]
        origin = self.ids.open("response", self.call.known.tenant, said)
        if origin is None:
            raise InvalidRequest(
                f"Previous response with id '{shown(said, MOST_CHARS)}' not found.",
                param=name,
                code="previous_response_not_found",
            )
        node[name] = self._taken(origin, said, name)

    def conversation(self, body: Body) -> None:
        """Put the provider's own id in the place of a conversation's, which is given as it is or in an object."""
        said = body["conversation"]
        node, name = (said, "id") if type(said) is dict else (body, "conversation")
        given = node.get(name)
        origin = self.ids.open("conversation", self.call.known.tenant, given) if type(given) is str else None
        if origin is None or type(given) is not str:
            raise InvalidRequest(
                f"Conversation with id '{shown(str(given or ''), MOST_CHARS)}' not found.", param="conversation"
            )
        node[name] = self._taken(origin, given, "conversation")

    def vector_store(self, said: str, param: str) -> str:
        """The provider's own id of a vector store."""
        origin = self.ids.open("vector_store", self.call.known.tenant, said)
        if origin is None:
            raise InvalidRequest(f"Vector store with id '{shown(said, MOST_CHARS)}' not found.", param=param)
        return self._taken(origin, said, param)

    def file(self, said: str, param: str) -> str:
        """The provider's own id of a file."""
        if said.startswith(_OF_CONTAINERS):
            return said
        origin = self.ids.open("file", self.call.known.tenant, said)
        if origin is None:
            raise file_missing(said, param)
        return self._taken(origin, said, param)

    def files(self, node: Any, param: str) -> None:
        """Put the provider's own ids in the places of those of files and vector stores, at any depth."""
        if type(node) is list:
            for place, each in enumerate(node):
                self.files(each, f"{param}[{place}]")
        elif type(node) is dict:
            for name, child in node.items():
                where = f"{param}.{name}"
                if name == "file_id" and type(child) is str:
                    node[name] = self.file(child, where)
                elif name == "file_ids" and type(child) is list:
                    node[name] = [self.file(each, where) if type(each) is str else each for each in child]
                elif name == "vector_store_ids" and type(child) is list:
                    node[name] = [self.vector_store(each, where) if type(each) is str else each for each in child]
                elif name not in _FREE:
                    self.files(child, where)

    def _taken(self, origin: Origin, said: str, param: str) -> str:
        self._bound(origin, param)
        self.given[origin.id] = said
        return origin.id

    def _bound(self, origin: Origin, param: str) -> None:
        if self.origin is None:
            self.origin, self.param = origin, param
        elif self.origin.provider != origin.provider:
            raise InvalidRequest(
                f"The object in {param} is kept by another provider than the one in {self.param}: no model has both.",
                param=param,
            )

    def encrypted(self, items: list[Body], native: Callable[[Target], bool]) -> list[Body]:
        """The items of an input with what providers have encrypted as they know it, bound to the one that can read it.

        Reasoning that nobody who is asked could read is left out: the latest says who is asked, and the model answers
        without the rest, as after a change of models. All other content is part of the conversation.
        """
        found = [each for place, item in enumerate(items) if (each := self._encrypted(item, place)) is not None]
        if not found:
            return items
        self._bind_to_reader(found, native)
        reader = self.origin.provider if self.origin is not None else None
        unreadable = [each.item for each in found if each.provider not in (None, reader)]
        for each in found:
            if each.content:
                each.item["encrypted_content"] = each.content
            else:
                del each.item["encrypted_content"]
        return responses.without_reasoning(items, unreadable) if unreadable else items

    def references(self, items: list[Body], native: Callable[[Target], bool]) -> None:
        """Bind the call to the one provider that can keep the items it refers to; their ids do not say which it is."""
        assert self.call.model is not None
        place = next((place for place, item in enumerate(items) if _is_reference(item)), None)
        keepers = {target.provider for target in self.call.model.candidates if native(target)}
        if self.origin is not None or place is None or not keepers:
            return
        if len(keepers) > 1:
            raise _unsealed(f"input[{place}].id")
        self._bound(Origin(keepers.pop(), "", ""), f"input[{place}].id")

    def _encrypted(self, item: Body, place: int) -> _Encrypted | None:
        content, param = item.get("encrypted_content"), f"input[{place}].encrypted_content"
        if type(content) is not str or not content or thoughts.is_closed(content):
            return None
        opened = self.ids.open_content(self.call.known.tenant, content)
        if opened is not None:
            return _Encrypted(item, param, *opened)
        if not is_sealed(content):
            return _Encrypted(item, param, None, content)
        if item.get("type") == "reasoning":
            return _Encrypted(item, param, "", content)
        raise InvalidRequest(
            f"The encrypted content in {param} could not be verified: whoever made it is gone, or it was altered.",
            param=param,
            code="invalid_encrypted_content",
        )

    def _bind_to_reader(self, found: list[_Encrypted], native: Callable[[Target], bool]) -> None:
        """Bind the call to whoever has made its encrypted content, if other objects do not bind it already."""
        assert self.call.model is not None
        for each in found:
            if each.provider and each.item.get("type") != "reasoning":
                self._bound(Origin(each.provider, "", ""), each.param)
        reachable = {target.provider for target in self.call.model.candidates}
        latest = next((each for each in reversed(found) if each.provider in reachable), None)
        if self.origin is None and latest is not None and latest.provider is not None:
            self._bound(Origin(latest.provider, "", ""), latest.param)
        unknown = next((each for each in found if each.provider is None), None)
        readers = {target.provider for target in self.call.model.candidates if native(target)}
        if self.origin is not None or unknown is None or not readers:
            return
        if len(readers) > 1:
            raise InvalidRequest(
                f"The encrypted content in {unknown.param} was not made through this gateway, and of the providers of "
                f"the model `{self.call.asked_model}` one alone could read it: leave this item out.",
                param=unknown.param,
                code="invalid_encrypted_content",
            )
        self._bound(Origin(readers.pop(), "", ""), unknown.param)


def _is_reference(item: Body) -> bool:
    return (item.get("type") or ("message" if "role" in item else "item_reference")) == "item_reference"


def _unsealed(param: str) -> InvalidRequest:
    return InvalidRequest(
        f"What {param} names is kept by a provider, and the id does not say by which: go on with "
        "'previous_response_id', or send the items themselves, as some clients do with 'store: false' alone.",
        param=param,
        code="unsupported_parameter",
    )


@frozen
class _Encrypted:
    """What a provider has encrypted, in an item of the input."""

    item: Body
    param: str
    provider: str | None
    """Who can read it; None: it was not sealed here, "": nobody any more."""
    content: str
    """As its maker gave it; empty where the maker keeps the item under its id."""


def _bind(call: Call, claims: Claims) -> None:
    assert call.model is not None
    assert claims.origin is not None
    provider = claims.origin.provider
    targets = tuple(target for target in call.model.candidates if target.provider == provider)
    if not targets:
        raise InvalidRequest(
            f"The object in {claims.param} is kept by a provider that the model `{call.asked_model}` does not have: "
            "ask for the model that it was made with, or make it again.",
            param=claims.param,
        )
    # Whoever chooses and falls back sees only targets that have the objects.
    call.model = evolve(call.model, candidates=targets, fallbacks={})
    call.targets = targets
    call.kept = Kept(provider, claims.given)


# --- on the way out ----------------------------------------------------------------------------


@define(eq=False)
class Sealer:
    """Puts sealed ids in the places of a provider's own, in answers about objects that it keeps."""

    ids: ObjectIds
    tenant: str
    provider: str
    model: str
    given: Mapping[str, str] = field(factory=dict)
    """The ids that the client gave, by the provider's own: these come back as they were."""

    @classmethod
    def of(cls, call: Call, target: Target, ids: ObjectIds) -> Sealer:
        """The sealer for what a target answers to a call."""
        model = call.asked_model or target.public
        return cls(ids, call.known.tenant, target.provider, model, call.kept.given if call.kept else {})

    def id(self, kind: str, own: str) -> str:
        """The sealed id of an object."""
        known = self.given.get(own)
        model = self.model if kind == "response" else ""
        return known or self.ids.seal(kind, self.tenant, Origin(self.provider, model, own))

    def seal(self, node: Any) -> None:
        """Seal the ids at any depth of an answer, or of a stream's event, in place."""
        if type(node) is list:
            for each in node:
                self.seal(each)
        elif type(node) is dict:
            for name, child in node.items():
                if type(child) is str:
                    node[name] = self._text(node, name, child)
                elif name == "file_ids" and type(child) is list:
                    node[name] = [self._file(each) if type(each) is str else each for each in child]
                elif name == "vector_store_ids" and type(child) is list:
                    node[name] = [self.id("vector_store", each) if type(each) is str else each for each in child]
                elif name == "conversation" and type(child) is dict and type(child.get("id")) is str:
                    child["id"] = self.id("conversation", child["id"])
                elif name not in _FREE:
                    self.seal(child)
            if node.get("type") == "reasoning" and not node.get("encrypted_content"):
                # Whether or not it was included: who keeps the item must be known when it comes back.
                node["encrypted_content"] = self.content("")

    def content(self, encrypted: str) -> str:
        """What the provider has encrypted, sealed."""
        return self.ids.seal_content(self.tenant, self.provider, encrypted)

    def _text(self, node: Body, name: str, text: str) -> str:
        if name == "id":
            kind = _OBJECTS.get(node["object"]) if type(node.get("object")) is str else None
            return self.id(kind, text) if kind is not None else text
        if name in _FILE_FIELDS:
            return self._file(text)
        if name == "encrypted_content":
            return self.content(text) if text else text
        if name == "vector_store_id":
            return self.id("vector_store", text)
        return self.id("response", text) if name in _RESPONSE_FIELDS else text

    def _file(self, own: str) -> str:
        return own if own.startswith(_OF_CONTAINERS) else self.id("file", own)

    def reply(self, reply: Reply) -> None:
        """Seal the ids of an answer in JSON, or of a stream of events on its way."""
        if reply.chunks is not None:
            reply.replace(chunks=_SealedEvents(reply.chunks, self))
        elif reply.body:
            body = json_of(reply.body)
            self.seal(body)
            reply.body = orjson.dumps(body)


@define(eq=False)
class _SealedEvents:
    # Not a generator: it takes every piece from the provider without a layer in between.
    _chunks: AsyncIterator[bytes]
    _sealer: Sealer
    _splitter: sse.Splitter = field(init=False, factory=sse.Splitter)
    _ended: bool = field(init=False, default=False)

    def __aiter__(self) -> _SealedEvents:
        return self

    async def __anext__(self) -> bytes:
        while not self._ended:
            try:
                events = self._splitter.take(await self._chunks.__anext__())
            except StopAsyncIteration:
                self._ended = True
                events = b"".join(self._splitter.flush())
            if events:
                return self._sealed(events) if _MAY_HAVE_IDS.search(events) else events
        raise StopAsyncIteration

    def _sealed(self, events: bytes) -> bytes:
        return b"".join([self._event(event) if _MAY_HAVE_IDS.search(event) else event for event in sse.cut(events)])

    def _event(self, event: bytes) -> bytes:
        try:
            payload = json_of(sse.data(event) or b"")
        except orjson.JSONDecodeError:
            return event
        if type(payload) is not dict or type(payload.get("type")) is not str:
            return event
        self._sealer.seal(payload)
        return typed.write(payload)
