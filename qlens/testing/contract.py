"""Checks that a plugin class keeps the contract of its stage, for its author's own tests."""

from __future__ import annotations

import inspect

import attrs

from qlens.config import PluginEntry
from qlens.registry import STAGES, check

_NEEDED = {
    "auth": ("authenticate",),
    "rate_limit": ("admit",),
    "guard": ("wrap_call",),
    "cache": ("lookup", "store"),
    "route": ("choose", "retry", "wrap_send"),
    "provider": ("send", "connect"),
    "cost": ("price", "admit", "settle"),
    "observe": ("settle", "wrap_call", "wrap_send", "lifespan"),
}
"""Hooks of which a plugin of the stage implements at least one; a cache implements both."""


def check_plugin(stage: str, cls: type) -> None:
    """Assert that a plugin class fits its stage; what does not is said by AssertionError or ConfigError."""
    assert stage in STAGES, f"no stage called {stage!r}; stages: {', '.join(STAGES)}"
    check(cls, PluginEntry(stage, cls.__name__, cls.__name__, {}, cls.__qualname__))
    implemented = {name for name, function in inspect.getmembers(cls) if hasattr(function, "qlens_impl")}
    needed = _NEEDED[stage]
    if stage == "cache":
        missing = set(needed) - implemented
        assert not missing, f"{cls.__name__} is a cache and does not implement {', '.join(sorted(missing))}"
    assert implemented & set(needed), f"{cls.__name__} is a {stage} plugin, but has no {' or '.join(needed)}"
    parameters = list(inspect.signature(cls).parameters)
    assert len(parameters) >= 2, f"{cls.__name__} must be constructed as {cls.__name__}(config, name)"
    assert "__eq__" not in vars(cls), f"{cls.__name__} compares by value: use @define(eq=False)"
    assert cls.__doc__, f"{cls.__name__} has no docstring"
    config = getattr(cls, "Config", None)
    if config is not None:
        assert attrs.has(config), f"{cls.__name__}.Config must be an attrs class"
        assert getattr(config, "__setattr__", None) is not object.__setattr__, f"{config.__name__} must be @frozen"
