"""The configuration file: from YAML to entries, with every fault at once."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from attrs import evolve

from qlens.config.entries import (
    FALLBACK_KINDS,
    ON_DISCONNECT,
    STAGES,
    Config,
    Draft,
    ModelEntry,
    ModelSettings,
    PluginEntry,
    Server,
    matches,
)
from qlens.config.environment import MissingText
from qlens.config.faults import suggestion, unknown_key
from qlens.config.scalars import Mismatch, choice, found, quoted
from qlens.config.strict import Strict
from qlens.config.tree import Place, YamlDict
from qlens.config.yaml import MAX_BYTES, Document, load
from qlens.errors import ConfigError, Fault

T = TypeVar("T")

SECTIONS = ("server", "pipeline", "providers", "models")


def read(path: Path, env: Mapping[str, str] | None = None, *, check_env: bool = True) -> Config:
    """Read a configuration file; raises ConfigError with every fault.

    `env` is the process's environment by default. With `check_env` False a variable without a value is no fault.
    """
    return parse(text_of(path), folder=path.parent, env=env, check_env=check_env, source=str(path))


def parse(
    text: str,
    *,
    folder: Path,
    env: Mapping[str, str] | None = None,
    check_env: bool = True,
    source: str = "qlens.yaml",
) -> Config:
    """As `read`, for a text; `source` is what faults call it."""
    result = draft(text, folder=folder, env=env, check_env=check_env, source=source)
    if result.faults:
        raise ConfigError(result.faults)
    return result.config


def draft(
    text: str,
    *,
    folder: Path,
    env: Mapping[str, str] | None = None,
    check_env: bool = True,
    source: str = "qlens.yaml",
) -> Draft:
    """As `parse`, but faults come back beside what could be understood, so that plugins can be checked as well.

    Entries with a fault of their own are left out. Raises ConfigError only where nothing can be read.
    """
    document = load(text, source=source, env=os.environ if env is None else env, check_env=check_env)
    # Not resolve(): what a link to a folder points at may be gone after the next deployment.
    return _Drafter(document, folder.absolute(), source).draft()


def text_of(path: Path) -> str:
    """The text of a configuration file; raises ConfigError where it cannot be read."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        return content.decode()
    except OSError as error:
        raise ConfigError([Fault(str(path), f"cannot be read: {error.strerror}")]) from None
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError([Fault(f"{path}:{line}", "not valid UTF-8")]) from None


def _version(content: Any) -> str:
    # The version is public and the content may hold weak secrets: make it slow to try them out.
    text = json.dumps(content, sort_keys=True)
    return hashlib.pbkdf2_hmac("sha256", text.encode(), b"qlens", 20_000).hex()[:12]


