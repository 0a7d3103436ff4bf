"""What an operator may set: nothing that opens more than what the operator has."""

from __future__ import annotations

from collections.abc import Callable

from attrs import evolve, frozen

from qlens import Allowance, Call, Caller, Forbidden, Gateway, fits
from qlens_plugins.auth.key_store.records import (
    Key,
    Models,
    Tenant,
    limits_or_none,
    limits_together,
    models_within,
    narrowed_limits,
    wider_limits,
)

_WORDS = {"budget_picos": "budget_usd", "tenant_budget_picos": "tenant_budget_usd"}


@frozen
class Authority:
    """An operator with what binds them.

    Whoever may give the role `admin` rules the gateway and is bound by nothing; all others by their own roles, models,
    limits, project, tags and end, and whoever rules one tenant by that as well.
    """

    caller: Caller
    scope: str | None
    """The only tenant it rules; None: all."""
    may_give: Callable[[str], bool]

    @classmethod
    def of(cls, call: Call, gateway: Gateway) -> Authority:
        """That of an authenticated caller at this moment."""
        caller, roles = call.known, gateway.roles
        return cls(caller, call.scope, lambda role: roles.may_give(caller.roles, role))

    @property
    def unbound(self) -> bool:
        """Whether it may set whatever there is."""
        return self.may_give("admin")

    @property
    def end(self) -> float | None:
        """When its key ends; a token is renewed by its issuer, and its end is not its holder's."""
        return self.caller.expires_at if self.caller.key_id is not None else None

    def narrowed(self, key: Key, tenant: Tenant | None, said: set[str]) -> Key:
        """A new key in which what nobody spoke of is no more than the operator has."""
        if self.unbound:
            return key
        key = evolve(key, tags={**self.caller.tags, **key.tags})
        if "project" not in said:
            key = evolve(key, project=self.caller.project)
        if "expires_at" not in said and self.end is not None:
            key = evolve(key, expires_at=int(self.end))
        if "models" not in said:
            key = evolve(key, models=models_within(key.models, self.caller.models))
        if "limits" not in said and self.caller.allowance is not None:
            wider = wider_limits(_effective(key, tenant), self.caller.allowance)
            key = evolve(key, limits=limits_or_none(narrowed_limits(key.limits, wider, self.caller.allowance)))
        return key

    def check_key(self, key: Key, tenant: Tenant | None) -> None:
        """Raise Forbidden for a key that would open more than the operator has."""
        self.check_tenant(key.tenant)
        self.check_roles(key)
        if self.unbound:
            return
        own = self.caller.models
        self._check_models(models_within(key.models, tenant.models if tenant else None), own)
        if wider := wider_limits(_effective(key, tenant), self.caller.allowance):
            raise Forbidden(f"You may not give more {_named(wider)} than you have.", param="limits")
        if self.end is not None and (key.expires_at is None or key.expires_at > self.end):
            raise Forbidden("A key may not outlive your own.", param="expires_at")
        if self.caller.project not in (None, key.project):
            raise Forbidden("A key must have your own project.", param="project")
        if not self.caller.tags.items() <= key.tags.items():
            raise Forbidden("A key must have your own tags.", param="tags")

    def check_tenant(self, tenant: str) -> None:
        """Raise Forbidden for a tenant that the operator does not rule."""
        if self.scope is not None and tenant != self.scope:
            raise Forbidden("You may do this for your own tenant alone.", param="tenant")

    def check_roles(self, key: Key) -> None:
        """Raise Forbidden for a key that has a role which the operator could not give."""
        if self.unbound:
            return  # a role that is no longer defined can be taken away
        for role in key.roles:
            if not self.may_give(role):
                raise Forbidden(f"The role {role} opens more than your own roles do.", param="roles")

    def check_settings(self, tenant: Tenant) -> None:
        """Raise Forbidden for a tenant whose keys would have more than the operator."""
        if self.unbound:
            return
        self._check_models(tenant.models, self.caller.models)
        if wider := wider_limits(tenant.limits, self.caller.allowance, of_tenant=True):
            raise Forbidden(f"You may not give more {_named(wider)} than you have.", param="limits")

    @staticmethod
    def _check_models(models: Models, own: Models) -> None:
        if own is not None and (models is None or not all(fits(model, own) for model in models)):
            raise Forbidden("You may not allow models that you may not use yourself.", param="models")


def _effective(key: Key, tenant: Tenant | None) -> Allowance | None:
    return limits_together(key.limits, tenant.limits if tenant else None)


def _named(limits: list[str]) -> str:
    return " and ".join(_WORDS.get(name, name) for name in limits)
