"""Many mixed calls: receipts, roll-ups, the usage API and the provider's own bill agree to the last picodollar.

`QLENS_MONEY_CALLS=100000 pytest tests/e2e/test_money.py -s --timeout 0` makes as many calls and prints the sums.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from attrs import define, field
from e2e.tills import BUCKETS, METERS, TIERS, UNITS, Bill, Till, Used, price_rows
from ledgers import Place, PostgresPlace, SqlitePlace

from qlens import Attempt, Receipt
from qlens.cli import main
from qlens.testing import Running, running
from qlens.testing.postgres import postgres_server
from qlens.testing.upstreams import serving
from qlens_plugins.cost.ledger import verifying
from qlens_plugins.cost.ledger.store import Database

CALLS = int(os.environ.get("QLENS_MONEY_CALLS", "1000"))
AT_ONCE = 40
"""Calls that run at the same time."""
BATCH = 2000
"""Calls whose receipts are kept in memory before they are added up."""
SEED = 20261128

CHAT, TRANSCRIPTIONS = "/v1/chat/completions", "/v1/audio/transcriptions"
PATHS = {
    "vectors": "/v1/embeddings",
    "response": "/v1/responses",
    "message": "/v1/messages",
    "images": "/v1/images/generations",
    "ranks": "/v1/rerank",
    "speech": "/v1/audio/speech",
    "transcript": TRANSCRIPTIONS,
}
"""By kind of call; the others are chats."""
TENANTS, PROJECTS = ("acme", "globex", "initech"), ("search", "chat")

CONFIG = """
pipeline:
  auth:
    - plugin: trusted_header
      proxies: ["127.0.0.1"]
      headers: {{tenant: x-tenant, subject: x-user, project: x-project}}
      default_roles: [member, viewer]
  cache: [{{plugin: exact}}]
  route: [{{plugin: retry, backoff_seconds: 0.001}}]
  cost:
    - plugin: prices
      catalogue: false
      table: {prices}
    - {{plugin: ledger, url: "{url}", flush_seconds: 0.05}}
providers:
  one: {{plugin: openai, base_url: "{one}", api_key: sk-example-one}}
  two: {{plugin: openai, base_url: "{two}", api_key: sk-example-two}}
models:
  small: {{max_output_tokens: 4096, targets: [{{provider: one, model: small}}]}}
  large: {{max_output_tokens: 4096, targets: [{{provider: one, model: large}}], fallbacks: [spare]}}
  spare: {{max_output_tokens: 4096, targets: [{{provider: two, model: spare}}]}}
  vectors: {{targets: [{{provider: one, model: vectors}}]}}
  unpriced: {{max_output_tokens: 4096, targets: [{{provider: two, model: unpriced}}]}}
  painter: {{targets: [{{provider: one, model: painter}}]}}
  judge: {{targets: [{{provider: two, model: judge}}]}}
  speaker: {{targets: [{{provider: one, model: speaker}}]}}
  writer: {{targets: [{{provider: two, model: writer}}]}}
