"""Seeded faults, each of which must turn the suite red: `python tests/mutants.py [NAME ...]`.

A copy of the tree gets one fault at a time, and the tests that should notice run against it. A mutant that survives
means that a promise is not tested. A test that noticed a fault must be green without it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path

from attrs import frozen

ROOT = Path(__file__).parents[1]
VOCABULARIES = Path(".tools/vocabularies")
COPIED = ("qlens", "plugins", "config", "tests", "pyproject.toml", "README.md", "CHANGELOG.md")
FAILED = ".pytest_cache/v/cache/lastfailed"
SECONDS = 240


@frozen
class Mutant:
    """One fault: in `path`, `old` becomes `new`; `tests` are expected to notice."""

    name: str
    path: str
    old: str
    new: str
    tests: tuple[str, ...]


@frozen
class Verdict:
    """What became of a mutant: why it survives, or the tests that noticed it."""

    survives: str = ""
    noticed_by: tuple[str, ...] = ()


PIPELINE = ("tests/core/test_pipeline.py", "tests/core/test_account.py", "tests/contract/test_matrix.py")
HOOKS = ("tests/core/test_attacks_hooks.py",)
ACCOUNT = ("tests/core/test_attacks_account.py",)
HTTP = ("tests/core/test_attacks_http.py",)
LIFE = ("tests/core/test_attacks_life.py",)
KEPT = ("tests/core/test_objects.py",)
BEDROCK = ("tests/plugins/provider/bedrock",)
GOLDEN = ("tests/plugins/provider/test_golden.py",)
REALTIME = ("tests/core/test_realtime.py",)
LIMITS = ("tests/plugins/rate_limit",)
BUDGETS = ("tests/plugins/cost/test_budgets.py",)
STORES = ("tests/core/test_stores_redis.py",)
KEY_STORE = ("tests/plugins/auth/test_key_store_postgres.py",)
METERS = ("tests/plugins/cost/test_prices_meters.py",)
BATCHES = ("tests/plugins/cost/test_ledger_batches.py",)
SUMMARY = ("tests/plugins/cost/test_ledger_summary.py",)
VERSIONS = ("tests/core/test_stores_sqlite.py",)
UPKEEP = ("tests/plugins/cost/test_ledger_upkeep.py",)
RECONCILE = ("tests/plugins/cost/test_reconcile_deployments.py",)

MUTANTS = (
    Mutant(
        "operators at a time who lose each other's changes",
        "plugins/qlens_plugins/auth/key_store/postgres.py",
        "; SELECT FROM key_state FOR UPDATE",
        "",
        KEY_STORE,
    ),
    Mutant(
        "a change whose commit was lost is told to have failed",
        "plugins/qlens_plugins/auth/key_store/sql_store.py",
        "        except CommitLost:\n",
        "        except ZeroDivisionError:\n",
        KEY_STORE,
    ),
    Mutant(
        "another database is followed from where the first one was",
        "plugins/qlens_plugins/auth/key_store/sql_store.py",
        "known = since if database is self._followed else None",
        "known = since",
        KEY_STORE,
    ),
    Mutant(
        "a budget that lets everything pass that is asked for at the same time",
        "plugins/qlens_plugins/cost/budgets/memory.py",
        "                free, slack = free - need.likely, slack - need.excess\n",
        "",
        BUDGETS,
    ),
    Mutant(
        "what a dead process had reserved is refunded",
        "plugins/qlens_plugins/cost/budgets/sqlite.py",
        "            (held + excess, held, excess, id_, window),\n",
        "            (0, held, excess, id_, window),\n",
        BUDGETS,
    ),
    Mutant(
        "what is not priced is free under a hard budget",
        "plugins/qlens_plugins/cost/budgets/plugin.py",
        "            raise refusals.unpriced(call)\n",
        "            return None\n",
        BUDGETS,
    ),
    Mutant(
        "a reservation that outlasts its call",
        "plugins/qlens_plugins/cost/budgets/tills.py",
        "        till.held -= need.likely\n        till.excess -= need.excess\n        till.spent += cost\n",
        "        till.excess -= need.excess\n        till.spent += cost\n",
        BUDGETS,
    ),
    Mutant(
        "a process that was given up goes on with what was charged",
        "plugins/qlens_plugins/cost/budgets/sqlite.py",
        "            if not is_alive and any(ask.is_known for ask in synced.asks):\n",
        "            if False:\n",
        BUDGETS,
    ),
    Mutant(
        "a window is dropped while something is held in it",
        "plugins/qlens_plugins/cost/budgets/script.py",
        "    if length and #raised == 0 and is_free and ",
        "    if length and #raised == 0 and ",
        BUDGETS,
    ),
    Mutant(
        "a stream that never ends is never cut",
        "qlens/metering.py",
        "        return None if most is None else Length(most, vocabularies.encoder(self.call))\n",
        "        return None\n",
        BUDGETS,
    ),
    Mutant(
        "text around reasoning is taken for shorter than it is, and hides how long a stream is",
        "qlens/metering.py",
        "        elif self._length is not None and self._measured < _MOST_NOTED:\n",
        "        elif False:\n",
        ("tests/core/test_metering_length.py",),
    ),
    Mutant(
        "a stream that was cut into pieces counts more tokens than it has",
        "qlens/metering_length.py",
        "_AT_EDGE = 2\n",
        "_AT_EDGE = 0\n",
        ("tests/core/test_metering_length.py",),
    ),
    Mutant(
        "a budget is projected by what was spent, not by how fast",
        "plugins/qlens_plugins/cost/budgets/endpoints.py",
        "spent * whole // elapsed",
        "spent",
        ("tests/plugins/cost/test_budgets_seen.py",),
    ),
    Mutant(
        "where only running calls stand in the way, clients are told not to try again",
        "plugins/qlens_plugins/cost/budgets/refusals.py",
        "    if need.likely <= left and told.held:\n",
        "    if False:\n",
        ("tests/plugins/cost/test_budgets_seen.py",),
    ),
    Mutant(
        "whoever is bound by a tenant's budget may widen it",
        "plugins/qlens_plugins/auth/key_store/authority.py",
        "wider_limits(tenant.limits, self.caller.allowance, of_tenant=True)",
        "wider_limits(tenant.limits, self.caller.allowance)",
        ("tests/plugins/cost/test_budgets_granted.py",),
    ),
    Mutant(
        "who rules one tenant sees the limits of all",
        "plugins/qlens_plugins/rate_limit/token_bucket/endpoints.py",
        " and call.scope in (None, used.tenant)",
        "",
        ("tests/plugins/rate_limit/test_token_bucket_shown.py",),
    ),
    Mutant(
        "a reset bucket is forgotten, and the next process says again what was missing",
        "plugins/qlens_plugins/rate_limit/token_bucket/script.py",
        "  redis.call('SET', KEYS[1], string.format('%.0f 0', t[1] * 1000000 + t[2]), 'KEEPTTL')\n",
        "  redis.call('DEL', KEYS[1])\n",
        ("tests/plugins/rate_limit/test_token_bucket_shown.py",),
    ),
    Mutant(
        "a stream of messages that never ends is never cut",
        "qlens/metering_typed.py",
        "            self._ending = ending(self.reply.dialect)\n",
        "            self._ending = None\n",
        ("tests/core/test_metering_cut.py",),
    ),
    Mutant(
        "a stream that was cut costs more than was reserved",
        "qlens/metering_typed.py",
        "return within(used, self.call.most_output or 0) if self.reply.cut else used",
        "return used",
        ("tests/core/test_metering_cut.py",),
    ),
    Mutant(
        "leases beside a full bucket: what is leased may be used while its bucket refills",
        "plugins/qlens_plugins/rate_limit/token_bucket/plugin.py",
        "meter.room - lease(store, meter, processes)",
        "meter.room + lease(store, meter, processes)",
        LIMITS,
    ),
    Mutant(
        "a bucket in the store that forgets digits",
        "plugins/qlens_plugins/rate_limit/token_bucket/script.py",
        "  local value = string.format('%.0f %.0f', now, missing[i])\n",
        "  local value = math.floor(now / 1000) * 1000 .. ' ' .. string.format('%.0f', missing[i])\n",
        LIMITS,
    ),
    Mutant(
        "buckets are written before all have said yes",
        "plugins/qlens_plugins/rate_limit/token_bucket/script.py",
        "  if refused == 0 then\n    for i",
        "  if refused >= 0 then\n    for i",
        LIMITS,
    ),
    Mutant(
        "what a call took before a bucket refused it is not given back",
        "plugins/qlens_plugins/rate_limit/token_bucket/memory.py",
        "                taken.level.full_at -= taken.quantity(tokens) * taken.unit\n",
        "                pass\n",
        LIMITS,
    ),
    Mutant(
        "an estimate gives tokens back",
        "plugins/qlens_plugins/rate_limit/token_bucket/plans.py",
        '    if difference >= 0 or usage.source == "provider":\n',
        "    if usage.total:\n",
        LIMITS,
    ),
    Mutant(
        "without the store there is no limit",
        "plugins/qlens_plugins/rate_limit/token_bucket/shared.py",
        "            return self._take_alone(group, tokens, now)\n",
        "            return None\n",
        LIMITS,
    ),
    Mutant(
        "leases that are not given back",
        "plugins/qlens_plugins/rate_limit/token_bucket/shared.py",
        "        owed_ps = (purse.owed - purse.units) * share.unit\n",
        "        owed_ps = purse.owed * share.unit\n",
        LIMITS,
    ),
    Mutant(
        "a store that is slow is waited for",
        "qlens/stores/redis.py",
        "                await self._in_time(self._send_together(together))\n",
        "                await self._send_together(together)\n",
        STORES,
    ),
    Mutant(
        "a store that is closed waits for a task whose cancellation was lost",
        "qlens/stores/redis.py",
        "            await asyncio.wait(tasks, timeout=_PROBE_SECONDS)\n",
        "            await asyncio.wait(tasks)\n",
        STORES,
    ),
    Mutant(
        "a session that does not wait for a side that does not read",
        "qlens/realtime.py",
        "            await sink.send(look(frame))\n",
        "            asyncio.ensure_future(sink.send(look(frame)))\n",
        REALTIME,
    ),
    Mutant(
        "a stream that is read on though its client does not read",
        "qlens/connection.py",
        "        return not self._paused\n",
        "        return True\n",
        ("tests/core/test_slow_clients.py",),
    ),
    Mutant(
        "pages of browsers use a gateway without keys",
        "qlens/realtime.py",
        '    if "origin" not in call.headers:\n',
        "    if call.headers:\n",
        REALTIME,
    ),
    Mutant(
        "sessions pass by the guards",
        "qlens/realtime.py",
        '    pipeline.refuse_unseen("Realtime sessions are not served")\n',
        "",
        REALTIME,
    ),
    Mutant(
        "tokens of a session without a bound are not taken from the limit",
        "qlens/realtime.py",
        "    call.estimated_input = 1\n",
        "    call.estimated_input = 0\n",
        REALTIME,
    ),
    Mutant(
        "a key follows a redirect",
        "qlens/websocket.py",
        "            middlewares=(_only_upgrades,),\n",
        "",
        REALTIME,
    ),
    Mutant(
        "settle dropped when the client leaves",
        "qlens/account.py",
        "        finishing = run_apart(self._finish(error))\n",
        "        if isinstance(error, asyncio.CancelledError):\n            return\n"
        "        finishing = run_apart(self._finish(error))\n",
        ("tests/core/test_account.py",),
    ),
    Mutant(
        "settled twice",
        "qlens/pipeline.py",
        "        for hook in self.hooks.settle:\n",
        "        for hook in (*self.hooks.settle, *self.hooks.settle):\n",
        PIPELINE,
    ),
    Mutant(
        "a hold is not given back",
        "qlens/pipeline.py",
        "account.holds.get(hook.instance)",
        "None",
        PIPELINE,
    ),
    Mutant(
        "another plugin's hold is given back",
        "qlens/pipeline.py",
        "account.holds[hook.instance] = hold",
        "account.holds = {bound.instance: hold for bound in self.hooks.admit}",
        PIPELINE,
    ),
    Mutant(
        "the upstream is not closed",
        "qlens/account.py",
        "                    await reply.aclose()\n",
        "                    pass\n",
        ("tests/core/test_account.py",),
    ),
    Mutant(
        "settle is not shielded",
        "qlens/account.py",
        "        await asyncio.shield(finishing)\n",
        "        finishing.cancel()\n        await asyncio.shield(finishing)\n",
        PIPELINE,
    ),
    Mutant(
        "a settle that fails stops the others",
        "qlens/pipeline.py",
        "                await hook.fn(account.call, receipt, account.holds.get(hook.instance))\n            except (Exception, asyncio.CancelledError) as error:",
        "                await hook.fn(account.call, receipt, account.holds.get(hook.instance))\n            except KeyError as error:",
        PIPELINE,
    ),
    Mutant(
        "a broken auth plugin is a 401",
        "qlens/pipeline.py",
        'Unavailable("Authentication is unavailable.")',
        'Unauthenticated("Authentication is unavailable.")',
        PIPELINE,
    ),
    Mutant(
        "the usage event is not withheld",
        "qlens/metering.py",
        '        if not self.call.wants_usage:\n            return b""\n',
        "",
        ("tests/core/test_metering.py",),
    ),
    Mutant(
        "an event without choices is passed on",
        "qlens/metering.py",
        '            if usage:\n                self._usage_event = payload\n            return b""\n',
        "            if usage:\n                self._usage_event = payload\n            return event\n",
        ("tests/core/test_metering.py",),
    ),
    Mutant(
        "an event that looks much like others is not looked into",
        "qlens/metering.py",
        "_NO_TEXT.search(block, begin, end) is None:\n",
        "True:\n",
        ("tests/core/test_metering.py",),
    ),
    Mutant(
        "a request is sent with another one's headers",
        "qlens/upstream.py",
        "        key = method, url, tls, *headers.items()\n",
        "        key = method, url, tls, *headers\n",
        ("tests/core/test_upstream.py",),
    ),
    Mutant(
        "a request that a provider may have billed is sent again unseen",
        "qlens/upstream.py",
        "                if not connection.unheard and method not in _IDEMPOTENT:\n",
        "                if False:\n",
        ("tests/core/test_upstream_kept.py",),
    ),
    Mutant(
        "a kept connection that ended before the request arrived costs an attempt",
        "qlens/upstream_connection.py",
        "_unacknowledged(self._transport))",
        "False)",
        ("tests/core/test_upstream_kept.py",),
    ),
    Mutant(
        "a request that the kernel refused counts as sent",
        "qlens/upstream_connection.py",
        "            self.unheard = True  # the kernel has not taken it\n",
        "            pass\n",
        ("tests/core/test_upstream_kept.py",),
    ),
    Mutant(
        "a cut stream counts as complete",
        "qlens/metering.py",
        '            raise UpstreamTruncated("The provider\'s answer stopped before its end.")\n',
        "            pass\n",
        ("tests/core/test_metering.py",),
    ),
    Mutant(
        "missing usage is zero",
        "qlens/metering.py",
        "            output=max(self.events - 1, text // _BYTES_PER_TOKEN, 0),\n",
        "            output=0,\n",
        ("tests/core/test_metering.py", "tests/core/test_account.py"),
    ),
    Mutant(
        "a provider's error event is forwarded",
        "qlens/metering.py",
        "            raise error_from(payload, None)\n",
        "            return event\n",
        ("tests/core/test_metering.py",),
    ),
    Mutant(
        "an abandoned stream is free",
        "qlens/account.py",
        "                if meter is None:\n                    continue\n                attempt.usage",
        "                if meter is None or error is not None:\n                    continue\n                attempt.usage",
        ("tests/core/test_account.py",),
    ),
    Mutant(
        "an attempt that failed is billed",
        "qlens/account.py",
        "        attempt.upstream_id = error.upstream_id\n",
        "        attempt.upstream_id = error.upstream_id\n        attempt.billed = True\n",
        ACCOUNT,
    ),
    Mutant(
        "a target is asked twice without a retry plugin",
        "qlens/pipeline.py",
        "                if self.hooks.retry:\n                    wait",
        "                if len(call.attempts) < 3:\n                    resting.append((0.0, target))\n"
        "                if self.hooks.retry:\n                    wait",
        PIPELINE,
    ),
    Mutant(
        "a fallback the caller may not use is asked",
        "qlens/pipeline.py",
        "            if name in reached or model is None or not call.known.may_use(name):\n",
        "            if name in reached or model is None:\n",
        PIPELINE,
    ),
    Mutant(
        "a model that is not allowed is told apart from an unknown one",
        "qlens/pipeline.py",
        "        if model is None or not (caller.models is None or caller.may_use(name)):\n            raise model_not_found(name)\n",
        '        if model is None:\n            raise model_not_found(name)\n        if not caller.may_use(name):\n            raise InvalidRequest("not allowed")\n',
        ("tests/core/test_server.py",),
    ),
    Mutant(
        "max tokens are not clamped",
        "qlens/pipeline.py",
        "        dialect.clamp(call.body, model.max_output_tokens, model.max_n)\n",
        "",
        ACCOUNT,
    ),
    Mutant(
        "attempts share one body",
        "qlens/call.py",
        "self._own = orjson.loads(orjson.dumps(self._given))",
        "self._own = self._given",
        PIPELINE,
    ),
    Mutant(
        "the body is read before authentication",
        "qlens/pipeline.py",
        "            call.caller = await self.authenticate(call)\n",
        "            await call.read()\n            call.caller = await self.authenticate(call)\n",
        ("tests/core/test_server.py",),
    ),
    Mutant(
        "a cached answer is stored again",
        "qlens/pipeline.py",
        "                account.open(known)\n                return known\n",
        "                account.open(known)\n                await self.store(account.call, known)\n                return known\n",
        PIPELINE,
    ),
    Mutant(
        "an incomplete answer is stored",
        "qlens/watching.py",
        "        if not self.call.keep or self._kept_bytes > self.call.keep:\n",
        "        if not self.call.keep:\n",
        ("tests/core/test_metering.py",),
    ),
    Mutant(
        "a local operation is not admitted",
        "qlens/pipeline.py",
        "        assert call.operation.local is not None\n        await self.admit(account)\n",
        "        assert call.operation.local is not None\n",
        PIPELINE,
    ),
    Mutant(
        "a reload that fails leaves the new configuration half in place",
        "qlens/gateway.py",
        "            self._seen = old\n            await self._close(opened)\n            raise\n",
        "            await self._close(opened)\n            raise\n",
        ("tests/core/test_gateway.py",),
    ),
    Mutant(
        "an old configuration is closed under its running calls",
        "qlens/gateway.py",
        "            await generation.settled()\n            self._older.remove",
        "            self._older.remove",
        ("tests/core/test_gateway.py",),
    ),
    Mutant(
        "an unchanged plugin loses its state on reload",
        "qlens/registry.py",
        "    if old is not None and instance.same(old):\n",
        "    if old is None and instance.same(old):\n",
        ("tests/core/test_gateway.py",),
    ),
    Mutant(
        "YAML order is turned round",
        "qlens/registry.py",
        "    for instance in instances:\n        manager.register",
        "    for instance in reversed(list(instances)):\n        manager.register",
        PIPELINE,
    ),
    Mutant(
        "a role is not asked",
        "qlens/server.py",
        "call.scope = generation.roles.scope(call.caller, endpoint)\n",
        "call.scope = None\n",
        ("tests/contract/test_matrix.py",),
    ),
    Mutant(
        "the client's leaving goes unnoticed",
        "qlens/server.py",
        "handler_cancellation=True",
        "handler_cancellation=False",
        ("tests/core/test_account.py",),
    ),
    Mutant(
        "a failed stream ends as if it were complete",
        "qlens/connection.py",
        "await self._write(error_event(error, dialect, self.id))\n",
        'await self._write(error_event(error, dialect, self.id) + b"data: [DONE]\\n\\n")\n',
        ("tests/core/test_account.py",),
    ),
    Mutant(
        "a cache's nonsense is believed",
        "qlens/pipeline.py",
        "return returned.reply(known)",
        "return known",
        HOOKS,
    ),
    Mutant(
        "a provider's nonsense is believed",
        "qlens/pipeline.py",
        "account.take(await provider.send.fn(call, target, outgoing))",
        "account.hold_open(await provider.send.fn(call, target, outgoing))",
        HOOKS,
    ),
    Mutant(
        "a caller without a tenant is believed",
        "qlens/returned.py",
        " or not isinstance(value.tenant, str) or not value.tenant:",
        ":",
        HOOKS,
    ),
    Mutant(
        "less than nothing is charged",
        "qlens/returned.py",
        "(type(value.picos) is int and value.picos >= 0)",
        "type(value.picos) is int",
        HOOKS,
    ),
    Mutant(
        "a cancellation of a plugin's own work ends the call",
        "qlens/returned.py",
        "(Exception,) if cancelled else (Exception, asyncio.CancelledError)",
        "(Exception,)",
        HOOKS,
    ),
    Mutant(
        "a provider that breaks in its stream is the gateway's mistake",
        "qlens/watching.py",
        "        return isinstance(reason, CallError) or not isinstance(reason, mistakes())\n",
        "        return True\n",
        HOOKS,
    ),
    Mutant(
        "a call's deadline ends nothing",
        "qlens/deadlines.py",
        "            task.cancel()\n",
        "            pass\n",
        ("tests/core/test_account.py",),
    ),
    Mutant(
        "retrying never ends",
        "qlens/pipeline.py",
        " or len(call.attempts) >= MOST_ATTEMPTS:",
        ":",
        HOOKS,
    ),
    Mutant(
        "only the last answer is closed",
        "qlens/account.py",
        "        self._opened.append(reply)\n",
        "        self._opened[:] = [reply]\n",
        ACCOUNT,
    ),
    Mutant(
        "every stream is billed by the last one's meter",
        "qlens/account.py",
        "meter = self.meters.get(place)\n",
        "meter = next(reversed(self.meters.values()), None)\n",
        ACCOUNT,
    ),
    Mutant(
        "an upstream that hangs while closing keeps the receipt",
        "qlens/account.py",
        "asyncio.timeout(CLOSE_SECONDS)",
        "asyncio.timeout(None)",
        ACCOUNT,
    ),
    Mutant(
        "a fallback is asked for more than it allows",
        "qlens/pipeline.py",
        "        dialects.named(dialect).clamp(body, model.max_output_tokens, model.max_n)\n",
        "        pass\n",
        ACCOUNT,
    ),
    Mutant(
        "the bound forgets fallbacks",
        "qlens/pipeline.py",
        "_most_output(self.reachable(call))",
        "model.max_output_tokens",
        ACCOUNT,
    ),
    Mutant(
        "a provider's error code becomes a label",
        "qlens/metrics.py",
        "attempt.error if attempt.error in _RESULTS else OTHER",
        "attempt.error",
        ACCOUNT,
    ),
    Mutant(
        "an error is written into an answer that is whole",
        "qlens/connection.py",
        "        if not self.begun:\n            await self.whole(",
        "        if not self.begun or not self._events:\n            await self.whole(",
        HTTP,
    ),
    Mutant(
        "a plugin's headers are sent whatever they are",
        "qlens/heads.py",
        "        if lower not in without and _may_be_sent(lower) and not _UNSENDABLE.search(value):\n",
        "        if lower not in without:\n",
        HTTP,
    ),
    Mutant(
        "an endpoint may take for ever",
        "qlens/server.py",
        "            async with asyncio.timeout_at(call.deadline) as timer:\n",
        "            async with asyncio.timeout(None) as timer:\n",
        HTTP,
    ),
    Mutant(
        "a stream in HTTP/1.0 has no end",
        "qlens/connection.py",
        "            self.keep_alive = False  # a client of HTTP/1.0",
        "            pass  # a client of HTTP/1.0",
        HTTP,
    ),
    Mutant(
        "a client that takes nothing is waited for",
        "qlens/server.py",
        "round(STALL_SECONDS * 1000)",
        "0",
        HTTP,
    ),
    Mutant(
        "a lifespan that hangs keeps the others open",
        "qlens/gateway.py",
        "asyncio.wait({self._task}, timeout=CLOSE_SECONDS)",
        "asyncio.wait({self._task})",
        LIFE,
    ),
    Mutant(
        "a settle that hangs keeps the process alive",
        "qlens/gateway.py",
        "            await asyncio.wait_for(self.settled(), SETTLE_SECONDS)\n",
        "            await self.settled()\n",
        LIFE,
    ),
    Mutant(
        "a name that begins like a loopback address is taken for one",
        "qlens/registry.py",
        '    try:\n        return host == "localhost"',
        '    if host.startswith("127."):\n        return True\n    try:\n        return host == "localhost"',
        LIFE,
    ),
    Mutant(
        "a model's id is not escaped once more in the canonical request",
        "plugins/qlens_plugins/provider/bedrock/signing.py",
        '    return quote(path, safe="/~")\n',
        "    return path\n",
        BEDROCK,
    ),
    Mutant(
        "Bedrock is asked to count for a profile",
        "plugins/qlens_plugins/provider/bedrock/counting.py",
        "quote(model.base, safe='')",
        "quote(model.text, safe='')",
        BEDROCK,
    ),
    Mutant(
        "what passes through to Bedrock has no price",
        "plugins/qlens_plugins/provider/bedrock/passing.py",
        "reply.usage, reply.target = meter.usage, asked",
        "reply.usage = meter.usage",
        BEDROCK,
    ),
    Mutant(
        "thoughts are counted twice",
        "plugins/qlens_plugins/provider/bedrock/usage.py",
        "    output -= reasoning\n",
        "",
        BEDROCK,
    ),
    Mutant(
        "what was read from Bedrock's cache is billed as fresh input",
        "plugins/qlens_plugins/provider/bedrock/usage.py",
        '        cached_input=_count(raw, "cacheReadInputTokens") or 0,\n',
        "        cached_input=0,\n",
        BEDROCK,
    ),
    Mutant(
        "a stream of Bedrock that stops early counts as complete",
        "plugins/qlens_plugins/provider/bedrock/converse.py",
        "        if self.writer.finish is None or not self._reader.is_between:\n",
        "        if not self._reader.is_between:\n",
        BEDROCK,
    ),
    Mutant(
        "calls of tools are counted by Bedrock's blocks",
        "plugins/qlens_plugins/provider/bedrock/converse_stream.py",
        '        self._parts[block] = _Part("call", self._calls)\n',
        '        self._parts[block] = _Part("call", block)\n',
        BEDROCK,
    ),
    Mutant(
        "an exception as a stream's first frame is met after the status was sent",
        "plugins/qlens_plugins/provider/bedrock/converse.py",
        '            if event_name(frame) != "messageStart":\n',
        '            if frame.headers.get(":event-type") != "messageStart":\n',
        BEDROCK,
    ),
    Mutant(
        "expired credentials are not renewed",
        "plugins/qlens_plugins/provider/bedrock/exchange.py",
        "            if not await self.credentials.renew(proof):\n                raise\n",
        "            raise\n",
        BEDROCK,
    ),
    Mutant(
        "a client replaces the operator's guardrail",
        "plugins/qlens_plugins/provider/bedrock/converse_request.py",
        "        if asked is not None:\n            raise",
        "        if asked is None:\n            raise",
        BEDROCK,
    ),
    Mutant(
        "a signature outlives its access key",
        "plugins/qlens_plugins/provider/bedrock/signing.py",
        "        if second != self._second or keys is not self._keys:\n",
        "        if second != self._second:\n",
        BEDROCK,
    ),
    Mutant(
        "a system prompt within a plain chat is moved to its beginning",
        "plugins/qlens_plugins/provider/bedrock/messages.py",
        "        elif role in _OPENING and not turns and family.system:\n",
        "        elif role in _OPENING and family.system:\n",
        BEDROCK,
    ),
    Mutant(
        "results of tools stand where they were said",
        "plugins/qlens_plugins/provider/bedrock/messages.py",
        "        entries.sort(key=_rank)\n",
        "        pass\n",
        BEDROCK,
    ),
    Mutant(
        "encrypted reasoning names no account",
        "qlens/objects.py",
        "            return self.content(text) if text else text\n",
        "            return text\n",
        KEPT,
    ),
    Mutant(
        "reasoning that is kept under its id names no account",
        "qlens/objects.py",
        '                node["encrypted_content"] = self.content("")\n',
        "                pass\n",
        KEPT,
    ),
    Mutant(
        "encrypted reasoning goes to any account",
        "qlens/objects.py",
        '            self._bound(Origin(latest.provider, "", ""), latest.param)\n',
        "            pass\n",
        KEPT,
    ),
    Mutant(
        "another tenant's encrypted reasoning is read",
        "qlens/object_ids.py",
        "        return (provider, content) if hmac.compare_digest(code, expected) else None\n",
        "        return provider, content\n",
        KEPT,
    ),
    Mutant(
        "what goes on in the background costs nothing",
        "qlens/pipeline.py",
        "output=max(guess.output, call.bound.output)",
        "output=guess.output",
        KEPT,
    ),
    Mutant(
        "a response of a deployment with codex is asked for behind an api-version without Responses",
        "plugins/qlens_plugins/provider/azure_openai/plugin.py",
        '{"responses": self._responses_query, "vector_stores": self._newest_query}',
        '{"vector_stores": self._newest_query}',
        ("tests/plugins/provider/azure_openai/test_responses.py",),
    ),
    Mutant(
        "a gateway whose plugins share a database loses its log to the next command",
        "qlens/stores/sqlite.py",
        "        if not path.exists():\n            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))\n",
        "        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))\n",
        ("tests/core/test_stores_sqlite.py",),
    ),
    Mutant(
        "schemas of functions become strict where a chat is asked by Responses",
        "qlens/bridges/chat_over_responses/request.py",
        '            "strict": bool(function.get("strict")),\n',
        '            **({"strict": True} if function.get("strict") else {}),\n',
        ("tests/core/bridges/test_chat_over_responses.py",),
    ),
    Mutant(
        "a chat asked by Responses is kept by the provider",
        "qlens/bridges/chat_over_responses/request.py",
        ', "store": False}',
        "}",
        ("tests/core/bridges/test_chat_over_responses.py",),
    ),
    Mutant(
        "a session that transcribes does so by whatever model the client names",
        "qlens/transcription.py",
        '            heard["model"] = model\n',
        "            pass\n",
        REALTIME,
    ),
    Mutant(
        "items are put into conversations unseen by guards",
        "qlens/affinity.py",
        '        pipeline.refuse_unseen("Conversations cannot be filled")\n',
        "        pass\n",
        ("tests/core/test_collections.py",),
    ),
    Mutant(
        "speech is asked of Azure by an api-version that lacks it",
        "plugins/qlens_plugins/provider/azure_openai/plugin.py",
        '_IN_PREVIEWS = frozenset({"image_edits", "speech"})',
        '_IN_PREVIEWS = frozenset({"image_edits"})',
        GOLDEN,
    ),
    Mutant(
        "a response of Azure is asked for at a deployment's path",
        "plugins/qlens_plugins/provider/azure_openai/plugin.py",
        'return f"{self._root}/{PATHS[dialect]}{self._responses_query}"',
        'return f"{self._place}{PATHS[dialect]}{self._responses_query}"',
        GOLDEN,
    ),
    Mutant(
        "a model at Bedrock that is not ready is a failure like any other",
        "plugins/qlens_plugins/provider/bedrock/failures.py",
        '"The model is not ready yet.", code="model_not_ready", retry_after=THROTTLED_SECONDS',
        '"The model is not ready yet."',
        ("tests/plugins/provider/test_golden_errors.py",),
    ),
    Mutant(
        "what Bedrock read from a cache is counted in one of its spellings only",
        "plugins/qlens_plugins/provider/bedrock/usage.py",
        "        value = raw.get(_OLDER[name])\n",
        '        value = raw.get(_OLDER[name] if "cache" not in name else name)\n',
        ("tests/plugins/provider/bedrock/test_pitfalls.py",),
    ),
    Mutant(
        "the tool by which a model fits a schema is shown among its calls",
        "plugins/qlens_plugins/provider/bedrock/converse_stream.py",
        '            self._parts[block] = _Part("helper")\n            return b""\n',
        '            self._parts[block] = _Part("helper")\n            self._calls += 1\n            return b""\n',
        ("tests/plugins/provider/bedrock/test_pitfalls.py",),
    ),
    Mutant(
        "a variable of the environment leads past the FIPS endpoint",
        "plugins/qlens_plugins/provider/bedrock/endpoints.py",
        "if not config.fips and (given := _given()) is not None:",
        "if (given := _given()) is not None:",
        ("tests/plugins/provider/bedrock/test_chat.py",),
    ),
    Mutant(
        "who asks for a response again pays for a request",
        "plugins/qlens_plugins/cost/prices/plugin.py",
        "if sheet.by_request and call.operation.meters:\n",
        "if sheet.by_request:\n",
        METERS,
    ),
    Mutant(
        "what is billed by the character is billed by tokens as well",
        "plugins/qlens_plugins/cost/prices/book.py",
        "            lines.clear()\n",
        "            pass\n",
        METERS,
    ),
    Mutant(
        "any row is enough for a strict price table",
        "plugins/qlens_plugins/cost/prices/plugin.py",
        "if not ways or all(any(sheet.bills(way) for way in ways) for sheet in sheets):\n",
        "if not ways or all(sheet.entries for sheet in sheets):\n",
        METERS,
    ),
    Mutant(
        "a batch is in the ledger for each time somebody asks for it",
        "qlens/batches.py",
        "    code = int.from_bytes(hashlib",
        "    whose = (*whose, str(time.time_ns()))\n    code = int.from_bytes(hashlib",
        BATCHES,
    ),
    Mutant(
        "the lines of a batch are one long prompt",
        "qlens/batches.py",
        "        return whole if picos == whole.picos else Cost(picos",
        "        return whole if whole.picos is not None else Cost(picos",
        BATCHES,
    ),
    Mutant(
        "a batch whose receipt was deleted is counted again",
        "plugins/qlens_plugins/cost/ledger/plugin.py",
        "if not self._is_forgotten(receipt) and not writer.keep(receipt):\n",
        "if not writer.keep(receipt):\n",
        BATCHES,
    ),
    Mutant(
        "an output that could not be read is not read again",
        "qlens/batches.py",
        "            self.pipeline.batches_read.discard(self.own)\n",
        "",
        BATCHES,
    ),
    Mutant(
        "refused calls are no errors in the summary",
        "plugins/qlens_plugins/cost/ledger/summary.py",
        'found["failed"] + turned_away, calls + turned_away',
        'found["failed"], calls + turned_away',
        SUMMARY,
    ),
    Mutant(
        "pictures that are billed by tokens are not counted",
        "plugins/qlens_plugins/cost/ledger/rollups.py",
        '"images": ("images", "output_images"),\n',
        '"images": ("images",),\n',
        SUMMARY,
    ),
    Mutant(
        "a gateway writes to tables that are no longer for it",
        "qlens/stores/sqlite.py",
        "    if (found[1] if found else version) > known:\n",
        "    if False:\n",
        VERSIONS,
    ),
    Mutant(
        "a newer version that disturbs nobody stops older gateways",
        "qlens/stores/sqlite.py",
        """        oldest = "ifnull(oldest, version)" if _has_oldest(database) else "version"\n""",
        """        oldest = "version"\n""",
        VERSIONS,
    ),
    Mutant(
        "a backup has nothing of receipts that were deleted",
        "plugins/qlens_plugins/cost/ledger/backup.py",
        "        yield Batch(number, (), {}, found_rests)\n",
        "        continue\n",
        UPKEEP,
    ),
    Mutant(
        "a backup is restored on top of roll-ups",
        "plugins/qlens_plugins/cost/ledger/backup.py",
        "                              UNION ALL SELECT 1 FROM usage_groups LIMIT 1) AS found),\n",
        "                              LIMIT 1) AS found),\n",
        UPKEEP,
    ),
    Mutant(
        "a deployment that drifts is hidden by the others of its model",
        "plugins/qlens_plugins/cost/ledger/reconcile_report.py",
        "self.found.models), *parts)))\n",
        "self.found.models))))\n",
        RECONCILE,
    ),
)


def judged(mutant: Mutant, clean: Path) -> Verdict:
    """Run the tests against a copy of the clean tree that has this fault."""
    with tempfile.TemporaryDirectory(prefix="qlens-mutant-") as name:
        copy = Path(shutil.copytree(clean, Path(name) / "tree"))
        target = copy / mutant.path
        text = target.read_text()
        if text.count(mutant.old) != 1:
            return Verdict(f"{mutant.path} has the text {text.count(mutant.old)} times: mend the mutant")
        target.write_text(text.replace(mutant.old, mutant.new))
        done = _pytest(copy, "-x", *mutant.tests)
        if done.returncode == 1:
            return Verdict(noticed_by=tuple(json.loads((copy / FAILED).read_text())))
        return Verdict(
            "no test noticed" if done.returncode == 0 else f"pytest ended with {done.returncode}: {done.stdout[-2000:]}"
        )


def _clean_tree(folder: Path, tests: set[str]) -> Path:
    """A copy of the tree, with everything compiled that these tests import."""
    for part in COPIED:
        source = ROOT / part
        if source.is_dir():
            shutil.copytree(
                source, folder / part, ignore=shutil.ignore_patterns("__pycache__", "node_modules", "*.db*")
            )
        elif source.exists():
            shutil.copy2(source, folder / part)
    fetched = folder / VOCABULARIES
    fetched.parent.mkdir(parents=True, exist_ok=True)
    fetched.symlink_to(ROOT / VOCABULARIES)
    _pytest(folder, "--collect-only", *sorted(tests), PYTHONDONTWRITEBYTECODE="")
    return folder


def _pytest(tree: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    paths = {"PYTHONPATH": f"{tree}:{tree / 'plugins'}", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "--timeout=30", *arguments]
    return subprocess.run(
        command,
        cwd=tree,
        env={**os.environ, **paths, **env},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )


def main(names: list[str]) -> int:
    """Try the mutants; returns 1 when one survives."""
    if any(name.startswith("-") for name in names):
        print(__doc__)
        return 2
    chosen = [mutant for mutant in MUTANTS if not names or any(name in mutant.name for name in names)]
    workers = os.cpu_count() or 1
    with tempfile.TemporaryDirectory(prefix="qlens-clean-") as name, ThreadPoolExecutor(workers) as pool:
        clean = _clean_tree(Path(name), {test for mutant in chosen for test in mutant.tests})
        verdicts = list(pool.map(judged, chosen, repeat(clean)))
        # Without any fault, all that noticed one must be green: else it is not the fault that they noticed.
        noticed_by = sorted({test for verdict in verdicts for test in verdict.noticed_by})
        parts = [noticed_by[start::workers] for start in range(min(workers, len(noticed_by)))]
        controls = list(pool.map(lambda part: _pytest(clean, *part), parts))
    for mutant, verdict in zip(chosen, verdicts, strict=True):
        print(f"SURVIVED  {mutant.name}: {verdict.survives}" if verdict.survives else f"killed    {mutant.name}")
    if red := [control for control in controls if control.returncode != 0]:
        print(*(control.stdout[-2000:] for control in red), sep="\n")
        print("the tests are red without any fault: no verdict holds")
        return 1
    alive = sum(bool(verdict.survives) for verdict in verdicts)
    print(f"{len(chosen) - alive} of {len(chosen)} mutants killed")
    return 1 if alive else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
