"""What roles open: four that rank from least to most, three that rule one tenant, and those that the file defines."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from attrs import define, field, frozen

from qlens.config.entries import BUILT_IN_ROLES, RANKS
from qlens.errors import Forbidden

if TYPE_CHECKING:
    from qlens.call import Caller
    from qlens.config.entries import RoleSettings
    from qlens.registry import Endpoint

_OF_TENANT = "tenant_"


@frozen
class Power:
    """What one role opens."""

    rank: int
    """Its place among the ranks: a role includes those before it."""
    everywhere: bool
    """Whether it rules all tenants, and what belongs to none; otherwise the caller's own alone."""
    paths: tuple[str, ...] | None = None
    """The paths it is narrowed to, with all below them; None: every path."""

    @classmethod
    def of(cls, built_in: str, paths: tuple[str, ...] | None = None) -> Power:
        """What a built-in role opens, perhaps narrowed to some paths."""
        return cls(RANKS.index(built_in.removeprefix(_OF_TENANT)), not built_in.startswith(_OF_TENANT), paths)

    def opens(self, path: str) -> bool:
        """Whether a path is not beyond what it is narrowed to."""
        return self.paths is None or any(path == open_ or path.startswith(f"{open_}/") for open_ in self.paths)

    def includes(self, other: Power) -> bool:
        """Whether it opens all that another one opens."""
        if not other.rank:
            return True  # every caller is a member
        if self.rank < other.rank or (other.everywhere and not self.everywhere):
            return False
        return self.paths is None or (other.paths is not None and all(map(self.opens, other.paths)))


@define(eq=False)
class Roles:
    """The roles of a configuration: what is not in this table opens nothing."""

    _powers: Mapping[str, Power] = field()

    @classmethod
    def of(cls, settings: Mapping[str, RoleSettings]) -> Roles:
        """The built-in roles and those of `server.roles`."""
        custom = {name: Power.of(role.like, role.paths) for name, role in settings.items()}
        return cls({**{name: Power.of(name) for name in BUILT_IN_ROLES}, **custom})

    @property
    def names(self) -> tuple[str, ...]:
        """Every role there is."""
        return tuple(self._powers)

    def scope(self, caller: Caller, endpoint: Endpoint) -> str | None:
        """The tenant that a caller is confined to at an endpoint, None: all; raises Forbidden when it is not open."""
        needed = RANKS.index(endpoint.role or RANKS[0])
        powers = [power for power in self._of(caller.roles) if power.rank >= needed]
        opening = [power for power in powers if power.opens(endpoint.path)]
        if any(power.everywhere and power.rank for power in opening):
            return None
        # Whoever has any role is a member, whatever paths the role is narrowed to.
        if (opening and endpoint.scoped) or (powers and not needed):
            return caller.tenant
        raise Forbidden(f"{endpoint.path} needs the role {endpoint.role}.")

    def may_give(self, roles: Iterable[str], role: str) -> bool:
        """Whether somebody with these roles may give a role to others: none that opens more than one of their own."""
        given = self._powers.get(role)
        return given is not None and any(power.includes(given) for power in self._of(roles))

    def _of(self, roles: Iterable[str]) -> list[Power]:
        return [self._powers[role] for role in roles if role in self._powers]
