"""Sealed ids: they say where an object is to those they were made for, and nothing to anybody else."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlens.config import Config, parse
from qlens.object_ids import MOST_CHARS, PREFIXES, ObjectIds, Origin
from qlens.registry import drafted, register

KEY = "0123456789abcdef0123456789abcdef"
ORIGIN = Origin("openai", "gpt-4o", "resp_" + "0" * 48)
IDS = ObjectIds(master=b"k" * 32)

kinds = st.sampled_from(sorted(PREFIXES))
names = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=20)


@given(kinds, names, names, names, names, names)
def test_what_is_sealed_opens_for_its_tenant_alone(
    kind: str, tenant: str, other: str, provider: str, model: str, own: str
) -> None:
    origin = Origin(provider, model, own)
    sealed = IDS.seal(kind, tenant, origin)
    assert sealed.startswith(PREFIXES[kind])
    assert len(sealed) <= MOST_CHARS
    assert IDS.open(kind, tenant, sealed) == origin
    if other != tenant:
        assert IDS.open(kind, other, sealed) is None
    for another in PREFIXES.keys() - {kind}:
        assert IDS.open(another, tenant, sealed) is None
        assert IDS.open(another, tenant, PREFIXES[another] + sealed.removeprefix(PREFIXES[kind])) is None


@given(st.data())
def test_no_altered_id_opens(data: st.DataObject) -> None:
    sealed = IDS.seal("response", "acme", ORIGIN)
    place = data.draw(st.integers(0, len(sealed) - 1))
    char = data.draw(st.characters(codec="utf-8").filter(lambda char: char != sealed[place]))
    assert IDS.open("response", "acme", sealed[:place] + char + sealed[place + 1 :]) is None
    cut = data.draw(st.integers(0, len(sealed) - 1))
    assert IDS.open("response", "acme", sealed[:cut]) is None
    assert IDS.open("response", "acme", sealed + data.draw(st.text(min_size=1, max_size=4))) is None


@pytest.mark.parametrize("own", ["resp_1", "resp_12", "resp_123"])
def test_no_other_spelling_of_an_id_opens(own: str) -> None:
    sealed = IDS.seal("response", "acme", Origin("openai", "gpt-4o", own))
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_+/="
    for other in [sealed[:-1] + letter for letter in letters if letter != sealed[-1]]:
        assert IDS.open("response", "acme", other) is None
    for other in (f"{sealed[:9]}!!!!{sealed[9:]}", f"{sealed[:9]}\n\n\n\n{sealed[9:]}", sealed + "=", sealed + "=="):
        assert IDS.open("response", "acme", other) is None


@given(kinds, st.text(max_size=60), st.booleans())
def test_no_invented_id_opens(kind: str, text: str, prefixed: bool) -> None:
    assert IDS.open(kind, "acme", PREFIXES[kind] + text if prefixed else text) is None


def test_replicas_with_the_same_key_agree_and_others_do_not() -> None:
    sealed = IDS.seal("file", "acme", ORIGIN)
    assert ObjectIds(master=b"k" * 32).seal("file", "acme", ORIGIN) == sealed
    assert ObjectIds(master=b"l" * 32).open("file", "acme", sealed) is None


def test_an_id_that_would_be_too_long_is_not_sealed_and_opens_for_nobody() -> None:
    long = Origin("openai", "gpt-4o", "resp_" + "x" * 400)
    assert IDS.seal("response", "acme", long) == long.id
    assert IDS.open("response", "acme", long.id) is None


def test_the_longest_model_name_that_a_client_may_send_still_fits() -> None:
    name = "openai/" + "x" * 249
    origin = Origin("a-provider-with-a-long-name", name, "resp_" + "0" * 48)
    assert IDS.open("response", "acme", IDS.seal("response", "acme", origin)) == origin


# --- keys from the configuration ---------------------------------------------------------------


def text(provider: str, server: str = "{}") -> str:
    return f"""
server: {server}
pipeline: {{auth: [{{plugin: anonymous}}], cost: []}}
providers: {{p: {provider}}}
models: {{m: {{max_output_tokens: 10, targets: [{{provider: p, model: m}}]}}}}
"""


def ids(tmp_path: Path, provider: str, server: str = "{}") -> ObjectIds:
    path = tmp_path / "qlens.yaml"
    path.write_text(text(provider, server))
    registration = register(drafted(path))
    keepers = {each.entry.name: each for each in registration.instances if each.entry.stage == "provider"}
    return ObjectIds.of(registration.config, keepers)


def own(origin: str = "x") -> Origin:
    return Origin("p", "m", f"file-{origin}")


def test_without_a_key_ids_are_sealed_with_the_providers_own_secret(tmp_path: Path) -> None:
    first = ids(tmp_path, "{plugin: openai, api_key: sk-example-0123456789}")
    again = ids(
        tmp_path, "{plugin: openai, api_key: sk-example-0123456789, idle_seconds: 7, headers: {x-team: search}}"
    )
    other = ids(tmp_path, "{plugin: openai, api_key: sk-example-9876543210}")
    sealed = first.seal("file", "acme", own())
    assert again.open("file", "acme", sealed) == own()
    assert other.open("file", "acme", sealed) is None


@pytest.mark.parametrize(
    "provider",
    [
        "{plugin: openai}",
        "{plugin: openai, api_key: short}",
        '{plugin: openai, headers: {x-team: "a long name that everybody knows"}}',
        '{plugin: azure_openai, endpoint: "https://x.openai.azure.com", identity: {kind: managed_identity}}',
    ],
)
def test_without_any_secret_nothing_is_sealed_nor_opened(tmp_path: Path, provider: str) -> None:
    keyless = ids(tmp_path, provider)
    assert not keyless.keeps("p")
    assert keyless.seal("file", "acme", own()) == "file-x"
    assert keyless.open("file", "acme", "file-x") is None
    assert keyless.mark("p", "acme") is None
    assert ids(tmp_path, provider, f"{{id_key: {KEY}}}").keeps("p")


def test_the_key_of_the_configuration_outlasts_a_providers_secret(tmp_path: Path) -> None:
    server = f"{{id_key: {KEY}}}"
    sealed = ids(tmp_path, "{plugin: openai, api_key: sk-example-0123456789}", server).seal("file", "acme", own())
    later = ids(tmp_path, "{plugin: openai, api_key: sk-example-9876543210}", server)
    assert later.open("file", "acme", sealed) == own()


def test_a_key_that_could_be_guessed_is_refused_and_never_shown(tmp_path: Path) -> None:
    path = tmp_path / "qlens.yaml"
    path.write_text(text("{plugin: openai}", "{id_key: tooshort}"))
    (fault,) = drafted(path).faults
    assert "server.id_key" in fault.path
    assert "at least 32 characters" in fault.message
    assert "tooshort" not in str(fault)


def test_the_key_is_not_printed(tmp_path: Path) -> None:
    config: Config = parse(text("{plugin: openai}", f"{{id_key: {KEY}}}"), folder=tmp_path)
    assert KEY not in repr(config)
    assert KEY not in repr(ObjectIds(master=KEY.encode()))
