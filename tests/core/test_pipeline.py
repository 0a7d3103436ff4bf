"""A call's way: which hooks run, in which order, and what happens when one fails."""

from __future__ import annotations

import hashlib

import pytest
from plugs import Probe
from yamls import CHAT, HELLO, STREAM, config, probe, targets

from qlens.testing import Scripted, running, upstream


async def test_hooks_run_in_stage_order_and_then_in_the_order_of_the_file() -> None:
    stages = {
        "observe": [probe("last")],
        "guard": [probe("second"), probe("third")],
        "rate_limit": [probe("first")],
    }
    async with running(config(stages)) as gateway:
        assert (await gateway.post(CHAT, HELLO)).status == 200
        await gateway.settled(1)
        order = [hook.plugin for hook in gateway.gateway.current.pipeline.hooks.admit if hook.plugin != "recorder"]
        assert order == ["first", "second", "third", "last"]
        seen = gateway.plugin("guard", "second").events
        assert seen == [
            "open", "admit", "wrap_call", "lookup", "choose", "wrap_send", "price", "store", "wrap_call done",
            "price", "settle complete",
        ] or [event for event in seen if event != "price"] == [
            "open", "admit", "wrap_call", "lookup", "choose", "wrap_send", "store", "wrap_call done", "settle complete",
        ]  # fmt: skip


async def test_the_first_auth_plugin_that_answers_wins() -> None:
    stages = {"auth": [probe("a"), probe("b", answer=["authenticate"], tenant="acme"), probe("c")]}
    async with running(config(stages)) as gateway:
        await gateway.post(CHAT, HELLO)
        (receipt,) = await gateway.settled(1)
        assert (receipt.caller.tenant, receipt.caller.by) == ("acme", "b")
        assert "authenticate" not in gateway.plugin("auth", "c").events


@pytest.mark.parametrize(
    ("credential", "code"), [(None, None), ("sk-example-wrong", "invalid_api_key")], ids=["no key", "unknown key"]
)
async def test_nobody_answering_is_401_and_opens_no_account(credential: str | None, code: str | None) -> None:
    async with running(config({"auth": [probe("a")]})) as gateway:
        answer = await gateway.post(CHAT, HELLO, key=credential)
        assert answer.status == 401
        assert answer.json()["error"]["code"] == code
        assert answer.json()["error"]["type"] == "invalid_request_error"
        assert gateway.receipts == []


