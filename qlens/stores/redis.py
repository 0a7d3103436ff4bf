"""Redis as plugins share it: one client for each address, Lua scripts within a time limit, and a breaker.

A plugin names the address in its settings and opens the store in its lifespan; who names the same address gets the
same client, over reloads too:

    TAKE = Script("take", "return redis.call('INCRBY', KEYS[1], ARGV[1])")

    @frozen
    class QuotaConfig:
        store: RedisSettings

    async with redis_store(gateway, self.config.store) as store:  # in lifespan; a dead Redis does not fail it
        ...
        left = await store.run(TAKE, [store.key("quota", slot=tenant)], [1])  # in a hook; raises StoreUnavailable
        ...
        return store.health()  # in health

Scripts that are asked for at the same time travel together, so a script costs a fraction of a round trip and no queue
forms behind connections. After two failures in a row the breaker opens: `run` then raises at once, without asking,
until the store has answered a probe as fast as it must. A run that raised, or was cancelled, may have happened all the
same: a script that is repeated must be idempotent.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
from collections import deque
from collections.abc import AsyncIterator, Coroutine, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote, urlsplit

from attrs import define, field, fields, frozen
from attrs.validators import ge, min_len, optional

from qlens.config import Secret, Url
from qlens.errors import Fault, StartupError
from qlens.registry import Health

if TYPE_CHECKING:
    from qlens.gateway import Gateway

log = logging.getLogger("qlens")

Argument = str | int
_FAILURES = 2
"""How many failures in a row open the breaker."""
_PROBE_SECONDS = 0.25
"""How long to wait between two probes of a store that failed."""
_DIAL_SECONDS = 0.5
"""How long a probe may take to connect, TLS and log-in included; a call never waits as long."""
_SLICES = 5
"""In how many slices the time of an answer runs."""
_MOST_TOGETHER = 64
"""How many scripts travel together at most."""
_LIST_SECONDS = 10
"""How long a look at all keys may take."""
_LIST_TOGETHER = 1000
_LOG_SECONDS = 60
"""How often a store that stays away is logged."""
_SCHEMES = ("redis", "rediss", "unix")


def _is_redis(_settings: object, _attribute: object, urls: Any) -> None:
    for url in urls if isinstance(urls, tuple) else (urls,) if urls is not None else ():
        if urlsplit(url).scheme not in _SCHEMES:
            raise ValueError(f"{url!r} is no address of a Redis: it begins with redis://, rediss:// (TLS) or unix://")


@frozen
class SentinelSettings:
    """Sentinels that know which Redis is the master."""

    master: str
    """The master's name."""
    urls: tuple[Url, ...] = field(validator=[min_len(1), _is_redis])
    """The Sentinels: `redis://host:26379`. With `rediss://` they and the master are asked over TLS."""
    username: str | None = None
    """The user at the master."""
    password: Secret | None = None
    """The password at the master; a Sentinel's own stands in its URL."""
    database: int = field(default=0, validator=ge(0))
    """The database at the master."""


