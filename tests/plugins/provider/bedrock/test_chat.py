"""What Bedrock gets for OpenAI's fields, and how its answers look to a client of OpenAI."""

from __future__ import annotations

from typing import Any

import pytest
from bedrocks import CHAT, CLAUDE, LLAMA, NOVA, WEATHER, chat, config, events, refused, sent, text, told, user

from qlens import StartupError
from qlens.testing import check_plugin, frames, running
from qlens.testing.bedrock import TEXT, answer, bedrock, failure, stream, streamed, whole
from qlens_plugins.provider.bedrock import Bedrock

OPUS = "us.anthropic.claude-opus-4-7"


def test_it_keeps_the_contract_of_its_stage() -> None:
    check_plugin("provider", Bedrock)


# --- generation --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "model", "expected"),
    [
        ({}, CLAUDE, None),
        ({"max_tokens": 50}, CLAUDE, {"maxTokens": 50}),
        ({"max_completion_tokens": 50}, CLAUDE, {"maxTokens": 50}),
        ({"max_tokens": 50_000}, CLAUDE, {"maxTokens": 8000}),
        ({"temperature": 1.7}, NOVA, {"temperature": 1}),
        ({"temperature": 0, "top_p": 0.5}, NOVA, {"temperature": 0, "topP": 0.5}),
        ({"top_p": 0.5}, CLAUDE, {"topP": 0.5}),
        ({"temperature": 0.1, "top_p": 0.5, "top_k": 3}, OPUS, None),
        ({"stop": "END"}, CLAUDE, {"stopSequences": ["END"]}),
        ({"stop": ["\n", "END"]}, CLAUDE, {"stopSequences": ["END"]}),
        ({"stop": ["END"]}, "us.openai.gpt-5.6-sol", None),
        ({"stop": ["|", "END"]}, "amazon.titan-text-premier-v1:0", {"stopSequences": ["|"]}),
    ],
)
async def test_how_to_generate(fields: dict[str, Any], model: str, expected: dict[str, Any] | None) -> None:
    assert (await sent(chat(**fields), model)).get("inferenceConfig") == expected


@pytest.mark.parametrize(
    ("model", "expected"), [(CLAUDE, {"top_k": 7}), (NOVA, {"inferenceConfig": {"topK": 7}}), (LLAMA, None)]
)
async def test_top_k_is_told_in_the_way_of_the_family(model: str, expected: dict[str, Any] | None) -> None:
    assert (await sent(chat(top_k=7), model)).get("additionalModelRequestFields") == expected


async def test_what_bedrock_has_no_equal_of_is_left_out_or_refused_as_the_operator_says() -> None:
    body = chat(seed=1, frequency_penalty=0.5, logit_bias={"1": 5}, store=True, verbosity="high", n=None)
    assert (await sent(body)).keys() == {"messages"}
    error = await refused(body, unsupported="reject")
    assert error["code"] == "unsupported_parameter"
    assert error["param"] in body
    assert (await sent(chat(frequency_penalty=0, store=True), unsupported="reject")).keys() == {"messages"}
    asked: list[dict[str, Any]] = [{"reasoning_effort": "high"}, {"web_search_options": {}}]
    for fields in asked:
        assert (await sent(chat(**fields), LLAMA)).keys() == {"messages"}
        assert (await refused(chat(**fields), LLAMA, unsupported="reject"))["param"] in fields


SOUND = {"type": "input_audio", "input_audio": {"data": "UklGRg==", "format": "wav"}}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"logprobs": True}, "logprobs"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"response_format": {"type": "grammar"}}, "response_format.type"),
        ({"messages": [user([SOUND])]}, "messages[0].content[0].type"),
    ],
)
async def test_what_cannot_be_left_out_without_another_answer_is_refused(fields: dict[str, Any], param: str) -> None:
    assert (await refused(chat(**fields)))["param"] == param


