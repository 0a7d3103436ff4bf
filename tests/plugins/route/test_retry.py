"""The plugin `retry`: how often a call is sent, and how long it waits in between."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlens import Attempt, Call, Model, StartupError, Target
from qlens.operations import OPERATIONS
from qlens.testing import Response, Running, Scripted, check_plugin, running, upstream
from qlens_plugins.route.retry import Retry, RetryConfig

PATH = "/v1/chat/completions"
CALL = {"model": "small", "messages": [{"role": "user", "content": "hello"}]}
QUICK = "backoff_seconds: 0.001"
BROKEN = Scripted(500, body={"error": {"message": "broken"}})


def config(settings: str, *, url: str, targets: str = "", more: str = "") -> str:
    targets = targets or "{provider: up, model: a}"
    return f"""
pipeline: {{auth: [{{plugin: anonymous}}], route: [{{plugin: retry, {settings}}}], cost: []}}
providers: {{up: {{plugin: openai, base_url: '{url}', api_key: sk-example-upstream}}}}
models:
  small: {{max_output_tokens: 100, targets: [{targets}]{more}}}
  spare: {{max_output_tokens: 100, targets: [{{provider: up, model: spare}}]}}
"""


async def ask(gateway: Running, **fields: Any) -> Response:
    return await gateway.post(PATH, {**CALL, **fields})


def test_it_keeps_the_contract_of_its_stage() -> None:
    check_plugin("route", Retry)


# --- how often ---------------------------------------------------------------------------------


async def test_a_target_that_failed_is_asked_again_until_it_answers() -> None:
    async with upstream() as up, running(config(f"attempts: 3, {QUICK}", url=up.url)) as gateway:
        up.script(BROKEN, BROKEN)
        answer = await ask(gateway)
        assert (answer.status, answer.headers["x-qlens-attempts"]) == (200, "3")
        assert len(up.requests) == 3
        (receipt,) = await gateway.settled(1)
        assert [attempt.billed for attempt in receipt.attempts] == [False, False, True]


async def test_a_call_is_sent_no_more_often_than_the_attempts_say() -> None:
    async with upstream() as up, running(config(f"attempts: 3, {QUICK}", url=up.url)) as gateway:
        up.script(*[BROKEN] * 9)
        assert (await ask(gateway)).status == 502
        assert len(up.requests) == 3


async def test_the_attempts_are_counted_over_all_targets_and_fallbacks() -> None:
    targets = "{provider: up, model: a}, {provider: up, model: b}"
    text = "attempts: 3, " + QUICK
    async with (
        upstream() as up,
        running(config(text, url=up.url, targets=targets, more=", fallbacks: [spare]")) as gateway,
    ):
        up.script(*[BROKEN] * 9)
        assert (await ask(gateway)).status == 502
        assert [request.body["model"] for request in up.requests] == ["a", "b", "spare"]


async def test_one_attempt_means_no_second_target() -> None:
    targets = "{provider: up, model: a}, {provider: up, model: b}"
    async with upstream() as up, running(config("attempts: 1", url=up.url, targets=targets)) as gateway:
        up.script(BROKEN)
        assert (await ask(gateway)).status == 502
        assert len(up.requests) == 1


async def test_the_clients_own_mistake_is_not_sent_again() -> None:
    async with upstream() as up, running(config(f"attempts: 3, {QUICK}", url=up.url)) as gateway:
        up.script(Scripted(400, body={"error": {"message": "no", "type": "invalid_request_error"}}))
        assert (await ask(gateway)).status == 400
        assert len(up.requests) == 1


async def test_a_stream_is_sent_again_before_its_first_byte_and_never_after() -> None:
    async with upstream() as up, running(config(f"attempts: 3, {QUICK}", url=up.url)) as gateway:
        event = {"id": "x", "choices": [{"index": 0, "delta": {"content": "word"}, "finish_reason": None}]}
        up.script(BROKEN, Scripted(events=[event]))
        answer = await ask(gateway, stream=True)
        assert "error" in answer.events()[-1]
        assert len(up.requests) == 2


# --- how long ----------------------------------------------------------------------------------


async def test_the_providers_retry_after_is_waited_for() -> None:
    async with upstream() as up, running(config(f"attempts: 2, {QUICK}", url=up.url)) as gateway:
        up.script(Scripted(429, headers={"retry-after-ms": "250"}, body={"error": {"message": "slow down"}}))
        assert (await ask(gateway)).status == 200
        (receipt,) = await gateway.settled(1)
        first, second = receipt.attempts
        assert first.retry_after == 0.25
        assert first.ended is not None
        assert second.started - first.ended >= 0.25


async def test_a_retry_after_that_is_too_long_ends_the_call_and_is_passed_on() -> None:
    settings = "attempts: 3, max_retry_after_seconds: 5"
    async with upstream() as up, running(config(settings, url=up.url)) as gateway:
        up.script(Scripted(429, headers={"retry-after": "6"}, body={"error": {"message": "slow down"}}))
        answer = await ask(gateway)
        assert (answer.status, answer.headers["retry-after"]) == (429, "6")
        assert len(up.requests) == 1


async def test_another_target_is_asked_at_once_however_long_the_first_wants_to_be_left_alone() -> None:
    targets = "{provider: up, model: a}, {provider: up, model: b}"
    async with upstream() as up, running(config("attempts: 3", url=up.url, targets=targets)) as gateway:
        up.script(Scripted(429, headers={"retry-after": "3600"}, body={"error": {"message": "slow down"}}))
        assert (await ask(gateway)).status == 200
        assert [request.body["model"] for request in up.requests] == ["a", "b"]


async def test_a_fallback_is_asked_however_long_the_model_wants_to_be_left_alone() -> None:
    more = ", fallbacks: [spare]"
    async with upstream() as up, running(config("attempts: 3", url=up.url, more=more)) as gateway:
        up.script(Scripted(429, headers={"retry-after": "3600"}, body={"error": {"message": "slow down"}}))
        assert (await ask(gateway)).status == 200
        assert [request.body["model"] for request in up.requests] == ["a", "spare"]


async def test_who_would_sleep_past_the_deadline_hears_the_providers_error_at_once() -> None:
    text = config("attempts: 3, backoff_seconds: 8, jitter: 0", url="URL") + "server: {call_seconds: 5}\n"
    async with upstream() as up, running(text.replace("URL", up.url)) as gateway:
        up.script(BROKEN)
        answer = await ask(gateway)
        assert answer.status == 502
        assert len(up.requests) == 1


TARGET = Target("up", "a", "small")


def failed_call(
    attempts: int, *, left: int | None = 5, seconds: float = 1e6, fallbacks: Mapping[str, tuple[str, ...]] | None = None
) -> Call:
    async def reader() -> bytes:
        return b""

    call = Call(
        id="x", operation=OPERATIONS[0], path=PATH, path_params={}, query={}, headers={}, peer=None, credential=None,
        started=0, wall_ns=0, deadline=time.monotonic() + seconds, reader=reader,
    )  # fmt: skip
    call.model = Model("small", (TARGET,), fallbacks or {})
    call.targets = (TARGET,)
    call.attempts = [Attempt(n + 1, TARGET, 0.0, ended=1.0) for n in range(attempts)]
    call.attempts_left = left
    return call


def wait(config: RetryConfig, call: Call) -> float | None:
    return Retry(config, "retry").retry(call, call.attempts[-1])


def test_waits_double_up_to_the_longest() -> None:
    config = RetryConfig(backoff_seconds=0.5, max_backoff_seconds=3, jitter=0)
    assert [wait(config, failed_call(n)) for n in (1, 2, 3, 4, 5, 5000)] == [0.5, 1, 2, 3, 3, 3]


@given(attempts=st.integers(1, 40), jitter=st.floats(0, 1))
def test_jitter_only_shortens_and_by_no_more_than_its_share(attempts: int, jitter: float) -> None:
    config = RetryConfig(backoff_seconds=0.5, max_backoff_seconds=8, jitter=jitter)
    full = min(8, 0.5 * 2 ** (attempts - 1))
    found = wait(config, failed_call(attempts))
    assert found is not None
    assert full * (1 - jitter) <= found <= full


def test_waits_of_calls_that_fail_together_differ() -> None:
    assert len({wait(RetryConfig(), failed_call(1)) for _ in range(20)}) > 10


def test_without_attempts_left_there_is_no_wait() -> None:
    assert wait(RetryConfig(), failed_call(3, left=0)) is None


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ("attempts: 0", "attempts"),
        ("attempts: 1.5", "attempts"),
        ("backoff_seconds: -1", "backoff_seconds"),
        ("jitter: 1.1", "jitter"),
        ("max_retry_after_seconds: soon", "max_retry_after_seconds"),
    ],
)
async def test_settings_that_make_no_sense_stop_the_start(settings: str, name: str) -> None:
    with pytest.raises(StartupError) as error:
        async with running(config(settings, url="http://127.0.0.1:1")):
            pass
    (fault,) = error.value.faults
    assert f"pipeline.route[0].{name}" in fault.path
