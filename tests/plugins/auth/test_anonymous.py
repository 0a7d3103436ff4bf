"""The plugin `anonymous`."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlens.cli import main
from qlens.testing import check_plugin, running
from qlens_plugins.auth.anonymous import Anonymous

CALL = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "hello"}]}
KEYS = "keys: [{id: one, hash: 'sha256:" + "0" * 64 + "', tenant: acme}]"


def config(auth: str, more: str = "") -> str:
    return f"""
pipeline: {{auth: {auth}, cost: []}}
providers: {{echo: {{plugin: echo}}}}
models: {{gpt-4o-mini: {{max_output_tokens: 1000, targets: [{{provider: echo, model: gpt-4o-mini}}]}}}}
{more}"""


def test_it_keeps_the_contract_of_its_stage() -> None:
    check_plugin("auth", Anonymous)


async def test_every_call_has_the_configured_tenant_and_roles() -> None:
    async with running(config("[{plugin: anonymous, tenant: lab, roles: [member, viewer]}]")) as gateway:
        assert (await gateway.post("/v1/chat/completions", CALL)).status == 200
        (receipt,) = await gateway.settled(1)
        caller = receipt.caller
        assert (caller.tenant, caller.subject, caller.by) == ("lab", "anonymous", "anonymous")
        assert caller.roles == {"member", "viewer"}
        assert caller.key_id is None


async def test_a_credential_makes_no_difference() -> None:
    async with running(config("[{plugin: anonymous}]")) as gateway:
        assert (await gateway.post("/v1/chat/completions", CALL, key="sk-example-whatever")).status == 200
        (receipt,) = await gateway.settled(1)
        assert receipt.caller.tenant == "anonymous"


async def test_plugins_listed_after_it_are_never_asked() -> None:
    auth = "[{plugin: anonymous}, {plugin: api_keys, file: keys.yaml}]"
    async with running(config(auth), files={"keys.yaml": KEYS}) as gateway:
        assert (await gateway.get("/v1/models", key="sk-example-unknown")).status == 200


async def test_behind_api_keys_it_takes_calls_without_a_key_but_not_wrong_keys() -> None:
    auth = "[{plugin: api_keys, file: keys.yaml}, {plugin: anonymous}]"
    async with running(config(auth), files={"keys.yaml": KEYS}) as gateway:
        assert (await gateway.get("/v1/models")).status == 200
        assert (await gateway.get("/v1/models", key="sk-example-unknown")).status == 401


def test_alone_it_does_not_protect_operators_paths_that_others_can_reach(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "qlens.yaml"
    file.write_text(config("[{plugin: anonymous}]", "server: {admin: {host: 0.0.0.0}}"))
    assert main(["check", str(file)]) == 2
    assert "server.admin.host" in capsys.readouterr().err
