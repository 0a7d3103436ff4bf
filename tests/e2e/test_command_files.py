"""Commands that are given files which are none of theirs say so in lines that name the file, and nothing falls over."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from e2e.serving import run_qlens

from qlens.cli import main

CONFIG = """
server: {{port: 0, admin: {{port: 0}}}}
pipeline:
  auth: [{{plugin: api_keys, file: "{keys}"}}, {{plugin: key_store, url: "sqlite:///{store}"}}]
  cost:
    - {{plugin: prices, table: [{{model: "*", input: 1, output: 1}}]}}
    - {{plugin: budgets, limits: [{{per: tenant, usd: 1, window: month}}], store: {{kind: sqlite, url: "{budgets}"}}}}
    - {{plugin: ledger, url: "sqlite:///{ledger}"}}
  observe:
    - plugin: webhooks
      url: "sqlite:///{hooks}"
      endpoints: [{{name: a, url: "https://hooks.example.com/", secrets: [{secret}], events: ["*"]}}]
providers: {{echo: {{plugin: echo}}}}
models: {{m: {{max_output_tokens: 10, targets: [{{provider: echo, model: m}}]}}}}
"""
SECRET = "whsec_YW4gZXhhbXBsZSBvZiAzMiBieXRlcywgbm90IHJlYWw="

Make = Callable[[Path], object]
STRANGE: dict[str, Make] = {
    "missing": lambda path: None,
    "folder": lambda path: path.mkdir(),
    "empty": lambda path: path.touch(),
    "binary": lambda path: path.write_bytes(bytes(range(256)) * 40),
    "no text": lambda path: path.write_bytes(b"\xff\xfe"),
    "deep": lambda path: path.write_bytes(b"[" * 200_000),
    "a loop": lambda path: path.symlink_to(path.name),
    "half a database": lambda path: path.write_bytes(b"SQLite format 3\0" + b"x" * 100),
    "half an archive": lambda path: path.write_bytes(b"\x1f\x8b\x08\x00xx"),
    "a list": lambda path: path.write_bytes(b"[1]"),
    "a bad line": lambda path: path.write_bytes(b'{"qlens_ledger": 2, "backup": "\\ud800"}\n{"end": 5}\n'),
}
ASKED = (
    # What is asked of the command line itself; FILE stands for what is strange.
    "check FILE", "routes FILE", "explain FILE ok.yaml", "explain ok.yaml FILE", "usage -c FILE",
    "ledger restore FILE", "reconcile --azure FILE --provider echo", "reconcile --aws FILE --provider echo",
    "reconcile --openai FILE --provider echo", "reconcile --azure bill.csv --map FILE --provider echo",
    "what-if --config FILE",
)  # fmt: skip
NAMED = {
    # What a configuration names, and the commands that use it.
    "keys": tuple(f"keys --plugin api_keys {words}" for words in ("list", "create --tenant a", "revoke x")),
    "store": (
        "keys --plugin key_store list", "keys --plugin key_store create --tenant a", "audit", "audit --verify",
        "keys --plugin api_keys create --tenant a",
    ),
    "ledger": ("usage", "ledger migrate", "ledger verify", "ledger backup all.jsonl", "what-if --config ok.yaml"),
    "hooks": ("webhooks list", "webhooks dead", "webhooks resend a"),
    "budgets": ("budgets",),
}  # fmt: skip


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QLENS_CONFIG", "ok.yaml")
    write(tmp_path / "ok.yaml")
    (tmp_path / "bill.csv").write_text("date,metername,costinbillingcurrency\n2026-11-01,gpt,1\n")
    return tmp_path


def write(path: Path, **named: str) -> None:
    usual = {"keys": "keys.yaml", "store": "store.db", "ledger": "ledger.db", "hooks": "hooks.db"}
    budgets = named.pop("budgets", "budgets.db")
    path.write_text(CONFIG.format(**(usual | named), budgets=f"sqlite:///{budgets}", secret=SECRET))


def ends(words: str) -> int:
    """How a command ends, which must be by itself."""
    try:
        return main(words.split())
    except SystemExit as left:
        return int(left.code or 0)


@pytest.mark.parametrize("make", STRANGE.values(), ids=STRANGE)
def test_a_strange_file_on_the_command_line_is_named(
    make: Make, house: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(house / "FILE")
    for words in ASKED:
        code = ends(words)
        said = capsys.readouterr()
        if code and '"invalid_request_error"' not in said.out:  # which is what a call with this body is answered
            assert "FILE" in said.err, (words, said.err)
        assert "Traceback" not in said.err + said.out, words


@pytest.mark.parametrize("make", STRANGE.values(), ids=STRANGE)
def test_a_strange_file_that_the_configuration_names_is_named(
    make: Make, house: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for which, commands in NAMED.items():
        for number, words in enumerate(commands):
            file = house / f"{which}{number}.db"
            make(file)
            write(house / "ok.yaml", **{which: str(file)})
            code = ends(words)
            said = capsys.readouterr()
            if code:
                assert file.name in said.err, (words, said.err)
            assert "Traceback" not in said.err + said.out, words


def test_a_name_that_is_no_text_is_shown_as_it_is(house: Path) -> None:
    name = os.fsdecode(b"all\xff.jsonl")
    for code, words in ((0, "backup"), (1, "backup"), (0, "restore")):
        write(house / "ok.yaml", ledger=f"{words}.db")
        found = run_qlens("ledger", words, name, cwd=house, env={"QLENS_CONFIG": "ok.yaml"})
        assert (found.returncode, "Traceback" in found.stderr) == (code, False), found.stderr
    assert (house / name).exists()