@frozen
class RedisSettings:
    """Where a Redis is; exactly one of `url`, `sentinel` and `cluster`. Plugins' own settings may extend it."""

    url: Url | None = field(default=None, validator=_is_redis)
    """One Redis: `redis://user:password@host:6379/0`, `rediss://` for TLS, `unix:///path`."""
    sentinel: SentinelSettings | None = None
    """A Redis with Sentinels, which is followed over failovers."""
    cluster: tuple[Url, ...] | None = field(default=None, validator=[optional(min_len(1)), _is_redis])
    """A Redis Cluster: some of its nodes; user, password and TLS of the first hold for all."""
    timeout_ms: int = field(default=50, validator=ge(1))
    """How long a call waits for an answer at most; longer counts as a failure."""
    prefix: str = field(default="qlens", validator=min_len(1))
    """How all keys begin: gateways that are to count apart on one Redis need different ones."""

    def __attrs_post_init__(self) -> None:
        if sum(place is not None for place in (self.url, self.sentinel, self.cluster)) != 1:
            raise ValueError("give exactly one of url, sentinel and cluster")

    @property
    def address(self) -> str:
        """The place in words, without any password: for logs and metrics."""
        if self.sentinel is not None:
            return f"{self.sentinel.master} by {','.join(map(_bare, self.sentinel.urls))}"
        return ",".join(map(_bare, self.cluster or (self.url or Url(""),)))

    def key(self, *parts: str, slot: str) -> str:
        """A key that names its parts beyond doubt; keys of one script share one slot, or it runs on no cluster."""
        # Quoted: a brace or colon in a tenant's name must not end the tag, nor make one key of two.
        tail = ":".join(quote(part, safe=" ,=*#", errors="surrogatepass") for part in parts)
        return f"{self.prefix}:{{{quote(slot, safe=' =', errors='surrogatepass')}}}:{tail}"

    def parts(self, key: str) -> tuple[str, list[str]]:
        """The slot and the parts that a key was made of."""
        slot, _, tail = key.removeprefix(f"{self.prefix}:{{").partition("}:")
        said = [unquote(part, errors="surrogatepass") for part in (slot, *tail.split(":"))]
        return said[0], said[1:]