"""


# --- the calls ---------------------------------------------------------------------------------

KINDS = (
    *("whole", "whole", "stream", "stream", "left", "breaks off", "vectors", "vectors", "cached", "fails once"),
    *("gone", "falls back", "busy", "refused", "unpriced", "faulty", "unknown"),
    *("response", "message", "images", "ranks", "speech", "transcript"),
)
MODELS = {
    "falls back": "large",
    "vectors": "vectors",
    "unpriced": "unpriced",
    "unknown": "?",
    "images": "painter",
    "ranks": "judge",
    "speech": "speaker",
    "transcript": "writer",
}
"""By kind, where it is not any that chats."""


@define(eq=False)
class Client:
    """Makes calls of all kinds, and knows what ought to become of them."""

    gateway: Running
    heard: dict[str, asyncio.Event]
    kinds: Counter[str] = field(factory=Counter)
    chance: random.Random = field(factory=lambda: random.Random(SEED))
    _number: int = 0

    @property
    def settled(self) -> int:
        """How many accounts they have."""
        return self.kinds.total() + self.kinds["cached"]

    @property
    def receipts(self) -> int:
        """How many of those are kept; refused calls are only counted."""
        return self.settled - self.kinds["faulty"] - self.kinds["unknown"]

    async def make(self, count: int) -> None:
        """Make some calls, many at once."""
        plans = [self._plan() for _ in range(count)]
        places = asyncio.Semaphore(AT_ONCE)

        async def one(plan: Callable[[], Any]) -> None:
            async with places:
                await plan()

        await asyncio.gather(*(one(plan) for plan in plans))

    def _plan(self) -> Callable[[], Any]:
        """What a call will be, decided in order: the calls are the same whichever ends first."""
        kind, chance = self.chance.choice(KINDS), self.chance
        self._number += 1
        self.kinds[kind] += 1
        tenant, project = chance.choice(TENANTS), chance.choice((None, *PROJECTS))
        headers = {"x-tenant": tenant, "x-user": "somebody", **({"x-project": project} if project else {})}
        model = "small" if kind == "cached" else chance.choice(("small", "large", "spare"))
        model = MODELS.get(kind, model)
        counts = [chance.randrange(1, 3000), chance.choice([0, chance.randrange(4000)]), chance.randrange(1, 500)]
        counts += [chance.choice([0, chance.randrange(900)])]
        if kind == "vectors":
            counts[1:] = [0, 0, 0]
        if model in UNITS:
            counts = [chance.randrange(1, 5), 0, 0, 0]
        tier = chance.choice(list(TIERS)) if model in {"large", "small"} else None
        text = json.dumps({"number": self._number, "say": [kind, model, tenant, counts, tier]})
        body = self._body(kind, model, text, counts[0])
        if kind in {"stream", "left", "breaks off"}:
            body |= {"stream": True, "stream_options": {"include_usage": chance.random() < 0.5}}
        if kind == "faulty":
            body["max_tokens"] = "many"
        return lambda: self._call(kind, headers, body)

    def _body(self, kind: str, model: str, text: str, count: int) -> dict[str, Any]:
        """What is asked, in the words of the operation."""
        bodies: dict[str, dict[str, Any]] = {
            "vectors": {"input": text},
            "response": {"input": text},
            "images": {"prompt": text, "n": count},
            "ranks": {"query": text, "documents": ["a document"]},
            "speech": {"input": text, "voice": "alloy"},
            "transcript": {"prompt": text},
        }
        if kind in bodies:
            return {"model": model, **bodies[kind]}
        chat: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": text}]}
        return {**chat, "max_tokens": 100, "stream": self.chance.random() < 0.5} if kind == "message" else chat

    async def _call(self, kind: str, headers: dict[str, str], body: dict[str, Any]) -> None:
        if kind == "left":
            await self._leave(headers, body)
            return
        if kind == "gone":
            heard = self.heard[body["messages"][0]["content"]] = asyncio.Event()
            asking = asyncio.create_task(self.gateway.post(CHAT, body, headers=headers))
            await heard.wait()
            asking.cancel()
            return
        path = PATHS.get(kind, CHAT)
        if path == TRANSCRIPTIONS:
            answer = await self.gateway.post_form(path, body, {"file": bytes(9000)}, headers=headers)
        else:
            answer = await self.gateway.post(path, body, headers=headers)
        expected = {"busy": 503, "refused": 400, "faulty": 400, "unknown": 404}.get(kind, 200)
        assert answer.status == expected, (kind, answer.text)
        if kind == "cached":
            again = await self.gateway.post(path, body, headers=headers)
            assert again.headers["x-qlens-cache"] == "hit"

    async def _leave(self, headers: dict[str, str], body: dict[str, Any]) -> None:
        """Hear what was used, and leave before the end."""
        async with (
            aiohttp.ClientSession() as client,
            client.post(self.gateway.url + CHAT, json=body, headers=headers) as answer,
        ):
            async for line in answer.content:
                if b"told" in line:
                    return


# --- the sums ----------------------------------------------------------------------------------


def picos_of(usd: str | Decimal) -> int:
    number = Decimal(usd).scaleb(12)
    assert number == int(number)
    return int(number)


MOST_OUTPUT = 4096
"""What the models may say."""
EXPECTED = {None, "client_closed", "invalid_request_error", "upstream_truncated", "upstream_unavailable"}
"""What attempts end with here."""


@define
class Settled:
    """What the receipts said, added up as they came."""

    picos: int = 0
    calls: int = 0
    unpriced: int = 0
    outcomes: Counter[str] = field(factory=Counter)
    errors: Counter[str | None] = field(factory=Counter)
    """What attempts ended with."""
    odd: list[str] = field(factory=list)
    """Calls with an attempt that ended in another way than any should."""
    tokens: Counter[str] = field(factory=Counter)
    """As the providers said, by bucket and meter."""
    guessed_tokens: int = 0
    """Of what is spoken, of which no provider counts them."""

    async def take(self, gateway: Running, bill: Bill, count: int) -> None:
        """Wait for so many receipts, rejected calls' included, compare each with the bill, and let go of them."""
        receipts = await gateway.settled(count, 60)
        assert len(receipts) == count
        of_text: dict[str, Receipt] = {}
        for receipt in receipts:
            self.outcomes[receipt.outcome] += 1
            if receipt.outcome == "rejected":
                continue
            self.calls += 1
            self.errors.update(attempt.error for attempt in receipt.attempts)
            if not EXPECTED.issuperset(attempt.error for attempt in receipt.attempts):
                self.odd.append(_told(receipt))
            self.picos += receipt.cost.picos or 0
            self.unpriced += receipt.cost.picos is None
            self.tokens.update({name: receipt.usage.meters.get(name, 0) for name in METERS})
            if receipt.operation == "speech":
                self.guessed_tokens += receipt.usage.total
            else:
                self.tokens.update({name: getattr(receipt.usage, name) for name in BUCKETS})
            for attempt in receipt.attempts:
                if attempt.billed and attempt.status is None:
                    self._goes_on(bill, receipt, attempt)
                elif attempt.billed:
                    served = bill.unclaimed.pop(attempt.upstream_id or "", None)
                    assert served is not None, f"nothing was charged for this, or twice: {_told(receipt)}"
                    of_text[served.text] = receipt
        lost = [f"{served}, of {_told(of_text.get(served.text))}" for served in bill.unclaimed.values()]
        assert lost == [], f"charged, and no receipt has it; attempts that went wrong: {self.odd or 'none'}"
        receipts.clear()

    @staticmethod
    def _goes_on(bill: Bill, receipt: Receipt, attempt: Attempt) -> None:
        """Let a provider bill the most for what its client did not wait for."""
        used, asked = attempt.usage, receipt.model
        assert used is not None
        assert asked is not None
        assert (receipt.outcome, used.source, used.output) == ("abandoned", "estimated", MOST_OUTPUT), _told(receipt)
        assert used.input > 0
        bill.charge(attempt.target.model, asked, receipt.caller.tenant, Used((used.input, 0, used.output, 0)))