@pytest.mark.parametrize(
    ("stage", "hook", "status"),
    [
        ("auth", "authenticate", 503),
        ("rate_limit", "admit", 503),
        ("guard", "wrap_call", 500),
        ("cache", "lookup", 200),
        ("cache", "store", 200),
        ("route", "choose", 500),
        ("route", "wrap_send", 500),
        ("cost", "price", 200),
        ("cost", "settle", 200),
        ("observe", "health", 200),
    ],
)
@pytest.mark.parametrize("body", [HELLO, STREAM], ids=["body", "stream"])
async def test_a_hook_that_fails_by_itself_is_answered_by_its_kind_and_counted(
    stage: str, hook: str, status: int, body: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    stages = {stage: [probe("broken", fail=[hook]), *([{"plugin": "anonymous"}] if stage == "auth" else [])]}
    async with running(config(stages)) as gateway:
        answer = await gateway.post(CHAT, body)
        assert answer.status == status
        assert "sk-example-secret" not in answer.text
        if status != 200:
            assert answer.json()["error"]["type"] == "server_error"
        if hook == "health":
            ready = await gateway.get("/readyz")
            assert ready.status == 200
            assert ready.json()["plugins"][f"{stage}.broken"]["ok"] is False
        if hook != "authenticate":
            await gateway.settled(1)
        counted = f'qlens_plugin_failures_total{{hook="{hook}",plugin="broken"}}'
        assert counted in (await gateway.get("/metrics")).text
        assert "sk-example-secret" not in (await gateway.get("/metrics")).text
    if hook != "health":
        assert f"broken failed in {hook}: RuntimeError" in caplog.text
        assert "in _plain" in caplog.text or "in _at" in caplog.text or hook == "settle"
    assert "sk-example-secret" not in caplog.text


async def test_a_settle_that_fails_does_not_keep_the_others_from_settling() -> None:
    stages = {"rate_limit": [probe("broken", fail=["settle"], hold="a")], "cost": [probe("sound", hold="b")]}
    async with running(config(stages)) as gateway:
        assert (await gateway.post(CHAT, HELLO)).status == 200
        await gateway.settled(1)
        for stage, name in (("rate_limit", "broken"), ("cost", "sound")):
            assert gateway.plugin(stage, name).holds == []


async def test_every_plugin_gets_its_own_hold_back() -> None:
    stages = {"rate_limit": [probe("a", hold="a"), probe("none"), probe("b", hold="b")]}
    async with running(config(stages)) as gateway:
        for _ in range(3):
            await gateway.post(CHAT, STREAM)
        await gateway.settled(3)
        probes: list[Probe] = [gateway.plugin("rate_limit", name) for name in ("a", "none", "b")]
        assert [probe.holds for probe in probes] == [[], [], []]
        assert [probe.events.count("settle complete") for probe in probes] == [3, 3, 3]


async def test_a_refusal_ends_admission_and_returns_what_was_held() -> None:
    stages = {"rate_limit": [probe("a", hold="a"), probe("no", refuse=["admit"]), probe("never", hold="c")]}
    async with running(config(stages)) as gateway:
        answer = await gateway.post(CHAT, HELLO)
        assert answer.status == 429
        assert answer.headers["retry-after"] == "2"
        assert answer.headers["retry-after-ms"] == "1500"
        (receipt,) = await gateway.settled(1)
        assert (receipt.outcome, receipt.status, receipt.error) == ("rejected", 429, "rate_limit_exceeded")
        assert gateway.plugin("rate_limit", "a").holds == []
        assert "admit" not in gateway.plugin("rate_limit", "never").events
        assert receipt.attempts == ()


async def test_an_answer_from_lookup_skips_the_provider_and_costs_nothing() -> None:
    stages = {"cache": [probe("known", answer=["lookup"]), probe("skipped")], "cost": [probe("p", answer=["price"])]}
    async with running(config(stages)) as gateway:
        answer = await gateway.post(CHAT, HELLO)
        assert answer.json()["choices"][0]["message"]["content"] == "from lookup"
        streamed = await gateway.post(CHAT, STREAM)
        assert "".join(e["choices"][0]["delta"].get("content") or "" for e in streamed.events()[:-1]) == "from lookup"
        assert streamed.events()[-1] == "[DONE]"
        for receipt in await gateway.settled(2):
            assert (receipt.outcome, receipt.cost.picos, receipt.usage.total) == ("cached", 0, 0)
        assert "lookup" not in gateway.plugin("cache", "skipped").events
        assert gateway.plugin("cache", "known").stored == []


async def test_wrap_call_stands_around_cached_answers_too() -> None:
    stages = {"guard": [probe("guard", answer=["wrap_call"])], "cache": [probe("known", answer=["lookup"])]}
    async with running(config(stages)) as gateway:
        answer = await gateway.post(CHAT, HELLO)
        assert answer.json()["choices"][0]["message"]["content"] == "from wrap_call"
        assert "lookup" not in gateway.plugin("cache", "known").events


@pytest.mark.parametrize("body", [HELLO, STREAM], ids=["body", "stream"])
async def test_store_gets_the_whole_answer_of_a_body_and_of_a_stream(body: dict[str, object]) -> None:
    async with running(config({"cache": [probe("cache")]})) as gateway:
        await gateway.post(CHAT, body)
        await gateway.settled(1)
        (stored,) = gateway.plugin("cache", "cache").stored
        assert b'"content":"Hello there!"' in stored.body
        assert stored.usage.total == 8
        assert stored.complete


async def test_choose_orders_the_targets() -> None:
    providers = {"one": {"plugin": "plugs:Talker"}, "two": {"plugin": "plugs:Talker", "words": ["two"]}}
    models = {"gpt-4o-mini": {"targets": targets("one", "two")}}
    async with running(config({"route": [probe("r", answer=["choose"])]}, providers, models)) as gateway:
        answer = await gateway.post(CHAT, HELLO)
        assert answer.json()["choices"][0]["message"]["content"] == "two"
        assert answer.headers["x-qlens-provider"] == "two"


async def test_without_a_retry_plugin_each_target_is_tried_once() -> None:
    providers = {name: {"plugin": "plugs:Talker", "fail": True} for name in ("one", "two")}
    models = {"gpt-4o-mini": {"targets": targets("one", "two")}}
    async with running(config({}, providers, models)) as gateway:
        answer = await gateway.post(CHAT, HELLO)
        assert answer.status == 502
        assert answer.headers["x-qlens-attempts"] == "2"
        (receipt,) = await gateway.settled(1)
        assert [a.target.provider for a in receipt.attempts] == ["one", "two"]
        assert receipt.outcome == "failed"
        assert receipt.cost.picos == 0


async def test_a_target_is_asked_again_only_when_all_were_tried() -> None:
    providers = {name: {"plugin": "plugs:Talker", "fail": True} for name in ("one", "two")}
    models = {"gpt-4o-mini": {"targets": targets("one", "two")}}
    stages = {"route": [{"plugin": "retry", "attempts": 4, "backoff_seconds": 0.001}]}
    async with running(config(stages, providers, models)) as gateway:
        assert (await gateway.post(CHAT, HELLO)).status == 502
        (receipt,) = await gateway.settled(1)
        assert [a.target.provider for a in receipt.attempts] == ["one", "two", "one", "two"]


async def test_the_wait_between_attempts_is_not_the_gateways_overhead() -> None:
    providers = {"one": {"plugin": "plugs:Talker", "fail": True}}
    stages = {"route": [{"plugin": "retry", "attempts": 2, "backoff_seconds": 0.3, "jitter": 0}]}
    async with running(config(stages, providers, {"gpt-4o-mini": {"targets": targets("one")}})) as gateway:
        await gateway.post(CHAT, HELLO)
        (receipt,) = await gateway.settled(1)
        assert receipt.total_us >= 300_000
        assert receipt.total_us - receipt.overhead_us >= 300_000


async def test_a_target_that_wants_too_long_a_wait_is_left_alone_and_the_others_still_asked() -> None:
    async with upstream() as busy, upstream() as well:
        busy.script(
            *(Scripted(status=429, headers={"retry-after": "3600"}, body={"error": {"message": "x"}}) for _ in "12")
        )
        providers = {
            name: {"plugin": "openai", "base_url": up.url, "api_key": "sk-example-up"}
            for name, up in (("busy", busy), ("well", well))
        }
        models = {
            "gpt-4o-mini": {"targets": targets("busy"), "fallbacks": ["spare"]},
            "spare": {"targets": targets("well")},
            "alone": {"targets": targets("busy")},
        }
        stages = {"route": [{"plugin": "retry", "attempts": 3, "max_retry_after_seconds": 1}]}
        async with running(config(stages, providers, models)) as gateway:
            assert (await gateway.post(CHAT, HELLO)).status == 200
            answer = await gateway.post(CHAT, {**HELLO, "model": "alone"})
            assert (answer.status, answer.headers["retry-after"]) == (429, "3600")
            first, second = await gateway.settled(2)
            assert [attempt.target.provider for attempt in first.attempts] == ["busy", "well"]
            assert [attempt.target.provider for attempt in second.attempts] == ["busy"]


async def test_a_fallback_is_asked_when_all_targets_failed_and_only_if_the_caller_may_use_it() -> None:
    providers = {"bad": {"plugin": "plugs:Talker", "fail": True}, "good": {"plugin": "plugs:Talker"}}
    models = {
        "gpt-4o-mini": {"targets": targets("bad"), "fallbacks": ["private", "spare"]},
        "private": {"targets": targets("good")},
        "spare": {"targets": targets("good")},
    }
    digest = hashlib.sha256(b"sk-example-a").hexdigest()
    keys = f"keys:\n- {{id: k, hash: 'sha256:{digest}', tenant: acme, models: [gpt-4o-mini, spare]}}\n"
    stages = {"auth": [{"plugin": "api_keys", "file": "keys.yaml"}]}
    async with running(config(stages, providers, models), files={"keys.yaml": keys}) as gateway:
        answer = await gateway.post(CHAT, HELLO, key="sk-example-a")
        assert answer.status == 200
        assert answer.headers["x-qlens-model"] == "gpt-4o-mini"
        (receipt,) = await gateway.settled(1)
        assert receipt.target is not None
        assert receipt.target.public == "spare"
        assert [a.error for a in receipt.attempts] == ["provider_failed", None]


async def test_a_refusal_before_the_send_is_no_attempt() -> None:
    providers = {"one": {"plugin": "plugs:Talker"}}
    models = {"gpt-4o-mini": {"targets": targets("one")}}
    async with running(config({"route": [probe("breaker", refuse=["wrap_send"])]}, providers, models)) as gateway:
        answer = await gateway.post(CHAT, HELLO)
        assert answer.status == 429
        (receipt,) = await gateway.settled(1)
        assert receipt.attempts == ()
        assert receipt.outcome == "failed"


async def test_an_operation_that_a_provider_does_not_speak_is_400() -> None:
    providers = {"talker": {"plugin": "plugs:Talker", "dialects": ["completions"]}}
    async with running(config({}, providers)) as gateway:
        answer = await gateway.post(CHAT, HELLO)
        assert answer.status == 400
        assert "talker" in answer.json()["error"]["message"]
        assert answer.json()["error"]["code"] == "unsupported_operation"


async def test_a_body_is_made_of_a_stream_nobody_asked_for_and_usage_is_estimated_when_missing() -> None:
    providers = {"talker": {"plugin": "plugs:Talker", "usage": False}}
    async with running(config({}, providers)) as gateway:
        await gateway.post(CHAT, HELLO)
        await gateway.post(CHAT, STREAM)
        for receipt in await gateway.settled(2):
            assert receipt.usage.source == "estimated"
            assert receipt.usage.input > 0
            assert receipt.usage.output > 0


async def test_each_attempt_gets_a_fresh_body_with_the_targets_own_model_and_params() -> None:
    providers = {"one": {"plugin": "plugs:Talker", "fail": True}, "two": {"plugin": "plugs:Talker"}}
    models = {
        "gpt-4o-mini": {
            "targets": [
                {"provider": "one", "model": "m1", "params": {"temperature": 0}},
                {"provider": "two", "model": "m2"},
            ]
        }
    }
    async with running(config({}, providers, models)) as gateway:
        await gateway.post(CHAT, {**HELLO, "temperature": 1, "made_up_field": {"kept": True}})
        one, two = gateway.plugin("provider", "one").bodies[0], gateway.plugin("provider", "two").bodies[0]
        assert (one["model"], one["temperature"]) == ("m1", 0)
        assert (two["model"], two["temperature"], two["made_up_field"]) == ("m2", 1, {"kept": True})
        assert one["messages"] is not two["messages"]


async def test_max_tokens_and_n_are_clamped_under_the_clients_own_names() -> None:
    models = {"gpt-4o-mini": {"max_output_tokens": 100, "max_n": 2, "targets": targets("talker")}}
    async with running(config({}, None, models)) as gateway:
        await gateway.post(CHAT, {**HELLO, "max_tokens": 5000, "n": 2})
        await gateway.post(CHAT, HELLO)
        asked, silent = gateway.plugin("provider", "talker").bodies
        assert asked["max_tokens"] == 100
        assert "max_tokens" not in silent
        assert "max_completion_tokens" not in silent