def _bare(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


class StoreUnavailable(Exception):
    """The store did not answer in time, or is known not to; what was asked may have happened all the same."""


@frozen
class Script:
    """A Lua script. Its keys must share one hash tag, so that it runs on a cluster."""

    name: str
    """Stands in the script's first line, with its version: so MONITOR and the slow log tell whose it is."""
    text: str = field(repr=False)
    version: int = 1
    sha: str = field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        object.__setattr__(self, "text", f"-- qlens {self.name} v{self.version}\n{self.text}")
        object.__setattr__(self, "sha", hashlib.sha1(self.text.encode()).hexdigest())  # noqa: S324 - Redis' own name for it

    def command(self, *, whole: bool, keys: Sequence[str], args: Iterable[Argument]) -> tuple[Argument, ...]:
        """What is sent: the script's hash, or all of it where the server does not know it."""
        head = ("EVAL", self.text) if whole else ("EVALSHA", self.sha)
        return (*head, len(keys), *keys, *args)


@define(eq=False)
class _Asked:
    script: Script
    keys: Sequence[str]
    args: Sequence[Argument]
    answer: asyncio.Future[Any]


@define(eq=False)
class RedisStore:
    """A Redis that is asked by scripts; made by `redis_store`."""

    settings: RedisSettings
    users: int = 0
    _gateway: Gateway = field(kw_only=True, repr=False)
    _client: Any = field(init=False, default=None, repr=False)
    _moved: Any = field(init=False, default=(), repr=False)
    """Those after which a cluster's nodes are to be found anew."""
    _sentinels: Sequence[Any] = field(init=False, default=(), repr=False)
    _waiting: deque[_Asked] = field(factory=deque, init=False, repr=False)
    _tasks: set[asyncio.Task[None]] = field(factory=set, init=False, repr=False)
    _working: bool = field(default=False, init=False)
    _watching: bool = field(default=False, init=False)
    _failures: int = field(default=0, init=False)
    _trouble: str = field(default="", init=False)
    _logged: float | None = field(default=None, init=False)
    calls: int = field(default=0, init=False)
    """How many scripts were sent."""

    @property
    def ok(self) -> bool:
        """Whether the store is asked; False while the breaker is open."""
        return self._failures < _FAILURES

    def health(self) -> Health:
        """How the store is, for a plugin's own `health`."""
        return Health(self.ok, self.settings.address if self.ok else f"{self.settings.address}: {self._trouble}")

    def key(self, *parts: str, slot: str) -> str:
        """A key that names its parts beyond doubt; see RedisSettings.key."""
        return self.settings.key(*parts, slot=slot)

    async def run(self, script: Script, keys: Sequence[str], args: Sequence[Argument]) -> Any:
        """Run a script and return its answer: integers, bytes, lists; raises StoreUnavailable."""
        if not self.ok:
            raise StoreUnavailable(self._trouble)
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Asked(script, keys, args, answer))
        if not self._working:
            self._working = True
            self._start(self._work())
        return await answer

    async def names(self, first: str) -> list[str]:
        """The keys whose first part this is, of all slots; raises StoreUnavailable.

        The server looks at every key it has, a few at a time: for operators' questions, not for calls.
        """
        if not self.ok:
            raise StoreUnavailable(self._trouble)
        begin = _literal(f"{self.settings.prefix}:{{")
        pattern = f"{begin}*}}:{_literal(self.key(first, slot='').rpartition(':')[2])}:*"
        try:
            async with asyncio.timeout(_LIST_SECONDS):
                # A key may be told twice while the server makes its table larger.
                names = {name async for name in self._client.scan_iter(match=pattern, count=_LIST_TOGETHER)}
                return [name.decode() for name in names]
        except TimeoutError:
            raise StoreUnavailable(f"its keys could not be listed within {_LIST_SECONDS} s") from None
        except Exception as error:
            raise StoreUnavailable(f"{type(error).__name__}: {error}") from error

    def _start(self, work: Any) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # --- asking --------------------------------------------------------------------------------

    async def _work(self) -> None:
        """Send what waits, until nothing does."""
        together: list[_Asked] = []
        try:
            while self._waiting:
                together = [self._waiting.popleft() for _ in range(min(len(self._waiting), _MOST_TOGETHER))]
                if self.ok:
                    await self._send(together)
                self._give_up(together)  # whoever has no answer by now
        finally:
            self._working = False
            self._give_up(together)

    async def _send(self, together: Sequence[_Asked]) -> None:
        self.calls += len(together)
        try:
            if self.settings.cluster is not None:
                await self._send_apart(together)
            else:
                await self._in_time(self._send_together(together))
        # Not the client library's errors alone: since Python 3.12 asyncio has an AttributeError for a dead connection.
        except Exception as error:  # noqa: BLE001
            self._failed(error)

    async def _in_time(self, work: Coroutine[Any, Any, None]) -> None:
        """Await an exchange; TimeoutError when it takes too long: its connection is closed, late answer and all."""
        task = asyncio.get_running_loop().create_task(work)
        try:
            if await self._late({task}):
                raise TimeoutError
            task.result()
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait({task})

    async def _late(self, tasks: Iterable[asyncio.Task[None]]) -> set[asyncio.Task[None]]:
        """Wait until all are done, and return those that take too long.

        The time runs in slices, each of which gives the loop a turn to read what has arrived: when this process itself
        is held up, that is not taken for a slow store.
        """
        left = set(tasks)
        for _ in range(_SLICES):
            _, left = await asyncio.wait(left, timeout=self.settings.timeout_ms / 1000 / _SLICES)
            if not left:
                break
        return left

    async def _send_together(self, together: Sequence[_Asked]) -> None:
        unknown = []
        for asked, answer in zip(together, await self._pipeline(together, whole=False), strict=True):
            if _is_unknown(answer):
                unknown.append(asked)
            else:
                self._answered(asked, answer)
        if unknown:  # the server was started anew, or its scripts were flushed
            for asked, answer in zip(unknown, await self._pipeline(unknown, whole=True), strict=True):
                self._answered(asked, answer)

    async def _pipeline(self, together: Sequence[_Asked], *, whole: bool) -> Sequence[Any]:
        pipeline = self._client.pipeline(transaction=False)
        for asked in together:
            pipeline.execute_command(*asked.script.command(whole=whole, keys=asked.keys, args=asked.args))
        answers: Sequence[Any] = await pipeline.execute(raise_on_error=False)
        if self.settings.cluster is not None and any(isinstance(answer, self._moved) for answer in answers):
            await self._client.aclose()  # it looks anew then who has which slots
        return answers

    async def _send_apart(self, together: Sequence[_Asked]) -> None:
        """On a cluster each node is asked by itself: one that is down holds up nobody else.

        What is late is not cancelled, or the client would never learn that a node is down and look for its successor;
        its answer is then for nobody.
        """
        tasks = [self._start(self._ask_node(asked)) for asked in self._by_node(together)]
        if await self._late(tasks):
            raise TimeoutError

    def _by_node(self, together: Iterable[_Asked]) -> Iterable[Sequence[_Asked]]:
        nodes: dict[str, list[_Asked]] = {}
        for asked in together:
            try:
                name = self._client.get_node_from_key(asked.keys[0]).name
            except Exception:  # noqa: BLE001 - not known yet, or no more
                name = ""
            nodes.setdefault(name, []).append(asked)
        return nodes.values()

    async def _ask_node(self, together: Sequence[_Asked]) -> None:
        try:
            await self._send_together(together)
        except Exception as error:  # noqa: BLE001 - see _send
            self._failed(error)
            self._give_up(together)

    def _give_up(self, together: Iterable[_Asked]) -> None:
        for asked in together:
            _fail(asked, self._trouble or "the store is closed")

    def _answered(self, asked: _Asked, answer: Any) -> None:
        if isinstance(answer, Exception):
            self._failed(answer)
            _fail(asked, self._trouble)
            return
        if not asked.answer.done():  # else it came too late, or whoever asked is gone
            asked.answer.set_result(answer)
            self._failures = 0 if self.ok else self._failures  # an open breaker is the probe's to close

    # --- the breaker ---------------------------------------------------------------------------

    def _failed(self, error: BaseException) -> None:
        within = f"within {self.settings.timeout_ms} ms"
        self._trouble = f"no answer {within}" if isinstance(error, TimeoutError) else f"{type(error).__name__}: {error}"
        self._failures += 1
        if self._failures == _FAILURES:
            self._gauge.set(0)
        now = self._gateway.clock.monotonic()
        if not self.ok and (self._logged is None or now - self._logged >= _LOG_SECONDS):
            self._logged = now
            log.error(
                "the store %s does not answer (%s): plugins go on without it", self.settings.address, self._trouble
            )
        if not self._watching:
            self._watching = True
            self._start(self._watch())

    async def _watch(self) -> None:
        """Probe a store that failed until it answers as fast as it must."""
        try:
            while not await self._probe():  # noqa: ASYNC110 - nobody tells when a store is back
                await asyncio.sleep(_PROBE_SECONDS)
            if not self.ok:
                log.warning("the store %s answers again", self.settings.address)
            self._failures, self._logged = 0, None
            self._gauge.set(1)
        finally:
            self._watching = False

    async def _probe(self) -> bool:
        """Whether the store answers: there may be a connection to make first, which takes longer."""
        try:
            async with asyncio.timeout(_DIAL_SECONDS):
                await self._ping()
            await self._in_time(self._ping())
        except Exception as error:  # noqa: BLE001 - see _send; or else nobody would ever ask again
            self._failed(error)
            return False
        return True

    async def _ping(self) -> None:
        if self.settings.cluster is not None:
            await self._client.ping(target_nodes=self._client.RANDOM)
        else:
            await self._client.ping()

    @property
    def _gauge(self) -> Any:
        return self._gateway.metrics.gauge(
            "qlens_store_up", "1 while a store that plugins share answers in time.", ("store",)
        ).labels(self.settings.address)

    # --- its life ------------------------------------------------------------------------------

    async def open(self) -> None:
        """Connect; a store that does not answer is watched until it does. Raises StartupError without the extra."""
        try:
            from redis.exceptions import ClusterDownError, ConnectionError, TimeoutError  # noqa: A004
        except ImportError as error:
            message = "a store of kind redis needs the extra: pip install 'qlens[redis]'"
            raise StartupError([Fault("", message)]) from error
        self._moved = (ClusterDownError, ConnectionError, TimeoutError)
        self._client, self._sentinels = _client(self.settings)
        self._gauge.set(1)
        if self.settings.cluster is not None:
            with suppress(Exception):
                await self._client.ping(target_nodes=self._client.PRIMARIES)  # so that no call has to connect
        while self.ok and not await self._probe():
            pass  # twice at most: calls need not find out that it is not there

    async def close(self) -> None:
        """Let go of every connection."""
        self._give_up(self._waiting)
        self._waiting.clear()
        while tasks := list(self._tasks):
            for task in tasks:
                task.cancel()
            # More than once: redis-py loses a cancellation that comes while it gives up a connection.
            await asyncio.wait(tasks, timeout=_PROBE_SECONDS)
        for client in (self._client, *self._sentinels):
            await client.aclose()


