"""A call's whole story, readable top to bottom: one frozen object for one configuration."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from functools import partial
from operator import itemgetter
from typing import Any, Protocol

import orjson
from attrs import evolve, field, frozen

from qlens import affinity, dialects, objects, realtime, returned, sse
from qlens.account import Account, ClientLeft, run_apart
from qlens.blamed import blame, note
from qlens.body_bounds import refuse_crowd
from qlens.bridges import Bridge, params
from qlens.bridges.counts import as_openai
from qlens.bridges.messages_over_chat import without_extensions
from qlens.bridges.responses_over_chat.thoughts import without_closed
from qlens.call import FREE, UNPRICED, Attempt, Call, Caller, Cost, Model, Outgoing, Receipt, Reply, Target
from qlens.deadlines import Deadlines
from qlens.dialects import count_tokens, input_tokens, responses, typed
from qlens.dialects.fields import missing
from qlens.dialects.texts import has_tokens
from qlens.drains import Drains, stop
from qlens.errors import (
    CallError,
    CallTimedOut,
    InvalidRequest,
    NotCounted,
    PluginFailed,
    Unauthenticated,
    Unavailable,
    UnsupportedMedia,
    UpstreamError,
    UpstreamInvalid,
)
from qlens.estimates import estimated
from qlens.forms import meters_of, read_form
from qlens.metering import Meter, exploded
from qlens.metering_raw import raw_meter
from qlens.metering_typed import TypedMeter
from qlens.metering_typed import exploded as typed_events
from qlens.metrics import CallMetrics
from qlens.models import Models
from qlens.object_ids import ObjectIds
from qlens.operations import model_not_found
from qlens.raised import Raised, raise_bound, raises_of
from qlens.refusals import Refusals
from qlens.registry import Bound, Hooks, Provider
from qlens.repeatable import may_be_known, may_be_repeated
from qlens.returned import mistakes
from qlens.surrogates import json_of
from qlens.translated import bridge_for, translate
from qlens.unsent import Unsent
from qlens.usage import NO_USAGE, Usage, counts_of
from qlens.watching import Watcher

log = logging.getLogger("qlens")

STORE_SECONDS = 0.05
"""How long an answer waits for the caches that keep it."""
MOST_ATTEMPTS = 100
"""No call makes more of them, whatever `retry` says."""

MOST_COLLECTED_BYTES = 32 * 1024 * 1024
"""The longest stream that is made into a body for a client that asked for one."""


_OK = 200
"""What is not this very number is looked at: True and 200.0 are equal to some."""

Step = Callable[[Account], Awaitable[Reply]]
Ask = Callable[[Account, Target], Awaitable[Reply]]


class Relay(Protocol):
    """Writes a reply to the client; raises ClientLeft when nobody reads it."""

    async def __call__(self, account: Account, reply: Reply) -> None: ...


@frozen(eq=False)
class Pipeline:
    """Runs calls through the hooks of one configuration.

    Each hook is a tuple of functions, frozen at start-up in calling order. A CallError may be raised anywhere and is
    caught by the server alone; what a hook raises by mistake is turned into one here, where it happened, and counted.
    """

    version: str
    models: Models
    hooks: Hooks
    providers: dict[str, Provider]
    ids: ObjectIds
    metrics: CallMetrics
    stopping: Callable[[], bool]
    """Whether calls are being cut off because the gateway stops."""
    drains: Drains
    """The calls that go on without their client."""
    unsent: Unsent
    """Who waits for a connection to a provider."""
    settling: set[asyncio.Task[None]] = field(factory=set)
    """What still accounts or stores on its own; shutdown and reload wait for it."""
    deadlines: Deadlines = field(factory=Deadlines)
    refusals: Refusals = field(factory=Refusals)
    batches_read: set[str] = field(factory=set)
    """The batches whose output was read for what they used, or is being read."""
    stores_at_once: bool = field(init=False)
    """Whether no cache waits for anything when it keeps an answer: no task is needed then, nor a bound on its time."""
    settles_at_once: bool = field(init=False)
    """The same of those that settle."""
    has_cache: bool = field(init=False)
    """Whether a plugin of the stage `cache` is asked for answers."""
    raised: Mapping[str, tuple[Raised, ...]] = field(init=False)
    """By model, what the params of its targets may add to the bound of a call."""
    _wrapped: Step = field(init=False)
    _sent: Ask = field(init=False)
    _connected: Ask = field(init=False)

    @stores_at_once.default
    def _stores_at_once(self) -> bool:
        return not any(hook.waits for hook in self.hooks.store)

    @settles_at_once.default
    def _settles_at_once(self) -> bool:
        return not any(hook.waits for hook in self.hooks.settle)

    @has_cache.default
    def _has_cache(self) -> bool:
        return any(hook.instance.startswith("cache.") for hook in self.hooks.lookup)

    @raised.default
    def _raised(self) -> Mapping[str, tuple[Raised, ...]]:
        return {name: found for name, model in self.models.items() if (found := raises_of(model))}

    @_wrapped.default
    def _around_found(self) -> Step:
        """`found` inside the layers of `wrap_call`, the first listed outermost."""
        step: Step = self.found
        for hook in reversed(self.hooks.wrap_call):
            step = self._layer(hook, step)
        return step

    @_sent.default
    def _around_attempt(self) -> Ask:
        """`attempt` inside the layers of `wrap_send`."""
        return self.inside_layers(self.attempt)

    @_connected.default
    def _around_connection(self) -> Ask:
        """The same for a session: to a circuit breaker, one that cannot be opened is a send that failed."""
        return self.inside_layers(partial(realtime.attempt, self))

    def inside_layers(self, ask: Ask) -> Ask:
        """A way to ask a target inside the layers of `wrap_send`."""
        for hook in reversed(self.hooks.wrap_send):
            ask = self._send_layer(hook, ask)
        return ask

    # --- the story -----------------------------------------------------------------------------

    async def run(self, call: Call, relay: Relay) -> None:
        """Take a call from its head to its last byte and its receipt."""
        call.config = self.version
        self.metrics.running += 1
        task = asyncio.current_task()
        assert task is not None
        self.deadlines.begin(call, task)
        try:
            call.caller = await self.authenticate(call)
            # From here on every exit settles, whatever it is and wherever it happens.
            account = Account(self, call)
            try:
                try:
                    await relay(account, await self.answer(account))
                except ClientLeft:
                    if call.left is not None:
                        await account.read_on()
                    raise
            except BaseException as error:
                await account.leave(error)
                raise
            await account.leave(None)
        except asyncio.CancelledError:
            if not self.deadlines.over(call) or task.uncancel():
                raise
            raise CallTimedOut("The call took longer than this gateway allows.") from None
        finally:
            self.deadlines.end(call)
            self.metrics.running -= 1
            del task  # a cancelled task keeps its error, whose traceback keeps this frame: a cycle

    def left(self, call: Call, task: asyncio.Task[None]) -> bool:
        """Note that the client of a call is gone; whether the call goes on, because its provider bills it whole."""
        if call.operation.runs == "session":
            return False  # which of its sides has left, the session knows
        call.left = time.monotonic()
        if task in self.unsent or self.stopping():
            return False
        for attempt in call.attempts:
            if attempt.ended is None and self.is_drained(attempt.target):
                return self.drains.begin(task)
        return False

    def is_drained(self, target: Target) -> bool:
        """Whether an answer of this target is read to its end when the client has left."""
        provider = self.providers.get(target.provider)  # a plugin may say another name for what has answered
        return provider is not None and provider.drains

    async def authenticate(self, call: Call) -> Caller:
        """Who is it: the first plugin that answers wins; only the head was read so far."""
        for hook in self.hooks.authenticate:
            try:
                caller = returned.caller(await hook.fn(call))
                returned.tags(call)
            except CallError:
                raise
            except mistakes() as error:
                # Never a 401: the client would blame its key.
                raise self.failure(hook, error, Unavailable("Authentication is unavailable.")) from error
            if caller is not None:
                return caller
        if call.credential is None:
            raise Unauthenticated(
                "You didn't provide an API key. Send it in an Authorization header: Authorization: Bearer YOUR_KEY."
            )
        raise Unauthenticated("Incorrect API key provided.", code="invalid_api_key")

    async def answer(self, account: Account) -> Reply:
        """Find the answer to an authenticated call."""
        call = account.call
        if call.operation.runs != "full":
            return await self.apart(account)
        await self.open(call)
        await self.admit(account)
        reply = account.reply = await self._wrapped(account)
        if reply is not account.source:
            account.picked(reply)
        if (reply.chunks is None) is call.stream and not reply.raw:
            reply = await self.shaped(account, reply)
        return reply

    async def apart(self, account: Account) -> Reply:
        """Find the answer to a call that leaves out some of the stages."""
        call = account.call
        match call.operation.runs:
            case "session":
                return await self.session(account)
            case "affinity":
                if call.operation.body != "none":
                    call.body = await _READERS[call.operation.body](call)
                return await affinity.answer(self, account)
            case "count":
                return await self.count(account)
        assert call.operation.local is not None
        await self.admit(account)
        return _local(call.operation.local(call, self.models))

    async def count(self, account: Account) -> Reply:
        """Let a target count that can, or else estimate."""
        call = account.call
        await self.open(call)
        assert call.model is not None
        call.bound, call.bound_cost, call.estimated_input = NO_USAGE, FREE, 0  # to count costs nothing
        able = tuple(
            each for each in call.targets if call.operation.dialect in self.providers[each.provider].dialects(each)
        )
        if able:
            call.model, call.targets = evolve(call.model, candidates=able, fallbacks={}), able
        await self.admit(account)
        if able:
            try:
                account.reply = await self._wrapped(account)
                return account.reply
            except NotCounted:
                pass  # it speaks of counting, but not for this model: that shows when it is asked
        counting = input_tokens if call.operation.dialect == "input_tokens" else count_tokens
        return _local(counting.estimate(call.body))

    async def session(self, account: Account) -> Reply:
        """Open a session; there is no body to guard, to know already or to keep."""
        realtime.open_session(self, account.call)
        await self.admit(account)
        return await self.ask(account, self._connected)

    def refuse_unseen(self, refusal: str, *, of_request: str | None = None) -> None:
        """Refuse what no guard can look into, where there is one that does not let it pass unseen.

        With `of_request`, the name of a field, only guards count that look at requests.
        """
        for hook in self.hooks.wrap_call:
            if not hook.instance.startswith("guard.") or getattr(hook.owner, "passes_sessions", False):
                continue
            if of_request is None or getattr(hook.owner, "reads_requests", True):
                raise InvalidRequest(
                    f"{refusal} here: the guard {hook.plugin} cannot look into them.",
                    param=of_request,
                    code="unsupported_operation",
                )

    async def open(self, call: Call) -> None:
        """Read the body, validate it, resolve the model, and bound what the call can use."""
        operation = call.operation
        call.body = body = await _READERS[operation.body](call)
        if call.path_params and (named := call.path_params.get("deployment")) is not None:
            body["model"] = named  # Azure's clients name it in the path, whatever the body says
        dialect = dialects.named(operation.dialect)
        validated = dialect.validate(body)
        if self.hooks.wrap_call and (field := _TOKENS.get(operation.dialect)) and has_tokens(body.get(field)):
            self.refuse_unseen("Arrays of tokens are not taken", of_request=field)
        name = call.asked_model = body["model"]
        model = self.models.resolve(name)
        caller = call.known
        if model is None or not (caller.models is None or caller.may_use(name)):
            raise model_not_found(name)
        call.model = model
        call.targets = model.candidates
        if operation.streams and body.get("stream") is True:
            call.stream = True
            call.wants_usage = bool((body.get("stream_options") or {}).get("include_usage"))
        asked = dialect.clamp(body, model.max_output_tokens, model.max_n)
        hard, call.estimated_input, media = dialect.measured(body, validated)
        if dialect.GENERATES:
            most = asked if asked is not None else _most_output(self.reachable(call))
            call.bounded = most is not None
            output = (most or 0) * dialect.choices(body)
        else:
            most, output = None, 0
        if media or operation.dialect in objects.OF_RESPONSES:
            objects.claim(call, self.ids, self.responds)
            if call.form is not None:
                media = {**media, **meters_of(call)}
        call.bound = Usage(input=hard, output=output, meters=media, source="estimated")
        if self.raised:  # by what operators have set for some targets; most set nothing that does it
            raises = [each for reached in self.reachable(call) for each in self.raised.get(reached.name, ())]
            raise_bound(call, dialect, raises, most)
        call.pricing = self.bound_cost

    def responds(self, target: Target) -> bool:
        """Whether a target speaks Responses itself."""
        return "responses" in self.providers[target.provider].dialects(target)

    def bound_cost(self, call: Call) -> Cost:
        """The most the call can cost: the dearest over candidates and fallbacks, unpriced if one of them is."""
        if not self.hooks.price or not call.bounded:
            return UNPRICED
        model = call.model
        if model is not None and len(model.candidates) == 1 and not model.fallbacks:  # most: nothing to compare
            return self.cost(call, model.candidates[0], call.bound)
        dearest = FREE
        for model in self.reachable(call):
            for target in model.candidates:
                cost = self.cost(call, target, call.bound)
                if cost.picos is None:
                    return UNPRICED
                if cost.picos >= (dearest.picos or 0):
                    dearest = cost
        return dearest

    def reachable(self, call: Call) -> list[Model]:
        """The call's model and the fallbacks that the caller may use."""
        assert call.model is not None
        if not call.model.fallbacks:
            return [call.model]
        names = {name for names in call.model.fallbacks.values() for name in names if call.known.may_use(name)}
        return [call.model, *(model for name in names if (model := self.models.resolve(name)) is not None)]

    async def admit(self, account: Account) -> None:
        """May it run: all plugins are asked, one after another; the first that raises ends it."""
        call = account.call
        told = len(call.limits)
        for hook in self.hooks.admit:
            if hook.bounded and not call.bounded and call.model is not None:
                field = "max_output_tokens" if call.operation.dialect == "responses" else "max_tokens"
                raise InvalidRequest(
                    f"{field} is required: the model `{call.model.name}`, or a fallback of it, has no "
                    f"max_output_tokens in this gateway's configuration and {hook.plugin} must know how much a call "
                    "can generate.",
                    param=field,
                    code="missing_required_parameter",
                )
            try:
                hold = await hook.fn(call)
                if hold is not None:
                    account.holds[hook.instance] = hold
                if len(call.limits) != told:
                    told = returned.limits(call.limits, told)
                if call.tags:
                    returned.tags(call)
            except CallError:
                raise
            except mistakes() as error:
                # What it has put there may be what is wrong.
                call.limits = call.limits[:told] if isinstance(call.limits, list) else []
                raise self.failure(hook, error, Unavailable(f"{hook.plugin} cannot decide at the moment.")) from error
        account.admitted = True

    def _layer(self, hook: Bound, inner: Step) -> Step:
        async def layer(account: Account) -> Reply:
            try:
                reply = account.take(await hook.fn(account.call, lambda: inner(account)))
                return blame(reply, partial(self.misguided, hook)) if reply.chunks is not None else reply
            except CallError:
                raise
            except mistakes() as error:
                raise self.misguided(hook, error) from error

        return layer

    def misguided(self, hook: Bound, error: BaseException) -> CallError:
        """The error for a layer of an onion that fails: what goes wrong deeper is a CallError already."""
        return self.failure(hook, error, PluginFailed(f"{hook.plugin} failed."))

    async def found(self, account: Account) -> Reply:
        """The cache's answer, or else a provider's, which the caches may keep."""
        call = account.call
        only_asks = may_be_known(call)
        if self.hooks.lookup and only_asks:
            known = await self.lookup(call)
            if known is not None:
                if call.cache != "semantic":
                    call.cache = "hit"
                account.open(known)
                return known
            if self.has_cache:
                call.cache = call.cache or "miss"
        reply = await self.ask(account)
        if self.hooks.store and only_asks and reply.body is not None and reply.complete and not reply.raw:
            # A cache may keep it, and this one goes on to change.
            await self.store(call, reply.copied() if self.has_cache else reply)
        return reply

    async def lookup(self, call: Call) -> Reply | None:
        """Is the answer known: the first reply wins and skips the rest; a broken cache is a miss."""
        for hook in self.hooks.lookup:
            try:
                known = await hook.fn(call)
                if known is not None:
                    return blame(returned.known(known, is_read=call.stream), partial(self.misguided, hook))
            except CallError:
                raise
            except mistakes() as error:
                self.failure(hook, error)
        return None

    # --- asking providers ----------------------------------------------------------------------

    async def ask(self, account: Account, sent: Ask | None = None) -> Reply:
        """The one owner of retries and fallback; it never runs again once a good byte is in hand.

        Each target of the model is asked in turn, then those of its fallbacks. Only when all were tried is one asked
        again, if `retry` allows it, after the wait it says.
        """
        call = account.call
        assert call.model is not None
        waiting = await self.choose(call, call.model)
        call.targets = tuple(waiting)
        reached = {call.model.name}
        resting: list[tuple[float, Target]] = []  # what failed, with the time from which it may be asked again
        error: CallError | None = None
        try:
            while True:
                if not waiting and error is not None:
                    waiting = await self.fall_back(call, error, reached)
                if not waiting and resting:
                    rested = min(resting, key=itemgetter(0))
                    resting.remove(rested)
                    await account.rest(rested[0])
                    waiting = [rested[1]]
                if not waiting:
                    raise error or Unavailable(f"No target of the model `{call.model.name}` may be asked.")
                target, before = waiting.pop(0), len(call.attempts)
                try:
                    return account.picked(await (sent or self._sent)(account, target))
                except CallError as raised:
                    if len(call.attempts) == before:  # refused before it was sent: no attempt
                        error = error if call.attempts else _latest(error, raised)
                        continue
                    error = _latest(error, raised)
                is_over = not error.elsewhere and error.fallback is None
                if is_over or not await self.has_room(account, call.attempts[before:]):
                    raise error
                if not error.elsewhere:
                    waiting, resting = [], []
                if self.hooks.retry:
                    wait = self.retry(call, call.attempts[-1])
                    if wait is None or len(call.attempts) >= MOST_ATTEMPTS:
                        raise error
                    if error.again and math.isfinite(wait):
                        resting.append((time.monotonic() + wait, target))
        finally:
            del error  # what is raised has a traceback, which keeps this frame: a cycle

    async def has_room(self, account: Account, failed: Iterable[Attempt]) -> bool:
        """Whether another attempt is within what is reserved: what these are billed, though they failed, is added."""
        call, most = account.call, account.call.bound_cost.picos or 0
        spent = sum(most if each.cost.picos is None else each.cost.picos for each in failed if each.billed)
        for hook in self.hooks.admit if spent else ():
            reserve_more, hold = getattr(hook.owner, "reserve_more", None), account.holds.get(hook.instance)
            if reserve_more is None or hold is None:
                continue
            try:
                if not await reserve_more(call, hold, spent):
                    return False
            except mistakes() as error:
                self.failure(hook, error)
                return False
        return True

    async def choose(self, call: Call, model: Model) -> list[Target]:
        """Order a model's targets: the first answer wins; without one it is YAML's order."""
        for hook in self.hooks.choose:
            try:
                chosen = await hook.fn(call, model)
                if chosen is model.candidates:
                    break  # as they are configured: there is nothing to look at
                if chosen is not None:
                    return returned.targets(chosen, self.providers)
            except CallError:
                raise
            except mistakes() as error:
                raise self.misguided(hook, error) from error
        return list(model.candidates)

    async def fall_back(self, call: Call, error: CallError, reached: set[str]) -> list[Target]:
        """The targets of the next fallback for this kind of error that the caller may use; each is reached once."""
        assert call.model is not None
        fallbacks = call.model.fallbacks
        names = fallbacks.get(error.fallback or "", ())
        if error.elsewhere:
            names = (*names, *fallbacks.get("any", ()))
        for name in names:
            model = self.models.resolve(name)
            if name in reached or model is None or not call.known.may_use(name):
                continue
            reached.add(name)
            return await self.choose(call, model)
        return []

    def retry(self, call: Call, attempt: Attempt) -> float | None:
        """How long to wait before another attempt, or None: no more."""
        for hook in self.hooks.retry:
            try:
                wait = returned.wait(hook.fn(call, attempt))
            except (Exception, SystemExit) as error:
                self.failure(hook, error)
                continue
            if wait is not None:
                return wait
        return None

    def _send_layer(self, hook: Bound, inner: Ask) -> Ask:
        async def layer(account: Account, target: Target) -> Reply:
            try:
                reply = account.take(await hook.fn(account.call, target, lambda other: inner(account, other)))
                return blame(reply, partial(self.misguided, hook)) if reply.chunks is not None else reply
            except CallError:
                raise
            except mistakes() as error:
                raise self.misguided(hook, error) from error

        return layer

    async def attempt(self, account: Account, target: Target) -> Reply:
        """One attempt: from here to its end the account knows about it."""
        call, provider = account.call, self.providers[target.provider]
        if call.left is not None:
            await stop()
        outgoing, bridge = self.outgoing(call, target, provider)
        place = account.begin(target)
        try:
            reply = account.take(await provider.send.fn(call, target, outgoing))
            if reply.status is not _OK:
                returned.success(reply)
            reply.target = reply.target or target  # a provider may know better which model it was
            translation = None
            if bridge is not None:
                translation = translate(reply, bridge, call.operation.dialect, call.body)
            elif reply.dialect in objects.OF_RESPONSES:
                objects.Sealer.of(call, target, self.ids).reply(reply)
            meter = self.metered(account, reply)
            if meter is not None:
                meter.translation = translation
        except CallError as error:
            if bridge is not None:
                error.param = params.asked(call.operation.dialect, error.param, outgoing.dialect)
            account.failed(place, error)
            raise
        except mistakes() as error:
            account.failed(place, "provider_failed")
            raise self.provider_failure(provider, error) from error
        except asyncio.CancelledError as error:
            account.cut_off(place, error)
            raise
        account.answered(place, reply, meter)
        return reply

    def outgoing(self, call: Call, target: Target, provider: Provider) -> tuple[Outgoing, Bridge | None]:
        """What this target is sent, in a dialect it speaks, with the bridge that is needed for it."""
        dialect, spoken = call.operation.dialect, provider.dialects(target)
        body, bridge = {**call.body, "model": target.model}, None
        if dialect not in spoken:
            dialect, bridge = bridge_for(
                dialect, spoken, f"The provider {target.provider} of the model `{target.public}`"
            )
            body = bridge.request(body)
        elif dialect in objects.OF_RESPONSES:
            body = without_closed(body)
        may_be_extended = dialect == "chat" and (call.extended or bridge is not None)
        if may_be_extended and not getattr(provider.plugin, "takes_extensions", False):
            # A field beside the messages that a client of chats sends is for a server that knows it.
            body = without_extensions(body, keep_settings=bridge is None)
        body.update(target.params)
        model = self.models.named(target.public)
        is_told = call.most_output is not None and _tell_most(body, dialect, call, provider)
        if model is not None and (bridge is not None or target.params or model is not call.model or is_told):
            # A fallback may allow less than the model that was asked for, params may ask for more, and where a
            # provider wants a number that the client did not give, a bridge has put in what the model can do.
            dialects.named(dialect).clamp(body, model.max_output_tokens, model.max_n)
        body["model"] = target.model
        return Outgoing(call.operation, dialect, body, call.stream, form=call.form), bridge

    def metered(self, account: Account, reply: Reply) -> Watcher | None:
        """See to it that usage is known: read from a body at once, found in a stream as it passes."""
        call, target = account.call, reply.target
        assert target is not None
        said = returned.usage(reply.usage)
        if reply.chunks is None:
            if said is None or not (said.output or _is_all(said, reply)):
                reply.usage = _usage_of(call, reply, said)
            reply.complete = True  # all of it is here
            return None

        async def keep(body: bytes) -> None:
            kept = Reply(body=body, dialect=reply.dialect, target=target, usage=meter.usage(), complete=True)
            kept.finish = reply.finish
            if may_be_known(call):
                await self.store(call, kept)

        def failed(error: BaseException) -> CallError:
            return self.provider_failure(self.providers[target.provider], error)

        def price(usage: Usage) -> Cost:
            return self.cost(call, reply.target or target, usage)

        meter: Watcher
        if reply.raw:
            meter = raw_meter(call, reply, failed)
        elif reply.dialect in typed.NAMES:
            meter = TypedMeter(call, reply, failed=failed, ended=keep, keeps_at_once=self.stores_at_once)
        else:
            meter = Meter(call, reply, failed=failed, ended=keep, price=price, keeps_at_once=self.stores_at_once)
        reply.replace(chunks=meter.watch(reply.chunks))
        return meter

    def provider_failure(self, provider: Provider, error: BaseException) -> CallError:
        """The error for a provider that fails by itself, before its answer or in the middle of it."""
        return self.failure(provider.send, error, UpstreamError(f"The provider {provider.name} failed."))

    async def store(self, call: Call, reply: Reply) -> None:
        """Hand a complete answer to the caches; a slow one goes on alone."""
        if not self.hooks.store or reply.status != 200 or not may_be_repeated(call, reply):
            return
        if self.stores_at_once:
            await self._store(call, reply)
            return
        storing = run_apart(self._store(call, reply))
        if not storing.done():
            self.settling.add(storing)
            storing.add_done_callback(self.settling.discard)
            await asyncio.wait({storing}, timeout=STORE_SECONDS)
        if not storing.done():
            # The call's own timer ends what hangs, though the call is over by then.
            timer = asyncio.get_running_loop().call_at(call.deadline, storing.cancel)
            storing.add_done_callback(lambda _: timer.cancel())

    async def _store(self, call: Call, reply: Reply) -> None:
        for hook in self.hooks.store:
            try:
                await hook.fn(call, reply)
            except mistakes() as error:
                self.failure(hook, error)

    # --- the way back --------------------------------------------------------------------------

    async def shaped(self, account: Account, reply: Reply) -> Reply:
        """Make a stream of one body or one body of a stream: what the client asked for."""
        if account.call.stream:
            is_typed = reply.dialect in typed.NAMES
            events = typed_events(reply) if is_typed else exploded(account.call, reply, account.cost())
            reply.replace(chunks=sse.chunks_of(events))
            reply.body = None
            return reply
        payloads, size = [], 0
        async for event in reply.events():
            data = sse.data(event)
            size += len(event)
            if size > MOST_COLLECTED_BYTES:
                raise UpstreamInvalid(f"The provider sent a stream of more than {MOST_COLLECTED_BYTES} bytes.")
            if data and not data.startswith(b"[DONE]"):
                payloads.append(sse.parsed(data))
        body = dialects.named(reply.dialect).assemble(payloads)
        said = account.source.usage if account.source is not None else None
        if said is not None and not body.get("usage") and reply.dialect not in typed.NAMES:
            body["usage"] = as_openai(said)  # its event was withheld, as from any client that did not ask for it
        reply.body, reply.chunks = orjson.dumps(body), None
        return reply

    def cost(self, call: Call, target: Target, usage: Usage) -> Cost:
        """What a usage costs at a target: the first plugin that knows; nobody knows means unpriced."""
        for hook in self.hooks.price:
            try:
                cost = returned.cost(hook.fn(call, target, usage))
            except (Exception, SystemExit) as error:
                self.failure(hook, error)
                continue
            if cost is not None:
                return cost
        return UNPRICED

    async def settle(self, account: Account, receipt: Receipt) -> None:
        """Account for a finished call: every plugin, once, each with its own hold, even if others fail."""
        for hook in self.hooks.settle:
            try:
                await hook.fn(account.call, receipt, account.holds.get(hook.instance))
            except (
                Exception,
                SystemExit,
                asyncio.CancelledError,
            ) as error:  # also when shutdown cancels one that hangs
                self.failure(hook, error)
        self.metrics.settled(receipt)

    @property
    def takes_once(self) -> list[Bound]:
        """The hooks that know a receipt by its id: they take it once, or tell of it under that id."""
        return [hook for hook in self.hooks.settle if getattr(hook.owner, "takes_once", False)]

    def settle_once(self, call: Call, receipt: Receipt) -> None:
        """Account for what became known after the call that set it going, and perhaps was accounted for before."""
        for hook in self.takes_once:
            self.settle_later(self._settle_once(hook, call, receipt))

    async def _settle_once(self, hook: Bound, call: Call, receipt: Receipt) -> None:
        try:
            await hook.fn(call, receipt, None)
        except (Exception, SystemExit, asyncio.CancelledError) as error:
            self.failure(hook, error)

    def settle_later(self, work: Coroutine[Any, Any, None]) -> None:
        """Do something that no call waits for; shutdown and reload do."""
        settling = run_apart(work)
        if not settling.done():
            self.settling.add(settling)
            settling.add_done_callback(self.settling.discard)

    def failure(self, hook: Bound, error: BaseException, answer: CallError | None = None) -> CallError:
        """Count a hook that failed by itself, and give the error that the client sees for it."""
        note(self.metrics.failures, hook, error)
        return answer or PluginFailed(f"{hook.plugin} failed.")


