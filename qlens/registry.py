"""From plugin names in YAML to ordered hook functions: found, checked, constructed and frozen at start-up."""

from __future__ import annotations

import argparse
import dis
import importlib
import inspect
import sys
from collections.abc import Awaitable, Callable, Iterable, Mapping
from importlib.metadata import EntryPoint, EntryPoints, entry_points
from ipaddress import ip_address
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pluggy
from attrs import define, field, fields, frozen

from qlens import hookspecs
from qlens.config import ON_DISCONNECT, Config, Draft, PluginEntry, convert, draft, text_of
from qlens.crashes import censored
from qlens.errors import ConfigError, Fault, StartupError
from qlens.models import Models, models_of

if TYPE_CHECKING:
    from qlens.call import Call, Reply, Target
    from qlens.gateway import Gateway

Select = Callable[..., EntryPoints]

STAGES = ("auth", "rate_limit", "guard", "cache", "route", "provider", "cost", "observe")
"""The order in which a call meets the plugins."""


@frozen
class Health:
    """How a plugin is: shown, never judged."""

    ok: bool
    detail: str = ""


@frozen
class Endpoint:
    """A path that a plugin serves."""

    method: str
    path: str
    role: str | None
    """The least role a caller must have, one of those that rank (member, viewer, operator, admin); None is public."""
    handler: Callable[[Call], Awaitable[Reply]]
    listener: Literal["client", "admin"] = "client"
    scoped: bool = False
    """Whether the handler minds `call.scope`, the tenant that a caller is confined to: only then it is open to roles
    that rule one tenant (`tenant_admin`, say)."""
    shared: bool = False
    """Whether the handler answers for all instances of its plugin: of several, the first serves the path."""


@frozen
class Command:
    """A command that a plugin adds to `qlens`."""

    name: str
    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[Gateway, argparse.Namespace], Awaitable[int]]


@frozen
class Bound:
    """One plugin's function for one hook, ready to be called with all of the hook's arguments."""

    name: str
    """The hook."""
    plugin: str
    """The instance's name, as in YAML."""
    instance: str
    """Stage and name: unique."""
    fn: Callable[..., Any] = field(repr=False)
    bounded: bool = False
    """Whether the plugin must know how much a call can generate."""
    waits: bool = True
    """Whether it may wait for anything: an `async def` without an await in it cannot."""
    owner: object = field(default=None, repr=False, eq=False)
    """The plugin."""


@frozen
class Hooks:
    """Every hook of a configuration as a tuple of functions in calling order."""

    lifespan: tuple[Bound, ...] = ()
    endpoints: tuple[Bound, ...] = ()
    commands: tuple[Bound, ...] = ()
    audit_log: tuple[Bound, ...] = ()
    banner: tuple[Bound, ...] = ()
    health: tuple[Bound, ...] = ()
    adopt: tuple[Bound, ...] = ()
    authenticate: tuple[Bound, ...] = ()
    admit: tuple[Bound, ...] = ()
    wrap_call: tuple[Bound, ...] = ()
    lookup: tuple[Bound, ...] = ()
    choose: tuple[Bound, ...] = ()
    retry: tuple[Bound, ...] = ()
    wrap_send: tuple[Bound, ...] = ()
    send: tuple[Bound, ...] = ()
    connect: tuple[Bound, ...] = ()
    store: tuple[Bound, ...] = ()
    price: tuple[Bound, ...] = ()
    settle: tuple[Bound, ...] = ()
    explain: tuple[Bound, ...] = ()


@frozen(eq=False)
class Provider:
    """A configured provider as the pipeline sees it."""

    name: str
    plugin: object
    send: Bound
    spoken: Mapping[tuple[str, str], tuple[str, ...]]
    """The dialects it speaks for each target known at start-up, by target key."""
    connect: Bound | None = None
    """None: it has no realtime sessions."""
    drains: bool = False
    """Whether an answer whose client has left is read to its end."""

    def dialects(self, target: Target) -> tuple[str, ...]:
        """The dialects this provider speaks for a target; one behind a wildcard is asked when it is met."""
        known = self.spoken.get(target.key)
        return known if known is not None else spoken_by(self.plugin, target)


@define(eq=False)
class Instance:
    """A constructed plugin with where it stands."""

    entry: PluginEntry
    cls: type
    config: object
    plugin: Any

    @property
    def key(self) -> str:
        """Stage and name: what makes an instance the same one after a reload."""
        return f"{self.entry.stage}.{self.entry.name}"

    def same(self, other: Instance | None) -> bool:
        """Whether another instance is this one, unchanged."""
        return other is not None and other.cls is self.cls and other.config == self.config


@frozen(eq=False)
class Registration:
    """All plugins of a configuration."""

    config: Config
    instances: tuple[Instance, ...]
    hooks: Hooks
    providers: dict[str, Provider]
    models: Models
    new: tuple[Instance, ...]
    """Those that did not come from the previous configuration."""


