"""What travels: the call, who makes it, where it may go, what comes back, what it cost."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, Protocol

import orjson
from attrs import Factory, asdict, define, evolve, field, frozen

from qlens import dialects, sse
from qlens.dialects.rewrite import rewrite_body, rewrite_plain, rewrite_stream
from qlens.errors import Blocked
from qlens.money import usd
from qlens.patterns import fits
from qlens.usage import NO_USAGE, Usage

if TYPE_CHECKING:
    from qlens.forms import File, Form
    from qlens.object_ids import Kept
    from qlens.operations import Operation
    from qlens.upstream_connection import Upload

Body = dict[str, Any]
"""A parsed JSON object in the client's (call.body) or the provider's (outgoing.body) dialect."""

Outcome = Literal["complete", "cached", "failed", "abandoned", "rejected", "blocked", "cut"]
CacheState = Literal["hit", "miss", "semantic", "off"]


@frozen
class Allowance:
    """What one credential may use, beside the limits and budgets of the configuration; None: not said."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrency: int | None = None
    budget_picos: int | None = None
    """Picodollars in a window."""
    budget_window: Literal["day", "week", "month", "total"] = "month"
    tenant_budget_picos: int | None = None
    """The same for all credentials of the tenant together."""
    tenant_budget_window: Literal["day", "week", "month", "total"] = "month"

    def row(self) -> dict[str, Any]:
        """What is said of it, as JSON has it: money as a decimal text."""
        said = {name: value for name, value in asdict(self).items() if value is not None}
        for budget in ("budget", "tenant_budget"):
            picos, window = said.pop(f"{budget}_picos", None), said.pop(f"{budget}_window")
            if picos is not None:
                said |= {f"{budget}_usd": usd(picos), f"{budget}_window": window}
        return said


@frozen
class Caller:
    """Who makes a call. Every caller has a tenant; what is None was not said by the credential."""

    tenant: str
    subject: str
    by: str
    """The auth plugin instance that vouches for this caller."""
    project: str | None = None
    key_id: str | None = None
    roles: frozenset[str] = frozenset({"member"})
    models: tuple[str, ...] | None = None
    """Model names or `prefix*` patterns this caller may use; None allows all."""
    tags: Mapping[str, str] = field(factory=dict, hash=False)
    expires_at: float | None = None
    """Unix seconds."""
    allowance: Allowance | None = None
    """Limits and a budget of this credential's own, which token_bucket and budgets keep by `key_id`."""

    def may_use(self, model: str) -> bool:
        """Tell whether this caller may ask for a model by this public name."""
        return fits(model, self.models)


@frozen
class Target:
    """A provider and the name it gives the model."""

    provider: str
    model: str
    public: str
    """The model entry this target stands under."""
    weight: int = 1
    base_model: str | None = None
    """What the model really is, where the provider's name hides it (an Azure deployment, say)."""
    region: str | None = None
    params: Mapping[str, Any] = field(factory=dict, hash=False)
    """Body fields the operator sets for this target; they win over the client's."""
    kind: str | None = field(default=None, eq=False, repr=False)
    """Whose models these are: the provider's plugin, or what it says itself in `kind`; None: nobody can tell."""

    @property
    def key(self) -> tuple[str, str]:
        """What identifies the target to breakers and health: provider and model."""
        return self.provider, self.model


@frozen
class Model:
    """A public name with the targets behind it. For a wildcard, `name` is the pattern."""

    name: str
    candidates: tuple[Target, ...]
    fallbacks: Mapping[str, tuple[str, ...]] = field(factory=dict, hash=False)
    """Public names by kind: any, context_length, content_filter, rate_limit."""
    max_output_tokens: int | None = None
    max_n: int = 128
    names: tuple[str, ...] = field()
    """All public names that lead to the same targets as this one, in the order of the configuration."""

    @names.default
    def _its_own(self) -> tuple[str, ...]:
        return (self.name,)

    @property
    def counts_as(self) -> str:
        """The one name under which limits and budgets count it: the first in the configuration."""
        return self.names[0]

    def fits(self, patterns: tuple[str, ...] | None) -> bool:
        """Whether one of its names is meant: what is said of one holds for all, or the others were ways around it."""
        return patterns is None or any(fits(name, patterns) for name in self.names)


@frozen(slots=False)  # like Usage
class Cost:
    """Money in picodollars (1e-12 USD), exact; `picos` is None when the price is unknown, never 0."""

    picos: int | None
    state: Literal["exact", "estimated", "unpriced"] = "exact"
    price_id: str | None = None
    lines: tuple[tuple[str, int, int], ...] = ()
    """How the sum came about: (meter, quantity, picodollars for one)."""


