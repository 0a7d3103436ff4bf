"""What passes through to a provider: only what its configuration lists, with the gateway's credential, both ways."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import anthropic as claudes
import openai
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from keepers import ACME, NARROW, PROVIDER_KEY, kept, settings

from qlens import StartupError, sse
from qlens.dialects import typed
from qlens.passthrough import escaped, matching, path_patterns
from qlens.testing import Running, Scripted, running
from qlens.testing.anthropic import KEY, MODEL, anthropic
from qlens.testing.objects import FakeKeeper, keeper

PATTERNS = '["GET /models", "GET /models/*", "POST /evals/**", "DELETE /things/*/parts"]'
PASS = f", passthrough: {PATTERNS}"
CHUNK = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m"}
HELLO: list[Any] = [{"role": "user", "content": "Hello"}]
DELTA = sse.write({**CHUNK, "choices": [{"index": 0, "delta": {"role": "assistant", "content": "Hello"}}]})


@pytest.fixture
async def up() -> AsyncIterator[FakeKeeper]:
    async with keeper() as fake:
        yield fake


@pytest.fixture
async def gateway(up: FakeKeeper) -> AsyncIterator[Running]:
    async with kept(settings(up, up, more=PASS)) as gateway:
        yield gateway


async def test_a_request_passes_with_the_gateways_credential_and_nothing_of_the_clients(
    gateway: Running, up: FakeKeeper
) -> None:
    secret = {"cookie": "a=b", "x-forwarded-for": "10.0.0.1", "x-api-key": "sk-example-else", "te": "trailers"}
    answer = await gateway.get("/v1/providers/one/models?limit=3&q=a%26b&q=c", key=ACME, headers=secret)
    assert answer.status == 200
    assert answer.json()["data"][0]["id"] == "upstream"
    (request,) = up.requests
    assert (request.path, request.query["limit"]) == ("/v1/models", "3")
    assert request.headers["authorization"] == f"Bearer {PROVIDER_KEY}"
    assert not {*secret} & {name.lower() for name in request.headers}
    assert ACME not in repr(request.headers)


async def test_its_receipt_has_outcome_and_bytes_and_no_price(gateway: Running) -> None:
    answer = await gateway.get("/v1/providers/one/models", key=ACME)
    (receipt,) = await gateway.settled(1)
    assert (receipt.operation, receipt.outcome, receipt.status) == ("passthrough", "complete", 200)
    assert (receipt.bytes_out, receipt.cost.state, receipt.usage.total) == (len(answer.body), "unpriced", 0)
    assert receipt.target is not None
    assert receipt.target.model == "GET /models"


async def test_bodies_pass_unchanged_in_both_directions(gateway: Running, up: FakeKeeper) -> None:
    content = bytes(range(256)) * 12_000
    up.script(Scripted(status=201, body=content[::-1], headers={"content-type": "application/x-odd"}, split=100_000))
    answer = await gateway.request(
        "POST", "/v1/providers/one/evals/a/b", body=content, key=ACME, headers={"content-type": "application/x-even"}
    )
    assert (answer.status, answer.headers["content-type"]) == (201, "application/x-odd")
    assert answer.body == content[::-1]
    assert up.requests[0].content == content
    assert up.requests[0].headers["content-type"] == "application/x-even"


async def test_events_pass_as_they_come(gateway: Running, up: FakeKeeper) -> None:
    up.script(Scripted(events=[{"n": 1}, {"n": 2}, "[DONE]"]))
    answer = await gateway.post("/v1/providers/one/evals/run", {"stream": True}, key=ACME)
    assert answer.events() == [{"n": 1}, {"n": 2}, "[DONE]"]


async def test_an_answer_without_a_body_passes(gateway: Running, up: FakeKeeper) -> None:
    up.script(Scripted(status=204))
    answer = await gateway.request("DELETE", "/v1/providers/one/things/5/parts", key=ACME)
    assert (answer.status, answer.body) == (204, b"")


async def test_what_breaks_off_ends_with_the_connection_and_is_not_complete(gateway: Running, up: FakeKeeper) -> None:
    up.script(Scripted(body=b"x" * 100_000, headers={"content-type": "text/plain"}, cut_at=50_000))
    with pytest.raises(Exception, match="payload"):
        await gateway.get("/v1/providers/one/models", key=ACME)
    (receipt,) = await gateway.settled(1)
    assert (receipt.outcome, receipt.error) == ("failed", "upstream_truncated")


@pytest.mark.parametrize(
    ("half", "between"),
    [
        (b"", b""),
        (DELTA, b""),
        (DELTA[:20], b"\n\n"),
        (DELTA[:3], b"\n\n"),
        (DELTA[:-1], b"\n\n"),
        (DELTA[:-2], b"\n\n"),
        (b": keep", b"\n\n"),
        (DELTA.replace(b"\n", b"\r\n"), b""),
        (DELTA.replace(b"\n", b"\r\n")[:-2], b"\n\n"),
        (DELTA.replace(b"\n", b"\r"), b""),
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_the_error_that_ends_a_broken_stream_is_an_event_of_its_own(
    gateway: Running, up: FakeKeeper, method: str, half: bytes, between: bytes
) -> None:
    up.script(Scripted(events=[DELTA, half, b"more"], cut_at=len(DELTA + half), gap=0.02))
    path = {"GET": "models", "POST": "evals/run"}[method]
    answer = await gateway.request(method, f"/v1/providers/one/{path}", body=b"{}", key=ACME)
    assert answer.body.startswith(DELTA + half + between + b"event: error\ndata: {")
    last = sse.data(sse.cut(answer.body)[-1])
    assert last is not None
    assert orjson.loads(last)["error"]["code"] == "upstream_truncated"
    (receipt,) = await gateway.settled(1)
    assert (receipt.outcome, receipt.error) == ("failed", "upstream_truncated")


async def until_it_fails(stream: AsyncIterator[Any]) -> list[Any]:
    """What an SDK makes of a stream before it raises an error."""
    seen = []
    try:
        async for each in stream:
            seen.append(each)
    except (openai.APIError, claudes.APIError, ValueError):  # the last is what half a JSON is
        return seen
    raise AssertionError("the stream was taken for a whole one")


async def test_openais_sdk_fails_wherever_a_stream_breaks(up: FakeKeeper) -> None:
    async with kept(settings(up, up, more=', passthrough: ["POST /**"]')) as gateway:
        client = openai.AsyncOpenAI(base_url=f"{gateway.url}/v1/providers/one", api_key=ACME, max_retries=0)
        async with client:
            for size in range(len(DELTA), 2 * len(DELTA) + 1):
                up.script(Scripted(events=[DELTA + DELTA, "[DONE]"], cut_at=size))
                stream = await client.chat.completions.create(model="m", messages=HELLO, stream=True)
                said = [chunk.choices[0].delta.content for chunk in await until_it_fails(stream)]
                # What lacks only its blank line was said whole.
                assert said == ["Hello"] * (1 + (size >= 2 * len(DELTA) - 2))


async def test_anthropics_sdk_fails_wherever_a_stream_breaks() -> None:
    async with anthropic() as up:
        text = f"""
