"""From the name a client asks for to a model with its targets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from attrs import evolve, field, frozen

from qlens.call import Model, Target
from qlens.config import Config, ModelEntry, matches

Upstream = frozenset[tuple[str, str]]
"""What targets lead to: providers, and what these call the model."""


@frozen
class Models(Mapping[str, Model]):
    """All models of a configuration by public name, wildcards under their pattern."""

    _models: Mapping[str, Model]
    _kinds: Mapping[str, str | None] = field(factory=dict)
    """Whose models each provider serves."""
    _exact: Mapping[str, Model] = field(init=False)
    """All but wildcards."""
    _wildcards: tuple[Model, ...] = field(init=False)
    """Longest first."""
    _reached: Mapping[str, Mapping[Upstream, tuple[str, Model]]] = field(init=False)
    """By wildcard, the models without one whose targets its own can become, each with a name that makes them so."""

    @_exact.default
    def _without_wildcards(self) -> Mapping[str, Model]:
        return {name: model for name, model in self._models.items() if not name.endswith("*")}

    @_wildcards.default
    def _sorted_wildcards(self) -> tuple[Model, ...]:
        wildcards = [model for name, model in self._models.items() if name.endswith("*")]
        return tuple(sorted(wildcards, key=lambda model: len(model.name), reverse=True))

    @_reached.default
    def _reached_by_wildcards(self) -> Mapping[str, Mapping[Upstream, tuple[str, Model]]]:
        exact = {_upstream(model.candidates): model for model in reversed(self.listed())}
        return {
            wildcard.name: {
                upstream: (wildcard.name[:-1] + matched, model)
                for upstream, model in exact.items()
                if (matched := _filling(wildcard.candidates, upstream)) is not None
            }
            for wildcard in self._wildcards
        }

    def resolve(self, name: str) -> Model | None:
        """The model that answers to a name: an exact one, or else the wildcard with the longest prefix.

        A wildcard's model keeps the pattern as its name; in its targets `*` has become what matched. Where these are
        those of a model without a wildcard, it counts as that.
        """
        if (model := self._exact.get(name)) is not None:
            return model
        if name.endswith("*"):
            return None
        # Nothing is remembered: clients may send endless names.
        wildcard = next((model for model in self._wildcards if matches(model.name, name)), None)
        if wildcard is None:
            return None
        candidates = _filled(wildcard.candidates, name[len(wildcard.name) - 1 :])
        reached = self._reached[wildcard.name]
        found = reached.get(_upstream(candidates)) if reached else None
        names = wildcard.names if found is None else (*found[1].names, *wildcard.names)
        return evolve(wildcard, candidates=candidates, names=names)

    def named(self, public_name: str) -> Model | None:
        """The model entry of exactly this name or pattern."""
        return self._models.get(public_name)

    def called(self, provider: str, said: str, asked: str = "") -> Target | None:
        """The target of a provider whose model the provider calls so; of several, the one that was asked for."""
        found = [each for model in self._models.values() for each in model.candidates if each.provider == provider]
        return _called(sorted(found, key=lambda each: each.model != asked), said)

    def billed(self, provider: str, said: str, asked: str) -> Target | None:
        """Whose price a call has that no target was chosen for, by the names of its model in the answer and in the
        request; None when neither names one.
        """
        if not (name := said or asked):
            return None
        return self.called(provider, name, asked) or Target(provider, name, "", kind=self._kinds.get(provider))

    def reached(self, public_name: str) -> Iterable[tuple[str, Model]]:
        """Names behind a wildcard by which calls count as another model, each with that model."""
        return self._reached.get(public_name, {}).values()

    def listed(self) -> tuple[Model, ...]:
        """The models that can be listed: all but wildcards."""
        return tuple(self._exact.values())

    def __getitem__(self, public_name: str) -> Model:
        return self._models[public_name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._models)

    def __len__(self) -> int:
        return len(self._models)


def models_of(config: Config, kinds: Mapping[str, str | None] | None = None) -> Models:
    """The models of a configuration, with the kinds of its providers by name."""
    kinds = kinds or {}
    models = {name: _model(entry, kinds) for name, entry in config.models.items()}
    alike: dict[Upstream, tuple[str, ...]] = {}
    for name, model in models.items():
        upstream = _upstream(model.candidates)
        alike[upstream] = (*alike.get(upstream, ()), name)
    return Models({name: evolve(each, names=alike[_upstream(each.candidates)]) for name, each in models.items()}, kinds)


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


def _called(targets: Iterable[Target], said: str) -> Target | None:
    """The target whose model a provider calls so: by its name, by that of a snapshot of it, or behind a wildcard."""
    targets = tuple(targets)
    known = [each for each in targets if not each.model.endswith("*")]
    for each in known:
        if said in {each.model, each.base_model}:
            return each
    for each in known:
        if any(name and said.startswith(f"{name}-20") for name in (each.model, each.base_model)):
            return each
    for each in targets:
        if each.model.endswith("*") and said.startswith(each.model[:-1]):
            return evolve(each, model=said)
    return None


def _filled(targets: Iterable[Target], matched: str) -> tuple[Target, ...]:
    return tuple(
        evolve(target, model=target.model[:-1] + matched) if target.model.endswith("*") else target
        for target in targets
    )


def _upstream(targets: Iterable[Target]) -> Upstream:
    # Deployments are found whatever their case, and nobody means two models by two spellings of one name.
    return frozenset((target.provider, target.model.strip().casefold()) for target in targets)


def _filling(targets: Iterable[Target], upstream: Upstream) -> str | None:
    """The text that makes a wildcard's targets these; None: there is none."""
    star = next((target for target in targets if target.model.endswith("*")), None)
    if star is None:
        return None
    texts = (model[len(star.model) - 1 :] for provider, model in upstream if provider == star.provider)
    return next((text for text in texts if text and _upstream(_filled(targets, text)) == upstream), None)
