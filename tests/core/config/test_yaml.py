"""The YAML loader: what a text means, what is refused and where."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlens.config.environment import EnvText, MissingText
from qlens.config.tree import YamlFloat
from qlens.config.yaml import load
from qlens.errors import ConfigError


def value(text: str, env: Mapping[str, str] | None = None) -> Any:
    document = load(text, source="qlens.yaml", env=env or {})
    assert not document.faults
    return document.root


def faults(text: str, env: Mapping[str, str] | None = None) -> list[str]:
    try:
        found = load(text, source="qlens.yaml", env=env or {}).faults
    except ConfigError as error:
        found = error.faults
    return [str(fault) for fault in found]


def fault(text: str) -> str:
    (only,) = faults(text)
    return only


# --- the core schema ---


@pytest.mark.parametrize("text", ["null", "Null", "NULL", "~", ""])
def test_null_has_five_spellings(text: str) -> None:
    assert value(f"a: {text}") == {"a": None}


@pytest.mark.parametrize(("text", "meaning"), [("true", True), ("True", True), ("TRUE", True), ("false", False)])
def test_truth_has_three_spellings(text: str, meaning: bool) -> None:
    assert value(f"a: {text}")["a"] is meaning


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("0", 0),
        ("-0", 0),
        ("17", 17),
        ("+17", 17),
        ("-17", -17),
        ("0o17", 15),
        ("0x1F", 31),
        (str(2**63 - 1), 2**63 - 1),
    ],
)
def test_whole_numbers(text: str, number: int) -> None:
    found = value(f"a: {text}")["a"]
    assert (type(found), found) == (int, number)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1.5", 1.5),
        (".5", 0.5),
        ("5.", 5.0),
        ("-1e3", -1000.0),
        ("1E-2", 0.01),
        (".inf", math.inf),
        ("-.INF", -math.inf),
    ],
)
def test_numbers_with_a_point_or_an_exponent(text: str, number: float) -> None:
    found = value(f"a: {text}")["a"]
    assert isinstance(found, float)
    assert found == number


def test_not_a_number_is_one() -> None:
    assert math.isnan(value("a: .nan")["a"])


def test_a_float_keeps_the_text_it_was_written_as() -> None:
    found = value("a: 100.00")["a"]
    assert isinstance(found, YamlFloat)
    assert found.text == "100.00"


@pytest.mark.parametrize(
    "text",
    [
        *("2024-10-21", "2024-10-21 12:00:00", "no", "No", "yes", "on", "off", "y", "012", "-012", "1:30", "190:20:30"),
        *("1_000", "0b11", "0o8", "+0x1", "nan", "inf", "TrUe", "nULL", "1e", "e3", ".", "1.2.3", "=", "<<"),
    ],
)
def test_all_else_is_text(text: str) -> None:
    assert value(f"a: {text}") == {"a": text}


@pytest.mark.parametrize("text", ["60", "true", "null", "1.5", "~"])
def test_quotes_make_text(text: str) -> None:
    assert value(f"a: '{text}'\nb: \"{text}\"\n") == {"a": text, "b": text}


def test_a_block_scalar_is_text() -> None:
    assert value("a: |\n  60\nb: >-\n  true\n") == {"a": "60\n", "b": "true"}


@pytest.mark.parametrize("text", [str(2**63), "-" + "9" * 5000, "0x" + "f" * 5000])
def test_a_whole_number_beyond_64_bits_is_a_fault(text: str) -> None:
    assert fault(f"a: {text}") == (
        "qlens.yaml:1 a: the number does not fit in 64 bits; put it in quotes if it is a text"
    )


def test_a_number_beyond_a_float_is_a_fault() -> None:
    assert "too large" in fault("a: 1e999")


json_scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text().filter(lambda text: "${" not in text)
)
json_values = st.recursive(
    json_scalars,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=40), inner, max_size=5),
    max_leaves=20,
)


@given(json_values)
def test_json_loads_as_itself(document: Any) -> None:
    found = load(json.dumps(document), source="qlens.yaml", env={})
    assert not found.faults
    assert found.root == document


@given(json_values)
def test_indented_json_loads_as_itself(document: Any) -> None:
    assert load(json.dumps(document, indent=2), source="qlens.yaml", env={}).root == document


yaml_like = st.text(
    st.sampled_from(list("ab01 \n\t:-?,[]{}#&*!|>'\"%@`\\$~.\r\ud800\x00\x85\u2028\ufeff")), max_size=60
)


@given(st.text() | yaml_like)
def test_no_text_raises_anything_but_a_config_error(text: str) -> None:
    assert all(line.startswith("qlens.yaml") for line in faults(text))


# --- what is refused ---


def test_a_duplicate_key_is_refused_with_both_lines() -> None:
    text = "models:\n  a: 1\n  b: 2\n  a: 3\n"
    assert fault(text) == "qlens.yaml:4 models.a: duplicate key; it is on line 2 already"


def test_the_first_of_two_equal_keys_is_kept_so_that_other_faults_are_found() -> None:
    document = load("a: 1\na: 2\n", source="qlens.yaml", env={})
    assert document.root == {"a": 1}


@pytest.mark.parametrize("key", ["1", "true", "~", "1.5", ".nan", "9" * 30])
def test_a_key_that_is_no_text_is_refused(key: str) -> None:
    assert fault(f"{key}: x") == f"qlens.yaml:1: the key {key} is not a text; put it in quotes"


@pytest.mark.parametrize("key", ["? [a, b]\n", "? {a: b}\n", "? !x a\n"])
def test_a_key_that_is_a_structure_or_tagged_is_refused(key: str) -> None:
    assert "qlens.yaml:1: a key must be a plain text" in faults(f"{key}: x")


def test_a_key_is_not_expanded() -> None:
    assert value("'${A}': x", {"A": "b"}) == {"${A}": "x"}


@pytest.mark.parametrize("tagged", ["!!python/object/apply:os.system [x]", "!!str 1", "!x y", "! 1", "!!map {}"])
def test_tags_are_refused(tagged: str) -> None:
    assert "is not allowed; remove it" in fault(f"a: {tagged}")


def test_a_file_holds_one_document() -> None:
    assert value("---\na: 1\n...\n") == {"a": 1}
    assert fault("a: 1\n---\nb: 2\n") == "qlens.yaml:2: a second document starts here; a file holds one"


@pytest.mark.parametrize("text", ["", "\n\n", "# nothing\n", "\ufeff"])
def test_an_empty_file_is_refused(text: str) -> None:
    assert fault(text) == "qlens.yaml: the file is empty"


def test_a_file_of_more_than_a_mebibyte_is_refused() -> None:
    assert value(f"a: {'x' * 1_000_000}")
    assert "too large" in fault(f"a: {'x' * 1024 * 1024}")


def test_the_size_is_counted_in_bytes() -> None:
    assert "too large" in fault(f"a: {'ä' * 600_000}")


def test_depth_is_bounded() -> None:
    assert value("[" * 40 + "]" * 40)
    assert "nested too deep" in fault("[" * 5000 + "]" * 5000)


def test_an_alias_repeats_its_anchor() -> None:
    assert value("a: &x {b: [1, 2]}\nc: *x\n") == {"a": {"b": [1, 2]}, "c": {"b": [1, 2]}}


def test_aliases_are_bounded() -> None:
    assert len(value("a: &x 1\nb: [" + "*x, " * 100 + "]\n")["b"]) == 100
    assert "too many aliases" in fault("a: &x 1\nb: [" + "*x, " * 101 + "]\n")


def test_a_billion_laughs_are_refused() -> None:
    lines = ["a0: &a0 [ha, ha, ha, ha, ha, ha, ha, ha, ha]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 10)]
    assert "too many values" in fault("\n".join(lines))


@pytest.mark.parametrize("text", ["a: *b", "a: &b [*b]", "a: [*b]\nc: &b 1"])
def test_an_alias_needs_a_complete_anchor_before_it(text: str) -> None:
    assert "the alias *b has no complete value" in fault(text)


@pytest.mark.parametrize(
    ("text", "place"),
    [("a: [1, 2\n", "qlens.yaml:2:1"), ("a: b: c", "qlens.yaml:1:5"), ("a: 1\n\tb: 2", "qlens.yaml:2:1")],
)
def test_a_syntax_error_names_line_and_column(text: str, place: str) -> None:
    message = fault(text)
    assert message.startswith(f"{place}: not valid YAML: ")
    assert "\n" not in message


def test_an_unquoted_variable_inside_braces_gets_a_hint() -> None:
    assert 'quote the environment: "${NAME}"' in fault("a: {b: ${C}}")


@pytest.mark.parametrize(("text", "place"), [("a: \x07", "1:4"), ("a: 1\nb: x\u2028y", "2:5"), ("a: \x85", "1:4")])
def test_a_control_character_or_odd_line_end_is_refused_with_its_place(text: str, place: str) -> None:
    message = fault(text)
    assert message.startswith(f"qlens.yaml:{place}: not valid YAML: the character U+")


def test_an_escape_beyond_unicode_is_refused() -> None:
    assert fault('a: "\\UFFFFFFFF"').startswith("qlens.yaml:1: not valid YAML")


def test_half_a_character_is_refused() -> None:
    assert "half of an escaped character" in fault(r'a: "\ud83d"')


def test_faults_do_not_hide_each_other() -> None:
    found = faults("a: !x 1\nb: ${NOPE}\nb: 2\n3: 4\n")
    assert [line.partition(" ")[0].rstrip(":") for line in found] == [f"qlens.yaml:{n}" for n in (1, 2, 3, 4)]


# --- the environment ---


def test_a_variable_is_filled_in_and_marked() -> None:
    found = value("a: ${PORT}", {"PORT": "8080"})["a"]
    assert isinstance(found, EnvText)
    assert (found, found.names) == ("8080", ("PORT",))


def test_several_variables_and_defaults_make_one_text() -> None:
    env = {"HOST": "db", "EMPTY": ""}
    found = value("a: redis://${HOST}:${PORT:-6379}/${EMPTY:-0}${EMPTY}", env)["a"]
    assert found == "redis://db:6379/0"
    assert found.names == ("HOST", "PORT", "EMPTY")


def test_variables_work_in_every_style_of_scalar() -> None:
    text = "a: ${X}\nb: '${X}'\nc: \"${X}\"\nd: |-\n  ${X}\ne: ['${X}']\n"
    assert value(text, {"X": "1"}) == {"a": "1", "b": "1", "c": "1", "d": "1", "e": ["1"]}


def test_what_a_variable_holds_is_no_yaml_and_not_expanded_again() -> None:
    env = {"X": "[1, {a: ${Y}}] # $${Z}\n- b", "Y": "no"}
    assert value("a: ${X}", env) == {"a": env["X"]}


def test_a_doubled_dollar_is_a_plain_one() -> None:
    found = value("a: $${X} costs $5 and $$ and }", {})["a"]
    assert found == "${X} costs $5 and $$ and }"
    assert not isinstance(found, EnvText)


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_value_of_a_variable_comes_through_unchanged(text: str) -> None:
    assert value("a: <${X}>", {"X": text}) == {"a": f"<{text}>"}


def test_a_missing_variable_is_a_fault_with_its_name_and_place() -> None:
    text = "a:\n  b: [1, '${NOPE}']\n"
    assert fault(text) == "qlens.yaml:2 a.b[1]: the environment variable NOPE is not set"


def test_every_missing_variable_is_named_once() -> None:
    assert len(faults("a: ${A}${B}${A}${C:-}")) == 2


def test_without_the_environment_a_missing_variable_leaves_the_text_as_written() -> None:
    document = load("a: x${NOPE}\nb: ${YES}", source="qlens.yaml", env={"YES": "1"}, check_env=False)
    assert not document.faults
    assert document.root == {"a": "x${NOPE}", "b": "1"}
    assert isinstance(document.root["a"], MissingText)
    assert not isinstance(document.root["b"], MissingText)


@pytest.mark.parametrize("text", ["${", "${}", "${1A}", "${A", "${A-b}", "${A:b}", "${A:-${B}}", "${ A }"])
@pytest.mark.parametrize("check_env", [True, False])
def test_a_malformed_reference_is_a_fault_with_or_without_the_environment(text: str, check_env: bool) -> None:
    document = load(f"a: '{text}'", source="qlens.yaml", env={"A": "1"}, check_env=check_env)
    (only,) = document.faults
    assert "expected ${NAME} or ${NAME:-default}" in only.message


def test_a_variable_that_is_not_utf8_is_a_fault() -> None:
    assert faults("a: ${X}", {"X": "\udcff"}) == ["qlens.yaml:1 a: the environment variable X is not valid UTF-8"]


def test_the_repr_of_an_environment_text_tells_its_names_only() -> None:
    found = value("a: ${USER_NAME}:${PASSWORD}", {"USER_NAME": "joe", "PASSWORD": "hunter2"})
    assert repr(found) == "{'a': a value from ${USER_NAME} and ${PASSWORD}}"
