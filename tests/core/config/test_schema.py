"""The JSON schema of the file: what an editor accepts and what it marks."""

from __future__ import annotations

import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any, Literal

from attrs import frozen

from qlens import Secret
from qlens.config.schema import schema


@frozen
class Memory:
    kind: Literal["memory"] = "memory"


@frozen
class Redis:
    kind: Literal["redis"]
    url: str
    """Where it is."""


@frozen
class Settings:
    """Does things. And more."""

    key: Secret
    """The key."""
    size: int = 3
    """The size."""
    share: float = 0.5
    usd: Decimal = Decimal("1.5")
    on: bool = True
    mode: Literal["a", "b"] = "a"
    names: tuple[str, ...] = ()
    prices: Mapping[str, int | None] | None = None
    store: Memory | Redis = Memory()
    single: Redis | None = None
    anything: Any = None


class Plugin:
    Config = Settings


class Bare: ...


ENV = {"$ref": "#/$defs/env"}
WHOLE = schema({"cache": {"exact": Plugin, "none": Bare}, "provider": {"echo": Bare}})
FIELDS = WHOLE["$defs"]["cache.exact"]["properties"]


def bare(name: str) -> dict[str, Any]:
    return {key: value for key, value in FIELDS[name].items() if key not in {"description", "default"}}


def test_unknown_keys_are_marked_everywhere() -> None:
    assert WHOLE["additionalProperties"] is False
    assert set(WHOLE["properties"]) == {"server", "pipeline", "providers", "models"}
    for section in ("server", "pipeline"):
        assert WHOLE["properties"][section]["additionalProperties"] is False
    assert WHOLE["$defs"]["cache.exact"]["additionalProperties"] is False
    assert WHOLE["properties"]["models"]["additionalProperties"]["additionalProperties"] is False


def test_every_stage_is_a_list_of_its_plugins() -> None:
    stages = WHOLE["properties"]["pipeline"]["properties"]
    assert list(stages) == ["auth", "rate_limit", "guard", "cache", "route", "cost", "observe"]
    entry = stages["cache"]["items"]
    assert entry["properties"]["plugin"]["anyOf"] == [
        {"enum": ["exact", "none"]},
        {"type": "string", "pattern": ":"},
        ENV,
    ]
    assert entry["required"] == ["plugin"]
    assert [rule["if"]["properties"]["plugin"]["const"] for rule in entry["allOf"]] == ["exact", "none"]
    assert [rule["then"]["$ref"] for rule in entry["allOf"]] == ["#/$defs/cache.exact", "#/$defs/cache.none"]
    assert "allOf" not in stages["auth"]["items"]


def test_an_import_path_may_have_any_settings() -> None:
    for entry in (
        WHOLE["properties"]["pipeline"]["properties"]["auth"]["items"],
        WHOLE["properties"]["providers"]["additionalProperties"],
    ):
        assert "additionalProperties" not in entry


def test_an_entry_of_a_stage_may_have_a_name_and_a_provider_has_its_key() -> None:
    assert list(WHOLE["$defs"]["cache.none"]["properties"]) == ["plugin", "name"]
    assert list(WHOLE["$defs"]["provider.echo"]["properties"]) == ["plugin", "on_disconnect"]


def test_settings_carry_their_docstrings_and_defaults() -> None:
    assert WHOLE["$defs"]["cache.exact"]["description"] == "Does things. And more."
    assert FIELDS["key"]["description"] == "The key."
    assert "default" not in FIELDS["key"]
    assert FIELDS["size"]["default"] == 3
    assert FIELDS["usd"]["default"] == 1.5
    assert FIELDS["store"]["default"] == {"kind": "memory"}
    assert WHOLE["$defs"]["cache.exact"]["required"] == ["key"]


def test_each_type_has_its_schema() -> None:
    assert bare("key") == {"type": "string"}
    assert bare("size") == {"anyOf": [{"type": "integer"}, ENV]}
    assert bare("share") == bare("usd") == {"anyOf": [{"type": "number"}, ENV]}
    assert bare("on") == {"anyOf": [{"type": "boolean"}, ENV]}
    assert bare("mode") == {"anyOf": [{"enum": ["a", "b"]}, ENV]}
    assert bare("names") == {"type": "array", "items": {"type": "string"}}
    assert bare("anything") == {}
    number = {"anyOf": [{"anyOf": [{"type": "integer"}, ENV]}, {"type": "null"}]}
    assert bare("prices") == {"anyOf": [{"type": "object", "additionalProperties": number}, {"type": "null"}]}


def test_classes_of_a_union_need_their_kind() -> None:
    assert [member["required"] for member in bare("store")["anyOf"]] == [["kind"], ["kind", "url"]]
    single, nothing = bare("single")["anyOf"]
    assert single["required"] == ["kind", "url"]
    assert nothing == {"type": "null"}


def test_a_text_of_the_environment_is_recognised() -> None:
    pattern = WHOLE["$defs"]["env"]["pattern"]
    for text in ("${PORT}", "a${A_1}b", "${A:-80}", "${A:-}"):
        assert re.search(pattern, text)
    for text in ("8080", "${", "${}", "${1}", "${A-1}"):
        assert not re.search(pattern, text)
