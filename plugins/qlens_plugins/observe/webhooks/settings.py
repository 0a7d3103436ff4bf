"""What the file may say about webhooks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attrs import Attribute, field, frozen
from attrs.validators import and_, deep_iterable, ge, gt, le, matches_re, max_len, min_len, optional

from qlens import Reach, Secret, Url, extra_headers, fits, networks, outbound_url, sqlite_path
from qlens_plugins.observe.webhooks.signing import HEADERS, key_of


def _file(_config: object, _attribute: object, value: str) -> None:
    sqlite_path(value, Path())


def _secrets(_config: object, _attribute: object, value: tuple[Secret, ...]) -> None:
    for each in value:
        key_of(each)


def _reachable(config: WebhooksConfig, attribute: Attribute[Any], value: tuple[WebhookEndpoint, ...]) -> None:
    networks(config, attribute, config.allow)
    seen = set()
    for each in value:
        if each.name in seen:
            raise ValueError(f"two endpoints are called {each.name!r}: give each a name of its own")
        seen.add(each.name)
        try:
            config.reach.check(each.url)
        except ValueError as error:
            raise ValueError(f"the URL of {each.name!r} cannot be reached: {error}") from None


@frozen
class WebhookEndpoint:
    """Where some events are sent."""

    name: str = field(validator=matches_re(r"[A-Za-z0-9._-]{1,64}"))
    """What commands, metrics and logs call it."""
    url: str = field(validator=outbound_url)
    """Where it is: `https://hooks.example.com/qlens`."""
    secrets: tuple[Secret, ...] = field(validator=and_(min_len(1), max_len(2), _secrets))
    """What events are signed with, as `whsec_...`. Two while one replaces the other: then there are both signatures."""
    events: tuple[str, ...] = field(validator=and_(min_len(1), deep_iterable(min_len(1))))
    """The types of events that are sent: `qlens.receipt`, or `qlens.budget.*` for all that begin so."""
    tenants: tuple[str, ...] | None = field(default=None, validator=optional(min_len(1)))
    """Whose events are sent, `acme` or `acme-*`; None: all, and those of no tenant, such as a changed configuration."""
    headers: Mapping[str, Secret] = field(
        factory=dict, hash=False, validator=extra_headers(*HEADERS), metadata={"lasting": False}
    )
    """More headers for every request."""

    def wants(self, type_: str, tenant: str | None) -> bool:
        """Whether it is sent the events of a type and a tenant."""
        return fits(type_, self.events) and fits(tenant, self.tenants)

    @property
    def keys(self) -> list[bytes]:
        """What to sign with."""
        return [key_of(secret) for secret in self.secrets]


@frozen
class WebhooksConfig:
    """Sends events to HTTP endpoints, signed by Standard Webhooks, again and again until they are taken."""

    endpoints: tuple[WebhookEndpoint, ...] = field(validator=[min_len(1), _reachable])
    """Who is sent what."""
    url: Url = field(default=Url("sqlite:///webhooks.db"), validator=_file)
    """Where events wait, as `sqlite:///FILE`; a relative one is in the YAML file's folder. The folder beside it, with
    `.spool` at its end, takes them first."""
    source: str = field(default="/qlens", validator=matches_re(r"[!-~]+"))
    """Which gateway the events come from, as a URI-reference: the attribute `source` of CloudEvents."""
    allow: tuple[str, ...] = field(default=(), validator=networks)
    """Networks that are reached though they are not public, as `10.1.0.0/16`, at any port and over http too."""
    ports: tuple[int, ...] = field(default=(443,), validator=deep_iterable(and_(ge(1), le(65535))))
    """The ports at which public addresses are reached."""
    timeout_seconds: float = field(default=5.0, validator=[gt(0), le(60)])
    """How long one delivery may take, from the name's address to the end of the answer."""
    give_up_hours: float = field(default=24, validator=[gt(0), le(24 * 7)])
    """After this time without success a delivery is dead: `qlens webhooks dead` lists them."""
    concurrency: int = field(default=8, validator=[ge(1), le(100)])
    """How many deliveries to one endpoint may be under way in one process."""
    queue_size: int = field(default=100_000, validator=ge(1))
    """How many events may wait for one endpoint; what comes then is counted and lost."""
    dead_size: int = field(default=10_000, validator=ge(0))
    """How many dead deliveries to one endpoint are kept; the oldest go first."""

    @property
    def reach(self) -> Reach:
        """Where connections may go."""
        return Reach(self.allow, self.ports)
