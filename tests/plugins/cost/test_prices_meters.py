"""What is billed by something else than tokens: by the request, the character, the second, the picture, the query."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from aiohttp import WSServerHandshakeError

from qlens.cli import main
from qlens.testing import Running, Scripted, running, upstream

TABLE = """
- {model: chat, input: 1, output: 2, meters: {requests: 0.01}, tiers: {flex: 0.5}}
- {model: flat, meters: {requests: 0.002}}
- {model: tokens, input: 0.6, output: 12}
- {model: voice, input: 0.6, output: 12, audio_in: 3, audio_out: 24}
- {model: characters, meters: {characters: 0.000015}}
- {model: seconds, meters: {seconds: 0.0001}}
- {model: pictures, meters: {images: 0.04}}
- {model: queries, meters: {queries: 0.002}}
- {model: embeds, input: 0.02}
- {model: long, input: 1, output: 2, above_prompt_tokens: 10}
"""
MODELS = ("chat", "flat", "tokens", "voice", "characters", "seconds", "pictures", "queries", "embeds", "long")
HELLO = {"messages": [{"role": "user", "content": "hello"}]}
SPEECH = {"input": "hello there friend", "voice": "alloy"}
LISTENED = {"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}]}]}  # fmt: skip  # noqa: E501


def yaml(url: str, more: str = "", plugin: str = "openai") -> str:
    rows = "".join(f"        {line}\n" for line in TABLE.strip().splitlines())
    models = "".join(
        f"  {name}: {{max_output_tokens: 100, targets: [{{provider: up, model: {name}}}]}}\n" for name in MODELS
    )
    provider = f'{{plugin: openai, base_url: "{url}", api_key: sk-example-0123456789}}'
    return f"""
pipeline:
  auth: [{{plugin: anonymous}}]
  cost:
    - plugin: prices
      {more}
      table:
{rows}
providers: {{up: {provider if plugin == "openai" else "{plugin: echo}"}}}
models:
{models}"""


def answer(**usage: object) -> Scripted:
    """A chat's answer with this usage."""
    message = {"role": "assistant", "content": "Hi"}
    choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
    return Scripted(body={"object": "chat.completion", "choices": choices, "usage": usage})


# --- by the request ----------------------------------------------------------------------------


async def test_a_request_has_its_price_beside_its_tokens() -> None:
    async with upstream() as up, running(yaml(up.url)) as gateway:
        up.script(answer(prompt_tokens=10, completion_tokens=5))
        told = await gateway.post("/v1/chat/completions", {"model": "chat", **HELLO})
        assert told.headers["x-qlens-cost-usd"] == "0.01002"
        (receipt,) = await gateway.settled(1)
    assert (receipt.cost.picos, receipt.cost.state) == (10_020_000_000, "exact")
    assert receipt.cost.lines == (
        ("input", 10, 1_000_000),
        ("output", 5, 2_000_000),
        ("requests", 1, 10_000_000_000),
    )
    assert not receipt.usage.meters  # it is no usage: whoever adds usages up adds no requests


async def test_a_tier_s_factor_is_of_the_request_too_and_a_stream_pays_once() -> None:
    async with upstream() as up, running(yaml(up.url)) as gateway:
        chunk = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "chat", "service_tier": "flex"}
        events = [
            {
                **chunk,
                "choices": [{"index": 0, "delta": {"role": "assistant", "content": "Hi"}, "finish_reason": None}],
            },
            {**chunk, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]},
            {**chunk, "choices": [], "usage": {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}},
        ]
        up.script(Scripted(events=events))
        body = {"model": "chat", **HELLO, "stream": True, "stream_options": {"include_usage": True}}
        told = await gateway.post("/v1/chat/completions", body)
        usage = next(event["usage"] for event in told.events() if event != "[DONE]" and event.get("usage"))
        assert usage["cost_usd"] == "0.00501"
        (receipt,) = await gateway.settled(1)
    assert receipt.cost.picos == 5_010_000_000


async def test_a_model_that_is_billed_by_the_request_alone_needs_no_price_of_tokens() -> None:
    async with upstream() as up, running(yaml(up.url, "strict: true")) as gateway:
        up.script(answer(prompt_tokens=10, completion_tokens=5))
        told = await gateway.post("/v1/chat/completions", {"model": "flat", **HELLO})
        assert told.headers["x-qlens-cost-usd"] == "0.002"


async def test_who_asks_for_what_was_answered_before_pays_no_request() -> None:
    async with upstream() as up, running(yaml(up.url)) as gateway:
        response = {"id": "resp_1", "object": "response", "status": "completed", "output": []}
        up.script(Scripted(body={**response, "usage": {"input_tokens": 10, "output_tokens": 5, "total_tokens": 15}}))
        made = await gateway.post("/v1/responses", {"model": "chat", "input": "hello"})
        assert made.headers["x-qlens-cost-usd"] == "0.01002"
        up.script(Scripted(body=response))
        again = await gateway.get(f"/v1/responses/{made.json()['id']}")
        assert again.status == 200, again.text
        first, second = await gateway.settled(2)
    assert (first.cost.picos, second.cost.picos) == (10_020_000_000, 0)


def test_the_most_a_call_can_cost_has_its_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "qlens.yaml").write_text(yaml("http://127.0.0.1:9/v1"))
    (tmp_path / "body.json").write_text(json.dumps({"model": "chat", **HELLO, "max_tokens": 100}))
    assert main(["explain", str(tmp_path / "qlens.yaml"), str(tmp_path / "body.json")]) == 0
    assert "1 requests x 0.01 = " in capsys.readouterr().out


# --- by the unit -------------------------------------------------------------------------------


