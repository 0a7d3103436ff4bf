"""Exact cache: the same body from the same tenant gets the answer that was given before."""

from __future__ import annotations

import re
import weakref
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from hashlib import sha256
from typing import Literal
from weakref import WeakKeyDictionary

from attrs import Attribute, define, field, frozen
from attrs.validators import ge, gt
from orjson import OPT_SORT_KEYS, dumps

from qlens import Call, Gateway, Model, Reply, Target, Usage, hookimpl, trimmed

_ENTRY_OVERHEAD = 1024
"""What an entry takes besides its body: key, usage and the containers around them, measured and rounded up."""
_REMEMBERED = 1024
"""How many beginnings of keys are kept at most: behind a wildcard, clients choose the model names."""


@frozen
class Memory:
    """Keeps answers in the memory of each process."""

    kind: Literal["memory"] = "memory"
    """The only kind there is so far."""
    max_bytes: int = field(default=64 * 1024 * 1024, validator=ge(1))
    """How much the answers may take; those not used for the longest time go first."""


def _fits(config: ExactConfig, attribute: Attribute[int], max_entry_bytes: int) -> None:
    if max_entry_bytes + _ENTRY_OVERHEAD > config.store.max_bytes:
        raise ValueError(
            f"an entry of {max_entry_bytes} bytes does not fit into store.max_bytes ({config.store.max_bytes}); "
            f"lower it to {max(1, config.store.max_bytes - _ENTRY_OVERHEAD)} or raise max_bytes"
        )


@frozen
class ExactConfig:
    """Answers a call that was answered before for the same tenant, without asking a provider."""

    store: Memory = field(factory=Memory)
    """Where answers are kept."""
    ttl_seconds: float = field(default=600, validator=gt(0))
    """How old an answer may be."""
    max_entry_bytes: int = field(default=1024 * 1024, validator=[ge(1), _fits])
    """A larger answer is not kept."""


@define(eq=False)
class _Entry:
    """An answer as it was given."""

    body: bytes
    usage: Usage | None
    finish: str | None
    target: Target | None
    dialect: str
    stored: float


@define(eq=False)
class _Shelf:
    """Entries by key, the longest unused first, with their size in bytes."""

    entries: OrderedDict[bytes, _Entry] = field(factory=OrderedDict)
    size: int = 0

    def get(self, key: bytes) -> _Entry | None:
        entry = self.entries.get(key)
        if entry is not None:
            self.entries.move_to_end(key)
        return entry

    def put(self, key: bytes, entry: _Entry, max_bytes: int) -> None:
        if key in self.entries:
            self.drop(key)
        self.entries[key] = entry
        self.size += len(entry.body) + _ENTRY_OVERHEAD
        while self.size > max_bytes:
            self.drop(next(iter(self.entries)))

    def drop(self, key: bytes) -> None:
        entry = self.entries.pop(key, None)
        if entry is not None:
            self.size -= len(entry.body) + _ENTRY_OVERHEAD


@frozen
class _Wishes:
    """What the client says in its Cache-Control header (https://www.rfc-editor.org/rfc/rfc9111#section-5.2.1)."""

    store: bool = True
    use: bool = True
    max_age: float = float("inf")


_NO_WISHES = _Wishes()
_UNKNOWN: tuple[Model | None, bytes] = (Model("", ()), b"")
"""Of no call's model."""
_FORM: Mapping[str, None] = {"stream": None, "stream_options": None}
"""What says the form of an answer alone, as if it was not there."""


