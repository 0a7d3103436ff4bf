"""Files that others write while a gateway follows them."""

from __future__ import annotations

import os
import time
from pathlib import Path

STILL_SECONDS = 0.1
"""How long nobody writes to a file that is whole."""

FileState = tuple[int, int, int]
"""What tells one state of a file from another: inode, size in bytes, time of the last change in nanoseconds."""


def file_state(path: Path) -> FileState | None:
    """The state that a file is in; None when it is not there, or nobody may ask."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def is_being_written(path: Path, state: FileState | None) -> bool:
    """Whether a file has changed 0.1 s after it was in this state; blocks that long.

    A file that is written in place is empty for a moment, and then half there: fewer rows, and not a fault in them.
    """
    time.sleep(STILL_SECONDS)
    return file_state(path) != state