async def test_tier_latency_and_metadata() -> None:
    body = await sent(
        chat(
            service_tier="priority",
            latency="optimized",
            user="u",
            safety_identifier="s",
            metadata={"a": "b|c", "": "x"},
        )
    )
    assert body["serviceTier"] == {"type": "priority"}
    assert body["performanceConfig"] == {"latency": "optimized"}
    assert body["requestMetadata"] == {"user": "u", "safety_identifier": "s", "a": "b_c"}


@pytest.mark.parametrize(
    ("given", "expected"),
    [("auto", None), ("default", {"type": "default"}), ("flex", {"type": "flex"}), ("reserved", None), ("x", None)],
)
async def test_tiers(given: str, expected: dict[str, str] | None) -> None:
    assert (await sent(chat(service_tier=given))).get("serviceTier") == expected


async def test_bought_capacity_is_the_operators_to_spend() -> None:
    body = await sent(chat(), target={"params": {"service_tier": "reserved"}})
    assert body["serviceTier"] == {"type": "reserved"}


async def test_the_operator_may_send_fields_of_the_model_itself_and_a_client_may_not() -> None:
    own = {"additional_model_request_fields": {"anthropic_beta": ["example"]}}
    body = await sent(chat(top_k=3), target={"params": own})
    assert body["additionalModelRequestFields"] == {"top_k": 3, "anthropic_beta": ["example"]}
    assert "additionalModelRequestFields" not in await sent(chat(**own))


# --- guardrails --------------------------------------------------------------------------------


async def test_a_configured_guardrail_stands_around_every_call() -> None:
    settings: dict[str, Any] = {"guardrail": {"id": "gr1example", "version": "2", "stream": "async"}}
    expected = {"guardrailIdentifier": "gr1example", "guardrailVersion": "2", "trace": "disabled"}
    assert (await sent(chat(), **settings))["guardrailConfig"] == expected
    streamed_body = await sent(chat(stream=True), **settings)
    assert streamed_body["guardrailConfig"] == {**expected, "streamProcessingMode": "async"}


async def test_a_client_chooses_a_guardrail_only_where_none_is_configured() -> None:
    asked = chat(guardrail={"id": "gr9other"})
    assert (await sent(asked))["guardrailConfig"]["guardrailIdentifier"] == "gr9other"
    assert (await refused(asked, guardrail={"id": "gr1example"}))["param"] == "guardrail"
    for wrong in ("gr9other", {"version": "1"}):
        assert (await refused(chat(guardrail=wrong)))["param"] == "guardrail"


async def test_a_target_may_have_a_guardrail_of_its_own() -> None:
    body = await sent(chat(), target={"params": {"guardrail": {"id": "gr2mine"}}}, guardrail={"id": "gr1example"})
    assert body["guardrailConfig"]["guardrailIdentifier"] == "gr2mine"


async def test_what_a_guardrail_says_is_the_answer_and_its_trace_stays_inside() -> None:
    blocked = answer(
        {"text": "Sorry, no."}, stop="guardrail_intervened", trace={"guardrail": {"actionReason": "canary"}}
    )
    for choice in await told(blocked, chat()):
        assert choice["message"]["content"] == "Sorry, no."
        assert choice["finish_reason"] == "content_filter"
        assert "canary" not in str(choice)


# --- answers -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reason", "finish"),
    [
        ("end_turn", "stop"),
        ("stop_sequence", "stop"),
        ("max_tokens", "length"),
        ("model_context_window_exceeded", "length"),
        ("guardrail_intervened", "content_filter"),
        ("content_filtered", "content_filter"),
        ("something_new", "stop"),
        ("tool_use", "stop"),
    ],
)
async def test_why_it_stopped(reason: str, finish: str) -> None:
    assert [choice["finish_reason"] for choice in await told(answer(stop=reason), chat())] == [finish] * 2


@pytest.mark.parametrize("reason", ["malformed_model_output", "malformed_tool_use"])
async def test_a_malformed_answer_is_an_error(reason: str) -> None:
    async with bedrock() as aws, running(config(aws.root)) as gateway:
        aws.script(whole(answer(stop=reason)))
        reply = await gateway.post(CHAT, chat())
        assert (reply.status, reply.json()["error"]["code"]) == (502, "malformed_model_output")


