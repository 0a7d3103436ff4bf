"""Reads what the package genai-prices knows: its data as text, nothing of it is run."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Mapping
from decimal import Decimal
from typing import Any

from qlens_plugins.cost.prices.quotes import Case, Key, Prices, Quotes, for_one
from qlens_plugins.cost.prices.rows import MILLION

NAME = "genai-prices"
DATA = "genai_prices/data.py"

_PROVIDERS = {"openai": "openai", "anthropic": "anthropic", "aws": "bedrock", "azure": "azure_openai"}
_TOKENS = {
    "input_mtok": "input",
    "cache_read_mtok": "cached_input",
    "cache_write_mtok": "cache_write_5m",
    "cache_write_5m_mtok": "cache_write_5m",
    "cache_write_1h_mtok": "cache_write_1h",
    "output_mtok": "output",
    "output_image_mtok": "output",  # an answer of pictures has no other tokens; it stands last, to win
    "output_reasoning_mtok": "reasoning",
    "input_audio_mtok": "audio_in",
    "output_audio_mtok": "audio_out",
}
_UNITS = {
    "input_image_mtok": ("image_tokens", MILLION),
    "cache_image_read_mtok": ("cached_image_tokens", MILLION),
    "input_mchars": ("characters", MILLION),
    "audio_hours": ("seconds", 3600),
    "input_audio_hours": ("seconds", 3600),
    "web_searches_kcount": ("web_searches", 1000),
    "requests_kcount": ("requests", 1000),
}
_DATED = re.compile(r"\^(?P<name>[\w.\\-]+)-(\[-@\])?\\d\{[48]\}(-\\d\{2\}-\\d\{2\})?\$")
"""A name and the date of a snapshot behind it."""
_FOREIGN = ("gpt-oss",)
"""Models that OpenAI gives away and does not serve."""

Node = dict[str, Any]


def read(text: str) -> Quotes:
    """The quotes in the source text of the package's data module."""
    found = Quotes(NAME)
    for provider in _providers(text):
        kind = _PROVIDERS.get(provider["id"])
        for model in provider["models"] if kind else ():
            assert kind is not None
            cases = _cases(model)
            for name in dict.fromkeys(_names(model, kind)):
                if name and not (kind == "openai" and name.startswith(_FOREIGN)):
                    found.add(Key(kind, name), cases)
    _lend(found)
    return found


_AT_AZURE = {"tts-1": "tts", "tts-1-hd": "tts-hd", "whisper-1": "whisper"}
"""What Azure calls models of OpenAI's; gpt-3.5 is gpt-35 there."""


def _lend(found: Quotes) -> None:
    """Azure's global deployments cost what OpenAI takes, where nothing else is said."""
    for key, quote in list(found.known.items()):
        if key.provider != "openai" or key.model.startswith("ft:"):
            continue
        for name in dict.fromkeys((key.model, _AT_AZURE.get(key.model, key.model.replace("gpt-3.5-", "gpt-35-")))):
            theirs = Key("azure_openai", name)
            if found.find(theirs) is None:
                # What a search costs there is another matter.
                found.add(theirs, {case: _without(prices, "web_searches") for case, prices in quote.cases.items()})


def _without(prices: Prices, meter: str) -> Prices:
    """The prices but for one."""
    return {name: usd for name, usd in prices.items() if name != meter}


def _cases(model: Node) -> dict[Case, Prices]:
    told = model.get("prices") or {}
    periods = told if isinstance(told, list) else [{"prices": told}]
    cases: dict[Case, Prices] = {}
    for period in periods:
        since = (period.get("constraint") or {}).get("start_date") or ""
        _fill(cases, since, "", period["prices"])
    for variant in model.get("price_variants") or ():
        tier = next(iter(variant["when"].values()))
        if tier != "default":
            _fill(cases, max(case.valid_from for case in cases), tier, variant["prices"])
    return cases


