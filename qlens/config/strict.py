"""One strict converter from plain values to attrs classes, and from what cattrs raises to faults with a path."""

from __future__ import annotations

import difflib
import enum
import os
from collections.abc import Callable, Iterable, Mapping
from decimal import Decimal
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import attrs
from cattrs import Converter
from cattrs.errors import (
    AttributeValidationNote,
    BaseValidationError,
    ForbiddenExtraKeysError,
    IterableValidationError,
    IterableValidationNote,
)
from cattrs.gen import make_dict_structure_fn, override

from qlens.config import scalars
from qlens.config.environment import EnvText, MissingText
from qlens.config.scalars import Mismatch, Url, found
from qlens.config.tree import Place
from qlens.errors import ConfigError, Fault

T = TypeVar("T")


def convert(value: Any, cls: type[T], path: str, *, folder: Path) -> T:
    """Make an instance of an attrs class from a mapping; raises ConfigError with every fault in it.

    Relative files are taken from `folder`. A text whose variable has no value is not checked: its field takes its
    default, or keeps the text as written where there is none.
    """
    return Strict(folder).convert(value, cls, path)


class Strict:
    """Converts without guessing: nothing but a text of the environment changes its type."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder.absolute()
        self._converter = Converter(forbid_extra_keys=True, detailed_validation=True, use_alias=True)
        self._readers: Mapping[Any, Callable[[Any], Any]] = {
            **scalars.READERS,
            Path: self._path,
            Url: self._url,
            Any: scalars.plain,
            object: scalars.plain,
        }
        self._register()

    def convert(self, value: Any, cls: type[T], path: str) -> T:
        """As the function `convert`, for many values."""
        place = Place.of(value, path)
        try:
            return self._converter.structure(value, cls)
        except (BaseValidationError, Mismatch) as error:
            raise ConfigError(faults_of(error, place)) from None
        except NameError as error:
            message = f"{cls.__qualname__} has a field whose type cannot be found: {error}"
            raise ConfigError([Fault(str(place), message)]) from None

    def _register(self) -> None:
        # cattrs reads these, and what inherits from them, in its own lenient way unless told by class.
        for type_ in (str, bytes, int, float, Path):
            self._converter.register_structure_hook(type_, self._scalar)
        # A later hook is asked before an earlier one: what none of the others knows is a scalar, or refused.
        for fits, hook in (
            (lambda _: True, self._scalar),
            (is_tuple, self._tuple),
            (is_mapping, self._mapping),
            (is_union, self._union),
        ):
            self._converter.register_structure_hook_func(fits, hook)
        self._converter.register_structure_hook_factory(attrs.has, self._class)

    def _scalar(self, value: Any, type_: Any) -> Any:
        if type_ in self._readers:
            return self._readers[type_](value)
        if is_choice(type_):
            return scalars.choice(value, choices_of(type_))
        raise Mismatch(f"no setting can be of type {type_}; the plugin's config class has to change")

    # --- classes ---

    def _class(self, cls: Any) -> Callable[[Any, Any], Any]:
        hooks = {field.name: override(struct_hook=self._field(field)) for field in fields_of(cls)}
        build: Any = make_dict_structure_fn(cls, self._converter, **hooks)  # type: ignore[arg-type]

        def structure(value: Any, _: Any) -> Any:
            if not isinstance(value, dict):
                raise Mismatch(f"found {found(value)}, expected a mapping")
            if not has_missing(value):
                return build(value, cls)
            # Each field was validated on its own already, but for those of which nothing is known.
            with attrs.validators.disabled():
                return build(value, cls)

        return structure

    def _field(self, field: attrs.Attribute[Any]) -> Callable[[Any, Any], Any]:
        def structure(value: Any, type_: Any) -> Any:
            result = self._converter.structure(value, type_)
            if isinstance(result, MissingText):
                return _default(field, result)
            if field.validator is not None and not has_missing(value):
                _validate(field, value, result)
            return result

        return structure

    # --- collections and unions ---

    def _tuple(self, value: Any, type_: Any) -> tuple[Any, ...]:
        if not isinstance(value, list):
            raise Mismatch(f"found {found(value)}, expected a list")
        return tuple(self._items(enumerate(value), get_args(type_)[0]))

    def _mapping(self, value: Any, type_: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise Mismatch(f"found {found(value)}, expected a mapping")
        return dict(zip(value, self._items(value.items(), get_args(type_)[1]), strict=True))

    def _items(self, items: Iterable[tuple[str | int, Any]], type_: Any) -> list[Any]:
        results, errors = [], []
        for step, item in items:
            try:
                results.append(self._converter.structure(item, type_))
            except (BaseValidationError, Mismatch) as error:
                errors.append(_noted(error, step))
        if errors:
            raise IterableValidationError("", errors, list)
        return results

    def _union(self, value: Any, type_: Any) -> Any:
        """The members of a union are told apart by shape (null, list, mapping, scalar), its classes by `kind`."""
        members = [one for one in get_args(type_) if _shape_of_type(one) == _shape(value)]
        if not members:
            raise Mismatch(f"found {found(value)}, expected {in_words(type_)}")
        kinds = kinds_of(type_)
        if not kinds or not isinstance(value, dict):
            return self._converter.structure(value, members[0])
        if "kind" not in value:
            raise Mismatch(f'the key "kind" is missing, expected one of: {", ".join(kinds)}')
        try:
            cls = scalars.choice(value["kind"], kinds)
        except Mismatch as error:
            raise IterableValidationError("", [_noted(error, "kind")], dict) from None
        return cls if isinstance(cls, MissingText) else self._converter.structure(value, cls)

    # --- files ---

    def _path(self, value: Any) -> Path | str:
        written = scalars.text(value)
        if not written or "\0" in written:
            raise Mismatch(f"found {found(value)}, expected a path")
        return written if isinstance(value, MissingText) else self._absolute(written, value)

    def _url(self, value: Any) -> Url | str:
        written = scalars.url(value)
        scheme, colon, rest = written.partition(":///")
        if isinstance(value, MissingText) or scheme != "sqlite" or not colon or rest in {"", ":memory:"}:
            return written if isinstance(value, MissingText) else Url(written)
        file, mark, options = rest.partition("?")
        return Url(f"sqlite:///{self._absolute(file, value)}{mark}{options}")

    def _absolute(self, written: str, value: Any) -> Path:
        try:
            return Path(os.path.normpath(self._folder / Path(written).expanduser()))
        except RuntimeError:
            raise Mismatch(f"found {found(value)}, but that home directory is not known") from None


def _noted(error: Exception, step: str | int) -> Exception:
    error.add_note(IterableValidationNote("", step, object))
    return error


def _default(field: attrs.Attribute[Any], written: MissingText) -> Any:
    default: Any = field.default
    if default is attrs.NOTHING:
        return written
    return default.factory() if isinstance(default, attrs.Factory) else default  # type: ignore[arg-type]


def has_missing(value: Any) -> bool:
    """Whether something in a value is unknown, because an environment variable is not set."""
    return any(isinstance(text, MissingText) for text in _env_texts(value))


def _env_texts(value: Any) -> list[EnvText]:
    if isinstance(value, EnvText):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for item in items for text in _env_texts(item)]


# --- types -------------------------------------------------------------------------------------


def fields_of(cls: Any) -> tuple[attrs.Attribute[Any], ...]:
    """The fields a file may set, with their types resolved."""
    return tuple(field for field in attrs.fields(attrs.resolve_types(cls)) if field.init)


def is_union(type_: Any) -> bool:
    """Whether it is a union; `X | None` is one."""
    return get_origin(type_) in {Union, UnionType}


def is_tuple(type_: Any) -> bool:
    """Whether it is a `tuple[X, ...]`."""
    return get_origin(type_) is tuple and get_args(type_)[1:] == (...,)


def is_mapping(type_: Any) -> bool:
    """Whether it is a `Mapping[str, X]`."""
    return get_origin(type_) in {Mapping, dict} and get_args(type_)[0] is str


def is_choice(type_: Any) -> bool:
    """Whether it is a Literal or an enum."""
    return get_origin(type_) is Literal or (isinstance(type_, type) and issubclass(type_, enum.Enum))


def choices_of(type_: Any) -> dict[Any, Any]:
    """The values a Literal or an enum may have in a file, and what they stand for."""
    if get_origin(type_) is Literal:
        return {name: name for name in get_args(type_)}
    return {member.value: member for member in type_}


def _shape(value: Any) -> str:
    if value is None:
        return "null"
    return "mapping" if isinstance(value, dict) else "list" if isinstance(value, list) else "scalar"


def _shape_of_type(type_: Any) -> str:
    if type_ is NoneType:
        return "null"
    if attrs.has(type_) or is_mapping(type_):
        return "mapping"
    return "list" if is_tuple(type_) else "scalar"


def kinds_of(type_: Any) -> dict[str, Any]:
    """The classes of a union by the choices of their field `kind`; empty where there are no two classes."""
    classes = [one for one in get_args(type_) if attrs.has(one)] if is_union(type_) else []
    if len(classes) < 2:
        return {}
    kinds = {}
    for cls in classes:
        field = next((field for field in fields_of(cls) if field.name == "kind"), None)
        kinds.update(dict.fromkeys(get_args(field.type) if field else (), cls))
    return kinds


_NAMES: Mapping[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    Decimal: "a decimal number",
    str: "a text",
    scalars.Secret: "a secret text",
    Path: "a path",
    Url: "a URL",
    NoneType: "nothing",
}


def in_words(type_: Any) -> str:
    """A type as a reader of YAML would call it."""
    if type_ in _NAMES:
        return _NAMES[type_]
    if is_choice(type_):
        return " or ".join(map(str, choices_of(type_)))
    if is_tuple(type_):
        return f"a list (each {in_words(get_args(type_)[0])})"
    if is_union(type_):
        return " or ".join(dict.fromkeys(map(in_words, get_args(type_))))
    return "anything" if type_ in {Any, object} else "a mapping"


# --- faults ------------------------------------------------------------------------------------


def _validate(field: attrs.Attribute[Any], value: Any, result: Any) -> None:
    """Ask a field's validator early and alone: the constructor would stop at the first that fails."""
    assert field.validator is not None
    try:
        field.validator(None, field, result)
    except (ValueError, TypeError, LookupError) as error:
        message = str(error.args[0] if error.args else error).removeprefix(f"'{field.name}' ")
        if message.endswith(f": {result}"):
            raise Mismatch(f"{message.removesuffix(f': {result}')}, found {found(value)}") from None
        raise Mismatch(_masked(message, value, str(result))) from None
    except AttributeError:
        # It looks at other fields, so it waits for the instance.
        return


