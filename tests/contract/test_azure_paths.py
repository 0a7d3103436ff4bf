"""Azure's inbound paths reach the same operations, through the same stages, as OpenAI's own."""

from __future__ import annotations

from typing import Any

import pytest
from plugs import Probe
from yamls import BODIES, ask, config, probe

from qlens.operations import OPERATIONS, Operation
from qlens.testing import running

MODEL = "vendor/model:one"
SEGMENT = "vendor%2Fmodel%3Aone"
ECHO = {"echo": {"plugin": "echo"}}
MODELS = {MODEL: {"max_output_tokens": 100, "targets": [{"provider": "echo", "model": "any"}]}}
CASES = [
    pytest.param(operation, path, id=f"{operation.name} {path}")
    for operation in OPERATIONS
    for path in operation.paths
    if path != operation.path and operation.runs not in {"affinity", "session"}
]


def test_every_operation_stands_on_both_of_azures_surfaces() -> None:
    for operation in OPERATIONS:
        if operation.path.startswith(("/v1/messages", "/v1/providers")):
            assert operation.paths == (operation.path,)  # no API of OpenAI's
            continue
        openai, v1, classic = operation.paths
        assert openai.startswith("/v1/")
        assert v1 == f"/openai{openai}"
        assert classic.startswith("/openai/")
    paths = [(operation.method, path) for operation in OPERATIONS for path in operation.paths]
    assert len(set(paths)) == len(paths)


@pytest.mark.parametrize(("operation", "path"), CASES)
@pytest.mark.parametrize("version", ["", "?api-version=2024-10-21"])
async def test_every_path_of_azure_authenticates_admits_and_settles(
    operation: Operation, path: str, version: str
) -> None:
    stages = {"auth": [probe("who", answer=["authenticate"])], "rate_limit": [probe("may", hold="h")]}
    async with running(config(stages, ECHO, MODELS)) as gateway:
        answer = await _ask(gateway, operation, path, version)
        assert answer.status == 200, answer.text
        (receipt,) = await gateway.settled(1)
        assert (receipt.operation, receipt.outcome) == (operation.name, "complete")
        if operation.runs == "full":
            assert (receipt.model, answer.headers["x-qlens-model"]) == (MODEL, MODEL)
        who: Probe = gateway.plugin("auth", "who")
        may: Probe = gateway.plugin("rate_limit", "may")
        assert "authenticate" in who.events
        assert "admit" in may.events
        assert may.events[-1] == "settle complete"
        assert may.holds == []


@pytest.mark.parametrize(("operation", "path"), CASES)
async def test_no_path_of_azure_answers_a_stranger_or_one_who_is_refused(operation: Operation, path: str) -> None:
    for stages, status in (({"auth": [probe("nobody")]}, 401), ({"rate_limit": [probe("no", refuse=["admit"])]}, 429)):
        async with running(config(stages, ECHO, MODELS)) as gateway:
            assert (await _ask(gateway, operation, path, "")).status == status


async def _ask(gateway: Any, operation: Operation, path: str, version: str) -> Any:
    place = path.replace("{deployment}", SEGMENT).replace("{id}", SEGMENT) + version
    named = {} if "{deployment}" in path else {"model": MODEL}
    return await ask(gateway, operation, place, **named)


@pytest.mark.parametrize("body_model", ["elsewhere", "", 5, None])
@pytest.mark.parametrize("segment", [SEGMENT, "vendor/model:one"], ids=["escaped", "with a bare slash"])
async def test_the_deployment_in_the_path_wins_over_the_bodys_model(segment: str, body_model: object) -> None:
    async with running(config({}, ECHO, MODELS)) as gateway:
        path = f"/openai/deployments/{segment}/chat/completions"
        answer = await gateway.post(path, {**BODIES["chat"], "model": body_model})
        assert answer.status == 200
        (receipt,) = await gateway.settled(1)
        assert receipt.model == MODEL


async def test_a_deployment_that_is_no_model_is_openais_model_not_found() -> None:
    async with running(config({}, ECHO, MODELS)) as gateway:
        for name in ("other", "vendor", "vendor%2Fmodel"):
            answer = await gateway.post(f"/openai/deployments/{name}/chat/completions", BODIES["chat"])
            assert (answer.status, answer.json()["error"]["code"]) == (404, "model_not_found")


async def test_a_caller_may_use_the_same_models_on_every_path() -> None:
    async with running(
        config({"auth": [{"plugin": "plugs:Probe", "answer": ["authenticate"]}]}, ECHO, MODELS)
    ) as gateway:
        ours = (await gateway.get("/v1/models")).json()
        for path in ("/openai/v1/models", "/openai/models?api-version=2024-10-21"):
            assert (await gateway.get(path)).json() == ours


@pytest.mark.parametrize(
    "path",
    [
        "/openai",
        "/openai/deployments",
        "/openai/deployments/x",
        "/openai/deployments//chat/completions",
        "/openai/deployments/x/chat",
        "/openai/deployments/x/models",
        "/openai/chat/completions",
        "/openai/v1",
        "/openai/v1/chat/completions/",
        "/openai/v1/deployments/x/chat/completions",
        "/OpenAI/v1/chat/completions",
    ],
)
async def test_nothing_else_is_served_there(path: str) -> None:
    async with running(config({}, ECHO, MODELS)) as gateway:
        assert (await gateway.post(path, BODIES["chat"])).status == 404


async def test_a_path_of_azure_has_its_method() -> None:
    async with running(config({}, ECHO, MODELS)) as gateway:
        answer = await gateway.get("/openai/deployments/x/chat/completions")
        assert (answer.status, answer.headers["allow"]) == (405, "POST")
