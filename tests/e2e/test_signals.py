"""Reload and shutdown of a running gateway, as an operator asks for them: by signal."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from e2e.serving import WAIT_SECONDS, Served, changed, receipts, serving, until
from openai import OpenAI
from openai.types.chat import ChatCompletionUserMessageParam

SIXTY = {
    "plugin": "token_bucket",
    "store": {"kind": "memory"},
    "limits": [{"per": "tenant", "requests_per_minute": 60}],
}


def sdk(served: Served) -> OpenAI:
    """A client that does not try again."""
    return OpenAI(base_url=f"{served.url}/v1", api_key=served.key, max_retries=0)


def models(served: Served) -> set[str]:
    """The models the gateway lists."""
    with sdk(served) as client:
        return {model.id for model in client.models.list()}


def with_model(name: str, **changes: Any) -> dict[str, Any]:
    """A change that adds a model, among others."""
    return {"models": {name: {"max_output_tokens": 10, "targets": [{"provider": "echo", "model": name}]}}, **changes}


def ask(served: Served, model: str = "gpt-4o-mini") -> httpx2.Response:
    """One chat call, with its headers."""
    body = {"model": model, "messages": [{"role": "user", "content": "Still there?"}]}
    headers = {"authorization": f"Bearer {served.key}"}
    return httpx2.post(f"{served.url}/v1/chat/completions", json=body, headers=headers, timeout=10)


def test_sighup_takes_a_changed_file_without_a_failed_call(tmp_path: Path) -> None:
    with serving(tmp_path) as served:
        stop = threading.Event()
        failed: list[openai.OpenAIError] = []
        done: list[int] = []

        def call_on_and_on() -> None:
            with sdk(served) as client:
                while not stop.is_set():
                    question: ChatCompletionUserMessageParam = {"role": "user", "content": str(len(done))}
                    try:
                        client.chat.completions.create(model="gpt-4o-mini", messages=[question])
                    except openai.OpenAIError as error:
                        failed.append(error)
                    done.append(1)
                    time.sleep(0.02)

        caller = threading.Thread(target=call_on_and_on)
        caller.start()
        try:
            for name in ("brand-new", "newer-still"):
                served.config.write_text(changed(with_model(name)))
                served.signal(signal.SIGHUP)
                until(lambda name=name: name in models(served), f"the model {name}")  # type: ignore[misc]
                so_far = len(done)
                until(lambda so_far=so_far: len(done) > so_far + 5, "a call after the reload")  # type: ignore[misc]
        finally:
            stop.set()
            caller.join()
        assert not failed
        assert "brand-new" not in models(served)


def test_sighup_leaves_buckets_as_full_as_they_were(tmp_path: Path) -> None:
    with serving(tmp_path, changes={"pipeline": {"rate_limit": [SIXTY]}}) as served:
        for _ in range(40):
            assert ask(served).status_code == 200
        served.config.write_text(changed(with_model("brand-new", pipeline={"rate_limit": [SIXTY]})))
        served.signal(signal.SIGHUP)
        until(lambda: "loaded configuration" in served.output, "the reload")
        after = ask(served, "brand-new")
        assert after.status_code == 200
        assert int(after.headers["x-ratelimit-remaining-requests"]) < 50


def test_sighup_with_a_bad_file_keeps_the_old_configuration_and_says_why(tmp_path: Path) -> None:
    with serving(tmp_path) as served:
        served.config.write_text(changed({"pipeline": {"cache": [{"plugin": "exactly"}]}}))
        served.signal(signal.SIGHUP)
        until(lambda: "exactly" in served.output, "the fault")
        assert "pipeline.cache[0]" in served.output
        assert ask(served).status_code == 200
        assert served.get("/readyz")[0] == 200


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stop_lets_a_stream_finish_and_writes_its_receipt(tmp_path: Path, number: signal.Signals) -> None:
    with serving(tmp_path) as served, sdk(served) as client:
        stream = client.chat.completions.create(
            model="echo-slow",
            messages=[{"role": "user", "content": "one two three four five six seven eight nine ten"}],
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = iter(stream)
        next(chunks)
        served.signal(number)
        rest = list(chunks)
        assert rest[-1].usage is not None
        assert rest[-2].choices[0].finish_reason == "stop"
        assert served.process.wait(WAIT_SECONDS) == 0
        (row,) = receipts(served, "--model", "echo-slow")
        assert row["calls"] == 1


def test_new_calls_are_refused_while_an_old_one_drains(tmp_path: Path) -> None:
    with serving(tmp_path) as served, sdk(served) as client:
        words = " ".join(str(number) for number in range(20))
        stream = client.chat.completions.create(
            model="echo-slow", messages=[{"role": "user", "content": words}], stream=True
        )
        chunks = iter(stream)
        next(chunks)
        served.signal(signal.SIGTERM)
        until(lambda: not ready(served), "the end of readiness")
        with sdk(served) as late, pytest.raises((openai.APIConnectionError, openai.InternalServerError)):
            late.models.list()
        assert list(chunks)[-1].choices[0].finish_reason == "stop"


@pytest.mark.parametrize("workers", [1, 2])
def test_calls_are_taken_for_a_while_after_the_order_to_stop_though_it_is_not_ready(
    tmp_path: Path, workers: int
) -> None:
    """R16: whoever has not learned of it yet is served; then the door closes, and nobody is cut off."""
    server = {"workers": workers, "accept_seconds": 1.5}
    with serving(tmp_path, changes={"server": server, "pipeline": {"rate_limit": []}}) as served:
        assert served.get("/readyz")[0] == 200
        served.signal(signal.SIGTERM)
        until(lambda: served.get("/readyz")[0] == 503, "the end of readiness")
        answered: list[int] = []
        ends = time.monotonic() + WAIT_SECONDS
        while time.monotonic() < ends:
            try:
                answered.append(ask(served).status_code)  # on a connection of its own
            except httpx2.ConnectError:
                break
        assert set(answered) == {200}
        assert served.process.wait(WAIT_SECONDS) == 0
        (row,) = receipts(served, "--model", "gpt-4o-mini")
        assert row["calls"] == len(answered)


def ready(served: Served) -> bool:
    """Whether /readyz says so; a closed socket is a no."""
    try:
        return served.get("/readyz")[0] == 200
    except OSError:
        return False


def test_stream_that_outlasts_the_drain_is_cut_with_an_error_and_accounted_for(tmp_path: Path) -> None:
    with serving(tmp_path, changes={"server": {"drain_seconds": 0.5}}) as served, sdk(served) as client:
        words = " ".join(str(number) for number in range(200))
        stream = client.chat.completions.create(
            model="echo-slow", messages=[{"role": "user", "content": words}], stream=True
        )
        chunks = iter(stream)
        next(chunks)
        served.signal(signal.SIGTERM)
        with pytest.raises(openai.APIError):
            list(chunks)
        assert served.process.wait(WAIT_SECONDS) == 0
        (row,) = receipts(served, "--model", "echo-slow")
        assert row["calls"] == 1
