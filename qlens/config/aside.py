"""YAML files that stand beside the configuration and belong to a plugin."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypeVar

from qlens.config.file import text_of
from qlens.config.scalars import found
from qlens.config.strict import convert
from qlens.config.yaml import load
from qlens.errors import ConfigError, Fault

T = TypeVar("T")


def read_yaml(path: Path, cls: type[T]) -> T:
    """Read a plugin's own YAML file into an attrs class, as strictly as the configuration.

    Raises ConfigError with every fault, each with its line; relative files in it stand in its folder.
    """
    document = load(text_of(path), source=str(path), env=os.environ)
    if not isinstance(document.root, dict):
        raise ConfigError([*document.faults, Fault(str(path), f"found {found(document.root)}, expected a mapping")])
    try:
        result = convert(document.root, cls, "", folder=path.parent)
    except ConfigError as error:
        raise ConfigError([*document.faults, *error.faults]) from None
    if document.faults:
        raise ConfigError(document.faults)
    return result