def _told(receipt: Receipt | None) -> str:
    """A call with all its attempts, to find out from a failure what has happened."""
    if receipt is None:
        return "no call that was answered"
    names = ("n", "error", "status", "started", "ended", "billed", "upstream_id")
    attempts = [{name: getattr(attempt, name) for name in names} for attempt in receipt.attempts]
    return f"{receipt.operation} {receipt.id} {receipt.outcome} {receipt.error}, attempts {attempts}"


ROLLUPS = ("usage_hours", "usage_days", "usage_coarse_days")


def in_ledger(database: Database) -> dict[str, tuple[int, int]]:
    """Calls and picodollars by the rows themselves and by the roll-ups, which agree in all else as well."""
    assert verifying.verify(database).told == []
    rows = database.rows("SELECT coalesce(cost_picos, 0) FROM receipts")
    found = {"receipts": (len(rows), sum(int(cost) for (cost,) in rows))}
    for name in ROLLUPS:
        columns = ", ".join(database.dialect.rolled(["cost"]))
        row = database.one(f"SELECT sum(calls), {columns} FROM {name}")
        assert row is not None
        found[name] = int(row[0]), database.dialect.whole(row[1:])[0]
    return found


async def asked(gateway: Running, path: str) -> Any:
    answer = await gateway.get(path, headers={"x-tenant": "boss", "x-user": "boss"})
    assert answer.status == 200, answer.text
    return json.loads(answer.body, parse_float=Decimal)


async def costs(gateway: Running, by: str) -> Counter[str]:
    """OpenAI's costs of the days around now, by one dimension."""
    start = int(time.time()) - 2 * 86_400
    found: Counter[str] = Counter()
    for bucket in (await asked(gateway, f"/v1/organization/costs?start_time={start}&limit=5&group_by={by}"))["data"]:
        for result in bucket["results"]:
            if result["amount"] is not None:
                found[result[by]] += picos_of(result["amount"]["value"])
    return found


async def in_analytics(gateway: Running) -> dict[str, int]:
    """The cost of all, as different parts of the usage API have it."""
    by_model = (await asked(gateway, "/v1/usage/summary?group_by=model"))["data"]
    total = (await asked(gateway, "/v1/usage/summary"))["total"]
    export = await gateway.get("/v1/usage/export?format=jsonl", headers={"x-tenant": "boss", "x-user": "boss"})
    lines = [json.loads(line) for line in export.body.splitlines()]
    return {
        "costs by model": sum((await costs(gateway, "line_item")).values()),
        "costs by project": sum((await costs(gateway, "project_id")).values()),
        "summary": picos_of(total["cost_usd"]),
        "summary by model": sum(picos_of(row["cost_usd"]) for row in by_model if row["cost_usd"] is not None),
        "export": sum(picos_of(line["cost_usd"]) for line in lines if line["cost_usd"] is not None),
    }


