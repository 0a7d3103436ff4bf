"""Reads the price file in the package litellm: JSON, nothing of the package is run."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Any

from qlens_plugins.cost.prices.quotes import Case, Key, Prices, Quotes
from qlens_plugins.cost.prices.rows import BUCKETS

NAME = "litellm"
DATA = "litellm/model_prices_and_context_window_backup.json"

_PROVIDERS = {
    "openai": "openai",
    "text-completion-openai": "openai",
    "azure": "azure_openai",
    "azure_text": "azure_openai",
    "anthropic": "anthropic",
    "bedrock": "bedrock",
    "bedrock_converse": "bedrock",
}
_FIELDS = {
    "input_cost_per_token": "input",
    "cache_read_input_token_cost": "cached_input",
    "cache_creation_input_token_cost": "cache_write_5m",
    "cache_creation_input_token_cost_above_1hr": "cache_write_1h",
    "output_cost_per_token": "output",
    "output_cost_per_image_token": "output",  # an answer of pictures has no other tokens; it stands later, to win
    "output_cost_per_reasoning_token": "reasoning",
    "input_cost_per_audio_token": "audio_in",
    "output_cost_per_audio_token": "audio_out",
    "input_cost_per_image_token": "image_tokens",
    "cache_read_input_image_token_cost": "cached_image_tokens",
    "input_cost_per_character": "characters",
    "input_cost_per_second": "seconds",
    "output_cost_per_image": "images",
    "input_cost_per_query": "queries",
}
_IN_MODE = {
    ("audio_speech", "output_cost_per_audio_token"): "output",  # an answer of speech has no other tokens
    ("embedding", "input_cost_per_query"): "requests",
}
"""What a field says for some kinds of models only."""
_TIERS = {"batches": "batch", "flex": "flex", "priority": "priority"}
_FIELD = re.compile(
    r"(?P<name>" + "|".join(sorted(_FIELDS, key=len, reverse=True)) + r")"
    r"(_above_(?P<thousands>\d+)k_tokens)?(_(?P<tier>" + "|".join(_TIERS) + r"))?"
)
_AWS_REGION = re.compile(r"[a-z]{2}(-gov)?-[a-z]+-\d")
_SIZED = re.compile(r"\d+-x-\d+/")


def read(text: str) -> Quotes:
    """The quotes in the text of the price file."""
    entries: dict[str, dict[str, Any]] = json.loads(text, parse_float=Decimal)
    sized = _by_size(entries)
    found = Quotes(NAME)
    # Azure's prices for global deployments stand under longer names than those it has for some region.
    for name, entry in sorted(entries.items(), key=lambda item: not item[0].startswith("azure/global")):
        key = _key(name, _PROVIDERS.get(entry.get("litellm_provider", ""), ""))
        if key is not None:
            found.add(key, _cases(entry, sized.get(key.model, set())))
    return found


def _by_size(entries: Mapping[str, Mapping[str, Any]]) -> dict[str, set[Any]]:
    """What a picture costs in each size and quality, of the models that have such prices."""
    found: dict[str, set[Any]] = {}
    for name, entry in entries.items():
        if _SIZED.search(name):
            found.setdefault(name.rpartition("/")[2], set()).add(entry.get("output_cost_per_image"))
    return found


def _key(name: str, provider: str) -> Key | None:
    parts = name.split("/")
    if provider in ("azure_openai", "bedrock") and parts[0] in ("azure", "bedrock"):
        parts = parts[1:]
    if parts[:-1] in (["global"], ["global-standard"]):
        parts = parts[1:]
    if not provider or not parts or len(parts) > 2:
        return None
    if len(parts) == 1:
        return Key(provider, parts[0])
    zone = provider == "azure_openai" and parts[0] in ("us", "eu")
    if zone or (provider == "bedrock" and _AWS_REGION.fullmatch(parts[0])):
        return Key(provider, parts[1], parts[0])
    return None


def _cases(entry: Mapping[str, Any], by_size: set[Any]) -> dict[Case, Prices]:
    cases: dict[Case, Prices] = {}
    mode = entry.get("mode", "")
    free = mode == "moderation"
    for case, name, usd in sorted(_told(entry), key=lambda told: list(_FIELDS).index(told[1])):
        meter = _IN_MODE.get((mode, name), _FIELDS[name])
        if meter == "images" and by_size - {usd}:
            continue  # what a picture costs goes by its size, which no usage tells
        if usd or free:  # elsewhere 0 says that nobody knows
            cases.setdefault(case, {})[meter] = usd.scaleb(6) if meter in BUCKETS else usd
    standard = cases.get(Case())
    if standard is None:
        return {}
    for case, prices in cases.items():
        if case.above and not case.tier:
            cases[case] = {**standard, **prices}
    return {case: prices for case, prices in cases.items() if not case.tier or _is_whole(prices, standard)}


def _is_whole(tier: Prices, standard: Prices) -> bool:
    """Whether a tier prices what is sent and what comes back: the rest would be at the standard price, and `exact`."""
    return all(name in tier for name in ("input", "output") if name in standard)


def _told(entry: Mapping[str, Any]) -> Iterator[tuple[Case, str, Decimal]]:
    for field, value in entry.items():
        if (said := _FIELD.fullmatch(field)) and isinstance(value, int | Decimal):
            above = int(said["thousands"] or 0) * 1000
            yield Case("", above, _TIERS.get(said["tier"] or "", "")), said["name"], Decimal(value)
