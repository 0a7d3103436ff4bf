"""From the name a client asks for to a model with its targets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from attrs import evolve, field, frozen

from qlens.call import Model, Target
from qlens.config import Config, ModelEntry, matches


@frozen
class Models(Mapping[str, Model]):
    """All models of a configuration by public name, wildcards under their pattern."""

    _models: Mapping[str, Model]
    _wildcards: tuple[Model, ...] = field(init=False)
    """Longest first."""

    @_wildcards.default
    def _sorted_wildcards(self) -> tuple[Model, ...]:
        wildcards = [model for name, model in self._models.items() if name.endswith("*")]
        return tuple(sorted(wildcards, key=lambda model: len(model.name), reverse=True))

    def resolve(self, name: str) -> Model | None:
        """The model that answers to a name: an exact one, or else the wildcard with the longest prefix.

        A wildcard's model keeps the pattern as its name; in its targets `*` has become what matched.
        """
        if name.endswith("*"):
            return None
        if (model := self._models.get(name)) is not None:
            return model
        # Nothing is remembered: clients may send endless names.
        wildcard = next((model for model in self._wildcards if matches(model.name, name)), None)
        return None if wildcard is None else _filled(wildcard, name[len(wildcard.name) - 1 :])

    def named(self, public_name: str) -> Model | None:
        """The model entry of exactly this name or pattern."""
        return self._models.get(public_name)

    def listed(self) -> tuple[Model, ...]:
        """The models that can be listed: all but wildcards."""
        return tuple(model for name, model in self._models.items() if not name.endswith("*"))

    def __getitem__(self, public_name: str) -> Model:
        return self._models[public_name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._models)

    def __len__(self) -> int:
        return len(self._models)


def models_of(config: Config, kinds: Mapping[str, str | None] | None = None) -> Models:
    """The models of a configuration, with the kinds of its providers by name."""
    return Models({name: _model(entry, kinds or {}) for name, entry in config.models.items()})


def _model(entry: ModelEntry, kinds: Mapping[str, str | None]) -> Model:
    targets = tuple(
        Target(
            provider=target.provider,
            model=target.model,
            public=entry.name,
            weight=target.weight,
            base_model=target.base_model,
            region=target.region,
            params=target.params,
            kind=kinds.get(target.provider),
        )
        for target in entry.targets
    )
    return Model(entry.name, targets, entry.fallbacks, entry.max_output_tokens, entry.max_n)


def _filled(wildcard: Model, matched: str) -> Model:
    return evolve(
        wildcard,
        candidates=tuple(
            evolve(target, model=target.model[:-1] + matched) if target.model.endswith("*") else target
            for target in wildcard.candidates
        ),
    )
