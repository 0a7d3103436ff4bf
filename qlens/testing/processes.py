"""What the real servers for tests have in common: a process of their own, on a port of 127.0.0.1."""

from __future__ import annotations

import secrets
import signal
import socket
import subprocess
from itertools import count

from attrs import define, field

# Below those that a system gives to connections and to whoever asks for any port: a server can be away for a while,
# and finds its port free when it comes back.
_PORTS = range(10_000, 32_768)
# Each process begins elsewhere, and none gives a port twice.
_places = count(secrets.randbelow(len(_PORTS)))


def free_port() -> int:
    """A port nobody listens on at the moment."""
    while True:
        port = _PORTS[next(_places) % len(_PORTS)]
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


@define(eq=False)
class ServerProcess:
    """A server that runs as a process, and is ended by its id."""

    _process: subprocess.Popen[bytes] | None = field(init=False, default=None, repr=False)

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal: SIGSTOP freezes it, SIGCONT lets it go on."""
        assert self._process is not None
        self._process.send_signal(number)

    def kill(self) -> None:
        """End it at once, as a crash does."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
