"""What a plugin raises where no call waits for it, at start-up or on the command line, as a fault of the file."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qlens.crashes import censored
from qlens.errors import Fault, StartupError
from qlens.registry import Registration


@contextmanager
def placed(registration: Registration, key: str, what: str) -> Iterator[None]:
    """Raise what goes wrong in a plugin as a StartupError that names its place, the plugin and the line it came from.

    A StartupError of the plugin's own passes, as does a reader of the output who has left.
    """
    try:
        yield
    except (StartupError, BrokenPipeError):
        raise
    except (Exception, SystemExit) as error:
        instance = next(instance for instance in registration.instances if instance.key == key)
        last = traceback.extract_tb(error.__traceback__)[-1]
        said = censored(f"{type(error).__name__}: {error}", instance.config)
        message = f"{instance.entry.plugin} failed in {what}: {said} ({Path(last.filename).name}, line {last.lineno})"
        raise StartupError([Fault(instance.entry.path, message)]) from error
