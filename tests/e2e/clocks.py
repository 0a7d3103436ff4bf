"""Processes whose clocks are wrong: each by as many seconds as a test says, at any time."""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Mapping
from pathlib import Path

from attrs import define, field

_SITE = '''\
"""Shifts the clocks of this process by what stands in a file; its name is in the environment."""
import mmap, os, struct, time

_file = os.open(os.environ["TEST_CLOCK"], os.O_RDONLY)
_shown = mmap.mmap(_file, 16, access=mmap.ACCESS_READ)
_time, _time_ns, _monotonic, _monotonic_ns = time.time, time.time_ns, time.monotonic, time.monotonic_ns
# Monotonic clocks of two machines have nothing in common, and never jump.
_since = struct.unpack_from("d", _shown, 8)[0]

time.time = lambda: _time() + struct.unpack_from("d", _shown)[0]
time.time_ns = lambda: _time_ns() + int(struct.unpack_from("d", _shown)[0] * 1e9)
time.monotonic = lambda: _monotonic() + _since
time.monotonic_ns = lambda: _monotonic_ns() + int(_since * 1e9)
'''


@define(eq=False)
class WrongClock:
    """The clocks of the processes that get its environment, workers and commands of theirs included."""

    folder: Path
    monotonic: float = 0
    """Seconds by which the monotonic clock, which begins anywhere, is ahead of this machine's."""
    ahead: float = field(default=0, on_setattr=lambda clock, _, seconds: clock._show(seconds))
    """Seconds by which the time of day is ahead; negative: behind."""
    _shown: mmap.mmap = field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        (self.folder / "sitecustomize.py").write_text(_SITE)
        file = self.folder / "clock"
        file.write_bytes(struct.pack("dd", 0, self.monotonic))
        with file.open("r+b") as opened:
            self._shown = mmap.mmap(opened.fileno(), 16)
        self._show(self.ahead)

    def _show(self, seconds: float) -> float:
        struct.pack_into("d", self._shown, 0, seconds)
        return seconds

    @property
    def env(self) -> Mapping[str, str]:
        """What a process needs that is to have these clocks."""
        path = [str(self.folder), *filter(None, [os.environ.get("PYTHONPATH")])]
        return {"PYTHONPATH": os.pathsep.join(path), "TEST_CLOCK": str(self.folder / "clock")}
