"""The catalogue: what is priced without a row, by which row, and how a new one is made."""

# ruff: noqa: E501  (excerpts of price lists, as they are)
from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path

import pytest
from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st

from qlens import NO_USAGE, Call, Cost, StartupError, Target, Usage
from qlens.cli import main
from qlens.config import convert
from qlens.config.yaml import load
from qlens.operations import OPERATIONS
from qlens.registry import drafted, register
from qlens.testing import Scripted, running, upstream
from qlens_plugins.cost.prices import Prices, PricesConfig
from qlens_plugins.cost.prices.book import Entry, Sheet
from qlens_plugins.cost.prices.catalogue import KINDS, Catalogue
from qlens_plugins.cost.prices.rows import BUCKETS, PriceRow, no_duplicates

CONFIG = Path(__file__).parents[3] / "config"
SHIPPED = Catalogue.read()
ROWS = tuple(SHIPPED.all())
NOW = 1_795_000_000 * 10**9
"""Some time in November 2026."""


def call_at(wall_ns: int = NOW, bound: Usage = NO_USAGE) -> Call:
    async def nothing() -> bytes:
        return b""

    return Call(
        id="c", operation=OPERATIONS[0], path="/", path_params={}, query={}, headers={}, peer=None, credential=None,
        started=0, wall_ns=wall_ns, deadline=0, reader=nothing, bound=bound,
    )  # fmt: skip


def prices(*rows: str, more: str = "") -> Prices:
    """The plugin, from rows as they stand in YAML."""
    text = more + "table:\n" + "".join(f"  - {row}\n" for row in rows) if rows else more or "strict: false\n"
    document = load(text, source="qlens.yaml", env={})
    assert not document.faults
    return Prices(convert(document.root, PricesConfig, "prices", folder=Path("/")), "prices")


def cost_of(plugin: Prices, target: Target, usage: Usage, wall_ns: int = NOW) -> Cost | None:
    return plugin.price(call_at(wall_ns), target, evolve(usage, source="provider"))


def row_used(plugin: Prices, target: Target, wall_ns: int = NOW, tier: str | None = None) -> str | None:
    cost = cost_of(plugin, target, Usage(input=1, tier=tier), wall_ns)
    return cost.price_id if cost else None


def azure(base_model: str, region: str | None = None) -> Target:
    return Target("azure-eu", "some-deployment", "public", base_model=base_model, region=region, kind="azure_openai")


def bedrock(model: str, region: str | None = None) -> Target:
    return Target("aws", model, "public", region=region, kind="bedrock")


def openai(model: str, kind: str | None = "openai") -> Target:
    return Target("oa", model, "public", kind=kind)


def picos(plugin: Prices, target: Target, usage: Usage, wall_ns: int = NOW) -> int | None:
    cost = cost_of(plugin, target, usage, wall_ns)
    return cost.picos if cost else None


# --- what is priced without a row --------------------------------------------------------------


@pytest.mark.parametrize("target", [azure("gpt-4o-mini"), openai("gpt-4o-mini"), openai("gpt-4o-mini-2024-07-18")])
def test_800_in_and_100_out_on_gpt_4o_mini_are_180_million_picodollars(target: Target) -> None:
    cost = cost_of(prices(), target, Usage(input=800, output=100))
    assert cost is not None
    assert (cost.picos, cost.state) == (180_000_000, "exact")


@pytest.mark.parametrize(
    ("target", "each_in", "each_out"),
    [
        (openai("gpt-4o-2024-11-20"), 2_500_000, 10_000_000),
        (openai("gpt-4o-2024-05-13"), 5_000_000, 15_000_000),
        (openai("gpt-5.6-sol-2026-07-01"), 4_000_000, 20_000_000),
        (azure("gpt-4o-2024-11-20", "westeurope"), 2_500_000, 10_000_000),
        (azure("gpt-4o-2024-11-20", "eu"), 2_750_000, 11_000_000),
        (bedrock("global.anthropic.claude-sonnet-4-5-20250929-v1:0"), 3_000_000, 15_000_000),
        (bedrock("us.anthropic.claude-sonnet-4-5-20250929-v1:0"), 3_300_000, 16_500_000),
        (bedrock("eu.anthropic.claude-sonnet-4-5-20250929-v1:0"), 3_300_000, 16_500_000),
        (bedrock("apac.anthropic.claude-haiku-4-5-20251001-v1:0"), 1_100_000, 5_500_000),
        (bedrock("anthropic.claude-haiku-4-5-20251001-v1:0"), 1_100_000, 5_500_000),
        (
            bedrock("arn:aws:bedrock:us-east-1:123456789012:inference-profile/us.amazon.nova-micro-v1:0"),
            35_000,
            140_000,
        ),
        (bedrock("amazon.nova-pro-v1:0"), 800_000, 3_200_000),
        (bedrock("amazon.nova-pro-v1:0", "us-gov-west-1"), 960_000, 3_840_000),
        (Target("claude", "claude-haiku-4-5-20251001", "public", kind="anthropic"), 1_000_000, 5_000_000),
    ],
)
def test_names_variants_and_regions_find_their_prices(target: Target, each_in: int, each_out: int) -> None:
    assert picos(prices(), target, Usage(input=1)) == each_in
    assert picos(prices(), target, Usage(output=1)) == each_out


