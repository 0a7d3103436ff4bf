"""From the name a client asks for to a model."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest

from qlens.call import Model
from qlens.config import parse
from qlens.models import Models, models_of

TEXT = """\
providers: {p: {plugin: echo}, q: {plugin: echo}}
models:
  gpt-4o: {max_output_tokens: 10, max_n: 2, targets: [{provider: p, model: deployed, base_model: gpt-4o, weight: 2}]}
  openai/*: {targets: [{provider: p, model: "*"}, {provider: q, model: "ft:*"}, {provider: q, model: fixed}]}
  openai/gpt-*: {targets: [{provider: q, model: "g-*"}], fallbacks: [gpt-4o]}
  openai/gpt-4: {targets: [{provider: q, model: exact}]}
"""


@pytest.fixture
def models() -> Models:
    return models_of(parse(TEXT, folder=Path("/etc"), env={}))


def asked(models: Models, name: str) -> list[str]:
    model = models.resolve(name)
    return [target.model for target in model.candidates] if model else []


def test_an_exact_name_is_found(models: Models) -> None:
    model = models.resolve("gpt-4o")
    assert model is not None
    assert (model.name, model.max_output_tokens, model.max_n) == ("gpt-4o", 10, 2)
    (target,) = model.candidates
    assert (target.provider, target.model, target.public, target.weight, target.base_model) == (
        "p",
        "deployed",
        "gpt-4o",
        2,
        "gpt-4o",
    )


def test_an_exact_name_beats_a_wildcard_and_a_longer_prefix_a_shorter(models: Models) -> None:
    assert asked(models, "openai/gpt-4") == ["exact"]
    assert asked(models, "openai/gpt-5") == ["g-5"]
    assert asked(models, "openai/o1") == ["o1", "ft:o1", "fixed"]


def test_a_wildcard_keeps_its_pattern_as_name(models: Models) -> None:
    model = models.resolve("openai/gpt-5")
    assert model is not None
    assert model.name == "openai/gpt-*"
    assert {target.public for target in model.candidates} == {"openai/gpt-*"}
    assert model.fallbacks == {"any": ("gpt-4o",)}


def test_a_wildcard_covers_any_text_but_none(models: Models) -> None:
    assert asked(models, "openai/") == []
    assert asked(models, "openai/gpt-") == ["gpt-", "ft:gpt-", "fixed"]
    assert asked(models, "openai/a/b:c d") == ["a/b:c d", "ft:a/b:c d", "fixed"]


@pytest.mark.parametrize("name", ["", "gpt", "GPT-4o", "openai", "*", "openai/*", "openai/gpt-*", "openai/x*"])
def test_other_names_are_unknown(models: Models, name: str) -> None:
    assert models.resolve(name) is None


def test_a_bare_star_covers_everything() -> None:
    text = "providers: {p: {plugin: echo}}\nmodels: {'*': {targets: [{provider: p, model: '*'}]}}"
    models = models_of(parse(text, folder=Path("/etc"), env={}))
    assert asked(models, "x") == ["x"]
    assert models.resolve("") is None


def test_names_of_the_same_targets_count_as_the_first() -> None:
    text = """\
providers: {p: {plugin: echo}, q: {plugin: echo}}
models:
  one: {targets: [{provider: p, model: a}, {provider: q, model: b, weight: 0}]}
  some: {targets: [{provider: p, model: a}]}
  two: {targets: [{provider: q, model: B, region: eu, params: {user: x}}, {provider: p, model: a, base_model: b}]}
  other: {targets: [{provider: q, model: a}]}
  p/*: {targets: [{provider: p, model: "*"}]}
  again/*: {targets: [{provider: p, model: "*"}]}
  pair/*: {targets: [{provider: p, model: "*"}, {provider: q, model: b}]}
  always/*: {targets: [{provider: p, model: a}]}
"""
    models = models_of(parse(text, folder=Path("/etc"), env={}))
    assert {name: model.names for name, model in models.items()} == {
        "one": ("one", "two"),
        "some": ("some", "always/*"),
        "two": ("one", "two"),
        "other": ("other",),
        "p/*": ("p/*", "again/*"),
        "again/*": ("p/*", "again/*"),
        "pair/*": ("pair/*",),
        "always/*": ("some", "always/*"),
    }
    assert {name: model.counts_as for name, model in models.items() if model.counts_as != name} == {
        "two": "one",
        "again/*": "p/*",
        "always/*": "some",
    }

    def names(asked: str) -> tuple[str, ...]:
        model = models.resolve(asked)
        assert model is not None
        assert model.counts_as == model.names[0]
        return model.names

    assert names("p/a") == names("p/A") == names("again/a ") == ("some", "always/*", "p/*", "again/*")
    assert names("pair/a") == ("one", "two", "pair/*")
    assert names("always/any") == ("some", "always/*")
    assert names("p/b") == names("again/b") == ("p/*", "again/*")
    assert [*models.reached("p/*")] == [("p/a", models["some"])]
    assert [*models.reached("pair/*")] == [("pair/a", models["one"])]
    assert [*models.reached("two"), *models.reached("always/*"), *models.reached("gone")] == []


def test_a_pattern_means_a_model_by_any_of_its_names() -> None:
    model = Model("fast", (), names=("gpt-4o", "fast"))
    assert [model.fits(patterns) for patterns in (None, ("fast",), ("gpt-*",), ("slow", "x*"), ())] == [
        *(True, True, True, False, False)
    ]
    assert Model("alone", ()).names == ("alone",)


def test_wildcards_are_not_listed(models: Models) -> None:
    assert [model.name for model in models.listed()] == ["gpt-4o", "openai/gpt-4"]


def test_models_are_a_mapping_by_public_name(models: Models) -> None:
    assert list(models) == ["gpt-4o", "openai/*", "openai/gpt-*", "openai/gpt-4"]
    assert len(models) == 4
    assert models["openai/*"].name == "openai/*"
    assert "openai/o1" not in models
    with pytest.raises(KeyError):
        models["openai/o1"]


def test_an_entry_is_found_by_its_public_name_or_pattern(models: Models) -> None:
    assert models.named("openai/*") is models["openai/*"]
    assert models.named("openai/o1") is None


def test_endless_names_leave_no_memory_behind(models: Models) -> None:
    for number in range(100):
        models.resolve(f"openai/{number}")
    tracemalloc.start()
    try:
        for number in range(5_000):
            models.resolve(f"openai/{number:0100}")
        assert tracemalloc.get_traced_memory()[0] < 250_000
    finally:
        tracemalloc.stop()
