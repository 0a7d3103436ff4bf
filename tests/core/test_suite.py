"""What fails beside others runs once more, alone; what fails then has failed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ONCE = """
from pathlib import Path
import pytest

@pytest.mark.parametrize("n", range({times}))
def test_at_first(n):
    seen = Path(f"seen-{{n}}")
    was_there = seen.exists()
    seen.touch()
    assert was_there
"""
GOOD = "def test_good():\n    pass\n"
BAD = "def test_bad():\n    assert False\n"


def suite(folder: Path, **files: str) -> tuple[int, str]:
    """The exit code and the output of a suite of these files."""
    for name, text in files.items():
        (folder / f"test_{name}.py").write_text(text)
    (folder / "pytest.ini").write_text("[pytest]\n")
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.suite", "--numprocesses=2", "--dist=loadfile"]
    run = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    return run.returncode, run.stdout


def test_all_pass(tmp_path: Path) -> None:
    code, said = suite(tmp_path, good=GOOD)
    assert code == 0
    assert "once more" not in said


def test_what_passes_alone_has_passed_and_is_named(tmp_path: Path) -> None:
    code, said = suite(tmp_path, good=GOOD, once=ONCE.format(times=2))
    assert code == 0
    named = [f"    test_once.py::test_at_first[{n}]" for n in range(2)]
    assert said.splitlines()[-3:] == ["failed beside other tests, passed alone:", *named]


@pytest.mark.parametrize("files", [{"bad": BAD}, {"bad": BAD, "once": ONCE.format(times=1)}], ids=["bad", "one-of-two"])
def test_what_fails_alone_has_failed(tmp_path: Path, files: dict[str, str]) -> None:
    code, said = suite(tmp_path, good=GOOD, **files)
    assert code == 1
    assert "passed alone" not in said


def test_many_failures_are_no_chance(tmp_path: Path) -> None:
    code, said = suite(tmp_path, good=GOOD, once=ONCE.format(times=4))
    assert code == 1
    assert "once more" not in said


def test_a_file_that_cannot_be_read_has_failed(tmp_path: Path) -> None:
    code, _ = suite(tmp_path, good=GOOD, broken="import nothing_of_this_name\n")
    assert code != 0
