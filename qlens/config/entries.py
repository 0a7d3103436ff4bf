"""What a configuration file holds, as frozen classes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import attrs
from attrs import field, frozen
from attrs.validators import and_, ge, gt, le, optional

from qlens.config.environment import MissingText
from qlens.config.faults import has_missing
from qlens.config.network import Network
from qlens.config.scalars import Secret
from qlens.errors import Fault

STAGES: tuple[str, ...] = ("auth", "rate_limit", "guard", "cache", "route", "cost", "observe")
"""The stages of `pipeline`, in the order of the file; providers stand under `providers`."""

FallbackKind = Literal["any", "context_length", "content_filter", "rate_limit"]
FALLBACK_KINDS: tuple[str, ...] = get_args(FallbackKind)

RANKS = ("member", "viewer", "operator", "admin")
"""The roles that rank, from least to most: a role includes those before it."""
BuiltInRole = Literal["member", "viewer", "operator", "admin", "tenant_viewer", "tenant_operator", "tenant_admin"]
BUILT_IN_ROLES: tuple[str, ...] = get_args(BuiltInRole)
"""`tenant_admin` is an admin within its caller's own tenant, and so are the others."""

OnDisconnect = Literal["drain", "abort"]
"""What becomes of an answer whose client has left: it is read to its end, unseen, or the connection is closed."""
ON_DISCONNECT: tuple[str, ...] = get_args(OnDisconnect)

LEAST_KEY_CHARS = 32
"""The shortest key that ids may be sealed with."""


def _not_empty(_: object, __: attrs.Attribute[Any], value: Any) -> None:
    if not value:
        raise ValueError("must not be empty")


def _not_guessed(_: object, __: attrs.Attribute[Any], value: Secret) -> None:
    if len(value.reveal()) < LEAST_KEY_CHARS:
        raise ValueError(f"must have at least {LEAST_KEY_CHARS} characters, at random: openssl rand -base64 32")


def _paths(_: object, __: attrs.Attribute[Any], value: tuple[str, ...]) -> None:
    _not_empty(_, __, value)
    for path in value:
        if not path.startswith("/") or path.endswith("/") or "*" in path:
            raise ValueError(f"{path!r} must begin with / and not end with it; all below a path belong to it")


def _not_built_in(_: object, __: attrs.Attribute[Any], value: Mapping[str, Any]) -> None:
    for name in value:
        if name in BUILT_IN_ROLES or not name.strip() or not name.isprintable():
            raise ValueError(f"{name!r} cannot be defined; choose another name than {', '.join(BUILT_IN_ROLES)}")


_PORT = and_(ge(0), le(65535))


@frozen
class Admin:
    """The listener for operators: /metrics and /admin."""

    host: str = field(default="127.0.0.1", validator=_not_empty)
    """The address operators reach; off-loopback it needs an auth plugin other than `anonymous`."""
    port: int = field(default=9090, validator=_PORT)
    """The port; 0 takes any free one."""
    metrics: Literal["viewer", "open"] = "viewer"
    """Who may read /metrics off-loopback: callers with the role `viewer`, or anyone (`open`)."""


@frozen
class RoleSettings:
    """A role of the file's own."""

    like: BuiltInRole
    """The built-in role it opens as much as."""
    paths: tuple[str, ...] | None = field(default=None, validator=optional(_paths))
    """Narrows it to these paths and all below them, as `qlens routes` lists them; without it, every path."""


@frozen
class Server:
    """The sockets, and the bounds that hold for every call."""

    host: str = field(default="127.0.0.1", validator=_not_empty)
    """The address clients reach."""
    port: int = field(default=8080, validator=_PORT)
    """The port; 0 takes any free one."""
    admin: Admin = Admin()
    """The listener for operators."""
    workers: int = field(default=1, validator=ge(1))
    """How many processes serve the address: one for each core. Limits need a store that they share, or `per_worker`."""
    pin_workers: bool = False
    """Keep each of several workers on one CPU of those that the gateway may use, all its threads together: some more
    calls on a machine of its own. Not where others use these CPUs too, as under a container's CPU quota."""
    max_body_bytes: int = field(default=32 * 1024 * 1024, validator=ge(1))
    """The largest request body that is read."""
    max_answer_bytes: int = field(default=128 * 1024 * 1024, validator=ge(1))
    """The largest answer of a provider that is read as a whole; one beyond it is charged as the most that it can have
    used, and not asked for again. Streams have no such bound."""
    keepalive_seconds: float = field(default=75.0, validator=gt(0))
    """How long a client's connection may idle, or take for the head of a request. Longer than a load balancer keeps its
    connections to the gateway (60 s, most of them), or else it may send a call on one that is just being closed."""
    drain_seconds: float = field(default=30.0, validator=ge(0))
    """How long running calls may go on after the order to stop."""
    accept_seconds: float = field(default=0.0, validator=ge(0))
    """How long new calls are still taken after the order to stop, while `/readyz` says 503 already: as long as a load
    balancer takes to learn of it. `drain_seconds` begin afterwards."""
    call_seconds: float = field(default=600.0, validator=gt(0))
    """How long one call may take, whatever it waits for."""
    session_seconds: float = field(default=3600.0, validator=gt(0))
    """How long a realtime session may be open."""
    session_idle_seconds: float = field(default=900.0, validator=gt(0))
    """How long a realtime session may be silent: without a message of the client or of the provider."""
    access_log: Path | None = None
    """A file that gets a line of JSON for each request: /dev/stdout, say. Without it there is no such log; the ledger
    has the calls."""
    network: Network | None = None
    """How plugins reach providers, issuers of tokens and key sets, unless a provider has a `network` of its own."""
    id_key: Secret | None = field(default=None, validator=optional(_not_guessed))
    """Seals the ids of objects that providers keep (responses, files, batches); the same for all replicas. Without it
    each provider's ids are sealed with its own secrets: ids end when those change, and a provider without any keeps
    nothing."""
    roles: Mapping[str, RoleSettings] = field(factory=dict, validator=_not_built_in, hash=False)
    """Roles beside the built-in ones, by name. A role that is neither opens nothing."""

    def __attrs_post_init__(self) -> None:
        if self.port and (self.host, self.port) == (self.admin.host, self.admin.port):
            raise ValueError("clients and operators cannot share one port; give admin.port another number")


