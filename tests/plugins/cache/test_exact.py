"""The plugin `exact`: who gets which answer again, for how long, and what is never kept."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import tracemalloc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve

from qlens import Call, Caller, Model, StartupError, Target
from qlens.cli import main
from qlens.operations import OPERATIONS
from qlens.testing import ManualClock, Response, Running, Scripted, check_plugin, running, upstream
from qlens.testing.upstreams import FakeUpstream, chat_events
from qlens_plugins.cache.exact import Exact, ExactConfig, cache_key

PATH = "/v1/chat/completions"
CALL = {"model": "small", "messages": [{"role": "user", "content": "hello"}]}
WRITERS = ("*/qlens/watching.py", "*/qlens/trimming.py")
"""Where the answer is made that is kept of a stream."""
ACME, ACME_TOO, BOLT = "sk-example-acme", "sk-example-acme-too", "sk-example-bolt"


def config(settings: str = "", *, url: str, targets: str = "", more: str = "") -> str:
    targets = targets or "{provider: up, model: small}"
    return f"""
pipeline:
  auth: [{{plugin: api_keys, file: keys.yaml}}, {{plugin: anonymous}}]
  cache: [{{plugin: exact{settings}}}]
  cost: []
providers: {{up: {{plugin: openai, base_url: '{url}', api_key: sk-example-upstream}}}}
models:
  small: {{max_output_tokens: 1000, targets: [{targets}]{more}}}
  other: {{max_output_tokens: 1000, targets: [{{provider: up, model: small}}]}}
  "open/*": {{max_output_tokens: 1000, targets: [{{provider: up, model: small}}]}}
