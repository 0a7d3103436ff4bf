"""The endpoints for questions about usage, and who may ask them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING

from attrs import evolve

from qlens import Call, Endpoint, Reply
from qlens_plugins.cost.ledger import calls, organization, summary
from qlens_plugins.cost.ledger.reader import Reader
from qlens_plugins.cost.ledger.view import Where, view

if TYPE_CHECKING:
    from qlens_plugins.cost.ledger.plugin import Ledger

Answer = Callable[[Call, Reader, Where], Awaitable[Reply]]


def endpoints(ledger: Ledger) -> Iterable[Endpoint]:
    """Where they are served: every caller may ask, of what that caller may see."""
    for path, kind in organization.KINDS.items():
        yield _endpoint(ledger, f"/v1/organization/{path}", partial(organization.answer, kind))
    yield _endpoint(ledger, "/v1/usage/summary", summary.summarised)
    yield _endpoint(ledger, "/v1/usage/calls", calls.listed)
    yield _endpoint(ledger, "/v1/usage/calls/{id}", calls.one)
    yield _endpoint(ledger, "/v1/usage/export", calls.exported)


def _endpoint(ledger: Ledger, path: str, answer: Answer) -> Endpoint:
    async def handle(call: Call) -> Reply:
        return await answer(call, ledger.reader, view(call, ledger.gateway, rulers))

    endpoint = Endpoint("GET", path, "member", handle, scoped=True)
    rulers = evolve(endpoint, role="viewer")
    return endpoint