class _Drafter:
    """Goes through a document once and gathers faults."""

    def __init__(self, document: Document, folder: Path, source: str) -> None:
        self._root = Place.of(document.root, "")
        self._source = source
        self._folder = folder
        self._strict = Strict(folder)
        self._faults = list(document.faults)

    def draft(self) -> Draft:
        root = self._root.value
        if not isinstance(root, dict):
            fault = Fault(self._source, f"found {found(root)}, expected a mapping with {', '.join(SECTIONS)}")
            raise ConfigError([*self._faults, fault])
        self._faults += [unknown_key(self._root.step(key), key, SECTIONS) for key in root if key not in SECTIONS]
        server = self._convert(self._root.step("server"), Server) if "server" in root else None
        pipeline = self._pipeline()
        providers = self._providers()
        models = self._models()
        config = Config(server or Server(), pipeline, providers, models, _version(root), self._folder)
        return Draft(config, tuple(self._faults))

    def _fault(self, place: Place, message: str) -> None:
        self._faults.append(Fault(str(place), message))

    def _convert(self, place: Place, cls: type[T]) -> T | None:
        try:
            return self._strict.convert(place.value, cls, str(place))
        except ConfigError as error:
            self._faults += error.faults
            return None

    def _section(self, name: str) -> Iterator[tuple[str, Place]]:
        if name not in self._root.value:
            return
        section = self._root.step(name)
        if not isinstance(section.value, dict):
            self._fault(section, f"found {found(section.value)}, expected a mapping")
            return
        for key in section.value:
            yield key, section.step(key)

    def _names(self, section: str) -> list[str]:
        value = self._root.value.get(section)
        return list(value) if isinstance(value, dict) else []

    # --- plugins ---

    def _pipeline(self) -> dict[str, tuple[PluginEntry, ...]]:
        pipeline: dict[str, tuple[PluginEntry, ...]] = dict.fromkeys(STAGES, ())
        for stage, place in self._section("pipeline"):
            if stage in STAGES:
                pipeline[stage] = tuple(self._stage(stage, place))
                continue
            hint = "; providers stand under `providers`" if stage.startswith("provider") else ""
            self._fault(place, f"unknown stage{suggestion(stage, STAGES, 'stages')}{hint}")
        return pipeline

    def _stage(self, stage: str, place: Place) -> Iterator[PluginEntry]:
        if not isinstance(place.value, list):
            self._fault(place, f"found {found(place.value)}, expected a list of plugins")
            return
        seen: dict[str, PluginEntry] = {}
        for entry in filter(None, (self._entry(stage, place.step(index)) for index in range(len(place.value)))):
            twin = seen.setdefault(entry.name, entry)
            if twin is entry:
                yield entry
                continue
            message = f"{quoted(entry.name)} is the name of {twin.path} already; give one of them another `name`"
            self._faults.append(Fault(entry.path, message))

    def _providers(self) -> dict[str, PluginEntry]:
        entries = {name: self._entry("provider", place, name) for name, place in self._section("providers")}
        return {name: entry for name, entry in entries.items() if entry is not None}

    def _entry(self, stage: str, place: Place, name: str | None = None) -> PluginEntry | None:
        settings = place.value
        plugin = settings.get("plugin") if isinstance(settings, YamlDict) else None
        if not isinstance(settings, YamlDict):
            self._fault(place, f'found {found(settings)}, expected a mapping with the key "plugin"')
        elif "plugin" not in settings:
            self._fault(place, 'the key "plugin" is missing: the name of a plugin, or its import path')
        elif not isinstance(plugin, str) or not plugin:
            self._fault(place.step("plugin"), f"found {found(plugin)}, expected a plugin's name or import path")
        elif name is not None:
            return self._provider(place, name, settings)
        elif "name" in settings:
            return self._named_entry(stage, place, settings["name"], settings.without("plugin", "name"))
        else:
            return self._named_entry(stage, place, plugin.rpartition(":")[2], settings.without("plugin"))
        return None

    def _provider(self, place: Place, name: str, settings: YamlDict) -> PluginEntry | None:
        """The entry of a provider, and the setting that all of them have."""
        entry = self._named_entry("provider", place, name, settings.without("plugin", "on_disconnect"))
        if entry is None or "on_disconnect" not in settings:
            return entry
        said = place.step("on_disconnect")
        try:
            chosen = choice(said.value, {name: name for name in ON_DISCONNECT})
        except Mismatch as error:
            self._fault(said, str(error))
            return entry
        return entry if isinstance(chosen, MissingText) else evolve(entry, on_disconnect=chosen)

    def _named_entry(self, stage: str, place: Place, name: Any, settings: YamlDict) -> PluginEntry | None:
        if _is_name(name):
            return PluginEntry(stage, str(name), place.value["plugin"], settings, str(place))
        where = place.step("name") if "name" in place.value else place
        self._fault(where, f"found {found(name)} as a name, expected a text without spaces")
        return None

    # --- models ---

    def _models(self) -> dict[str, ModelEntry]:
        models = {}
        for name, place in self._section("models"):
            if not _is_name(name):
                self._fault(place, f"found {found(name)} as a model's name, expected a text without spaces")
            if "*" in name[:-1]:
                self._fault(place, "`*` may only stand at the end of a model's name")
            settings = self._convert(place, ModelSettings)
            if settings is not None:
                models[name] = ModelEntry.of(name, settings)
            self._check_targets(name, place)
            self._check_fallbacks(name, place)
        return models

    # What follows looks at the file's own values, so that a fault of one field does not hide another's.

    def _check_targets(self, name: str, model: Place) -> None:
        targets = model.step("targets")
        providers = self._names("providers")
        for target in _items(targets):
            provider, upstream = target.step("provider"), target.step("model")
            if _is_known(provider.value) and provider.value not in providers:
                hint = suggestion(provider.value, providers, "providers")
                self._fault(provider, f"no provider called {quoted(provider.value)}{hint}")
            if not _is_known(upstream.value):
                continue
            if "*" in upstream.value[:-1]:
                self._fault(upstream, "`*` may only stand at the end of a target's model")
            elif upstream.value.endswith("*") and not name.endswith("*"):
                self._fault(upstream, f"`*` stands for what a wildcard matched, but {quoted(name)} is no wildcard")

    def _check_fallbacks(self, name: str, model: Place) -> None:
        fallbacks = model.step("fallbacks")
        lists = [fallbacks.step(kind) for kind in FALLBACK_KINDS]
        for place in (item for listed in (fallbacks, *lists) for item in _items(listed)):
            if _is_known(place.value):
                self._check_fallback(name, place)

    def _check_fallback(self, name: str, place: Place) -> None:
        models = self._names("models")
        if place.value == name:
            self._fault(place, "a model cannot fall back to itself")
        elif place.value.endswith("*"):
            self._fault(place, "a fallback is one model, not a wildcard")
        elif not any(matches(known, place.value) for known in models):
            hint = suggestion(place.value, models, "models")
            self._fault(place, f"no model called {quoted(place.value)}{hint}")


def _items(place: Place) -> list[Place]:
    return [place.step(index) for index in range(len(place.value))] if isinstance(place.value, list) else []


def _is_known(value: Any) -> bool:
    return isinstance(value, str) and bool(value) and not isinstance(value, MissingText)


def _is_name(name: Any) -> bool:
    return isinstance(name, str) and bool(name) and name.isprintable() and " " not in name
