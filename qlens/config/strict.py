"""One strict converter from plain values to attrs classes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar, cast, get_args

import attrs
from cattrs import Converter
from cattrs.errors import BaseValidationError, IterableValidationError
from cattrs.gen import make_dict_structure_fn, override

from qlens.config import scalars
from qlens.config.environment import MissingText
from qlens.config.faults import faults_of, has_missing, masked, noted
from qlens.config.scalars import Mismatch, Url, found
from qlens.config.shapes import (
    choices_of,
    fields_of,
    in_words,
    is_choice,
    is_mapping,
    is_tuple,
    is_union,
    kinds_of,
    shape_of,
    shape_of_type,
)
from qlens.config.tree import Place
from qlens.errors import ConfigError, Fault

T = TypeVar("T")


def convert(value: Any, cls: type[T], path: str, *, folder: Path) -> T:
    """Make an instance of an attrs class from a mapping; raises ConfigError with every fault in it.

    Relative files are taken from `folder`. A text whose variable has no value is not checked: its field takes its
    default, or keeps the text as written where there is none, or where the class wants one of several fields.
    """
    return Strict(folder).convert(value, cls, path)


class Strict:
    """Converts without guessing: nothing but a text of the environment changes its type."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder.absolute()
        self._keeps = False
        """Whether an optional text whose variable has no value is kept as written, instead of left out."""
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
        fields = fields_of(cls)
        hooks = {field.name: override(struct_hook=self._field(field)) for field in fields}
        build: Any = make_dict_structure_fn(cls, self._converter, **hooks)  # type: ignore[arg-type]
        # A default that names a file is relative as well.
        files = {field.alias: str(field.default) for field in fields if isinstance(field.default, Path | Url)}

        def structure(value: Any, _: Any) -> Any:
            if not isinstance(value, dict):
                raise Mismatch(f"found {found(value)}, expected a mapping")
            if not has_missing(value):
                return build({**files, **value}, cls)
            # Each field was validated on its own already, but for those of which nothing is known.
            with attrs.validators.disabled():
                try:
                    return build({**files, **value}, cls)
                except BaseValidationError:
                    if self._keeps:
                        raise
            # What looks at several fields may miss one that is written, as "exactly one of url and cluster" does.
            self._keeps = True
            try:
                with attrs.validators.disabled():
                    return build({**files, **value}, cls)
            finally:
                self._keeps = False

        return structure

    def _field(self, field: attrs.Attribute[Any]) -> Callable[[Any, Any], Any]:
        def structure(value: Any, type_: Any) -> Any:
            result = self._converter.structure(value, type_)
            if isinstance(result, MissingText):
                return self._default(field, result)
            if field.validator is not None and not has_missing(value):
                _validate(field, value, result)
            return result

        return structure

    def _default(self, field: attrs.Attribute[Any], written: MissingText) -> Any:
        """What stands for a text of which nothing is known."""
        default: Any = field.default
        if default is attrs.NOTHING or (default is None and self._keeps):
            return written
        if isinstance(default, Path | Url):
            return self._converter.structure(str(default), cast(Any, field.type))
        return default.factory() if isinstance(default, attrs.Factory) else default  # type: ignore[arg-type]

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
                errors.append(noted(error, step))
        if errors:
            raise IterableValidationError("", errors, list)
        return results

    def _union(self, value: Any, type_: Any) -> Any:
        """The members of a union are told apart by shape (null, list, mapping, scalar), its classes by `kind`."""
        members = [one for one in get_args(type_) if shape_of_type(one) == shape_of(value)]
        if not members:
            raise Mismatch(f"found {found(value)}, expected {in_words(type_)}")
        kinds = kinds_of(type_)
        if not kinds or not isinstance(value, dict):
            return self._first(value, members, type_)
        if "kind" not in value:
            raise Mismatch(f'the key "kind" is missing, expected one of: {", ".join(kinds)}')
        try:
            cls = scalars.choice(value["kind"], kinds)
        except Mismatch as error:
            raise IterableValidationError("", [noted(error, "kind")], dict) from None
        return cls if isinstance(cls, MissingText) else self._converter.structure(value, cls)

    def _first(self, value: Any, members: list[Any], type_: Any) -> Any:
        *others, last = members
        for member in others:
            with suppress(Mismatch):
                return self._converter.structure(value, member)
        try:
            return self._converter.structure(value, last)
        except Mismatch as error:
            if not others:
                raise
            raise Mismatch(f"found {found(value)}, expected {in_words(type_)}") from error

    # --- files ---

    def _path(self, value: Any) -> Path | str:
        written = scalars.text(value)
        if isinstance(value, MissingText):
            return written
        if not written or "\0" in written:
            raise Mismatch(f"found {found(value)}, expected a path")
        return self._absolute(written, value)

    def _url(self, value: Any) -> Url | str:
        written = scalars.url(value)
        if isinstance(value, MissingText):
            return written
        scheme, colon, rest = written.partition(":///")
        if scheme != "sqlite" or not colon or rest in {"", ":memory:"}:
            return Url(written)
        file, mark, options = rest.partition("?")
        return Url(f"sqlite:///{self._absolute(file, value)}{mark}{options}")

    def _absolute(self, written: str, value: Any) -> Path:
        try:
            return Path(os.path.normpath(self._folder / Path(written).expanduser()))
        except RuntimeError:
            raise Mismatch(f"found {found(value)}, but that home directory is not known") from None


def _validate(field: attrs.Attribute[Any], value: Any, result: Any) -> None:
    """Ask a field's validator early and alone: the constructor would stop at the first that fails."""
    assert field.validator is not None
    try:
        field.validator(None, field, result)
    except (ValueError, TypeError, LookupError) as error:
        message = str(error.args[0] if error.args else error).removeprefix(f"'{field.name}' ")
        if message.endswith(f": {result}"):
            raise Mismatch(f"{message.removesuffix(f': {result}')}, found {found(value)}") from None
        raise Mismatch(masked(message, value, str(result))) from None
    except AttributeError:
        # It looks at other fields, so it waits for the instance.
        return
