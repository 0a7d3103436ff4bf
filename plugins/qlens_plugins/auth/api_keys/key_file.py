"""The file of hashed keys: strict reading, and changes that leave the rest of the file as it is."""

from __future__ import annotations

import fcntl
import os
import re
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import yaml
from attrs import define, evolve, field, fields, frozen

from qlens import Fault, StartupError
from qlens_plugins.auth.credentials import digest, instant, written

_MAX_BYTES = 64 * 1024 * 1024
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_HASH = re.compile(r"sha256:[0-9a-f]{64}")
_HEAD = "# Keys by their hashes. Change it with `qlens keys`, or by hand: a running gateway sees it by itself.\nkeys:\n"


@frozen
class Key:
    """One row of the file: who calls with this key, and what the key may do."""

    id: str
    hash: str
    tenant: str
    project: str | None = None
    roles: tuple[str, ...] = ("member",)
    models: tuple[str, ...] | None = None
    tags: Mapping[str, str] = field(factory=dict, hash=False)
    created: datetime | None = None
    expires_at: datetime | None = None
    revoked: datetime | None = None

    @property
    def digest(self) -> bytes:
        """The hash as bytes."""
        return bytes.fromhex(self.hash.removeprefix("sha256:"))

    def row(self) -> dict[str, object]:
        """What stands in the file: texts and lists, without what says nothing."""
        plain = {attribute.name: _plain(getattr(self, attribute.name)) for attribute in fields(Key)}
        return {name: value for name, value in plain.items() if value}


def hash_text(key: str) -> str:
    """The hash of a key as the file has it."""
    return f"sha256:{digest(key).hex()}"


def _plain(value: object) -> object:
    if isinstance(value, datetime):
        return written(value)
    if isinstance(value, tuple):
        return list(value)
    return dict(value) if isinstance(value, Mapping) else value


# --- reading -----------------------------------------------------------------------------------


def read(path: Path) -> tuple[Key, ...]:
    """The keys of a file; StartupError lists all faults, OSError passes."""
    with path.open("rb") as file:
        raw = file.read(_MAX_BYTES + 1)
    if len(raw) > _MAX_BYTES:
        raise StartupError([Fault(str(path), f"is larger than {_MAX_BYTES} bytes; is this the file of keys?")])
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        raise _no_text(path) from None
    return parse(text, str(path))


def _no_text(path: Path) -> StartupError:
    return StartupError([Fault(str(path), "is not UTF-8 text; is this the file of keys?")])


def parse(text: str, source: str) -> tuple[Key, ...]:
    """The keys of a file's text; raises StartupError with every fault and its line."""
    reader = _Reader(source)
    keys = [key for row in reader.rows(_composed(text, source)) if (key := reader.key(row))]
    if reader.faults:
        raise StartupError(reader.faults)
    return tuple(keys)