def _fill(cases: dict[Case, Prices], since: str, tier: str, told: Node) -> None:
    sizes = {step["start"] for price in told.values() if isinstance(price, dict) for step in price["tiers"]}
    if tier:  # whoever pays more for long prompts pays this tier's prices there
        sizes |= {case.above for case in cases if case.valid_from == since and case.above}
    for size in (0, *sorted(sizes)):
        cases[Case(since, size, tier)] = dict(_prices(told, size))


def _prices(told: Node, size: int) -> Iterator[tuple[str, Decimal]]:
    at = {name: _at(price, size) for name, price in told.items() if price is not None}
    for name, bucket in _TOKENS.items():
        if name in at:
            yield bucket, at[name]
    for name, (meter, units) in _UNITS.items():
        if name in at:
            yield meter, for_one(at[name], units)


def _at(price: Node | Decimal, size: int) -> Decimal:
    if isinstance(price, Decimal):
        return price
    found: Decimal = price["base"]
    for step in sorted(price["tiers"], key=lambda step: int(step["start"])):
        if step["start"] <= size:
            found = step["price"]
    return found


# --- names -------------------------------------------------------------------------------------


def _names(model: Node, kind: str) -> Iterator[str]:
    for way, text in _clauses(model["match"]):
        if kind == "bedrock":
            yield from _bedrock(model["id"], way, text)
        elif way == "Equals":
            yield text
        elif way == "StartsWith":
            yield f"{text}*"
        elif way == "Contains":
            yield model["id"]
        elif way == "Regex" and (dated := _DATED.fullmatch(text)):
            yield dated["name"].replace("\\", "") + "-20*"


def _bedrock(model_id: str, way: str, text: str) -> Iterator[str]:
    """Names on Bedrock; where no inference profile is named, those of the region itself and of the United States."""
    if "/" in text:
        return  # the end of an ARN, which is looked up by its own last part
    bare = model_id.removeprefix("global.").removeprefix("regional.")
    vendor = bare.partition(".")[0] + "."
    if vendor not in text:
        text = vendor + text
    end = "*" if way in ("Contains", "StartsWith") else ""
    yield text + end
    if way == "Contains" and text.startswith(vendor):
        yield f"us.{text}{end}"


def _clauses(clause: Node) -> Iterator[tuple[str, str]]:
    way = clause["_"].removeprefix("Clause")
    if way == "Or":
        for part in clause["or_"]:
            yield from _clauses(part)
    elif way != "And":
        yield way, next(value for name, value in clause.items() if name != "_")


# --- the data as text --------------------------------------------------------------------------


def _providers(text: str) -> Iterable[Node]:
    for statement in ast.parse(text).body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.value, ast.List):
            return [_value(element) for element in statement.value.elts if _wanted(element)]
    raise ValueError("there is no list of providers in it")


def _wanted(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and any(
        word.arg == "id" and isinstance(word.value, ast.Constant) and word.value.value in _PROVIDERS
        for word in node.keywords
    )


def _value(node: ast.AST) -> Any:
    """A literal or a constructor's call as plain data; a decimal from its text."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.List | ast.Tuple):
        return [_value(element) for element in node.elts]
    if isinstance(node, ast.Dict):
        return {_value(key): _value(value) for key, value in zip(node.keys, node.values, strict=True) if key}
    if isinstance(node, ast.Call):
        return _constructed(node)
    raise ValueError(f"line {getattr(node, 'lineno', '?')} is no data: {type(node).__name__}")


def _constructed(node: ast.Call) -> Any:
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "?")
    words = {word.arg: _value(word.value) for word in node.keywords if word.arg not in _IGNORED}
    given = [_value(argument) for argument in node.args]
    if name == "Decimal":
        return Decimal(given[0])
    if name == "date":
        return "-".join(f"{part:02}" for part in given)
    if name in ("ModelPrice", "TieredPrices", "Tier", "StartDateConstraint", "ConditionalPrice", "PriceVariant"):
        return words
    return {"_": name, **words}


_IGNORED: Mapping[str | None, None] = dict.fromkeys(("extractors", "description", "model_match", "provider_match"))
