"""What exact prices and a durable ledger cost a call: `PYTHONPATH=tests python -m benchmarks.evidence`.

Two gateways run in this process with the stages of config/qlens.yaml, one of them without its prices and its ledger.
They answer 50 calls each in turns, one at a time: a call is settled behind its answer, so with one call in a turn that
would count for the other gateway. The difference in CPU time between the two halves of a turn is what the two plugins
take of the event loop's thread, with what it costs that thread to have Python's lock back from the ledger's; what is
spent on other threads is theirs alone. Afterwards their hooks are called alone, over and over for one call: what they
take when nothing else uses the processor's caches.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from statistics import quantiles

from benchmarks.gateways import MODEL, as_yaml, provider, python
from benchmarks.instructions import CannedUpstream, Client, canned, connected
from benchmarks.stages import steps
from qlens import Call
from qlens.testing import Running, running

BEFORE, AFTER = "route: circuit_breaker", "cost: ledger"
TURNS, CALLS, WARM_UP = 120, 50, 300
"""How many turns, and how many calls of each gateway in one."""
LOOPS, AT_ONCE = 40, 250

KEPT = [{"plugin": "keep:Keep", "name": "keep"}]
KEEP = '''\
from qlens import hookimpl


class Keep:
    """Keeps the last call."""

    def __init__(self, config: object, name: str) -> None:
        self.name = name

    @hookimpl
    async def settle(self, call):
        self.seen = call
'''


async def _seconds(client: Client) -> float:
    """CPU time of the event loop's thread for a call of a few: the gateway's, the client's and the upstream's."""
    before = time.thread_time()
    for _ in range(CALLS):
        await client.call()
    return (time.thread_time() - before) / CALLS


async def _written(gateway: Running) -> None:
    """Wait until every receipt is in the database."""
    while gateway.plugin("cost", "ledger").writer.waiting:
        await asyncio.sleep(0.05)


async def _alone(gateway: Running) -> list[float]:
    """CPU time of the event loop's thread for all that the two do for a call."""
    call: Call = gateway.plugin("observe", "keep").seen
    receipt, ledger = gateway.receipts[-1], gateway.plugin("cost", "ledger")
    pipeline, target = gateway.gateway.current.pipeline, receipt.attempts[0].target
    found = []
    for _ in range(LOOPS):
        before = time.thread_time()
        for _ in range(AT_ONCE):
            call.pricing, call._bound_cost = pipeline.bound_cost, None  # as if nobody had asked for it
            hold = await ledger.admit(call)
            pipeline.cost(call, target, receipt.usage)
            await ledger.settle(call, receipt, hold)
        found.append((time.thread_time() - before) / AT_ONCE)
        await _written(gateway)
    return found


async def measure(turns: int) -> str:
    """Both gateways in turns, then the hooks alone."""
    answer = canned(0)
    upstream = await asyncio.get_running_loop().create_server(lambda: CannedUpstream(answer), "127.0.0.1", 0)
    pipelines = {step.name: {**step.pipeline, "observe": KEPT} for step in steps()}
    model = {"providers": {"bench": provider(upstream.sockets[0].getsockname()[1])}, "models": {"gpt-4o-mini": MODEL}}
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(upstream)
        without, with_ = [
            await stack.enter_async_context(
                running(as_yaml({"pipeline": pipelines[name], **model}), files={"keep.py": KEEP})
            )
            for name in (BEFORE, AFTER)
        ]
        clients = [await connected(gateway, stream=False) for gateway in (without, with_)]
        for _ in range(WARM_UP):
            for client in clients:
                await client.call()
        await _written(with_)
        gc.freeze()
        thread, whole = time.thread_time(), time.process_time()
        few, many = zip(*[[await _seconds(client) for client in clients] for _ in range(turns)], strict=True)
        await _written(with_)
        others = (time.process_time() - whole - (time.thread_time() - thread)) / (turns * CALLS)
        alone = await _alone(with_)
        for client in clients:
            client.writer.close()
    return table(few, many, others, alone)


def table(few: Sequence[float], many: Sequence[float], others: float, alone: Sequence[float]) -> str:
    """The medians, and that of the differences; the least of a loop is what they take when nobody slows it down."""
    more = [there - here for here, there in zip(few, many, strict=True)]
    lines = [f"Python {python()}", "", "| CPU per call, us | median | middle half | least |", "|---|---|---|---|"]
    for name, found in (
        ("a call without prices and ledger, client and upstream included", few),
        ("the same with them", many),
        ("what they take more of the event loop's thread", more),
        ("their hooks alone, in a loop", alone),
    ):
        low, middle, high = (seconds * 1e6 for seconds in quantiles(found, n=4))
        least = "" if found is more else f"{min(found) * 1e6:.1f}"
        lines.append(f"| {name} | {middle:.1f} | {low:.1f} to {high:.1f} | {least} |")
    return "\n".join([*lines, f"| their own threads | {others * 1e6:.1f} | | |"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=TURNS)
    print(asyncio.run(measure(parser.parse_args().turns)))
