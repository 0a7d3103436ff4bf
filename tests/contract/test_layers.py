"""Who may import whom, read from the syntax tree."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import qlens

ROOT = Path(__file__).parents[2]
CORE = sorted((ROOT / "qlens").rglob("*.py"))
PLUGINS = sorted((ROOT / "plugins/qlens_plugins").rglob("*.py"))
SDKS = {"aiobotocore", "asyncpg", "attrs", "cryptography", "jwt", "nats", "yaml", "orjson", "prometheus_client"}
"""What a built-in plugin may import beside qlens and the standard library; a new SDK is entered here with its extra."""


def _imports(path: Path) -> Iterator[tuple[str, tuple[str, ...], int]]:
    """Every import of a file: absolute module, names, line."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, (), node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: import by the full name, not relatively"
            yield node.module or "", tuple(alias.name for alias in node.names), node.lineno


def _id(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", CORE, ids=_id)
def test_the_core_imports_no_plugin(path: Path) -> None:
    for module, _, line in _imports(path):
        assert not module.startswith("qlens_plugins"), f"{_id(path)}:{line}: the core knows stages, never plugins"


@pytest.mark.parametrize("path", PLUGINS, ids=_id)
def test_a_plugin_imports_only_public_names_its_own_package_and_its_sdk(path: Path) -> None:
    own = ".".join(path.relative_to(ROOT / "plugins").with_suffix("").parts[:2])
    for module, names, line in _imports(path):
        top = module.partition(".")[0]
        where = f"{_id(path)}:{line}"
        if top == "qlens":
            assert module == "qlens", f"{where}: import from qlens itself, not from {module}"
            private = [name for name in names if name not in qlens.__all__]
            assert not private, f"{where}: {', '.join(private)} is not public; add it to qlens.__all__ or do without"
        elif top == "qlens_plugins":
            assert module.startswith(own), f"{where}: a plugin shares by function through qlens, not with {module}"
        else:
            assert top in sys.stdlib_module_names or top in SDKS, f"{where}: {top} is no known SDK of a built-in plugin"


def test_the_pipeline_knows_nothing_of_http() -> None:
    for module, _, line in _imports(ROOT / "qlens/pipeline.py"):
        assert not module.startswith("aiohttp"), f"qlens/pipeline.py:{line}: HTTP belongs to server.py and upstream.py"


def test_aiohttp_is_known_to_the_server_and_the_kit_alone() -> None:
    allowed = {"qlens/connection.py", "qlens/server.py", "qlens/websocket.py", "qlens/workers/admin.py"}
    for path in CORE:
        if _id(path) in allowed or "testing" in path.parts:
            continue
        for module, _, line in _imports(path):
            assert not module.startswith("aiohttp"), (
                f"{_id(path)}:{line}: aiohttp belongs to {', '.join(sorted(allowed))}"
            )


def test_the_public_names_are_all_there_and_live_where_they_are_said_to() -> None:
    assert len(set(qlens.__all__)) == len(qlens.__all__)
    for name in qlens.__all__:
        assert getattr(qlens, name) is not None
    assert set(qlens.__all__) == {"__version__", *qlens._HOME}


@pytest.mark.parametrize("path", [*CORE, *PLUGINS], ids=_id)
def test_nothing_evaluates_text_as_code_or_unpickles(path: Path) -> None:
    forbidden = {"eval", "exec", "compile", "__import__"}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in forbidden, f"{_id(path)}:{node.lineno}: {node.func.id} is not used here"
    for module, _, line in _imports(path):
        assert module not in {"pickle", "marshal", "shelve"}, f"{_id(path)}:{line}: {module} is not used here"
