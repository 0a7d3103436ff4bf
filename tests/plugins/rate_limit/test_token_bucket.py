"""The plugin `token_bucket`: what it lets pass, what it holds, and what it gives back."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlens import (
    FREE,
    Attempt,
    Call,
    Caller,
    Gateway,
    Model,
    RateLimited,
    Receipt,
    StartupError,
    Target,
    Usage,
)
from qlens.call import Outcome
from qlens.cli import main
from qlens.operations import OPERATIONS
from qlens.testing import ManualClock, Response, Running, Scripted, check_plugin, running, upstream
from qlens_plugins.rate_limit.token_bucket import Rule, TokenBucket, TokenBucketConfig
from qlens_plugins.rate_limit.token_bucket.memory import Levels

PATH = "/v1/chat/completions"
CALL = {"model": "small", "messages": [{"role": "user", "content": "hello"}]}
KEYS = {
    "sk-example-a1": ("a1", "acme", "search"),
    "sk-example-a2": ("a2", "acme", None),
    "sk-example-b": ("b", "bolt", "search"),
}


def config(limits: str, *, url: str = "", more: str = "", stages: str = "") -> str:
    provider = f"{{plugin: openai, base_url: '{url}', api_key: sk-example-upstream}}" if url else "{plugin: echo}"
    return f"""
pipeline:
  auth: [{{plugin: api_keys, file: keys.yaml}}, {{plugin: anonymous}}]
  rate_limit: [{{plugin: token_bucket, limits: {limits}}}{more}]
  cost: []
  {stages}
providers: {{up: {provider}}}
models:
  small: {{max_output_tokens: 1000, targets: [{{provider: up, model: small}}]}}
  other: {{max_output_tokens: 1000, targets: [{{provider: up, model: other}}]}}
  unbounded: {{targets: [{{provider: up, model: unbounded}}]}}
  "open/*": {{max_output_tokens: 1000, targets: [{{provider: up, model: "*"}}]}}
