"""The fake Azure refuses what the real one refuses, and streams with the same oddities."""

from __future__ import annotations

from typing import Any

import aiohttp
import orjson
import pytest

from qlens import sse
from qlens.testing import ManualClock, Scripted
from qlens.testing.azure import BLOCKED, KEY, Deployment, FakeAzure, azure
from qlens.testing.entra import entra
from qlens.testing.upstreams import TEXT

CLASSIC = "/openai/deployments/my-deployment/chat/completions?api-version=2024-10-21"
PREVIEW = "/openai/deployments/my-deployment/chat/completions?api-version=2025-04-01-preview"
V1 = "/openai/v1/chat/completions"
HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}]}


async def ask(
    cloud: FakeAzure, path: str = CLASSIC, body: Any = HELLO, headers: dict[str, str] | None = None
) -> tuple[int, Any]:
    sent = {"api-key": KEY} if headers is None else headers
    async with aiohttp.ClientSession() as session, session.post(cloud.root + path, json=body, headers=sent) as answer:
        raw = await answer.read()
        return answer.status, orjson.loads(raw) if answer.content_type == "application/json" else raw


def code(body: Any) -> Any:
    return body["error"]["code"]


@pytest.mark.parametrize("path", [CLASSIC, PREVIEW])
async def test_it_answers_with_what_the_filter_found(path: str) -> None:
    async with azure() as cloud:
        status, body = await ask(cloud, path)
        assert (status, body["model"]) == (200, "gpt-4o-2024-11-20")
        assert body["choices"][0]["message"]["content"] == TEXT
        assert body["choices"][0]["content_filter_results"]["hate"] == {"filtered": False, "severity": "safe"}
        assert body["prompt_filter_results"][0]["prompt_index"] == 0


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        (CLASSIC, {}, 401),
        (CLASSIC, {"api-key": "example-wrong"}, 401),
        (CLASSIC, {"authorization": f"Bearer {KEY}"}, 401),  # only v1 takes a key as bearer
        (V1, {"authorization": f"Bearer {KEY}"}, 200),
        (V1, {"api-key": KEY}, 200),
    ],
)
async def test_a_key_has_its_header(path: str, headers: dict[str, str], status: int) -> None:
    async with azure() as cloud:
        got, body = await ask(cloud, path, {**HELLO, "model": "my-deployment"}, headers)
        assert got == status
        if status == 401:
            assert body["statusCode"] == 401
            assert "error" not in body


async def test_a_token_must_be_fresh_and_for_the_surface() -> None:
    clock = ManualClock()
    async with entra(clock=clock) as identity, azure(entra=identity) as cloud:
        old, new = identity.token("https://cognitiveservices.azure.com"), identity.token("https://ai.azure.com")
        asked = {**HELLO, "model": "my-deployment"}
        for token, path, status in ((old, CLASSIC, 200), (new, CLASSIC, 401), (old, V1, 200), (new, V1, 200)):
            assert (await ask(cloud, path, asked, {"authorization": f"Bearer {token}"}))[0] == status
        clock.advance(3600)
        assert (await ask(cloud, CLASSIC, asked, {"authorization": f"Bearer {old}"}))[0] == 401


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/openai/deployments/my-deployment/chat/completions", "404"),
        ("/openai/deployments/my-deployment/chat/completions?api-version=2020-01-01", "404"),
        ("/openai/deployments/my-deployment/nonsense?api-version=2024-10-21", "404"),
        ("/v1/chat/completions", "404"),
        ("/openai/v1/chat/completions?api-version=2024-10-21", "404"),
        ("/openai/v1/completions", "404"),
        ("/openai/deployments/my-deployment/audio/speech?api-version=2024-10-21", "404"),
        ("/openai/deployments/other/chat/completions?api-version=2024-10-21", "DeploymentNotFound"),
    ],
)
async def test_a_wrong_place_is_not_found(path: str, expected: str) -> None:
    async with azure() as cloud:
        status, body = await ask(cloud, path, {**HELLO, "model": "my-deployment"})
        assert (status, code(body)) == (404, expected)


@pytest.mark.parametrize(("version", "status"), [("2024-10-21", 404), ("2025-04-01-preview", 200)])
async def test_pictures_are_edited_in_previews_alone(version: str, status: int) -> None:
    form = aiohttp.FormData({"prompt": "a hat"})
    form.add_field("image", b"a", filename="a.png")
    deployments = {"my-deployment": Deployment("gpt-image-1")}
    async with azure(deployments) as cloud, aiohttp.ClientSession(headers={"api-key": KEY}) as session:
        place = f"{cloud.root}/openai/deployments/my-deployment/images/edits?api-version={version}"
        async with session.post(place, data=form) as answer:
            assert answer.status == status


