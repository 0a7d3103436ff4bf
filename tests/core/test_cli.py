"""The command `qlens` on configurations that are good, that are not, and that may surprise."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from qlens.cli import main
from qlens.testing import running

BASE = """
pipeline:
  auth: [{plugin: anonymous}]
  rate_limit: [{plugin: token_bucket, limits: [{per: tenant, tokens_per_minute: 1000}]}]
providers: {echo: {plugin: echo}}
models:
  large: {targets: [{provider: echo, model: large}]}
  small: {max_output_tokens: 100, targets: [{provider: echo, model: small}]}
  reader: {targets: [{provider: echo, model: text-embedding-3-small}]}
"""
BUDGETS = "[{plugin: prices}, {plugin: budgets, limits: [{per: tenant, usd: 1, window: day, hard: HARD}]}]"


def check(folder: Path, text: str, *options: str) -> int:
    file = folder / "qlens.yaml"
    file.write_text(text)
    return main(["check", *options, str(file)])


# --- what no model limits ----------------------------------------------------------------------


def test_models_without_a_limit_are_named_where_a_plugin_must_know_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check(tmp_path, BASE) == 0
    said = capsys.readouterr()
    (warning,) = said.err.splitlines()
    assert warning.startswith("warning: ")
    assert "no max_output_tokens at models.large: token_bucket must know" in warning
    assert "good: 3 plugins, 3 models" in said.out


@pytest.mark.parametrize(("hard", "warned"), [("true", True), ("false", False)])
def test_a_hard_budget_must_know_it_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], hard: str, warned: bool
) -> None:
    text = BASE.replace("tokens_per_minute", "requests_per_minute")
    text = text.replace("providers:", f"  cost: {BUDGETS.replace('HARD', hard)}\nproviders:", 1)
    assert check(tmp_path, text) == 0
    assert ("models.large: budgets must know" in capsys.readouterr().err) is warned


def test_nothing_is_said_where_nobody_must_know(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text in (
        BASE.replace("tokens_per_minute", "requests_per_minute"),
        BASE.replace("large: {", "large: {max_output_tokens: 5, "),
    ):
        assert check(tmp_path, text) == 0
        assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        ("rate_limit: [{plugin: token_bucket, limits: [{per: key, requests_per_minute: 1, match: {model: [smal]}}]}]",
         "pipeline.rate_limit[0]: match: no model is called 'smal': this never applies; did you mean 'small'?"),
        ("rate_limit: [{plugin: token_bucket, limits: [{per: provider, requests_per_minute: 1, "
         "match: {provider: [ecko*]}}]}]", "pipeline.rate_limit[0]: match: no provider is called 'ecko*'"),
        ("cost: [{plugin: prices}, {plugin: budgets, limits: [{per: tenant, usd: 1, hard: false, "
         "match: {model: [large, none]}}]}]", "pipeline.cost[1]: match: no model is called 'none'"),
        ("rate_limit: [{plugin: token_bucket, limits: [{per: key, requests_per_minute: 1, "
         "match: {model: ['la*', all-x], tenant: [nobody]}}]}]", None),
    ],
)  # fmt: skip
def test_a_rule_for_what_is_not_there_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], stage: str, said: str | None
) -> None:
    text = f"""
pipeline:
  auth: [{{plugin: anonymous}}]
  {stage}
providers: {{echo: {{plugin: echo}}}}
models:
  small: {{max_output_tokens: 5, targets: [{{provider: echo, model: small}}]}}
  large: {{max_output_tokens: 5, targets: [{{provider: echo, model: large}}]}}
  all-*: {{max_output_tokens: 5, targets: [{{provider: echo, model: "*"}}]}}
"""
    assert check(tmp_path, text) == 0
    warnings = capsys.readouterr().err
    assert (said is None) == (warnings == "")
    assert (said or "") in warnings


def test_a_gateway_that_nobody_may_call_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "providers: {echo: {plugin: echo}}\nmodels: {m: {targets: [{provider: echo, model: m}]}}\n"
    assert check(tmp_path, text) == 0
    assert "pipeline.auth: no plugin says who calls" in capsys.readouterr().err


async def test_the_same_is_logged_at_start_up(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "qlens"):
        async with running(BASE):
            pass
    (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "no max_output_tokens at models.large" in warning.getMessage()


# --- variables ---------------------------------------------------------------------------------

STORE = BASE.replace("plugin: token_bucket", "plugin: token_bucket, store: STORE").replace(
    "large: {", "large: {max_output_tokens: 5, "
)


@pytest.mark.parametrize(
    "store",
    [
        '{kind: redis, url: "${NOBODY_SET_THIS}"}',
        '{kind: redis, url: "redis://${NOBODY_SET_THIS}:6379"}',
        '{kind: redis, cluster: ["${NOBODY_SET_THIS}"]}',
        '{kind: redis, sentinel: {master: m, urls: ["${NOBODY_SET_THIS}"]}}',
    ],
)
def test_no_env_checks_a_store_whose_place_is_in_a_variable(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], store: str
) -> None:
    assert check(tmp_path, STORE.replace("STORE", store), "--no-env") == 0
    assert check(tmp_path, STORE.replace("STORE", store)) == 2
    assert "the environment variable NOBODY_SET_THIS is not set" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("store", "fault"),
    [
        ('{kind: redis, url: "${NOBODY_SET_THIS}", nope: 1}', "store.nope: unknown key"),
        ('{kind: redis, url: "${NOBODY_SET_THIS}", timeout_ms: 0}', "store.timeout_ms"),
        ('{kind: redis, prefix: "${NOBODY_SET_THIS}"}', "cannot be checked while variables are not set"),
    ],
)
def test_no_env_still_finds_what_else_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], store: str, fault: str
) -> None:
    assert check(tmp_path, STORE.replace("STORE", store), "--no-env") == 2
    assert fault in capsys.readouterr().err


# --- paths -------------------------------------------------------------------------------------

TAKER = """
from qlens import Endpoint, Reply, hookimpl

