"""What is generated from the code: tables, hooks, blocks in files."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from decimal import Decimal
from enum import Enum
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, Literal

import pytest
from attrs import field, frozen

from qlens import Secret, Url, hookspecs, reference
from qlens.reference import Row, fields, generate, hooks, main, rewrite, table


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


@frozen
class Memory:
    kind: Literal["memory"] = "memory"
    max_bytes: int = 1000
    """How much it may hold."""


@frozen
class Redis:
    kind: Literal["redis"]
    url: Url
    """Where it is."""


@frozen
class Rule:
    per: Literal["tenant", "key"]
    """Whose calls: one | the other."""
    usd: Decimal | None = None
    """How much."""


@frozen
class Inherited:
    first: bool = True
    """From above."""


@frozen
class Settings(Inherited):
    """Does things."""

    file: Path = field(kw_only=True)
    """A file,
    on two lines."""
    key: Secret | None = None
    """The key."""
    rules: tuple[Rule, ...] = ()
    """All must fit."""
    store: Memory | Redis = field(factory=Memory)
    """Where things are kept."""
    prices: Mapping[str, Rule] = field(factory=dict)
    """By name."""
    colour: Colour = Colour.RED
    """The colour."""
    audience: str | tuple[str, ...] = ""
    """Who is meant."""
    ratio: float = 60.0
    """A share."""
    extra: Mapping[str, Any] = field(factory=lambda: {"a": [1, None]})
    """What is given on."""
    spare_: int = field(default=3, alias="spare")
    """Has another name."""
    undocumented: int = 1
    _inner: int = field(default=0, init=False)


@frozen
class Tree:
    """Holds itself."""

    name: str = "x"
    """A name."""
    children: tuple[Tree, ...] = ()
    """The same again."""


@frozen
class Empty:
    """Has nothing to set."""


class Plugin:
    """A plugin with settings."""

    Config = Settings


class Bare:
    """A plugin without."""


# --- tables ---


def test_every_setting_is_a_row_with_its_type_default_and_docstring() -> None:
    assert fields(Settings) == (
        Row("first", "true or false", "`true`", "From above."),
        Row("file", "path", "required", "A file, on two lines."),
        Row("key", "secret text", "none", "The key."),
        Row("rules", "list of mapping", "`[]`", "All must fit."),
        Row("rules[].per", "`tenant` or `key`", "required", "Whose calls: one | the other."),
        Row("rules[].usd", "decimal number", "none", "How much."),
        Row("store", "mapping with kind `memory` or `redis`", "`{kind: memory}`", "Where things are kept."),
        Row("store.max_bytes", "whole number", "`1000`", "(kind `memory`) How much it may hold."),
        Row("store.url", "URL", "required", "(kind `redis`) Where it is."),
        Row("prices", "mapping of mapping", "`{}`", "By name."),
        Row("prices.*.per", "`tenant` or `key`", "required", "Whose calls: one | the other."),
        Row("prices.*.usd", "decimal number", "none", "How much."),
        Row("colour", "`red` or `blue`", "`red`", "The colour."),
        Row("audience", "text or list of text", '`""`', "Who is meant."),
        Row("ratio", "number", "`60`", "A share."),
        Row("extra", "mapping of anything", "`{a: [1, null]}`", "What is given on."),
        Row("spare", "whole number", "`3`", "Has another name."),
        Row("undocumented", "whole number", "`1`", ""),
    )


def test_a_class_within_itself_is_shown_once() -> None:
    assert [row.name for row in fields(Tree)] == ["name", "children"]


def test_a_table_is_markdown() -> None:
    assert table(Rule) == (
        "| Setting | Type | Default | Meaning |\n"
        "| --- | --- | --- | --- |\n"
        "| `per` | `tenant` or `key` | required | Whose calls: one \\| the other. |\n"
        "| `usd` | decimal number | none | How much. |"
    )


def test_a_class_without_fields_has_no_table() -> None:
    assert table(Empty) == "No settings."


# --- hooks ---


def test_every_hook_stands_there_with_signature_and_docstring() -> None:
    text = hooks()
    assert [
        line.partition("def ")[2].partition("(")[0] for line in text.splitlines() if line.startswith("### ")
    ] == sorted(hookspecs.__all__, key=lambda name: getattr(hookspecs, name).__code__.co_firstlineno)
    assert "### `async def admit(call: Call) -> object | None`\n\nDecide whether the call may run" in text
    assert "type: ignore" not in text


# --- blocks ---


def test_a_block_is_replaced_between_its_markers() -> None:
    text = "a\n<!-- generated: x -->\nold\n<!-- end -->\nb\n<!-- generated: y -->\n<!-- end -->\n"
    once = rewrite(text, "x", "new")
    assert once == "a\n<!-- generated: x -->\nnew\n<!-- end -->\nb\n<!-- generated: y -->\n<!-- end -->\n"
    assert rewrite(once, "x", "new") == once


@pytest.mark.parametrize(
    "text",
    [
        "",
        "<!-- generated: x -->",
        "<!-- end -->\n<!-- generated: x -->",
        "<!-- generated: xy -->\n<!-- end -->",
        "<!-- generated: x -->\n<!-- end -->\n" * 2,
    ],
)
def test_markers_that_are_not_there_once_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected one <!-- generated: x --> with <!-- end --> below it"):
        rewrite(text, "x", "new")


# --- files ---


def _block(name: str) -> str:
    return f"## {name}\n\n<!-- generated: {name} -->\n<!-- end -->\n"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    stage = tmp_path / "plugins" / "qlens_plugins" / "cache"
    stage.mkdir(parents=True)
    (tmp_path / "config").mkdir()
    (tmp_path / "README.md").write_text(_block("fields server"))
    (tmp_path / "plugins" / "README.md").write_text(_block("hooks"))
    (stage / "README.md").write_text(_block("fields one") + _block("fields two"))
    return tmp_path


def test_all_files_are_generated(root: Path) -> None:
    files = generate(root, {"cache": {"one": Plugin, "two": Bare}})
    texts = {str(path.relative_to(root)): text for path, text in files.items()}
    assert set(texts) == {
        "README.md",
        "config/schema.json",
        "plugins/README.md",
        "plugins/qlens_plugins/cache/README.md",
    }
    assert table(Settings) in texts["plugins/qlens_plugins/cache/README.md"]
    assert "<!-- generated: fields two -->\nNo settings.\n" in texts["plugins/qlens_plugins/cache/README.md"]
    assert "| `max_body_bytes` | whole number | `33554432` |" in texts["README.md"]
    assert hooks() in texts["plugins/README.md"]
    assert "cache.one" in json.loads(texts["config/schema.json"])["$defs"]


def test_every_missing_block_is_named(root: Path) -> None:
    with pytest.raises(ValueError, match="expected one") as raised:
        generate(root, {"cache": {"three": Plugin}, "auth": {"four": Plugin}})
    assert str(raised.value).splitlines() == [
        "plugins/qlens_plugins/cache/README.md: "
        "expected one <!-- generated: fields three --> with <!-- end --> below it",
        "plugins/qlens_plugins/auth/README.md: expected one <!-- generated: fields four --> with <!-- end --> below it",
    ]


@pytest.fixture
def own_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [
        EntryPoint("one", f"{__name__}:Plugin", "qlens.cache"),
        EntryPoint("two", f"{__name__}:Bare", "qlens.cache"),
        EntryPoint("qlens", "nowhere:main", "console_scripts"),
    ]
    distribution = type("Distribution", (), {"entry_points": points})
    monkeypatch.setattr(reference, "distribution", lambda name: distribution if name == "qlens" else None)


@pytest.mark.usefixtures("own_plugins")
def test_the_command_writes_what_is_stale_and_then_finds_nothing(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--check"], root) == 1
    assert "config/schema.json: stale; run `make docs`" in capsys.readouterr().out
    assert not (root / "config" / "schema.json").exists()
    assert main([], root) == 0
    assert "config/schema.json: written" in capsys.readouterr().out
    assert main(["--check"], root) == 0
    assert capsys.readouterr().out == ""
    readme = root / "plugins" / "README.md"
    readme.write_text(readme.read_text().replace("Decide", "Decided"))
    assert main(["--check"], root) == 1
    assert capsys.readouterr().out == "plugins/README.md: stale; run `make docs`\n"


@pytest.mark.usefixtures("own_plugins")
def test_the_command_says_which_block_is_missing(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "plugins" / "README.md").unlink()
    assert main([], root) == 1
    assert capsys.readouterr().err.startswith("plugins/README.md: expected one <!-- generated: hooks -->")


def test_the_built_in_plugins_are_those_of_the_distribution() -> None:
    found = reference.built_in()
    assert found["auth"]["anonymous"].__module__.startswith("qlens_plugins.")
    assert set(found) <= {"auth", "rate_limit", "guard", "cache", "route", "provider", "cost", "observe"}


def test_a_plugin_without_its_sdk_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [EntryPoint("semantic", "nowhere_at_all:Semantic", "qlens.cache")]
    monkeypatch.setattr(reference, "distribution", lambda _: type("Distribution", (), {"entry_points": points}))
    with pytest.raises(ValueError, match=r"qlens.cache semantic cannot be imported: .*; install qlens\[all\]"):
        reference.built_in()


def test_every_metric_is_in_a_readme() -> None:
    root = Path(__file__).parents[2]
    sources = [file.read_text() for folder in ("qlens", "plugins") for file in (root / folder).rglob("*.py")]
    made = {name for text in sources for name in re.findall(r'(?:counter|gauge|histogram)\(\s*"(qlens_\w+)"', text)}
    core = {f"{name}_total" for text in sources for name in re.findall(r'_counter\(\s*"(qlens_\w+)"', text)}
    core |= {
        name for text in sources for name in re.findall(r'(?:_histogram|GaugeMetricFamily)\(\s*"(qlens_\w+)"', text)
    }
    said = " ".join(file.read_text() for file in (root / "README.md", *(root / "plugins").rglob("README.md")))
    missing = {name for name in (made - {each.removesuffix("_total") for each in core}) | core if name not in said}
    assert len(made | core) > 25
    assert not missing