@pytest.mark.parametrize(
    ("version", "field", "status"),
    [
        ("2024-10-21", {"max_completion_tokens": 5}, 200),
        ("2024-10-21", {"store": True}, 400),  # in the preview before it, and not in it
        ("2024-10-01-preview", {"store": True}, 200),
        ("2024-10-01-preview", {"user_security_context": {}}, 400),
        ("2024-12-01-preview", {"prediction": {}}, 400),
        ("2025-01-01-preview", {"prediction": {}, "modalities": ["text"], "audio": {}}, 200),
        ("2025-04-01-preview", {"service_tier": "auto"}, 400),
        ("2025-04-01-preview", {"prompt_cache_key": "a"}, 400),
        (None, {"service_tier": "auto", "prompt_cache_key": "a", "safety_identifier": "b", "store": True}, 200),
        (None, {"of_tomorrow": 1}, 400),
    ],
)
async def test_it_knows_the_fields_of_its_api_version(version: str | None, field: dict[str, Any], status: int) -> None:
    path = V1 if version is None else CLASSIC.replace("2024-10-21", version)
    async with azure() as cloud:
        got, body = await ask(cloud, path, {**HELLO, "model": "my-deployment", **field})
        assert got == status
        if status == 400:
            assert body["error"]["message"] == f"Unrecognized request argument supplied: {', '.join(field)}"


@pytest.mark.parametrize(
    ("model", "path", "status"),
    [
        ("gpt-image-1", "images/generations", 200),
        ("dall-e-3", "images/generations", 200),
        ("gpt-4o", "images/generations", 400),
        ("tts", "audio/speech", 200),
        ("whisper", "audio/speech", 400),
        ("gpt-image-1", "chat/completions", 400),
    ],
)
async def test_a_deployment_does_what_its_model_can(model: str, path: str, status: int) -> None:
    body = {"model": "my-deployment", "prompt": "a", "input": "a", "voice": "alloy", **HELLO}
    async with azure({"my-deployment": Deployment(model)}) as cloud:
        got, said = await ask(cloud, f"/openai/v1/{path}", body)
        assert got == status
        if status == 400:
            assert code(said) == "OperationNotSupported"


@pytest.mark.parametrize(
    ("model", "path", "called"),
    [("gpt-4o", "completions", "completion"), ("gpt-35-turbo-instruct", "chat/completions", "chatCompletion")],
)
async def test_a_model_chats_or_completes(model: str, path: str, called: str) -> None:
    async with azure({"my-deployment": Deployment(model)}) as cloud:
        place = f"/openai/deployments/my-deployment/{path}?api-version=2024-10-21"
        status, body = await ask(cloud, place, {**HELLO, "prompt": "Hello"})
        assert (status, code(body)) == (400, "OperationNotSupported")
        wording = f"The {called} operation does not work with the specified model, {model}."
        assert body["error"]["message"].startswith(wording)


async def test_a_model_that_completes_completes() -> None:
    async with azure({"my-deployment": Deployment("gpt-35-turbo-instruct")}) as cloud:
        place = "/openai/deployments/my-deployment/completions?api-version=2024-10-21"
        status, body = await ask(cloud, place, {"prompt": "Hello"})
        assert (status, body["choices"][0]["text"], body["model"]) == (200, TEXT, "gpt-35-turbo-instruct-0914")


async def test_v1_takes_the_deployment_from_the_body() -> None:
    async with azure() as cloud:
        assert (await ask(cloud, V1))[1]["error"]["param"] == "model"
        assert code((await ask(cloud, V1, {**HELLO, "model": "other"}))[1]) == "DeploymentNotFound"


BOTH = [{"role": "system", "content": "a"}, {"role": "developer", "content": "b"}]