@pytest.mark.parametrize(
    "target",
    [
        openai("gpt-4o", kind=None),
        openai("gpt-4o", kind="echo"),
        openai("gpt-4o-mini-2031-01-01"),
        openai("gpt-4o-2031-01-01"),
        openai("us.amazon.nova-micro-v1:0"),
        bedrock("gpt-4o-mini"),
        bedrock("arn:aws:bedrock:us-east-1:123456789012:application-inference-profile/a1b2c3d4e5f6"),
        bedrock("xx.anthropic.claude-haiku-4-5-20251001-v1:0"),
        azure("our-own-gpt-4o"),
    ],
)
def test_what_the_catalogue_does_not_know_is_unpriced(target: Target) -> None:
    assert cost_of(prices(), target, Usage(input=1)) is None


def test_tiers_batch_and_long_prompts_have_their_own_prices() -> None:
    plugin = prices()
    assert picos(plugin, openai("gpt-4o"), Usage(input=1, tier="batch")) == 1_250_000
    assert picos(plugin, openai("gpt-4o"), Usage(input=1, tier="priority")) == 4_250_000
    assert picos(plugin, openai("o3"), Usage(input=1, tier="flex")) == 1_000_000
    assert row_used(plugin, openai("gpt-4o"), tier="priority") == f"openai/gpt-4o@{SHIPPED.date}:priority"
    haiku = Target("claude", "claude-haiku-5-5", "public", kind="anthropic")
    assert picos(plugin, haiku, Usage(input=100_000)) == 100_000 * 100_000
    assert picos(plugin, haiku, Usage(input=100_000, cached_input=1)) == 100_000 * 500_000 + 50_000
    assert picos(plugin, haiku, Usage(input=100_000, cached_input=1, tier="batch")) == 100_000 * 250_000 + 25_000
    assert row_used(plugin, openai("o3"), 0) == f"openai/o3@{SHIPPED.date}"
    assert picos(plugin, openai("o3"), Usage(input=1), 0) == 10_000_000
    assert row_used(plugin, openai("o3")) == "openai/o3@2025-06-10"
    assert picos(plugin, openai("o3"), Usage(input=1)) == 2_000_000


@pytest.mark.parametrize(
    ("profile", "each_in", "each_cached", "each_out"),
    [
        ("global.", 6_000_000, 600_000, 22_500_000),
        *((profile, 6_600_000, 660_000, 24_750_000) for profile in ("us.", "eu.", "apac.", "jp.", "")),
    ],
)
def test_a_long_prompt_of_sonnet_costs_double_on_bedrock_too(
    profile: str, each_in: int, each_cached: int, each_out: int
) -> None:
    target = bedrock(f"{profile}anthropic.claude-sonnet-4-5-20250929-v1:0")
    cost = cost_of(prices(), target, Usage(input=200_000, cached_input=1, output=1000))
    assert cost is not None
    assert (cost.picos, cost.state) == (200_000 * each_in + each_cached + 1000 * each_out, "exact")
    assert picos(prices(), target, Usage(input=200_000)) == 200_000 * each_in // 2


@pytest.mark.parametrize("region", ["eu", "us"])
def test_a_tier_of_which_only_a_part_has_a_price_is_estimated(region: str) -> None:
    cost = cost_of(prices(), azure("gpt-4o-mini", region), Usage(input=1000, output=1000, tier="batch"))
    assert cost is not None
    assert (cost.picos, cost.state) == (1000 * (165_000 + 660_000), "estimated")


async def test_an_edit_costs_what_its_texts_and_its_images_do() -> None:
    """100 texts at 5, 500 images at 10 and 1000 of the answer at 40 USD per million: 45.5 thousandths."""
    told: dict[str, object] = {"input_tokens": 600, "output_tokens": 1000, "total_tokens": 1600}
    told |= {"input_tokens_details": {"text_tokens": 100, "image_tokens": 500}}
    async with upstream() as up:
        up.script(Scripted(body={"created": 1, "data": [{"b64_json": "aGk="}], "usage": told}))
        text = f"""
        pipeline: {{auth: [{{plugin: anonymous}}], cost: [{{plugin: prices}}]}}
        providers: {{azure: {{plugin: azure_openai, endpoint: "{up.url}", api_key: sk-example}}}}
        models: {{gpt-image-1: {{targets: [{{provider: azure, model: pictures, base_model: gpt-image-1}}]}}}}
        """
        async with running(text) as gateway:
            body = {"model": "gpt-image-1", "prompt": "a hat", "images": [{"image_url": "data:image/png;base64,aGk="}]}
            answer = await gateway.post("/v1/images/edits", body)
            assert answer.status == 200
            (receipt,) = await gateway.settled(1)
    assert receipt.usage.meters == {"image_tokens": 500, "output_images": 1}
    assert (receipt.usage.input, receipt.usage.output) == (100, 1000)
    assert (receipt.cost.picos, receipt.cost.state) == (45_500_000_000, "exact")


