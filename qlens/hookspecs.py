"""The contract: every hook, in the order a call meets them.

A plugin is a class, constructed as `Plugin(config, name)`, whose methods carry `@hookimpl`. It is named in YAML and
run in the order of its stage and of the YAML file; an implementation may leave out arguments it does not need.
Request hooks are `async def`; the others are plain functions.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, TypeVar, overload

import pluggy

if TYPE_CHECKING:
    from qlens.call import Attempt, Call, Caller, Cost, Model, Outgoing, Receipt, Reply, Target
    from qlens.gateway import Gateway
    from qlens.registry import Command, Endpoint, Health
    from qlens.session import Session
    from qlens.usage import Usage

__all__ = [
    "admit",
    "adopt",
    "audit_log",
    "authenticate",
    "banner",
    "choose",
    "commands",
    "connect",
    "endpoints",
    "explain",
    "health",
    "lifespan",
    "lookup",
    "price",
    "retry",
    "send",
    "settle",
    "store",
    "wrap_call",
    "wrap_send",
]

F = TypeVar("F", bound=Callable[..., object])

_spec = pluggy.HookspecMarker("qlens")
_impl = pluggy.HookimplMarker("qlens")


@overload
def hookspec(function: F) -> F: ...
@overload
def hookspec(*, firstresult: bool) -> Callable[[F], F]: ...
def hookspec(function: F | None = None, *, firstresult: bool = False) -> F | Callable[[F], F]:
    """Mark a function of this module as a hook; `firstresult`: the first answer that is not None wins."""
    if function is None:
        return _spec(firstresult=firstresult)
    return _spec(function)


def hookimpl(function: F) -> F:
    """Mark a plugin's method as the implementation of the hook with the same name."""
    return _impl(function)


# --- start-up ----------------------------------------------------------------------------------


@hookspec
def lifespan(gateway: Gateway) -> AbstractAsyncContextManager[None]:  # type: ignore[empty-body]
    """Hold what the plugin needs while it serves: connections, tasks, files.

    Entered at start-up before the socket opens, and on reload; left after the last call of this configuration settled.
    Opening may take 60 s, or the plugin's `open_seconds`, and closing 30 s; then it is cancelled.
    Return an async context manager. `gateway` gives http, metrics, stores, models, providers, clock, worker, audit and
    events; `gateway.reach(network)` gives http or, for a setting of type Network, connections that close with it.
    Raise StartupError for a fault the operator must mend; a backend that is down must not fail it: show it in `health`.
    """


@hookspec
def endpoints() -> Iterable[Endpoint]:  # type: ignore[empty-body]
    """Serve paths of the plugin's own.

    Asked once at start-up.
    Return Endpoint objects; the core's own paths cannot be taken.
    Raising stops the start-up.
    """


@hookspec
def commands() -> Iterable[Command]:  # type: ignore[empty-body]
    """Add commands to `qlens`.

    Asked when the command line is read; only this instance's lifespan is open while a command runs.
    Return Command objects; where two plugins have one name, `--plugin NAME` says whose is meant.
    Raising stops the command.
    """


@hookspec
def audit_log(gateway: Gateway) -> AbstractAsyncContextManager[None]:  # type: ignore[empty-body]
    """Keep what is done at the command line, where no lifespan of this plugin is open.

    Entered each time a command of any plugin notes what it is about to do, and left when that is noted.
    Return an async context manager that holds `gateway.audit.into(sink)` open, as the lifespan does while calls are
    served.
    Raising stops the command before it does anything.
    """


@hookspec
def banner() -> Iterable[str]:  # type: ignore[empty-body]
    """Say something to the operator at start-up.

    Asked once, after the lifespans opened and before the socket does.
    Return lines of text.
    Raising stops the start-up.
    """


@hookspec
def health() -> Health:  # type: ignore[empty-body]
    """Tell how the plugin is.

    Asked for /readyz and /admin/health; must not wait for anything.
    Return a Health; it is shown and never changes the status of /readyz.
    Raising is shown as unhealthy.
    """


@hookspec
def adopt(old: object) -> None:
    """Take over the state of the instance this one replaces.

    Runs on reload, when an instance of the same stage, name and class has a changed config.
    Share the old one's state objects, never copy them: calls under the old configuration still settle into them.
    Raising refuses the reload.
    """


# --- a call's way ------------------------------------------------------------------------------


@hookspec(firstresult=True)
async def authenticate(call: Call) -> Caller | None:
    """Say who makes the call.

    Runs first, when only the head of the request was read; `call.credential` holds the bearer token or api-key.
    Return None when the credential is not of this plugin's kind: the next plugin looks; nobody answers: 401.
    Raise Unauthenticated when it is of this plugin's kind and wrong; anything else that is raised gives 503.
    """