def openai_export(bill: Bill) -> str:
    """The bill as OpenAI would export it, all on one day."""
    results = ", ".join(
        f'{{"amount": {{"value": {Decimal(picos).scaleb(-12):f}, "currency": "usd"}}, "line_item": "{model}, input"}}'
        for model, picos in bill.by(0).items()
    )
    return f'{{"object": "page", "data": [{{"start_time": {int(time.time())}, "results": [{results}]}}]}}'


@pytest.fixture(params=["sqlite", "postgres"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    if request.param == "sqlite":
        yield SqlitePlace(tmp_path / "money.db")
        return
    with postgres_server() as server:
        yield PostgresPlace(server, server.new_database())


async def test_receipts_roll_ups_usage_api_and_the_providers_bill_are_one_sum(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bill, settled, begun = Bill(), Settled(), time.monotonic()
    heard: dict[str, asyncio.Event] = {}
    async with serving(Till(bill=bill, heard=heard)) as one, serving(Till(bill=bill, heard=heard)) as two:
        text = CONFIG.format(prices=price_rows(), url=place.url, one=one.url, two=two.url)
        async with running(text) as gateway:
            client = Client(gateway, heard)
            for first in range(0, CALLS, BATCH):
                before, count = client.settled, min(BATCH, CALLS - first)
                await client.make(count)
                await settled.take(gateway, bill, client.settled - before)
            ledger = gateway.plugin("cost", "ledger")
            async with asyncio.timeout(60):
                while ledger.writer.waiting:
                    await asyncio.sleep(0.02)
            stored = await asyncio.to_thread(ledger.writer.store.reading(600).run, in_ledger)
            analytics = await in_analytics(gateway)
            by_model, by_project = await costs(gateway, "line_item"), await costs(gateway, "project_id")
            totals = (await asked(gateway, "/v1/usage/summary"))["total"]
    owed = sum(bill.picos.values())
    with capsys.disabled():
        if CALLS > 10_000:
            _print(client, bill, settled, stored, analytics, time.monotonic() - begun)
    assert settled.picos == owed, settled.odd
    assert settled.calls == client.receipts
    assert +settled.tokens == +bill.tokens
    assert settled.outcomes["abandoned"] == client.kinds["left"] + client.kinds["gone"]
    assert settled.unpriced == client.kinds["unpriced"] == totals["unpriced_calls"]
    assert stored == dict.fromkeys(("receipts", *ROLLUPS), (client.receipts, owed))
    assert analytics == dict.fromkeys(analytics, owed)
    assert totals["total_tokens"] == sum(bill.tokens[name] for name in BUCKETS) + settled.guessed_tokens
    # Not only in all: by model, and by tenant, whose projects the API has apart.
    assert +by_model == bill.by(1)
    tenants: Counter[str] = Counter()
    for project, picos in by_project.items():
        tenants[project.partition("/")[0]] += picos
    assert tenants == bill.by(2)
    # And what an operator would do with the bill when it comes.
    (tmp_path / "qlens.yaml").write_text(text)
    (tmp_path / "costs.json").write_text(openai_export(bill))
    reconcile = ["--openai", str(tmp_path / "costs.json"), "--provider", "one", "--provider", "two", "--threshold", "0"]
    code = await asyncio.to_thread(main, ["reconcile", "-c", str(tmp_path / "qlens.yaml"), "--json", *reconcile])
    found = json.loads(capsys.readouterr().out)
    assert (code, found["total"]["drift_usd"], picos_of(found["total"]["bill_usd"])) == (0, "0", owed)
    what_if = ["what-if", "-c", str(tmp_path / "qlens.yaml"), "--config", str(tmp_path / "qlens.yaml"), "--json"]
    assert await asyncio.to_thread(main, what_if) == 0
    assert json.loads(capsys.readouterr().out)["total"]["calls"] == client.receipts


def _print(client: Client, bill: Bill, settled: Settled, stored: Any, analytics: Any, seconds: float) -> None:
    print(f"\n{CALLS:,} calls in {seconds:.0f} s: {dict(sorted(client.kinds.items()))}")
    print(f"outcomes {dict(sorted(settled.outcomes.items()))}, {settled.unpriced} without a price")
    print(f"errors of attempts {dict(settled.errors)}; odd ones: {settled.odd or 'none'}")
    print(f"{sum(bill.picos.values()):>20} picodollars on the providers' bill\n{settled.picos:>20} in receipts settled")
    for name, (calls, picos) in stored.items():
        print(f"{picos:>20} in the ledger's {name}, of {calls:,} calls")
    for name, picos in analytics.items():
        print(f"{picos:>20} from the usage API: {name}")
