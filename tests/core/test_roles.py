"""What roles open, what they include, and what may be given on."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlens import Call, Caller, Endpoint, Forbidden, Reply
from qlens.config.entries import BUILT_IN_ROLES, RANKS, RoleSettings
from qlens.roles import Roles

PATHS = ["/admin/keys", "/admin/keys/{id}", "/admin/keysmith", "/admin/audit", "/metrics"]


async def nothing(call: Call) -> Reply:
    return Reply(body=b"")


ENDPOINTS = [
    Endpoint("GET", path, role, nothing, "admin", scoped=scoped)
    for path, role, scoped in itertools.product(PATHS, RANKS, (True, False))
]


def caller(*roles: str) -> Caller:
    return Caller("acme", "joe", "test", roles=frozenset(roles))


def opened(roles: Roles, *held: str) -> dict[int, str | None]:
    """The endpoints that are open, with the tenant that they are confined to."""
    found = {}
    for place, endpoint in enumerate(ENDPOINTS):
        try:
            found[place] = roles.scope(caller(*held), endpoint)
        except Forbidden:
            continue
    return found


def test_a_prefix_ends_where_a_segment_does() -> None:
    roles = Roles.of({"desk": RoleSettings("admin", ("/admin/keys",))})
    paths = {ENDPOINTS[place].path for place in opened(roles, "desk") if ENDPOINTS[place].role == "admin"}
    assert paths == {"/admin/keys", "/admin/keys/{id}"}


@pytest.mark.parametrize("role", ["", "Admin", "admin ", "root", "tenant_", "tenant_member", "tenant_root"])
def test_what_is_not_in_the_table_opens_nothing(role: str) -> None:
    roles = Roles.of({})
    assert opened(roles, role) == {}
    assert not roles.may_give(["admin"], role)


_TABLE = st.dictionaries(
    st.sampled_from(["one", "two", "three"]),
    st.builds(
        RoleSettings,
        st.sampled_from(BUILT_IN_ROLES),
        st.none() | st.lists(st.sampled_from(["/admin", "/admin/keys", "/metrics"]), min_size=1).map(tuple),
    ),
)
_HELD = st.lists(st.sampled_from([*BUILT_IN_ROLES, "one", "two", "three"]), max_size=3)


@given(_TABLE, _HELD, _HELD)
def test_nobody_gives_on_what_opens_more_than_they_have(
    table: dict[str, RoleSettings], held: list[str], wanted: list[str]
) -> None:
    """Whatever roles somebody may give, whoever gets them reaches nothing that the giver does not reach."""
    roles = Roles.of(table)
    given_ = [role for role in wanted if roles.may_give(held, role)]
    if not held or not any(role in roles.names for role in held):
        assert given_ == [] or all(roles.may_give(held, role) for role in given_)
        return
    mine, theirs = opened(roles, *held), opened(roles, *given_)
    for place, scope in theirs.items():
        assert place in mine
        assert mine[place] is None or scope == "acme"
