"""The admin API of keys and tenants. Every change is noted in the audit log, in one transaction with it."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import orjson
from attrs import define, evolve

from qlens import Allowance, Call, Endpoint, Forbidden, Gateway, InvalidRequest, Reply
from qlens_plugins.auth.credentials import STORED, new_key
from qlens_plugins.auth.key_store import bodies
from qlens_plugins.auth.key_store.answers import Conflict, Missing, json, listed, no_place_to_begin
from qlens_plugins.auth.key_store.authority import Authority
from qlens_plugins.auth.key_store.events import event_of
from qlens_plugins.auth.key_store.keyring import Keyring, away
from qlens_plugins.auth.key_store.records import Key, Tenant, hint
from qlens_plugins.auth.key_store.store import AuditQuery, StoreAway
from qlens_plugins.auth.key_store.telling import OWN_SECONDS

_TRIES = 3
"""How often a change is begun again because somebody else made one in between."""

if TYPE_CHECKING:
    from qlens_plugins.auth.key_store.plugin import KeyStore

Handler = Callable[[Call], Awaitable[Reply]]


@define(eq=False)
class Admin:
    """Handlers, each for one path and method."""

    plugin: KeyStore

    @property
    def gateway(self) -> Gateway:
        """The gateway they serve."""
        return self.plugin.gateway

    @property
    def keyring(self) -> Keyring:
        """What they change."""
        return self.plugin.keyring

    def endpoints(self) -> Iterable[Endpoint]:
        """Where they are served. Whoever rules one tenant sees and changes what is that tenant's."""
        for method, path, role, handler, scoped in (
            # First: an id may have slashes in it, as far as paths know.
            ("POST", "/admin/keys/{id}/rotate", "operator", self.rotate_key, True),
            ("GET", "/admin/keys", "viewer", self.list_keys, True),
            ("POST", "/admin/keys", "operator", self.create_key, True),
            ("GET", "/admin/keys/{id}", "viewer", self.get_key, True),
            ("PATCH", "/admin/keys/{id}", "operator", self.change_key, True),
            ("DELETE", "/admin/keys/{id}", "operator", self.revoke_key, True),
            ("GET", "/admin/tenants", "viewer", self.list_tenants, True),
            ("POST", "/admin/tenants", "admin", self.create_tenant, False),
            ("GET", "/admin/tenants/{name}", "viewer", self.get_tenant, True),
            ("PATCH", "/admin/tenants/{name}", "admin", self.change_tenant, False),
            ("DELETE", "/admin/tenants/{name}", "admin", self.delete_tenant, False),
            ("GET", "/admin/audit", "viewer", self.list_audit, True),
        ):
            yield Endpoint(method, path, role, _answering(handler), "admin", scoped)

    @property
    def _now(self) -> int:
        return int(self.gateway.clock.time())

    # --- keys ----------------------------------------------------------------------------------

    async def list_keys(self, call: Call) -> Reply:
        """The keys that the caller rules, the newest first."""
        asked = bodies.asked(call, {**bodies.LIST, "tenant": bodies.text})
        page, tenant = bodies.page(asked), asked.get("tenant")
        if call.scope not in (None, tenant or call.scope):
            return listed([], "id", more=False)  # another's tenant is like one that has nothing
        found = await self.keyring.store.keys(page, call.scope or tenant)
        if found is None:
            raise no_place_to_begin()
        return listed([key.row(self._now) for key in found.rows], "id", more=found.more)

    async def get_key(self, call: Call) -> Reply:
        """One key."""
        return json((await self._key(call)).row(self._now))

    async def create_key(self, call: Call) -> Reply:
        """Make a key; the answer shows it, this once."""
        required = ("tenant",) if call.scope is None else ()
        asked = await bodies.body(call, bodies.NEW_KEY, required)
        authority = Authority.of(call, self.gateway)
        async with self._refusal_noted(call, "keys.create", "-", asked):
            plain, key = self._drafted(call, asked)
            tenant = self.keyring.tenant(key.tenant)
            key = authority.narrowed(key, tenant, set(asked))
            authority.check_key(key, tenant)
        row = key.row(self._now)
        entry = await self.gateway.audit.record(
            call, "keys.create", key.id, after=row, tenant=key.tenant, but=self.keyring.store
        )
        event = event_of(entry)
        await self.keyring.store.add_key(key, entry, event, OWN_SECONDS)
        self.keyring.teller.tell(event)
        await self.keyring.look()
        return json({**row, "key": plain})

    def _drafted(self, call: Call, asked: Mapping[str, Any]) -> tuple[str, Key]:
        self._check(asked)
        id_, plain = f"key-{secrets.token_hex(8)}", new_key(STORED)
        said = {"tenant": call.scope, "subject": id_, **asked}
        return plain, Key(
            id=id_,
            hash=self.keyring.hashed(plain),
            hint=hint(plain),
            created_at=self._now,
            created_by=call.known.subject,
            **said,
        )

    def _check(self, asked: Mapping[str, Any]) -> None:
        """Raise InvalidRequest for roles that there are not, and for an end that is past."""
        for role in asked.get("roles", ()):
            if role not in self.gateway.roles.names:
                known = ", ".join(self.gateway.roles.names)
                raise InvalidRequest(f"There is no such role; roles: {known}.", param="roles", code="invalid_value")
        ends = asked.get("expires_at")
        if ends is not None and ends <= self._now:
            raise InvalidRequest("`expires_at` must be in the future.", param="expires_at", code="invalid_value")

    async def change_key(self, call: Call) -> Reply:
        """Change what is said; the rest stays."""
        asked = await bodies.body(call, bodies.CHANGED_KEY)

        def change(key: Key, authority: Authority) -> Key:
            if asked.get("tenant", key.tenant) != key.tenant:
                authority.check_tenant(asked["tenant"])
                raise InvalidRequest("A key stays with its tenant: make another one there.", param="tenant")
            self._check(asked)
            authority.check_roles(key)
            changed = evolve(key, **asked)
            authority.check_key(changed, self.keyring.tenant(key.tenant))
            return changed

        return json((await self._changed(call, "keys.change", asked, change)).row(self._now))

    async def revoke_key(self, call: Call) -> Reply:
        """Refuse a key from now on; it stays in the list."""
        await bodies.body(call, {})

        def change(key: Key, authority: Authority) -> Key:
            authority.check_roles(key)
            return key if key.revoked_at is not None else evolve(key, revoked_at=self._now)

        key = await self._changed(call, "keys.revoke", {}, change, revoked=True)
        return json({"object": "key", "id": key.id, "deleted": True})

    async def rotate_key(self, call: Call) -> Reply:
        """Give a key another secret, under the same id; the old one works a while longer."""
        asked = await bodies.body(call, bodies.ROTATION)
        plain, now = new_key(STORED), self._now
        overlap = asked.get("overlap_seconds", bodies.OVERLAP_SECONDS)

        def change(key: Key, authority: Authority) -> Key:
            # The new secret is in the hands of whoever asks: it must open no more than they have.
            authority.check_key(key, self.keyring.tenant(key.tenant))
            if key.state(now) == "expired":
                raise Conflict("The key has expired: give it another `expires_at` first, or make a new key.")
            return key.rotated(self.keyring.hashed(plain), hint(plain), now, overlap)

        key = await self._changed(call, "keys.rotate", asked, change)
        return json({**key.row(now), "key": plain})

    async def _key(self, call: Call) -> Key:
        """The key of the path, if the caller rules its tenant; raises Missing."""
        id_ = call.path_params["id"]
        # Not every database takes what no id has: PostgreSQL has no room for a NUL.
        key = await self.keyring.store.key(id_, call.scope) if id_.isprintable() else None
        if key is None:
            raise Missing("There is no such key.")
        return key

    async def _changed(
        self,
        call: Call,
        action: str,
        asked: Mapping[str, Any],
        change: Callable[[Key, Authority], Key],
        *,
        revoked: bool = False,
    ) -> Key:
        """Change the key of the path as it is now; begins again when somebody else changed it in between."""
        for _ in range(_TRIES):
            key = await self._key(call)
            if key.revoked_at is not None and not revoked:
                raise Conflict("The key is revoked, for good: make a new one.")
            async with self._refusal_noted(call, action, key.id, asked):
                changed = change(key, Authority.of(call, self.gateway))
            if changed == key:
                return key
            entry = await self.gateway.audit.record(
                *(call, action, key.id),
                before=key.row(self._now),
                after=changed.row(self._now),
                tenant=key.tenant,
                but=self.keyring.store,
            )
            event = event_of(entry)
            if await self.keyring.store.put_key(changed, entry, event, OWN_SECONDS):
                self.keyring.teller.tell(event)
                await self.keyring.look()
                return changed
        raise Conflict("The key changes all the time. Please try again.")

    # --- tenants -------------------------------------------------------------------------------

    async def list_tenants(self, call: Call) -> Reply:
        """The tenants that the caller rules, by name."""
        page = bodies.page(bodies.asked(call, bodies.LIST))
        found = await self.keyring.store.tenants(page, call.scope)
        return listed([tenant.row() for tenant in found.rows], "name", more=found.more)

    async def get_tenant(self, call: Call) -> Reply:
        """One tenant."""
        return json((await self._tenant(call)).row())

    async def create_tenant(self, call: Call) -> Reply:
        """Say something about a tenant; keys may be made for tenants of which nothing is said."""
        asked = await bodies.body(call, bodies.NEW_TENANT, ("name",))
        async with self._refusal_noted(call, "tenants.create", asked["name"], asked):
            known = await self.keyring.store.tenant(asked["name"])
            if known is not None and known.deleted_at is None:
                raise Conflict("There is a tenant of this name.", param="name")
            change = known.change if known is not None else 0
            tenant = Tenant(**asked, created_at=self._now, created_by=call.known.subject, change=change)
            Authority.of(call, self.gateway).check_settings(tenant)
        await self._put(call, "tenants.create", None, tenant)
        return json(tenant.row())

    async def change_tenant(self, call: Call) -> Reply:
        """Change what is said; the rest stays. Keys follow within a moment."""
        asked = await bodies.body(call, bodies.CHANGED_TENANT)
        tenant = await self._tenant(call)
        async with self._refusal_noted(call, "tenants.change", tenant.name, asked):
            changed = evolve(tenant, **asked)
            Authority.of(call, self.gateway).check_settings(changed)
        await self._put(call, "tenants.change", tenant, changed)
        return json(changed.row())

    async def delete_tenant(self, call: Call) -> Reply:
        """Forget what was said about a tenant that has no keys."""
        await bodies.body(call, {})
        tenant = await self._tenant(call)
        if count := await self.keyring.store.live_keys(tenant.name, self._now):
            raise Conflict(f"The tenant has {count} keys that work: revoke them first, or disable the tenant.")
        await self._put(call, "tenants.delete", tenant, evolve(tenant, deleted_at=self._now))
        return json({"object": "tenant", "name": tenant.name, "deleted": True})

    async def _tenant(self, call: Call) -> Tenant:
        name = call.path_params["name"]
        is_seen = call.scope in (None, name) and name.isprintable()
        tenant = await self.keyring.store.tenant(name) if is_seen else None
        if tenant is None or tenant.deleted_at is not None:
            raise Missing("There is no such tenant.")
        return tenant

    async def _put(self, call: Call, action: str, before: Tenant | None, after: Tenant) -> None:
        entry = await self.gateway.audit.record(
            *(call, action, after.name),
            before=None if before is None else before.row(),
            after=None if after.deleted_at is not None else after.row(),
            tenant=after.name,
            but=self.keyring.store,
        )
        if not await self.keyring.store.put_tenant(after, entry):
            raise Conflict("Somebody else has just changed this tenant. Please look at it, and try again.")
        await self.keyring.look()

    # --- the audit log -------------------------------------------------------------------------

    async def list_audit(self, call: Call) -> Reply:
        """What operators did, the newest first: to all tenants, or to the one that the caller rules."""
        asked = bodies.asked(call, bodies.AUDIT)
        page = bodies.page(asked)
        if call.scope not in (None, asked.get("tenant", call.scope)):
            return listed([], "id", more=False)
        asked["tenant"] = call.scope or asked.get("tenant")
        found = await self.keyring.store.entries(page, AuditQuery(**asked))
        if found is None:
            raise no_place_to_begin()
        return listed([orjson.loads(text) for text in found.rows], "id", more=found.more)

    @asynccontextmanager
    async def _refusal_noted(self, call: Call, action: str, id_: str, asked: Mapping[str, Any]) -> AsyncIterator[None]:
        """Note what the caller was not allowed to do, under the caller's own tenant."""
        try:
            yield
        except Forbidden:
            said = {name: value.row() if isinstance(value, Allowance) else value for name, value in asked.items()}
            await self.gateway.audit.record(call, action, id_, after=said, tenant=call.known.tenant, outcome="refused")
            raise


def _answering(handler: Handler) -> Handler:
    """A handler that says so when the database is away."""

    async def answer(call: Call) -> Reply:
        try:
            return await handler(call)
        except StoreAway:
            raise away() from None

    return answer
