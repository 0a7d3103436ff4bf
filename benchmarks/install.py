"""What the default install puts on a disk."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from benchmarks.gateways import pip
from benchmarks.processes import MIB
from benchmarks.rig import ROOT, Fault


def default_install() -> dict[str, Any]:
    """Install QLens without extras into an empty folder; return its size in MB and the packages in it, itself included.

    Where pip cannot (no network), only the reason comes back.
    """
    with tempfile.TemporaryDirectory() as name:
        try:
            pip("--target", name, "--require-hashes", "--requirement", str(ROOT / "requirements" / "run.txt"))
            pip("--target", name, "--no-deps", "--no-build-isolation", str(ROOT))
        except Fault as fault:
            return {"fault": str(fault)}
        files = [path for path in Path(name).rglob("*") if path.is_file() and not path.is_symlink()]
        packages = sorted(path.name.partition("-")[0] for path in Path(name).glob("*.dist-info"))
        return {
            "mb": round(sum(path.stat().st_blocks * 512 for path in files) / MIB, 1),
            "count": len(packages),
            "packages": packages,
        }