def _literal(text: str) -> str:
    """A text as a pattern of the server's that fits it alone."""
    return re.sub(r"([][*?^\\-])", r"\\\1", text)


def _fail(asked: _Asked, why: str) -> None:
    if not asked.answer.done():
        asked.answer.set_exception(StoreUnavailable(why))


def _is_unknown(answer: object) -> bool:
    """Whether a server says that it does not know a script."""
    from redis.exceptions import NoScriptError

    return isinstance(answer, NoScriptError)


def _client(settings: RedisSettings) -> tuple[Any, Sequence[Any]]:
    """The client of redis-py, and those of its Sentinels; nothing is tried again, as a script must not run twice."""
    from redis.asyncio import Redis
    from redis.asyncio.cluster import ClusterNode, RedisCluster
    from redis.asyncio.connection import SSLConnection, parse_url
    from redis.asyncio.retry import Retry
    from redis.asyncio.sentinel import Sentinel
    from redis.backoff import NoBackoff

    once: dict[str, Any] = {"retry": Retry(NoBackoff(), 0), "protocol": 2}
    if settings.url is not None:
        return Redis.from_url(settings.url, **once), ()
    if settings.sentinel is not None:
        nodes: list[dict[str, Any]] = [{**parse_url(url)} for url in settings.sentinel.urls]
        secure = any(issubclass(node.pop("connection_class", object), SSLConnection) for node in nodes)
        own = {name: value for node in nodes for name, value in node.items() if name not in {"host", "port"}}
        sentinel = Sentinel(  # type: ignore[no-untyped-call]
            [(node.get("host", "localhost"), node.get("port", 26379)) for node in nodes],
            sentinel_kwargs={**own, **once, "ssl": secure, "socket_timeout": _DIAL_SECONDS / 2},
        )
        password = settings.sentinel.password
        client = sentinel.master_for(
            settings.sentinel.master,
            username=settings.sentinel.username,
            password=password.reveal() if password else None,
            db=settings.sentinel.database,
            ssl=secure,
            **once,
        )
        return client, sentinel.sentinels
    assert settings.cluster is not None
    seeds: list[dict[str, Any]] = [{**parse_url(url)} for url in settings.cluster]
    first = seeds[0]
    cluster = RedisCluster(
        startup_nodes=[ClusterNode(seed.get("host", "localhost"), seed.get("port", 6379)) for seed in seeds],
        username=first.get("username"),
        password=first.get("password"),
        ssl=issubclass(first.get("connection_class", object), SSLConnection),
        socket_timeout=max(settings.timeout_ms / 1000, _DIAL_SECONDS),
        require_full_coverage=False,
        retry=Retry(NoBackoff(), 1),
        protocol=2,
    )
    return cluster, ()


@asynccontextmanager
async def redis_store(gateway: Gateway, settings: RedisSettings) -> AsyncIterator[RedisStore]:
    """The store at an address, open; whoever leaves last closes it. Raises StartupError without the extra `redis`."""
    # What a plugin adds to the settings is its own.
    wanted = RedisSettings(**{each.name: getattr(settings, each.name) for each in fields(RedisSettings)})
    stores = gateway.stores
    name = next(
        (name for name, store in stores.items() if isinstance(store, RedisStore) and store.settings == wanted), ""
    )
    if not name:
        name = f"redis {len(stores)} {settings.address}"
        store = stores[name] = RedisStore(wanted, gateway=gateway)
        try:
            await store.open()
        except BaseException:
            del stores[name]
            raise
    store = stores[name]
    store.users += 1
    try:
        yield store
    finally:
        store.users -= 1
        if not store.users:
            del stores[name]
            await store.close()