"""


def key_file() -> str:
    owners = {ACME: ("a", "acme"), ACME_TOO: ("a2", "acme"), BOLT: ("b", "bolt")}
    rows = [
        f"- {{id: {id_}, tenant: {tenant}, hash: 'sha256:{hashlib.sha256(key.encode()).hexdigest()}'}}"
        for key, (id_, tenant) in owners.items()
    ]
    return "\n".join(["keys:", *rows])


@asynccontextmanager
async def cached(settings: str = "", **options: Any) -> AsyncIterator[tuple[Running, FakeUpstream, ManualClock]]:
    clock = ManualClock()
    async with upstream() as up:
        text = config(settings, url=up.url, **options)
        async with running(text, files={"keys.yaml": key_file()}, clock=clock) as gateway:
            yield gateway, up, clock


async def ask(
    gateway: Running, key: str | None = None, headers: dict[str, str] | None = None, **fields: Any
) -> Response:
    return await gateway.post(PATH, {**CALL, **fields}, key=key, headers=headers)


def state(answer: Response) -> str:
    assert answer.status == 200, answer.text
    return answer.headers["x-qlens-cache"]


async def control(gateway: Running, directives: str) -> str:
    return state(await ask(gateway, headers={"cache-control": directives}))


def test_it_keeps_the_contract_of_its_stage() -> None:
    check_plugin("cache", Exact)


# --- the same answer again ---------------------------------------------------------------------


async def test_the_same_body_gets_the_same_answer_without_a_provider() -> None:
    async with cached() as (gateway, up, _):
        first, second = await ask(gateway), await ask(gateway)
        assert (state(first), state(second)) == ("miss", "hit")
        assert second.body == first.body
        assert len(up.requests) == 1
        assert second.headers["x-qlens-provider"] == "up"
        assert second.headers["x-qlens-attempts"] == "0"
        assert "x-request-id" in second.headers
        assert second.headers["x-request-id"] != first.headers["x-request-id"]
        one, two = await gateway.settled(2)
        assert (one.outcome, two.outcome, two.cache) == ("complete", "cached", "hit")
        assert two.cost.picos == 0


async def test_tenants_never_share_and_keys_of_one_tenant_do() -> None:
    async with cached() as (gateway, up, _):
        assert state(await ask(gateway, ACME)) == "miss"
        assert state(await ask(gateway, BOLT)) == "miss"
        assert state(await ask(gateway)) == "miss"
        assert state(await ask(gateway, ACME_TOO)) == "hit"
        assert len(up.requests) == 3


@pytest.mark.parametrize(
    "changed",
    [
        {"messages": [{"role": "user", "content": "hello "}]},
        {"messages": [{"role": "system", "content": "hello"}]},
        {"temperature": 0},
        {"temperature": 0.0},
        {"max_tokens": 9},
        {"model": "other"},
        {"user": "someone"},
        {"metadata": {"a": "1"}},
    ],
)
async def test_whatever_differs_in_the_body_makes_another_answer(changed: dict[str, Any]) -> None:
    async with cached() as (gateway, _, _):
        assert state(await ask(gateway)) == "miss"
        assert state(await ask(gateway, **changed)) == "miss"
        assert state(await ask(gateway, **changed)) == "hit"


async def test_the_order_of_fields_and_the_form_of_the_answer_make_no_difference() -> None:
    async with cached() as (gateway, up, _):
        assert state(await ask(gateway)) == "miss"
        turned = {name: CALL[name] for name in reversed(CALL)}
        assert state(await gateway.post(PATH, {**turned, "stream": False})) == "hit"
        streamed = await ask(gateway, stream=True, stream_options={"include_usage": True})
        assert state(streamed) == "hit"
        *_, usage, done = streamed.events()
        assert done == "[DONE]"
        assert usage["usage"]["total_tokens"] == 13
        assert len(up.requests) == 1


async def test_a_stream_is_collected_and_answers_a_call_for_one_body() -> None:
    async with cached() as (gateway, up, _):
        assert state(await ask(gateway, stream=True)) == "miss"
        whole = await ask(gateway)
        assert state(whole) == "hit"
        assert whole.json()["choices"][0]["message"]["content"] == "Hello from upstream."
        assert whole.json()["choices"][0]["finish_reason"] == "stop"
        assert len(up.requests) == 1
        again = await ask(gateway, stream=True)
        assert state(again) == "hit"
        events = [event for event in again.events() if event != "[DONE]"]
        assert "".join(event["choices"][0]["delta"].get("content") or "" for event in events) == "Hello from upstream."


async def test_names_behind_a_wildcard_are_different_models() -> None:
    async with cached() as (gateway, _, _):
        assert state(await ask(gateway, model="open/one")) == "miss"
        assert state(await ask(gateway, model="open/two")) == "miss"
        assert state(await ask(gateway, model="open/one")) == "hit"


async def test_embeddings_and_completions_are_cached_too() -> None:
    async with cached() as (gateway, up, _):
        for path, body in (
            ("/v1/embeddings", {"model": "small", "input": "x"}),
            ("/v1/completions", {"model": "small", "prompt": "x"}),
        ):
            first, second = await gateway.post(path, body), await gateway.post(path, body)
            assert (state(first), state(second)) == ("miss", "hit")
            assert first.body == second.body
        assert len(up.requests) == 2


async def test_another_target_behind_the_model_makes_another_answer() -> None:
    async with cached() as (gateway, up, _):
        assert state(await ask(gateway)) == "miss"
        for targets in ("{provider: up, model: newer}", "{provider: up, model: newer, params: {temperature: 1}}"):
            await gateway.reload(config(url=up.url, targets=targets))
            assert state(await ask(gateway)) == "miss"
            assert state(await ask(gateway)) == "hit"


# --- what is not kept --------------------------------------------------------------------------


async def test_an_error_is_not_kept() -> None:
    async with cached() as (gateway, up, _):
        up.script(Scripted(400, body={"error": {"message": "no", "type": "invalid_request_error"}}))
        assert (await ask(gateway)).status == 400
        assert state(await ask(gateway)) == "miss"


async def test_a_stream_that_was_cut_is_not_kept() -> None:
    async with cached() as (gateway, up, _):
        up.script(Scripted(events=chat_events()[:-2]))  # no finish reason, no end mark
        await ask(gateway, stream=True)
        assert state(await ask(gateway)) == "miss"


async def test_a_stream_that_its_client_left_is_not_kept() -> None:
    async with cached() as (gateway, up, _):
        up.script(Scripted(events=chat_events()[:-2], hang=True))
        leaving = asyncio.create_task(ask(gateway, stream=True))
        await up.arrived(1)
        leaving.cancel()
        await gateway.settled(1)
        assert state(await ask(gateway)) == "miss"


async def test_an_answer_larger_than_the_most_is_not_kept() -> None:
    async with cached(", max_entry_bytes: 200") as (gateway, _, _):
        assert state(await ask(gateway)) == "miss"
        assert state(await ask(gateway)) == "miss"
        assert state(await ask(gateway, stream=True)) == "miss"
        assert state(await ask(gateway)) == "miss"


async def test_a_fallbacks_answer_does_not_outlive_the_trouble() -> None:
    async with cached(more=", fallbacks: [other]") as (gateway, up, _):
        up.script(Scripted(500, body={"error": {"message": "down"}}))
        assert [state(await ask(gateway)) for _ in range(3)] == ["miss", "miss", "hit"]
        receipts = await gateway.settled(3)
        assert [receipt.target and receipt.target.public for receipt in receipts] == ["other", "small", "small"]


# --- what the client says ----------------------------------------------------------------------


async def test_no_store_may_be_answered_from_the_cache_but_leaves_nothing_there() -> None:
    async with cached() as (gateway, _, _):
        assert await control(gateway, "no-store") == "miss"
        assert await control(gateway, "No-Store") == "miss"
        assert state(await ask(gateway)) == "miss"
        assert await control(gateway, "no-store") == "hit"


async def test_no_cache_asks_the_provider_and_keeps_the_new_answer() -> None:
    async with cached() as (gateway, up, _):
        assert state(await ask(gateway)) == "miss"
        assert await control(gateway, "max-age=60, no-cache") == "miss"
        assert len(up.requests) == 2
        assert state(await ask(gateway)) == "hit"


async def test_with_no_store_and_no_cache_the_cache_is_off() -> None:
    async with cached() as (gateway, up, _):
        assert await control(gateway, "no-store, no-cache") == "off"
        assert await control(gateway, "no-store,no-cache") == "off"
        assert len(up.requests) == 2
        assert state(await ask(gateway)) == "miss"


async def test_max_age_refuses_older_answers_and_keeps_the_new_one() -> None:
    async with cached() as (gateway, _, clock):
        assert state(await ask(gateway)) == "miss"
        clock.advance(30)
        assert await control(gateway, "max-age=30") == "hit"
        assert await control(gateway, "max-age=29") == "miss"
        assert await control(gateway, "max-age=0") == "hit"
        assert await control(gateway, "max-age=soon") == "hit"


# --- time and space ----------------------------------------------------------------------------


async def test_an_answer_is_kept_for_its_time_and_no_longer() -> None:
    async with cached(", ttl_seconds: 10") as (gateway, _, clock):
        assert state(await ask(gateway)) == "miss"
        clock.advance(10)
        assert state(await ask(gateway)) == "hit"
        clock.advance(0.001)
        assert state(await ask(gateway)) == "miss"
        assert state(await ask(gateway)) == "hit"


async def test_the_answer_that_was_not_used_for_longest_makes_room() -> None:
    async with cached(", store: {kind: memory, max_bytes: 3000}, max_entry_bytes: 1000") as (gateway, _, _):
        assert [state(await ask(gateway, user=user)) for user in "ab"] == ["miss", "miss"]  # two fit, three do not
        assert state(await ask(gateway, user="a")) == "hit"
        assert state(await ask(gateway, user="c")) == "miss"
        assert state(await ask(gateway, user="a")) == "hit"
        assert state(await ask(gateway, user="b")) == "miss"


async def test_the_metric_of_its_size_never_passes_the_most_and_falls_with_time() -> None:
    async with cached(", store: {max_bytes: 20000}, max_entry_bytes: 1000, ttl_seconds: 5") as (gateway, _, clock):
        for number in range(40):
            await ask(gateway, user=str(number))
        full = await size(gateway)
        assert 15000 < full <= 20000
        clock.advance(6)
        await ask(gateway, user="39", headers={"cache-control": "no-store"})
        assert await size(gateway) < full


async def test_what_is_kept_takes_no_more_memory_than_is_counted() -> None:
    async with cached(", store: {max_bytes: 10000000}") as (gateway, _, _):
        await ask(gateway, user="first", stream=True)
        tracemalloc.start()
        try:
            for number in range(100):  # what is made of a stream is JSON that the gateway has written
                assert state(await ask(gateway, user=str(number), stream=True)) == "miss"
            gc.collect()
            traces = tracemalloc.take_snapshot().filter_traces([tracemalloc.Filter(True, place) for place in WRITERS])
        finally:
            tracemalloc.stop()
        kept = sum(trace.size for trace in traces.statistics("filename"))
        assert 0 < kept < await size(gateway)


async def test_a_cache_that_is_gone_takes_nothing_and_its_metric_does_not_keep_its_answers() -> None:
    async with cached() as (gateway, up, _):
        await ask(gateway)
        assert await size(gateway) > 0
        await gateway.reload(config(url=up.url).replace("  cache: [{plugin: exact}]\n", ""))
        await ask(gateway)
        gc.collect()
        assert await size(gateway) == 0


async def size(gateway: Running) -> float:
    lines = (await gateway.get("/metrics")).text.splitlines()
    return next(float(line.split()[-1]) for line in lines if line.startswith('qlens_cache_bytes{cache="exact"}'))


async def test_lookups_are_counted_by_result() -> None:
    async with cached() as (gateway, _, _):
        for directives in ("max-age=600", "max-age=600", "no-cache"):
            await control(gateway, directives)
        text = (await gateway.get("/metrics")).text
        for result in ("hit", "miss", "bypass"):
            assert f'qlens_cache_lookups_total{{cache="exact",result="{result}"}} 1.0' in text


async def test_a_reload_keeps_the_answers_and_the_new_time_holds_at_once() -> None:
    async with cached() as (gateway, up, clock):
        assert state(await ask(gateway)) == "miss"
        await gateway.reload(config(", ttl_seconds: 5", url=up.url))
        assert state(await ask(gateway)) == "hit"
        clock.advance(6)
        assert state(await ask(gateway)) == "miss"


# --- the key -----------------------------------------------------------------------------------

TARGET = Target("up", "small", "small")


def made_call(**body: Any) -> Call:
    async def reader() -> bytes:
        return b""

    call = Call(
        id="x", operation=OPERATIONS[0], path=PATH, path_params={}, query={}, headers={}, peer=None, credential=None,
        started=0, wall_ns=0, deadline=0, reader=reader, caller=Caller(tenant="t", subject="s", by="test"),
    )  # fmt: skip
    call.body = {**CALL, **body}
    call.model, call.asked_model = Model("small", (TARGET,)), "small"
    return call


def test_the_tenant_is_a_required_part_of_the_key_and_cannot_run_into_the_next_part() -> None:
    with pytest.raises(TypeError):
        cache_key(call=made_call())  # type: ignore[call-arg]
    call, longer = made_call(), made_call()
    longer.operation = evolve(call.operation, name="at")
    call.operation = evolve(call.operation, name="chat")
    assert cache_key("acme", call) != cache_key("bolt", call)
    assert cache_key("acmech", longer) != cache_key("acme", call)


@pytest.mark.parametrize(
    "change",
    [{"provider": "else"}, {"model": "large"}, {"base_model": "b"}, {"region": "eu"}, {"params": {"temperature": 1}}],
)
def test_everything_about_a_target_that_shapes_answers_is_in_the_key(change: dict[str, Any]) -> None:
    call, other = made_call(), made_call()
    other.model = Model("small", (evolve(TARGET, **change),))
    assert cache_key("acme", call) != cache_key("acme", other)


def test_the_name_asked_for_is_in_the_key_even_where_the_body_does_not_have_it() -> None:
    call, other, third = made_call(), made_call(), made_call()
    other.asked_model = "large"
    third.model = Model("large", (TARGET,))
    assert len({cache_key("acme", which) for which in (call, other, third)}) == 3


def test_endless_names_behind_a_wildcard_do_not_fill_the_memory() -> None:
    plugin = Exact(ExactConfig(), "exact")
    for number in range(3000):
        call = made_call()
        call.asked_model = f"open/{number}"
        assert plugin._key(call) == cache_key("t", call)
    assert len(plugin._heads) <= 1024


def test_weights_and_stream_fields_are_not_in_the_key() -> None:
    call = made_call()
    other = made_call(stream=True, stream_options={"include_usage": True})
    other.model = Model("small", (evolve(TARGET, weight=9),))
    assert cache_key("acme", call) == cache_key("acme", other)


# --- configuration -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (", ttl_seconds: 0", "ttl_seconds"),
        (", store: {kind: redis}", "memory"),
        (
            ", store: {max_bytes: 5000}, max_entry_bytes: 5000",
            "store.max_bytes (5000); lower it to 3976",
        ),
    ],
)
async def test_settings_that_make_no_sense_stop_the_start(settings: str, message: str) -> None:
    with pytest.raises(StartupError) as error:
        async with cached(settings):
            pass
    (fault,) = error.value.faults
    assert "pipeline.cache[0]" in fault.path
    assert message in str(fault)


def test_explain_shows_the_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "qlens.yaml").write_text(config(", ttl_seconds: 5", url="http://127.0.0.1:1"))
    (tmp_path / "body.json").write_text('{"model": "small", "messages": [{"role": "user", "content": "hello"}]}')
    seen = set()
    for tenant in ("acme", "acme", "bolt"):
        assert main(["explain", str(tmp_path / "qlens.yaml"), str(tmp_path / "body.json"), "--tenant", tenant]) == 0
        line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("cache.exact"))
        assert "keeps a new one for 5 s" in line
        seen.add(line)
    assert len(seen) == 2
