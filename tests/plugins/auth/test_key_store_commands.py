"""`qlens keys` and `qlens audit` on a database of keys."""

from __future__ import annotations

import asyncio
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from keystores import config, key_file, status
from ledgers import Place, PostgresPlace

from qlens.cli import main
from qlens.testing import running


def alone(place: Place) -> str:
    """The store without the file of keys."""
    return config(place=place).replace(", {plugin: api_keys, file: keys.yaml}", "")


@pytest.fixture
def house(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The configuration that the commands find."""
    path = tmp_path / "qlens.yaml"
    path.write_text(alone(place))
    monkeypatch.setenv("QLENS_CONFIG", str(path))
    return path


def rows(capsys: pytest.CaptureFixture[str], *words: str) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert main([*words, "--json"]) == 0
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return found


async def test_what_the_command_makes_rotates_and_revokes_a_gateway_knows(
    house: Path, place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*words: str) -> str:
        assert main(list(words)) == 0
        return capsys.readouterr().out.strip()

    async with running(alone(place)) as gateway:
        key = await asyncio.to_thread(run, "keys", "create", "--tenant", "acme")
        assert await status(gateway, key) == 200
        id_ = (await gateway.get("/admin/whoami", key=key)).json()["key_id"]
        new = await asyncio.to_thread(run, "keys", "rotate", id_, "--overlap", "2d")
        assert [await status(gateway, each) for each in (new, key)] == [200, 200]
        await asyncio.to_thread(run, "keys", "revoke", id_)
        async with asyncio.timeout(5):
            while await status(gateway, new) != 401:
                await asyncio.sleep(0.02)
        assert await status(gateway, key) == 401


def test_everything_that_a_key_may_be_told_is_kept_and_its_hash_is_not_shown(
    house: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in (
        "--tenant acme --name one --project search --role member --role tenant_admin --model gpt*",
        "--tenant acme --tag a=b --expires 90d --concurrency 2 --budget-usd 2.50 --budget-window day",
        "--tenant globex --requests-per-minute 5 --tokens-per-minute 6 --metadata owner=search --metadata ticket=a=b",
    ):
        assert main(["keys", "create", *words.split()]) == 0
    third, second, first = rows(capsys, "keys", "list")
    assert (first["name"], first["project"], first["models"]) == ("one", "search", ["gpt*"])
    assert first["roles"] == ["member", "tenant_admin"]
    assert (second["tags"], second["expires_at"] is not None) == ({"a": "b"}, True)
    assert second["limits"] == {"concurrency": 2, "budget_usd": "2.5", "budget_window": "day"}
    assert third["limits"] == {"requests_per_minute": 5, "tokens_per_minute": 6}
    assert (first["metadata"], third["metadata"]) == ({}, {"owner": "search", "ticket": "a=b"})
    assert not any("hash" in name for row in (first, second, third) for name in row)
    assert [row["id"] for row in rows(capsys, "keys", "list", "--tenant", "globex")] == [third["id"]]
    assert main(["keys", "list"]) == 0
    assert capsys.readouterr().out.startswith("ID ")


def test_what_the_command_does_is_in_the_audit_log(
    house: Path, place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["keys", "create", "--tenant", "acme"]) == 0
    (key,) = rows(capsys, "keys", "list")
    assert main(["keys", "revoke", key["id"]]) == 0
    revoked, created = rows(capsys, "audit")
    assert (revoked["action"], created["action"]) == ("keys.revoke", "keys.create")
    assert (revoked["actor"]["by"], revoked["actor"]["tenant"], revoked["tenant"]) == ("command line", None, "acme")
    assert rows(capsys, "audit", "--action", "keys.create", "--object", key["id"], "--since", "2020-01-01") == [created]
    assert rows(capsys, "audit", "--until", "2020-01-01") == []
    assert main(["audit", "--verify"]) == 0
    assert "2 entries, each as it was written" in capsys.readouterr().out
    is_postgres = isinstance(place, PostgresPlace)
    place.execute("ALTER TABLE audit DISABLE TRIGGER ALL" if is_postgres else "DROP TRIGGER audit_is_not_deleted")
    place.execute("DELETE FROM audit WHERE n = 1")
    assert main(["audit", "--verify"]) == 1
    assert revoked["id"] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("keys revoke key-0", "no key with the id 'key-0'"),
        ("keys rotate key-0", "no key with the id 'key-0'"),
        ("keys create --tenant acme --role root", "there is no role 'root'"),
        ("keys create --tenant acme --expires 2020-01-01", "not in the future"),
        (f"keys create --tenant acme {' '.join(f'--metadata {n}=x' for n in range(17))}", "at most 16 texts"),
    ],
)
def test_what_cannot_be_done_is_said(house: Path, capsys: pytest.CaptureFixture[str], words: str, message: str) -> None:
    assert main(words.split()) == 2
    assert message in capsys.readouterr().err


def test_options_are_read_as_the_admin_api_reads_its_fields(house: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in (
        ("--tenant ''", "--tenant: '': must be a text"),
        ("--tenant 'a\nb'", "--tenant: 'a\\nb': must be a text"),
        ("--tenant a --name 'x\udcff'", "--name: 'x\\udcff': must be a text"),
        ("--tenant a --model g*t", "--model: 'g*t': must be names"),
        ("--tenant a --tag 'a= '", "--tag: 'a= ': must be a text"),
        (f"--tenant a --metadata {'n' * 65}=x", "must have names of at most 64 characters"),
        ("--tenant a --metadata 'a=\udcff'", "must have texts that are Unicode"),
        ("--tenant a --concurrency 0", "--concurrency: '0': must be a whole number from 1"),
        ("--tenant a --budget-usd 1e99", "--budget-usd: '1e99': "),
        ("--tenant a --expires 9999-12-31T23:59:59-14:00", "--expires: '9999-12-31T23:59:59-14:00' is before"),
    ):
        with pytest.raises(SystemExit):
            main(["keys", "create", *shlex.split(words)])
        assert message in capsys.readouterr().err, words


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("keys revoke a\udcff", "no key with the id 'a\\udcff'"),
        ("keys rotate a\udcff", "no key with the id 'a\\udcff'"),
        ("keys create --tenant a --role a\udcff", "there is no role 'a\\udcff'"),
        ("keys list --tenant a\udcff", "--tenant: 'a\\udcff' has bytes that are no UTF-8"),
        *(
            (f"audit --{name} a\udcff", f"--{name}: 'a\\udcff' has bytes that are no UTF-8")
            for name in ("tenant", "actor", "action", "object")
        ),
    ],
)
def test_arguments_with_bytes_that_are_no_unicode_are_refused(
    house: Path, capsys: pytest.CaptureFixture[str], words: str, message: str
) -> None:
    try:
        code = main(words.split())
    except SystemExit as left:
        code = int(left.code or 0)
    assert code == 2
    assert message in capsys.readouterr().err


def test_what_the_environment_says_is_nobody_in_the_audit_log(
    house: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOGNAME", "somebody-else")
    assert main(["keys", "create", "--tenant", "acme"]) == 0
    (entry,) = rows(capsys, "audit")
    assert entry["actor"]["subject"] != "somebody-else"


def test_where_two_plugins_have_the_command_one_is_chosen(
    house: Path, place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    house.write_text(config(place=place))
    (house.parent / "keys.yaml").write_text(key_file())
    assert main(["keys", "list"]) == 2
    said = capsys.readouterr().err
    assert "belongs to both auth.key_store and auth.api_keys: choose one, like qlens keys --plugin api_keys" in said
    assert rows(capsys, "keys", "--plugin", "key_store", "list") == []
    assert len(rows(capsys, "keys", "list", "--plugin=auth.api_keys")) > 10
    assert main(["audit"]) == 0  # only key_store has it
    assert main(["keys", "list", "--plugin", "ledger"]) == 2
    assert "no plugin called 'ledger' has a command" in capsys.readouterr().err
