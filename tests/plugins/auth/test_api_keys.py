"""The plugin `api_keys`: who is let in, how its file is read and followed, and the command that changes it."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import stat
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn

import pytest

from qlens import StartupError
from qlens.cli import main
from qlens.testing import ManualClock, Running, check_plugin, running
from qlens_plugins.auth.api_keys import ApiKeys
from qlens_plugins.auth.api_keys.key_file import parse

CALL = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "hello"}]}
KEY = "sk-example-Zb1yQ0cW8mT5rL2vX7nK4hJ9dF6gS3aP"
OTHER = "sk-example-otherotherotherotherotherother"
JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJ4In0.c2lnbmF0dXJl"


def config(settings: str = "file: keys.yaml, reload_seconds: 0.02", behind: str = "") -> str:
    return f"""
pipeline: {{auth: [{{plugin: api_keys, {settings}}}{behind}], cost: []}}
providers: {{echo: {{plugin: echo}}}}
models:
  gpt-4o-mini: {{max_output_tokens: 1000, targets: [{{provider: echo, model: gpt-4o-mini}}]}}
  secret-model: {{max_output_tokens: 1000, targets: [{{provider: echo, model: gpt-4o-mini}}]}}
"""


def hashed(key: str) -> str:
    return "sha256:" + hashlib.sha256(key.encode()).hexdigest()


def row(key: str = KEY, id_: str = "one", more: str = "") -> str:
    return f"- {{id: {id_}, hash: '{hashed(key)}', tenant: acme{more}}}\n"


def keys(*rows: str) -> str:
    return "keys:\n" + "".join(rows or (row(),))


async def eventually(holds: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(10):
        while not await holds():
            await asyncio.sleep(0.02)


async def status(gateway: Running, key: str) -> int:
    return (await gateway.get("/v1/models", key=key)).status


def test_it_keeps_the_contract_of_its_stage() -> None:
    check_plugin("auth", ApiKeys)


# --- who is let in -----------------------------------------------------------------------------


async def test_a_key_tells_everything_about_its_caller() -> None:
    text = f"""
keys:
  - id: search-prod
    hash: {hashed(KEY)}
    tenant: acme
    project: search
    roles: [member, viewer]
    models: [gpt-4o*]
    tags: {{team: search, cost_center: "0042"}}
    created: 2026-01-01
    expires_at: 2100-01-01T01:00:00+01:00
