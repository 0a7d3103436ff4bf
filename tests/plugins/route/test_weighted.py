"""The plugin `weighted`."""

from __future__ import annotations

from collections import Counter

import pytest

from qlens import Model, StartupError, Target
from qlens.testing import check_plugin, running
from qlens_plugins.route.weighted import Weighted, WeightedConfig

CALL = {"model": "small", "messages": [{"role": "user", "content": "hello"}]}


def config(settings: str = "", first: str = "") -> str:
    return f"""
pipeline: {{auth: [{{plugin: anonymous}}], route: [{{plugin: weighted{settings}}}], cost: []}}
providers: {{one: {{plugin: echo}}, two: {{plugin: echo}}}}
models:
  small:
    max_output_tokens: 100
    targets:
      - {{provider: one, model: a, weight: 3{first}}}
      - {{provider: two, model: b, weight: 1}}
"""


def model(*weights: int) -> Model:
    return Model("small", tuple(Target(f"p{place}", "m", "small", weight) for place, weight in enumerate(weights)))


async def orders(plugin: Weighted, of: Model, count: int) -> list[tuple[str, ...]]:
    return [tuple(target.provider for target in await plugin.choose(of)) for _ in range(count)]


def weighted(seed: int | None = 7) -> Weighted:
    return Weighted(WeightedConfig(seed=seed), "weighted")


def test_it_keeps_the_contract_of_its_stage() -> None:
    check_plugin("route", Weighted)


async def test_calls_are_spread_by_weight() -> None:
    async with running(config(", seed: 1")) as gateway:
        answers = [await gateway.post("/v1/chat/completions", CALL) for _ in range(200)]
        counts = Counter(answer.headers["x-qlens-provider"] for answer in answers)
        assert 130 <= counts["one"] <= 170


async def test_a_failed_target_is_followed_by_the_others() -> None:
    async with running(config(", seed: 1", first=", params: {fail_status: 503}")) as gateway:
        for _ in range(20):
            answer = await gateway.post("/v1/chat/completions", CALL)
            assert (answer.status, answer.headers["x-qlens-provider"]) == (200, "two")


async def test_every_target_comes_exactly_once() -> None:
    for order in await orders(weighted(), model(5, 1, 0, 3), 50):
        assert sorted(order) == ["p0", "p1", "p2", "p3"]


async def test_the_second_choice_is_drawn_by_weight_among_those_that_are_left() -> None:
    seen = await orders(weighted(), model(60, 30, 10), 6000)
    first = Counter(order[0] for order in seen)
    assert first["p0"] == pytest.approx(3600, rel=0.1)
    assert first["p2"] == pytest.approx(600, rel=0.2)
    second = Counter(order[1] for order in seen if order[0] == "p0")
    assert second["p1"] / second["p2"] == pytest.approx(3, rel=0.2)


async def test_weight_0_comes_after_all_others_as_listed() -> None:
    for order in await orders(weighted(), model(0, 1, 0, 1), 50):
        assert order[2:] == ("p0", "p2")
    assert await orders(weighted(), model(0, 0), 1) == [("p0", "p1")]


async def test_a_seed_repeats_the_draws_and_without_one_they_differ() -> None:
    even = model(1, 1, 1, 1)
    assert await orders(weighted(7), even, 50) == await orders(weighted(7), even, 50)
    assert await orders(weighted(None), even, 50) != await orders(weighted(None), even, 50)


async def test_a_seed_that_is_no_number_stops_the_start() -> None:
    with pytest.raises(StartupError, match="seed"):
        async with running(config(", seed: soon")):
            pass