async def test_an_answer_without_content_has_an_empty_text() -> None:
    silent = {**answer(), "output": {"message": {"role": "assistant", "content": []}}}
    whole_choice, _ = await told(silent, chat())
    assert whole_choice["message"]["content"] == ""


async def test_citations_become_annotations() -> None:
    cited = {
        "citationsContent": {
            "content": [{"text": "It rains."}],
            "citations": [
                {"title": "Weather", "location": {"web": {"url": "https://weather.example/today"}}},
                {"location": {"documentChar": {"documentIndex": 0, "start": 0, "end": 4}}},
            ],
        }
    }
    one, other = await told(answer(cited), chat())
    expected = {"url": "https://weather.example/today", "title": "Weather", "start_index": 0, "end_index": 9}
    assert one["message"]["content"] == other["message"]["content"] == "It rains."
    assert one["message"]["annotations"] == [{"type": "url_citation", "url_citation": expected}]
    assert other["message"]["annotations"][0]["url_citation"]["url"] == "https://weather.example/today"


async def test_an_event_that_nobody_knows_is_passed_over() -> None:
    known = streamed(answer({"text": "Hello"}))
    async with bedrock() as aws, running(config(aws.root)) as gateway:
        new = frames.event("somethingNew", {"p": "abc"})
        delta = frames.event("contentBlockDelta", {"contentBlockIndex": 0, "delta": {"somethingNew": {}}})
        aws.script(stream([new, *known[:1], new, delta, *known[1:], new]))
        assert text(await gateway.post(CHAT, chat(stream=True))) == "Hello"


# --- several choices ---------------------------------------------------------------------------


async def test_several_choices_are_several_requests_and_their_usage_adds_up() -> None:
    async with bedrock() as aws, running(config(aws.root)) as gateway:
        reply = await gateway.post(CHAT, chat(n=3))
        choices = reply.json()["choices"]
        assert [(choice["index"], choice["message"]["content"]) for choice in choices] == [
            (at, TEXT) for at in range(3)
        ]
        assert reply.json()["usage"]["total_tokens"] == 3 * 13
        assert len(aws.requests) == 3
        (receipt,) = await gateway.settled(1)
        assert (receipt.usage.input, receipt.usage.output, len(receipt.attempts)) == (27, 12, 1)


async def test_several_choices_stream_side_by_side() -> None:
    async with bedrock() as aws, running(config(aws.root)) as gateway:
        reply = await gateway.post(CHAT, chat(n=3, stream=True, stream_options={"include_usage": True}))
        *deltas, usage = events(reply)
        for index in range(3):
            mine = [event["choices"][0] for event in deltas if event["choices"][0]["index"] == index]
            assert "".join(choice["delta"].get("content", "") for choice in mine) == TEXT
            assert [choice["finish_reason"] for choice in mine if choice["finish_reason"]] == ["stop"]
        assert (usage["choices"], usage["usage"]["total_tokens"]) == ([], 39)


@pytest.mark.parametrize("streaming", [False, True])
async def test_one_failing_choice_fails_the_call_and_closes_the_others(streaming: bool) -> None:
    slow = streamed(answer())
    async with bedrock() as aws, running(config(aws.root)) as gateway:
        aws.script(
            stream(slow, hang=True), failure("ThrottlingException", "slow down", status=429), stream(slow, hang=True)
        )
        reply = await gateway.post(CHAT, chat(n=3, stream=streaming))
        assert reply.status == 429
        for request in aws.requests:
            if not request.answered.is_set():
                await request.closed.wait()


# --- targets -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({"model": "arn:aws:bedrock:us-east-1:123456789012:application-inference-profile/abc123"}, "set base_model"),
        ({"model": "arn:aws:bedrock:eu-west-1::foundation-model/amazon.nova-lite-v1:0"}, "in the region eu-west-1"),
        ({"model": "arn:aws:iam::123456789012:role/x"}, "no ARN of Bedrock"),
        ({"params": {"structured_output": "magic"}}, "structured_output"),
        ({"params": {"additional_model_request_fields": 5}}, "additional_model_request_fields"),
    ],
)
async def test_a_target_that_cannot_work_is_a_fault(target: dict[str, Any], message: str) -> None:
    with pytest.raises(StartupError, match=message):
        async with running(config("http://127.0.0.1:1", target=target)):
            pass


