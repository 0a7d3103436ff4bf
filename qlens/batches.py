"""What batches used: receipts of their own, made when somebody asks for a batch after it is over."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import TYPE_CHECKING, Any
from urllib.parse import quote
from uuid import UUID

import orjson
from attrs import define, evolve, field

from qlens import dialects
from qlens.call import UNPRICED, Attempt, Body, Call, Cost, Outgoing, Receipt, Reply, Request, Target
from qlens.errors import frames
from qlens.usage import BUCKETS, Usage, counts_of, from_responses, together

if TYPE_CHECKING:
    from qlens.pipeline import Pipeline

log = logging.getLogger("qlens")

TIER = "batch"
"""The service tier that a batch is billed at."""
MOST_READ = 1000
"""How many batches a process remembers whose output it has read."""
OUTPUT_SECONDS = 120
"""How long the output of a batch is read."""
MOST_LINE_BYTES = 64 * 1024 * 1024

_OVER = ("completed_at", "expired_at", "cancelled_at", "failed_at")
"""When a batch ended, in Unix seconds; one of them is said of each that is over."""
_DIALECTS: Mapping[str, str] = {
    "/chat/completions": "chat",
    "/completions": "completions",
    "/embeddings": "embeddings",
    "/moderations": "moderations",
    "/responses": "responses",
}
"""What the lines of a batch do, by its endpoint behind the version."""
_LATEST = 2**40
"""No batch ends later: beyond that a time is nonsense."""


def settle(pipeline: Pipeline, call: Call, target: Target, batch: Body) -> None:
    """Account for a batch that is over, as its provider describes it; for one that runs there is nothing to do.

    Where the provider does not say what a batch used, its output is read, in a task of its own. Whoever asks, and
    however often, receipts have the same ids, so that a ledger has them once. They count for the caller that asks: the
    tenant is the one that made the batch, since nobody else can open its id.
    """
    ended, own = _ended(batch), batch.get("id")
    if ended is None or type(own) is not str or not pipeline.takes_once:
        return
    over = _Over(pipeline, call, target, own, ended, _dialect(batch.get("endpoint")))
    used = from_responses(batch.get("usage"), TIER)
    if used is not None and used.total:
        asked = over.asked(batch.get("model"))
        over.settle({asked: (used, over.cost(asked, used))})
    elif type(file := batch.get("output_file_id")) is str and file and own not in pipeline.batches_read:
        if len(pipeline.batches_read) >= MOST_READ:
            pipeline.batches_read.clear()
        pipeline.batches_read.add(own)
        pipeline.settle_later(over.read(file))


def _ended(batch: Body) -> int | None:
    times = (batch.get(name) for name in _OVER)
    return next((said for said in times if type(said) is int and 0 < said < _LATEST), None)


def _dialect(endpoint: object) -> str | None:
    """What the lines are; Azure's endpoints have another beginning."""
    return next((name for path, name in _DIALECTS.items() if str(endpoint) in (path, f"/v1{path}")), None)


@define(eq=False)
class _Over:
    """A batch that is over."""

    pipeline: Pipeline
    call: Call
    keeper: Target
    """A target of the provider that has it."""
    own: str
    """Its id there."""
    ended: int
    dialect: str | None

    # --- who and how much ----------------------------------------------------------------------

    def asked(self, model: object) -> Target:
        """The target that lines of a model would have been sent to; its model is empty where that is not known."""
        if type(model) is not str or not model:
            return evolve(self.keeper, model="", public="", base_model=None)
        found = self.pipeline.models.called(self.keeper.provider, model)
        return found if found is not None else evolve(self.keeper, model=model, public="", base_model=None)

    def cost(self, target: Target, used: Usage) -> Cost:
        """What all lines cost: together they are a longer prompt than any of them, and each is paid as a short one.

        Where long prompts have prices of their own that is a guess: nobody says how long the prompts were.
        """
        if not target.model:
            return UNPRICED
        whole = self.pipeline.cost(self.call, target, used)
        lines, price_id = [], whole.price_id
        for name, count in zip(BUCKETS, counts_of(used), strict=True):
            if not count:
                continue
            one = self.pipeline.cost(self.call, target, Usage(**{name: 1}, meters={}, source="provider", tier=TIER))
            if one.picos is None:
                return UNPRICED
            lines.append((name, count, one.picos))
            price_id = one.price_id
        picos = sum(count * each for _, count, each in lines)
        return whole if picos == whole.picos else Cost(picos, "estimated", price_id, tuple(lines))

    def settle(self, used: Mapping[Target, tuple[Usage, Cost]]) -> None:
        """Hand on a receipt for each model; most batches have one."""
        for place, (target, (usage, cost)) in enumerate(sorted(used.items(), key=lambda item: item[0].model)):
            self.pipeline.settle_once(self.call, self._receipt(target, usage, cost, place))

    def _receipt(self, target: Target, usage: Usage, cost: Cost, place: int) -> Receipt:
        call, caller, now = self.call, self.call.known, time.monotonic()
        more = (target.model,) if place else ()
        return Receipt(
            id=_id(self.ended, caller.tenant, self.keeper.provider, self.own, *more),
            caller=caller,
            operation=f"batch_{self.dialect or 'other'}",
            model=target.public or None,
            target=target,
            outcome="complete",
            status=200,
            error=None,
            usage=usage,
            cost=cost,
            saved_picos=0,
            cache="off",
            streamed=False,
            attempts=(Attempt(1, target, now, ended=now, status=200, usage=usage, cost=cost, billed=True),),
            tags={**caller.tags, **call.tags} if call.tags else caller.tags,
            wall_ns=self.ended * 10**9,
            ttft_us=None,
            total_us=0,
            overhead_us=0,
            bytes_out=0,
            config_version=call.config,
        )

    # --- its output ----------------------------------------------------------------------------

    async def read(self, file: str) -> None:
        """Add up what the lines of the output say; what cannot be read now is read when somebody asks again."""
        request = Request("GET", f"/files/{quote(file, safe='')}/content", (), {"accept": "*/*"})
        provider = self.pipeline.providers[self.keeper.provider]
        sums = _Sums(self)
        try:
            async with asyncio.timeout(OUTPUT_SECONDS):
                outgoing = Outgoing(self.call.operation, "", {}, True, request)
                reply = await provider.send.fn(self.call, self.keeper, outgoing)
                try:
                    async with aclosing(_lines(reply)) as lines:
                        async for line in lines:
                            sums.add(line)
                finally:
                    await reply.aclose()
        except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 - it is tried again
            self.pipeline.batches_read.discard(self.own)
            log.warning("the output of a batch at %s cannot be read: %s", provider.name, frames(error))
            return
        self.settle(sums.found)


