"""The plugin: limits at admission and, for providers, around each send."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any, Literal

from attrs import define, field

from qlens import Call, CallError, Endpoint, Gateway, Health, Receipt, Reply, Target, hookimpl, redis_store
from qlens_plugins.rate_limit.token_bucket.endpoints import LimitApi
from qlens_plugins.rate_limit.token_bucket.memory import Levels, clock
from qlens_plugins.rate_limit.token_bucket.meters import Meter, Rules
from qlens_plugins.rate_limit.token_bucket.plans import Hold, Plan, Plans
from qlens_plugins.rate_limit.token_bucket.purses import Purses
from qlens_plugins.rate_limit.token_bucket.refusals import owner, too_large, unbounded
from qlens_plugins.rate_limit.token_bucket.settings import Memory, Redis, TokenBucketConfig
from qlens_plugins.rate_limit.token_bucket.shared import Shared, lease
from qlens_plugins.rate_limit.token_bucket.shown import Shown


@define(eq=False)
class TokenBucket:
    """Takes from all buckets of a call or from none, and corrects them when the call has settled."""

    config: TokenBucketConfig
    name: str
    _states: Levels | Purses = field(init=False, repr=False)
    _plans: Plans[Any, Any] = field(init=False, repr=False)
    _limits: Levels | Shared = field(init=False, repr=False)
    """Who decides, from the time the lifespan has opened."""
    gateway: Gateway = field(init=False, repr=False)
    """From the time the lifespan has opened."""

    Config = TokenBucketConfig

    def __new__(cls, config: TokenBucketConfig, name: str) -> TokenBucket:
        """An instance that stands around sends only where a rule is for providers: nobody else's sends pay for it."""
        del name
        is_around = any(rule.per == "provider" for rule in config.limits)
        return object.__new__(TokenBucketAroundSends if is_around else cls)

    def __attrs_post_init__(self) -> None:
        store = self.config.store
        self._states = Purses(store, self.name) if isinstance(store, Redis) else Levels()
        self._divide(1)

    @property
    def bounded(self) -> bool:
        """Whether a call must say how much it can generate."""
        return any(rule.tokens_per_minute is not None for rule in self.config.limits)

    @property
    def shares(self) -> Literal["process", "store"]:
        """How far the limits reach: in a store, or with a share for each worker, for all of them together."""
        store = self.config.store
        return "store" if isinstance(store, Redis) or store.per_worker else "process"

    @hookimpl
    @asynccontextmanager
    async def lifespan(self, gateway: Gateway) -> AsyncIterator[None]:
        """Take the clock, this worker's share of the limits, and the store."""
        self.gateway, now = gateway, clock(gateway.clock.monotonic_ns)
        states, store = self._states, self.config.store
        workers = gateway.config.server.workers if gateway.url else 1
        if isinstance(states, Levels):
            states.now, self._limits = now, states
            if isinstance(store, Memory) and store.per_worker:
                self._divide(workers)
            yield
            return
        assert isinstance(store, Redis)
        calls = gateway.metrics.counter(
            "qlens_limit_calls_total",
            "Calls whose limits were not served from a lease: asked of the store, or decided alone while it was away.",
            ("limiter", "way"),
        )
        count = {way: calls.labels(self.name, way).inc for way in ("asked", "alone")}
        self._divide(store.replicas * workers)
        async with redis_store(gateway, store) as redis:
            processes = store.replicas * workers
            shared = self._limits = Shared(redis, store, states, now, processes, lambda way: count[way]())
            tending = asyncio.create_task(shared.tend(), name=f"{self.name}: give back leases")
            try:
                yield
            finally:
                tending.cancel()
                await asyncio.gather(tending, return_exceptions=True)
                await shared.close()

    @hookimpl
    def adopt(self, old: object) -> None:
        """Go on with the buckets as they are: a changed number is no fresh bucket."""
        assert isinstance(old, TokenBucket)
        old._plans.end()
        if type(old._states) is type(self._states) and old._prefix == self._prefix:
            self._states = old._states
            self._plans.states = self._states

    @property
    def _prefix(self) -> str | None:
        return self.config.store.prefix if isinstance(self.config.store, Redis) else None

    @hookimpl
    def health(self) -> Health:
        """How the store is."""
        if isinstance(self._limits, Levels):
            return Health(True, "")
        health = self._limits.store.health()
        if health.ok:
            return health
        return Health(False, f"{health.detail}; this process enforces 1/{self._limits.processes} of each limit")

    # --- at admission --------------------------------------------------------------------------

    @hookimpl
    async def admit(self, call: Call) -> Hold[Any, Any]:
        """Take what the call may use; nothing is taken unless every bucket has said yes."""
        plan = self._plans.find(call)
        tokens = call.estimated_input + call.bound.output
        if plan.needs_bound and not call.bounded and call.model is not None:
            raise unbounded()
        verdict = self._limits.take(plan, tokens)
        call.limits += plan.limits
        if verdict is not None:
            await _passed(verdict)
        return plan, tokens

    @hookimpl
    async def settle(self, call: Call, receipt: Receipt, hold: Hold[Any, Any] | None) -> None:
        """Correct what was held by what was used, and let the next call run."""
        if hold is not None:
            self._limits.settle(hold, receipt)

    # --- for operators -------------------------------------------------------------------------

    @hookimpl
    def endpoints(self) -> Iterable[Endpoint]:
        """How full buckets are."""
        return LimitApi(self, TokenBucket).endpoints()

    @property
    def shown(self) -> Shown:
        """All buckets and places, from the time the lifespan has opened."""
        return self._limits

    @property
    def rules(self) -> Rules:
        """What the configuration says, in memory this process' share of it."""
        return self._plans.rules

    @property
    def is_apart(self) -> bool:
        """Whether other workers have buckets of their own."""
        return isinstance(self.config.store, Memory) and self._plans.processes > 1

    def room(self, meter: Meter) -> int:
        """How much of a full bucket may be used at once, in picoseconds."""
        return self._plans.room(meter)

    # --- the rest ------------------------------------------------------------------------------

    @hookimpl
    def explain(self, call: Call) -> list[str]:
        """Say what the call would take from whom."""
        plan: Plan[Any, Any] = self._plans.make(call)
        tokens = call.estimated_input + call.bound.output
        takes = [(share, share.quantity(tokens)) for share in plan.taking(tokens)]
        return [
            *(
                f"takes {quantity} of {share.meter.per_minute} {share.meter.kind} a minute from {owner(share.key)}"
                for share, quantity in takes
            ),
            *(f"takes one of {place.cap.most} places at a time from {owner(place.key)}" for place in plan.places),
            *(
                too_large(share.meter, share.key, quantity, share.room // share.unit).message
                for share, quantity in takes
                if quantity * share.unit > share.room
            ),
        ]

    def _divide(self, processes: int) -> None:
        """Take the rules: in memory each process has its share of them, in a store all have the whole."""
        store = self.config.store
        if isinstance(store, Redis):
            self._plans = Plans(
                self._states, lambda meter: meter.room - lease(store, meter, processes), Rules.of(self.config.limits), 1
            )
        else:
            rules = Rules.of(self.config.limits, processes)
            self._plans = Plans(self._states, lambda meter: meter.room, rules, processes)


@define(eq=False)
class TokenBucketAroundSends(TokenBucket):
    """The same with limits for providers, which are known only when a call is about to be sent."""

    _sent: dict[Call, list[tuple[str, Hold[Any, Any]]]] = field(factory=dict, init=False, repr=False)
    """What calls hold of the limits of providers they were sent to."""

    @hookimpl
    async def wrap_send(self, call: Call, target: Target, proceed: Callable[[Target], Awaitable[Reply]]) -> Reply:
        """Take from the provider's buckets; without room there another target is asked."""
        plan = self._plans.find(call, target.provider)
        tokens = call.estimated_input + call.bound.output
        verdict = self._limits.take(plan, tokens)
        if verdict is not None:
            await _passed(verdict)
        hold = (plan, tokens)
        try:
            reply = await proceed(target)
        except CallError:
            self._limits.unsent(hold)
            raise
        except BaseException:
            self._sent.setdefault(call, []).append((target.provider, hold))
            raise
        self._sent.setdefault(call, []).append((target.provider, hold))
        return reply

    @hookimpl
    async def settle(self, call: Call, receipt: Receipt, hold: Hold[Any, Any] | None) -> None:
        """Correct what was held of providers' limits, too."""
        if hold is not None:
            self._limits.settle(hold, receipt)
        for provider, taken in self._sent.pop(call, ()):
            self._limits.settle(taken, receipt, provider)


async def _passed(verdict: CallError | Awaitable[CallError | None]) -> None:
    """Wait for a verdict that is not there yet, and raise what refuses the call."""
    refusal = verdict if isinstance(verdict, CallError) else await verdict
    if refusal is not None:
        raise refusal