def _composed(text: str, source: str) -> yaml.Node | None:
    # Nodes instead of values: they know their lines, and no text turns into a date or a number.
    try:
        return yaml.compose(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.MarkedYAMLError as error:
        place = f"{source}:{error.problem_mark.line + 1}" if error.problem_mark else source
        raise StartupError([Fault(place, f"is no YAML: {error.problem}")]) from None
    except (yaml.YAMLError, RecursionError) as error:
        raise StartupError([Fault(source, f"is no YAML: {error}")]) from None


class _Wrong(ValueError):
    """A value that is not what its field takes."""

    def __init__(self, node: yaml.Node, message: str) -> None:
        super().__init__(message)
        self.line = node.start_mark.line + 1


@define(eq=False)
class _Reader:
    """Turns nodes into keys and collects what is wrong."""

    source: str
    faults: list[Fault] = field(factory=list)
    _seen: dict[str, int] = field(factory=dict)
    """Ids and hashes, with the lines they were first seen in."""

    def rows(self, root: yaml.Node | None) -> list[yaml.Node]:
        """The nodes of the list `keys`."""
        try:
            if root is None:
                return []
            pairs = _pairs(root, "the file must be a mapping with the list `keys`")
            for name in sorted(pairs.keys() - {"keys"}):
                self._note(_Wrong(pairs[name][0], f"unknown field {name!r}; the file has one: keys"))
            return _rows(root, pairs)
        except _Wrong as wrong:
            self._note(wrong)
            return []

    def key(self, row: yaml.Node) -> Key | None:
        """One key, or None when a fault was noted."""
        faults = len(self.faults)
        found: dict[str, object] = {}
        try:
            nodes = _fields(row)
        except _Wrong as wrong:
            self._note(wrong)
            return None
        for name, node in nodes.items():
            try:
                found[name] = _READ[name](node)
                self._refuse_twin(name, node)
            except _Wrong as wrong:
                self._note(wrong, f"{name}: ")
        return Key(**found) if len(self.faults) == faults else None  # type: ignore[arg-type]

    def _refuse_twin(self, name: str, node: yaml.Node) -> None:
        if name not in {"id", "hash"}:
            return
        line = self._seen.setdefault(f"{name} {node.value}", node.start_mark.line + 1)
        if line != node.start_mark.line + 1:
            raise _Wrong(node, f"{node.value!r} stands in line {line} already; take one of the two out")

    def _note(self, wrong: _Wrong, name: str = "") -> None:
        self.faults.append(Fault(f"{self.source}:{wrong.line}", f"{name}{wrong}"))


def _rows(root: yaml.Node, pairs: Mapping[str, tuple[yaml.Node, yaml.Node]]) -> list[yaml.Node]:
    if "keys" not in pairs:
        raise _Wrong(root, "the list `keys` is missing")
    keys = pairs["keys"][1]
    is_empty = isinstance(keys, yaml.ScalarNode) and not keys.value
    return [] if is_empty else _items(keys, "`keys` must be a list")


def _fields(row: yaml.Node) -> dict[str, yaml.Node]:
    """The fields of one key, all of them known and those that must be there present."""
    pairs = _pairs(row, "a key must be a mapping with id, hash and tenant")
    for name, (at, _) in pairs.items():
        if name not in _READ:
            raise _Wrong(at, f"unknown field {name!r}; a key has {', '.join(_READ)}")
    if missing := [name for name in ("id", "hash", "tenant") if name not in pairs]:
        raise _Wrong(row, f"the key has no {' and no '.join(missing)}; `qlens keys create` writes them all")
    return {name: node for name, (_, node) in pairs.items()}


def _pairs(node: yaml.Node, what: str) -> dict[str, tuple[yaml.Node, yaml.Node]]:
    if not isinstance(node, yaml.MappingNode):
        raise _Wrong(node, what)
    pairs: dict[str, tuple[yaml.Node, yaml.Node]] = {}
    for name, value in node.value:
        text = _text(name)
        if text in pairs:
            raise _Wrong(name, f"{text!r} stands here twice; take one of the two out")
        pairs[text] = (name, value)
    return pairs


def _items(node: yaml.Node, what: str) -> list[yaml.Node]:
    if not isinstance(node, yaml.SequenceNode):
        raise _Wrong(node, what)
    return list(node.value)


def _text(node: yaml.Node) -> str:
    if not isinstance(node, yaml.ScalarNode):
        raise _Wrong(node, "must be a text")
    text = str(node.value)
    if not text.strip() or not text.isprintable():
        raise _Wrong(node, f"must be a text of printable characters; found {text!r}")
    return text


def _texts(node: yaml.Node) -> tuple[str, ...]:
    texts = tuple(_text(item) for item in _items(node, "must be a list of texts"))
    if not texts:
        raise _Wrong(node, "an empty list; leave the field out, or name something in it")
    return texts


def _tags(node: yaml.Node) -> dict[str, str]:
    return {name: _text(value) for name, (_, value) in _pairs(node, "must be a mapping of texts").items()}


def _id(node: yaml.Node) -> str:
    text = _text(node)
    if not _ID.fullmatch(text):
        raise _Wrong(node, f"{text!r} must be up to 64 letters, digits, dots, dashes and underscores")
    return text


def _hash(node: yaml.Node) -> str:
    text = _text(node)
    if not _HASH.fullmatch(text):
        # What stands here by mistake may be the key itself: it is not repeated.
        raise _Wrong(node, "must be sha256: and 64 small hex digits; `qlens keys create` writes it")
    return text


def _instant(node: yaml.Node) -> datetime:
    try:
        return instant(_text(node))
    except _Wrong:
        raise
    except ValueError as error:
        raise _Wrong(node, str(error)) from None


_READ: Mapping[str, Callable[[yaml.Node], object]] = {
    "id": _id,
    "hash": _hash,
    "tenant": _text,
    "project": _text,
    "roles": _texts,
    "models": _texts,
    "tags": _tags,
    "created": _instant,
    "expires_at": _instant,
    "revoked": _instant,
}
"""The fields of a key, in the order they are written."""


# --- changing ----------------------------------------------------------------------------------


Noted = Callable[[Key | None, Key], None]
"""Notes that a key is about to become another, or to be new; when it raises, the file stays as it is."""


def add(path: Path, key: Key, noted: Noted) -> None:
    """Append a key; raises StartupError when it is wrong, its id is taken, or the file cannot be appended to."""
    parse(f"keys:\n{_item(key, 0)}", "new key")

    def edit(text: str, keys: tuple[Key, ...]) -> tuple[str, tuple[Key, ...]]:
        if any(known.id == key.id for known in keys):
            raise StartupError(f"a key with the id {key.id!r} exists already: choose another one with --id")
        return _appended(text, key), (*keys, key)

    _change(path, edit, noted)


def revoke(path: Path, id_: str, at: datetime, noted: Noted) -> Key:
    """Mark a key as revoked, which keeps its id taken; returns the key. Raises StartupError when there is none."""

    def edit(text: str, keys: tuple[Key, ...]) -> tuple[str, tuple[Key, ...]]:
        place = next((place for place, key in enumerate(keys) if key.id == id_), None)
        if place is None:
            raise StartupError(f"no key with the id {id_!r} in {path}; `qlens keys list` shows them")
        if keys[place].revoked is not None:
            return text, keys
        after = (*keys[:place], evolve(keys[place], revoked=at), *keys[place + 1 :])
        return _marked(text, place, at), after

    return next(key for key in _change(path, edit, noted) if key.id == id_)


Edit = Callable[[str, tuple[Key, ...]], tuple[str, tuple[Key, ...]]]
"""From a file's text and keys to the text as it shall be, with the keys that must then be in it."""


def _change(path: Path, edit: Edit, noted: Noted) -> tuple[Key, ...]:
    """Change a file in one step: whoever reads it sees the old text or the new one, and two writers take turns."""
    try:
        path = path.resolve()  # a link stays a link
    except RuntimeError:
        raise StartupError([Fault(str(path), "is a link that leads to itself; name the file of keys")]) from None
    with _turn(path):
        try:
            text = path.read_text(encoding="utf-8") if path.exists() else ""
        except UnicodeDecodeError:
            raise _no_text(path) from None
        before = parse(text, str(path))
        new, keys = edit(text, before)
        # The text is edited, not written anew, so that comments stay: check that it says what it should.
        if not _says(new, keys):
            raise StartupError(f"{path}: its layout cannot be edited; put the keys in a plain block list under `keys:`")
        if new != text:
            known = {key.id: key for key in before}
            for key in keys:
                if key != known.get(key.id):
                    noted(known.get(key.id), key)
            _replace(path, new)
    return keys


def _says(text: str, keys: tuple[Key, ...]) -> bool:
    try:
        return parse(text, "") == keys
    except StartupError:
        return False


@contextmanager
def _turn(path: Path) -> Iterator[None]:
    """Wait for the folder's lock: the file itself is replaced, so a lock on it would be lost."""
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def _replace(path: Path, text: str) -> None:
    """Write beside the file and rename over it; a new file is for its owner alone, an old one keeps owner and mode."""
    descriptor, draft = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            _look_like(path, descriptor)
            os.fsync(descriptor)
        os.replace(draft, path)
    except BaseException:
        os.unlink(draft)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _look_like(path: Path, descriptor: int) -> None:
    if not path.exists():
        return
    before = path.stat()
    os.fchmod(descriptor, stat.S_IMODE(before.st_mode))
    if os.geteuid() == 0:  # an operator's root must not take the file from the gateway's user
        os.fchown(descriptor, before.st_uid, before.st_gid)


def _appended(text: str, key: Key) -> str:
    root = _composed(text, "")
    if root is None:
        return f"{_ended(text)}{_HEAD}{_item(key, 2)}"
    keys = root.value[0][1]
    if isinstance(keys, yaml.SequenceNode) and keys.value:
        return f"{_ended(text)}{_item(key, keys.start_mark.column)}"
    # `keys:` with nothing, or with [] behind it.
    start, end = _offsets(text, keys)
    return f"{_ended(text[:start].rstrip() + text[end:])}{_item(key, 2)}"


def _marked(text: str, place: int, at: datetime) -> str:
    root = _composed(text, "")
    assert root is not None
    row = root.value[0][1].value[place]
    start, _ = _offsets(text, row)
    if row.flow_style:
        return f'{text[: start + 1]}revoked: "{written(at)}", {text[start + 1 :]}'
    lines = text.splitlines(keepends=True)
    id_ = next(value for name, value in row.value if name.value == "id")
    line = id_.end_mark.line + 1
    lines[line - 1] = _ended(lines[line - 1])
    lines.insert(line, f'{" " * row.start_mark.column}revoked: "{written(at)}"\n')
    return "".join(lines)


def _offsets(text: str, node: yaml.Node) -> tuple[int, int]:
    """Where a node starts and ends, in characters."""
    return node.start_mark.index, node.end_mark.index


def _ended(text: str) -> str:
    return text if not text or text.endswith("\n") else text + "\n"


def _item(key: Key, column: int) -> str:
    lines = yaml.safe_dump(
        [key.row()], sort_keys=False, allow_unicode=True, default_flow_style=None, width=10**9
    ).splitlines()
    return "".join(f"{' ' * column}{line}\n" for line in lines)
