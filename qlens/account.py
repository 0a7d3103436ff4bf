"""A call's account: opened when it is authenticated, settled exactly once, by whatever exit it leaves."""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, Protocol

from attrs import define, evolve, field

from qlens import returned, vocabularies
from qlens.call import FREE, Attempt, Call, Cost, Outcome, Receipt, Reply, Target
from qlens.drains import read_on, stop
from qlens.errors import Blocked, CallError, QuotaExceeded, SessionCut, Unavailable, frames
from qlens.unsent import is_unsent
from qlens.usage import NO_USAGE, Usage, together
from qlens.watching import Watcher

if TYPE_CHECKING:
    from qlens.pipeline import Pipeline

log = logging.getLogger("qlens")

CLIENT_CLOSED = 499
"""The status of a call whose client left, as nginx logs it; nobody receives it."""
MICROS = 1_000_000
CLOSE_SECONDS = 5
"""How long an upstream may take to close: the receipt waits for it."""
LEAVE_SECONDS = 0.25
"""How long a client, who has its answer, waits with its next call for this one to settle."""
MOST_LEAVING = 1000
"""Settlements that go on alone; with more of them calls wait for theirs, so that what hangs takes no more memory."""


_OPEN, _PICKED, _CLOSED = range(3)
"""The stages of an account: an answer that comes is the call's; the call has another one; it is over."""


Ending = tuple[Outcome, int, str | None]
"""How a call ended: outcome, status, error code."""


class ClientLeft(Exception):
    """The client closed its connection before it had the whole answer."""