def spoken_by(plugin: object, target: Target) -> tuple[str, ...]:
    """The dialects a provider speaks for a target; one that does not say takes every call as the client wrote it."""
    ask = getattr(plugin, "dialects", None)
    return tuple(ask(target)) if ask is not None else ("chat", "completions", "embeddings")


def installed(stage: str, select: Select | None = None) -> dict[str, list[EntryPoint]]:
    """The plugins of a stage that are installed, by name; not imported.

    `select` is that of `entry_points()`, for whoever asks often: every distribution's files are read for it.
    """
    found: dict[str, list[EntryPoint]] = {}
    for point in (select or entry_points().select)(group=f"qlens.{stage}"):
        known = found.setdefault(point.name, [])
        # The same distribution may be seen twice (a source checkout and its installation).
        if all(point.value != other.value or _distribution(point) != _distribution(other) for other in known):
            known.append(point)
    return found


def _distribution(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else "?"


def register(found: Draft, previous: Registration | None = None) -> Registration:
    """Find, check and construct every plugin of a configuration.

    Instances whose class and config did not change are taken over from `previous`. Raises ConfigError with all faults,
    the file's own and those of its plugins.
    """
    config = found.config
    folder = str(config.folder)
    if folder not in sys.path:
        sys.path.insert(0, folder)  # a plugin in a file next to the YAML is importable
    faults = list(found.faults)
    before = {instance.key: instance for instance in previous.instances} if previous else {}
    instances, new = [], []
    select = entry_points().select
    for entry in _entries(config):
        try:
            instance = _instance(entry, config, before, select)
        except StartupError as error:
            faults.extend(error.faults)
            continue
        instances.append(instance)
        if before.get(instance.key) is not instance:
            new.append(instance)
    if faults:
        raise ConfigError(faults)
    models = models_of(config, _kinds(instances))
    hooks = _hooks(instances)
    providers = _providers(config.providers, instances, hooks, models, faults)
    faults.extend(_misplaced(config, instances))
    if faults:
        raise ConfigError(faults)
    return Registration(config, tuple(instances), hooks, providers, models, tuple(new))


def _kinds(instances: Iterable[Instance]) -> dict[str, str | None]:
    """Whose models each provider serves: a server that speaks a known API need not be the one known for it."""
    return {
        instance.entry.name: getattr(instance.plugin, "kind", instance.entry.plugin)
        for instance in instances
        if instance.entry.stage == "provider"
    }


def drafted(path: Path, *, check_env: bool = True) -> Draft:
    """A configuration file with whatever is wrong with it, for `register`."""
    return draft(text_of(path), folder=path.parent, check_env=check_env, source=str(path))


def _entries(config: Config) -> Iterable[PluginEntry]:
    for stage in STAGES:
        yield from config.providers.values() if stage == "provider" else config.pipeline.get(stage, ())


def _instance(entry: PluginEntry, config: Config, before: Mapping[str, Instance], select: Select) -> Instance:
    cls = find(entry, select)
    check(cls, entry)
    accepted = getattr(cls, "Config", None)
    if accepted is None:
        if entry.settings:
            raise _fault(entry, f"{entry.plugin} accepts no settings; found {', '.join(sorted(entry.settings))}")
        settings: object = None
    else:
        settings = convert(entry.settings, accepted, entry.path, folder=config.folder)
    instance = Instance(entry, cls, settings, None)
    old = before.get(instance.key)
    if old is not None and instance.same(old):
        return old
    try:
        instance.plugin = cls(settings, entry.name)
    except (Exception, SystemExit) as error:
        said = str(error) if isinstance(error, ValueError | TypeError) else _named(error)
        raise _fault(entry, f"{entry.plugin} cannot be constructed: {censored(said, settings)}") from error
    return instance


# --- finding -----------------------------------------------------------------------------------


def find(entry: PluginEntry, select: Select | None = None) -> type:
    """The class a plugin name stands for: an entry point of the stage's group, or an import path with a colon."""
    if ":" in entry.plugin:
        return _import(entry)
    known = installed(entry.stage, select)
    points = known.get(entry.plugin, [])
    if not points:
        names = ", ".join(sorted(known)) or "none"
        raise _fault(entry, f"no {entry.stage} plugin called {entry.plugin!r}; installed: {names}")
    if len(points) > 1:
        owners = " and ".join(sorted(f"{_distribution(point)} ({point.value})" for point in points))
        raise _fault(entry, f"{entry.plugin!r} is provided by {owners}; uninstall one, or name one by import path")
    try:
        loaded = points[0].load()
    except (ImportError, AttributeError) as error:
        raise _fault(entry, f"{_of(entry, points[0])} cannot be imported: {error}{_extra(points[0], error)}") from error
    except (Exception, SystemExit) as error:
        raise _fault(entry, f"{_of(entry, points[0])} cannot be imported: {_named(error)}") from error
    return _class(entry, loaded)


def _of(entry: PluginEntry, point: EntryPoint) -> str:
    """A plugin, and whose it is where it is not one of ours."""
    owner = _distribution(point)
    return f"plugin {entry.plugin!r}" + ("" if owner in {"qlens", "?"} else f" of the package {owner}")


def _extra(point: EntryPoint, error: Exception) -> str:
    """Where that may come from which cannot be imported: an extra that is called like the plugin, or the package."""
    if point.dist is None or not isinstance(error, ImportError):
        return ""
    extra = point.name.replace("_", "-")
    if extra in (point.dist.metadata.get_all("Provides-Extra") or ()):
        return f"; is its extra installed? pip install '{point.dist.name}[{extra}]'"
    return f"; is all there that {point.dist.name} needs? pip install --upgrade {point.dist.name}"


def _import(entry: PluginEntry) -> type:
    module, _, name = entry.plugin.partition(":")
    try:
        loaded = getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise _fault(
            entry, f"cannot import {module!r}: {error}; is the file next to the YAML, or installed?"
        ) from error
    except AttributeError:
        raise _fault(entry, f"the module {module!r} has no {name!r}") from None
    except (Exception, SystemExit) as error:
        raise _fault(entry, f"cannot import {module!r}: {_named(error)}") from error
    return _class(entry, loaded)


def _class(entry: PluginEntry, found: object) -> type:
    if not isinstance(found, type):
        raise _fault(entry, f"{entry.plugin!r} is a {type(found).__name__}, not a class")
    return found


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _fault(entry: PluginEntry, message: str) -> ConfigError:
    return ConfigError([Fault(entry.path, message)])


# --- checking ----------------------------------------------------------------------------------


def check(cls: type, entry: PluginEntry) -> None:
    """Refuse a plugin class whose hooks would not do what their author meant; raises ConfigError with all faults."""
    faults = []
    for name, function in inspect.getmembers(cls, inspect.isfunction):
        options = getattr(function, "qlens_impl", None)
        message = _unmarked(name) if options is None else _wrong(name, function, options)
        if message:
            faults.append(Fault(entry.path, f"{entry.plugin}.{name} {message}"))
    if faults:
        raise ConfigError(faults)


def _unmarked(name: str) -> str | None:
    if name in hookspecs.__all__:
        return "is named like a hook but not marked: put @hookimpl above it"
    return None


def _wrong(name: str, function: Callable[..., object], options: Mapping[str, object]) -> str | None:
    """What is wrong with an implementation, or None."""
    if name not in hookspecs.__all__:
        return f"is marked @hookimpl but there is no such hook; hooks: {', '.join(hookspecs.__all__)}"
    for option in ("tryfirst", "trylast", "hookwrapper", "wrapper"):
        if options.get(option):
            return f"uses {option}: calling order is the stage's and YAML's alone"
    spec = getattr(hookspecs, name)
    if inspect.iscoroutinefunction(spec) and not inspect.iscoroutinefunction(function):
        return "must be async: write `async def`"
    if not inspect.iscoroutinefunction(spec) and inspect.iscoroutinefunction(function):
        return "must not be async: write `def`"
    allowed = list(inspect.signature(spec).parameters)
    unknown = [arg for arg in list(inspect.signature(function).parameters)[1:] if arg not in allowed]
    if unknown:
        return f"takes {', '.join(unknown)}, which the hook does not give; it gives {', '.join(allowed)}"
    return None


def _misplaced(config: Config, instances: Iterable[Instance]) -> Iterable[Fault]:
    """What plugins say of themselves that does not fit the server's settings."""
    for instance in instances:
        if getattr(instance.plugin, "loopback_only", False) and not is_loopback(config.server.host):
            yield Fault(
                instance.entry.path,
                f"{instance.entry.plugin} is set up for this machine only, but server.host is {config.server.host}: "
                "bind to 127.0.0.1, or take the setting that makes it so (a demo key, say) out",
            )
        if config.server.workers > 1 and _limits_alone(instance):
            yield Fault(instance.entry.path, _too_generous(instance, config.server.workers))
    admin, auth = config.server.admin, [instance for instance in instances if instance.entry.stage == "auth"]
    if is_loopback(admin.host):
        return
    if all(_believes_everybody(instance) for instance in auth):
        yield Fault(
            "server.admin.host",
            f"{admin.host} can be reached from other machines, and no auth plugin asks for a credential: "
            "bind to 127.0.0.1, or add an auth plugin such as api_keys",
        )
    for instance in auth:
        roles = getattr(instance.config, "roles", None)
        if _believes_everybody(instance) and not (isinstance(roles, tuple) and set(roles) <= {"member"}):
            yield Fault(
                instance.entry.path,
                f"{instance.entry.plugin} asks for no credential, gives more than the role member, and "
                f"server.admin.host is {admin.host}: bind that to 127.0.0.1, or leave it `roles: [member]`",
            )


def _believes_everybody(instance: Instance) -> bool:
    return bool(getattr(instance.plugin, "needs_no_credential", False))


def _limits_alone(instance: Instance) -> bool:
    """Whether it may refuse calls by what its own process counted: caches and breakers may know less, limits not."""
    return (
        instance.entry.stage in {"rate_limit", "cost"}
        and hasattr(instance.cls, "admit")
        and getattr(instance.plugin, "shares", "process") != "store"
    )


def _too_generous(instance: Instance, workers: int) -> str:
    way = "a store that they share"
    if hasattr(getattr(instance.config, "store", None), "per_worker"):
        way = "`store: {kind: memory, per_worker: true}`, which gives each its part of the limits"
    return (
        f"{instance.entry.plugin} counts in each process by itself, so {workers} workers would together allow "
        f"{workers} times its limits: give it {way}, or set server.workers to 1"
    )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a bind address; a name other than localhost may be anybody's."""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


# --- ordering ----------------------------------------------------------------------------------


def _hooks(instances: Iterable[Instance]) -> Hooks:
    """Freeze what the plugins implement, in stage order and then YAML order."""
    manager = pluggy.PluginManager("qlens")
    manager.add_hookspecs(hookspecs)
    owners = {}
    for instance in instances:
        manager.register(instance.plugin, name=instance.key)
        owners[instance.key] = instance
    manager.check_pending()
    return Hooks(
        **{
            # pluggy lists implementations in the order of registration (and would call them last first).
            name: tuple(
                _bound(name, impl, owners[impl.plugin_name]) for impl in getattr(manager.hook, name).get_hookimpls()
            )
            for name in (attribute.name for attribute in fields(Hooks))
        }
    )


def _bound(name: str, impl: pluggy.HookImpl, owner: Instance) -> Bound:
    expected = tuple(inspect.signature(getattr(hookspecs, name)).parameters)
    return Bound(
        name=name,
        plugin=owner.entry.name,
        instance=owner.key,
        fn=_adapted(impl.function, expected, tuple(impl.argnames)),
        bounded=bool(getattr(owner.plugin, "bounded", False)),
        waits=_waits(impl.function),
        owner=owner.plugin,
    )


def _waits(function: Callable[..., Any]) -> bool:
    code = getattr(function, "__code__", None)
    # Every second byte is the code of an instruction.
    return code is None or dis.opmap["SEND"] in code.co_code[::2]


def _adapted(function: Callable[..., Any], given: tuple[str, ...], taken: tuple[str, ...]) -> Callable[..., Any]:
    """The function, callable with all of the hook's arguments though it may take fewer: so a hook can grow."""
    if given == taken:
        return function
    places = [given.index(name) for name in taken]
    if not places:
        return lambda *args: function()
    if len(places) == 1:
        place = places[0]
        return lambda *args: function(args[place])
    pick = itemgetter(*places)
    return lambda *args: function(*pick(args))


def _providers(
    entries: Mapping[str, PluginEntry], instances: Iterable[Instance], hooks: Hooks, models: Models, faults: list[Fault]
) -> dict[str, Provider]:
    senders = {hook.instance: hook for hook in hooks.send}
    connectors = {hook.instance: hook for hook in hooks.connect}
    providers = {}
    for instance in instances:
        if instance.entry.stage != "provider":
            continue
        if instance.key not in senders:
            faults.append(Fault(instance.entry.path, f"{instance.entry.plugin} does not implement send"))
            continue
        targets = [
            target for model in models.values() for target in model.candidates if target.provider == instance.entry.name
        ]
        for target in targets:
            for message in getattr(instance.plugin, "check", lambda _: ())(target):
                faults.append(Fault(f"models.{target.public}", message))
        spoken = {target.key: spoken_by(instance.plugin, target) for target in targets}
        # The file's own entry: an instance that did not change is that of the configuration before.
        chosen = entries[instance.entry.name].on_disconnect or getattr(instance.plugin, "on_disconnect", "abort")
        if chosen not in ON_DISCONNECT:
            said = f"{instance.entry.plugin}.on_disconnect is {chosen!r}"
            faults.append(Fault(instance.entry.path, f"{said}, expected one of: {', '.join(ON_DISCONNECT)}"))
        providers[instance.entry.name] = Provider(
            instance.entry.name,
            instance.plugin,
            senders[instance.key],
            spoken,
            connectors.get(instance.key),
            drains=chosen == "drain",
        )
    return providers
