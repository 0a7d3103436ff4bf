"""Builds the catalogue from the price lists in two packages; only their files are read."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from decimal import Decimal
from importlib.metadata import Distribution, distributions
from pathlib import Path

from attrs import frozen

from qlens import StartupError
from qlens_plugins.cost.prices import genai_prices, litellm_prices
from qlens_plugins.cost.prices.quotes import Case, Key, Prices, Quote, Quotes
from qlens_plugins.cost.prices.rows import BUCKETS

RULE = (
    "genai-prices wins where both name a model. What it leaves open (a bucket, a service tier, long prompts) is taken "
    "from litellm only when both have the same price for input and output. litellm alone prices the rest."
)


@frozen
class Source:
    """A package with a price list."""

    package: str
    data: str
    """Its file, below the folder where packages are installed."""
    read: Callable[[str], Quotes]
    url: str
    licence: str = "MIT"


SOURCES = (
    Source(genai_prices.NAME, genai_prices.DATA, genai_prices.read, "https://github.com/pydantic/genai-prices"),
    Source(litellm_prices.NAME, litellm_prices.DATA, litellm_prices.read, "https://github.com/BerriAI/litellm"),
)


@frozen
class Built:
    """A catalogue, and what its makers should look at."""

    text: str
    models: int
    conflicts: tuple[str, ...]
    refused: tuple[str, ...]


def build(date: str, packages: Path | None = None) -> Built:
    """The catalogue of the packages in a folder, or else of those installed; raises StartupError without any."""
    quotes, used = [], []
    for source in SOURCES:
        if (package := _package(source.package, packages)) is None:
            continue
        file = Path(str(package.locate_file(source.data)))
        try:
            quotes.append(source.read(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, SyntaxError) as error:
            raise StartupError(f"{source.package} {package.version}: cannot read {file}: {error}") from error
        licence = {"licence": source.licence, "url": source.url}
        used.append({"package": source.package, "version": package.version, **licence})
    if not quotes:
        raise StartupError(
            "neither genai-prices nor litellm is installed; put them into a folder, without what they depend on: "
            "pip install --no-deps --target prices-packages genai-prices litellm; then: --packages prices-packages"
        )
    conflicts = _merge(quotes)
    known = quotes[0].known
    _without_doubtful_regions(quotes)
    head = {"date": date, "currency": "USD", "sources": used, "rule": RULE}
    refused = tuple(line for said in quotes for line in said.refused)
    return Built(_written(head, known), len(known), tuple(conflicts), refused)


def _package(name: str, folder: Path | None) -> Distribution | None:
    found = distributions(name=name) if folder is None else distributions(name=name, path=[str(folder)])
    return next(iter(found), None)


# --- two lists become one ----------------------------------------------------------------------


def _merge(quotes: list[Quotes]) -> list[str]:
    """Add what the second list knows to the first; tells where they differ."""
    if len(quotes) < 2:
        return []
    first, second = quotes
    conflicts, added = [], {}
    for key, other in second.known.items():
        found = first.find(key)
        if found is None:
            added[key] = other
            continue
        name, mine = found
        if differing := [*_differing(mine.standard(), other.standard()), *_left_out(mine, other)]:
            conflicts.append(f"{key.provider}/{key.model}: {'; '.join(differing)}")
        if _agree(mine, other):
            first.known[name] = _completed(mine, other)
    first.known.update(added)
    return conflicts


def _differing(mine: Prices, other: Prices) -> list[str]:
    shared = [name for name in mine if name in other and mine[name] != other[name]]
    return [f"{name} {_text(mine[name])} by genai-prices, {_text(other[name])} by litellm" for name in shared]


def _agree(mine: Quote, other: Quote) -> bool:
    one, two = mine.standard(), other.standard()
    return all(one.get(name) == two.get(name) for name in ("input", "output"))


def _sizes_of(mine: Quote, other: Quote) -> set[int]:
    """Of the other's prompt sizes, those that only it has: none may be taken where the first list ever said some."""
    return other.sizes() - mine.sizes() if not any(case.above for case in mine.cases) else set()


def _left_out(mine: Quote, other: Quote) -> list[str]:
    """The prices for long prompts that are not taken over."""
    left = other.sizes() - mine.sizes() - (_sizes_of(mine, other) if _agree(mine, other) else set())
    return [f"prompts of more than {above} tokens have prices by litellm alone" for above in sorted(left)]


def _completed(mine: Quote, other: Quote) -> Quote:
    """A quote with what only the other says: buckets of the standard prices, prompt sizes, and tiers."""
    since, cases = mine.newest(), dict(mine.cases)
    for above in mine.sizes() & other.sizes():
        cases[Case(since, above)] = {**other.standard(above), **cases[Case(since, above)]}
    taken = _sizes_of(mine, other)
    for above in taken:
        cases[Case(since, above)] = {**cases[Case(since)], **other.standard(above)}
    if mine.sizes() | taken == other.sizes():
        for tier in other.tiers() - mine.tiers():
            for above in other.sizes(tier):
                cases[Case(since, above, tier)] = other.cases[Case(other.newest(), above, tier)]
    if cases == mine.cases:
        return mine
    return Quote(cases, tuple(dict.fromkeys((*mine.sources, *other.sources))))


def _without_doubtful_regions(quotes: list[Quotes]) -> None:
    """Take out a region's prices that say nothing new, and those of a list that is wrong about the general ones."""
    known, said = quotes[0].known, quotes[-1]
    for key in [key for key in known if key.region]:
        general, theirs = quotes[0].find(Key(key.provider, key.model)), said.find(Key(key.provider, key.model))
        if general is None:
            continue
        same = general[1].standard() == known[key].standard()
        if same or theirs is None or not _agree(general[1], theirs[1]):
            del known[key]


# --- writing -----------------------------------------------------------------------------------


def _written(head: Mapping[str, object], known: Mapping[Key, Quote]) -> str:
    """JSON with one line for all models of a provider that cost the same."""
    alike: dict[tuple[str, str, str], list[str]] = {}
    for key, quote in sorted(known.items()):
        said = json.dumps({"source": "+".join(quote.sources), "rows": list(_rows(quote))}, separators=(",", ":"))
        alike.setdefault((key.provider, key.region, said), []).append(key.model)
    lines = []
    for (provider, region, said), models in alike.items():
        named = {"provider": provider, **({"region": region} if region else {}), "models": models}
        lines.append(json.dumps(named, separators=(",", ":"))[:-1] + "," + said[1:])
    return json.dumps({**head, "entries": []}, indent=1)[: -len("[]\n}")] + "[\n" + ",\n".join(lines) + "\n]}\n"


def _rows(quote: Quote) -> Iterable[dict[str, object]]:
    for case in sorted(quote.cases):
        said: dict[str, object] = dict(_when(case))
        prices = {**quote.cases.get(Case(case.valid_from, case.above), {}), **quote.cases[case]}
        said.update({name: _text(prices[name]) for name in BUCKETS if name in prices})
        meters = {name: _text(usd) for name, usd in sorted(prices.items()) if name not in BUCKETS}
        yield {**said, **({"meters": meters} if meters else {})}


def _when(case: Case) -> Iterator[tuple[str, object]]:
    if case.valid_from:
        yield "valid_from", case.valid_from
    if case.above:
        yield "above_prompt_tokens", case.above
    if case.tier:
        yield "tier", case.tier


def _text(usd: Decimal) -> str:
    return f"{usd.normalize():f}" if usd else "0"
