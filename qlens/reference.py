"""Generates what can be read from the code: tables of settings, the list of hooks, the JSON schema of the file."""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import distribution
from pathlib import Path
from typing import Any, get_args

import attrs
from attrs import frozen

from qlens import hookspecs
from qlens.config.entries import ModelSettings, Server
from qlens.config.schema import schema
from qlens.config.shapes import default_of, docstrings, fields_of, in_words, is_mapping, is_tuple, is_union, kinds_of

ROOT = Path(__file__).resolve().parent.parent
NO_SETTINGS = "No settings."


# --- settings ----------------------------------------------------------------------------------


@frozen
class Row:
    """One setting, as a table shows it."""

    name: str
    type: str
    default: str
    text: str


def fields(cls: type) -> tuple[Row, ...]:
    """The settings of a config class, those of nested classes below their own, named by path."""
    return tuple(_rows(cls, "", ()))


def table(cls: type) -> str:
    """The settings of a config class as a Markdown table."""
    rows = fields(cls)
    if not rows:
        return NO_SETTINGS
    lines = [("Setting", "Type", "Default", "Meaning"), ("---",) * 4]
    lines += [(f"`{row.name}`", row.type, row.default, row.text) for row in rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", r"\|")


def _rows(cls: type, prefix: str, outer: tuple[type, ...]) -> Iterator[Row]:
    texts = docstrings(cls)
    for field in fields_of(cls):
        name = f"{prefix}{field.alias}"
        yield Row(name, _type_cell(field), _default_cell(field), texts.get(field.name, ""))
        for suffix, kind, nested in _nested(field.type):
            if nested in (*outer, cls):
                continue
            for row in _rows(nested, f"{name}{suffix}.", (*outer, cls)):
                if kind is None:
                    yield row
                elif row.name != f"{name}{suffix}.kind":
                    yield attrs.evolve(row, text=f"(kind `{kind}`) {row.text}")


def _nested(type_: Any, suffix: str = "") -> Iterator[tuple[str, str | None, type]]:
    """The config classes inside a type: the path to each, the kind that chooses it, the class."""
    if attrs.has(type_):
        yield suffix, None, type_
    elif is_tuple(type_):
        yield from _nested(get_args(type_)[0], f"{suffix}[]")
    elif is_mapping(type_):
        yield from _nested(get_args(type_)[1], f"{suffix}.*")
    elif kinds := kinds_of(type_):
        yield from ((suffix, kind, cls) for kind, cls in kinds.items())
    elif is_union(type_):
        for member in get_args(type_):
            yield from _nested(member, suffix)


def _type_cell(field: attrs.Attribute[Any]) -> str:
    if kinds := kinds_of(field.type):
        return f"mapping with kind {' or '.join(f'`{kind}`' for kind in kinds)}"
    words = in_words(field.type)
    return words.removesuffix(" or nothing") if field.default is None else words


def _default_cell(field: attrs.Attribute[Any]) -> str:
    if field.default is attrs.NOTHING:
        return "required"
    default = default_of(field)
    return "none" if default is None else f"`{_flow(default)}`"


def _flow(value: Any) -> str:
    if isinstance(value, dict):
        return f"{{{', '.join(f'{name}: {_flow(item)}' for name, item in value.items())}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(_flow, value))}]"
    return value if isinstance(value, str) and value else json.dumps(value)


# --- hooks -------------------------------------------------------------------------------------


def hooks() -> str:
    """Every hook with its signature, as the source has it, and its docstring."""
    nodes = ast.parse(inspect.getsource(hookspecs)).body
    specs = [node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    return "\n\n".join(_hook(node) for node in specs if node.name in hookspecs.__all__)


def _hook(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    keyword = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
    assert node.returns is not None
    signature = f"{keyword} {node.name}({ast.unparse(node.args)}) -> {ast.unparse(node.returns)}"
    return f"### `{signature}`\n\n{ast.get_docstring(node) or ''}"


# --- files -------------------------------------------------------------------------------------

_START = "<!-- generated: {} -->"
_END = "<!-- end -->"


def rewrite(text: str, name: str, block: str) -> str:
    """Put a generated block between its markers; raises ValueError where they are not there once."""
    start = _START.format(name)
    before, found, rest = text.partition(start)
    _, end, after = rest.partition(_END)
    if not found or not end or start in rest:
        raise ValueError(f"expected one {start} with {_END} below it")
    return f"{before}{start}\n{block}\n{end}{after}"


def built_in() -> dict[str, dict[str, type]]:
    """The plugin classes that this distribution brings, by stage and name; ValueError for one without its SDK."""
    plugins: dict[str, dict[str, type]] = {}
    for point in distribution("qlens").entry_points:
        if not point.group.startswith("qlens."):
            continue
        try:
            plugins.setdefault(point.group.removeprefix("qlens."), {})[point.name] = point.load()
        except ImportError as error:
            raise ValueError(f"{point.group} {point.name} cannot be imported: {error}; install qlens[all]") from error
    return plugins


def generate(root: Path, plugins: Mapping[str, Mapping[str, type]]) -> dict[Path, str]:
    """Every file that holds generated text, as it ought to be; raises ValueError naming each missing place."""
    files = {root / "config" / "schema.json": json.dumps(schema(plugins), indent=2, ensure_ascii=False) + "\n"}
    problems = []
    for path, name, block in _blocks(root, plugins):
        try:
            files[path] = rewrite(files[path] if path in files else _read(path), name, block)
        except ValueError as error:
            problems.append(f"{path.relative_to(root)}: {error}")
    if problems:
        raise ValueError("\n".join(problems))
    return files


def _blocks(root: Path, plugins: Mapping[str, Mapping[str, type]]) -> Iterator[tuple[Path, str, str]]:
    """Every generated block: its file, its name, its text. The README shows the core's settings where it likes."""
    readme = root / "README.md"
    for name, settings in (("fields server", Server), ("fields models", ModelSettings)):
        if _START.format(name) in _read(readme):
            yield readme, name, table(settings)
    yield root / "plugins" / "README.md", "hooks", hooks()
    for stage, classes in plugins.items():
        readme = root / "plugins" / "qlens_plugins" / stage / "README.md"
        for name, cls in classes.items():
            config = getattr(cls, "Config", None)
            yield readme, f"fields {name}", table(config) if config else NO_SETTINGS


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


def main(argv: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Write the generated texts, or with --check say which are stale; exit code 1 where something is to be done."""
    parser = argparse.ArgumentParser(prog="python -m qlens.reference", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a file is stale")
    check = parser.parse_args(argv).check
    try:
        files = generate(root, built_in())
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    stale = [path for path, text in files.items() if _read(path) != text]
    for path in stale:
        if not check:
            path.write_text(files[path], encoding="utf-8")
        sys.stdout.write(f"{path.relative_to(root)}: {'stale; run `make docs`' if check else 'written'}\n")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