async def _json_body(call: Call) -> dialects.Body:
    """The request's body as a JSON object."""
    media = call.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media != "application/json" and not media.endswith("+json"):
        raise UnsupportedMedia(
            "Unsupported content type. This API accepts 'application/json' only: set the header "
            "'Content-Type: application/json'."
        )
    raw = await call.read()
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"We could not parse the JSON body of your request: {error}.") from None
    if not isinstance(body, dict):
        raise InvalidRequest("The JSON body of your request must be an object.")
    refuse_crowd(raw, body)
    call.extended = b'"thinking_blocks"' in raw or b'"cache_control"' in raw
    return body


async def _form_body(call: Call) -> dialects.Body:
    """A form's fields; or the JSON object that names the files, where an operation takes that instead."""
    named = getattr(dialects.named(call.operation.dialect), "by_reference", "")
    if not named or not call.headers.get("content-type", "").lower().startswith("application/json"):
        return await read_form(call)
    body = await _json_body(call)
    if body.get(named) is None:
        raise missing((None, named))
    return body


_LIMITS: Mapping[str, str] = {
    "chat": "max_tokens",
    "completions": "max_tokens",
    "responses": "max_output_tokens",
}
"""The field of a dialect that bounds an answer; Messages always have theirs."""
_TOKENS: Mapping[str, str] = {"completions": "prompt", "embeddings": "input"}
"""The field of a dialect that may hold tokens instead of texts."""
_READERS: Mapping[str, Callable[[Call], Awaitable[dialects.Body]]] = {"json": _json_body, "form": _form_body}
"""What reads a body of each kind."""


