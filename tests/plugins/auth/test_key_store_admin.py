"""The admin API of `key_store`: keys, tenants, what nobody may give, what nobody may see, and the audit log."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st
from keystores import ADMIN, CALL, config, key_of, made, send, status, stored
from ledgers import Place, SqlitePlace

from qlens import Allowance, AuditEntry, Caller, Forbidden
from qlens.testing import Running
from qlens_plugins.auth.key_store.authority import Authority
from qlens_plugins.auth.key_store.records import Key, Tenant, limits_together, models_within, wider_limits

TEAM = key_of("tenant_admin")
OTHER = key_of("tenant_admin", "globex")


def keyring(gateway: Running) -> Any:
    return gateway.plugin("auth", "key_store").keyring


async def listed(gateway: Running, path: str, key: str = ADMIN) -> list[dict[str, Any]]:
    answer = await send(gateway, "GET", path, key=key)
    assert answer.status == 200, answer.text
    rows: list[dict[str, Any]] = answer.json()["data"]
    return rows


# --- keys --------------------------------------------------------------------------------------


async def test_a_key_is_made_shown_once_changed_and_revoked(place: Place) -> None:
    async with stored(place=place) as gateway:
        key = await made(gateway, name="one", models=["gpt-4o"], limits={"concurrency": 2})
        path = f"/admin/keys/{key['id']}"
        plain = key.pop("key")
        assert (await send(gateway, "GET", path)).json() == key
        changed = await send(gateway, "PATCH", path, {"name": None, "models": None, "limits": None, "tags": {"a": "b"}})
        assert changed.status == 200
        assert changed.headers["cache-control"] == "no-store"
        assert changed.json() == {**key, "name": None, "models": None, "limits": None, "tags": {"a": "b"}}
        assert (await send(gateway, "DELETE", path)).json() == {"object": "key", "id": key["id"], "deleted": True}
        assert await status(gateway, plain) == 401
        after = (await send(gateway, "GET", path)).json()
        assert (after["state"], after["revoked_at"] is not None) == ("revoked", True)
        for method, where in (("PATCH", path), ("POST", f"{path}/rotate")):
            refused = await send(gateway, method, where, {})
            assert (refused.status, refused.json()["error"]["code"]) == (409, "conflict")
        assert (await send(gateway, "DELETE", path)).status == 200  # once more does nothing more
        assert len(await listed(gateway, "/admin/audit?action=keys.revoke")) == 1


async def test_lists_are_paged_the_newest_first(place: Place) -> None:
    async with stored(place=place) as gateway:
        ids = [(await made(gateway, tenant=("acme", "globex")[place % 2]))["id"] for place in range(5)]
        seen, after = [], ""
        while True:
            page = (await send(gateway, "GET", f"/admin/keys?limit=2{after}")).json()
            seen += [row["id"] for row in page["data"]]
            if not page["has_more"]:
                break
            after = f"&after={page['last_id']}"
        assert seen == ids[::-1]
        assert [row["id"] for row in await listed(gateway, "/admin/keys?tenant=globex")] == [ids[3], ids[1]]
        assert [row["id"] for row in await listed(gateway, "/admin/keys", TEAM)] == [ids[4], ids[2], ids[0]]
        assert await listed(gateway, "/admin/keys?tenant=globex", TEAM) == []
        for query in ("limit=0", "limit=101", "limit=x", "after=", "page=2", "after=key-0", "limit=1&limit=2"):
            assert (await send(gateway, "GET", f"/admin/keys?{query}")).status == 400


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"tenant": "acme", "model": ["x"]}, "model"),
    ({"tenant": "acme", "id": "key-mine"}, "id"),
    ({"tenant": "acme", "created_by": "x"}, "created_by"),
    ({"tenant": "acme", "hash": "x"}, "hash"),
    ({}, "tenant"),
    ({"tenant": ""}, "tenant"),
    ({"tenant": "a\u2028b"}, "tenant"),
    ({"tenant": 1}, "tenant"),
    ({"tenant": "acme "}, "tenant"),
    ({"tenant": "acme", "roles": []}, "roles"),
    ({"tenant": "acme", "roles": ["root"]}, "roles"),
    ({"tenant": "acme", "roles": "admin"}, "roles"),
    ({"tenant": "acme", "models": ["g*t"]}, "models"),
    ({"tenant": "acme", "models": [1]}, "models"),
    ({"tenant": "acme", "tags": {"a": 1}}, "tags"),
    ({"tenant": "acme", "limits": {"rpm": 1}}, "limits"),
    ({"tenant": "acme", "limits": {"concurrency": 0}}, "limits"),
    ({"tenant": "acme", "limits": {"concurrency": True}}, "limits"),
    ({"tenant": "acme", "limits": {"concurrency": "5"}}, "limits"),
    ({"tenant": "acme", "limits": {"budget_usd": 0.1}}, "limits"),
    ({"tenant": "acme", "limits": {"budget_usd": "-1"}}, "limits"),
    ({"tenant": "acme", "limits": {"budget_usd": "1e99"}}, "limits"),
    ({"tenant": "acme", "limits": {"budget_usd": "NaN"}}, "limits"),
    ({"tenant": "acme", "limits": {"budget_window": "day"}}, "limits"),
    ({"tenant": "acme", "limits": {"budget_usd": "1", "budget_window": "year"}}, "limits"),
    ({"tenant": "acme", "expires_at": "2020-01-01"}, "expires_at"),
    ({"tenant": "acme", "expires_at": "2100-01-01T00:00:00"}, "expires_at"),
    ({"tenant": "acme", "expires_at": "9999-12-31T23:59:59-23:00"}, "expires_at"),
    ({"tenant": "acme", "expires_at": 4102444800}, "expires_at"),
]
NO_OBJECTS = (b"[]", b"{", b"null", b'"x"', b"\xff", b"[" * 50_000, b" " * 70_000)


async def test_bodies_are_read_strictly_and_what_is_wrong_is_named() -> None:
    async with stored() as gateway:
        for body, param in WRONG:
            answer = await send(gateway, "POST", "/admin/keys", body)
            assert (answer.status, answer.json()["error"]["param"]) == (400, param), (body, answer.text)
        for raw in NO_OBJECTS:
            answer = await gateway.request("POST", "/admin/keys", body=raw, key=ADMIN)
            assert (answer.status, answer.json()["error"]["type"]) == (400, "invalid_request_error"), raw[:9]
        assert await listed(gateway, "/admin/keys") == []


async def test_a_key_that_is_revoked_while_its_body_arrives_changes_nothing(place: Place) -> None:
    async with stored(place=place) as gateway:
        key = await made(gateway, tenant="ops", roles=["admin"])
        reader, writer = await asyncio.open_connection(*gateway.admin_url.removeprefix("http://").split(":"))
        body = b'{"tenant": "acme", "roles": ["admin"]}'
        head = f"POST /admin/keys HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key['key']}\r\nconnection: close\r\n"
        writer.write(f"{head}content-length: {len(body)}\r\nexpect: 100-continue\r\n\r\n".encode())
        assert b"100 Continue" in await reader.readuntil(b"\r\n\r\n")  # it was let in
        assert (await send(gateway, "DELETE", f"/admin/keys/{key['id']}")).status == 200
        writer.write(body)
        assert b" 401 " in (await reader.read()).splitlines()[0]
        writer.close()
        assert [row["id"] for row in await listed(gateway, "/admin/keys")] == [key["id"]]


async def test_metadata_is_small_and_not_deep() -> None:
    async with stored() as gateway:
        wrong: list[Any] = [{"a": "x" * 5000}, [], "x"]
        for metadata in wrong:
            answer = await send(gateway, "POST", "/admin/tenants", {"name": "acme", "metadata": metadata})
            assert (answer.status, answer.json()["error"]["param"]) == (400, "metadata")
        raw = b'{"name": "acme", "metadata": {"a": ' + b"[" * 500 + b"]" * 500 + b"}}"
        answer = await gateway.request("POST", "/admin/tenants", body=raw, key=ADMIN)
        assert (answer.status, answer.json()["error"]["param"]) == (400, "metadata")


async def test_notes_about_a_key_are_kept_shown_replaced_and_audited(place: Place) -> None:
    notes = {"owner": "search team\nroom 4", "ticket": "", "x" * 64: "y" * 512}
    async with stored(config(cost="{plugin: ledger, flush_seconds: 0.01}", place=place)) as gateway:
        key = await made(gateway, metadata=notes)
        path = f"/admin/keys/{key['id']}"
        assert key["metadata"] == (await send(gateway, "GET", path)).json()["metadata"] == notes
        assert (await send(gateway, "PATCH", path, {"name": "one"})).json()["metadata"] == notes
        assert (await send(gateway, "POST", f"{path}/rotate", {})).json()["metadata"] == notes
        assert (await send(gateway, "PATCH", path, {"metadata": {"a": "b"}})).json()["metadata"] == {"a": "b"}
        (row,) = await listed(gateway, "/admin/keys")
        assert row["metadata"] == {"a": "b"}
        entry, *_, first = await listed(gateway, "/admin/audit")
        assert (entry["before"]["metadata"], entry["after"]["metadata"]) == (notes, {"a": "b"})
        assert first["after"]["metadata"] == notes
        assert (await send(gateway, "PATCH", path, {"metadata": {}})).json()["metadata"] == {}
        wrong: list[Any] = [
            *({"a": 1}, {"a": None}, {"": "x"}, {" a": "x"}, {"x" * 65: "x"}, {"a": "x" * 513}, [], "x", None),
            {str(number): "x" for number in range(17)},
        ]
        for each in wrong:
            for method, where in (("PATCH", path), ("POST", "/admin/keys")):
                body = {"metadata": each, **({"tenant": "acme"} if method == "POST" else {})}
                answer = await send(gateway, method, where, body)
                assert (answer.status, answer.json()["error"]["param"]) == (400, "metadata"), each


async def test_a_database_of_before_there_were_notes_about_keys_is_taken_over() -> None:
    async with stored() as gateway:
        key = await made(gateway)
        database = sqlite3.connect(gateway.folder / "qlens.db", isolation_level=None)
        database.execute("ALTER TABLE keys DROP COLUMN metadata")
        database.execute("DROP TABLE untold_events")
        database.execute("UPDATE versions SET version = 1 WHERE owner = 'key_store'")
        database.close()
        file = f"poll_seconds: 0.05, url: 'sqlite:///{gateway.folder}/qlens.db'"
        async with stored(config(file)) as other:
            assert await status(other, key["key"]) == 200
            row = (await send(other, "GET", f"/admin/keys/{key['id']}")).json()
            assert (row["id"], row["metadata"]) == (key["id"], {})


async def test_a_change_that_changes_nothing_is_none(place: Place) -> None:
    async with stored(place=place) as gateway:
        key = await made(gateway, name="one")
        assert (await send(gateway, "PATCH", f"/admin/keys/{key['id']}", {"name": "one"})).status == 200
        assert len(await listed(gateway, "/admin/audit")) == 1


async def test_two_who_change_a_key_at_a_time_lose_nothing(place: Place) -> None:
    async with stored(place=place) as gateway:
        key = await made(gateway)
        path = f"/admin/keys/{key['id']}"
        answers = await asyncio.gather(*(send(gateway, "PATCH", path, {"name": f"n{n}"}) for n in range(8)))
        done = [answer.json()["name"] for answer in answers if answer.status == 200]
        assert {answer.status for answer in answers} <= {200, 409}
        assert done
        entries = await listed(gateway, "/admin/audit?action=keys.change")
        assert len(entries) == len(done)
        # Each began where the one before it had ended.
        for later, earlier in itertools.pairwise(entries):
            assert later["before"] == earlier["after"]


# --- nobody gives more than they have ----------------------------------------------------------

GREEDY: list[dict[str, Any]] = [
    {"tenant": "globex"},
    {"roles": ["admin"]},
    {"roles": ["viewer"]},
    {"roles": ["key_desk"]},
    {"roles": ["member", "operator"]},
    {"models": None},
    {"models": ["claude"]},
    {"models": ["gpt*"]},
    {"limits": None},
    {"limits": {"requests_per_minute": 61, "budget_usd": "10"}},
    {"limits": {"requests_per_minute": 60}},
    {"limits": {"requests_per_minute": 60, "budget_usd": "10.000001"}},
    {"limits": {"requests_per_minute": 60, "budget_usd": "10", "budget_window": "day"}},
]


async def _bound(gateway: Running) -> dict[str, Any]:
    """A tenant admin with models and limits of its own."""
    limits = {"requests_per_minute": 60, "budget_usd": "10"}
    return await made(gateway, roles=["tenant_admin"], models=["gpt-4o*"], limits=limits)


async def test_whoever_rules_a_tenant_gives_nothing_beyond_it_and_nothing_beyond_themselves() -> None:
    async with stored() as gateway:
        admin = await _bound(gateway)
        own = admin["key"]
        before = await listed(gateway, "/admin/keys")
        for greedy in GREEDY:
            answer = await send(gateway, "POST", "/admin/keys", greedy, own)
            assert (answer.status, answer.json()["error"]["param"]) == (403, next(iter(greedy))), (greedy, answer.text)
        for greedy in GREEDY:
            answer = await send(gateway, "PATCH", f"/admin/keys/{admin['id']}", greedy, own)
            assert (answer.status, answer.json()["error"]["param"]) == (403, next(iter(greedy))), (greedy, answer.text)
        assert await listed(gateway, "/admin/keys") == before
        refused = await listed(gateway, "/admin/audit?limit=100", own)
        assert len([entry for entry in refused if entry["outcome"] == "refused"]) == 2 * len(GREEDY)
        assert await listed(gateway, "/admin/audit", OTHER) == []


async def test_what_is_not_said_is_what_the_maker_has() -> None:
    async with stored() as gateway:
        own = (await _bound(gateway))["key"]
        key = (await send(gateway, "POST", "/admin/keys", {}, own)).json()
        assert (key["tenant"], key["roles"], key["models"]) == ("acme", ["member"], ["gpt-4o*"])
        assert key["limits"] == {"requests_per_minute": 60, "budget_usd": "10", "budget_window": "month"}
        less = {"models": ["gpt-4o"], "limits": {"requests_per_minute": 1, "budget_usd": "9", "budget_window": "total"}}
        key = (await send(gateway, "POST", "/admin/keys", {**less, "roles": ["team_desk"]}, own)).json()
        assert (key["models"], key["limits"], key["roles"]) == (["gpt-4o"], less["limits"], ["team_desk"])


async def test_a_key_has_its_makers_project_and_tags_and_does_not_outlive_it() -> None:
    has: dict[str, Any] = {"project": "search", "tags": {"team": "one"}, "expires_at": "2099-01-01T00:00:00Z"}
    greedy: list[tuple[str, Any]] = [
        *(("project", None), ("project", "other"), ("tags", {"team": "two"})),
        *(("expires_at", None), ("expires_at", "2099-01-01T00:00:01Z")),
    ]
    async with stored() as gateway:
        operator = await made(gateway, roles=["operator"], **has)
        own, at = operator["key"], f"/admin/keys/{operator['id']}"
        key = await made(gateway, own)
        assert {name: key[name] for name in has} == has
        key = await made(gateway, own, tags={"a": "b"}, expires_at="2098-01-01T00:00:00Z")
        assert (key["tags"], key["expires_at"]) == ({"team": "one", "a": "b"}, "2098-01-01T00:00:00Z")
        for param, value in greedy:
            body: dict[str, Any] = {param: value}
            for answer in (
                await send(gateway, "POST", "/admin/keys", {"tenant": "acme", **body}, own),
                await send(gateway, "PATCH", at, body, own),
                await send(gateway, "PATCH", f"/admin/keys/{key['id']}", body, own),
            ):
                assert (answer.status, answer.json()["error"]["param"]) == (403, param), answer.text
        assert (await send(gateway, "PATCH", at, {"tags": {}}, own)).status == 403
        assert (await send(gateway, "PATCH", at, {"name": "mine"}, own)).status == 200
        free = await made(gateway)
        assert (await send(gateway, "POST", f"/admin/keys/{free['id']}/rotate", {}, own)).status == 403
        lifted: dict[str, Any] = {"project": None, "tags": {}, "expires_at": None}
        assert (await send(gateway, "PATCH", at, lifted)).status == 200


async def test_an_old_secret_makes_no_key_that_outlives_it_and_a_token_does() -> None:
    async with stored() as gateway:
        operator = await made(gateway, roles=["operator"])
        assert (await made(gateway, operator["key"]))["expires_at"] is None
        new = (await send(gateway, "POST", f"/admin/keys/{operator['id']}/rotate", {})).json()
        ends = (await made(gateway, operator["key"]))["expires_at"]
        assert ends == new["rotated_from"]["works_until"]
    holder = Authority(Caller("acme", "joe", "jwt", expires_at=1.0), None, lambda role: role == "member")
    key = holder.narrowed(Key("k", b"", "", "acme", "joe"), None, set())
    holder.check_key(key, None)
    assert key.expires_at is None


async def test_a_key_with_more_than_oneself_is_not_rotated_nor_changed_and_none_with_more_roles_revoked() -> None:
    async with stored() as gateway:
        own = (await _bound(gateway))["key"]
        more = [
            (await made(gateway, roles=["admin"])),
            (await made(gateway, models=["claude"], limits={"requests_per_minute": 1, "budget_usd": "1"})),
        ]
        for key in more:
            path = f"/admin/keys/{key['id']}"
            assert (await send(gateway, "POST", f"{path}/rotate", {}, own)).status == 403
            assert (await send(gateway, "PATCH", path, {"name": "x"}, own)).status == 403
            assert await status(gateway, key["key"]) == 200
        assert (await send(gateway, "DELETE", f"/admin/keys/{more[0]['id']}", None, own)).status == 403
        assert (
            await send(gateway, "DELETE", f"/admin/keys/{more[1]['id']}", None, own)
        ).status == 200  # takes, gives nothing


async def test_a_role_that_is_narrowed_to_paths_gives_itself_and_less() -> None:
    async with stored() as gateway:
        desk = key_of("key_desk")
        for role, expected in (
            *(("key_desk", 200), ("team_desk", 200), ("member", 200)),
            *(("viewer", 403), ("operator", 403), ("auditor", 403), ("tenant_operator", 403), ("admin", 403)),
        ):
            answer = await send(gateway, "POST", "/admin/keys", {"tenant": "globex", "roles": [role]}, desk)
            assert answer.status == expected, role


async def test_a_role_that_is_no_longer_defined_can_be_taken_away() -> None:
    async with stored() as gateway:
        key = await made(gateway, roles=["auditor"])
        await gateway.reload(config().replace("auditor:", "other:"))
        assert (await gateway.get("/admin/audit", key=key["key"])).status == 403
        path = f"/admin/keys/{key['id']}"
        assert (await send(gateway, "PATCH", path, {"roles": ["member"]}, TEAM)).status == 403
        assert (await send(gateway, "PATCH", path, {"name": "stale"})).status == 200
        assert (await send(gateway, "DELETE", path)).status == 200


_MODELS = st.lists(st.sampled_from(["a", "ab", "abc", "a*", "ab*", "abc*", "b*", "*", "c"]), max_size=4)
_NAMES = ["a", "ab", "abc", "abcd", "b", "bc", "c", "d"]


@given(st.none() | _MODELS, st.none() | _MODELS)
def test_models_within_others_are_exactly_those_that_both_allow(one: list[str] | None, two: list[str] | None) -> None:
    def may(models: Any, name: str) -> bool:
        return Caller("t", "s", "b", models=None if models is None else tuple(models)).may_use(name)

    both = models_within(None if one is None else tuple(one), None if two is None else tuple(two))
    for name in _NAMES:
        assert may(both, name) == (may(one, name) and may(two, name))


_LIMITS = st.builds(
    Allowance,
    st.none() | st.integers(1, 3),
    st.none() | st.integers(1, 3),
    st.none() | st.integers(1, 3),
    st.none() | st.integers(0, 3),
    st.sampled_from(["day", "week", "month", "total"]),
)


@given(_LIMITS, _LIMITS, _LIMITS)
def test_limits_are_ordered(one: Allowance, two: Allowance, three: Allowance) -> None:
    assert not wider_limits(one, one)
    assert not wider_limits(one, None)
    if not wider_limits(one, two) and not wider_limits(two, three):
        assert not wider_limits(one, three)  # who gives on gives no more than was given


_SOME_LIMITS = st.none() | _LIMITS
_SOME_MODELS = st.none() | _MODELS.map(tuple)


@given(
    _SOME_MODELS,
    _SOME_LIMITS,
    _SOME_MODELS,
    _SOME_LIMITS,
    _SOME_MODELS,
    _SOME_LIMITS,
    st.sets(st.sampled_from(["models", "limits"])),
)
def test_a_key_that_may_be_made_never_opens_more_than_its_maker_has(
    own_models: Any, own_limits: Any, models: Any, limits: Any, most: Any, default: Any, said: set[str]
) -> None:
    maker = Caller("acme", "joe", "test", models=own_models, allowance=own_limits)
    authority = Authority(maker, "acme", lambda role: role in ("member", "tenant_admin"))
    tenant = Tenant("acme", models=most, limits=default)
    key = Key("k", b"", "", "acme", "joe", models=models if "models" in said else None)
    key = evolve(key, limits=limits if "limits" in said else None)
    key = authority.narrowed(key, tenant, said)
    try:
        authority.check_key(key, tenant)
    except Forbidden:
        assert said  # what nobody spoke of is never too much
        return
    made_ = Caller("acme", "k", "test", models=models_within(key.models, tenant.models))
    assert all(maker.may_use(name) for name in _NAMES if made_.may_use(name))
    assert not wider_limits(limits_together(key.limits, tenant.limits), own_limits)


# --- nobody sees another tenant's --------------------------------------------------------------


async def test_another_tenants_things_are_byte_for_byte_like_unknown_ones(place: Place) -> None:
    async with stored(place=place) as gateway:
        theirs = await made(gateway, tenant="globex")
        await send(gateway, "POST", "/admin/tenants", {"name": "globex", "disabled": False})
        entry = (await listed(gateway, "/admin/audit", OTHER))[0]["id"]
        unknown = theirs["id"][:-4] + "0000"
        for method, path, body in (
            ("GET", "/admin/keys/{}", None),
            ("PATCH", "/admin/keys/{}", {"name": "mine"}),
            ("PATCH", "/admin/keys/{}", {"tenant": "acme"}),
            ("DELETE", "/admin/keys/{}", None),
            ("POST", "/admin/keys/{}/rotate", {}),
            ("GET", "/admin/keys?after={}", None),
        ):
            answers = [await send(gateway, method, path.format(id_), body, TEAM) for id_ in (theirs["id"], unknown)]
            assert answers[0].body == answers[1].body, path
            assert answers[0].status == answers[1].status == (400 if "after" in path else 404)
            heads = [{k: v for k, v in a.headers.items() if k.lower() not in ("x-request-id", "date")} for a in answers]
            assert heads[0] == heads[1]
        for known, not_known in (("/admin/tenants/globex", "/admin/tenants/nobody"),):
            answers = [await send(gateway, "GET", path, key=TEAM) for path in (known, not_known)]
            assert (answers[0].status, answers[0].body) == (404, answers[1].body)
        answers = [await send(gateway, "GET", f"/admin/audit?after={id_}", key=TEAM) for id_ in (entry, "0" * 32)]
        assert (answers[0].status, answers[0].body) == (400, answers[1].body)
        assert await listed(gateway, "/admin/tenants", TEAM) == []
        assert await status(gateway, theirs["key"]) == 200


# --- tenants -----------------------------------------------------------------------------------


async def test_tenants_are_made_changed_and_deleted(place: Place) -> None:
    async with stored(place=place) as gateway:
        body = {"name": "acme corp/eu", "models": ["gpt-4o"], "limits": {"concurrency": 1}, "metadata": {"a": [1]}}
        answer = await send(gateway, "POST", "/admin/tenants", body)
        assert answer.status == 200
        made_ = answer.json()
        assert {name: made_[name] for name in body} == body
        assert (made_["disabled"], made_["created_by"]) == (False, "root")
        assert (await send(gateway, "POST", "/admin/tenants", body)).status == 409
        path = "/admin/tenants/acme%20corp%2Feu"
        assert (await send(gateway, "GET", path)).json() == made_
        assert (await send(gateway, "PATCH", path, {"models": None})).json() == {**made_, "models": None}
        assert (await send(gateway, "PATCH", path, {"name": "other"})).status == 400
        key = await made(gateway, tenant="acme corp/eu")
        assert (await send(gateway, "DELETE", path)).status == 409
        assert (await send(gateway, "DELETE", f"/admin/keys/{key['id']}")).status == 200
        assert (await send(gateway, "DELETE", path)).status == 200
        assert (await send(gateway, "GET", path)).status == 404
        assert (await send(gateway, "POST", "/admin/tenants", {"name": "acme corp/eu"})).status == 200
        assert [tenant["models"] for tenant in await listed(gateway, "/admin/tenants")] == [None]
        actions = [entry["action"] for entry in await listed(gateway, "/admin/audit?object=acme%20corp/eu")]
        assert actions == ["tenants.create", "tenants.delete", "tenants.change", "tenants.create"]


# --- the audit log -----------------------------------------------------------------------------


async def test_an_entry_says_who_did_what_to_what_and_how_it_was(place: Place) -> None:
    async with stored(place=place) as gateway:
        key = await made(gateway, TEAM, name="one")
        await send(gateway, "PATCH", f"/admin/keys/{key['id']}", {"name": "two"}, TEAM)
        entry, first = await listed(gateway, "/admin/audit")
        assert (entry["action"], entry["object"], entry["tenant"], entry["outcome"]) == (
            *("keys.change", key["id"]),
            *("acme", "done"),
        )
        id_ = "acme-tenant_admin"
        assert entry["actor"] == {
            "subject": id_,
            "tenant": "acme",
            "key_id": id_,
            "by": "api_keys",
            "peer": "127.0.0.1",
        }
        assert (entry["before"]["name"], entry["after"]["name"]) == ("one", "two")
        assert (first["before"], first["after"]["id"]) == (None, key["id"])
        assert entry["request_id"] != first["request_id"]
        assert await listed(gateway, f"/admin/audit?actor={id_}&action=keys.create") == [first]
        at = entry["at"]
        assert await listed(gateway, f"/admin/audit?since={at}") == [entry]
        assert await listed(gateway, f"/admin/audit?until={at}") == [first]
        assert await listed(gateway, f"/admin/audit?limit=1&after={entry['id']}") == [first]
        assert await listed(gateway, "/admin/audit?since=9999-12-31") == []
        assert await listed(gateway, "/admin/audit?until=0001-01-01") == []
        for wrong in ("yesterday", "9999-12-31T23:59:59-14:00"):
            assert (await send(gateway, "GET", f"/admin/audit?since={wrong}")).status == 400
        assert await listed(gateway, "/admin/audit?tenant=acme", OTHER) == []


_BY_FORCE = {
    "SqlitePlace": (
        ("UPDATE audit SET actor = 'nobody'", "DELETE FROM audit", "REPLACE INTO audit SELECT * FROM audit"),
        "DROP TRIGGER audit_is_not_changed",
    ),
    "PostgresPlace": (
        (
            "UPDATE audit SET actor = 'nobody'",
            "DELETE FROM audit",
            "TRUNCATE audit",
            "INSERT INTO audit OVERRIDING SYSTEM VALUE SELECT * FROM audit ON CONFLICT (n) DO UPDATE SET actor = 'x'",
        ),
        "ALTER TABLE audit DISABLE TRIGGER audit_is_append_only",
    ),
}
"""What nobody may do to the log, and how it may be done by force."""


async def test_the_log_cannot_be_changed_and_a_change_by_force_is_seen(place: Place) -> None:
    async with stored(place=place) as gateway:
        await made(gateway)
        await made(gateway)
        by_force, allowed = _BY_FORCE[type(place).__name__]
        for statement in by_force:
            with pytest.raises(Exception, match="append-only"):
                place.execute(statement)
        store = keyring(gateway).store
        count, wrong, _ = await store.chain()
        assert (count, wrong) == (2, None)
        place.execute(allowed)
        for column in ("actor", "tenant", "object", "wall_ns"):
            (row,) = place.rows(f"SELECT {column} FROM audit WHERE n = 1")
            place.execute(f"UPDATE audit SET {column} = '7' WHERE n = 1")
            found = await store.chain()  # the entry is whole, and would not be found by what it says
            assert (found[0], found[1] is None) == (1, False), column
            place.execute(f"UPDATE audit SET {column} = '{row[column]}' WHERE n = 1")
        assert (await store.chain())[:2] == (2, None)
        place.execute("UPDATE audit SET entry = replace(entry, 'root', 'toor') WHERE n = 1")
        assert (await store.chain())[1] is not None


class _Broken:
    """A sink that cannot keep anything."""

    kept: list[AuditEntry]

    def __init__(self) -> None:
        self.kept = []

    async def keep(self, entry: AuditEntry) -> None:
        self.kept.append(entry)
        raise OSError("the disk is full")


_FULL = {
    "SqlitePlace": (
        ("CREATE TRIGGER full_disk BEFORE INSERT ON audit BEGIN SELECT RAISE(ABORT, 'the disk is full'); END",),
        "DROP TRIGGER full_disk",
    ),
    "PostgresPlace": (
        (
            "CREATE FUNCTION full_disk() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE disk_full; END $$",
            "CREATE TRIGGER full_disk BEFORE INSERT ON audit EXECUTE FUNCTION full_disk()",
        ),
        "DROP TRIGGER full_disk ON audit",
    ),
}
"""How nothing can be added to the log, and how it can again."""


async def test_what_cannot_be_noted_does_not_happen(place: Place) -> None:
    async with stored(place=place) as gateway:
        key = await made(gateway)
        path = f"/admin/keys/{key['id']}"
        full, free = _FULL[type(place).__name__]
        for statement in full:
            place.execute(statement)
        before = await listed(gateway, "/admin/keys"), await listed(gateway, "/admin/tenants")
        asked = [
            ("POST", "/admin/keys", {"tenant": "acme"}),
            ("PATCH", path, {"name": "x"}),
            ("POST", f"{path}/rotate", {}),
            ("DELETE", path, None),
            ("POST", "/admin/tenants", {"name": "acme"}),
        ]
        for method, where, body in asked:
            assert (await send(gateway, method, where, body)).status == 503, where
        place.execute(free)
        with gateway.gateway.audit.into(_Broken()):  # nor when another one cannot keep it
            for method, where, body in asked:
                answer = await send(gateway, method, where, body)
                assert (answer.status, answer.json()["error"]["code"]) == (503, "audit_unavailable"), where
        assert (await listed(gateway, "/admin/keys"), await listed(gateway, "/admin/tenants")) == before
        assert await status(gateway, key["key"]) == 200


# --- secrets -----------------------------------------------------------------------------------


def _files(place: Place) -> list[Path]:
    """The files of a database that is one."""
    return sorted(place.path.parent.glob(f"{place.path.name}*")) if isinstance(place, SqlitePlace) else []


async def test_no_key_is_anywhere_but_in_the_answer_that_shows_it(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    async with stored(config(cost="{plugin: ledger, flush_seconds: 0.01}", place=place)) as gateway:
        keys = [await made(gateway, name=f"n{n}") for n in range(3)]
        plain = [key["key"] for key in keys]
        for key in keys:
            turned = await send(gateway, "POST", f"/admin/keys/{key['id']}/rotate", {})
            plain.append(turned.json()["key"])
        for key in plain:
            assert (await gateway.post("/v1/chat/completions", CALL, key=key)).status == 200
        await gateway.settled(len(plain))
        texts = [
            (await send(gateway, method, path, key=key)).text
            for key in (ADMIN, plain[0])
            for method, path in (
                *(("GET", "/admin/keys"), ("GET", f"/admin/keys/{keys[0]['id']}"), ("GET", "/admin/audit")),
                *(("GET", "/metrics"), ("GET", "/admin/health"), ("GET", "/admin/whoami"), ("POST", "/admin/keys")),
                ("DELETE", f"/admin/keys/{keys[1]['id']}"),
            )
        ]
        texts += [
            (await gateway.get("/v1/models", key=plain[1])).text,
            (await gateway.get("/v1/models", key=plain[1] + "x")).text,
        ]
        texts += [record.getMessage() for record in caplog.records] + [caplog.text]
        texts.append(repr(keyring(gateway)))
    texts += [repr(place.rows(f"SELECT * FROM {table}")) for table in ("keys", "tenants", "audit", "untold_events")]
    content = b"".join(path.read_bytes() for path in [*gateway.folder.glob("qlens.db*"), *_files(place)])
    everything = "\n".join(texts).encode() + content
    for key in plain:
        secret = key.removeprefix("sk-qlens-v-")
        assert secret.encode() not in everything
        assert secret[:12].encode() not in everything
    assert json.dumps(keys[0]["id"]).encode() in everything  # it is the right place to look