@pytest.mark.parametrize(
    ("target", "shown"),
    [
        ({"model": "eu.amazon.nova-lite-v1:0"}, "eu.amazon.nova-lite-v1:0"),
        (
            {"model": "arn:aws:bedrock:us-east-1:123456789012:inference-profile/us.amazon.nova-lite-v1:0"},
            "amazon.nova-lite-v1:0",
        ),
        (
            {
                "model": "arn:aws:bedrock:us-east-1:123456789012:application-inference-profile/abc123",
                "base_model": "amazon.nova-lite-v1:0",
            },
            "amazon.nova-lite-v1:0",
        ),
    ],
)
async def test_an_account_number_never_shows(target: dict[str, str], shown: str) -> None:
    async with bedrock() as aws, running(config(aws.root, target=target)) as gateway:
        for streaming in (False, True):
            reply = await gateway.post(CHAT, chat(user("hi"), stream=streaming, tools=[WEATHER]))
            assert "123456789012" not in reply.text
            assert f'"model":"{shown}"' in reply.text
        assert aws.models == [target["model"]] * 2


@pytest.mark.parametrize(
    ("settings", "address"),
    [
        ({"region": "us-east-1"}, "https://bedrock-runtime.us-east-1.amazonaws.com"),
        ({"region": "cn-north-1"}, "https://bedrock-runtime.cn-north-1.amazonaws.com.cn"),
        ({"region": "us-gov-west-1", "fips": True}, "https://bedrock-runtime-fips.us-gov-west-1.amazonaws.com"),
        ({"endpoint": "https://vpce-1.example.com/"}, "https://vpce-1.example.com"),
    ],
)
async def test_the_address_follows_from_the_region(settings: dict[str, Any], address: str) -> None:
    assert await _address(settings) == address


async def _address(settings: dict[str, Any]) -> Any:
    async with running(config("http://127.0.0.1:1", **{"endpoint": None, **settings})) as gateway:
        return gateway.plugin("provider", "aws")._wire.base


HERE, ELSEWHERE = "http://127.0.0.1:1/here", "http://127.0.0.1:1/elsewhere"
USUAL = "https://bedrock-runtime.us-east-1.amazonaws.com"


@pytest.mark.parametrize(
    ("variables", "settings", "address"),
    [
        ({"AWS_ENDPOINT_URL_BEDROCK_RUNTIME": HERE, "AWS_ENDPOINT_URL": ELSEWHERE}, {}, HERE),
        ({"AWS_ENDPOINT_URL": ELSEWHERE}, {}, ELSEWHERE),
        ({"AWS_ENDPOINT_URL_BEDROCK_RUNTIME": "", "AWS_ENDPOINT_URL": ""}, {}, USUAL),
        ({"AWS_ENDPOINT_URL": ELSEWHERE, "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS": "true"}, {}, USUAL),
        ({"AWS_ENDPOINT_URL": ELSEWHERE}, {"endpoint": HERE}, HERE),
        ({"AWS_ENDPOINT_URL": ELSEWHERE}, {"fips": True}, "https://bedrock-runtime-fips.us-east-1.amazonaws.com"),
    ],
)
async def test_the_address_may_stand_in_awss_own_variables(
    variables: dict[str, str], settings: dict[str, Any], address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert await _address(settings) == address


async def test_an_address_in_a_variable_that_is_none_stops_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_BEDROCK_RUNTIME", "localhost:4566")
    with pytest.raises(StartupError, match="AWS_ENDPOINT_URL_BEDROCK_RUNTIME must be a URL"):
        async with running(config("http://127.0.0.1:1", endpoint=None)):
            pass
