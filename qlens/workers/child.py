"""One worker process as the supervisor sees it: started, asked, told to stop, and in the end known by its exit code."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from attrs import define, field

from qlens.errors import Fault, StartupError
from qlens.workers.channel import Channel, ChannelClosed
from qlens.workers.merged import Family

ANSWER_SECONDS = 2
"""How long a worker may take to answer what it can answer at once."""
SILENT_SECONDS = 0.2
"""How long one is waited for that did not answer the last time."""


@define(eq=False)
class Child:
    """A worker process and the channel to it."""

    number: int
    admin: Path
    """The socket on which it listens for what is relayed to it."""
    process: asyncio.subprocess.Process
    state: Literal["starting", "ready", "draining", "ended"] = field(default="starting", init=False)
    answering: bool = field(default=True, init=False)
    """Whether it answered when it was asked last."""
    dismissed: bool = field(default=False, init=False)
    """Whether it was told to stop."""
    leaving: asyncio.Event = field(factory=asyncio.Event, init=False)
    """Set once it has ended, or drains: a successor may start."""
    metrics: Sequence[Family] = field(default=(), init=False)
    """What it last said."""
    _channel: Channel = field(init=False)
    _listening: asyncio.Task[None] = field(init=False)

    @classmethod
    async def start(cls, number: int, config: Path, listener: socket.socket, admin: Path) -> Child:
        """Start a fresh interpreter that inherits the listening socket; raises OSError when that cannot be done."""
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                process = await asyncio.create_subprocess_exec(
                    *_interpreter(),
                    *("-m", "qlens.workers.worker", str(config), str(number)),
                    *(str(listener.fileno()), str(theirs.fileno()), str(admin)),
                    stdin=subprocess.DEVNULL,
                    pass_fds=(listener.fileno(), theirs.fileno()),
                    process_group=0,  # Ctrl-C is for the supervisor alone, who tells the others
                )
        except BaseException:
            ours.close()
            raise
        child = cls(number, admin, process)
        child._channel = await Channel.over(ours, child._told)
        child._listening = asyncio.create_task(child._channel.listen())
        return child

    @property
    def serving(self) -> bool:
        """Whether it has calls, and can say something about them."""
        return self.state in {"ready", "draining"}

    @property
    def silent_seconds(self) -> float:
        """For how long it has said nothing, not even a late answer."""
        return time.monotonic() - self._channel.heard_at

    async def order(self, what: str, **details: Any) -> dict[str, Any]:
        """Have something done; raises StartupError with the faults it found, ChannelClosed when it ended over it."""
        answer = await self._channel.ask(what, **details)
        if "faults" in answer:
            raise StartupError([Fault(path, message) for path, message in answer["faults"]])
        return answer

    async def learn(self, what: str) -> dict[str, Any] | None:
        """What it says about itself, or None when it does not answer now."""
        try:
            async with asyncio.timeout(ANSWER_SECONDS if self.answering else SILENT_SECONDS):
                answer = await self._channel.ask(what)
        except TimeoutError:
            self.answering = False
            return None
        except ChannelClosed:
            return None
        self.answering = True
        return None if "faults" in answer else answer

    async def look(self) -> None:
        """Keep its metrics as they are now; when it does not answer, those it had stay."""
        if (answer := await self.learn("metrics")) is not None:
            self.metrics = answer["metrics"]

    async def stop(self) -> None:
        """Have it drain and end; returns when it has heard."""
        self.dismissed = True
        if self.state != "ended":
            self.state = "draining"
        self.leaving.set()
        with contextlib.suppress(ChannelClosed):  # it ends by itself
            await self._channel.ask("stop")

    def kill(self) -> None:
        """End it at once."""
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()

    async def ended(self) -> None:
        """Wait for its end, and take its last words."""
        await self.process.wait()
        # What it said last is still in the channel, which a process that it left behind might keep open.
        await asyncio.wait({self._listening}, timeout=ANSWER_SECONDS)
        self._listening.cancel()
        await self._channel.close()
        with contextlib.suppress(OSError):
            self.admin.unlink(missing_ok=True)
        self.state = "ended"
        self.leaving.set()

    @property
    def end(self) -> str:
        """How it ended, in words."""
        code = self.process.returncode
        return f"killed by {_signal(-code)}" if code is not None and code < 0 else f"exit code {code}"

    async def _told(self, what: str, details: Mapping[str, Any]) -> dict[str, Any]:
        if what == "last":
            self.metrics = details["metrics"]
        return {}


def _interpreter() -> list[str]:
    """This Python with this process's own flags, and without the current folder on its path unless it is on ours."""
    flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    safe = [] if "-P" in flags or sys.path[:1] == [os.getcwd()] else ["-P"]
    return [sys.executable, *flags, *safe]


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