@frozen
class PluginEntry:
    """One plugin instance as the file names it; its settings are checked against the plugin's class later."""

    stage: str
    name: str
    plugin: str
    settings: dict[str, Any] = field(repr=False, hash=False)
    path: str = field(eq=False)
    """Where it stands: `qlens.yaml:12 pipeline.cache[0]`."""
    on_disconnect: OnDisconnect | None = None
    """Of a provider; None leaves it to the plugin."""

    @property
    def missing_env(self) -> bool:
        """Whether some of it is unknown because an environment variable is not set."""
        return isinstance(self.plugin, MissingText) or has_missing(self.settings)


@frozen
class TargetEntry:
    """A provider and the name it gives the model."""

    provider: str = field(validator=_not_empty)
    """A name under `providers`."""
    model: str = field(validator=_not_empty)
    """What this provider calls the model; a `*` at its end stands for what the model's wildcard matched."""
    weight: int = field(default=1, validator=ge(0))
    """The share of calls that go here first; 0 means only when the others failed."""
    base_model: str | None = None
    """What the model really is, for its price, where the provider's name hides it."""
    region: str | None = None
    """Where the target runs."""
    params: Mapping[str, Any] = field(factory=dict, hash=False)
    """Body fields set for this target; they win over the client's."""


@frozen
class FallbackKinds:
    """Fallbacks by kind of failure."""

    any: tuple[str, ...] = ()
    """Models to ask after any failure."""
    context_length: tuple[str, ...] = ()
    """Models to ask when the prompt is too long for this one."""
    content_filter: tuple[str, ...] = ()
    """Models to ask when the provider's own filter refused."""
    rate_limit: tuple[str, ...] = ()
    """Models to ask when the providers' rate limits are reached."""

    def by_kind(self) -> dict[str, tuple[str, ...]]:
        """The kinds that have any."""
        return {kind: names for kind in FALLBACK_KINDS if (names := getattr(self, kind))}


@frozen
class ModelSettings:
    """What stands behind a public model name."""

    targets: tuple[TargetEntry, ...] = field(validator=_not_empty)
    """Where calls for this model may go; at least one."""
    max_output_tokens: int | None = field(default=None, validator=optional(ge(1)))
    """The most tokens one answer may have; a client that asks for more gets this."""
    max_n: int = field(default=128, validator=ge(1))
    """The most choices one call may ask for."""
    fallbacks: tuple[str, ...] | FallbackKinds = ()
    """Models to ask when no target of this one could answer: a list, or a mapping by kind of failure."""


@frozen
class ModelEntry:
    """A model of the file, under its public name or its wildcard."""

    name: str
    targets: tuple[TargetEntry, ...]
    fallbacks: Mapping[str, tuple[str, ...]] = field(factory=dict, hash=False)
    """Public names by kind; kinds without any are left out."""
    max_output_tokens: int | None = None
    max_n: int = 128

    @classmethod
    def of(cls, name: str, settings: ModelSettings) -> ModelEntry:
        """The entry of a name and what the file says about it."""
        fallbacks = settings.fallbacks if isinstance(settings.fallbacks, FallbackKinds) else None
        by_kind = (fallbacks or FallbackKinds(any=settings.fallbacks)).by_kind()  # type: ignore[arg-type]
        return cls(name, settings.targets, by_kind, settings.max_output_tokens, settings.max_n)


@frozen
class Config:
    """A whole configuration."""

    server: Server
    pipeline: Mapping[str, tuple[PluginEntry, ...]]
    """Plugins by stage, in calling order; every stage is there."""
    providers: Mapping[str, PluginEntry]
    models: Mapping[str, ModelEntry]
    version: str
    """Changes with the content, environment included; nothing can be read back from it."""
    folder: Path
    """Where relative files are."""


@frozen
class Draft:
    """What of a file could be understood, and everything that is wrong with it."""

    config: Config
    faults: tuple[Fault, ...]


def matches(pattern: str, name: str) -> bool:
    """Whether a model's name, or wildcard, covers a name that clients may ask for."""
    if not pattern.endswith("*"):
        return name == pattern
    return name.startswith(pattern[:-1]) and len(name) >= len(pattern) and not name.endswith("*")
