"""What a model takes, by its name."""

from __future__ import annotations

import pytest

from qlens.bridges import claude
from qlens.testing.messages_rules import MODELS


@pytest.mark.parametrize(
    ("model", "thinking", "sampling", "one_sampler", "schema"),
    [
        ("claude-3-haiku-20240307", "none", True, False, "tool"),
        ("claude-3-5-sonnet-latest", "none", True, False, "tool"),
        ("claude-3-7-sonnet-20250219", "budget", True, False, "tool"),
        ("claude-sonnet-4-20250514", "budget", True, False, "tool"),
        ("claude-opus-4-1-20250805", "budget", True, True, "tool"),
        ("claude-haiku-4-5-20251001", "budget", True, True, "native"),
        ("claude-sonnet-4-6", "adaptive", True, True, "native"),
        ("claude-opus-4-7", "adaptive", False, True, "native"),
        ("claude-opus-5-5", "adaptive", False, True, "native"),
        ("claude-mythos-preview", "adaptive", False, True, "native"),
        ("vendor/claude-sonnet-4-5@20250929", "budget", True, True, "native"),
        ("my-model", "budget", True, False, "tool"),
    ],
)
def test_versions_differ(model: str, thinking: str, sampling: bool, one_sampler: bool, schema: str) -> None:
    found = claude.of(model)
    assert (found.thinking, found.sampling, found.one_sampler, found.schema) == (
        thinking,
        sampling,
        one_sampler,
        schema,
    )


def test_nothing_is_told_to_a_model_that_it_refuses() -> None:
    for name, card in MODELS.items():
        found = claude.of(name)
        assert card.sampling or not found.sampling
        assert found.one_sampler or not card.one_sampler
        assert card.schema or found.schema == "tool"
        assert found.thinking in {"none": {"none"}, "both": {"budget", "adaptive"}}.get(card.thinking, {card.thinking})
        assert found.most_output <= card.max_tokens
