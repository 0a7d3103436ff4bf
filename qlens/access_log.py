"""An access log: a line of JSON for each request, whoever sent it and however it ended."""

from __future__ import annotations

import logging
import os
import stat
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from select import PIPE_BUF
from threading import Event, Thread
from typing import NamedTuple

import orjson
from attrs import define, field

from qlens.background import background_thread
from qlens.errors import StartupError

log = logging.getLogger("qlens")

STANDARD_OUTPUT = Path("/dev/stdout")
"""Where it is a socket, as under systemd, it can be written to and not be opened."""
FLUSH_SECONDS = 0.5
"""How long a line waits for others to be written with it."""
MOST_WAITING = 100_000
"""Lines that wait while the disk takes nothing; those that come then are lost."""
CLOSE_SECONDS = 5.0
_AT_ONCE = 200
"""Lines that are made before the thread lets go of Python's lock."""
_STANDARD_OUTPUT_FILE = 1


class Access(NamedTuple):
    """What is said of a request. Nothing that a client wrote is in it but the path, without its query."""

    wall_ns: int
    id: str
    client: str | None
    method: str | None
    path: str | None
    """Of a request that is not HTTP, neither is known."""
    status: int
    seconds: float
    tenant: str | None
    key_id: str | None
    model: str | None
    """Its name in the configuration."""

    def line(self) -> bytes:
        """It as JSON, without what is not known."""
        wall_ns, id_, client, method, path, status, seconds, tenant, key, model = self
        said = {
            "time": datetime.fromtimestamp(wall_ns / 1e9, UTC).isoformat(timespec="milliseconds"),
            "id": id_,
            "client": client,
            "method": method,
            "path": path,
            "status": status,
            "duration_ms": round(seconds * 1000, 3),
            "tenant": tenant,
            "key_id": key,
            "model": model,
        }
        known = {name: value for name, value in said.items() if value is not None}
        try:
            return orjson.dumps(known, option=orjson.OPT_APPEND_NEWLINE)
        except orjson.JSONEncodeError:  # a name has half of a surrogate pair in it, say
            return orjson.dumps(
                {name: _valid(value) for name, value in known.items()}, option=orjson.OPT_APPEND_NEWLINE
            )


def _valid(value: object) -> object:
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value


@define(eq=False)
class AccessLog:
    """Takes requests from the event loop and writes them in a thread, so that one costs a call an append to a list.

    A file that was moved away, as by logrotate, is made anew. Processes may share it: each appends whole lines.
    """

    place: Path
    lost: Callable[[float], object]
    """Called with how many lines were lost: a metric."""
    _waiting: list[Access] = field(init=False, factory=list, repr=False)
    _rest: bytes = field(init=False, default=b"", repr=False)
    """Lines that are on their way to the file; of the first, a part may be there."""
    _file: int = field(init=False, default=-1)
    _is_pipe: bool = field(init=False, default=False)
    """Whether only a few lines at a time are written whole, whoever else writes to it."""
    _is_failing: bool = field(init=False, default=False)
    _ending: Event = field(init=False, factory=Event)
    _thread: Thread = field(init=False)

    def __attrs_post_init__(self) -> None:
        self._thread = background_thread(self._run, "qlens-access")

    def open(self) -> None:
        """Begin; raises StartupError when the file cannot be written."""
        try:
            self._reopen()
        except OSError as error:
            raise StartupError(
                f"server.access_log: {self.place} cannot be written: {error.strerror}; name another file, or "
                "/dev/stdout"
            ) from error
        self._thread.start()

    def note(self, access: Access) -> None:
        """Take one."""
        if len(self._waiting) < MOST_WAITING:
            self._waiting.append(access)
        else:
            self.lost(1)

    def close(self) -> None:
        """Write what waits, and end."""
        self._ending.set()
        self._thread.join(CLOSE_SECONDS)
        if lost := len(self._waiting) + self._rest.count(b"\n"):
            self.lost(lost)
            log.error("access log %s: %d lines are lost", self.place, lost)
        # A thread that hangs in a write has the file still: its number must not become another one's.
        if self.place != STANDARD_OUTPUT and self._file >= 0 and not self._thread.is_alive():
            os.close(self._file)

    # --- on the thread -------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._ending.wait(FLUSH_SECONDS):
            self._write_all()
        self._write_all()

    def _write_all(self) -> None:
        while self._rest or self._waiting:
            try:
                self._reopen()
                while self._rest:
                    self._rest = self._rest[os.write(self._file, self._next()) :]
            except OSError as error:
                if not self._is_failing:
                    log.error("access log %s: cannot be written, lines wait: %s", self.place, error.strerror)
                self._is_failing = True
                return
            self._is_failing = False
            taken = self._waiting[:_AT_ONCE]
            self._rest = b"".join([access.line() for access in taken])
            del self._waiting[: len(taken)]
            time.sleep(0)

    def _next(self) -> bytes:
        """What is written at once: all, or as many lines as a pipe takes in one piece."""
        if not self._is_pipe or len(self._rest) <= PIPE_BUF:
            return self._rest
        return self._rest[: self._rest.rfind(b"\n", 0, PIPE_BUF) + 1 or self._rest.find(b"\n") + 1]

    def _reopen(self) -> None:
        """Open the file, or the one that stands in its place now."""
        if self.place == STANDARD_OUTPUT:
            self._file = _STANDARD_OUTPUT_FILE
            self._is_pipe = stat.S_ISFIFO(os.fstat(self._file).st_mode)
            return
        if self._file >= 0:
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(self._file), os.stat(self.place)):
                    return
            os.close(self._file)
            self._file = -1
        self._file = os.open(self.place, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o640)