UNPRICED = Cost(None, "unpriced")
FREE = Cost(0)


@frozen(slots=False)  # like Usage
class Limit:
    """Where the caller stands with one limit; the core writes the tightest of each kind as x-ratelimit headers."""

    kind: Literal["requests", "tokens", "concurrency"]
    name: str
    limit: int
    remaining: int
    reset_seconds: float


class Standing(Protocol):
    """Where the caller stands with one limit: a Limit, or what a plugin keeps up to date for longer than one call."""

    @property
    def kind(self) -> Literal["requests", "tokens", "concurrency"]: ...
    @property
    def name(self) -> str: ...
    @property
    def limit(self) -> int: ...
    @property
    def remaining(self) -> int: ...
    @property
    def reset_seconds(self) -> float: ...


@define
class Attempt:
    """One send to one target. Times are monotonic seconds; `ended` is None while it runs.

    The core fills it in while the attempt runs; everybody else reads it.
    """

    n: int
    target: Target
    started: float
    kind: Literal["send", "hedge", "shadow"] = "send"
    """A `hedge` began while another attempt of the call was not answered yet."""
    first_byte: float | None = None
    ended: float | None = None
    status: int | None = None
    error: str | None = None
    retry_after: float | None = None
    """Seconds after which the provider says it may be asked again."""
    usage: Usage | None = None
    cost: Cost = UNPRICED
    billed: bool = False
    upstream_id: str | None = None


@frozen(slots=False)  # like Usage
class Receipt:
    """What a finished call cost and how it ended. Made exactly once for every call that has an account."""

    id: str
    caller: Caller
    operation: str
    model: str | None
    target: Target | None
    outcome: Outcome
    status: int
    error: str | None
    usage: Usage
    cost: Cost
    saved_picos: int
    cache: CacheState
    streamed: bool
    attempts: tuple[Attempt, ...]
    tags: Mapping[str, str]
    wall_ns: int
    ttft_us: int | None
    total_us: int
    overhead_us: int
    bytes_out: int
    config_version: str


@frozen
class Request:
    """What is asked of a provider as it is, where no dialect says it: about an object it keeps, or what passes through.

    Clients' credentials are never in it.
    """

    method: str
    path: str
    """Below the provider's address, escaped: `/files/file-1`."""
    query: tuple[tuple[str, str], ...] = ()
    headers: Mapping[str, str] = field(factory=dict, hash=False)
    """Those of the client's that the provider may see: what the body is, and what is wanted."""
    body: bytes | Upload | None = field(default=None, repr=False)


@define(eq=False)
class Outgoing:
    """What is sent to one target: a fresh copy for each attempt, which the provider may edit."""

    operation: Operation
    dialect: str
    _given: Body = field(alias="body", repr=False)
    stream: bool
    request: Request | None = None
    """For operations without a dialect: there is no body then but the one in here."""
    form: Form | None = None
    """The files that go with the body, which is then sent as a form."""
    _own: Body | None = field(default=None, init=False, repr=False)

    @property
    def body(self) -> Body:
        """The body, the provider's own to edit at any depth: what is nested is copied when it is first asked for."""
        if self._own is None:
            self._own = orjson.loads(orjson.dumps(self._given))
        return self._own

    @body.setter
    def body(self, body: Body) -> None:
        self._own = body

    @property
    def files(self) -> tuple[File, ...]:
        """The files to send; each attempt reads them from their beginning."""
        return () if self.form is None else self.form.files

    def fields(self) -> Body:
        """The body's fields in a new dict. What is nested in them may be the call's own: it is only to be read."""
        return dict(self._given if self._own is None else self._own)


class _FileName(tuple[str | int, ...]):
    """A Ref to what an uploaded file is called, by its number."""

    __slots__ = ()


