"""What of the ledger a caller may see."""

from __future__ import annotations

from collections.abc import Mapping

from qlens import Call, Endpoint, Forbidden, Gateway

Where = dict[str, tuple[str, ...]]
"""By dimension, the values that count."""


def view(call: Call, gateway: Gateway, rulers: Endpoint) -> Where:
    """What a caller is confined to: nothing, the own tenant, or, with no role for `rulers`, the own key alone.

    A tenant is shared by people who need not know of each other's calls.
    """
    caller = call.known
    try:
        # Not call.scope, which at a path that is open to members is the tenant for them too.
        tenant = gateway.roles.scope(caller, rulers)
    except Forbidden:
        # Somebody who came without a key is known by the subject.
        mine: Where = {"subject": (caller.subject,)} if caller.key_id is None else {"key_id": (caller.key_id,)}
        return {"tenant": (caller.tenant,), **mine}
    return {} if tenant is None else {"tenant": (tenant,)}


def narrowed(own: Where, asked: Mapping[str, tuple[str, ...]]) -> Where:
    """What is asked for of what may be seen: what is another's is like what is not there."""
    found = dict(asked)
    for name, values in own.items():
        found[name] = tuple(value for value in asked.get(name, values) if value in values)
    return found