def test_every_model_of_the_production_configuration_is_priced_by_the_catalogue_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = (CONFIG / "production.yaml").read_text()
    for name in {part.partition("}")[0].partition(":")[0] for part in text.split("${")[1:]}:
        if "KEY" in name or "ENDPOINT" in name:
            monkeypatch.setenv(name, "https://example.openai.azure.com" if "ENDPOINT" in name else "sk-example-1234567")
    registration = register(drafted(CONFIG / "production.yaml"))
    plugin = prices()
    for model in registration.models.listed():
        for target in model.candidates:
            assert cost_of(plugin, target, Usage(input=1)) is not None, target
    behind = registration.models.resolve("openai/o4-mini")
    assert behind is not None
    assert row_used(plugin, behind.candidates[0]) == f"openai/o4-mini@{SHIPPED.date}"


# --- which row ---------------------------------------------------------------------------------


def test_a_row_of_yours_wins_over_the_catalogue_and_a_name_over_its_kind() -> None:
    plugin = prices(
        "{model: gpt-4o, provider: azure_openai, input: 2}",
        "{model: gpt-4o, provider: azure-eu, input: 3}",
        "{model: gpt-4o, provider: azure-eu, region: westeurope, input: 4}",
        "{model: gpt-4.1*, input: 1}",
    )
    other = evolve(azure("gpt-4o"), provider="azure-us")
    assert row_used(plugin, azure("gpt-4o", "westeurope")) == "azure-eu/gpt-4o[westeurope]"
    assert row_used(plugin, azure("gpt-4o", "northeurope")) == "azure-eu/gpt-4o"
    assert row_used(plugin, other) == "azure_openai/gpt-4o"
    assert row_used(plugin, openai("gpt-4o")) == f"openai/gpt-4o@{SHIPPED.date}"
    assert row_used(plugin, openai("gpt-4o", kind=None)) is None
    assert row_used(plugin, openai("gpt-4.1-mini")) == "*/gpt-4.1*"


def test_without_the_catalogue_only_rows_count() -> None:
    assert cost_of(prices(more="catalogue: false\n"), azure("gpt-4o"), Usage(input=1)) is None


DAY = 86_400 * 10**9
NEW_YEAR = 1_798_761_600 * 10**9
"""2027-01-01."""


def test_prices_change_at_midnight_for_calls_that_begin_then() -> None:
    plugin = prices(
        "{model: gpt-4o, provider: azure_openai, valid_from: 2026-12-31, input: 2, output: 8}",
        "{model: gpt-4o, provider: azure_openai, valid_from: 2026-12-31, tier: flex, input: 1, output: 4}",
        "{model: gpt-4o, provider: azure_openai, valid_from: 2027-01-01, input: 1, output: 4}",
    )
    target = azure("gpt-4o")
    for _ in range(2):  # what is remembered changes with time too
        assert picos(plugin, target, Usage(input=1), NEW_YEAR) == 1_000_000
        assert picos(plugin, target, Usage(input=1), NEW_YEAR - 1) == 2_000_000
        assert picos(plugin, target, Usage(input=1), NEW_YEAR - DAY - 1) == 2_500_000  # the catalogue's
    assert row_used(plugin, target, NEW_YEAR - 1, tier="flex") == "azure_openai/gpt-4o@2026-12-31:flex"
    late = cost_of(plugin, target, Usage(input=1, tier="flex"), NEW_YEAR)
    assert late is not None
    assert (late.picos, late.state) == (1_000_000, "estimated")  # the new list has no such tier


@pytest.mark.parametrize("text", ["2027-1-1", "tomorrow", "2027-02-30", "2027-W01-1", "2027-01-01T00:00"])
def test_a_day_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(StartupError, match=f"{text} is no date"):
        prices(f"{{model: m, input: 1, valid_from: {text}}}")


def test_two_rows_for_one_tier_and_day_are_refused_and_named() -> None:
    row = "{model: m, input: 1, tier: flex, valid_from: 2027-01-01}"
    with pytest.raises(StartupError, match="2 rows for model m of provider \\* at tier flex from 2027-01-01; leave"):
        prices(row, row)
    assert len(prices(row, "{model: m, input: 1, tier: flex}", "{model: m, input: 1}").book.rows) == 3


def test_a_row_for_one_tier_says_nothing_of_the_others() -> None:
    plugin = prices("{model: m, tier: flex, input: 1}")
    assert row_used(plugin, openai("m"), tier="flex") == "*/m:flex"
    assert row_used(plugin, openai("m")) is None


# --- exactness ---------------------------------------------------------------------------------

sheets = [
    Sheet.of(row for row in rows if (row.valid_from or "") == day)
    for rows in {
        tuple(SHIPPED.find(row.provider, row.model.replace("*", "x"), row.region))
        for row in ROWS
        if row.tier is None and not row.above_prompt_tokens
    }
    for day in {row.valid_from or "" for row in rows}
]
counts = st.integers(min_value=0, max_value=10**6)
used = st.fixed_dictionaries(dict.fromkeys(BUCKETS, counts))
tiers = st.sampled_from([None, "default", "batch", "flex", "priority", "fast", "scale"])


def test_no_row_stands_twice_and_every_kind_is_there() -> None:
    no_duplicates(ROWS)
    assert {row.provider for row in ROWS} == KINDS
    assert SHIPPED.sources == ("genai-prices 0.2.3", "litellm 1.110.2")


