"""A plugin of somebody else, with a pyproject of its own, installed by pip and used by its YAML name."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from e2e.serving import changed, run_qlens, serving
from openai import OpenAI

ACME = Path(__file__).parent / "acme"


def install(source: Path, target: Path) -> Path:
    """Build and install a distribution, as pip does, without asking an index."""
    options = ["--quiet", "--disable-pip-version-check", "--no-index", "--no-deps", "--no-build-isolation", "--target"]
    pip = [sys.executable, "-m", "pip", "install", *options, str(target), str(source)]
    done = subprocess.run(pip, capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 0, done.stderr
    return target


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the installed plugin."""
    return install(ACME, tmp_path_factory.mktemp("site"))


def configuration(folder: Path, **settings: str) -> Path:
    """A file that uses the plugin with these settings."""
    path = folder / "qlens.yaml"
    path.write_text(changed({"pipeline": {"guard": [{"plugin": "signature", **settings}]}}))
    return path


def test_installed_plugin_is_listed_with_its_package(site: Path) -> None:
    rows = json.loads(run_qlens("plugins", "--json", env={"PYTHONPATH": str(site)}).stdout)
    (row,) = (row for row in rows if row["name"] == "signature")
    assert (row["stage"], row["package"], row["version"]) == ("guard", "acme-gateway", "4.2.0")


def test_installed_plugin_works_under_its_yaml_name(site: Path, tmp_path: Path) -> None:
    guard = {"plugin": "signature", "text": "-- Acme"}
    with (
        serving(tmp_path, changes={"pipeline": {"guard": [guard]}}, env={"PYTHONPATH": str(site)}) as served,
        OpenAI(base_url=f"{served.url}/v1", api_key=served.key) as client,
    ):
        answer = client.chat.completions.create(
            model="gpt-4o-mini", messages=[{"role": "user", "content": "Yours, @@"}]
        )
        assert answer.choices[0].message.content == "Yours, -- Acme"
        stream = client.chat.completions.create(
            model="gpt-4o-mini", messages=[{"role": "user", "content": "Truly yours, @@ and sons"}], stream=True
        )
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        assert text == "Truly yours, -- Acme and sons"


def test_settings_of_an_installed_plugin_are_checked_as_strictly(site: Path, tmp_path: Path) -> None:
    result = run_qlens("check", str(configuration(tmp_path, texts="x")), env={"PYTHONPATH": str(site)})
    assert result.returncode == 2
    assert "pipeline.guard[0].texts" in result.stderr


def test_plugin_that_is_not_installed_is_a_fault_that_lists_those_that_are(tmp_path: Path) -> None:
    result = run_qlens("check", str(configuration(tmp_path, text="x")))
    assert result.returncode == 2
    assert "signature" in result.stderr
    assert "pattern" in result.stderr


def test_name_that_two_packages_claim_is_refused_with_both_named(site: Path, tmp_path: Path) -> None:
    rival = shutil.copytree(ACME, tmp_path / "rival")
    pyproject = (rival / "pyproject.toml").read_text()
    (rival / "pyproject.toml").write_text(pyproject.replace('name = "acme-gateway"', 'name = "rival-gateway"'))
    second = install(rival, tmp_path / "site")
    result = run_qlens("check", str(configuration(tmp_path, text="x")), env={"PYTHONPATH": f"{site}:{second}"})
    assert result.returncode == 2
    assert "acme-gateway" in result.stderr
    assert "rival-gateway" in result.stderr
