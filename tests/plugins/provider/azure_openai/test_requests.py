"""What `azure_openai` sends: to which address, with which credential, and in which words for which model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import pytest
from azures import CHAT, DEPLOYMENT, chat, config, text

from qlens.testing import Scripted, check_plugin, running, upstream
from qlens.testing.azure import KEY, Deployment, azure, refusal
from qlens.testing.upstreams import TEXT
from qlens_plugins.provider.azure_openai import AzureOpenAI
from qlens_plugins.provider.azure_openai.parameters import family

GOLDEN = orjson.loads((Path(__file__).parent / "golden/requests.json").read_bytes())["cases"]


def test_it_keeps_the_contract_of_its_stage() -> None:
    check_plugin("provider", AzureOpenAI)


@pytest.mark.parametrize(
    ("settings", "path", "query"),
    [
        ({}, "/openai/deployments/my-deployment/chat/completions", {"api-version": "2024-10-21"}),
        (
            {"api_version": "2025-04-01-preview"},
            "/openai/deployments/my-deployment/chat/completions",
            {"api-version": "2025-04-01-preview"},
        ),
        (
            {"deployment": "a/b c%ü"},
            "/openai/deployments/a%2Fb%20c%25%C3%BC/chat/completions",
            {"api-version": "2024-10-21"},
        ),
        ({"surface": "v1"}, "/openai/v1/chat/completions", {}),
        ({"surface": "v1", "api_version": "preview"}, "/openai/v1/chat/completions", {"api-version": "preview"}),
    ],
)
async def test_each_surface_has_its_address(settings: dict[str, Any], path: str, query: dict[str, str]) -> None:
    deployment = settings.get("deployment", DEPLOYMENT)
    async with azure({deployment: Deployment()}) as cloud, running(config(cloud.root + "/", **settings)) as gateway:
        answer = await gateway.post(CHAT, chat(), key="sk-example-client")
        (request,) = cloud.requests
        assert answer.json()["choices"][0]["message"]["content"] == TEXT
        assert (request.path, request.query) == (path, query)
        assert request.body["model"] == deployment
        assert request.headers["api-key"] == KEY
        assert "authorization" not in request.headers
        assert answer.headers["x-ms-region"] == "swedencentral"


@pytest.mark.parametrize("surface", ["classic", "v1"])
async def test_each_surface_makes_embeddings(surface: str) -> None:
    model = "text-embedding-3-small"
    deployments = {DEPLOYMENT: Deployment(model)}
    async with azure(deployments) as cloud, running(config(cloud.root, base_model=model, surface=surface)) as gateway:
        body = {"model": "ours", "input": "Hello", "encoding_format": "base64"}
        assert (await gateway.post("/v1/embeddings", body)).status == 200
        (request,) = cloud.requests
        assert request.path.endswith("/embeddings")


@pytest.mark.parametrize(
    ("base_model", "surface", "place"),
    [
        ("gpt-35-turbo-instruct", "classic", f"/openai/deployments/{DEPLOYMENT}/completions"),
        ("gpt-35-turbo", "classic", f"/openai/deployments/{DEPLOYMENT}/chat/completions"),
        ("gpt-4o", "classic", f"/openai/deployments/{DEPLOYMENT}/chat/completions"),
        ("gpt-5-mini", "classic", f"/openai/deployments/{DEPLOYMENT}/chat/completions"),
        (None, "classic", f"/openai/deployments/{DEPLOYMENT}/chat/completions"),
        ("gpt-4o", "v1", "/openai/v1/chat/completions"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_prompt_is_put_to_a_model_that_chats_as_a_chat(
    base_model: str | None, surface: str, place: str, stream: bool
) -> None:
    async with (
        azure({DEPLOYMENT: Deployment(base_model or "gpt-4o")}) as cloud,
        running(config(cloud.root, base_model=base_model, surface=surface)) as gateway,
    ):
        asked = {"model": "ours", "prompt": "Hello", "max_tokens": 5, "stream": stream}
        answer = await gateway.post("/v1/completions", asked)
        assert answer.status == 200, answer.text
        told = [event for event in answer.events() if event != "[DONE]"] if stream else [answer.json()]
        assert "".join(choice["text"] for event in told for choice in event["choices"]) == TEXT
        assert {event["object"] for event in told} == {"text_completion"}
        (request,) = cloud.requests
        assert request.path == place
        (receipt,) = await gateway.settled(1)
        assert (receipt.operation, receipt.outcome, receipt.usage.source) == ("completions", "complete", "provider")


@pytest.mark.parametrize(
    ("base_model", "completes"),
    [
        ("gpt-3.5-turbo-instruct", True),
        ("gpt-35-turbo-instruct-0914", True),
        ("davinci-002", True),
        ("Babbage-002", True),
        ("gpt-35-turbo", False),
        ("gpt-35-turbo-16k", False),
        ("gpt-4o", False),
        ("davinci-003-chat", False),
    ],
)
def test_which_models_have_completions(base_model: str, completes: bool) -> None:
    found = family(base_model)
    assert found is not None
    assert found.completes == completes


@pytest.mark.parametrize(
    ("base_model", "settings", "version"),
    [
        ("gpt-5-mini", {}, "2025-04-01-preview"),
        ("o3-mini", {}, "2025-04-01-preview"),
        ("o3-mini", {"api_version": "2024-12-01-preview"}, "2024-12-01-preview"),
        ("gpt-5-mini", {"surface": "v1"}, None),
    ],
)
async def test_a_reasoning_model_can_be_told_how_much_to_reason(
    base_model: str, settings: dict[str, Any], version: str | None
) -> None:
    async with (
        azure({DEPLOYMENT: Deployment(base_model)}) as cloud,
        running(config(cloud.root, base_model=base_model, **settings)) as gateway,
    ):
        answer = await gateway.post(CHAT, chat(reasoning_effort="low"))
        assert answer.status == 200, answer.text
        (request,) = cloud.requests
        assert (request.body["reasoning_effort"], request.query.get("api-version")) == ("low", version)


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case["name"])
async def test_what_is_sent_is_what_the_model_accepts(case: dict[str, Any]) -> None:
    deployments = {DEPLOYMENT: Deployment(case["base_model"])}
    async with (
        azure(deployments) as cloud,
        running(config(cloud.root, base_model=case["base_model"], **case["settings"])) as gateway,
    ):
        answer = await gateway.post(CHAT, chat(**case["client"]))
        assert answer.status == 200, answer.text
        (request,) = cloud.requests
        assert request.body == {"messages": chat()["messages"], **case["wire"], "model": DEPLOYMENT}


@pytest.mark.parametrize(
    "field",
    [
        {"temperature": 0.2},
        {"top_p": 0.5},
        {"presence_penalty": 1},
        {"frequency_penalty": 1},
        {"logprobs": True},
        {"logit_bias": {"1": 1}},
    ],
    ids=lambda field: next(iter(field)),
)
async def test_what_a_model_does_not_have_can_be_refused_instead_of_left_out(field: dict[str, Any]) -> None:
    async with (
        azure({DEPLOYMENT: Deployment("o3-mini")}) as cloud,
        running(config(cloud.root, base_model="o3-mini", unsupported="reject")) as gateway,
    ):
        answer = await gateway.post(CHAT, chat(**field))
        error = answer.json()["error"]
        assert (answer.status, error["code"], error["param"]) == (400, "unsupported_parameter", next(iter(field)))
        assert cloud.requests == []


async def test_clients_own_max_completion_tokens_wins_over_max_tokens() -> None:
    async with (
        azure({DEPLOYMENT: Deployment("o3-mini")}) as cloud,
        running(config(cloud.root, base_model="o3-mini")) as gateway,
    ):
        await gateway.post(CHAT, chat(max_tokens=50, max_completion_tokens=40))
        body = cloud.requests[0].body
        assert body["max_completion_tokens"] == 40
        assert "max_tokens" not in body


@pytest.mark.parametrize("base_model", [None, "gpt-4o", "gpt-4.1", "gpt-35-turbo", "omni", "gpt-oss-120b"])
async def test_a_deployments_name_says_nothing_about_its_model(base_model: str | None) -> None:
    deployment = "gpt-5-is-only-a-name"
    async with upstream() as up, running(config(up.root, deployment=deployment, base_model=base_model)) as gateway:
        await gateway.post(CHAT, chat(max_tokens=50, temperature=0.5))
        body = up.requests[0].body
        assert (body["max_tokens"], body["temperature"]) == (50, 0.5)
        assert "max_completion_tokens" not in body


@pytest.mark.parametrize("base_model", ["o1", "O4-mini-2025-04-16", "gpt-5", "gpt-5.4-mini", "gpt-6-luna", "gpt-12"])
async def test_reasoning_models_are_known_by_their_series(base_model: str) -> None:
    async with upstream() as up, running(config(up.root, base_model=base_model)) as gateway:
        await gateway.post(CHAT, chat(max_tokens=50))
        body = up.requests[0].body
        assert body["max_completion_tokens"] == 50
        assert "max_tokens" not in body


@pytest.mark.parametrize("base_model", ["gpt-5.1-codex", "gpt-5-pro", "o3-pro", "gpt-5.1-codex-mini"])
async def test_chats_with_models_that_speak_responses_only_are_asked_by_them(base_model: str) -> None:
    deployments = {DEPLOYMENT: Deployment("gpt-5.1-codex")}
    async with azure(deployments) as cloud, running(config(cloud.root, base_model=base_model)) as gateway:
        sampled = chat(max_tokens=50, temperature=0.5, presence_penalty=1)
        answer = await gateway.post(CHAT, sampled)
        assert answer.status == 200, answer.text
        assert answer.json()["object"] == "chat.completion"
        request = cloud.requests[0]
        assert (request.path, request.query) == ("/openai/responses", {"api-version": "2025-04-01-preview"})
        assert request.body.keys() == {"model", "input", "store", "max_output_tokens", *_SAMPLED_BY[base_model]}
        stream = (await gateway.post(CHAT, chat(stream=True))).events()
        assert text(stream) == answer.json()["choices"][0]["message"]["content"]
        assert stream[-1] == "[DONE]"
        refused = await gateway.post(CHAT, chat(stop=["a"]))
        assert (refused.status, refused.json()["error"]["param"]) == (400, "stop")
        assert "azure" in refused.json()["error"]["message"]


# gpt-5.1 takes sampling parameters where it is not to reason, as by default.
_SAMPLED_BY = {"gpt-5.1-codex": {"temperature"}, "gpt-5.1-codex-mini": {"temperature"}, "gpt-5-pro": (), "o3-pro": ()}


# --- api-versions ------------------------------------------------------------------------------

GA, PREVIEW = "2024-10-21", "2025-04-01-preview"
PREVIEWED: dict[str, Any] = {
    "metadata": {"a": "b"},
    "store": True,
    "prediction": {"type": "content", "content": "a"},
    "modalities": ["text"],
}


@pytest.mark.parametrize(("name", "value"), PREVIEWED.items(), ids=PREVIEWED)
async def test_what_only_previews_know_is_asked_by_one_unless_the_operator_chose_another(name: str, value: Any) -> None:
    async with azure() as cloud, running(config(cloud.root, base_model="gpt-4o")) as gateway:
        assert (await gateway.post(CHAT, chat())).status == 200
        assert (await gateway.post(CHAT, chat(**{name: value}))).status == 200
        assert [request.query["api-version"] for request in cloud.requests] == [GA, PREVIEW]
        await gateway.reload(config(cloud.root, base_model="gpt-4o", api_version=GA))
        answer = await gateway.post(CHAT, chat(**{name: value}))
        assert answer.status == 400
        message = answer.json()["error"]["message"]
        assert f"Unrecognized request argument supplied: {name}" in message
        assert f"the api_version {PREVIEW} knows {name}" in message
        assert cloud.requests[-1].query["api-version"] == GA


async def test_what_v1_alone_knows_is_refused_by_the_classic_surface_with_the_way_out() -> None:
    async with azure() as cloud, running(config(cloud.root, base_model="gpt-4o")) as gateway:
        answer = await gateway.post(CHAT, chat(service_tier="priority"))
        assert answer.status == 400
        assert "the surface v1 knows service_tier" in answer.json()["error"]["message"]
        await gateway.reload(config(cloud.root, base_model="gpt-4o", surface="v1"))
        assert (await gateway.post(CHAT, chat(service_tier="priority"))).status == 200


async def test_a_body_is_edited_for_each_attempt_alone() -> None:
    yaml = orjson.loads(config("http://azure.invalid", base_model="o3-mini"))
    async with azure({DEPLOYMENT: Deployment("o3-mini"), "plain": Deployment("gpt-4o")}) as cloud:
        yaml["providers"]["azure"]["endpoint"] = cloud.root
        yaml["models"]["ours"]["targets"].append({"provider": "azure", "model": "plain", "base_model": "gpt-4o"})
        async with running(orjson.dumps(yaml).decode()) as gateway:
            cloud.script(Scripted(status=500))
            messages = [{"role": "system", "content": "a"}, {"role": "developer", "content": "b"}]
            answer = await gateway.post(CHAT, chat(max_tokens=50, temperature=0.5, messages=messages))
            assert answer.status == 200
            first, second = (request.body for request in cloud.requests)
            assert (first["max_completion_tokens"], "temperature" in first) == (50, False)
            assert (second["max_tokens"], second["temperature"]) == (50, 0.5)
            assert [message["role"] for message in first["messages"]] == ["developer", "developer"]
            assert [message["role"] for message in second["messages"]] == ["system", "system"]


# --- what Azure teaches -------------------------------------------------------------------------


async def test_a_field_that_azure_refuses_is_left_out_once_and_for_all() -> None:
    async with azure({DEPLOYMENT: Deployment("o3-mini")}) as cloud, running(config(cloud.root)) as gateway:
        for _ in range(2):
            asked = chat(temperature=0.2, max_tokens=50, parallel_tool_calls=True)
            assert (await gateway.post(CHAT, asked)).status == 200
        last = cloud.requests[-1].body
        assert last["max_completion_tokens"] == 50
        assert not {"temperature", "max_tokens", "parallel_tool_calls"} & last.keys()
        assert len(cloud.requests) == 3 + 1 + 1, "each of three fields is refused once, then both calls go through"
        first, second = await gateway.settled(2)
        assert (len(first.attempts), len(second.attempts)) == (1, 1)


async def test_what_azure_refuses_is_remembered_over_a_reload() -> None:
    async with azure({DEPLOYMENT: Deployment("o3-mini")}) as cloud, running(config(cloud.root)) as gateway:
        assert (await gateway.post(CHAT, chat(temperature=0.2))).status == 200
        await gateway.reload(config(cloud.root, idle_seconds=30))
        assert (await gateway.post(CHAT, chat(temperature=0.2))).status == 200
        assert len(cloud.requests) == 2 + 1


async def test_azure_is_asked_again_only_for_what_can_be_left_out() -> None:
    async with azure() as cloud, running(config(cloud.root)) as gateway:
        cloud.script(refusal("Unsupported value: 'stop'", param="stop", code="unsupported_parameter"))
        answer = await gateway.post(CHAT, chat(stop=["END"]))
        assert (answer.status, answer.json()["error"]["param"]) == (400, "stop")
        cloud.script(refusal("Unsupported value: 'top_p'", param="top_p", code="unsupported_value"))
        answer = await gateway.post(CHAT, chat(temperature=0.5))
        assert (answer.status, answer.json()["error"]["param"]) == (400, "top_p"), "it was not even sent"
        assert len(cloud.requests) == 2


async def test_where_fields_are_refused_only_the_limit_is_renamed() -> None:
    async with (
        azure({DEPLOYMENT: Deployment("o3-mini")}) as cloud,
        running(config(cloud.root, unsupported="reject")) as gateway,
    ):
        assert (await gateway.post(CHAT, chat(max_tokens=50))).status == 200
        answer = await gateway.post(CHAT, chat(temperature=0.5))
        assert (answer.status, answer.json()["error"]["code"]) == (400, "unsupported_value")


@pytest.mark.parametrize("asked", [False, True], ids=["not asked", "asked"])
async def test_an_older_api_version_without_stream_options_is_not_asked_for_usage_again(asked: bool) -> None:
    async with azure() as cloud, running(config(cloud.root, api_version="2024-02-01")) as gateway:
        options = {"stream_options": {"include_usage": True}} if asked else {}
        for _ in range(2):
            answer = await gateway.post(CHAT, chat(stream=True, **options))
            assert answer.events()[-1] == "[DONE]"
        assert ["stream_options" in request.body for request in cloud.requests] == [True, False, False]
        first, second = await gateway.settled(2)
        assert first.usage.source == second.usage.source == "estimated"
        assert first.usage.total > 0


# --- capacity -----------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("busy", "tier", "picos"), [(True, None, 62_500_000), (False, "provisioned", 0)])
async def test_provisioned_tokens_are_free_until_they_spill_over(
    busy: bool, tier: str | None, picos: int, stream: bool
) -> None:
    row = {"model": "gpt-4o", "input": 2.5, "output": 10, "tiers": {"provisioned": 0}}
    deployments = {"ptu": Deployment(busy=busy), "standard": Deployment()}
    params = {"provisioned": True, "spillover_deployment": "standard"}
    async with azure(deployments) as cloud:
        text = config(
            cloud.root,
            deployment="ptu",
            base_model="gpt-4o",
            params=params,
            pipeline={"cost": [{"plugin": "prices", "table": [row]}]},
        )
        async with running(text) as gateway:
            answer = await gateway.post(CHAT, chat(stream=stream))
            assert answer.status == 200
            assert cloud.requests[0].headers["x-ms-spillover-deployment"] == "standard"
            assert not params.keys() & cloud.requests[0].body.keys()
            assert "x-ms-spillover-from-deployment" not in answer.headers
            (receipt,) = await gateway.settled(1)
            assert (receipt.usage.tier, receipt.cost.picos, receipt.cost.state) == (tier, picos, "exact")
            assert dict(receipt.tags) == ({"azure_spillover_from": "ptu"} if busy else {})


# --- what a client cannot do --------------------------------------------------------------------


async def test_a_client_chooses_neither_endpoint_nor_credential_nor_spillover() -> None:
    async with azure() as cloud, azure() as other, running(config(cloud.root)) as gateway:
        mischief = {
            "host": other.root.removeprefix("http://"),
            "api-key": "sk-example-client",
            "x-ms-spillover-deployment": "other",
            "x-forwarded-host": "example.com",
            "azure-endpoint": other.root,
        }
        answer = await gateway.post(
            f"{CHAT}?api-version=2023-05-15&azure_endpoint={other.root}", chat(), headers=mischief
        )
        assert answer.status == 200
        assert other.requests == []
        (request,) = cloud.requests
        assert request.query == {"api-version": "2024-10-21"}
        assert request.headers["api-key"] == KEY
        assert request.headers["host"] == cloud.root.removeprefix("http://")
        assert not {"x-ms-spillover-deployment", "x-forwarded-host", "azure-endpoint"} & set(request.headers)


async def test_the_key_follows_no_redirect() -> None:
    async with azure() as cloud, azure() as other, running(config(cloud.root)) as gateway:
        cloud.script(Scripted(307, {"location": f"{other.root}/openai/v1/chat/completions"}))
        answer = await gateway.post(CHAT, chat())
        assert (answer.status, answer.json()["error"]["code"]) == (502, "upstream_invalid_response")
        assert other.requests == []


@pytest.mark.parametrize("name", [".", "..", "a/../../b", "a?b#c"])
async def test_a_name_behind_a_wildcard_leads_to_no_other_path(name: str) -> None:
    async with upstream() as up, running(config(up.root, deployment="*", name="azure/*")) as gateway:
        answer = await gateway.post(CHAT, {**chat(), "model": f"azure/{name}"})
        if name in {".", ".."}:
            assert (answer.status, answer.json()["error"]["code"]) == (404, "model_not_found")
            assert up.requests == []
        else:
            (request,) = up.requests
            assert request.path.count("/") == 5
            assert request.path.startswith("/openai/deployments/a%")