@define(eq=False)
class Call:
    """One request of a client for one operation, on its way through the pipeline.

    The fields of the head are there from the start; `caller` from authentication on; `body` to
    `bound_cost` once the call is open; the rest is filled on the way.
    """

    id: str
    operation: Operation
    path: str
    path_params: Mapping[str, str]
    query: Mapping[str, str]
    headers: Mapping[str, str]
    """Case-insensitive."""
    peer: str | None
    credential: str | None = field(repr=False)
    """The bearer token or api-key header, without its scheme."""
    started: float
    """Monotonic seconds."""
    wall_ns: int
    deadline: float
    """Monotonic seconds; whatever runs then is cancelled."""
    reader: Callable[[], Awaitable[bytes]] = field(repr=False)
    arriving: Callable[[], AsyncGenerator[bytes]] | None = field(default=None, repr=False)
    """Reads the request body as it arrives, instead of whole."""

    caller: Caller | None = None
    scope: str | None = None
    """At an endpoint that asks for a role: the tenant that the caller is confined to; None: it rules all."""
    body: Body = field(factory=dict, repr=False)
    form: Form | None = None
    """What was uploaded with the body, for operations that take a form; it is kept until the call ends."""
    model: Model | None = None
    asked_model: str | None = None
    """The name the client asked for: the model's name, or what a wildcard matched."""
    stream: bool = False
    wants_usage: bool = False
    """Whether a streaming client asked for the usage event."""
    bound: Usage = NO_USAGE
    """The most this call can use: input is the UTF-8 bytes of all texts, output the clamped max tokens times n."""
    estimated_input: int = 0
    """Input tokens by estimate (bytes / 3), for soft limits and for answers without usage."""
    extended: bool = False
    """Whether the body may have fields in its messages that only providers of Claude know."""
    bounded: bool = True
    """False when neither the client nor the model says how much may be generated: `bound.output` is then 0."""
    pricing: Callable[[Call], Cost] | None = field(default=None, repr=False)
    """What works out `bound_cost`."""
    _bound_cost: Cost | None = field(default=None, init=False, repr=False)

    limits: list[Standing] = Factory(list)
    targets: tuple[Target, ...] = ()
    attempts: list[Attempt] = Factory(list)
    attempts_left: int | None = None
    """How many more sends the call may make, over all its targets and fallbacks; None: each target once."""
    kept: Kept | None = None
    """The objects that the call names: it may go nowhere but to the provider that keeps them."""
    cache: CacheState | None = None
    """What a cache says that it had for the call; one that says nothing is spoken for by what its `lookup` returns."""
    keep: int = 0
    """A cache that wants a stream's answer sets this to the most bytes to collect."""
    most_output: int | None = None
    """A budget sets this to the output tokens it has reserved: the provider is told, and a stream that is surely longer
    is cut."""
    tags: dict[str, str] = Factory(dict)
    left: float | None = None
    """When the client closed its connection, in monotonic seconds; None while it is there."""
    config: str = ""
    """The version of the configuration this call sees to its end."""

    @property
    def bound_cost(self) -> Cost:
        """The most this call can cost; worked out when first asked for, because without a budget nobody asks."""
        if self._bound_cost is None:
            self._bound_cost = UNPRICED if self.pricing is None else self.pricing(self)
        return self._bound_cost

    @bound_cost.setter
    def bound_cost(self, cost: Cost) -> None:
        self._bound_cost = cost

    async def read(self) -> bytes:
        """Read the request body whole; raises BodyTooLarge, BodyTimedOut or UnsupportedMedia."""
        return await self.reader()

    def pieces(self) -> AsyncGenerator[bytes]:
        """Read the request body as it arrives, bounded as by `read`; once, and instead of it."""
        assert self.arriving is not None, "the call did not arrive by HTTP"
        return self.arriving()

    @property
    def files(self) -> tuple[File, ...]:
        """The files of a form; two calls with the same body may differ in them."""
        return () if self.form is None else self.form.files

    @property
    def known(self) -> Caller:
        """The caller, for hooks that run after authentication."""
        assert self.caller is not None, "the call is not authenticated yet"
        return self.caller

    def texts(self) -> list[tuple[dialects.Ref, str]]:
        """List every text of the request that a model will read, each with a reference to put it back.

        Tools and the form of the answer are among them, with names and values that `replace_text` refuses to change; so
        is what uploaded files are called.
        """
        found = dialects.named(self.operation.dialect).request_texts(self.body)
        if self.form is not None:
            found = [*found, *((_FileName((number,)), file.filename) for number, file in enumerate(self.form.files))]
        return found

    def replace_text(self, ref: dialects.Ref, text: str) -> None:
        """Put a text back where `texts()` found it; raises Blocked for what cannot be another text.

        Such are the names of tools and parameters, the values of enums, and thoughts that a model has signed: the call
        would fail, or mean something else.
        """
        if type(ref) is dialects.Fixed:
            place = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in ref[:2]).lstrip(".")
            raise Blocked(
                f"The prompt was blocked: this gateway would have to rewrite a part of '{place}' that must stay as it "
                "is, like a name, a value of an enum or a signed thought."
            )
        if type(ref) is _FileName and self.form is not None:
            self.form.files = tuple(
                evolve(file, filename=text) if (number,) == ref else file for number, file in enumerate(self.files)
            )
        else:
            dialects.put(self.body, ref, text)

    def rewrite_text(self, fn: Callable[[str], str]) -> None:
        """Send every text of `texts()` through `fn` and put it back; raises what `fn` and `replace_text` raise."""
        within: dict[dialects.Ref, dict[int, str]] = {}
        for ref, text in self.texts():
            new = fn(text)
            if new == text:
                continue
            if type(ref) is dialects.Within:  # all that stand in one JSON at once: there may be very many
                within.setdefault(ref[:-1], {})[int(ref[-1])] = new
            else:
                self.replace_text(ref, new)
        for ref, news in within.items():
            dialects.put_within(self.body, ref, news)