def run_apart(work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    """Start a task of its own, which goes on when whoever waits for it is cancelled."""
    if sys.version_info >= (3, 12):
        # Runs at once up to its first wait: work that never waits costs no turn of the loop.
        return asyncio.Task(work, loop=asyncio.get_running_loop(), eager_start=True)
    return asyncio.get_running_loop().create_task(work)


class Metering(Protocol):
    """What watches a stream or a session."""

    reply: Reply

    def usage(self) -> Usage:
        """What was used so far."""


@define(eq=False)
class Account:
    """What a call holds, tries and owes. Whoever made one leaves it, whatever happens: leaving settles."""

    pipeline: Pipeline
    call: Call
    admitted: bool = False
    holds: dict[str, object] = field(factory=dict)
    """What each plugin reserved, by instance."""
    reply: Reply | None = None
    """What the client gets."""
    source: Reply | None = None
    """What the cache or the provider gave; a guard may have put another reply in front."""
    asking: dict[int, asyncio.Task[Any] | None] = field(factory=dict)
    """The tasks in which attempts wait for their answer, by the attempt's place."""
    meters: dict[int, Metering] = field(factory=dict)
    """What watches each attempt's stream or session, by the attempt's place."""
    first_byte: float | None = None
    bytes_out: int = 0
    rested: float = 0.0
    """Seconds spent waiting until a target might be asked again."""
    delivered: bool = False
    """Whether the client was handed the whole answer."""
    _opened: list[Reply] = field(factory=list, init=False)
    _answers: dict[int, Reply] = field(factory=dict, init=False)
    """What targets have answered, by the attempt's place."""
    _stage: int = field(default=_OPEN, init=False)

    async def leave(self, error: BaseException | None) -> None:
        """Close what is open and settle; `error` is what ended the call, None its good end."""
        if self.pipeline.settles_at_once and not self.asking and not self._holds_open():
            # Nothing in it waits, so nothing can cancel it half-way.
            self._stage = _CLOSED
            await self._settle(self._ending(error))
            return
        finishing = run_apart(self._finish(error))
        if finishing.done():
            return
        settling = self.pipeline.settling
        settling.add(finishing)
        finishing.add_done_callback(settling.discard)
        # A cancellation ends the waiting alone.
        await asyncio.wait({finishing}, timeout=LEAVE_SECONDS if len(settling) <= MOST_LEAVING else None)
        if finishing.done():
            finishing.result()

    def _holds_open(self) -> bool:
        for reply in self._opened:  # noqa: SIM110 - a generator costs as much as all the rest
            if reply.is_open:
                return True
        return False

    async def _finish(self, error: BaseException | None) -> None:
        ending = self._ending(error)  # before anything is waited for, which may change the reasons
        await self._close()
        await self._settle(ending)

    async def _settle(self, ending: Ending) -> None:
        if self.call.form is not None:
            self.call.form.close()
        await self.pipeline.settle(self, self._receipt(*ending))

    async def read_on(self) -> None:
        """Read to their end, for nobody, the answers of providers that bill them whole."""
        for place, meter in self.meters.items():
            if isinstance(meter, Watcher) and self.pipeline.is_drained(self.call.attempts[place].target):
                try:
                    await read_on(meter)
                except CallError as error:
                    log.debug("call %s: the answer is not read to its end: %s", self.call.id, error.code)

    async def _close(self) -> None:
        self._stage = _CLOSED
        if self.asking:
            await self._stop_asking()
        for reply in self._opened:
            if not reply.is_open:
                continue
            try:
                async with asyncio.timeout(CLOSE_SECONDS):
                    await reply.aclose()
            except (Exception, SystemExit, asyncio.CancelledError) as error:  # also of a task of the provider's own
                log.error("call %s: closing the upstream failed: %s", self.call.id, frames(error))

    async def _stop_asking(self) -> None:
        """End the attempts that still run: the call has its answer from another one, or needs none any more."""
        tasks = {task for task in self.asking.values() if task is not None and task is not asyncio.current_task()}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=CLOSE_SECONDS)

    def hold_open(self, reply: Reply) -> Reply:
        """Take charge of a reply: it is closed with the account, whatever becomes of it."""
        opened = self._opened
        if opened and opened[-1] is reply:  # as layer after layer hands it on
            return reply
        for known in opened:
            if known is reply:
                return reply
        opened.append(reply)
        return reply

    def take(self, reply: Reply) -> Reply:
        """Look at what a plugin returned as the answer and take charge of it; TypeError when it is none."""
        return self.hold_open(returned.reply(reply))

    def open(self, reply: Reply) -> None:
        """Take a reply of a cache or a provider as the call's answer, whoever stands in front of it."""
        self.reply = self.source = self.hold_open(reply)

    def picked(self, reply: Reply) -> Reply:
        """Settle on the reply that a plugin returned: which answer it is, where targets give several."""
        if reply is not self.source or self.asking:
            self._stage = _PICKED
            for answer in self._answers.values():
                if answer is reply or _is_made_of(reply, answer):
                    self.source = answer
        return reply

    # --- attempts ------------------------------------------------------------------------------

    def begin(self, target: Target) -> int:
        """Note that a target is asked from now on; returns the attempt's place. Raises Unavailable after the end."""
        if self._stage == _CLOSED:
            raise Unavailable("The call is over.")
        attempts = self.call.attempts
        place = len(attempts)
        attempt = Attempt(place + 1, target, time.monotonic())
        if self.asking:
            attempt.kind = "hedge"
        attempts.append(attempt)
        self.asking[place] = asyncio.current_task()
        if self.call.attempts_left is not None:
            self.call.attempts_left -= 1
        return place

    def failed(self, place: int, error: CallError | str) -> None:
        """Note that an attempt ended without an answer; it is billed only for what the provider says it used.

        One whose answer was made and could not be read is billed for the most it can have used: its provider bills it.
        """
        del self.asking[place]
        attempt = self.call.attempts[place]
        attempt.ended = time.monotonic()
        if isinstance(error, str):
            attempt.error = error
            return
        self.pipeline.refusals.note(attempt.target, error)
        if error.usage is not None and (error.usage.total or error.usage.meters):
            used: Usage | None = error.usage
        else:
            used = self._most() if error.answered else None
        if used is not None:
            attempt.billed, attempt.usage = True, used
            attempt.cost = self.pipeline.cost(self.call, attempt.target, used)
        attempt.error = error.code or error.type
        attempt.status = error.status
        attempt.retry_after = error.retry_after
        attempt.upstream_id = error.upstream_id

    async def rest(self, until: float) -> None:
        """Wait until a target may be asked again."""
        if self.call.left is not None:
            await stop()
        started = time.monotonic()
        await asyncio.sleep(until - started)
        self.rested += time.monotonic() - started

    def cut_off(self, place: int, error: asyncio.CancelledError) -> None:
        """Note that an attempt was cancelled; why, is known when the call ends.

        One that nobody wants any more, because the client has left or another attempt was faster, is billed for the
        most it can use: its provider may go on. One that was not sent is free, as is one that took too long.
        """
        del self.asking[place]
        attempt = self.call.attempts[place]
        attempt.ended = time.monotonic()
        most = self._most()
        if is_unsent(error) or most is None or not (self._answers or self.call.left is not None):
            return
        attempt.error = "unanswered" if self.call.left is None else "client_closed"
        attempt.billed, attempt.usage = True, most
        attempt.cost = self.pipeline.cost(self.call, attempt.target, most)

    def _most(self) -> Usage | None:
        """The most that one attempt can use; None where that is not bounded, or the provider makes nothing."""
        call = self.call
        if call.operation.runs != "full":
            return None
        return evolve(call.bound, input=vocabularies.estimated_input(call))

    def answered(self, place: int, reply: Reply, meter: Metering | None) -> None:
        """Note that a target answered: with a body, which is all of it, or with a stream that is still to come."""
        del self.asking[place]
        self._answers[place] = reply
        if self._stage == _OPEN:
            self.open(reply)
        elif self._stage == _CLOSED:
            self.pipeline.settle_later(reply.aclose())
        attempt = self.call.attempts[place]
        attempt.first_byte = now = time.monotonic()
        attempt.status, attempt.upstream_id = reply.status, reply.upstream_id
        attempt.billed = True
        attempt.target = reply.target or attempt.target
        if meter is not None:
            self.meters[place] = meter
            return
        attempt.ended = now
        attempt.usage = reply.usage or NO_USAGE
        attempt.cost = self.pipeline.cost(self.call, attempt.target, attempt.usage)

    def _close_attempts(self, error: str | None) -> None:
        """Bill streams for what they delivered, and say why what was cut off ended."""
        for place, attempt in enumerate(self.call.attempts):
            if attempt.billed:
                meter = self.meters.get(place)
                if meter is None:
                    continue
                attempt.usage = meter.usage()
                if (
                    not meter.reply.complete
                    and self.pipeline.is_drained(attempt.target)
                    and self._is_unwanted(meter.reply)
                ):
                    # Its provider goes on, and nobody hears how far.
                    most = self._most()
                    attempt.usage = most if most is not None and most.total > attempt.usage.total else attempt.usage
                attempt.target = meter.reply.target or attempt.target
                attempt.cost = self.pipeline.cost(self.call, attempt.target, attempt.usage)
                attempt.error = error
            elif attempt.error is None:
                attempt.error = error or "unanswered"
            else:
                continue
            attempt.ended = attempt.ended or time.monotonic()

    def _is_unwanted(self, answer: Reply) -> bool:
        return self.call.left is not None or answer is not self.source

    # --- the receipt ---------------------------------------------------------------------------

    def cost(self) -> Cost:
        """What the billed attempts cost so far; unpriced as soon as one of them is."""
        attempts = self.call.attempts
        if len(attempts) == 1 and attempts[0].billed:
            return attempts[0].cost
        costs = [attempt.cost for attempt in attempts if attempt.billed]
        if not costs:
            return FREE
        if len(costs) == 1:
            return costs[0]
        if any(cost.picos is None for cost in costs):
            return Cost(None, "unpriced")
        return Cost(
            picos=sum(cost.picos or 0 for cost in costs),
            state="estimated" if any(cost.state == "estimated" for cost in costs) else "exact",
            price_id=costs[-1].price_id,
            lines=tuple(line for cost in costs for line in cost.lines),
        )

    def _usage(self) -> Usage:
        attempts = self.call.attempts
        if len(attempts) == 1 and attempts[0].billed:
            return attempts[0].usage or NO_USAGE
        return together([a.usage for a in attempts if a.billed and a.usage is not None])

    def saved(self) -> int:
        """What an answer from the cache would have cost, in picodollars."""
        reply = self.source
        if self.call.attempts or reply is None or reply.target is None or reply.usage is None:
            return 0
        return self.pipeline.cost(self.call, reply.target, reply.usage).picos or 0

    def waited(self, until: float) -> float:
        """Seconds spent waiting for providers, between attempts too: all else is the gateway's own."""
        waited = self.rested
        for attempt in self.call.attempts:
            waited += (attempt.ended or until) - attempt.started
        return waited

    def _receipt(self, outcome: Outcome, status: int, code: str | None) -> Receipt:
        call, now, caller, source = self.call, time.monotonic(), self.call.known, self.source
        attempts = call.attempts
        if outcome == "rejected" and attempts:
            outcome = "failed"
        self._close_attempts(code)
        target = source.target if source is not None else None
        if target is None and attempts:
            target = attempts[-1].target
        total = now - call.started
        # In the order of its fields: with their names it would take twice as long to make.
        return Receipt(
            call.id,
            caller,
            call.operation.name,
            None if call.model is None else call.model.name,
            target,
            outcome,
            status,
            code,
            self._usage(),
            self.cost(),
            self.saved() if outcome == "cached" else 0,
            call.cache or "off",
            call.stream,
            tuple(attempts),
            {**caller.tags, **self._tags()} if call.tags else caller.tags,
            call.wall_ns,
            None if self.first_byte is None else round((self.first_byte - call.started) * MICROS),
            round(total * MICROS),
            round(max(0.0, total - self.waited(now)) * MICROS),
            self.bytes_out,
            call.config,
        )

    def _tags(self) -> dict[str, str]:
        """What plugins have noted of the call, as far as it is texts: nobody could keep anything else."""
        tags = {name: text for name, text in self.call.tags.items() if isinstance(name, str) and isinstance(text, str)}
        if len(tags) != len(self.call.tags):
            log.error("call %s: a plugin has put a tag into it that is no text: it is left out", self.call.id)
        return tags

    def _ending(self, error: BaseException | None) -> Ending:
        """How the call ended: outcome, status, error code."""
        if self.delivered and not isinstance(error, CallError):
            error = None  # who leaves after the last byte has had it all
        if error is None:
            return self._well_ended()
        if self.call.left is not None:
            return "abandoned", CLIENT_CLOSED, "client_closed"
        if isinstance(error, asyncio.CancelledError):
            if self.pipeline.deadlines.over(self.call):
                return "failed", self._seen(504), "call_timeout"
            if self.pipeline.stopping():
                return "failed", self._seen(503), "shutting_down"
            return "abandoned", CLIENT_CLOSED, "client_closed"
        if isinstance(error, ClientLeft):
            return "abandoned", CLIENT_CLOSED, "client_closed"
        if not isinstance(error, CallError):
            return "failed", self._seen(500), "internal_error"
        status = self._seen(error.status)
        code = error.code or error.type
        if isinstance(error, Blocked):
            return "blocked", status, code
        if isinstance(error, QuotaExceeded | SessionCut) and self.first_byte is not None:
            return "cut", status, code
        if not self.admitted and error.status < 500:
            return "rejected", status, code
        return "failed", status, code

    def _seen(self, status: int) -> int:
        """The status that the client sees of an error: once an answer has begun, it is that of the answer."""
        return status if self.first_byte is None or self.reply is None else self.reply.status

    def _well_ended(self) -> Ending:
        status = self.reply.status if self.reply is not None else 200
        runs = self.call.operation.runs
        if runs == "local" or (runs == "count" and self.source is None):
            return "complete", status, None
        if not self.call.attempts:
            return "cached", status, None
        if self.source is not None and self.source.complete:
            return "complete", status, None
        if self.source is not None and self.source.cut:
            return "cut", status, "output_limit"
        return "failed", status, "upstream_truncated"


def _is_made_of(reply: Reply, answer: Reply) -> bool:
    """Whether a plugin's own reply hands on what is in an answer."""
    if reply.chunks is not None:
        return reply.chunks is answer.chunks
    return reply.body is not None and reply.body is answer.body
