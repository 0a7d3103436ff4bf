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
RUNS = 3
"""How often a mutant that nobody notices is tried: what two processes do at a time may hide a fault by chance."""


@frozen
class Mutant:
    """One fault: in `path`, `old` becomes `new`; `tests` are expected to notice, the one that is about it if there is."""

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
    runs: int = 1

    def of(self, mutant: Mutant) -> str:
        """A line for people."""
        if self.survives:
            return f"SURVIVED  {mutant.name}: {self.survives}"
        by_chance = f", in run {self.runs}: its test lets it pass by chance" if self.runs > 1 else ""
        return f"killed    {mutant.name}{by_chance}"


SAID = ("tests/core/test_metering_said.py",)
STORES = ("tests/core/test_stores_redis.py",)
TOLD = ("tests/plugins/auth/test_key_store_told.py",)
METERS = ("tests/plugins/cost/test_prices_meters.py",)

MUTANTS = (
    Mutant(
        "operators at a time who lose each other's changes",
        "plugins/qlens_plugins/auth/key_store/postgres.py",
        "; SELECT FROM key_state FOR UPDATE",
        "",
        ("tests/plugins/auth/test_key_store_postgres.py::test_operators_at_two_gateways_lose_no_change_of_each_other",),
    ),
    Mutant(
        "a change whose commit was lost is told to have failed",
        "plugins/qlens_plugins/auth/key_store/sql_store.py",
        "        except CommitLost:\n",
        "        except ZeroDivisionError:\n",
        ("tests/plugins/auth/test_key_store_postgres.py::test_a_change_whose_commit_nobody_answered_is_made_once",),
    ),
    Mutant(
        "an event of a command that is let go of before it is told",
        "plugins/qlens_plugins/auth/key_store/sql_store.py",
        "                    _on_loop(loop, lambda: publish(events))\n",
        "                    loop.call_later(1, publish, events)\n",
        TOLD,
    ),
    Mutant(
        "events of commands that nobody hears are kept for good",
        "plugins/qlens_plugins/auth/key_store/telling.py",
        "        if self.gateway.events.is_heard:\n",
        "        if True:\n",
        TOLD,
    ),
    Mutant(
        "what a command does is in no audit log",
        "qlens/gateway.py",
        "for hook in registration.hooks.audit_log:",
        "for hook in ():",
        ("tests/e2e/test_commands_noted.py",),
    ),
    Mutant(
        "another database is followed from where the first one was",
        "plugins/qlens_plugins/auth/key_store/sql_store.py",
        "known = since if database is self._followed else None",
        "known = since",
        ("tests/plugins/auth/test_key_store_postgres.py::test_what_another_connection_leads_to_is_read_anew",),
    ),
    Mutant(
        "a budget that lets everything pass that is asked for at the same time",
        "plugins/qlens_plugins/cost/budgets/memory.py",
        "                free, slack = free - need.likely, slack - need.excess\n",
        "",
        ("tests/plugins/cost/test_budgets.py::test_of_a_thousand_calls_at_once_with_room_for_one_exactly_one_passes",),
    ),
    Mutant(
        "what a dead process had reserved is refunded",
        "plugins/qlens_plugins/cost/budgets/sqlite.py",
        "            (held + excess, held, excess, id_, window),\n",
        "            (0, held, excess, id_, window),\n",
        (
            "tests/plugins/cost/test_budgets.py::test_what_a_dead_process_held_is_charged_once_and_it_is_told_when_it_comes_back",
        ),
    ),
    Mutant(
        "what is not priced is free under a hard budget",
        "plugins/qlens_plugins/cost/budgets/plugin.py",
        "            raise refusals.unpriced(call)\n",
        "            return None\n",
        (
            "tests/plugins/cost/test_budgets.py::test_what_cannot_be_bounded_is_refused_before_a_hard_budget_and_not_before_a_soft_one[unpriced-model_unpriced]",
        ),
    ),
    Mutant(
        "a reservation that outlasts its call",
        "plugins/qlens_plugins/cost/budgets/tills.py",
        "        till.held -= need.likely\n        till.excess -= need.excess\n        till.spent += cost\n",
        "        till.excess -= need.excess\n        till.spent += cost\n",
        ("tests/plugins/cost/test_budgets.py::test_the_form_of_the_design_works_and_a_call_is_charged_what_it_cost",),
    ),
    Mutant(
        "a process that was given up goes on with what was charged",
        "plugins/qlens_plugins/cost/budgets/sqlite.py",
        "            if not is_alive and any(ask.is_known for ask in synced.asks):\n",
        "            if False:\n",
        (
            "tests/plugins/cost/test_budgets.py::test_what_a_dead_process_held_is_charged_once_and_it_is_told_when_it_comes_back",
        ),
    ),
    Mutant(
        "another name of a model has a budget of its own",
        "plugins/qlens_plugins/cost/budgets/lines.py",
        "    caller, model = call.known, call.model.counts_as if call.model else None\n",
        "    caller, model = call.known, call.model.name if call.model else None\n",
        (
            "tests/plugins/cost/test_budgets_aliases.py::test_all_names_of_a_model_spend_one_budget_and_usage_has_the_name_that_was_asked",
        ),
    ),
    Mutant(
        "another name of a model has a bucket of its own",
        "plugins/qlens_plugins/rate_limit/token_bucket/meters.py",
        '        return "model", call.model.counts_as if call.model else ""\n',
        '        return "model", call.model.name if call.model else ""\n',
        ("tests/plugins/rate_limit/test_token_bucket_aliases.py::test_all_names_of_a_model_take_from_one_bucket",),
    ),
    Mutant(
        "calls that came while the store was asked ask it again",
        "plugins/qlens_plugins/cost/budgets/tills.py",
        "            while self._still_waiting(till):\n",
        "            while till.waiting:\n",
        ("tests/plugins/cost/test_budgets_redis.py::test_calls_that_came_while_redis_was_asked_take_of_what_it_gave",),
    ),
    Mutant(
        "who puts another name of a model first has a fresh budget",
        "plugins/qlens_plugins/cost/budgets/tills.py",
        "            till.floor,\n            till.purse.beside,\n",
        "            till.floor,\n",
        ("tests/plugins/cost/test_budgets_aliases.py::test_a_reload_that_adds_a_name_gives_no_room",),
    ),
    Mutant(
        "what a ledger has of a model's other names is forgotten with Redis",
        "plugins/qlens_plugins/cost/budgets/past.py",
        '        where["model"] = (account.owner,) if model is None else model.names\n',
        '        where["model"] = (account.owner,)\n',
        ("tests/plugins/cost/test_budgets_aliases.py::test_a_redis_that_comes_back_empty_is_told_of_all_names",),
    ),
    Mutant(
        "a wildcard is a way around the limits of a model with a name of its own",
        "qlens/models.py",
        "        found = reached.get(_upstream(candidates)) if reached else None\n",
        "        found = None\n",
        ("tests/core/test_models.py::test_names_of_the_same_targets_count_as_the_first",),
    ),
    Mutant(
        "a window is dropped while something is held in it",
        "plugins/qlens_plugins/cost/budgets/script.py",
        "    if length and #raised == 0 and is_free and ",
        "    if length and #raised == 0 and ",
        (
            "tests/plugins/cost/test_budgets.py::test_windows_that_are_long_over_are_forgotten_and_no_money_with_them[redis]",
        ),
    ),
    Mutant(
        "a stream that never ends is never cut",
        "qlens/metering.py",
        "        return None if most is None else Length(most, vocabularies.encoder(self.call))\n",
        "        return None\n",
        (
            "tests/plugins/cost/test_budgets.py::test_a_stream_that_never_ends_is_cut_with_a_valid_end_and_its_provider_is_told",
        ),
    ),
    Mutant(
        "events of reasoning hide how much text the others have",
        "qlens/metering.py",
        "        is_content = CHAT[0] in event\n",
        "        is_content = True\n",
        ("tests/core/test_metering_length.py::test_no_stream_is_endless_whatever_its_events_look_like",),
    ),
    Mutant(
        "an event that nobody can read hides those that are read with it",
        "qlens/metering_alike.py",
        "    for data in filter(None, map(_json, events)):\n",
        "    for data in ():\n",
        ("tests/core/test_metering_length.py::test_no_stream_is_endless_whatever_its_events_look_like",),
    ),
    Mutant(
        "the first delta says how much of all others is no text",
        "qlens/metering_typed.py",
        "if len(event) < self._shortest and self._ending is not None:",
        "if not self._bare and self._ending is not None:",
        ("tests/core/test_metering_length.py::test_no_stream_is_endless_whatever_its_events_look_like",),
    ),
    Mutant(
        "a stream that was cut into pieces counts more tokens than it has",
        "qlens/metering_length.py",
        "_AT_EDGE = 2\n",
        "_AT_EDGE = 0\n",
        ("tests/core/test_metering_length.py::test_what_is_cut_where_vocabularies_do_not_cut_counts_no_more_either",),
    ),
    Mutant(
        "a budget is projected by what was spent, not by how fast",
        "plugins/qlens_plugins/cost/budgets/endpoints.py",
        "spent * whole // elapsed",
        "spent",
        ("tests/plugins/cost/test_budgets_seen.py::test_what_a_window_will_have_cost_goes_on_as_it_went",),
    ),
    Mutant(
        "where only running calls stand in the way, clients are told not to try again",
        "plugins/qlens_plugins/cost/budgets/refusals.py",
        "    if not is_spent(till, need):\n",
        "    if False:\n",
        (
            "tests/plugins/cost/test_budgets_seen.py::test_where_only_running_calls_stand_in_the_way_the_sdk_tries_again_and_passes",
        ),
    ),
    Mutant(
        "whoever is bound by a tenant's budget may widen it",
        "plugins/qlens_plugins/auth/key_store/authority.py",
        "wider_limits(tenant.limits, self.caller.allowance, of_tenant=True)",
        "wider_limits(tenant.limits, self.caller.allowance)",
        ("tests/plugins/cost/test_budgets_granted.py::test_nobody_who_is_bound_by_a_tenants_budget_widens_it",),
    ),
    Mutant(
        "who rules one tenant sees the limits of all",
        "plugins/qlens_plugins/rate_limit/token_bucket/endpoints.py",
        " and call.scope in (None, used.tenant)",
        "",
        ("tests/plugins/rate_limit/test_token_bucket_shown.py::test_each_sees_what_its_role_lets_it_see",),
    ),
    Mutant(
        "a reset bucket is forgotten, and the next process says again what was missing",
        "plugins/qlens_plugins/rate_limit/token_bucket/script.py",
        "  redis.call('SET', KEYS[1], string.format('%.0f 0', t[1] * 1000000 + t[2]), 'KEEPTTL')\n",
        "  redis.call('DEL', KEYS[1])\n",
        (
            "tests/plugins/rate_limit/test_token_bucket_shown.py::test_with_replicas_any_one_shows_what_all_took_and_a_reset_holds_for_all",
        ),
    ),
    Mutant(
        "a stream of messages that never ends is never cut",
        "qlens/metering_typed.py",
        "            self._ending = ending(self.reply.dialect)\n",
        "            self._ending = None\n",
        ("tests/core/test_metering_cut.py::test_the_anthropic_sdk_sees_a_message_that_reached_its_max_tokens",),
    ),
    Mutant(
        "a stream that was cut costs more than was reserved",
        "qlens/metering_typed.py",
        "return within(used, self.call.most_output or 0) if self.reply.cut else used",
        "return used",
        ("tests/core/test_metering_cut.py::test_the_anthropic_sdk_sees_a_message_that_reached_its_max_tokens",),
    ),
    Mutant(
        "leases beside a full bucket: what is leased may be used while its bucket refills",
        "plugins/qlens_plugins/rate_limit/token_bucket/plugin.py",
        "meter.room - lease(store, meter, processes)",
        "meter.room + lease(store, meter, processes)",
        ("tests/plugins/rate_limit/test_token_bucket_redis.py::test_leases_serve_the_bulk_and_the_edge_is_exact",),
    ),
    Mutant(
        "a bucket in the store that forgets digits",
        "plugins/qlens_plugins/rate_limit/token_bucket/script.py",
        "  local value = string.format('%.0f %.0f', now, missing[i])\n",
        "  local value = math.floor(now / 1000) * 1000 .. ' ' .. string.format('%.0f', missing[i])\n",
        ("tests/plugins/rate_limit/test_token_bucket_redis.py::test_the_script_decides_as_memory_does",),
    ),
    Mutant(
        "buckets are written before all have said yes",
        "plugins/qlens_plugins/rate_limit/token_bucket/script.py",
        "  if refused == 0 then\n    for i",
        "  if refused >= 0 then\n    for i",
        ("tests/plugins/rate_limit/test_token_bucket_redis.py::test_the_script_decides_as_memory_does",),
    ),
    Mutant(
        "what a call took before a bucket refused it is not given back",
        "plugins/qlens_plugins/rate_limit/token_bucket/memory.py",
        "                taken.level.full_at -= taken.quantity(tokens) * taken.unit\n",
        "                pass\n",
        ("tests/plugins/rate_limit/test_token_bucket.py::test_what_a_refused_call_is_told_has_nothing_taken_from_it",),
    ),
    Mutant(
        "an estimate gives tokens back",
        "plugins/qlens_plugins/rate_limit/token_bucket/plans.py",
        '    if difference >= 0 or usage.source == "provider":\n',
        "    if usage.total:\n",
        ("tests/plugins/rate_limit/test_token_bucket.py::test_an_estimate_never_gives_tokens_back",),
    ),
    Mutant(
        "without the store there is no limit",
        "plugins/qlens_plugins/rate_limit/token_bucket/shared.py",
        "            return self._take_alone(group, tokens, now)\n",
        "            return None\n",
        (
            "tests/plugins/rate_limit/test_token_bucket_redis.py::test_while_the_store_is_away_each_replica_enforces_its_share",
        ),
    ),
    Mutant(
        "leases that are not given back",
        "plugins/qlens_plugins/rate_limit/token_bucket/shared.py",
        "        owed_ps = (purse.owed - purse.units) * share.unit\n",
        "        owed_ps = purse.owed * share.unit\n",
        (
            "tests/plugins/rate_limit/test_token_bucket_redis.py::test_unused_units_go_back_when_their_lease_ends_and_at_the_end",
        ),
    ),
    Mutant(
        "a store that is slow is waited for",
        "qlens/stores/redis.py",
        "                await self._in_time(self._send_together(together))\n",
        "                await self._send_together(together)\n",
        ("tests/core/test_stores_redis.py::test_a_late_answer_is_read_by_nobody",),
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
        ("tests/core/test_realtime.py::test_a_provider_that_does_not_read_stops_the_client_from_sending",),
    ),
    Mutant(
        "a stream that is read on though its client does not read",
        "qlens/connection.py",
        "        return not connection._paused\n",
        "        return True\n",
        ("tests/core/test_slow_clients.py",),
    ),
    Mutant(
        "pages of browsers use a gateway without keys",
        "qlens/realtime.py",
        '    if "origin" not in call.headers:\n',
        "    if call.headers:\n",
        ("tests/core/test_realtime.py::test_a_page_in_a_browser_may_not_use_a_gateway_that_asks_for_no_key",),
    ),
    Mutant(
        "sessions pass by the guards",
        "qlens/realtime.py",
        '    pipeline.refuse_unseen("Realtime sessions are not served")\n',
        "",
        (
            "tests/core/test_realtime.py::test_a_guard_that_cannot_look_into_sessions_refuses_them_unless_told_to_let_them_pass",
        ),
    ),
    Mutant(
        "tokens of a session without a bound are not taken from the limit",
        "qlens/realtime.py",
        "    call.estimated_input = 1\n",
        "    call.estimated_input = 0\n",
        (
            "tests/core/test_realtime.py::test_tokens_of_a_session_are_taken_from_the_limit_when_it_ends_even_without_a_bound",
        ),
    ),
    Mutant(
        "a key follows a redirect",
        "qlens/websocket.py",
        "            middlewares=(_only_upgrades,),\n",
        "",
        ("tests/core/test_realtime.py::test_a_redirect_is_not_followed_with_the_gateways_key",),
    ),
    Mutant(
        "settle dropped when the client leaves",
        "qlens/account.py",
        "        finishing = run_apart(self._finish(error))\n",
        "        if isinstance(error, asyncio.CancelledError):\n            return\n"
        "        finishing = run_apart(self._finish(error))\n",
        ("tests/core/test_account.py::test_a_client_that_leaves_while_a_hook_waits_is_settled_once_as_abandoned",),
    ),
    Mutant(
        "settled twice",
        "qlens/pipeline.py",
        "        for hook in self.hooks.settle:\n",
        "        for hook in (*self.hooks.settle, *self.hooks.settle):\n",
        ("tests/core/test_pipeline.py::test_hooks_run_in_stage_order_and_then_in_the_order_of_the_file",),
    ),
    Mutant(
        "a hold is not given back",
        "qlens/pipeline.py",
        "receipt, account.holds.get(hook.instance)",
        "receipt, None",
        ("tests/core/test_pipeline.py::test_a_settle_that_fails_does_not_keep_the_others_from_settling",),
    ),
    Mutant(
        "another plugin's hold is given back",
        "qlens/pipeline.py",
        "account.holds[hook.instance] = hold",
        "account.holds = {bound.instance: hold for bound in self.hooks.admit}",
        ("tests/core/test_pipeline.py::test_a_settle_that_fails_does_not_keep_the_others_from_settling",),
    ),
    Mutant(
        "the upstream is not closed",
        "qlens/account.py",
        "                    await reply.aclose()\n",
        "                    pass\n",
        (
            "tests/core/test_account.py::test_a_stream_left_in_its_middle_closes_the_upstream_and_charges_what_was_delivered",
        ),
    ),
    Mutant(
        "settle is not shielded",
        "qlens/account.py",
        "        await asyncio.wait({finishing}, timeout=LEAVE_SECONDS if len(settling) <= MOST_LEAVING else None)\n",
        "        finishing.cancel()\n        await asyncio.wait({finishing}, timeout=LEAVE_SECONDS)\n",
        ("tests/core/test_pipeline.py::test_hooks_run_in_stage_order_and_then_in_the_order_of_the_file",),
    ),
    Mutant(
        "a settle that fails stops the others",
        "qlens/pipeline.py",
        "receipt, account.holds.get(hook.instance))\n            except (\n                Exception,\n                SystemExit,\n",
        "receipt, account.holds.get(hook.instance))\n            except (\n                KeyError,\n",
        ("tests/core/test_pipeline.py::test_a_hook_that_fails_by_itself_is_answered_by_its_kind_and_counted",),
    ),
    Mutant(
        "a broken auth plugin is a 401",
        "qlens/pipeline.py",
        'Unavailable("Authentication is unavailable.")',
        'Unauthenticated("Authentication is unavailable.")',
        ("tests/core/test_pipeline.py::test_a_hook_that_fails_by_itself_is_answered_by_its_kind_and_counted",),
    ),
    Mutant(
        "the usage event is not withheld",
        "qlens/metering.py",
        '        if not self.call.wants_usage:\n            return b""\n',
        "",
        ("tests/core/test_metering.py::test_at_every_cut_no_client_sees_an_event_without_choices_unless_it_asked",),
    ),
    Mutant(
        "an event without choices is passed on",
        "qlens/metering.py",
        '= payload, counts_of(usage)\n            return b""\n',
        "= payload, counts_of(usage)\n            return event\n",
        ("tests/core/test_metering.py::test_at_every_cut_no_client_sees_an_event_without_choices_unless_it_asked",),
    ),
    Mutant(
        "an event that looks much like others is not looked into",
        "qlens/metering_alike.py",
        "return None if _no_text_in(event, begin, end) or event[",
        "return None if event[",
        ("tests/core/test_metering.py::test_an_event_that_looks_much_like_others_is_looked_into",),
    ),
    Mutant(
        "what stands in the place of a padding is not looked into",
        "qlens/metering_alike.py",
        " or _no_text_in(event, padding, end):\n",
        ":\n",
        ("tests/core/test_metering.py::test_an_event_that_looks_much_like_others_is_looked_into",),
    ),
    Mutant(
        "texts that are kept together are not kept",
        "qlens/watching.py",
        "            self._kept.append(self._like.event(self._texts))\n",
        "",
        ("tests/core/test_metering.py::test_whatever_is_alike_all_of_it_passes_and_is_kept",),
    ),
    Mutant(
        "what came since a stream was last read is taken for nothing",
        "qlens/metering_length.py",
        "+ self._waiting_bytes + new <= self.most",
        "+ self._waiting_bytes <= self.most",
        ("tests/core/test_metering_length.py::test_an_endless_stream_of_tokens_is_cut_and_costs_what_was_reserved",),
    ),
    Mutant(
        "a request is sent with another one's headers",
        "qlens/upstream.py",
        "        key = method, url, tls, *headers, *headers.values()\n",
        "        key = method, url, tls, *headers\n",
        ("tests/core/test_upstream.py::test_requests_that_differ_in_one_header_or_the_body_are_told_apart",),
    ),
    Mutant(
        "a request that a provider may have billed is sent again unseen",
        "qlens/upstream.py",
        "                if not connection.unheard and method not in _IDEMPOTENT:\n",
        "                if False:\n",
        ("tests/core/test_upstream_kept.py::test_request_that_was_read_is_not_sent_again",),
    ),
    Mutant(
        "a kept connection that ended before the request arrived costs an attempt",
        "qlens/upstream_connection.py",
        "_unacknowledged(self._transport))",
        "False)",
        ("tests/core/test_upstream_kept.py::test_request_to_a_peer_that_has_just_gone_is_sent_again",),
    ),
    Mutant(
        "a request that the kernel refused counts as sent",
        "qlens/upstream_connection.py",
        "            self.unheard = True  # the kernel has not taken it\n",
        "            pass\n",
        ("tests/core/test_upstream_kept.py::test_request_to_a_peer_that_has_just_gone_is_sent_again",),
    ),
    Mutant(
        "a cut stream counts as complete",
        "qlens/metering.py",
        '            raise UpstreamTruncated("The provider\'s answer stopped before its end.")\n',
        "            pass\n",
        ("tests/core/test_metering.py::test_a_stream_cut_before_its_end_is_an_error_and_no_success",),
    ),
    Mutant(
        "missing usage is zero",
        "qlens/metering.py",
        "        return max(events - silent, text // BYTES_PER_TOKEN, 0)\n",
        "        return 0\n",
        ("tests/core/test_metering.py::test_missing_or_empty_usage_is_estimated_never_zero",),
    ),
    Mutant(
        "a server's keep-alives are paid for",
        "qlens/metering.py",
        'if not block.startswith(b":") and b"\\n:" not in block:',
        "if block:",
        ("tests/core/test_metering_said.py::test_comments_between_events_are_not_counted",),
    ),
    Mutant(
        "parts of a usage that is said twice are added up",
        "qlens/usage.py",
        "        input=prompt.input,\n",
        "        input=max(one.input, other.input),\n",
        SAID,
    ),
    Mutant(
        "a client is shown another usage than what is priced",
        "qlens/metering.py",
        " or counts_of(usage) != self._counts_there",
        "",
        SAID,
    ),
    Mutant(
        "what an early event says was used is all that a stream costs",
        "qlens/metering.py",
        "                    self._told_early = None if self._is_finished() else self._passed_with(passing)\n",
        "                    self._told_early = None\n",
        SAID,
    ),
    Mutant(
        "a completion that is not counted is exactly nothing",
        "qlens/usage.py",
        '            total, source = prompt, "estimated"\n',
        "            total = prompt\n",
        ("tests/core/test_usage.py",),
    ),
    Mutant(
        "a completion of nothing is believed of an answer that says something",
        "qlens/pipeline.py",
        '    return evolve(said, output=max(0, guess.output - said.completion), source="estimated")\n',
        "    return said\n",
        SAID,
    ),
    Mutant(
        "a failed attempt that says what it used is free",
        "qlens/account.py",
        "        if error.usage is not None and (error.usage.total or error.usage.meters):\n",
        "        if False:\n",
        SAID,
    ),
    Mutant(
        "an answer without choices is one",
        "qlens/exchange.py",
        "    if not items and name in _NEVER_EMPTY:\n",
        "    if False:\n",
        SAID,
    ),
    Mutant(
        "a provider's error event is forwarded",
        "qlens/metering.py",
        "            raise error_from(payload, None)\n",
        "            return event\n",
        ("tests/core/test_metering.py::test_an_error_event_of_the_provider_is_mapped_not_forwarded",),
    ),
    Mutant(
        "a client that leaves cuts off what its provider bills whole",
        "qlens/connection.py",
        "            if goes_on(call, task):\n",
        "            if goes_on(call, task) and False:\n",
        ("tests/core/test_drains.py::test_an_answer_whose_client_has_left_is_read_to_its_end_and_charged_exactly",),
    ),
    Mutant(
        "what nobody reads is not read to its end",
        "qlens/pipeline.py",
        "                        await account.read_on()\n",
        "                        pass\n",
        ("tests/core/test_drains.py::test_an_answer_whose_client_has_left_is_read_to_its_end_and_charged_exactly",),
    ),
    Mutant(
        "any number of calls is drained",
        "qlens/drains.py",
        "if len(self._timers) >= MOST_DRAINS:",
        "if len(self._timers) < 0:",
        ("tests/core/test_drains.py::test_what_comes_when_enough_is_drained_is_closed_and_charged_the_most",),
    ),
    Mutant(
        "a drain that lasts for ever",
        "qlens/drains.py",
        "call_later(DRAIN_SECONDS, task.cancel)",
        "call_later(1000 * DRAIN_SECONDS, task.cancel)",
        ("tests/core/test_drains.py::test_a_drain_is_bounded_in_time_and_then_charged_the_most",),
    ),
    Mutant(
        "a drain is not cut off when the gateway stops",
        "qlens/server.py",
        " | self.gateway.drains.running()",
        "",
        ("tests/core/test_drains.py::test_the_gateway_stops_when_drains_have_ended_or_its_time_is_over",),
    ),
    Mutant(
        "an answer that is not read to its end costs what came of it",
        "qlens/account.py",
        "                    not meter.reply.complete\n",
        "                    meter is None\n",
        ("tests/core/test_drains.py::test_a_drained_stream_that_breaks_is_charged_the_most",),
    ),
    Mutant(
        "who leaves before the answer pays nothing",
        "qlens/account.py",
        "attempt.billed, attempt.usage = True, most",
        "attempt.usage = most",
        ("tests/core/test_drains.py::test_an_answer_that_is_not_drained_is_closed_and_not_free",),
    ),
    Mutant(
        "what was not sent is charged",
        "qlens/account.py",
        "if is_unsent(error) or most is None",
        "if most is None",
        ("tests/core/test_drains.py::test_what_waits_for_a_connection_when_its_client_leaves_is_not_sent_and_free",),
    ),
    Mutant(
        "what waits for a connection is sent though its client has left",
        "qlens/pipeline.py",
        "if task in self.unsent or self.stopping():",
        "if self.stopping():",
        ("tests/core/test_drains.py::test_what_waits_for_a_connection_when_its_client_leaves_is_not_sent_and_free",),
    ),
    Mutant(
        "another target is asked for a client that has left",
        "qlens/drains.py",
        "    task.cancel()\n    await asyncio.sleep(0)\n",
        "    await asyncio.sleep(0)\n",
        ("tests/core/test_drains.py::test_nobody_else_is_asked_when_a_drained_attempt_fails",),
    ),
    Mutant(
        "the last answer is the call's, whichever its client gets",
        "qlens/account.py",
        "        if self._stage == _OPEN:\n",
        "        if True:\n",
        ("tests/core/test_hedges.py::test_a_stream_is_the_receipts_though_another_answers_while_it_runs",),
    ),
    Mutant(
        "an attempt that is not needed runs on",
        "qlens/account.py",
        "            await self._stop_asking()\n",
        "            pass\n",
        ("tests/core/test_hedges.py::test_the_faster_answer_is_the_receipts_and_the_slower_one_is_ended_and_not_free",),
    ),
    Mutant(
        "an abandoned stream is free",
        "qlens/account.py",
        "                if meter is None:\n                    continue\n                attempt.usage",
        "                if meter is None or error is not None:\n                    continue\n                attempt.usage",
        (
            "tests/core/test_account.py::test_a_stream_left_in_its_middle_closes_the_upstream_and_charges_what_was_delivered",
        ),
    ),
    Mutant(
        "an attempt that failed is billed",
        "qlens/account.py",
        "        attempt.upstream_id = error.upstream_id\n",
        "        attempt.upstream_id = error.upstream_id\n        attempt.billed = True\n",
        ("tests/core/test_attacks_account.py::test_an_attempt_that_was_refused_costs_nothing",),
    ),
    Mutant(
        "a target is asked twice without a retry plugin",
        "qlens/pipeline.py",
        "                if self.hooks.retry:\n                    wait",
        "                if len(call.attempts) < 3:\n                    resting.append((0.0, target))\n"
        "                if self.hooks.retry:\n                    wait",
        ("tests/core/test_pipeline.py::test_without_a_retry_plugin_each_target_is_tried_once",),
    ),
    Mutant(
        "a fallback the caller may not use is asked",
        "qlens/pipeline.py",
        "            if name in reached or model is None or not call.known.may_use(name):\n",
        "            if name in reached or model is None:\n",
        (
            "tests/core/test_pipeline.py::test_a_fallback_is_asked_when_all_targets_failed_and_only_if_the_caller_may_use_it",
        ),
    ),
    Mutant(
        "a model that is not allowed is told apart from an unknown one",
        "qlens/pipeline.py",
        "        if model is None or not (caller.models is None or caller.may_use(name)):\n            raise model_not_found(name)\n",
        '        if model is None:\n            raise model_not_found(name)\n        if not caller.may_use(name):\n            raise InvalidRequest("not allowed")\n',
        ("tests/core/test_server.py::test_unknown_and_not_allowed_models_get_the_same_answer",),
    ),
    Mutant(
        "max tokens are not clamped",
        "qlens/pipeline.py",
        "        asked = dialect.clamp(body, model.max_output_tokens, model.max_n)\n",
        "        _, asked = dialect.output_bound(body)\n",
        (
            "tests/core/test_attacks_account.py::test_a_fallback_is_asked_for_no_more_than_it_allows_and_the_bound_knows_the_most",
        ),
    ),
    Mutant(
        "attempts share one body",
        "qlens/call.py",
        "self._own = orjson.loads(orjson.dumps(self._given))",
        "self._own = self._given",
        ("tests/core/test_pipeline.py::test_each_attempt_gets_a_fresh_body_with_the_targets_own_model_and_params",),
    ),
    Mutant(
        "the body is read before authentication",
        "qlens/pipeline.py",
        "            call.caller = await self.authenticate(call)\n",
        "            await call.read()\n            call.caller = await self.authenticate(call)\n",
        ("tests/core/test_server.py::test_what_is_wrong_with_a_request_is_said_in_openais_words",),
    ),
    Mutant(
        "a cached answer is stored again",
        "qlens/pipeline.py",
        "                account.open(known)\n                return known\n",
        "                account.open(known)\n                await self.store(account.call, known)\n                return known\n",
        ("tests/core/test_pipeline.py::test_an_answer_from_lookup_skips_the_provider_and_costs_nothing",),
    ),
    Mutant(
        "an incomplete answer is stored",
        "qlens/watching.py",
        "        if not self.call.keep or self._kept_bytes > self.call.keep:\n",
        "        if not self.call.keep:\n",
        (
            "tests/core/test_metering.py::test_a_kept_answer_is_handed_over_before_the_end_mark_and_not_when_it_is_too_big",
        ),
    ),
    Mutant(
        "a local operation is not admitted",
        "qlens/pipeline.py",
        "        assert call.operation.local is not None\n        await self.admit(account)\n",
        "        assert call.operation.local is not None\n",
        ("tests/core/test_account.py::test_a_local_operation_is_admitted_and_settled_too",),
    ),
    Mutant(
        "a reload that fails leaves the new configuration half in place",
        "qlens/gateway.py",
        "            self._seen = old\n            await self._close(opened)\n            raise\n",
        "            await self._close(opened)\n            raise\n",
        ("tests/core/test_gateway.py::test_a_bad_configuration_is_refused_and_the_present_one_stays",),
    ),
    Mutant(
        "an old configuration is closed under its running calls",
        "qlens/gateway.py",
        "            await generation.settled()\n            self._older.remove",
        "            self._older.remove",
        ("tests/core/test_gateway.py::test_a_call_sees_one_configuration_to_its_end_and_the_old_one_closes_after_it",),
    ),
    Mutant(
        "an unchanged plugin loses its state on reload",
        "qlens/registry.py",
        "    if old is not None and instance.same(old):\n",
        "    if old is None and instance.same(old):\n",
        ("tests/core/test_gateway.py::test_an_unchanged_instance_moves_over_and_a_changed_one_adopts",),
    ),
    Mutant(
        "YAML order is turned round",
        "qlens/registry.py",
        "    for instance in instances:\n        manager.register",
        "    for instance in reversed(list(instances)):\n        manager.register",
        ("tests/core/test_pipeline.py::test_hooks_run_in_stage_order_and_then_in_the_order_of_the_file",),
    ),
    Mutant(
        "a role is not asked",
        "qlens/server.py",
        "call.scope = generation.roles.scope(call.caller, endpoint)\n",
        "call.scope = None\n",
        ("tests/contract/test_matrix.py::test_every_endpoint_asks_exactly_its_role",),
    ),
    Mutant(
        "the client's leaving goes unnoticed",
        "qlens/server.py",
        "handler_cancellation=True",
        "handler_cancellation=False",
        ("tests/core/test_account.py::test_a_client_that_leaves_while_a_hook_waits_is_settled_once_as_abandoned",),
    ),
    Mutant(
        "a failed stream ends as if it were complete",
        "qlens/connection.py",
        "await self._write(error_event(error, dialect, self.id))\n",
        'await self._write(error_event(error, dialect, self.id) + b"data: [DONE]\\n\\n")\n',
        (
            "tests/core/test_account.py::test_a_stream_that_outlives_the_deadline_ends_with_an_error_event_and_no_end_mark",
        ),
    ),
    Mutant(
        "a cache's nonsense is believed",
        "qlens/pipeline.py",
        "blame(returned.known(known, is_read=call.stream), partial(self.misguided, hook))",
        "known",
        ("tests/core/test_attacks_hooks.py::test_nonsense_from_a_hook_is_a_failure_of_that_hook",),
    ),
    Mutant(
        "a provider's nonsense is believed",
        "qlens/pipeline.py",
        "account.take(await provider.send.fn(call, target, outgoing))",
        "account.hold_open(await provider.send.fn(call, target, outgoing))",
        ("tests/core/test_attacks_hooks.py::test_nonsense_from_a_provider_is_502_after_the_next_target_was_asked",),
    ),
    Mutant(
        "a caller without a tenant is believed",
        "qlens/returned.py",
        " or not isinstance(value.tenant, str) or not value.tenant:",
        ":",
        ("tests/core/test_attacks_hooks.py::test_nonsense_from_a_hook_is_a_failure_of_that_hook",),
    ),
    Mutant(
        "less than nothing is charged",
        "qlens/returned.py",
        "(type(picos) is int and picos >= 0)",
        "type(picos) is int",
        ("tests/core/test_attacks_hooks.py::test_nonsense_from_a_hook_is_a_failure_of_that_hook",),
    ),
    Mutant(
        "a cancellation of a plugin's own work ends the call",
        "qlens/returned.py",
        "(Exception, SystemExit) if cancelled else (Exception, SystemExit, asyncio.CancelledError)",
        "(Exception, SystemExit)",
        ("tests/core/test_attacks_hooks.py::test_nonsense_from_a_hook_is_a_failure_of_that_hook",),
    ),
    Mutant(
        "a provider that breaks in its stream is the gateway's mistake",
        "qlens/watching.py",
        "        return isinstance(reason, CallError) or not isinstance(reason, mistakes())\n",
        "        return True\n",
        ("tests/core/test_attacks_hooks.py::test_a_stream_that_breaks_by_itself_is_the_providers_failure",),
    ),
    Mutant(
        "a call's deadline ends nothing",
        "qlens/deadlines.py",
        "            task.cancel()\n",
        "            pass\n",
        ("tests/core/test_account.py::test_the_calls_own_deadline_ends_it_as_failed_with_504",),
    ),
    Mutant(
        "retrying never ends",
        "qlens/pipeline.py",
        " or len(call.attempts) >= MOST_ATTEMPTS:",
        ":",
        ("tests/core/test_attacks_hooks.py::test_a_retry_that_always_says_yes_comes_to_an_end",),
    ),
    Mutant(
        "only the last answer is closed",
        "qlens/account.py",
        "        opened.append(reply)\n",
        "        opened[:] = [reply]\n",
        ("tests/core/test_attacks_account.py::test_an_answer_that_a_plugin_drops_is_closed_and_billed_for_what_it_is",),
    ),
    Mutant(
        "every stream is billed by the last one's meter",
        "qlens/account.py",
        "meter = self.meters.get(place)\n",
        "meter = next(reversed(self.meters.values()), None)\n",
        ("tests/core/test_attacks_account.py::test_an_answer_that_a_plugin_drops_is_closed_and_billed_for_what_it_is",),
    ),
    Mutant(
        "an upstream that hangs while closing keeps the receipt",
        "qlens/account.py",
        "asyncio.timeout(CLOSE_SECONDS)",
        "asyncio.timeout(None)",
        ("tests/core/test_attacks_account.py::test_an_upstream_that_does_not_close_well_settles_all_the_same",),
    ),
    Mutant(
        "a fallback is asked for more than it allows",
        "qlens/pipeline.py",
        "        dialects.named(dialect).clamp(body, model.max_output_tokens, model.max_n)\n",
        "        pass\n",
        (
            "tests/core/test_attacks_account.py::test_a_fallback_is_asked_for_no_more_than_it_allows_and_the_bound_knows_the_most",
        ),
    ),
    Mutant(
        "the bound forgets fallbacks",
        "qlens/pipeline.py",
        "_most_output(self.reachable(call))",
        "model.max_output_tokens",
        (
            "tests/core/test_attacks_account.py::test_a_fallback_is_asked_for_no_more_than_it_allows_and_the_bound_knows_the_most",
        ),
    ),
    Mutant(
        "a provider's error code becomes a label",
        "qlens/metrics.py",
        "attempt.error if attempt.error in _RESULTS else OTHER",
        "attempt.error",
        (
            "tests/core/test_attacks_account.py::test_a_provider_cannot_make_endless_metrics_with_the_codes_of_its_errors",
        ),
    ),
    Mutant(
        "an error is written into an answer that is whole",
        "qlens/connection.py",
        "        if not self.begun:\n            await self.whole(",
        "        if not self.begun or not self._events:\n            await self.whole(",
        ("tests/core/test_attacks_http.py::test_a_deadline_in_the_middle_of_a_body_adds_nothing_to_it",),
    ),
    Mutant(
        "a plugin's headers are sent whatever they are",
        "qlens/heads.py",
        "        if lower not in without and _may_be_sent(lower) and not _UNSENDABLE.search(value):\n",
        "        if lower not in without:\n",
        ("tests/core/test_attacks_http.py::test_a_header_of_a_provider_that_cannot_be_sent_is_left_out",),
    ),
    Mutant(
        "a body that is waited for in one go may take for ever",
        "qlens/connection.py",
        "                if due <= loop.time():\n",
        "                if due <= 0:\n",
        ("tests/core/test_server.py::test_a_body_may_take_the_longer_the_more_of_it_is_there",),
    ),
    Mutant(
        "an endpoint may take for ever",
        "qlens/server.py",
        "            async with asyncio.timeout_at(call.deadline) as timer:\n",
        "            async with asyncio.timeout(None) as timer:\n",
        ("tests/core/test_attacks_http.py::test_an_endpoint_that_hangs_ends_at_the_calls_deadline",),
    ),
    Mutant(
        "a stream in HTTP/1.0 has no end",
        "qlens/connection.py",
        "            self.keep_alive = False  # a client of HTTP/1.0",
        "            pass  # a client of HTTP/1.0",
        ("tests/core/test_attacks_http.py::test_http_1_0_gets_a_stream_that_ends_with_the_connection",),
    ),
    Mutant(
        "a client that takes nothing is waited for",
        "qlens/server.py",
        "round(STALL_SECONDS * 1000)",
        "0",
        ("tests/core/test_attacks_http.py::test_a_client_that_never_reads_is_given_up",),
    ),
    Mutant(
        "a lifespan that hangs keeps the others open",
        "qlens/gateway.py",
        "asyncio.wait({self._task}, timeout=CLOSE_SECONDS)",
        "asyncio.wait({self._task})",
        ("tests/core/test_attacks_life.py::test_a_lifespan_that_does_not_close_well_keeps_no_other_from_closing",),
    ),
    Mutant(
        "a settle that hangs keeps the process alive",
        "qlens/gateway.py",
        "            await asyncio.wait_for(self.settled(), SETTLE_SECONDS)\n",
        "            await self.settled()\n",
        ("tests/core/test_attacks_life.py::test_a_settle_that_hangs_does_not_keep_the_gateway_from_stopping",),
    ),
    Mutant(
        "a name that begins like a loopback address is taken for one",
        "qlens/registry.py",
        '    try:\n        return host == "localhost"',
        '    if host.startswith("127."):\n        return True\n    try:\n        return host == "localhost"',
        ("tests/core/test_attacks_life.py::test_only_addresses_of_this_machine_are_taken_for_it",),
    ),
    Mutant(
        "a model's id is not escaped once more in the canonical request",
        "plugins/qlens_plugins/provider/bedrock/signing.py",
        '    return quote(path, safe="/~")\n',
        "    return path\n",
        (
            "tests/plugins/provider/bedrock/test_pitfalls.py::test_pitfall_38_an_arn_is_one_escaped_segment_and_its_signature_is_right",
        ),
    ),
    Mutant(
        "Bedrock is asked to count for a profile",
        "plugins/qlens_plugins/provider/bedrock/counting.py",
        "quote(model.base, safe='')",
        "quote(model.text, safe='')",
        ("tests/plugins/provider/bedrock/test_counting.py::test_counted_is_for_the_model_behind_a_profile",),
    ),
    Mutant(
        "what passes through to Bedrock has no price",
        "plugins/qlens_plugins/provider/bedrock/passing.py",
        "reply.usage, reply.target = meter.usage, asked",
        "reply.usage = meter.usage",
        ("tests/plugins/provider/bedrock/test_passing.py::test_awss_sdk_converses_through_the_gateway",),
    ),
    Mutant(
        "thoughts are counted twice",
        "plugins/qlens_plugins/provider/bedrock/usage.py",
        "    output -= reasoning\n",
        "",
        (
            "tests/plugins/provider/bedrock/test_reasoning.py::test_how_many_tokens_are_thoughts_is_said_where_it_is_known",
        ),
    ),
    Mutant(
        "what was read from Bedrock's cache is billed as fresh input",
        "plugins/qlens_plugins/provider/bedrock/usage.py",
        '        cached_input=_count(raw, "cacheReadInputTokens") or 0,\n',
        "        cached_input=0,\n",
        ("tests/plugins/provider/bedrock/test_pitfalls.py::test_pitfall_05_prompt_tokens_include_what_was_cached",),
    ),
    Mutant(
        "a stream of Bedrock that stops early counts as complete",
        "plugins/qlens_plugins/provider/bedrock/converse.py",
        "        if self.writer.finish is None or not self._reader.is_between:\n",
        "        if not self._reader.is_between:\n",
        ("tests/plugins/provider/bedrock/test_pitfalls.py::test_pitfall_12_a_truncated_stream_is_no_success",),
    ),
    Mutant(
        "calls of tools are counted by Bedrock's blocks",
        "plugins/qlens_plugins/provider/bedrock/converse_stream.py",
        '        self._parts[block] = _Part("call", self._calls)\n',
        '        self._parts[block] = _Part("call", block)\n',
        (
            "tests/plugins/provider/bedrock/test_pitfalls.py::test_pitfalls_28_and_29_each_call_has_its_own_index_counted_over_calls_alone",
        ),
    ),
    Mutant(
        "an exception as a stream's first frame is met after the status was sent",
        "plugins/qlens_plugins/provider/bedrock/converse.py",
        '            if event_name(frame) != "messageStart":\n',
        '            if frame.headers.get(":event-type") != "messageStart":\n',
        (
            "tests/plugins/provider/bedrock/test_pitfalls.py::test_pitfall_11_an_exception_as_the_first_frame_lets_the_next_target_answer",
        ),
    ),
    Mutant(
        "expired credentials are not renewed",
        "plugins/qlens_plugins/provider/bedrock/exchange.py",
        "            if not await self.credentials.renew(proof):\n                raise\n",
        "            raise\n",
        (
            "tests/plugins/provider/bedrock/test_credentials.py::test_a_credential_refused_as_expired_is_renewed_once_and_the_call_sent_again",
        ),
    ),
    Mutant(
        "a client replaces the operator's guardrail",
        "plugins/qlens_plugins/provider/bedrock/converse_request.py",
        "        if asked is not None:\n            raise",
        "        if asked is None:\n            raise",
        (
            "tests/plugins/provider/bedrock/test_chat.py::test_a_client_chooses_a_guardrail_only_where_none_is_configured",
        ),
    ),
    Mutant(
        "a signature outlives its access key",
        "plugins/qlens_plugins/provider/bedrock/signing.py",
        "        if second != self._second or keys is not self._keys:\n",
        "        if second != self._second:\n",
        (
            "tests/plugins/provider/bedrock/test_signing.py::test_what_is_remembered_does_not_outlive_the_day_nor_the_key",
        ),
    ),
    Mutant(
        "a system prompt within a plain chat is moved to its beginning",
        "plugins/qlens_plugins/provider/bedrock/messages.py",
        "        elif role in _OPENING and not turns and family.system:\n",
        "        elif role in _OPENING and family.system:\n",
        ("tests/plugins/provider/bedrock/test_properties.py::test_a_plain_chat_is_written_as_one_that_is_not",),
    ),
    Mutant(
        "results of tools stand where they were said",
        "plugins/qlens_plugins/provider/bedrock/messages.py",
        "        entries.sort(key=_rank)\n",
        "        pass\n",
        (
            "tests/plugins/provider/bedrock/test_pitfalls.py::test_pitfall_26_results_of_parallel_calls_stand_in_one_message_in_front_of_what_follows",
        ),
    ),
    Mutant(
        "encrypted reasoning names no account",
        "qlens/objects.py",
        "            return self.content(text) if text else text\n",
        "            return text\n",
        ("tests/core/test_objects.py::test_reasoning_goes_back_to_its_account_whoever_is_asked_first",),
    ),
    Mutant(
        "reasoning that is kept under its id names no account",
        "qlens/objects.py",
        '                node["encrypted_content"] = self.content("")\n',
        "                pass\n",
        ("tests/core/test_objects.py::test_reasoning_that_is_kept_under_its_id_goes_back_too",),
    ),
    Mutant(
        "encrypted reasoning goes to any account",
        "qlens/objects.py",
        '            self._bound(Origin(latest.provider, "", ""), latest.param)\n',
        "            pass\n",
        ("tests/core/test_objects.py::test_after_a_change_of_models_the_others_reasoning_is_left_out",),
    ),
    Mutant(
        "another tenant's encrypted reasoning is read",
        "qlens/object_ids.py",
        "        return (provider, content) if hmac.compare_digest(code, expected) else None\n",
        "        return provider, content\n",
        ("tests/core/test_objects.py::test_another_tenant_cannot_have_it_read",),
    ),
    Mutant(
        "what goes on in the background costs nothing",
        "qlens/pipeline.py",
        "output=max(guess.output, call.bound.output)",
        "output=guess.output",
        ("tests/core/test_objects.py::test_what_goes_on_in_the_background_is_charged_as_the_most_it_can_be",),
    ),
    Mutant(
        "a response of a deployment with codex is asked for behind an api-version without Responses",
        "plugins/qlens_plugins/provider/azure_openai/plugin.py",
        '{"responses": self._responses_query, "vector_stores": self._newest_query}',
        '{"vector_stores": self._newest_query}',
        (
            "tests/plugins/provider/azure_openai/test_responses.py::test_the_model_and_the_api_version_say_how_it_is_asked",
        ),
    ),
    Mutant(
        "a gateway whose plugins share a database loses its log to the next command",
        "qlens/stores/sqlite.py",
        "        if not path.exists():\n            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))\n",
        "        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))\n",
        ("tests/core/test_stores_sqlite.py::test_other_processes_that_come_and_go_leave_the_log_of_those_who_stay",),
    ),
    Mutant(
        "schemas of functions become strict where a chat is asked by Responses",
        "qlens/bridges/chat_over_responses/request.py",
        '            "strict": bool(function.get("strict")),\n',
        '            **({"strict": True} if function.get("strict") else {}),\n',
        ("tests/core/bridges/test_chat_over_responses.py::test_tools_are_flat_and_as_strict_as_chat_has_them",),
    ),
    Mutant(
        "a chat asked by Responses is kept by the provider",
        "qlens/bridges/chat_over_responses/request.py",
        ', "store": False}',
        "}",
        ("tests/core/bridges/test_chat_over_responses.py::test_nothing_is_kept_there",),
    ),
    Mutant(
        "a session that transcribes does so by whatever model the client names",
        "qlens/transcription.py",
        '            heard["model"] = model\n',
        "            pass\n",
        ("tests/core/test_realtime.py::test_a_session_that_only_transcribes_keeps_to_the_model_it_was_let_in_for",),
    ),
    Mutant(
        "who gets a kept answer that passes pays what it used once more",
        "qlens/metering_passed.py",
        '    if meter is None or call.operation.method != "POST":\n',
        "    if meter is None:\n",
        ("tests/core/test_metering_passed.py::test_what_is_there_already_is_not_paid_for_once_more",),
    ),
    Mutant(
        "who cancels an answer that passes pays what it used once more",
        "qlens/metering_passed.py",
        'type(body) is not dict or unnamed.answer_of(body).get("id") in self.path.split("/"):',
        "type(body) is not dict:",
        ("tests/core/test_metering_passed.py::test_what_is_there_already_is_not_paid_for_once_more",),
    ),
    Mutant(
        "what passes is billed as the model that was asked for, whichever answered",
        "qlens/models.py",
        "        if not (name := said or asked):\n",
        "        if not (name := asked or said):\n",
        (
            "tests/core/test_metering_passed.py::test_the_price_is_that_of_the_model_that_answered_or_else_of_the_one_that_was_asked",
        ),
    ),
    Mutant(
        "what the params of a target ask for is not reserved",
        "qlens/pipeline.py",
        "            raise_bound(call, dialect, raises, most)\n",
        "            raise_bound(call, dialect, [], most)\n",
        ("tests/core/test_raised.py",),
    ),
    Mutant(
        "parts that nobody knows pass a hard budget",
        "qlens/dialects/chat.py",
        'return known if known or part["type"] in _WORDS else [texts.UNKNOWN]',
        "return known",
        ("tests/plugins/cost/test_budgets_unknown.py",),
    ),
    Mutant(
        "items that nobody knows pass a hard budget",
        "qlens/dialects/responses.py",
        "            yield _MEDIA.get(kind, texts.UNKNOWN)\n",
        "            yield from [_MEDIA[kind]] if kind in _MEDIA else []\n",
        ("tests/plugins/cost/test_budgets_unknown.py",),
    ),
    Mutant(
        "a guard rewrites names of tools and signed thoughts",
        "qlens/call.py",
        "        if type(ref) is dialects.Fixed:\n",
        "        if False:\n",
        ("tests/plugins/guard/test_pattern_unseen.py",),
    ),
    Mutant(
        "descriptions of tools are not seen by guards",
        "qlens/dialects/chat.py",
        "            texts.describe(value, (name,), found)\n",
        "            pass\n",
        ("tests/plugins/guard/test_pattern_unseen.py",),
    ),
    Mutant(
        "arrays of tokens pass by the guards",
        "qlens/pipeline.py",
        '            self.refuse_unseen("Arrays of tokens are not taken", of_request=field)\n',
        "            pass\n",
        ("tests/plugins/guard/test_pattern_unseen.py",),
    ),
    Mutant(
        "a path that is taken is found when it is served",
        "qlens/cli.py",
        "        paths_of(gateway, registration)\n",
        "        pass\n",
        ("tests/core/test_cli.py",),
    ),
    Mutant(
        "a store whose address is in a variable cannot be checked",
        "qlens/config/strict.py",
        "            self._keeps = True\n",
        "            self._keeps = False\n",
        ("tests/core/test_cli.py",),
    ),
    Mutant(
        "items are put into conversations unseen by guards",
        "qlens/affinity.py",
        '        pipeline.refuse_unseen("Conversations cannot be filled")\n',
        "        pass\n",
        ("tests/core/test_collections.py::test_no_guard_is_passed_by_way_of_a_conversation",),
    ),
    Mutant(
        "speech is asked of Azure by an api-version that lacks it",
        "plugins/qlens_plugins/provider/azure_openai/plugin.py",
        '_IN_PREVIEWS = frozenset({"image_edits", "speech"})',
        '_IN_PREVIEWS = frozenset({"image_edits"})',
        ("tests/plugins/provider/test_golden.py::test_azure_openai[audio: spoken]",),
    ),
    Mutant(
        "a response of Azure is asked for at a deployment's path",
        "plugins/qlens_plugins/provider/azure_openai/plugin.py",
        'return f"{self._root}/{PATHS[dialect]}{self._responses_query}"',
        'return f"{self._place}{PATHS[dialect]}{self._responses_query}"',
        ("tests/plugins/provider/test_golden.py::test_azure_openai[responses: whole]",),
    ),
    Mutant(
        "a model at Bedrock that is not ready is a failure like any other",
        "plugins/qlens_plugins/provider/bedrock/failures.py",
        '"The model is not ready yet.", code="model_not_ready", retry_after=THROTTLED_SECONDS',
        '"The model is not ready yet."',
        ("tests/plugins/provider/test_golden_errors.py::test_bedrock[errors: ModelNotReadyException]",),
    ),
    Mutant(
        "what Bedrock read from a cache is counted in one of its spellings only",
        "plugins/qlens_plugins/provider/bedrock/usage.py",
        "        value = raw.get(_OLDER[name])\n",
        '        value = raw.get(_OLDER[name] if "cache" not in name else name)\n',
        ("tests/plugins/provider/bedrock/test_pitfalls.py::test_pitfall_08_both_spellings_of_counts_are_read",),
    ),
    Mutant(
        "the tool by which a model fits a schema is shown among its calls",
        "plugins/qlens_plugins/provider/bedrock/converse_stream.py",
        '            self._parts[block] = _Part("helper")\n            return b""\n',
        '            self._parts[block] = _Part("helper")\n            self._calls += 1\n            return b""\n',
        (
            "tests/plugins/provider/bedrock/test_pitfalls.py::test_pitfall_29_the_tool_by_which_a_model_fits_a_schema_is_not_among_the_calls",
        ),
    ),
    Mutant(
        "what a model says beside the tool that gives its answer is in the answer of a stream",
        "plugins/qlens_plugins/provider/bedrock/converse_stream.py",
        '            return b"" if self._helped else chunk\n',
        "            return chunk\n",
        (
            "tests/plugins/provider/bedrock/test_formats.py::test_what_the_model_says_beside_the_tool_is_not_in_the_answer",
        ),
    ),
    Mutant(
        "a property that is called like a keyword is lost from a schema with references",
        "plugins/qlens_plugins/provider/bedrock/schemas.py",
        "        if name in _NAMED and isinstance(value, dict):\n            self._grow(1, depth)\n",
        "        if False:\n            self._grow(1, depth)\n",
        (
            "tests/plugins/provider/bedrock/test_formats.py::test_a_property_may_be_called_like_what_holds_definitions_and_values_are_not_rewritten",
        ),
    ),
    Mutant(
        "a mistake in a provider's plugin closes its target to everybody",
        "plugins/qlens_plugins/route/circuit_breaker.py",
        "    if isinstance(error.__cause__, _OF_CODE) and call.attempts and call.attempts[-1].error == _FAILED:\n",
        "    if False:\n",
        (
            "tests/plugins/route/test_circuit_breaker.py::test_a_mistake_in_a_providers_plugin_does_not_close_its_target_to_everybody",
        ),
    ),
    Mutant(
        "a variable of the environment leads past the FIPS endpoint",
        "plugins/qlens_plugins/provider/bedrock/endpoints.py",
        "if not config.fips and (given := _given()) is not None:",
        "if (given := _given()) is not None:",
        ("tests/plugins/provider/bedrock/test_chat.py::test_the_address_may_stand_in_awss_own_variables",),
    ),
    Mutant(
        "who asks for a response again pays for a request",
        "plugins/qlens_plugins/cost/prices/plugin.py",
        "if sheet.by_request and (call.operation.meters or _has_passed(call, usage)):\n",
        "if sheet.by_request:\n",
        METERS,
    ),
    Mutant(
        "what is billed by the character is billed by tokens as well",
        "plugins/qlens_plugins/cost/prices/book.py",
        "            lines.clear()\n",
        "            pass\n",
        (
            "tests/plugins/cost/test_prices_meters.py::test_a_model_that_is_billed_by_the_request_alone_needs_no_price_of_tokens",
        ),
    ),
    Mutant(
        "any row is enough for a strict price table",
        "plugins/qlens_plugins/cost/prices/plugin.py",
        "if not ways or all(any(sheet.bills(way) for way in ways) for sheet in sheets):\n",
        "if not ways or all(sheet.entries for sheet in sheets):\n",
        (
            "tests/plugins/cost/test_prices_meters.py::test_a_strict_table_wants_a_price_of_what_the_operation_is_billed_by",
        ),
    ),
    Mutant(
        "a batch is in the ledger for each time somebody asks for it",
        "qlens/batches.py",
        "    code = int.from_bytes(hashlib",
        "    whose = (*whose, str(time.time_ns()))\n    code = int.from_bytes(hashlib",
        (
            "tests/plugins/cost/test_ledger_batches.py::test_a_batch_is_in_the_ledger_once_however_many_ask_for_it_where_and_when",
        ),
    ),
    Mutant(
        "the lines of a batch are one long prompt",
        "qlens/batches.py",
        "        return whole if picos == whole.picos else Cost(picos",
        "        return whole if whole.picos is not None else Cost(picos",
        ("tests/plugins/cost/test_ledger_batches.py::test_the_lines_of_a_batch_are_not_one_long_prompt",),
    ),
    Mutant(
        "nobody is told of calls that a killed process had in flight",
        "plugins/qlens_plugins/cost/ledger/source.py",
        "                self._untold.setdefault(record.id, record)\n",
        "                pass\n",
        (
            "tests/plugins/cost/test_ledger_spool.py::test_calls_of_a_dead_process_are_told_to_those_that_opened_after_the_ledger",
        ),
    ),
    Mutant(
        "nobody is told of the last receipt that a killed process wrote down",
        "plugins/qlens_plugins/cost/ledger/source.py",
        "                self._hold(record)\n",
        "                pass\n",
        (
            "tests/plugins/cost/test_ledger_spool.py::test_calls_of_a_dead_process_are_told_to_those_that_opened_after_the_ledger",
        ),
    ),
    Mutant(
        "what a killed process left goes before it is told",
        "plugins/qlens_plugins/cost/ledger/source.py",
        " and self._kept[0] not in self._untold:\n",
        ":\n",
        (
            "tests/plugins/cost/test_ledger_spool.py::test_calls_of_a_dead_process_are_told_to_those_that_opened_after_the_ledger",
        ),
    ),
    Mutant(
        "what a killed process left is told while nobody listens yet",
        "plugins/qlens_plugins/cost/ledger/writer.py",
        "        if not news.is_due:\n",
        "        if news.is_due is None:\n",
        (
            "tests/plugins/cost/test_ledger_spool.py::test_calls_of_a_dead_process_are_told_to_those_that_opened_after_the_ledger",
        ),
    ),
    Mutant(
        "a receipt leaves the spool before all plugins have had it",
        "plugins/qlens_plugins/cost/ledger/writer.py",
        "            self.news.come_round()\n",
        "            pass\n",
        ("tests/plugins/cost/test_ledger_spool.py::test_a_receipt_leaves_the_spool_when_all_plugins_have_had_it",),
    ),
    Mutant(
        "a call that has ended is told to be interrupted",
        "plugins/qlens_plugins/cost/ledger/news.py",
        " AND error = 'interrupted'",
        "",
        (
            "tests/plugins/cost/test_ledger_spool.py::test_a_call_whose_beginning_was_carried_behind_its_end_is_not_told_to_have_failed",
        ),
    ),
    Mutant(
        "a batch whose receipt was deleted is counted again",
        "plugins/qlens_plugins/cost/ledger/plugin.py",
        "if not self._is_forgotten(receipt) and not writer.keep(receipt):\n",
        "if not writer.keep(receipt):\n",
        ("tests/plugins/cost/test_ledger_batches.py::test_a_batch_whose_receipt_was_forgotten_is_not_counted_again",),
    ),
    Mutant(
        "what a Redis that others have begun anew was not told is missing where budgets are shown",
        "plugins/qlens_plugins/cost/budgets/script.py",
        "if epoch ~= ARGV[1] and ARGV[1] ~= '-' then return {'epoch', epoch} end\n",
        "",
        (
            "tests/plugins/cost/test_budgets_aliases.py::test_a_redis_that_another_gateway_has_begun_anew_is_told_all_before_it_is_asked",
        ),
    ),
    Mutant(
        "half of a table of prices is taken while it is written",
        "plugins/qlens_plugins/cost/prices/plugin.py",
        "if now == self._seen or is_being_written(file, now):\n",
        "if now == self._seen:\n",
        ("tests/plugins/cost/test_prices.py::test_a_file_that_is_being_written_prices_nothing",),
    ),
    Mutant(
        "a ledger is closed before its thread has returned",
        "plugins/qlens_plugins/cost/ledger/writer.py",
        "        if done and self._thread is not None:",
        "        if False:",
        ("tests/plugins/cost/test_ledger.py::test_no_thread_outlives_a_gateway_or_a_start_that_fails",),
    ),
    Mutant(
        "names without data and blank lines hide what is said from a budget",
        "qlens/metering.py",
        'return min(sse.count(block), block.count(b"data:")), len(block)',
        "return sse.count(block), len(block)",
        ("tests/core/test_metering_length.py::test_no_stream_is_endless_whatever_its_events_look_like",),
    ),
    Mutant(
        "days are not summed up with their hours",
        "plugins/qlens_plugins/cost/ledger/sqlite/writing.py",
        "(start // DAY * DAY, *sums)",
        "(start, *sums)",
        ("tests/plugins/cost/test_ledger_rollups.py",),
    ),
    Mutant(
        "the arguments of a tool are looked at as they are spelled",
        "qlens/dialects/jsons.py",
        "return ref[-1] in _TOLD_IN_JSON or (len(strand) > 1 and strand[1] in _TOLD_IN_JSON)",
        "return False",
        ("tests/plugins/guard/test_pattern_arguments.py",),
    ),
    Mutant(
        "a thought that was rewritten keeps its signature",
        "qlens/dialects/rewrite.py",
        "            signed.unsign(body, ref, whole=whole)\n",
        "            pass\n",
        ("tests/plugins/guard/test_pattern_thoughts.py",),
    ),
    Mutant(
        "usage is asked of receipts that were deleted",
        "plugins/qlens_plugins/cost/ledger/summary.py",
        "kept.read(database, question)",
        "sums.read(database, question)",
        ("tests/plugins/cost/test_ledger_kept.py",),
    ),
    Mutant(
        "an event that is not taken holds up all others",
        "plugins/qlens_plugins/observe/nats/source.py",
        "if message.subject not in taken]\n",
        "if message.subject not in taken and False]\n",
        (
            "tests/plugins/observe/test_nats.py::test_what_the_stream_does_not_take_holds_up_no_others_and_comes_when_it_does",
        ),
    ),
    Mutant(
        "an output that could not be read is not read again",
        "qlens/batches.py",
        "            self.pipeline.batches_read.discard(self.own)\n",
        "",
        (
            "tests/plugins/cost/test_ledger_batches.py::test_an_output_that_cannot_be_read_is_read_when_somebody_asks_again",
        ),
    ),
    Mutant(
        "refused calls are no errors in the summary",
        "plugins/qlens_plugins/cost/ledger/summary.py",
        'found["failed"] + turned_away, calls + turned_away',
        'found["failed"], calls + turned_away',
        ("tests/plugins/cost/test_ledger_summary.py::test_who_is_refused_is_an_error_where_that_is_known",),
    ),
    Mutant(
        "pictures that are billed by tokens are not counted",
        "plugins/qlens_plugins/cost/ledger/rollups.py",
        '"images": ("images", "output_images"),\n',
        '"images": ("images",),\n',
        ("tests/plugins/cost/test_ledger_summary.py::test_pictures_are_counted_where_tokens_are_billed_for_them",),
    ),
    Mutant(
        "a gateway writes to tables that are no longer for it",
        "qlens/stores/sqlite.py",
        "    if (found[1] if found else version) > known:\n",
        "    if False:\n",
        ("tests/core/test_stores_sqlite.py::test_an_older_version_is_upgraded_and_a_newer_one_left_alone",),
    ),
    Mutant(
        "a newer version that disturbs nobody stops older gateways",
        "qlens/stores/sqlite.py",
        """        oldest = "ifnull(oldest, version)" if _has_oldest(database) else "version"\n""",
        """        oldest = "version"\n""",
        ("tests/core/test_stores_sqlite.py::test_a_newer_version_s_tables_are_used_by_those_for_whom_they_are",),
    ),
    Mutant(
        "a backup has nothing of receipts that were deleted",
        "plugins/qlens_plugins/cost/ledger/backup.py",
        "        yield Batch(number, (), {}, found_rests)\n",
        "        continue\n",
        (
            "tests/plugins/cost/test_ledger_upkeep.py::test_what_roll_ups_say_of_deleted_receipts_comes_back_into_either_database",
        ),
    ),
    Mutant(
        "a backup is restored on top of roll-ups",
        "plugins/qlens_plugins/cost/ledger/backup.py",
        "                              UNION ALL SELECT 1 FROM usage_groups LIMIT 1) AS found),\n",
        "                              LIMIT 1) AS found),\n",
        ("tests/plugins/cost/test_ledger_upkeep.py::test_a_ledger_with_roll_ups_alone_is_not_empty",),
    ),
    Mutant(
        "a deployment that drifts is hidden by the others of its model",
        "plugins/qlens_plugins/cost/ledger/reconcile_report.py",
        "self.found.models), *parts)))\n",
        "self.found.models))))\n",
        (
            "tests/plugins/cost/test_reconcile_deployments.py::test_deployments_in_several_accounts_of_azure_are_compared_each_for_itself",
        ),
    ),
)


