"""Runs pytest; what fails beside others is run once more, alone: `python -m tests.suite ARGUMENTS`.

Thousands of tests with servers of their own share a few cores, perhaps with somebody else's work: now and then one of
them waits in vain. Whether that was all shows when it runs by itself. More than a few failures are no such chance.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

FAILED = Path(".pytest_cache/v/cache/lastfailed")
MOST = 3
"""How many are run again."""


def main(arguments: Sequence[str]) -> int:
    """Run them; returns the exit code."""
    code = _pytest("--cache-clear", *arguments)
    if code != 1:
        return code
    failed = sorted(json.loads(FAILED.read_text()))
    if not 1 <= len(failed) <= MOST:
        return code
    print(f"\n{len(failed)} of the tests failed beside others and will be run once more, alone", flush=True)
    code = _pytest("--last-failed", "--verbose", *_places(failed))
    if code == 0:
        print("\nfailed beside other tests, passed alone:", *failed, sep="\n    ", flush=True)
    return code


def _pytest(*arguments: str) -> int:
    return subprocess.run([sys.executable, "-m", "pytest", *arguments], check=False).returncode


def _places(failed: Sequence[str]) -> list[str]:
    """The files in which they stand."""
    return sorted({name.partition("::")[0] for name in failed})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