async def test_what_is_billed_by_the_unit_is_not_billed_by_the_tokens_of_its_text_as_well() -> None:
    """18 characters, whose tokens nobody bills."""
    async with upstream() as up, running(yaml(up.url)) as gateway:
        up.script(Scripted(body=b"sound", headers={"content-type": "audio/mpeg"}))
        assert (await gateway.post("/v1/audio/speech", {"model": "characters", **SPEECH})).status == 200
        up.script(Scripted(body={"results": [{"index": 0, "relevance_score": 0.5}]}))
        asked = {"model": "queries", "query": "hats", "documents": ["a hat", "a cat"]}
        assert (await gateway.post("/v1/rerank", asked)).status == 200
        speech, rerank = await gateway.settled(2)
    assert speech.usage.input > 0
    assert speech.cost.lines == (("characters", 18, 15_000_000),)
    assert speech.cost.picos == 270_000_000
    assert rerank.usage.input > 0
    assert rerank.cost.lines == (("queries", 1, 2_000_000_000),)


async def test_what_is_billed_by_tokens_that_nobody_counted_has_no_price_rather_than_none_to_pay() -> None:
    async with upstream() as up, running(yaml(up.url)) as gateway:
        up.script(Scripted(body=b"sound", headers={"content-type": "audio/mpeg"}))
        told = await gateway.post("/v1/audio/speech", {"model": "tokens", **SPEECH})
        assert told.status == 200
        assert "x-qlens-cost-usd" not in told.headers
        (receipt,) = await gateway.settled(1)
    assert (receipt.cost.picos, receipt.cost.state) == (None, "unpriced")


# --- a strict table ----------------------------------------------------------------------------

IMAGE = {"prompt": "a hat"}
RERANK = {"query": "hats", "documents": ["a hat"]}
SPOKEN = {**HELLO, "modalities": ["text", "audio"], "audio": {"voice": "alloy", "format": "wav"}}


async def asked(gateway: Running, path: str, model: str, body: dict[str, object]) -> tuple[int, str | None]:
    """The status, and the error's code."""
    if path.startswith("audio/tr"):
        fields = {"model": model, **{name: str(value) for name, value in body.items()}}
        told = await gateway.post_form(f"/v1/{path}", fields, {"file": b"sound" * 1000})
    else:
        told = await gateway.post(f"/v1/{path}", {"model": model, **body})
    return told.status, (told.json()["error"]["code"] if told.status != 200 else None)


@pytest.mark.parametrize(
    ("path", "body", "priced", "unpriced"),
    [
        ("chat/completions", HELLO, "tokens", "embeds"),
        ("chat/completions", HELLO, "flat", "long"),
        ("chat/completions", SPOKEN, "voice", "tokens"),
        ("chat/completions", LISTENED, "voice", "tokens"),
        ("responses", {"input": "hello"}, "tokens", "pictures"),
        ("embeddings", {"input": "hello"}, "embeds", "queries"),
        ("moderations", {"input": "hello"}, "embeds", "characters"),
        ("rerank", RERANK, "queries", "seconds"),
        ("rerank", RERANK, "embeds", "pictures"),
        ("images/generations", IMAGE, "pictures", "embeds"),
        ("images/generations", IMAGE, "tokens", "characters"),
        ("audio/speech", SPEECH, "characters", "tokens"),
        ("audio/speech", {**SPEECH, "stream_format": "sse"}, "tokens", "embeds"),
        ("audio/transcriptions", {}, "seconds", "tokens"),
        ("audio/transcriptions", {"response_format": "json"}, "voice", "characters"),
        ("audio/transcriptions", {"response_format": "srt"}, "seconds", "voice"),
        ("audio/translations", {}, "seconds", "queries"),
    ],
)
async def test_a_strict_table_wants_a_price_of_what_the_operation_is_billed_by(
    path: str, body: dict[str, object], priced: str, unpriced: str
) -> None:
    async with running(yaml("", "strict: true", plugin="echo")) as gateway:
        assert await asked(gateway, path, unpriced, body) == (400, "model_unpriced")
        assert (await asked(gateway, path, priced, body))[0] == 200
        refused, answered = await gateway.settled(2)
    assert (refused.outcome, answered.outcome) == ("rejected", "complete")


async def test_without_strict_the_same_calls_are_answered_and_their_cost_is_unknown() -> None:
    async with running(yaml("", plugin="echo")) as gateway:
        for path, model, body in (
            ("chat/completions", "embeds", HELLO),
            ("audio/speech", "tokens", SPEECH),
            ("audio/transcriptions", "tokens", {"response_format": "srt"}),
            ("images/generations", "characters", IMAGE),
        ):
            assert (await asked(gateway, path, model, dict(body)))[0] == 200
        receipts = await gateway.settled(4)
    assert {(receipt.cost.picos, receipt.cost.state) for receipt in receipts} == {(None, "unpriced")}


async def test_a_strict_table_wants_all_prices_that_a_session_may_need() -> None:
    async with running(yaml("", "strict: true", plugin="echo")) as gateway:
        with pytest.raises(WSServerHandshakeError) as refused:
            async with gateway.session.ws_connect(f"{gateway.url}/v1/realtime?model=tokens"):
                pass
        assert refused.value.status == 400
        async with gateway.session.ws_connect(f"{gateway.url}/v1/realtime?model=voice") as socket:
            assert json.loads(await socket.receive_str(timeout=5))["type"] == "session.created"


async def test_a_refusal_says_what_has_no_price() -> None:
    async with running(yaml("", "strict: true", plugin="echo")) as gateway:
        told = await gateway.post("/v1/audio/speech", {"model": "tokens", **SPEECH})
    assert "has no price of characters, by which" in told.json()["error"]["message"]
    assert told.json()["error"]["param"] == "model"
