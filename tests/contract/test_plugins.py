"""Every built-in plugin is where one looks for it, documented, tested, configured somewhere, and strict."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from importlib.metadata import EntryPoint, distribution
from pathlib import Path
from typing import Any

import attrs
import pytest

from qlens import ConfigError
from qlens.config import convert
from qlens.registry import STAGES
from qlens.testing import check_plugin

ROOT = Path(__file__).parents[2]
BUILT_IN: list[EntryPoint] = [point for point in distribution("qlens").entry_points if point.group.startswith("qlens.")]
each = pytest.mark.parametrize("point", BUILT_IN, ids=lambda point: f"{point.group[6:]}.{point.name}")


def _stage(point: EntryPoint) -> str:
    return point.group.removeprefix("qlens.")


def test_there_are_plugins_and_every_group_is_a_stage() -> None:
    assert len(BUILT_IN) >= 13
    assert {_stage(point) for point in BUILT_IN} <= set(STAGES)


@each
def test_it_stands_at_the_named_place(point: EntryPoint) -> None:
    module, _, cls = point.value.partition(":")
    assert module == f"qlens_plugins.{_stage(point)}.{point.name}", "module name = YAML name, in the stage's folder"
    assert cls.lower() == point.name.replace("_", ""), "class name = YAML name in CamelCase"


@each
def test_it_keeps_its_stages_contract(point: EntryPoint) -> None:
    check_plugin(_stage(point), point.load())


@each
def test_its_config_is_frozen_and_every_field_says_what_it_is(point: EntryPoint) -> None:
    config = getattr(point.load(), "Config", None)
    if config is None:
        return
    assert config.__name__ == f"{point.load().__name__}Config"
    assert config.__doc__
    for cls in _nested(config):
        source = "\n".join(inspect.getsource(base) for base in cls.__mro__ if attrs.has(base))
        for field in attrs.fields(cls):
            documented = re.search(rf'^    {field.name}\s*:.*?(?:\n\s+.*?)*?\n    """', source, re.MULTILINE)
            assert documented, f"{cls.__name__}.{field.name} has no docstring below it"


def _nested(cls: type, seen: tuple[type, ...] = ()) -> list[type]:
    """A config class and the attrs classes in its fields."""
    found = [cls]
    for field in attrs.fields(attrs.resolve_types(cls)):
        for inner in _classes(field.type):
            if inner not in (*seen, *found):
                found += _nested(inner, (*seen, *found))
    return found


def _classes(kind: Any) -> list[type]:
    if isinstance(kind, type) and attrs.has(kind):
        return [kind]
    return [cls for part in getattr(kind, "__args__", ()) for cls in _classes(part)]


@each
def test_its_readme_has_a_heading_for_it(point: EntryPoint) -> None:
    readme = ROOT / "plugins/qlens_plugins" / _stage(point) / "README.md"
    assert f"## `{point.name}`" in readme.read_text(), f"add a heading to {readme.relative_to(ROOT)}"


@each
def test_it_has_a_test_at_the_mirrored_path(point: EntryPoint) -> None:
    path = ROOT / "tests/plugins" / _stage(point) / f"test_{point.name}.py"
    folder = ROOT / "tests/plugins" / _stage(point) / point.name
    assert path.exists() or list(folder.glob("test_*.py")), f"write {path.relative_to(ROOT)}"


@each
def test_it_appears_in_a_configuration_that_ships(point: EntryPoint) -> None:
    texts = [path.read_text() for path in (ROOT / "config").glob("*.yaml")]
    assert any(re.search(rf"plugin:\s*{point.name}\b", text) for text in texts), "use it in a file under config/"


@each
def test_an_unknown_key_and_a_wrong_type_are_refused_with_their_path(point: EntryPoint) -> None:
    config = getattr(point.load(), "Config", None)
    if config is None:
        return
    with pytest.raises(ConfigError) as caught:
        convert({"no_such_key": 1}, config, "pipeline.x[0]", folder=ROOT)
    assert any("no_such_key" in str(fault) and "pipeline.x[0]" in fault.path for fault in caught.value.faults)
    for field in attrs.fields(attrs.resolve_types(config)):
        wrong: object = 1 if "Mapping" in str(field.type) else {"a": {"deeply": ["wrong"]}}
        with pytest.raises(ConfigError) as caught:
            convert({field.name: wrong}, config, "pipeline.x[0]", folder=ROOT)
        assert any(field.name in fault.path for fault in caught.value.faults), f"{field.name} takes {wrong!r}"


def test_only_named_plugins_are_imported() -> None:
    named = "pipeline: {auth: [{plugin: anonymous}]}\nproviders: {echo: {plugin: echo}}\n"
    named += "models: {m: {targets: [{provider: echo, model: m}]}}\n"
    program = f"""
import sys, pathlib
from qlens.config import draft
from qlens.registry import register
register(draft({named!r}, folder=pathlib.Path(".")))
print(sorted({{".".join(name.split(".")[:3]) for name in sys.modules if name.startswith("qlens_plugins.")}}))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    stages = [f"qlens_plugins.{stage}" for stage in ("auth", "auth.anonymous", "provider", "provider.echo")]
    assert done.stdout.strip() == str(stages)