def judged(mutant: Mutant, clean: Path) -> Verdict:
    """Run the tests against a copy of the clean tree that has this fault."""
    with tempfile.TemporaryDirectory(prefix="qlens-mutant-") as name:
        # Linked, for copying takes as long as many a test: what is written to must be a file of its own.
        unlinked = shutil.ignore_patterns(".pytest_cache")
        copy = Path(shutil.copytree(clean, Path(name) / "tree", symlinks=True, ignore=unlinked, copy_function=os.link))
        target = copy / mutant.path
        text = target.read_text()
        if text.count(mutant.old) != 1:
            return Verdict(f"{mutant.path} has the text {text.count(mutant.old)} times: mend the mutant")
        target.unlink()
        target.write_text(text.replace(mutant.old, mutant.new))
        for run in range(1, RUNS + 1):
            done = _pytest(copy, "-x", *mutant.tests)
            if done.returncode == 1:
                return Verdict(noticed_by=tuple(json.loads((copy / FAILED).read_text())), runs=run)
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
    workers = (os.cpu_count() or 1) * 3 // 2  # for many a fault makes its test wait
    with tempfile.TemporaryDirectory(prefix="qlens-clean-") as name, ThreadPoolExecutor(workers) as pool:
        clean = _clean_tree(Path(name), {test for mutant in chosen for test in mutant.tests})
        verdicts = list(pool.map(judged, chosen, repeat(clean)))
        # Without any fault, all that noticed one must be green: else it is not the fault that they noticed.
        noticed_by = sorted({test for verdict in verdicts for test in verdict.noticed_by})
        parts = [noticed_by[start::workers] for start in range(min(workers, len(noticed_by)))]
        controls = list(pool.map(lambda part: _pytest(clean, *part), parts))
    for mutant, verdict in zip(chosen, verdicts, strict=True):
        print(verdict.of(mutant))
    if red := [control for control in controls if control.returncode != 0]:
        print(*(control.stdout[-2000:] for control in red), sep="\n")
        print("the tests are red without any fault: no verdict holds")
        return 1
    alive = sum(bool(verdict.survives) for verdict in verdicts)
    print(f"{len(chosen) - alive} of {len(chosen)} mutants killed")
    return 1 if alive else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
