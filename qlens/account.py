"""A call's account: opened when it is authenticated, settled exactly once, by whatever exit it leaves."""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, Protocol

from attrs import define, field

from qlens import returned
from qlens.call import FREE, Attempt, Call, Cost, Outcome, Receipt, Reply, Target
from qlens.errors import Blocked, CallError, QuotaExceeded, SessionCut, frames
from qlens.usage import NO_USAGE, Usage, together

if TYPE_CHECKING:
    from qlens.pipeline import Pipeline

log = logging.getLogger("qlens")

CLIENT_CLOSED = 499
"""The status of a call whose client left, as nginx logs it; nobody receives it."""
CLOSE_SECONDS = 5
"""How long an upstream may take to close: the receipt waits for it."""


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
    meters: dict[int, Metering] = field(factory=dict)
    """What watches each attempt's stream or session, by the attempt's place."""
    first_byte: float | None = None
    bytes_out: int = 0
    rested: float = 0.0
    """Seconds spent waiting until a target might be asked again."""
    delivered: bool = False
    """Whether the client was handed the whole answer."""
    _opened: list[Reply] = field(factory=list, init=False)

    async def leave(self, error: BaseException | None) -> None:
        """Close what is open and settle; `error` is what ended the call, None its good end."""
        if self.pipeline.settles_at_once and not self._holds_open():
            # Nothing in it waits, so nothing can cancel it half-way.
            await self._finish(error)
            return
        finishing = run_apart(self._finish(error))
        if finishing.done():
            return
        self.pipeline.settling.add(finishing)
        finishing.add_done_callback(self.pipeline.settling.discard)
        await asyncio.shield(finishing)

    def _holds_open(self) -> bool:
        for reply in self._opened:  # noqa: SIM110 - a generator costs as much as all the rest
            if reply.is_open:
                return True
        return False

    async def _finish(self, error: BaseException | None) -> None:
        ending = self._ending(error)  # before anything is waited for, which may change the reasons
        await self._close()
        if self.call.form is not None:
            self.call.form.close()
        await self.pipeline.settle(self, self._receipt(*ending))

    async def _close(self) -> None:
        for reply in self._opened:
            if not reply.is_open:
                continue
            try:
                async with asyncio.timeout(CLOSE_SECONDS):
                    await reply.aclose()
            except (Exception, asyncio.CancelledError) as error:  # also of a task of the provider's own
                log.error("call %s: closing the upstream failed: %s", self.call.id, frames(error))

    def hold_open(self, reply: Reply) -> Reply:
        """Take charge of a reply: it is closed with the account, whatever becomes of it."""
        for known in self._opened:
            if known is reply:
                return reply
        self._opened.append(reply)
        return reply

    def take(self, reply: Reply) -> Reply:
        """Look at what a plugin returned as the answer and take charge of it; TypeError when it is none."""
        return self.hold_open(returned.reply(reply))

    def open(self, reply: Reply) -> None:
        """Take a reply of a cache or a provider as the call's answer, whoever stands in front of it."""
        self.reply = self.source = self.hold_open(reply)

    # --- attempts ------------------------------------------------------------------------------

    def begin(self, target: Target) -> int:
        """Note that a target is asked from now on; returns the attempt's place."""
        attempts = self.call.attempts
        attempts.append(Attempt(len(attempts) + 1, target, time.monotonic()))
        if self.call.attempts_left is not None:
            self.call.attempts_left -= 1
        return len(attempts) - 1

    def failed(self, place: int, error: CallError | str) -> None:
        """Note that an attempt ended without an answer; it is not billed."""
        attempt = self.call.attempts[place]
        attempt.ended = time.monotonic()
        if isinstance(error, str):
            attempt.error = error
            return
        attempt.error = error.code or error.type
        attempt.status = error.status
        attempt.retry_after = error.retry_after
        attempt.upstream_id = error.upstream_id

    async def rest(self, until: float) -> None:
        """Wait until a target may be asked again."""
        started = time.monotonic()
        await asyncio.sleep(until - started)
        self.rested += time.monotonic() - started

    def cut_off(self, place: int) -> None:
        """Note that an attempt was cancelled; why, is known when the call ends."""
        self.call.attempts[place].ended = time.monotonic()

    def answered(self, place: int, reply: Reply, meter: Metering | None) -> None:
        """Note that a target answered: with a body, which is all of it, or with a stream that is still to come."""
        self.open(reply)
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
                attempt.target = meter.reply.target or attempt.target
                attempt.cost = self.pipeline.cost(self.call, attempt.target, attempt.usage)
                attempt.error = error
            elif attempt.error is None:
                attempt.error = error or "unanswered"
            else:
                continue
            attempt.ended = attempt.ended or time.monotonic()

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
        call, now = self.call, time.monotonic()
        if outcome == "rejected" and call.attempts:
            outcome = "failed"
        self._close_attempts(code)
        target = self.source.target if self.source is not None else None
        if target is None and call.attempts:
            target = call.attempts[-1].target
        total = now - call.started
        return Receipt(
            id=call.id,
            caller=call.known,
            operation=call.operation.name,
            model=call.model.name if call.model else None,
            target=target,
            outcome=outcome,
            status=status,
            error=code,
            usage=self._usage(),
            cost=self.cost(),
            saved_picos=self.saved() if outcome == "cached" else 0,
            cache=call.cache,
            streamed=call.stream,
            attempts=tuple(call.attempts),
            tags={**call.known.tags, **call.tags} if call.tags else call.known.tags,
            wall_ns=call.wall_ns,
            ttft_us=None if self.first_byte is None else _micros(self.first_byte - call.started),
            total_us=_micros(total),
            overhead_us=_micros(max(0.0, total - self.waited(now))),
            bytes_out=self.bytes_out,
            config_version=call.config,
        )

    def _ending(self, error: BaseException | None) -> tuple[Outcome, int, str | None]:
        """How the call ended: outcome, status, error code."""
        if self.delivered and not isinstance(error, CallError):
            error = None  # who leaves after the last byte has had it all
        if error is None:
            return self._well_ended()
        if isinstance(error, asyncio.CancelledError):
            if self.pipeline.deadlines.over(self.call):
                return "failed", 504, "call_timeout"
            if self.pipeline.stopping():
                return "failed", 503, "shutting_down"
            return "abandoned", CLIENT_CLOSED, "client_closed"
        if isinstance(error, ClientLeft):
            return "abandoned", CLIENT_CLOSED, "client_closed"
        if not isinstance(error, CallError):
            return "failed", 500, "internal_error"
        status = error.status if self.first_byte is None else 200
        code = error.code or error.type
        if isinstance(error, Blocked):
            return "blocked", status, code
        if isinstance(error, QuotaExceeded | SessionCut) and self.first_byte is not None:
            return "cut", status, code
        if not self.admitted and error.status < 500:
            return "rejected", status, code
        return "failed", status, code

    def _well_ended(self) -> tuple[Outcome, int, str | None]:
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


def _micros(seconds: float) -> int:
    return round(seconds * 1_000_000)
