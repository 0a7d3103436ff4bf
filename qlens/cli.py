"""The command `qlens`: serve, check, plugins, routes, explain, version, and the commands that plugins add."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import qlens
from qlens.advice import warnings
from qlens.call import Caller, Target
from qlens.config import Draft, draft, text_of
from qlens.crashes import Lines, guard_loop, guard_output
from qlens.errors import CallError, Fault, StartupError
from qlens.gateway import Gateway
from qlens.money import usd
from qlens.operations import OPERATIONS, Operation
from qlens.paths import own_endpoints, plugin_endpoints
from qlens.paths import served as paths_of
from qlens.placed import placed
from qlens.registry import STAGES, Bound, Command, Hooks, Registration, drafted, installed, register
from qlens.server import may_open_all, served, spare_the_collector
from qlens.signals import ignore_stops, on_reload, on_stop

log = logging.getLogger("qlens")

_EXAMPLES = """\
examples:
  qlens serve config/qlens.yaml        start the gateway
  qlens check config/production.yaml   find every fault, without starting anything
  qlens routes config/qlens.yaml       every path with the hooks it runs
  qlens keys create --tenant acme      make a key (a command of the plugin api_keys)

Commands of plugins take -c CONFIG (default: $QLENS_CONFIG, then ./config/qlens.yaml).
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 2 for a fault of the configuration."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        code = _dispatch(words)
        sys.stdout.flush()  # here, where it is known what to do if nobody reads it
    except StartupError as error:
        for fault in error.faults:
            print(f"qlens: {fault}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code


def _dispatch(words: list[str]) -> int:
    parser = _parser()
    first = next((word for word in words if not word.startswith("-")), None)
    if first is not None and first not in _CORE:
        return _plugin_command(words)
    args = parser.parse_args(words)
    if args.command is None:
        parser.print_help()
        return 0
    code: int = args.run(args)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qlens",
        description="An LLM gateway whose every stage is a plugin.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    serve = commands.add_parser("serve", help="start the gateway", epilog="example: qlens serve config/qlens.yaml")
    serve.add_argument("config", metavar="CONFIG", type=Path)
    serve.set_defaults(run=_serve)

    check = commands.add_parser(
        "check",
        help="find every fault of a configuration",
        epilog="example: qlens check --no-env config/production.yaml",
    )
    check.add_argument("config", metavar="CONFIG", type=Path)
    check.add_argument("--no-env", action="store_true", help="environment variables need not be set (for CI)")
    check.set_defaults(run=_check)

    plugins = commands.add_parser("plugins", help="list installed plugins", epilog="example: qlens plugins --json")
    plugins.add_argument("--json", action="store_true", help="print JSON")
    plugins.set_defaults(run=_plugins)

    routes = commands.add_parser(
        "routes", help="list every path with the hooks it runs", epilog="example: qlens routes config/qlens.yaml"
    )
    routes.add_argument("config", metavar="CONFIG", type=Path)
    routes.add_argument("--json", action="store_true", help="print JSON")
    routes.set_defaults(run=_routes)

    explain = commands.add_parser(
        "explain",
        help="say what would happen to a call, and why",
        epilog="example: qlens explain config/qlens.yaml body.json --tenant acme",
    )
    explain.add_argument("config", metavar="CONFIG", type=Path)
    explain.add_argument("body", metavar="BODY.json", type=Path, help="the request's body; - reads standard input")
    explain.add_argument(
        "--operation",
        choices=[o.name for o in OPERATIONS if o.runs == "full" and o.body == "json"],
        help="default: guessed",
    )
    explain.add_argument("--tenant", default="example", help="the caller's tenant")
    explain.add_argument("--project", help="the caller's project")
    explain.add_argument("--json", action="store_true", help="print JSON")
    explain.set_defaults(run=_explain)

    version = commands.add_parser("version", help="print the version")
    version.set_defaults(run=lambda _: print(qlens.__version__) or 0)
    return parser


_CORE = {"serve", "check", "plugins", "routes", "explain", "version"}


# --- serve -------------------------------------------------------------------------------------


def _serve(args: argparse.Namespace) -> int:
    lines = logging.StreamHandler(sys.stderr)
    lines.setFormatter(Lines("%(asctime)s %(levelname)s %(name)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[lines])
    guard_output()
    may_open_all()
    path, text = args.config, text_of(args.config)
    found = draft(text, folder=path.parent, source=str(path))
    # A file with faults is served by nobody: `register` tells them, with those of the plugins.
    if found.config.server.workers > 1 and not found.faults:
        from qlens.workers.supervisor import supervise  # most run one process, which then need not load it

        return asyncio.run(supervise(path, text, found.config.server))
    return asyncio.run(_serving(path, found))


async def _serving(path: Path, found: Draft) -> int:
    guard_loop()
    gateway = Gateway()
    stop, reload = asyncio.Event(), asyncio.Event()
    starting = asyncio.current_task()
    assert starting is not None
    on_stop(starting.cancel)  # a plugin may take long to open
    on_reload(reload.set)
    try:
        await _serving_until(stop, reload, gateway, found, path)
    except asyncio.CancelledError:
        log.info("told to stop before it served")
    ignore_stops()
    return 0


async def _serving_until(
    stop: asyncio.Event, reload: asyncio.Event, gateway: Gateway, found: Draft, path: Path
) -> None:
    async with served(gateway, found) as server:
        on_stop(stop.set)
        print(f"qlens {qlens.__version__}: {gateway.url} for clients, {server.admin_url} for operators")
        for line in gateway.banner():
            print(line)
        sys.stdout.flush()
        await server.start()
        spare_the_collector()
        reloading = asyncio.create_task(_reloading(gateway, path, reload))
        await stop.wait()
        reloading.cancel()


async def _reloading(gateway: Gateway, path: Path, asked: asyncio.Event) -> None:
    """Change to the file's configuration whenever it is asked for; a bad one is refused and said."""
    while True:
        await asked.wait()
        asked.clear()
        try:
            await gateway.load(partial(drafted, path))
        except StartupError as error:
            for fault in error.faults:
                log.error("the configuration stays as it is: %s", fault)
        except Exception:
            log.exception("the configuration stays as it is")
        else:
            log.info("loaded configuration %s", gateway.config.version)


# --- what a configuration says -----------------------------------------------------------------


def _check(args: argparse.Namespace) -> int:
    registration = register(drafted(args.config, check_env=not args.no_env))
    asyncio.run(_check_paths(registration))
    _commands(registration, None)  # raises where one fails, or is called like one of the core's
    for warning in warnings(registration):
        print(f"warning: {args.config}: {warning}", file=sys.stderr)
    print(f"{args.config}: good: {len(registration.instances)} plugins, {len(registration.models)} models")
    return 0


async def _check_paths(registration: Registration) -> None:
    gateway = Gateway()
    gateway.view(registration)
    try:
        paths_of(gateway, registration)
    finally:
        await gateway.http.aclose()


def _plugins(args: argparse.Namespace) -> int:
    rows = [
        {
            "stage": stage,
            "name": name,
            "package": point.dist.name if point.dist else "?",
            "version": point.dist.version if point.dist else "?",
            "class": point.value,
        }
        for stage in STAGES
        for name, points in sorted(installed(stage).items())
        for point in points
    ]
    _show(args.json, rows)
    return 0


def _routes(args: argparse.Namespace) -> int:
    registration = register(drafted(args.config))
    asyncio.run(_check_paths(registration))
    _show(args.json, asyncio.run(_route_rows(registration)))
    return 0


async def _route_rows(registration: Registration) -> list[dict[str, Any]]:
    gateway = Gateway()
    gateway.view(registration)
    rows = [
        {
            "listener": "client",
            "method": o.method,
            "path": path,
            "role": "any caller",
            "runs": _story(o, registration.hooks),
        }
        for o in OPERATIONS
        for path in o.paths
    ]
    endpoints = [*own_endpoints(gateway), *(endpoint for _, endpoint in plugin_endpoints(registration))]
    rows += [
        {
            "listener": e.listener,
            "method": e.method,
            "path": e.path,
            "role": e.role or "public",
            "runs": _names("authenticate", registration.hooks.authenticate) if e.role else "-",
        }
        for e in endpoints
    ]
    await gateway.http.aclose()
    return rows


def _names(hook: str, functions: Sequence[Bound]) -> str:
    return f"{hook}({', '.join(function.plugin for function in functions)})" if functions else ""


_STORIES: Mapping[str, tuple[str, ...]] = {
    "affinity": ("authenticate", "admit", "wrap_send", "send", "settle"),
    "full": (
        *("authenticate", "admit", "wrap_call", "lookup", "choose", "retry", "wrap_send", "send"),
        *("store", "settle"),
    ),
    "local": ("authenticate", "admit", "settle"),
    "session": ("authenticate", "admit", "choose", "retry", "wrap_send", "connect", "settle"),
}
"""The hooks that operations run, by how they run; what is in none of them runs as `full`."""


def _story(operation: Operation, hooks: Hooks) -> str:
    """The hooks an operation runs, in order."""
    names = _STORIES.get(operation.runs, _STORIES["full"])
    return " > ".join(part for name in names if (part := _names(name, getattr(hooks, name))))


def _explain(args: argparse.Namespace) -> int:
    registration = register(drafted(args.config))
    raw = sys.stdin.buffer.read() if str(args.body) == "-" else _file(args.body)
    return asyncio.run(_explaining(registration, raw, args))


def _file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise StartupError(f"{path}: {error.strerror}") from error


async def _explaining(registration: Registration, raw: bytes, args: argparse.Namespace) -> int:
    guard_loop()
    gateway = Gateway()
    gateway.view(registration)
    try:
        caller = Caller(tenant=args.tenant, subject="explain", by="explain", project=args.project)
        operation = next(o for o in OPERATIONS if o.name == (args.operation or _guess(raw)))
        call = await gateway.opened(registration, operation, raw, caller)
    except CallError as error:
        _show(True, {"status": error.status, **error.body()})
        return 1
    finally:
        await gateway.http.aclose()
    model = call.model
    assert model is not None
    lines = [
        f"operation  {operation.name} ({operation.method} {operation.path}), {'stream' if call.stream else 'one body'}",
        f"model      {model.name}, max_output_tokens {model.max_output_tokens or 'not set'}",
        *([f"counts as  {model.counts_as}"] if model.counts_as != model.name else ()),
        *(f"target     {_target(target)}" for target in model.candidates),
        *(f"fallback   {kind}: {', '.join(names)}" for kind, names in model.fallbacks.items()),
        f"bound      {call.bound.input} input tokens at most ({call.estimated_input} by estimate), "
        f"{call.bound.output if call.bounded else 'unbounded'} output",
        f"cost       at most {usd(call.bound_cost.picos)} USD"
        if call.bound_cost.picos is not None
        else "cost       unpriced",
    ]
    for hook in registration.hooks.explain:
        with placed(registration, hook.instance, "explain"):
            lines += [f"{hook.instance}: {line}" for line in hook.fn(call)]
    _show(True, {"explanation": lines}) if args.json else print("\n".join(lines))
    return 0


def _guess(raw: bytes) -> str:
    """The operation a body is most likely for, by its fields; others are named by --operation."""
    for field, name in ((b'"messages"', "chat"), (b'"prompt"', "completions"), (b'"input"', "embeddings")):
        if field in raw:
            return name
    return "chat"


def _target(target: Target) -> str:
    base = f" (base_model {target.base_model})" if target.base_model else ""
    return f"{target.provider}/{target.model}{base}, weight {target.weight}"


# --- commands of plugins -----------------------------------------------------------------------


def _plugin_command(words: list[str]) -> int:
    path, rest = _config_path(words)
    if not path.exists():
        raise StartupError(
            f"{path}: No such file or directory. Commands other than {', '.join(sorted(_CORE))}, and their help, come "
            "from the plugins of a configuration: say which with -c CONFIG, or in $QLENS_CONFIG"
        )
    registration = register(drafted(path, check_env=False))
    chosen, rest = _chosen_plugin(rest)
    commands = _commands(registration, chosen)
    asked = next((word for word in rest if not word.startswith("-")), None)
    if asked in commands and len(commands[asked]) > 1:
        owners = [owner for owner, _ in commands[asked]]
        way = f"qlens {asked} --plugin {owners[-1].partition('.')[2]}"
        raise StartupError(f"the command {asked!r} belongs to both {' and '.join(owners)}: choose one, like {way}")
    parser = argparse.ArgumentParser(
        prog="qlens", epilog=f"configuration: {path}; --plugin NAME: whose command is meant, where two plugins have it"
    )
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, [(key, command), *_] in commands.items():
        words_of = subparsers.add_parser(
            name, help=command.help, description=command.help, epilog="-c CONFIG: the configuration"
        )
        with placed(registration, key, f"the arguments of the command {name}"):
            command.add_arguments(words_of)
    args = parser.parse_args(rest)
    [(key, command)] = commands[args.command]
    if any(instance.key == key and instance.entry.missing_env for instance in registration.instances):
        register(drafted(path))  # only this plugin's own variables must be set; this raises with their names
    return asyncio.run(_running(registration, key, command, args))


def _commands(registration: Registration, chosen: str | None) -> dict[str, list[tuple[str, Command]]]:
    """The commands of plugins with their owners, or those of one instance, by its name or stage and name."""
    commands: dict[str, list[tuple[str, Command]]] = {}
    for hook in registration.hooks.commands:
        if chosen is not None and chosen not in (hook.instance, hook.instance.partition(".")[2]):
            continue
        with placed(registration, hook.instance, "commands"):
            given = [(command.name, command) for command in hook.fn()]
        for name, command in given:
            if name in _CORE:
                entry = next(each.entry for each in registration.instances if each.key == hook.instance)
                message = f"{entry.plugin}: the command {name!r} is qlens' own: give it another name"
                raise StartupError([Fault(entry.path, message)])
            commands.setdefault(name, []).append((hook.instance, command))
    if chosen is not None and not commands:
        raise StartupError(f"--plugin: no plugin called {chosen!r} has a command in this configuration")
    return commands


async def _running(registration: Registration, key: str, command: Command, args: argparse.Namespace) -> int:
    guard_loop()
    gateway = Gateway()
    try:
        with _audit_lines():
            async with gateway.only(registration, key):
                with placed(registration, key, f"the command {command.name}"):
                    return await _run(command, gateway, args)
    finally:
        await gateway.http.aclose()


async def _run(command: Command, gateway: Gateway, args: argparse.Namespace) -> int:
    try:
        return await command.run(gateway, args)
    except SystemExit as error:  # its own way to end: with a code, or with a text
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
        return error.code if isinstance(error.code, int) else int(error.code is not None)


@contextmanager
def _audit_lines() -> Iterator[None]:
    """Write what no plugin keeps to standard error: a command sets up no log."""
    log, lines = logging.getLogger("qlens.audit"), logging.StreamHandler(sys.stderr)
    lines.setFormatter(Lines("%(name)s %(message)s"))
    level = log.level
    log.addHandler(lines)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(lines)
        log.setLevel(level)


def _config_path(words: list[str]) -> tuple[Path, list[str]]:
    """Take -c CONFIG out of the words, wherever it stands."""
    chosen, rest = _taken(words, "-c")
    return Path(chosen or os.environ.get("QLENS_CONFIG") or "config/qlens.yaml"), rest


def _chosen_plugin(words: list[str]) -> tuple[str | None, list[str]]:
    """Take --plugin NAME out of the words: whose command is meant, where two plugins have it."""
    return _taken(words, "--plugin")


def _taken(words: list[str], *names: str) -> tuple[str | None, list[str]]:
    """The value of an option, and the other words."""
    rest: list[str] = []
    value = None
    remaining = iter(words)
    for word in remaining:
        if word in names:
            value = next(remaining, value)
        elif word.startswith(f"{names[-1]}="):
            value = word.partition("=")[2]
        else:
            rest.append(word)
    return value, rest


# --- output ------------------------------------------------------------------------------------


def _show(as_json: bool, found: Any) -> None:
    """Print rows as a table, or as JSON."""
    if as_json:
        print(json.dumps(found, indent=2))
        return
    if not found:
        print("nothing")
        return
    names = list(found[0])
    widths = {name: max(len(name), *(len(str(row[name])) for row in found)) for name in names}
    for row in ({name: name.upper() for name in names}, *found):
        print("  ".join(f"{row[name]!s:<{widths[name]}}" for name in names).rstrip())