"""
    async with running(config(), files={"keys.yaml": text}) as gateway:
        assert (await gateway.post("/v1/chat/completions", CALL, key=KEY)).status == 200
        (receipt,) = await gateway.settled(1)
        caller = receipt.caller
        assert (caller.tenant, caller.project, caller.key_id) == ("acme", "search", "search-prod")
        assert (caller.subject, caller.by) == ("search-prod", "api_keys")
        assert caller.roles == {"member", "viewer"}
        assert caller.models == ("gpt-4o*",)
        assert receipt.tags == {"team": "search", "cost_center": "0042"}
        assert caller.expires_at == 4102444800


async def test_an_api_key_header_is_as_good_as_a_bearer_token() -> None:
    async with running(config(), files={"keys.yaml": keys()}) as gateway:
        assert (await gateway.get("/v1/models", headers={"api-key": KEY})).status == 200


async def test_only_the_whole_key_is_the_key() -> None:
    async with running(config(), files={"keys.yaml": keys()}) as gateway:
        for wrong in (KEY[:-1], KEY + "x", KEY.swapcase(), KEY[:20], OTHER, "x", "ключ-ключ"):
            answer = await gateway.get("/v1/models", key=wrong)
            assert answer.status == 401
            error = answer.json()["error"]
            assert (error["type"], error["code"], error["param"]) == ("invalid_request_error", "invalid_api_key", None)
            assert error["message"].startswith("Incorrect API key provided: ")
            assert wrong not in error["message"]


async def test_of_a_wrong_key_seven_characters_are_shown_and_of_a_short_one_none() -> None:
    async with running(config(), files={"keys.yaml": keys()}) as gateway:
        long = (await gateway.get("/v1/models", key="sk-example-0123456789abcdef")).json()["error"]["message"]
        assert "sk-...cdef." in long
        assert "example" not in long
        short = (await gateway.get("/v1/models", key="sk-hunter2")).json()["error"]["message"]
        assert "***" in short
        assert "hunter2" not in short


async def test_bytes_that_are_no_text_are_a_wrong_key_and_not_a_failure() -> None:
    async with running(config(), files={"keys.yaml": keys()}) as gateway:
        reader, writer = await asyncio.open_connection(*gateway.url.removeprefix("http://").split(":"))
        writer.write(b"GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\n")
        writer.write(b"Authorization: Bearer " + b"sk-example-\xff\xfe\x80" * 4 + b"\r\n\r\n")
        answer = await reader.read()
        writer.close()
        assert answer.startswith(b"HTTP/1.1 401 ")
        assert b'"code":"invalid_api_key"' in answer


async def test_without_a_credential_the_next_plugin_is_asked() -> None:
    behind = ", {plugin: anonymous}"
    async with running(config(behind=behind), files={"keys.yaml": keys()}) as gateway:
        assert (await gateway.get("/v1/models")).status == 200
    async with running(config(), files={"keys.yaml": keys()}) as gateway:
        answer = await gateway.get("/v1/models")
        assert answer.status == 401
        assert "didn't provide an API key" in answer.text


async def test_an_unknown_jwt_is_left_to_the_next_plugin() -> None:
    behind = ", {plugin: anonymous}"
    async with running(config(behind=behind), files={"keys.yaml": keys()}) as gateway:
        assert await status(gateway, JWT) == 200
        assert await status(gateway, OTHER) == 401
    async with running(config(), files={"keys.yaml": keys()}) as gateway:
        assert await status(gateway, JWT) == 401


async def test_a_known_key_may_look_like_a_jwt() -> None:
    async with running(config(), files={"keys.yaml": keys(row(JWT))}) as gateway:
        assert await status(gateway, JWT) == 200


async def test_a_key_expires_at_its_moment() -> None:
    clock = ManualClock(now=1_800_000_000.0)
    rows = keys(row(more=", expires_at: '2027-01-15T08:01:00Z'"))
    async with running(config(), files={"keys.yaml": rows}, clock=clock) as gateway:
        clock.advance(59)
        assert await status(gateway, KEY) == 200
        clock.advance(1)
        answer = await gateway.get("/v1/models", key=KEY)
        assert answer.status == 401
        assert answer.json()["error"]["code"] == "invalid_api_key"
        assert "expired" in answer.text


async def test_a_revoked_key_is_refused() -> None:
    rows = keys(row(more=", revoked: 2026-01-01"), row(OTHER, "two"))
    async with running(config(), files={"keys.yaml": rows}) as gateway:
        answer = await gateway.get("/v1/models", key=KEY)
        assert (answer.status, answer.json()["error"]["code"]) == (401, "invalid_api_key")
        assert "revoked" in answer.text
        assert await status(gateway, OTHER) == 200


async def test_a_model_the_key_may_not_use_is_not_found() -> None:
    async with running(config(), files={"keys.yaml": keys(row(more=", models: ['gpt-*']"))}) as gateway:
        answer = await gateway.post("/v1/chat/completions", {**CALL, "model": "secret-model"}, key=KEY)
        unknown = await gateway.post("/v1/chat/completions", {**CALL, "model": "secret-modem"}, key=KEY)
        assert answer.status == unknown.status == 404
        assert answer.text.replace("secret-model", "secret-modem") == unknown.text


# --- the file ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "place", "message"),
    [
        ("keys: [{id: a\n", "keys.yaml:2", "is no YAML"),
        ("- id: a\n", "keys.yaml:1", "must be a mapping with the list `keys`"),
        ("{}\n", "keys.yaml:1", "the list `keys` is missing"),
        ("keys: text\n", "keys.yaml:1", "`keys` must be a list"),
        ("keyz: []\n", "keys.yaml:1", "unknown field 'keyz'"),
        ("keys:\n- text\n", "keys.yaml:2", "a key must be a mapping"),
        ("keys:\n- {id: a}\n", "keys.yaml:2", "the key has no hash and no tenant"),
        (keys(row(more=", colour: red")), "keys.yaml:2", "unknown field 'colour'; a key has id, hash, tenant"),
        (keys(row(more=", id: two")), "keys.yaml:2", "'id' stands here twice"),
        (keys(row(), row(OTHER)), "keys.yaml:3", "id: 'one' stands in line 2 already"),
        (keys(row(), row(KEY, "two")), "keys.yaml:3", f"hash: '{hashed(KEY)}' stands in line 2 already"),
        (keys(row(id_="'a/b'")), "keys.yaml:2", "id: 'a/b' must be up to 64 letters"),
        (keys("- {id: a, tenant: t, hash: 'sha256:12'}\n"), "keys.yaml:2", "hash: must be sha256: and 64"),
        (keys(row(more=", project: ''")), "keys.yaml:2", "project: must be a text of printable characters"),
        (keys(row(more=", project: [a]")), "keys.yaml:2", "project: must be a text"),
        (keys(row(more=", roles: member")), "keys.yaml:2", "roles: must be a list of texts"),
        (keys(row(more=", models: []")), "keys.yaml:2", "models: an empty list; leave the field out"),
        (keys(row(more=", tags: [a]")), "keys.yaml:2", "tags: must be a mapping of texts"),
        (keys(row(more=", tags: {a: {b: c}}")), "keys.yaml:2", "tags: must be a text"),
        (keys(row(more=", expires_at: soon")), "keys.yaml:2", "expires_at: 'soon' is no ISO 8601 time"),
        (keys(row(more=", expires_at: '2027-01-01T00:00:00'")), "keys.yaml:2", "has no time zone; end it with Z"),
        (keys(row(more=", expires_at: '9999-12-31T23:59:59-01:00'")), "keys.yaml:2", "is before the year 1 or after"),
    ],
)
def test_what_is_wrong_in_a_file_is_told_with_place_and_way_out(text: str, place: str, message: str) -> None:
    with pytest.raises(StartupError) as error:
        parse(text, "keys.yaml")
    faults = [str(fault) for fault in error.value.faults]
    assert any(place in fault and message in fault for fault in faults), faults


async def test_all_faults_of_a_file_are_told_at_once_and_a_key_in_the_wrong_place_is_not_repeated() -> None:
    text = keys(f"- {{id: a, hash: {KEY}, tenant: t, roles: []}}\n", row(more=", expires_at: soon"))
    with pytest.raises(StartupError) as error:
        async with running(config(), files={"keys.yaml": text}):
            pass
    assert len(error.value.faults) == 3
    assert KEY not in str(error.value)


async def test_a_missing_file_stops_the_start_and_names_the_command_that_makes_it() -> None:
    with pytest.raises(StartupError, match=r"keys.yaml: does not exist; .*qlens keys create"):
        async with running(config()):
            pass


async def test_an_empty_list_of_keys_starts_and_lets_nobody_in() -> None:
    async with running(config(), files={"keys.yaml": "keys: []\n"}) as gateway:
        assert await status(gateway, KEY) == 401


async def test_keys_come_and_go_without_a_restart() -> None:
    async with running(config(), files={"keys.yaml": keys()}) as gateway:
        file = gateway.folder / "keys.yaml"
        assert await status(gateway, OTHER) == 401
        file.write_text(keys(row(more=", revoked: 2026-01-01"), row(OTHER, "two")))

        async def changed() -> bool:
            return await status(gateway, OTHER) == 200

        await eventually(changed)
        assert await status(gateway, KEY) == 401


async def test_a_file_that_is_being_written_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qlens.followed_files.STILL_SECONDS", 1)
    before = keys(row(), row(OTHER, "two"))
    async with running(config(), files={"keys.yaml": before}) as gateway:
        third = "sk-example-thirdthirdthirdthirdthirdthird"
        with (gateway.folder / "keys.yaml").open("w") as file:
            for line in [*before.splitlines(keepends=True), row(third, "three")]:
                await asyncio.sleep(0.1)
                assert (await status(gateway, KEY), await status(gateway, OTHER)) == (200, 200)
                file.write(line)
                file.flush()

        async def changed() -> bool:
            assert (await status(gateway, KEY), await status(gateway, OTHER)) == (200, 200)
            return await status(gateway, third) == 200

        await eventually(changed)


@pytest.mark.parametrize("unforeseen", [False, True])
async def test_a_bad_new_file_keeps_the_old_keys_and_is_told_once(
    unforeseen: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_path: Path) -> NoReturn:
        raise RecursionError

    caplog.set_level(logging.INFO)
    async with running(config(), files={"keys.yaml": keys()}) as gateway:
        plugin = gateway.plugin("auth", "api_keys")
        file = gateway.folder / "keys.yaml"
        if unforeseen:
            monkeypatch.setattr("qlens_plugins.auth.api_keys.plugin.read", fail)
        file.write_text("keys:\n- id: one\n")

        async def troubled() -> bool:
            return not plugin.health().ok

        await eventually(troubled)
        assert await status(gateway, KEY) == 200
        told = "keys.yaml: RecursionError" if unforeseen else "keys.yaml:2: the key has no hash and no tenant"
        assert told in plugin.health().detail
        assert "still using 1 keys" in plugin.health().detail
        await asyncio.sleep(0.1)  # several more looks at the file
        assert len([record for record in caplog.records if "stay as they are" in record.message]) == 1

        monkeypatch.undo()
        file.write_text(keys(row(OTHER)))

        async def mended() -> bool:
            return bool(plugin.health().ok)

        await eventually(mended)
        assert await status(gateway, OTHER) == 200
        await asyncio.sleep(0.1)
        assert len([record for record in caplog.records if "read 1 keys" in record.message]) == 1


async def test_a_file_that_vanishes_and_returns_unchanged_is_in_use_again() -> None:
    async with running(config(), files={"keys.yaml": keys()}) as gateway:
        plugin = gateway.plugin("auth", "api_keys")
        file = gateway.folder / "keys.yaml"
        file.rename(gateway.folder / "away.yaml")

        async def troubled() -> bool:
            return "No such file" in plugin.health().detail

        await eventually(troubled)
        assert await status(gateway, KEY) == 200
        (gateway.folder / "away.yaml").rename(file)

        async def mended() -> bool:
            return bool(plugin.health().ok)

        await eventually(mended)


# --- the demo key ------------------------------------------------------------------------------

DEMO = "file: keys.yaml, demo_key_file: demo/key, reload_seconds: 0.02"


async def test_a_demo_key_is_made_for_its_owner_alone_and_shown_in_the_banner() -> None:
    async with running(config(DEMO)) as gateway:
        file = gateway.folder / "demo" / "key"
        demo = file.read_text().strip()
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert demo.startswith("sk-qlens-")
        assert len(demo) > 50
        banner = "\n".join(gateway.gateway.banner())
        assert f"base URL  {gateway.url}/v1\n" in banner
        assert f"API key   {demo}\n" in banner
        curl = banner[banner.index("curl ") : banner.index("from openai")]
        done = await asyncio.create_subprocess_shell(f"{curl.strip()} -s", stdout=asyncio.subprocess.PIPE)
        assert b'"chat.completion"' in (await done.communicate())[0]
        answer = await gateway.get("/admin/health", key=demo)
        assert answer.status == 200
        assert gateway.plugin("auth", "api_keys").demo_key == demo
        assert (await gateway.post("/v1/chat/completions", CALL, key=demo)).status == 200
        receipt, *_ = await gateway.settled(1)
        assert (receipt.caller.tenant, receipt.caller.key_id) == ("demo", "demo")
        assert [name.name for name in file.parent.iterdir()] == ["key"]


async def test_a_demo_key_stays_the_same_from_start_to_start(tmp_path: Path) -> None:
    settings = f"file: keys.yaml, demo_key_file: {tmp_path}/key"
    async with running(config(settings)) as gateway:
        first = gateway.plugin("auth", "api_keys").demo_key
    async with running(config(settings)) as gateway:
        assert gateway.plugin("auth", "api_keys").demo_key == first
        assert await status(gateway, first) == 200


async def test_a_demo_key_that_others_may_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "key").write_text(KEY)
    (tmp_path / "key").chmod(0o640)
    with pytest.raises(StartupError, match=r"others may read the demo key \(mode 0640\): chmod 600"):
        async with running(config(f"file: keys.yaml, demo_key_file: {tmp_path}/key")):
            pass


async def test_a_demo_key_file_without_a_key_is_refused(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("two words\n")
    (tmp_path / "key").chmod(0o600)
    with pytest.raises(StartupError, match="delete it, and a new one is made"):
        async with running(config(f"file: keys.yaml, demo_key_file: {tmp_path}/key")):
            pass


async def test_with_a_demo_key_the_file_of_keys_may_come_later() -> None:
    async with running(config(DEMO)) as gateway:
        assert gateway.plugin("auth", "api_keys").health().ok
        (gateway.folder / "keys.yaml").write_text(keys())

        async def changed() -> bool:
            return await status(gateway, KEY) == 200

        await eventually(changed)
        assert await status(gateway, gateway.plugin("auth", "api_keys").demo_key) == 200


async def test_no_other_key_may_be_called_demo_beside_the_demo_key() -> None:
    with pytest.raises(StartupError, match="the id 'demo' belongs to the demo key"):
        async with running(config(DEMO), files={"keys.yaml": keys(row(id_="demo"))}):
            pass


def test_a_demo_key_is_for_this_machine_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "qlens.yaml"
    file.write_text(config(DEMO) + "server: {host: 0.0.0.0}\n")
    assert main(["check", str(file)]) == 2
    assert "for this machine only" in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()


# --- the command -------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "qlens.yaml").write_text(config())
    monkeypatch.setenv("QLENS_CONFIG", str(tmp_path / "qlens.yaml"))
    return tmp_path


def create(*words: str) -> int:
    return main(["keys", "create", "--tenant", "acme", *words])


async def test_a_created_key_opens_the_gateway_and_is_not_in_the_file(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--project", "search", "--role", "viewer", "--model", "gpt-*", "--tag", "team=a=b", "--id", "mine"]
    assert await asyncio.to_thread(create, *words, "--expires", "90d") == 0
    out, err = capsys.readouterr()
    key = out.removesuffix("\n")
    assert key.startswith("sk-qlens-")
    assert "\n" not in key
    assert "mine" in err
    assert key not in err
    text = (folder / "keys.yaml").read_text()
    assert key not in text
    assert stat.S_IMODE((folder / "keys.yaml").stat().st_mode) == 0o600
    async with running(config(), files={"keys.yaml": text}) as gateway:
        assert (await gateway.post("/v1/chat/completions", CALL, key=key)).status == 200
        (receipt,) = await gateway.settled(1)
        assert receipt.caller.project == "search"
        assert receipt.caller.roles == {"viewer"}
        assert receipt.caller.models == ("gpt-*",)
        assert receipt.tags == {"team": "a=b"}


def test_a_file_of_keys_holds_no_usable_key(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = []
    for _ in range(8):
        assert create() == 0
        made.append(capsys.readouterr().out.strip())
    text = (folder / "keys.yaml").read_text()
    assert len(set(made)) == 8
    assert not [key for key in made if key in text or key[-12:] in text]


@pytest.mark.parametrize(
    "text",
    [
        "# why\nkeys:\n  - id: old # mine\n    hash: HASH\n    tenant: t\n# the end",
        "keys:\n- {id: old, hash: 'HASH', tenant: t} # mine\n",
        "keys:\n    -   id: old # mine\n        hash: HASH\n        tenant: t\n",
        "keys:\r\n- id: old # mine\r\n  hash: HASH\r\n  tenant: t\r\n",
    ],
)
def test_creating_and_revoking_leave_the_rest_of_the_file_as_it_is(
    text: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = folder / "keys.yaml"
    file.write_bytes(text.replace("HASH", hashed(KEY)).encode())
    file.chmod(0o640)
    assert create("--id", "new") == 0
    assert main(["keys", "revoke", "old"]) == 0
    capsys.readouterr()
    assert main(["keys", "list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [(key["id"], key["state"]) for key in listed] == [("old", "revoked"), ("new", "active")]
    assert not any("hash" in key for key in listed)
    after = file.read_bytes().decode()
    assert all(line in after for line in text.replace("HASH", hashed(KEY)).splitlines() if "{" not in line)
    assert "# mine" in after
    assert stat.S_IMODE(file.stat().st_mode) == 0o640


@pytest.mark.parametrize("text", ["", "# nobody yet\n", "keys:\n", "keys: []  # nobody yet\n", "keys:  # nobody yet"])
def test_the_first_key_fits_into_every_empty_file(text: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "keys.yaml").write_text(text)
    assert create("--id", "first") == 0
    capsys.readouterr()
    assert main(["keys", "list", "--json"]) == 0
    assert [key["id"] for key in json.loads(capsys.readouterr().out)] == ["first"]
    assert ("# nobody yet" in text) == ("# nobody yet" in (folder / "keys.yaml").read_text())


def test_a_layout_that_cannot_be_edited_is_refused_and_left_alone(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = f"keys: [{{id: old, hash: '{hashed(KEY)}', tenant: t}}]\n"
    (folder / "keys.yaml").write_text(text)
    assert create() == 2
    out, err = capsys.readouterr()
    assert "block list" in err
    assert not out
    assert (folder / "keys.yaml").read_text() == text


def test_an_id_stays_taken_after_its_key_was_revoked(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert create("--id", "one") == 0
    assert main(["keys", "revoke", "one"]) == 0
    before = (folder / "keys.yaml").read_text()
    assert main(["keys", "revoke", "one"]) == 0
    assert (folder / "keys.yaml").read_text() == before
    capsys.readouterr()
    assert create("--id", "one") == 2
    out, err = capsys.readouterr()
    assert "'one' exists already" in err
    assert not out


def test_revoking_an_unknown_id_is_an_error(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert create() == 0
    assert main(["keys", "revoke", "nobody"]) == 2
    assert "no key with the id 'nobody'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--expires", "2020-01-01"), "2020-01-01T00:00:00Z is not in the future"),
        (("--id", "a b"), "must be up to 64 letters"),
    ],
)
def test_values_that_the_file_would_refuse_make_no_key(
    words: tuple[str, ...], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert create(*words) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert not out
    assert not (folder / "keys.yaml").exists()


@pytest.mark.parametrize("words", [("--expires", "soon"), ("--expires", "90"), ("--tag", "team"), ("--tag", "=x")])
def test_arguments_that_mean_nothing_are_explained(
    words: tuple[str, ...], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        create(*words)
    assert stopped.value.code == 2
    assert words[1] in capsys.readouterr().err


def test_the_list_shows_who_has_a_key_and_no_hash(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "keys.yaml").write_text(keys(row(more=", expires_at: 2020-01-01"), row(OTHER, "two", ", roles: [a, b]")))
    assert main(["keys", "list"]) == 0
    out = capsys.readouterr().out
    head, first, second = out.splitlines()
    assert head.split() == ["ID", "TENANT", "PROJECT", "ROLES", "MODELS", "CREATED", "EXPIRES_AT", "STATE"]
    assert first.split() == ["one", "acme", "-", "member", "-", "-", "2020-01-01T00:00:00Z", "expired"]
    assert second.split() == ["two", "acme", "-", "a,", "b", "-", "-", "-", "active"]
    assert "sha256" not in out


def test_an_empty_list_says_how_to_make_a_key(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", "list"]) == 0
    assert "qlens keys create" in capsys.readouterr().err


def test_keys_created_at_the_same_time_are_all_kept(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda n: create("--id", f"key{n}"), range(8))) == [0] * 8
    capsys.readouterr()
    assert main(["keys", "list", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 8
    assert sorted(os.listdir(folder)) == ["keys.yaml", "qlens.yaml"]


def test_a_link_to_the_file_stays_a_link(folder: Path) -> None:
    (folder / "real.yaml").write_text("keys:\n")
    (folder / "keys.yaml").symlink_to("real.yaml")
    assert create("--id", "one") == 0
    assert (folder / "keys.yaml").is_symlink()
    assert "id: one" in (folder / "real.yaml").read_text()