def _masked(message: str, value: Any, result: str = "") -> str:
    """A message of foreign code without the texts of the environment that it may repeat."""
    for text in _env_texts(value):
        forms = {str(text), repr(str(text))[1:-1], result if text is value else ""} - {""}
        for form in sorted(forms, key=len, reverse=True):
            message = message.replace(form, found(text))
    return message


def faults_of(error: Exception, place: Place) -> list[Fault]:
    """What cattrs raised for the value at a place, as one fault for each thing that is wrong."""
    if isinstance(error, ForbiddenExtraKeysError):
        known = [str(field.alias) for field in fields_of(error.cl)]
        return [unknown_key(place.step(key), key, known) for key in place.value if key in error.extra_fields]
    if not isinstance(error, BaseValidationError):
        unsure = not isinstance(error, Mismatch) and has_missing(place.value)
        message = "cannot be checked while variables are not set" if unsure else _masked(str(error), place.value)
        return [Fault(str(place), message)]
    faults: list[Fault] = []
    for inner in error.exceptions:
        step = _step(inner, error)
        if step is not None and isinstance(inner, KeyError):
            faults.append(Fault(str(place), f'the key "{step}" is missing'))
        else:
            faults += faults_of(inner, place if step is None else place.step(step))
    return faults


def _step(error: Exception, group: BaseValidationError) -> str | int | None:
    """Which step down an error of a group stands for, as noted; None: it is about the value itself."""
    for note in getattr(error, "__notes__", ()):
        if isinstance(note, IterableValidationNote):
            return note.index
        if isinstance(note, AttributeValidationNote):
            return str(attrs.fields_dict(group.cl)[note.name].alias)
    return None


def unknown_key(place: Place, key: str, known: Iterable[str]) -> Fault:
    """The fault of a key that nobody knows."""
    return Fault(str(place), f"unknown key{suggestion(key, known, 'known keys')}")


def suggestion(name: str, known: Iterable[str], label: str) -> str:
    """What a wrong name may have meant, and all that would be right."""
    names = list(known)
    close = difflib.get_close_matches(name, names, n=1)
    meant = f' did you mean "{close[0]}"?' if close else ""
    return f";{meant} {label}: {', '.join(names) or 'none'}"