def _tell_most(body: dialects.Body, dialect: str, call: Call, provider: Provider) -> bool:
    """Tell a provider what was reserved for an answer that the client has not bounded; whether that was needed."""
    if call.most_output is None or (name := _LIMITS.get(dialect)) is None:
        return False
    if dialects.named(dialect).output_bound(body)[1] is not None:
        return False
    if dialect == "chat" and getattr(provider.plugin, "kind", None) == "openai":
        name = "max_completion_tokens"  # its reasoning models know no other; servers that speak its API know the first
    body[name] = call.most_output // dialects.named(call.operation.dialect).choices(call.body)
    return True


def _most_output(models: Iterable[Model]) -> int | None:
    """The most that one of these models generates; None when that is not known of one."""
    limits = [model.max_output_tokens for model in models]
    return None if None in limits else max(limit for limit in limits if limit is not None)


def _is_all(said: Usage, reply: Reply) -> bool:
    """Whether usage without output can be true: it has something else, and of what is generated, there is some."""
    if not reply.raw and dialects.named(reply.dialect).GENERATES:
        return said.source != "estimated" and bool(said.completion)
    return any(counts_of(said)) or bool(said.meters)


def _usage_of(call: Call, reply: Reply, said: Usage | None) -> Usage:
    """The usage a whole answer states, as far as it was not `said` yet, or else an estimate: never a silent zero."""
    if reply.raw:
        return estimated(call, reply.dialect, {"text": (reply.body or b"").decode(errors="ignore")})
    try:
        body = json_of(reply.body or b"")
    except orjson.JSONDecodeError:
        raise UpstreamInvalid("The provider's answer is not JSON.") from None
    if not isinstance(body, dict):
        raise UpstreamInvalid("The provider's answer is not a JSON object.")
    dialect = dialects.named(reply.dialect)
    if said is None or not (said.total or said.meters):
        said = dialect.usage(body)
    reply.finish = reply.finish or dialect.finish(body)
    guess = estimated(call, reply.dialect, body)
    if reply.dialect == "responses" and responses.goes_on(body):
        # It is asked for once more when it is over, or never, and nobody could tell which: the most it can use counts.
        return evolve(guess, output=max(guess.output, call.bound.output))
    if said is None or not (said.total or said.meters or not guess.output):
        return guess
    if not dialect.GENERATES or (said.completion and said.source != "estimated") or not guess.output:
        return said
    return evolve(said, output=max(0, guess.output - said.completion), source="estimated")


def _local(body: dialects.Body) -> Reply:
    return Reply(body=orjson.dumps(body), complete=True)


def _latest(one: CallError | None, other: CallError) -> CallError:
    """The later error; of two of the same kind, the one that lets the client come back sooner."""
    if one is not None and one.status == other.status and (one.retry_after or 0) < (other.retry_after or 0):
        return one
    return other
