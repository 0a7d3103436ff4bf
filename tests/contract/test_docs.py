"""The documents are true: hooks and tables equal the code, every YAML block loads, every Python block runs."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from qlens import hookspecs
from qlens.config import draft
from qlens.registry import drafted, register

ROOT = Path(__file__).parents[2]
READMES = sorted(
    path for path in [*ROOT.glob("*.md"), *(ROOT / "plugins").rglob("*.md")] if path.name != "CHANGELOG.md"
)
CONFIGS = sorted(path for path in (ROOT / "config").glob("*.yaml") if path.name not in {"prices.yaml", "keys.yaml"})
_FENCE = re.compile(r"^( *)```(\w+)[^\n]*\n(.*?)^\1```", re.MULTILINE | re.DOTALL)


def _blocks(language: str) -> list[pytest.ParameterSet]:
    found = []
    for path in READMES:
        for number, (_, spoken, block) in enumerate(_FENCE.findall(path.read_text())):
            if spoken == language:
                found.append(pytest.param(block, id=f"{path.relative_to(ROOT)}-{number}"))
    return found


def _specs() -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    tree = ast.parse(Path(hookspecs.__file__).read_text())
    return [
        node
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name in hookspecs.__all__
    ]


@pytest.mark.parametrize("spec", _specs(), ids=lambda spec: spec.name)
def test_every_hook_stands_in_the_readme_with_its_exact_signature(spec: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
    assert spec.returns is not None
    keyword = "async def" if isinstance(spec, ast.AsyncFunctionDef) else "def"
    signature = f"{keyword} {spec.name}({ast.unparse(spec.args)}) -> {ast.unparse(spec.returns)}"
    assert signature in (ROOT / "plugins/README.md").read_text(), "run `make docs`"


@pytest.mark.parametrize("spec", _specs(), ids=lambda spec: spec.name)
def test_every_hook_says_when_it_runs_what_to_return_and_what_raising_does(
    spec: ast.FunctionDef | ast.AsyncFunctionDef,
) -> None:
    text = ast.get_docstring(spec) or ""
    first, _, rest = text.partition("\n\n")
    assert first.endswith("."), "one sentence first"
    assert re.search(r"\b(Runs|Asked|Entered|Reserved)\b", rest), "say when it runs"
    assert "eturn" in rest or spec.name == "adopt", "say what to return"
    assert re.search(r"\bRais(e|ing)\b|\bno I/O\b|must be pure", rest), "say what raising does"


def test_the_generated_parts_are_what_the_code_generates() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "qlens.reference", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"run `make docs`: {done.stdout}{done.stderr}"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_configuration_that_ships_loads(path: Path) -> None:
    assert register(drafted(path, check_env=False)).instances


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_pitfall_17_every_configuration_that_ships_lets_a_model_think_for_90_seconds(path: Path) -> None:
    waits = {
        instance.entry.name: instance.config.first_byte_seconds
        for instance in register(drafted(path, check_env=False)).instances
        if instance.entry.stage == "provider" and hasattr(instance.config, "first_byte_seconds")
    }
    assert [name for name, seconds in waits.items() if seconds < 90] == []


@pytest.mark.parametrize("block", _blocks("yaml"))
def test_every_yaml_block_of_a_readme_is_a_configuration_that_loads(block: str, tmp_path: Path) -> None:
    modules = re.findall(r'plugin: "(\w+):(\w+)"', block)
    for module, name in modules:
        (tmp_path / f"{module}.py").write_text(f"class {name}:\n    def __init__(self, config, name): ...\n")
    try:
        assert register(draft(block, folder=tmp_path, env={}, check_env=False)).instances
    finally:
        for module, _ in modules:
            sys.modules.pop(module, None)


@pytest.mark.parametrize("block", _blocks("python"))
def test_every_python_block_of_a_readme_runs(block: str, tmp_path: Path) -> None:
    if "OpenAI(" in block:
        compile(block, "README", "exec")  # needs a gateway: tests/e2e runs it against one
        return
    (tmp_path / "block.py").write_text(block)
    done = subprocess.run(
        [sys.executable, "-W", "error", "block.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=50,
    )
    assert done.returncode == 0, done.stderr
