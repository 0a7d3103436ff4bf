"""Another configuration beside the one in use: where calls would go under it, and what they would cost."""

from __future__ import annotations

from pathlib import Path

from attrs import frozen

from qlens import returned
from qlens.call import UNPRICED, Call, Caller, Cost, Model, Target
from qlens.config import Config
from qlens.errors import StartupError
from qlens.models import Models
from qlens.operations import OPERATIONS, Operation
from qlens.registry import Registration, drafted, register
from qlens.usage import Usage

_OPERATIONS = {operation.name: operation for operation in OPERATIONS}


async def _nothing() -> bytes:
    return b""


@frozen
class Alternative:
    """A configuration whose plugins are constructed and not opened; nothing runs under it."""

    _registration: Registration

    @classmethod
    def read(cls, path: Path) -> Alternative:
        """Read a file; variables of the environment need not be set. Raises ConfigError with every fault."""
        return cls(register(drafted(path, check_env=False)))

    @property
    def config(self) -> Config:
        """What the file says."""
        return self._registration.config

    @property
    def models(self) -> Models:
        """Its models, by public name."""
        return self._registration.models

    def call(self, operation: str, caller: Caller, model: Model | None) -> Call:
        """A call as prices see it: it has no body and does not run. `wall_ns` is the caller's to set."""
        known = _OPERATIONS.get(operation) or Operation(operation, "POST", "/", runs="full")
        return Call(
            id="alternative", operation=known, path=known.path, path_params={}, query={}, headers={}, peer=None,
            credential=None, started=0.0, wall_ns=0, deadline=0.0, reader=_nothing, caller=caller, model=model,
        )  # fmt: skip

    def cost(self, call: Call, target: Target, usage: Usage) -> Cost:
        """What a usage would cost at a target: the first plugin that knows; nobody knows means unpriced.

        Raises StartupError when what a plugin needs for it cannot be read.
        """
        for hook in self._registration.hooks.price:
            try:
                cost = returned.cost(hook.fn(call, target, usage))
            except StartupError:
                raise  # a table that is not there: the gateway would not have started
            except Exception:  # noqa: BLE001 - a plugin that fails knows no price, as in a gateway that serves
                cost = None
            if cost is not None:
                return cost
        return UNPRICED
