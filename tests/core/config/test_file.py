"""The configuration file as a whole: sections, plugin entries, models, and every fault at once."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson
import pytest
from attrs import frozen
from hypothesis import given
from hypothesis import strategies as st

from qlens import Secret, read_yaml
from qlens.config import (
    STAGES,
    Admin,
    Config,
    ModelEntry,
    PluginEntry,
    Server,
    TargetEntry,
    convert,
    draft,
    parse,
    read,
)
from qlens.errors import ConfigError

FOLDER = Path("/etc/qlens")

WHOLE = """\
server:
  host: 0.0.0.0
  port: "${PORT}"
  admin: {port: 0, metrics: open}
  call_seconds: 90
pipeline:
  auth:
    - {plugin: api_keys, file: keys.yaml}
    - plugin: acme.gateway:Outer.Quota
      limits: [{per: tenant}]
  cost: []
  observe:
    - {plugin: tracing, name: first}
    - {plugin: tracing, name: second}
providers:
  azure-eu: {plugin: azure_openai, api_key: "${AZURE_KEY}", name: kept}
models:
  gpt-4o:
    max_output_tokens: 16384
    max_n: 4
    targets:
      - {provider: azure-eu, model: gpt, base_model: gpt-4o, region: eu, weight: 3, params: {temperature: 0.5}}
      - {provider: azure-eu, model: spare, weight: 0}
    fallbacks: [small, vendor/tiny]
  small:
    targets: [{provider: azure-eu, model: small}]
    fallbacks: {context_length: [gpt-4o]}
  vendor/*: {targets: [{provider: azure-eu, model: "v-*"}]}
"""
ENV = {"PORT": "8081", "AZURE_KEY": "sk-example-azure"}


def config(text: str = WHOLE, env: Mapping[str, str] = ENV, *, check_env: bool = True) -> Config:
    return parse(text, folder=FOLDER, env=env, check_env=check_env)


def faults(text: str, env: Mapping[str, str] = ENV) -> list[str]:
    with pytest.raises(ConfigError) as raised:
        config(text, env)
    return [str(fault) for fault in raised.value.faults]


def fault(text: str) -> str:
    (only,) = faults(text)
    return only


def model(targets: str = "[{provider: p, model: m}]", more: str = "", name: str = "a") -> str:
    return f"providers: {{p: {{plugin: echo}}}}\nmodels:\n  {name}:\n    targets: {targets}\n    {more}\n"


# --- the whole ---


def test_a_whole_file_is_read() -> None:
    found = config()
    assert found.server == Server("0.0.0.0", 8081, Admin(port=0, metrics="open"), call_seconds=90.0)
    assert found.folder == FOLDER
    assert tuple(found.pipeline) == STAGES
    assert found.models == {
        "gpt-4o": ModelEntry(
            "gpt-4o",
            (
                TargetEntry("azure-eu", "gpt", 3, "gpt-4o", "eu", {"temperature": 0.5}),
                TargetEntry("azure-eu", "spare", 0),
            ),
            {"any": ("small", "vendor/tiny")},
            16384,
            4,
        ),
        "small": ModelEntry("small", (TargetEntry("azure-eu", "small"),), {"context_length": ("gpt-4o",)}),
        "vendor/*": ModelEntry("vendor/*", (TargetEntry("azure-eu", "v-*"),)),
    }


def test_every_section_may_be_left_out() -> None:
    found = config("models: {}")
    assert found.server == Server()
    assert set(found.pipeline.values()) == {()}
    assert (found.providers, found.models) == ({}, {})


def test_a_file_is_read_with_its_own_folder(tmp_path: Path) -> None:
    file = tmp_path / "conf" / "qlens.yaml"
    file.parent.mkdir()
    file.write_text(WHOLE)
    assert read(file, ENV) == parse(WHOLE, folder=tmp_path / "conf", env=ENV, source=str(file))


def test_a_link_keeps_the_folder_it_stands_in(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "qlens.yaml").write_text("models: {}")
    (tmp_path / "qlens.yaml").symlink_to(tmp_path / "data" / "qlens.yaml")
    (tmp_path / "current").symlink_to(tmp_path / "data")
    assert read(tmp_path / "qlens.yaml").folder == tmp_path
    assert read(tmp_path / "current" / "qlens.yaml").folder == tmp_path / "current"


def test_a_relative_file_has_an_absolute_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "qlens.yaml").write_text("models: {}")
    monkeypatch.chdir(tmp_path)
    assert read(Path("qlens.yaml")).folder == tmp_path


def test_the_environment_is_the_process_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLENS_TEST_PORT", "4242")
    (tmp_path / "qlens.yaml").write_text("server: {port: '${QLENS_TEST_PORT}'}")
    assert read(tmp_path / "qlens.yaml").server.port == 4242


@pytest.mark.parametrize("make", [Path.mkdir, lambda path: None])
def test_a_file_that_cannot_be_read_is_one_fault(tmp_path: Path, make: Any) -> None:
    path = tmp_path / "qlens.yaml"
    make(path)
    with pytest.raises(ConfigError, match="cannot be read: ") as raised:
        read(path)
    assert [fault.path for fault in raised.value.faults] == [str(path)]


def test_a_file_that_is_not_utf8_is_a_fault_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "qlens.yaml"
    path.write_bytes(b"server:\n  host: \xff\n")
    with pytest.raises(ConfigError, match=rf"{path}:2: not valid UTF-8"):
        read(path)


def test_a_file_of_endless_size_is_not_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "qlens.yaml"
    with path.open("wb") as file:
        os.truncate(file.fileno(), 10 * 2**40)
    with pytest.raises(ConfigError, match="too large"):
        read(path)


@pytest.mark.parametrize("text", ["", "null", "[]", "x", "3"])
def test_a_file_must_be_a_mapping(text: str) -> None:
    assert fault(text).startswith("qlens.yaml: ")


def test_an_unknown_section_is_refused() -> None:
    assert fault("model: {}") == (
        'qlens.yaml:1 model: unknown key; did you mean "models"? known keys: server, pipeline, providers, models'
    )


@pytest.mark.parametrize("section", ["server", "pipeline", "providers", "models"])
def test_a_section_must_be_a_mapping(section: str) -> None:
    assert fault(f"{section}: []") == f"qlens.yaml:1 {section}: found a list, expected a mapping"
    assert fault(f"{section}:") == f"qlens.yaml:1 {section}: found nothing, expected a mapping"


def test_faults_of_all_sections_come_at_once() -> None:
    text = """\
server: {port: x}
pipeline:
  atuh: []
  cost: [{plug: x}]
providers: {p: {}}
models:
  a: {targets: [{provider: q, model: "${NOPE}"}], max_n: 0, fallbacks: [b]}
a: 1
a: 2
"""
    found = faults(text)
    assert {line.partition(": ")[0] for line in found} == {
        "qlens.yaml:1 server.port",
        "qlens.yaml:3 pipeline.atuh",
        "qlens.yaml:4 pipeline.cost[0]",
        "qlens.yaml:5 providers.p",
        "qlens.yaml:7 models.a.targets[0].provider",
        "qlens.yaml:7 models.a.targets[0].model",
        "qlens.yaml:7 models.a.max_n",
        "qlens.yaml:7 models.a.fallbacks[0]",
        "qlens.yaml:8 a",
        "qlens.yaml:9 a",
    }


# --- server ---


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("port: 65536", "must be <= 65535, found 65536"),
        ("port: -1", "must be >= 0, found -1"),
        ("host: ''", "must not be empty"),
        ("max_body_bytes: 0", "must be >= 1, found 0"),
        ("drain_seconds: -1", "must be >= 0, found -1"),
        ("call_seconds: 0", "must be > 0, found 0"),
        ("workers: 0", "must be >= 1, found 0"),
    ],
)
def test_a_number_out_of_range_is_refused(setting: str, message: str) -> None:
    assert fault(f"server: {{{setting}}}") == f"qlens.yaml:1 server.{setting.partition(':')[0]}: {message}"


def test_clients_and_operators_cannot_share_a_port() -> None:
    assert "server: clients and operators cannot share one port" in fault("server: {port: 1, admin: {port: 1}}")
    assert config("server: {port: 0, admin: {port: 0}}").server.admin.port == 0
    assert config("server: {port: 1, host: '::1', admin: {port: 1}}").server.port == 1


# --- plugins ---


def test_an_entry_is_named_by_its_plugin() -> None:
    api_keys, quota = config().pipeline["auth"]
    assert api_keys == PluginEntry("auth", "api_keys", "api_keys", {"file": "keys.yaml"}, "")
    assert (quota.name, quota.plugin) == ("Outer.Quota", "acme.gateway:Outer.Quota")
    assert quota.settings == {"limits": [{"per": "tenant"}]}


def test_entries_may_have_names_of_their_own() -> None:
    assert [(entry.name, entry.plugin) for entry in config().pipeline["observe"]] == [
        ("first", "tracing"),
        ("second", "tracing"),
    ]


def test_a_provider_is_named_by_its_key() -> None:
    provider = config().providers["azure-eu"]
    assert (provider.stage, provider.name, provider.plugin) == ("provider", "azure-eu", "azure_openai")
    assert provider.settings == {"api_key": "sk-example-azure", "name": "kept"}


def test_an_entry_knows_its_place() -> None:
    found = config()
    assert found.pipeline["auth"][1].path == "qlens.yaml:9 pipeline.auth[1]"
    assert found.providers["azure-eu"].path == "qlens.yaml:16 providers.azure-eu"


def test_an_entry_that_moves_is_the_same() -> None:
    moved = config("# a line more\n" + WHOLE)
    assert moved.pipeline == config().pipeline


def test_an_entry_never_shows_its_settings() -> None:
    assert "sk-example-azure" not in repr(config())
    assert "sk-example-azure" not in repr(config().providers["azure-eu"].settings)
    assert "sk-example-literal" not in repr(config("providers: {p: {plugin: x, api_key: sk-example-literal}}"))


@frozen
class Keyed:
    limit: int
    key: Secret


def test_settings_keep_their_places_for_the_plugins_own_class() -> None:
    text = "providers:\n  p:\n    plugin: x\n    key: ${KEY}\n    limit: none\n"
    entry = config(text, {"KEY": "sk-example-9"}).providers["p"]
    with pytest.raises(ConfigError) as raised:
        convert(entry.settings, Keyed, entry.path, folder=FOLDER)
    assert str(raised.value) == 'qlens.yaml:5 providers.p.limit: found the text "none", expected a whole number'


@pytest.mark.parametrize("stage", ["ratelimit", "providers", "provider", "x"])
def test_an_unknown_stage_lists_the_stages(stage: str) -> None:
    found = fault(f"pipeline: {{{stage}: []}}")
    assert found.startswith(f"qlens.yaml:1 pipeline.{stage}: unknown stage; ")
    assert "stages: auth, rate_limit, guard, cache, route, cost, observe" in found
    assert ("providers stand under `providers`" in found) == stage.startswith("provider")
    assert ('did you mean "rate_limit"?' in found) == (stage == "ratelimit")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("weighted", 'found the text "weighted", expected a mapping with the key "plugin"'),
        ("{name: x}", 'the key "plugin" is missing'),
        ("{plugin: 3}", "found 3, expected a plugin's name or import path"),
        ("{plugin: ''}", 'found the text "", expected a plugin\'s name or import path'),
        ("{plugin: x, name: ''}", 'found the text "" as a name, expected a text without spaces'),
        ("{plugin: x, name: a b}", 'found the text "a b" as a name, expected a text without spaces'),
        ("{plugin: x, name: 5}", "found 5 as a name, expected a text without spaces"),
    ],
)
def test_an_entry_that_is_none_is_refused(entry: str, message: str) -> None:
    found = fault(f"pipeline: {{route: [{entry}]}}")
    assert found.startswith("qlens.yaml:1 pipeline.route[0]")
    assert message in found


def test_a_stage_must_be_a_list() -> None:
    assert fault("pipeline: {auth: {}}") == "qlens.yaml:1 pipeline.auth: found a mapping, expected a list of plugins"


def test_two_instances_of_one_name_in_a_stage_are_refused_with_both_places() -> None:
    text = "pipeline:\n  cost:\n    - {plugin: a}\n    - {plugin: b, name: a}\n  route: [{plugin: a}]\n"
    assert fault(text) == (
        'qlens.yaml:4 pipeline.cost[1]: "a" is the name of qlens.yaml:3 pipeline.cost[0] already; '
        "give one of them another `name`"
    )


# --- models ---


@pytest.mark.parametrize(
    ("targets", "place", "message"),
    [
        ("[]", "", "must not be empty"),
        ("{}", "", "found a mapping, expected a list"),
        ("[{provider: q, model: m}]", "[0].provider", 'no provider called "q"; providers: p'),
        ("[{provider: p}]", "[0]", 'the key "model" is missing'),
        ("[{provider: p, model: ''}]", "[0].model", "must not be empty"),
        ("[{provider: p, model: m, weight: -1}]", "[0].weight", "must be >= 0, found -1"),
        ("[{provider: p, model: m, weight: 1.5}]", "[0].weight", "found 1.5, expected a whole number"),
        ("[{provider: p, model: m, params: []}]", "[0].params", "found a list, expected a mapping"),
        ("[{provider: p, model: 'a*b'}]", "[0].model", "`*` may only stand at the end of a target's model"),
        ("[{provider: p, model: 'm*'}]", "[0].model", '`*` stands for what a wildcard matched, but "a" is no wildcard'),
    ],
)
def test_a_wrong_target_is_refused(targets: str, place: str, message: str) -> None:
    assert fault(model(targets)) == f"qlens.yaml:4 models.a.targets{place}: {message}"


def test_a_wrong_provider_gets_a_suggestion() -> None:
    text = "providers: {openai: {plugin: x}}\nmodels: {a: {targets: [{provider: openia, model: m}]}}"
    assert 'did you mean "openai"? providers: openai' in fault(text)


def test_a_provider_with_a_fault_is_no_unknown_one() -> None:
    (only,) = faults("providers: {p: {}}\nmodels: {a: {targets: [{provider: p, model: m}]}}")
    assert "providers.p" in only


def test_a_model_without_targets_is_refused() -> None:
    assert fault("models: {a: {}}") == 'qlens.yaml:1 models.a: the key "targets" is missing'


@pytest.mark.parametrize("name", ["a*b", "*a", "a**"])
def test_a_star_stands_only_at_the_end_of_a_model_name(name: str) -> None:
    assert "`*` may only stand at the end of a model's name" in fault(model(name=f"'{name}'"))


@pytest.mark.parametrize("name", ["", "a b", "a\\n"])
def test_a_model_needs_a_name(name: str) -> None:
    assert "as a model's name, expected a text without spaces" in fault(model(name=f'"{name}"'))


@pytest.mark.parametrize(
    ("fallbacks", "place", "message"),
    [
        ("[b]", "[0]", 'no model called "b"; models: a'),
        ("{any: [b]}", ".any[0]", 'no model called "b"; models: a'),
        ("[a]", "[0]", "a model cannot fall back to itself"),
        ("{rate_limit: [a]}", ".rate_limit[0]", "a model cannot fall back to itself"),
        ("['x*']", "[0]", "a fallback is one model, not a wildcard"),
        ("{timeout: [a]}", ".timeout", "unknown key; known keys: any, context_length, content_filter, rate_limit"),
        ("{any: a}", ".any", 'found the text "a", expected a list'),
        ("a", "", 'found the text "a", expected list of text or mapping'),
        ("[1]", "[0]", "found 1, expected a text (put it in quotes)"),
    ],
)
def test_a_wrong_fallback_is_refused(fallbacks: str, place: str, message: str) -> None:
    assert fault(model(more=f"fallbacks: {fallbacks}")) == f"qlens.yaml:5 models.a.fallbacks{place}: {message}"


def test_a_fallback_may_be_what_a_wildcard_covers() -> None:
    text = model(more="fallbacks: [v/x]") + "  v/*: {targets: [{provider: p, model: '*'}]}\n"
    assert config(text).models["a"].fallbacks == {"any": ("v/x",)}
    assert 'no model called "v/"' in fault(text.replace("v/x", "v/"))


@pytest.mark.parametrize("setting", ["max_output_tokens: 0", "max_n: 0"])
def test_a_bound_of_nothing_is_refused(setting: str) -> None:
    assert "must be >= 1, found 0" in fault(model(more=setting))


# --- the environment ---


def test_a_missing_variable_is_a_fault() -> None:
    assert fault("server: {host: '${HOST}'}") == "qlens.yaml:1 server.host: the environment variable HOST is not set"


def test_without_the_environment_only_what_depends_on_it_goes_unchecked() -> None:
    found = config(env={}, check_env=False)
    assert found.server.port == Server().port
    assert found.providers["azure-eu"].missing_env
    assert not found.pipeline["auth"][0].missing_env
    with pytest.raises(ConfigError, match=r"max_n: must be >= 1"):
        config(WHOLE.replace("max_n: 4", "max_n: 0"), {}, check_env=False)


def test_names_may_come_from_the_environment() -> None:
    text = "providers: {p: {plugin: '${P}'}}\nmodels: {a: {targets: [{provider: '${Q}', model: '${M}'}]}}"
    found = config(text, {"P": "echo", "Q": "p", "M": "m"})
    assert (found.providers["p"].plugin, found.models["a"].targets[0].model) == ("echo", "m")
    assert config(text, {}, check_env=False).providers["p"].missing_env


def test_no_fault_shows_a_value_of_the_environment() -> None:
    secret = "hunter2-hunter2"
    text = """\
server: {port: "${S}", host: "${S}", workers: "${S}"}
pipeline: {auth: ["${S}", {plugin: a, name: "${S} x"}]}
models: {a: {targets: [{provider: p, model: m, weight: "${S}"}], fallbacks: "${S}"}}
"""
    found = "\n".join(faults(text, {"S": secret}))
    assert secret not in found
    assert found.count("a value from ${S}") == 6


# --- the version ---


def test_the_version_changes_with_the_content_and_the_environment() -> None:
    versions = {
        config().version,
        config(WHOLE.replace("max_n: 4", "max_n: 5")).version,
        config(env={**ENV, "PORT": "8082"}).version,
    }
    assert len(versions) == 3
    assert all(len(version) == 12 for version in versions)


def test_the_version_stays_when_only_the_writing_changes() -> None:
    assert config("models: {}  # none\n").version == config("'models':\n  {}\n").version
    assert config("models: {}\nserver: {port: 1}").version == config("server: {port: 1}\nmodels: {}").version


# --- drafts ---


def test_a_draft_gives_what_is_sound_beside_the_faults() -> None:
    text = "pipeline: {cost: [{plugin: a}, {}]}\nproviders: {p: {plugin: echo}}\n" + "models: {a: {}}\nzzz: 1\n"
    found = draft(text, folder=FOLDER, env={})
    assert len(found.faults) == 3
    assert [entry.name for entry in found.config.pipeline["cost"]] == ["a"]
    assert list(found.config.providers) == ["p"]
    assert found.config.models == {}


# --- a plugin's own file ---


def test_a_plugin_reads_its_own_file_as_strictly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLENS_TEST_KEY", "sk-example-7")
    file = tmp_path / "own.yaml"
    file.write_text("key: ${QLENS_TEST_KEY}\nlimit: 3\n")
    assert read_yaml(file, Keyed) == Keyed(3, Secret("sk-example-7"))
    file.write_text("key: ${QLENS_TEST_NOPE}\nlimt: 3\nkey: x\n")
    with pytest.raises(ConfigError) as raised:
        read_yaml(file, Keyed)
    assert [str(fault).removeprefix(f"{file}:").partition(":")[0] for fault in raised.value.faults] == [
        "1 key",
        "3 key",
        "1",
        "2 limt",
    ]
    file.write_text("[]")
    with pytest.raises(ConfigError, match="found a list, expected a mapping"):
        read_yaml(file, Keyed)


# --- whatever comes ---

words = st.sampled_from(
    ["server", "pipeline", "providers", "models", "auth", "plugin", "name", "targets", "provider", "model", "fallbacks"]
)
documents = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats() | words | st.sampled_from(["a*", "${A}", "${B}", "*"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words | st.text(max_size=3), inner, max_size=4),
    max_leaves=25,
)


@given(st.dictionaries(words, documents, max_size=4))
def test_no_document_raises_anything_but_a_config_error(document: Any) -> None:
    try:
        found = draft(orjson.dumps(document).decode(), folder=FOLDER, env={"A": "1"})
    except ConfigError as error:
        faults = error.faults
    else:
        faults = found.faults
    assert all(fault.path.startswith("qlens.yaml") and fault.message for fault in faults)
