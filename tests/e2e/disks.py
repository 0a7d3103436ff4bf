"""Disks that a test fills and empties, and disks that cannot sync, for one process and on any machine."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from attrs import frozen

MIB = 1024 * 1024
# Root may mount where it likes; others may where the kernel lets them have a user namespace of their own.
_NAMESPACES = (("unshare", "--mount"), ("unshare", "--user", "--map-root-user", "--mount"))


class Disk(Protocol):
    """A disk for the files of one process."""

    @property
    def before(self) -> Sequence[str]:
        """What the process's command begins with."""

    def fill(self, pid: int) -> None:
        """Let it take nothing more from the process, until that frees something itself."""

    def empty(self, pid: int) -> None:
        """Let there be room again."""


@frozen
class SmallDisk:
    """A file system of its own, which the process alone sees in a folder: writes fail with ENOSPC."""

    folder: Path
    namespace: Sequence[str]
    mebibytes: int = 8

    @property
    def before(self) -> Sequence[str]:
        """Mounts it in a namespace of the process's own, which goes with the process."""
        mount = f'mount -t tmpfs -o size={self.mebibytes}m tmpfs "$0" && exec "$@"'
        return (*self.namespace, "sh", "-c", mount, str(self.folder))

    def _filler(self, pid: int) -> Path:
        return Path(f"/proc/{pid}/root{self.folder}/filler")

    def fill(self, pid: int) -> None:
        """Write to it, beside the process, until there is no room; again, where the process has made some."""
        with self._filler(pid).open("ab", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(MIB))

    def empty(self, pid: int) -> None:
        """Delete what was written."""
        self._filler(pid).unlink()


@frozen
class NoGrowth:
    """No file of the process may grow: the kernel refuses its writes with EFBIG. Needs no rights."""

    before: Sequence[str] = ()

    def fill(self, pid: int) -> None:
        """Set the limit."""
        _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (1, hard))

    def empty(self, pid: int) -> None:
        """Lift it."""
        _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (hard, hard))


def small_disk(folder: Path) -> Disk:
    """A real small disk where this machine lets us mount one, else a limit that does the same."""
    for namespace in _NAMESPACES if shutil.which("unshare") else ():
        disk = SmallDisk(folder, namespace)
        if subprocess.run([*disk.before, "true"], capture_output=True, check=False).returncode == 0:
            return disk
    return NoGrowth()


# --- syncs that fail ---------------------------------------------------------------------------

_LIBRARY = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
static _Thread_local int calls;
int fdatasync(int file) {
    int call = ++calls;
    if (FIRST <= call && call <= LAST) {
        errno = ERROR;
        return -1;
    }
    return ((int (*)(int))dlsym(RTLD_NEXT, "fdatasync"))(file);
}
"""
# Where there is no compiler: of Python's own syncs alone, not of SQLite's.
_SITE = """
import os, threading
_thread, _real = threading.local(), os.fdatasync
def fdatasync(file):
    _thread.calls = getattr(_thread, "calls", 0) + 1
    if FIRST <= _thread.calls <= LAST:
        raise OSError(ERROR, os.strerror(ERROR))
    _real(file)
os.fdatasync = fdatasync
"""


def failing_syncs(folder: Path, first: int, last: int, compiler: str | None) -> Mapping[str, str]:
    """The environment of a process whose fdatasync fails with EIO, for some of the calls of each of its threads."""
    values = {"FIRST": str(first), "LAST": str(last), "ERROR": str(errno.EIO)}
    if compiler is None:
        text = _SITE
        for name, value in values.items():
            text = text.replace(name, value)
        (folder / "sitecustomize.py").write_text(text)
        return {"PYTHONPATH": os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))}
    source, library = folder / "syncs.c", folder / "syncs.so"
    source.write_text(_LIBRARY)
    defines = [f"-D{name}={value}" for name, value in values.items()]
    subprocess.run([compiler, "-shared", "-fPIC", *defines, "-o", str(library), str(source), "-ldl"], check=True)
    return {"LD_PRELOAD": str(library)}