@pytest.mark.parametrize(
    ("model", "path", "fields", "expected"),
    [
        ("gpt-4o", CLASSIC, {"nonsense": 1}, "Unrecognized request argument supplied: nonsense"),
        ("gpt-4o", PREVIEW, {"reasoning_effort": "low"}, "Unrecognized request argument supplied: reasoning_effort"),
        ("gpt-4o", CLASSIC, {"stream_options": {}}, "only allowed when 'stream' is enabled"),
        ("gpt-4o", CLASSIC, {"messages": BOTH[1:]}, "Invalid value: 'developer'"),
        ("gpt-5", CLASSIC, {"reasoning_effort": "low"}, "Unrecognized request argument supplied: reasoning_effort"),
        ("gpt-5", PREVIEW, {"max_tokens": 5}, "'max_tokens' is not supported with this model"),
        ("gpt-5", PREVIEW, {"temperature": 0}, "'temperature' does not support 0"),
        ("gpt-5", PREVIEW, {"logprobs": True}, "'logprobs' is not supported"),
        ("gpt-5", PREVIEW, {"messages": BOTH}, "cannot both be present"),
        ("gpt-5", PREVIEW, {"reasoning_effort": "minimal", "parallel_tool_calls": True}, "'parallel_tool_calls'"),
        ("gpt-5.1", PREVIEW, {"reasoning_effort": "low", "top_p": 0.5}, "'top_p' does not support 0.5"),
        ("o3-mini", PREVIEW, {"parallel_tool_calls": False}, "'parallel_tool_calls'"),
        ("gpt-5.1-codex", PREVIEW, {}, "does not work with the specified model"),
        ("text-embedding-3-small", CLASSIC, {}, "does not work with the specified model"),
        ("gpt-4o", CLASSIC, {"messages": [{"role": "user", "content": BLOCKED}]}, "content management policy"),
    ],
)
async def test_it_refuses_what_the_model_does_not_have(model: str, path: str, fields: Any, expected: str) -> None:
    async with azure({"my-deployment": Deployment(model)}) as cloud:
        status, body = await ask(cloud, path, {**HELLO, **fields})
        assert status == 400
        assert expected in body["error"]["message"]


@pytest.mark.parametrize(
    ("model", "fields"),
    [
        ("gpt-5", {"temperature": 1, "max_completion_tokens": 5, "reasoning_effort": "low"}),
        ("gpt-5.1", {"temperature": 0.1}),
        ("gpt-5.1", {"temperature": 0.1, "reasoning_effort": "none"}),
        ("gpt-5-mini", {"parallel_tool_calls": True}),
        ("gpt-5-chat", {"temperature": 0.1, "max_tokens": 5}),
        ("gpt-4o", {"messages": BOTH}),
    ],
)
async def test_it_takes_what_the_model_has(model: str, fields: Any) -> None:
    async with azure({"my-deployment": Deployment(model)}) as cloud:
        status, body = await ask(cloud, PREVIEW, {**HELLO, **fields})
        assert status == 200, body


async def test_it_refuses_stream_options_where_the_api_version_is_too_old() -> None:
    async with azure() as cloud:
        asked = {**HELLO, "stream": True, "stream_options": {"include_usage": True}}
        status, body = await ask(cloud, CLASSIC.replace("2024-10-21", "2024-06-01"), asked)
        assert (status, body["error"]["message"]) == (400, "Unrecognized request argument supplied: stream_options")


async def events(cloud: FakeAzure, **fields: Any) -> list[Any]:
    _, raw = await ask(cloud, CLASSIC, {**HELLO, "stream": True, **fields})
    found = [sse.data(event) for event in sse.Splitter().feed(raw)]
    return [orjson.loads(data) if data != b"[DONE]" else "[DONE]" for data in found if data is not None]


async def test_a_stream_begins_with_the_prompts_results_and_carries_results_in_every_choice() -> None:
    async with azure() as cloud:
        first, *rest, end = await events(cloud)
        assert (first["id"], first["choices"], "prompt_filter_results" in first) == ("", [], True)
        assert all("content_filter_results" in choice for event in rest for choice in event["choices"])
        assert end == "[DONE]"


async def test_the_asynchronous_filter_speaks_without_delta_and_after_the_end() -> None:
    late = Deployment(filter="asynchronous", late_block=True, ends_with_done=False)
    async with azure({"my-deployment": late}) as cloud:
        found = await events(cloud, stream_options={"include_usage": True})
        nameless = [event["choices"][0] for event in found[1:] if not event["id"]]
        assert nameless
        assert all("delta" not in choice and "content_filter_offsets" in choice for choice in nameless)
        assert nameless[-1]["finish_reason"] == "content_filter"
        assert found[-1] != "[DONE]"
        assert any(event["choices"] == [] and event["usage"] for event in found[1:])


async def test_a_busy_deployment_spills_over_only_where_the_request_allows_it() -> None:
    async with azure({"my-deployment": Deployment(busy=True), "standard": Deployment()}) as cloud:
        assert (await ask(cloud))[0] == 429
        spill = {"api-key": KEY, "x-ms-spillover-deployment": "standard"}
        assert (await ask(cloud, headers=spill))[0] == 200


async def test_a_router_says_which_model_answered() -> None:
    async with azure({"my-deployment": Deployment("model-router", routes_to="gpt-5-mini")}) as cloud:
        assert (await ask(cloud))[1]["model"] == "gpt-5-mini-2025-08-07"


async def test_a_script_comes_first_and_every_request_is_recorded() -> None:
    async with azure() as cloud:
        cloud.script(Scripted(503))
        assert [(await ask(cloud))[0] for _ in range(2)] == [503, 200]
        assert [request.headers["api-key"] for request in cloud.requests] == [KEY, KEY]