@given(st.sampled_from(ROWS), used, tiers)
def test_every_row_prices_any_usage_to_whole_picodollars(row: PriceRow, use: dict[str, int], tier: str | None) -> None:
    meters = dict.fromkeys(row.meters, 3)
    usage = Usage(**use, meters=meters, tier=tier, source="provider")
    plain = evolve(row, tier=None)
    cost = Sheet((Entry.of([plain]),)).cost(evolve(usage, input=use["input"] + row.above_prompt_tokens))
    if cost is None:
        assert any(getattr(row, name) is None for name in BUCKETS)
        return
    assert type(cost.picos) is int
    assert cost.picos == sum(quantity * each for _, quantity, each in cost.lines)
    for name, quantity, each in cost.lines:
        if name in BUCKETS and (said := getattr(row, name)) is not None:
            assert Decimal(each) == said * 10**6
        assert quantity == (3 if name in meters else use[name] + row.above_prompt_tokens * (name == "input"))


@given(st.sampled_from(sheets), used, tiers)
def test_no_call_costs_more_than_its_bound(sheet: Sheet, use: dict[str, int], tier: str | None) -> None:
    usage = Usage(**use, tier=tier, source="provider")  # type: ignore[arg-type]
    bound = sheet.bound(Usage(input=usage.prompt, output=usage.completion, source="estimated"))
    cost = sheet.cost(usage)
    if cost is not None and bound is not None:
        assert cost.picos is not None
        assert bound.picos is not None
        assert cost.picos <= bound.picos


# --- over HTTP and on the command line ---------------------------------------------------------

FRESH = """
pipeline: {auth: [{plugin: anonymous}], cost: [{plugin: prices%s}]}
providers:
  azure: {plugin: azure_openai, endpoint: "https://example.openai.azure.com", api_key: sk-example-1, api_version: 2024-10-21}
  oa: {plugin: openai, api_key: sk-example-2}
  vllm: {plugin: openai, base_url: "http://127.0.0.1:9/v1"}
  lookalike: {plugin: openai, base_url: "https://api.openai.com.example.com/v1"}
models:
  a: {max_output_tokens: 100, targets: [{provider: azure, model: prod, base_model: gpt-4o}]}
  b: {max_output_tokens: 100, targets: [{provider: oa, model: gpt-4o}]}
  c: {max_output_tokens: 100, targets: [{provider: vllm, model: gpt-4o}]}
  d: {max_output_tokens: 100, targets: [{provider: lookalike, model: gpt-4o}]}
"""