pipeline: {{auth: [{{plugin: anonymous}}], cost: []}}
providers: {{claude: {{plugin: anthropic, base_url: "{up.url}", api_key: {KEY}, passthrough: ["POST /v1/messages"]}}}}
models: {{m: {{max_output_tokens: 10, targets: [{{provider: claude, model: {MODEL}}}]}}}}
"""
        said = typed.write({"type": "content_block_stop", "index": 0})
        async with running(text) as gateway:
            base = f"{gateway.url}/v1/providers/claude"
            async with claudes.AsyncAnthropic(base_url=base, api_key="sk-example", max_retries=0) as client:
                for size in range(len(said), 2 * len(said) + 1):
                    up.script(Scripted(events=[said + said, "[DONE]"], cut_at=size))
                    stream = await client.messages.create(model=MODEL, max_tokens=5, messages=HELLO, stream=True)
                    seen = [event.type for event in await until_it_fails(stream)]
                    assert seen == ["content_block_stop"] * (1 + (size >= 2 * len(said) - 2))


async def test_errors_are_mapped_and_not_forwarded(gateway: Running, up: FakeKeeper) -> None:
    for status, expected in ((401, 502), (404, 404), (429, 429), (500, 502), (302, 502)):
        up.script(Scripted(status, body={"error": {"message": "sk-example-echoed-key-0123456789"}}))
        answer = await gateway.get("/v1/providers/one/models", key=ACME)
        assert answer.status == expected
        assert "echoed" not in answer.text


@pytest.mark.parametrize(
    "path",
    [
        "one/files",
        "one/models/a/b",
        "one/models/",
        "one/models/..",
        "one/models/%2e%2e",
        "one/models/..%2Ffiles",
        "one/models/a%2Fb",
        "one/models/a%5Cb",
        "one/models/a%00",
        "one//models",
        "two/models",  # its configuration lists nothing
        "echo/models",  # nor can it
        "none/models",
    ],
)
async def test_what_is_not_listed_is_no_path(gateway: Running, up: FakeKeeper, path: str) -> None:
    async with gateway.session.get(
        f"{gateway.url}/v1/providers/{path}", headers={"authorization": f"Bearer {ACME}"}
    ) as answer:
        assert answer.status == 404
        assert (await answer.json())["error"]["code"] == "unknown_url"
    assert not up.requests


async def test_another_method_does_not_pass(gateway: Running, up: FakeKeeper) -> None:
    assert (await gateway.post("/v1/providers/one/models", {}, key=ACME)).status == 404
    assert not up.requests


async def test_a_key_for_some_models_passes_nowhere(gateway: Running, up: FakeKeeper) -> None:
    assert (await gateway.get("/v1/providers/one/models", key=NARROW)).status == 404
    assert not up.requests


@given(st.text(max_size=30), st.text(max_size=30))
def test_no_path_leaves_the_segments_that_a_pattern_allows(one: str, two: str) -> None:
    path = f"{one}/{two}"
    if matching(["GET /models/*"], "GET", path) is None:
        return
    sent = escaped(path)
    assert sent.isascii()
    assert sent.count("/") == 2
    assert not {"?", "#", "\\", " ", "%2F"} & {*sent}
    assert not {".", ".."} & {*sent.split("/")}


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("models", "must begin with one of DELETE, GET"),
        ("TRACE /models", "must begin with one of DELETE, GET"),
        ("GET models", "must name a path"),
        ("GET /a//b", "must name a path"),
        ("GET /a?b", "must name a path"),
        ("GET /a/mod*", "must name a path"),
        ("GET /**/a", "only at its end"),
        ("GET /a/../b", "only at its end"),
    ],
)
async def test_a_pattern_that_would_not_do_what_it_says_is_refused(up: FakeKeeper, pattern: str, said: str) -> None:
    with pytest.raises(StartupError, match="passthrough") as caught:
        async with kept(settings(up, up, more=f', passthrough: ["{pattern}"]')):
            raise AssertionError("it started")
    assert said in str(caught.value)


def test_good_patterns_are_accepted() -> None:
    path_patterns(None, None, ("GET /models", "POST /a/*/b", "PUT /a/**", "DELETE /a:b/c-d_e.f"))


async def test_anthropics_paths_pass_with_its_own_headers() -> None:
    async with anthropic() as up:
        text = f"""
pipeline: {{auth: [{{plugin: anonymous}}], cost: []}}
providers: {{claude: {{plugin: anthropic, base_url: "{up.url}", api_key: {KEY}, passthrough: ["GET /v1/models/*"]}}}}
models: {{m: {{max_output_tokens: 10, targets: [{{provider: claude, model: {MODEL}}}]}}}}
"""
        async with running(text) as gateway:
            answer = await gateway.get(f"/v1/providers/claude/v1/models/{MODEL}")
        assert answer.status == 404  # as strict as the real one, of which this fake has the messages alone
        (request,) = up.requests
        assert (request.path, request.headers["x-api-key"]) == (f"/v1/models/{MODEL}", KEY)
        assert "anthropic-version" in request.headers