class Taker:
    def __init__(self, config, name):
        pass

    @hookimpl
    def endpoints(self):
        async def answer(call):
            return Reply(body=b"{}")

        return [Endpoint("GET", "PATH", None, answer, "LISTENER")]
"""


@pytest.mark.parametrize(
    ("path", "listener"),
    [("/healthz", "client"), ("/v1/models", "client"), ("/metrics", "admin"), ("/readyz", "admin")],
)
@pytest.mark.parametrize("command", ["check", "routes"])
def test_a_path_that_is_taken_is_found_before_it_is_served(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], path: str, listener: str, command: str
) -> None:
    module = f"taker_{command}_{listener}_{path.strip('/').replace('/', '_')}"
    (tmp_path / f"{module}.py").write_text(TAKER.replace("PATH", path).replace("LISTENER", listener))
    file = tmp_path / "qlens.yaml"
    file.write_text(
        f"pipeline: {{auth: [{{plugin: anonymous}}], observe: [{{plugin: '{module}:Taker', name: taker}}]}}\n"
        "providers: {echo: {plugin: echo}}\nmodels: {m: {targets: [{provider: echo, model: m}]}}\n"
    )
    assert main([command, str(file)]) == 2
    said = capsys.readouterr().err
    assert "taker" in said
    assert path in said


async def test_both_listeners_say_that_the_process_lives_and_is_ready() -> None:
    async with running(BASE) as gateway:
        for url in (gateway.url, gateway.admin_url):
            for path in ("/healthz", "/readyz"):
                async with gateway.session.get(url + path) as answer:
                    assert answer.status == 200


# --- plugins of others -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("extra", "way"), [("", "--upgrade acme-broken"), ("Provides-Extra: broken\n", "'acme-broken[broken]'")]
)
def test_a_plugin_of_another_package_that_cannot_be_imported_names_that_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], extra: str, way: str
) -> None:
    site = tmp_path / "site"
    info = site / "acme_broken-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: acme-broken\nVersion: 1.0\n{extra}")
    (info / "entry_points.txt").write_text("[qlens.observe]\nbroken = acme_broken:Broken\n")
    (site / "acme_broken.py").write_text("import a_module_that_nobody_has\n")
    monkeypatch.syspath_prepend(site)
    text = BASE.replace("providers:", "  observe: [{plugin: broken}]\nproviders:", 1)
    assert check(tmp_path, text) == 2
    said = capsys.readouterr().err
    assert "plugin 'broken' of the package acme-broken cannot be imported: No module named" in said
    assert f"pip install {way}" in said
    assert "qlens[" not in said


# --- help --------------------------------------------------------------------------------------


def test_help_of_a_plugins_command_says_where_it_comes_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("QLENS_CONFIG", raising=False)
    monkeypatch.chdir(tmp_path)
    assert main(["keys", "--help"]) == 2
    said = capsys.readouterr().err
    assert "config/qlens.yaml: No such file or directory" in said
    assert "-c CONFIG" in said


@pytest.mark.parametrize(
    "words", [["keys", "create"], ["keys", "list"], ["keys", "revoke"], ["keys"], ["usage"], ["prices"], ["budgets"]]
)
@pytest.mark.parametrize("keys", ["api_keys, file: keys.yaml", "key_store, url: 'sqlite:///k.db'"])
def test_help_of_plugins_commands_has_examples(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], keys: str
) -> None:
    file = tmp_path / "qlens.yaml"
    file.write_text(
        BASE.replace("plugin: anonymous", f"plugin: {keys}").replace(
            "providers:",
            f"  cost: {BUDGETS.replace('HARD', 'true')[:-1]}, {{plugin: ledger, url: 'sqlite:///l.db'}}]\nproviders:",
            1,
        )
    )
    with pytest.raises(SystemExit) as left:
        main([*words, "--help", "-c", str(file)])
    assert left.value.code == 0
    said = capsys.readouterr().out
    assert f"qlens {' '.join(words)}" in said[said.index("example") :]


# --- the echo ----------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", [{}, {"prompt": None}])
async def test_a_completion_may_go_on_from_nothing(prompt: dict[str, None]) -> None:
    async with running(BASE) as gateway:
        answer = await gateway.post("/v1/completions", {"model": "small", "max_tokens": 5, **prompt})
        assert (answer.status, answer.json()["choices"][0]["text"]) == (200, ""), answer.text