@hookspec
async def admit(call: Call) -> object | None:
    """Decide whether the call may run, and reserve what it may use.

    Runs after the body was read, validated and bounded; all plugins are asked one after another. Every worker has its
    own instance: one of `rate_limit` or `cost` says with `shares = "store"` that its limits hold for all of them
    together.
    Return a hold, which this plugin's own `settle` gets back, or None; add Limit entries to `call.limits`.
    Raise RateLimited, QuotaExceeded or Forbidden to refuse; whoever raises, or is cancelled, has undone itself.
    """


@hookspec
async def wrap_call(call: Call, proceed: Callable[[], Awaitable[Reply]]) -> Reply:  # type: ignore[empty-body]
    """Stand around everything below, cached answers included: guards, coalescing, idempotency.

    Runs after admission; the plugin listed first is outermost. It ends before a stream does.
    Return the reply of `await proceed()`, changed by `rewrite_text` or `replace`, or one of your own.
    Raise Blocked to refuse; an exception that is no CallError gives 500.
    """


@hookspec(firstresult=True)
async def lookup(call: Call) -> Reply | None:
    """Answer a call without asking a provider.

    Runs after admission, before a target is chosen; set `call.keep` to be handed a stream's answer later.
    Not asked where a call changes something at the provider: with a `conversation`, or with `store: true`.
    Return None to let the next cache look; a Reply ends the search. The core converts between body and stream.
    Raise nothing for a broken cache: it counts as a miss.
    """


@hookspec(firstresult=True)
async def choose(call: Call, model: Model) -> Iterable[Target] | None:
    """Put a model's targets in the order they are to be asked.

    Runs once for the call's model and once for each fallback when it is reached.
    Return targets, best first, or None to let the next plugin decide; without an answer the order is YAML's.
    Raise Unavailable when none may be asked; an exception that is no CallError gives 500.
    """


@hookspec(firstresult=True)
def retry(call: Call, attempt: Attempt) -> float | None:
    """Say whether the call may make another attempt.

    Asked after every failed attempt that another one might mend.
    Return the seconds before this target may be asked again (an untried one is asked at once); `math.inf`: not this
    one again, though untried ones may; None: no more attempts at all.
    Raising counts as None.
    """


@hookspec
async def wrap_send(call: Call, target: Target, proceed: Callable[[Target], Awaitable[Reply]]) -> Reply:  # type: ignore[empty-body]
    """Stand around one send: circuit breaker, deadline, timing, hedge.

    Runs for every attempt; the plugin listed first is outermost. To hedge, call `proceed` more than once.
    Return the reply of `await proceed(target)`; of several, the one that the client is to get.
    Raise a CallError before `proceed` to refuse: that is no attempt, and the next target is asked.
    """


@hookspec
async def send(call: Call, target: Target, outgoing: Outgoing) -> Reply:  # type: ignore[empty-body]
    """Ask a target; only the provider that the target names is asked.

    Runs inside `wrap_send`; `outgoing` is a fresh copy in a dialect this provider speaks and may be edited.
    Return a Reply, for a stream only once its first good event is in hand.
    Raise an UpstreamError, or UpstreamRejected for the client's mistake; anything else gives 502 and the next target.
    """


@hookspec
async def connect(call: Call, target: Target) -> Session:  # type: ignore[empty-body]
    """Open a duplex session with a target; only the provider that the target names is asked.

    Runs inside `wrap_send` for `/v1/realtime`; `gateway.http.connect` opens a WebSocket. `wrap_call`, `lookup` and
    `store` do not run for sessions. The core passes frames both ways and meters OpenAI's `response.done` events.
    Return a Session that is open: nothing was sent to the client yet, so that another target may still be asked.
    Raise as `send` does.
    """


@hookspec
async def store(call: Call, reply: Reply) -> None:
    """Keep an answer.

    Runs for complete answers of a provider only, before the body or the stream's end is written; `reply` has a body.
    Not handed what is no answer to the next who asks: responses that are stored or in the background, a finish `error`.
    Return nothing. After 50 ms the answer goes on without waiting.
    Raise nothing for a broken cache: it is counted and forgotten.
    """


@hookspec(firstresult=True)
def price(call: Call, target: Target, usage: Usage) -> Cost | None:
    """Say what a usage costs at a target.

    Asked for the bound before admission and for the exact cost of each attempt; must be pure.
    Return None when the price is not known here: nobody knows means unpriced, never 0.
    Raising counts as unpriced.
    """


@hookspec
async def settle(call: Call, receipt: Receipt, hold: object | None) -> None:
    """Account for a finished call.

    Runs exactly once for every authenticated call, whatever its exit; `hold` is what this plugin's `admit` returned.
    Return nothing; give back what was held and was not used.
    Raising is counted; the other plugins still settle.
    """


@hookspec
def explain(call: Call) -> Iterable[str]:  # type: ignore[empty-body]
    """Say what this plugin would do with a call, for `qlens explain`.

    Asked for a call that is open but does not run; no lifespan is open then.
    Return lines of text.
    Do no I/O.
    """