@define(eq=False)
class Exact:
    """Looks answers up by a hash of everything that shapes them, the tenant first."""

    config: ExactConfig
    name: str
    _monotonic: Callable[[], float] = field(init=False, repr=False)
    _lookups: dict[tuple[str, ...], int] = field(init=False, repr=False)
    """How many there were, by name and result."""
    _hit: tuple[str, str] = field(init=False, repr=False)
    _miss: tuple[str, str] = field(init=False, repr=False)
    _bypass: tuple[str, str] = field(init=False, repr=False)
    _shelf: _Shelf = field(factory=_Shelf, init=False, repr=False)
    _heads: dict[tuple[str, str, str | None], tuple[Model | None, bytes]] = field(factory=dict, init=False, repr=False)
    """How keys begin: what depends on the caller and the configuration alone, and the model it was worked out for."""
    # The key is taken when the call is looked up: what is stored must answer what the client asked, even if something
    # on the way to the provider edits the body.
    _awaited: WeakKeyDictionary[Call, bytes] = field(factory=WeakKeyDictionary, init=False, repr=False)

    Config = ExactConfig

    @hookimpl
    @asynccontextmanager
    async def lifespan(self, gateway: Gateway) -> AsyncIterator[None]:
        """Take the clock and the metrics."""
        self._monotonic = gateway.clock.monotonic
        self._lookups = gateway.metrics.counts(
            "qlens_cache_lookups_total", "Calls looked up in a cache: hit, miss, bypass.", ("cache", "result")
        )
        self._hit, self._miss, self._bypass = ((self.name, result) for result in ("hit", "miss", "bypass"))
        for labels in (self._hit, self._miss, self._bypass):
            self._lookups[labels] += 0
        size = gateway.metrics.gauge("qlens_cache_bytes", "What a cache's answers take.", ("cache",))
        # Asked at every scrape; the metric outlives the cache and must not keep its answers alive.
        size.labels(self.name).set_function(partial(_size, weakref.ref(self._shelf)))
        yield

    @hookimpl
    def adopt(self, old: object) -> None:
        """Keep the answers of the instance before; the new limits hold from the next look or entry on."""
        assert isinstance(old, Exact)
        self._shelf = old._shelf

    @hookimpl
    async def lookup(self, call: Call) -> Reply | None:
        """Answer from memory, or ask for the provider's answer to be kept."""
        said = call.headers.get("cache-control")
        wishes = _wishes(said) if said else _NO_WISHES
        key = self._key(call)
        if not wishes.use:
            self._lookups[self._bypass] += 1
        elif key in self._shelf.entries and (entry := self._fresh(key, wishes.max_age)):
            call.cache = "hit"
            self._lookups[self._hit] += 1
            return _reply(entry)
        else:
            self._lookups[self._miss] += 1
        if wishes.store:
            self._awaited[call] = key
            call.keep = max(call.keep, self.config.max_entry_bytes)
        call.cache = "miss" if wishes.use or wishes.store else "off"
        return None

    @hookimpl
    async def store(self, call: Call, reply: Reply) -> None:
        """Keep a complete answer of the call's own model."""
        key, body, config = self._awaited.pop(call, None), reply.body, self.config
        if key is None or body is None or len(body) > config.max_entry_bytes:
            return
        # A fallback's answer stands in while the model is down; kept, it would outlive the trouble.
        target, model = reply.target, call.model
        if target is not None and model is not None and target.public != model.name:
            return
        entry = _Entry(trimmed(body), reply.usage, reply.finish, target, reply.dialect, self._monotonic())
        self._shelf.put(key, entry, config.store.max_bytes)

    @hookimpl
    def explain(self, call: Call) -> list[str]:
        """Say under which key the answer is looked up."""
        key = self._key(call).hex()
        return [f"looks for an answer under {key[:16]}..., and keeps a new one for {self.config.ttl_seconds:g} s"]

    def _key(self, call: Call) -> bytes:
        """The call's `cache_key`, with a beginning that is worked out once."""
        tenant = call.known.tenant
        about = tenant, call.operation.name, call.asked_model
        model, head = self._heads.get(about, _UNKNOWN)
        if model is not call.model:
            if len(self._heads) >= _REMEMBERED:
                self._heads.clear()
            head = _head(tenant, call)
            self._heads[about] = call.model, head
        return _key_of(head, call)

    def _fresh(self, key: bytes, max_age: float) -> _Entry | None:
        entry = self._shelf.get(key)
        if entry is None:
            return None
        age = self._monotonic() - entry.stored
        if age > self.config.ttl_seconds:
            self._shelf.drop(key)
            return None
        return entry if age <= max_age else None


def cache_key(tenant: str, call: Call) -> bytes:
    """The one way to name an answer: tenant, operation, model with its targets, the client's betas, and the whole body.

    The body counts without `stream` and `stream_options`: the core turns one form of an answer into the other.
    """
    return _key_of(_head(tenant, call), call)


def _head(tenant: str, call: Call) -> bytes:
    return b"".join(map(_measured, (tenant.encode(), call.operation.name.encode(), _canonical(_model(call)))))


def _key_of(head: bytes, call: Call) -> bytes:
    if betas := call.headers.get("anthropic-beta"):  # a provider may be sent some of them, and answer otherwise for it
        head += _measured(",".join(sorted({name.strip() for name in betas.split(",")})).encode(errors="replace"))
    return sha256(head + dumps({**call.body, **_FORM}, _plain, OPT_SORT_KEYS)).digest()


def _measured(part: bytes) -> bytes:
    """A part with its length before it, so that it cannot pass for the end of another."""
    return len(part).to_bytes(8) + part


def _model(call: Call) -> list[object]:
    """The model and what stands behind it, so that a changed configuration does not give old answers."""
    if call.model is None:
        return [call.asked_model]
    targets = [[t.provider, t.model, t.base_model, t.region, t.params] for t in call.model.candidates]
    return [call.asked_model, call.model.name, targets]


def _canonical(value: object) -> bytes:
    return dumps(value, _plain, OPT_SORT_KEYS)


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")


def _size(shelf: weakref.ref[_Shelf]) -> float:
    kept = shelf()
    return 0.0 if kept is None else kept.size


def _wishes(cache_control: str) -> _Wishes:
    directives = {part.strip().lower() for part in cache_control.split(",")}
    ages = [int(match[1]) for part in directives if (match := re.fullmatch(r'max-age="?(\d{1,9})"?', part))]
    return _Wishes(
        store="no-store" not in directives,
        use="no-cache" not in directives,
        max_age=min(ages, default=float("inf")),
    )


def _reply(entry: _Entry) -> Reply:
    # No header and no id of the upstream's: they belonged to the call that was answered first.
    return Reply(
        body=entry.body,
        usage=entry.usage,
        finish=entry.finish,
        target=entry.target,
        dialect=entry.dialect,
        complete=True,
    )