def test_a_fresh_configuration_is_priced_and_a_server_of_ones_own_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "qlens.yaml").write_text(FRESH % "")
    assert main(["prices", "--json", "-c", str(tmp_path / "qlens.yaml")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["catalogue"]["date"] == SHIPPED.date
    assert {target["model"]: target["rows"] for target in found["targets"]} == {
        "a": [f"azure_openai/gpt-4o@{SHIPPED.date}"],
        "b": [f"openai/gpt-4o@{SHIPPED.date}"],
        "c": None,
        "d": None,
    }
    (tmp_path / "body.json").write_text('{"model": "a", "messages": [{"role": "user", "content": "hi"}]}')
    assert main(["explain", str(tmp_path / "qlens.yaml"), str(tmp_path / "body.json")]) == 0
    assert f"row azure_openai/gpt-4o@{SHIPPED.date}" in capsys.readouterr().out


async def test_a_strict_gateway_refuses_what_neither_table_nor_catalogue_prices() -> None:
    async with running(FRESH % ", strict: true") as gateway:
        answer = await gateway.post(
            "/v1/chat/completions", {"model": "c", "messages": [{"role": "user", "content": "hi"}]}
        )
        assert answer.status == 400
        assert answer.json()["error"]["code"] == "model_unpriced"
        assert f"catalogue of {SHIPPED.date}" in gateway.plugin("cost", "prices").health().detail


async def test_a_row_for_a_provider_that_is_not_there_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "prices.yaml").write_text("table: [{model: m, provider: elsewhere, input: 1}]\n")
    names = ("azrue", "azure", "vllm", "openai", "bedrock", '"*"')
    rows = ", ".join(f"{{model: m, provider: {name}, input: 1}}" for name in names)
    async with running(FRESH % f", file: {tmp_path / 'prices.yaml'}, table: [{rows}]"):
        told = [record.getMessage() for record in caplog.records if "row for the provider" in record.getMessage()]
    assert len(told) == 1
    assert "'azrue', neither under `providers:` nor a kind of provider" in told[0]


# --- how a catalogue is made -------------------------------------------------------------------

GENAI = """
from .types import *
providers: list[Provider] = [
    Provider(id='avian', models=[ModelInfo(id='x', match=ClauseEquals(equals='x'), prices=unknown_name)]),
    Provider(id='azure', models=[
        ModelInfo(id='o3-mini', match=ClauseOr(or_=[ClauseEquals(equals='o3-mini')]),
                  prices=ModelPrice(input_mtok=Decimal('1.1'), cache_read_mtok=Decimal('0.55'), output_mtok=Decimal('4.4'))),
    ]),
    Provider(id='openai', extractors=[UsageExtractor(root='usage', mappings=[])], models=[
        ModelInfo(id='gpt-4o-mini', match=ClauseOr(or_=[ClauseEquals(equals='gpt-4o-mini'), ClauseEquals(equals='gpt-4o-mini-2024-07-18')]),
                  prices=ModelPrice(input_mtok=Decimal('0.15'), cache_read_mtok=Decimal('0.075'), output_mtok=Decimal('0.6')),
                  price_variants=[PriceVariant(when={'service_tier': 'default'}, prices=ModelPrice()),
                                  PriceVariant(when={'service_tier': 'priority'}, prices=ModelPrice(input_mtok=Decimal('0.25'), output_mtok=Decimal('1')),
                                               constraint=StartDateConstraint(start_date=date(2026, 10, 12)))]),
        ModelInfo(id='o3', match=ClauseEquals(equals='o3'),
                  prices=[ConditionalPrice(prices=ModelPrice(input_mtok=Decimal('10'), output_mtok=Decimal('40'))),
                          ConditionalPrice(constraint=StartDateConstraint(start_date=date(2025, 6, 10)),
                                           prices=ModelPrice(input_mtok=Decimal('2'), output_mtok=Decimal('8')))]),
        ModelInfo(id='gpt-6-sol', match=ClauseOr(or_=[ClauseEquals(equals='gpt-6-sol'), ClauseRegex(regex='^gpt-6-sol-\\\\d{4}-\\\\d{2}-\\\\d{2}$')]),
                  prices=ModelPrice(input_mtok=TieredPrices(base=Decimal('2'), tiers=[Tier(start=272000, price=Decimal('4'))]), output_mtok=Decimal('10'))),
        ModelInfo(id='whisper-1', match=ClauseEquals(equals='whisper-1'), prices=ModelPrice(audio_hours=Decimal('0.36'))),
        ModelInfo(id='tts-1-hd', match=ClauseEquals(equals='tts-1-hd'), prices=ModelPrice(input_mchars=Decimal('30'))),
        ModelInfo(id='gpt-3.5-turbo-0125', match=ClauseEquals(equals='gpt-3.5-turbo-0125'), prices=ModelPrice(input_mtok=Decimal('0.5'), output_mtok=Decimal('1.5'))),
        ModelInfo(id='gpt-search', match=ClauseEquals(equals='gpt-search'),
                  prices=ModelPrice(input_mtok=Decimal('1'), output_mtok=Decimal('2'), web_searches_kcount=Decimal('10'), requests_kcount=Decimal('5'))),
        ModelInfo(id='gpt-live-1', match=ClauseEquals(equals='gpt-live-1'), prices=ModelPrice(audio_hours=Decimal('1.02'))),
        ModelInfo(id='gpt-oss-20b', match=ClauseEquals(equals='gpt-oss-20b'), prices=ModelPrice(input_mtok=Decimal('0.029'), output_mtok=Decimal('0.14'))),
    ]),
    Provider(id='aws', models=[
        ModelInfo(id='regional.anthropic.claude-haiku-4-5-20251001-v1:0',
                  match=ClauseOr(or_=[ClauseStartsWith(starts_with='claude-haiku-4-5-20251001'), ClauseContains(contains='eu.anthropic.claude-haiku-4-5-20251001')]),
                  prices=ModelPrice(input_mtok=Decimal('1.1'), output_mtok=Decimal('5.5'))),
        ModelInfo(id='global.anthropic.claude-sonnet-4-5-20250929-v1:0', match=ClauseContains(contains='global.anthropic.claude-sonnet-4-5-20250929'),
                  prices=ModelPrice(input_mtok=Decimal('3'), cache_write_1h_mtok=Decimal('6'), output_mtok=Decimal('15'))),
        ModelInfo(id='anthropic.claude-sonnet-4-5-20250929-v1:0', match=ClauseEquals(equals='anthropic.claude-sonnet-4-5-20250929-v1:0'),
                  prices=ModelPrice(input_mtok=Decimal('3.3'), output_mtok=Decimal('16.5'))),
        ModelInfo(id='anthropic.claude-sonnet-4-6', match=ClauseEquals(equals='anthropic.claude-sonnet-4-6'),
                  prices=[ConditionalPrice(prices=ModelPrice(input_mtok=TieredPrices(base=Decimal('3'), tiers=[Tier(start=200000, price=Decimal('6'))]), output_mtok=Decimal('15'))),
                          ConditionalPrice(constraint=StartDateConstraint(start_date=date(2026, 3, 13)),
                                           prices=ModelPrice(input_mtok=Decimal('3'), output_mtok=Decimal('15')))]),
    ]),
]
"""
LITELLM = """{
 "sample_spec": {"litellm_provider": "one of many", "input_cost_per_token": 0},
 "gpt-4o-mini": {"litellm_provider": "openai", "mode": "chat", "input_cost_per_token": 1.5e-07, "output_cost_per_token": 6e-07,
  "input_cost_per_token_batches": 7.5e-08, "output_cost_per_token_batches": 3e-07, "input_cost_per_token_priority": 9e-07},
 "o3": {"litellm_provider": "openai", "mode": "chat", "input_cost_per_token": 1e-05, "output_cost_per_token": 4e-05,
  "input_cost_per_token_flex": 5e-06},
 "text-embedding-3-small": {"litellm_provider": "openai", "mode": "embedding", "input_cost_per_token": 2e-08, "output_cost_per_token": 0.0},
 "omni-moderation-latest": {"litellm_provider": "openai", "mode": "moderation", "input_cost_per_token": 0.0, "output_cost_per_token": 0.0},
 "azure/gpt-4o": {"litellm_provider": "azure", "input_cost_per_token": 2.75e-06, "output_cost_per_token": 1.1e-05},
 "azure/global/gpt-4o": {"litellm_provider": "azure", "input_cost_per_token": 2.5e-06, "output_cost_per_token": 1e-05},
 "azure/eu/gpt-4o": {"litellm_provider": "azure", "input_cost_per_token": 2.75e-06, "output_cost_per_token": 1.1e-05,
  "input_cost_per_token_batches": 1.375e-06, "input_cost_per_token_priority": 5.5e-06, "output_cost_per_token_priority": 2.2e-05},
 "global.anthropic.claude-sonnet-4-5-20250929-v1:0": {"litellm_provider": "bedrock_converse", "input_cost_per_token": 3e-06, "output_cost_per_token": 1.5e-05,
  "cache_read_input_token_cost": 3e-07, "input_cost_per_token_above_200k_tokens": 6e-06, "output_cost_per_token_above_200k_tokens": 2.25e-05,
  "cache_read_input_token_cost_above_200k_tokens": 6e-07, "input_cost_per_token_batches": 1.5e-06, "output_cost_per_token_batches": 7.5e-06},
 "anthropic.claude-sonnet-4-5-20250929-v1:0": {"litellm_provider": "bedrock_converse", "input_cost_per_token": 3e-06, "output_cost_per_token": 1.5e-05,
  "input_cost_per_token_above_200k_tokens": 6e-06, "output_cost_per_token_above_200k_tokens": 2.25e-05},
 "anthropic.claude-sonnet-4-6": {"litellm_provider": "bedrock_converse", "input_cost_per_token": 3e-06, "output_cost_per_token": 1.5e-05,
  "input_cost_per_token_above_200k_tokens": 6e-06, "output_cost_per_token_above_200k_tokens": 2.25e-05},
 "azure/us/o3": {"litellm_provider": "azure", "input_cost_per_token": 1.1e-05, "output_cost_per_token": 4.4e-05},
 "azure/standard/1024-x-1024/dall-e-3": {"litellm_provider": "azure", "output_cost_per_image": 0.04},
 "gpt-4o-mini-tts-2025-12-15": {"litellm_provider": "openai", "mode": "audio_speech", "input_cost_per_token": 6e-07,
  "output_cost_per_token": 1e-05, "output_cost_per_audio_token": 1.2e-05},
 "gpt-image-3": {"litellm_provider": "openai", "mode": "image_generation", "input_cost_per_token": 5e-06, "output_cost_per_image_token": 3e-05,
  "input_cost_per_image_token": 8e-06, "cache_read_input_image_token_cost": 2e-06},
 "512-x-512/50-steps/canvas-v1:0": {"litellm_provider": "bedrock", "output_cost_per_image": 0.06},
 "1024-x-1024/50-steps/canvas-v1:0": {"litellm_provider": "bedrock", "output_cost_per_image": 0.06},
 "canvas-v1:0": {"litellm_provider": "bedrock", "mode": "image_generation", "output_cost_per_image": 0.06},
 "512-x-512/50-steps/diffusion": {"litellm_provider": "bedrock", "output_cost_per_image": 0.04},
 "1024-x-1024/max-steps/diffusion": {"litellm_provider": "bedrock", "output_cost_per_image": 0.08},
 "diffusion": {"litellm_provider": "bedrock", "mode": "image_generation", "output_cost_per_image": 0.04},
 "labs.embed-v1:0": {"litellm_provider": "bedrock", "mode": "embedding", "input_cost_per_query": 7e-05, "output_cost_per_token": 0.0},
 "bedrock/eu-west-2/1-month-commitment/m.m": {"litellm_provider": "bedrock", "input_cost_per_second": 0.01},
 "amazon.rerank-v1:0": {"litellm_provider": "bedrock", "mode": "rerank", "input_cost_per_query": 0.001, "input_cost_per_token": 0.0},
 "eu.anthropic.claude-haiku-4-5-20251001-v1:0": {"litellm_provider": "bedrock_converse", "input_cost_per_token": 1.1e-06,
  "output_cost_per_token": 5.5e-06, "cache_creation_input_token_cost_above_1hr": 2.2e-06},
 "broken": {"litellm_provider": "openai", "input_cost_per_token": 1.23456789e-07, "output_cost_per_token": 1e-06}
}"""


def packages(folder: Path, *, genai: str | None = GENAI, litellm: str | None = LITELLM) -> Path:
    """A folder as pip makes it, with excerpts of the two packages."""
    for name, module, file, text in (
        ("genai-prices", "genai_prices", "data.py", genai),
        ("litellm", "litellm", "model_prices_and_context_window_backup.json", litellm),
    ):
        if text is not None:
            info = folder / f"{module}-1.2.3.dist-info"
            info.mkdir(parents=True)
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2.3\n")
            (folder / module).mkdir()
            (folder / module / file).write_text(text)
    return folder


@pytest.fixture
def made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[Path, str]:
    """A catalogue made by the command, and what it said of it."""
    (tmp_path / "qlens.yaml").write_text(FRESH % "")
    out, folder = tmp_path / "made.json", packages(tmp_path / "packages")
    words = ["prices", "update", "-c", str(tmp_path / "qlens.yaml"), "--packages", str(folder), "--out", str(out)]
    assert main(words) == 0
    return out, capsys.readouterr().err


def test_a_catalogue_is_made_of_what_two_packages_say(made: tuple[Path, str]) -> None:
    out, said = made
    catalogue = Catalogue.read(out)
    assert catalogue.sources == ("genai-prices 1.2.3", "litellm 1.2.3")

    def rows(kind: str, model: str, region: str | None = None) -> dict[str, dict[str, str]]:
        return {
            f"{row.valid_from or ''}{row.above_prompt_tokens or ''}{row.tier or ''}": {
                name: str(price) for name in BUCKETS if (price := getattr(row, name)) is not None
            }
            for row in catalogue.find(kind, model, region)
        }

    mini = {
        "": {"input": "0.15", "cached_input": "0.075", "output": "0.6"},
        "priority": {"input": "0.25", "cached_input": "0.075", "output": "1"},
        "batch": {"input": "0.075", "cached_input": "0.075", "output": "0.3"},
    }
    assert rows("openai", "gpt-4o-mini") == mini  # the tier that only one of them has, and not the other's of the same
    del mini["batch"]
    assert rows("openai", "gpt-4o-mini-2024-07-18") == rows("azure_openai", "gpt-4o-mini") == mini
    # They differ about it: nothing of the loser's is taken, and it does not know its regions either.
    assert rows("openai", "o3") == {"": {"input": "10", "output": "40"}, "2025-06-10": {"input": "2", "output": "8"}}
    assert "the sources differ: openai/o3: input 2 by genai-prices, 10 by litellm" in said
    assert rows("azure_openai", "o3", "us") == rows("azure_openai", "o3")
    assert rows("openai", "gpt-6-sol-2026-09-01") == {
        "": {"input": "2", "output": "10"},
        "272000": {"input": "4", "output": "10"},
    }
    assert rows("azure_openai", "gpt-4o")[""]["input"] == "2.5"
    # Of its batches one price is known: the other would be the standard one, and look as if it were known.
    assert rows("azure_openai", "gpt-4o", "eu") == {
        "": {"input": "2.75", "output": "11"},
        "priority": {"input": "5.5", "output": "22"},
    }
    assert rows("azure_openai", "o3-mini")[""]["cached_input"] == "0.55"
    # Long prompts that one of them alone has are taken where they agree, and where the other never had any.
    assert rows("bedrock", "global.anthropic.claude-sonnet-4-5-20250929-v1:0") == {
        "": {"input": "3", "cached_input": "0.3", "cache_write_1h": "6", "output": "15"},
        "batch": {"input": "1.5", "cached_input": "0.3", "cache_write_1h": "6", "output": "7.5"},
        "200000": {"input": "6", "cached_input": "0.6", "cache_write_1h": "6", "output": "22.5"},
    }
    assert rows("bedrock", "anthropic.claude-sonnet-4-5-20250929-v1:0") == {"": {"input": "3.3", "output": "16.5"}}
    assert set(rows("bedrock", "anthropic.claude-sonnet-4-6")) == {"", "200000", "2026-03-13"}
    only = "prompts of more than 200000 tokens have prices by litellm alone"
    assert f"16.5 by genai-prices, 15 by litellm; {only}" in said
    assert f"the sources differ: bedrock/anthropic.claude-sonnet-4-6: {only}" in said
    haiku = {"": {"input": "1.1", "output": "5.5", "cache_write_1h": "2.2"}}
    assert rows("bedrock", "eu.anthropic.claude-haiku-4-5-20251001-v1:0") == haiku
    assert rows("bedrock", "anthropic.claude-haiku-4-5-20251001-v1:0")[""] == {"input": "1.1", "output": "5.5"}
    assert rows("openai", "text-embedding-3-small") == {"": {"input": "0.02"}}
    assert rows("openai", "omni-moderation-latest") == {"": {"input": "0", "output": "0"}}
    assert catalogue.find("bedrock", "amazon.rerank-v1:0")[0].meters == {"queries": Decimal("0.001")}
    assert catalogue.find("openai", "whisper-1")[0].meters == {"seconds": Decimal("0.0001")}
    for model in ("gpt-oss-20b", "gpt-live-1", "broken", "dall-e-3"):
        assert not catalogue.find("openai", model), model
    assert "no exact price: litellm: openai/broken: input: 0.123456789 USD per million tokens" in said
    assert "no exact price: genai-prices: openai/gpt-live-1: seconds" in said


def test_what_is_billed_beside_tokens_comes_over_by_its_meter(made: tuple[Path, str]) -> None:
    catalogue = Catalogue.read(made[0])

    def only(kind: str, model: str) -> dict[str, str]:
        (row,) = catalogue.find(kind, model)
        tokens = {name: price for name in BUCKETS if (price := getattr(row, name)) is not None}
        return {name: f"{price:f}" for name, price in {**tokens, **row.meters}.items()}

    # An answer of speech has no other tokens than those of sound.
    assert only("openai", "gpt-4o-mini-tts-2025-12-15") == {"input": "0.6", "output": "12"}
    pictures = {"image_tokens": "0.000008", "cached_image_tokens": "0.000002"}
    assert only("openai", "gpt-image-3") == {"input": "5", "output": "30", **pictures}
    # One price for all sizes is a price; several are none, since no usage tells the size.
    assert only("bedrock", "canvas-v1:0") == {"images": "0.06"}
    assert not catalogue.find("bedrock", "diffusion")
    assert only("bedrock", "labs.embed-v1:0") == {"requests": "0.00007"}
    both = {"input": "1", "output": "2"}
    assert only("openai", "gpt-search") == {**both, "web_searches": "0.01", "requests": "0.005"}
    assert only("azure_openai", "gpt-search") == {**both, "requests": "0.005"}
    for ours, azure in (("whisper-1", "whisper"), ("tts-1-hd", "tts-hd"), ("gpt-3.5-turbo-0125", "gpt-35-turbo-0125")):
        assert only("azure_openai", azure) == only("azure_openai", ours) == only("openai", ours)


@pytest.mark.parametrize(
    ("target", "usage", "amount"),
    [
        (azure("whisper"), Usage(meters={"seconds": 60}), 6_000_000_000),
        (azure("tts"), Usage(meters={"characters": 1000}), 15_000_000_000),
        (azure("tts-hd"), Usage(meters={"characters": 1000}), 30_000_000_000),
        (openai("gpt-4o-mini-tts-2025-12-15"), Usage(output=1000), 12_000_000_000),
        (openai("gpt-4o-mini-transcribe"), Usage(meters={"seconds": 60}), 3_000_000_000),
        (bedrock("amazon.nova-canvas-v1:0"), Usage(meters={"images": 1}), 60_000_000_000),
        (bedrock("us.amazon.nova-canvas-v1:0"), Usage(meters={"images": 1}), 60_000_000_000),
        (bedrock("stability.sd3-5-large-v1:0"), Usage(meters={"images": 1}), 80_000_000_000),
        (bedrock("us.cohere.embed-v4:0"), Usage(input=1000), 120_000_000),
        (bedrock("twelvelabs.marengo-embed-3-0-v1:0"), Usage(input=8, meters={}), 70_000_000),
        (openai("gpt-5"), Usage(input=1000, meters={"web_searches": 2}), 21_250_000_000),
        (Target("claude", "claude-haiku-4-5", "public", kind="anthropic"), Usage(meters={"web_searches": 1}), 10**10),
    ],
)
def test_pictures_speech_searches_and_requests_have_prices(target: Target, usage: Usage, amount: int) -> None:
    cost = cost_of(prices(), target, usage)
    assert cost is not None
    assert (cost.picos, cost.state) == (amount, "exact")


def test_a_catalogue_of_ones_own_takes_the_place_of_the_shipped_one(made: tuple[Path, str]) -> None:
    plugin = prices(more=f"catalogue_file: {made[0]}\n")
    assert picos(plugin, openai("gpt-6-sol"), Usage(input=1)) == 2_000_000
    assert cost_of(plugin, openai("gpt-5"), Usage(input=1)) is None


def test_one_package_is_enough_and_none_is_told_how_to_get_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "qlens.yaml").write_text(FRESH % "")
    words = ["prices", "update", "-c", str(tmp_path / "qlens.yaml"), "--packages"]
    assert main([*words, str(packages(tmp_path / "one", litellm=None))]) == 0
    assert [source["package"] for source in json.loads(capsys.readouterr().out)["sources"]] == ["genai-prices"]
    assert main([*words, str(packages(tmp_path / "other", genai=None))]) == 0
    assert [source["package"] for source in json.loads(capsys.readouterr().out)["sources"]] == ["litellm"]
    assert main([*words, str(tmp_path / "nowhere")]) == 2
    assert "pip install --no-deps --target" in capsys.readouterr().err
    assert main([*words, str(packages(tmp_path / "odd", genai="import os\nproviders: list = os.environ\n"))]) == 2
    assert "genai-prices 1.2.3: cannot read" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"entries": []}',
        '{"date": "2026-11-28", "sources": [], "entries": [{"provider": "openai", "models": ["m"], "rows": [{"input": 0.1}]}]}',
        '{"date": "2026-11-28", "sources": [], "entries": [{"provider": "openai", "models": ["m"], "rows": [{"input": "x"}]}]}',
        '{"date": "2026-11-28", "sources": [], "entries": [{"provider": "openai", "models": ["m"], "rows": [{"in": "1"}]}]}',
        '{"date": "2026-11-28", "sources": [], "entries": [{"provider": "openai", "models": ["m"], "rows": [{"input": "NaN"}]}]}',
        '{"date": "2026-11-28", "sources": [], "entries": ["m"]}',
    ],
)
def test_a_file_that_is_no_catalogue_is_refused_and_named(tmp_path: Path, text: str) -> None:
    file = tmp_path / "mine.json"
    file.write_text(text)
    with pytest.raises(StartupError, match=r"mine\.json: no price catalogue"):
        prices(more=f"catalogue_file: {file}\n").book.find(openai("m"), NOW)
