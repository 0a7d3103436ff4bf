"""How full buckets are, for operators, and how one is filled again."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import orjson
from attrs import define

from qlens import Call, CallError, Endpoint, Forbidden, Gateway, InvalidRequest, Reply, StoreUnavailable, Unavailable
from qlens_plugins.rate_limit.token_bucket.shown import Used, row

if TYPE_CHECKING:
    from qlens_plugins.rate_limit.token_bucket.plugin import TokenBucket

MOST_ROWS = 1000
"""On one page of a list."""
_PARAMETERS = ("limit", "after", "tenant")

Row = dict[str, Any]


class Missing(CallError):
    """There is no such limit, nothing was taken from it, or it is another tenant's: one answer. 404."""

    status, type, code = 404, "invalid_request_error", "not_found"


class Apart(CallError):
    """Each worker has a bucket of its own. 409."""

    status, type, code = 409, "invalid_request_error", "conflict"


@define(eq=False)
class LimitApi:
    """Handlers, each for one path and method; they answer for every instance of the plugin."""

    plugin: TokenBucket
    kind: type[TokenBucket]
    """What all instances of the plugin are."""

    def endpoints(self) -> Iterable[Endpoint]:
        """Where they are served. Nobody who rules one tenant fills its buckets."""
        yield Endpoint("POST", "/admin/limits/{id}/reset", "operator", self.reset, "admin", shared=True)
        yield Endpoint("GET", "/admin/limits", "viewer", self.all, "admin", scoped=True, shared=True)
        yield Endpoint("GET", "/admin/limits/{id}", "viewer", self.one, "admin", scoped=True, shared=True)

    async def all(self, call: Call) -> Reply:
        """Limits that something was taken from, by id, a page at a time; for who rules one tenant its own."""
        most, after, tenant = _page(call)
        found = [each for each in await self._found(call) if each[0] > after and tenant in (None, each[2].tenant)]
        found.sort(key=itemgetter(0))
        rows = await _rows([(plugin, used) for _, plugin, used in found[:most]])
        ids = [each["id"] for each in rows] or [None]
        ends = {"first_id": ids[0], "last_id": ids[-1], "has_more": len(found) > most}
        return _json({"object": "list", "data": rows, **ends})

    async def one(self, call: Call) -> Reply:
        """One limit of one owner."""
        return _json(await _row(*await self._named(call)))

    async def reset(self, call: Call) -> Reply:
        """Make a bucket full, debts included; only who may give `admin` fills one that binds whoever asks."""
        plugin, used = await self._named(call)
        before = await _row(plugin, used)
        if used.kind == "concurrency":
            raise InvalidRequest("Calls at a time are not reset: a place is free again when its call has ended.")
        if plugin.is_apart:
            raise Apart(
                "Each worker has buckets of its own, and this would fill the one of a single worker; "
                "with `store: {kind: redis}` there is one for all."
            )
        after = {"remaining": before["burst"]}
        noted = partial(
            self._gateway.audit.record, call, "limits.reset", before["id"], before=before, after=after,
            tenant=used.tenant,
        )  # fmt: skip
        if not self._gateway.roles.may_give(call.known.roles, "admin") and used.binds(call.known):
            await noted(outcome="refused")
            raise Forbidden("You may not reset a limit that binds you yourself: ask an admin.")
        await noted()
        try:
            await plugin.shown.clear(used)
        except StoreUnavailable as away:
            await noted(outcome="failed")  # as far as anybody can tell
            raise _away() from away
        return _json(await _row(plugin, used))

    @property
    def _gateway(self) -> Gateway:
        return self.plugin.gateway

    async def _found(self, call: Call) -> list[tuple[str, TokenBucket, Used]]:
        """What whoever asks may see, of all instances."""
        found = []
        for instance in self._gateway.registration.instances:
            if not isinstance(plugin := instance.plugin, self.kind):
                continue
            try:
                everything = await plugin.shown.used()
            except StoreUnavailable as away:
                raise _away() from away
            for each in everything:
                used = each.under(plugin.rules)
                if used is not None and call.scope in (None, used.tenant):
                    found.append((used.id(plugin.name), plugin, used))
        return found

    async def _named(self, call: Call) -> tuple[TokenBucket, Used]:
        for id_, plugin, used in await self._found(call):
            if id_ == call.path_params["id"]:
                return plugin, used
        raise Missing("No such limit.")


async def _row(plugin: TokenBucket, used: Used) -> Row:
    (found,) = await _rows([(plugin, used)])
    return found


async def _rows(found: Sequence[tuple[TokenBucket, Used]]) -> list[Row]:
    rows: dict[int, Row] = {}
    for plugin in dict.fromkeys(plugin for plugin, _ in found):
        numbers = [number for number, (owner, _) in enumerate(found) if owner is plugin]
        try:
            taken = await plugin.shown.taken([found[number][1] for number in numbers])
        except StoreUnavailable as away:
            raise _away() from away
        for number, each in zip(numbers, taken, strict=True):
            rows[number] = row(plugin.name, found[number][1], each, plugin.room)
    return [rows[number] for number in range(len(found))]


def _page(call: Call) -> tuple[int, str, str | None]:
    """How many limits are asked for, after which id, and of which tenant."""
    given = [name for name, _ in call.query.items()]
    for name in given:
        if name not in _PARAMETERS:
            known = ", ".join(_PARAMETERS)
            raise InvalidRequest(f"Unknown parameter; known: {known}.", param=name[:64], code="unknown_parameter")
        if given.count(name) > 1:
            raise InvalidRequest(f"`{name}` may be said once.", param=name, code="invalid_value")
    text = call.query.get("limit", str(MOST_ROWS))
    if not (text.isascii() and text.isdigit() and len(text) < 6 and 1 <= int(text) <= MOST_ROWS):
        must = f"`limit` must be a whole number from 1 to {MOST_ROWS}."
        raise InvalidRequest(must, param="limit", code="invalid_value")
    return int(text), call.query.get("after", ""), call.query.get("tenant")


def _away() -> Unavailable:
    return Unavailable(
        "The store of the limits does not answer. Each gateway enforces its share alone meanwhile, and it is not known "
        "here how full all of them are.",
        code="limits_unavailable",
        retry_after=1.0,
    )


def _json(answer: object) -> Reply:
    return Reply(headers={"content-type": "application/json", "cache-control": "no-store"}, body=orjson.dumps(answer))
