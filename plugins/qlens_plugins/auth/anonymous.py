"""Authentication for gateways that nobody else reaches: every call has one and the same caller."""

from __future__ import annotations

from attrs import define, field, frozen, validators

from qlens import Caller, hookimpl


@frozen
class AnonymousConfig:
    """Takes every call that reaches it, with or without a credential, as one and the same caller."""

    tenant: str = field(default="anonymous", validator=validators.min_len(1))
    """The tenant these calls belong to."""
    roles: tuple[str, ...] = ("member",)
    """The roles of this caller. An admin role here opens the operators' paths to everybody who can connect."""


@define(eq=False)
class Anonymous:
    """Answers for every call, so it stands last in the list: plugins after it are never asked."""

    config: AnonymousConfig
    name: str
    _caller: Caller = field(init=False)

    Config = AnonymousConfig
    needs_no_credential = True

    @_caller.default
    def _one_for_all(self) -> Caller:
        return Caller(tenant=self.config.tenant, subject="anonymous", by=self.name, roles=frozenset(self.config.roles))

    @hookimpl
    async def authenticate(self) -> Caller:
        """Take the call."""
        return self._caller