@define(eq=False)
class _Sums:
    """What the lines of an output used and cost, by the target of their model."""

    over: _Over
    found: dict[Target, tuple[Usage, Cost]] = field(factory=dict)
    _targets: dict[str, Target] = field(factory=dict)

    def add(self, line: bytes) -> None:
        """Add what a line says; one that failed, or says nothing, has used nothing that anybody knows of."""
        body = _answer(line)
        if body is None or self.over.dialect is None:
            return
        used = dialects.named(self.over.dialect).usage(body)
        if used is None or not used.total:
            return
        used, target = evolve(used, tier=TIER), self._target(str(body.get("model") or ""))
        pipeline, call = self.over.pipeline, self.over.call
        cost = pipeline.cost(call, target, used) if target.model else UNPRICED
        if (known := self.found.get(target)) is not None:
            used, cost = together([known[0], used]), _added(known[1], cost)
        self.found[target] = used, cost

    def _target(self, model: str) -> Target:
        if model not in self._targets:
            self._targets[model] = self.over.asked(model)
        return self._targets[model]


def _answer(line: bytes) -> Body | None:
    """The body of the answer in a line of an output; None when it has none."""
    try:
        said: Any = orjson.loads(line)
        body = said["response"]["body"]
    except (orjson.JSONDecodeError, LookupError, TypeError):
        return None
    return body if type(body) is dict else None


def _added(one: Cost, other: Cost) -> Cost:
    if one.picos is None or other.picos is None:
        return UNPRICED
    quantities: dict[tuple[str, int], int] = {}
    for name, quantity, each in (*one.lines, *other.lines):
        quantities[name, each] = quantities.get((name, each), 0) + quantity
    return Cost(
        one.picos + other.picos,
        "exact" if one.state == other.state == "exact" else "estimated",
        one.price_id,
        tuple((name, quantity, each) for (name, each), quantity in quantities.items()),
    )


async def _lines(reply: Reply) -> AsyncGenerator[bytes]:
    """The lines of a reply; raises ValueError for one that is too long."""
    if reply.chunks is None:
        for line in (reply.body or b"").split(b"\n"):
            yield line
        return
    pieces: list[bytes] = []  # of the last line: joined once, for a line may be long
    size = 0
    async for chunk in reply.chunks:
        first, *others = chunk.split(b"\n")
        pieces.append(first)
        size += len(first)
        if others:
            yield b"".join(pieces)
            for line in others[:-1]:
                yield line
            pieces, size = [others[-1]], len(others[-1])
        if size > MOST_LINE_BYTES:
            raise ValueError(f"a line has more than {MOST_LINE_BYTES} bytes")
    yield b"".join(pieces)


def _id(ended: int, *whose: str) -> str:
    """A UUIDv7 of the time at which the batch ended, with a hash where others have chance."""
    code = int.from_bytes(hashlib.sha256("\0".join(whose).encode(errors="surrogatepass")).digest()[:10])
    value = ended * 1000 << 80 | 0x7 << 76 | code & ~(0xF << 76) & ~(0xC << 60) | 0x8 << 60
    return str(UUID(int=value))
