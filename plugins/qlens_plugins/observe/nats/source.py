"""An outbox as its shipper reads it: in order, but for what the stream does not take at present."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from itertools import takewhile
from operator import attrgetter

from attrs import define, field

from qlens import Spool
from qlens_plugins.observe.nats.messages import Message

READ_AT_ONCE = 1000
"""Records that are read before something is sent, or others have the processor."""
FIRST_WAIT_SECONDS = 1.0
LONGEST_WAIT_SECONDS = 60.0
"""Before what was set aside is sent again; each wait is twice the one before."""
LONGEST_AFTER_NOTHING_SECONDS = 5.0
"""The same where nothing was taken at all: then it is hardly their subjects' fault."""
PART_OF_TIME = 20
"""A wait is no shorter than so many times what reading took: there may be 200,000 events."""
FRUITLESS = 3
"""After so many rounds in which nothing was taken it is nobody's subject: the rest is not tried."""


@define(eq=False)
class Source:
    """A spool whose records go when the stream has them.

    Events whose subject the stream does not take are set aside, so that they hold up no others; after a while all are
    read once more. Their bodies are on the disk alone meanwhile.
    """

    spool: Spool
    why: str = field(default="", init=False)
    """Why something is set aside; empty when nothing is."""
    aside: int = field(default=0, init=False)
    """How many events are set aside."""
    _read: deque[Message] = field(factory=deque, init=False)
    """What was read, and is there still."""
    _open: list[Message] = field(factory=list, init=False)
    """Those of it that are to be sent."""
    _refused: dict[str, str] = field(factory=dict, init=False)
    """Subjects that are not taken at present, by themselves: each is in memory once."""
    _known: deque[Message] = field(factory=deque, init=False)
    """What comes next was read before, and this became of it."""
    _fruitless: int = field(default=0, init=False)
    _took: bool = field(default=False, init=False)
    """Whether something was taken since all was read anew."""
    _spent: float = field(default=0.0, init=False)
    """The processor's time that reading took since then."""
    _wait: float = field(default=FIRST_WAIT_SECONDS, init=False)
    _since: float = field(default=0.0, init=False)
    """Since when something is set aside, in monotonic seconds."""

    @property
    def is_stuck(self) -> bool:
        """Whether something is set aside and nothing was taken since all was read anew."""
        return bool(self.why) and not self._took

    @property
    def unsent(self) -> int:
        """How many are to be sent now: neither acknowledged, nor set aside."""
        return self.spool.left.records - len(self._read) + sum(not message.done for message in self._open)

    def filled(self, most: int) -> tuple[list[Message], bool]:
        """What is to be sent, so many at most; and whether there is perhaps more."""
        began, count = time.thread_time(), 0
        self._open = [message for message in self._open if not message.done]  # some are, where a connection was lost
        while len(self._open) < most and count < READ_AT_ONCE:
            records = self.spool.read(min(most - len(self._open), READ_AT_ONCE - count), after=len(self._read))
            if not records:
                break
            count += len(records)
            for record in records:
                self._take(record)
        self._spent += time.thread_time() - began
        return self._open, len(self._open) >= most or count >= READ_AT_ONCE

    def _take(self, record: bytes) -> None:
        message = self._message(record)
        if self._known:
            known = self._known.popleft()
            if known.id != message.id:  # what stood in between was damaged
                self._known.clear()
            elif known.done:
                message = known
        self._read.append(message)
        if message.done:
            return
        if message.subject in self._refused:
            self._put_aside(message)
        else:
            self._open.append(message)

    def _message(self, record: bytes) -> Message:
        try:
            return Message.read(record)
        except ValueError:
            return Message("", "", b"", done=True, refusal=f"a record in {self.spool.place} is no event")

    def sent(self, messages: Sequence[Message], why: str) -> bool:
        """Take note of what became of these; whether none of several rounds had one that was taken.

        The subjects of which none was taken are set aside.
        """
        left = [message for message in messages if not message.done]
        taken = {message.subject for message in messages if message.done and message.refusal is None}
        self._took = self._took or bool(taken)
        self._fruitless = 0 if taken or not messages else self._fruitless + 1
        refused = [message.subject for message in left if message.subject not in taken]
        if refused:
            self._refused.update(zip(refused, refused, strict=True))
            self._since = self._since if self.why else time.monotonic()
            self.why = why
        self._open = [message for message in left if message.subject in taken]
        for message in left:
            if message.subject not in taken:
                self._put_aside(message)
        if self._fruitless < FRUITLESS or self._took:
            return False
        self._begin_anew()
        return True

    def _put_aside(self, message: Message) -> None:
        message.subject, message.body = self._refused[message.subject], b""
        self.aside += 1

    @property
    def done(self) -> list[Message]:
        """What is done, up to the first that is not."""
        return list(takewhile(attrgetter("done"), self._read))

    def let_go(self, count: int) -> None:
        """Do without so many that are done."""
        for _ in range(count):
            self._read.popleft()
        self.spool.shipped(count)

    def look_again(self, *, now: bool = False) -> None:
        """Read all anew when it is time for what was set aside."""
        if not self.why:
            self._wait = FIRST_WAIT_SECONDS
            return
        longest = LONGEST_WAIT_SECONDS if self._took else LONGEST_AFTER_NOTHING_SECONDS
        wait = max(min(self._wait, longest), self._spent * PART_OF_TIME)
        if now or time.monotonic() >= self._since + wait:
            self._wait = FIRST_WAIT_SECONDS if now else min(self._wait * 2, LONGEST_WAIT_SECONDS)
            self._begin_anew()

    def _begin_anew(self) -> None:
        self._known.extendleft(reversed(self._read))
        self._read.clear()
        self._open.clear()
        self._refused.clear()
        self.why, self.aside, self._took, self._fruitless, self._spent = "", 0, False, 0, 0.0
