"""The pinned requirements: they hold on every Python that QLens runs on, not only on the one that pinned them."""

from __future__ import annotations

from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

FOLDER = Path(__file__).parents[2] / "requirements"
PYTHONS = ("3.11.0", "3.11.2", "3.11.14", "3.12.0", "3.13.0", "3.14.0")


def pinned(name: str) -> set[str]:
    """The packages of a requirements file."""
    lines = [line for line in (FOLDER / name).read_text().splitlines() if not line.startswith((" ", "#"))]
    return {canonicalize_name(line.split("==")[0]) for line in lines if "==" in line}


def wanted(package: str, python: str) -> set[str]:
    """What an installed package needs on a Python of Linux, without its extras."""
    environment = {"python_version": python.rpartition(".")[0], "python_full_version": python, "extra": ""}
    found = [Requirement(text) for text in distribution(package).requires or ()]
    return {canonicalize_name(each.name) for each in found if not each.marker or each.marker.evaluate(environment)}


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("name", ["run.txt", "all.txt", "dev.txt"])
def test_what_a_pinned_package_needs_on_any_python_is_pinned(name: str, python: str) -> None:
    packages = pinned(name)
    assert len(packages) > 15
    lacking = {package: wanted(package, python) - packages for package in packages}
    assert not {package: names for package, names in lacking.items() if names}