@define(eq=False)
class Reply:
    """What comes back: one body, or a stream of chunks in the framing of server-sent events, unless it is `raw`.

    `close` releases what stands behind the reply (an upstream connection). It is kept here, beside the chunks,
    because closing a generator that never started runs none of its `finally`.
    """

    status: int = 200
    headers: Mapping[str, str] = field(factory=dict)
    body: bytes | None = field(default=None, repr=False)
    chunks: AsyncIterator[bytes] | None = field(default=None, repr=False)
    dialect: str = "chat"
    target: Target | None = None
    usage: Usage | None = None
    finish: str | None = None
    complete: bool = False
    cut: bool = False
    """Whether the gateway ended the stream, because it was longer than what a budget had reserved for it."""
    raw: bool = False
    """Whether the answer is neither JSON nor events, but bytes of the content-type in `headers`: speech, subtitles."""
    close: Callable[[], Awaitable[None]] | None = field(default=None, repr=False)
    upstream_id: str | None = None
    _layers: list[AsyncIterator[bytes]] = field(factory=list, init=False, repr=False)

    @property
    def is_open(self) -> bool:
        """Whether something stands behind it that is to be released."""
        return self.chunks is not None or self.close is not None or bool(self._layers)

    async def aclose(self) -> None:
        """Release the upstream; may be called more than once."""
        layers = [*([self.chunks] if self.chunks else ()), *reversed(self._layers)]
        self._layers = []
        close, self.close = self.close, None
        try:
            for layer in layers:
                # The same generator may be closed twice; that does nothing.
                if aclose := getattr(layer, "aclose", None):
                    await aclose()
        finally:
            if close is not None:
                await close()

    def let_go(
        self, stream: AsyncIterator[bytes], source: AsyncIterator[bytes], close: Callable[[], Awaitable[None]]
    ) -> bool:
        """Take note that a source was closed, if this stream of it is all there is; whether it is."""
        if self.chunks is not stream or self._layers != [source] or self.close not in (None, close):
            return False
        self.chunks, self.close, self._layers = None, None, []
        return True

    def copied(self) -> Reply:
        """Give the answer as a Reply of its own, without what is open: that stays with this one."""
        return Reply(
            self.status,
            self.headers,
            self.body,
            dialect=self.dialect,
            target=self.target,
            usage=self.usage,
            finish=self.finish,
            complete=self.complete,
            cut=self.cut,
            raw=self.raw,
            upstream_id=self.upstream_id,
        )

    def moved(self) -> Reply:
        """Give the answer as a Reply of its own, with what is open: this one has it no more, as it is read once."""
        own = self.copied()
        if self.is_open:
            own.chunks, own.close, own._layers = self.chunks, self.close, self._layers
            self.chunks, self.close, self._layers = None, None, []
        return own

    def replace(self, *, chunks: AsyncIterator[bytes]) -> None:
        """Put a stream in front of the present one; both are closed with the reply."""
        if self.chunks is not None:
            self._layers.append(self.chunks)
        self.chunks = chunks

    def events(self) -> AsyncIterator[bytes]:
        """Iterate over the stream's events, each whole, with its blank line."""
        assert self.chunks is not None, "a reply with a body has no events"
        return sse.split(self.chunks)

    def rewrite_text(self, fn: Callable[[str], str], hold_back: int) -> None:
        """Send every text of the answer through `fn`, in a body or a stream alike.

        `hold_back` is the longest match of `fn` in characters: a stream keeps that many back, so that nothing
        slips through between two chunks. `fn` may raise Blocked, which ends the answer.
        """
        if self.raw:
            self.body = self.body if self.body is None else rewrite_plain(self.body, fn)
        elif self.body is not None:
            self.body = rewrite_body(self.dialect, self.body, fn)
        elif self.chunks is not None:
            self.replace(chunks=rewrite_stream(self.dialect, self.events(), fn, hold_back))
