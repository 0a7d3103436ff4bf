"""Another configuration, asked for its models and prices without being served."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlens import Alternative, Caller, ConfigError, StartupError, Usage
from qlens.gateway import Gateway

HOUSE = """
from attrs import define

from qlens import Cost, StartupError, hookimpl


@define(eq=False)
class Broken:
    config: None
    name: str

    @hookimpl
    def price(self, call, target, usage):
        if call.operation.name == "gone":
            raise StartupError("the table is gone")
        raise RuntimeError("broken")


@define(eq=False)
class Flat:
    config: None
    name: str

    @hookimpl
    def price(self, call, target, usage):
        return Cost(usage.input * 7 + call.wall_ns) if call.known.tenant == "acme" else None
"""
CONFIG = """
pipeline:
  auth: [{plugin: anonymous}]
  cost: [{plugin: "house_of_prices:Broken"}, {plugin: "house_of_prices:Flat"}]
providers: {echo: {plugin: echo}, away: {plugin: openai, api_key: "${NOT_SET_ANYWHERE}"}}
models: {a: {targets: [{provider: echo, model: b}]}}
"""


def alternative(folder: Path, text: str = CONFIG) -> Alternative:
    (folder / "house_of_prices.py").write_text(HOUSE)
    (folder / "other.yaml").write_text(text)
    return Gateway.alternative(folder / "other.yaml")


def test_the_first_plugin_that_knows_a_price_says_it_and_one_that_fails_knows_none(tmp_path: Path) -> None:
    other = alternative(tmp_path)
    model, usage = other.models["a"], Usage(input=3, source="provider")
    call = other.call("chat", Caller("acme", "test", "test"), model)
    call.wall_ns = 5
    assert other.cost(call, model.candidates[0], usage).picos == 26
    stranger = other.call("chat", Caller("globex", "test", "test"), model)
    assert other.cost(stranger, model.candidates[0], usage).picos is None


def test_an_operation_of_another_version_is_priced_too_and_what_stops_a_start_is_told(tmp_path: Path) -> None:
    other = alternative(tmp_path)
    model = other.models["a"]
    call = other.call("gone", Caller("acme", "test", "test"), model)
    with pytest.raises(StartupError, match="the table is gone"):
        other.cost(call, model.candidates[0], Usage())


def test_a_faulty_file_is_refused_with_all_its_faults(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        alternative(tmp_path, CONFIG.replace("plugin: anonymous", "plugin: nobody").replace("provider: echo", "x: y"))
    assert len(caught.value.faults) >= 2