"""


def key_file() -> str:
    def row(key: str, id_: str, tenant: str, project: str | None) -> str:
        digest = hashlib.sha256(key.encode()).hexdigest()
        return f"- {{id: {id_}, hash: 'sha256:{digest}', tenant: {tenant}{f', project: {project}' if project else ''}}}"

    return "\n".join(["keys:", *(row(key, *owner) for key, owner in KEYS.items())])


@asynccontextmanager
async def limited(limits: str, **options: Any) -> AsyncIterator[tuple[Running, ManualClock]]:
    clock = ManualClock()
    async with running(config(limits, **options), files={"keys.yaml": key_file()}, clock=clock) as gateway:
        yield gateway, clock


async def post(gateway: Running, key: str | None = None, **fields: Any) -> Response:
    return await gateway.post(PATH, {**CALL, **fields}, key=key)


async def statuses(gateway: Running, count: int, key: str | None = None, **fields: Any) -> list[int]:
    return [(await post(gateway, key, **fields)).status for _ in range(count)]


def remaining(answer: Response, kind: str = "tokens") -> int:
    return int(answer.headers[f"x-ratelimit-remaining-{kind}"])


def test_it_keeps_the_contract_of_its_stage() -> None:
    check_plugin("rate_limit", TokenBucket)


# --- requests ----------------------------------------------------------------------------------


async def test_a_full_bucket_is_used_at_once_and_the_next_call_is_told_when_to_come() -> None:
    async with limited("[{per: tenant, requests_per_minute: 3}]") as (gateway, clock):
        assert await statuses(gateway, 3) == [200, 200, 200]
        answer = await post(gateway)
        assert answer.status == 429
        error = answer.json()["error"]
        assert (error["type"], error["code"]) == ("requests", "rate_limit_exceeded")
        assert "tenant anonymous on requests per min (RPM): Limit 3, Remaining 0" in error["message"]
        assert "try again in 20s" in error["message"]
        assert (answer.headers["retry-after"], answer.headers["retry-after-ms"]) == ("20", "20000")
        assert answer.headers["x-ratelimit-remaining-requests"] == "0"
        clock.advance(19.999)
        assert (await post(gateway)).status == 429
        clock.advance(0.001)
        assert await statuses(gateway, 2) == [200, 429]


async def test_headers_tell_where_the_caller_stands() -> None:
    async with limited("[{per: tenant, requests_per_minute: 60}]") as (gateway, _):
        first, second = await post(gateway), await post(gateway)
        assert first.headers["x-ratelimit-limit-requests"] == "60"
        assert [remaining(first, "requests"), remaining(second, "requests")] == [59, 58]
        assert [answer.headers["x-ratelimit-reset-requests"] for answer in (first, second)] == ["1s", "2s"]


async def test_of_several_limits_of_a_kind_the_headers_tell_the_tightest() -> None:
    limits = "[{per: tenant, requests_per_minute: 4}, {per: key, requests_per_minute: 3}]"
    async with limited(limits) as (gateway, _):
        told = []
        for key in ("sk-example-a1", "sk-example-a2", "sk-example-a2", "sk-example-a2", "sk-example-a1"):
            answer = await post(gateway, key)
            told.append((answer.status, answer.headers["x-ratelimit-limit-requests"], remaining(answer, "requests")))
        assert told == [(200, "3", 2), (200, "4", 2), (200, "4", 1), (200, "4", 0), (429, "4", 0)]


async def test_what_a_refused_call_is_told_has_nothing_taken_from_it() -> None:
    limits = "[{per: tenant, requests_per_minute: 9, tokens_per_minute: 1500, concurrency: 5}]"
    async with upstream() as up, limited(limits, url=up.url) as (gateway, _):
        up.script(answer_using(1400))
        assert (await post(gateway)).status == 200
        answers = [await post(gateway), await post(gateway)]
        assert [answer.status for answer in answers] == [429, 429]
        assert [remaining(answer, "requests") for answer in answers] == [8, 8]
        assert [remaining(answer) for answer in answers] == [100, 100]


async def test_a_short_burst_holds_less_at_the_same_rate() -> None:
    async with limited("[{per: tenant, requests_per_minute: 60, burst_seconds: 2}]") as (gateway, clock):
        assert await statuses(gateway, 3) == [200, 200, 429]
        clock.advance(1)
        assert await statuses(gateway, 2) == [200, 429]
        clock.advance(3600)
        assert await statuses(gateway, 3) == [200, 200, 429]


async def test_of_calls_that_race_exactly_as_many_pass_as_the_limit_says() -> None:
    async with limited("[{per: tenant, requests_per_minute: 7}]") as (gateway, _):
        answers = await asyncio.gather(*(post(gateway) for _ in range(60)))
        assert sorted(answer.status for answer in answers) == [200] * 7 + [429] * 53


async def test_a_failed_request_is_a_request_all_the_same() -> None:
    async with upstream() as up, limited("[{per: tenant, requests_per_minute: 2}]", url=up.url) as (gateway, _):
        up.script(*[Scripted(400, body={"error": {"message": "no", "type": "invalid_request_error"}})] * 2)
        assert await statuses(gateway, 3) == [400, 400, 429]


async def test_a_local_operation_is_a_request_without_tokens() -> None:
    limits = "[{per: tenant, requests_per_minute: 3, tokens_per_minute: 1200}]"
    async with upstream() as up, limited(limits, url=up.url) as (gateway, _):
        up.script(answer_using(5000))
        assert (await post(gateway)).status == 200
        assert (await post(gateway)).json()["error"]["type"] == "tokens"  # deep in debt
        models = await gateway.get("/v1/models")
        assert (models.status, remaining(models), remaining(models, "requests")) == (200, 0, 1)
        assert (await gateway.get("/v1/models")).status == 200
        assert (await gateway.get("/v1/models")).status == 429


# --- tokens ------------------------------------------------------------------------------------


def answer_using(total: int) -> Scripted:
    choice = {"index": 0, "message": {"role": "assistant", "content": "ok"}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 1, "completion_tokens": total - 1, "total_tokens": total}
    return Scripted(body={"id": "x", "object": "chat.completion", "created": 1, "choices": [choice], "usage": usage})


async def spent(gateway: Running, limit: int) -> int:
    """Tokens that are gone, told by a probe whose own hold is known."""
    await gateway.gateway.settled()
    probe = await post(gateway, max_tokens=1)
    await gateway.gateway.settled()
    return limit - remaining(probe) - await estimate(gateway) - 1


async def estimate(gateway: Running) -> int:
    caller = Caller(tenant="x", subject="x", by="x")
    raw = b'{"model": "small", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 1}'
    registration = gateway.gateway.registration
    call = await gateway.gateway.opened(registration, OPERATIONS[0], raw, caller)
    return call.estimated_input


async def test_tokens_are_held_by_the_bound_and_corrected_by_what_was_used() -> None:
    async with upstream() as up, limited("[{per: tenant, tokens_per_minute: 6000}]", url=up.url) as (gateway, _):
        up.script(answer_using(40))
        first = await post(gateway)
        assert remaining(first) == 6000 - 1000 - await estimate(gateway)
        assert await spent(gateway, 6000) == 40


async def test_the_upstream_is_asked_for_no_more_than_was_held() -> None:
    async with upstream() as up, limited("[{per: tenant, tokens_per_minute: 9000}]", url=up.url) as (gateway, _):
        answer = await post(gateway, max_tokens=1_000_000_000, n=3)
        assert up.requests[0].body["max_tokens"] == 1000
        assert remaining(answer) == 9000 - 3 * 1000 - await estimate(gateway)


async def test_more_tokens_than_held_become_debt_that_must_be_paid_first() -> None:
    async with upstream() as up, limited("[{per: tenant, tokens_per_minute: 6000}]", url=up.url) as (gateway, clock):
        up.script(answer_using(8000))
        assert (await post(gateway)).status == 200
        await gateway.settled(1)
        answer = await post(gateway, max_tokens=100)
        assert answer.status == 429
        assert answer.json()["error"]["type"] == "tokens"
        missing = 2000 + 100 + await estimate(gateway)  # 100 tokens come back in a second
        assert answer.headers["retry-after-ms"] == str(missing * 10)
        clock.advance(missing / 100 - 0.001)
        assert (await post(gateway, max_tokens=100)).status == 429
        clock.advance(0.001)
        assert (await post(gateway, max_tokens=100)).status == 200


async def test_an_estimate_never_gives_tokens_back() -> None:
    async with upstream() as up, limited("[{per: tenant, tokens_per_minute: 6000}]", url=up.url) as (gateway, _):
        silent = answer_using(40)
        assert isinstance(silent.body, dict)
        del silent.body["usage"]
        up.script(silent)
        await post(gateway)
        assert await spent(gateway, 6000) == 1000 + await estimate(gateway)


async def test_a_call_that_no_provider_billed_gives_all_its_tokens_back() -> None:
    async with upstream() as up, limited("[{per: tenant, tokens_per_minute: 6000}]", url=up.url) as (gateway, _):
        up.script(Scripted(500, body={"error": {"message": "broken"}}))
        assert (await post(gateway)).status == 502
        assert await spent(gateway, 6000) == 0


async def test_a_cached_answer_costs_no_tokens() -> None:
    stages = "cache: [{plugin: exact}]"
    limits = "[{per: tenant, tokens_per_minute: 6000}]"
    async with upstream() as up, limited(limits, url=up.url, stages=stages) as (gateway, _):
        await post(gateway)
        answer = await post(gateway)
        assert answer.headers["x-qlens-cache"] == "hit"
        assert await spent(gateway, 6000) == 13  # the first call's alone


async def test_a_stream_holds_until_its_end_and_then_owes_what_it_used() -> None:
    async with upstream() as up, limited("[{per: tenant, tokens_per_minute: 6000}]", url=up.url) as (gateway, _):
        answer = await post(gateway, stream=True)
        assert answer.events()[-1] == "[DONE]"
        assert await spent(gateway, 6000) == 13


async def test_who_leaves_before_the_first_byte_gets_nothing_back() -> None:
    async with upstream() as up, limited("[{per: tenant, tokens_per_minute: 6000}]", url=up.url) as (gateway, _):
        up.script(Scripted(hang=True))
        leaving = asyncio.create_task(post(gateway))
        await up.arrived(1)
        leaving.cancel()
        (receipt,) = await gateway.settled(1)
        assert receipt.outcome == "abandoned"
        assert await spent(gateway, 6000) == 1000 + await estimate(gateway)


async def test_a_call_that_can_never_fit_is_refused_for_good() -> None:
    async with limited("[{per: tenant, tokens_per_minute: 500}]") as (gateway, _):
        answer = await post(gateway)
        error = answer.json()["error"]
        assert (answer.status, error["type"], error["code"]) == (400, "invalid_request_error", "request_too_large")
        assert f"needs up to {1000 + await estimate(gateway)}" in error["message"]
        assert "`tokens per tenant` never allows more than 500" in error["message"]
        assert (await post(gateway, max_tokens=100)).status == 200


async def test_a_call_without_any_bound_is_asked_for_max_tokens_only_where_tokens_are_limited() -> None:
    async with limited("[{per: tenant, tokens_per_minute: 6000}]") as (gateway, _):
        answer = await post(gateway, model="unbounded")
        assert (answer.status, answer.json()["error"]["param"]) == (400, "max_tokens")
        assert (await post(gateway, model="unbounded", max_tokens=10)).status == 200
    async with limited("[{per: tenant, requests_per_minute: 60}]") as (gateway, _):
        assert (await post(gateway, model="unbounded")).status == 200


# --- concurrency -------------------------------------------------------------------------------


async def test_a_running_call_takes_a_place_until_it_ends() -> None:
    async with upstream() as up, limited("[{per: tenant, concurrency: 2}]", url=up.url) as (gateway, _):
        up.script(Scripted(hang=True), Scripted(hang=True))
        waiting = [asyncio.create_task(post(gateway)) for _ in range(2)]
        await up.arrived(2)
        answer = await post(gateway)
        assert (answer.status, answer.headers["retry-after"]) == (429, "1")
        assert "concurrent requests: Limit 2, Running 2" in answer.json()["error"]["message"]
        waiting[0].cancel()
        await gateway.settled(2)  # the refused one and the one that left
        assert (await post(gateway)).status == 200
        waiting[1].cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


async def test_a_stream_keeps_its_place_while_it_runs_and_gives_it_back_when_its_client_leaves() -> None:
    async with upstream() as up, limited("[{per: tenant, concurrency: 1}]", url=up.url) as (gateway, _):
        event = {"id": "x", "choices": [{"index": 0, "delta": {"content": "word"}, "finish_reason": None}]}
        up.script(Scripted(events=[event], hang=True))
        async with (
            aiohttp.ClientSession() as session,
            session.post(gateway.url + PATH, json={**CALL, "stream": True}) as stream,
        ):
            await stream.content.readany()
            assert (await post(gateway)).status == 429
            stream.close()
        await gateway.settled(2)
        assert (await post(gateway)).status == 200


# --- whose bucket ------------------------------------------------------------------------------


async def test_tenants_do_not_share_and_their_keys_do() -> None:
    async with limited("[{per: tenant, requests_per_minute: 2}]") as (gateway, _):
        assert [(await post(gateway, key)).status for key in ("sk-example-a1", "sk-example-a2")] == [200, 200]
        assert [(await post(gateway, key)).status for key in ("sk-example-a1", "sk-example-a2")] == [429, 429]
        assert (await post(gateway, "sk-example-b")).status == 200


async def test_each_key_has_its_own_bucket() -> None:
    async with limited("[{per: key, requests_per_minute: 1}]") as (gateway, _):
        for key in (*KEYS, None):
            assert await statuses(gateway, 2, key) == [200, 429]


async def test_a_caller_without_a_project_counts_to_its_tenant() -> None:
    async with limited("[{per: project, requests_per_minute: 1}]") as (gateway, _):
        answers = {key: await statuses(gateway, 2, key) for key in KEYS}
        assert answers == {key: [200, 429] for key in KEYS}
        refused = await post(gateway, "sk-example-a2")
        assert "for tenant acme" in refused.json()["error"]["message"]


async def test_a_model_is_shared_by_all_tenants() -> None:
    async with limited("[{per: model, requests_per_minute: 1}]") as (gateway, _):
        assert (await post(gateway, "sk-example-a1")).status == 200
        assert (await post(gateway, "sk-example-b")).status == 429
        assert (await post(gateway, "sk-example-b", model="other")).status == 200


async def test_names_behind_a_wildcard_are_one_model() -> None:
    async with limited("[{per: model, requests_per_minute: 1}]") as (gateway, _):
        assert (await post(gateway, model="open/one")).status == 200
        assert (await post(gateway, model="open/One")).status == 429
        assert (await post(gateway, model="open/two")).status == 429


async def test_a_rule_that_matches_some_leaves_the_others_alone() -> None:
    limits = "[{per: tenant, requests_per_minute: 1, match: {tenant: [ac*], model: [small, 'open/*']}}]"
    async with limited(limits) as (gateway, _):
        assert await statuses(gateway, 2, "sk-example-a1") == [200, 429]
        assert await statuses(gateway, 1, "sk-example-a1", model="open/one") == [429]
        assert await statuses(gateway, 2, "sk-example-a1", model="other") == [200, 200]
        assert await statuses(gateway, 2, "sk-example-b") == [200, 200]


async def test_a_rule_for_some_keys_is_not_for_callers_without_a_key() -> None:
    async with limited("[{per: key, requests_per_minute: 1, match: {key: ['*']}}]") as (gateway, _):
        assert await statuses(gateway, 2, "sk-example-a1") == [200, 429]
        assert await statuses(gateway, 2) == [200, 200]


async def test_two_rules_alike_do_not_share_a_bucket() -> None:
    limits = "[{per: tenant, requests_per_minute: 4}, {per: tenant, requests_per_minute: 4}]"
    async with limited(limits) as (gateway, _):
        assert await statuses(gateway, 5) == [200] * 4 + [429]


async def test_when_one_bucket_refuses_no_other_has_lost_anything() -> None:
    limits = "[{per: tenant, requests_per_minute: 5, concurrency: 1}, {per: key, tokens_per_minute: 1200}]"
    async with upstream() as up, limited(limits, url=up.url) as (gateway, _):
        up.script(answer_using(5000))
        assert await statuses(gateway, 4, "sk-example-a1") == [200, 429, 429, 429]
        answer = await post(gateway, "sk-example-a2")
        assert answer.status == 200
        assert remaining(answer, "requests") == 3


async def test_a_call_that_a_later_plugin_rejects_gives_everything_back() -> None:
    more = ", {plugin: token_bucket, name: second, limits: [{per: key, tokens_per_minute: 1200}]}"
    limits = "[{per: tenant, requests_per_minute: 5, concurrency: 1}]"
    async with upstream() as up, limited(limits, url=up.url, more=more) as (gateway, _):
        up.script(answer_using(5000))
        assert await statuses(gateway, 4, "sk-example-a1") == [200, 429, 429, 429]
        answer = await post(gateway, "sk-example-a2")
        assert answer.status == 200
        assert remaining(answer, "requests") == 3


async def test_tokens_come_back_when_a_later_plugin_rejects_the_call() -> None:
    more = ", {plugin: token_bucket, name: second, limits: [{per: key, requests_per_minute: 1}]}"
    async with limited("[{per: tenant, tokens_per_minute: 60000}]", more=more) as (gateway, _):
        assert await statuses(gateway, 4, "sk-example-a1") == [200, 429, 429, 429]
        (first, *_) = await gateway.settled(4)
        answer = await post(gateway, "sk-example-a2")
        assert remaining(answer) == 60000 - first.usage.total - 1000 - await estimate(gateway)


# --- reload ------------------------------------------------------------------------------------


async def test_a_reload_with_other_numbers_gives_no_fresh_bucket() -> None:
    async with limited("[{per: tenant, requests_per_minute: 4}]") as (gateway, clock):
        assert await statuses(gateway, 5) == [200] * 4 + [429]
        await gateway.reload(config("[{per: key, requests_per_minute: 99}, {per: tenant, requests_per_minute: 8}]"))
        assert await statuses(gateway, 1) == [429]
        clock.advance(7.5)
        assert await statuses(gateway, 2) == [200, 429]


async def test_a_call_that_runs_over_a_reload_gives_back_to_the_bucket_in_use() -> None:
    limits = "[{per: tenant, requests_per_minute: 60, concurrency: 1}]"
    async with upstream() as up, limited(limits, url=up.url) as (gateway, _):
        up.script(Scripted(hang=True))
        running_call = asyncio.create_task(post(gateway))
        await up.arrived(1)
        await gateway.reload(config(limits.replace("60", "90"), url=up.url))
        assert (await post(gateway)).status == 429
        running_call.cancel()
        await gateway.settled(2)
        assert (await post(gateway)).status == 200


# --- configuration -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ("[]", "limits"),
        ("[{per: tenant}]", "the rule limits nothing: give requests_per_minute, tokens_per_minute or concurrency"),
        ("[{per: planet, concurrency: 1}]", "tenant, project, key, model"),
        ("[{per: tenant, requests_per_minute: 0}]", "requests_per_minute"),
        ("[{per: tenant, requests_per_minute: 1.5}]", "requests_per_minute"),
        ("[{per: tenant, concurrency: 1, burst_seconds: 0}]", "burst_seconds"),
        ("[{per: tenant, concurrency: 1, match: {colour: [red]}}]", "colour"),
    ],
)
async def test_rules_that_make_no_sense_stop_the_start(limits: str, message: str) -> None:
    with pytest.raises(StartupError) as error:
        async with limited(limits):
            pass
    (fault,) = error.value.faults
    assert "pipeline.rate_limit[0]" in fault.path
    assert message in str(fault)


async def test_one_worker_has_the_whole_limit_of_a_store_per_worker() -> None:
    text = config("[{per: tenant, requests_per_minute: 2}]").replace(
        "limits:", "store: {kind: memory, per_worker: true}, limits:"
    )
    async with running(text, files={"keys.yaml": key_file()}, clock=ManualClock()) as gateway:
        assert gateway.plugin("rate_limit", "token_bucket").shares == "store"
        assert await statuses(gateway, 3) == [200, 200, 429]
    async with limited("[{per: tenant, requests_per_minute: 2}]") as (gateway, _):
        assert gateway.plugin("rate_limit", "token_bucket").shares == "process"


def test_explain_says_what_a_call_takes_and_what_never_fits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    limits = "[{per: tenant, requests_per_minute: 5, tokens_per_minute: 500, concurrency: 3}]"
    (tmp_path / "qlens.yaml").write_text(config(limits))
    (tmp_path / "body.json").write_text('{"model": "small", "messages": [{"role": "user", "content": "hello"}]}')
    assert main(["explain", str(tmp_path / "qlens.yaml"), str(tmp_path / "body.json"), "--tenant", "acme"]) == 0
    out = capsys.readouterr().out
    assert "takes 1 of 5 requests a minute from tenant acme" in out
    assert "takes one of 3 places at a time from tenant acme" in out
    assert "never allows more than 500" in out


# --- what holds for every sequence of calls ----------------------------------------------------

TARGET = Target("up", "small", "small")
SMALL = Model("small", (TARGET,))


def made_call(tokens: int, tenant: str = "acme") -> Call:
    async def reader() -> bytes:
        return b""

    call = Call(
        id="x", operation=OPERATIONS[0], path=PATH, path_params={}, query={}, headers={}, peer=None, credential=None,
        started=0, wall_ns=0, deadline=0, reader=reader, caller=Caller(tenant=tenant, subject="s", by="test"),
    )  # fmt: skip
    call.model = SMALL
    call.bound = Usage(output=tokens)
    return call


def made_receipt(call: Call, used: int | None, outcome: Outcome = "complete") -> Receipt:
    """The receipt of a call that used so many tokens; None: nobody billed anything."""
    attempt = Attempt(1, TARGET, 0, billed=used is not None)
    return Receipt(
        id="x", caller=call.known, operation="chat", model="small", target=TARGET, outcome=outcome, status=200,
        error=None, usage=Usage(output=used or 0, source="provider"), cost=FREE, saved_picos=0, cache="off",
        streamed=False, attempts=(attempt,), tags={}, wall_ns=0, ttft_us=None, total_us=0, overhead_us=0, bytes_out=0,
        config_version="",
    )  # fmt: skip


@asynccontextmanager
async def bucket(*rules: Rule) -> AsyncIterator[tuple[TokenBucket, ManualClock]]:
    clock = ManualClock(now=1000.0)
    plugin = TokenBucket(TokenBucketConfig(limits=rules), "token_bucket")
    gateway = Gateway(clock=clock)
    try:
        async with plugin.lifespan(gateway):
            yield plugin, clock
    finally:
        await gateway.http.aclose()


async def admitted(plugin: TokenBucket, call: Call) -> object | None:
    try:
        return await plugin.admit(call)
    except RateLimited:
        return None


STEPS = st.lists(st.tuples(st.integers(0, 20_000), st.integers(1, 40)), min_size=1, max_size=40)


@settings(max_examples=150, deadline=None)
@given(rate=st.integers(1, 600), burst=st.integers(1, 120), steps=STEPS)
async def test_no_window_ever_has_more_than_the_burst_and_what_the_rate_gives(
    rate: int, burst: int, steps: list[tuple[int, int]]
) -> None:
    async with bucket(Rule(per="tenant", tokens_per_minute=rate, burst_seconds=burst)) as (plugin, clock):
        capacity = max(1, rate * burst // 60)
        now, passed = 0, []
        for milliseconds, quantity in steps:
            now += milliseconds
            clock.now = 1000 + now / 1000
            if quantity <= capacity and await admitted(plugin, made_call(quantity)):
                passed.append((now, quantity))
        for first, last in itertools.combinations_with_replacement(range(len(passed)), 2):
            window = Fraction(passed[last][0] - passed[first][0], 1000)
            assert sum(quantity for _, quantity in passed[first : last + 1]) <= capacity + rate * window / 60


@settings(max_examples=150, deadline=None)
@given(rate=st.integers(1, 600), steps=STEPS)
async def test_who_waits_as_long_as_told_passes_and_a_millisecond_less_is_too_early(
    rate: int, steps: list[tuple[int, int]]
) -> None:
    async with bucket(Rule(per="tenant", tokens_per_minute=rate)) as (plugin, clock):
        now = 0
        for milliseconds, quantity in steps:
            now += milliseconds
            clock.now = 1000 + now / 1000
            call = made_call(min(quantity, rate))
            if await admitted(plugin, call):
                continue
            wait = await told_to_wait(plugin, call)
            clock.now = 1000 + (now + wait - 1) / 1000
            assert not await admitted(plugin, call)
            now += wait
            clock.now = 1000 + now / 1000
            assert await admitted(plugin, call)


async def told_to_wait(plugin: TokenBucket, call: Call) -> int:
    """The milliseconds that a call which does not pass is told to wait; 0 for one that passes."""
    try:
        await plugin.admit(call)
    except RateLimited as error:
        return round((error.retry_after or 0) * 1000)
    return 0


@settings(max_examples=150, deadline=None)
@given(
    calls=st.lists(st.tuples(st.integers(1, 400), st.one_of(st.none(), st.integers(0, 900))), min_size=1, max_size=20),
    data=st.data(),
)
async def test_settled_calls_leave_behind_exactly_what_they_used(
    calls: list[tuple[int, int | None]], data: st.DataObject
) -> None:
    rule = Rule(per="tenant", requests_per_minute=10, tokens_per_minute=1000, concurrency=4)
    async with bucket(rule) as (plugin, clock):
        open_calls: list[tuple[Call, Any, int | None]] = []
        used = 0

        async def settle_one() -> None:
            nonlocal used
            place: int = data.draw(st.integers(0, len(open_calls) - 1))
            call, hold, total = open_calls.pop(place)
            await plugin.settle(call, made_receipt(call, total), hold)
            used += total or 0

        for tokens, total in calls:
            call = made_call(tokens)
            if hold := await admitted(plugin, call):
                open_calls.append((call, hold, total))
            settles: bool = data.draw(st.booleans())
            if open_calls and settles:
                await settle_one()
        while open_calls:
            await settle_one()
        # Debt and level alike are paid after as many minutes as tokens were used.
        clock.advance(60)  # the requests are all back by then
        probe = made_call(1000)
        wait = await told_to_wait(plugin, probe)
        assert wait == max(0, used - 1000) * 60
        assert [limit.remaining for limit in probe.limits if limit.kind == "concurrency"] == [4 if wait else 3]


async def test_buckets_of_callers_that_went_away_are_forgotten() -> None:
    async with bucket(Rule(per="tenant", requests_per_minute=60, tokens_per_minute=60)) as (plugin, clock):
        for number in range(5000):
            call = made_call(1, tenant=f"tenant{number}")
            await plugin.settle(call, made_receipt(call, 1), await plugin.admit(call))
            clock.advance(0.1)  # each is full again a second later
        del call
        states = plugin._states
        assert isinstance(states, Levels)
        assert len(plugin._plans) == 4096
        assert len(states.levels) <= 2 * 4096 + 100
        assert len(states.running) == 0
        assert len(states.left) < 100
