"""Gateways in front of providers that keep things, for several tenants."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from openai import AsyncOpenAI

from qlens.testing import Running, running
from qlens.testing.objects import FakeKeeper

ACME, OTHER, NARROW = (f"sk-example-{name}-0123456789abcdef" for name in ("acme", "other", "narrow"))
"""Keys of three callers: two tenants, and one of the first who may use the model `first` alone."""
PROVIDER_KEY = "sk-example-provider-0123456789"


def keys() -> str:
    rows = [("one", ACME, "acme", ""), ("two", OTHER, "other", ""), ("three", NARROW, "acme", ", models: [first]")]
    hashes = [(name, hashlib.sha256(key.encode()).hexdigest(), tenant, more) for name, key, tenant, more in rows]
    return "keys:\n" + "".join(
        f"- {{id: {name}, hash: 'sha256:{digest}', tenant: {tenant}{more}}}\n" for name, digest, tenant, more in hashes
    )


def settings(
    first: FakeKeeper,
    second: FakeKeeper,
    *,
    server: str = "{}",
    limits: str = "[]",
    guards: str = "[]",
    more: str = "",
    key: str = PROVIDER_KEY,
    cache: str = "[]",
    cost: str = "[]",
) -> str:
    """Two providers, each behind a model of its own, and both behind the model `both`."""
    return f"""
server: {server}
pipeline:
  auth: [{{plugin: api_keys, file: keys.yaml}}]
  rate_limit: {limits}
  guard: {guards}
  cache: {cache}
  route: [{{plugin: weighted}}]
  cost: {cost}
providers:
  one: {{plugin: openai, base_url: "{first.url}", api_key: {key}{more}}}
  two: {{plugin: openai, base_url: "{second.url}", api_key: {key}}}
  echo: {{plugin: echo}}
models:
  first: {{max_output_tokens: 100, targets: [{{provider: one, model: upstream}}]}}
  second: {{max_output_tokens: 100, targets: [{{provider: two, model: upstream}}]}}
  both:
    max_output_tokens: 100
    targets: [{{provider: one, model: upstream}}, {{provider: two, model: upstream}}]
    fallbacks: [second]
  talk: {{max_output_tokens: 100, targets: [{{provider: echo, model: any}}]}}
"""


@asynccontextmanager
async def kept(text: str) -> AsyncIterator[Running]:
    """A gateway with these callers."""
    async with running(text, files={"keys.yaml": keys()}) as gateway:
        yield gateway


def sdk(gateway: Running, key: str = ACME) -> AsyncOpenAI:
    """OpenAI's own client, that asks once."""
    return AsyncOpenAI(base_url=gateway.url + "/v1", api_key=key, max_retries=0)
